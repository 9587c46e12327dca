// What the parts of the torch backend share.

#pragma once

#include <ATen/ATen.h>

#include "runtime.h"

namespace simulated {

inline constexpr auto kSimulated = c10::DeviceType::PrivateUse1;

int current_stream();

// nullptr where nothing was allocated.
Block* block_of(const at::Tensor& tensor);

// Pinned host memory that this device handed out.
bool is_pinned(const void* pointer);

const at::Generator& default_generator();

// A seed for the next operation that draws random numbers.
uint64_t next_seed(const std::optional<at::Generator>& generator);

}  // namespace simulated
