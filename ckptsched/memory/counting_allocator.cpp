// Counts the bytes that PyTorch's CPU allocator hands out while a window is open.
//
// The allocator wraps the one that was installed before it and is installed once, for the life of
// the process. It hands on the wrapped allocator's blocks as they are, with their context equal to
// their data pointer, because oneDNN allocates through raw_allocate(), which relies on that. Only
// the deleter is exchanged; the size of a block is kept beside it, in a table.

#include <c10/core/Allocator.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_map>

namespace {

struct Counter {
  std::mutex lock;
  std::unordered_map<void*, int64_t> born;  // bytes by address, of blocks born in the open window
  std::atomic<bool> open{false};
  std::atomic<int64_t> unfollowed{0};  // blocks whose deleter could not be exchanged
  std::atomic<const void*> owner{nullptr};  // the only thread of Python's that counts, or all
  int64_t live_bytes = 0;
  int64_t peak_bytes = 0;
};

// Never destroyed: tensors may be freed after the destructors of static objects have run.
Counter& counter() {
  static Counter* const only = new Counter;
  return *only;
}

// Its address tells a thread.
thread_local const char this_thread = 0;

// PyGILState_GetThisThreadState: null in a thread that has never run Python, such as a worker of
// OpenMP's. It needs no lock.
void* (*python_state)() = nullptr;

bool counts_here(const void* owner) {
  return owner == nullptr || owner == &this_thread || python_state() == nullptr;
}

c10::Allocator* wrapped = nullptr;
c10::DeleterFnPtr wrapped_deleter = nullptr;

void forget_and_free(void* block) {
  Counter& count = counter();
  // A block born in the window that is open was born after `open` was set, so a stale `false`
  // is read only for blocks that do not count.
  if (count.open.load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> guard(count.lock);
    const auto found = count.born.find(block);
    if (found != count.born.end()) {
      count.live_bytes -= found->second;
      count.born.erase(found);
    }
  }
  // Last: once freed, another thread may be given the same address and count it.
  wrapped_deleter(block);
}

class CountingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    c10::DataPtr block = wrapped->allocate(size);
    void* const address = block.get();
    if (address == nullptr) {
      return block;
    }
    Counter& count = counter();
    // Outside of windows too: every block must carry the deleter that raw_deleter() names.
    if (block.get_context() != address ||
        !block.compare_exchange_deleter(wrapped_deleter, &forget_and_free)) {
      count.unfollowed.fetch_add(1);
      return block;
    }
    if (count.open.load(std::memory_order_acquire)) {
      const std::lock_guard<std::mutex> guard(count.lock);
      if (count.open.load(std::memory_order_relaxed) && counts_here(count.owner)) {
        count.born[address] = static_cast<int64_t>(size);
        count.live_bytes += static_cast<int64_t>(size);
        count.peak_bytes = std::max(count.peak_bytes, count.live_bytes);
      }
    }
    return block;
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &forget_and_free;
  }

  void copy_data(void* to, const void* from, std::size_t size) const override {
    wrapped->copy_data(to, from, size);
  }
};

CountingAllocator& counting_allocator() {
  static CountingAllocator* const only = new CountingAllocator;
  return *only;
}

// A process is forked while nobody has the lock: in the child nobody would ever let go of it.
void before_fork() {
  counter().lock.lock();
}

void after_fork() {
  counter().lock.unlock();
}

}  // namespace

#define CKPTSCHED_EXPORT extern "C" __attribute__((visibility("default")))

// 0, or 1 where the allocator in use cannot be wrapped. Wraps once, however often it is called.
CKPTSCHED_EXPORT int ckptsched_install(void* (*thread_state)()) {
  python_state = thread_state;
  if (wrapped_deleter != nullptr) {
    return 0;
  }
  wrapped = c10::GetAllocator(c10::DeviceType::CPU);
  wrapped_deleter = wrapped->raw_deleter();
  if (wrapped_deleter == nullptr || pthread_atfork(&before_fork, &after_fork, &after_fork) != 0) {
    return 1;
  }
  c10::SetAllocator(c10::DeviceType::CPU, &counting_allocator(), /*priority=*/255);
  return c10::GetAllocator(c10::DeviceType::CPU) == &counting_allocator() ? 0 : 1;
}

// 0, or 1 where another allocator has been installed since, so that nothing would be counted.
// If `alone`, blocks made in other threads that run Python do not count.
CKPTSCHED_EXPORT int ckptsched_open(int alone) {
  if (c10::GetAllocator(c10::DeviceType::CPU) != &counting_allocator()) {
    return 1;
  }
  Counter& count = counter();
  const std::lock_guard<std::mutex> guard(count.lock);
  count.live_bytes = 0;
  count.peak_bytes = 0;
  count.unfollowed.store(0);
  count.owner.store(alone != 0 ? &this_thread : nullptr);
  count.open.store(true, std::memory_order_release);
  return 0;
}

// The live bytes and the largest since the last mark (or the opening), which starts anew.
CKPTSCHED_EXPORT void ckptsched_mark(int64_t* live_bytes, int64_t* peak_bytes) {
  Counter& count = counter();
  const std::lock_guard<std::mutex> guard(count.lock);
  *live_bytes = count.live_bytes;
  *peak_bytes = count.peak_bytes;
  count.peak_bytes = count.live_bytes;
}

// Forgets the blocks still alive (they stay freeable); how many blocks could not be followed.
CKPTSCHED_EXPORT int64_t ckptsched_close() {
  Counter& count = counter();
  const std::lock_guard<std::mutex> guard(count.lock);
  count.open.store(false, std::memory_order_release);
  count.born.clear();
  return count.unfollowed.load();
}
