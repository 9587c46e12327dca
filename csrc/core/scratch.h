// Temporary arrays of one call, taken from the buffer cache and given back when the call ends.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "memory.h"

namespace kt {

class Scratch {
 public:
  Scratch(std::shared_ptr<BufferCache> cache, int threads)
      : cache_(std::move(cache)),
        per_thread_(static_cast<size_t>(threads)),
        thread_sizes_(static_cast<size_t>(threads)) {}
  // Hands out null and counts what a call would take.
  static Scratch counting(int threads) { return Scratch(nullptr, threads); }

  uint8_t* bytes(int64_t count) {
    counted_ += size_class(static_cast<size_t>(count));
    if (!cache_) return nullptr;
    held_.push_back(cache_->acquire(static_cast<size_t>(count)));
    return held_.back()->data();
  }
  float* floats(int64_t count) {
    return reinterpret_cast<float*>(bytes(count * static_cast<int64_t>(sizeof(float))));
  }

  // The buffer of one pool thread; a larger request replaces it, so use one at a time.
  uint8_t* thread_bytes(int thread, int64_t count) {
    const size_t which = static_cast<size_t>(thread), wanted = static_cast<size_t>(count);
    thread_sizes_[which] = std::max(thread_sizes_[which], size_class(wanted));
    if (!cache_) return nullptr;
    std::shared_ptr<LargeBuffer>& own = per_thread_[which];
    if (!own || own->size() < wanted) own = cache_->acquire(wanted);
    return own->data();
  }
  float* thread_floats(int thread, int64_t count) {
    return reinterpret_cast<float*>(
        thread_bytes(thread, count * static_cast<int64_t>(sizeof(float))));
  }

  // Bytes of everything that was asked for.
  int64_t counted() const {
    size_t sum = counted_;
    for (const size_t own : thread_sizes_) sum += own;
    return static_cast<int64_t>(sum);
  }

 private:
  std::shared_ptr<BufferCache> cache_;
  std::vector<std::shared_ptr<LargeBuffer>> held_;
  std::vector<std::shared_ptr<LargeBuffer>> per_thread_;
  std::vector<size_t> thread_sizes_;
  size_t counted_ = 0;
};

}  // namespace kt
