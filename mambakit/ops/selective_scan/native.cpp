// The selective scan on a CPU. Arithmetic is float32; see reference.py for the equations.
//
// Rows of several tokens: a vector is W neighbouring channels (channels are adjacent in memory), states are the loop.
// No sum crosses lanes, softplus and the gate are vectors too, and A, h are transposed once per row.
// Rows of up to kFew tokens (decode): a vector is W states of one channel, since A and h lie that way in memory and
// transposing them would cost more than the step itself.
// Which of the two runs depends on the row's length (and on whether checkpoints are kept), never on the batch: a row's
// bits are the same in any batch.
// One state, with tokens adjacent in memory: a vector is W tokens of one channel.
//
// B and C: rows of each of `groups` groups of channels, or constants over time, of which every channel has its own, as
// of A. An item's channels belong to one group. Operands in another number format than y's, or with tokens adjacent
// instead of channels, are copied tile by tile (layout.h), into the cache and out of it.
#include "layout.h"
#include "parallel.h"
#include "simd.h"
#include "steps.h"

namespace {

constexpr int64_t kFew = 4;
// Vectors of channels per item, and tokens whose step sizes, inputs and outputs stay in the first-level cache: a tile
// reads whole cache lines in groups. Where tokens are adjacent, few channels and many tokens are long runs on few
// pages.
constexpr int64_t kVectors = 4, kTile = 32;
constexpr int64_t kFewVectors = 1, kLongTile = 128;
// One state with tokens adjacent: channels per item and tokens whose B and C stay in the first-level cache.
constexpr int64_t kChannels = 16, kRun = 512;

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
  // What follows may all be 0: channels are adjacent, y is contiguous, all is of one format, B and C have one group.
  int64_t u_c, delta_c, z_c, y_c;  // strides over channels; y is (b, l, d) or, with a stride, (b, d, l) memory
  int64_t delta_other, z_other, B_other, C_other;  // of the other format: bfloat16 where y is float32 and vice versa
  int64_t groups, B_g, C_g, B_n, C_n;  // strides over groups and states
  int64_t B_constant, C_constant;      // float32 (d, n) of every row, which are B_b or C_b apart
};

constexpr int64_t is_half(const float*) { return 0; }
constexpr int64_t is_half(const bfloat16*) { return 1; }

template <class T>
Operand operand(const void* p, int64_t b, int64_t l, int64_t c, int64_t other) {
  return {const_cast<void*>(p), b, l, c ? c : 1, is_half(static_cast<T*>(nullptr)) ^ other};
}
template <class T>
Operand output(const Arguments& a, void* p, int64_t c, int64_t other) {
  return operand<T>(p, a.l * a.d, c ? 1 : a.d, c, other);
}

// Channels of a group, and how many items of `width` channels they make.
struct Groups {
  int64_t count, channels, blocks;
  Groups(const Arguments& a, int64_t width)
      : count(a.groups ? a.groups : 1), channels(a.d / count), blocks(ceil_div(channels, width)) {}
};

// B or C of one group and row.
struct Selection {
  const void* p;
  int64_t l, n, half;
  const float* constant;  // (d, n), or null

  // Rows of `pitch` floats, one for each of `tokens` tokens. Few states one by one: a part of a vector is a call of
  // memcpy, twice for every token.
  void rows(float* target, int64_t pitch, int64_t token, int64_t tokens, int64_t count) const {
    if (count >= W) return Operand{const_cast<void*>(p), 0, l, n, half}.in(target, pitch, 0, token, 0, tokens, count);
    half ? states_as<bfloat16>(target, pitch, 1, token, tokens, count)
         : states_as<float>(target, pitch, 1, token, tokens, count);
  }
  // The same with one row, of `pitch` floats, for each state.
  void columns(float* target, int64_t pitch, int64_t token, int64_t tokens, int64_t count) const {
    half ? states_as<bfloat16>(target, 1, pitch, token, tokens, count)
         : states_as<float>(target, 1, pitch, token, tokens, count);
  }

