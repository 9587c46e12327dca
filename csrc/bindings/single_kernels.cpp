#include "single_kernels.h"

#include <pybind11/stl.h>

#include <string>
#include <tuple>

#include "../core/dispatch.h"

namespace py = pybind11;

namespace kt {
namespace {

// By name alone: the caller has made sure that the CPU, or an emulator, runs it.
const KernelTable& table_named(const std::string& isa) {
  for (const IsaEntry& entry : isa_entries())
    if (isa == entry.table->name) return *entry.table;
  throw std::invalid_argument("isa: got '" + isa + "'");
}

// How an argument of a kernel arrives from Python: pointers as addresses, structs as tuples.
template <class T>
struct Bound {
  using Type = T;
  static T get(T value) { return value; }
};
template <class T>
struct Bound<T*> {
  using Type = uintptr_t;
  static T* get(uintptr_t address) { return reinterpret_cast<T*>(address); }
};
template <>
struct Bound<FloatType> {
  using Type = int;
  static FloatType get(int value) { return static_cast<FloatType>(value); }
};
template <>
struct Bound<CodeKind> {
  using Type = int;
  static CodeKind get(int value) { return static_cast<CodeKind>(value); }
};
// Two times 64 scales, then two times 64 zero points.
template <>
struct Bound<const CodeScales&> {
  using Type = uintptr_t;
  static const CodeScales& get(uintptr_t address) {
    return *reinterpret_cast<const CodeScales*>(address);
  }
};
template <>
struct Bound<const Prefetch&> {
  using Type = py::none;
  static Prefetch get(const py::none&) { return {}; }
};
template <>
struct Bound<const DropoutKey&> {
  using Type = std::tuple<uint32_t, uint32_t, float>;
  static DropoutKey get(const Type& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }
};
template <>
struct Bound<const Gate&> {
  using Type = std::tuple<int, bool, float, float, float>;
  static Gate get(const Type& t) {
    return {static_cast<Activation>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t),
            std::get<4>(t)};
  }
};
// (rows, gate, up, h, ldh, keep_gate, keep_up, ldk, stream)
template <>
struct Bound<const GateForward&> {
  using Type = std::tuple<int, uintptr_t, uintptr_t, uintptr_t, int64_t, uintptr_t, uintptr_t,
                          int64_t, bool>;
  static GateForward get(const Type& t) {
    return {std::get<0>(t),
            reinterpret_cast<const float*>(std::get<1>(t)),
            reinterpret_cast<const float*>(std::get<2>(t)),
            reinterpret_cast<float*>(std::get<3>(t)),
            std::get<4>(t),
            reinterpret_cast<float*>(std::get<5>(t)),
            reinterpret_cast<float*>(std::get<6>(t)),
            std::get<7>(t),
            std::get<8>(t)};
  }
};
// (rows, weight, dh, gate, up, ldk, dgate, dup, ldd, h, ldh, d_weight, ldw, stream)
template <>
struct Bound<const GateBackward&> {
  using Type = std::tuple<int, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, uintptr_t,
                          uintptr_t, int64_t, uintptr_t, int64_t, uintptr_t, int64_t, bool>;
  static GateBackward get(const Type& t) {
    return {std::get<0>(t),
            reinterpret_cast<const float*>(std::get<1>(t)),
            reinterpret_cast<const float*>(std::get<2>(t)),
            reinterpret_cast<const float*>(std::get<3>(t)),
            reinterpret_cast<const float*>(std::get<4>(t)),
            std::get<5>(t),
            reinterpret_cast<float*>(std::get<6>(t)),
            reinterpret_cast<float*>(std::get<7>(t)),
            std::get<8>(t),
            reinterpret_cast<float*>(std::get<9>(t)),
            std::get<10>(t),
            reinterpret_cast<float*>(std::get<11>(t)),
            std::get<12>(t),
            std::get<13>(t)};
  }
};

template <class Result, class... Arguments>
void bind_kernel(py::module_& m, const char* name, Result (*KernelTable::*field)(Arguments...)) {
  m.def(name, [field](const std::string& isa, typename Bound<Arguments>::Type... arguments) {
    const auto kernel = table_named(isa).*field;
    const std::tuple<decltype(Bound<Arguments>::get(arguments))...> values{
        Bound<Arguments>::get(arguments)...};
    py::gil_scoped_release unlocked;
    return std::apply(kernel, values);
  });
}

}  // namespace

void bind_single_kernels(py::module_& m) {
  py::module_ single = m.def_submodule("single", "Single kernels over raw addresses.");
#define KT_BIND(result, name, arguments) bind_kernel(single, #name, &KernelTable::name);
  KT_KERNELS(KT_BIND)
#undef KT_BIND
  single.def("geometry", [](const std::string& isa) {
    static const char* const forms[] = {"u8", "s16", "bf16", "f32"};
    const KernelTable& table = table_named(isa);
    py::dict out;
    out["int_panel"] = forms[static_cast<int>(table.int_panel)];
    out["float_panel"] = forms[static_cast<int>(table.float_panel)];
    out["max_int_rows"] = py::make_tuple(table.max_int_rows[0], table.max_int_rows[1]);
    out["max_float_rows"] = table.max_float_rows;
    return out;
  });
#define KT_NAME(result, name, arguments) names.append(#name);
  py::list names;
  KT_KERNELS(KT_NAME)
#undef KT_NAME
  single.attr("KERNELS") = py::tuple(names);
}

}  // namespace kt
