// The Python module kt_sft.kernels._core. Addresses arrive as integers that kt_sft/kernels has
// checked (dtype, shape, stride, device, lifetime); nothing here knows torch, so one build serves
// every torch version. The GIL is released around all work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "../core/dispatch.h"
#include "../core/engine.h"
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

Gate gate_from(const std::string& activation, bool gated, float alpha, float limit,
               float up_offset) {
  static const std::map<std::string, Activation> names = {{"swish", Activation::kSwish},
                                                          {"gelu", Activation::kGeluErf},
                                                          {"gelu_tanh", Activation::kGeluTanh},
                                                          {"relu", Activation::kRelu},
                                                          {"relu2", Activation::kRelu2}};
  Gate gate;
  gate.activation = named(names, "activation", activation);
  gate.gated = gated;
  gate.alpha = alpha;
  gate.limit = limit;
  gate.up_offset = up_offset;
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
  std::map<std::string, WeightFormat> names;
  for (size_t i = 0; i < std::size(kFormatNames); ++i)
    names.emplace(kFormatNames[i], static_cast<WeightFormat>(i));
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
  if (layout.form().takes_floats() == coding.has_value())
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

BlockInput block_input(const PackedExperts& weights, const std::string& compute_name,
                       const Gate& gate, int64_t tokens, int64_t top_k, const std::string& dtype,
                       Address hidden, Address index, Address routing_weight,
                       const std::array<Lora, kProjectionCount>& lora, float dropout,
                       uint64_t dropout_seed, int64_t first_channel, int64_t max_rows) {
  BlockInput in;
  in.weights = &weights;
  in.compute = compute(compute_name);
  in.gate = gate;
  in.tokens = tokens;
  in.top_k = top_k;
  in.type = float_type(dtype);
  in.hidden = pointer<const void>(hidden);
  in.index = pointer<const int64_t>(index);
  in.routing_weight = pointer<const float>(routing_weight);
  in.lora = lora;
  in.dropout = dropout;
  in.dropout_seed = dropout_seed;
  in.first_channel = first_channel;
  in.max_rows = max_rows;
  return in;
}

KeptActivations kept_activations(Address gate, Address up,
                                 const std::array<Address, kProjectionCount>& lora_down) {
  KeptActivations kept;
  kept.gate = pointer<float>(gate);
  kept.up = pointer<float>(up);
  for (size_t i = 0; i < lora_down.size(); ++i) kept.lora_down[i] = pointer<float>(lora_down[i]);
  return kept;
}

// The engine's work without the GIL.
template <class Work>
auto unlocked(const Work& work) {
  py::gil_scoped_release released;
  return work();
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
          "Name -> bytes of every section that is not empty.")
      .def_property_readonly(
          "matrix_bytes",
          [](const PackedLayout& self) {
            std::map<std::string, std::array<int64_t, kProjectionCount>> out;
            for (size_t i = 0; i < kSectionCount; ++i) {
              const Section section = static_cast<Section>(i);
              if (!self.section_bytes(section)) continue;
              for (int p = static_cast<int>(self.first_projection()); p < kProjectionCount; ++p)
                out[kSectionNames[i]][static_cast<size_t>(p)] =
                    self.matrix_bytes(section, static_cast<Projection>(p));
            }
            return out;
          },
          "Section -> bytes of one expert's gate, up and down; experts follow each other.")
      .def_property_readonly("is_float", &PackedLayout::is_float)
      .def_property_readonly("channel_granule", &PackedLayout::channel_granule);
  std::vector<std::string> own_formats;
  for (size_t i = 0; i < std::size(kFormatNames); ++i)
    if (form_of(static_cast<WeightFormat>(i)).takes_floats())
      own_formats.emplace_back(kFormatNames[i]);
  m.attr("OWN_FORMATS") = own_formats;
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
            unlocked([&] {
              engine.exclusively([&](ThreadPool& pool) {
                self.pack_codes(pool, expert, p, pointer<const uint8_t>(codes), row_stride,
                                pointer<const void>(scales), pointer<const uint8_t>(zeros));
              });
            });
          },
          py::arg("engine"), py::arg("expert"), py::arg("projection"), py::arg("codes"),
          py::arg("row_stride"), py::arg("scales"), py::arg("zeros"))
      .def(
          "take_channels",
          [](PackedExperts& self, Engine& engine, const PackedExperts& from, int64_t first) {
            unlocked([&] {
              engine.exclusively([&](ThreadPool& pool) { self.take_channels(pool, from, first); });
            });
          },
          py::arg("engine"), py::arg("source"), py::arg("first"))
      .def(
          "take_experts",
          [](PackedExperts& self, Engine& engine, const PackedExperts& from,
             const std::vector<int64_t>& chosen) {
            unlocked([&] {
              engine.exclusively([&](ThreadPool& pool) { self.take_experts(pool, from, chosen); });
            });
          },
          py::arg("engine"), py::arg("source"), py::arg("experts"))
      .def(
          "pack",
          [](PackedExperts& self, Engine& engine, int64_t expert, const std::string& name,
             const std::string& dtype, Address weight, int64_t row_stride) {
            const Projection p = projection(name);
            const FloatType type = float_type(dtype);
            unlocked([&] {
              engine.exclusively([&](ThreadPool& pool) {
                self.pack(pool, engine.kernels(), expert, p, type, pointer<const void>(weight),
                          row_stride);
              });
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

  py::class_<Gate>(m, "Gate").def(py::init(&gate_from), py::kw_only(), py::arg("activation"),
                                  py::arg("gated"), py::arg("alpha"), py::arg("limit"),
                                  py::arg("up_offset"));
  py::class_<Lora>(m, "Lora")
      .def(py::init<>())
      .def(py::init([](int rank, Address a, Address b, float scaling, bool shared) {
             return Lora{rank, pointer<const float>(a), pointer<const float>(b), scaling, shared};
           }),
           py::kw_only(), py::arg("rank"), py::arg("a"), py::arg("b"), py::arg("scaling"),
           py::arg("shared"));
  py::class_<LoraGradient>(m, "LoraGradient")
      .def(py::init<>())
      .def(py::init([](Address a, Address b) {
             return LoraGradient{pointer<float>(a), pointer<float>(b)};
           }),
           py::kw_only(), py::arg("a"), py::arg("b"));
  py::class_<KeptActivations>(m, "KeptActivations")
      .def(py::init<>())
      .def(py::init(&kept_activations), py::kw_only(), py::arg("gate"), py::arg("up"),
           py::arg("lora_down"));
  // Holds the weights; the other addresses must outlive the call.
  py::class_<BlockInput>(m, "BlockInput")
      .def(py::init(&block_input), py::keep_alive<1, 2>(), py::kw_only(), py::arg("weights"),
           py::arg("compute"), py::arg("gate"), py::arg("tokens"), py::arg("top_k"),
           py::arg("dtype"), py::arg("hidden"), py::arg("index"), py::arg("routing_weight"),
           py::arg("lora"), py::arg("dropout"), py::arg("dropout_seed"), py::arg("first_channel"),
           py::arg("max_rows"));

  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine")
      .def(py::init([](int threads, const std::string& isa, const FlagMap& flags) {
             return std::make_shared<Engine>(threads, isa, features_from(flags));
           }),
           py::arg("threads"), py::arg("isa"), py::arg("cpu_flags") = std::nullopt)
      .def_property_readonly("isa", [](const Engine& e) { return e.kernels().name; })
      .def_property_readonly("threads", &Engine::threads)
      .def_property_readonly("cached_bytes", &Engine::cached_bytes)
      .def(
          "buffer", [](Engine& self, size_t bytes) { return Buffer{self.buffer(bytes)}; },
          py::arg("bytes"))
      .def("trim", &Engine::trim)
      .def(
          "forward",
          [](Engine& self, const BlockInput& in, Address out, const KeptActivations& kept) {
            return as_dict(unlocked([&] { return self.forward(in, pointer<void>(out), kept); }));
          },
          py::arg("input"), py::kw_only(), py::arg("out"), py::arg("kept"))
      .def(
          "backward",
          [](Engine& self, const BlockInput& in, Address d_out, const KeptActivations& kept,
             Address d_hidden, Address d_weight,
             const std::array<LoraGradient, kProjectionCount>& d_lora) {
            return as_dict(unlocked([&] {
              return self.backward(in, pointer<const void>(d_out), kept, pointer<void>(d_hidden),
                                   pointer<float>(d_weight), d_lora);
            }));
          },
          py::arg("input"), py::kw_only(), py::arg("d_out"), py::arg("kept"), py::arg("d_hidden"),
          py::arg("d_weight"), py::arg("d_lora"));

  m.def(
      "backward_bytes",
      [](const std::string& isa, int threads, const PackedLayout& layout,
         const std::string& compute_name, int64_t tokens, int64_t top_k, const std::string& dtype,
         const std::array<int, kProjectionCount>& ranks, bool shared, int64_t max_rows) {
        const PackedExperts outline = PackedExperts::outline(layout);
        BlockInput in;
        in.weights = &outline;
        in.compute = compute(compute_name);
        in.tokens = tokens;
        in.top_k = top_k;
        in.type = float_type(dtype);
        in.max_rows = max_rows;
        for (size_t i = 0; i < ranks.size(); ++i) {
          in.lora[i].rank = ranks[i];
          in.lora[i].shared = shared;
        }
        const KernelTable& kernels = describe_kernels(isa);
        return unlocked([&] { return ExpertsBlock::backward_bytes(kernels, threads, in); });
      },
      py::kw_only(), py::arg("isa"), py::arg("threads"), py::arg("layout"), py::arg("compute"),
      py::arg("tokens"), py::arg("top_k"), py::arg("dtype"), py::arg("ranks"), py::arg("shared"),
      py::arg("max_rows"), "Temporary bytes of a backward on such experts.");
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
