#include "emulator.h"

#include <algorithm>
#include <exception>
#include <map>
#include <numeric>
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
constexpr size_t kStaticShared = 48 * 1024, kSharedOfBlock = 227 * 1024;  // a kernel on CUDA
constexpr uint32_t kAllLanes = ~0u;  // what an operation takes from every lane

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
  std::unique_ptr<std::byte[]> stack{new std::byte[kStackBytes]};
  void* sp = nullptr;

  void prepare(void (*entry)()) {
    auto top = reinterpret_cast<uintptr_t>(stack.get() + kStackBytes) & ~uintptr_t{15};
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
  std::unique_ptr<std::byte[]> stack{new std::byte[kStackBytes]};
  ucontext_t context;

  void prepare(void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};
void switch_fiber(Fiber& from, Fiber& to) {
  swapcontext(&from.context, &to.context);
}
#endif

enum class State { ready, at_simd, at_barrier, at_cluster, at_parts, done };

struct Thread {
  Fiber fiber;
  State state = State::ready;
  Where where;
  uint32_t words[kMostWords] = {}, source = 0;
  uint32_t warp_epoch = 0;
  uint32_t arrived = 0, waited = 0;  // phases of the cluster's barrier
  const SharedBlock* arrivals = nullptr;
  bool has_parts = false;
  std::vector<std::vector<std::function<void()>>> copies;  // groups of them, the last one open
};

std::string location(const Where& where) {
  const std::string file = where.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line);
}

// The order in which those of one level run.
std::vector<uint32_t> counted(uint32_t n) {
  std::vector<uint32_t> order(n);
  std::iota(order.begin(), order.end(), 0u);
  return order;
}

class Group {
 public:
  void start(Uint3 position, uint32_t rank, uint64_t first, uint32_t threads, bool cuda);
  // Runs each thread as far as it comes without the rest of the cluster; false when none moved.
  bool advance(Order order, std::mt19937& random);
  void park(State state, Where where) {
    Thread& self = threads_[current_];
    self.state = state;
    self.where = where;
    switch_fiber(self.fiber, scheduler_);
  }
  std::vector<Thread>& threads() { return threads_; }
  Thread& self() { return threads_[current_]; }
  uint32_t current() const { return current_; }
  uint32_t in_cluster() const { return rank_ * count() + current_; }
  uint32_t count() const { return static_cast<uint32_t>(threads_.size()); }
  uint32_t epoch() const { return epoch_; }
  Uint3 position() const { return position_; }
  uint64_t in_dispatch() const { return first_ + current_ + 1; }
  LaneWords seen() const { return {seen_[current_ / kSimdWidth]}; }
  SharedBlock& shared(const char* name, size_t count, size_t size, bool dynamic, Where where);
  void check_remote() const;

 private:
  static void entry();
  bool run_simdgroup(uint32_t begin, uint32_t end, const std::vector<uint32_t>& order);
  bool exchange(uint32_t begin, uint32_t end);
  bool release_barrier();

  std::vector<Thread> threads_;
  std::map<std::string, std::unique_ptr<SharedBlock>> shared_;
  size_t shared_bytes_ = 0, dynamic_bytes_ = 0;
  Fiber scheduler_;
  std::exception_ptr error_;
  Uint3 position_;
  uint32_t rank_ = 0, current_ = 0, epoch_ = 1;
  uint64_t first_ = 0;
  bool cuda_ = false;
  uint32_t seen_[kMaxThreads / kSimdWidth][kSimdWidth][kMostWords];
};

// The groups that are alive together, and the one of them that runs.
struct Cluster {
  std::vector<std::unique_ptr<Group>> groups;
  Group* running = nullptr;
  Uint3 count;  // groups of the dispatch
  const std::function<void()>* kernel = nullptr;

  void run(Uint3 position, uint64_t first, uint32_t size, uint32_t threads, Order order,
           uint32_t seed);
  bool done() const;
  bool release() const;
};

Cluster& cluster() {
  static thread_local Cluster instance;
  return instance;
}
Group& group() {
  return *cluster().running;
}

