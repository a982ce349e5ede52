// Sampling by many blocks where MLX has one for a row. Comes after moe_router.h.
#pragma once

// Of all lanes the largest key and its place, the lowest of equal ones.
FUNC void first_of_largest(uint& top, uint& place) {
  for (uint m = 1; m < 32u; m <<= 1) {
    uint other = shuffle_xor(top, m), there = shuffle_xor(place, m);
    bool better = other > top || (other == top && there < place);
    top = better ? other : top;
    place = better ? there : place;
  }
}
