// Large buffers: page-aligned, huge pages where the kernel grants them, not copied by fork.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "process_guard.h"

namespace kt {

class LargeBuffer {
 public:
  LargeBuffer() = default;
  // Zero-filled on first touch. Throws std::bad_alloc.
  explicit LargeBuffer(size_t bytes);
  ~LargeBuffer();
  LargeBuffer(LargeBuffer&& other) noexcept;
  LargeBuffer& operator=(LargeBuffer&& other) noexcept;
  LargeBuffer(const LargeBuffer&) = delete;
  LargeBuffer& operator=(const LargeBuffer&) = delete;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  pid_t owner_ = getpid();
};

// What a request is rounded up to.
size_t size_class(size_t bytes);

// Keeps released buffers for later requests. A training step asks for the same sizes again and
// again; giving the pages back to the system and faulting them in anew costs more than the
// arithmetic on them. What is kept and unused never exceeds the most that was in use at one time.
class BufferCache : public std::enable_shared_from_this<BufferCache> {
 public:
  // A buffer of at least `bytes`, returned to the cache when the pointer dies. Contents undefined.
  std::shared_ptr<LargeBuffer> acquire(size_t bytes);
  // Frees every buffer that is not in use; returns the bytes freed.
  size_t trim();
  size_t cached_bytes() const;

 private:
  void release(LargeBuffer buffer);

  mutable std::mutex mutex_;
  std::multimap<size_t, LargeBuffer> free_;
  size_t free_bytes_ = 0, used_bytes_ = 0, most_used_bytes_ = 0;
};

}  // namespace kt
