// Shared by the forward and the backward kernels. Compiled at run time: the macros below come from gpu.py.
//
//   DTYPE    0 float32, 1 bfloat16, 2 float16: u, delta, z, B, C, y and their gradients
//   LANES    neighbouring lanes that share a channel (a power of two)
//   NS       states of a channel in each of those lanes, a multiple of 4; LANES * NS >= n, the rest is padding with A = B = C = 0
//   K        channels of each thread
//   WARPS    warps of a block
//   HAS_Z, SOFTPLUS, PACKED, RELAY: 0 or 1
//   WHOLE    4 or 8 when every four or eight neighbours of a row of u, delta, z, B, C and the gradients can be read at once: their
//            strides, d and n are multiples of it and their addresses of as many elements; else 0
//
// A group of LANES lanes serves K channels, a warp 32 / LANES groups, and every thread walks time with NS states of K
// channels in registers. Time goes by in tiles of 8 tokens: the warp first computes each (token, channel)'s step size
// once, every lane other elements, and hands them over through shared memory; B and C are in shared memory as float32.
// A token past the end has step 0 and input 0, so that states pass through it.

typedef unsigned int u32;
typedef long long i64;
#define DEVICE __device__ __forceinline__

constexpr int TILE = 8;
constexpr int NP = LANES * NS;              // states with padding, a multiple of 4
constexpr int GROUPS = 32 / LANES;          // of a warp
constexpr int WARP_CHANNELS = GROUPS * K;
constexpr int BLOCK_CHANNELS = WARP_CHANNELS * WARPS;
constexpr int THREADS = 32 * WARPS;
constexpr int VEC = WARP_CHANNELS >= 16 ? 4 : WARP_CHANNELS >= 8 ? 2 : 1;  // neighbouring channels that a lane loads
constexpr int ROW_VECS = WARP_CHANNELS / VEC;
constexpr int VECS = (TILE * ROW_VECS + 31) / 32;  // of a lane, in one tile
constexpr int QUADS = NP / 4;
// A row of (step, step * input) pairs and 16 bytes, so that the rows that lanes write together lie in different banks.
constexpr int STEPS_ROW = WARP_CHANNELS + 2;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr u32 ALL = 0xffffffffu;

DEVICE float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float rcp(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float sigmoid(float x) { return rcp(1.f + ex2(-LOG2E * x)); }

// max(x, 0) + log1p(exp(-|x|)), and log1p(e) = e p(e) with the best polynomial on [0, 1], relative error 3e-8: no cancellation
// for small e, which lg2 would have.
DEVICE float softplus(float x) {
    float e = ex2(-LOG2E * fabsf(x));
    float p = 0.005232693627f;
    p = fmaf(p, e, -0.0295052398f);
    p = fmaf(p, e, 0.07822596282f);
    p = fmaf(p, e, -0.1366324723f);
    p = fmaf(p, e, 0.1910600811f);
    p = fmaf(p, e, -0.2484298199f);
    p = fmaf(p, e, 0.3331909776f);
    p = fmaf(p, e, -0.4999949336f);
    p = fmaf(p, e, 0.9999999404f);
    return fmaf(p, e, fmaxf(x, 0.f));
}

#if DTYPE == 0
typedef float T;
#else
typedef unsigned short T;
#endif

DEVICE float from_half(u32 w, bool high) {
#if DTYPE == 1
    return __uint_as_float(high ? w & 0xffff0000u : w << 16);
#else
    float y;
    unsigned short bits = (unsigned short)(high ? w >> 16 : w);
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
    return y;
#endif
}

DEVICE u32 to_half_pair(float low, float high) {
    u32 w;
#if DTYPE == 1
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
#endif
    return w;
}

// N neighbouring elements as they lie in memory: loaded early, converted late.
template <int N> struct Raw {
    static constexpr int WORDS = (N * sizeof(T) + 3) / 4;
    u32 w[WORDS];

    DEVICE float get(int i) const {
#if DTYPE == 0
        return __uint_as_float(w[i]);
#else
        return from_half(w[i / 2], i & 1);
#endif
    }

    // `count` of the N elements exist: with WHOLE, all of them or none.
    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < WORDS; i++) w[i] = 0;
    }

    DEVICE void load(const T* p, int count) {
        clear();
        if (count <= 0) return;
        if constexpr (WHOLE) {
            if constexpr (N * sizeof(T) == 16) {
                uint4 x = __ldg((const uint4*)p);
                w[0] = x.x; w[1] = x.y; w[2] = x.z; w[WORDS - 1] = x.w;
            } else if constexpr (N * sizeof(T) == 8) {
                uint2 x = __ldg((const uint2*)p);
                w[0] = x.x; w[WORDS - 1] = x.y;
            } else if constexpr (N * sizeof(T) == 4) {
                w[0] = __ldg((const u32*)p);
            } else {
                w[0] = __ldg((const unsigned short*)p);
            }
        } else {
#pragma unroll
            for (int i = 0; i < N; i++) {
                if (i < count) {
#if DTYPE == 0
                    w[i] = __ldg((const u32*)p + i);
#else
                    w[i / 2] |= (u32)__ldg((const unsigned short*)p + i) << (i & 1 ? 16 : 0);
#endif
                }
            }
        }
    }
};

