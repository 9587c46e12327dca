#include "routing.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace kt {

Routing route(const int64_t* index, int64_t tokens, int64_t top_k, int64_t experts) {
  Routing r;
  r.tokens = tokens;
  r.top_k = top_k;
  r.end_expert = static_cast<int32_t>(experts);
  r.offset.assign(static_cast<size_t>(experts + 1), 0);
  const int64_t slots = tokens * top_k;
  if (slots > INT32_MAX)
    throw std::invalid_argument("top_k_index: " + std::to_string(slots) +
                                " routed rows in one call, expected fewer than 2^31");
  for (int64_t s = 0; s < slots; ++s) {
    const int64_t e = index[s];
    if (e < 0 || e > experts)
      throw std::invalid_argument("top_k_index: token " + std::to_string(s / top_k) +
                                  " names expert " + std::to_string(e) + ", expected 0 to " +
                                  std::to_string(experts - 1) + " (or " + std::to_string(experts) +
                                  " to skip)");
    if (e < experts) ++r.offset[static_cast<size_t>(e + 1)];
  }
  for (int64_t e = 0; e < experts; ++e) {
    if (r.offset[e + 1] > 0) r.active.push_back(static_cast<int32_t>(e));
    r.offset[e + 1] += r.offset[e];
  }
  r.rows = r.offset[experts];
  r.row_of_slot.assign(static_cast<size_t>(slots), -1);
  r.slot_of_row.resize(static_cast<size_t>(r.rows));
  std::vector<int64_t> next(r.offset.begin(), r.offset.end() - 1);
  for (int64_t s = 0; s < slots; ++s) {
    if (index[s] == experts) continue;
    const int64_t row = next[index[s]]++;
    r.row_of_slot[s] = static_cast<int32_t>(row);
    r.slot_of_row[row] = static_cast<int32_t>(s);
  }
  // Largest first, so that the last work items are small and the threads end together.
  std::stable_sort(r.active.begin(), r.active.end(),
                   [&](int32_t a, int32_t b) { return r.count(a) > r.count(b); });
  return r;
}

Routing evenly(int64_t tokens, int64_t top_k, int64_t experts) {
  Routing routing;
  routing.tokens = tokens;
  routing.top_k = top_k;
  routing.rows = tokens * top_k;
  routing.end_expert = static_cast<int32_t>(experts);
  for (int64_t e = 0; e <= experts; ++e) routing.offset.push_back(routing.rows * e / experts);
  for (int64_t e = 0; e < experts; ++e)
    if (routing.count(e)) routing.active.push_back(static_cast<int32_t>(e));
  return routing;
}

std::vector<RunOfExperts> runs_of(const Routing& routing, int64_t max_rows) {
  std::vector<RunOfExperts> runs;
  int32_t begin = 0;
  for (int32_t e = 1; max_rows > 0 && e < routing.end_expert; ++e)
    if (routing.offset[e + 1] - routing.offset[begin] > max_rows) {
      runs.push_back({begin, e, runs.empty(), false});
      begin = e;
    }
  runs.push_back({begin, routing.end_expert, runs.empty(), true});
  return runs;
}

Routing part_of(const Routing& whole, const RunOfExperts& run) {
  Routing r;
  r.tokens = whole.tokens;
  r.top_k = whole.top_k;
  r.first_expert = run.begin;
  r.end_expert = run.end;
  const int64_t begin = whole.offset[run.begin], end = whole.offset[run.end];
  r.rows = end - begin;
  for (const int64_t row : whole.offset) r.offset.push_back(std::clamp(row, begin, end) - begin);
  for (const int32_t e : whole.active)
    if (e >= run.begin && e < run.end) r.active.push_back(e);
  r.row_of_slot.reserve(whole.row_of_slot.size());
  for (const int32_t row : whole.row_of_slot)
    r.row_of_slot.push_back(row >= begin && row < end ? static_cast<int32_t>(row - begin) : -1);
  if (!whole.slot_of_row.empty())
    r.slot_of_row.assign(whole.slot_of_row.begin() + begin, whole.slot_of_row.begin() + end);
  return r;
}

}  // namespace kt
