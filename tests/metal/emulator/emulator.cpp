#include "emulator.h"

#include <algorithm>
#include <exception>
#include <map>
#include <random>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {
namespace {

constexpr uint32_t kSimdWidth = 32;
constexpr size_t kThreadgroupMemory = 32 * 1024;
constexpr size_t kStackBytes = 64 * 1024;
constexpr uint32_t kMaxThreads = 1024;

// ---- A fibre: a stack, and the place on it where it stopped. ----
#if defined(__x86_64__)
extern "C" void emulator_switch(void** save, void* load);
// The callee-saved registers go on the old stack and come from the new one.
asm(R"(
.text
.type emulator_switch,@function
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulator_switch,.-emulator_switch
)");

struct Fiber {
  std::vector<std::byte> stack = std::vector<std::byte>(kStackBytes);
  void* sp = nullptr;

  void prepare(void (*entry)()) {
    auto top = reinterpret_cast<uintptr_t>(stack.data() + stack.size()) & ~uintptr_t{15};
    auto* words = reinterpret_cast<uint64_t*>(top) - 8;
    std::fill(words, words + 6, 0);
    words[6] = reinterpret_cast<uint64_t>(entry);  // emulator_switch returns into it
    words[7] = 0;
    sp = words;
  }
};
void switch_fiber(Fiber& from, Fiber& to) {
  emulator_switch(&from.sp, to.sp);
}
#else
struct Fiber {
  std::vector<std::byte> stack = std::vector<std::byte>(kStackBytes);
  ucontext_t context;

  void prepare(void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack.data();
    context.uc_stack.ss_size = stack.size();
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};
void switch_fiber(Fiber& from, Fiber& to) {
  swapcontext(&from.context, &to.context);
}
#endif

enum class State { ready, at_simd, at_barrier, done };

struct Thread {
  Fiber fiber;
  State state = State::ready;
  Where where;
  uint32_t value = 0, source = 0;
};

std::string location(const Where& where) {
  const std::string file = where.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line);
}

class Group {
 public:
  Uint3 groups;  // of the dispatch
  void run(Uint3 position, uint64_t first, uint32_t threads, Order order, uint32_t seed,
           const std::function<void()>& kernel);
  void park(State state, Where where) {
    Thread& self = threads_[current_];
    self.state = state;
    self.where = where;
    switch_fiber(self.fiber, scheduler_);
  }
  Thread& self() { return threads_[current_]; }
  uint32_t current() const { return current_; }
  uint32_t epoch() const { return epoch_; }
  Uint3 position() const { return position_; }
  uint64_t in_dispatch() const { return running_ ? first_ + current_ + 1 : 0; }
  SharedBlock& shared(const char* name, size_t count, size_t size, Where where);

 private:
  static void entry();
  void run_simdgroup(uint32_t begin, uint32_t end, const std::vector<uint32_t>& order);
  bool exchange(uint32_t begin, uint32_t end);
  bool release_barrier();

  std::vector<Thread> threads_ = std::vector<Thread>(kMaxThreads);
  std::map<std::string, std::unique_ptr<SharedBlock>> shared_;
  size_t shared_bytes_ = 0;
  Fiber scheduler_;
  const std::function<void()>* kernel_ = nullptr;
  std::exception_ptr error_;
  Uint3 position_;
  uint32_t count_ = 0, current_ = 0, epoch_ = 1;
  uint64_t first_ = 0;
  bool running_ = false;
};

Group& group() {
  static thread_local Group instance;
  return instance;
}

void Group::entry() {
  Group& g = group();
  try {
    (*g.kernel_)();
  } catch (...) {
    g.error_ = std::current_exception();
  }
  g.park(State::done, Where());
}

// True when every live thread of the simdgroup waits at the same simd operation: values change
// hands and the threads go on.
bool Group::exchange(uint32_t begin, uint32_t end) {
  const Thread* first = nullptr;
  for (uint32_t t = begin; t < end; ++t) {
    const Thread& thread = threads_[t];
    if (thread.state == State::done) continue;
    if (!first) first = &thread;
    if (thread.state != first->state || !(thread.where == first->where)) {
      fail(thread.where, "thread " + std::to_string(t) +
                             " waits here while its simdgroup waits at " + location(first->where));
    }
  }
  if (!first || first->state != State::at_simd) return false;
  uint32_t received[kSimdWidth];
  for (uint32_t t = begin; t < end; ++t) {
    if (threads_[t].state == State::done) continue;
    const uint32_t source = begin + threads_[t].source;
    if (source >= end || threads_[source].state == State::done) {
      fail(threads_[t].where, "shuffle from a lane that is not active");
    }
    received[t - begin] = threads_[source].value;
  }
  for (uint32_t t = begin; t < end; ++t) {
    if (threads_[t].state == State::done) continue;
    threads_[t].value = received[t - begin];
    threads_[t].state = State::ready;
  }
  return true;
}

void Group::run_simdgroup(uint32_t begin, uint32_t end, const std::vector<uint32_t>& order) {
  do {
    for (uint32_t offset : order) {
      const uint32_t t = begin + offset;
      if (t >= end || threads_[t].state != State::ready) continue;
      current_ = t;
      switch_fiber(scheduler_, threads_[t].fiber);
      if (error_) std::rethrow_exception(error_);
    }
  } while (exchange(begin, end));
}

// True when there was a barrier to release, false when all threads have ended.
bool Group::release_barrier() {
  uint32_t done = 0;
  for (uint32_t t = 0; t < count_; ++t) done += threads_[t].state == State::done;
  if (done == count_) return false;
  const Thread* first = nullptr;
  for (uint32_t t = 0; t < count_; ++t) {
    Thread& thread = threads_[t];
    if (thread.state == State::done) continue;
    if (!first) first = &thread;
    if (done > 0 || !(thread.where == first->where)) {
      fail(thread.where, "divergent barrier: not every thread of the group arrives here");
    }
    thread.state = State::ready;
  }
  ++epoch_;
  return true;
}

void Group::run(Uint3 position, uint64_t first, uint32_t threads, Order order, uint32_t seed,
                const std::function<void()>& kernel) {
  position_ = position;
  first_ = first;
  count_ = threads;
  kernel_ = &kernel;
  error_ = nullptr;
  shared_.clear();
  shared_bytes_ = 0;
  epoch_ = 1;
  for (uint32_t t = 0; t < threads; ++t) {
    threads_[t].fiber.prepare(&Group::entry);
    threads_[t].state = State::ready;
  }
  const uint32_t groups = (threads + kSimdWidth - 1) / kSimdWidth;
  std::vector<uint32_t> lanes(kSimdWidth), simds(groups);
  for (uint32_t i = 0; i < kSimdWidth; ++i) lanes[i] = i;
  for (uint32_t i = 0; i < groups; ++i) simds[i] = i;
  std::mt19937 random(seed);
  if (order == Order::reverse) {
    std::reverse(lanes.begin(), lanes.end());
    std::reverse(simds.begin(), simds.end());
  }
  running_ = true;
  try {
    do {
      if (order == Order::shuffled) {
        std::shuffle(lanes.begin(), lanes.end(), random);
        std::shuffle(simds.begin(), simds.end(), random);
      }
      for (uint32_t s : simds) {
        run_simdgroup(s * kSimdWidth, std::min((s + 1) * kSimdWidth, threads), lanes);
      }
    } while (release_barrier());
  } catch (...) {
    running_ = false;
    throw;
  }
  running_ = false;
}

SharedBlock& Group::shared(const char* name, size_t count, size_t size, Where where) {
  auto& block = shared_[name];
  if (!block) {
    shared_bytes_ += (count * size + 15) / 16 * 16;
    if (shared_bytes_ > kThreadgroupMemory) {
      fail(where, "threadgroup memory of " + std::to_string(shared_bytes_) + " bytes, limit 32768");
    }
    block = std::make_unique<SharedBlock>(count, size);
  }
  return *block;
}

}  // namespace

