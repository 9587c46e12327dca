#include "packed_experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace kt {
namespace {

int64_t element_bytes(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

}  // namespace

PackedExperts::PackedExperts(const PackedLayout& layout) : layout_(layout) {
  layout.check();
  for (size_t i = 0; i < kSectionCount; ++i)
    if (const int64_t bytes = layout.section_bytes(static_cast<Section>(i))) {
      owned_[i] = LargeBuffer(static_cast<size_t>(bytes));
      memory_[i] = owned_[i].data();
    }
}

PackedExperts::PackedExperts(const PackedLayout& layout,
                             const std::array<const uint8_t*, kSectionCount>& packed)
    : layout_(layout), memory_(packed) {
  layout.check();
  for (size_t i = 0; i < kSectionCount; ++i)
    if ((layout.section_bytes(static_cast<Section>(i)) > 0) != (packed[i] != nullptr))
      throw std::invalid_argument(std::string("section ") + kSectionNames[i] +
                                  (packed[i] ? ": this format has none" : ": is missing"));
}

StoredMatrix PackedExperts::matrix(int64_t expert, Projection projection) const {
  StoredMatrix m{layout_, expert, projection, {}};
  for (size_t i = 0; i < kSectionCount; ++i)
    if (memory_[i])
      m.sections[i] =
          memory_[i] + layout_.matrix_offset(static_cast<Section>(i), expert, projection);
  return m;
}

WritableMatrix PackedExperts::writable_matrix(int64_t expert, Projection projection) const {
  WritableMatrix m{layout_, expert, projection, {}};
  if (!owned_[0].data()) throw std::invalid_argument("these packed experts are read only");
  for (size_t i = 0; i < kSectionCount; ++i)
    if (uint8_t* data = owned_[i].data())
      m.sections[i] = data + layout_.matrix_offset(static_cast<Section>(i), expert, projection);
  return m;
}

const float* PackedExperts::scales(int64_t expert, Projection projection) const {
  if (layout_.is_float()) return nullptr;
  return reinterpret_cast<const float*>(
      section(Section::kScales) + layout_.matrix_offset(Section::kScales, expert, projection));
}

const float* PackedExperts::bias(int64_t expert, Projection projection) const {
  if (!layout_.biased[static_cast<size_t>(projection)]) return nullptr;
  return reinterpret_cast<const float*>(
      section(Section::kBiases) + layout_.matrix_offset(Section::kBiases, expert, projection));
}

void PackedExperts::pack(ThreadPool& pool, const KernelTable& kernels, int64_t expert,
                         Projection projection, FloatType type, const void* weight,
                         int64_t row_stride) {
  const WeightForm& form = layout_.form();
  if (!form.takes_floats())
    throw std::invalid_argument("pack: these experts keep published codes; use pack_codes");
  const WritableMatrix matrix = writable_matrix(expert, projection);
  const int64_t n_real = matrix.outputs(), k_real = matrix.inputs(), k_blocks = matrix.blocks();
  const int64_t units_per_block = layout_.tile_bytes() / (kPanelCols * 4);
  // A line more than the row: at a power of two, all channels would share a few sets of the cache.
  const int64_t units_per_row = k_blocks * units_per_block + 16;
  const int64_t channels = form.interleaved();
  const char* source = static_cast<const char*>(weight);
  pool.run(matrix.panels(), [&](int64_t i, int) {
    ChannelBuffers channel(k_blocks * kBlock);
    std::vector<uint32_t> units(static_cast<size_t>(kPanelCols * units_per_row));
    for (int64_t j = 0; j < kPanelCols; ++j) {
      const int64_t n = i * kPanelCols + j;
      if (n < n_real) {
        kernels.to_float_row(k_real, type, source + n * row_stride * element_bytes(type),
                             channel.values.data());
        if (!std::isfinite(kernels.absmax_row(k_real, channel.values.data()))) {
          size_t k = 0;
          while (std::isfinite(channel.values[k])) ++k;
          refuse("weights", matrix, channel.values[k],
                 std::to_string(n) + ", " + std::to_string(k));
        }
      } else {
        std::fill(channel.values.begin(), channel.values.end(), 0.0f);
      }
      form.pack_channel(kernels, matrix, n, channel, units.data() + j * units_per_row);
    }
    uint32_t* out = reinterpret_cast<uint32_t*>(tile_of(matrix, layout_.tile_bytes(), i, 0));
    for (int64_t b = 0; b < k_blocks; ++b)
      for (int64_t first = 0; first < kPanelCols; first += channels)
        for (int64_t u = 0; u < units_per_block; ++u)
          for (int64_t j = 0; j < channels; ++j)
            *out++ =
                units[static_cast<size_t>((first + j) * units_per_row + b * units_per_block + u)];
  });
}

void PackedExperts::pack_codes(ThreadPool& pool, int64_t expert, Projection projection,
                               const uint8_t* codes, int64_t row_stride, const void* scales,
                               const uint8_t* zeros) {
  process_.require_owner();
  const WeightForm& form = layout_.form();
  const CodeKind kind = form.code_kind(layout_);
  const WritableMatrix matrix = writable_matrix(expert, projection);
  const PublishedCodes published{codes, row_stride, scales, zeros};
  form.pack_scales(matrix, published);
  const int64_t n_real = matrix.outputs(), k_real = matrix.inputs();
  const int64_t tile_bytes = layout_.tile_bytes();
  // Padding is worth zero: by its code here, by its scale where a zero point moves that.
  const uint8_t nothing = kind == CodeKind::kUint8 ? 128 : kind == CodeKind::kUint4 ? 8 : 0;
  pool.run(matrix.panels(), [&](int64_t i, int) {
    for (int64_t b = 0; b < matrix.blocks(); ++b) {
      uint8_t* tile = tile_of(matrix, tile_bytes, i, b);
      std::memset(tile, is_four_bit(kind) ? nothing | nothing << 4 : nothing,
                  static_cast<size_t>(tile_bytes));
      for (int64_t j = 0; j < kPanelCols && i * kPanelCols + j < n_real; ++j) {
        const int64_t n = i * kPanelCols + j, first = b * kBlock;
        const int64_t width = std::min(kBlock, k_real - first);
        std::array<uint8_t, kBlock> row;
        std::memcpy(row.data(), codes + n * row_stride + first, static_cast<size_t>(width));
        if (width < kBlock)
          std::fill(row.begin() + width, row.end(),
                    form.padding_code(matrix, n, published, nothing));
        if (kind == CodeKind::kE4m3)
          for (int64_t k = 0; k < width; ++k)
            if ((row[static_cast<size_t>(k)] & 0x7f) == 0x7f)
              refuse("weights", matrix, from_bits(0x7fc00000),
                     std::to_string(n) + ", " + std::to_string(first + k));
        form.place_codes(layout_, row, j, tile);
      }
    }
  });
}

void PackedExperts::set_bias(int64_t expert, Projection projection, const float* bias) {
  process_.require_owner();
  if (!layout_.biased[static_cast<size_t>(projection)])
    throw std::invalid_argument(std::string("bias: these experts were laid out without one for ") +
                                kProjectionNames[static_cast<size_t>(projection)]);
  const WritableMatrix matrix = writable_matrix(expert, projection);
  for (int64_t n = 0; n < matrix.outputs(); ++n)
    if (!std::isfinite(bias[n])) refuse("bias", matrix, bias[n], std::to_string(n));
  std::copy_n(bias, matrix.outputs(), reinterpret_cast<float*>(matrix.in(Section::kBiases)));
}

void PackedExperts::take_channels(ThreadPool& pool, const PackedExperts& from, int64_t first) {
  process_.require_owner();
  PackedLayout expected = from.layout_;
  expected.intermediate = layout_.intermediate;
  expected.biased = layout_.biased;  // down's is on one part only
  if (!layout_.same_as(expected) || first < 0 ||
      first + layout_.intermediate > from.layout_.intermediate)
    throw std::invalid_argument("take_channels: the experts differ in more than their channels");
  const bool whole = first == 0 && layout_.intermediate == from.layout_.intermediate;
  const int64_t granule = from.layout_.channel_granule();
  if (!whole && first % granule)
    throw std::invalid_argument("take_channels: channel " + std::to_string(first) +
                                " is inside a group of " + std::to_string(granule));
  const int64_t tile = layout_.tile_bytes(), matrices = layout_.projections();
  pool.run(layout_.experts * matrices, [&](int64_t item, int) {
    const int64_t expert = item / matrices;
    const Projection p = static_cast<Projection>(item % matrices + (kProjectionCount - matrices));
    const WritableMatrix to = writable_matrix(expert, p);
    const StoredMatrix source = from.matrix(expert, p);
    const bool down = p == Projection::kDown;
    const int64_t output = down ? 0 : first, input = down ? first : 0;
    for (int64_t i = 0; i < to.panels(); ++i)
      std::memcpy(tile_of(to, tile, i, 0),
                  tile_of(source, tile, output / kPanelCols + i, input / kBlock),
                  static_cast<size_t>(to.blocks() * tile));
    layout_.form().take_rest(to, source, output, input);
    if (from.bias(expert, p) && layout_.biased[static_cast<size_t>(p)])
      std::copy_n(from.bias(expert, p) + output, to.outputs(),
                  reinterpret_cast<float*>(to.in(Section::kBiases)));
  });
}

void PackedExperts::take_experts(ThreadPool& pool, const PackedExperts& from,
                                 const std::vector<int64_t>& chosen) {
  process_.require_owner();
  PackedLayout expected = from.layout_;
  expected.experts = static_cast<int64_t>(chosen.size());
  if (!layout_.same_as(expected))
    throw std::invalid_argument("take_experts: the experts differ in more than their number");
  for (const int64_t expert : chosen)
    if (expert < 0 || expert >= from.layout_.experts)
      throw std::invalid_argument("take_experts: got expert " + std::to_string(expert) +
                                  ", expected 0 to " + std::to_string(from.layout_.experts - 1));
  if (!owned_[0].data()) throw std::invalid_argument("these packed experts are read only");
  // A section holds its experts one after the other, and padding after the last.
  pool.run(static_cast<int64_t>(chosen.size()), [&](int64_t expert, int) {
    for (size_t i = 0; i < kSectionCount; ++i) {
      const Section s = static_cast<Section>(i);
      const int64_t bytes = layout_.expert_bytes(s);
      if (!bytes) continue;
      std::memcpy(owned_[i].data() + expert * bytes,
                  from.section(s) + chosen[static_cast<size_t>(expert)] * bytes,
                  static_cast<size_t>(bytes));
    }
  });
}

void PackedExperts::unpack(int64_t expert, Projection projection, float* weight) const {
  process_.require_owner();
  const StoredMatrix from = matrix(expert, projection);
  const WeightForm& form = layout_.form();
  for (int64_t n = 0; n < from.outputs(); ++n)
    for (int64_t k = 0; k < from.inputs(); ++k) *weight++ = form.weight(from, n, k);
}

}  // namespace kt
