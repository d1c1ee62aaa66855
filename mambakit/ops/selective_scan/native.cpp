// The selective scan on a CPU. Arithmetic is float32; see reference.py for the equations.
//
// Rows of several tokens: a vector is W neighbouring channels (channels are adjacent in memory), states are the loop.
// No sum crosses lanes, softplus and the gate are vectors too, and A, h are transposed once per row.
// Rows of up to kFew tokens (decode): a vector is W states of one channel, since A and h lie that way in memory and
// transposing them would cost more than the step itself.
// Which of the two runs depends on the row's length (and on whether checkpoints are kept), never on the batch: a row's bits
// are the same in any batch.
#include "parallel.h"
#include "simd.h"

namespace {

constexpr int64_t kFew = 4;
constexpr int64_t kTile = 32;  // tokens whose step sizes, inputs and outputs stay in the first-level cache
constexpr int64_t kVectors = 4;  // vectors of channels per item: a tile reads whole cache lines in groups

struct Arguments {
  const void *u, *delta;
  const float* A;
  const void *B, *C;
  const float* D;
  const void* z;
  const float *bias, *initial;
  const int32_t *slots, *cu;
  float *final_state, *checkpoints;
  void* y;
  int64_t b, l, d, n, sequences, interval, softplus, threads;
  int64_t u_b, u_l, delta_b, delta_l, z_b, z_l, B_b, B_l, C_b, C_l;
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

V step_size(V raw, int64_t softplus_) { return softplus_ ? softplus(raw) : raw; }

// (lanes, n) rows of `source` as n vectors, times `factor`; absent rows and lanes are 0.
void transpose_in(float* vectors, const float* source, int64_t lanes, int64_t n, float factor) {
  for (int64_t i = 0; i < n * W; ++i) vectors[i] = 0.0f;
  if (!source) return;
  for (int64_t j = 0; j < lanes; ++j)
    for (int64_t i = 0; i < n; ++i) vectors[i * W + j] = source[j * n + i] * factor;
}
void transpose_out(float* target, const float* vectors, int64_t lanes, int64_t n) {
  for (int64_t j = 0; j < lanes; ++j)
    for (int64_t i = 0; i < n; ++i) target[j * n + i] = vectors[i * W + j];
}

// kVectors vectors of numbers from here on will be read.
template <class T>
void prefetch_vectors(const T* p) {
  for (uint64_t i = 0; i < kVectors * W * sizeof(T); i += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + i);
}

float* checkpoint_at(const Arguments& a, int64_t row, int64_t token, int64_t channel) {
  const int64_t count = ceil_div(a.l, a.interval);
  return a.checkpoints + ((row * count + token / a.interval) * a.d + channel) * a.n;
}

// K states of one vector of channels over the tokens of a tile; `steps`, `inputs` and `y` hold kVectors vectors a token.
template <int K>
void advance(float* h, const float* A, const float* B, const float* C, const float* steps, const float* inputs, float* y,
             int64_t tokens, int64_t n) {
  constexpr int64_t kStride = kVectors * W;
  V state[K], rate[K];
  for (int k = 0; k < K; ++k) {
    state[k] = load(h + k * W);
    rate[k] = load(A + k * W);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    V step = load(steps + t * kStride), input = load(inputs + t * kStride), out = load(y + t * kStride);
    for (int k = 0; k < K; ++k) {
      state[k] = exp2(step * rate[k]) * state[k] + input * B[t * n + k];
      out += state[k] * C[t * n + k];
    }
    store(y + t * kStride, out);
  }
  for (int k = 0; k < K; ++k) store(h + k * W, state[k]);
}

template <class T>
void scan_channels(const Arguments& a, const Sequence& s, int64_t channel, float* scratch) {
  const int64_t n = a.n, vectors = min64(kVectors, ceil_div(a.d - channel, W));
  float *A = scratch, *h = A + kVectors * n * W, *B = h + kVectors * n * W, *C = B + kTile * n;
  float *steps = C + kTile * n, *inputs = steps + kTile * kVectors * W, *y = inputs + kTile * kVectors * W;
  float *D = y + kTile * kVectors * W, *bias = D + kVectors * W;
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t c = channel + v * W, lanes = min64(W, a.d - c);
    transpose_in(A + v * n * W, a.A + c * n, lanes, n, kLog2e);
    const float* initial = a.initial && s.slot >= 0 ? a.initial + (s.slot * a.d + c) * n : nullptr;
    transpose_in(h + v * n * W, initial, lanes, n, 1.0f);
    store(D + v * W, a.D ? load(a.D + c, lanes) : splat(0.0f));
    store(bias + v * W, a.bias ? load(a.bias + c, lanes) : splat(0.0f));
  }
  for (int64_t t0 = s.start; t0 < s.end;) {
    const int64_t t1 = min64(s.end, (t0 / kTile + 1) * kTile), tokens = t1 - t0;
    const T* b_row = static_cast<const T*>(a.B) + s.row * a.B_b + t0 * a.B_l;
    const T* c_row = static_cast<const T*>(a.C) + s.row * a.C_b + t0 * a.C_l;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < n; i += W) {
        store(B + t * n + i, load(b_row + t * a.B_l + i, n - i), n - i);
        store(C + t * n + i, load(c_row + t * a.C_l + i, n - i), n - i);
      }
    // An interval is a multiple of the tile, so a checkpoint is only ever at a tile's start.
    if (a.interval && t0 % a.interval == 0 && (t0 > s.start || t0 == 0))
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t c = channel + v * W;
        transpose_out(checkpoint_at(a, s.row, t0, c), h + v * n * W, min64(W, a.d - c), n);
      }
    // Token by token over all of the item's channels: whole cache lines, once. Rows are pages apart, which no processor
    // foresees, so the next tile is asked for while this one is read.
    const T* u = static_cast<const T*>(a.u) + s.row * a.u_b + t0 * a.u_l + channel;
    const T* delta = static_cast<const T*>(a.delta) + s.row * a.delta_b + t0 * a.delta_l + channel;
    const T* z = a.z ? static_cast<const T*>(a.z) + s.row * a.z_b + t0 * a.z_l + channel : nullptr;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t ahead = min64(t + kTile, s.end - 1 - t0);
      prefetch_vectors(u + ahead * a.u_l);
      prefetch_vectors(delta + ahead * a.delta_l);
      if (z) prefetch_vectors(z + t * a.z_l);  // of this tile, used after its states
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t c = channel + v * W, lanes = min64(W, a.d - c), at = (t * kVectors + v) * W;
        V x = load(u + t * a.u_l + v * W, lanes), raw = load(delta + t * a.delta_l + v * W, lanes);
        V step = step_size(raw + load(bias + v * W), a.softplus);
        store(steps + at, step);
        store(inputs + at, step * x);
        store(y + at, load(D + v * W) * x);
      }
    }
    for (int64_t v = 0; v < vectors; ++v) {
      float *hv = h + v * n * W, *Av = A + v * n * W;
      int64_t i = 0;
      for (; i + 4 <= n; i += 4)
        advance<4>(hv + i * W, Av + i * W, B + i, C + i, steps + v * W, inputs + v * W, y + v * W, tokens, n);
      for (; i < n; ++i)
        advance<1>(hv + i * W, Av + i * W, B + i, C + i, steps + v * W, inputs + v * W, y + v * W, tokens, n);
    }
    T* out = static_cast<T*>(a.y) + (s.row * a.l + t0) * a.d + channel;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t lanes = min64(W, a.d - channel - v * W);
        V value = load(y + (t * kVectors + v) * W);
        if (z) value *= silu(load(z + t * a.z_l + v * W, lanes));
        store(out + t * a.d + v * W, value, lanes);
      }
    t0 = t1;
  }
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t c = channel + v * W, lanes = min64(W, a.d - c);
    // The state that enters a later packed sequence's checkpoint is the one this sequence leaves.
    if (a.interval && s.end > s.start && s.end < a.l && s.end % a.interval == 0)
      transpose_out(checkpoint_at(a, s.row, s.end, c), h + v * n * W, lanes, n);
    if (s.slot >= 0) transpose_out(a.final_state + (s.slot * a.d + c) * n, h + v * n * W, lanes, n);
  }
}