// The same through shared memory, for loads that are asked for long before they are used: registers that wait for a load
// cannot be handed on from one tile to the next without waiting. Each lane reads back what it asked for itself.
template <int N> DEVICE void load_early(T* shared, const T* p, int count) {
    constexpr int BYTES = N * sizeof(T);
    if constexpr (WHOLE && BYTES >= 4) {
        u32 to = (u32)__cvta_generic_to_shared(shared);
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(p), "n"(BYTES), "r"(count > 0 ? BYTES : 0));
    } else {
        Raw<N> raw;
        raw.load(p, count);
        if constexpr (BYTES >= 4) {
#pragma unroll
            for (int i = 0; i < Raw<N>::WORDS; i++) ((u32*)shared)[i] = raw.w[i];
        } else {
            *shared = (T)raw.w[0];
        }
    }
}

DEVICE void end_of_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LATER> DEVICE void wait_for_groups() { asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory"); }

template <int N> DEVICE Raw<N> read_early(const T* shared) {
    Raw<N> raw;
    if constexpr (N * sizeof(T) < 4) {
        raw.w[0] = *(const unsigned short*)shared;
    } else if constexpr (Raw<N>::WORDS == 4) {
        uint4 x = *(const uint4*)shared;
        raw.w[0] = x.x, raw.w[1] = x.y, raw.w[2] = x.z, raw.w[3] = x.w;
    } else if constexpr (Raw<N>::WORDS == 2) {
        uint2 x = *(const uint2*)shared;
        raw.w[0] = x.x, raw.w[1] = x.y;
    } else {
        raw.w[0] = *(const u32*)shared;
    }
    return raw;
}

template <int N> DEVICE void store(T* p, const float* v, int count) {
    if (count <= 0) return;
#if DTYPE == 0
    if constexpr (WHOLE) {
        if constexpr (N == 4) { *(float4*)p = make_float4(v[0], v[1], v[N > 2 ? 2 : 0], v[N - 1]); return; }
        if constexpr (N == 2) { *(float2*)p = make_float2(v[0], v[N - 1]); return; }
    }
#pragma unroll
    for (int i = 0; i < N; i++)
        if (i < count) p[i] = v[i];
#else
    if constexpr (WHOLE) {
        if constexpr (N == 4) {
            *(uint2*)p = make_uint2(to_half_pair(v[0], v[1]), to_half_pair(v[N > 2 ? 2 : 0], v[N - 1]));
            return;
        }
        if constexpr (N == 2) { *(u32*)p = to_half_pair(v[0], v[N - 1]); return; }
    }
#pragma unroll
    for (int i = 0; i < N; i++)
        if (i < count) p[i] = (T)to_half_pair(v[i], 0.f);
#endif
}

// Sums M values over the lanes that differ in bits below HIGH and not below LOW. Each exchange halves the values that a
// lane still holds: M - 1 shuffles instead of M log2. Afterwards lane `bits = (lane % HIGH) / LOW` holds the sums number
// bits * (M * LOW / HIGH) + i in v[i], or, when there are fewer values than lanes, number bits / (HIGH / LOW / M).
template <int M, int HIGH, int LOW> DEVICE void sum_lanes(float* v, int lane) {
    if constexpr (HIGH > LOW) {
        constexpr int W = HIGH / 2;
        if constexpr (M > 1) {
            bool upper = lane & W;
#pragma unroll
            for (int i = 0; i < M / 2; i++) {
                float give = upper ? v[i] : v[i + M / 2];
                float keep = upper ? v[i + M / 2] : v[i];
                v[i] = keep + __shfl_xor_sync(ALL, give, W);
            }
            sum_lanes<M / 2, W, LOW>(v, lane);
        } else {
            v[0] += __shfl_xor_sync(ALL, v[0], W);
            sum_lanes<1, W, LOW>(v, lane);
        }
    }
}

template <int N> DEVICE void read_floats(float* out, const float* p) {
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            float4 x = *(const float4*)(p + i);
            out[i] = x.x; out[i + 1] = x.y; out[i + 2] = x.z; out[i + 3] = x.w;
        }
    } else if constexpr (N == 2) {
        float2 x = *(const float2*)p;
        out[0] = x.x; out[1] = x.y;
    } else {
        out[0] = p[0];
    }
}