 private:
  template <class T>
  void states_as(float* target, int64_t per_token, int64_t per_state, int64_t token, int64_t tokens,
                 int64_t count) const {
    const T* from = static_cast<const T*>(p) + token * l;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < count; ++i) target[t * per_token + i * per_state] = to_float(from[t * l + i * n]);
  }
};
template <class T>
Selection selection(const void* p, int64_t b, int64_t l, int64_t g, int64_t n, int64_t other, int64_t constant,
                    int64_t row, int64_t group) {
  const int64_t half = is_half(static_cast<T*>(nullptr)) ^ other;
  if (constant) return {nullptr, 0, 0, 0, static_cast<const float*>(p) + row * b};
  const char* at = static_cast<const char*>(p) + (row * b + group * g) * (half ? 2 : 4);
  return {at, l, n ? n : 1, half, nullptr};
}
template <class T>
Selection B_of(const Arguments& a, int64_t row, int64_t group) {
  return selection<T>(a.B, a.B_b, a.B_l, a.B_g, a.B_n, a.B_other, a.B_constant, row, group);
}
template <class T>
Selection C_of(const Arguments& a, int64_t row, int64_t group) {
  return selection<T>(a.C, a.C_b, a.C_l, a.C_g, a.C_n, a.C_other, a.C_constant, row, group);
}

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

// VECTORS vectors of numbers from here on will be read.
template <int64_t VECTORS, class T>
void prefetch_vectors(const T* p) {
  for (uint64_t i = 0; i < VECTORS * W * sizeof(T); i += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + i);
}

float* checkpoint_at(const Arguments& a, int64_t row, int64_t token, int64_t channel) {
  const int64_t count = ceil_div(a.l, a.interval);
  return a.checkpoints + ((row * count + token / a.interval) * a.d + channel) * a.n;
}

// K states of one vector of channels over the tokens of a tile; `steps`, `inputs` and `y` hold VECTORS vectors a token.
// B and C have rows of n states, or (OWN_B, OWN_C) are constants of each channel, one vector a state.
template <int64_t VECTORS, int K, bool OWN_B, bool OWN_C>
void advance(float* h, const float* A, const float* B, const float* C, const float* steps, const float* inputs,
             float* y, int64_t tokens, int64_t n) {
  constexpr int64_t kStride = VECTORS * W;
  V state[K], rate[K], own_B[K], own_C[K];
  for (int k = 0; k < K; ++k) {
    state[k] = load(h + k * W);
    rate[k] = load(A + k * W);
    if (OWN_B) own_B[k] = load(B + k * W);
    if (OWN_C) own_C[k] = load(C + k * W);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    V step = load(steps + t * kStride), input = load(inputs + t * kStride), out = load(y + t * kStride);
    for (int k = 0; k < K; ++k) {
      state[k] = exp2(step * rate[k]) * state[k] + (OWN_B ? input * own_B[k] : input * B[t * n + k]);
      out += OWN_C ? state[k] * own_C[k] : state[k] * C[t * n + k];
    }
    store(y + t * kStride, out);
  }
  for (int k = 0; k < K; ++k) store(h + k * W, state[k]);
}

// All n states of one vector of channels, four at a time.
template <int64_t VECTORS, bool OWN_B, bool OWN_C>
void advance_all(float* h, const float* A, const float* B, const float* C, const float* steps, const float* inputs,
                 float* y, int64_t tokens, int64_t n) {
  constexpr int64_t kB = OWN_B ? W : 1, kC = OWN_C ? W : 1;
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    advance<VECTORS, 4, OWN_B, OWN_C>(h + i * W, A + i * W, B + i * kB, C + i * kC, steps, inputs, y, tokens, n);
  for (; i < n; ++i)
    advance<VECTORS, 1, OWN_B, OWN_C>(h + i * W, A + i * W, B + i * kB, C + i * kC, steps, inputs, y, tokens, n);
}

int64_t scan_floats(const Arguments& a, int64_t vectors, int64_t tile) {
  return 4 * vectors * a.n * W + 2 * tile * a.n + 3 * tile * vectors * W + 2 * vectors * W;
}

