// The Python module kt_sft.kernels._core. Addresses arrive as integers that kt_sft/kernels has
// checked (dtype, shape, stride, device, lifetime); nothing here knows torch, so one build serves
// every torch version. The GIL is released around all work.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <mutex>

#include "../core/cpu_features.h"
#include "../core/experts_block.h"
#include "../core/thread_pool.h"

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

Activation activation(const std::string& name) {
  static const std::map<std::string, Activation> names = {{"silu", Activation::kSilu},
                                                          {"gelu", Activation::kGeluErf},
                                                          {"gelu_tanh", Activation::kGeluTanh},
                                                          {"quick_gelu", Activation::kQuickGelu}};
  return named(names, "activation", name);
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
  static const std::map<std::string, WeightFormat> names = {{"int8", WeightFormat::kInt8},
                                                            {"bf16", WeightFormat::kBf16}};
  return named(names, "weights", name);
}

struct Buffer {
  std::shared_ptr<LargeBuffer> memory;
};

// Threads, kernels and temporary memory, shared by all layers of a model. Calls are serialized.
class Engine {
 public:
  Engine(int threads, const std::string& isa)
      : kernels_(select_kernels(isa, detect_cpu_features())),
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
                       const std::string& activation_name, int64_t tokens, int64_t top_k,
                       const std::string& dtype, Address hidden, Address index,
                       Address routing_weight, const std::array<LoraTuple, 3>& lora, float dropout,
                       uint64_t dropout_seed) {
  BlockInput in;
  in.weights = &weights;
  in.compute = compute(compute_name);
  if ((in.compute == Compute::kBf16) != (weights.format() == WeightFormat::kBf16))
    throw std::invalid_argument("compute: bf16 goes with bf16 weights, exact and int8 with int8");
  in.activation = activation(activation_name);
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
  return in;
}

KeptActivations kept_activations(Address gate, Address up, const std::array<Address, 3>& lora) {
  KeptActivations kept;
  kept.gate = pointer<float>(gate);
  kept.up = pointer<float>(up);
  for (size_t i = 0; i < lora.size(); ++i) kept.lora_down[i] = pointer<float>(lora[i]);
  return kept;
}