template <class T>
void scan_states(const Arguments& a, const Sequence& s, int64_t channel, float* scratch) {
  const int64_t n = a.n, padded = ceil_div(n, W) * W, end = min64(a.d, channel + kVectors * W);
  float *B = scratch, *C = B + kFew * padded, *dropped = C + kFew * padded;
  const int64_t tokens = s.end - s.start;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < n; i += W) {
      const int64_t at = s.start + t;
      store(B + t * padded + i, load(static_cast<const T*>(a.B) + s.row * a.B_b + at * a.B_l + i, n - i));
      store(C + t * padded + i, load(static_cast<const T*>(a.C) + s.row * a.C_b + at * a.C_l + i, n - i));
    }
  for (int64_t c = channel; c < end; c += W) {
    const int64_t lanes = min64(W, end - c);
    const V bias = a.bias ? load(a.bias + c, lanes) : splat(0.0f);
    const V D = a.D ? load(a.D + c, lanes) : splat(0.0f);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t at = s.start + t;
      const V x = load(static_cast<const T*>(a.u) + s.row * a.u_b + at * a.u_l + c, lanes);
      const T* delta = static_cast<const T*>(a.delta) + s.row * a.delta_b + at * a.delta_l + c;
      const V step = step_size(load(delta, lanes) + bias, a.softplus);
      alignas(64) float exponents[W], inputs[W];
      store(exponents, step * kLog2e);
      store(inputs, step * x);
      V products[W];
      for (int64_t j = 0; j < W; ++j) products[j] = splat(0.0f);
      for (int64_t j = 0; j < lanes; ++j) {
        float* target = s.slot < 0 ? dropped + (c - channel + j) * n : a.final_state + (s.slot * a.d + c + j) * n;
        const float* source = target;
        if (t == 0) source = s.slot < 0 || !a.initial ? nullptr : a.initial + (s.slot * a.d + c + j) * n;
        const float* A = a.A + (c + j) * n;
        for (int64_t i = 0; i < n; i += W) {
          const int64_t count = n - i;
          V h = source ? load(source + i, count) : splat(0.0f);
          h = exp2(load(A + i, count) * exponents[j]) * h + load(B + t * padded + i) * inputs[j];
          if (count < W) h = first_lanes(h, count);  // 0 times an infinite step would be NaN in the unused ones
          products[j] += h * load(C + t * padded + i);
          store(target + i, h, count);
        }
      }
      V value = sums(products) + D * x;
      if (a.z) value *= silu(load(static_cast<const T*>(a.z) + s.row * a.z_b + at * a.z_l + c, lanes));
      store(static_cast<T*>(a.y) + (s.row * a.l + at) * a.d + c, value, lanes);
    }
  }
}

