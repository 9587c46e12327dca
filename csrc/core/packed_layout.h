// How the packed weights of one MoE layer lie in memory: formats, sections, offsets.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../kernels/kernel_table.h"

namespace kt {

// int4 is in two levels: a weight is scale[n] * m(n, group) * c, m in 1..16 and c in -8..7 or
// -7..8, so that m * c is an int8 weight and both directions need only the scale of the output
// channel. Coded formats keep what a checkpoint published: codes, and scales over groups of outputs
// and inputs.
enum class WeightFormat : int { kInt8 = 0, kBf16, kInt4Group32, kInt4Group128, kCoded };
enum class Projection : int { kGate = 0, kUp = 1, kDown = 2 };
constexpr int kProjectionCount = 3;

enum class ScaleType : int { kFloat32 = 0, kBfloat16, kFloat16, kE8m0 };
constexpr int64_t kScaleBytes[] = {4, 2, 2, 1};

// Of a coded format. A weight is (value(code) - zero) * scale, rounded once to bf16.
struct Coding {
  CodeKind kind = CodeKind::kE4m3;
  ScaleType scale_type = ScaleType::kFloat32;
  int64_t group_outputs = 1;
  int64_t group_inputs = 32;  // a multiple of 32, or longer than any row: one group
  bool zeros = false;         // each group has its zero point; otherwise that of the kind

  bool same_as(const Coding& other) const {
    return kind == other.kind && scale_type == other.scale_type &&
           group_outputs == other.group_outputs && group_inputs == other.group_inputs &&
           zeros == other.zeros;
  }
};

// The memory is in sections, so that a store can keep each as one tensor.
enum class Section : int { kTiles = 0, kMultipliers, kScales, kZeros, kBiases };
constexpr int kSectionCount = 5;
constexpr std::array<const char*, kSectionCount> kSectionNames = {"tiles", "multipliers", "scales",
                                                                  "zeros", "biases"};

constexpr int64_t padded(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }
constexpr int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Everything that decides how the memory is laid out.
struct PackedLayout {
  int64_t experts, hidden, intermediate;
  WeightFormat format = WeightFormat::kInt8;
  bool gated = true;  // without a gate, h = act(up) and there is no gate projection
  std::array<bool, kProjectionCount> biased{};
  Coding coding{};

  bool is_coded() const { return format == WeightFormat::kCoded; }
  bool is_bf16() const { return format == WeightFormat::kBf16; }
  // Multiplied as floats, in panels that are made of bf16 tiles.
  bool is_float() const { return is_bf16() || is_coded(); }
  bool is_int4() const { return int4_group() > 0; }
  int64_t int4_group() const {
    return format == WeightFormat::kInt4Group32    ? 32
           : format == WeightFormat::kInt4Group128 ? 128
                                                   : 0;
  }
  bool any_bias() const { return biased[0] || biased[1] || biased[2]; }

  int64_t hidden_padded() const { return padded(hidden); }
  int64_t intermediate_padded() const { return padded(intermediate); }
  // Outputs and inputs of a projection, unpadded: gate and up [F, D], down [D, F].
  int64_t outputs(Projection p) const { return p == Projection::kDown ? hidden : intermediate; }
  int64_t inputs(Projection p) const { return p == Projection::kDown ? intermediate : hidden; }

  int64_t tile_bytes() const {
    if (is_coded()) return is_four_bit(coding.kind) ? kTileBytesCode4 : kTileBytesCode8;
    return is_bf16() ? kTileBytesBf16 : is_int4() ? kTileBytesInt4 : kTileBytesInt8;
  }
  int64_t projections() const { return gated ? 3 : 2; }
  int64_t slot(Projection p) const { return static_cast<int64_t>(p) - (gated ? 0 : 1); }
  int64_t matrix(int64_t expert, Projection p) const { return expert * projections() + slot(p); }

