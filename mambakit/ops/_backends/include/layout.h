// Operands that a kernel does not read as its own vectors: of another number format, or with their tokens adjacent in
// memory instead of their channels ((b, d, l) memory). A tile of them is copied to float32 rows of channels, and back.
#pragma once

#include "simd.h"

namespace {

// A block of W channels and W tokens. Functions of their own: in a loop, GCC keeps all W addresses of rows on the
// stack.
template <class T>
__attribute__((noinline)) void block_in(float* tile, int64_t pitch, const T* p, int64_t channel_stride) {
  V v[W];
  for (int j = 0; j < W; ++j, p += channel_stride) v[j] = load(p);
  transpose(v);
  for (int j = 0; j < W; ++j, tile += pitch) store(tile, v[j]);
}
template <class T>
__attribute__((noinline)) void block_out(T* p, int64_t channel_stride, const float* tile, int64_t pitch) {
  V v[W];
  for (int j = 0; j < W; ++j, tile += pitch) v[j] = load(tile);
  transpose(v);
  for (int j = 0; j < W; ++j, p += channel_stride) store(p, v[j]);
}

// Of bfloat16, W channels and 2 W tokens are a block of as many 32-bit pairs of tokens, and half the work.
typedef uint32_t UnalignedPairs __attribute__((vector_size(W * 4), aligned(2), may_alias));
__attribute__((noinline)) void pairs_in(float* tile, int64_t pitch, const bfloat16* p, int64_t channel_stride) {
  V v[W];
  for (int j = 0; j < W; ++j, p += channel_stride) v[j] = as_float(*reinterpret_cast<const UnalignedPairs*>(p));
  transpose(v);
  for (int j = 0; j < W; ++j, tile += 2 * pitch) {
    store(tile, as_float((U)v[j] << 16));
    store(tile + pitch, as_float((U)v[j] & 0xffff0000u));
  }
}
__attribute__((noinline)) void pairs_out(bfloat16* p, int64_t channel_stride, const float* tile, int64_t pitch) {
  V v[W];
  for (int j = 0; j < W; ++j, tile += 2 * pitch)
    v[j] = as_float(half_bits(load(tile)) | (half_bits(load(tile + pitch)) << 16));
  transpose(v);
  for (int j = 0; j < W; ++j, p += channel_stride) *reinterpret_cast<UnalignedPairs*>(p) = (U)v[j];
}
// Tokens that such a block takes of those that are left; 0 where it takes none.
inline int64_t pairs_in(float* tile, int64_t pitch, const bfloat16* p, int64_t channel_stride, int64_t left) {
  if (left < 2 * W) return 0;
  pairs_in(tile, pitch, p, channel_stride);
  return 2 * W;
}
inline int64_t pairs_out(bfloat16* p, int64_t channel_stride, const float* tile, int64_t pitch, int64_t left) {
  if (left < 2 * W) return 0;
  pairs_out(p, channel_stride, tile, pitch);
  return 2 * W;
}
inline int64_t pairs_in(float*, int64_t, const float*, int64_t, int64_t) { return 0; }
inline int64_t pairs_out(float*, int64_t, const float*, int64_t, int64_t) { return 0; }

// `tokens` neighbouring tokens of each channel become rows of a tile, `pitch` floats apart. Where a row has room for
// more channels than there are, the rest of a vector is 0.
template <class T>
void tokens_in(float* tile, int64_t pitch, const T* p, int64_t channel_stride, int64_t tokens, int64_t channels) {
  for (int64_t c = 0; c < channels; c += W)
    for (int64_t t = 0, taken; t < tokens; t += taken) {
      const int64_t rows = min64(W, channels - c), count = min64(W, tokens - t);
      const T* at = p + c * channel_stride + t;
      float* to = tile + t * pitch + c;
      if (rows == W && (taken = pairs_in(to, pitch, at, channel_stride, tokens - t))) continue;
      taken = W;
      if (rows == W && count == W) {
        block_in(to, pitch, at, channel_stride);
        continue;
      }
      V v[W];
      for (int64_t j = 0; j < W; ++j) v[j] = j < rows ? load(at + j * channel_stride, count) : splat(0.0f);
      transpose(v);
      for (int64_t j = 0; j < count; ++j) store(to + j * pitch, v[j], pitch - c);
    }
}
// The way back.
template <class T>
void tokens_out(T* p, int64_t channel_stride, const float* tile, int64_t pitch, int64_t tokens, int64_t channels) {
  for (int64_t c = 0; c < channels; c += W)
    for (int64_t t = 0, taken; t < tokens; t += taken) {
      const int64_t rows = min64(W, channels - c), count = min64(W, tokens - t);
      const float* from = tile + t * pitch + c;
      T* at = p + c * channel_stride + t;
      if (rows == W && (taken = pairs_out(at, channel_stride, from, pitch, tokens - t))) continue;
      taken = W;
      if (rows == W && count == W) {
        block_out(at, channel_stride, from, pitch);
        continue;
      }
      V v[W];
      for (int64_t j = 0; j < W; ++j) v[j] = j < count ? load(from + j * pitch, rows) : splat(0.0f);
      transpose(v);
      for (int64_t j = 0; j < rows; ++j) store(at + j * channel_stride, v[j], count);
    }
}

// A (b, l, d) operand in memory, of float32 or bfloat16, whose channels or whose tokens are adjacent.
struct Operand {
  void* p;
  int64_t b, l, c, half;  // strides over rows, tokens and channels

