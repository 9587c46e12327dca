// The frozen weights of one MoE layer in host memory, packed for the kernels: one copy that serves
// forward and backward.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "../kernels/kernel_table.h"
#include "memory.h"
#include "thread_pool.h"

namespace kt {

// int4 is in two levels: a weight is scale[n] * m(n, group) * c, m in 1..16 and c in -8..7, so that
// m * c is an int8 weight and both directions need only the scale of the output channel.
enum class WeightFormat : int { kInt8 = 0, kBf16, kInt4Group32, kInt4Group128 };
enum class Projection : int { kGate = 0, kUp = 1, kDown = 2 };
constexpr int kProjectionCount = 3;

inline int64_t padded(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

class PackedExperts {
 public:
  // Without a gate, h = act(up) and there is no gate projection.
  PackedExperts(int64_t experts, int64_t hidden, int64_t intermediate, WeightFormat format,
                bool gated);

  int64_t experts() const { return experts_; }
  int64_t hidden() const { return hidden_; }
  int64_t intermediate() const { return intermediate_; }
  int64_t hidden_padded() const { return padded(hidden_); }
  int64_t intermediate_padded() const { return padded(intermediate_); }
  WeightFormat format() const { return format_; }
  bool gated() const { return gated_; }
  bool is_bf16() const { return format_ == WeightFormat::kBf16; }
  bool is_int4() const { return int4_group() > 0; }

  // Outputs and inputs of a projection, unpadded: gate and up [F, D], down [D, F].
  int64_t outputs(Projection p) const { return p == Projection::kDown ? hidden_ : intermediate_; }
  int64_t inputs(Projection p) const { return p == Projection::kDown ? intermediate_ : hidden_; }

  // Packs `weight` [outputs, inputs], rows `row_stride` elements apart, as one expert's projection.
  // Throws std::invalid_argument when the weights have NaN or Inf.
  void pack(ThreadPool& pool, const KernelTable& kernels, int64_t expert, Projection projection,
            FloatType type, const void* weight, int64_t row_stride);
  // The weights the kernels compute with, as fp32 [outputs, inputs] contiguous.
  void unpack(int64_t expert, Projection projection, float* weight) const;
  // Adds `bias` [outputs] to the projection's output from now on. Throws std::invalid_argument when
  // it has NaN or Inf.
  void set_bias(int64_t expert, Projection projection, const float* bias);

  // Super tiles [outputs / 32][inputs / 64] of a projection.
  const uint8_t* tiles(int64_t expert, Projection projection) const;
  // One scale per output channel, padded with zeros; null for bf16.
  const float* scales(int64_t expert, Projection projection) const;
  // One bias per output channel, padded with zeros; null where none was set.
  const float* bias(int64_t expert, Projection projection) const;
  // The multipliers of 16 outputs (half h of panel i) in block b of 64 inputs, for its k < 32 and
  // k >= 32.
  std::array<const uint8_t*, 2> multipliers(int64_t expert, Projection projection, int64_t i,
                                            int64_t b, int64_t h) const;
  int64_t tile_bytes() const {
    return is_bf16() ? kTileBytesBf16 : is_int4() ? kTileBytesInt4 : kTileBytesInt8;
  }
  int64_t bytes() const {
    return static_cast<int64_t>(weights_.size() + multipliers_.size() + scales_.size() +
                                biases_.size());
  }

 private:
  int64_t int4_group() const {
    return format_ == WeightFormat::kInt4Group32    ? 32
           : format_ == WeightFormat::kInt4Group128 ? 128
                                                    : 0;
  }
  int64_t projections() const { return gated_ ? 3 : 2; }
  int64_t slot(Projection p) const { return static_cast<int64_t>(p) - (gated_ ? 0 : 1); }
  int64_t matrix_bytes() const;
  int64_t matrix_multipliers() const;
  int64_t channels() const;
  int64_t first_channel(int64_t expert, Projection projection) const;
  int64_t multiplier_offset(Projection projection, int64_t i, int64_t b, int64_t h) const;
  uint8_t* mutable_tiles(int64_t expert, Projection projection) const;
  uint8_t* mutable_multipliers(int64_t expert, Projection projection) const;

  struct PanelBuffers;
  // Channel n, in panel.values, as units of 4 bytes in the order of k; its scale and multipliers go
  // where they belong.
  void quantize_row(const KernelTable& kernels, PanelBuffers& panel, int64_t expert,
                    Projection projection, int64_t n, uint32_t* units) const;

  const int64_t experts_, hidden_, intermediate_;
  const WeightFormat format_;
  const bool gated_;
  const ProcessGuard process_;
  LargeBuffer weights_, multipliers_, scales_, biases_;
  std::array<bool, kProjectionCount> has_bias_{};
};

}  // namespace kt
