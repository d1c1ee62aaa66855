// Matrix times vectors: y = x W^T + bias. Up to 16 rows of x, as in decoding, are bound by reading W once; more, as in
// prompts, are cut into blocks of 16.
//
// Sums are float32. float32 and bfloat16 weights, stored as they are or in fewer bits without loss (lossless.h), are
// widened in registers and multiplied by x as it is. int8 and int4 weights are multiplied as integers by x rounded to
// 16 bits (integers.h): widening them would take longer than reading them. Every (row of x, row of W) pair is summed in
// the same order whatever the batch, so a row's bits do not depend on its neighbours.
#include "dot_products.h"
#include "integers.h"
#include "lossless.h"
#include "product.h"

namespace {

// -- float32 and bfloat16 ---------------------------------------------------------------------------------------------

constexpr int kSums = 4;  // independent sums per row of W: they hide the latency of an addition

// Adds columns in one order, whatever the number of rows of x.
template <class T, int B>
inline void dot(const Arguments& a, const float* x, int64_t row, V (&total)[B]) {
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

// W rows of W (fewer at the end) times B rows of x: their sums over lanes are taken together.
template <class T, int B>
inline void rows_times(const Arguments& a, int64_t row, int64_t count, int64_t b0) {
  V totals[B][W];
  for (int64_t i = 0; i < W; ++i) {
    V total[B] = {};
    if (i < count) dot<T>(a, a.x + b0 * a.x_stride, row + i, total);
    for (int b = 0; b < B; ++b) totals[b][i] = total[b];
  }
  const V bias = a.bias ? load(a.bias + row, count) : splat(0.0f);
  for (int b = 0; b < B; ++b) store(a.y + (b0 + b) * a.y_stride + row, sums(totals[b]) + bias, count);
}

// Rows [row, end) of W times all of x. Sums, operands and the weight must fit the registers.
template <class T>
void multiply(const Arguments& a, int64_t row, int64_t end) {
  for (; row < end; row += W) {
    const int64_t count = min64(W, end - row);
    int64_t b = 0;
    if (W == 16)
      for (; b + 4 <= a.b; b += 4) rows_times<T, 4>(a, row, count, b);
    for (; b + 2 <= a.b; b += 2) rows_times<T, 2>(a, row, count, b);
    if (b < a.b) rows_times<T, 1>(a, row, count, b);
  }
}

template <class T>
int run(const Arguments& a) {
  return for_each_part(a, a.in * sizeof(T), 0, [](const Arguments&, float*) {},
                       [](const Arguments& block, int64_t row, int64_t end, float*) {
    multiply<T>(block, row, end);
  });
}

}  // namespace

// kind: 0 float32, 1 bfloat16, 2 int8, 3 int4, 4 lossless32, 5 lossless16
MAMBAKIT_EXPORT(linear)(const Arguments* a, int64_t kind) {
  if (a->out == 0) return 0;
  switch (kind) {
    case 0: return run<float>(*a);
    case 1: return run<bfloat16>(*a);
#if defined(MAMBAKIT_DOT_PRODUCTS)
    case 2: return run_dot_products<PackedBytes>(*a);
    case 3: return run_dot_products<PackedNibbles>(*a);
#else
    case 2: return run_groups<Bytes>(*a);
    case 3: return run_groups<Nibbles>(*a);
#endif
    case 4: return run_lossless<true>(*a);
    default: return run_lossless<false>(*a);
  }
}

// y (out, in) = W in float32; x is not read.
MAMBAKIT_EXPORT(widen)(const Arguments* a, int64_t kind) {
  switch (kind) {
    case 2: return widen_groups<Bytes>(*a);
    case 3: return widen_groups<Nibbles>(*a);
    case 4: return widen_lossless<true>(*a);
    default: return widen_lossless<false>(*a);
  }
}
