// int8: q + 128 unsigned, one fp32 scale for each output. Super tile [2 halves][16 k4][16 n][4 kk].
#pragma once

#include "weight_form.h"

namespace kt {

class Int8Form : public ScaledForm {
 public:
  bool is_panel(PanelForm panel) const override { return panel == PanelForm::kU8; }
  int64_t tile_bytes(const PackedLayout&) const override { return kTileBytesInt8; }

  void pack_channel(const KernelTable& kernels, const WritableMatrix& to, int64_t n,
                    ChannelBuffers& channel, uint32_t* units) const override {
    kernels.quantize_weight_row(static_cast<int64_t>(channel.values.size()), channel.values.data(),
                                reinterpret_cast<uint8_t*>(units), scales(to) + n);
  }

  CodeKind code_kind(const PackedLayout&) const override { return CodeKind::kUint8; }
  void pack_scales(const WritableMatrix& to, const PublishedCodes& from) const override {
    const float* source = static_cast<const float*>(from.scales);
    for (int64_t n = 0; n < to.outputs(); ++n)
      if (!std::isfinite(source[n])) refuse("scales", to, source[n], std::to_string(n));
    std::copy_n(source, to.outputs(), scales(to));
  }
  void place_codes(const PackedLayout&, const std::array<uint8_t, kBlock>& row, int64_t j,
                   uint8_t* tile) const override {
    for (int64_t k = 0; k < kBlock; k += 4) std::memcpy(tile + index(j, k), &row[k], 4);
  }

  float weight(const StoredMatrix& from, int64_t n, int64_t k) const override {
    const uint8_t* tile = tile_of(from, kTileBytesInt8, n / kPanelCols, k / kBlock);
    const int q = static_cast<int>(tile[index(n % kPanelCols, k % kBlock)]) - 128;
    return static_cast<float>(q) * scales(from)[n];
  }
  const uint8_t* int8_half(const KernelTable&, const StoredMatrix& from, int64_t panel,
                           int64_t block, int64_t half, uint8_t*) const override {
    return tile_of(from, kTileBytesInt8, panel, block) + half * kTileBytesInt8 / 2;
  }

 private:
  static int64_t index(int64_t n, int64_t k) {
    return n / 16 * 1024 + k / 4 * 64 + n % 16 * 4 + k % 4;
  }
};

}  // namespace kt
