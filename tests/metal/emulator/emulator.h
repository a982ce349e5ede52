// Runs a kernel text on this machine as a Metal device would: threadgroups one after another, the
// threads of a group as fibres, simdgroups of 32 that meet at every simd operation, barriers that
// all threads of a group must reach, and 32 KB of threadgroup memory that starts out as NaN.
//
// What a GPU leaves undefined is an error here, with the line of the kernel text: a read or write
// outside a buffer, a divergent barrier or simd operation, a read of threadgroup memory that nobody
// wrote, two threads that touch one element between two barriers (one of them writing), two threads
// of a dispatch that write one element of a buffer, a misaligned vector load.
//
// For CUDA's own texts also a warp's own barrier, clusters of groups that are alive together, with
// a barrier in two halves (which publishes nothing) and stores to each other's shared memory, which
// the receiver counts; matrix operations, which take words from every lane; and copies in the
// background, which land no earlier than they are waited for.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Uint3 {
  uint32_t x = 1, y = 1, z = 1;
};

enum class Order { forward, reverse, shuffled };

// Where in the kernel text something happened; the default arguments take the caller's line.
struct Where {
  const char* file;
  int line;
  Where(const char* f = __builtin_FILE(), int l = __builtin_LINE()) : file(f), line(l) {}
  bool operator==(const Where& o) const { return line == o.line && !std::strcmp(file, o.file); }
};

// An index together with the line that used it.
struct At {
  int64_t index;
  Where where;
  template <typename I, typename = std::enable_if_t<std::is_integral_v<I>>>
  At(I i, const char* f = __builtin_FILE(), int l = __builtin_LINE())
      : index(static_cast<int64_t>(i)), where(f, l) {}
};

[[noreturn]] void fail(const Where& where, const std::string& what);

// Runs `kernel` for every thread of `groups` threadgroups of `threads` threads (one dimension).
// cluster: so many of them along x are alive together, with the shared memory of a block on CUDA.
void dispatch(Uint3 groups, uint32_t threads, Order order, const std::function<void()>& kernel,
              uint32_t cluster = 1);

// Called from kernel texts through the host dialect.
uint32_t lane();
uint32_t simdgroup();
uint32_t thread_in_group();
Uint3 group_position();
Uint3 group_count();
// The running dispatch and, in the low 32 bits, the thread in it from 1 on; 0 outside a kernel.
uint64_t thread_in_dispatch();
void barrier(Where where);
void warp_barrier(Where where);  // publishes what its lanes did to its lanes
uint32_t shuffle(uint32_t value, uint32_t source_lane, Where where);

// What each lane of the simdgroup gave to exchange(), until the thread's next simd operation.
constexpr int kMostWords = 6;
struct LaneWords {
  const uint32_t (*words)[kMostWords];
  const uint32_t* operator[](uint32_t lane) const { return words[lane]; }
};
LaneWords exchange(const uint32_t* words, uint32_t count, Where where);

void cluster_arrive(Where where);
void cluster_wait(Where where);
// Until all the bytes that `arrivals` expects have come.
class SharedBlock;
void wait_for_parts(const SharedBlock& arrivals, Where where);

// land: called when the thread waits for the group of copies that commit_copies() put it in.
void start_copy(std::function<void()> land);
void commit_copies();
void wait_for_copies(uint32_t pending);

// One array of threadgroup memory, shared by the threads of the running group. `count` granules of
// `size` bytes; an access touches one or several.
class SharedBlock {
 public:
  SharedBlock(const char* name, size_t count, size_t size, bool dynamic);
  // at: in units of `size` bytes. unwritten_too: what nobody wrote reads as NaN.
  void on_read(const At& at, size_t size, bool unwritten_too = false) const;
  // remote: by a thread of another group of the cluster. copying: from now on until it lands.
  void on_write(const At& at, size_t size, bool remote = false, bool copying = false);
  // Of the group of that rank in the cluster.
  SharedBlock& of_rank(uint32_t rank, const Where& where) const;
  std::byte* data() { return bytes_.data(); }
  // The line of a store from another group, if there was one.
  const std::optional<Where>& remote() const { return remote_; }

  // An array that counts the bytes of such stores.
  void expect(uint32_t bytes, const Where& where);
  void arrive(uint32_t bytes, const Where& where);
  bool complete() const { return expecting_ && received_ == expected_; }

 private:
  static constexpr int32_t kNobody = -1, kSeveral = -2;
  struct Touch {
    int32_t thread = kNobody;  // in the cluster
    uint32_t epoch = 0;        // barriers of the group so far; 0 from elsewhere
    uint32_t warp_epoch = 0;   // and of the thread's warp
    uint32_t phase = 0;        // arrival at the cluster's barrier that comes next
  };
  struct Shadow {
    Touch write, read;
    bool copying = false;
  };
  static bool by_barrier(const Touch& touch);
  static bool by_cluster(const Touch& touch);
  static Touch touch(bool remote);
  void check(const At& at, size_t size) const;

