// bf16 as it is. Super tile [32 k2][32 n][2 kk].
#pragma once

#include "weight_form.h"

namespace kt {

class Bf16Form : public WeightForm {
 public:
  bool is_float() const override { return true; }
  bool is_panel(PanelForm panel) const override { return panel == PanelForm::kBf16; }
  int64_t tile_bytes(const PackedLayout&) const override { return kTileBytesBf16; }
  int64_t interleaved() const override { return kPanelCols; }

  void pack_channel(const KernelTable& kernels, const WritableMatrix&, int64_t,
                    ChannelBuffers& channel, uint32_t* units) const override {
    kernels.to_bf16_row(static_cast<int64_t>(channel.values.size()), channel.values.data(),
                        reinterpret_cast<uint16_t*>(units));
  }

  float weight(const StoredMatrix& from, int64_t n, int64_t k) const override {
    const uint8_t* tile = tile_of(from, kTileBytesBf16, n / kPanelCols, k / kBlock);
    const int64_t index = k % kBlock / 2 * 64 + n % kPanelCols * 2 + k % 2;
    uint16_t half;
    std::memcpy(&half, tile + 2 * index, 2);
    return from_bits(static_cast<uint32_t>(half) << 16);
  }
  const uint16_t* bf16_tile(const KernelTable&, const StoredMatrix& from, int64_t panel,
                            int64_t block, uint16_t*) const override {
    return reinterpret_cast<const uint16_t*>(tile_of(from, kTileBytesBf16, panel, block));
  }
};

}  // namespace kt
