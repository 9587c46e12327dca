// The product of routed rows with a unit of weight panels.
#pragma once

#include <algorithm>

#include "activation_rows.h"
#include "panels.h"
#include "work_items.h"

namespace kt {

using Tile = float[kMaxDotRows * kPanelCols];

// With few rows a built panel is used as soon as a piece of it is there, while it is in the
// first-level cache: 256 of the contraction, 16 KB for two panels in bytes.
constexpr int64_t kFewRows = 28;
constexpr int64_t kPieceBlocks = 4;

// Runs `epilogue(row, rows, tiles)` for every tile of rows [begin, end): tiles[p] is the product
// with panel p of the unit, [rows][32], times col_scale[p][32] if that is not null. `more`: the
// next unit follows on this thread, and its weights are brought near meanwhile.
template <class Panels, class Epilogue>
void multiply(const ActivationRows& a, Panels& panels, int64_t unit, bool more, int64_t begin,
              int64_t end, const std::array<const float*, 2>& col_scale, const Epilogue& epilogue) {
  const int64_t rows = end - begin, blocks = panels.blocks();
  const int64_t tiles = ceil_div(rows, a.max_rows());
  const bool few = rows * a.sums_per_row() <= kFewRows;
  const int64_t step = panels.built() && few ? std::min(kPieceBlocks, blocks) : blocks;
  const int64_t steps = ceil_div(blocks, step);
  alignas(64) Tile sums[2], buffers[2];
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t first = s * step, count = std::min(step, blocks - first);
    panels.prepare(unit, first, first + count);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = begin + rows * t / tiles;
      const int height = static_cast<int>(begin + rows * (t + 1) / tiles - row);
      // Between pieces of the contraction, all rows keep their sums.
      const int64_t place = steps > 1 ? (row - begin) * a.sums_per_row() * kPanelCols : 0;
      std::array<float*, 2> y;
      for (int p = 0; p < 2; ++p) {
        const Prefetch next =
            more ? panels.prefetch(unit + 1, p, s * tiles + t, steps * tiles) : Prefetch{};
        const size_t which = static_cast<size_t>(p);
        a.dot(row, height, first, count, panels.part(p), s > 0, sums[which] + place, next);
        if (s + 1 == steps)
          y[which] = a.finish(row, height, col_scale[which], sums[which] + place, buffers[which]);
      }
      if (s + 1 == steps) epilogue(row, height, y);
    }
  }
}

}  // namespace kt
