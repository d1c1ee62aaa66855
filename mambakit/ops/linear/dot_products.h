// int8 and int4 weights on processors that multiply bytes and add four products at once: AVX-512 VNNI, AVX-VNNI, Arm's
// dot products and its 8-bit matrix products (I8MM).
//
// A number of x has 16 bits (integers.h): x = 256 high + low, high signed, low unsigned. So W x is two products of
// bytes, and the sums are the same integers that the 16-bit kernels have: not a bit more is lost. The instructions want
// certain signs. Where they do not fit, a multiple of 128 (int8) or 8 (int4) is added to the weights; what that adds to
// the sum depends on x alone, so it is subtracted from every row alike ("correction").
#pragma once

#include "integers.h"

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD) || defined(MAMBAKIT_EMULATED)
#define MAMBAKIT_DOT_PRODUCTS

namespace {

constexpr int64_t kLanes = 4 * W;  // bytes of a vector
constexpr int64_t kMostTogether = 4;  // rows of x that meet a row of W together
typedef uint8_t Octets __attribute__((vector_size(kLanes)));
typedef Octets UnalignedOctets __attribute__((aligned(1), may_alias));

inline Octets load_octets(const void* p) { return *static_cast<const UnalignedOctets*>(p); }
// Keeps x in a register. Otherwise the compiler reads it again from memory as an operand of each instruction, and loads
// are what binds with AVX-512 (one vector a cycle on Zen 4).
inline void keep(Octets& x) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(x));
#else
  (void)x;
#endif
}
inline void store_octets(void* p, Octets x) { *static_cast<UnalignedOctets*>(p) = x; }

// Which weights a product of the high and of the low bytes takes: as they are, or 128 larger as unsigned numbers.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr bool kHighShifted = false;
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool kLowShifted = false;
#else
constexpr bool kLowShifted = true;  // both operands are signed, or both are unsigned
#endif
inline I multiply_high(I sum, Octets w, Octets high) {
  return (I)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)high);
}
inline I multiply_low(I sum, Octets w, Octets low) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  return (I)vusdotq_s32((int32x4_t)sum, (uint8x16_t)low, (int8x16_t)w);
#else
  return (I)vdotq_u32((uint32x4_t)sum, (uint8x16_t)w, (uint8x16_t)low);
#endif
}
#else
constexpr bool kHighShifted = true, kLowShifted = false;
// Unsigned times signed.
inline I multiply_bytes(I sum, Octets a, Octets b) {
#if defined(__AVX512VNNI__)
  return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
  return (I)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#else
  // The instruction's arithmetic, for tests on processors without it.
  for (int64_t i = 0; i < kLanes; ++i) sum[i / 4] += (int32_t)a[i] * (int8_t)b[i];
  return sum;
#endif
}
inline I multiply_high(I sum, Octets w, Octets high) { return multiply_bytes(sum, w, high); }
inline I multiply_low(I sum, Octets w, Octets low) { return multiply_bytes(sum, low, w); }
#endif

// Of each 16 bytes the even ones, then the odd ones: in a block of int4 they are columns of different halves.
inline Octets evens_first(Octets x) {
#if defined(__AVX512VNNI__)
  const __m128i order = _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
  return (Octets)_mm512_shuffle_epi8((__m512i)x, _mm512_broadcast_i32x4(order));
#elif defined(__AVX2__)
  const __m128i order = _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
  return (Octets)_mm256_shuffle_epi8((__m256i)x, _mm256_broadcastsi128_si256(order));
#else
  return (Octets)vcombine_u8(vget_low_u8(vuzp1q_u8((uint8x16_t)x, (uint8x16_t)x)),
                             vget_low_u8(vuzp2q_u8((uint8x16_t)x, (uint8x16_t)x)));
#endif
}

