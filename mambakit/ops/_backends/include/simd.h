// Vectors of float for one instruction set, and the elementary functions the kernels need.
//
// A kernel file is compiled once per instruction set. Everything here is in an unnamed namespace: an inline function
// with external linkage would be merged across those objects by the linker, and AVX-512 code would run on any
// processor. For the same reason kernels use no standard library templates.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define MAMBAKIT_WIDTH 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define MAMBAKIT_WIDTH 8
#else
#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#define MAMBAKIT_WIDTH 4
#endif

#define MAMBAKIT_JOIN_(name, isa) name##_##isa
#define MAMBAKIT_JOIN(name, isa) MAMBAKIT_JOIN_(name, isa)
// The exported name of a kernel: one symbol per instruction set.
#if defined(_WIN32)
#define MAMBAKIT_EXPORT(name) extern "C" __declspec(dllexport) int MAMBAKIT_JOIN(name, MAMBAKIT_ISA)
#else
#define MAMBAKIT_EXPORT(name) extern "C" __attribute__((visibility("default"))) int MAMBAKIT_JOIN(name, MAMBAKIT_ISA)
#endif

namespace {

constexpr int W = MAMBAKIT_WIDTH;
typedef float V __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));
typedef uint32_t U __attribute__((vector_size(W * 4)));
typedef uint16_t H __attribute__((vector_size(W * 2)));
typedef float UnalignedV __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t UnalignedH __attribute__((vector_size(W * 2), aligned(2), may_alias));
struct bfloat16 {
  uint16_t bits;
};

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline V splat(float x) { return x - V{}; }
inline V as_float(U x) { return (V)x; }

// a b + c with the same bits wherever it is written: what the compiler contracts on its own differs from place to
// place.
inline V multiply_add(V a, V b, V c) {
#if defined(__AVX512F__)
  return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// -- memory -----------------------------------------------------------------------------------------------------------

inline V load(const float* p) { return *reinterpret_cast<const UnalignedV*>(p); }
inline void store(float* p, V x) { *reinterpret_cast<UnalignedV*>(p) = x; }
// GCC 12 makes a dozen instructions of __builtin_convertvector where these have one.
inline V widen(H x) {
#if defined(__AVX512F__)
  return as_float((U)_mm512_cvtepu16_epi32((__m256i)x) << 16);
#elif defined(__AVX2__)
  return as_float((U)_mm256_cvtepu16_epi32((__m128i)x) << 16);
#else
  return as_float(__builtin_convertvector(x, U) << 16);
#endif
}
inline V load(const bfloat16* p) { return widen(*reinterpret_cast<const UnalignedH*>(p)); }

// The bits of the bfloat16s, rounded to nearest even; a NaN stays one.
inline U half_bits(V x) {
  U bits = (U)x;
  U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  U quiet = (bits >> 16) | 0x40u;
  return x == x ? rounded : quiet;
}
inline H narrow(V x) {
  const U kept = half_bits(x);
#if defined(__AVX512F__)
  return (H)_mm512_cvtepi32_epi16((__m512i)kept);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)kept, (__m256i)kept);
  return (H)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8));
#else
  return __builtin_convertvector(kept, H);
#endif
}
inline void store(bfloat16* p, V x) { *reinterpret_cast<UnalignedH*>(p) = narrow(x); }

