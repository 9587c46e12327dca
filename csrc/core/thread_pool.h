// A fixed set of threads that take work items from one counter, in phases.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>

#include "process_guard.h"

namespace kt {

// The system gives fewer threads than asked for; those that had started are gone again.
struct ThreadsUnavailable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class ThreadPool {
 public:
  using Body = std::function<void(int64_t item, int thread)>;

  // Throws ThreadsUnavailable, and std::invalid_argument for less than one.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return threads_; }

  // Calls body(item, thread) once for each item in [0, items), in ascending order of start, and
  // returns when all are done; the caller works as thread 0. The first exception is rethrown.
  // Calls must not overlap, nor come from a forked child (Engine refuses those before any lock).
  void run(int64_t items, const Body& body);

 private:
  // Threads and what they wait on. In a forked child it is left alone for ever: its threads do not
  // exist there, and destroying a condition variable waits for those that waited on it.
  struct Shared;

  const int threads_;
  const ProcessGuard process_;
  std::unique_ptr<Shared> shared_;
};

}  // namespace kt