// `tile` divides the interval of checkpoints.
template <class T, int64_t VECTORS>
void scan_channels(const Arguments& a, const Sequence& s, int64_t group, int64_t channel, int64_t end, int64_t tile,
                   float* scratch) {
  constexpr int64_t kPitch = VECTORS * W;
  const int64_t floats = tile * kPitch;
  const int64_t n = a.n, channels = min64(kPitch, end - channel), vectors = ceil_div(channels, W);
  float *A = scratch, *h = A + kPitch * n, *own_B = h + kPitch * n, *own_C = own_B + kPitch * n;
  float *B = own_C + kPitch * n, *C = B + tile * n;
  float *steps = C + tile * n, *inputs = steps + floats, *y = inputs + floats;
  float *D = y + floats, *bias = D + kPitch;
  const Operand u_of = operand<T>(a.u, a.u_b, a.u_l, a.u_c, 0), y_of = output<T>(a, a.y, a.y_c, 0);
  const Operand delta_of = operand<T>(a.delta, a.delta_b, a.delta_l, a.delta_c, a.delta_other);
  const Operand z_of = operand<T>(a.z, a.z_b, a.z_l, a.z_c, a.z_other);
  const int64_t half = is_half(static_cast<T*>(nullptr));
  const bool copies_u = !u_of.is_vectors(half), copies_delta = !delta_of.is_vectors(half);
  const bool copies_z = a.z && !z_of.is_vectors(half), copies_y = !y_of.is_vectors(half);
  const Selection B_rows = B_of<T>(a, s.row, group), C_rows = C_of<T>(a, s.row, group);
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t c = channel + v * W, lanes = min64(W, end - c);
    transpose_in(A + v * n * W, a.A + c * n, lanes, n, kLog2e);
    if (B_rows.constant) transpose_in(own_B + v * n * W, B_rows.constant + c * n, lanes, n, 1.0f);
    if (C_rows.constant) transpose_in(own_C + v * n * W, C_rows.constant + c * n, lanes, n, 1.0f);
    const float* initial = a.initial && s.slot >= 0 ? a.initial + (s.slot * a.d + c) * n : nullptr;
    transpose_in(h + v * n * W, initial, lanes, n, 1.0f);
    store(D + v * W, a.D ? load(a.D + c, lanes) : splat(0.0f));
    store(bias + v * W, a.bias ? load(a.bias + c, lanes) : splat(0.0f));
  }
  for (int64_t t0 = s.start; t0 < s.end;) {
    const int64_t t1 = min64(s.end, (t0 / tile + 1) * tile), tokens = t1 - t0;
    if (!B_rows.constant) B_rows.rows(B, n, t0, tokens, n);
    if (!C_rows.constant) C_rows.rows(C, n, t0, tokens, n);
    // An interval is a multiple of the tile, so a checkpoint is only ever at a tile's start.
    if (a.interval && t0 % a.interval == 0 && (t0 > s.start || t0 == 0))
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t c = channel + v * W;
        transpose_out(checkpoint_at(a, s.row, t0, c), h + v * n * W, min64(W, end - c), n);
      }
    if (copies_u) u_of.in(inputs, kPitch, s.row, t0, channel, tokens, channels);
    if (copies_delta) delta_of.in(steps, kPitch, s.row, t0, channel, tokens, channels);
    const int64_t later = min64(s.end - t1, tile);  // tokens of the next tile
    if (a.u_c) u_of.prefetch(s.row, t1, channel, later, channels);
    if (a.delta_c) delta_of.prefetch(s.row, t1, channel, later, channels);
    if (a.z_c) z_of.prefetch(s.row, t0, channel, tokens, channels);
    if (a.y_c) y_of.prefetch(s.row, t0, channel, tokens, channels);
    // Token by token over all of the item's channels: whole cache lines, once. Rows are pages apart, which no processor
    // foresees, so the next tile is asked for while this one is read.
    const T* u = static_cast<const T*>(a.u) + s.row * a.u_b + t0 * a.u_l + channel;
    const T* delta = static_cast<const T*>(a.delta) + s.row * a.delta_b + t0 * a.delta_l + channel;
    const T* z = a.z ? static_cast<const T*>(a.z) + s.row * a.z_b + t0 * a.z_l + channel : nullptr;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t ahead = min64(t + tile, s.end - 1 - t0);
      if (!copies_u) prefetch_vectors<VECTORS>(u + ahead * a.u_l);
      if (!copies_delta) prefetch_vectors<VECTORS>(delta + ahead * a.delta_l);
      if (z && !copies_z) prefetch_vectors<VECTORS>(z + t * a.z_l);  // of this tile, used after its states
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t c = channel + v * W, lanes = min64(W, end - c), at = (t * VECTORS + v) * W;
        V x = copies_u ? load(inputs + at) : load(u + t * a.u_l + v * W, lanes);
        V raw = copies_delta ? load(steps + at) : load(delta + t * a.delta_l + v * W, lanes);
        V step = step_size(raw + load(bias + v * W), a.softplus);
        store(steps + at, step);
        store(inputs + at, step * x);
        store(y + at, load(D + v * W) * x);
      }
    }
    for (int64_t v = 0; v < vectors; ++v) {
      float *hv = h + v * n * W, *Av = A + v * n * W, *yv = y + v * W;
      const float *Bv = B_rows.constant ? own_B + v * n * W : B, *Cv = C_rows.constant ? own_C + v * n * W : C;
      auto of_own_B = C_rows.constant ? advance_all<VECTORS, true, true> : advance_all<VECTORS, true, false>;
      auto of_B = C_rows.constant ? advance_all<VECTORS, false, true> : advance_all<VECTORS, false, false>;
      auto all = B_rows.constant ? of_own_B : of_B;
      all(hv, Av, Bv, Cv, steps + v * W, inputs + v * W, yv, tokens, n);
    }
    if (copies_z) z_of.in(steps, kPitch, s.row, t0, channel, tokens, channels);  // the step sizes are used
    T* out = static_cast<T*>(a.y) + (s.row * a.l + t0) * a.d + channel;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t lanes = min64(W, end - channel - v * W), at = (t * VECTORS + v) * W;
        V value = load(y + at);
        if (z) value *= silu(copies_z ? load(steps + at) : load(z + t * a.z_l + v * W, lanes));
        if (copies_y)
          store(y + at, value);
        else
          store(out + t * a.d + v * W, value, lanes);
      }
    if (copies_y) y_of.out(y, kPitch, s.row, t0, channel, tokens, channels);
    t0 = t1;
  }
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t c = channel + v * W, lanes = min64(W, end - c);
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

