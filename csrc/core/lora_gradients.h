// The gradients of the LoRA factors of one backward.
//
//   dB = sum over rows of p[row]' d_output[row]     dA = sum over rows of q[row]' input~[row]
//
// p = s input~ A' was kept by forward, q = s d_output B is made here. dB is summed in shares, block
// by block of rows, while their output gradients are packed and so in the cache; dA at the end, in
// columns. What belongs to down lacks the routing weight until it is summed.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "lora_operands.h"

namespace kt {

class LoraGradients {
 public:
  LoraGradients(const BlockInput& in, const Routing& routing, const KernelTable& kernels,
                const LoraOperands& lora, Scratch& scratch)
      : in_(in),
        routing_(routing),
        kernels_(kernels),
        lora_(lora),
        // Without LoRA the blocks are only there to be packed, and small ones spread better.
        blocks_(
            row_items(routing, lora.rank_sum()
                                   ? kBlockRows * std::max<int64_t>(1, lora.max_rank() / kBlockRank)
                                   : kRowsPerItem)) {
    for (int i = 0; i < kProjectionCount; ++i) {
      const Projection p = static_cast<Projection>(i);
      if (!lora.any(p)) continue;
      q_[place(p)] = scratch.floats(routing.rows * rank(p));
      db_shares_[place(p)] =
          scratch.floats(static_cast<int64_t>(blocks_.size()) * rank(p) * output_width(p));
    }
  }

  // Blocks of rows of one expert, whose shares of dB are summed by `begin_block` and `add_rows`.
  const std::vector<ExpertItem>& blocks() const { return blocks_; }
  const float* q(Projection p) const { return q_[place(p)]; }

  void begin_block(Projection p, int64_t block) const {
    if (lora_.any(p)) std::fill_n(share(p, block), rank(p) * output_width(p), 0.0f);
  }
  // Of each thread, while dA is made.
  int64_t thread_floats() const {
    int64_t most = 0;
    for (const Group& group : groups_of_one_source())
      most = std::max(most, column_floats(ranks(group)));
    return most;
  }

  // At most kRowsPerItem rows of a block: their q, and their part of its share of dB.
  // row_of(r): the gradient of the projection's output, that of down without the routing weight.
  template <class RowOf>
  void add_rows(Projection p, int64_t block, int64_t begin, int64_t end, const float* p_R,
                const float* weight_R, const RowOf& row_of) const {
    if (!lora_.any(p)) return;
    lora_.project_output(p, blocks_[static_cast<size_t>(block)].expert, begin, end, row_of,
                         q_[place(p)]);
    const float* rows[kRowsPerItem];
    for (int64_t r = begin; r < end; ++r) rows[r - begin] = row_of(r);
    const int count = static_cast<int>(end - begin), r = rank(p);
    const float* factor = p_R + begin * r;
    std::vector<float> weighted;
    if (p == Projection::kDown) {
      weighted.resize(static_cast<size_t>(count * r));
      weigh(count, r, weight_R + begin, factor, weighted.data());
      factor = weighted.data();
    }
    kernels_.rank_outer(count, r, output_width(p), factor, r, rows, share(p, block),
                        output_width(p));
  }

  // dB: the shares of each expert's blocks summed and turned to [outputs, rank].
  void write_b(Phases& phases, const std::array<LoraGradient, kProjectionCount>& out) const {
    const PackedLayout& layout = in_.weights->layout();
    std::vector<int64_t> first(static_cast<size_t>(layout.experts), 0);
    std::vector<int64_t> count(static_cast<size_t>(layout.experts), 0);
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const size_t e = static_cast<size_t>(blocks_[i].expert);
      if (!count[e]++) first[e] = static_cast<int64_t>(i);
    }
    const int64_t channels = layout.hidden_padded() + 2 * layout.intermediate_padded();
    const int64_t experts = routing_.end_expert - routing_.first_expert;
    phases.run("lora_b_gradients", experts * kProjectionCount,
               experts * channels * lora_.rank_sum(), [&](int64_t i, int) {
                 const Projection p = static_cast<Projection>(i % kProjectionCount);
                 const int64_t expert = routing_.first_expert + i / kProjectionCount;
                 const size_t e = static_cast<size_t>(expert);
                 if (lora_.any(p))
                   write_b(p, first[e], count[e],
                           out[place(p)].b + expert * layout.outputs(p) * rank(p));
               });
  }