  bool is_vectors(int64_t of_half) const { return c == 1 && half == of_half; }

  // `tokens` tokens of `channels` channels to rows of the tile.
  void in(float* tile, int64_t pitch, int64_t row, int64_t token, int64_t channel, int64_t tokens,
          int64_t channels) const {
    half ? in_as<bfloat16>(tile, pitch, row, token, channel, tokens, channels)
         : in_as<float>(tile, pitch, row, token, channel, tokens, channels);
  }
  void out(const float* tile, int64_t pitch, int64_t row, int64_t token, int64_t channel, int64_t tokens,
           int64_t channels) const {
    half ? out_as<bfloat16>(tile, pitch, row, token, channel, tokens, channels)
         : out_as<float>(tile, pitch, row, token, channel, tokens, channels);
  }
  // Asks for a tile where tokens are adjacent: its channels are pages apart, which no processor foresees.
  void prefetch(int64_t row, int64_t token, int64_t channel, int64_t tokens, int64_t channels) const {
    const int64_t size = half ? 2 : 4;
    const char* from = static_cast<const char*>(p) + (row * b + token * l + channel * c) * size;
    for (int64_t i = 0; i < channels; ++i)
      for (int64_t at = 0; at < tokens * size; at += 64) __builtin_prefetch(from + i * c * size + at);
  }
  // `count` neighbouring tokens of a channel, where tokens are adjacent.
  V tokens(int64_t row, int64_t token, int64_t channel, int64_t count) const {
    return half ? load(at<const bfloat16>(row, token, channel), count) : load(at<const float>(row, token, channel), count);
  }
  template <class T>
  T* at(int64_t row, int64_t token, int64_t channel) const {
    return static_cast<T*>(p) + row * b + token * l + channel * c;
  }

 private:
  template <class T>
  void in_as(float* tile, int64_t pitch, int64_t row, int64_t token, int64_t channel, int64_t tokens,
             int64_t channels) const {
    const T* from = at<T>(row, token, channel);
    if (c != 1) return tokens_in(tile, pitch, from, c, tokens, channels);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < channels; i += W)
        store(tile + t * pitch + i, load(from + t * l + i, channels - i), pitch - i);
  }
  template <class T>
  void out_as(const float* tile, int64_t pitch, int64_t row, int64_t token, int64_t channel, int64_t tokens,
              int64_t channels) const {
    T* to = at<T>(row, token, channel);
    if (c != 1) return tokens_out(to, c, tile, pitch, tokens, channels);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < channels; i += W)
        store(to + t * l + i, load(tile + t * pitch + i, channels - i), channels - i);
  }
};

}  // namespace