// One state, and tokens adjacent in every operand: a vector is W tokens of one channel, and its W steps are composed in
// registers. Nothing is transposed, which would cost more than the recurrence of a single state.
template <class T>
void scan_tokens(const Arguments& a, const Sequence& s, int64_t group, int64_t channel, int64_t end, float* scratch) {
  float *B = scratch, *C = B + kRun, *steps = C + kRun, *inputs = steps + kRun, *out = inputs + kRun, *h = out + kRun;
  const Operand u = operand<T>(a.u, a.u_b, a.u_l, a.u_c, 0), y = output<T>(a, a.y, a.y_c, 0);
  const Operand delta = operand<T>(a.delta, a.delta_b, a.delta_l, a.delta_c, a.delta_other);
  const Operand z = operand<T>(a.z, a.z_b, a.z_l, a.z_c, a.z_other);
  const Selection B_rows = B_of<T>(a, s.row, group), C_rows = C_of<T>(a, s.row, group);
  const float* initial = a.initial && s.slot >= 0 ? a.initial + s.slot * a.d : nullptr;
  for (int64_t c = channel; c < end; ++c) {
    h[c - channel] = initial ? initial[c] : 0.0f;
    if (a.interval && s.start == 0 && s.end > 0) *checkpoint_at(a, s.row, 0, c) = h[c - channel];
  }
  for (int64_t t0 = s.start; t0 < s.end; t0 += kRun) {
    const int64_t tokens = min64(kRun, s.end - t0);
    if (!B_rows.constant) B_rows.columns(B, tokens, t0, tokens, 1);
    if (!C_rows.constant) C_rows.columns(C, tokens, t0, tokens, 1);
    for (int64_t c = channel; c < end; ++c) {
      const float rate = a.A[c] * kLog2e, D = a.D ? a.D[c] : 0.0f, bias = a.bias ? a.bias[c] : 0.0f;
      // Three loops, each of few enough instructions that a processor has several vectors in flight.
      for (int64_t i = 0; i < tokens; i += W) {
        const int64_t count = min64(W, tokens - i);
        V x = u.tokens(s.row, t0 + i, c, count);
        V step = step_size(delta.tokens(s.row, t0 + i, c, count) + bias, a.softplus);
        store(steps + i, step);
        store(inputs + i, step * x);
        store(out + i, D * x);
      }
      V state = splat(h[c - channel]);
      for (int64_t i = 0; i < tokens; i += W) {
        const int64_t t = t0 + i, count = min64(W, tokens - i);
        V decay = exp2(load(steps + i) * rate);
        V input = load(inputs + i) * (B_rows.constant ? splat(B_rows.constant[c]) : load(B + i));
        compose_steps(decay, input);
        V states = decay * state + input;
        store(out + i, states * (C_rows.constant ? splat(C_rows.constant[c]) : load(C + i)) + load(out + i));
        // The last lane of `states`, by a chain of one multiplication and addition from vector to vector.
        state = count == W ? last_lane(decay) * state + last_lane(input) : splat(states[count - 1]);
        if (!a.interval) continue;
        for (int64_t at = ceil_div(t + 1, a.interval) * a.interval; at <= t + count && at < a.l; at += a.interval)
          *checkpoint_at(a, s.row, at, c) = states[at - 1 - t];
      }
      T* to = y.at<T>(s.row, t0, c);
      for (int64_t i = 0; i < tokens; i += W) {
        const int64_t count = min64(W, tokens - i);
        V value = load(out + i);
        if (a.z) value *= silu(z.tokens(s.row, t0 + i, c, count));
        store(to + i, value, count);
      }
      h[c - channel] = state[0];
    }
  }
  for (int64_t c = channel; s.slot >= 0 && c < end; ++c) a.final_state[s.slot * a.d + c] = h[c - channel];
}

