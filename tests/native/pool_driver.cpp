// Uses the thread pool hard, for a build with the thread sanitizer: many phases that hand data from
// one to the next, exceptions, pools beside each other, and pools that come and go.
#include <cstdio>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../../csrc/core/thread_pool.h"

namespace {

// Each phase reads what other threads wrote in the one before, without locks of its own.
bool phases_see_each_other(kt::ThreadPool& pool, int rounds) {
  constexpr int64_t kItems = 97;
  std::vector<int64_t> a(kItems), b(kItems);
  std::iota(a.begin(), a.end(), 0);
  for (int r = 0; r < rounds; ++r) {
    pool.run(kItems, [&](int64_t i, int) { b[i] = a[(i + 31) % kItems] + 1; });
    pool.run(kItems, [&](int64_t i, int) { a[i] = b[(i + kItems - 31) % kItems]; });
  }
  for (int64_t i = 0; i < kItems; ++i)
    if (a[i] != i + rounds) return false;
  return true;
}

bool exceptions_arrive(kt::ThreadPool& pool) {
  for (int64_t bad = 0; bad < 40; ++bad) {
    bool caught = false;
    try {
      pool.run(40, [&](int64_t i, int) {
        if (i == bad) throw std::runtime_error("planted");
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    if (!caught) return false;
  }
  return true;
}

}  // namespace

int main() {
  bool good = true;
  for (int threads : {1, 2, 3, 8}) {
    kt::ThreadPool pool(threads);
    good = good && phases_see_each_other(pool, 300) && exceptions_arrive(pool) &&
           phases_see_each_other(pool, 10);
    // Workers fall asleep between the phases.
    for (int i = 0; i < 5; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      good = good && phases_see_each_other(pool, 3);
    }
  }
  for (int i = 0; i < 50; ++i) kt::ThreadPool short_lived(4);
  std::vector<std::thread> callers;
  std::vector<int> results(3, 0);
  for (int t = 0; t < 3; ++t)
    callers.emplace_back([&, t] {
      kt::ThreadPool pool(3);
      results[t] = phases_see_each_other(pool, 200);
    });
  for (std::thread& caller : callers) caller.join();
  for (int r : results) good = good && r;
  std::printf(good ? "good\n" : "wrong results\n");
  return good ? 0 : 1;
}
