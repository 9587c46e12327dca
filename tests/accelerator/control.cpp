// What tests ask of the simulated device, as plain C, and what autocast does on it.

#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <cstring>

#include "backend.h"

using simulated::Device;

extern "C" {

void simulated_delay(int kind, int microseconds) {
  Device::instance().delay(static_cast<simulated::Kind>(kind), microseconds);
}

void simulated_clear() { Device::instance().clear(); }

// Valid until the next call in the same thread.
const char* simulated_report() {
  thread_local std::string text;
  text = Device::instance().report();
  return text.c_str();
}

size_t simulated_allocated() { return Device::instance().allocated(); }
size_t simulated_peak() { return Device::instance().peak(); }

// Of the default generator: a seed, and how many operations drew.
void simulated_get_random_state(void* state) {
  at::Tensor from = simulated::default_generator().get_state();
  std::memcpy(state, from.data_ptr(), from.nbytes());
}

void simulated_set_random_state(const void* state) {
  at::Tensor to = at::empty({16}, at::kByte);
  std::memcpy(to.data_ptr(), state, to.nbytes());
  at::Generator generator = simulated::default_generator();
  generator.set_state(to);
}

}  // extern "C"

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(baddbmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(softmax, int, fp32)
  KERNEL_PRIVATEUSEONE(log_softmax, int, fp32)
  KERNEL_PRIVATEUSEONE(cross_entropy_loss, fp32)
  KERNEL_PRIVATEUSEONE(nll_loss, fp32)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(rsqrt, fp32)
}
