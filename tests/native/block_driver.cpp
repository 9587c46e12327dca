// Runs the experts block on small random layers, in buffers of exactly the right size, for a build
// with sanitizers: every format, gate and ISA named on the command line, compared with portable.
//   block_driver THREADS ISA...
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/core/dispatch.h"
#include "../../csrc/core/experts_block.h"

namespace {

struct Case {
  kt::WeightFormat format;
  kt::Compute compute;
  bool gated, biased;
  int rank;
  float dropout;
  int64_t tokens, top_k, experts, hidden, intermediate;
};

struct Result {
  std::vector<float> out, d_hidden, d_weight;
  std::vector<std::vector<float>> d_lora;
};

const kt::KernelTable& table(const std::string& name) {
  return kt::select_kernels(name, kt::detect_cpu_features());
}

Result run(const Case& c, const std::string& isa, int threads) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  const auto values = [&](int64_t n, float scale) {
    std::vector<float> v(static_cast<size_t>(n));
    for (float& x : v) x = scale * normal(random);
    return v;
  };
  kt::ThreadPool pool(threads);
  const kt::KernelTable& kernels = table(isa);
  const bool b = c.biased;
  kt::PackedExperts weights(kt::PackedLayout{
      c.experts, c.hidden, c.intermediate, c.format, c.gated, {b && c.gated, b, b}, {}});
  for (int p = c.gated ? 0 : 1; p < kt::kProjectionCount; ++p) {
    const kt::Projection projection = static_cast<kt::Projection>(p);
    const int64_t n = weights.layout().outputs(projection), k = weights.layout().inputs(projection);
    for (int64_t e = 0; e < c.experts; ++e) {
      const std::vector<float> w = values(n * k, 1.0f / std::sqrt(static_cast<float>(k)));
      weights.pack(pool, kernels, e, projection, kt::FloatType::kFloat32, w.data(), k);
      if (c.biased) weights.set_bias(e, projection, values(n, 1.0f).data());
    }
  }
  const std::vector<float> hidden = values(c.tokens * c.hidden, 1.0f);
  const std::vector<float> d_out = values(c.tokens * c.hidden, 1.0f);
  const std::vector<float> routing = values(c.tokens * c.top_k, 0.5f);
  std::vector<int64_t> index(static_cast<size_t>(c.tokens * c.top_k));
  for (int64_t& i : index) i = static_cast<int64_t>(random() % (c.experts + 1));

  kt::BlockInput in;
  in.weights = &weights;
  in.compute = c.compute;
  in.gate.gated = c.gated;
  in.gate.limit = 2.0f;
  in.tokens = c.tokens;
  in.top_k = c.top_k;
  in.hidden = hidden.data();
  in.index = index.data();
  in.routing_weight = routing.data();
  in.dropout = c.dropout;
  in.dropout_seed = 11;
  Result result;
  std::vector<std::vector<float>> factors, kept_p;
  std::array<kt::LoraGradient, kt::kProjectionCount> d_lora{};
  const int64_t rows = c.tokens * c.top_k;
  std::vector<float> gate(c.gated ? rows * kt::padded(c.intermediate) : 0);
  std::vector<float> up(rows * kt::padded(c.intermediate));
  kt::KeptActivations kept;
  kept.gate = c.gated ? gate.data() : nullptr;
  kept.up = up.data();
  factors.reserve(6);
  kept_p.reserve(3);
  result.d_lora.reserve(6);
  for (int p = c.gated ? 0 : 1; p < kt::kProjectionCount && c.rank; ++p) {
    const kt::Projection projection = static_cast<kt::Projection>(p);
    const int64_t a = c.experts * c.rank * weights.layout().inputs(projection);
    const int64_t b = c.experts * c.rank * weights.layout().outputs(projection);
    factors.push_back(values(a, 0.1f));
    factors.push_back(values(b, 0.1f));
    in.lora[p] = {c.rank, factors[factors.size() - 2].data(), factors.back().data(), 0.5f};
    kept_p.emplace_back(static_cast<size_t>(rows * c.rank));
    kept.lora_down[p] = kept_p.back().data();
    result.d_lora.emplace_back(static_cast<size_t>(a));
    result.d_lora.emplace_back(static_cast<size_t>(b));
    d_lora[p] = {result.d_lora[result.d_lora.size() - 2].data(), result.d_lora.back().data()};
  }
  result.out.resize(hidden.size());
  result.d_hidden.resize(hidden.size());
  result.d_weight.resize(routing.size());
  kt::ExpertsBlock block(kernels, pool, std::make_shared<kt::BufferCache>());
  for (int repeat = 0; repeat < 2; ++repeat) {
    block.forward(in, result.out.data(), kept);
    block.backward(in, d_out.data(), kept, result.d_hidden.data(), result.d_weight.data(), d_lora);
  }
  return result;
}

// The relative distance of two results, which must not be zero everywhere.
double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    size += b[i] * b[i];
  }
  if (!(size > 0)) return HUGE_VAL;
  return std::sqrt(difference / size);
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = std::atoi(argv[1]);
  using F = kt::WeightFormat;
  using C = kt::Compute;
  const std::vector<Case> cases = {
      {F::kInt8, C::kExact, true, false, 4, 0.0f, 37, 2, 4, 72, 40},
      {F::kInt8, C::kInt8, true, true, 3, 0.2f, 9, 1, 3, 65, 33},
      {F::kInt8, C::kExact, false, true, 5, 0.0f, 40, 3, 5, 130, 70},
      {F::kBf16, C::kBf16, true, true, 8, 0.0f, 33, 2, 4, 63, 97},
      {F::kInt4Group32, C::kExact, true, false, 2, 0.1f, 21, 2, 3, 200, 64},
      {F::kInt4Group128, C::kInt8, false, false, 0, 0.0f, 70, 2, 2, 300, 129},
      {F::kInt8, C::kExact, true, false, 17, 0.0f, 700, 2, 3, 128, 64},
  };
  int failures = 0;
  for (const Case& c : cases) {
    const Result want = run(c, "portable", threads);
    for (int i = 2; i < argc; ++i) {
      const Result got = run(c, argv[i], threads);
      double worst = std::max(distance(got.out, want.out), distance(got.d_hidden, want.d_hidden));
      worst = std::max(worst, distance(got.d_weight, want.d_weight));
      for (size_t j = 0; j < got.d_lora.size(); ++j)
        worst = std::max(worst, distance(got.d_lora[j], want.d_lora[j]));
      // The integer products are the same; bf16 activations against fp32 ones are not.
      const double bound = c.compute == C::kBf16 ? 1e-2 : c.compute == C::kInt8 ? 5e-3 : 1e-4;
      if (!(worst <= bound)) {
        std::fprintf(stderr, "%s differs from portable by %g\n", argv[i], worst);
        ++failures;
      }
    }
  }
  std::printf("%zu cases, %d failures\n", cases.size(), failures);
  return failures ? 1 : 0;
}