void Group::entry() {
  Group& g = group();
  try {
    (*cluster().kernel)();
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
  for (uint32_t t = begin; t < end; ++t) {
    if (threads_[t].state == State::done) continue;
    const uint32_t source = begin + threads_[t].source;
    const bool all = threads_[t].source == kAllLanes;
    if (all ? end - begin < kSimdWidth : source >= end || threads_[source].state == State::done)
      fail(threads_[t].where, "shuffle from a lane that is not active");
    for (uint32_t i = begin; all && i < end; ++i)
      if (threads_[i].state == State::done) fail(threads_[t].where, "a lane is not active");
    std::copy_n(threads_[t].words, kMostWords, seen_[begin / kSimdWidth][t - begin]);
  }
  for (uint32_t t = begin; t < end; ++t)
    if (threads_[t].state != State::done) threads_[t].state = State::ready;
  return true;
}

bool Group::run_simdgroup(uint32_t begin, uint32_t end, const std::vector<uint32_t>& order) {
  bool moved = false;
  do {
    for (uint32_t offset : order) {
      const uint32_t t = begin + offset;
      if (t >= end || threads_[t].state != State::ready) continue;
      moved = true;
      current_ = t;
      switch_fiber(scheduler_, threads_[t].fiber);
      if (error_) std::rethrow_exception(error_);
    }
  } while (exchange(begin, end));
  return moved;
}

// True when there was a barrier to release, false when all threads have ended or some of them wait
// for the cluster.
bool Group::release_barrier() {
  uint32_t done = 0;
  const Thread* first = nullptr;
  for (const Thread& thread : threads_) {
    if (thread.state == State::at_cluster || thread.state == State::at_parts) return false;
    if (thread.state == State::done)
      ++done;
    else if (!first)
      first = &thread;
  }
  if (!first) return false;
  for (Thread& thread : threads_) {
    if (thread.state == State::done) continue;
    if (done > 0 || !(thread.where == first->where)) {
      fail(thread.where, "divergent barrier: not every thread of the group arrives here");
    }
    thread.state = State::ready;
  }
  ++epoch_;
  return true;
}

void Group::start(Uint3 position, uint32_t rank, uint64_t first, uint32_t threads, bool cuda) {
  position_ = position;
  rank_ = rank;
  first_ = first;
  cuda_ = cuda;
  error_ = nullptr;
  shared_.clear();
  shared_bytes_ = dynamic_bytes_ = 0;
  epoch_ = 1;
  current_ = 0;
  threads_.resize(threads);
  for (Thread& thread : threads_) {
    thread.fiber.prepare(&Group::entry);
    thread.state = State::ready;
    thread.warp_epoch = thread.arrived = thread.waited = 0;
    thread.has_parts = false;
    thread.copies.assign(1, {});
  }
}

bool Group::advance(Order order, std::mt19937& random) {
  auto lanes = counted(kSimdWidth), simds = counted((count() + kSimdWidth - 1) / kSimdWidth);
  if (order == Order::reverse) {
    std::reverse(lanes.begin(), lanes.end());
    std::reverse(simds.begin(), simds.end());
  }
  for (Thread& thread : threads_) {
    if (thread.state != State::at_parts || !thread.arrivals->complete()) continue;
    thread.has_parts = true;
    thread.state = State::ready;
  }
  bool moved = false;
  do {
    if (order == Order::shuffled) {
      std::shuffle(lanes.begin(), lanes.end(), random);
      std::shuffle(simds.begin(), simds.end(), random);
    }
    for (uint32_t s : simds) {
      const uint32_t begin = s * kSimdWidth;
      moved |= run_simdgroup(begin, std::min(begin + kSimdWidth, count()), lanes);
    }
  } while (release_barrier());
  return moved;
}

bool Cluster::done() const {
  for (const auto& g : groups)
    for (const Thread& thread : g->threads())
      if (thread.state != State::done) return false;
  return true;
}

// Lets those go on whose phase every thread of the cluster has arrived at.
bool Cluster::release() const {
  uint32_t arrived = ~0u;
  const Thread *waiting = nullptr, *ended = nullptr;
  for (const auto& g : groups)
    for (const Thread& thread : g->threads()) {
      arrived = std::min(arrived, thread.arrived);
      if (thread.state == State::at_cluster) waiting = &thread;
      if (thread.state == State::done && (!ended || thread.arrived < ended->arrived))
        ended = &thread;
    }
  if (waiting && ended && ended->arrived <= waiting->waited)
    fail(waiting->where, "a thread of the cluster has ended before this wait");
  bool released = false;
  for (const auto& g : groups)
    for (Thread& thread : g->threads())
      if (thread.state == State::at_cluster && arrived > thread.waited) {
        ++thread.waited;
        thread.state = State::ready;
        released = true;
      }
  return released;
}

void Cluster::run(Uint3 position, uint64_t first, uint32_t size, uint32_t threads, Order order,
                  uint32_t seed) {
  while (groups.size() < size) groups.push_back(std::make_unique<Group>());
  groups.resize(size);
  auto ranks = counted(size);
  if (order == Order::reverse) std::reverse(ranks.begin(), ranks.end());
  std::mt19937 random(seed);
  for (uint32_t rank = 0; rank < size; ++rank) {
    groups[rank]->start(position, rank, first + rank * threads, threads, size > 1);
    ++position.x;
  }
  try {
    for (bool moved = true; !done();) {
      if (!moved) fail(groups[0]->threads()[0].where, "the cluster waits for a thread forever");
      moved = false;
      if (order == Order::shuffled) std::shuffle(ranks.begin(), ranks.end(), random);
      for (uint32_t rank : ranks) {
        running = groups[rank].get();
        moved |= running->advance(order, random);
      }
      running = nullptr;
      moved |= release();
    }
  } catch (...) {
    running = nullptr;
    throw;
  }
  for (const auto& g : groups) g->check_remote();
}

// A block that does not wait for the stores to it may be gone when they arrive.
void Group::check_remote() const {
  for (const auto& [name, block] : shared_)
    for (const Thread& thread : threads_)
      if (block->remote() && !thread.has_parts)
        fail(*block->remote(), "the other block may have ended already");
}

SharedBlock& Group::shared(const char* name, size_t count, size_t size, bool dynamic, Where where) {
  auto& block = shared_[name];
  if (!block) {
    const size_t bytes = (count * size + 15) / 16 * 16;
    (dynamic ? dynamic_bytes_ : shared_bytes_) += bytes;
    const size_t limit = cuda_ ? kStaticShared : kThreadgroupMemory;
    if (shared_bytes_ > limit) {
      fail(where, "threadgroup memory of " + std::to_string(shared_bytes_) + " bytes, limit " +
                      std::to_string(limit));
    }
    if (dynamic_bytes_ > 0 && (!cuda_ || shared_bytes_ + dynamic_bytes_ > kSharedOfBlock)) {
      fail(where, "shared memory of " + std::to_string(shared_bytes_ + dynamic_bytes_) +
                      " bytes, limit 232448 in a cluster and none elsewhere");
    }
    block = std::make_unique<SharedBlock>(name, count, size, dynamic);
  }
  return *block;
}

}  // namespace

