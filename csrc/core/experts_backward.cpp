#include <algorithm>
#include <cstring>

#include "activation_rows.h"
#include "experts_block.h"
#include "lora_operands.h"
#include "products.h"
#include "work_items.h"

namespace kt {
namespace {

// Columns of a LoRA gradient per work item, and rows of its input taken at a time: the sums of the
// ranks and the rows' columns share the first-level cache.
constexpr int64_t kGradientCols = 512;
constexpr int64_t kGradientRows = 32;

// Rows of one expert whose share of the gradients of B is summed while their output gradients are
// packed, and so in the cache. Shares of higher ranks are larger, so fewer of them are made.
constexpr int64_t kGradientBlock = 128;
constexpr int kGradientBlockRank = 8;

// The gradient of A: sum over rows of factor[row]' input[row], [rank, cols].
struct RankProduct {
  Projection projection;
  const float* factor_R;  // [R, rank]
  bool weighted;          // the factor still lacks the routing weight
};

// Rank products over the same source rows, computed together.
struct RankProducts {
  const std::vector<RankProduct> products;
  int64_t cols;
};

}  // namespace

BlockReport ExpertsBlock::backward(const BlockInput& in, const void* d_out,
                                   const KeptActivations& kept, void* d_hidden, float* d_weight,
                                   const std::array<LoraGradient, kProjectionCount>& d_lora) {
  BlockReport report;
  Phases phases(pool_, report);
  const PackedExperts& weights = *in.weights;
  const bool gated = weights.layout().gated;
  const int64_t d = weights.layout().hidden, dp = weights.layout().hidden_padded();
  const int64_t fp = weights.layout().intermediate_padded();
  const int64_t gp = gated ? 2 * fp : fp;  // a row of d_gate and d_up, or of d_up alone
  const Routing routing = route(in.index, in.tokens, in.top_k, weights.layout().experts);
  report.rows = routing.rows;
  report.max_rows = routing.max_count();
  report.active_experts = static_cast<int64_t>(routing.active.size());
  const int64_t token_items = ceil_div(in.tokens, kTokensPerItem);
  const int64_t f_blocks = fp / kBlock, d_blocks = dp / kBlock;

  Scratch scratch(cache_, pool_.size());
  const LoraOperands lora(in, routing, kernels_, phases, scratch);
  const FloatRows x(in.hidden, in.type, in.tokens, d, scratch);
  const FloatRows g(d_out, in.type, in.tokens, d, scratch);
  ActivationRows dy_rows(kernels_, in.compute, routing.rows, dp, scratch);
  ActivationRows dgu_rows(kernels_, in.compute, routing.rows, gp, scratch);
  float* dgu_RG = scratch.floats(routing.rows * gp);
  float* dx_RD = scratch.floats(routing.rows * dp);
  // Per block of F, and at the end the share of down's bias.
  const int64_t weight_parts = f_blocks + 1;
  float* d_weight_parts = scratch.floats(routing.rows * weight_parts);
  float* h_RF = lora.any(Projection::kDown) ? scratch.floats(routing.rows * fp) : nullptr;
  std::array<float*, kProjectionCount> q{};
  for (int i = 0; i < kProjectionCount; ++i)
    if (in.lora[i].rank) q[i] = scratch.floats(routing.rows * in.lora[i].rank);
  float* weight_R = scratch.floats(routing.rows);
  for (int64_t r = 0; r < routing.rows; ++r)
    weight_R[r] = in.routing_weight[routing.slot_of_row[r]];
  const bool stream_f = streams(routing.rows * fp), stream_d = streams(routing.rows * dp);

  const auto x_of_row = [&](int64_t r) { return x.row(routing.token_of_row(r)); };
  const auto dout_of_row = [&](int64_t r) { return g.row(routing.token_of_row(r)); };
  const auto h_of_row = [&](int64_t r) { return h_RF + r * fp; };
  const auto dgate_of_row = [&](int64_t r) { return dgu_RG + r * gp; };
  const auto dup_of_row = [&](int64_t r) { return dgu_RG + r * gp + (gated ? fp : 0); };

  phases.run("to_float", token_items, in.tokens * dp * 2, [&](int64_t item, int) {
    const int64_t end = std::min(in.tokens, (item + 1) * kTokensPerItem);
    for (int64_t t = item * kTokensPerItem; t < end; ++t) {
      g.convert(kernels_, t);
      if (lora.any(Projection::kGate) || lora.any(Projection::kUp)) x.convert(kernels_, t);
    }
  });

  // Without LoRA the blocks are only there to be packed, and small ones spread better.
  const std::vector<ExpertItem> blocks = row_items(
      routing, lora.rank_sum()
                   ? kGradientBlock * std::max<int64_t>(1, lora.max_rank() / kGradientBlockRank)
                   : kRowsPerItem);
  std::array<float*, kProjectionCount> db_parts{};  // [blocks, rank, outputs padded]
  for (int i = 0; i < kProjectionCount; ++i)
    if (in.lora[i].rank)
      db_parts[i] = scratch.floats(static_cast<int64_t>(blocks.size()) * in.lora[i].rank *
                                   padded(weights.layout().outputs(static_cast<Projection>(i))));
  // Adds rows [begin, end) to their block's share of dB: factor[row]' d_output[row], where the
  // factor of down carries the routing weight, as its output does.
  const auto add_to_db = [&](Projection proj, int64_t block, int64_t begin, int64_t end,
                             const auto& row_of) {
    if (!lora.any(proj)) return;
    const int which = static_cast<int>(proj), rank = in.lora[which].rank;
    const int64_t width = padded(weights.layout().outputs(proj));
    const float* rows[kRowsPerItem];
    std::vector<float> weighted;
    const float* factor = kept.lora_down[which] + begin * rank;
    if (proj == Projection::kDown) {
      for (int64_t r = begin; r < end; ++r)
        for (int j = 0; j < rank; ++j)
          weighted.push_back(weight_R[r] * kept.lora_down[which][r * rank + j]);
      factor = weighted.data();
    }
    for (int64_t r = begin; r < end; ++r) rows[r - begin] = row_of(r);
    kernels_.rank_outer(static_cast<int>(end - begin), rank, width, factor, rank, rows,
                        db_parts[which] + block * rank * width, width);
  };
  const auto clear_db = [&](Projection proj, int64_t block) {
    const int64_t size =
        in.lora[static_cast<int>(proj)].rank * padded(weights.layout().outputs(proj));
    if (size) std::fill_n(db_parts[static_cast<int>(proj)] + block * size, size, 0.0f);
  };
  const auto in_batches = [](const ExpertItem& item, const auto& body) {
    for (int64_t row = item.row_begin; row < item.row_end; row += kRowsPerItem)
      body(row, std::min(item.row_end, row + kRowsPerItem));
  };

  phases.run("pack_d_out", static_cast<int64_t>(blocks.size()),
             routing.rows * dp * (4 + 2 * lora.rank_sum()), [&](int64_t i, int) {
               const ExpertItem& item = blocks[i];
               const float* fold = weights.scales(item.expert, Projection::kDown);
               const float* bias = weights.bias(item.expert, Projection::kDown);
               clear_db(Projection::kDown, i);
               in_batches(item, [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) {
                   dy_rows.pack(r, dout_of_row(r), fold);
                   d_weight_parts[r * weight_parts + f_blocks] =
                       bias ? kernels_.dot_row(dp, dout_of_row(r), bias) : 0.0f;
                 }
                 lora.project_output(Projection::kDown, item.expert, begin, end, dout_of_row, q[2]);
                 add_to_db(Projection::kDown, i, begin, end, dout_of_row);
               });
             });