// The first `count` lanes; the others read as 0 and are not written. With AVX-512 of floats in one instruction: copying
// through the stack costs some 40 cycles a time.
#if defined(__AVX512F__)
inline __mmask16 lanes_below(int64_t count) {
  return static_cast<__mmask16>(count >= W ? 0xffff : (1 << (count > 0 ? count : 0)) - 1);
}
inline V load(const float* p, int64_t count) { return (V)_mm512_maskz_loadu_ps(lanes_below(count), p); }
inline void store(float* p, V x, int64_t count) { _mm512_mask_storeu_ps(p, lanes_below(count), (__m512)x); }
#endif
template <class T>
inline V load(const T* p, int64_t count) {
  if (count >= W) return load(p);
  T lanes[W];
  memset(lanes, 0, sizeof lanes);
  memcpy(lanes, p, sizeof(T) * count);
  return load(lanes);
}
template <class T>
inline void store(T* p, V x, int64_t count) {
  if (count >= W) return store(p, x);
  T lanes[W];
  store(lanes, x);
  memcpy(p, lanes, sizeof(T) * count);
}
inline V first_lanes(V x, int64_t count) {
  for (int64_t i = count; i < W; ++i) x[i] = 0.0f;
  return x;
}
inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
inline void from_float(float* p, float x) { *p = x; }
inline void from_float(bfloat16* p, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  p->bits = x == x ? (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : (uint16_t)((bits >> 16) | 0x40u);
}

// -- elementary functions ---------------------------------------------------------------------------------------------

// Adding this rounds a float below 2^22 to the nearest integer, which is then in the low bits.
constexpr float kRound = 12582912.0f;

// x held to [low, high]; a NaN passes (the instructions give their second operand where one is a NaN).
inline V clamp(V x, float low, float high) {
#if defined(__AVX512F__)
  return (V)_mm512_min_ps((__m512)splat(high), _mm512_max_ps((__m512)splat(low), (__m512)x));
#elif defined(__AVX2__)
  return (V)_mm256_min_ps((__m256)splat(high), _mm256_max_ps((__m256)splat(low), (__m256)x));
#else
  x = x < low ? splat(low) : x;  // comparisons with NaN are false
  return x > high ? splat(high) : x;
#endif
}

// The integer n nearest to a float, and p * 2^n for n in [-127, 128]: 0 at -127, infinity at 128.
#if defined(__AVX512F__)
struct Power {
  V n;
  explicit Power(V x) : n((V)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) {}
  V times(V p) const { return (V)_mm512_scalef_ps((__m512)p, (__m512)n); }
};
#else
struct Power {
  V shifted, n;  // n + 127 is in the low bits of `shifted`: moved up, they are the exponent of 2^n
  explicit Power(V x) : shifted(x + (kRound + 127.0f)), n(shifted - (kRound + 127.0f)) {}
  V times(V p) const { return p * (V)((I)shifted << 23); }
};
#endif

// 2^x. 2^0 is exactly 1 and the error near 0 is proportional to |x|: decays close to 1 compound over a row. At most 2
// ulp; results below 2^-126 may be 0, those above 2^127.5 may be infinite; NaN propagates.
inline V exp2(V x) {
  x = clamp(x, -127.0f, 128.0f);
  const Power power(x);
  V r = x - power.n;
  V q = r * 1.5353596508904872e-4f + 1.3398852870095195e-3f;  // (2^r - 1) / r on [-1/2, 1/2]
  q = q * r + 9.618436402608574e-3f;
  q = q * r + 5.550332543371924e-2f;
  q = q * r + 2.4022647922954535e-1f;
  q = q * r + 6.931472028029229e-1f;
  return power.times(q * r + 1.0f);
}
constexpr float kLog2e = 1.44269504088896340736f;

// e^x to 2 ulp for any x: the reduction is in two parts (the high one has few bits, so its product with n is exact).
inline V exp(V x) {
  x = clamp(x, -88.02f, 88.8f);
  const Power power(x * kLog2e);
  V r = (x - power.n * 0.693359375f) - power.n * -2.12194440e-4f;
  V q = r * 1.3843950178940056e-3f + 8.374143680791682e-3f;  // (e^r - 1) / r
  q = q * r + 4.166799657204545e-2f;
  q = q * r + 1.6666431487262137e-1f;
  q = q * r + 4.9999994233817396e-1f;
  q = q * r + 1.0000000320739837f;
  return power.times(q * r + 1.0f);
}

// log(1 + e) for e in [0, 1], relative error below 3e-7: log1p(e) = 2 atanh(e / (2 + e)).
inline V log1p_unit(V e) {
  V s = e / (e + 2.0f);
  V s2 = s * s;
  V p = s2 * 1.2206525068580285e-1f + 1.0696627820486528e-1f;  // atanh(s) / s in s^2
  p = p * s2 + 1.4310360810803757e-1f;
  p = p * s2 + 1.99993454611468e-1f;
  p = p * s2 + 3.3333339653584304e-1f;
  p = p * s2 + 1.0f;
  return (s + s) * p;
}
inline V abs(V x) { return as_float((U)x & 0x7fffffffu); }

// log(1 + e^x) without overflow and without losing very negative x, where it is e^x.
inline V softplus(V x) {
  V positive = x > 0.0f ? x : splat(0.0f);
  return positive + log1p_unit(exp(-abs(x)));
}
inline V sigmoid(V x) { return 1.0f / (exp(-x) + 1.0f); }
inline V silu(V x) { return x / (exp(-x) + 1.0f); }

// -- sums over lanes --------------------------------------------------------------------------------------------------

#if defined(__clang__)
#define MAMBAKIT_PICK(a, b, f)                                                                             \
  __builtin_shufflevector(a, b, f(0), f(1), f(2), f(3) MAMBAKIT_PICK_REST(f))
#if MAMBAKIT_WIDTH == 16
#define MAMBAKIT_PICK_REST(f) , f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#elif MAMBAKIT_WIDTH == 8
#define MAMBAKIT_PICK_REST(f) , f(4), f(5), f(6), f(7)
#else
#define MAMBAKIT_PICK_REST(f)
#endif
#endif

// Lane i of the result keeps a's lane where bit S of i is clear, else b's; to it is added its neighbour i ^ S.
template <int S>
inline V fold(V a, V b) {
#if defined(__clang__)
#define MAMBAKIT_KEEP(i) ((i) + (((i) & S) ? W : 0))
#define MAMBAKIT_SWAP(i) (((i) ^ S) + (((i) & S) ? W : 0))
  return MAMBAKIT_PICK(a, b, MAMBAKIT_KEEP) + MAMBAKIT_PICK(a, b, MAMBAKIT_SWAP);
#else
  I keep, swap;
  for (int i = 0; i < W; ++i) {
    keep[i] = i + ((i & S) ? W : 0);
    swap[i] = (i ^ S) + ((i & S) ? W : 0);
  }
  return __builtin_shuffle(a, b, keep) + __builtin_shuffle(a, b, swap);
#endif
}

// The W sums of W vectors, one per lane.
inline V sums(const V* v) {
  V a[W / 2];
  for (int i = 0; i < W / 2; ++i) a[i] = fold<1>(v[2 * i], v[2 * i + 1]);
  for (int i = 0; i < W / 4; ++i) a[i] = fold<2>(a[2 * i], a[2 * i + 1]);
#if MAMBAKIT_WIDTH >= 8
  for (int i = 0; i < W / 8; ++i) a[i] = fold<4>(a[2 * i], a[2 * i + 1]);
#endif
#if MAMBAKIT_WIDTH >= 16
  a[0] = fold<8>(a[0], a[1]);
#endif
  return a[0];
}
inline float sum(V x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  for (int s = W / 2; s > 0; s /= 2)
    for (int i = 0; i < s; ++i) x[i] += x[i + s];
  return x[0];
#endif
}

// -- transposition ----------------------------------------------------------------------------------------------------

// Lane i of the result is a's where bit S of i is clear, else b's lane i - S.
template <int S>
inline V upper_from(V a, V b) {
#if defined(__clang__)
#define MAMBAKIT_LOW(i) (((i) & S) ? W + (i) - S : (i))
  return MAMBAKIT_PICK(a, b, MAMBAKIT_LOW);
#else
  I pick;
  for (int i = 0; i < W; ++i) pick[i] = (i & S) ? W + i - S : i;
  return __builtin_shuffle(a, b, pick);
#endif
}
// Lane i of the result is b's where bit S of i is set, else a's lane i + S.
template <int S>
inline V lower_from(V a, V b) {
#if defined(__clang__)
#define MAMBAKIT_HIGH(i) (((i) & S) ? W + (i) : (i) + S)
  return MAMBAKIT_PICK(a, b, MAMBAKIT_HIGH);
#else
  I pick;
  for (int i = 0; i < W; ++i) pick[i] = (i & S) ? W + i : i + S;
  return __builtin_shuffle(a, b, pick);
#endif
}
template <int S>
inline __attribute__((always_inline)) void transpose_by(V* v) {
  for (int i = 0; i < W; ++i) {
    if (i & S) continue;
    const V a = v[i], b = v[i + S];
    v[i] = upper_from<S>(a, b);
    v[i + S] = lower_from<S>(a, b);
  }
}
// W vectors as the rows of a matrix become its columns.
inline __attribute__((always_inline)) void transpose(V* v) {
  transpose_by<1>(v);
  transpose_by<2>(v);
#if MAMBAKIT_WIDTH >= 8
  transpose_by<4>(v);
#endif
#if MAMBAKIT_WIDTH >= 16
  transpose_by<8>(v);
#endif
}

}  // namespace