template <class T>
int run(const Arguments& a) {
  const int64_t padded = ceil_div(a.n, W) * W, blocks = ceil_div(a.d, kVectors * W);
  const int64_t scratch = 2 * kVectors * padded * W + 2 * kTile * padded + (3 * kTile + 2) * kVectors * W;
  return for_each(a.sequences * blocks, a.threads, scratch, [&](int64_t item, float* memory) {
    const Sequence s = sequence_at(a, item / blocks);
    const int64_t channel = item % blocks * kVectors * W, tokens = s.end - s.start;
    if (tokens >= 1 && tokens <= kFew && !a.interval)
      scan_states<T>(a, s, channel, memory);  // keeps no checkpoints
    else
      scan_channels<T>(a, s, channel, memory);
  });
}

// -- the gradient ------------------------------------------------------------------------------------------------------

struct Gradients {
  const void* dy;
  const float *dfinal, *checkpoints;
  void *du, *ddelta;
  float* dA;
  void *dB, *dC;
  float* dD;
  void* dz;
  float *dbias, *dinitial;
  // Partial sums: dB and dC of each group of channels (2, groups, b, n, l); dA, dD, dbias of each row.
  float *partial, *dA_rows, *dD_rows, *dbias_rows;
  int64_t groups, dy_b, dy_l;
};

