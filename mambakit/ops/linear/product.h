// A product's arguments, and how its work is dealt out.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace {

constexpr int64_t kAhead = 512;      // bytes between a prefetch and its use
constexpr int64_t kItemBytes = 128 << 10;  // of W per work item; a thread reads item after item

struct Arguments {
  const float* x;
  const void* weight;
  const float *scales, *bias;
  float* y;
  // lossless: of row r, the columns and numbers from starts[r] to starts[r + 1], which `weight` has as 0
  const int32_t *starts, *columns;
  const float* values;
  int64_t b, in, out, group, threads, x_stride, y_stride;
};

template <class T>
inline void prefetch(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead);
}

// A multiple of W.
int64_t rows_per_item(const Arguments& a, int64_t row_bytes) {
  const int64_t rows = min64(ceil_div(kItemBytes, row_bytes > 0 ? row_bytes : 1), ceil_div(a.out, 4 * a.threads));
  return ceil_div(rows, W) * W;
}

}  // namespace
