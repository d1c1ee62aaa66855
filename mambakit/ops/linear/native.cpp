// Matrix times a few vectors, for decoding: y = x W^T + bias for 1 to 16 rows of x, bound by reading W once.
//
// Activations and sums are float32; weights are float32, bfloat16, int8 or int4 and are widened in registers, so half and
// quantised weights are as fast on processors without instructions for them. Every (row of x, row of W) pair is summed in
// the same order whatever the batch, so a row's bits do not depend on its neighbours.
#include "parallel.h"
#include "simd.h"

namespace {

constexpr int kRows = 4;              // rows of W at a time: independent sums that hide the latency of an addition
constexpr int kAhead = 4;             // rows of W between a prefetch and its use
constexpr int64_t kBlock = 128;       // int4: columns of a block, 16 words of 8 nibbles; see api.py
constexpr int64_t kWords = 16;
constexpr int64_t kItemBytes = 1 << 16;  // of W per work item

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

// Nibble s of each word, as a signed number.
inline V nibbles(I words, int s) {
#if defined(__AVX512F__)
  const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  return (V)_mm512_permutexvar_ps((__m512i)((U)words >> (4 * s)), values);  // reads the low four bits of each index
#else
  return __builtin_convertvector((I)((U)words << (28 - 4 * s)) >> 28, V);
#endif
}

// sums[r][b] += columns [begin, end) of R rows of W (a row apart: `stride`) times B rows of x.
template <class T, int R, int B>
inline void multiply(const T* w, int64_t stride, const float* x, int64_t x_stride, int64_t begin, int64_t end,
                     V (&sums)[R][B]) {
  const int64_t whole = begin + (end - begin) / W * W;
  for (int64_t i = begin; i < whole; i += W) {
    V values[B];
    for (int b = 0; b < B; ++b) values[b] = load(x + b * x_stride + i);
    for (int r = 0; r < R; ++r) {
      // The rows that come next: they are too short for the processor's own prefetcher to settle on.
      __builtin_prefetch(w + (r + kAhead) * stride + i);
      V weights = load(w + r * stride + i);
      for (int b = 0; b < B; ++b) sums[r][b] += weights * values[b];
    }
  }
  if (whole == end) return;
  for (int r = 0; r < R; ++r) {
    V weights = load(w + r * stride + whole, end - whole);
    for (int b = 0; b < B; ++b) sums[r][b] += weights * load(x + b * x_stride + whole, end - whole);
  }
}

// How many rows of W go with B rows of x: sums (twice, where there are groups) and operands must fit the registers.
constexpr int rows_with(int b, bool groups) {
  return b == 1 ? kRows : (W == 16 && !groups) || b == 2 ? 2 * (W == 16) + 2 : W == 16 ? 2 : 1;
}

struct Plain {
  static constexpr bool kGroups = false;
  template <class T, int R, int B>
  static void dot(const Arguments& a, const float* x, int64_t row, V (&sums)[R][B]) {
    multiply<T, R, B>(static_cast<const T*>(a.weight) + row * a.in, a.in, x, a.x_stride, 0, a.in, sums);
  }
};

struct Grouped {
  static constexpr bool kGroups = true;
  template <class T, int R, int B>
  static void dot(const Arguments& a, const float* x, int64_t row, V (&sums)[R][B]) {
    const int8_t* w = static_cast<const int8_t*>(a.weight) + row * a.in;
    const int64_t groups = ceil_div(a.in, a.group);
    for (int64_t g = 0; g < groups; ++g) {
      V part[R][B] = {};
      multiply<int8_t, R, B>(w, a.in, x, a.x_stride, g * a.group, min64(a.in, (g + 1) * a.group), part);
      for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) sums[r][b] += part[r][b] * a.scales[(row + r) * groups + g];
    }
  }
};

struct Nibbles {
  static constexpr bool kGroups = true;
  template <class T, int R, int B>
  static void dot(const Arguments& a, const float* x, int64_t row, V (&sums)[R][B]) {
    const int64_t blocks = ceil_div(a.in, kBlock), groups = blocks * (kBlock / a.group);
    const int per_group = static_cast<int>(a.group / kWords);  // nibbles of a word in one group
    const int32_t* w = static_cast<const int32_t*>(a.weight) + row * blocks * kWords;
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t lane = 0; lane < kWords; lane += W) {
        I words[R];
        for (int r = 0; r < R; ++r) {
          const int32_t* block_words = w + (r * blocks + block) * kWords + lane;
          __builtin_prefetch(block_words + kAhead * blocks * kWords);
          memcpy(&words[r], block_words, sizeof(I));
        }
        for (int first = 0; first < 8; first += per_group) {
          V part[R][B] = {};
          for (int s = first; s < first + per_group; ++s) {
            const int64_t i = block * kBlock + s * kWords + lane;
            V values[B];
            if (i + W <= a.in)
              for (int b = 0; b < B; ++b) values[b] = load(x + b * a.x_stride + i);
            else
              for (int b = 0; b < B; ++b)
                values[b] = i < a.in ? load(x + b * a.x_stride + i, a.in - i) : splat(0.0f);
            for (int r = 0; r < R; ++r) {
              V weights = nibbles(words[r], s);
              for (int b = 0; b < B; ++b) part[r][b] += weights * values[b];
            }
          }
          const int64_t g = block * (kBlock / a.group) + first / per_group;
          for (int r = 0; r < R; ++r)
            for (int b = 0; b < B; ++b) sums[r][b] += part[r][b] * a.scales[(row + r) * groups + g];
        }
      }
  }
};

template <class Kind, class T, int R, int B>
void rows_times(const Arguments& a, int64_t row, int64_t b0) {
  V sums[R][B] = {};
  Kind::template dot<T, R, B>(a, a.x + b0 * a.x_stride, row, sums);
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r)
      a.y[(b0 + b) * a.y_stride + row + r] = sum(sums[r][b]) + (a.bias ? a.bias[row + r] : 0.0f);
}

// Rows [row, end) of W, at most kRows, times B rows of x.
template <class Kind, class T, int B>
void some_of_x(const Arguments& a, int64_t row, int64_t end, int64_t b0) {
  constexpr int R = rows_with(B, Kind::kGroups);
  for (; row + R <= end; row += R) rows_times<Kind, T, R, B>(a, row, b0);
  for (; row < end; ++row) rows_times<Kind, T, 1, B>(a, row, b0);
}

template <class Kind, class T>
void all_of_x(const Arguments& a, int64_t row, int64_t end) {
  int64_t b = 0;
  for (; b + 4 <= a.b; b += 4) some_of_x<Kind, T, 4>(a, row, end, b);
  for (; b + 2 <= a.b; b += 2) some_of_x<Kind, T, 2>(a, row, end, b);
  if (b < a.b) some_of_x<Kind, T, 1>(a, row, end, b);
}

template <class Kind, class T>
int run(const Arguments& a, int64_t row_bytes) {
  const int64_t most = ceil_div(kItemBytes, row_bytes > 0 ? row_bytes : 1), fair = ceil_div(a.out, 4 * a.threads);
  const int64_t rows = ceil_div(min64(most, fair), kRows) * kRows;
  return for_each(ceil_div(a.out, rows), a.threads, 0, [&](int64_t item, float*) {
    const int64_t end = min64(a.out, (item + 1) * rows);
    for (int64_t row = item * rows; row < end; row += kRows) all_of_x<Kind, T>(a, row, min64(end, row + kRows));
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