void fail(const Where& where, const std::string& what) {
  std::string who;
  if (group().in_dispatch() != 0) who = " (thread " + std::to_string(group().current()) + ")";
  throw Error(location(where) + ": " + what + who);
}

void dispatch(Uint3 groups, uint32_t threads, Order order, const std::function<void()>& kernel) {
  if (threads == 0 || threads > kMaxThreads) {
    throw Error("threadgroup of " + std::to_string(threads) + " threads, limit 1024");
  }
  group().groups = groups;
  static uint64_t serial = 0;
  ++serial;
  const uint32_t total = groups.x * groups.y * groups.z;
  for (uint32_t n = 0; n < total; ++n) {
    const uint32_t i = order == Order::reverse ? total - 1 - n : n;
    const Uint3 position{i % groups.x, i / groups.x % groups.y, i / groups.x / groups.y};
    group().run(position, (serial << 32) + i * threads, threads, order, i, kernel);
  }
}

uint32_t lane() {
  return group().current() % kSimdWidth;
}
uint32_t simdgroup() {
  return group().current() / kSimdWidth;
}
uint32_t thread_in_group() {
  return group().current();
}
Uint3 group_count() {
  return group().groups;
}
Uint3 group_position() {
  return group().position();
}
uint64_t thread_in_dispatch() {
  return group().in_dispatch();
}
void barrier(Where where) {
  group().park(State::at_barrier, where);
}

uint32_t shuffle(uint32_t value, uint32_t source_lane, Where where) {
  Thread& self = group().self();
  self.value = value;
  self.source = source_lane;
  group().park(State::at_simd, where);
  return self.value;
}

SharedBlock& shared_block(const char* name, size_t count, size_t size, Where where) {
  return group().shared(name, count, size, where);
}

SharedBlock::SharedBlock(size_t count, size_t size)
    : bytes_(count * size, std::byte{0xff}), shadow_(count) {}

void SharedBlock::check(const At& at) const {
  if (at.index < 0 || at.index >= static_cast<int64_t>(shadow_.size())) {
    fail(at.where, "index " + std::to_string(at.index) + " outside a threadgroup array of " +
                       std::to_string(shadow_.size()));
  }
}

void SharedBlock::on_read(const At& at) const {
  check(at);
  Shadow& s = shadow_[at.index];
  const auto self = static_cast<int32_t>(thread_in_group());
  const uint32_t epoch = group().epoch();
  if (s.writer < 0) fail(at.where, "reads threadgroup memory that nobody wrote");
  if (s.write_epoch == epoch && s.writer != self) {
    fail(at.where, "race: thread " + std::to_string(s.writer) + " writes element " +
                       std::to_string(at.index) + " before the same barrier");
  }
  s.reader = s.read_epoch == epoch && s.reader != self ? -2 : self;
  s.read_epoch = epoch;
}

void SharedBlock::on_write(const At& at) {
  check(at);
  Shadow& s = shadow_[at.index];
  const auto self = static_cast<int32_t>(thread_in_group());
  const uint32_t epoch = group().epoch();
  const bool written = s.writer >= 0 && s.write_epoch == epoch && s.writer != self;
  const bool read = s.read_epoch == epoch && s.reader != self;
  if (written || read) {
    fail(at.where, "race: another thread touches element " + std::to_string(at.index) +
                       " before the same barrier");
  }
  s.writer = self;
  s.write_epoch = epoch;
}

}  // namespace emulator
