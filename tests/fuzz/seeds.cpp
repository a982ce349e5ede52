// Writes every planted corruption into the folder of its argument, as inputs of fuzz_load.
#include <filesystem>
#include <fstream>

#include "corruptions.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  std::filesystem::create_directories(argv[1]);
  for (const auto& c : moefuse::test::corruptions()) {
    std::ofstream file(std::filesystem::path(argv[1]) / (c.kind + std::string("_") + c.name),
                       std::ios::binary);
    if (!(file << c.kind << c.bytes)) return 1;
  }
}