  const std::vector<ExpertItem> dh_items =
      expert_items(routing, f_blocks, pool_.size(), dy_rows.row_bytes());
  phases.run("d_h", static_cast<int64_t>(dh_items.size()), routing.rows * fp * dp,
             [&](int64_t i, int thread) {
               const ExpertItem& item = dh_items[i];
               BackwardPanels panels(kernels_, weights, item.expert, {Projection::kDown},
                                     scratch.thread_bytes(thread, BackwardPanels::buffer_bytes(
                                                                      kernels_, weights, dp)));
               for (int64_t unit = item.begin; unit < item.end; ++unit)
                 multiply(dy_rows, panels, unit, unit + 1 < item.end, item.row_begin, item.row_end,
                          {}, [&](int64_t row, int rows, const std::array<float*, 2>& dh) {
                            float* parts = d_weight_parts + row * weight_parts + unit;
                            for (int m = 0; m < rows; ++m) parts[m * weight_parts] = 0.0f;
                            for (int64_t half = 0; half < 2; ++half) {
                              const int64_t col = unit * kBlock + half * kPanelCols;
                              lora.add_input(Projection::kDown, item.expert, row, rows, q[2], col,
                                             dh[half]);
                              GateBackward io{};
                              io.rows = rows;
                              io.weight = weight_R + row;
                              io.dh = dh[half];
                              io.gate = gated ? kept.gate + row * fp + col : nullptr;
                              io.up = kept.up + row * fp + col;
                              io.ldk = io.ldh = fp;
                              io.dgate = gated ? dgate_of_row(row) + col : nullptr;
                              io.dup = dup_of_row(row) + col;
                              io.ldd = gp;
                              io.h = h_RF ? h_of_row(row) + col : nullptr;
                              io.d_weight = parts;
                              io.ldw = weight_parts;
                              io.stream = stream_f;
                              kernels_.gate_backward(in.gate, io);
                            }
                          });
             });