// A vector of W in memory holds kVectors vectors of bytes; kShift was added to the weights that `low` and `high` get.
template <int Group>
struct PackedBytes {
  typedef Bytes Format;
  static constexpr int64_t kVectors = 1, kBlockColumns = 1;
  static constexpr int32_t kHighShift = kHighShifted ? 128 : 0, kLowShift = kLowShifted ? 128 : 0;
  Octets w, shifted;
  inline explicit PackedBytes(const void* p) : w(load_octets(p)), shifted(w ^ (uint8_t)128) {}
  inline Octets high(int64_t) const { return kHighShifted ? shifted : w; }
  inline Octets low(int64_t) const { return kLowShifted ? shifted : w; }
  // Of kLanes columns, one byte each.
  static void arrange(const int16_t* x, int64_t, uint8_t* high, uint8_t* low) {
    for (int64_t i = 0; i < kLanes; ++i) {
      high[i] = (uint8_t)((uint16_t)x[i] >> 8);
      low[i] = (uint8_t)x[i];
    }
  }
};

// Numbers of 4 bits plus 8 are 0 to 15: signed or unsigned, as an instruction likes.
template <int Group>
struct PackedNibbles {
  typedef Nibbles Format;
  static constexpr int64_t kVectors = 2, kBlockColumns = kUnit;
  static constexpr int32_t kHighShift = 8, kLowShift = 8;
  Octets w[2];
  inline explicit PackedNibbles(const void* p) {
    Octets bytes = load_octets(p);
    keep(bytes);
    if (Group < kUnit) bytes = evens_first(bytes);
#if defined(__AVX512VNNI__)
    const __m512i four = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8), v = (__m512i)bytes;
    w[0] = (Octets)_mm512_ternarylogic_epi32(v, four, eight, 0x6a);  // (v & 15) ^ 8
    w[1] = (Octets)_mm512_ternarylogic_epi32(_mm512_srli_epi16(v, 4), four, eight, 0x6a);
#else
    typedef uint16_t Words __attribute__((vector_size(kLanes)));
    w[0] = (bytes & (uint8_t)15) ^ (uint8_t)8;
    w[1] = ((Octets)((Words)bytes >> 4) & (uint8_t)15) ^ (uint8_t)8;
#endif
  }
  inline Octets high(int64_t i) const { return w[i]; }
  inline Octets low(int64_t i) const { return w[i]; }
  // Word i of a block is columns i, 16 + i, 32 + i and 48 + i: its lower nibbles are columns i and 32 + i. `vector` is
  // of the lower nibbles where it is even, of the upper ones where it is odd; x is where the step begins.
  static void arrange(const int16_t* x, int64_t vector, uint8_t* high, uint8_t* low) {
    for (int64_t i = 0; i < kLanes; i += 2) {
      const int64_t at = vector / 2 * kLanes + i;  // bytes of W from where the step begins
      const int16_t* numbers = x + at / 32 * kUnit + vector % 2 * 16 + at % 32 / 2;
      low[i] = (uint8_t)numbers[0], low[i + 1] = (uint8_t)numbers[32];
      high[i] = (uint8_t)((uint16_t)numbers[0] >> 8), high[i + 1] = (uint8_t)((uint16_t)numbers[32] >> 8);
    }
    if (Group >= kUnit) return;
    store_octets(low, evens_first(load_octets(low)));
    store_octets(high, evens_first(load_octets(high)));
  }
};

// A step is what is summed together: whole groups, whole vectors of W and whole blocks.
template <class Packed, int Group>
struct Step {
  static constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
  static constexpr int64_t kColumns = larger(larger(Group, Packed::kVectors * kLanes), Packed::kBlockColumns);
  static constexpr int64_t kVectors = kColumns / kLanes, kGroups = kColumns / Group;
  static constexpr int64_t kBytes = kVectors / Packed::kVectors * kLanes;  // of W
  static constexpr int64_t kStored = (2 * kVectors + 1) * kLanes;  // of x: high bytes, low bytes, the correction
  static constexpr bool kCorrected = Packed::kHighShift || Packed::kLowShift;