// Buffers of one interval and one vector of channels; every field is `tokens` vectors unless noted.
struct Interval {
  float *B, *C;  // (n, tokens), float32
  float *step, *u, *input, *dy;  // dy: the gradient of the output before the gate
  float *y, *gB, *dstep;  // sums over states: C.h, g.B, and the decay's part of ddelta
  float *h, *decay;  // of one state; h has one vector more, the state before the first token
  float *to_B, *to_C;  // of one state, before their sum over channels
};

int64_t interval_floats(int64_t n, int64_t interval) { return 2 * n * interval + (12 * interval + 1) * W; }

Interval place(float* memory, int64_t n, int64_t interval) {
  Interval s;
  s.B = memory;
  s.C = s.B + n * interval;
  float** fields[] = {&s.step, &s.u, &s.input, &s.dy, &s.y, &s.gB, &s.dstep, &s.decay, &s.to_B, &s.to_C};
  float* next = s.C + n * interval;
  for (float** field : fields) {
    *field = next;
    next += interval * W;
  }
  s.h = next;
  return s;
}

// One state over an interval: forward again from the state that entered it, then back. Adds to y, gB, dstep and dA;
// leaves what dB and dC get from each channel in to_B and to_C; g is the gradient of the state, from right to left.
void differentiate(const Interval& s, int64_t tokens, int64_t interval, int64_t i, V h, V rate, V& g, V& dA) {
  const float *B = s.B + i * interval, *C = s.C + i * interval;
  const V exponent = rate * kLog2e;
  store(s.h, h);
  for (int64_t t = 0; t < tokens; ++t) {
    V decay = exp2(load(s.step + t * W) * exponent);
    h = decay * h + load(s.input + t * W) * B[t];
    store(s.decay + t * W, decay);
    store(s.h + (t + 1) * W, h);
    store(s.y + t * W, load(s.y + t * W) + h * C[t]);
    store(s.to_C + t * W, load(s.dy + t * W) * h);
  }
  for (int64_t t = tokens - 1; t >= 0; --t) {
    g += load(s.dy + t * W) * C[t];
    store(s.gB + t * W, load(s.gB + t * W) + g * B[t]);
    store(s.to_B + t * W, g * load(s.input + t * W));
    g *= load(s.decay + t * W);
    V through = g * load(s.h + t * W);
    store(s.dstep + t * W, load(s.dstep + t * W) + through * rate);
    dA += through * load(s.step + t * W);
  }
}

// target[t] += sum over channels of products[t], W tokens at a time.
void add_channel_sums(float* target, const float* products, int64_t tokens) {
  for (int64_t t = 0; t < tokens; t += W) {
    V v[W];
    for (int64_t k = 0; k < W; ++k) v[k] = t + k < tokens ? load(products + (t + k) * W) : splat(0.0f);
    store(target + t, load(target + t, tokens - t) + sums(v), tokens - t);
  }
}

