#include "packed_experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace kt {
namespace {

const char* const kProjectionNames[] = {"gate_proj", "up_proj", "down_proj"};

int64_t element_bytes(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

// Offset of weight (n, k) within its 32 x 64 super tile, in elements of the format.
int64_t int8_index(int64_t n, int64_t k) { return n / 16 * 1024 + k / 4 * 64 + n % 16 * 4 + k % 4; }
int64_t bf16_index(int64_t n, int64_t k) { return k / 2 * 64 + n * 2 + k % 2; }
// The byte that holds weights (n, k) and (n, k + 32), k < 32.
int64_t int4_index(int64_t n, int64_t k) { return n / 16 * 512 + k / 4 * 64 + n % 16 * 4 + k % 4; }

[[noreturn]] void refuse(const char* what, int64_t expert, Projection projection, float value,
                         const std::string& where) {
  throw std::invalid_argument(
      std::string(what) + ": " + kProjectionNames[static_cast<int>(projection)] + " of expert " +
      std::to_string(expert) + " has " + std::to_string(value) + " at [" + where + "]");
}

// The byte of an 8-bit coded tile that holds weight (n, k); of a 4-bit one, (n, k) and (n, k + 32).
int64_t code_index(int64_t n, int64_t k) { return k / 2 * 64 + n * 2 + k % 2; }

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude < 0x400)
    return std::copysign(static_cast<float>(magnitude) * 0x1p-24f, from_bits(sign | 0x3f800000));
  return from_bits(sign | ((magnitude << 13) + (112u << 23)));
}

// Written apart from the kernels' vectors, so that each checks the other.
float code_value(CodeKind kind, int code) {
  switch (kind) {
    case CodeKind::kUint8:
    case CodeKind::kUint4:
      return static_cast<float>(code);
    case CodeKind::kE4m3: {
      const int exponent = code >> 3 & 15, mantissa = code & 7;
      const float value = exponent ? std::ldexp(static_cast<float>(8 + mantissa), exponent - 10)
                                   : std::ldexp(static_cast<float>(mantissa), -9);
      return code & 0x80 ? -value : value;
    }
    case CodeKind::kE2m1: {
      static const float kLevels[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
      return code & 8 ? -kLevels[code & 7] : kLevels[code & 7];
    }
  }
  return 0.0f;
}

// Puts 64 codes of output j into their places of a tile, in units of as many as lie together.
void place_codes(const std::array<uint8_t, kBlock>& row, bool int8, bool four_bit, int64_t j,
                 uint8_t* tile) {
  if (int8) {
    for (int64_t k4 = 0; k4 < 16; ++k4) std::memcpy(tile + int8_index(j, 4 * k4), &row[4 * k4], 4);
    return;
  }
  for (int64_t k2 = 0; k2 < (four_bit ? 16 : 32); ++k2) {
    uint16_t unit, high = 0;
    std::memcpy(&unit, &row[2 * k2], 2);
    if (four_bit) std::memcpy(&high, &row[2 * k2 + 32], 2);
    if (four_bit) unit = static_cast<uint16_t>((unit & 0x0f0f) | (high & 0x0f0f) << 4);
    std::memcpy(tile + code_index(j, 2 * k2), &unit, 2);
  }
}

float default_zero(CodeKind kind) {
  return kind == CodeKind::kUint8 ? 128.0f : kind == CodeKind::kUint4 ? 8.0f : 0.0f;
}

float rounded_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
}

}  // namespace

// The 32 output channels of a panel on their way into the tiles: each a row of units of 4 bytes,
// which the tiles hold side by side for all channels.
struct PackedExperts::PanelBuffers {
  PanelBuffers(int64_t width, int64_t units_per_row)
      : values(static_cast<size_t>(width)),
        quantized(static_cast<size_t>(width)),
        multipliers(static_cast<size_t>(width / 32)),
        units(static_cast<size_t>(kPanelCols * units_per_row)) {}
  std::vector<float> values;         // of one channel, padded
  std::vector<uint8_t> quantized;    // int4: one byte each
  std::vector<uint8_t> multipliers;  // int4
  std::vector<uint32_t> units;       // [32][units_per_row], each row with room at its end
};

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

