// What a checkpoint published: codes, and scales over groups of outputs and inputs. A weight is
// (value(code) - zero) * scale, rounded once to bf16. Super tiles of 8-bit codes [32 k2][32 n]
// [2 kk]; of 4-bit ones [16 k2][32 n][2 kk] with (n, k) and (n, k + 32) in a byte.
#pragma once

#include <numeric>

#include "weight_form.h"

namespace kt {

class CodedForm : public WeightForm {
 public:
  bool is_float() const override { return true; }
  bool takes_floats() const override { return false; }
  int64_t tile_bytes(const PackedLayout& layout) const override {
    return is_four_bit(layout.coding.kind) ? kTileBytesCode4 : kTileBytesCode8;
  }
  int64_t matrix_bytes(const PackedLayout& layout, Section s, Projection p) const override {
    const int64_t groups = input_groups(layout, p) * output_groups(layout, p);
    if (s == Section::kScales) return groups * scale_bytes(layout);
    return s == Section::kZeros && layout.coding.zeros ? groups : 0;
  }
  int64_t channel_granule(const PackedLayout& layout) const override {
    const int64_t inputs = layout.coding.group_inputs;
    const bool whole_rows = inputs >= layout.intermediate;
    return std::lcm(std::lcm(kBlock, layout.coding.group_outputs),
                    whole_rows ? int64_t{1} : inputs);
  }
  void check(const PackedLayout& layout) const override {
    const Coding& coding = layout.coding;
    const int64_t longest = std::max(layout.hidden, layout.intermediate);
    if (coding.group_outputs < 1 || coding.group_inputs < 1 ||
        (coding.group_inputs % 32 && coding.group_inputs < longest))
      throw std::invalid_argument("groups: got " + std::to_string(coding.group_outputs) +
                                  " outputs by " + std::to_string(coding.group_inputs) +
                                  " inputs, expected at least 1 by a multiple of 32");
  }

  void pack_channel(const KernelTable&, const WritableMatrix&, int64_t, ChannelBuffers&,
                    uint32_t*) const override {}

  CodeKind code_kind(const PackedLayout& layout) const override { return layout.coding.kind; }
  void pack_scales(const WritableMatrix& to, const PublishedCodes& from) const override {
    const int64_t groups =
        input_groups(to.layout, to.projection) * output_groups(to.layout, to.projection);
    std::memcpy(to.in(Section::kScales), from.scales,
                static_cast<size_t>(groups * scale_bytes(to.layout)));
    if (to.layout.coding.zeros)
      std::memcpy(to.in(Section::kZeros), from.zeros, static_cast<size_t>(groups));
    for (int64_t g = 0; g < groups; ++g) {
      float scale;
      read_scales(to, g, 1, &scale);
      const bool wrong = to.layout.coding.scale_type == ScaleType::kE8m0
                             ? static_cast<const uint8_t*>(from.scales)[g] == 255
                             : !std::isfinite(scale);
      if (wrong) refuse("scales", to, scale, std::to_string(g));
    }
  }
  uint8_t padding_code(const WritableMatrix& to, int64_t n, const PublishedCodes& from,
                       uint8_t otherwise) const override {
    const Coding& coding = to.layout.coding;
    if (!coding.zeros) return otherwise;
    // A group's own zero point is the code that is worth zero.
    return from
        .zeros[(to.inputs() - 1) / coding.group_inputs * output_groups(to.layout, to.projection) +
               n / coding.group_outputs];
  }
  void place_codes(const PackedLayout& layout, const std::array<uint8_t, kBlock>& row, int64_t j,
                   uint8_t* tile) const override {
    const bool four = is_four_bit(layout.coding.kind);
    for (int64_t k2 = 0; k2 < (four ? 16 : 32); ++k2) {
      uint16_t unit, high = 0;
      std::memcpy(&unit, &row[2 * k2], 2);
      if (four) std::memcpy(&high, &row[2 * k2 + 32], 2);
      if (four) unit = static_cast<uint16_t>((unit & 0x0f0f) | (high & 0x0f0f) << 4);
      std::memcpy(tile + index(j, 2 * k2), &unit, 2);
    }
  }

  float weight(const StoredMatrix& from, int64_t n, int64_t k) const override {
    const Coding& coding = from.layout.coding;
    const bool four = is_four_bit(coding.kind), high = k % kBlock >= 32;
    const uint8_t* tile = tile_of(from, tile_bytes(from.layout), n / kPanelCols, k / kBlock);
    const uint8_t byte = tile[index(n % kPanelCols, four ? k % 32 : k % kBlock)];
    const int code = !four ? byte : high ? byte >> 4 : byte & 15;
    const int64_t group = k / coding.group_inputs * output_groups(from.layout, from.projection) +
                          n / coding.group_outputs;
    float scale;
    read_scales(from, group, 1, &scale);
    const bool integer = coding.kind == CodeKind::kUint8 || coding.kind == CodeKind::kUint4;
    const float moved = code_value(coding.kind, code) - (integer ? zero(from, group) : 0.0f);
    return rounded_to_bf16(moved * scale);
  }
  const uint16_t* bf16_tile(const KernelTable& kernels, const StoredMatrix& from, int64_t panel,
                            int64_t block, uint16_t* buffer) const override {
    CodeScales groups;
    read_groups(from, panel, block, groups);
    kernels.decode_tile(from.layout.coding.kind,
                        tile_of(from, tile_bytes(from.layout), panel, block), groups, buffer);
    return buffer;
  }

