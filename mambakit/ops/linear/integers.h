// int8 and int4 weights: integers times activations of 16 bits.
#pragma once

#include "product.h"
#include "vectors256.h"

namespace {

constexpr int64_t kUnit = 64;  // numbers of W that are unpacked at once, as four vectors of 16

// Eight sums of two products each; of which two differs, their sum over lanes does not.
inline I8 multiply_integers(S16 a, S16 b) {
#if defined(__AVX2__)
  return (I8)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  __m128i x[2], y[2];
  memcpy(x, &a, sizeof a);
  memcpy(y, &b, sizeof b);
  x[0] = _mm_madd_epi16(x[0], y[0]);
  x[1] = _mm_madd_epi16(x[1], y[1]);
  I8 sums;
  memcpy(&sums, x, sizeof sums);
  return sums;
#else
  typedef int16_t Half __attribute__((vector_size(16)));
  Half x[2], y[2];
  memcpy(x, &a, sizeof a);
  memcpy(y, &b, sizeof b);
  return __builtin_convertvector(x[0], I8) * __builtin_convertvector(y[0], I8) +
         __builtin_convertvector(x[1], I8) * __builtin_convertvector(y[1], I8);
#endif
}
// x in 16 bits: numbers (b, columns), 0 past `in`, and scales (b, columns / group).
struct Rounded {
  int16_t* numbers;
  float* scales;
  int64_t columns, groups;
};

// The number of the group that is furthest from 0 becomes +-32767. A group with a NaN or an infinity has a NaN for its
// scale.
void round_group(const float* x, int64_t count, int64_t group, int16_t* numbers, float* scale) {
  V peak = splat(0.0f), faults = splat(0.0f);
  for (int64_t i = 0; i < count; i += W) {
    const V value = load(x + i, count - i), size = abs(value);
    peak = size > peak ? size : peak;
    faults += value * 0.0f;
  }
  float most = 0.0f;
  for (int i = 0; i < W; ++i) most = peak[i] > most ? peak[i] : most;
  const float inverse = most > 1e-33f ? 32767.0f / most : 0.0f;
  *scale = most * (1.0f / 32767.0f) + sum(faults);
  for (int64_t i = 0; i < group; i += W) {
    V value = i < count ? load(x + i, count - i) : splat(0.0f);
    I rounded = (I)(value * inverse + kRound) - 0x4b400000;
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)(numbers + i), _mm512_cvtsepi32_epi16((__m512i)rounded));
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_packs_epi32((__m256i)rounded, (__m256i)rounded);
    _mm_storeu_si128((__m128i*)(numbers + i), _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 8)));
#else
    for (int j = 0; j < W; ++j) numbers[i + j] = (int16_t)rounded[j];
#endif
  }
}

struct Bytes {
  typedef int8_t Number;
  static constexpr int64_t kNumbers = 64;  // elements of a unit in memory
  static constexpr bool kPadded = false;   // rows end with column `in`
  static inline void unpack(const int8_t* unit, S16* w) {
    for (int i = 0; i < 4; ++i) {
#if defined(__AVX2__)
      w[i] = (S16)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(unit + 16 * i)));
#else
      typedef int8_t Octets __attribute__((vector_size(16)));
      Octets numbers;
      memcpy(&numbers, unit + 16 * i, sizeof numbers);
      w[i] = __builtin_convertvector(numbers, S16);
#endif
    }
  }
};

// Nibble s of word i (bits 4s to 4s+3) is column 16 s + i of the unit.
struct Nibbles {
  typedef int16_t Number;
  static constexpr int64_t kNumbers = 16;
  static constexpr bool kPadded = true;
  static inline void unpack(const int16_t* unit, S16* w) {
    S16 words;
    memcpy(&words, unit, sizeof words);
    w[0] = (words << 12) >> 12;
    w[1] = (words << 8) >> 12;
    w[2] = (words << 4) >> 12;
    w[3] = words >> 12;
  }
};

// Columns that are unpacked together: whole units and whole groups.
template <int Group>
constexpr int64_t kStep = Group > kUnit ? Group : kUnit;

template <class Format, int Group, int B>
inline void integer_dot(const Arguments& a, const Rounded& x, int64_t row, int64_t b0) {
  typedef typename Format::Number Number;
  constexpr int64_t kUnits = kStep<Group> / kUnit, kGroups = kStep<Group> / Group, kPerGroup = Group / 16;
  constexpr int64_t kStepNumbers = kUnits * Format::kNumbers;
  const int64_t steps = x.columns / kStep<Group>;
  const int64_t row_numbers = Format::kPadded ? steps * kStepNumbers : a.in;
  const int64_t row_groups = Format::kPadded ? x.groups : ceil_div(a.in, Group);
  const Number* w = static_cast<const Number*>(a.weight) + row * row_numbers;
  const float* scales = a.scales + row * row_groups;
  V8 total[B] = {};
  auto add_step = [&](int64_t step, const Number* numbers, int64_t groups) {
    S16 unpacked[4 * kUnits];
    for (int64_t u = 0; u < kUnits; ++u) Format::unpack(numbers + u * Format::kNumbers, unpacked + 4 * u);
    for (int b = 0; b < B; ++b) {
      const int16_t* values = x.numbers + (b0 + b) * x.columns + step * kStep<Group>;
      for (int64_t g = 0; g < groups; ++g) {
        I8 products = {};
#pragma GCC unroll 8
        for (int64_t i = g * kPerGroup; i < (g + 1) * kPerGroup; ++i) {
          S16 operand;
          memcpy(&operand, values + 16 * i, sizeof operand);
          products += multiply_integers(unpacked[i], operand);
        }
        const float scale = scales[step * kGroups + g] * x.scales[(b0 + b) * x.groups + step * kGroups + g];
        total[b] = multiply_add(__builtin_convertvector(products, V8), scale, total[b]);
      }
    }
  };
  const int64_t whole = Format::kPadded ? steps : a.in / kStep<Group>;
  for (int64_t step = 0; step < whole; ++step) {
    for (int64_t u = 0; u < kUnits; ++u) prefetch(w + step * kStepNumbers + u * Format::kNumbers);
    add_step(step, w + step * kStepNumbers, kGroups);
  }
  if (whole < steps) {
    Number rest[kStepNumbers] = {};
    memcpy(rest, w + whole * kStepNumbers, (row_numbers - whole * kStepNumbers) * sizeof(Number));
    add_step(whole, rest, row_groups - whole * kGroups);
  }
  const float bias = a.bias ? a.bias[row] : 0.0f;
  for (int b = 0; b < B; ++b) a.y[(b0 + b) * a.y_stride + row] = sum_lanes(total[b]) + bias;
}