uint8_t* PackedExperts::writable(Section section) const {
  uint8_t* data = owned_[static_cast<size_t>(section)].data();
  if (!data) throw std::invalid_argument("these packed experts are read only");
  return data;
}

uint8_t* PackedExperts::mutable_tiles(int64_t expert, Projection projection) const {
  return writable(Section::kTiles) + layout_.matrix(expert, projection) * layout_.matrix_bytes();
}

uint8_t* PackedExperts::mutable_multipliers(int64_t expert, Projection projection) const {
  return writable(Section::kMultipliers) +
         layout_.matrix(expert, projection) * layout_.matrix_multipliers();
}

float* PackedExperts::mutable_scales(int64_t expert, Projection projection) const {
  return reinterpret_cast<float*>(writable(Section::kScales)) +
         layout_.first_channel(expert, projection);
}

const uint8_t* PackedExperts::tiles(int64_t expert, Projection projection) const {
  return section(Section::kTiles) + layout_.matrix(expert, projection) * layout_.matrix_bytes();
}

const float* PackedExperts::scales(int64_t expert, Projection projection) const {
  if (layout_.is_float()) return nullptr;
  return reinterpret_cast<const float*>(section(Section::kScales)) +
         layout_.first_channel(expert, projection);
}

const float* PackedExperts::bias(int64_t expert, Projection projection) const {
  if (!layout_.biased[static_cast<size_t>(projection)]) return nullptr;
  return reinterpret_cast<const float*>(section(Section::kBiases)) +
         layout_.first_channel(expert, projection);
}

std::array<const uint8_t*, 2> PackedExperts::multipliers(int64_t expert, Projection projection,
                                                         int64_t i, int64_t b, int64_t h) const {
  const uint8_t* first = section(Section::kMultipliers) +
                         layout_.matrix(expert, projection) * layout_.matrix_multipliers() +
                         layout_.multiplier_offset(projection, i, b, h);
  return {first, layout_.format == WeightFormat::kInt4Group32 ? first + 16 : first};
}

void PackedExperts::read_scales(int64_t first, int64_t count, float* out) const {
  const uint8_t* scales = section(Section::kScales);
  switch (layout_.coding.scale_type) {
    case ScaleType::kFloat32:
      std::copy_n(reinterpret_cast<const float*>(scales) + first, count, out);
      return;
    case ScaleType::kBfloat16: {
      const uint16_t* halves = reinterpret_cast<const uint16_t*>(scales) + first;
      for (int64_t i = 0; i < count; ++i)
        out[i] = from_bits(static_cast<uint32_t>(halves[i]) << 16);
      return;
    }
    case ScaleType::kFloat16: {
      const uint16_t* halves = reinterpret_cast<const uint16_t*>(scales) + first;
      for (int64_t i = 0; i < count; ++i) out[i] = half_to_float(halves[i]);
      return;
    }
    case ScaleType::kE8m0:  // 2^(byte - 127); the least one is subnormal
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t exponent = scales[first + i];
        out[i] = from_bits(exponent ? exponent << 23 : 0x00400000);
      }
      return;
  }
}

float PackedExperts::code_scale(int64_t index) const {
  float scale = 0.0f;
  read_scales(index, 1, &scale);
  return scale;
}

float PackedExperts::code_zero(int64_t index) const {
  return layout_.coding.zeros ? section(Section::kZeros)[index] : default_zero(layout_.coding.kind);
}

