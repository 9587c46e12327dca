// How the packed weights of one MoE layer lie in memory: formats, sections, offsets.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../formats/format_table.h"
#include "../kernels/kernel_table.h"

namespace kt {

enum class Projection : int { kGate = 0, kUp = 1, kDown = 2 };
constexpr int kProjectionCount = 3;
constexpr std::array<const char*, kProjectionCount> kProjectionNames = {"gate_proj", "up_proj",
                                                                        "down_proj"};

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

  const WeightForm& form() const { return form_of(format); }
  // Multiplied as floats, in panels that are made of bf16 tiles.
  bool is_float() const;
  bool any_bias() const { return biased[0] || biased[1] || biased[2]; }

  int64_t hidden_padded() const { return padded(hidden); }
  int64_t intermediate_padded() const { return padded(intermediate); }
  // Outputs and inputs of a projection, unpadded: gate and up [F, D], down [D, F].
  int64_t outputs(Projection p) const { return p == Projection::kDown ? hidden : intermediate; }
  int64_t inputs(Projection p) const { return p == Projection::kDown ? intermediate : hidden; }

  int64_t projections() const { return gated ? 3 : 2; }
  Projection first_projection() const { return gated ? Projection::kGate : Projection::kUp; }

  int64_t tile_bytes() const;
  // Intermediate channels can be cut at multiples of this.
  int64_t channel_granule() const;
  // Of one projection in a section; 0 for what the format does not have of it.
  int64_t matrix_bytes(Section section, Projection p) const;
  // A section holds its experts one after the other, and an expert its projections.
  int64_t matrix_offset(Section section, int64_t expert, Projection p) const {
    int64_t offset = expert * expert_bytes(section);
    for (int i = static_cast<int>(first_projection()); i < static_cast<int>(p); ++i)
      offset += matrix_bytes(section, static_cast<Projection>(i));
    return offset;
  }
  int64_t expert_bytes(Section section) const {
    int64_t sum = 0;
    for (int i = static_cast<int>(first_projection()); i < kProjectionCount; ++i)
      sum += matrix_bytes(section, static_cast<Projection>(i));
    return sum;
  }
  // A multiple of 64.
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
  void check() const;
};

}  // namespace kt
