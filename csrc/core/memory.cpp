#include "memory.h"

#include <sys/mman.h>

#include <new>
#include <utility>

namespace kt {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t rounded_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Eight classes to the doubling waste at most an eighth and make sizes of neighbouring batches
// fall together.
size_t size_class(size_t bytes) {
  const size_t smallest = size_t{1} << 16;
  if (bytes <= smallest) return smallest;
  size_t step = smallest;
  while (step * 16 <= bytes) step *= 2;
  return rounded_up(bytes, step);
}

}  // namespace

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
  if (data_) munmap(data_, size_);
}

LargeBuffer::LargeBuffer(LargeBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

LargeBuffer& LargeBuffer::operator=(LargeBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

std::shared_ptr<LargeBuffer> BufferCache::acquire(size_t bytes) {
  const size_t wanted = size_class(bytes);
  LargeBuffer found;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = free_.find(wanted);
    if (it != free_.end()) {
      found = std::move(it->second);
      free_.erase(it);
    }
  }
  if (!found.data()) found = LargeBuffer(wanted);
  std::shared_ptr<BufferCache> self = shared_from_this();
  return std::shared_ptr<LargeBuffer>(new LargeBuffer(std::move(found)),
                                      [self, wanted](LargeBuffer* buffer) {
                                        {
                                          std::lock_guard<std::mutex> lock(self->mutex_);
                                          self->free_.emplace(wanted, std::move(*buffer));
                                        }
                                        delete buffer;
                                      });
}

size_t BufferCache::trim() {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t bytes = 0;
  for (const auto& entry : free_) bytes += entry.second.size();
  free_.clear();
  return bytes;
}

size_t BufferCache::cached_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t bytes = 0;
  for (const auto& entry : free_) bytes += entry.second.size();
  return bytes;
}

}  // namespace kt
