// The operations of the simulated device: each is a job on the current stream that runs torch's CPU
// kernels on the device's memory. What an operation returns is known from its meta kernel; where
// there is none, or where the result's shape depends on data, the host waits, as it does on a GPU.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/ParallelGuard.h>
#include <torch/library.h>

#include <cstring>
#include <set>

#include "backend.h"

namespace simulated {
namespace {

using c10::IValue;
using torch::jit::Stack;

bool is_ours(const at::Tensor& t) { return t.defined() && t.device().type() == kSimulated; }

// The same tensor as jobs see it. It holds nothing: memory lives as long as its allocation.
at::Tensor on_host(const at::Tensor& t) {
  auto options = at::TensorOptions().dtype(t.dtype()).device(at::kCPU);
  if (!block_of(t)) return at::empty_strided(t.sizes(), t.strides(), options);
  char* begin = Device::instance().inner(t.storage().data_ptr().get());
  auto made =
      at::from_blob(begin + t.storage_offset() * t.itemsize(), t.sizes(), t.strides(), options);
  made._set_conj(t.is_conj());
  made._set_neg(t.is_neg());
  return made;
}

at::Tensor on_meta(const at::Tensor& t) {
  return at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kMeta));
}

at::Tensor empty_like_meta(const at::Tensor& t) {
  return at::empty_strided(t.sizes(), t.strides(), t.options().device(kSimulated));
}

// Runs CPU kernels in a stream's thread.
template <typename Run>
void in_job(Run run) {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::ParallelGuard serial(true);
  run();
}

// Each tensor of an argument, a list's too, replaced by what `change` makes of it.
template <typename Change>
IValue with_tensors(const IValue& value, Change change) {
  if (value.isTensor()) {
    const at::Tensor& t = value.toTensor();
    return t.defined() ? IValue(change(t)) : value;
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& t : value.toTensorVector()) list.push_back(change(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector())
      list.push_back(t && t->defined() ? std::optional(change(*t)) : t);
    return list;
  }
  return value;
}

struct Operands {
  std::vector<IValue> host;  // as the job gets them
  std::vector<IValue> meta;
  std::vector<Block*> reads, writes;
  bool draws_numbers = false;
};

bool takes_host_indices(const std::string& name) {
  static const std::set<std::string> names = {"aten::index", "aten::index_put", "aten::index_put_",
                                              "aten::_index_put_impl_"};
  return names.count(name) > 0;
}

at::Tensor host_operand(const std::string& name, const at::Tensor& t) {
  // As on a GPU, where a number beside tensors need not be on the device, and indices neither.
  TORCH_CHECK(t.dim() == 0 || takes_host_indices(name),
              "Expected all tensors to be on the same device, but ", name, " got one of shape ",
              t.sizes(), " on ", t.device(), " beside others on ", c10::Device(kSimulated, 0));
  return t.unsafeGetTensorImpl()->is_wrapped_number() ? t : t.clone();
}

Operands operands_of(const c10::OperatorHandle& op, const Stack& stack) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  Operands found;
  auto given = torch::jit::last(stack, arguments.size());
  std::optional<at::Generator> generator;
  for (size_t i = 0; i < arguments.size(); ++i)
    if (given[i].isGenerator()) generator = given[i].toGenerator();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const IValue& value = given[i];
    const auto* alias = arguments[i].alias_info();
    auto& blocks = alias && alias->isWrite() ? found.writes : found.reads;
    bool for_generator = arguments[i].type()->str().find("Generator") != std::string::npos;
    if (for_generator) {
      found.draws_numbers = true;
      found.host.emplace_back(at::make_generator<at::CPUGeneratorImpl>(next_seed(generator)));
      found.meta.emplace_back();
    } else if (value.isDevice()) {
      found.host.emplace_back(c10::Device(at::kCPU));
      found.meta.emplace_back(c10::Device(at::kMeta));
    } else {
      found.host.push_back(with_tensors(value, [&](const at::Tensor& t) {
        if (!is_ours(t)) return host_operand(schema.name(), t);
        if (Block* block = block_of(t)) blocks.push_back(block);
        return on_host(t);
      }));
      found.meta.push_back(
          with_tensors(value, [&](const at::Tensor& t) { return is_ours(t) ? on_meta(t) : t; }));
    }
  }
  return found;
}

// The argument that a return is, where the operation returns what it writes.
int written_argument(const c10::FunctionSchema& schema, const c10::Argument& returned) {
  if (!returned.alias_info()) return -1;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (alias && alias->isWrite() && alias->beforeSets() == returned.alias_info()->beforeSets())
      return static_cast<int>(i);
  }
  return -1;
}