template <int N> DEVICE void write_floats(float* p, const float* v) {
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4) *(float4*)(p + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
    } else if constexpr (N == 2) {
        *(float2*)p = make_float2(v[0], v[1]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) p[i] = v[i];
    }
}

// States in memory are (..., d, n); this thread's part of K channels, zero where there is no channel or no state.
struct StatePlace {
    int first, d, n, s0;  // the thread's first channel and state

    DEVICE void load(float (*h)[NS], const float* row) const {
#pragma unroll
        for (int k = 0; k < K; k++) {
            const float* p = row + (i64)(first + k) * n + s0;
            if (n == NP) {
#pragma unroll
                for (int i = 0; i < NS; i += 4) {
                    float4 x = first + k < d ? *(const float4*)(p + i) : make_float4(0.f, 0.f, 0.f, 0.f);
                    h[k][i] = x.x, h[k][i + 1] = x.y, h[k][i + 2] = x.z, h[k][i + 3] = x.w;
                }
            } else {
#pragma unroll
                for (int i = 0; i < NS; i++) h[k][i] = first + k < d && s0 + i < n ? p[i] : 0.f;
            }
        }
    }

    DEVICE void store(float* row, const float (*h)[NS]) const {
#pragma unroll
        for (int k = 0; k < K; k++) {
            if (first + k >= d) break;
            float* p = row + (i64)(first + k) * n + s0;
            if (n == NP) {
#pragma unroll
                for (int i = 0; i < NS; i += 4)
                    *(float4*)(p + i) = make_float4(h[k][i], h[k][i + 1], h[k][i + 2], h[k][i + 3]);
            } else {
#pragma unroll
                for (int i = 0; i < NS; i++)
                    if (s0 + i < n) p[i] = h[k][i];
            }
        }
    }
};

// RELAY: a row's chunks are walked by different blocks, each of which waits for the state that the one before it hands on. So no block
// lasts a whole row, and rows fill the card evenly whatever their number. turns[0] numbers the blocks in the order in which
// they start, so that who is waited for has started; turns[1 + b] counts the chunks done of block of channels b.
DEVICE int number_of_block(int* turns, char* memory) {
    if (threadIdx.x == 0) *(int*)memory = atomicAdd(turns, 1);
    __syncthreads();
    const int number = *(int*)memory;
    __syncthreads();
    return number;
}

DEVICE void wait_for_turn(const int* turn, int done) {
    while (*(const volatile int*)turn < done) __nanosleep(100);
    __threadfence();
}

DEVICE void hand_on(int* turn, int done) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *(volatile int*)turn = done;
}

// Sequence starts of a packed row, for one tile: bit j says that token t + j begins another sequence than token t + j - 1
// (bit j + 1: that token t + j is the last of its sequence), and of(j) is the sequence of token t + j.
struct Starts {
    int id;
    u32 mask;

