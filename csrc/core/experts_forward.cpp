#include <algorithm>

#include "activation_rows.h"
#include "experts_block.h"
#include "lora_operands.h"
#include "panels.h"
#include "work_items.h"

namespace kt {

BlockReport ExpertsBlock::forward(const BlockInput& in, void* out, const KeptActivations& kept) {
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

  Scratch scratch(cache_, pool_.size());
  const LoraOperands lora(in, routing, kernels_, phases, scratch);
  const FloatRows x(in.hidden, in.type, in.tokens, d, scratch);
  ActivationRows x_rows(in.compute, routing.rows, dp, scratch);
  ActivationRows h_rows(in.compute, routing.rows, fp, scratch);
  float* h_RF = scratch.floats(routing.rows * fp);
  float* y_RD = scratch.floats(routing.rows * dp);

  phases.run("pack_hidden", token_items, routing.rows * dp * 4, [&](int64_t item, int) {
    const int64_t end = std::min(in.tokens, (item + 1) * kTokensPerItem);
    for (int64_t t = item * kTokensPerItem; t < end; ++t) {
      const float* row = x.convert(kernels_, t);
      int64_t first = -1;
      for (int64_t k = 0; k < in.top_k; ++k) {
        const int64_t r = routing.row_of_slot[t * in.top_k + k];
        if (r < 0) continue;
        if (first < 0)
          x_rows.pack(kernels_, first = r, row, nullptr);
        else
          x_rows.copy(first, r);
      }
    }
  });

  const std::vector<ExpertItem> by_rows = row_items(routing);
  std::array<float*, kProjectionCount> p{};
  for (int i = 0; i < kProjectionCount; ++i)
    if (in.lora[i].rank)
      p[i] = kept.lora_down[i] ? kept.lora_down[i] : scratch.floats(routing.rows * in.lora[i].rank);
  const auto x_of_row = [&](int64_t r) { return x.row(routing.token_of_row(r)); };
  const auto h_of_row = [&](int64_t r) { return h_RF + r * fp; };

  if (lora.any(Projection::kGate) || lora.any(Projection::kUp))
    phases.run("lora_gate_up_a", static_cast<int64_t>(by_rows.size()),
               routing.rows * dp * lora.rank_sum(), [&](int64_t i, int) {
                 const ExpertItem& item = by_rows[i];
                 for (const Projection proj : {Projection::kGate, Projection::kUp})
                   lora.project_input(proj, item.expert, item.begin, item.end, x_of_row,
                                      p[static_cast<int>(proj)]);
               });

  const int64_t f_panels = fp / kPanelCols, d_panels = dp / kPanelCols;
  const std::vector<ExpertItem> gate_items =
      expert_items(routing, f_panels, group_size(routing, f_panels, pool_.size()));
  phases.run("gate_up", static_cast<int64_t>(gate_items.size()), routing.rows * fp * dp,
             [&](int64_t i, int) {
               const ExpertItem& item = gate_items[i];
               const int64_t base = routing.offset[item.expert];
               const Chunks chunks(routing.count(item.expert), x_rows.terms());
               const ForwardPanels gate(weights, item.expert, Projection::kGate);
               const ForwardPanels up(weights, item.expert, Projection::kUp);
               Tile gate_tile, up_tile, h_tile;
               for (int64_t panel = item.begin; panel < item.end; ++panel) {
                 const int64_t col = panel * kPanelCols;
                 for (int64_t c = 0; c < chunks.count; ++c) {
                   const int64_t r = base + chunks.begin(c);
                   const int rows = chunks.size(c);
                   const bool last = panel + 1 == item.end;
                   x_rows.dot(kernels_, r, rows, gate.panel(panel), gate.scales(panel),
                              gate.prefetch(panel + 1, last, c, chunks.count), gate_tile);
                   x_rows.dot(kernels_, r, rows, up.panel(panel), up.scales(panel),
                              up.prefetch(panel + 1, last, c, chunks.count), up_tile);
                   lora.add_output(Projection::kGate, item.expert, r, rows, p[0], col, gate_tile);
                   lora.add_output(Projection::kUp, item.expert, r, rows, p[1], col, up_tile);
                   kernels_.gate_forward(in.activation, rows * kPanelCols, gate_tile, up_tile,
                                         h_tile);
                   copy_tile_out(rows, h_tile, h_RF + r * fp + col, fp);
                   if (kept.gate) {
                     copy_tile_out(rows, gate_tile, kept.gate + r * fp + col, fp);
                     copy_tile_out(rows, up_tile, kept.up + r * fp + col, fp);
                   }
                 }
               }
             });

  phases.run("pack_h", static_cast<int64_t>(by_rows.size()),
             routing.rows * fp * (4 + lora.rank_sum()), [&](int64_t i, int) {
               const ExpertItem& item = by_rows[i];
               for (int64_t r = item.begin; r < item.end; ++r)
                 h_rows.pack(kernels_, r, h_of_row(r), nullptr);
               lora.project_input(Projection::kDown, item.expert, item.begin, item.end, h_of_row,
                                  p[2]);
             });

  const std::vector<ExpertItem> down_items =
      expert_items(routing, d_panels, group_size(routing, d_panels, pool_.size()));
  phases.run(
      "down", static_cast<int64_t>(down_items.size()), routing.rows * fp * dp, [&](int64_t i, int) {
        const ExpertItem& item = down_items[i];
        const int64_t base = routing.offset[item.expert];
        const Chunks chunks(routing.count(item.expert), h_rows.terms());
        const ForwardPanels down(weights, item.expert, Projection::kDown);
        Tile tile;
        for (int64_t panel = item.begin; panel < item.end; ++panel) {
          const int64_t col = panel * kPanelCols;
          for (int64_t c = 0; c < chunks.count; ++c) {
            const int64_t r = base + chunks.begin(c);
            const int rows = chunks.size(c);
            h_rows.dot(kernels_, r, rows, down.panel(panel), down.scales(panel),
                       down.prefetch(panel + 1, panel + 1 == item.end, c, chunks.count), tile);
            lora.add_output(Projection::kDown, item.expert, r, rows, p[2], col, tile);
            copy_tile_out(rows, tile, y_RD + r * dp + col, dp);
          }
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
        if (r >= 0) sum.add(in.routing_weight[slot], y_RD + r * dp);
      }
      sum.write(kernels_, dp, d, in.type, out, t);
    }
  });
  return report;
}

}  // namespace kt
