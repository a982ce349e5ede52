// Sampling by many blocks where MLX has one for a row. Comes after moe_router.h and
// tensor_dialect.h.
#pragma once

// Of all lanes the largest key and its place, the lowest of equal ones.
FUNC void first_of_largest(uint& top, uint& place) {
  uint largest = lane_max(top);
  place = ~lane_max(top == largest ? ~place : 0u);
  top = largest;
}
// Both of them to place `at`.
template <typename P>
FUNC void put_first_of_largest(uint top, uint place, P tops, P places, uint at, uint lane) {
  first_of_largest(top, place);
  if (lane == 0u) {
    tops[at] = top;
    places[at] = place;
  }
}