  phases.run("pack_d_gate_up", static_cast<int64_t>(blocks.size()),
             routing.rows * fp * (8 + 2 * lora.rank_sum()), [&](int64_t i, int) {
               const ExpertItem& item = blocks[i];
               // Gate and up scales lie next to each other, as the two halves of a row do.
               const float* fold =
                   weights.scales(item.expert, gated ? Projection::kGate : Projection::kUp);
               clear_db(Projection::kGate, i);
               clear_db(Projection::kUp, i);
               in_batches(item, [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) dgu_rows.pack(r, dgu_RG + r * gp, fold);
                 lora.project_output(Projection::kGate, item.expert, begin, end, dgate_of_row,
                                     q[0]);
                 lora.project_output(Projection::kUp, item.expert, begin, end, dup_of_row, q[1]);
                 add_to_db(Projection::kGate, i, begin, end, dgate_of_row);
                 add_to_db(Projection::kUp, i, begin, end, dup_of_row);
               });
             });

  const std::vector<ExpertItem> dx_items =
      expert_items(routing, d_blocks, pool_.size(), dgu_rows.row_bytes());
  const std::vector<Projection> inner =
      gated ? std::vector{Projection::kGate, Projection::kUp} : std::vector{Projection::kUp};
  phases.run(
      "d_x", static_cast<int64_t>(dx_items.size()), routing.rows * fp * dp,
      [&](int64_t i, int thread) {
        const ExpertItem& item = dx_items[i];
        BackwardPanels panels(
            kernels_, weights, item.expert, inner,
            scratch.thread_bytes(thread, BackwardPanels::buffer_bytes(kernels_, weights, gp)));
        for (int64_t unit = item.begin; unit < item.end; ++unit)
          multiply(dgu_rows, panels, unit, unit + 1 < item.end, item.row_begin, item.row_end, {},
                   [&](int64_t row, int rows, const std::array<float*, 2>& dx) {
                     for (int64_t half = 0; half < 2; ++half) {
                       const int64_t col = unit * kBlock + half * kPanelCols;
                       for (const Projection proj : {Projection::kGate, Projection::kUp})
                         lora.add_input(proj, item.expert, row, rows, q[static_cast<int>(proj)],
                                        col, dx[half]);
                       kernels_.store_tile(rows, dx[half], dx_RD + row * dp + col, dp, stream_d);
                     }
                   });
      });

  // dB: the blocks' shares of each expert summed and turned to [outputs, rank].
  std::vector<int64_t> first_block(static_cast<size_t>(weights.layout().experts), 0);
  std::vector<int64_t> block_count(static_cast<size_t>(weights.layout().experts), 0);
  for (size_t i = 0; i < blocks.size(); ++i) {
    const size_t e = static_cast<size_t>(blocks[i].expert);
    if (!block_count[e]++) first_block[e] = static_cast<int64_t>(i);
  }
  const auto write_db = [&](Projection proj, int64_t expert) {
    if (!lora.any(proj)) return;
    const int which = static_cast<int>(proj), rank = in.lora[which].rank;
    const int64_t outputs = weights.layout().outputs(proj), width = padded(outputs);
    const float* parts = db_parts[which] + first_block[expert] * rank * width;
    float* out = d_lora[which].b + expert * outputs * rank;
    for (int64_t n = 0; n < outputs; ++n)
      for (int j = 0; j < rank; ++j) {
        float sum = 0.0f;
        for (int64_t b = 0; b < block_count[expert]; ++b) sum += parts[(b * rank + j) * width + n];
        out[n * rank + j] = sum;
      }
  };
  phases.run("lora_b_gradients", weights.layout().experts * kProjectionCount,
             weights.layout().experts * (dp + 2 * fp) * lora.rank_sum(), [&](int64_t i, int) {
               write_db(static_cast<Projection>(i % kProjectionCount), i / kProjectionCount);
             });

  // dA = sum over rows of q' input~; down's q lacks the routing weight.
  std::vector<RankProducts> rank_products;
  const auto add_products = [&](const std::vector<RankProduct>& products) {
    std::vector<RankProduct> present;
    for (const RankProduct& product : products)
      if (lora.any(product.projection)) present.push_back(product);
    if (!present.empty())
      rank_products.push_back({present, weights.layout().inputs(present[0].projection)});
  };
  const RankProduct a_gate{Projection::kGate, q[0], false}, a_up{Projection::kUp, q[1], false};
  if (in.dropout > 0.0f) {  // each projection drops other elements of x
    add_products({a_gate});
    add_products({a_up});
  } else {
    add_products({a_gate, a_up});
  }
  add_products({{Projection::kDown, q[2], true}});

  struct GradientItem {
    const RankProducts* group;
    int32_t expert;
    int64_t col;
  };
  std::vector<GradientItem> gradient_items;
  const auto add_items = [&](int32_t expert) {
    for (const RankProducts& group : rank_products)
      for (int64_t col = 0; col < group.cols; col += kGradientCols)
        gradient_items.push_back({&group, expert, col});
  };
  for (const int32_t expert : routing.active) add_items(expert);
  for (int32_t e = 0; e < weights.layout().experts; ++e)
    if (!routing.count(e)) add_items(e);

  phases.run(
      "lora_a_gradients", static_cast<int64_t>(gradient_items.size()),
      (routing.rows + weights.layout().experts) * (dp + fp) * lora.rank_sum(),
      [&](int64_t i, int thread) {
        const GradientItem& item = gradient_items[i];
        const std::vector<RankProduct>& products = item.group->products;
        const Projection proj = products[0].projection;
        const int64_t cols = std::min(kGradientCols, padded(item.group->cols) - item.col);
        int64_t ranks = 0;
        for (const RankProduct& product : products)
          ranks += in.lora[static_cast<int>(product.projection)].rank;
        float* sums = scratch.thread_floats(
            thread, ranks * kGradientCols + kGradientRows * (kGradientCols + ranks));
        float* gathered = sums + ranks * kGradientCols;
        float* weighted = gathered + kGradientRows * kGradientCols;
        std::fill_n(sums, ranks * kGradientCols, 0.0f);
        const int64_t end = routing.offset[item.expert + 1];
        const auto source_row = [&](int64_t r) {
          return (proj == Projection::kDown ? h_of_row(r) : x_of_row(r)) + item.col;
        };
        // Rows are copied together: at their own strides they would all fall into the same few
        // sets of the cache. Each batch is brought near while the one before is computed.
        const float* rows[kGradientRows];
        for (int64_t m = 0; m < kGradientRows; ++m) rows[m] = gathered + m * kGradientCols;
        const int64_t first = routing.offset[item.expert];
        const auto bring_near = [&](int64_t begin) {
          for (int64_t r = begin; r < std::min(end, begin + kGradientRows); ++r)
            for (int64_t j = 0; j < cols; j += 16) __builtin_prefetch(source_row(r) + j, 0, 2);
        };
        bring_near(first);
        for (int64_t begin = first; begin < end; begin += kGradientRows) {
          const int count = static_cast<int>(std::min(kGradientRows, end - begin));
          for (int m = 0; m < count; ++m) {
            float* copy = gathered + m * kGradientCols;
            if (in.dropout > 0.0f)
              kernels_.dropout_row(lora.dropout_key(proj, begin + m),
                                   lora.first_input(proj) + item.col, cols, source_row(begin + m),
                                   copy);
            else
              std::memcpy(copy, source_row(begin + m), sizeof(float) * static_cast<size_t>(cols));
          }
          bring_near(begin + kGradientRows);
          float* sum = sums;
          for (const RankProduct& product : products) {
            const int rank = in.lora[static_cast<int>(product.projection)].rank;
            const float* factor = product.factor_R + begin * rank;
            if (product.weighted) {
              for (int m = 0; m < count; ++m)
                for (int j = 0; j < rank; ++j)
                  weighted[m * rank + j] = weight_R[begin + m] * factor[m * rank + j];
              factor = weighted;
            }
            kernels_.rank_outer(count, rank, cols, factor, rank, rows, sum, kGradientCols);
            sum += rank * kGradientCols;
          }
        }
        const int64_t width = item.group->cols, real = std::min(kGradientCols, width - item.col);
        const float* sum = sums;
        for (const RankProduct& product : products) {
          const int which = static_cast<int>(product.projection), rank = in.lora[which].rank;
          float* out = d_lora[which].a + item.expert * rank * width + item.col;
          for (int j = 0; j < rank; ++j)
            std::memcpy(out + j * width, sum + j * kGradientCols,
                        sizeof(float) * static_cast<size_t>(real));
          sum += rank * kGradientCols;
        }
      });

  phases.run("reduce", token_items, routing.rows * dp * 2, [&](int64_t item, int thread) {
    TokenSum sum(scratch.thread_floats(thread, dp), in.top_k);
    const int64_t end = std::min(in.tokens, (item + 1) * kTokensPerItem);
    for (int64_t t = item * kTokensPerItem; t < end; ++t) {
      sum.clear();
      for (int64_t k = 0; k < in.top_k; ++k) {
        const int64_t slot = t * in.top_k + k;
        const int64_t r = routing.row_of_slot[slot];
        float total = 0.0f;
        if (r >= 0) {
          sum.add(1.0f, dx_RD + r * dp);
          for (int64_t b = 0; b < weight_parts; ++b) total += d_weight_parts[r * weight_parts + b];
        }
        d_weight[slot] = total;
      }
      sum.write(kernels_, dp, d, in.type, d_hidden, t);
    }
  });
  return report;
}

}  // namespace kt
