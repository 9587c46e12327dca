// A device in this process: memory without access, streams served by threads, events, and a record
// of what the host waited for. It knows nothing of torch.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace simulated {

// What a job on a stream is, for delays and the trace.
enum class Kind { compute, down, up, order };
inline constexpr int kKinds = 4;

// Why the host waited.
enum class Wait { device, stream, event, pageable, copy, item, fallback };
inline constexpr int kWaits = 7;

// By stream: how many of its jobs are known to be over. Who holds it comes after those.
using Clock = std::map<int, uint64_t>;

struct Access {
  int stream = -1;
  uint64_t job = 0;
  const char* name = "";
};

// An allocation. Only jobs may touch it, at `inner`; `outer`, which tensors show, has no access.
struct Block {
  char* outer;
  char* inner;
  size_t bytes;
  int stream;              // the one that may reuse it after its own jobs
  std::vector<int> users;  // others, as record_stream said
  Access last_write;
  std::vector<Access> reads;
};

// One recording of an event.
struct Recorded {
  Clock clock;
  std::promise<double> promise;
  std::shared_future<double> over{promise.get_future()};  // milliseconds since the start
};

struct Event {
  std::shared_ptr<Recorded> last;
};

class Device {
 public:
  static Device& instance();

  Block* allocate(size_t bytes, int stream);
  void free(Block* block);
  void use(Block* block, int stream);
  // Where jobs find what tensors show at `outer`.
  char* inner(void* outer) const { return static_cast<char*>(outer) - outer_ + inner_; }

  int new_stream();
  void submit(int stream, Kind kind, const char* name, const std::vector<Block*>& reads,
              const std::vector<Block*>& writes, std::function<void()> run);

  void record(Event& event, int stream);
  void block(const Event& event, int stream);
  bool query(const Event& event);
  void wait(const Event& event, Wait why);
  // Nothing happens, and nothing is counted, where the stream has no work.
  void drain(int stream, Wait why);
  void drain_all(Wait why);
  bool idle(int stream);

  void count_copy(Kind direction, size_t bytes);
  void violation(std::string text);
  void delay(Kind kind, int microseconds) { delays_[static_cast<int>(kind)] = microseconds; }
  void clear();
  std::string report();
  size_t allocated() const { return allocated_; }
  size_t peak() const { return peak_; }

 private:
  struct Job {
    Kind kind;
    const char* name;
    std::function<void()> run;
  };
  struct Stream {
    std::deque<Job> jobs;
    std::condition_variable_any wake;
    uint64_t submitted = 0;
    uint64_t over = 0;
    Clock clock;
  };
  struct Ran {
    int stream;
    Kind kind;
    const char* name;
    double begin, end;
  };

  Device();
  void serve(int id, Stream& stream);
  void check(int stream, const char* name, const std::vector<Block*>& reads,
             const std::vector<Block*>& writes);
  void push(int id, Kind kind, const char* name, std::function<void()> run);
  double now() const;

  mutable std::recursive_mutex mutex_;
  std::condition_variable_any over_;
  std::deque<Stream> streams_;
  Clock host_;
  char* outer_;
  char* inner_;
  size_t used_ = 0;
  std::atomic<size_t> allocated_{0};
  std::atomic<size_t> peak_{0};
  std::map<std::pair<int, size_t>, std::vector<Block*>> unused_;
  std::atomic<int> delays_[kKinds] = {};
  uint64_t waits_[kWaits] = {};
  uint64_t copies_[2] = {}, bytes_[2] = {};
  std::vector<std::string> violations_;
  std::vector<Ran> trace_;
};

}  // namespace simulated
