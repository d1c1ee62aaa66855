// float32 in 28 bits and bfloat16 in 12, without loss; the layout is in api.py.
#pragma once

#include "product.h"
#include "vectors256.h"

namespace {

constexpr int64_t kBlock = 64;  // columns
constexpr int64_t kTable = 16;  // bytes at the start of a row: what a nibble stands for
template <bool Wide>
constexpr int64_t kBlockBytes = Wide ? 224 : 96;

// 64 neighbouring weights.
template <bool Wide>
inline void unpack_block(const uint8_t* block, const uint8_t* table, V8* w) {
#if defined(__AVX2__)
  const __m256i pairs = _mm256_loadu_si256((const __m256i*)block), mask = _mm256_set1_epi8(15);
  const __m256i tops = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  for (int half = 0; half < 2; ++half) {
    const __m256i nibbles = _mm256_and_si256(half ? _mm256_srli_epi16(pairs, 4) : pairs, mask);
    const __m256i high = _mm256_shuffle_epi8(tops, nibbles);
    const __m256i middle = _mm256_loadu_si256((const __m256i*)(block + 32 + 32 * half));
    const __m256i upper[2] = {_mm256_unpacklo_epi8(middle, high), _mm256_unpackhi_epi8(middle, high)};
    for (int i = 0; i < 2; ++i) {
      __m256i lower = _mm256_setzero_si256();
      if (Wide) lower = _mm256_loadu_si256((const __m256i*)(block + 96 + 64 * half + 32 * i));
      w[4 * half + 2 * i] = (V8)_mm256_unpacklo_epi16(lower, upper[i]);
      w[4 * half + 2 * i + 1] = (V8)_mm256_unpackhi_epi16(lower, upper[i]);
    }
  }
#else
  float numbers[kBlock];
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 32; ++i) {
      const int lane = i / 16, k = i % 16, column = 8 * (k / 4) + 4 * lane + k % 4;
      uint16_t lower = 0;
      if (Wide) memcpy(&lower, block + 96 + 64 * half + 2 * (16 * (k / 8) + 8 * lane + k % 8), sizeof lower);
      const uint32_t bits = (uint32_t)table[block[i] >> (4 * half) & 15] << 24 |
                            (uint32_t)block[32 + 32 * half + i] << 16 | lower;
      memcpy(numbers + 32 * half + column, &bits, sizeof bits);
    }
  memcpy(w, numbers, sizeof numbers);
#endif
}

template <bool Wide, int B>
inline void lossless_dot(const Arguments& a, int64_t row, int64_t b0) {
  const int64_t blocks = ceil_div(a.in, kBlock), full = a.in / kBlock;
  const uint8_t* table = static_cast<const uint8_t*>(a.weight) + row * (kTable + blocks * kBlockBytes<Wide>);
  const float* x = a.x + b0 * a.x_stride;
  V8 sums[2][B] = {};
  for (int64_t i = 0; i < full; ++i) {
    const uint8_t* block = table + kTable + i * kBlockBytes<Wide>;
    for (int64_t line = 0; line < kBlockBytes<Wide>; line += 64) prefetch(block + line);
    V8 w[8];
    unpack_block<Wide>(block, table, w);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j)
      for (int b = 0; b < B; ++b)
        sums[j % 2][b] = multiply_add_lanes(w[j], load8(x + b * a.x_stride + i * kBlock + 8 * j, 8), sums[j % 2][b]);
  }
  if (full < blocks) {
    V8 w[8];
    unpack_block<Wide>(table + kTable + full * kBlockBytes<Wide>, table, w);
    for (int j = 0; j < 8; ++j)
      for (int b = 0; b < B; ++b) {
        const int64_t column = full * kBlock + 8 * j;
        sums[j % 2][b] = multiply_add_lanes(w[j], load8(x + b * a.x_stride + column, a.in - column), sums[j % 2][b]);
      }
  }
  for (int b = 0; b < B; ++b) {
    float total = sum_lanes(sums[0][b] + sums[1][b]);
    for (int32_t i = a.starts[row]; i < a.starts[row + 1]; ++i) total += a.values[i] * x[b * a.x_stride + a.columns[i]];
    a.y[(b0 + b) * a.y_stride + row] = total + (a.bias ? a.bias[row] : 0.0f);
  }
}

template <bool Wide>
int run_lossless(const Arguments& a) {
  return for_each_part(a, kTable + ceil_div(a.in, kBlock) * kBlockBytes<Wide>, 0, [](const Arguments&, float*) {},
                       [](const Arguments& block, int64_t row, int64_t end, float*) {
    for (; row < end; ++row) {
      int64_t b = 0;
      for (; b + 4 <= block.b; b += 4) lossless_dot<Wide, 4>(block, row, b);
      for (; b + 2 <= block.b; b += 2) lossless_dot<Wide, 2>(block, row, b);
      if (b < block.b) lossless_dot<Wide, 1>(block, row, b);
    }
  });
}

template <bool Wide>
int widen_lossless(const Arguments& a) {
  const int64_t blocks = ceil_div(a.in, kBlock), row_bytes = kTable + blocks * kBlockBytes<Wide>;
  return for_each(ceil_div(a.out, W), a.threads, 0, [&](int64_t item, float*) {
    for (int64_t row = item * W; row < min64(a.out, item * W + W); ++row) {
      const uint8_t* table = static_cast<const uint8_t*>(a.weight) + row * row_bytes;
      float* y = a.y + row * a.y_stride;
      for (int64_t i = 0; i < blocks; ++i) {
        V8 w[8];
        unpack_block<Wide>(table + kTable + i * kBlockBytes<Wide>, table, w);
        memcpy(y + i * kBlock, w, min64(kBlock, a.in - i * kBlock) * sizeof(float));
      }
      for (int32_t i = a.starts[row]; i < a.starts[row + 1]; ++i) y[a.columns[i]] = a.values[i];
    }
  });
}

}  // namespace
