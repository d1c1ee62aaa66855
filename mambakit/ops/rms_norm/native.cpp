// RMSNorm with the residual addition, on a CPU: one pass over each row, which stays in cache as float32.
#include "parallel.h"
#include "simd.h"

namespace {

struct Arguments {
  const void* x;
  const float* weight;
  const void* residual;
  void *y, *residual_out;
  int64_t rows, h, x_half, residual_half, y_half, out_half, threads;  // out_half: the dtype of residual_out
  int64_t x_stride, residual_stride;  // between rows; outputs are contiguous
  double eps;
};

constexpr int64_t kRows = 8;  // rows per item

V read(const void* p, int64_t half, int64_t i, int64_t count) {
  return half ? load(static_cast<const bfloat16*>(p) + i, count) : load(static_cast<const float*>(p) + i, count);
}
void write(void* p, int64_t half, int64_t i, V x, int64_t count) {
  half ? store(static_cast<bfloat16*>(p) + i, x, count) : store(static_cast<float*>(p) + i, x, count);
}
V rounded(V x, int64_t half) { return half ? widen(narrow(x)) : x; }

float inverse_rms(V squares, int64_t h, double eps) {
  return 1.0f / __builtin_sqrtf(sum(squares) / (float)h + (float)eps);
}

void normalise(const Arguments& a, int64_t row, float* buffer) {
  V squares[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  int part = 0;
  for (int64_t i = 0; i < a.h; i += W, part = (part + 1) & 3) {
    const int64_t count = a.h - i;
    V total = read(a.x, a.x_half, row * a.x_stride + i, count);
    if (a.residual) total += read(a.residual, a.residual_half, row * a.residual_stride + i, count);
    write(a.residual_out, a.out_half, row * a.h + i, total, count);
    total = rounded(total, a.out_half);  // normalise what is kept: the gradient sees nothing else
    store(buffer + i, total);
    squares[part] += total * total;
  }
  const float inverse = inverse_rms((squares[0] + squares[1]) + (squares[2] + squares[3]), a.h, a.eps);
  for (int64_t i = 0; i < a.h; i += W) {
    V y = load(buffer + i) * inverse;
    if (a.weight) y *= load(a.weight + i, a.h - i);
    write(a.y, a.y_half, row * a.h + i, y, a.h - i);
  }
}

struct Gradients {
  const void *dy, *dresidual_out, *residual_out;
  const float* weight;
  void *dx, *dresidual;
  float *dweight, *dweight_parts;  // (h,), (parts, h)
  int64_t rows, h, parts, dy_half, dout_half, out_half, dx_half, threads;
  int64_t dy_stride, dout_stride, out_stride;
  double eps;
};

void differentiate_row(const Gradients& a, int64_t row, float* dweight) {
  V squares = splat(0.0f), products = splat(0.0f);  // sum r^2, sum (dy w) r
  for (int64_t i = 0; i < a.h; i += W) {
    const int64_t count = a.h - i;
    V r = read(a.residual_out, a.out_half, row * a.out_stride + i, count);
    V scaled = read(a.dy, a.dy_half, row * a.dy_stride + i, count);
    if (a.weight) scaled *= load(a.weight + i, count);
    squares += r * r;
    products += scaled * r;
  }
  const float inverse = inverse_rms(squares, a.h, a.eps);
  const float mean = sum(products) / (float)a.h * inverse;  // of (dy w) times the normed row
  for (int64_t i = 0; i < a.h; i += W) {
    const int64_t count = a.h - i;
    V normed = read(a.residual_out, a.out_half, row * a.out_stride + i, count) * inverse;
    V dy = read(a.dy, a.dy_half, row * a.dy_stride + i, count);
    V gradient = ((a.weight ? dy * load(a.weight + i, count) : dy) - normed * mean) * inverse;
    if (a.dresidual_out) gradient += read(a.dresidual_out, a.dout_half, row * a.dout_stride + i, count);
    write(a.dx, a.dx_half, row * a.h + i, gradient, count);
    if (a.dresidual) write(a.dresidual, a.out_half, row * a.h + i, gradient, count);
    if (a.dweight) store(dweight + i, load(dweight + i, count) + dy * normed, count);
  }
}

}  // namespace

// The second argument gives every forward kernel one signature.
MAMBAKIT_EXPORT(rms_norm)(const Arguments* a, int64_t) {
  return for_each(ceil_div(a->rows, kRows), a->threads, ceil_div(a->h, W) * W, [&](int64_t item, float* buffer) {
    for (int64_t row = item * kRows; row < min64(a->rows, (item + 1) * kRows); ++row) normalise(*a, row, buffer);
  });
}

// The weight's gradient is summed in `parts` runs of rows, then over the runs: the same for any number of threads.
MAMBAKIT_EXPORT(rms_norm_backward)(const Gradients* a) {
  const int failed = for_each(a->parts, a->threads, 0, [&](int64_t part, float*) {
    float* dweight = a->dweight_parts + part * a->h;
    if (a->dweight)
      for (int64_t i = 0; i < a->h; ++i) dweight[i] = 0.0f;
    for (int64_t row = part * a->rows / a->parts; row < (part + 1) * a->rows / a->parts; ++row)
      differentiate_row(*a, row, dweight);
  });
  if (failed || !a->dweight) return failed;
  for (int64_t i = 0; i < a->h; i += W) {
    V total = splat(0.0f);
    for (int64_t part = 0; part < a->parts; ++part) total += load(a->dweight_parts + part * a->h + i, a->h - i);
    store(a->dweight + i, total, a->h - i);
  }
  return 0;
}
