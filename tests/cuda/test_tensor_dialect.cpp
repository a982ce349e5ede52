// What the emulator has for CUDA's texts beyond Metal's: products of tiles as the PTX manual lays
// them out, and planted faults in clusters and background copies, each caught.
#include <gtest/gtest.h>

#include <string>

#include "dialect_host.h"
#include "tensor_dialect_host.h"

namespace {

using emulator::Buffer;
using emulator::Order;
using emulator::Pointer;
using T = float16_t;

constexpr Order kOrders[] = {Order::forward, Order::reverse, Order::shuffled};

void expect_caught(uint threads, uint cluster, const std::function<void()>& kernel,
                   const std::string& what) {
  for (Order order : kOrders) {
    try {
      emulator::dispatch({cluster, 1, 1}, threads, order, kernel, cluster);
      FAIL() << "not caught: " << what;
    } catch (const emulator::Error& e) {
      EXPECT_NE(std::string(e.what()).find(what), std::string::npos) << e.what();
    }
  }
}

// The same float twice.
Floats<2> twice(float v) {
  return {{v, v}};
}

// Two blocks, and what each has for two floats from both.
struct Parts {
  emulator::Shared<float> floats;
  emulator::Shared<Arrivals> arrivals;

  void send() const {
    if (thread_id < 2) send_part(floats + 2 * group_x, arrivals, thread_id, twice(1.0f));
  }
};
Parts expected_parts() {
  SHARED_ARRAY(float, parts, 4);
  SHARED_ARRAY(Arrivals, arrivals, 1);
  if (thread_id == 0) expect_parts(arrivals, 16);
  return {parts, arrivals};
}
void meet() {
  cluster_arrive();
  cluster_wait();
}

// 16 x 16 times 16 x 8.
TEST(TensorDialect, MultipliesTiles) {
  std::vector<T> a(16 * 16), b(16 * 8);
  for (size_t i = 0; i < a.size(); ++i) a[i] = T(float(i * 7 % 23) - 11.0f);
  for (size_t i = 0; i < b.size(); ++i) b[i] = T(float(i * 5 % 19) - 9.0f);
  Buffer<T> in_a(a), in_b(b);
  auto out = Buffer<float>::output(16 * 8);
  const Pointer<const T> x(in_a), y(in_b);
  const Pointer<float> z(out);
  const auto kernel = [=] {
    DYNAMIC_SHARED_ARRAY(T, left, 16 * 24);
    SHARED_ARRAY(T, right, 32 * 8);
    copy_async(left + (lane_id / 2 * 24 + lane_id % 2 * 8), x + lane_id * 8);
    if (lane_id < 16) copy_async(right + lane_id * 8, y + lane_id * 8);
    if (lane_id >= 16) store_zeros(right + lane_id * 8);
    commit_copies();
    wait_for_copies<0>();
    group_barrier();
    const uint row = lane_id / 4, pair = lane_id % 4 * 2;  // and column of the second
    const auto a = [&](uint r, uint k) {
      return two_halves<T>(float(left[r * 24 + k]), float(left[r * 24 + k + 1]));
    };
    const auto b = [&](uint k) {
      return two_halves<T>(float(right[k * 8 + row]), float(right[(k + 1) * 8 + row]));
    };
    const auto c = multiply_halves<T>(zeros<4>(), a(row, pair), a(row + 8, pair), a(row, pair + 8),
                                      a(row + 8, pair + 8), b(pair), b(pair + 8));
    for (uint i = 0; i < 4; ++i)
      z[(lane_id / 4 + i / 2 * 8) * 8 + lane_id % 4 * 2 + i % 2] = c.v[i];
  };
  emulator::dispatch(
      {2, 1, 1}, 32, Order::forward,
      [&] {
        if (group_x == 0) kernel();
      },
      2);
  for (size_t row = 0; row < 16; ++row)
    for (size_t column = 0; column < 8; ++column) {
      float sum = 0.0f;
      for (size_t k = 0; k < 16; ++k) sum += float(a[row * 16 + k]) * float(b[k * 8 + column]);
      EXPECT_EQ(out.values()[row * 8 + column], sum) << row << " " << column;
    }
}

// Lane 4 g + t has columns 2 t and 2 t + 1 of row g, before and after.
TEST(TensorDialect, TransposesATile) {
  std::vector<uint> words(32);
  for (uint i = 0; i < 32; ++i) words[i] = 2 * i | (2 * i + 1) << 16;
  Buffer<uint> in(words);
  auto out = Buffer<uint>::output(32);
  const Pointer<const uint> x(in);
  const Pointer<uint> y(out);
  emulator::dispatch({1, 1, 1}, 32, Order::forward, [=] { y[lane_id] = transposed(x[lane_id]); });
  for (uint row = 0; row < 8; ++row)
    for (uint t = 0; t < 4; ++t)
      EXPECT_EQ(out.values()[4 * row + t], (16 * t + row) | (16 * t + 8 + row) << 16);
}

// Element (row, column) of a tile of a warpgroup's products: its 16 bytes change places.
uint in_tile(uint row, uint column) {
  return row * 64 + ((column / 8 ^ row % 8) * 8 + column % 8);
}

// 64 x 32 times 32 x 8 by a warpgroup, in two steps, the first as it is or transposed.
template <bool TURNED>
void expect_warpgroup_products() {
  const auto x = [](size_t row, size_t k) { return float((row * 7 + k * 5) % 23) - 11.0f; };
  const auto y = [](size_t k, size_t column) { return float((k * 3 + column * 11) % 19) - 9.0f; };
  auto out = Buffer<float>::output(64 * 8);
  const Pointer<float> z(out);
  const auto kernel = [=] {
    SHARED_ARRAY(T, tiles, 2 * 64 * 64);
    const auto second = tiles + 64 * 64;
    for (uint i = thread_id; i < 64 * 32; i += 128) {
      const uint row = i / 32, k = i % 32;
      tiles[TURNED ? in_tile(k, row) : in_tile(row, k)] = T(x(row, k));
    }
    for (uint i = thread_id; i < 8 * 32; i += 128)
      second[in_tile(i / 32, i % 32)] = T(y(i % 32, i / 32));
    tiles_written();
    group_barrier();
    auto c = zeros<4>();
    begin_products();
    for (uint k = 0; k < 32; k += 16)
      multiply_tiles<T, 8, TURNED>(c, tiles + (TURNED ? k * 64 : k), second + k);
    wait_for_products();
    settle(c);
    for (uint i = 0; i < 4; ++i)
      z[(16 * simd_id + lane_id / 4 + i / 2 * 8) * 8 + lane_id % 4 * 2 + i % 2] = c.v[i];
  };
  emulator::dispatch({1, 1, 1}, 128, Order::shuffled, kernel);
  for (size_t row = 0; row < 64; ++row)
    for (size_t column = 0; column < 8; ++column) {
      float sum = 0.0f;
      for (size_t k = 0; k < 32; ++k) sum += x(row, k) * y(k, column);
      EXPECT_EQ(out.values()[row * 8 + column], sum) << row << " " << column;
    }
}
TEST(TensorDialect, WarpgroupMultipliesTiles) {
  expect_warpgroup_products<false>();
  expect_warpgroup_products<true>();
}

TEST(TensorDialect, StoresTilesTurned) {
  auto out = Buffer<float>::output(4 * 64);
  const Pointer<float> z(out);
  emulator::dispatch({1, 1, 1}, 32, Order::shuffled, [=] {
    SHARED_ARRAY(T, tiles, 4 * 64);
    Words<4> w;
    for (uint i = 0; i < 4; ++i) {
      const float first = float(64 * i + lane_id / 4 * 8 + lane_id % 4 * 2);
      w.w[i] = two_halves<T>(first, first + 1.0f);
    }
    store_turned(tiles + lane_id * 8, w);
    group_barrier();
    for (uint i = lane_id; i < 4 * 64; i += 32) z[i] = float(tiles[i]);
  });
  for (size_t i = 0; i < 4 * 64; ++i)
    EXPECT_EQ(out.values()[i], float(i / 64 * 64 + i % 8 * 8 + i / 8 % 8)) << i;
}

TEST(TensorDialect, BlocksSendToEachOther) {
  auto out = Buffer<float>::output(4 * 16);
  const Pointer<float> z(out);
  for (Order order : kOrders) {
    emulator::dispatch(
        {4, 1, 1}, 64, order,
        [=] {
          SHARED_ARRAY(float, parts, 16);
          SHARED_ARRAY(Arrivals, arrivals, 1);
          if (thread_id == 0) expect_parts(arrivals, 4 * 16);
          cluster_arrive();
          cluster_wait();
          const float v = float(10 * group_x);
          if (thread_id < 4)
            send_part(parts + 4 * group_x, arrivals, thread_id,
                      Floats<4>{{v, v + 1, v + 2, v + 3}});
          wait_for_parts(arrivals);
          if (thread_id < 16) z[group_x * 16 + thread_id] = parts[thread_id];
        },
        4);
    for (size_t i = 0; i < 64; ++i)
      EXPECT_EQ(out.values()[i], float(10 * (i % 16 / 4) + i % 4)) << i;
  }
}

// What the 32 threads of a warp write, each reads of the next behind the warp's own barrier.
TEST(TensorDialect, AWarpsBarrierPublishesToItsLanes) {
  auto out = Buffer<float>::output(64);
  const Pointer<float> to(out);
  for (Order order : kOrders)
    emulator::dispatch({1, 1, 1}, 64, order, [=] {
      SHARED_ARRAY(float, there, 64);
      there[thread_id] = float(thread_id);
      warp_barrier();
      to[thread_id] = there[thread_id / 32 * 32 + (lane_id + 1) % 32];
      warp_barrier();
      there[thread_id / 32 * 32 + (lane_id + 2) % 32] = 0.0f;
    });
  for (uint i = 0; i < 64; ++i) EXPECT_EQ(out.values()[i], float(i / 32 * 32 + (i + 1) % 32));
}

TEST(TensorDialect, CatchesWhatAWarpsBarrierDoesNotPublish) {
  const auto reads = [](uint distance, bool between) {
    return [=] {
      SHARED_ARRAY(float, there, 64);
      if (between) warp_barrier();
      there[thread_id] = 1.0f;
      if (!between) warp_barrier();
      if (float(there[(thread_id + distance) % 64]) < 0.0f) group_barrier();
    };
  };
  expect_caught(64, 1, reads(32, false), "thread");  // of the other warp: a race, or not there yet
  expect_caught(64, 1, reads(1, true), "thread");    // the barrier was before
  expect_caught(
      64, 1,
      [] {
        if (lane_id != 3) warp_barrier();
      },
      "not active");
}

TEST(TensorDialect, CatchesAPartOutOfLine) {
  expect_caught(
      32, 2,
      [] {
        const Parts parts = expected_parts();
        meet();
        if (thread_id < 2) send_part(parts.floats + 1, parts.arrivals, thread_id, twice(1.0f));
        wait_for_parts(parts.arrivals);
      },
      "misaligned part");
}

TEST(TensorDialect, CatchesAPartThatNobodyWaitedFor) {
  expect_caught(
      32, 2,
      [] {
        const Parts parts = expected_parts();
        meet();
        parts.send();
        meet();
        const float seen = parts.floats[0];
        (void)seen;
        wait_for_parts(parts.arrivals);
      },
      "before the same barrier");
}

TEST(TensorDialect, CatchesAPartToABlockThatMayHaveEnded) {
  expect_caught(
      32, 2,
      [] {
        const Parts parts = expected_parts();
        meet();
        parts.send();
        if (group_x == 0) wait_for_parts(parts.arrivals);
      },
      "may have ended");
}

TEST(TensorDialect, CatchesAPartBeforeTheBlocksMet) {
  expect_caught(
      32, 2,
      [] {
        const Parts parts = expected_parts();
        cluster_arrive();
        parts.send();
        cluster_wait();
        wait_for_parts(parts.arrivals);
      },
      "may not expect");
}

TEST(TensorDialect, CatchesAPartOverWhatMayStillBeRead) {
  expect_caught(
      32, 2,
      [] {
        const Parts parts = expected_parts();
        if (thread_id < 2) parts.floats[thread_id] = 0.0f;
        cluster_arrive();
        const float seen = thread_id < 2 ? float(parts.floats[thread_id]) : 0.0f;  // after arriving
        (void)seen;
        cluster_wait();
        parts.send();
        wait_for_parts(parts.arrivals);
      },
      "race");
}

TEST(TensorDialect, CatchesPartsThatNeverCome) {
  expect_caught(
      32, 2,
      [] {
        SHARED_ARRAY(Arrivals, arrivals, 1);
        if (thread_id == 0) expect_parts(arrivals, 4);
        meet();
        wait_for_parts(arrivals);
      },
      "forever");
}

TEST(TensorDialect, CatchesABlockThatLeavesItsCluster) {
  expect_caught(
      32, 2,
      [] {
        if (group_x == 1) return;
        meet();
      },
      "has ended");
}

TEST(TensorDialect, CatchesReadingWhatACopyBrings) {
  Buffer<T> in(std::vector<T>(256, T(1.0f)));
  const Pointer<const T> x(in);
  expect_caught(
      32, 2,
      [=] {
        SHARED_ARRAY(T, there, 512);
        copy_async(there + lane_id * 8, x + lane_id * 8);
        commit_copies();
        copy_async(there + (256 + lane_id * 8), x + lane_id * 8);
        commit_copies();
        wait_for_copies<1>();
        group_barrier();
        load_shared(there, lane_id * 8);
        load_shared(there, 256 + lane_id * 8);
      },
      "a copy that nobody waited for");
}

TEST(TensorDialect, CatchesACopyThatWasNeverCommitted) {
  Buffer<T> in(std::vector<T>(256, T(1.0f)));
  const Pointer<const T> x(in);
  expect_caught(
      32, 2,
      [=] {
        SHARED_ARRAY(T, there, 256);
        copy_async(there + lane_id * 8, x + lane_id * 8);
        wait_for_copies<0>();
        load_shared(there, lane_id * 8);
      },
      "a copy that nobody waited for");
}

TEST(TensorDialect, CatchesMisalignedTiles) {
  expect_caught(
      32, 2,
      [] {
        SHARED_ARRAY(T, there, 512);
        load_shared(there, lane_id * 8 + 4);
      },
      "misaligned");
}

}  // namespace
