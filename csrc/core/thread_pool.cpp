#include "thread_pool.h"

#include <immintrin.h>
#include <unistd.h>

#include <chrono>

namespace kt {
namespace {

// Phases of one call follow each other within microseconds, so a short spin saves the wake-up;
// between calls the threads sleep and cost nothing.
constexpr auto kSpin = std::chrono::microseconds(50);

constexpr uint64_t kOpen = uint64_t{1} << 31;
constexpr uint64_t kInside = kOpen - 1;
constexpr int kPhaseShift = 32;

template <class Ready>
bool spin_until(const Ready& ready) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      _mm_pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

}  // namespace

ThreadPool::ThreadPool(int threads) : threads_(threads), owner_(getpid()) {
  if (threads < 1)
    throw std::invalid_argument("threads: got " + std::to_string(threads) + ", expected >= 1");
  for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { worker(t); });
}

ThreadPool::~ThreadPool() {
  if (getpid() != owner_) {
    // After a fork the handles name threads that do not exist here and cannot be joined.
    for (std::thread& worker : workers_) worker.detach();
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::require_same_process() const {
  if (getpid() == owner_) return;
  throw ForkedProcess("the expert thread pool was made by process " + std::to_string(owner_) +
                      " and cannot run in its forked child " + std::to_string(getpid()) +
                      "; run the model in the parent, or start the child with the 'spawn' method");
}

void ThreadPool::take_items(int thread) {
  try {
    for (;;) {
      const int64_t item = next_.fetch_add(1, std::memory_order_relaxed);
      if (item >= items_) return;
      (*body_)(item, thread);
    }
  } catch (...) {
    next_.store(items_);  // the others stop after their current item
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
  }
}

// Enters the open phase, if it is a new one; `seen` is the last phase that was looked at.
bool ThreadPool::enter_phase(uint64_t& seen) {
  uint64_t state = state_.load(std::memory_order_acquire);
  while (state >> kPhaseShift != seen) {
    if (!(state & kOpen)) {
      seen = state >> kPhaseShift;
      return false;
    }
    if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
      seen = state >> kPhaseShift;
      return true;
    }
  }
  return false;
}

void ThreadPool::worker(int thread) {
  uint64_t seen = 0;
  for (;;) {
    const auto ready = [&] {
      return state_.load(std::memory_order_acquire) >> kPhaseShift != seen || stop_;
    };
    if (!spin_until(ready)) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, ready);
    }
    if (stop_) return;
    if (!enter_phase(seen)) continue;
    take_items(thread);
    const uint64_t left = state_.fetch_sub(1, std::memory_order_acq_rel) - 1;
    if (!(left & kOpen) && !(left & kInside)) {
      std::lock_guard<std::mutex> lock(mutex_);
      done_.notify_one();
    }
  }
}

void ThreadPool::run(int64_t items, const Body& body) {
  require_same_process();
  if (items <= 0) return;
  body_ = &body;
  items_ = items;
  next_.store(0, std::memory_order_relaxed);
  error_ = nullptr;
  if (threads_ == 1 || items == 1) {
    take_items(0);
  } else {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const uint64_t phase = (state_.load(std::memory_order_relaxed) >> kPhaseShift) + 1;
      state_.store(phase << kPhaseShift | kOpen, std::memory_order_release);
    }
    wake_.notify_all();
    take_items(0);
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    const auto finished = [&] { return !(state_.load(std::memory_order_acquire) & kInside); };
    if (!spin_until(finished)) {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, finished);
    }
  }
  if (error_) std::rethrow_exception(error_);
}

}  // namespace kt
