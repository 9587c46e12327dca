// Temporary arrays of one call, taken from the buffer cache and given back when the call ends.
#pragma once

#include <memory>
#include <vector>

#include "memory.h"

namespace kt {

class Scratch {
 public:
  Scratch(std::shared_ptr<BufferCache> cache, int threads)
      : cache_(std::move(cache)), per_thread_(static_cast<size_t>(threads)) {}

  uint8_t* bytes(int64_t count) {
    held_.push_back(cache_->acquire(static_cast<size_t>(count)));
    return held_.back()->data();
  }
  float* floats(int64_t count) {
    return reinterpret_cast<float*>(bytes(count * static_cast<int64_t>(sizeof(float))));
  }

  // The buffer of one pool thread; a larger request replaces it, so use one at a time.
  uint8_t* thread_bytes(int thread, int64_t count) {
    std::shared_ptr<LargeBuffer>& own = per_thread_[static_cast<size_t>(thread)];
    if (!own || own->size() < static_cast<size_t>(count))
      own = cache_->acquire(static_cast<size_t>(count));
    return own->data();
  }
  float* thread_floats(int thread, int64_t count) {
    return reinterpret_cast<float*>(
        thread_bytes(thread, count * static_cast<int64_t>(sizeof(float))));
  }

 private:
  std::shared_ptr<BufferCache> cache_;
  std::vector<std::shared_ptr<LargeBuffer>> held_;
  std::vector<std::shared_ptr<LargeBuffer>> per_thread_;
};

}  // namespace kt