bool is_view(const c10::FunctionSchema& schema) {
  const auto& returns = schema.returns();
  return !returns.empty() && returns[0].alias_info() && !returns[0].alias_info()->isWrite();
}

void fit_to_meta(const at::Tensor& ours, const at::Tensor& meta) {
  if (ours.sizes() == meta.sizes()) return;
  ours.resize_(meta.sizes());
  if (ours.strides() != meta.strides())
    ours.unsafeGetTensorImpl()->set_sizes_and_strides(meta.sizes(), meta.strides());
}

bool returns_tensors_only(const c10::FunctionSchema& schema) {
  for (const auto& returned : schema.returns()) {
    std::string type = returned.type()->str();
    if (type.find("Tensor") == std::string::npos) return false;
  }
  return true;
}

// What the meta kernel returns; nothing where it cannot tell.
std::optional<Stack> shapes_of(const c10::OperatorHandle& op, const std::vector<IValue>& meta) {
  Stack stack(meta);
  try {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(&stack);
  } catch (const std::exception&) {
    return std::nullopt;
  }
  return stack;
}

void copy_results(const Stack& from, const Stack& to) {
  auto copy = [](const at::Tensor& a, const at::Tensor& b) {
    if (a.defined() && b.defined() && a.data_ptr() != b.data_ptr()) b.copy_(a);
  };
  for (size_t i = 0; i < to.size(); ++i) {
    if (to[i].isTensor()) copy(from[i].toTensor(), to[i].toTensor());
    if (!to[i].isTensorList()) continue;
    auto a = from[i].toTensorVector(), b = to[i].toTensorVector();
    for (size_t k = 0; k < b.size(); ++k) copy(a[k], b[k]);
  }
}

void run_at_once(const c10::OperatorHandle& op, Stack* stack, const Operands& operands) {
  const auto& schema = op.schema();
  Device::instance().drain(current_stream(), Wait::fallback);
  Stack host(operands.host);
  // An out argument of another size cannot be resized where it lies.
  op.callBoxed(&host);
  Stack results;
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    int argument = written_argument(schema, schema.returns()[i]);
    if (argument >= 0) {
      const IValue& given = torch::jit::peek(*stack, argument, schema.arguments().size());
      if (given.isTensor() && given.toTensor().sizes() != host[i].toTensor().sizes()) {
        given.toTensor().resize_(host[i].toTensor().sizes());
        given.toTensor().copy_(host[i].toTensor());
      }
      results.push_back(given);
    } else {
      results.push_back(with_tensors(host[i], [](const at::Tensor& t) {
        at::Tensor made = empty_like_meta(t);
        on_host(made).copy_(t);  // nothing else runs
        return made;
      }));
    }
  }
  torch::jit::drop(*stack, schema.arguments().size());
  for (IValue& result : results) stack->push_back(std::move(result));
}

at::Tensor view_of(const at::Tensor& t, c10::IntArrayRef sizes, c10::IntArrayRef strides,
                   int64_t offset, std::optional<caffe2::TypeMeta> dtype = std::nullopt) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(t.storage()), t.key_set(), dtype.value_or(t.dtype()));
  made.unsafeGetTensorImpl()->set_storage_offset(offset);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return made;
}

// A view is the same memory with the form that its meta kernel gives it.
void make_view(const c10::OperatorHandle& op, Stack* stack) {
  const size_t arguments = op.schema().arguments().size();
  const at::Tensor base = torch::jit::peek(*stack, 0, arguments).toTensor();
  at::Tensor meta = at::empty({0}, base.options().device(at::kMeta));
  meta = at::as_strided(meta, base.sizes(), base.strides(), base.storage_offset());
  Stack metas(torch::jit::last(*stack, arguments).vec());
  metas[0] = meta;
  op.callBoxed(&metas);
  torch::jit::drop(*stack, arguments);
  for (const IValue& made : metas)
    stack->push_back(with_tensors(made, [&](const at::Tensor& t) {
      return view_of(base, t.sizes(), t.strides(), t.storage_offset(), t.dtype());
    }));
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const auto& schema = op.schema();
  if (is_view(schema)) return make_view(op, stack);
  Operands operands = operands_of(op, *stack);
  TORCH_CHECK(operands.draws_numbers || !op.hasTag(at::Tag::nondeterministic_seeded), schema.name(),
              " would draw from the CPU's random numbers");
  std::optional<Stack> shapes;
  if (returns_tensors_only(schema)) shapes = shapes_of(op, operands.meta);
  if (!shapes) return run_at_once(op, stack, operands);

  Stack results, targets;
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    int argument = written_argument(schema, schema.returns()[i]);
    if (argument >= 0) {
      const IValue& given = torch::jit::peek(*stack, argument, schema.arguments().size());
      if (given.isTensor() && is_ours(given.toTensor())) {
        fit_to_meta(given.toTensor(), (*shapes)[i].toTensor());
        operands.host[argument] = on_host(given.toTensor());
        if (Block* block = block_of(given.toTensor())) operands.writes.push_back(block);
      }
      results.push_back(given);
      targets.emplace_back();
      continue;
    }
    results.push_back(with_tensors((*shapes)[i], [&](const at::Tensor& t) {
      return t.device().is_meta() ? empty_like_meta(t) : t;
    }));
    targets.push_back(with_tensors(results.back(), [&](const at::Tensor& t) {
      if (!is_ours(t)) return t;
      if (Block* block = block_of(t)) operands.writes.push_back(block);
      return on_host(t);
    }));
  }
  torch::jit::drop(*stack, schema.arguments().size());
  for (const IValue& result : results) stack->push_back(result);
  Device::instance().submit(current_stream(), Kind::compute, schema.name().c_str(), operands.reads,
                            operands.writes,
                            [op, host = std::move(operands.host), targets = std::move(targets)] {
                              in_job([&] {
                                Stack run(host);
                                op.callBoxed(&run);
                                copy_results(run, targets);
                              });
                            });
}