void PackedExperts::code_scales(int64_t expert, Projection projection, int64_t i, int64_t b,
                                CodeScales& out) const {
  const Coding& coding = layout_.coding;
  const int64_t groups = layout_.output_groups(projection);
  const int64_t first = layout_.first_scale(expert, projection);
  const int64_t real = std::min(kPanelCols, layout_.outputs(projection) - i * kPanelCols);
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t k = b * kBlock + half * 32;
    const int64_t group = k / coding.group_inputs;
    if (half && group == b * kBlock / coding.group_inputs) {
      std::copy_n(out.scale[0], 64, out.scale[1]);
      std::copy_n(out.zero[0], 64, out.zero[1]);
      continue;
    }
    const bool past = k >= layout_.inputs(projection);
    const int64_t n0 = i * kPanelCols, row = first + group * groups;
    const int64_t count = past ? 0 : real;
    std::array<float, kPanelCols> scale{}, zero{};  // padding: every code is worth zero
    if (coding.group_outputs == 1) {
      read_scales(row + n0, count, scale.data());
      for (int64_t n = 0; n < count; ++n) zero[static_cast<size_t>(n)] = code_zero(row + n0 + n);
    } else {
      int64_t seen = -1;
      float s = 0.0f, z = 0.0f;
      for (int64_t n = 0; n < count; ++n) {
        const int64_t index = row + (n0 + n) / coding.group_outputs;
        if (index != seen) {
          read_scales(index, 1, &s);
          z = code_zero(index);
          seen = index;
        }
        scale[static_cast<size_t>(n)] = s;
        zero[static_cast<size_t>(n)] = z;
      }
    }
    for (size_t n = 0; n < kPanelCols; ++n) {
      out.scale[half][2 * n] = out.scale[half][2 * n + 1] = scale[n];
      out.zero[half][2 * n] = out.zero[half][2 * n + 1] = zero[n];
    }
  }
}

void PackedExperts::quantize_row(const KernelTable& kernels, PanelBuffers& panel, int64_t expert,
                                 Projection projection, int64_t n, uint32_t* units) const {
  const int64_t width = static_cast<int64_t>(panel.values.size()), j = n % kPanelCols;
  if (layout_.is_bf16()) {
    kernels.to_bf16_row(width, panel.values.data(), reinterpret_cast<uint16_t*>(units));
    return;
  }
  float* scale = mutable_scales(expert, projection) + n;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(units);
  if (!layout_.is_int4()) {
    kernels.quantize_weight_row(width, panel.values.data(), bytes, scale);
    return;
  }
  const int64_t group = layout_.int4_group();
  kernels.quantize_int4_row(width, group, panel.values.data(), panel.quantized.data(),
                            panel.multipliers.data(), scale);
  uint8_t* multipliers = mutable_multipliers(expert, projection);
  for (int64_t k = 0; k < width; k += group == 32 ? 32 : 64)
    multipliers[layout_.multiplier_offset(projection, n / kPanelCols, k / kBlock, j / 16) +
                (group == 32 ? k % kBlock / 32 * 16 : 0) + j % 16] =
        panel.multipliers[static_cast<size_t>(k / group)];
  for (int64_t k = 0; k < width; k += kBlock)
    for (int64_t i = 0; i < 32; ++i) {
      const uint8_t* c = panel.quantized.data() + k + i;
      bytes[k / 2 + i] = static_cast<uint8_t>(c[0] | c[32] << 4);
    }
}

void PackedExperts::pack(ThreadPool& pool, const KernelTable& kernels, int64_t expert,
                         Projection projection, FloatType type, const void* weight,
                         int64_t row_stride) {
  if (layout_.is_coded())
    throw std::invalid_argument("pack: these experts keep published codes; use pack_codes");
  const int64_t n_real = layout_.outputs(projection), k_real = layout_.inputs(projection);
  const int64_t k_blocks = padded(k_real) / kBlock;
  const int64_t units_per_block = layout_.tile_bytes() / (kPanelCols * 4);
  // A line more than the row: at a power of two, all channels would share a few sets of the cache.
  const int64_t units_per_row = k_blocks * units_per_block + 16;
  // Integer tiles come in two halves of 16 channels.
  const int64_t channels = layout_.is_bf16() ? kPanelCols : kPanelCols / 2;
  const char* source = static_cast<const char*>(weight);
  uint8_t* tiles = mutable_tiles(expert, projection);
  pool.run(padded(n_real) / kPanelCols, [&](int64_t i, int) {
    PanelBuffers panel(k_blocks * kBlock, units_per_row);
    for (int64_t j = 0; j < kPanelCols; ++j) {
      const int64_t n = i * kPanelCols + j;
      if (n < n_real) {
        kernels.to_float_row(k_real, type, source + n * row_stride * element_bytes(type),
                             panel.values.data());
        if (!std::isfinite(kernels.absmax_row(k_real, panel.values.data()))) {
          size_t k = 0;
          while (std::isfinite(panel.values[k])) ++k;
          refuse("weights", expert, projection, panel.values[k],
                 std::to_string(n) + ", " + std::to_string(k));
        }
      } else {
        std::fill(panel.values.begin(), panel.values.end(), 0.0f);
      }
      quantize_row(kernels, panel, expert, projection, n, panel.units.data() + j * units_per_row);
    }
    uint32_t* out = reinterpret_cast<uint32_t*>(tiles + i * k_blocks * layout_.tile_bytes());
    for (int64_t b = 0; b < k_blocks; ++b)
      for (int64_t first = 0; first < kPanelCols; first += channels)
        for (int64_t u = 0; u < units_per_block; ++u)
          for (int64_t j = 0; j < channels; ++j)
            *out++ = panel.units[static_cast<size_t>((first + j) * units_per_row +
                                                     b * units_per_block + u)];
  });
}

