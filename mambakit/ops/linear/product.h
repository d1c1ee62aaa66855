// A product's arguments, and how its work is dealt out.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace {

// Bytes between a prefetch and its use. Memory answers after some 100 ns, in which a processor reads 2 KB at its
// bandwidth. Into the second-level cache: the first level waits for few lines at once (24 on Zen 4), and a line that is
// asked for there early holds one of those places for the whole time.
constexpr int64_t kAhead = 4096;
constexpr int64_t kItemBytes = 128 << 10;  // of W per work item; a thread reads item after item
constexpr int64_t kRowsTogether = 16;      // rows of x that meet W together; more are cut into blocks
constexpr int64_t kPartBytes = 256 << 10;  // of W that block after block meets: it stays in the second-level cache

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
  __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead, 0, 2);
}

// A multiple of W.
int64_t rows_per_item(const Arguments& a, int64_t row_bytes) {
  const int64_t rows = min64(ceil_div(kItemBytes, row_bytes > 0 ? row_bytes : 1), ceil_div(a.out, 4 * a.threads));
  return ceil_div(rows, W) * W;
}

// body(block, first, end, scratch) for rows [first, end) of W and the block of rows of x that `block` is about, after
// prepare(block, scratch), which has room for a block. Up to kRowsTogether rows are one block, which a thread prepares
// once; of more, a block is prepared anew for each part of W.
template <class Prepare, class Body>
int for_each_part(const Arguments& a, int64_t row_bytes, int64_t scratch_floats, const Prepare& prepare,
                  const Body& body) {
  if (a.b <= kRowsTogether) {
    const int64_t rows = rows_per_item(a, row_bytes);
    return for_each(ceil_div(a.out, rows), a.threads, scratch_floats, [&](float* scratch) { prepare(a, scratch); },
                    [&](int64_t item, float* scratch) {
      body(a, item * rows, min64(a.out, (item + 1) * rows), scratch);
    });
  }
  const int64_t blocks = ceil_div(a.b, kRowsTogether), least = ceil_div(2 * a.threads, blocks);  // parts of W
  const int64_t most = min64(ceil_div(kPartBytes, row_bytes > 0 ? row_bytes : 1), ceil_div(a.out, least));
  const int64_t rows = ceil_div(most, W) * W;
  return for_each(blocks * ceil_div(a.out, rows), a.threads, scratch_floats, [&](int64_t item, float* scratch) {
    const int64_t first = item % blocks * kRowsTogether, row = item / blocks * rows;
    Arguments block = a;
    block.x += first * a.x_stride;
    block.y += first * a.y_stride;
    block.b = min64(kRowsTogether, a.b - first);
    prepare(block, scratch);
    body(block, row, min64(a.out, row + rows), scratch);
  });
}

}  // namespace
