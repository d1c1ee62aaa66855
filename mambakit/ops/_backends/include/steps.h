// Steps h -> decay h + input, one in each lane, composed in registers.
#pragma once

#include "simd.h"

namespace {

// Lane i of the result keeps `first` where bit S of i is clear; else it is the last of x's S lanes before those of i. With
// S below 4 no lane leaves its 128 bits, which costs some processors two instructions and eight cycles.
template <int S>
inline V from_before(V x, V first) {
#if defined(__clang__)
#define MAMBAKIT_BEFORE(i) (((i) & S) ? ((i) & ~(2 * S - 1)) + S - 1 : W + (i))
  return MAMBAKIT_PICK(x, first, MAMBAKIT_BEFORE);
#else
  I pick;
  for (int i = 0; i < W; ++i) pick[i] = (i & S) ? (i & ~(2 * S - 1)) + S - 1 : W + i;
  return __builtin_shuffle(x, first, pick);
#endif
}
inline V last_lane(V x) {
#if defined(__clang__)
#define MAMBAKIT_LAST(i) (W - 1 + 0 * (i))
  return MAMBAKIT_PICK(x, x, MAMBAKIT_LAST);
#else
  I pick;
  for (int i = 0; i < W; ++i) pick[i] = W - 1;
  return __builtin_shuffle(x, pick);
#endif
}
template <int S>
inline __attribute__((always_inline)) void compose_by(V& decay, V& input) {
  input = decay * from_before<S>(input, splat(0.0f)) + input;
  decay = decay * from_before<S>(decay, splat(1.0f));
}
// Lanes are steps h -> decay h + input, one after another; each becomes the step from before the first to after it.
inline __attribute__((always_inline)) void compose_steps(V& decay, V& input) {
  compose_by<1>(decay, input);
  compose_by<2>(decay, input);
#if MAMBAKIT_WIDTH >= 8
  compose_by<4>(decay, input);
#endif
#if MAMBAKIT_WIDTH >= 16
  compose_by<8>(decay, input);
#endif
}

}  // namespace