c10::OperatorHandle operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

// Torch knows no convolution of other devices by itself.
void convolution(const c10::OperatorHandle&, c10::DispatchKeySet keys, Stack* stack) {
  fallback(operation("aten::convolution"), keys, stack);
}

void convolution_backward(const c10::OperatorHandle&, c10::DispatchKeySet keys, Stack* stack) {
  const size_t weight = 2, arguments = 10;
  auto outputs = torch::jit::peek(*stack, weight, arguments).toTensor().size(0);
  stack->insert(stack->end() - (arguments - weight - 1), IValue(std::vector<int64_t>{outputs}));
  fallback(operation("aten::convolution_backward"), keys, stack);
}

void up(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  // As CUDA does it: a copy moves bytes, and what differs is changed on the device.
  if (from.dtype() != to.dtype()) {
    at::Tensor raw = at::empty(from.sizes(), from.options().device(kSimulated));
    up(from, raw, non_blocking);
    to.copy_(raw);
    return;
  }
  at::Tensor source = from.contiguous();
  bool pinned = is_pinned(source.data_ptr());
  Device& device = Device::instance();
  int stream = current_stream();
  device.count_copy(Kind::up, source.nbytes());
  // What the host writes before the copy has run would reach the device.
  at::Tensor then = pinned ? source.clone() : source;
  std::vector<Block*> writes;
  if (Block* block = block_of(to)) writes.push_back(block);
  device.submit(stream, Kind::up, "copy up", {}, writes,
                [source, then, pinned, target = on_host(to), &device] {
                  in_job([&] {
                    if (pinned && std::memcmp(source.data_ptr(), then.data_ptr(), source.nbytes()))
                      device.violation("pinned memory was written before its copy up ran");
                    target.copy_(source);
                  });
                });
  if (!pinned) {
    device.drain(stream, Wait::pageable);
  } else if (!non_blocking) {
    device.drain(stream, Wait::copy);
  }
}

void down(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (from.dtype() != to.dtype()) return down(from.to(to.scalar_type()), to, non_blocking);
  at::Tensor target = to.is_contiguous() ? to : at::empty(to.sizes(), to.options());
  bool pinned = is_pinned(target.data_ptr());
  at::Tensor source = from.contiguous();
  Device& device = Device::instance();
  int stream = current_stream();
  device.count_copy(Kind::down, source.nbytes());
  // Who reads before the copy has run finds NaN, however fast it comes.
  std::memset(target.data_ptr(), 0xFF, target.nbytes());
  std::vector<Block*> reads;
  if (Block* block = block_of(source)) reads.push_back(block);
  device.submit(stream, Kind::down, "copy down", reads, {},
                [source = on_host(source), target] { in_job([&] { target.copy_(source); }); });
  if (!pinned || !target.is_same(to)) {
    device.drain(stream, Wait::pageable);
  } else if (!non_blocking) {
    device.drain(stream, Wait::copy);
  }
  if (!target.is_same(to)) to.copy_(target);
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  at::Tensor source = from.expand_as(to);
  if (to.numel() == 0) return to;
  if (!is_ours(source) || !is_ours(to)) source = source.resolve_conj().resolve_neg();
  if (!is_ours(source)) {
    up(source, to, non_blocking);
  } else if (!is_ours(to)) {
    down(source, to, non_blocking);
  } else {
    std::vector<Block*> reads{block_of(source)}, writes{block_of(to)};
    Device::instance().submit(
        current_stream(), Kind::compute, "aten::copy_", reads, writes,
        [a = on_host(source), b = on_host(to)] { in_job([&] { b.copy_(a); }); });
  }
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Tensor empty(c10::SymIntArrayRef sizes, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), c10::GetAllocator(kSimulated),
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides),
      c10::GetAllocator(kSimulated), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype));
}

