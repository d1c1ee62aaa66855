// Drawing from torch's global generator of a CPU as `torch.multinomial` does: a token is the argmax of p / q, with an
// exponential number q = -log1p(-u) for every p, u of 53 bits from two words of the Mersenne Twister (MT19937).
//
// torch computes every q in double precision, one after the other. Here all words are drawn, so that the generator goes
// on as it would, but q is computed in float32 vectors, to 1e-6, and in double only where p / q may be the largest.
#include <math.h>

#include "parallel.h"
#include "simd.h"

namespace {

constexpr int64_t kWords = 624, kMiddle = 397;  // of the generator's state
constexpr int64_t kTile = 1024;  // numbers at a time
constexpr float kNear = 1.0f - 4e-6f;  // more than the error of p / q in float32

struct Arguments {
  const float* p;  // (b, v)
  uint32_t* state;  // kWords
  int64_t *position, *tokens, *drawable;  // position: of the next word, kWords where the state is used up
  int64_t b, v;
};

typedef uint32_t UnalignedU __attribute__((vector_size(W * 4), aligned(4), may_alias));
inline U load_words(const uint32_t* p) { return *reinterpret_cast<const UnalignedU*>(p); }

inline uint32_t twist(uint32_t a, uint32_t b) {
  return (((a & 0x80000000u) | (b & 0x7fffffffu)) >> 1) ^ (b & 1 ? 0x9908b0dfu : 0);
}
inline U twist(U a, U b) {
  return (((a & 0x80000000u) | (b & 0x7fffffffu)) >> 1) ^ ((0u - (b & 1u)) & 0x9908b0dfu);
}
// Words [from, to) of the next state, from the words `ahead` further.
void renew(uint32_t* state, int64_t from, int64_t to, int64_t ahead) {
  int64_t i = from;
  for (; i + W <= to; i += W)
    *reinterpret_cast<UnalignedU*>(state + i) =
        load_words(state + i + ahead) ^ twist(load_words(state + i), load_words(state + i + 1));
  for (; i < to; ++i) state[i] = state[i + ahead] ^ twist(state[i], state[i + 1]);
}

void draw(const Arguments& a, uint32_t* words, int64_t count) {
  int64_t& position = *a.position;
  while (count > 0) {
    if (position == kWords) {
      renew(a.state, 0, kWords - kMiddle, kMiddle);
      renew(a.state, kWords - kMiddle, kWords - 1, kMiddle - kWords);
      a.state[kWords - 1] = a.state[kMiddle - 1] ^ twist(a.state[kWords - 1], a.state[0]);
      position = 0;
    }
    const int64_t some = min64(count, kWords - position);
    for (int64_t i = 0; i < some; ++i) {
      uint32_t y = a.state[position + i];
      y ^= y >> 11;
      y ^= (y << 7) & 0x9d2c5680u;
      y ^= (y << 15) & 0xefc60000u;
      words[i] = y ^ (y >> 18);
    }
    position += some;
    words += some;
    count -= some;
  }
}

inline V floats(U x) {  // of integers below 2^32, to 2^-24
  return __builtin_convertvector((I)(x >> 8), V) * 256.0f + __builtin_convertvector((I)(x & 255u), V);
}
// -log1p(-u) to 1e-6, u = (2^32 high + low) / 2^53.
inline V exponential(U high, U low) {
  constexpr float kHigh = 4.76837158203125e-7f, kLow = 1.1102230246251565e-16f;  // 2^-21, 2^-53
  high &= 0x1fffffu;
  const V u = floats(high) * kHigh + floats(low) * kLow;
  const V rest = floats(0x1fffffu - high) * kHigh + (floats(~low) + 1.0f) * kLow;  // 1 - u
  // Above 1/2: rest = 2^-k f, f in [1, 2).
  const V k = __builtin_convertvector(127 - (I)((U)rest >> 23), V);
  const V f = as_float(((U)rest & 0x7fffffu) | 0x3f800000u);
  return u < 0.5f ? log1p_unit(u / rest) : k * 0.69314718056f - log1p_unit(f - 1.0f);
}

inline bool any(I mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < W; ++i) all |= mask[i];
  return all != 0;
#endif
}

void race(const Arguments& a, int64_t row, uint32_t* words, uint32_t* high, uint32_t* low) {
  const float* p = a.p + row * a.v;
  float best = 0.0f;
  int64_t token = 0;
  bool faulty = false;
  for (int64_t tile = 0; tile < a.v; tile += kTile) {
    const int64_t count = min64(kTile, a.v - tile);
    draw(a, words, 2 * count);
    for (int64_t i = 0; i < count; ++i) high[i] = words[2 * i], low[i] = words[2 * i + 1];
    for (int64_t i = 0; i < count; i += W) {
      const V numbers = load(p + tile + i, count - i);
      const I open = ~((numbers == 0.0f) | (numbers < exponential(load_words(high + i), load_words(low + i)) *
                                                          (best * kNear)));
      if (!any(open)) continue;
      for (int64_t j = 0; j < W && i + j < count; ++j) {
        if (!open[j] || faulty) continue;
        const uint64_t bits = ((uint64_t)high[i + j] << 32 | low[i + j]) & ((uint64_t{1} << 53) - 1);
        const float q = (float)-log1p(-((double)bits * 0x1p-53));
        const float value = numbers[j] / q;
        faulty = value != value;
        if (value > best || faulty) best = value, token = tile + i + j;
      }
    }
  }
  a.tokens[row] = token;
  a.drawable[row] = !faulty && best > 0.0f;
}

}  // namespace

// The second argument gives every forward kernel one signature.
MAMBAKIT_EXPORT(exponential_race)(const Arguments* a, int64_t) {
  return for_each(1, 1, 4 * kTile + 2 * W, [&](int64_t, float* scratch) {
    uint32_t* words = reinterpret_cast<uint32_t*>(scratch);
    uint32_t *high = words + 2 * kTile, *low = high + kTile + W;
    for (int64_t i = 0; i < 2 * kTile + 2 * W; ++i) high[i] = 0;  // the rest of a last vector
    for (int64_t row = 0; row < a->b; ++row) race(*a, row, words, high, low);
  });
}