void fail(const Where& where, const std::string& what) {
  std::string who;
  if (cluster().running) who = " (thread " + std::to_string(group().current()) + ")";
  throw Error(location(where) + ": " + what + who);
}

void dispatch(Uint3 groups, uint32_t threads, Order order, const std::function<void()>& kernel,
              uint32_t size) {
  if (threads == 0 || threads > kMaxThreads) {
    throw Error("threadgroup of " + std::to_string(threads) + " threads, limit 1024");
  }
  if (size == 0 || groups.x % size != 0) {
    throw Error("a grid of " + std::to_string(groups.x) + " groups in clusters of " +
                std::to_string(size));
  }
  cluster().count = groups;
  cluster().kernel = &kernel;
  static uint64_t serial = 0;
  ++serial;
  const uint32_t total = groups.x * groups.y * groups.z / size;
  for (uint32_t n = 0; n < total; ++n) {
    const uint32_t i = (order == Order::reverse ? total - 1 - n : n) * size;
    const Uint3 position{i % groups.x, i / groups.x % groups.y, i / groups.x / groups.y};
    cluster().run(position, (serial << 32) + i * threads, size, threads, order, i);
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
  return cluster().count;
}
Uint3 group_position() {
  return group().position();
}
uint64_t thread_in_dispatch() {
  return cluster().running ? group().in_dispatch() : 0;
}
void barrier(Where where) {
  group().park(State::at_barrier, where);
}

uint32_t shuffle(uint32_t value, uint32_t source_lane, Where where) {
  Thread& self = group().self();
  self.words[0] = value;
  self.source = source_lane;
  group().park(State::at_simd, where);
  return group().seen()[source_lane][0];
}

LaneWords exchange(const uint32_t* words, uint32_t count, Where where) {
  Thread& self = group().self();
  std::copy_n(words, count, self.words);
  self.source = kAllLanes;
  group().park(State::at_simd, where);
  return group().seen();
}

void warp_barrier(Where where) {
  exchange(nullptr, 0, where);
  ++group().self().warp_epoch;
}

void cluster_arrive(Where where) {
  exchange(nullptr, 0, where);  // all lanes of a warp together
  Thread& self = group().self();
  if (self.arrived != self.waited) fail(where, "arrives twice at the cluster's barrier");
  ++self.arrived;
}
void cluster_wait(Where where) {
  const Thread& self = group().self();
  if (self.arrived == self.waited) fail(where, "waits for the cluster without having arrived");
  group().park(State::at_cluster, where);
}

void wait_for_parts(const SharedBlock& arrivals, Where where) {
  group().self().arrivals = &arrivals;
  group().park(State::at_parts, where);
}

void start_copy(std::function<void()> land) {
  group().self().copies.back().push_back(std::move(land));
}
void commit_copies() {
  group().self().copies.emplace_back();
}
void wait_for_copies(uint32_t pending) {
  auto& copies = group().self().copies;
  while (copies.size() > pending + 1) {
    for (const auto& land : copies.front()) land();
    copies.erase(copies.begin());
  }
}

SharedBlock& shared_block(const char* name, size_t count, size_t size, Where where, bool dynamic) {
  return group().shared(name, count, size, dynamic, where);
}

SharedBlock& SharedBlock::of_rank(uint32_t rank, const Where& where) const {
  const auto& groups = cluster().groups;
  if (rank >= groups.size()) {
    fail(where,
         "rank " + std::to_string(rank) + " of a cluster of " + std::to_string(groups.size()));
  }
  return groups[rank]->shared(name_.c_str(), shadow_.size(), granule_, dynamic_, where);
}

SharedBlock::SharedBlock(const char* name, size_t count, size_t size, bool dynamic)
    : name_(name),
      granule_(size),
      dynamic_(dynamic),
      bytes_(count * size, std::byte{0xff}),
      shadow_(count) {}

void SharedBlock::check(const At& at, size_t size) const {
  const int64_t all = static_cast<int64_t>(bytes_.size() / size);
  if (at.index < 0 || at.index >= all) {
    fail(at.where, "index " + std::to_string(at.index) + " outside a threadgroup array of " +
                       std::to_string(all));
  }
}

// What a thread did is over for this one, and to be seen, when a barrier of the group lies between,
// or of their warp; what another group sent, when this one waited for it.
bool SharedBlock::by_barrier(const Touch& touch) {
  Group& g = group();
  if (touch.epoch == 0) return g.self().has_parts;
  if (touch.epoch != g.epoch()) return true;
  const auto self = static_cast<int32_t>(g.in_cluster()), width = static_cast<int32_t>(kSimdWidth);
  if (touch.thread < 0 || touch.thread / width != self / width) return false;
  return touch.thread == self || touch.warp_epoch < g.self().warp_epoch;
}
// It is over, though not to be seen, when the thread arrived at the cluster's barrier afterwards
// and this one has waited for that.
bool SharedBlock::by_cluster(const Touch& touch) {
  return group().self().waited >= touch.phase;
}
SharedBlock::Touch SharedBlock::touch(bool remote) {
  Group& g = group();
  return {static_cast<int32_t>(g.in_cluster()), remote ? 0 : g.epoch(), g.self().warp_epoch,
          g.self().arrived + 1};
}

void SharedBlock::on_read(const At& at, size_t size, bool unwritten_too) const {
  check(at, size);
  for (size_t i = at.index * size / granule_; i < (at.index + 1) * size / granule_; ++i) {
    Shadow& s = shadow_[i];
    if (s.write.thread == kNobody && unwritten_too) continue;
    if (s.copying) fail(at.where, "reads what a copy that nobody waited for brings");
    if (s.write.thread == kNobody) fail(at.where, "reads threadgroup memory that nobody wrote");
    if (!by_barrier(s.write)) {
      fail(at.where, "race: thread " + std::to_string(s.write.thread) + " writes element " +
                         std::to_string(at.index) + " before the same barrier");
    }
    const bool another = s.read.thread != kNobody && !by_barrier(s.read);
    const Touch before = s.read;
    s.read = touch(false);
    if (another) s.read.thread = kSeveral;
    if (another) s.read.phase = std::max(s.read.phase, before.phase);
  }
}

void SharedBlock::on_write(const At& at, size_t size, bool remote, bool copying) {
  check(at, size);
  for (size_t i = at.index * size / granule_; i < (at.index + 1) * size / granule_; ++i) {
    Shadow& s = shadow_[i];
    for (const Touch& t : {s.read, s.write}) {
      if (t.thread == kNobody || by_cluster(t) || (!remote && by_barrier(t))) continue;
      fail(at.where, "race: another thread touches element " + std::to_string(at.index) +
                         " before the same barrier");
    }
    s.write = touch(remote);
    s.copying = copying;
  }
  if (remote) remote_ = at.where;
}

void SharedBlock::expect(uint32_t bytes, const Where& where) {
  if (expecting_) fail(where, "expects parts twice");
  expecting_ = true;
  expected_ = bytes;
  expecting_phase_ = touch(false).phase;
}
void SharedBlock::arrive(uint32_t bytes, const Where& where) {
  if (!expecting_ || group().self().waited < expecting_phase_)
    fail(where, "sends what the other block may not expect yet");
  received_ += bytes;
  if (received_ > expected_) fail(where, "sends more than the other block expects");
}

}  // namespace emulator
