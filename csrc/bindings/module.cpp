// The Python module kt_sft.kernels._core. Addresses arrive as integers that kt_sft/kernels has
// checked (dtype, shape, stride, device, lifetime); nothing here knows torch, so one build serves
// every torch version. The GIL is released around all work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <mutex>

#include "../core/cpu_features.h"
#include "../core/experts_block.h"
#include "../core/thread_pool.h"
#include "single_kernels.h"

namespace py = pybind11;

namespace kt {
namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
T named(const std::map<std::string, T>& names, const std::string& what, const std::string& got) {
  const auto it = names.find(got);
  if (it != names.end()) return it->second;
  std::string valid;
  for (const auto& entry : names) valid += (valid.empty() ? "" : ", ") + entry.first;
  throw std::invalid_argument(what + ": got '" + got + "', expected one of " + valid);
}

FloatType float_type(const std::string& name) {
  static const std::map<std::string, FloatType> names = {{"float32", FloatType::kFloat32},
                                                         {"bfloat16", FloatType::kBfloat16},
                                                         {"float16", FloatType::kFloat16}};
  return named(names, "dtype", name);
}

// (activation, gated, alpha, limit, up_offset)
using GateTuple = std::tuple<std::string, bool, float, float, float>;

Gate gate_from(const GateTuple& tuple) {
  static const std::map<std::string, Activation> names = {{"swish", Activation::kSwish},
                                                          {"gelu", Activation::kGeluErf},
                                                          {"gelu_tanh", Activation::kGeluTanh},
                                                          {"relu", Activation::kRelu},
                                                          {"relu2", Activation::kRelu2}};
  Gate gate;
  gate.activation = named(names, "activation", std::get<0>(tuple));
  gate.gated = std::get<1>(tuple);
  gate.alpha = std::get<2>(tuple);
  gate.limit = std::get<3>(tuple);
  gate.up_offset = std::get<4>(tuple);
  return gate;
}

Compute compute(const std::string& name) {
  static const std::map<std::string, Compute> names = {
      {"exact", Compute::kExact}, {"int8", Compute::kInt8}, {"bf16", Compute::kBf16}};
  return named(names, "compute", name);
}

Projection projection(const std::string& name) {
  static const std::map<std::string, Projection> names = {{"gate_proj", Projection::kGate},
                                                          {"up_proj", Projection::kUp},
                                                          {"down_proj", Projection::kDown}};
  return named(names, "projection", name);
}

WeightFormat weight_format(const std::string& name) {
  static const std::map<std::string, WeightFormat> names = {
      {"int8", WeightFormat::kInt8},
      {"bf16", WeightFormat::kBf16},
      {"int4_g32", WeightFormat::kInt4Group32},
      {"int4_g128", WeightFormat::kInt4Group128},
      {"coded", WeightFormat::kCoded}};
  return named(names, "weights", name);
}

CodeKind code_kind(const std::string& name) {
  static const std::map<std::string, CodeKind> names = {{"e4m3", CodeKind::kE4m3},
                                                        {"e2m1", CodeKind::kE2m1},
                                                        {"uint8", CodeKind::kUint8},
                                                        {"uint4", CodeKind::kUint4}};
  return named(names, "codes", name);
}

ScaleType scale_type(const std::string& name) {
  static const std::map<std::string, ScaleType> names = {{"float32", ScaleType::kFloat32},
                                                         {"bfloat16", ScaleType::kBfloat16},
                                                         {"float16", ScaleType::kFloat16},
                                                         {"e8m0", ScaleType::kE8m0}};
  return named(names, "scales", name);
}

// (codes, scales, outputs and inputs of a group, zero points)
using CodingTuple = std::tuple<std::string, std::string, int64_t, int64_t, bool>;

PackedLayout packed_layout(int64_t experts, int64_t hidden, int64_t intermediate,
                           const std::string& weights, bool gated,
                           const std::array<bool, kProjectionCount>& biased,
                           const std::optional<CodingTuple>& coding) {
  PackedLayout layout{experts, hidden, intermediate, weight_format(weights), gated, biased, {}};
  if (layout.is_coded() != coding.has_value())
    throw std::invalid_argument("coding: goes with coded weights");
  if (coding)
    layout.coding = {code_kind(std::get<0>(*coding)), scale_type(std::get<1>(*coding)),
                     std::get<2>(*coding), std::get<3>(*coding), std::get<4>(*coding)};
  layout.check();
  return layout;
}

struct Buffer {
  std::shared_ptr<LargeBuffer> memory;
};

// Threads, kernels and temporary memory, shared by all layers of a model. Calls are serialized.
class Engine {
 public:
  Engine(int threads, const std::string& isa, const CpuFeatures& features)
      : kernels_(select_kernels(isa, features)),
        pool_(threads),
        cache_(std::make_shared<BufferCache>()),
        block_(kernels_, pool_, cache_) {}