template <class T>
void differentiate_sequence(const Arguments& a, const Gradients& o, const Sequence& s, int64_t channel, float* dB, float* dC,
                            const float* A, float* g, float* dA, V& dD, V& dbias, float* entering, const Interval& x) {
  const int64_t n = a.n, lanes = min64(W, a.d - channel), I = a.interval;
  transpose_in(g, o.dfinal ? o.dfinal + (s.slot * a.d + channel) * n : nullptr, lanes, n, 1.0f);
  const V bias = a.bias ? load(a.bias + channel, lanes) : splat(0.0f);
  const V D = a.D ? load(a.D + channel, lanes) : splat(0.0f);
  for (int64_t t1 = s.end; t1 > s.start;) {
    const int64_t boundary = (t1 - 1) / I * I, t0 = boundary > s.start ? boundary : s.start, tokens = t1 - t0;
    const float* state = nullptr;
    if (t0 > s.start)
      state = o.checkpoints + ((s.row * ceil_div(a.l, I) + t0 / I) * a.d + channel) * n;
    else if (a.initial)
      state = a.initial + (s.slot * a.d + channel) * n;
    transpose_in(entering, state, lanes, n, 1.0f);
    const T* u = static_cast<const T*>(a.u) + s.row * a.u_b + t0 * a.u_l + channel;
    const T* delta = static_cast<const T*>(a.delta) + s.row * a.delta_b + t0 * a.delta_l + channel;
    const T* z = a.z ? static_cast<const T*>(a.z) + s.row * a.z_b + t0 * a.z_l + channel : nullptr;
    const T* dy = static_cast<const T*>(o.dy) + s.row * o.dy_b + t0 * o.dy_l + channel;
    const T* b_row = static_cast<const T*>(a.B) + s.row * a.B_b + t0 * a.B_l;
    const T* c_row = static_cast<const T*>(a.C) + s.row * a.C_b + t0 * a.C_l;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < n; ++i) {
        x.B[i * I + t] = to_float(b_row[t * a.B_l + i]);
        x.C[i * I + t] = to_float(c_row[t * a.C_l + i]);
      }
      V value = load(u + t * a.u_l, lanes), step = step_size(load(delta + t * a.delta_l, lanes) + bias, a.softplus);
      V gradient = load(dy + t * o.dy_l, lanes);
      if (z) gradient *= silu(load(z + t * a.z_l, lanes));
      store(x.step + t * W, step);
      store(x.u + t * W, value);
      store(x.input + t * W, step * value);
      store(x.dy + t * W, gradient);
      store(x.y + t * W, D * value);
      store(x.gB + t * W, splat(0.0f));
      store(x.dstep + t * W, splat(0.0f));
      dD += gradient * value;
    }
    for (int64_t i = 0; i < n; ++i) {
      V gradient = load(g + i * W), decay_gradient = load(dA + i * W);
      differentiate(x, tokens, I, i, load(entering + i * W), load(A + i * W), gradient, decay_gradient);
      store(g + i * W, gradient);
      store(dA + i * W, decay_gradient);
      add_channel_sums(dB + i * a.l + t0, x.to_B, tokens);
      add_channel_sums(dC + i * a.l + t0, x.to_C, tokens);
    }
    const int64_t out = (s.row * a.l + t0) * a.d + channel;
    for (int64_t t = 0; t < tokens; ++t) {
      V gB = load(x.gB + t * W), gradient = load(x.dy + t * W);
      store(static_cast<T*>(o.du) + out + t * a.d, gB * load(x.step + t * W) + gradient * D, lanes);
      V dstep = load(x.dstep + t * W) + gB * load(x.u + t * W);
      if (a.softplus) dstep *= sigmoid(load(delta + t * a.delta_l, lanes) + bias);
      store(static_cast<T*>(o.ddelta) + out + t * a.d, dstep, lanes);
      dbias += dstep;
      if (z) {
        V gate = load(z + t * a.z_l, lanes), open = sigmoid(gate);
        V dz = load(dy + t * o.dy_l, lanes) * load(x.y + t * W) * open * (1.0f + gate * (1.0f - open));
        store(static_cast<T*>(o.dz) + out + t * a.d, dz, lanes);
      }
    }
    t1 = t0;
  }
  if (o.dinitial) transpose_out(o.dinitial + (s.slot * a.d + channel) * n, g, lanes, n);
}

