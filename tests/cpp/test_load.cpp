// A checkpoint that will not fit is refused before a tensor is read.
#include <gtest/gtest.h>

#include <string>

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

}  // namespace
}  // namespace moefuse