  const KernelTable& kernels() const { return kernels_; }
  int threads() const { return pool_.size(); }
  Buffer buffer(size_t bytes) { return {cache_->acquire(bytes)}; }
  size_t trim() { return cache_->trim(); }
  size_t cached_bytes() const { return cache_->cached_bytes(); }

  template <class Work>
  auto exclusively(const Work& work) {
    // Before the lock, which another thread may have held when this process was forked.
    process_.require_owner();
    py::gil_scoped_release unlocked;
    std::lock_guard<std::mutex> lock(mutex_);
    return work(pool_, block_);
  }

 private:
  const KernelTable& kernels_;
  ThreadPool pool_;
  std::shared_ptr<BufferCache> cache_;
  ExpertsBlock block_;
  const ProcessGuard process_;
  std::mutex mutex_;
};

py::dict as_dict(const BlockReport& report) {
  py::dict phases;
  for (const auto& [name, ms] : report.phase_ms) phases[py::str(name)] = ms;
  py::dict out;
  out["rows"] = report.rows;
  out["max_rows"] = report.max_rows;
  out["active_experts"] = report.active_experts;
  out["phase_ms"] = phases;
  return out;
}

// One projection's LoRA as (rank, address of a, address of b, scaling).
using LoraTuple = std::tuple<int, Address, Address, float>;

BlockInput block_input(const PackedExperts& weights, const std::string& compute_name,
                       const GateTuple& gate, int64_t tokens, int64_t top_k,
                       const std::string& dtype, Address hidden, Address index,
                       Address routing_weight, const std::array<LoraTuple, 3>& lora, float dropout,
                       uint64_t dropout_seed, int64_t first_channel) {
  BlockInput in;
  in.weights = &weights;
  in.compute = compute(compute_name);
  if ((in.compute == Compute::kBf16) != weights.layout().is_float())
    throw std::invalid_argument(
        "compute: bf16 goes with bf16 and coded weights, exact and int8 with int8 and int4");
  in.gate = gate_from(gate);
  if (in.gate.gated != weights.layout().gated)
    throw std::invalid_argument(weights.layout().gated
                                    ? "gate: these experts have a gate projection"
                                    : "gate: these experts have no gate projection");
  if (!weights.layout().gated && std::get<0>(lora[0]))
    throw std::invalid_argument("gate_proj: LoRA on a projection that these experts lack");
  in.tokens = tokens;
  in.top_k = top_k;
  in.type = float_type(dtype);
  in.hidden = pointer<const void>(hidden);
  in.index = pointer<const int64_t>(index);
  in.routing_weight = pointer<const float>(routing_weight);
  for (size_t i = 0; i < lora.size(); ++i) {
    in.lora[i].rank = std::get<0>(lora[i]);
    in.lora[i].a = pointer<const float>(std::get<1>(lora[i]));
    in.lora[i].b = pointer<const float>(std::get<2>(lora[i]));
    in.lora[i].scaling = std::get<3>(lora[i]);
  }
  in.dropout = dropout;
  in.dropout_seed = dropout_seed;
  in.first_channel = first_channel;
  return in;
}

KeptActivations kept_activations(Address gate, Address up, const std::array<Address, 3>& lora) {
  KeptActivations kept;
  kept.gate = pointer<float>(gate);
  kept.up = pointer<float>(up);
  for (size_t i = 0; i < lora.size(); ++i) kept.lora_down[i] = pointer<float>(lora[i]);
  return kept;
}

// The machine's flags, or the given ones in their place (for tests of the dispatch, and for AMX
// under emulation).
using FlagMap = std::optional<std::map<std::string, bool>>;

CpuFeatures features_from(const FlagMap& flags) {
  if (!flags) return detect_cpu_features();
  std::map<std::string, CpuFlag> known;
  for (const CpuFlag& flag : cpu_flags()) known.emplace(flag.name, flag);
  CpuFeatures f;
  for (const auto& [name, value] : *flags) f.*named(known, "cpu flag", name).value = value;
  return f;
}

}  // namespace
}  // namespace kt

