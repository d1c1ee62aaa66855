// What the packed formats share: vectors of 256 bits on every processor, so that sums have the same order on all of
// them.
#pragma once

#include "simd.h"

namespace {

typedef int16_t S16 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef float V8 __attribute__((vector_size(32)));

inline V8 multiply_add_lanes(V8 a, V8 b, V8 c) {
#if defined(__AVX2__)
  return (V8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  float32x4_t x[2], y[2], z[2];
  memcpy(x, &a, sizeof a);
  memcpy(y, &b, sizeof b);
  memcpy(z, &c, sizeof c);
  for (int i = 0; i < 2; ++i) z[i] = vfmaq_f32(z[i], x[i], y[i]);
  memcpy(&c, z, sizeof c);
  return c;
#else
  return a * b + c;
#endif
}
inline V8 multiply_add(V8 a, float b, V8 c) {
#if defined(__AVX2__)
  return (V8)_mm256_fmadd_ps((__m256)a, _mm256_set1_ps(b), (__m256)c);
#else
  return multiply_add_lanes(a, V8{} + b, c);
#endif
}
// The first `count` of eight numbers, and zeros.
inline V8 load8(const float* p, int64_t count) {
  V8 lanes = {};
  memcpy(&lanes, p, count >= 8 ? sizeof lanes : sizeof(float) * (count > 0 ? count : 0));
  return lanes;
}
inline float sum_lanes(V8 x) {
#if defined(__AVX2__)
  const __m128 fours = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  const __m128 twos = _mm_add_ps(fours, _mm_movehl_ps(fours, fours));
  return _mm_cvtss_f32(_mm_add_ss(twos, _mm_movehdup_ps(twos)));
#else
  float lanes[8];
  memcpy(lanes, &x, sizeof lanes);
  for (int s = 4; s > 0; s /= 2)
    for (int i = 0; i < s; ++i) lanes[i] += lanes[i + s];
  return lanes[0];
#endif
}

}  // namespace
