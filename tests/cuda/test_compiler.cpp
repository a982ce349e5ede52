// What NVRTC compiled is found again, and nothing else is; where NVRTC is, with the real one.
#include "cuda/compiler.h"

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "../metal/true_shapes.h"
#include "collect_calls.h"
#include "cuda/replay.h"

namespace fs = std::filesystem;
using moefuse::cuda::code_folder;
using moefuse::cuda::CodeFiles;
using moefuse::cuda::machine_code;

namespace {

class Compiler : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string made = (fs::temp_directory_path() / "moefuse.XXXXXX").string();
    ASSERT_NE(mkdtemp(made.data()), nullptr);
    folder_ = made;
  }
  void TearDown() override {
    unsetenv("MOEFUSE_CUDA_CACHE");
    fs::remove_all(folder_);
  }
  std::vector<fs::path> files() const {
    std::vector<fs::path> found;
    for (const auto& entry : fs::directory_iterator(folder_)) found.push_back(entry.path());
    return found;
  }
  fs::path folder_;
};

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write(const fs::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

// Text of every byte, as code is.
std::string code(int seed) {
  std::string text;
  for (int i = 0; i < 1000; ++i) text += static_cast<char>(i * 7 + seed);
  return text;
}

TEST_F(Compiler, WhatWasKeptIsFoundUnderItsKeyAlone) {
  const CodeFiles kept(folder_ / "not yet there");
  kept.keep("one\nkey", code(1));
  kept.keep("another", code(2));
  EXPECT_EQ(CodeFiles(folder_ / "not yet there").find("one\nkey"), code(1));
  EXPECT_EQ(kept.find("another"), code(2));
  EXPECT_EQ(kept.find("a third"), std::nullopt);
  kept.keep("another", code(3));
  EXPECT_EQ(kept.find("another"), code(3));
}

// Two keys of one hash would have one file: its own key decides.
TEST_F(Compiler, AFileOfAnotherKeyIsNotTaken) {
  const CodeFiles kept(folder_);
  kept.keep("first ", code(1));
  const fs::path of_first = files().at(0);
  kept.keep("second", code(2));
  for (const fs::path& path : files())
    if (path != of_first) fs::copy_file(path, of_first, fs::copy_options::overwrite_existing);
  EXPECT_EQ(kept.find("first "), std::nullopt);
  EXPECT_EQ(kept.find("second"), code(2));
}

TEST_F(Compiler, ADamagedFileIsNotTaken) {
  const CodeFiles kept(folder_);
  kept.keep("key", code(1));
  const fs::path path = files().at(0);
  const std::string whole = read(path);
  for (size_t length = 0; length < whole.size(); ++length) {
    write(path, whole.substr(0, length));
    ASSERT_EQ(kept.find("key"), std::nullopt) << "cut to " << length << " bytes";
  }
  for (size_t at = 0; at < whole.size(); ++at) {
    std::string changed = whole;
    changed[at] ^= 1;
    write(path, changed);
    ASSERT_EQ(kept.find("key"), std::nullopt) << "byte " << at << " changed";
  }
  write(path, whole + "more");
  EXPECT_EQ(kept.find("key"), std::nullopt);
  write(path, whole);
  EXPECT_EQ(kept.find("key"), code(1));
}

TEST_F(Compiler, AFolderThatCannotBeIsNoError) {
  write(folder_ / "file", "");
  for (const CodeFiles& kept : {CodeFiles(folder_ / "file" / "folder"), CodeFiles({})}) {
    kept.keep("key", code(1));
    EXPECT_EQ(kept.find("key"), std::nullopt);
  }
}

TEST_F(Compiler, TheLeastRecentlyUsedMakeRoom) {
  const CodeFiles kept(folder_);
  const auto age = [&] {  // every file so far, by an hour
    for (const fs::path& path : files())
      fs::last_write_time(path, fs::last_write_time(path) - std::chrono::hours(1));
  };
  write(folder_ / "0123456789abcdef.code.12.0", "a draft whose writer was stopped");
  age();
  for (int i = 0; i < CodeFiles::kMost; ++i) {
    kept.keep(std::to_string(i), code(i));
    age();
  }
  write(folder_ / "somebody's.txt", "not ours");
  EXPECT_EQ(kept.find("0"), code(0));  // used again: "1" is the oldest now
  kept.keep("new", code(0));
  EXPECT_EQ(kept.find("1"), std::nullopt);
  for (const char* key : {"0", "2", "new"}) EXPECT_NE(kept.find(key), std::nullopt) << key;
  EXPECT_EQ(files().size(), CodeFiles::kMost + 1u);
}

TEST_F(Compiler, WritersOfOneKeyLeaveAWholeFile) {
  std::vector<std::thread> writers;
  for (int t = 0; t < 4; ++t)
    writers.emplace_back([&] {
      for (int i = 0; i < 50; ++i) CodeFiles(folder_).keep("key", code(1));
    });
  for (std::thread& writer : writers) writer.join();
  EXPECT_EQ(CodeFiles(folder_).find("key"), code(1));
  EXPECT_EQ(files().size(), 1u) << "drafts were left";
}

TEST_F(Compiler, TheFolderIsTheUsersWish) {
  const auto with = [](const char* own, const char* caches, const char* home) {
    setenv("XDG_CACHE_HOME", caches, 1);
    setenv("HOME", home, 1);
    own ? setenv("MOEFUSE_CUDA_CACHE", own, 1) : unsetenv("MOEFUSE_CUDA_CACHE");
    return code_folder().string();
  };
  const std::string home = std::getenv("HOME") ? std::getenv("HOME") : "";
  EXPECT_EQ(with("/own", "/caches", "/home"), "/own");
  EXPECT_EQ(with("", "/caches", "/home"), "");
  EXPECT_EQ(with(nullptr, "/caches", "/home"), "/caches/moefuse/cuda");
  EXPECT_EQ(with(nullptr, "", "/home"), "/home/.cache/moefuse/cuda");
  EXPECT_EQ(with(nullptr, "", ""), "");
  setenv("HOME", home.c_str(), 1);
}

class Nvrtc : public Compiler {
 protected:
  void SetUp() override {
    Compiler::SetUp();
    if (!dlopen("libnvrtc.so.13", RTLD_NOW) && !dlopen("libnvrtc.so.12", RTLD_NOW))
      GTEST_SKIP() << "no NVRTC on this machine";
    setenv("MOEFUSE_CUDA_CACHE", folder_.c_str(), 1);
  }
};

const char* const kSource = R"(extern "C" __global__ void f(float* x) { x[threadIdx.x] = 1.0f; })";

TEST_F(Nvrtc, IsAskedOnceForASourceAndADevice) {
  const std::string built = machine_code(kSource, 90);
  EXPECT_EQ(built.substr(1, 3), "ELF");
  ASSERT_EQ(files().size(), 1u);
  // What the second call gives is the file's: its code exchanged, under the same key.
  const std::string whole = read(files()[0]);
  const size_t line = whole.find('\n') + 1;
  CodeFiles(folder_).keep(whole.substr(line, whole.size() - line - built.size()), "exchanged");
  EXPECT_EQ(machine_code(kSource, 90), "exchanged");
  EXPECT_NE(machine_code(kSource, 80), "exchanged");
  EXPECT_EQ(files().size(), 2u);
  setenv("MOEFUSE_CUDA_CACHE", "", 1);
  EXPECT_EQ(machine_code(kSource, 90), built);
}

TEST_F(Nvrtc, SaysWhatItDoesNotUnderstandAndNothingIsKept) {
  try {
    machine_code("__global__ void f() { no_such_name(); }", 90);
    FAIL() << "no error";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("no_such_name"), std::string::npos) << error.what();
  }
  EXPECT_TRUE(files().empty());
}

// With the options that a GPU's machine gives it.
TEST_F(Nvrtc, CompilesAWholeStep) {
  const moefuse::Plan plan = moefuse::make_plan(true_shapes::qwen().model);
  const std::string source = moefuse::cuda::source_of(calls_of(plan, 1, 1));
  EXPECT_EQ(machine_code(source, 90).substr(1, 3), "ELF");
}

}  // namespace