  // The scale of each lane's group, from the scales of the step.
  static inline V scale(const float* scales) {
    if (kGroups == 1) return splat(*scales);
    I group;  // a constant
    for (int i = 0; i < W; ++i)
      // Blocks are 8 lanes; where a block has two groups, of each 4 lanes the last two are of the second.
      group[i] = Packed::kVectors == 1 ? i * 4 / Group : Group < kUnit ? i / 8 * 2 + i % 4 / 2 : i / 8 * kUnit / Group;
#if defined(__AVX512F__)
    return (V)_mm512_permutexvar_ps((__m512i)group, (__m512)load(scales));
#elif defined(__AVX2__)
    return (V)_mm256_permutevar8x32_ps((__m256)load(scales), (__m256i)group);
#else
    V lanes;
    for (int i = 0; i < W; ++i) lanes[i] = scales[group[i]];
    return lanes;
#endif
  }

  static void arrange(const int16_t* x, uint8_t* stored) {
    const Octets ones = Octets{} + (uint8_t)1;
    I highs = {}, lows = {};
    for (int64_t i = 0; i < kVectors; ++i) {
      uint8_t *high = stored + i * kLanes, *low = high + kVectors * kLanes;
      Packed::arrange(Packed::kVectors == 1 ? x + i * kLanes : x, i, high, low);
      highs = multiply_high(highs, ones, load_octets(high));
      lows = multiply_low(lows, ones, load_octets(low));
    }
    const I correction = highs * -256 * Packed::kHighShift - lows * Packed::kLowShift;
    store_octets(stored + 2 * kVectors * kLanes, (Octets)correction);
  }
};

// x as a thread has it: per row of x, its steps one after the other, and a scale for each group.
struct Arranged {
  uint8_t* steps;
  float *scales, *products;  // products: the scales of a row of W times those of x
  int64_t groups, stride;  // bytes of a row of x
};

template <class Packed, int Group, int B>
inline void arranged_rows(const Arguments& a, const Arranged& x, int64_t row, int64_t count, int64_t b0) {
  typedef Step<Packed, Group> S;
  typedef typename Packed::Format Format;
  constexpr bool kPadded = Format::kPadded;
  const int64_t steps = ceil_div(a.in, S::kColumns);
  // An int4 row is padded to whole groups and blocks, which may be fewer than whole steps.
  const int64_t padded = ceil_div(a.in, kStep<Group>) * kStep<Group>;
  const int64_t row_bytes = kPadded ? padded / 2 : a.in;
  const int64_t row_groups = kPadded ? padded / Group : ceil_div(a.in, Group);
  const int64_t whole = row_bytes / S::kBytes;
  V totals[B][W];
  for (int64_t r = 0; r < W; ++r) {
    V total[B] = {};
    if (r < count) {
      const uint8_t* w = static_cast<const uint8_t*>(a.weight) + (row + r) * row_bytes;
      const float* scales = a.scales + (row + r) * row_groups;
      for (int64_t g = 0; g < row_groups; g += W) {
        const V of_row = load(scales + g, row_groups - g);
        for (int b = 0; b < B; ++b)
          store(x.products + b * x.groups + g, of_row * load(x.scales + (b0 + b) * x.groups + g));
      }
      const uint8_t* first = x.steps + b0 * x.stride;
      const float* products = x.products;
      const int64_t stride = x.stride, groups = x.groups;  // copies, which no store of a float can change
      auto add_step = [=, &total](int64_t step, const uint8_t* numbers) {
        for (int b = 0; b < B; ++b) {
          const uint8_t* stored = first + b * stride + step * S::kStored;
          I sum = {};
#pragma GCC unroll 16
          for (int64_t i = 0; i < S::kVectors; ++i) {
            const Packed packed(numbers + i / Packed::kVectors * kLanes);
            sum = multiply_high(sum, packed.high(i % Packed::kVectors), load_octets(stored + i * kLanes));
          }
          sum *= 256;
          if (S::kCorrected) sum += (I)load_octets(stored + 2 * S::kVectors * kLanes);
#pragma GCC unroll 16
          for (int64_t i = 0; i < S::kVectors; ++i) {
            const Packed packed(numbers + i / Packed::kVectors * kLanes);
            sum = multiply_low(sum, packed.low(i % Packed::kVectors), load_octets(stored + (S::kVectors + i) * kLanes));
          }
          const V scale = S::scale(products + b * groups + step * S::kGroups);
          total[b] = multiply_add(__builtin_convertvector(sum, V), scale, total[b]);
        }
      };
      for (int64_t step = 0; step < whole; ++step) {
        for (int64_t line = 0; line < S::kBytes; line += 64) prefetch(w + step * S::kBytes + line);
        add_step(step, w + step * S::kBytes);
      }
      if (whole < steps) {
        uint8_t rest[S::kBytes] = {};
        memcpy(rest, w + whole * S::kBytes, row_bytes - whole * S::kBytes);
        add_step(whole, rest);
      }
    }
    for (int b = 0; b < B; ++b) totals[b][r] = total[b];
  }
  const V bias = a.bias ? load(a.bias + row, count) : splat(0.0f);
  for (int b = 0; b < B; ++b) store(a.y + (b0 + b) * a.y_stride + row, sums(totals[b]) + bias, count);
}