  const std::string name_;
  const size_t granule_;
  const bool dynamic_;
  std::optional<Where> remote_;
  bool expecting_ = false;
  uint32_t expected_ = 0, received_ = 0, expecting_phase_ = 0;
  std::vector<std::byte> bytes_;
  mutable std::vector<Shadow> shadow_;
};

SharedBlock& shared_block(const char* name, size_t count, size_t size, Where where,
                          bool dynamic = false);

template <typename T>
class Shared {
 public:
  class Element {
   public:
    Element(SharedBlock* block, At at) : block_(block), at_(at) {}
    explicit operator float() const requires(!std::is_same_v<T, float>) {
      return static_cast<float>(static_cast<T>(*this));
    }
    operator T() const {
      block_->on_read(at_, sizeof(T));
      return reinterpret_cast<T*>(block_->data())[at_.index];
    }
    void operator=(T value) const {
      block_->on_write(at_, sizeof(T));
      reinterpret_cast<T*>(block_->data())[at_.index] = value;
    }
    void operator=(const Element& other) const { *this = static_cast<T>(other); }

   private:
    SharedBlock* block_;
    At at_;
  };

  explicit Shared(SharedBlock& block, int64_t offset = 0) : block_(&block), offset_(offset) {}
  Element operator[](At at) const {
    at.index += offset_;
    return {block_, at};
  }
  Shared operator+(int64_t n) const { return Shared(*block_, offset_ + n); }
  int64_t offset() const { return offset_; }
  SharedBlock& block() const { return *block_; }

  // 16 bytes from here on, for what moves as many at once.
  static constexpr int kLine = 16 / sizeof(T);
  At line(const Where& where) const {
    if (offset_ % kLine != 0) fail(where, "misaligned access to shared memory");
    return At(offset_ / kLine, where.file, where.line);
  }
  std::byte* bytes() const { return block_->data() + offset_ * sizeof(T); }

 private:
  SharedBlock* block_;
  int64_t offset_ = 0;
};

// A device buffer. Filled with bytes 0xff (NaN in every float format) when it is an output.
template <typename T>
class Buffer {
 public:
  explicit Buffer(std::vector<T> values) : values_(std::move(values)), writer_(values_.size()) {}
  static Buffer output(size_t count) {
    std::vector<T> values(count);
    std::memset(static_cast<void*>(values.data()), 0xff, count * sizeof(T));
    return Buffer(std::move(values));
  }

  const std::vector<T>& values() const { return values_; }
  size_t unwritten() const {
    size_t n = 0;
    for (uint64_t w : writer_) n += w == 0;
    return n;
  }

  T read(const At& at) const {
    check(at);
    if (another_wrote(at.index)) {
      fail(at.where, "reads element " + std::to_string(at.index) +
                         " that another thread writes in the same dispatch");
    }
    return values_[at.index];
  }
  void write(const At& at, T value) {
    check(at);
    if (another_wrote(at.index)) {
      fail(at.where,
           "writes element " + std::to_string(at.index) + " that another thread also writes");
    }
    writer_[at.index] = thread_in_dispatch();
    values_[at.index] = value;
  }

 private:
  void check(const At& at) const {
    if (at.index < 0 || at.index >= static_cast<int64_t>(values_.size())) {
      fail(at.where, "index " + std::to_string(at.index) + " outside a buffer of " +
                         std::to_string(values_.size()));
    }
  }
  bool another_wrote(int64_t i) const {
    const uint64_t writer = writer_[i], self = thread_in_dispatch();
    return writer != self && writer >> 32 == self >> 32 && writer != 0;
  }
  std::vector<T> values_;
  std::vector<uint64_t> writer_;  // the last thread_in_dispatch() to write an element
};

// What a kernel text sees of a buffer: a pointer that knows its bounds. Const ones only read.
template <typename T>
class Pointer {
 public:
  using Value = std::remove_const_t<T>;
  class Element {
   public:
    Element(Buffer<Value>* buffer, At at) : buffer_(buffer), at_(at) {}
    operator Value() const { return buffer_->read(at_); }
    void operator=(Value value) const { buffer_->write(at_, value); }

   private:
    Buffer<Value>* buffer_;
    At at_;
  };

  Pointer(Buffer<Value>& buffer, int64_t offset = 0) : buffer_(&buffer), offset_(offset) {}

  auto operator[](At at) const {
    at.index += offset_;
    if constexpr (std::is_const_v<T>) {
      return buffer_->read(at);
    } else {
      return Element(buffer_, at);
    }
  }
  Pointer operator+(int64_t n) const { return {*buffer_, offset_ + n}; }
  Pointer<Value> writable() const { return {*buffer_, offset_}; }
  int64_t offset() const { return offset_; }
  size_t size() const { return buffer_->values().size(); }

 private:
  Buffer<Value>* buffer_;
  int64_t offset_;
};

}  // namespace emulator
