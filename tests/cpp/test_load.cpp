// What is wrong with a checkpoint is said by name, before a tensor is read.
#include <gtest/gtest.h>

#if defined(__unix__)
#include <sys/stat.h>
#endif

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include "corruptions.h"
#include "model/safetensors.h"
#include "moefuse/model.h"

namespace moefuse {
namespace {

std::string refusal(uint64_t weight_bytes, std::optional<uint64_t> available) {
  try {
    check_memory("big", weight_bytes, available);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST(Load, RefusesWeightsThatDoNotFitWithBothNumbers) {
  const std::string said = refusal(2000, 2099);
  EXPECT_NE(said.find("[load] big: expected"), std::string::npos) << said;
  EXPECT_NE(said.find("2099 bytes of available"), std::string::npos) << said;
  EXPECT_NE(said.find("2100 bytes"), std::string::npos) << said;
  EXPECT_EQ(refusal(2000, 2100), "");
  EXPECT_EQ(refusal(uint64_t{1} << 60, std::nullopt), "");
}

#ifdef __linux__
TEST(Load, KnowsTheMemoryOfThisMachine) {
  ASSERT_TRUE(available_memory().has_value());
  EXPECT_GT(*available_memory(), uint64_t{16} << 20);
  EXPECT_NE(refusal(uint64_t{1} << 60, available_memory()), "");
}
#endif

namespace fs = std::filesystem;

// What `call` says when it throws std::invalid_argument; anything else that it throws fails.
template <class F>
std::string said_by(F&& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST(Load, EveryPlantedCorruptionGivesItsOwnError) {
  for (const test::Corruption& c : test::corruptions()) {
    const std::string said = said_by([&] {
      std::istringstream file(c.bytes);
      if (c.kind == 'c') parse_config(c.bytes);
      if (c.kind == 'i') index_files("index", c.bytes);
      if (c.kind == 's') check_safetensors("file", file, c.bytes.size());
    });
    EXPECT_EQ(said.empty(), !*c.error) << c.kind << " " << c.name << ": " << said;
    EXPECT_NE(said.find(c.error), std::string::npos) << c.kind << " " << c.name << ": " << said;
    EXPECT_LT(said.size(), 300u) << c.kind << " " << c.name;
  }
}

class LoadFolder : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() /
              ("moefuse load \xc3\xa9 " +
               std::to_string(testing::UnitTest::GetInstance()->random_seed()) + "-" +
               testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(folder_);
    fs::create_directories(folder_);
    write("config.json", test::config("qwen3_moe"));
    write("model.safetensors", test::tensor(R"("F32")", "[2]", "[0,8]"));
  }
  void TearDown() override { fs::remove_all(folder_); }
  void write(const std::string& name, const std::string& bytes) {
    std::ofstream(folder_ / name, std::ios::binary) << bytes;
  }
  std::string said() {
    return said_by([&] { load_model(folder_.string()); });
  }
  fs::path folder_;
};

TEST_F(LoadFolder, ReadsWhatIsRight) {
  const Model model = load_model(folder_.string());
  ASSERT_EQ(model.weights.count("a"), 1u);
  EXPECT_EQ(model.weights.at("a").shape(), (mx::Shape{2}));
}

TEST_F(LoadFolder, RefusesTheSameTensorInTwoFiles) {
  write("second.safetensors", test::tensor(R"("F32")", "[2]", "[0,8]"));
  EXPECT_NE(said().find("a: expected a tensor once"), std::string::npos) << said();
}

TEST_F(LoadFolder, RefusesAnIndexWhoseFileIsNotThere) {
  write("model.safetensors.index.json", R"({"weight_map":{"a":"gone.safetensors"}})");
  EXPECT_NE(said().find("gone.safetensors: expected a readable file"), std::string::npos) << said();
}

TEST_F(LoadFolder, RefusesFoldersInTheFilesPlaces) {
  for (const char* name : {"config.json", "model.safetensors"}) {
    fs::rename(folder_ / name, folder_ / "kept");
    fs::create_directory(folder_ / name);
    EXPECT_NE(said().find(std::string(name) + ": expected a readable file"), std::string::npos)
        << said();
    fs::remove(folder_ / name);
    fs::rename(folder_ / "kept", folder_ / name);
  }
}

#if defined(__unix__)
TEST_F(LoadFolder, DoesNotWaitForAPipe) {
  for (const char* name : {"config.json", "model.safetensors"}) {
    fs::rename(folder_ / name, folder_ / "kept");
    ASSERT_EQ(mkfifo((folder_ / name).c_str(), 0600), 0);
    EXPECT_NE(said().find(std::string(name) + ": expected a readable file"), std::string::npos)
        << said();
    fs::remove(folder_ / name);
    fs::rename(folder_ / "kept", folder_ / name);
  }
}

TEST_F(LoadFolder, RefusesLinksInACircle) {
  fs::create_symlink("model.safetensors.index.json", folder_ / "model.safetensors.index.json");
  EXPECT_NE(said().find("index.json: expected a readable file"), std::string::npos) << said();
}
#endif

}  // namespace
}  // namespace moefuse
