// Sorting the T * K routed rows by expert.
#pragma once

#include <cstdint>
#include <vector>

namespace kt {

struct Routing {
  int64_t tokens = 0, top_k = 0, rows = 0;
  int32_t first_expert = 0, end_expert = 0;  // whose rows these are, the last one excluded
  std::vector<int64_t> offset;       // [E + 1]: rows of expert e are offset[e] .. offset[e + 1]
  std::vector<int32_t> row_of_slot;  // [T * K]: the row of (token, k), or -1 when skipped
  std::vector<int32_t> slot_of_row;  // [R]: token * K + k
  std::vector<int32_t> active;       // experts that have rows, most rows first

  int64_t count(int64_t expert) const { return offset[expert + 1] - offset[expert]; }
  int64_t token_of_row(int64_t row) const { return slot_of_row[row] / top_k; }
  int64_t max_count() const { return active.empty() ? 0 : count(active[0]); }
};

// Stable counting sort of index[T][K]. An index equal to `experts` is the expert-parallel
// sentinel of Transformers and is skipped; anything else outside 0 .. experts - 1 throws
// std::invalid_argument that names the token.
Routing route(const int64_t* index, int64_t tokens, int64_t top_k, int64_t experts);

// As many rows for every expert as can be; without the rows' places, for counting what they take.
Routing evenly(int64_t tokens, int64_t top_k, int64_t experts);

// Experts that are computed together, [begin, end), and their place among all runs.
struct RunOfExperts {
  int32_t begin = 0, end = 0;
  bool first = true, last = true;
};

// Runs with at most `max_rows` rows each, or one expert with more; all experts where it is 0.
std::vector<RunOfExperts> runs_of(const Routing& routing, int64_t max_rows);

// The rows of a run, from 0 on.
Routing part_of(const Routing& whole, const RunOfExperts& run);

}  // namespace kt