// Whether all is as `scan_tokens` reads it.
bool is_of_tokens(const Arguments& a) { return a.n == 1 && a.u_c && a.delta_c && a.y_c && (!a.z || a.z_c); }

template <class T>
int run_tokens(const Arguments& a) {
  const Groups groups(a, kChannels);
  const int64_t items = groups.count * groups.blocks;
  return for_each(a.sequences * items, a.threads, 5 * kRun + kChannels, [&](int64_t item, float* memory) {
    const int64_t group = item % items / groups.blocks, of_group = (group + 1) * groups.channels;
    const int64_t channel = group * groups.channels + item % groups.blocks * kChannels;
    scan_tokens<T>(a, sequence_at(a, item / items), group, channel, min64(of_group, channel + kChannels), memory);
  });
}

// Whether all is as `scan_states` reads it.
bool is_plain(const Arguments& a) {
  return !(a.u_c | a.delta_c | a.z_c | a.y_c | a.delta_other | a.z_other | a.B_other | a.C_other | a.groups | a.B_n |
           a.C_n | a.B_constant | a.C_constant);
}

template <class T, int64_t VECTORS>
int run(const Arguments& a, int64_t tile) {
  const int64_t few = 2 * kFew * ceil_div(a.n, W) * W + VECTORS * W * a.n, floats = scan_floats(a, VECTORS, tile);
  const Groups groups(a, VECTORS * W);
  const bool plain = is_plain(a);
  const int64_t items = groups.count * groups.blocks;
  return for_each(a.sequences * items, a.threads, floats > few ? floats : few, [&](int64_t item, float* memory) {
    const Sequence s = sequence_at(a, item / items);
    const int64_t group = item % items / groups.blocks, end = (group + 1) * groups.channels;
    const int64_t channel = group * groups.channels + item % groups.blocks * VECTORS * W, tokens = s.end - s.start;
    if (plain && tokens >= 1 && tokens <= kFew && !a.interval)
      scan_states<T>(a, s, channel, memory);  // keeps no checkpoints
    else
      scan_channels<T, VECTORS>(a, s, group, channel, end, tile, memory);
  });
}

template <class T>
int run(const Arguments& a) {
  if (is_of_tokens(a)) return run_tokens<T>(a);
  if (!a.u_c && !a.y_c && !a.delta_c) return run<T, kVectors>(a, kTile);
  return run<T, kFewVectors>(a, a.interval && a.interval % kLongTile ? kTile : kLongTile);
}

// -- the gradient -----------------------------------------------------------------------------------------------------

struct Gradients {
  const void* dy;
  const float *dfinal, *checkpoints;
  void *du, *ddelta;
  float* dA;
  void *dB, *dC;
  float* dD;
  void* dz;
  float *dbias, *dinitial;
  // Partial sums: dB and dC of each part of the channels (2, groups of B and C, parts, b, n, l); dA, dD, dbias of each
  // row. dB and dC are (b, l, groups, n) or, of constants, float32 (b, d, n).
  float *partial, *dA_rows, *dD_rows, *dbias_rows;
  int64_t groups, dy_b, dy_l;  // groups: parts of the channels of each group of B and C
  // As in Arguments, these may be 0. ddelta and dz have the formats of delta and z.
  int64_t dy_c, du_c, ddelta_c, dz_c, dB_other, dC_other;
};

// Buffers of one interval and one vector of channels; every field is `tokens` vectors unless noted.
struct Interval {
  float *B, *C;  // (n, tokens), float32
  float *step, *u, *input, *dy;  // dy: the gradient of the output before the gate
  float *y, *gB, *dstep;  // sums over states: C.h, g.B, and the decay's part of ddelta
  float *h, *decay;  // of one state; h has one vector more, the state before the first token
  float *to_B, *to_C;  // of one state, before their sum over channels
  float *raw, *z, *out, *dz;  // tiles: delta, z, the gradient of the output, that of z
};

