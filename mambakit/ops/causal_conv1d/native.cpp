// The causal depthwise convolution on a CPU: a vector is W neighbouring channels, the filter's window stays in
// registers. Of (b, d, l) memory, whose tokens are neighbours, it is W tokens of one channel.
#include "parallel.h"
#include "simd.h"

namespace {

// tokens of one vector before the next vector: a tile's rows stay in cache and in the TLB
constexpr int64_t kTile = 32;
constexpr int64_t kVectors = 4;  // vectors of channels per item
constexpr int64_t kLongTile = 512, kChannels = 16;  // of (b, d, l) memory: tokens per tile, channels per item

struct Arguments {
  const void* x;
  const float *weight, *bias;  // (d, k), (d,) float32
  const void* initial;
  const int32_t *slots, *cu;
  void *final_state, *y;
  int64_t b, l, d, k, sequences, silu, state_half, threads;
  int64_t x_b, x_l;
  int64_t x_c;  // stride over channels where tokens are adjacent, of x and y; 0 where channels are
};

struct Sequence {
  int64_t row, start, end, slot;
};

Sequence sequence_at(const Arguments& a, int64_t i) {
  Sequence s;
  s.row = a.cu ? 0 : i;
  s.start = a.cu ? a.cu[i] : 0;
  s.end = a.cu ? a.cu[i + 1] : a.l;
  s.slot = a.slots ? a.slots[i] : i;
  return s;
}

// `N` numbers of each of `lanes` channels, side by side in memory, as N vectors of channels. By way of memory:
// inserting into a lane of a register costs several instructions.
template <int N, class S>
void columns_in(V* columns, const S* source, int64_t lanes) {
  alignas(64) float numbers[N][W];
  if (lanes < W) memset(numbers, 0, sizeof numbers);
  auto copy = [&](int64_t count) {
    for (int64_t lane = 0; lane < count; ++lane)
      for (int i = 0; i < N; ++i) numbers[i][lane] = to_float(source[lane * N + i]);
  };
  lanes >= W ? copy(W) : copy(lanes);
  for (int i = 0; i < N; ++i) columns[i] = load(numbers[i]);
}
template <int N, class S>
void columns_out(S* target, const V* columns, int64_t lanes) {
  alignas(64) float numbers[N][W];
  for (int i = 0; i < N; ++i) store(numbers[i], columns[i]);
  auto copy = [&](int64_t count) {
    for (int64_t lane = 0; lane < count; ++lane)
      for (int i = 0; i < N; ++i) from_float(target + lane * N + i, numbers[i][lane]);
  };
  lanes >= W ? copy(W) : copy(lanes);
}

template <class T, class S, int K>
void convolve(const Arguments& a, const Sequence& s, int64_t channel) {
  const int64_t end = min64(a.d, channel + kVectors * W);
  V windows[kVectors][K];  // the K - 1 inputs before the next token, then room for that token
  for (int64_t c = channel, v = 0; c < end; c += W, ++v)
    if (a.initial && s.slot >= 0)
      columns_in<K - 1>(windows[v], static_cast<const S*>(a.initial) + (s.slot * a.d + c) * (K - 1), min64(W, end - c));
    else
      for (int i = 0; i < K - 1; ++i) windows[v][i] = splat(0.0f);
  for (int64_t t0 = s.start; t0 < s.end; t0 += kTile) {
    const int64_t t1 = min64(s.end, t0 + kTile);
    for (int64_t c = channel, v = 0; c < end; c += W, ++v) {
      const int64_t lanes = min64(W, end - c);
      V w[K], window[K];
      columns_in<K>(w, a.weight + c * K, lanes);
      for (int i = 0; i < K - 1; ++i) window[i] = windows[v][i];
      const V bias = a.bias ? load(a.bias + c, lanes) : splat(0.0f);
      for (int64_t t = t0; t < t1; ++t) {
        const T* x = static_cast<const T*>(a.x) + s.row * a.x_b + t * a.x_l + c;
        // rows are pages apart: no processor foresees them
        __builtin_prefetch(x + min64(kTile, s.end - 1 - t) * a.x_l);
        window[K - 1] = load(x, lanes);
        V y = bias;
        for (int j = 0; j < K; ++j) y += w[j] * window[j];
        for (int i = 0; i < K - 1; ++i) window[i] = window[i + 1];
        store(static_cast<T*>(a.y) + (s.row * a.l + t) * a.d + c, a.silu ? silu(y) : y, lanes);
      }
      for (int i = 0; i < K - 1; ++i) windows[v][i] = window[i];
    }
  }
  if (s.slot < 0) return;
  for (int64_t c = channel, v = 0; c < end; c += W, ++v)
    columns_out<K - 1>(static_cast<S*>(a.final_state) + (s.slot * a.d + c) * (K - 1), windows[v], min64(W, end - c));
}

// One channel of (b, d, l) memory. `window` has room for K - 1 inputs before a tile, the tile, and a vector.
template <class T, class S, int K>
void convolve_channel(const Arguments& a, const Sequence& s, int64_t channel, float* window) {
  const float *w = a.weight + channel * K, bias = a.bias ? a.bias[channel] : 0.0f;
  const int64_t state = (s.slot * a.d + channel) * (K - 1);
  const bool begins = a.initial && s.slot >= 0;
  for (int i = 0; i < K - 1; ++i) window[i] = begins ? to_float(static_cast<const S*>(a.initial)[state + i]) : 0.0f;
  const T* x = static_cast<const T*>(a.x) + s.row * a.x_b + channel * a.x_c;
  T* y = static_cast<T*>(a.y) + (s.row * a.d + channel) * a.l;
  for (int64_t t0 = s.start; t0 < s.end; t0 += kLongTile) {
    const int64_t tokens = min64(s.end - t0, kLongTile);
    for (int64_t t = 0; t < tokens; t += W) store(window + K - 1 + t, load(x + t0 + t, tokens - t));
    for (int64_t t = 0; t < tokens; t += W) {
      V out = splat(bias);
      for (int j = 0; j < K; ++j) out += w[j] * load(window + t + j);
      store(y + t0 + t, a.silu ? silu(out) : out, tokens - t);
    }
    for (int i = 0; i < K - 1; ++i) window[i] = window[tokens + i];
  }
  if (s.slot < 0) return;
  for (int i = 0; i < K - 1; ++i) from_float(static_cast<S*>(a.final_state) + state + i, window[i]);
}

template <class T, class S, int K>
int run(const Arguments& a) {
  if (a.x_c) {
    const int64_t blocks = ceil_div(a.d, kChannels);
    return for_each(a.sequences * blocks, a.threads, kLongTile + K + W, [&](int64_t item, float* window) {
      const int64_t first = item % blocks * kChannels, end = min64(a.d, first + kChannels);
      for (int64_t c = first; c < end; ++c) convolve_channel<T, S, K>(a, sequence_at(a, item / blocks), c, window);
    });
  }
  const int64_t blocks = ceil_div(a.d, kVectors * W);
  return for_each(a.sequences * blocks, a.threads, 0, [&](int64_t item, float*) {
    convolve<T, S, K>(a, sequence_at(a, item / blocks), item % blocks * kVectors * W);
  });
}

struct Gradients {
  const void *dy, *dfinal;  // dfinal has x's dtype
  void* dx;
  float *dweight, *dbias;
  void* dinitial;  // the dtype of `initial`
  float *dweight_rows, *dbias_rows;  // (b, d, k), (b, d)
  int64_t dy_b, dy_l;
  int64_t dy_c;  // as x_c
};

template <class T, class S, int K>
void differentiate_sequence(const Arguments& a, const Gradients& o, const Sequence& s, int64_t c, V* dw, V& dbias) {
  const int64_t lanes = min64(W, a.d - c), state = (s.slot * a.d + c) * (K - 1);
  V w[K], window[K], dx[K], dinitial[K];  // dx[j]: the gradient so far of the input at t - K + 1 + j
  for (int j = 0; j < K; ++j) window[j] = dx[j] = dinitial[j] = splat(0.0f);
  columns_in<K>(w, a.weight + c * K, lanes);
  if (a.initial) columns_in<K - 1>(window, static_cast<const S*>(a.initial) + state, lanes);
  const V bias = a.bias ? load(a.bias + c, lanes) : splat(0.0f);
  // The input `before` tokens into the sequence (negative: in the initial state) has all of its gradient.
  auto emit = [&](int64_t before, V gradient) {
    if (before >= 0)
      store(static_cast<T*>(o.dx) + (s.row * a.l + s.start + before) * a.d + c, gradient, lanes);
    else
      dinitial[before + K - 1] = gradient;
  };
  const int64_t tokens = s.end - s.start;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t at = s.start + t;
    window[K - 1] = load(static_cast<const T*>(a.x) + s.row * a.x_b + at * a.x_l + c, lanes);
    V g = load(static_cast<const T*>(o.dy) + s.row * o.dy_b + at * o.dy_l + c, lanes);
    if (a.silu) {
      V y = bias;
      for (int j = 0; j < K; ++j) y += w[j] * window[j];
      V open = sigmoid(y);
      g *= open * (1.0f + y * (1.0f - open));
    }
    dbias += g;
    for (int j = 0; j < K; ++j) {
      dw[j] += g * window[j];
      dx[j] += g * w[j];
    }
    emit(t - K + 1, dx[0]);
    for (int j = 0; j < K - 1; ++j) {
      window[j] = window[j + 1];
      dx[j] = dx[j + 1];
    }
    dx[K - 1] = splat(0.0f);
  }
  // What is left are the last K - 1 inputs: they are the final state, too.
  V dfinal[K];
  if (o.dfinal) columns_in<K - 1>(dfinal, static_cast<const T*>(o.dfinal) + state, lanes);
  for (int i = 0; i < K - 1; ++i) emit(tokens - K + 1 + i, o.dfinal ? dx[i] + dfinal[i] : dx[i]);
  if (o.dinitial) columns_out<K - 1>(static_cast<S*>(o.dinitial) + state, dinitial, lanes);
}

