// Forward and backward of the routed experts of one layer.
//
//   gate = x Wg' + bg + s (x~ Ag') Bg'      up = x Wu' + bu + s (x~ Au') Bu'
//   h    = act(gate) * up, in the variants of Gate (without a gate: act(up))
//   y    = h Wd' + bd + s (h~ Ad') Bd'      out[t] = sum_k weight[t, k] * y[row(t, k)]
//
// x~ and h~ are x and h under the LoRA dropout (themselves when it is off). Frozen weights and
// biases have no gradient. d_weight comes from <d_out Wd, h> + <d_out, bd>, so y is never kept.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "memory.h"
#include "packed_experts.h"
#include "routing.h"
#include "thread_pool.h"

namespace kt {

class FloatRows;
class Phases;

enum class Compute : int { kExact = 0, kInt8 = 1, kBf16 = 2 };

// LoRA of one projection over all experts, fp32: a [E, rank, inputs], b [E, outputs, rank]; of one
// pair that all experts share, a [rank, inputs] and b [outputs, rank].
struct Lora {
  int rank = 0;  // 0: none
  const float* a = nullptr;
  const float* b = nullptr;
  float scaling = 1.0f;
  bool shared = false;

  // Where an expert's factors lie, in pairs.
  int64_t pair(int64_t expert) const { return shared ? 0 : expert; }
  int64_t pairs(int64_t experts) const { return shared ? 1 : experts; }
};

struct LoraGradient {
  float* a = nullptr;
  float* b = nullptr;
};

struct BlockInput {
  const PackedExperts* weights = nullptr;
  Compute compute = Compute::kExact;
  Gate gate;
  int64_t tokens = 0, top_k = 0;
  FloatType type = FloatType::kFloat32;   // of hidden, out and their gradients
  const void* hidden = nullptr;           // [T, D]
  const int64_t* index = nullptr;         // [T, K]
  const float* routing_weight = nullptr;  // [T, K]
  std::array<Lora, kProjectionCount> lora;
  float dropout = 0.0f;
  uint64_t dropout_seed = 0;
  int64_t first_channel = 0;  // of F in a layer whose channels are split, for down's dropout
  // Routed rows that are computed at a time, whole experts at least; 0: all. Temporary memory
  // depends on it, results do not.
  int64_t max_rows = 0;

  // Throws std::invalid_argument where compute, gate or LoRA do not go with the weights.
  void check() const;
};

// What forward keeps for backward. Rows are sorted by expert; null pointers: keep nothing.
struct KeptActivations {
  float* gate = nullptr;                             // [T * K, F padded]; null without a gate
  float* up = nullptr;                               // [T * K, F padded]
  std::array<float*, kProjectionCount> lora_down{};  // [T * K, rank]: s (input~ A')

  // Of the rows from `row` on.
  KeptActivations from(int64_t row, const BlockInput& in) const;
};

struct BlockReport {
  int64_t rows = 0, max_rows = 0, active_experts = 0;
  std::vector<std::pair<std::string, double>> phase_ms;
};

class ExpertsBlock {
 public:
  ExpertsBlock(const KernelTable& kernels, ThreadPool& pool, std::shared_ptr<BufferCache> cache)
      : kernels_(kernels), pool_(pool), cache_(std::move(cache)) {}

  // out: [T, D] in input.type.
  BlockReport forward(const BlockInput& input, void* out, const KeptActivations& kept);
  // d_hidden: [T, D] in input.type; d_weight: [T, K] fp32; gradients of each LoRA with rank > 0,
  // dense: experts without rows get zeros.
  BlockReport backward(const BlockInput& input, const void* d_out, const KeptActivations& kept,
                       void* d_hidden, float* d_weight,
                       const std::array<LoraGradient, kProjectionCount>& d_lora);
  // Temporary bytes of a backward, which takes more than a forward. Nothing that `input` points to
  // is read but the layout of its weights.
  static int64_t backward_bytes(const KernelTable& kernels, int threads, const BlockInput& input);

 private:
  // A run of experts of a call. kept: of the run's rows. waiting: sums of tokens over the runs
  // before, see TokenSum.
  void forward_run(const BlockInput& input, const RunOfExperts& run, const Routing& routing,
                   const FloatRows& x, const KeptActivations& kept, float* waiting, void* out,
                   Phases& phases);
  void backward_run(const BlockInput& input, const RunOfExperts& run, const Routing& routing,
                    const FloatRows& x, const FloatRows& g, const KeptActivations& kept,
                    float* waiting, void* d_hidden, float* d_weight,
                    const std::array<LoraGradient, kProjectionCount>& d_lora, Phases& phases);

  const KernelTable& kernels_;
  ThreadPool& pool_;
  std::shared_ptr<BufferCache> cache_;
};

}  // namespace kt