int64_t interval_floats(int64_t n, int64_t interval) { return 2 * n * interval + (16 * interval + 1) * W; }

Interval place(float* memory, int64_t n, int64_t interval) {
  Interval s;
  s.B = memory;
  s.C = s.B + n * interval;
  float** fields[] = {&s.step,  &s.u,    &s.input, &s.dy,  &s.y, &s.gB,  &s.dstep,
                      &s.decay, &s.to_B, &s.to_C,  &s.raw, &s.z, &s.out, &s.dz};
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
// Of constants (OWN_B, OWN_C) it adds to dB and dC, the sums over time.
template <bool OWN_B, bool OWN_C>
void differentiate(const Interval& s, int64_t tokens, int64_t interval, int64_t i, V h, V rate, V own_B, V own_C, V& g,
                   V& dA, V& dB, V& dC) {
  const float *B = s.B + i * interval, *C = s.C + i * interval;
  const V exponent = rate * kLog2e;
  store(s.h, h);
  for (int64_t t = 0; t < tokens; ++t) {
    V decay = exp2(load(s.step + t * W) * exponent);
    h = decay * h + (OWN_B ? load(s.input + t * W) * own_B : load(s.input + t * W) * B[t]);
    store(s.decay + t * W, decay);
    store(s.h + (t + 1) * W, h);
    store(s.y + t * W, load(s.y + t * W) + (OWN_C ? h * own_C : h * C[t]));
    if (OWN_C)
      dC += load(s.dy + t * W) * h;
    else
      store(s.to_C + t * W, load(s.dy + t * W) * h);
  }
  for (int64_t t = tokens - 1; t >= 0; --t) {
    g += OWN_C ? load(s.dy + t * W) * own_C : load(s.dy + t * W) * C[t];
    store(s.gB + t * W, load(s.gB + t * W) + (OWN_B ? g * own_B : g * B[t]));
    if (OWN_B)
      dB += g * load(s.input + t * W);
    else
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

// What a vector of channels keeps from sequence to sequence; n vectors each.
struct Vectors {
  float *A, *g, *entering, *own_B, *own_C;
  float *dA, *dB, *dC;  // sums; of constants, dB and dC
};

template <class T>
void differentiate_sequence(const Arguments& a, const Gradients& o, const Sequence& s, int64_t channel, int64_t end,
                            const Selection& B_rows, const Selection& C_rows, float* dB, float* dC, const Vectors& m,
                            V& dD, V& dbias, const Interval& x) {
  const int64_t n = a.n, lanes = min64(W, end - channel), I = a.interval;
  transpose_in(m.g, o.dfinal ? o.dfinal + (s.slot * a.d + channel) * n : nullptr, lanes, n, 1.0f);
  const V bias = a.bias ? load(a.bias + channel, lanes) : splat(0.0f);
  const V D = a.D ? load(a.D + channel, lanes) : splat(0.0f);
  const Operand u_of = operand<T>(a.u, a.u_b, a.u_l, a.u_c, 0), dy_of = operand<T>(o.dy, o.dy_b, o.dy_l, o.dy_c, 0);
  const Operand delta_of = operand<T>(a.delta, a.delta_b, a.delta_l, a.delta_c, a.delta_other);
  const Operand z_of = operand<T>(a.z, a.z_b, a.z_l, a.z_c, a.z_other);
  const Operand du_of = output<T>(a, o.du, o.du_c, 0), ddelta_of = output<T>(a, o.ddelta, o.ddelta_c, a.delta_other);
  const Operand dz_of = output<T>(a, o.dz, o.dz_c, a.z_other);
  const auto differentiate_state =
      B_rows.constant ? (C_rows.constant ? differentiate<true, true> : differentiate<true, false>)
                      : (C_rows.constant ? differentiate<false, true> : differentiate<false, false>);
  for (int64_t t1 = s.end; t1 > s.start;) {
    const int64_t boundary = (t1 - 1) / I * I, t0 = boundary > s.start ? boundary : s.start, tokens = t1 - t0;
    const float* state = nullptr;
    if (t0 > s.start)
      state = o.checkpoints + ((s.row * ceil_div(a.l, I) + t0 / I) * a.d + channel) * n;
    else if (a.initial)
      state = a.initial + (s.slot * a.d + channel) * n;
    transpose_in(m.entering, state, lanes, n, 1.0f);
    u_of.in(x.u, W, s.row, t0, channel, tokens, lanes);
    delta_of.in(x.raw, W, s.row, t0, channel, tokens, lanes);
    dy_of.in(x.out, W, s.row, t0, channel, tokens, lanes);
    if (a.z) z_of.in(x.z, W, s.row, t0, channel, tokens, lanes);
    // What the next interval reads and this one writes.
    const int64_t earlier = t0 > s.start + I ? t0 - I : s.start;
    if (a.u_c) u_of.prefetch(s.row, earlier, channel, t0 - earlier, lanes);
    if (a.delta_c) delta_of.prefetch(s.row, earlier, channel, t0 - earlier, lanes);
    if (o.dy_c) dy_of.prefetch(s.row, earlier, channel, t0 - earlier, lanes);
    if (a.z_c) z_of.prefetch(s.row, earlier, channel, t0 - earlier, lanes);
    if (o.du_c) du_of.prefetch(s.row, t0, channel, tokens, lanes);
    if (o.ddelta_c) ddelta_of.prefetch(s.row, t0, channel, tokens, lanes);
    if (o.dz_c) dz_of.prefetch(s.row, t0, channel, tokens, lanes);
    if (!B_rows.constant) B_rows.columns(x.B, I, t0, tokens, n);
    if (!C_rows.constant) C_rows.columns(x.C, I, t0, tokens, n);
    for (int64_t t = 0; t < tokens; ++t) {
      V value = load(x.u + t * W), step = step_size(load(x.raw + t * W) + bias, a.softplus);
      V gradient = load(x.out + t * W);
      if (a.z) gradient *= silu(load(x.z + t * W));
      store(x.step + t * W, step);
      store(x.input + t * W, step * value);
      store(x.dy + t * W, gradient);
      store(x.y + t * W, D * value);
      store(x.gB + t * W, splat(0.0f));
      store(x.dstep + t * W, splat(0.0f));
      dD += gradient * value;
    }
    for (int64_t i = 0; i < n; ++i) {
      V g = load(m.g + i * W), dA = load(m.dA + i * W), own_dB = load(m.dB + i * W), own_dC = load(m.dC + i * W);
      differentiate_state(x, tokens, I, i, load(m.entering + i * W), load(m.A + i * W), load(m.own_B + i * W),
                          load(m.own_C + i * W), g, dA, own_dB, own_dC);
      store(m.g + i * W, g);
      store(m.dA + i * W, dA);
      if (B_rows.constant)
        store(m.dB + i * W, own_dB);
      else
        add_channel_sums(dB + i * a.l + t0, x.to_B, tokens);
      if (C_rows.constant)
        store(m.dC + i * W, own_dC);
      else
        add_channel_sums(dC + i * a.l + t0, x.to_C, tokens);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      V gB = load(x.gB + t * W), gradient = load(x.dy + t * W);
      store(x.gB + t * W, gB * load(x.step + t * W) + gradient * D);  // the gradient of u
      V dstep = load(x.dstep + t * W) + gB * load(x.u + t * W);
      if (a.softplus) dstep *= sigmoid(load(x.raw + t * W) + bias);
      store(x.dstep + t * W, dstep);
      dbias += dstep;
      if (a.z) {
        V gate = load(x.z + t * W), open = sigmoid(gate);
        store(x.dz + t * W, load(x.out + t * W) * load(x.y + t * W) * open * (1.0f + gate * (1.0f - open)));
      }
    }
    du_of.out(x.gB, W, s.row, t0, channel, tokens, lanes);
    ddelta_of.out(x.dstep, W, s.row, t0, channel, tokens, lanes);
    if (a.z) dz_of.out(x.dz, W, s.row, t0, channel, tokens, lanes);
    t1 = t0;
  }
  if (o.dinitial) transpose_out(o.dinitial + (s.slot * a.d + channel) * n, m.g, lanes, n);
}

template <class T>
void differentiate_part(const Arguments& a, const Gradients& o, int64_t row, int64_t group, int64_t part,
                        float* memory) {
  const int64_t n = a.n;
  const Groups groups(a, W);
  Vectors m;
  float** fields[] = {&m.A, &m.g, &m.entering, &m.own_B, &m.own_C, &m.dA, &m.dB, &m.dC};
  for (float** field : fields) {
    *field = memory;
    memory += n * W;
  }
  const Interval x = place(memory, n, a.interval);
  const Selection B_rows = B_of<T>(a, row, group), C_rows = C_of<T>(a, row, group);
  float* dB = o.partial + ((group * o.groups + part) * a.b + row) * n * a.l;
  float* dC = dB + groups.count * o.groups * a.b * n * a.l;
  for (int64_t i = 0; i < n * a.l; ++i) {
    if (!B_rows.constant) dB[i] = 0.0f;
    if (!C_rows.constant) dC[i] = 0.0f;
  }
  const int64_t first = a.cu ? 0 : row, last = a.cu ? a.sequences : row + 1, end = (group + 1) * groups.channels;
  for (int64_t block = part * groups.blocks / o.groups; block < (part + 1) * groups.blocks / o.groups; ++block) {
    const int64_t channel = group * groups.channels + block * W, lanes = min64(W, end - channel);
    transpose_in(m.A, a.A + channel * n, lanes, n, 1.0f);
    transpose_in(m.own_B, B_rows.constant ? B_rows.constant + channel * n : nullptr, lanes, n, 1.0f);
    transpose_in(m.own_C, C_rows.constant ? C_rows.constant + channel * n : nullptr, lanes, n, 1.0f);
    float* sums[] = {m.dA, m.dB, m.dC};
    for (float* zeros : sums) transpose_in(zeros, nullptr, lanes, n, 1.0f);
    V dD = splat(0.0f), dbias = splat(0.0f);
    for (int64_t i = first; i < last; ++i)
      differentiate_sequence<T>(a, o, sequence_at(a, i), channel, end, B_rows, C_rows, dB, dC, m, dD, dbias, x);
    const int64_t at = row * a.d + channel;
    transpose_out(o.dA_rows + at * n, m.dA, lanes, n);
    if (B_rows.constant) transpose_out(static_cast<float*>(o.dB) + at * n, m.dB, lanes, n);
    if (C_rows.constant) transpose_out(static_cast<float*>(o.dC) + at * n, m.dC, lanes, n);
    store(o.dD_rows + at, dD, lanes);
    store(o.dbias_rows + at, dbias, lanes);
  }
}

// target (b, l, groups of B and C, n) = the parts (groups, parts, b, n, l), summed in their order.
template <class T>
void sum_parts(const Arguments& a, const Gradients& o, const float* parts, T* target, int64_t groups, int64_t row,
               int64_t t0) {
  const int64_t n = a.n, tokens = min64(W, a.l - t0), stride = a.b * n * a.l;
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t i = 0; i < n; ++i) {
      const float* part = parts + group * o.groups * stride + (row * n + i) * a.l + t0;
      V total = splat(0.0f);
      for (int64_t p = 0; p < o.groups; ++p) total += load(part + p * stride, tokens);
      T* to = target + ((row * a.l + t0) * groups + group) * n + i;
      for (int64_t t = 0; t < tokens; ++t) from_float(to + t * groups * n, total[t]);
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
  const int64_t scratch = 8 * a.n * W + interval_floats(a.n, a.interval), groups = Groups(a, W).count;
  const int64_t items = groups * o.groups;
  const int failed = for_each(a.b * items, a.threads, scratch, [&](int64_t item, float* memory) {
    differentiate_part<T>(a, o, item / items, item % items / o.groups, item % o.groups, memory);
  });
  if (failed) return failed;
  sum_rows(o.dA, o.dA_rows, a.b, a.d * a.n);
  if (o.dD) sum_rows(o.dD, o.dD_rows, a.b, a.d);
  if (o.dbias) sum_rows(o.dbias, o.dbias_rows, a.b, a.d);
  const int64_t tiles = ceil_div(a.l, W), half = is_half(static_cast<T*>(nullptr));
  return for_each(a.b * tiles, a.threads, 0, [&](int64_t item, float*) {
    const int64_t row = item / tiles, t0 = item % tiles * W;
    auto sum = [&](const float* parts, void* target, int64_t other) {
      half ^ other ? sum_parts(a, o, parts, static_cast<bfloat16*>(target), groups, row, t0)
                   : sum_parts(a, o, parts, static_cast<float*>(target), groups, row, t0);
    };
    if (!a.B_constant) sum(o.partial, o.dB, o.dB_other);
    if (!a.C_constant) sum(o.partial + items * a.b * a.n * a.l, o.dC, o.dC_other);
  });
}

}  // namespace

MAMBAKIT_EXPORT(selective_scan)(const Arguments* a, int64_t half) { return half ? run<bfloat16>(*a) : run<float>(*a); }
MAMBAKIT_EXPORT(selective_scan_backward)(const Arguments* a, const Gradients* o, int64_t half) {
  return half ? differentiate<bfloat16>(*a, *o) : differentiate<float>(*a, *o);
}