  void take_rest(const WritableMatrix& to, const StoredMatrix& from, int64_t output,
                 int64_t input) const override {
    const Coding& coding = to.layout.coding;
    const Projection p = to.projection;
    const int64_t width = scale_bytes(to.layout), count = output_groups(to.layout, p);
    const int64_t first =
        input / coding.group_inputs * output_groups(from.layout, p) + output / coding.group_outputs;
    for (int64_t g = 0; g < input_groups(to.layout, p); ++g) {
      const int64_t source = first + g * output_groups(from.layout, p);
      std::memcpy(to.in(Section::kScales) + g * count * width,
                  from.in(Section::kScales) + source * width, static_cast<size_t>(count * width));
      if (coding.zeros)
        std::memcpy(to.in(Section::kZeros) + g * count, from.in(Section::kZeros) + source,
                    static_cast<size_t>(count));
    }
  }

 private:
  static int64_t index(int64_t n, int64_t k) { return k / 2 * 64 + n * 2 + k % 2; }
  static int64_t scale_bytes(const PackedLayout& layout) {
    return kScaleBytes[static_cast<int>(layout.coding.scale_type)];
  }
  // Scales of a projection: [groups along the inputs][groups along the outputs].
  static int64_t input_groups(const PackedLayout& layout, Projection p) {
    return divided_up(layout.inputs(p), layout.coding.group_inputs);
  }
  static int64_t output_groups(const PackedLayout& layout, Projection p) {
    return divided_up(layout.outputs(p), layout.coding.group_outputs);
  }

  static float default_zero(CodeKind kind) {
    return kind == CodeKind::kUint8 ? 128.0f : kind == CodeKind::kUint4 ? 8.0f : 0.0f;
  }
  static float zero(const StoredMatrix& from, int64_t group) {
    return from.layout.coding.zeros ? from.in(Section::kZeros)[group]
                                    : default_zero(from.layout.coding.kind);
  }

  template <class Byte>
  static void read_scales(const MatrixMemory<Byte>& from, int64_t first, int64_t count,
                          float* out) {
    const uint8_t* scales = from.in(Section::kScales);
    switch (from.layout.coding.scale_type) {
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

  // The groups that super tile (panel, block) meets.
  static void read_groups(const StoredMatrix& from, int64_t panel, int64_t block, CodeScales& out) {
    const Coding& coding = from.layout.coding;
    const int64_t groups = output_groups(from.layout, from.projection);
    const int64_t real = std::min(kPanelCols, from.outputs() - panel * kPanelCols);
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t k = block * kBlock + half * 32;
      const int64_t group = k / coding.group_inputs;
      if (half && group == block * kBlock / coding.group_inputs) {
        std::copy_n(out.scale[0], 64, out.scale[1]);
        std::copy_n(out.zero[0], 64, out.zero[1]);
        continue;
      }
      const bool past = k >= from.inputs();
      const int64_t n0 = panel * kPanelCols, row = group * groups;
      const int64_t count = past ? 0 : real;
      std::array<float, kPanelCols> scale{}, zeros{};  // padding: every code is worth zero
      if (coding.group_outputs == 1) {
        read_scales(from, row + n0, count, scale.data());
        for (int64_t n = 0; n < count; ++n)
          zeros[static_cast<size_t>(n)] = zero(from, row + n0 + n);
      } else {
        int64_t seen = -1;
        float s = 0.0f, z = 0.0f;
        for (int64_t n = 0; n < count; ++n) {
          const int64_t index = row + (n0 + n) / coding.group_outputs;
          if (index != seen) {
            read_scales(from, index, 1, &s);
            z = zero(from, index);
            seen = index;
          }
          scale[static_cast<size_t>(n)] = s;
          zeros[static_cast<size_t>(n)] = z;
        }
      }
      for (size_t n = 0; n < kPanelCols; ++n) {
        out.scale[half][2 * n] = out.scale[half][2 * n + 1] = scale[n];
        out.zero[half][2 * n] = out.zero[half][2 * n + 1] = zeros[n];
      }
    }
  }

  static float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude < 0x400)
      return std::copysign(static_cast<float>(magnitude) * 0x1p-24f, from_bits(sign | 0x3f800000));
    return from_bits(sign | ((magnitude << 13) + (112u << 23)));
  }
  static float rounded_to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
  }

  // Written apart from the kernels' vectors, so that each checks the other.
  static float code_value(CodeKind kind, int code) {
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
};

}  // namespace kt
