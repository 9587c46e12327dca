// The shares of a unit's prefetch name each line of the next unit's stored weights exactly once.
#include <cstdio>
#include <map>
#include <string>

#include "../../csrc/core/dispatch.h"
#include "../../csrc/core/panels.h"

namespace {

using Lines = std::map<const char*, int>;

void add(const kt::Prefetch& next, Lines& lines) {
  for (int64_t i = next.first; i < next.first + next.count; ++i) {
    const int64_t in_tile = i & ((int64_t{1} << next.tile_shift) - 1);
    ++lines[next.base + (i >> next.tile_shift) * next.tile_stride + in_tile * 64];
  }
}

template <class Panels>
Lines prefetched(const Panels& panels, int64_t unit, int64_t shares) {
  Lines lines;
  for (int64_t share = 0; share < shares; ++share)
    for (int p = 0; p < 2; ++p) add(panels.prefetch(unit, p, share, shares), lines);
  return lines;
}

void add_tile(const kt::PackedExperts& weights, kt::Projection p, int64_t panel, int64_t block,
              Lines& lines) {
  const int64_t bytes = weights.layout().tile_bytes();
  const uint8_t* tile = kt::tile_of(weights.matrix(1, p), bytes, panel, block);
  for (int64_t at = 0; at < bytes; at += 64) ++lines[reinterpret_cast<const char*>(tile) + at];
}

}  // namespace

int main() {
  using P = kt::Projection;
  const kt::KernelTable& kernels = kt::select_kernels("portable", {});
  int checked = 0, wrong = 0;
  for (const kt::WeightFormat format :
       {kt::WeightFormat::kInt8, kt::WeightFormat::kBf16, kt::WeightFormat::kInt4Group32})
    for (const std::vector<P>& projections :
         {std::vector<P>{P::kGate, P::kUp}, std::vector<P>{P::kUp}, std::vector<P>{P::kDown}}) {
      const kt::PackedExperts weights(kt::PackedLayout{2, 200, 330, format, true, {}, {}});
      const int64_t blocks = kt::padded(weights.layout().inputs(projections[0])) / kt::kBlock;
      const int64_t panels_of_n =
          kt::padded(weights.layout().outputs(projections[0])) / kt::kPanelCols;
      std::vector<uint8_t> buffer(1 << 20);
      const kt::ForwardPanels forward(kernels, weights, 1, projections, buffer.data());
      const kt::BackwardPanels backward(kernels, weights, 1, projections, buffer.data());
      for (const int64_t shares : {1, 3, 19}) {
        const bool two = projections.size() == 2;
        for (int64_t unit = 0; unit < (two ? panels_of_n : panels_of_n / 2); ++unit) {
          Lines want;
          for (int64_t p = 0; p < 2; ++p)
            for (int64_t b = 0; b < blocks; ++b)
              add_tile(weights, projections[two ? p : 0], two ? unit : 2 * unit + p, b, want);
          wrong += prefetched(forward, unit, shares) != want;
          ++checked;
        }
        for (int64_t unit = 0; unit < blocks; ++unit) {
          Lines want;
          for (const P p : projections)
            for (int64_t n = 0; n < panels_of_n; ++n)
              add_tile(weights, p, n, unit, want);
          wrong += prefetched(backward, unit, shares) != want;
          ++checked;
        }
      }
    }
  std::printf("%d units, %d wrong\n", checked, wrong);
  return checked < 100 || wrong ? 1 : 0;
}
