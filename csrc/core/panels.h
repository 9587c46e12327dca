// Weight panels of one expert: forward as stored, backward transposed into a thread's buffer, and
// what to prefetch of the next one meanwhile.
#pragma once

#include <array>
#include <vector>

#include "packed_experts.h"

namespace kt {

inline int lines_shift(int64_t tile_bytes) { return tile_bytes == kTileBytesInt8 ? 5 : 6; }

// Panels of 32 outputs that contract over the inputs.
class ForwardPanels {
 public:
  ForwardPanels(const PackedExperts& weights, int64_t expert, Projection projection)
      : tiles_(weights.tiles(expert, projection)),
        scales_(weights.scales(expert, projection)),
        tile_bytes_(weights.tile_bytes()),
        panel_bytes_(padded(weights.inputs(projection)) / kBlock * tile_bytes_) {}

  const uint8_t* panel(int64_t i) const { return tiles_ + i * panel_bytes_; }
  const float* scales(int64_t i) const { return scales_ ? scales_ + i * kPanelCols : nullptr; }

  // The share of chunk c of `chunks` in bringing panel i near; nothing when there is none.
  Prefetch prefetch(int64_t i, bool none, int64_t c, int64_t chunks) const {
    Prefetch next;
    if (none) return next;
    const int64_t lines = panel_bytes_ / 64;
    next.base = reinterpret_cast<const char*>(panel(i));
    next.tile_stride = tile_bytes_;
    next.tile_shift = lines_shift(tile_bytes_);
    next.first = lines * c / chunks;
    next.count = lines * (c + 1) / chunks - next.first;
    return next;
  }

 private:
  const uint8_t* tiles_;
  const float* scales_;
  int64_t tile_bytes_, panel_bytes_;
};

// For a block of 64 inputs, two panels of 32 that contract over the outputs of one or more
// projections laid end to end (gate, then up). `buffer` holds both panels.
class BackwardPanels {
 public:
  BackwardPanels(const PackedExperts& weights, int64_t expert, std::vector<Projection> projections,
                 uint8_t* buffer)
      : tile_bytes_(weights.tile_bytes()), int8_(weights.format() == WeightFormat::kInt8) {
    for (const Projection p : projections) {
      const int64_t blocks_of_inputs = padded(weights.inputs(p)) / kBlock;
      sources_.push_back({weights.tiles(expert, p), blocks_of_inputs * tile_bytes_,
                          padded(weights.outputs(p)) / kPanelCols});
      panels_ += padded(weights.outputs(p)) / kPanelCols;
    }
    halves_ = {buffer, buffer + panels_ / 2 * tile_bytes_};
  }

  void build(const KernelTable& kernels, int64_t block) {
    int64_t at = 0;  // super tiles of 64 contracted outputs done
    for (const Source& source : sources_)
      for (int64_t pair = 0; pair < source.panels; pair += 2, ++at)
        for (int64_t which = 0; which < 2; ++which) {
          const uint8_t* tile = source.tiles + (pair + which) * source.stride + block * tile_bytes_;
          if (int8_)
            place_int8(kernels, tile, at, which);
          else
            place_bf16(kernels, tile, at, which);
        }
  }

  const uint8_t* half(int h) const { return halves_[static_cast<size_t>(h)]; }

  // The share of (half, chunk) in bringing the tiles of block `block` near.
  Prefetch prefetch(int64_t block, bool none, int half, int64_t c, int64_t chunks) const {
    Prefetch next;
    if (none) return next;
    const bool two = sources_.size() == 2;
    const Source& source = sources_[two ? static_cast<size_t>(half) : 0];
    const int64_t lines = source.panels * (tile_bytes_ / 64);
    const int64_t begin = two ? 0 : lines * half / 2;
    const int64_t share = two ? lines : lines / 2;
    next.base = reinterpret_cast<const char*>(source.tiles + block * tile_bytes_);
    next.tile_stride = source.stride;
    next.tile_shift = lines_shift(tile_bytes_);
    next.first = begin + share * c / chunks;
    next.count = begin + share * (c + 1) / chunks - next.first;
    return next;
  }

 private:
  struct Source {
    const uint8_t* tiles;
    int64_t stride;  // bytes from one panel of 32 outputs to the next
    int64_t panels;  // even: outputs are padded to 64
  };

  void place_int8(const KernelTable& kernels, const uint8_t* super, int64_t at, int64_t which) {
    for (int64_t side = 0; side < 2; ++side) {
      uint8_t* pieces[4];
      for (int64_t g = 0; g < 4; ++g)
        pieces[g] = halves_[static_cast<size_t>(g / 2)] + at * kTileBytesInt8 + g % 2 * 1024 +
                    (2 * which + side) * 256;
      kernels.transpose_u8(super + side * 1024, pieces);
    }
  }
  void place_bf16(const KernelTable& kernels, const uint8_t* super, int64_t at, int64_t which) {
    uint16_t* pieces[2];
    for (size_t h = 0; h < 2; ++h)
      pieces[h] = reinterpret_cast<uint16_t*>(halves_[h] + at * kTileBytesBf16 +
                                              which * kTileBytesBf16 / 2);
    kernels.transpose_bf16(reinterpret_cast<const uint16_t*>(super), pieces);
  }

  int64_t tile_bytes_;
  bool int8_;
  std::vector<Source> sources_;
  int64_t panels_ = 0;
  std::array<uint8_t*, 2> halves_{};
};

}  // namespace kt
