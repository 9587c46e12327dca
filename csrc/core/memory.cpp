#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <utility>

namespace kt {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t rounded_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

// Eight classes to the doubling waste at most an eighth and make sizes of neighbouring batches
// fall together.
size_t size_class(size_t bytes) {
  const size_t smallest = size_t{1} << 16;
  if (bytes <= smallest) return smallest;
  size_t step = smallest;
  while (step * 16 <= bytes) step *= 2;
  return rounded_up(bytes, step);
}

LargeBuffer::LargeBuffer(size_t bytes) : size_(rounded_up(bytes ? bytes : 1, 4096)) {
  const size_t slack = size_ >= kHugePage ? kHugePage : 0;
  void* raw =
      mmap(nullptr, size_ + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  uint8_t* begin = static_cast<uint8_t*>(raw);
  if (slack) {
    // Align to a huge page and give the surplus at both ends back.
    uint8_t* aligned =
        reinterpret_cast<uint8_t*>(rounded_up(reinterpret_cast<size_t>(begin), kHugePage));
    if (aligned > begin) munmap(begin, static_cast<size_t>(aligned - begin));
    uint8_t* end = begin + size_ + slack;
    if (end > aligned + size_) munmap(aligned + size_, static_cast<size_t>(end - aligned) - size_);
    begin = aligned;
    madvise(begin, size_, MADV_HUGEPAGE);
  }
  madvise(begin, size_, MADV_DONTFORK);
  data_ = begin;
}

LargeBuffer::~LargeBuffer() {
  // A forked child never had these pages (MADV_DONTFORK): what lies there now is not ours.
  if (data_ && owner_ == getpid()) munmap(data_, size_);
}

LargeBuffer::LargeBuffer(LargeBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      owner_(other.owner_) {}

LargeBuffer& LargeBuffer::operator=(LargeBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(owner_, other.owner_);
  return *this;
}

std::shared_ptr<LargeBuffer> BufferCache::acquire(size_t bytes) {
  const size_t wanted = size_class(bytes);
  LargeBuffer found;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    // The smallest that fits, unless it would waste more than it holds.
    const auto it = free_.lower_bound(wanted);
    if (it != free_.end() && it->first <= 2 * wanted) {
      found = std::move(it->second);
      free_.erase(it);
      free_bytes_ -= found.size();
    }
  }
  if (!found.data()) found = LargeBuffer(wanted);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    used_bytes_ += found.size();
    most_used_bytes_ = std::max(most_used_bytes_, used_bytes_);
  }
  std::shared_ptr<BufferCache> self = shared_from_this();
  return std::shared_ptr<LargeBuffer>(new LargeBuffer(std::move(found)),
                                      [self](LargeBuffer* buffer) {
                                        self->release(std::move(*buffer));
                                        delete buffer;
                                      });
}

void BufferCache::release(LargeBuffer buffer) {
  std::vector<LargeBuffer> surplus;  // unmapped after the lock is gone
  std::lock_guard<std::mutex> lock(mutex_);
  used_bytes_ -= buffer.size();
  free_bytes_ += buffer.size();
  free_.emplace(buffer.size(), std::move(buffer));
  // Small ones go first: they cost least to get again.
  while (free_bytes_ + used_bytes_ > most_used_bytes_ + most_used_bytes_ / 4 && !free_.empty()) {
    free_bytes_ -= free_.begin()->first;
    surplus.push_back(std::move(free_.begin()->second));
    free_.erase(free_.begin());
  }
}

size_t BufferCache::trim() {
  std::multimap<size_t, LargeBuffer> freed;
  std::lock_guard<std::mutex> lock(mutex_);
  freed.swap(free_);
  most_used_bytes_ = used_bytes_;
  return std::exchange(free_bytes_, 0);
}

size_t BufferCache::cached_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return free_bytes_;
}

}  // namespace kt
