// Matrix times a few vectors, for decoding: y = x W^T + bias for 1 to 16 rows of x, bound by reading W once.
//
// Activations and sums are float32; weights are float32, bfloat16, int8 or int4 and are widened in registers, so half and
// quantised weights are as fast on processors without instructions for them. Every (row of x, row of W) pair is summed in
// the same order whatever the batch, so a row's bits do not depend on its neighbours.
#include "parallel.h"
#include "simd.h"

namespace {

constexpr int kSums = 4;              // independent sums per row of W: they hide the latency of an addition
constexpr int64_t kAhead = 512;      // bytes between a prefetch and its use
constexpr int64_t kBlock = 128;       // int4: columns of a block, 16 words of 8 nibbles; see api.py
constexpr int64_t kWords = 16;
constexpr int64_t kItemBytes = 128 << 10;  // of W per work item; a thread reads item after item

struct Arguments {
  const float* x;
  const void* weight;
  const float *scales, *bias;
  float* y;
  int64_t b, in, out, group, threads, x_stride, y_stride;
};

inline V load(const int8_t* p) {
#if defined(__AVX512F__)
  return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  I numbers;
  for (int i = 0; i < W; ++i) numbers[i] = p[i];
  return __builtin_convertvector(numbers, V);
#endif
}
inline V load(const int8_t* p, int64_t count) {
  if (count >= W) return load(p);
  int8_t lanes[W];
  memset(lanes, 0, sizeof lanes);
  memcpy(lanes, p, count);
  return load(lanes);
}

// Nibbles s (low) and s + 4 (high) of each word, as signed numbers.
inline void nibbles(I words, int s, V& low, V& high) {
#if defined(__AVX512F__)
  // One lookup for both: each half of a word picks, by its low four bits, a bfloat16.
  const __m512i values = _mm512_set_epi16(
      -16512, -16384, -16320, -16256, -16224, -16192, -16160, -16128, 16608, 16576, 16544, 16512, 16448, 16384, 16256, 0,
      -16512, -16384, -16320, -16256, -16224, -16192, -16160, -16128, 16608, 16576, 16544, 16512, 16448, 16384, 16256, 0);
  const U pairs = (U)_mm512_permutexvar_epi16((__m512i)((U)words >> (4 * s)), values);
  low = (V)(pairs << 16);
  high = (V)(pairs & 0xffff0000u);
#else
  low = __builtin_convertvector((I)((U)words << (28 - 4 * s)) >> 28, V);
  high = __builtin_convertvector((I)((U)words << (12 - 4 * s)) >> 28, V);
#endif
}

template <class T>
inline void prefetch(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead);
}

// A dot product of each kind adds columns in one order, whatever the number of rows of x.
struct Plain {
  template <class T, int B>
  static inline void dot(const Arguments& a, const float* x, int64_t row, V (&total)[B]) {
    const T* w = static_cast<const T*>(a.weight) + row * a.in;
    V sums[kSums][B] = {};
    int64_t i = 0;
    for (; i + kSums * W <= a.in; i += kSums * W)
      for (int u = 0; u < kSums; ++u) {
        if (u * W * sizeof(T) % 64 == 0) prefetch(w + i + u * W);
        V weights = load(w + i + u * W);
        for (int b = 0; b < B; ++b)
          sums[u][b] = multiply_add(weights, load(x + b * a.x_stride + i + u * W), sums[u][b]);
      }
    for (; i < a.in; i += W) {
      V weights = load(w + i, a.in - i);
      for (int b = 0; b < B; ++b)
        sums[0][b] = multiply_add(weights, load(x + b * a.x_stride + i, a.in - i), sums[0][b]);
    }
    for (int b = 0; b < B; ++b) total[b] = (sums[0][b] + sums[1][b]) + (sums[2][b] + sums[3][b]);
  }
};

struct Grouped {
  // PerGroup: vectors in a group.
  template <int PerGroup, int B>
  static inline void row_dot(const Arguments& a, const float* x, int64_t row, V (&total)[B]) {
    constexpr int64_t kGroup = PerGroup * W;
    const int8_t* w = static_cast<const int8_t*>(a.weight) + row * a.in;
    const int64_t groups = ceil_div(a.in, kGroup), full = a.in / kGroup;
    const float* scales = a.scales + row * groups;
    for (int64_t g = 0; g < full; ++g) {
      V part[B] = {};
      prefetch(w + g * kGroup);
#pragma GCC unroll 16
      for (int i = 0; i < PerGroup; ++i) {
        V weights = load(w + g * kGroup + i * W);
        for (int b = 0; b < B; ++b) part[b] = multiply_add(weights, load(x + b * a.x_stride + g * kGroup + i * W), part[b]);
      }
      for (int b = 0; b < B; ++b) total[b] = multiply_add(part[b], splat(scales[g]), total[b]);
    }
    if (full == groups) return;
    V part[B] = {};
    for (int64_t i = full * kGroup; i < a.in; i += W) {
      V weights = load(w + i, a.in - i);
      for (int b = 0; b < B; ++b) part[b] = multiply_add(weights, load(x + b * a.x_stride + i, a.in - i), part[b]);
    }
    for (int b = 0; b < B; ++b) total[b] = multiply_add(part[b], splat(scales[full]), total[b]);
  }
  template <class T, int B>
  static inline void dot(const Arguments& a, const float* x, int64_t row, V (&total)[B]) {
    if (a.group == 64) return row_dot<64 / W>(a, x, row, total);
    if (a.group == 32) return row_dot<32 / W>(a, x, row, total);
    return row_dot<128 / W>(a, x, row, total);
  }
};

