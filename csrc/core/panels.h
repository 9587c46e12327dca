// The weight panels of one expert, two at a time: forward as stored where that is the form the dot
// products read, otherwise built in a thread's buffer; backward always built. A unit is the two
// panels of one step: (gate, up) of the same 32 outputs, or 64 neighbouring outputs or inputs.
#pragma once

#include <array>
#include <vector>

#include "packed_experts.h"

namespace kt {

inline PanelForm panel_form(const KernelTable& kernels, const PackedExperts& weights) {
  return weights.layout().is_float() ? kernels.float_panel : kernels.int_panel;
}
inline int64_t panel_block_bytes(const KernelTable& kernels, const PackedExperts& weights) {
  return kPanelBlockBytes[static_cast<int>(panel_form(kernels, weights))];
}

// Reads the stored tiles of one expert's projection.
class StoredTiles {
 public:
  StoredTiles(const KernelTable& kernels, const PackedExperts& weights, int64_t expert,
              Projection projection)
      : kernels_(kernels),
        form_(weights.layout().form()),
        matrix_(weights.matrix(expert, projection)),
        tile_bytes_(weights.layout().tile_bytes()),
        blocks_(matrix_.blocks()),
        panels_(matrix_.panels()) {}

  int64_t blocks() const { return blocks_; }  // super tiles along the inputs
  int64_t panels() const { return panels_; }  // along the outputs
  const uint8_t* tile(int64_t panel, int64_t block) const {
    return matrix_.in(Section::kTiles) + (panel * blocks_ + block) * tile_bytes_;
  }
  // See WeightForm.
  const uint8_t* int8_half(int64_t panel, int64_t block, int64_t half, uint8_t* buffer) const {
    return form_.int8_half(kernels_, matrix_, panel, block, half, buffer);
  }
  const uint16_t* bf16_tile(int64_t panel, int64_t block, uint16_t* buffer) const {
    return form_.bf16_tile(kernels_, matrix_, panel, block, buffer);
  }

 private:
  const KernelTable& kernels_;
  const WeightForm& form_;
  StoredMatrix matrix_;
  int64_t tile_bytes_, blocks_, panels_;
};

inline int tile_lines_shift(const PackedExperts& weights) {
  return __builtin_ctzll(static_cast<uint64_t>(weights.layout().tile_bytes() / 64));
}

// The part'th of `parts` shares of `lines` stored lines from `first`.
inline Prefetch prefetch_share(const PackedExperts& weights, const uint8_t* base, int64_t stride,
                               int64_t first, int64_t lines, int64_t part, int64_t parts) {
  Prefetch next;
  next.base = reinterpret_cast<const char*>(base);
  next.tile_stride = stride;
  next.tile_shift = tile_lines_shift(weights);
  next.first = first + lines * part / parts;
  next.count = first + lines * (part + 1) / parts - next.first;
  return next;
}

// Contracts over the inputs. With one projection a unit is panels (2i, 2i + 1), with two it is
// panel i of each.
class ForwardPanels {
 public:
  ForwardPanels(const KernelTable& kernels, const PackedExperts& weights, int64_t expert,
                const std::vector<Projection>& projections, uint8_t* buffer)
      : kernels_(kernels), weights_(weights), block_bytes_(panel_block_bytes(kernels, weights)) {
    for (const Projection p : projections) sources_.emplace_back(kernels, weights, expert, p);
    in_place_ = weights.layout().form().is_panel(panel_form(kernels, weights));
    buffers_ = {buffer, buffer + blocks() * block_bytes_};
  }

  static int64_t buffer_bytes(const KernelTable& kernels, const PackedExperts& weights,
                              int64_t contraction) {
    return 2 * contraction / kBlock * panel_block_bytes(kernels, weights);
  }

  bool built() const { return !in_place_; }
  int64_t blocks() const { return sources_[0].blocks(); }
  const void* part(int p) const { return parts_[static_cast<size_t>(p)]; }

  // Makes blocks [begin, end) of a unit's panels available as part(0) and part(1).
  void prepare(int64_t unit, int64_t begin, int64_t end) {
    for (int p = 0; p < 2; ++p) {
      const StoredTiles& source = of_part(p);
      const int64_t panel = panel_of(unit, p);
      const size_t which = static_cast<size_t>(p);
      parts_[which] = in_place_ ? source.tile(panel, begin) : buffers_[which];
      if (in_place_) continue;
      for (int64_t b = begin; b < end; ++b)
        build(source, panel, b, buffers_[which] + (b - begin) * block_bytes_);
    }
  }

  Prefetch prefetch(int64_t unit, int p, int64_t share, int64_t shares) const {
    const int64_t bytes = blocks() * weights_.layout().tile_bytes();
    return prefetch_share(weights_, of_part(p).tile(panel_of(unit, p), 0),
                          weights_.layout().tile_bytes(), 0, bytes / 64, share, shares);
  }

 private:
  const StoredTiles& of_part(int p) const {
    return sources_[sources_.size() == 2 ? static_cast<size_t>(p) : 0];
  }
  int64_t panel_of(int64_t unit, int p) const { return sources_.size() == 2 ? unit : 2 * unit + p; }