template <class T>
void differentiate_group(const Arguments& a, const Gradients& o, int64_t row, int64_t group, float* memory) {
  const int64_t n = a.n, blocks = ceil_div(a.d, W);
  float *A = memory, *g = A + n * W, *dA = g + n * W, *entering = dA + n * W;
  const Interval x = place(entering + n * W, n, a.interval);
  float* dB = o.partial + (group * a.b + row) * n * a.l;
  float* dC = dB + o.groups * a.b * n * a.l;
  for (int64_t i = 0; i < n * a.l; ++i) dB[i] = dC[i] = 0.0f;
  const int64_t first = a.cu ? 0 : row, last = a.cu ? a.sequences : row + 1;
  for (int64_t block = group * blocks / o.groups; block < (group + 1) * blocks / o.groups; ++block) {
    const int64_t channel = block * W, lanes = min64(W, a.d - channel);
    transpose_in(A, a.A + channel * n, lanes, n, 1.0f);
    transpose_in(dA, nullptr, lanes, n, 1.0f);
    V dD = splat(0.0f), dbias = splat(0.0f);
    for (int64_t i = first; i < last; ++i)
      differentiate_sequence<T>(a, o, sequence_at(a, i), channel, dB, dC, A, g, dA, dD, dbias, entering, x);
    transpose_out(o.dA_rows + (row * a.d + channel) * n, dA, lanes, n);
    store(o.dD_rows + row * a.d + channel, dD, lanes);
    store(o.dbias_rows + row * a.d + channel, dbias, lanes);
  }
}

// target (b, l, n) = the groups' parts (groups, b, n, l), summed in the order of the groups.
template <class T>
void sum_groups(const Arguments& a, const Gradients& o, const float* parts, T* target, int64_t row, int64_t t0) {
  const int64_t n = a.n, tokens = min64(W, a.l - t0), stride = a.b * n * a.l;
  for (int64_t i = 0; i < n; ++i) {
    const float* part = parts + (row * n + i) * a.l + t0;
    V total = splat(0.0f);
    for (int64_t group = 0; group < o.groups; ++group) total += load(part + group * stride, tokens);
    for (int64_t t = 0; t < tokens; ++t) from_float(target + (row * a.l + t0 + t) * n + i, total[t]);
  }
}

void sum_rows(float* target, const float* rows, int64_t count, int64_t size) {
  for (int64_t i = 0; i < size; i += W) {
    V total = splat(0.0f);
    for (int64_t row = 0; row < count; ++row) total += load(rows + row * size + i, size - i);
    store(target + i, total, size - i);
  }
}

template <class T>
int differentiate(const Arguments& a, const Gradients& o) {
  const int64_t scratch = 4 * a.n * W + interval_floats(a.n, a.interval);
  const int failed = for_each(a.b * o.groups, a.threads, scratch, [&](int64_t item, float* memory) {
    differentiate_group<T>(a, o, item / o.groups, item % o.groups, memory);
  });
  if (failed) return failed;
  sum_rows(o.dA, o.dA_rows, a.b, a.d * a.n);
  if (o.dD) sum_rows(o.dD, o.dD_rows, a.b, a.d);
  if (o.dbias) sum_rows(o.dbias, o.dbias_rows, a.b, a.d);
  const int64_t tiles = ceil_div(a.l, W);
  return for_each(a.b * tiles, a.threads, 0, [&](int64_t item, float*) {
    const int64_t row = item / tiles, t0 = item % tiles * W;
    sum_groups(a, o, o.partial, static_cast<T*>(o.dB), row, t0);
    sum_groups(a, o, o.partial + o.groups * a.b * a.n * a.l, static_cast<T*>(o.dC), row, t0);
  });
}

}  // namespace

MAMBAKIT_EXPORT(selective_scan)(const Arguments* a, int64_t half) { return half ? run<bfloat16>(*a) : run<float>(*a); }
MAMBAKIT_EXPORT(selective_scan_backward)(const Arguments* a, const Gradients* o, int64_t half) {
  return half ? differentiate<bfloat16>(*a, *o) : differentiate<float>(*a, *o);
}
