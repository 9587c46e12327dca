#include "thread_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "../arch/wait.h"

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
      relax();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

}  // namespace

struct ThreadPool::Shared {
  std::vector<std::thread> workers;
  const Body* body = nullptr;
  int64_t items = 0;
  std::atomic<int64_t> next{0};
  // Phase number in the high half, kOpen, and in the low bits the workers inside the phase. A
  // worker that wakes up late finds the phase closed: the caller never waits for a thread that
  // the system has not scheduled yet, which on contended cores costs whole time slices.
  std::atomic<uint64_t> state{0};
  std::atomic<bool> stop{false};

  std::mutex mutex;
  std::condition_variable wake, done;
  std::exception_ptr error;

  void join();
  bool enter_phase(uint64_t& seen);
  void take_items(int thread);
  void work(int thread);
};

ThreadPool::ThreadPool(int threads) : threads_(threads) {
  if (threads < 1)
    throw std::invalid_argument("threads: got " + std::to_string(threads) + ", expected >= 1");
  shared_ = std::make_unique<Shared>();
  try {
    shared_->workers.reserve(static_cast<size_t>(threads - 1));
    for (int t = 1; t < threads; ++t)
      shared_->workers.emplace_back([shared = shared_.get(), t] { shared->work(t); });
  } catch (const std::exception& error) {
    const size_t started = shared_->workers.size() + 1;
    shared_->join();
    throw ThreadsUnavailable("got " + std::to_string(started) + " of " + std::to_string(threads) +
                             " threads from the system (" + error.what() + ")");
  }
}

ThreadPool::~ThreadPool() {
  if (process_.is_owner())
    shared_->join();
  else
    shared_.release();
}

void ThreadPool::Shared::join() {
  {
    std::lock_guard<std::mutex> lock(mutex);
    stop = true;
  }
  wake.notify_all();
  for (std::thread& worker : workers) worker.join();
}

void ThreadPool::Shared::take_items(int thread) {
  try {
    for (;;) {
      const int64_t item = next.fetch_add(1, std::memory_order_relaxed);
      if (item >= items) return;
      (*body)(item, thread);
    }
  } catch (...) {
    next.store(items);  // the others stop after their current item
    std::lock_guard<std::mutex> lock(mutex);
    if (!error) error = std::current_exception();
  }
}

// Enters the open phase, if it is a new one; `seen` is the last phase that was looked at.
bool ThreadPool::Shared::enter_phase(uint64_t& seen) {
  uint64_t now = state.load(std::memory_order_acquire);
  while (now >> kPhaseShift != seen) {
    if (!(now & kOpen)) {
      seen = now >> kPhaseShift;
      return false;
    }
    if (state.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) {
      seen = now >> kPhaseShift;
      return true;
    }
  }
  return false;
}

void ThreadPool::Shared::work(int thread) {
  uint64_t seen = 0;
  for (;;) {
    const auto ready = [&] {
      return state.load(std::memory_order_acquire) >> kPhaseShift != seen || stop;
    };
    if (!spin_until(ready)) {
      std::unique_lock<std::mutex> lock(mutex);
      wake.wait(lock, ready);
    }
    if (stop) return;
    if (!enter_phase(seen)) continue;
    take_items(thread);
    const uint64_t left = state.fetch_sub(1, std::memory_order_acq_rel) - 1;
    if (!(left & kOpen) && !(left & kInside)) {
      std::lock_guard<std::mutex> lock(mutex);
      done.notify_one();
    }
  }
}

void ThreadPool::run(int64_t items, const Body& body) {
  if (items <= 0) return;
  Shared& s = *shared_;
  s.body = &body;
  s.items = items;
  s.next.store(0, std::memory_order_relaxed);
  s.error = nullptr;
  if (threads_ == 1 || items == 1) {
    s.take_items(0);
  } else {
    {
      std::lock_guard<std::mutex> lock(s.mutex);
      const uint64_t phase = (s.state.load(std::memory_order_relaxed) >> kPhaseShift) + 1;
      s.state.store(phase << kPhaseShift | kOpen, std::memory_order_release);
    }
    s.wake.notify_all();
    s.take_items(0);
    s.state.fetch_and(~kOpen, std::memory_order_acq_rel);
    const auto finished = [&] { return !(s.state.load(std::memory_order_acquire) & kInside); };
    if (!spin_until(finished)) {
      std::unique_lock<std::mutex> lock(s.mutex);
      s.done.wait(lock, finished);
    }
  }
  if (s.error) std::rethrow_exception(s.error);
}

}  // namespace kt