  int64_t matrix_bytes() const {
    return hidden_padded() * intermediate_padded() / (kPanelCols * kBlock) * tile_bytes();
  }
  // Groups of 128 may end in half a group on either side.
  int64_t matrix_multipliers() const {
    return is_int4() ? (hidden_padded() + kBlock) * (intermediate_padded() + kBlock) / int4_group()
                     : 0;
  }
  int64_t channels() const { return (projections() - 1) * intermediate_padded() + hidden_padded(); }
  int64_t first_channel(int64_t expert, Projection p) const {
    return expert * channels() + slot(p) * intermediate_padded();
  }
  // Groups of 32: [panel][block][2 halves][2 groups][16 n]; of 128: [panel][2 blocks][2 halves]
  // [16 n].
  int64_t multiplier_offset(Projection p, int64_t i, int64_t b, int64_t h) const {
    const int64_t blocks = padded(inputs(p)) / kBlock;
    if (format == WeightFormat::kInt4Group32) return (i * blocks + b) * 64 + h * 32;
    return (i * ((blocks + 1) / 2) + b / 2) * 32 + h * 16;
  }
  // Scales of a coded projection: [groups along the inputs][groups along the outputs].
  int64_t input_groups(Projection p) const { return divided_up(inputs(p), coding.group_inputs); }
  int64_t output_groups(Projection p) const { return divided_up(outputs(p), coding.group_outputs); }
  int64_t matrix_scales(Projection p) const { return input_groups(p) * output_groups(p); }
  int64_t first_scale(int64_t expert, Projection p) const {
    const int64_t narrow = matrix_scales(Projection::kUp), wide = matrix_scales(Projection::kDown);
    return expert * ((projections() - 1) * narrow + wide) + slot(p) * narrow;
  }

  // Bytes of one expert in a section; 0 for what the format does not have.
  int64_t expert_bytes(Section section) const {
    const int64_t groups =
        is_coded() ? (projections() - 1) * matrix_scales(Projection::kUp) +
                         matrix_scales(Projection::kDown)
                   : 0;
    const int64_t bytes[] = {
        projections() * matrix_bytes(),
        projections() * matrix_multipliers(),
        is_coded()  ? groups * kScaleBytes[static_cast<int>(coding.scale_type)]
        : is_bf16() ? 0
                    : channels() * 4,
        coding.zeros ? groups : 0,
        any_bias() ? channels() * 4 : 0,
    };
    return bytes[static_cast<int>(section)];
  }
  // Bytes of a section, a multiple of 64.
  int64_t section_bytes(Section section) const {
    return divided_up(experts * expert_bytes(section), 64) * 64;
  }
  int64_t bytes() const {
    int64_t sum = 0;
    for (int i = 0; i < kSectionCount; ++i) sum += section_bytes(static_cast<Section>(i));
    return sum;
  }

  bool same_as(const PackedLayout& other) const {
    return experts == other.experts && hidden == other.hidden &&
           intermediate == other.intermediate && format == other.format && gated == other.gated &&
           biased == other.biased && coding.same_as(other.coding);
  }

  // Throws std::invalid_argument.
  void check() const {
    if (experts < 1 || hidden < 1 || intermediate < 1)
      throw std::invalid_argument("experts, hidden and intermediate must be positive, got " +
                                  std::to_string(experts) + ", " + std::to_string(hidden) + ", " +
                                  std::to_string(intermediate));
    if (hidden > kMaxContraction || 2 * intermediate > kMaxContraction)
      throw std::invalid_argument("hidden " + std::to_string(hidden) + " and intermediate " +
                                  std::to_string(intermediate) + " must be at most " +
                                  std::to_string(kMaxContraction) + " and " +
                                  std::to_string(kMaxContraction / 2));
    if (experts > kMaxContraction)
      throw std::invalid_argument("experts: got " + std::to_string(experts) +
                                  ", expected at most " + std::to_string(kMaxContraction));
    const int64_t longest = std::max(hidden, intermediate);
    constexpr int64_t kLargestGroup = int64_t{1} << 20;
    if (coding.group_outputs > kLargestGroup || coding.group_inputs > kLargestGroup)
      throw std::invalid_argument("groups: expected at most " + std::to_string(kLargestGroup));
    if (is_coded() && (coding.group_outputs < 1 || coding.group_inputs < 1 ||
                       (coding.group_inputs % 32 && coding.group_inputs < longest)))
      throw std::invalid_argument("groups: got " + std::to_string(coding.group_outputs) +
                                  " outputs by " + std::to_string(coding.group_inputs) +
                                  " inputs, expected at least 1 by a multiple of 32");
    if (!gated && biased[static_cast<size_t>(Projection::kGate)])
      throw std::invalid_argument("bias: these experts have no gate projection");
  }
};

}  // namespace kt
