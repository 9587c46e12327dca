#include <algorithm>

#include "activation_rows.h"
#include "experts_block.h"
#include "lora_gradients.h"
#include "products.h"
#include "work_items.h"

namespace kt {
namespace {

// What the backward of a run of experts needs beside inputs and results.
struct BackwardArrays {
  BackwardArrays(const BlockInput& in, const Routing& routing, const KernelTable& kernels,
                 Scratch& scratch)
      : d(in.weights->layout().hidden_padded()),
        f(in.weights->layout().intermediate_padded()),
        gate_up(in.weights->layout().gated ? 2 * f : f),
        lora(in, routing, kernels, scratch),
        dy_rows(kernels, in.compute, routing.rows, d, scratch),
        dgu_rows(kernels, in.compute, routing.rows, gate_up, scratch),
        dgu_RG(scratch.floats(routing.rows * gate_up)),
        dx_RD(scratch.floats(routing.rows * d)),
        weight_parts(f / kBlock + 1),
        d_weight_parts(scratch.floats(routing.rows * weight_parts)),
        h_RF(lora.any(Projection::kDown) ? scratch.floats(routing.rows * f) : nullptr),
        gradients(in, routing, kernels, lora, scratch),
        weight_R(scratch.floats(routing.rows)) {}

  const int64_t d, f, gate_up;  // padded widths; of a row of d_gate and d_up, or of d_up alone
  const LoraOperands lora;
  ActivationRows dy_rows, dgu_rows;
  float* const dgu_RG;
  float* const dx_RD;
  const int64_t weight_parts;  // per block of F, and at the end the share of down's bias
  float* const d_weight_parts;
  float* const h_RF;
  const LoraGradients gradients;
  float* const weight_R;
};

}  // namespace

int64_t ExpertsBlock::backward_bytes(const KernelTable& kernels, int threads,
                                     const BlockInput& in) {
  const int64_t experts = in.weights->layout().experts;
  const Routing routing = evenly(in.tokens, in.top_k, experts);
  Scratch shared = Scratch::counting(threads), scratch = Scratch::counting(threads);
  const PackedLayout& layout = in.weights->layout();
  const FloatRows x(nullptr, in.type, in.tokens, layout.hidden, shared);
  const FloatRows g(nullptr, in.type, in.tokens, layout.hidden, shared);
  const std::vector<RunOfExperts> runs = runs_of(routing, in.max_rows);
  if (runs.size() > 1) shared.floats(in.tokens * layout.hidden_padded());
  RunOfExperts most = runs.front();
  const auto rows_of = [&](const RunOfExperts& run) {
    return routing.offset[run.end] - routing.offset[run.begin];
  };
  for (const RunOfExperts& run : runs)
    if (rows_of(run) > rows_of(most)) most = run;
  const Routing part = part_of(routing, most);
  const BackwardArrays arrays(in, part, kernels, scratch);
  for (int thread = 0; thread < threads; ++thread) {
    scratch.thread_bytes(thread, BackwardPanels::buffer_bytes(kernels, *in.weights, arrays.d));
    scratch.thread_bytes(thread,
                         BackwardPanels::buffer_bytes(kernels, *in.weights, arrays.gate_up));
    scratch.thread_floats(thread, std::max(arrays.d, arrays.gradients.thread_floats()));
  }
  return shared.counted() + scratch.counted();
}

BlockReport ExpertsBlock::backward(const BlockInput& in, const void* d_out,
                                   const KeptActivations& kept, void* d_hidden, float* d_weight,
                                   const std::array<LoraGradient, kProjectionCount>& d_lora) {
  BlockReport report;
  Phases phases(pool_, report);
  const PackedLayout& layout = in.weights->layout();
  const Routing routing = route(in.index, in.tokens, in.top_k, layout.experts);
  report.rows = routing.rows;
  report.max_rows = routing.max_count();
  report.active_experts = static_cast<int64_t>(routing.active.size());

  Scratch scratch(cache_, pool_.size());
  const FloatRows x(in.hidden, in.type, in.tokens, layout.hidden, scratch);
  const FloatRows g(d_out, in.type, in.tokens, layout.hidden, scratch);
  const bool needs_x = in.lora[0].rank || in.lora[1].rank;
  phases.run("to_float", ceil_div(in.tokens, kTokensPerItem),
             in.tokens * layout.hidden_padded() * 2, [&](int64_t item, int) {
               const int64_t end = std::min(in.tokens, (item + 1) * kTokensPerItem);
               for (int64_t t = item * kTokensPerItem; t < end; ++t) {
                 g.convert(kernels_, t);
                 if (needs_x) x.convert(kernels_, t);
               }
             });
  const std::vector<RunOfExperts> runs = runs_of(routing, in.max_rows);
  float* waiting = runs.size() > 1 ? scratch.floats(in.tokens * layout.hidden_padded()) : nullptr;
  for (const RunOfExperts& run : runs)
    backward_run(in, run, runs.size() > 1 ? part_of(routing, run) : routing, x, g,
                 kept.from(routing.offset[run.begin], in), waiting, d_hidden, d_weight, d_lora,
                 phases);
  return report;
}

void ExpertsBlock::backward_run(const BlockInput& in, const RunOfExperts& run,
                                const Routing& routing, const FloatRows& x, const FloatRows& g,
                                const KeptActivations& kept, float* waiting, void* d_hidden,
                                float* d_weight,
                                const std::array<LoraGradient, kProjectionCount>& d_lora,
                                Phases& phases) {
  const PackedExperts& weights = *in.weights;
  const bool gated = weights.layout().gated;
  const int64_t token_items = ceil_div(in.tokens, kTokensPerItem);

  Scratch scratch(cache_, pool_.size());
  BackwardArrays arrays(in, routing, kernels_, scratch);
  const int64_t dp = arrays.d, fp = arrays.f, gp = arrays.gate_up;
  const int64_t f_blocks = fp / kBlock, d_blocks = dp / kBlock;
  const int64_t weight_parts = arrays.weight_parts;
  float* const dgu_RG = arrays.dgu_RG;
  float* const dx_RD = arrays.dx_RD;
  float* const d_weight_parts = arrays.d_weight_parts;
  float* const h_RF = arrays.h_RF;
  float* const weight_R = arrays.weight_R;
  const LoraOperands& lora = arrays.lora;
  const LoraGradients& gradients = arrays.gradients;
  const std::vector<ExpertItem>& blocks = gradients.blocks();
  lora.lay_out(phases);
  for (int64_t r = 0; r < routing.rows; ++r)
    weight_R[r] = in.routing_weight[routing.slot_of_row[r]];
  const bool stream_f = streams(routing.rows * fp), stream_d = streams(routing.rows * dp);

  const auto x_of_row = [&](int64_t r) { return x.row(routing.token_of_row(r)); };
  const auto dout_of_row = [&](int64_t r) { return g.row(routing.token_of_row(r)); };
  const auto h_of_row = [&](int64_t r) { return h_RF + r * fp; };
  const auto dgate_of_row = [&](int64_t r) { return dgu_RG + r * gp; };
  const auto dup_of_row = [&](int64_t r) { return dgu_RG + r * gp + (gated ? fp : 0); };

  const auto in_batches = [](const ExpertItem& item, const auto& body) {
    for (int64_t row = item.row_begin; row < item.row_end; row += kRowsPerItem)
      body(row, std::min(item.row_end, row + kRowsPerItem));
  };

  phases.run("pack_d_out", static_cast<int64_t>(blocks.size()),
             routing.rows * dp * (4 + 2 * lora.rank_sum()), [&](int64_t i, int) {
               const ExpertItem& item = blocks[i];
               const float* fold = weights.scales(item.expert, Projection::kDown);
               const float* bias = weights.bias(item.expert, Projection::kDown);
               gradients.begin_block(Projection::kDown, i);
               in_batches(item, [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) {
                   arrays.dy_rows.pack(r, dout_of_row(r), fold);
                   d_weight_parts[r * weight_parts + f_blocks] =
                       bias ? kernels_.dot_row(dp, dout_of_row(r), bias) : 0.0f;
                 }
                 gradients.add_rows(Projection::kDown, i, begin, end, kept.lora_down[2], weight_R,
                                    dout_of_row);
               });
             });

