// What a weight format decides: how much memory a matrix takes, how it is packed and read, and in
// which form its tiles reach the dot products.
//
// A matrix [outputs, inputs] is a grid of super tiles of 32 outputs by 64 inputs, [outputs / 32]
// [inputs / 64], both padded to 64, in the section of the tiles; what else a format keeps of it is
// in sections of their own.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/packed_layout.h"
#include "../kernels/kernel_table.h"

namespace kt {

// One expert's projection in packed memory; null where a section has nothing of it.
template <class Byte>
struct MatrixMemory {
  const PackedLayout& layout;
  int64_t expert;
  Projection projection;
  std::array<Byte*, kSectionCount> sections;

  Byte* in(Section s) const { return sections[static_cast<size_t>(s)]; }
  int64_t outputs() const { return layout.outputs(projection); }
  int64_t inputs() const { return layout.inputs(projection); }
  int64_t blocks() const { return padded(inputs()) / kBlock; }
  int64_t panels() const { return padded(outputs()) / kPanelCols; }
};
using StoredMatrix = MatrixMemory<const uint8_t>;
using WritableMatrix = MatrixMemory<uint8_t>;

// Throws std::invalid_argument that names the value and its place.
template <class Byte>
[[noreturn]] void refuse(const char* what, const MatrixMemory<Byte>& matrix, float value,
                         const std::string& where) {
  throw std::invalid_argument(std::string(what) + ": " +
                              kProjectionNames[static_cast<int>(matrix.projection)] +
                              " of expert " + std::to_string(matrix.expert) + " has " +
                              std::to_string(value) + " at [" + where + "]");
}

// One channel on its way into the tiles.
struct ChannelBuffers {
  explicit ChannelBuffers(int64_t width)
      : values(static_cast<size_t>(width)),
        quantized(static_cast<size_t>(width)),
        multipliers(static_cast<size_t>(width / 32)) {}
  std::vector<float> values;         // padded to a multiple of 64 with zeros
  std::vector<uint8_t> quantized;    // int4: one byte each
  std::vector<uint8_t> multipliers;  // int4
};

// Published codes of one matrix: [outputs, inputs] one byte each, scales and zero points [groups
// along the inputs][groups along the outputs].
struct PublishedCodes {
  const uint8_t* codes;
  int64_t row_stride;
  const void* scales;
  const uint8_t* zeros;
};

class WeightForm {
 public:
  virtual ~WeightForm() = default;

  // Multiplied as floats, from bf16 tiles; otherwise as integers, from int8 halves.
  virtual bool is_float() const = 0;
  // Packed from floats; otherwise published codes are kept.
  virtual bool takes_floats() const { return true; }
  // The panel that stored tiles are as they lie, if they are one.
  virtual bool is_panel(PanelForm) const { return false; }

  virtual int64_t tile_bytes(const PackedLayout& layout) const = 0;
  // Bytes of one projection in a section other than tiles and biases.
  virtual int64_t matrix_bytes(const PackedLayout&, Section, Projection) const { return 0; }
  // Intermediate channels can be cut at multiples of this.
  virtual int64_t channel_granule(const PackedLayout&) const { return kBlock; }
  // Throws std::invalid_argument for a layout that this format does not have.
  virtual void check(const PackedLayout&) const {}

  // Tiles hold units of 4 bytes of this many channels side by side.
  virtual int64_t interleaved() const { return kPanelCols / 2; }
  // Channel n as units in the order of the inputs; its scale and multipliers go where they belong.
  virtual void pack_channel(const KernelTable& kernels, const WritableMatrix& to, int64_t n,
                            ChannelBuffers& channel, uint32_t* units) const = 0;

  // The codes that `pack_codes` takes; throws where the format is not for published codes.
  virtual CodeKind code_kind(const PackedLayout&) const {
    throw std::invalid_argument("pack_codes: this format is not for published codes");
  }
  // Throws std::invalid_argument for scales of NaN and Inf.
  virtual void pack_scales(const WritableMatrix&, const PublishedCodes&) const {}
  // The code of channel n that is worth zero beyond the last input.
  virtual uint8_t padding_code(const WritableMatrix&, int64_t, const PublishedCodes&,
                               uint8_t otherwise) const {
    return otherwise;
  }
  // Puts 64 codes of output j into their places of a tile.
  virtual void place_codes(const PackedLayout&, const std::array<uint8_t, kBlock>&, int64_t,
                           uint8_t*) const {}

  // What is computed with, at (n, k).
  virtual float weight(const StoredMatrix& from, int64_t n, int64_t k) const = 0;
  // Half a super tile, 16 outputs, in int8; where it is stored, or in `buffer`.
  virtual const uint8_t* int8_half(const KernelTable&, const StoredMatrix&, int64_t, int64_t,
                                   int64_t, uint8_t*) const {
    return nullptr;
  }
  // A super tile in bf16; where it is stored, or in `buffer`.
  virtual const uint16_t* bf16_tile(const KernelTable&, const StoredMatrix&, int64_t, int64_t,
                                    uint16_t*) const {
    return nullptr;
  }

  // Copies what is beside the tiles: of outputs from `output` on and inputs from `input` on.
  virtual void take_rest(const WritableMatrix&, const StoredMatrix&, int64_t, int64_t) const {}
};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class Byte>
auto tile_of(const MatrixMemory<Byte>& matrix, int64_t tile_bytes, int64_t panel, int64_t block) {
  return matrix.in(Section::kTiles) + (panel * matrix.blocks() + block) * tile_bytes;
}

// Formats with one fp32 scale for each output, padded with zeros.
class ScaledForm : public WeightForm {
 public:
  bool is_float() const override { return false; }
  int64_t matrix_bytes(const PackedLayout& layout, Section s, Projection p) const override {
    return s == Section::kScales ? 4 * padded(layout.outputs(p)) : 0;
  }
  void take_rest(const WritableMatrix& to, const StoredMatrix& from, int64_t output,
                 int64_t) const override {
    std::copy_n(scales(from) + output, padded(to.outputs()), scales(to));
  }

 protected:
  static float* scales(const WritableMatrix& m) {
    return reinterpret_cast<float*>(m.in(Section::kScales));
  }
  static const float* scales(const StoredMatrix& m) {
    return reinterpret_cast<const float*>(m.in(Section::kScales));
  }
};

}  // namespace kt