  void build(const StoredTiles& source, int64_t panel, int64_t b, uint8_t* out) const {
    if (weights_.layout().is_float()) {
      alignas(64) uint16_t decoded[kTileBytesBf16 / 2];
      if (kernels_.float_panel == PanelForm::kBf16)
        source.bf16_tile(panel, b, reinterpret_cast<uint16_t*>(out));
      else
        kernels_.place_float_forward(source.bf16_tile(panel, b, decoded), out);
      return;
    }
    const bool bytes = kernels_.int_panel == PanelForm::kU8;
    for (int64_t half = 0; half < 2; ++half) {
      uint8_t* place = out + half * (bytes ? kTileBytesInt8 / 2 : 64);
      if (bytes) {
        source.int8_half(panel, b, half, place);
      } else {
        alignas(64) uint8_t unpacked[kTileBytesInt8 / 2];
        kernels_.place_int_forward(source.int8_half(panel, b, half, unpacked), place);
      }
    }
  }

  const KernelTable& kernels_;
  const PackedExperts& weights_;
  int64_t block_bytes_;
  bool in_place_;
  std::vector<StoredTiles> sources_;
  std::array<uint8_t*, 2> buffers_{};
  std::array<const void*, 2> parts_{};
};

// Contracts over the outputs of one or more projections laid end to end (gate, then up). A unit is
// a block of 64 inputs.
class BackwardPanels {
 public:
  BackwardPanels(const KernelTable& kernels, const PackedExperts& weights, int64_t expert,
                 const std::vector<Projection>& projections, uint8_t* buffer)
      : kernels_(kernels), weights_(weights), block_bytes_(panel_block_bytes(kernels, weights)) {
    for (const Projection p : projections) sources_.emplace_back(kernels, weights, expert, p);
    halves_ = {buffer, buffer + blocks() * block_bytes_};
  }

  static int64_t buffer_bytes(const KernelTable& kernels, const PackedExperts& weights,
                              int64_t contraction) {
    return ForwardPanels::buffer_bytes(kernels, weights, contraction);
  }

  bool built() const { return true; }
  int64_t blocks() const {  // of 64 contracted outputs
    return sources_[0].panels() / 2 * static_cast<int64_t>(sources_.size());
  }
  const void* part(int p) const { return halves_[static_cast<size_t>(p)]; }

  void prepare(int64_t unit, int64_t begin, int64_t end) {
    const int64_t per_source = sources_[0].panels() / 2;
    for (int64_t b = begin; b < end; ++b)
      for (int64_t which = 0; which < 2; ++which) {
        const StoredTiles& source = sources_[static_cast<size_t>(b / per_source)];
        const int64_t panel = b % per_source * 2 + which;
        if (weights_.layout().is_float())
          place_float(source, panel, unit, b - begin, which);
        else
          place_int(source, panel, unit, b - begin, which);
      }
  }

  Prefetch prefetch(int64_t unit, int p, int64_t share, int64_t shares) const {
    const bool two = sources_.size() == 2;
    const StoredTiles& source = sources_[two ? static_cast<size_t>(p) : 0];
    const int64_t lines = source.panels() * (weights_.layout().tile_bytes() / 64);
    const int64_t own = two ? lines : lines / 2;
    return prefetch_share(weights_, source.tile(0, unit),
                          source.blocks() * weights_.layout().tile_bytes(), two ? 0 : own * p, own,
                          share, shares);
  }

 private:
  // Super tile `which` of the pair that makes block `at` of the panels: 32 of its 64 outputs.
  void place_int(const StoredTiles& source, int64_t panel, int64_t unit, int64_t at,
                 int64_t which) {
    const bool bytes = kernels_.int_panel == PanelForm::kU8;
    alignas(64) uint8_t unpacked[kTileBytesInt8 / 2];
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t sixteenth = 2 * which + half;  // of the block's 64 outputs
      void* pieces[4];
      for (int64_t g = 0; g < 4; ++g)
        pieces[g] = halves_[static_cast<size_t>(g / 2)] + at * block_bytes_ +
                    (bytes ? g % 2 * 1024 + sixteenth * 256 : g % 2 * 64 + sixteenth * 1024);
      kernels_.place_int_backward(source.int8_half(panel, unit, half, unpacked), pieces);
    }
  }
  void place_float(const StoredTiles& source, int64_t panel, int64_t unit, int64_t at,
                   int64_t which) {
    alignas(64) uint16_t decoded[kTileBytesBf16 / 2];
    void* pieces[2];
    for (size_t h = 0; h < 2; ++h)
      pieces[h] = halves_[h] + at * block_bytes_ + which * block_bytes_ / 2;
    kernels_.place_float_backward(source.bf16_tile(panel, unit, decoded), pieces);
  }

  const KernelTable& kernels_;
  const PackedExperts& weights_;
  int64_t block_bytes_;
  std::vector<StoredTiles> sources_;
  std::array<uint8_t*, 2> halves_{};
};

}  // namespace kt