// The same of one channel of (b, d, l) memory. `window` and `slopes`, the gradients before the activation, have room
// for K - 1 numbers before a tile, the tile, and a vector.
template <class T, class S, int K>
void differentiate_channel(const Arguments& a, const Gradients& o, const Sequence& s, int64_t channel, V* dw, V& dbias,
                           float* window, float* slopes) {
  const float *w = a.weight + channel * K, bias = a.bias ? a.bias[channel] : 0.0f;
  const int64_t state = (s.slot * a.d + channel) * (K - 1), length = s.end - s.start;
  for (int i = 0; i < K - 1; ++i) {
    window[i] = a.initial ? to_float(static_cast<const S*>(a.initial)[state + i]) : 0.0f;
    slopes[i] = 0.0f;
  }
  const T* x = static_cast<const T*>(a.x) + s.row * a.x_b + channel * a.x_c + s.start;
  const T* dy = static_cast<const T*>(o.dy) + s.row * o.dy_b + channel * o.dy_c + s.start;
  T* dx = static_cast<T*>(o.dx) + (s.row * a.d + channel) * a.l + s.start;
  // The gradient of the input `at` tokens into the sequence; negative: in the initial state.
  auto emit = [&](int64_t at, float gradient) {
    if (at >= 0)
      from_float(dx + at, gradient);
    else if (o.dinitial)
      from_float(static_cast<S*>(o.dinitial) + state + at + K - 1, gradient);
  };
  for (int64_t t0 = 0; t0 < length; t0 += kLongTile) {
    const int64_t tokens = min64(length - t0, kLongTile);
    for (int64_t t = 0; t < tokens; t += W) store(window + K - 1 + t, load(x + t0 + t, tokens - t));
    for (int64_t t = 0; t < tokens; t += W) {
      V g = load(dy + t0 + t, tokens - t);
      if (a.silu) {
        V y = splat(bias);
        for (int j = 0; j < K; ++j) y += w[j] * load(window + t + j);
        V open = sigmoid(y);
        g *= open * (1.0f + y * (1.0f - open));
      }
      if (tokens - t < W) g = first_lanes(g, tokens - t);  // the window has old numbers there
      store(slopes + K - 1 + t, g);
      dbias += g;
      for (int j = 0; j < K; ++j) dw[j] += g * load(window + t + j);
    }
    // The inputs that have all of their gradient: up to K - 1 before this tile's last one.
    for (int64_t t = 0; t < tokens; t += W) {
      V gradient = splat(0.0f);
      for (int j = 0; j < K; ++j) gradient += w[j] * load(slopes + K - 1 + t - j);
      const int64_t at = t0 + t - (K - 1), count = min64(W, tokens - t);
      if (at >= 0)
        store(dx + at, gradient, count);
      else
        for (int64_t i = 0; i < count; ++i) emit(at + i, gradient[i]);
    }
    for (int i = 0; i < K - 1; ++i) {
      window[i] = window[tokens + i];
      slopes[i] = slopes[tokens + i];
    }
  }
  // What is left are the last K - 1 inputs: they are the final state, too.
  for (int i = 0; i < K - 1; ++i) {
    float gradient = o.dfinal ? to_float(static_cast<const T*>(o.dfinal)[state + i]) : 0.0f;
    for (int j = i + 1; j < K; ++j) gradient += w[j] * slopes[K - 1 + i - j];
    emit(length - (K - 1) + i, gradient);
  }
}

