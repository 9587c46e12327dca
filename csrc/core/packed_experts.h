// The frozen weights of one MoE layer in host memory, packed for the kernels: one copy that serves
// forward and backward.
#pragma once

#include <cstdint>
#include <string>

#include "../kernels/kernel_table.h"
#include "memory.h"
#include "thread_pool.h"

namespace kt {

enum class WeightFormat : int { kInt8 = 0, kBf16 = 1 };
enum class Projection : int { kGate = 0, kUp = 1, kDown = 2 };
constexpr int kProjectionCount = 3;

inline int64_t padded(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

class PackedExperts {
 public:
  PackedExperts(int64_t experts, int64_t hidden, int64_t intermediate, WeightFormat format);

  int64_t experts() const { return experts_; }
  int64_t hidden() const { return hidden_; }
  int64_t intermediate() const { return intermediate_; }
  int64_t hidden_padded() const { return padded(hidden_); }
  int64_t intermediate_padded() const { return padded(intermediate_); }
  WeightFormat format() const { return format_; }

  // Outputs and inputs of a projection, unpadded: gate and up [F, D], down [D, F].
  int64_t outputs(Projection p) const { return p == Projection::kDown ? hidden_ : intermediate_; }
  int64_t inputs(Projection p) const { return p == Projection::kDown ? intermediate_ : hidden_; }

  // Packs `weight` [outputs, inputs], rows `row_stride` elements apart, as one expert's projection.
  // Throws std::invalid_argument when the weights have NaN or Inf.
  void pack(ThreadPool& pool, const KernelTable& kernels, int64_t expert, Projection projection,
            FloatType type, const void* weight, int64_t row_stride);
  // The weights the kernels compute with, as fp32 [outputs, inputs] contiguous.
  void unpack(int64_t expert, Projection projection, float* weight) const;

  // Super tiles [outputs / 32][inputs / 64] of a projection.
  const uint8_t* tiles(int64_t expert, Projection projection) const;
  // One scale per output channel, padded with zeros; null for bf16.
  const float* scales(int64_t expert, Projection projection) const;
  int64_t tile_bytes() const {
    return format_ == WeightFormat::kInt8 ? kTileBytesInt8 : kTileBytesBf16;
  }
  int64_t bytes() const { return static_cast<int64_t>(weights_.size() + scales_.size()); }

 private:
  int64_t matrix_bytes() const;
  uint8_t* mutable_tiles(int64_t expert, Projection projection) const;
  float* mutable_scales(int64_t expert, Projection projection) const;

  const int64_t experts_, hidden_, intermediate_;
  const WeightFormat format_;
  const ProcessGuard process_;
  LargeBuffer weights_, scales_;
};

}  // namespace kt
