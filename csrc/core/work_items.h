// How a call is cut into phases, work items and tiles.
#pragma once

#include <algorithm>
#include <chrono>
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
    for (auto& [known, sum] : report_.phase_ms)
      if (known == name) {
        sum += ms.count();
        return;
      }
    report_.phase_ms.emplace_back(name, ms.count());
  }

 private:
  ThreadPool& pool_;
  BlockReport& report_;
};

// Rows [row_begin, row_end) of one expert by units [begin, end) of its panels.
struct ExpertItem {
  int32_t expert;
  int64_t begin, end;
  int64_t row_begin, row_end;
};

// Activations that a work item goes through again for every unit stay in the second-level cache.
constexpr int64_t kRowBlockBytes = 640 << 10;
constexpr int64_t kMinRowBlock = 64;

// Items of about equal work, 8 for each thread where there are enough units, from the expert with
// the most rows to the one with the fewest. Large groups of units let one unit's computation
// prefetch the next; an expert with many rows is cut by rows too, so that skewed routing keeps all
// threads busy.
inline std::vector<ExpertItem> expert_items(const Routing& routing, int64_t units, int threads,
                                            int64_t row_bytes) {
  const int64_t block = std::max(kMinRowBlock, kRowBlockBytes / row_bytes);
  const int64_t target = std::max<int64_t>(1, routing.rows * units / (int64_t{8} * threads));
  std::vector<ExpertItem> items;
  for (const int32_t expert : routing.active) {
    const int64_t rows = routing.count(expert), base = routing.offset[expert];
    const int64_t parts = std::max<int64_t>(1, (rows + block / 2) / block);
    const int64_t group = std::clamp<int64_t>(target / ceil_div(rows, parts), 1, 8);
    for (int64_t begin = 0; begin < units; begin += group)
      for (int64_t part = 0; part < parts; ++part)
        items.push_back({expert, begin, std::min(units, begin + group), base + rows * part / parts,
                         base + rows * (part + 1) / parts});
  }
  return items;
}

// Blocks of at most `most` rows of one expert, an expert's blocks next to each other.
inline std::vector<ExpertItem> row_items(const Routing& routing, int64_t most) {
  std::vector<ExpertItem> items;
  for (const int32_t expert : routing.active) {
    const int64_t rows = routing.count(expert), base = routing.offset[expert];
    const int64_t parts = ceil_div(rows, most);
    for (int64_t part = 0; part < parts; ++part)
      items.push_back({expert, 0, 1, base + rows * part / parts, base + rows * (part + 1) / parts});
  }
  return items;
}

// Arrays that do not fit the caches are written past them: the line is not read first, and what is
// there stays. The locked instruction that ends a phase makes such stores visible to all threads.
constexpr int64_t kStreamBytes = 24 << 20;
inline bool streams(int64_t floats) { return floats * int64_t{sizeof(float)} > kStreamBytes; }

}  // namespace kt