  // dA, from the rows of x and, for down, of h.
  template <class XOfRow, class HOfRow>
  void write_a(Phases& phases, Scratch& scratch, const float* weight_R, const XOfRow& x_of_row,
               const HOfRow& h_of_row,
               const std::array<LoraGradient, kProjectionCount>& out) const {
    const PackedLayout& layout = in_.weights->layout();
    const std::vector<Group> groups = groups_of_one_source();
    std::vector<ColumnItem> items;
    const auto add = [&](int32_t expert) {
      for (const Group& group : groups)
        for (int64_t col = 0; col < layout.inputs(group[0]); col += kColumns)
          items.push_back({&group, expert, col});
    };
    for (const int32_t expert : routing_.active) add(expert);
    for (int32_t e = routing_.first_expert; e < routing_.end_expert; ++e)
      if (!routing_.count(e)) add(e);
    const int64_t width = layout.hidden_padded() + layout.intermediate_padded();
    phases.run(
        "lora_a_gradients", static_cast<int64_t>(items.size()),
        (routing_.rows + routing_.end_expert - routing_.first_expert) * width * lora_.rank_sum(),
        [&](int64_t i, int thread) {
          const ColumnItem& item = items[static_cast<size_t>(i)];
          float* buffer = scratch.thread_floats(thread, column_floats(ranks(*item.group)));
          if ((*item.group)[0] == Projection::kDown)
            write_columns(item, weight_R, h_of_row, buffer, out);
          else
            write_columns(item, weight_R, x_of_row, buffer, out);
        });
  }

 private:
  // Columns of dA per work item, and rows of its input taken at a time: the sums of the ranks and
  // the rows' columns share the first-level cache.
  static constexpr int64_t kColumns = 512;
  static constexpr int64_t kRows = 32;
  // Rows whose share of dB is summed in one piece. Shares of higher ranks are larger, so fewer of
  // them are made.
  static constexpr int64_t kBlockRows = 128;
  static constexpr int kBlockRank = 8;

  // Projections of the same input, whose columns are read once for all.
  using Group = std::vector<Projection>;
  struct ColumnItem {
    const Group* group;
    int32_t expert;
    int64_t col;
  };

  static size_t place(Projection p) { return static_cast<size_t>(p); }
  int rank(Projection p) const { return in_.lora[place(p)].rank; }
  int64_t output_width(Projection p) const { return padded(in_.weights->layout().outputs(p)); }
  float* share(Projection p, int64_t block) const {
    return db_shares_[place(p)] + block * rank(p) * output_width(p);
  }
  int64_t ranks(const Group& group) const {
    int64_t sum = 0;
    for (const Projection p : group) sum += rank(p);
    return sum;
  }
  static int64_t column_floats(int64_t ranks) {
    return ranks * kColumns + kRows * (kColumns + ranks);
  }

  static void weigh(int rows, int rank, const float* weight, const float* factor, float* out) {
    for (int m = 0; m < rows; ++m)
      for (int j = 0; j < rank; ++j) out[m * rank + j] = weight[m] * factor[m * rank + j];
  }

  void write_b(Projection p, int64_t first, int64_t count, float* out) const {
    const int r = rank(p);
    const int64_t outputs = in_.weights->layout().outputs(p), width = output_width(p);
    const float* shares = db_shares_[place(p)] + first * r * width;
    for (int64_t n = 0; n < outputs; ++n)
      for (int j = 0; j < r; ++j) {
        float sum = 0.0f;
        for (int64_t b = 0; b < count; ++b) sum += shares[(b * r + j) * width + n];
        out[n * r + j] = sum;
      }
  }

