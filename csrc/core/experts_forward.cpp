#include <algorithm>
#include <stdexcept>

#include "activation_rows.h"
#include "experts_block.h"
#include "lora_operands.h"
#include "products.h"
#include "work_items.h"

namespace kt {

void BlockInput::check() const {
  const PackedLayout& layout = weights->layout();
  if ((compute == Compute::kBf16) != layout.is_float())
    throw std::invalid_argument(
        "compute: bf16 goes with bf16 and coded weights, exact and int8 with int8 and int4");
  if (gate.gated != layout.gated)
    throw std::invalid_argument(layout.gated ? "gate: these experts have a gate projection"
                                             : "gate: these experts have no gate projection");
  if (!layout.gated && lora[0].rank)
    throw std::invalid_argument("gate_proj: LoRA on a projection that these experts lack");
}

KeptActivations KeptActivations::from(int64_t row, const BlockInput& in) const {
  const int64_t fp = in.weights->layout().intermediate_padded();
  KeptActivations own = *this;
  if (gate) own.gate += row * fp;
  if (up) own.up += row * fp;
  for (size_t i = 0; i < lora_down.size(); ++i)
    if (lora_down[i]) own.lora_down[i] += row * in.lora[i].rank;
  return own;
}

BlockReport ExpertsBlock::forward(const BlockInput& in, void* out, const KeptActivations& kept) {
  BlockReport report;
  Phases phases(pool_, report);
  const PackedLayout& layout = in.weights->layout();
  const Routing routing = route(in.index, in.tokens, in.top_k, layout.experts);
  report.rows = routing.rows;
  report.max_rows = routing.max_count();
  report.active_experts = static_cast<int64_t>(routing.active.size());

  Scratch scratch(cache_, pool_.size());
  const FloatRows x(in.hidden, in.type, in.tokens, layout.hidden, scratch);
  const std::vector<RunOfExperts> runs = runs_of(routing, in.max_rows);
  float* waiting = runs.size() > 1 ? scratch.floats(in.tokens * layout.hidden_padded()) : nullptr;
  for (const RunOfExperts& run : runs)
    forward_run(in, run, runs.size() > 1 ? part_of(routing, run) : routing, x,
                kept.from(routing.offset[run.begin], in), waiting, out, phases);
  return report;
}

void ExpertsBlock::forward_run(const BlockInput& in, const RunOfExperts& run,
                               const Routing& routing, const FloatRows& x,
                               const KeptActivations& kept, float* waiting, void* out,
                               Phases& phases) {
  const PackedExperts& weights = *in.weights;
  const int64_t d = weights.layout().hidden, dp = weights.layout().hidden_padded();
  const int64_t fp = weights.layout().intermediate_padded();
  const int64_t token_items = ceil_div(in.tokens, kTokensPerItem);

  Scratch scratch(cache_, pool_.size());
  const LoraOperands lora(in, routing, kernels_, scratch);
  lora.lay_out(phases);
  ActivationRows x_rows(kernels_, in.compute, routing.rows, dp, scratch);
  ActivationRows h_rows(kernels_, in.compute, routing.rows, fp, scratch);
  float* h_RF = scratch.floats(routing.rows * fp);
  float* y_RD = scratch.floats(routing.rows * dp);
  const bool stream_f = streams(routing.rows * fp), stream_d = streams(routing.rows * dp);

  phases.run("pack_hidden", token_items, routing.rows * dp * 4, [&](int64_t item, int) {
    const int64_t end = std::min(in.tokens, (item + 1) * kTokensPerItem);
    for (int64_t t = item * kTokensPerItem; t < end; ++t) {
      const float* row = run.first ? x.convert(kernels_, t) : x.row(t);
      int64_t first = -1;
      for (int64_t k = 0; k < in.top_k; ++k) {
        const int64_t r = routing.row_of_slot[t * in.top_k + k];
        if (r < 0) continue;
        if (first < 0)
          x_rows.pack(first = r, row, nullptr);
        else
          x_rows.copy(first, r);
      }
    }
  });

  const std::vector<ExpertItem> by_rows = row_items(routing, kRowsPerItem);
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
                   lora.project_input(proj, item.expert, item.row_begin, item.row_end, x_of_row,
                                      p[static_cast<int>(proj)]);
               });

  // What follows a frozen product: its bias and the adapter's share, for 32 outputs from `col`.
  const auto complete = [&](Projection proj, int64_t expert, int64_t row, int rows, int64_t col,
                            float* tile) {
    if (const float* bias = weights.bias(expert, proj)) kernels_.add_row(rows, bias + col, tile);
    lora.add_output(proj, expert, row, rows, p[static_cast<int>(proj)], col, tile);
  };
  const auto col_scale = [&](int64_t expert, Projection proj, int64_t col) {
    const float* scales = weights.scales(expert, proj);
    return scales ? scales + col : nullptr;
  };

  const bool gated = weights.layout().gated;
  const int64_t f_units = fp / (gated ? kPanelCols : 2 * kPanelCols);
  const std::vector<Projection> inner =
      gated ? std::vector{Projection::kGate, Projection::kUp} : std::vector{Projection::kUp};
  const std::vector<ExpertItem> inner_items =
      expert_items(routing, f_units, pool_.size(), x_rows.row_bytes());
  phases.run("gate_up", static_cast<int64_t>(inner_items.size()), routing.rows * fp * dp,
             [&](int64_t i, int thread) {
               const ExpertItem& item = inner_items[i];
               ForwardPanels panels(kernels_, weights, item.expert, inner,
                                    scratch.thread_bytes(thread, ForwardPanels::buffer_bytes(
                                                                     kernels_, weights, dp)));
               const auto activate = [&](int64_t row, int rows, int64_t col, const float* gate,
                                         const float* up) {
                 GateForward io{};
                 io.rows = rows;
                 io.gate = gate;
                 io.up = up;
                 io.h = h_RF + row * fp + col;
                 io.ldh = io.ldk = fp;
                 if (kept.up) {
                   io.keep_gate = gate ? kept.gate + row * fp + col : nullptr;
                   io.keep_up = kept.up + row * fp + col;
                 }
                 io.stream = stream_f;
                 kernels_.gate_forward(in.gate, io);
               };
               for (int64_t unit = item.begin; unit < item.end; ++unit) {
                 const int64_t col = unit * (gated ? kPanelCols : 2 * kPanelCols);
                 const std::array<const float*, 2> scales = {
                     col_scale(item.expert, inner.front(), col),
                     col_scale(item.expert, Projection::kUp, gated ? col : col + kPanelCols)};
                 multiply(x_rows, panels, unit, unit + 1 < item.end, item.row_begin, item.row_end,
                          scales, [&](int64_t row, int rows, const std::array<float*, 2>& y) {
                            if (gated) {
                              complete(Projection::kGate, item.expert, row, rows, col, y[0]);
                              complete(Projection::kUp, item.expert, row, rows, col, y[1]);
                              activate(row, rows, col, y[0], y[1]);
                            } else {
                              for (int64_t half = 0; half < 2; ++half) {
                                const int64_t at = col + half * kPanelCols;
                                complete(Projection::kUp, item.expert, row, rows, at, y[half]);
                                activate(row, rows, at, nullptr, y[half]);
                              }
                            }
                          });
               }
             });

  phases.run("pack_h", static_cast<int64_t>(by_rows.size()),
             routing.rows * fp * (4 + lora.rank_sum()), [&](int64_t i, int) {
               const ExpertItem& item = by_rows[i];
               for (int64_t r = item.row_begin; r < item.row_end; ++r)
                 h_rows.pack(r, h_of_row(r), nullptr);
               lora.project_input(Projection::kDown, item.expert, item.row_begin, item.row_end,
                                  h_of_row, p[2]);
             });

  const std::vector<ExpertItem> down_items =
      expert_items(routing, dp / kBlock, pool_.size(), h_rows.row_bytes());
  phases.run(
      "down", static_cast<int64_t>(down_items.size()), routing.rows * fp * dp,
      [&](int64_t i, int thread) {
        const ExpertItem& item = down_items[i];
        ForwardPanels panels(
            kernels_, weights, item.expert, {Projection::kDown},
            scratch.thread_bytes(thread, ForwardPanels::buffer_bytes(kernels_, weights, fp)));
        for (int64_t unit = item.begin; unit < item.end; ++unit) {
          const int64_t col = unit * kBlock;
          multiply(h_rows, panels, unit, unit + 1 < item.end, item.row_begin, item.row_end,
                   {col_scale(item.expert, Projection::kDown, col),
                    col_scale(item.expert, Projection::kDown, col + kPanelCols)},
                   [&](int64_t row, int rows, const std::array<float*, 2>& y) {
                     for (int64_t half = 0; half < 2; ++half) {
                       const int64_t at = col + half * kPanelCols;
                       complete(Projection::kDown, item.expert, row, rows, at, y[half]);
                       kernels_.store_tile(rows, y[half], y_RD + row * dp + at, dp, stream_d);
                     }
                   });
        }
      });

  phases.run("reduce", token_items, routing.rows * dp * 2, [&](int64_t item, int thread) {
    TokenSum sum(kernels_, scratch.thread_floats(thread, dp), waiting, run, d, in.type);
    const int64_t end = std::min(in.tokens, (item + 1) * kTokensPerItem);
    for (int64_t t = item * kTokensPerItem; t < end; ++t) {
      sum.clear();
      for (int64_t k = 0; k < in.top_k; ++k) {
        const int64_t slot = t * in.top_k + k;
        const int64_t r = routing.row_of_slot[slot];
        if (r >= 0) sum.add(r, in.routing_weight[slot], y_RD + r * dp);
      }
      sum.write(out, t);
    }
  });
}

}  // namespace kt