template <class Packed, int Group>
int run_dot_products(const Arguments& a) {
  typedef Step<Packed, Group> S;
  const int64_t steps = ceil_div(a.in, S::kColumns);
  Arranged x;
  // Vectors of scales are read and written whole.
  x.groups = ceil_div(steps * S::kGroups, W) * W + W;
  x.stride = steps * S::kStored;
  const int64_t together = min64(a.b, kRowsTogether);
  const int64_t step_floats = together * x.stride / sizeof(float), numbers_floats = S::kColumns / 2;
  auto place = [&](float* scratch) {
    Arranged mine = x;
    mine.steps = reinterpret_cast<uint8_t*>(scratch);
    mine.scales = scratch + step_floats;
    mine.products = mine.scales + together * x.groups;
    return mine;
  };
  const int64_t floats = step_floats + (together + kMostTogether) * x.groups + numbers_floats;
  auto prepare = [&](const Arguments& block, float* scratch) {
    const Arranged mine = place(scratch);
    int16_t* numbers = reinterpret_cast<int16_t*>(scratch + floats - numbers_floats);
    for (int64_t b = 0; b < block.b; ++b) {
      float* scales = mine.scales + b * x.groups;
      for (int64_t g = steps * S::kGroups; g < x.groups; ++g) scales[g] = 0.0f;
      for (int64_t step = 0; step < steps; ++step) {
        for (int64_t g = 0; g < S::kGroups; ++g) {
          const int64_t column = step * S::kColumns + g * Group, left = a.in - column;
          round_group(block.x + b * a.x_stride + column, left < 0 ? 0 : min64(left, Group), Group, numbers + g * Group,
                      scales + step * S::kGroups + g);
        }
        S::arrange(numbers, mine.steps + b * x.stride + step * S::kStored);
      }
    }
  };
  return for_each_part(a, steps * S::kBytes, floats, prepare,
                       [&](const Arguments& block, int64_t row, int64_t end, float* scratch) {
    const Arranged mine = place(scratch);
    for (; row < end; row += W) {
      const int64_t count = min64(W, end - row);
      int64_t b = 0;
      for (; b + 4 <= block.b; b += 4) arranged_rows<Packed, Group, 4>(block, mine, row, count, b);
      for (; b + 2 <= block.b; b += 2) arranged_rows<Packed, Group, 2>(block, mine, row, count, b);
      if (b < block.b) arranged_rows<Packed, Group, 1>(block, mine, row, count, b);
    }
  });
}

template <template <int> class Packed>
int run_dot_products(const Arguments& a) {
  if (a.group == 32) return run_dot_products<Packed<32>, 32>(a);
  if (a.group == 64) return run_dot_products<Packed<64>, 64>(a);
  return run_dot_products<Packed<128>, 128>(a);
}

}  // namespace
#endif