void PackedExperts::check_code_scales(int64_t expert, Projection projection,
                                      const void* scales) const {
  const int64_t groups = layout_.is_coded() ? layout_.matrix_scales(projection) : 0;
  for (int64_t g = 0; g < groups; ++g) {
    const float scale = code_scale(layout_.first_scale(expert, projection) + g);
    const bool wrong = layout_.coding.scale_type == ScaleType::kE8m0
                           ? static_cast<const uint8_t*>(scales)[g] == 255
                           : !std::isfinite(scale);
    if (wrong) refuse("scales", expert, projection, scale, std::to_string(g));
  }
}

void PackedExperts::pack_codes(ThreadPool& pool, int64_t expert, Projection projection,
                               const uint8_t* codes, int64_t row_stride, const void* scales,
                               const uint8_t* zeros) {
  process_.require_owner();
  const bool int8 = layout_.format == WeightFormat::kInt8;
  if (!layout_.is_coded() && !int8)
    throw std::invalid_argument("pack_codes: this format is not for published codes");
  const int64_t n_real = layout_.outputs(projection), k_real = layout_.inputs(projection);
  const CodeKind kind = int8 ? CodeKind::kUint8 : layout_.coding.kind;
  if (int8) {
    const float* source = static_cast<const float*>(scales);
    for (int64_t n = 0; n < n_real; ++n)
      if (!std::isfinite(source[n]))
        refuse("scales", expert, projection, source[n], std::to_string(n));
    std::copy_n(source, n_real, mutable_scales(expert, projection));
  } else {
    const int64_t first = layout_.first_scale(expert, projection);
    const int64_t count = layout_.matrix_scales(projection);
    const int64_t width = kScaleBytes[static_cast<int>(layout_.coding.scale_type)];
    std::memcpy(writable(Section::kScales) + first * width, scales,
                static_cast<size_t>(count * width));
    if (layout_.coding.zeros)
      std::memcpy(writable(Section::kZeros) + first, zeros, static_cast<size_t>(count));
    check_code_scales(expert, projection, scales);
  }
  const int64_t k_blocks = padded(k_real) / kBlock, tile_bytes = layout_.tile_bytes();
  uint8_t* tiles = mutable_tiles(expert, projection);
  pool.run(padded(n_real) / kPanelCols, [&](int64_t i, int) {
    // Padding is worth zero: by its code here, by its scale where a zero point moves that.
    const uint8_t nothing = static_cast<uint8_t>(default_zero(kind));
    for (int64_t b = 0; b < k_blocks; ++b) {
      uint8_t* tile = tiles + (i * k_blocks + b) * tile_bytes;
      std::memset(tile, is_four_bit(kind) ? nothing | nothing << 4 : nothing,
                  static_cast<size_t>(tile_bytes));
      for (int64_t j = 0; j < kPanelCols && i * kPanelCols + j < n_real; ++j) {
        const int64_t n = i * kPanelCols + j, first = b * kBlock;
        const int64_t width = std::min(kBlock, k_real - first);
        std::array<uint8_t, kBlock> row;
        std::memcpy(row.data(), codes + n * row_stride + first, static_cast<size_t>(width));
        // Beyond the last input a group's own zero point is the code that is worth zero.
        uint8_t padding = nothing;
        if (width < kBlock && !int8 && layout_.coding.zeros)
          padding =
              zeros[(k_real - 1) / layout_.coding.group_inputs * layout_.output_groups(projection) +
                    n / layout_.coding.group_outputs];
        std::fill(row.begin() + width, row.end(), padding);
        if (kind == CodeKind::kE4m3)
          for (int64_t k = 0; k < width; ++k)
            if ((row[static_cast<size_t>(k)] & 0x7f) == 0x7f)
              refuse("weights", expert, projection, from_bits(0x7fc00000),
                     std::to_string(n) + ", " + std::to_string(first + k));
        place_codes(row, int8, is_four_bit(kind), j, tile);
      }
    }
  });
}

