// A fixed set of threads that take work items from one counter, in phases.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

namespace kt {

struct ForkedProcess : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class ThreadPool {
 public:
  using Body = std::function<void(int64_t item, int thread)>;

  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return threads_; }

  // Calls body(item, thread) once for each item in [0, items), in ascending order of start, and
  // returns when all are done; the caller works as thread 0. The first exception is rethrown.
  // Throws ForkedProcess in a child of the process that made the pool: its threads are not there.
  // Calls must not overlap.
  void run(int64_t items, const Body& body);

 private:
  void worker(int thread);
  bool enter_phase(uint64_t& seen);
  void take_items(int thread);
  void require_same_process() const;

  const int threads_;
  const pid_t owner_;
  std::vector<std::thread> workers_;

  const Body* body_ = nullptr;
  int64_t items_ = 0;
  std::atomic<int64_t> next_{0};
  // Phase number in the high half, kOpen, and in the low bits the workers inside the phase. A
  // worker that wakes up late finds the phase closed: the caller never waits for a thread that
  // the system has not scheduled yet, which on contended cores costs whole time slices.
  std::atomic<uint64_t> state_{0};
  std::atomic<bool> stop_{false};

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::exception_ptr error_;
};

}  // namespace kt
