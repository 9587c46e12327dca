#include <algorithm>
#include <cstring>

#include "activation_rows.h"
#include "experts_block.h"
#include "lora_operands.h"
#include "panels.h"
#include "work_items.h"

namespace kt {
namespace {

// Columns of a LoRA gradient per work item, and rows of its input gathered at a time.
constexpr int64_t kGradientCols = 256;
constexpr int64_t kGradientRows = 64;

}  // namespace

BlockReport ExpertsBlock::backward(const BlockInput& in, const void* d_out,
                                   const KeptActivations& kept, void* d_hidden, float* d_weight,
                                   const std::array<LoraGradient, kProjectionCount>& d_lora) {
  BlockReport report;
  Phases phases(pool_, report);
  const PackedExperts& weights = *in.weights;
  const int64_t d = weights.hidden(), dp = weights.hidden_padded();
  const int64_t fp = weights.intermediate_padded();
  const Routing routing = route(in.index, in.tokens, in.top_k, weights.experts());
  report.rows = routing.rows;
  report.max_rows = routing.max_count();
  report.active_experts = static_cast<int64_t>(routing.active.size());
  const int64_t token_items = ceil_div(in.tokens, kTokensPerItem);
  const int64_t f_blocks = fp / kBlock, d_blocks = dp / kBlock;

  Scratch scratch(cache_, pool_.size());
  const LoraOperands lora(in, routing, kernels_, phases, scratch);
  const FloatRows x(in.hidden, in.type, in.tokens, d, scratch);
  const FloatRows g(d_out, in.type, in.tokens, d, scratch);
  ActivationRows dy_rows(in.compute, routing.rows, dp, scratch);
  ActivationRows dgu_rows(in.compute, routing.rows, 2 * fp, scratch);
  float* dgu_RF2 = scratch.floats(routing.rows * 2 * fp);
  float* dx_RD = scratch.floats(routing.rows * dp);
  float* d_weight_parts = scratch.floats(routing.rows * f_blocks);
  float* h_RF = lora.any(Projection::kDown) ? scratch.floats(routing.rows * fp) : nullptr;
  std::array<float*, kProjectionCount> q{};
  for (int i = 0; i < kProjectionCount; ++i)
    if (in.lora[i].rank) q[i] = scratch.floats(routing.rows * in.lora[i].rank);

  const auto weight_of_row = [&](int64_t r) { return in.routing_weight[routing.slot_of_row[r]]; };
  const auto x_of_row = [&](int64_t r) { return x.row(routing.token_of_row(r)); };
  const auto dout_of_row = [&](int64_t r) { return g.row(routing.token_of_row(r)); };
  const auto h_of_row = [&](int64_t r) { return h_RF + r * fp; };
  const auto dgate_of_row = [&](int64_t r) { return dgu_RF2 + r * 2 * fp; };
  const auto dup_of_row = [&](int64_t r) { return dgu_RF2 + r * 2 * fp + fp; };

  phases.run("to_float", token_items, in.tokens * dp * 2, [&](int64_t item, int) {
    const int64_t end = std::min(in.tokens, (item + 1) * kTokensPerItem);
    for (int64_t t = item * kTokensPerItem; t < end; ++t) {
      g.convert(kernels_, t);
      if (lora.any(Projection::kGate) || lora.any(Projection::kUp)) x.convert(kernels_, t);
    }
  });

  const std::vector<ExpertItem> by_rows = row_items(routing);
  phases.run("pack_d_out", static_cast<int64_t>(by_rows.size()),
             routing.rows * dp * (4 + lora.rank_sum()), [&](int64_t i, int) {
               const ExpertItem& item = by_rows[i];
               const float* fold = weights.scales(item.expert, Projection::kDown);
               for (int64_t r = item.begin; r < item.end; ++r)
                 dy_rows.pack(kernels_, r, dout_of_row(r), fold);
               lora.project_output(Projection::kDown, item.expert, item.begin, item.end,
                                   dout_of_row, q[2]);
             });

  const int64_t f_group = group_size(routing, f_blocks, pool_.size());
  const std::vector<ExpertItem> dh_items = expert_items(routing, f_blocks, f_group);
  const int64_t panel_bytes = std::max(dp, 2 * fp) * kBlock * weights.tile_bytes() / 2048;
  phases.run(
      "d_h", static_cast<int64_t>(dh_items.size()), routing.rows * fp * dp,
      [&](int64_t i, int thread) {
        const ExpertItem& item = dh_items[i];
        const int64_t base = routing.offset[item.expert];
        const Chunks chunks(routing.count(item.expert), dy_rows.terms());
        BackwardPanels panels(weights, item.expert, {Projection::kDown},
                              scratch.thread_bytes(thread, panel_bytes));
        Tile dh, gate, up, dgate, dup, h;
        for (int64_t block = item.begin; block < item.end; ++block) {
          panels.build(kernels_, block);
          for (int64_t c = 0; c < chunks.count; ++c)
            for (int m = 0; m < chunks.size(c); ++m)
              d_weight_parts[(base + chunks.begin(c) + m) * f_blocks + block] = 0.0f;
          for (int half = 0; half < 2; ++half) {
            const int64_t col = block * kBlock + half * kPanelCols;
            for (int64_t c = 0; c < chunks.count; ++c) {
              const int64_t r = base + chunks.begin(c);
              const int rows = chunks.size(c);
              dy_rows.dot(kernels_, r, rows, panels.half(half), nullptr,
                          panels.prefetch(block + 1, block + 1 == item.end, half, c, chunks.count),
                          dh);
              lora.add_input(Projection::kDown, item.expert, r, rows, q[2], col, dh);
              copy_tile_in(rows, kept.gate + r * fp + col, fp, gate);
              copy_tile_in(rows, kept.up + r * fp + col, fp, up);
              for (int m = 0; m < rows; ++m) {
                const int at = m * static_cast<int>(kPanelCols);
                d_weight_parts[(r + m) * f_blocks + block] +=
                    kernels_.gate_backward(in.activation, kPanelCols, weight_of_row(r + m), dh + at,
                                           gate + at, up + at, dgate + at, dup + at, h + at);
              }
              copy_tile_out(rows, dgate, dgu_RF2 + r * 2 * fp + col, 2 * fp);
              copy_tile_out(rows, dup, dgu_RF2 + r * 2 * fp + fp + col, 2 * fp);
              if (h_RF) copy_tile_out(rows, h, h_RF + r * fp + col, fp);
            }
          }
        }
      });

  phases.run("pack_d_gate_up", static_cast<int64_t>(by_rows.size()),
             routing.rows * fp * (8 + lora.rank_sum()), [&](int64_t i, int) {
               const ExpertItem& item = by_rows[i];
               // Gate and up scales lie next to each other, as the two halves of a row do.
               const float* fold = weights.scales(item.expert, Projection::kGate);
               for (int64_t r = item.begin; r < item.end; ++r)
                 dgu_rows.pack(kernels_, r, dgate_of_row(r), fold);
               lora.project_output(Projection::kGate, item.expert, item.begin, item.end,
                                   dgate_of_row, q[0]);
               lora.project_output(Projection::kUp, item.expert, item.begin, item.end, dup_of_row,
                                   q[1]);
             });

  const int64_t d_group = group_size(routing, d_blocks, pool_.size());
  const std::vector<ExpertItem> dx_items = expert_items(routing, d_blocks, d_group);
  phases.run("d_x", static_cast<int64_t>(dx_items.size()), routing.rows * fp * dp,
             [&](int64_t i, int thread) {
               const ExpertItem& item = dx_items[i];
               const int64_t base = routing.offset[item.expert];
               const Chunks chunks(routing.count(item.expert), dgu_rows.terms());
               BackwardPanels panels(weights, item.expert, {Projection::kGate, Projection::kUp},
                                     scratch.thread_bytes(thread, panel_bytes));
               Tile tile;
               for (int64_t block = item.begin; block < item.end; ++block) {
                 panels.build(kernels_, block);
                 for (int half = 0; half < 2; ++half) {
                   const int64_t col = block * kBlock + half * kPanelCols;
                   for (int64_t c = 0; c < chunks.count; ++c) {
                     const int64_t r = base + chunks.begin(c);
                     const int rows = chunks.size(c);
                     dgu_rows.dot(
                         kernels_, r, rows, panels.half(half), nullptr,
                         panels.prefetch(block + 1, block + 1 == item.end, half, c, chunks.count),
                         tile);
                     lora.add_input(Projection::kGate, item.expert, r, rows, q[0], col, tile);
                     lora.add_input(Projection::kUp, item.expert, r, rows, q[1], col, tile);
                     copy_tile_out(rows, tile, dx_RD + r * dp + col, dp);
                   }
                 }
               }
             });

  // Per projection: dA = sum over rows of q' input~, dB = sum over rows of d_output' p.
  struct Product {
    Projection projection;
    bool of_a;
    int64_t cols;
  };
  std::vector<Product> products;
  for (const Projection proj : {Projection::kGate, Projection::kUp, Projection::kDown})
    if (lora.any(proj)) {
      products.push_back({proj, true, weights.inputs(proj)});
      products.push_back({proj, false, weights.outputs(proj)});
    }
  struct GradientItem {
    Product product;
    int32_t expert;
    int64_t col;
  };
  std::vector<GradientItem> gradient_items;
  for (const Product& product : products)
    for (int32_t e = 0; e < weights.experts(); ++e)
      for (int64_t col = 0; col < product.cols; col += kGradientCols)
        gradient_items.push_back({product, e, col});
  phases.run(
      "lora_gradients", static_cast<int64_t>(gradient_items.size()),
      (routing.rows + weights.experts()) * (dp + fp) * lora.rank_sum(), [&](int64_t i, int thread) {
        const GradientItem& item = gradient_items[i];
        const Projection proj = item.product.projection;
        const int which = static_cast<int>(proj);
        const int rank = in.lora[which].rank;
        const int64_t cols = std::min(kGradientCols, item.product.cols - item.col);
        const int64_t cols_padded = std::min(kGradientCols, padded(item.product.cols) - item.col);
        float* sum = scratch.thread_floats(
            thread, rank * kGradientCols + kGradientRows * (kGradientCols + rank));
        float* gathered = sum + rank * kGradientCols;
        float* factor = gathered + kGradientRows * kGradientCols;
        std::fill_n(sum, rank * kGradientCols, 0.0f);
        const int64_t end = routing.offset[item.expert + 1];
        const float* rows[kGradientRows];
        for (int64_t begin = routing.offset[item.expert]; begin < end; begin += kGradientRows) {
          const int count = static_cast<int>(std::min(kGradientRows, end - begin));
          const float* left = (item.product.of_a ? q[which] : kept.lora_down[which]) + begin * rank;
          if (proj == Projection::kDown) {
            // Down's output is weighted by the router, so both of its gradients carry the weight.
            for (int m = 0; m < count; ++m)
              for (int j = 0; j < rank; ++j)
                factor[m * rank + j] = weight_of_row(begin + m) * left[m * rank + j];
            left = factor;
          }
          for (int m = 0; m < count; ++m) {
            const int64_t r = begin + m;
            const float* row;
            if (item.product.of_a)
              row = proj == Projection::kDown ? h_of_row(r) : x_of_row(r);
            else
              row = proj == Projection::kDown   ? dout_of_row(r)
                    : proj == Projection::kGate ? dgate_of_row(r)
                                                : dup_of_row(r);
            rows[m] = row + item.col;
            if (item.product.of_a && in.dropout > 0.0f) {
              float* dropped = gathered + m * kGradientCols;
              kernels_.dropout_row(lora.dropout_key(proj, r), item.col, cols_padded, rows[m],
                                   dropped);
              rows[m] = dropped;
            }
          }
          kernels_.rank_outer(count, rank, cols_padded, left, rows, sum, kGradientCols);
        }
        if (item.product.of_a) {
          float* out = d_lora[which].a + item.expert * rank * item.product.cols + item.col;
          for (int j = 0; j < rank; ++j)
            std::memcpy(out + j * item.product.cols, sum + j * kGradientCols,
                        sizeof(float) * static_cast<size_t>(cols));
        } else {
          float* out = d_lora[which].b + (item.expert * item.product.cols + item.col) * rank;
          for (int64_t n = 0; n < cols; ++n)
            for (int j = 0; j < rank; ++j) out[n * rank + j] = sum[j * kGradientCols + n];
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
          for (int64_t b = 0; b < f_blocks; ++b) total += d_weight_parts[r * f_blocks + b];
        }
        d_weight[slot] = total;
      }
      sum.write(kernels_, dp, d, in.type, d_hidden, t);
    }
  });
  return report;
}

}  // namespace kt
