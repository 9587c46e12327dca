// int4 in two levels: a weight is scale[n] * m(n, group) * c, m in 1..16 and c in -8..7 or -7..8,
// so that m * c is an int8 weight and both directions need only the scale of the output channel.
// Super tile [2 halves][8 k4][16 n][4 kk], weights (n, k) and (n, k + 32) in a byte.
//
// Multipliers of groups of 32: [panel][block][2 halves][2 groups][16 n]; of 128: [panel][2 blocks]
// [2 halves][16 n].
#pragma once

#include "weight_form.h"

namespace kt {

template <int64_t kGroup>
class Int4Form : public ScaledForm {
 public:
  int64_t tile_bytes(const PackedLayout&) const override { return kTileBytesInt4; }
  int64_t matrix_bytes(const PackedLayout& layout, Section s, Projection p) const override {
    // Groups of 128 may end in half a group on either side.
    if (s == Section::kMultipliers)
      return (layout.hidden_padded() + kBlock) * (layout.intermediate_padded() + kBlock) / kGroup;
    return ScaledForm::matrix_bytes(layout, s, p);
  }
  int64_t channel_granule(const PackedLayout&) const override { return std::max(kBlock, kGroup); }

  void pack_channel(const KernelTable& kernels, const WritableMatrix& to, int64_t n,
                    ChannelBuffers& channel, uint32_t* units) const override {
    const int64_t width = static_cast<int64_t>(channel.values.size()), j = n % kPanelCols;
    kernels.quantize_int4_row(width, kGroup, channel.values.data(), channel.quantized.data(),
                              channel.multipliers.data(), scales(to) + n);
    uint8_t* multipliers = to.in(Section::kMultipliers);
    for (int64_t k = 0; k < width; k += kGroup == 32 ? 32 : 64)
      multipliers[offset(to.blocks(), n / kPanelCols, k / kBlock, j / 16) +
                  (kGroup == 32 ? k % kBlock / 32 * 16 : 0) + j % 16] =
          channel.multipliers[static_cast<size_t>(k / kGroup)];
    uint8_t* bytes = reinterpret_cast<uint8_t*>(units);
    for (int64_t k = 0; k < width; k += kBlock)
      for (int64_t i = 0; i < 32; ++i) {
        const uint8_t* c = channel.quantized.data() + k + i;
        bytes[k / 2 + i] = static_cast<uint8_t>(c[0] | c[32] << 4);
      }
  }

  float weight(const StoredMatrix& from, int64_t n, int64_t k) const override {
    const int64_t panel = n / kPanelCols, j = n % kPanelCols;
    const bool high = k % kBlock >= 32;
    const uint8_t* tile = tile_of(from, kTileBytesInt4, panel, k / kBlock);
    const int m = multipliers(from, panel, k / kBlock, j / 16)[high][j % 16];
    const int64_t index = j / 16 * 512 + k % 32 / 4 * 64 + j % 16 * 4 + k % 4;
    const int c = (tile[index] >> (high ? 4 : 0) & 15) - (m & kInt4Raised ? 7 : 8);
    return static_cast<float>((m & 31) * c) * scales(from)[n];
  }
  const uint8_t* int8_half(const KernelTable& kernels, const StoredMatrix& from, int64_t panel,
                           int64_t block, int64_t half, uint8_t* buffer) const override {
    kernels.unpack_int4(tile_of(from, kTileBytesInt4, panel, block) + half * kTileBytesInt4 / 2,
                        multipliers(from, panel, block, half).data(), buffer);
    return buffer;
  }

  void take_rest(const WritableMatrix& to, const StoredMatrix& from, int64_t output,
                 int64_t input) const override {
    ScaledForm::take_rest(to, from, output, input);
    const int64_t size = offset(to.blocks(), 1, 0, 0);
    for (int64_t i = 0; i < to.panels(); ++i)
      std::memcpy(to.in(Section::kMultipliers) + i * size,
                  from.in(Section::kMultipliers) +
                      offset(from.blocks(), output / kPanelCols + i, input / kBlock, 0),
                  static_cast<size_t>(size));
  }

 private:
  static int64_t offset(int64_t blocks, int64_t panel, int64_t block, int64_t half) {
    if (kGroup == 32) return (panel * blocks + block) * 64 + half * 32;
    return (panel * ((blocks + 1) / 2) + block / 2) * 32 + half * 16;
  }
  // Of 16 outputs, for the block's k < 32 and k >= 32.
  static std::array<const uint8_t*, 2> multipliers(const StoredMatrix& from, int64_t panel,
                                                   int64_t block, int64_t half) {
    const uint8_t* first =
        from.in(Section::kMultipliers) + offset(from.blocks(), panel, block, half);
    return {first, kGroup == 32 ? first + 16 : first};
  }
};

}  // namespace kt