    static DEVICE int fetch(const int* ids, int t, int l, int lane) {
        int at = t - 1 + lane;
        return PACKED && lane <= TILE + 1 && at >= 0 && at < l ? __ldg(ids + at) : -1;
    }

    DEVICE void set(int fetched, int lane) {
        id = fetched;
        int before = __shfl_up_sync(ALL, id, 1);
        mask = __ballot_sync(ALL, lane >= 1 && lane <= TILE + 1 && id != before) >> 1;
    }

    DEVICE int of(int j) const { return __shfl_sync(ALL, id, j + 1); }
    DEVICE bool starts(int j) const { return PACKED && (mask >> j & 1); }
    DEVICE bool ends(int j) const { return PACKED && (mask >> (j + 1) & 1); }
};

// Rows of B and C (`PARTS` = 2) or of one of them (1) for TOKENS tokens, as float32 in shared memory: [token][part][NP]. Fetched
// into registers ahead of time.
template <int TOKENS, int PARTS> struct Rows {
    static constexpr int ITEMS = (TOKENS * PARTS * QUADS + THREADS - 1) / THREADS;
    const T* at[ITEMS];
    i64 move[PARTS];
    Raw<4> raw[ITEMS];

    DEVICE int token(int i) const { return (int)(threadIdx.x + i * THREADS) / (PARTS * QUADS); }
    DEVICE int rest(int i) const { return (int)(threadIdx.x + i * THREADS) % (PARTS * QUADS); }
    DEVICE int part(int i) const { return PARTS == 2 && rest(i) >= QUADS; }

    // Begin at token t; each fetch steps TOKENS on, or, with `direction` -1, back.
    DEVICE void set(const T* first, const T* second, i64 stride1, i64 stride2, int t, int direction) {
        move[0] = direction * TOKENS * stride1;
        move[PARTS - 1] = direction * TOKENS * (PARTS == 2 ? stride2 : stride1);
#pragma unroll
        for (int i = 0; i < ITEMS; i++)
            at[i] = (part(i) ? second + (i64)(t + token(i)) * stride2 : first + (i64)(t + token(i)) * stride1) + rest(i) % QUADS * 4;
    }

    // `left` tokens exist.
    DEVICE void fetch(int left, int n) {
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            raw[i].load(at[i], token(i) < min(left, TOKENS) ? min(4, n - rest(i) % QUADS * 4) : 0);
            at[i] += part(i) ? move[PARTS - 1] : move[0];
        }
    }

    DEVICE void put(float* shared) const {
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            int item = threadIdx.x + i * THREADS;
            if (item < TOKENS * PARTS * QUADS)
                *(float4*)(shared + item * 4) = make_float4(raw[i].get(0), raw[i].get(1), raw[i].get(2), raw[i].get(3));
        }
    }
};

// Which elements of a tile this lane computes step sizes for: VECS vectors of VEC neighbouring channels.
struct Elements {
    int token[VECS], column[VECS], count[VECS];  // count: how many of the vector's channels exist

    DEVICE void set(int lane, int first_channel, int d) {
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            int at = lane + 32 * v;
            token[v] = at / ROW_VECS;
            column[v] = at % ROW_VECS * VEC;
            count[v] = token[v] < TILE ? min(VEC, d - first_channel - column[v]) : 0;
        }
    }
};

// One block or more for each packed sequence: which sequence each token belongs to, and, since no token moves the state of
// an empty sequence, that sequence's state copied through (`to` may be null, `from` null means zeros).
struct SequencesParams {
    const int* cu;
    int* ids;
    const float* from;
    float* to;
    i64 state;  // d * n
};

extern "C" __global__ void __launch_bounds__(256) selective_scan_sequences(const __grid_constant__ SequencesParams p) {
    const int s = blockIdx.x, begin = p.cu[s], end = p.cu[s + 1];
    const i64 at = (i64)blockIdx.y * 256 + threadIdx.x, step = (i64)gridDim.y * 256;
    for (i64 t = begin + at; t < end; t += step) p.ids[t] = s;
    if (begin == end && p.to)
        for (i64 i = at; i < p.state; i += step) p.to[s * p.state + i] = p.from ? p.from[s * p.state + i] : 0.f;
}