struct Nibbles {
  // PerGroup: nibbles of a word in one group.
  template <int PerGroup, bool Whole, int B>
  static inline void block_dot(const Arguments& a, const float* x, const int32_t* block, const float* scales,
                               int64_t column, V (&total)[B]) {
    auto values = [&](int b, int64_t i) {
      const float* numbers = x + b * a.x_stride + i;
      return Whole ? load(numbers) : i < a.in ? load(numbers, a.in - i) : splat(0.0f);
    };
    for (int64_t lane = 0; lane < kWords; lane += W) {
      I words;
      memcpy(&words, block + lane, sizeof(I));
      V parts[8 / PerGroup][B] = {};
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        const int64_t i = column + s * kWords + lane;
        V low, high;
        nibbles(words, s, low, high);
        for (int b = 0; b < B; ++b) {
          V& first = parts[s / PerGroup][b];
          first = multiply_add(low, values(b, i), first);
          V& second = parts[(s + 4) / PerGroup][b];
          second = multiply_add(high, values(b, i + 4 * kWords), second);
        }
      }
      for (int g = 0; g < 8 / PerGroup; ++g)
        for (int b = 0; b < B; ++b) total[b] = multiply_add(parts[g][b], splat(scales[g]), total[b]);
    }
  }
  template <int PerGroup, int B>
  static inline void row_dot(const Arguments& a, const float* x, int64_t row, V (&total)[B]) {
    constexpr int64_t kGroups = 8 / PerGroup;  // of a block
    const int64_t blocks = ceil_div(a.in, kBlock), full = a.in / kBlock;
    const int32_t* w = static_cast<const int32_t*>(a.weight) + row * blocks * kWords;
    const float* scales = a.scales + row * blocks * kGroups;
    for (int64_t i = 0; i < full; ++i) {
      prefetch(w + i * kWords);
      block_dot<PerGroup, true>(a, x, w + i * kWords, scales + i * kGroups, i * kBlock, total);
    }
    if (full < blocks)
      block_dot<PerGroup, false>(a, x, w + full * kWords, scales + full * kGroups, full * kBlock, total);
  }
  template <class T, int B>
  static inline void dot(const Arguments& a, const float* x, int64_t row, V (&total)[B]) {
    if (a.group == 64) return row_dot<4>(a, x, row, total);
    if (a.group == 32) return row_dot<2>(a, x, row, total);
    return row_dot<8>(a, x, row, total);
  }
};

template <class Kind, class T, int B>
inline void row_times(const Arguments& a, int64_t row, int64_t b0) {
  V total[B] = {};
  Kind::template dot<T>(a, a.x + b0 * a.x_stride, row, total);
  const float bias = a.bias ? a.bias[row] : 0.0f;
  for (int b = 0; b < B; ++b) a.y[(b0 + b) * a.y_stride + row] = sum(total[b]) + bias;
}

// Rows [row, end) of W times all of x. Sums, operands and the weight must fit the registers.
template <class Kind, class T>
void multiply(const Arguments& a, int64_t row, int64_t end) {
  for (; row < end; ++row) {
    int64_t b = 0;
    if (W == 16)
      for (; b + 4 <= a.b; b += 4) row_times<Kind, T, 4>(a, row, b);
    for (; b + 2 <= a.b; b += 2) row_times<Kind, T, 2>(a, row, b);
    if (b < a.b) row_times<Kind, T, 1>(a, row, b);
  }
}

template <class Kind, class T>
int run(const Arguments& a, int64_t row_bytes) {
  const int64_t most = ceil_div(kItemBytes, row_bytes > 0 ? row_bytes : 1);
  const int64_t rows = min64(most, ceil_div(a.out, 4 * a.threads));
  return for_each(ceil_div(a.out, rows), a.threads, 0, [&](int64_t item, float*) {
    multiply<Kind, T>(a, item * rows, min64(a.out, (item + 1) * rows));
  });
}

}  // namespace

// kind: 0 float32, 1 bfloat16, 2 int8, 3 int4
MAMBAKIT_EXPORT(linear)(const Arguments* a, int64_t kind) {
  if (a->out == 0) return 0;
  switch (kind) {
    case 0: return run<Plain, float>(*a, a->in * 4);
    case 1: return run<Plain, bfloat16>(*a, a->in * 2);
    case 2: return run<Grouped, int8_t>(*a, a->in);
    default: return run<Nibbles, int32_t>(*a, a->in / 2);
  }
}