CpuFeatures features_from(const std::map<std::string, bool>& flags) {
  CpuFeatures f;
  const std::map<std::string, bool*> fields = {{"avx2", &f.avx2},
                                               {"fma", &f.fma},
                                               {"avx512f", &f.avx512f},
                                               {"avx512bw", &f.avx512bw},
                                               {"avx512vl", &f.avx512vl},
                                               {"avx512dq", &f.avx512dq},
                                               {"avx512_vnni", &f.avx512_vnni},
                                               {"avx512_bf16", &f.avx512_bf16}};
  for (const auto& [name, value] : flags) *named(fields, "cpu flag", name) = value;
  return f;
}

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// Single kernels over numpy arrays, for tests that compare instruction sets stage by stage.
void bind_single_kernels(py::module_& m) {
  const auto table = [](const std::string& isa) -> const KernelTable& {
    return select_kernels(isa, detect_cpu_features());
  };
  m.def(
      "quantize_row",
      [table](const std::string& isa, int terms, const Array<float>& x) {
        const int64_t n = x.size();
        Array<int8_t> q({static_cast<py::ssize_t>(terms), static_cast<py::ssize_t>(n)});
        Array<int32_t> sums(terms);
        float scale = 0.0f;
        table(isa).quantize_row(terms, n, x.data(), nullptr, q.mutable_data(), &scale,
                                sums.mutable_data());
        return py::make_tuple(q, scale, sums);
      },
      py::arg("isa"), py::arg("terms"), py::arg("x").noconvert());
  m.def(
      "dot_u8s8",
      [table](const std::string& isa, const Array<int8_t>& a, const Array<uint8_t>& panel) {
        const int rows = static_cast<int>(a.shape(0));
        const int64_t blocks = a.shape(1) / kBlock;
        if (rows < 1 || rows > kMaxDotRows || a.shape(1) % kBlock ||
            panel.size() != blocks * kTileBytesInt8)
          throw std::invalid_argument("dot_u8s8: shapes do not fit");
        Array<int32_t> c({static_cast<py::ssize_t>(rows), static_cast<py::ssize_t>(kPanelCols)});
        table(isa).dot_u8s8(rows, blocks, a.data(), a.shape(1), panel.data(), c.mutable_data(), {});
        return c;
      },
      py::arg("isa"), py::arg("a").noconvert(), py::arg("panel").noconvert());
  m.def(
      "dot_bf16",
      [table](const std::string& isa, const Array<uint16_t>& a, const Array<uint16_t>& panel) {
        const int rows = static_cast<int>(a.shape(0));
        const int64_t blocks = a.shape(1) / kBlock;
        if (rows < 1 || rows > kMaxDotRows || a.shape(1) % kBlock ||
            panel.size() != blocks * kTileBytesBf16 / 2)
          throw std::invalid_argument("dot_bf16: shapes do not fit");
        Array<float> c({static_cast<py::ssize_t>(rows), static_cast<py::ssize_t>(kPanelCols)});
        table(isa).dot_bf16(rows, blocks, a.data(), a.shape(1), panel.data(), c.mutable_data(), {});
        return c;
      },
      py::arg("isa"), py::arg("a").noconvert(), py::arg("panel").noconvert());
  m.def(
      "transpose_u8",
      [table](const std::string& isa, const Array<uint8_t>& tile) {
        if (tile.size() != 1024) throw std::invalid_argument("transpose_u8: expected 1024 bytes");
        Array<uint8_t> out({4, 256});
        uint8_t* pieces[4];
        for (int i = 0; i < 4; ++i) pieces[i] = out.mutable_data() + i * 256;
        table(isa).transpose_u8(tile.data(), pieces);
        return out;
      },
      py::arg("isa"), py::arg("tile").noconvert());
  m.def(
      "transpose_bf16",
      [table](const std::string& isa, const Array<uint16_t>& tile) {
        if (tile.size() != 2048)
          throw std::invalid_argument("transpose_bf16: expected 2048 values");
        Array<uint16_t> out({2, 1024});
        uint16_t* pieces[2] = {out.mutable_data(), out.mutable_data() + 1024};
        table(isa).transpose_bf16(tile.data(), pieces);
        return out;
      },
      py::arg("isa"), py::arg("tile").noconvert());
  m.def(
      "convert",
      [table](const std::string& isa, const std::string& dtype, const Array<float>& x) {
        Array<uint16_t> half(x.size());
        Array<float> back(x.size());
        table(isa).from_float_row(x.size(), float_type(dtype), x.data(), half.mutable_data());
        table(isa).to_float_row(x.size(), float_type(dtype), half.data(), back.mutable_data());
        return py::make_tuple(half, back);
      },
      py::arg("isa"), py::arg("dtype"), py::arg("x").noconvert());
  m.def(
      "activate",
      [table](const std::string& isa, const std::string& name, const Array<float>& gate) {
        // Value and slope: up = 1 and dh = 1, weight = 1.
        const int64_t n = gate.size();
        if (n % kPanelCols)
          throw std::invalid_argument("activate: length must be a multiple of 32");
        std::vector<float> one(static_cast<size_t>(n), 1.0f), dup(static_cast<size_t>(n));
        Array<float> value(n), slope(n);
        table(isa).gate_forward(activation(name), n, gate.data(), one.data(), value.mutable_data());
        std::vector<float> h(static_cast<size_t>(n));
        table(isa).gate_backward(activation(name), n, 1.0f, one.data(), gate.data(), one.data(),
                                 slope.mutable_data(), dup.data(), h.data());
        return py::make_tuple(value, slope);
      },
      py::arg("isa"), py::arg("activation"), py::arg("gate").noconvert());
  m.def("dropout_keep",
        [table](const std::string& isa, uint32_t row_key, float p, int64_t first, int64_t n) {
          std::vector<float> one(static_cast<size_t>(n), 1.0f);
          Array<float> out(n);
          DropoutKey key;
          key.row_key = row_key;
          key.threshold = static_cast<uint32_t>(static_cast<double>(p) * 4294967296.0);
          key.keep_scale = 1.0f / (1.0f - p);
          table(isa).dropout_row(key, first, n, one.data(), out.mutable_data());
          return out;
        });
}

}  // namespace
}  // namespace kt

