#include "runtime.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <thread>

namespace simulated {
namespace {

constexpr size_t kMemory = size_t{64} << 30;  // of addresses; what is touched is taken
constexpr size_t kAlignment = 512;
constexpr int kPoison = 0xFF;  // NaN in every floating type, -1 in integers
constexpr const char* kKindNames[] = {"compute", "down", "up", "order"};
constexpr const char* kWaitNames[] = {"device", "stream", "event",   "pageable",
                                      "copy",   "item",   "fallback"};

void merge(Clock& into, const Clock& from) {
  for (auto [stream, job] : from) into[stream] = std::max(into[stream], job);
}

bool knows(const Clock& clock, const Access& access) {
  auto found = clock.find(access.stream);
  return access.stream < 0 || (found != clock.end() && found->second >= access.job);
}

}  // namespace

Device& Device::instance() {
  static auto* device = new Device;  // its threads outlive everything
  return *device;
}

Device::Device() {
  int file = memfd_create("simulated device", 0);
  if (file < 0 || ftruncate(file, kMemory) != 0) throw std::runtime_error("no memory file");
  auto map = [&](int access) {
    void* found = mmap(nullptr, kMemory, access, MAP_SHARED | MAP_NORESERVE, file, 0);
    if (found == MAP_FAILED) throw std::runtime_error("cannot map the device's memory");
    return static_cast<char*>(found);
  };
  outer_ = map(PROT_NONE);
  inner_ = map(PROT_READ | PROT_WRITE);
  close(file);
  new_stream();
}

Block* Device::allocate(size_t bytes, int stream) {
  std::lock_guard lock(mutex_);
  size_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  allocated_ += size;
  peak_ = std::max(peak_.load(), allocated_.load());
  auto& unused = unused_[{stream, size}];
  if (!unused.empty()) {
    Block* block = unused.back();
    unused.pop_back();
    return block;
  }
  if (used_ + size > kMemory) throw std::runtime_error("the simulated device is out of memory");
  auto* block = new Block{outer_ + used_, inner_ + used_, size, stream, {}, {}, {}};
  used_ += size;
  std::memset(block->inner, kPoison, size);
  return block;
}

void Device::free(Block* block) {
  std::lock_guard lock(mutex_);
  allocated_ -= block->bytes;
  for (int user : block->users) {
    Event event;
    record(event, user);
    this->block(event, block->stream);
  }
  block->users.clear();
  // Its memory is for the next allocation of its stream: who still reads it sees that.
  submit(block->stream, Kind::order, "free", {}, {block},
         [block] { std::memset(block->inner, kPoison, block->bytes); });
  unused_[{block->stream, block->bytes}].push_back(block);
}

void Device::use(Block* block, int stream) {
  std::lock_guard lock(mutex_);
  if (stream != block->stream) block->users.push_back(stream);
}

int Device::new_stream() {
  std::lock_guard lock(mutex_);
  int id = static_cast<int>(streams_.size());
  Stream& stream = streams_.emplace_back();
  std::thread([this, id, &stream] { serve(id, stream); }).detach();
  return id;
}

double Device::now() const {
  static const auto begin = std::chrono::steady_clock::now();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin)
      .count();
}

void Device::serve(int id, Stream& stream) {
  std::unique_lock lock(mutex_);
  while (true) {
    stream.wake.wait(lock, [&] { return !stream.jobs.empty(); });
    Job job = std::move(stream.jobs.front());
    stream.jobs.pop_front();
    lock.unlock();
    int delay = delays_[static_cast<int>(job.kind)];
    if (delay) std::this_thread::sleep_for(std::chrono::microseconds(delay));
    double begin = now();
    try {
      job.run();
    } catch (const std::exception& error) {
      violation(std::string(job.name) + ": " + error.what());
    }
    job.run = nullptr;
    lock.lock();
    if (job.kind != Kind::order) trace_.push_back({id, job.kind, job.name, begin, now()});
    ++stream.over;
    over_.notify_all();
  }
}

void Device::check(int stream, const char* name, const std::vector<Block*>& reads,
                   const std::vector<Block*>& writes) {
  const Clock& clock = streams_[stream].clock;
  Access access{stream, streams_[stream].submitted + 1, name};
  auto complain = [&](const char* verb, const char* past, const Access& other) {
    std::ostringstream text;
    text << name << " on stream " << stream << " " << verb << " what " << other.name
         << " on stream " << other.stream << " " << past << ", and no event is between them";
    violations_.push_back(text.str());
  };
  for (Block* block : reads) {
    if (!knows(clock, block->last_write)) complain("reads", "writes", block->last_write);
    std::erase_if(block->reads, [&](const Access& a) { return a.stream == stream; });
    block->reads.push_back(access);
  }
  for (Block* block : writes) {
    if (block->last_write.job == access.job && block->last_write.stream == stream)
      continue;  // twice among the operands
    if (!knows(clock, block->last_write)) complain("writes", "writes", block->last_write);
    for (const Access& read : block->reads)
      if ((read.job != access.job || read.stream != stream) && !knows(clock, read))
        complain("writes", "reads", read);
    block->reads.clear();
    block->last_write = access;
  }
}

