// The LoRA factors of one call, laid out for the rank kernels, and the four products with them.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>

#include "products.h"

namespace kt {

class LoraOperands {
 public:
  LoraOperands(const BlockInput& in, const Routing& routing, const KernelTable& kernels,
               Scratch& scratch)
      : in_(in), routing_(routing), kernels_(kernels) {
    for (int i = 0; i < kProjectionCount; ++i) {
      const Lora& lora = in.lora[static_cast<size_t>(i)];
      if (!lora.rank) continue;
      Operand& op = operands_[static_cast<size_t>(i)];
      const Projection p = static_cast<Projection>(i);
      op.inputs = in.weights->layout().inputs(p);
      op.outputs = in.weights->layout().outputs(p);
      op.lda = padded(op.inputs);
      op.ldb = padded(op.outputs);
      const int64_t pairs = lora.pairs(in.weights->layout().experts);
      op.a_copy = op.lda == op.inputs ? nullptr : scratch.floats(pairs * lora.rank * op.lda);
      op.bt = scratch.floats(pairs * lora.rank * op.ldb);
    }
  }

  // Fills what the products read.
  void lay_out(Phases& phases) const {
    if (!rank_sum()) return;
    const int64_t active = static_cast<int64_t>(routing_.active.size());
    phases.run("lora_layout", active * kProjectionCount, active * rank_sum() * 1024,
               [&](int64_t item, int) {
                 lay_out(static_cast<int>(item % kProjectionCount),
                         routing_.active[static_cast<size_t>(item / kProjectionCount)]);
               });
  }

  // Ranks of all projections together.
  int64_t rank_sum() const {
    int64_t sum = 0;
    for (const Lora& lora : in_.lora) sum += lora.rank;
    return sum;
  }

  int64_t max_rank() const {
    int64_t most = 0;
    for (const Lora& lora : in_.lora) most = std::max<int64_t>(most, lora.rank);
    return most;
  }

  bool any(Projection p) const { return in_.lora[static_cast<size_t>(p)].rank > 0; }

  // Where the projection's inputs begin among those of the whole layer.
  int64_t first_input(Projection p) const { return p == Projection::kDown ? in_.first_channel : 0; }

  DropoutKey dropout_key(Projection p, int64_t row) const {
    // splitmix64 over (seed, projection, token and choice): the same in forward, recompute and
    // backward, and independent of how rows are sorted.
    uint64_t z = in_.dropout_seed +
                 0x9e3779b97f4a7c15ull *
                     (static_cast<uint64_t>(routing_.slot_of_row[row]) * kProjectionCount +
                      static_cast<uint64_t>(p) + 1);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    DropoutKey key;
    key.row_key = static_cast<uint32_t>(z);
    key.threshold = static_cast<uint32_t>(static_cast<double>(in_.dropout) * 4294967296.0);
    key.keep_scale = 1.0f / (1.0f - in_.dropout);
    return key;
  }

  // p[row] = scaling * input~[row] A', rows begin to end of one expert.
  template <class RowOf>
  void project_input(Projection p, int64_t expert, int64_t begin, int64_t end, const RowOf& row_of,
                     float* out) const {
    if (!any(p)) return;
    const Lora& lora = in_.lora[static_cast<size_t>(p)];
    const Operand& op = operands_[static_cast<size_t>(p)];
    std::vector<float> dropped;
    if (in_.dropout > 0.0f) dropped.resize(static_cast<size_t>((end - begin) * op.lda));
    std::vector<const float*> rows;
    for (int64_t r = begin; r < end; ++r) {
      const float* row = row_of(r);
      if (in_.dropout > 0.0f) {
        float* copy = dropped.data() + (r - begin) * op.lda;
        kernels_.dropout_row(dropout_key(p, r), first_input(p), op.lda, row, copy);
        row = copy;
      }
      rows.push_back(row);
    }
    kernels_.rank_project(static_cast<int>(rows.size()), lora.rank, op.lda, rows.data(),
                          a(p, expert), op.lda, lora.scaling, out + begin * lora.rank, lora.rank);
  }

