// RMS norms of dt, B and C, which lie side by side in x_proj's output, on a CPU. Output and input may be one tensor.
#include "parallel.h"
#include "simd.h"

namespace {

struct Arguments {
  const void* x;
  const float *dt_weight, *B_weight, *C_weight;  // (r,), (n,), (n,), or all null
  void* y;
  int64_t rows, r, n, x_half, y_half, threads;
  int64_t x_stride, y_stride;  // between rows
  double eps;
};

constexpr int64_t kRows = 8;  // rows per item

V read(const void* p, int64_t half, int64_t i, int64_t count) {
  return half ? load(static_cast<const bfloat16*>(p) + i, count) : load(static_cast<const float*>(p) + i, count);
}
void write(void* p, int64_t half, int64_t i, V x, int64_t count) {
  half ? store(static_cast<bfloat16*>(p) + i, x, count) : store(static_cast<float*>(p) + i, x, count);
}

// One of the three: its first channel, its channels, its weight.
struct Part {
  int64_t begin, size;
  const float* weight;
};
template <class A>
Part part_of(const A& a, int i) {
  return i == 0 ? Part{0, a.r, a.dt_weight} : i == 1 ? Part{a.r, a.n, a.B_weight} : Part{a.r + a.n, a.n, a.C_weight};
}

float inverse_rms(V squares, int64_t size, double eps) {
  return 1.0f / __builtin_sqrtf(sum(squares) / (float)size + (float)eps);
}

void normalise(const Arguments& a, int64_t row) {
  for (int i = 0; i < 3; ++i) {
    const Part part = part_of(a, i);
    const int64_t from = row * a.x_stride + part.begin, to = row * a.y_stride + part.begin;
    V squares = splat(0.0f);
    for (int64_t j = 0; j < part.size; j += W) {
      const V x = read(a.x, a.x_half, from + j, part.size - j);
      squares += x * x;
    }
    const float inverse = inverse_rms(squares, part.size, a.eps);
    for (int64_t j = 0; j < part.size; j += W) {
      V y = read(a.x, a.x_half, from + j, part.size - j) * inverse;
      if (part.weight) y *= load(part.weight + j, part.size - j);
      write(a.y, a.y_half, to + j, y, part.size - j);
    }
  }
}

struct Gradients {
  const void *dy, *x;
  const float *dt_weight, *B_weight, *C_weight;
  void* dx;
  float *dweights, *parts_of_dweights;  // (r + 2 n,), (parts, r + 2 n): of the three side by side
  int64_t rows, r, n, parts, dy_half, x_half, dx_half, threads;
  double eps;
};

void differentiate(const Gradients& a, int64_t row, float* dweights) {
  const int64_t width = a.r + 2 * a.n;
  for (int i = 0; i < 3; ++i) {
    const Part part = part_of(a, i);
    const int64_t at = row * width + part.begin;
    V squares = splat(0.0f), products = splat(0.0f);  // sum x^2, sum (dy w) x
    for (int64_t j = 0; j < part.size; j += W) {
      const int64_t count = part.size - j;
      const V x = read(a.x, a.x_half, at + j, count);
      V dy = read(a.dy, a.dy_half, at + j, count);
      if (part.weight) dy *= load(part.weight + j, count);
      squares += x * x;
      products += dy * x;
    }
    const float inverse = inverse_rms(squares, part.size, a.eps);
    const float mean = sum(products) / (float)part.size * inverse;  // of (dy w) times the normed channels
    for (int64_t j = 0; j < part.size; j += W) {
      const int64_t count = part.size - j;
      const V normed = read(a.x, a.x_half, at + j, count) * inverse, dy = read(a.dy, a.dy_half, at + j, count);
      const V scaled = part.weight ? dy * load(part.weight + j, count) : dy;
      write(a.dx, a.dx_half, at + j, (scaled - normed * mean) * inverse, count);
      if (dweights) {
        float* to = dweights + part.begin + j;
        store(to, load(to, count) + dy * normed, count);
      }
    }
  }
}

}  // namespace

// The second argument gives every forward kernel one signature.
MAMBAKIT_EXPORT(selection_norm)(const Arguments* a, int64_t) {
  return for_each(ceil_div(a->rows, kRows), a->threads, 0, [&](int64_t item, float*) {
    for (int64_t row = item * kRows; row < min64(a->rows, (item + 1) * kRows); ++row) normalise(*a, row);
  });
}

// The weights' gradients are summed in `parts` runs of rows, then over the runs: the same for any number of threads.
MAMBAKIT_EXPORT(selection_norm_backward)(const Gradients* a) {
  const int64_t width = a->r + 2 * a->n;
  const int failed = for_each(a->parts, a->threads, 0, [&](int64_t part, float*) {
    float* dweights = a->dweights ? a->parts_of_dweights + part * width : nullptr;
    if (dweights)
      for (int64_t i = 0; i < width; ++i) dweights[i] = 0.0f;
    for (int64_t row = part * a->rows / a->parts; row < (part + 1) * a->rows / a->parts; ++row)
      differentiate(*a, row, dweights);
  });
  if (failed || !a->dweights) return failed;
  for (int64_t i = 0; i < width; i += W) {
    V total = splat(0.0f);
    for (int64_t part = 0; part < a->parts; ++part) total += load(a->parts_of_dweights + part * width + i, width - i);
    store(a->dweights + i, total, width - i);
  }
  return 0;
}
