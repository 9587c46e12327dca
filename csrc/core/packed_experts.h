// The frozen weights of one MoE layer in host memory, packed for the kernels: one copy that serves
// forward and backward.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "../formats/weight_form.h"
#include "memory.h"
#include "packed_layout.h"
#include "thread_pool.h"

namespace kt {

class PackedExperts {
 public:
  // In memory of its own, zero-filled.
  explicit PackedExperts(const PackedLayout& layout);
  // Over memory that was packed before and outlives this; null where a section is empty. Read only.
  PackedExperts(const PackedLayout& layout,
                const std::array<const uint8_t*, kSectionCount>& packed);

  // Without memory: to ask what a call on such experts would take.
  static PackedExperts outline(const PackedLayout& layout) { return PackedExperts(layout, {}, 0); }

  const PackedLayout& layout() const { return layout_; }
  // Throws ForkedProcess where memory of its own is not mapped.
  void require_owner() const { process_.require_owner(); }
  const uint8_t* section(Section s) const { return memory_[static_cast<size_t>(s)]; }

  // Packs `weight` [outputs, inputs], rows `row_stride` elements apart, as one expert's projection;
  // not for coded formats. Throws std::invalid_argument when the weights have NaN or Inf.
  void pack(ThreadPool& pool, const KernelTable& kernels, int64_t expert, Projection projection,
            FloatType type, const void* weight, int64_t row_stride);
  // Packs codes [outputs, inputs], one byte each, with scales and zero points [groups along the
  // inputs][groups along the outputs]; for coded formats, and int8 (codes q + 128, fp32 scales
  // [outputs]). Throws std::invalid_argument for codes of NaN and scales of NaN or Inf.
  void pack_codes(ThreadPool& pool, int64_t expert, Projection projection, const uint8_t* codes,
                  int64_t row_stride, const void* scales, const uint8_t* zeros);
  // The weights the kernels compute with, as fp32 [outputs, inputs] contiguous.
  void unpack(int64_t expert, Projection projection, float* weight) const;
  // Adds `bias` [outputs] to the projection's output; the layout must have it. Throws
  // std::invalid_argument when it has NaN or Inf.
  void set_bias(int64_t expert, Projection projection, const float* bias);
  // Copies the intermediate channels from `first` on out of experts in the same format. `first`
  // must be a multiple of 64 and of the format's groups.
  void take_channels(ThreadPool& pool, const PackedExperts& from, int64_t first);
  // Copies experts, one for each of these, out of experts of the same sizes and format.
  void take_experts(ThreadPool& pool, const PackedExperts& from,
                    const std::vector<int64_t>& chosen);

  // One matrix, to be read by its form.
  StoredMatrix matrix(int64_t expert, Projection projection) const;
  // One scale per output channel, padded with zeros; null for formats without.
  const float* scales(int64_t expert, Projection projection) const;
  // One bias per output channel, padded with zeros; null where the layout has none.
  const float* bias(int64_t expert, Projection projection) const;

 private:
  PackedExperts(const PackedLayout& layout, const std::array<const uint8_t*, kSectionCount>& packed,
                int)
      : layout_(layout), memory_(packed) {}
  // Throws std::invalid_argument over memory that was packed before.
  WritableMatrix writable_matrix(int64_t expert, Projection projection) const;

  const PackedLayout layout_;
  const ProcessGuard process_;
  std::array<LargeBuffer, kSectionCount> owned_;
  std::array<const uint8_t*, kSectionCount> memory_{};
};

}  // namespace kt
