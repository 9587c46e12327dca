// The simulated device as a backend of torch: memory, streams, events, random numbers.

#include "backend.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>

#include <cstring>

namespace simulated {
namespace {

thread_local int g_stream = 0;

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(kSimulated, 0);
    if (bytes == 0) return {nullptr, device};
    Block* block = Device::instance().allocate(bytes, g_stream);
    auto free = [](void* context) { Device::instance().free(static_cast<Block*>(context)); };
    return {block->outer, block, free, device};
  }
  void copy_data(void*, const void*, size_t) const override {
    TORCH_CHECK(false, "the simulated device copies in its streams only");
  }
};

DeviceAllocator g_allocator;

std::mutex g_pinned_mutex;
std::map<uintptr_t, size_t> g_pinned;

struct PinnedAllocator final : c10::Allocator {
  static void free(void* pointer) {
    std::lock_guard lock(g_pinned_mutex);
    auto found = g_pinned.find(reinterpret_cast<uintptr_t>(pointer));
    // Nobody else gets these addresses: who still uses them crashes.
    madvise(pointer, found->second, MADV_DONTNEED);
    mprotect(pointer, found->second, PROT_NONE);
    g_pinned.erase(found);
  }
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, device};
    void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(pages != MAP_FAILED, "no pinned memory");
    std::memset(pages, 0xFF, bytes);
    std::lock_guard lock(g_pinned_mutex);
    g_pinned[reinterpret_cast<uintptr_t>(pages)] = bytes;
    return {pages, pages, &PinnedAllocator::free, device};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

PinnedAllocator g_pinned_allocator;

// Numbers follow from a seed and how many operations drew any: what the order of threads is does
// not matter.
struct CounterGenerator final : c10::GeneratorImpl {
  uint64_t seed_ = c10::default_rng_seed_val;
  uint64_t drawn_ = 0;

  static c10::DeviceType device_type() { return kSimulated; }  // for at::check_generator
  CounterGenerator()
      : GeneratorImpl(c10::Device(kSimulated, 0),
                      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}
  void set_current_seed(uint64_t seed) override {
    seed_ = seed;
    drawn_ = 0;
  }
  void set_offset(uint64_t offset) override { drawn_ = offset; }
  uint64_t get_offset() const override { return drawn_; }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return seed_;
  }
  void set_state(const c10::TensorImpl& state) override {
    TORCH_CHECK(state.numel() == 16, "random state: got ", state.numel(), " bytes, expected 16");
    auto* from = static_cast<const uint64_t*>(state.data());
    seed_ = from[0];
    drawn_ = from[1];
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    at::Tensor state = at::empty({16}, at::kByte);
    auto* to = static_cast<uint64_t*>(state.data_ptr());
    to[0] = seed_;
    to[1] = drawn_;
    return state.getIntrusivePtr();
  }
  GeneratorImpl* clone_impl() const override {
    auto* copy = new CounterGenerator;
    copy->seed_ = seed_;
    copy->drawn_ = drawn_;
    return copy;
  }
};

}  // namespace

const at::Generator& default_generator() {
  static const at::Generator generator = at::make_generator<CounterGenerator>();
  return generator;
}

namespace {

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &g_pinned_allocator; }
  at::Device getDeviceFromPtr(void*) const override { return {kSimulated, 0}; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return default_generator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<CounterGenerator>();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    TORCH_CHECK(storage.nbytes() == 0 || bytes == 0, "a storage is not resized with its data");
    storage.set_data_ptr(g_allocator.allocate(bytes));
    storage.set_nbytes(bytes);
  }
};

c10::Stream stream_of(int id) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(kSimulated, 0), id);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kSimulated;
  c10::DeviceType type() const override { return kSimulated; }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Device getDevice() const override { return {kSimulated, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Stream getStream(c10::Device) const override { return stream_of(g_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream_of(0); }
  c10::Stream getNewStream(c10::Device, int) const override {
    return stream_of(Device::instance().new_stream());
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    int former = g_stream;
    g_stream = static_cast<int>(stream.id());
    return stream_of(former);
  }
  bool queryStream(const c10::Stream& stream) const override {
    return Device::instance().idle(static_cast<int>(stream.id()));
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    Device::instance().drain(static_cast<int>(stream.id()), Wait::stream);
  }
  void synchronizeDevice(c10::DeviceIndex) const override {
    Device::instance().drain_all(Wait::device);
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    if (auto* block = static_cast<Block*>(data.get_context()))
      Device::instance().use(block, static_cast<int>(stream.id()));
  }

  void record(void** event, const c10::Stream& stream, c10::DeviceIndex,
              c10::EventFlag) const override {
    if (!*event) *event = new Event;
    Device::instance().record(*static_cast<Event*>(*event), static_cast<int>(stream.id()));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event) Device::instance().block(*static_cast<Event*>(event), static_cast<int>(stream.id()));
  }
  bool queryEvent(void* event) const override {
    return !event || Device::instance().query(*static_cast<Event*>(event));
  }
  void synchronizeEvent(void* event) const override {
    if (event) Device::instance().wait(*static_cast<Event*>(event), Wait::event);
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  double elapsedTime(void* begin, void* end, c10::DeviceIndex) const override {
    auto at = [](void* event) { return static_cast<Event*>(event)->last->over.get(); };
    return at(end) - at(begin);
  }
};

}  // namespace

int current_stream() { return g_stream; }

Block* block_of(const at::Tensor& tensor) {
  return static_cast<Block*>(tensor.storage().data_ptr().get_context());
}

bool is_pinned(const void* pointer) {
  std::lock_guard lock(g_pinned_mutex);
  auto after = g_pinned.upper_bound(reinterpret_cast<uintptr_t>(pointer));
  if (after == g_pinned.begin()) return false;
  auto [begin, bytes] = *--after;
  return reinterpret_cast<uintptr_t>(pointer) < begin + bytes;
}

uint64_t next_seed(const std::optional<at::Generator>& generator) {
  const at::Generator& from = generator && generator->defined() ? *generator : default_generator();
  auto* counter = at::check_generator<CounterGenerator>(from);
  std::lock_guard lock(counter->mutex_);
  return counter->seed_ + 0x9E3779B97F4A7C15ull * ++counter->drawn_;
}

}  // namespace simulated

namespace simulated {

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)
REGISTER_ALLOCATOR(kSimulated, &g_allocator)

static const bool g_hooks = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

}  // namespace simulated