  // q[row] = scaling * d_output[row] B.
  template <class RowOf>
  void project_output(Projection p, int64_t expert, int64_t begin, int64_t end, const RowOf& row_of,
                      float* out) const {
    if (!any(p)) return;
    const Lora& lora = in_.lora[static_cast<size_t>(p)];
    const Operand& op = operands_[static_cast<size_t>(p)];
    std::vector<const float*> rows;
    for (int64_t r = begin; r < end; ++r) rows.push_back(row_of(r));
    kernels_.rank_project(static_cast<int>(rows.size()), lora.rank, op.ldb, rows.data(),
                          bt(p, expert), op.ldb, lora.scaling, out + begin * lora.rank, lora.rank);
  }

  // tile += p B', for 32 outputs from `col`.
  void add_output(Projection p, int64_t expert, int64_t row, int rows, const float* factors,
                  int64_t col, float* tile) const {
    if (!any(p)) return;
    const int rank = in_.lora[static_cast<size_t>(p)].rank;
    kernels_.rank_expand(rows, rank, factors + row * rank, rank, bt(p, expert) + col,
                         operands_[static_cast<size_t>(p)].ldb, tile);
  }

  // tile += dropout mask * (q A), for 32 inputs from `col`.
  void add_input(Projection p, int64_t expert, int64_t row, int rows, const float* factors,
                 int64_t col, float* tile) const {
    if (!any(p)) return;
    const int rank = in_.lora[static_cast<size_t>(p)].rank;
    const float* a_cols = a(p, expert) + col;
    const int64_t lda = operands_[static_cast<size_t>(p)].lda;
    if (in_.dropout == 0.0f) {
      kernels_.rank_expand(rows, rank, factors + row * rank, rank, a_cols, lda, tile);
      return;
    }
    Tile path{};
    kernels_.rank_expand(rows, rank, factors + row * rank, rank, a_cols, lda, path);
    for (int m = 0; m < rows; ++m) {
      float* path_row = path + m * kPanelCols;
      kernels_.dropout_row(dropout_key(p, row + m), first_input(p) + col, kPanelCols, path_row,
                           path_row);
      for (int64_t j = 0; j < kPanelCols; ++j) tile[m * kPanelCols + j] += path_row[j];
    }
  }

 private:
  struct Operand {
    int64_t inputs = 0, outputs = 0;
    int64_t lda = 0, ldb = 0;
    float* a_copy = nullptr;  // [pairs, rank, inputs padded], only where padding is needed
    float* bt = nullptr;      // [pairs, rank, outputs padded]
  };

  const float* a(Projection p, int64_t expert) const {
    const Operand& op = operands_[static_cast<size_t>(p)];
    const Lora& lora = in_.lora[static_cast<size_t>(p)];
    return (op.a_copy ? op.a_copy : lora.a) + lora.pair(expert) * lora.rank * op.lda;
  }
  const float* bt(Projection p, int64_t expert) const {
    const Operand& op = operands_[static_cast<size_t>(p)];
    const Lora& lora = in_.lora[static_cast<size_t>(p)];
    return op.bt + lora.pair(expert) * lora.rank * op.ldb;
  }

  void lay_out(int which, int64_t expert) const {
    const Lora& lora = in_.lora[static_cast<size_t>(which)];
    if (!lora.rank || (lora.shared && expert != routing_.active[0])) return;
    const Operand& op = operands_[static_cast<size_t>(which)];
    const int64_t pair = lora.pair(expert);
    const float* b = lora.b + pair * op.outputs * lora.rank;
    float* bt = op.bt + pair * lora.rank * op.ldb;
    for (int j = 0; j < lora.rank; ++j) {
      float* row = bt + j * op.ldb;
      for (int64_t n = 0; n < op.outputs; ++n) row[n] = b[n * lora.rank + j];
      std::fill(row + op.outputs, row + op.ldb, 0.0f);
    }
    if (!op.a_copy) return;
    for (int j = 0; j < lora.rank; ++j) {
      float* row = op.a_copy + (pair * lora.rank + j) * op.lda;
      std::memcpy(row, lora.a + (pair * lora.rank + j) * op.inputs,
                  sizeof(float) * static_cast<size_t>(op.inputs));
      std::fill(row + op.inputs, row + op.lda, 0.0f);
    }
  }

  const BlockInput& in_;
  const Routing& routing_;
  const KernelTable& kernels_;
  std::array<Operand, kProjectionCount> operands_;
};

}  // namespace kt