void sum_rows(float* target, const float* rows, int64_t count, int64_t size) {
  for (int64_t i = 0; i < size; i += W) {
    V total = splat(0.0f);
    for (int64_t row = 0; row < count; ++row) total += load(rows + row * size + i, size - i);
    store(target + i, total, size - i);
  }
}

template <class T, class S, int K>
int differentiate(const Arguments& a, const Gradients& o) {
  const int64_t blocks = ceil_div(a.d, W), room = kLongTile + K + W;
  const int64_t scratch = a.x_c ? 2 * room : 0;
  const int failed = for_each(a.b * blocks, a.threads, scratch, [&](int64_t item, float* memory) {
    const int64_t row = item / blocks, c = item % blocks * W, lanes = min64(W, a.d - c);
    if (a.x_c) {
      for (int64_t channel = c; channel < c + lanes; ++channel) {
        V dw[K], dbias = splat(0.0f);
        for (int j = 0; j < K; ++j) dw[j] = splat(0.0f);
        const int64_t first = a.cu ? 0 : row, last = a.cu ? a.sequences : row + 1, at = row * a.d + channel;
        for (int64_t i = first; i < last; ++i)
          differentiate_channel<T, S, K>(a, o, sequence_at(a, i), channel, dw, dbias, memory, memory + room);
        for (int j = 0; j < K; ++j) o.dweight_rows[at * K + j] = sum(dw[j]);
        o.dbias_rows[at] = sum(dbias);
      }
      return;
    }
    V dw[K], dbias = splat(0.0f);
    for (int j = 0; j < K; ++j) dw[j] = splat(0.0f);
    const int64_t first = a.cu ? 0 : row, last = a.cu ? a.sequences : row + 1;
    for (int64_t i = first; i < last; ++i) differentiate_sequence<T, S, K>(a, o, sequence_at(a, i), c, dw, dbias);
    for (int j = 0; j < K; ++j)
      for (int64_t lane = 0; lane < lanes; ++lane) o.dweight_rows[(row * a.d + c + lane) * K + j] = dw[j][lane];
    store(o.dbias_rows + row * a.d + c, dbias, lanes);
  });
  if (failed) return failed;
  sum_rows(o.dweight, o.dweight_rows, a.b, a.d * K);
  if (o.dbias) sum_rows(o.dbias, o.dbias_rows, a.b, a.d);
  return 0;
}