PYBIND11_MODULE(_core, m) {
  using namespace kt;
  m.doc() = "Compiled core of kt_sft: CPU kernels for routed experts.";

  py::register_exception<ForkedProcess>(m, "ForkedProcess", PyExc_RuntimeError);

  m.def(
      "isa_report",
      [](const std::optional<std::map<std::string, bool>>& flags) {
        const CpuFeatures features = flags ? features_from(*flags) : detect_cpu_features();
        std::vector<std::pair<std::string, std::vector<std::string>>> out;
        for (const IsaEntry& entry : isa_entries())
          out.emplace_back(entry.table->name, entry.missing(features));
        return out;
      },
      py::arg("cpu_flags") = std::nullopt,
      "Every instruction set, best first, with the CPU flags it misses here.");
  m.def(
      "select_isa",
      [](const std::string& isa, const std::optional<std::map<std::string, bool>>& flags) {
        return std::string(
            select_kernels(isa, flags ? features_from(*flags) : detect_cpu_features()).name);
      },
      py::arg("isa"), py::arg("cpu_flags") = std::nullopt);

  py::class_<Buffer>(m, "Buffer", py::buffer_protocol()).def_buffer([](Buffer& buffer) {
    return py::buffer_info(buffer.memory->data(), 1, py::format_descriptor<uint8_t>::format(),
                           static_cast<py::ssize_t>(buffer.memory->size()));
  });

  py::class_<PackedExperts, std::shared_ptr<PackedExperts>>(m, "PackedExperts")
      .def(py::init([](int64_t experts, int64_t hidden, int64_t intermediate,
                       const std::string& weights) {
             return std::make_shared<PackedExperts>(experts, hidden, intermediate,
                                                    weight_format(weights));
           }),
           py::arg("experts"), py::arg("hidden"), py::arg("intermediate"), py::arg("weights"))
      .def_property_readonly("nbytes", &PackedExperts::bytes)
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
          "unpack",
          [](const PackedExperts& self, int64_t expert, const std::string& name, Address out) {
            const Projection p = projection(name);
            py::gil_scoped_release unlocked;
            self.unpack(expert, p, pointer<float>(out));
          },
          py::arg("expert"), py::arg("projection"), py::arg("out"));

  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine")
      .def(py::init([](int threads, const std::string& isa) {
             return std::make_shared<Engine>(threads, isa);
           }),
           py::arg("threads"), py::arg("isa"))
      .def_property_readonly("isa", [](const Engine& e) { return e.kernels().name; })
      .def_property_readonly("threads", &Engine::threads)
      .def_property_readonly("cached_bytes", &Engine::cached_bytes)
      .def("buffer", &Engine::buffer, py::arg("bytes"))
      .def("trim", &Engine::trim)
      .def("forward",
           [](Engine& self, const PackedExperts& weights, const std::string& compute,
              const std::string& activation, int64_t tokens, int64_t top_k,
              const std::string& dtype, Address hidden, Address index, Address routing_weight,
              const std::array<LoraTuple, 3>& lora, float dropout, uint64_t dropout_seed,
              Address out, Address gate, Address up, const std::array<Address, 3>& lora_down) {
             const BlockInput in =
                 block_input(weights, compute, activation, tokens, top_k, dtype, hidden, index,
                             routing_weight, lora, dropout, dropout_seed);
             return as_dict(self.exclusively([&](ThreadPool&, ExpertsBlock& block) {
               return block.forward(in, pointer<void>(out), kept_activations(gate, up, lora_down));
             }));
           })
      .def("backward",
           [](Engine& self, const PackedExperts& weights, const std::string& compute,
              const std::string& activation, int64_t tokens, int64_t top_k,
              const std::string& dtype, Address hidden, Address index, Address routing_weight,
              const std::array<LoraTuple, 3>& lora, float dropout, uint64_t dropout_seed,
              Address d_out, Address gate, Address up, const std::array<Address, 3>& lora_down,
              Address d_hidden, Address d_weight,
              const std::array<std::pair<Address, Address>, 3>& d_lora) {
             const BlockInput in =
                 block_input(weights, compute, activation, tokens, top_k, dtype, hidden, index,
                             routing_weight, lora, dropout, dropout_seed);
             std::array<LoraGradient, kProjectionCount> gradients;
             for (size_t i = 0; i < gradients.size(); ++i)
               gradients[i] = {pointer<float>(d_lora[i].first), pointer<float>(d_lora[i].second)};
             return as_dict(self.exclusively([&](ThreadPool&, ExpertsBlock& block) {
               return block.backward(in, pointer<const void>(d_out),
                                     kept_activations(gate, up, lora_down), pointer<void>(d_hidden),
                                     pointer<float>(d_weight), gradients);
             }));
           });

  py::module_ single = m.def_submodule("single", "Single kernels over numpy arrays, for tests.");
  bind_single_kernels(single);
}