void PackedExperts::set_bias(int64_t expert, Projection projection, const float* bias) {
  process_.require_owner();
  if (!layout_.biased[static_cast<size_t>(projection)])
    throw std::invalid_argument(std::string("bias: these experts were laid out without one for ") +
                                kProjectionNames[static_cast<int>(projection)]);
  const int64_t count = layout_.outputs(projection);
  for (int64_t n = 0; n < count; ++n)
    if (!std::isfinite(bias[n])) refuse("bias", expert, projection, bias[n], std::to_string(n));
  std::copy_n(bias, count,
              reinterpret_cast<float*>(writable(Section::kBiases)) +
                  layout_.first_channel(expert, projection));
}

void PackedExperts::take_channels(ThreadPool& pool, const PackedExperts& from, int64_t first) {
  process_.require_owner();
  const PackedLayout &to_layout = layout_, &from_layout = from.layout_;
  int64_t group = std::max(kBlock, to_layout.int4_group());
  if (to_layout.is_coded()) {
    const Coding& coding = to_layout.coding;
    const bool whole_rows = coding.group_inputs >= from_layout.intermediate;
    group = std::max(coding.group_outputs, whole_rows ? int64_t{1} : coding.group_inputs);
  }
  const bool whole = first == 0 && to_layout.intermediate == from_layout.intermediate;
  if (to_layout.format != from_layout.format || to_layout.experts != from_layout.experts ||
      to_layout.hidden != from_layout.hidden || to_layout.gated != from_layout.gated || first < 0 ||
      first + to_layout.intermediate > from_layout.intermediate)
    throw std::invalid_argument("take_channels: the experts differ in more than their channels");
  if (!whole && (first % kBlock || first % group))
    throw std::invalid_argument("take_channels: channel " + std::to_string(first) +
                                " is inside a group of " + std::to_string(group));
  const int64_t tile = to_layout.tile_bytes(), matrices = to_layout.projections();
  pool.run(to_layout.experts * matrices, [&](int64_t item, int) {
    const int64_t expert = item / matrices;
    const Projection p = static_cast<Projection>(item % matrices + (kProjectionCount - matrices));
    const bool down = p == Projection::kDown;
    const int64_t panels = padded(to_layout.outputs(p)) / kPanelCols;
    const int64_t blocks = padded(to_layout.inputs(p)) / kBlock;
    const int64_t from_blocks = padded(from_layout.inputs(p)) / kBlock;
    const int64_t panel0 = down ? 0 : first / kPanelCols, block0 = down ? first / kBlock : 0;
    for (int64_t i = 0; i < panels; ++i) {
      std::memcpy(mutable_tiles(expert, p) + i * blocks * tile,
                  from.tiles(expert, p) + ((panel0 + i) * from_blocks + block0) * tile,
                  static_cast<size_t>(blocks * tile));
      if (!to_layout.is_int4()) continue;
      const int64_t begin = to_layout.multiplier_offset(p, i, 0, 0);
      std::memcpy(mutable_multipliers(expert, p) + begin,
                  from.multipliers(expert, p, panel0 + i, block0, 0)[0],
                  static_cast<size_t>(to_layout.multiplier_offset(p, i + 1, 0, 0) - begin));
    }
    const int64_t channel0 = down ? 0 : first;
    if (!to_layout.is_float())
      std::copy_n(from.scales(expert, p) + channel0, padded(to_layout.outputs(p)),
                  mutable_scales(expert, p));
    if (from.bias(expert, p) && to_layout.biased[static_cast<size_t>(p)])
      std::copy_n(from.bias(expert, p) + channel0, to_layout.outputs(p),
                  reinterpret_cast<float*>(writable(Section::kBiases)) +
                      to_layout.first_channel(expert, p));
    if (!to_layout.is_coded()) return;
    const int64_t width = kScaleBytes[static_cast<int>(to_layout.coding.scale_type)];
    const int64_t group0 = down ? first / to_layout.coding.group_inputs : 0;
    const int64_t output0 = down ? 0 : first / to_layout.coding.group_outputs;
    const int64_t count = to_layout.output_groups(p);
    for (int64_t g = 0; g < to_layout.input_groups(p); ++g) {
      const int64_t at = to_layout.first_scale(expert, p) + g * count;
      const int64_t source = from_layout.first_scale(expert, p) +
                             (group0 + g) * from_layout.output_groups(p) + output0;
      std::memcpy(writable(Section::kScales) + at * width,
                  from.section(Section::kScales) + source * width,
                  static_cast<size_t>(count * width));
      if (to_layout.coding.zeros)
        std::memcpy(writable(Section::kZeros) + at, from.section(Section::kZeros) + source,
                    static_cast<size_t>(count));
    }
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
  // A section holds its experts one after the other, and padding after the last.
  pool.run(static_cast<int64_t>(chosen.size()), [&](int64_t expert, int) {
    for (size_t i = 0; i < kSectionCount; ++i) {
      const Section s = static_cast<Section>(i);
      const int64_t bytes = layout_.expert_bytes(s);
      if (!bytes) continue;
      std::memcpy(writable(s) + expert * bytes,
                  from.section(s) + chosen[static_cast<size_t>(expert)] * bytes,
                  static_cast<size_t>(bytes));
    }
  });
}

void PackedExperts::unpack(int64_t expert, Projection projection, float* weight) const {
  process_.require_owner();
  const int64_t n_real = layout_.outputs(projection), k_real = layout_.inputs(projection);
  const int64_t k_blocks = padded(k_real) / kBlock, tile_bytes = layout_.tile_bytes();
  const float* scales = this->scales(expert, projection);
  for (int64_t n = 0; n < n_real; ++n) {
    const int64_t panel = n / kPanelCols, j = n % kPanelCols;
    const uint8_t* tiles = this->tiles(expert, projection) + panel * k_blocks * tile_bytes;
    for (int64_t k = 0; k < k_real; ++k) {
      const uint8_t* tile = tiles + k / kBlock * tile_bytes;
      const bool high = k % kBlock >= 32;
      float& out = weight[n * k_real + k];
      if (layout_.is_coded()) {
        const Coding& coding = layout_.coding;
        const bool four = is_four_bit(coding.kind);
        const uint8_t byte = tile[code_index(j, four ? k % 32 : k % kBlock)];
        const int code = !four ? byte : high ? byte >> 4 : byte & 15;
        const int64_t group = layout_.first_scale(expert, projection) +
                              k / coding.group_inputs * layout_.output_groups(projection) +
                              n / coding.group_outputs;
        const bool integer = coding.kind == CodeKind::kUint8 || coding.kind == CodeKind::kUint4;
        const float zero = integer ? code_zero(group) : 0.0f;
        out = rounded_to_bf16((code_value(coding.kind, code) - zero) * code_scale(group));
      } else if (layout_.is_bf16()) {
        uint16_t half;
        std::memcpy(&half, tile + 2 * bf16_index(j, k % kBlock), 2);
        out = from_bits(static_cast<uint32_t>(half) << 16);
      } else if (layout_.is_int4()) {
        const int m = multipliers(expert, projection, panel, k / kBlock, j / 16)[high][j % 16];
        const int c =
            (tile[int4_index(j, k % 32)] >> (high ? 4 : 0) & 15) - (m & kInt4Raised ? 7 : 8);
        out = static_cast<float>((m & 31) * c) * scales[n];
      } else {
        const int q = static_cast<int>(tile[int8_index(j, k % kBlock)]) - 128;
        out = static_cast<float>(q) * scales[n];
      }
    }
  }
}

}  // namespace kt