  const std::vector<ExpertItem> dh_items =
      expert_items(routing, f_blocks, pool_.size(), arrays.dy_rows.row_bytes());
  phases.run(
      "d_h", static_cast<int64_t>(dh_items.size()), routing.rows * fp * dp,
      [&](int64_t i, int thread) {
        const ExpertItem& item = dh_items[i];
        BackwardPanels panels(
            kernels_, weights, item.expert, {Projection::kDown},
            scratch.thread_bytes(thread, BackwardPanels::buffer_bytes(kernels_, weights, dp)));
        for (int64_t unit = item.begin; unit < item.end; ++unit)
          multiply(arrays.dy_rows, panels, unit, unit + 1 < item.end, item.row_begin, item.row_end,
                   {}, [&](int64_t row, int rows, const std::array<float*, 2>& dh) {
                     float* parts = d_weight_parts + row * weight_parts + unit;
                     for (int m = 0; m < rows; ++m) parts[m * weight_parts] = 0.0f;
                     for (int64_t half = 0; half < 2; ++half) {
                       const int64_t col = unit * kBlock + half * kPanelCols;
                       lora.add_input(Projection::kDown, item.expert, row, rows,
                                      gradients.q(Projection::kDown), col, dh[half]);
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
               gradients.begin_block(Projection::kGate, i);
               gradients.begin_block(Projection::kUp, i);
               in_batches(item, [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r)
                   arrays.dgu_rows.pack(r, dgu_RG + r * gp, fold);
                 gradients.add_rows(Projection::kGate, i, begin, end, kept.lora_down[0], weight_R,
                                    dgate_of_row);
                 gradients.add_rows(Projection::kUp, i, begin, end, kept.lora_down[1], weight_R,
                                    dup_of_row);
               });
             });

  const std::vector<ExpertItem> dx_items =
      expert_items(routing, d_blocks, pool_.size(), arrays.dgu_rows.row_bytes());
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
          multiply(arrays.dgu_rows, panels, unit, unit + 1 < item.end, item.row_begin, item.row_end,
                   {}, [&](int64_t row, int rows, const std::array<float*, 2>& dx) {
                     for (int64_t half = 0; half < 2; ++half) {
                       const int64_t col = unit * kBlock + half * kPanelCols;
                       for (const Projection proj : {Projection::kGate, Projection::kUp})
                         lora.add_input(proj, item.expert, row, rows, gradients.q(proj), col,
                                        dx[half]);
                       kernels_.store_tile(rows, dx[half], dx_RD + row * dp + col, dp, stream_d);
                     }
                   });
      });

  gradients.write_b(phases, d_lora);
  gradients.write_a(phases, scratch, weight_R, x_of_row, h_of_row, d_lora);

  phases.run("reduce", token_items, routing.rows * dp * 2, [&](int64_t item, int thread) {
    TokenSum sum(kernels_, scratch.thread_floats(thread, dp), waiting, run, weights.layout().hidden,
                 in.type);
    const int64_t end = std::min(in.tokens, (item + 1) * kTokensPerItem);
    for (int64_t t = item * kTokensPerItem; t < end; ++t) {
      sum.clear();
      for (int64_t k = 0; k < in.top_k; ++k) {
        const int64_t slot = t * in.top_k + k;
        const int64_t r = routing.row_of_slot[slot];
        if (r < 0) {
          if (run.first) d_weight[slot] = 0.0f;
          continue;
        }
        sum.add(r, 1.0f, dx_RD + r * dp);
        float total = 0.0f;
        for (int64_t b = 0; b < weight_parts; ++b) total += d_weight_parts[r * weight_parts + b];
        d_weight[slot] = total;
      }
      sum.write(d_hidden, t);
    }
  });
}

}  // namespace kt