  std::vector<Group> groups_of_one_source() const {
    std::vector<Group> groups;
    const auto add = [&](const Group& wanted) {
      Group present;
      for (const Projection p : wanted)
        if (lora_.any(p)) present.push_back(p);
      if (!present.empty()) groups.push_back(present);
    };
    if (in_.dropout > 0.0f) {  // each projection drops other elements of x
      add({Projection::kGate});
      add({Projection::kUp});
    } else {
      add({Projection::kGate, Projection::kUp});
    }
    add({Projection::kDown});
    return groups;
  }

  template <class RowOf>
  void write_columns(const ColumnItem& item, const float* weight_R, const RowOf& row_of,
                     float* buffer, const std::array<LoraGradient, kProjectionCount>& out) const {
    const Group& group = *item.group;
    const int64_t width = in_.weights->layout().inputs(group[0]);
    const int64_t cols = std::min(kColumns, padded(width) - item.col);
    float* sums = buffer;
    float* gathered = sums + ranks(group) * kColumns;
    float* weighted = gathered + kRows * kColumns;
    std::fill_n(sums, ranks(group) * kColumns, 0.0f);
    const int64_t first = routing_.offset[item.expert], end = routing_.offset[item.expert + 1];
    // Rows are copied together: at their own strides they would all fall into the same few sets of
    // the cache. Each batch is brought near while the one before is computed.
    const float* rows[kRows];
    for (int64_t m = 0; m < kRows; ++m) rows[m] = gathered + m * kColumns;
    const auto bring_near = [&](int64_t begin) {
      for (int64_t r = begin; r < std::min(end, begin + kRows); ++r)
        for (int64_t j = 0; j < cols; j += 16) __builtin_prefetch(row_of(r) + item.col + j, 0, 2);
    };
    bring_near(first);
    for (int64_t begin = first; begin < end; begin += kRows) {
      const int count = static_cast<int>(std::min(kRows, end - begin));
      for (int m = 0; m < count; ++m) {
        const float* source = row_of(begin + m) + item.col;
        float* copy = gathered + m * kColumns;
        if (in_.dropout > 0.0f)
          kernels_.dropout_row(lora_.dropout_key(group[0], begin + m),
                               lora_.first_input(group[0]) + item.col, cols, source, copy);
        else
          std::memcpy(copy, source, sizeof(float) * static_cast<size_t>(cols));
      }
      bring_near(begin + kRows);
      float* sum = sums;
      for (const Projection p : group) {
        const int r = rank(p);
        const float* factor = q_[place(p)] + begin * r;
        if (p == Projection::kDown) {
          weigh(count, r, weight_R + begin, factor, weighted);
          factor = weighted;
        }
        kernels_.rank_outer(count, r, cols, factor, r, rows, sum, kColumns);
        sum += r * kColumns;
      }
    }
    const int64_t real = std::min(kColumns, width - item.col);
    const float* sum = sums;
    for (const Projection p : group) {
      const int r = rank(p);
      float* target = out[place(p)].a + item.expert * r * width + item.col;
      for (int j = 0; j < r; ++j)
        std::memcpy(target + j * width, sum + j * kColumns,
                    sizeof(float) * static_cast<size_t>(real));
      sum += r * kColumns;
    }
  }

  const BlockInput& in_;
  const Routing& routing_;
  const KernelTable& kernels_;
  const LoraOperands& lora_;
  const std::vector<ExpertItem> blocks_;
  std::array<float*, kProjectionCount> q_{};          // [R, rank]
  std::array<float*, kProjectionCount> db_shares_{};  // [blocks, rank, outputs padded]
};

}  // namespace kt
