// Which vectors go through which expert: the slots of a routing, sorted by expert.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace moefuse::cpu {

// Slots (one row's one expert) that share an expert, neighbours in the sorted order: their vectors
// go through the expert's weights in one pass.
struct Group {
  uint32_t expert;
  int begin, end;
};

struct Slots {
  std::vector<int> order;     // slot at each sorted position
  std::vector<int> position;  // sorted position of each slot
  std::vector<Group> groups;

  Slots() = default;
  Slots(const uint32_t* expert, int n) { assign(expert, n); }

  void assign(const uint32_t* expert, int n) {
    order.resize(n);
    position.resize(n);
    groups.clear();
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [=](int a, int b) { return expert[a] < expert[b]; });
    for (int p = 0; p < n; ++p) {
      position[order[p]] = p;
      if (p == 0 || expert[order[p]] != groups.back().expert)
        groups.push_back({expert[order[p]], p, p});
      groups.back().end = p + 1;
    }
  }
};

}  // namespace moefuse::cpu
