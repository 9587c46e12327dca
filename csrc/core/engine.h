// What computes a model's routed experts on the CPU: threads, kernels and temporary memory, shared
// by all layers. Calls from several threads wait for each other; a forked child is refused.
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "dispatch.h"
#include "experts_block.h"

namespace kt {

class Engine {
 public:
  // Throws ThreadsUnavailable, and std::invalid_argument for an instruction set that is not here.
  Engine(int threads, const std::string& isa, const CpuFeatures& features)
      : kernels_(select_kernels(isa, features)),
        pool_(threads),
        cache_(std::make_shared<BufferCache>()),
        block_(kernels_, pool_, cache_) {}

  const KernelTable& kernels() const { return kernels_; }
  int threads() const { return pool_.size(); }
  std::shared_ptr<LargeBuffer> buffer(size_t bytes) { return cache_->acquire(bytes); }
  size_t trim() { return cache_->trim(); }
  size_t cached_bytes() const { return cache_->cached_bytes(); }

  // work(pool), alone. Throws ForkedProcess.
  template <class Work>
  auto exclusively(const Work& work) {
    // Before the lock, which another thread may have held when this process was forked.
    process_.require_owner();
    std::lock_guard<std::mutex> lock(mutex_);
    return work(pool_);
  }

  // See ExpertsBlock. Both throw std::invalid_argument where the call does not fit its weights.
  BlockReport forward(const BlockInput& input, void* out, const KeptActivations& kept) {
    input.check();
    return exclusively([&](ThreadPool&) { return block_.forward(input, out, kept); });
  }
  BlockReport backward(const BlockInput& input, const void* d_out, const KeptActivations& kept,
                       void* d_hidden, float* d_weight,
                       const std::array<LoraGradient, kProjectionCount>& d_lora) {
    input.check();
    return exclusively([&](ThreadPool&) {
      return block_.backward(input, d_out, kept, d_hidden, d_weight, d_lora);
    });
  }

 private:
  const KernelTable& kernels_;
  ThreadPool pool_;
  std::shared_ptr<BufferCache> cache_;
  ExpertsBlock block_;
  const ProcessGuard process_;
  std::mutex mutex_;
};

}  // namespace kt
