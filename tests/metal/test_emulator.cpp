// The emulator itself: faults planted in small kernels must each be caught, with their line.
#include <gtest/gtest.h>

#include <string>

#include "dialect_host.h"

namespace {

using emulator::Buffer;
using emulator::Order;
using emulator::Pointer;

constexpr Order kOrders[] = {Order::forward, Order::reverse, Order::shuffled};

// The kernel stands between the lines `first` and `last` of this file.
void expect_caught(uint threads, int first, const std::function<void()>& kernel,
                   const std::string& what, int last) {
  for (Order order : kOrders) {
    try {
      emulator::dispatch({2, 1, 1}, threads, order, kernel);
      FAIL() << "not caught: " << what;
    } catch (const emulator::Error& e) {
      const std::string message = e.what(), file = "test_emulator.cpp:";
      EXPECT_NE(message.find(what), std::string::npos) << message;
      ASSERT_EQ(message.rfind(file, 0), 0u) << message;
      const int line = std::stoi(message.substr(file.size()));
      EXPECT_GE(line, first) << message;
      EXPECT_LE(line, last) << message;
    }
  }
}

TEST(Emulator, LanesExchangeValues) {
  for (Order order : kOrders) {
    auto out = Buffer<uint>::output(128);
    Pointer<uint> p(out);
    emulator::dispatch({2, 1, 1}, 64, order, [=] {
      uint v = thread_id;
      for (uint m = 16; m > 0; m >>= 1) v += shuffle_xor(v, m);
      p[group_x * 64 + thread_id] = v;
    });
    EXPECT_EQ(out.unwritten(), 0u);
    for (size_t i = 0; i < 128; ++i) EXPECT_EQ(out.values()[i], i % 64 < 32 ? 496u : 1520u);
  }
}

TEST(Emulator, BarrierOrdersThreadgroupMemory) {
  for (Order order : kOrders) {
    auto out = Buffer<float>::output(128);
    Pointer<float> p(out);
    emulator::dispatch({2, 1, 1}, 64, order, [=] {
      SHARED_ARRAY(float, shared, 64);
      shared[thread_id] = float(thread_id);
      group_barrier();
      p[group_x * 64 + thread_id] = shared[63 - thread_id];
    });
    for (size_t i = 0; i < 64; ++i) EXPECT_EQ(out.values()[i], 63.0f - float(i));
  }
}

TEST(Emulator, CatchesARace) {
  auto kernel = [] {
    SHARED_ARRAY(float, shared, 64);
    shared[thread_id] = 1.0f;
    group_barrier();
    if (thread_id == 40) shared[3] = 2.0f;
    float seen = thread_id == 2 ? float(shared[3]) : 0.0f;
    (void)seen;
  };
  // Which of the two lines reports it depends on who comes first.
  for (Order order : kOrders) {
    EXPECT_THROW(emulator::dispatch({1, 1, 1}, 64, order, kernel), emulator::Error);
  }
}

TEST(Emulator, CatchesTwoWriters) {
  expect_caught(
      64, __LINE__,
      [] {
        SHARED_ARRAY(float, shared, 64);
        shared[thread_id / 2] = 1.0f;
      },
      "race", __LINE__);
}

TEST(Emulator, CatchesADivergentBarrier) {
  expect_caught(
      64, __LINE__,
      [] {
        if (thread_id < 32) group_barrier();
      },
      "divergent barrier", __LINE__);
}

TEST(Emulator, CatchesADivergentShuffle) {
  expect_caught(
      32, __LINE__,
      [] {
        float v = 1.0f;
        if (lane_id < 16) v = shuffle_xor(v, 16);
      },
      "not active", __LINE__);
}

TEST(Emulator, CatchesLanesAtDifferentOperations) {
  auto kernel = [] {
    float v = 1.0f;
    if (lane_id < 16)
      v = shuffle_xor(v, 1);
    else
      v = shuffle_xor(v, 2);
  };
  EXPECT_THROW(emulator::dispatch({1, 1, 1}, 32, Order::forward, kernel), emulator::Error);
}

TEST(Emulator, CatchesABarrierInsideASimdOperation) {
  auto kernel = [] {
    if (lane_id == 5)
      group_barrier();
    else
      shuffle_xor(1.0f, 1);
  };
  EXPECT_THROW(emulator::dispatch({1, 1, 1}, 32, Order::forward, kernel), emulator::Error);
}

TEST(Emulator, CatchesOutOfBounds) {
  Buffer<float> in(std::vector<float>(64, 1.0f));
  auto out = Buffer<float>::output(64);
  Pointer<const float> x(in);
  Pointer<float> y(out);
  expect_caught(
      32, __LINE__, [=] { y[group_x * 32 + lane_id] = x[group_x * 32 + lane_id + 1]; },
      "outside a buffer of 64", __LINE__);
  expect_caught(
      32, __LINE__, [=] { (y + 40)[lane_id] = x[lane_id]; }, "outside a buffer of 64", __LINE__);
}

TEST(Emulator, CatchesTwoThreadsOfOneElement) {
  auto out = Buffer<float>::output(64);
  Pointer<float> y(out);
  expect_caught(
      32, __LINE__,
      [=] {
        y[lane_id] = 1.0f;  // both threadgroups
      },
      "also writes", __LINE__);
}

TEST(Emulator, CatchesReadingWhatAnotherThreadWrites) {
  auto out = Buffer<float>::output(64);
  Pointer<float> y(out);
  auto kernel = [=] {
    y[lane_id] = 1.0f;
    float v = y[(lane_id + 1) % 32];
    (void)v;
  };
  for (Order order : kOrders) {
    EXPECT_THROW(emulator::dispatch({1, 1, 1}, 32, order, kernel), emulator::Error);
  }
}

TEST(Emulator, CatchesUninitialisedThreadgroupMemory) {
  expect_caught(
      32, __LINE__,
      [] {
        SHARED_ARRAY(float, shared, 32);
        float v = shared[lane_id];
        (void)v;
      },
      "nobody wrote", __LINE__);
}

TEST(Emulator, ThreadgroupMemoryDoesNotOutliveItsGroup) {
  expect_caught(
      32, __LINE__,
      [] {
        SHARED_ARRAY(float, shared, 32);
        if (group_x == emulator::group_position().y) shared[lane_id] = 1.0f;
        float v = shared[lane_id];
        (void)v;
      },
      "nobody wrote", __LINE__);
}

TEST(Emulator, CatchesTooMuchThreadgroupMemory) {
  expect_caught(
      32, __LINE__,
      [] {
        SHARED_ARRAY(float, a, 8000);
        SHARED_ARRAY(float, b, 200);
        (void)a;
        (void)b;
      },
      "limit 32768", __LINE__);
}

TEST(Emulator, CatchesAMisalignedVectorLoad) {
  Buffer<uint> in(std::vector<uint>(64, 1u));
  Pointer<const uint> x(in);
  expect_caught(
      32, __LINE__, [=] { load_words<2>(x, lane_id); }, "misaligned", __LINE__);
}

TEST(Emulator, CountsElementsThatNobodyWrote) {
  auto out = Buffer<float>::output(64);
  Pointer<float> y(out);
  emulator::dispatch({1, 1, 1}, 32, Order::forward, [=] { y[lane_id] = 0.0f; });
  EXPECT_EQ(out.unwritten(), 32u);
  EXPECT_TRUE(std::isnan(out.values()[40]));
}

}  // namespace