at::Tensor as_strided(const at::Tensor& t, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides,
                      std::optional<c10::SymInt> offset) {
  return view_of(t, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides),
                 offset ? offset->expect_int() : t.storage_offset());
}

at::Tensor reshape_alias(const at::Tensor& t, c10::SymIntArrayRef sizes,
                         c10::SymIntArrayRef strides) {
  return as_strided(t, sizes, strides, std::nullopt);
}

at::Tensor view(const at::Tensor& t, c10::SymIntArrayRef wanted) {
  auto sizes = at::infer_size_dv(C10_AS_INTARRAYREF_SLOW(wanted), t.numel());
  auto strides = at::detail::computeStride(t.sizes(), t.strides(), sizes);
  TORCH_CHECK(strides, "view: ", t.sizes(), " does not fit ", wanted, "; use reshape");
  return view_of(t, sizes, *strides, t.storage_offset());
}

const at::Tensor& resize(const at::Tensor& t, c10::SymIntArrayRef wanted,
                         std::optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(wanted);
  auto* impl = t.unsafeGetTensorImpl();
  if (t.sizes() == sizes) return t;
  size_t needed = t.storage_offset() * t.itemsize() + c10::multiply_integers(sizes) * t.itemsize();
  if (needed > t.storage().nbytes()) {
    at::Tensor larger = at::empty({static_cast<int64_t>(needed)}, t.options().dtype(at::kByte));
    if (size_t had = t.storage().nbytes()) {
      auto bytes = view_of(t, {}, {}, 0).view(at::kByte);
      copy_from(bytes.as_strided({static_cast<int64_t>(had)}, {1}, 0), larger.narrow(0, 0, had),
                true);
    }
    auto* storage = t.storage().unsafeGetStorageImpl();
    storage->set_data_ptr(larger.storage().unsafeGetStorageImpl()->set_data_ptr(c10::DataPtr()));
    storage->set_nbytes(needed);
  }
  impl->set_sizes_contiguous(sizes);
  return t;
}

at::Tensor& set_storage(at::Tensor& t, c10::Storage source, c10::SymInt offset,
                        c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides) {
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset.expect_int());
  if (strides.data() && strides.size() == sizes.size()) {
    impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
  } else {
    impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(sizes));
  }
  return t;
}

at::Tensor& set_whole_storage(at::Tensor& t, c10::Storage source) {
  int64_t elements = source.nbytes() / t.itemsize();
  return set_storage(t, std::move(source), 0, c10::SymIntArrayRef({c10::SymInt(elements)}), {});
}

at::Tensor& set_tensor(at::Tensor& t, const at::Tensor& source) {
  return set_storage(t, source.storage(), source.storage_offset(), source.sym_sizes(),
                     source.sym_strides());
}

at::Scalar item(const at::Tensor& t) {
  Device::instance().drain(current_stream(), Wait::item);
  return on_host(t).item();
}

std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& t, double p,
                                                  std::optional<bool> train) {
  if (!train.value_or(true)) return {t.clone(), at::ones_like(t, t.options().dtype(at::kBool))};
  at::Tensor mask = at::empty_like(t, t.options().dtype(at::kBool)).bernoulli_(1 - p);
  return {t * mask * (p < 1 ? 1 / (1 - p) : 0.0), mask};
}

void record_stream(at::Tensor& t, at::Stream stream) {
  if (Block* block = block_of(t)) Device::instance().use(block, static_cast<int>(stream.id()));
}

int64_t plain_attention(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        const std::optional<at::Tensor>&, double, bool, std::optional<double>,
                        bool) {
  return 0;  // of at::SDPBackend: math
}

}  // namespace
}  // namespace simulated

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&simulated::fallback>());
}

// A copy resolves them; torch would copy first.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  using namespace simulated;
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &simulated::empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("view", &view);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("native_dropout", &native_dropout);
  m.impl("record_stream", &record_stream);
  m.impl("_local_scalar_dense", &item);
  m.impl("_fused_sdp_choice", &plain_attention);
  m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("convolution_backward_overrideable",
         torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
}