void Device::push(int id, Kind kind, const char* name, std::function<void()> run) {
  Stream& stream = streams_[id];
  ++stream.submitted;
  stream.clock[id] = stream.submitted;
  stream.jobs.push_back({kind, name, std::move(run)});
  stream.wake.notify_one();
}

void Device::submit(int stream, Kind kind, const char* name, const std::vector<Block*>& reads,
                    const std::vector<Block*>& writes, std::function<void()> run) {
  std::lock_guard lock(mutex_);
  merge(streams_[stream].clock, host_);
  check(stream, name, reads, writes);
  push(stream, kind, name, std::move(run));
}

void Device::record(Event& event, int stream) {
  std::lock_guard lock(mutex_);
  auto recorded = std::make_shared<Recorded>();
  merge(streams_[stream].clock, host_);
  recorded->clock = streams_[stream].clock;
  event.last = recorded;
  push(stream, Kind::order, "record", [this, recorded] { recorded->promise.set_value(now()); });
}

void Device::block(const Event& event, int stream) {
  if (!event.last) return;
  std::lock_guard lock(mutex_);
  merge(streams_[stream].clock, event.last->clock);
  push(stream, Kind::order, "wait", [over = event.last->over] { over.wait(); });
}

bool Device::query(const Event& event) {
  if (!event.last) return true;
  if (event.last->over.wait_for(std::chrono::seconds(0)) != std::future_status::ready) return false;
  std::lock_guard lock(mutex_);
  merge(host_, event.last->clock);
  return true;
}

void Device::wait(const Event& event, Wait why) {
  if (!event.last) return;
  {
    std::lock_guard lock(mutex_);
    ++waits_[static_cast<int>(why)];
  }
  event.last->over.wait();
  query(event);
}

void Device::drain(int stream, Wait why) {
  std::unique_lock lock(mutex_);
  Stream& s = streams_[stream];
  ++waits_[static_cast<int>(why)];
  uint64_t until = s.submitted;
  over_.wait(lock, [&] { return s.over >= until; });
  merge(host_, s.clock);
}

void Device::drain_all(Wait why) {
  std::unique_lock lock(mutex_);
  ++waits_[static_cast<int>(why)];
  for (Stream& s : streams_) {
    uint64_t until = s.submitted;
    over_.wait(lock, [&] { return s.over >= until; });
    merge(host_, s.clock);
  }
}

bool Device::idle(int stream) {
  std::lock_guard lock(mutex_);
  return streams_[stream].over == streams_[stream].submitted;
}

void Device::count_copy(Kind direction, size_t bytes) {
  std::lock_guard lock(mutex_);
  int i = direction == Kind::up;
  ++copies_[i];
  bytes_[i] += bytes;
}

void Device::violation(std::string text) {
  std::lock_guard lock(mutex_);
  violations_.push_back(std::move(text));
}

void Device::clear() {
  std::lock_guard lock(mutex_);
  std::fill_n(waits_, kWaits, 0);
  copies_[0] = copies_[1] = bytes_[0] = bytes_[1] = 0;
  violations_.clear();
  trace_.clear();
  peak_ = allocated_.load();
}

std::string Device::report() {
  std::lock_guard lock(mutex_);
  auto quoted = [](const std::string& text) {
    std::string out = "\"";
    for (char c : text) {
      if (c == '"' || c == '\\') out += '\\';
      out += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
    }
    return out + "\"";
  };
  std::ostringstream json;
  json << "{\"waits\": {";
  for (int i = 0; i < kWaits; ++i)
    json << (i ? ", " : "") << quoted(kWaitNames[i]) << ": " << waits_[i];
  json << "}, \"copies_down\": " << copies_[0] << ", \"copies_up\": " << copies_[1]
       << ", \"bytes_down\": " << bytes_[0] << ", \"bytes_up\": " << bytes_[1]
       << ", \"violations\": [";
  for (size_t i = 0; i < violations_.size(); ++i) json << (i ? ", " : "") << quoted(violations_[i]);
  json << "], \"trace\": [";
  for (size_t i = 0; i < trace_.size(); ++i) {
    const Ran& ran = trace_[i];
    json << (i ? ", " : "") << "[" << ran.stream << ", "
         << quoted(kKindNames[static_cast<int>(ran.kind)]) << ", " << quoted(ran.name) << ", "
         << ran.begin << ", " << ran.end << "]";
  }
  json << "]}";
  return json.str();
}

}  // namespace simulated