PYBIND11_MODULE(_core, m) {
  using namespace kt;
  m.doc() = "Compiled core of kt_sft: CPU kernels for routed experts.";

  py::register_exception<ForkedProcess>(m, "ForkedProcess", PyExc_RuntimeError);
  py::register_exception<ThreadsUnavailable>(m, "ThreadsUnavailable", PyExc_RuntimeError);

  m.def(
      "isa_report",
      [](const FlagMap& flags) {
        const CpuFeatures features = features_from(flags);
        std::vector<std::pair<std::string, std::vector<std::string>>> out;
        for (const IsaEntry& entry : isa_entries())
          out.emplace_back(entry.table->name, entry.missing(features));
        return out;
      },
      py::arg("cpu_flags") = std::nullopt,
      "Every instruction set, best first, with the CPU flags it misses here.");
  m.def(
      "select_isa",
      [](const std::string& isa, const FlagMap& flags) {
        return std::string(select_kernels(isa, features_from(flags)).name);
      },
      py::arg("isa"), py::arg("cpu_flags") = std::nullopt);

  py::class_<Buffer>(m, "Buffer", py::buffer_protocol()).def_buffer([](Buffer& buffer) {
    return py::buffer_info(buffer.memory->data(), 1, py::format_descriptor<uint8_t>::format(),
                           static_cast<py::ssize_t>(buffer.memory->size()));
  });

  py::class_<PackedLayout>(m, "PackedLayout")
      .def(py::init(&packed_layout), py::arg("experts"), py::arg("hidden"), py::arg("intermediate"),
           py::arg("weights"), py::arg("gated"), py::arg("biased"), py::arg("coding"))
      .def_property_readonly(
          "section_bytes",
          [](const PackedLayout& self) {
            std::map<std::string, int64_t> out;
            for (size_t i = 0; i < kSectionCount; ++i)
              if (const int64_t bytes = self.section_bytes(static_cast<Section>(i)))
                out[kSectionNames[i]] = bytes;
            return out;
          },
          "Name -> bytes of every section that is not empty.");
  m.attr("SECTIONS") = py::cast(kSectionNames);

  py::class_<PackedExperts, std::shared_ptr<PackedExperts>>(m, "PackedExperts")
      .def(py::init([](const PackedLayout& layout,
                       const std::optional<std::array<Address, kSectionCount>>& packed) {
             if (!packed) return std::make_shared<PackedExperts>(layout);
             std::array<const uint8_t*, kSectionCount> sections;
             for (size_t i = 0; i < sections.size(); ++i)
               sections[i] = pointer<const uint8_t>((*packed)[i]);
             return std::make_shared<PackedExperts>(layout, sections);
           }),
           py::arg("layout"), py::arg("packed") = std::nullopt)
      .def_property_readonly("nbytes",
                             [](const PackedExperts& self) { return self.layout().bytes(); })
      .def_property_readonly(
          "sections",
          [](const PackedExperts& self) {
            self.require_owner();  // in a forked child the memory is not there
            std::map<std::string, std::pair<Address, int64_t>> out;
            for (size_t i = 0; i < kSectionCount; ++i)
              if (const int64_t bytes = self.layout().section_bytes(static_cast<Section>(i)))
                out[kSectionNames[i]] = {
                    reinterpret_cast<Address>(self.section(static_cast<Section>(i))), bytes};
            return out;
          },
          "Name -> (address, bytes) of every section that is not empty.")
      .def(
          "pack_codes",
          [](PackedExperts& self, Engine& engine, int64_t expert, const std::string& name,
             Address codes, int64_t row_stride, Address scales, Address zeros) {
            const Projection p = projection(name);
            engine.exclusively([&](ThreadPool& pool, ExpertsBlock&) {
              self.pack_codes(pool, expert, p, pointer<const uint8_t>(codes), row_stride,
                              pointer<const void>(scales), pointer<const uint8_t>(zeros));
            });
          },
          py::arg("engine"), py::arg("expert"), py::arg("projection"), py::arg("codes"),
          py::arg("row_stride"), py::arg("scales"), py::arg("zeros"))
      .def(
          "take_channels",
          [](PackedExperts& self, Engine& engine, const PackedExperts& from, int64_t first) {
            engine.exclusively(
                [&](ThreadPool& pool, ExpertsBlock&) { self.take_channels(pool, from, first); });
          },
          py::arg("engine"), py::arg("source"), py::arg("first"))
      .def(
          "pack",
          [](PackedExperts& self, Engine& engine, int64_t expert, const std::string& name,
             const std::string& dtype, Address weight, int64_t row_stride) {
            const Projection p = projection(name);
            const FloatType type = float_type(dtype);
            engine.exclusively([&](ThreadPool& pool, ExpertsBlock&) {
              self.pack(pool, engine.kernels(), expert, p, type, pointer<const void>(weight),
                        row_stride);
            });
          },
          py::arg("engine"), py::arg("expert"), py::arg("projection"), py::arg("dtype"),
          py::arg("weight"), py::arg("row_stride"))
      .def(
          "set_bias",
          [](PackedExperts& self, int64_t expert, const std::string& name, Address bias) {
            self.set_bias(expert, projection(name), pointer<const float>(bias));
          },
          py::arg("expert"), py::arg("projection"), py::arg("bias"))
      .def(
          "unpack",
          [](const PackedExperts& self, int64_t expert, const std::string& name, Address out) {
            const Projection p = projection(name);
            py::gil_scoped_release unlocked;
            self.unpack(expert, p, pointer<float>(out));
          },
          py::arg("expert"), py::arg("projection"), py::arg("out"));

  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine")
      .def(py::init([](int threads, const std::string& isa, const FlagMap& flags) {
             return std::make_shared<Engine>(threads, isa, features_from(flags));
           }),
           py::arg("threads"), py::arg("isa"), py::arg("cpu_flags") = std::nullopt)
      .def_property_readonly("isa", [](const Engine& e) { return e.kernels().name; })
      .def_property_readonly("threads", &Engine::threads)
      .def_property_readonly("cached_bytes", &Engine::cached_bytes)
      .def("buffer", &Engine::buffer, py::arg("bytes"))
      .def("trim", &Engine::trim)
      .def("forward",
           [](Engine& self, const PackedExperts& weights, const std::string& compute,
              const GateTuple& gate, int64_t tokens, int64_t top_k, const std::string& dtype,
              Address hidden, Address index, Address routing_weight,
              const std::array<LoraTuple, 3>& lora, float dropout, uint64_t dropout_seed,
              int64_t first_channel, Address out, Address kept_gate, Address kept_up,
              const std::array<Address, 3>& lora_down) {
             const BlockInput in =
                 block_input(weights, compute, gate, tokens, top_k, dtype, hidden, index,
                             routing_weight, lora, dropout, dropout_seed, first_channel);
             return as_dict(self.exclusively([&](ThreadPool&, ExpertsBlock& block) {
               return block.forward(in, pointer<void>(out),
                                    kept_activations(kept_gate, kept_up, lora_down));
             }));
           })
      .def("backward",
           [](Engine& self, const PackedExperts& weights, const std::string& compute,
              const GateTuple& gate, int64_t tokens, int64_t top_k, const std::string& dtype,
              Address hidden, Address index, Address routing_weight,
              const std::array<LoraTuple, 3>& lora, float dropout, uint64_t dropout_seed,
              int64_t first_channel, Address d_out, Address kept_gate, Address kept_up,
              const std::array<Address, 3>& lora_down, Address d_hidden, Address d_weight,
              const std::array<std::pair<Address, Address>, 3>& d_lora) {
             const BlockInput in =
                 block_input(weights, compute, gate, tokens, top_k, dtype, hidden, index,
                             routing_weight, lora, dropout, dropout_seed, first_channel);
             std::array<LoraGradient, kProjectionCount> gradients;
             for (size_t i = 0; i < gradients.size(); ++i)
               gradients[i] = {pointer<float>(d_lora[i].first), pointer<float>(d_lora[i].second)};
             return as_dict(self.exclusively([&](ThreadPool&, ExpertsBlock& block) {
               return block.backward(in, pointer<const void>(d_out),
                                     kept_activations(kept_gate, kept_up, lora_down),
                                     pointer<void>(d_hidden), pointer<float>(d_weight), gradients);
             }));
           });

  m.def(
      "kernel_rows",
      [] {
        std::vector<std::tuple<std::string, std::string, std::string>> out;
        for (const IsaEntry& entry : isa_entries())
          out.emplace_back(entry.table->name, entry.table->int_dot, entry.table->float_dot);
        return out;
      },
      "Every instruction set, best first: name, integer dot product, float dot product.");

  bind_single_kernels(m);
}