template <class T, class S>
int with_width(const Arguments& a, const Gradients* o) {
  switch (a.k) {
    case 2: return o ? differentiate<T, S, 2>(a, *o) : run<T, S, 2>(a);
    case 3: return o ? differentiate<T, S, 3>(a, *o) : run<T, S, 3>(a);
    case 4: return o ? differentiate<T, S, 4>(a, *o) : run<T, S, 4>(a);
    case 5: return o ? differentiate<T, S, 5>(a, *o) : run<T, S, 5>(a);
    case 6: return o ? differentiate<T, S, 6>(a, *o) : run<T, S, 6>(a);
    case 7: return o ? differentiate<T, S, 7>(a, *o) : run<T, S, 7>(a);
    case 8: return o ? differentiate<T, S, 8>(a, *o) : run<T, S, 8>(a);
  }
  return 2;  // not a width of these kernels
}

int with_types(const Arguments& a, const Gradients* o, int64_t half) {
  if (half) return a.state_half ? with_width<bfloat16, bfloat16>(a, o) : with_width<bfloat16, float>(a, o);
  return a.state_half ? with_width<float, bfloat16>(a, o) : with_width<float, float>(a, o);
}

}  // namespace

MAMBAKIT_EXPORT(causal_conv1d)(const Arguments* a, int64_t half) { return with_types(*a, nullptr, half); }

MAMBAKIT_EXPORT(causal_conv1d_backward)(const Arguments* a, const Gradients* o, int64_t half) {
  return with_types(*a, o, half);
}