template <class Format, int Group>
int run_integers(const Arguments& a) {
  Rounded x;
  x.columns = ceil_div(a.in, kStep<Group>) * kStep<Group>;
  x.groups = x.columns / Group;
  const int64_t together = min64(a.b, kRowsTogether), floats = ceil_div(together * x.columns, 2);
  const int64_t row_bytes = x.columns / kUnit * Format::kNumbers * sizeof(typename Format::Number);
  // Every thread rounds x for itself, which is sooner done than waited for.
  auto place = [&](float* scratch) {
    Rounded mine = x;
    mine.numbers = reinterpret_cast<int16_t*>(scratch);
    mine.scales = scratch + floats;
    return mine;
  };
  auto prepare = [&](const Arguments& block, float* scratch) {
    const Rounded mine = place(scratch);
    for (int64_t b = 0; b < block.b; ++b)
      for (int64_t g = 0; g < x.groups; ++g) {
        const int64_t left = a.in - g * Group;
        round_group(block.x + b * a.x_stride + g * Group, left < 0 ? 0 : min64(left, Group), Group,
                    mine.numbers + b * x.columns + g * Group, mine.scales + b * x.groups + g);
      }
  };
  return for_each_part(a, row_bytes, floats + together * x.groups, prepare,
                       [&](const Arguments& block, int64_t row, int64_t end, float* scratch) {
    const Rounded mine = place(scratch);
    for (; row < end; ++row) {
      int64_t b = 0;
      for (; b + 4 <= block.b; b += 4) integer_dot<Format, Group, 4>(block, mine, row, b);
      for (; b + 2 <= block.b; b += 2) integer_dot<Format, Group, 2>(block, mine, row, b);
      if (b < block.b) integer_dot<Format, Group, 1>(block, mine, row, b);
    }
  });
}

template <class Format>
int run_groups(const Arguments& a) {
  if (a.group == 32) return run_integers<Format, 32>(a);
  if (a.group == 64) return run_integers<Format, 64>(a);
  return run_integers<Format, 128>(a);
}

// The eight numbers from `first`, 0 or 8, on.
inline V8 eight_floats(S16 numbers, int64_t first) {
#if defined(__AVX2__)
  const __m128i half = first ? _mm256_extracti128_si256((__m256i)numbers, 1) : _mm256_castsi256_si128((__m256i)numbers);
  return (V8)_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(half));
#else
  V8 floats;
  for (int i = 0; i < 8; ++i) floats[i] = numbers[first + i];
  return floats;
#endif
}

template <class Format, int Group>
int widen_integers(const Arguments& a) {
  typedef typename Format::Number Number;
  const int64_t steps = ceil_div(a.in, kStep<Group>), per_step = kStep<Group> / kUnit * Format::kNumbers;
  const int64_t row_numbers = Format::kPadded ? steps * per_step : a.in;
  const int64_t groups = Format::kPadded ? steps * (kStep<Group> / Group) : ceil_div(a.in, Group);
  return for_each(ceil_div(a.out, W), a.threads, 0, [&](int64_t item, float*) {
    for (int64_t row = item * W; row < min64(a.out, item * W + W); ++row)
      for (int64_t unit = 0; unit * kUnit < a.in; ++unit) {
        const Number* w = static_cast<const Number*>(a.weight) + row * row_numbers + unit * Format::kNumbers;
        Number rest[Format::kNumbers] = {};
        const int64_t left = row_numbers - unit * Format::kNumbers;
        if (left < Format::kNumbers) w = static_cast<Number*>(memcpy(rest, w, left * sizeof(Number)));
        S16 unpacked[4];
        Format::unpack(w, unpacked);
        float* y = a.y + row * a.y_stride + unit * kUnit;
        const float* scales = a.scales + row * groups;
        for (int64_t i = 0; i < kUnit && unit * kUnit + i < a.in; i += 8) {  // whole vectors are of one group
          const V8 numbers = eight_floats(unpacked[i / 16], i % 16) * scales[(unit * kUnit + i) / Group];
          const int64_t left = a.in - unit * kUnit - i;
          memcpy(y + i, &numbers, left >= 8 ? sizeof numbers : left * sizeof(float));
        }
      }
  });
}

template <class Format>
int widen_groups(const Arguments& a) {
  if (a.group == 32) return widen_integers<Format, 32>(a);
  if (a.group == 64) return widen_integers<Format, 64>(a);
  return widen_integers<Format, 128>(a);
}

}  // namespace
