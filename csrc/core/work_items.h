// How a call is cut into phases, work items and tiles.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "experts_block.h"

namespace kt {

constexpr int64_t kTokensPerItem = 16;
constexpr int64_t kRowsPerItem = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Below this many operations (some 20 microseconds on one thread) waking others takes longer.
constexpr int64_t kWorthSharing = int64_t{1} << 20;

// Runs phases on the pool and notes how long each took.
class Phases {
 public:
  Phases(ThreadPool& pool, BlockReport& report) : pool_(pool), report_(report) {}

  // `operations` is an estimate of the whole phase's work.
  void run(const char* name, int64_t items, int64_t operations, const ThreadPool::Body& body) {
    const auto start = std::chrono::steady_clock::now();
    if (operations < kWorthSharing)
      for (int64_t i = 0; i < items; ++i) body(i, 0);
    else
      pool_.run(items, body);
    const std::chrono::duration<double, std::milli> ms = std::chrono::steady_clock::now() - start;
    report_.phase_ms.emplace_back(name, ms.count());
  }

 private:
  ThreadPool& pool_;
  BlockReport& report_;
};

// Work items (expert, begin, end) that cut `units` of each active expert into groups.
struct ExpertItem {
  int32_t expert;
  int64_t begin, end;
};

inline std::vector<ExpertItem> expert_items(const Routing& routing, int64_t units, int64_t group) {
  std::vector<ExpertItem> items;
  for (const int32_t expert : routing.active)
    for (int64_t begin = 0; begin < units; begin += group)
      items.push_back({expert, begin, std::min(units, begin + group)});
  return items;
}

inline std::vector<ExpertItem> row_items(const Routing& routing) {
  std::vector<ExpertItem> items;
  for (const int32_t expert : routing.active)
    for (int64_t row = routing.offset[expert]; row < routing.offset[expert + 1];
         row += kRowsPerItem)
      items.push_back({expert, row, std::min(routing.offset[expert + 1], row + kRowsPerItem)});
  return items;
}

// Large groups let one panel's computation prefetch the next; small ones keep all threads busy.
inline int64_t group_size(const Routing& routing, int64_t units, int threads) {
  const int64_t all = units * static_cast<int64_t>(routing.active.size());
  return std::clamp<int64_t>(all / (int64_t{8} * threads), 1, 8);
}

// Rows of one expert in nearly equal chunks that fit one call of a dot kernel.
struct Chunks {
  int64_t count, rows;
  Chunks(int64_t rows_of_expert, int terms)
      : count(ceil_div(rows_of_expert, kMaxDotRows / terms)), rows(rows_of_expert) {}
  int64_t begin(int64_t i) const { return rows * i / count; }
  int size(int64_t i) const { return static_cast<int>(begin(i + 1) - begin(i)); }
};

using Tile = float[kMaxDotRows * kPanelCols];

inline void copy_tile_out(int rows, const float* tile, float* out, int64_t stride) {
  for (int m = 0; m < rows; ++m)
    std::memcpy(out + m * stride, tile + m * kPanelCols, sizeof(float) * kPanelCols);
}

inline void copy_tile_in(int rows, const float* source, int64_t stride, float* tile) {
  for (int m = 0; m < rows; ++m)
    std::memcpy(tile + m * kPanelCols, source + m * stride, sizeof(float) * kPanelCols);
}

}  // namespace kt
