// Shared by the forward and the backward kernels. Compiled at run time, with the macros of plan.py:
//
//   DTYPE     0 float32, 1 bfloat16, 2 float16: u, delta, z, B, C, y and their gradients
//   LANES     neighbouring lanes that share a channel (a power of two)
//   NS        states of a channel in each of those lanes, a multiple of 4; LANES * NS >= n, the rest is padding: A = B
//             = C = 0
//   K         channels of each thread
//   WARPS     warps of a CTA
//   MIN_CTAS  CTAs per SM that the registers must leave room for
//   SHARED    bytes of dynamic shared memory of the kernel that scans, as plan.py counts them
//   HAS_Z, SOFTPLUS, PACKED: 0 or 1
//   CHAINED   1: chunks of a row pass their carry from CTA to CTA (a chained scan, below)
//   ALIGNED   8, 4 or 0: the number of neighbouring elements that one load may read. Strides, d and n are multiples of
//             it, and addresses of as many elements. 0: element by element
//   GROUPED   1: B and C have groups of neighbouring channels, a multiple of ALIGNED of them. A CTA's are of one group
//   CONSTANT  bit 0: B, bit 1: C does not depend on time, and each channel has its own states, in float32 as of A
//   TRANSPOSED  bits 0 to 3: u (and y, du), delta (ddelta), z (dz), dy are (b, d, l) in memory: tokens are adjacent. Bit
//             4: each row of those begins at a multiple of 16 bytes
//
// A group of LANES lanes serves K channels, a warp 32 / LANES groups. Each thread steps through time with NS states of
// K channels in registers, in tiles of 8 tokens. A warp first computes the step size of every (token, channel) of a
// tile once, spread over its lanes, and shares them through shared memory; B and C are in shared memory as float32. A
// token past the end has step size 0 and input 0, which leaves the state unchanged.

typedef unsigned int u32;
typedef long long i64;
#define DEVICE __device__ __forceinline__

constexpr int TILE = 8;
constexpr int NP = LANES * NS;      // padded state size, a multiple of 4
constexpr int GROUPS = 32 / LANES;  // of a warp
constexpr int WARP_CHANNELS = GROUPS * K;
constexpr int CTA_CHANNELS = WARP_CHANNELS * WARPS;
constexpr int THREADS = 32 * WARPS;
constexpr int VEC = WARP_CHANNELS >= 16 ? 4 : WARP_CHANNELS >= 8 ? 2 : 1;  // channels of one lane's vector load
constexpr int ROW_VECS = WARP_CHANNELS / VEC;
constexpr int VECS = (TILE * ROW_VECS + 31) / 32;  // vectors of a lane in one tile
constexpr int QUADS = NP / 4;
constexpr bool EVEN = TRANSPOSED & 16;
// Where tokens are adjacent in u, delta and z, and rows begin at multiples of 16 bytes, a lane's vectors of a tile are
// neighbouring tokens of a channel, else neighbouring channels of a token: one load then reads a vector, or eight tokens
// of each of a few channels.
constexpr int OF_INPUTS = HAS_Z ? 7 : 3;
constexpr bool ALONG = EVEN && (TRANSPOSED & OF_INPUTS) == OF_INPUTS;
constexpr int VEC_CHANNELS = ALONG ? 1 : VEC;
constexpr int ROW_LANES = ALONG ? WARP_CHANNELS : ROW_VECS;  // lanes after which the channels are the same again
// A row of (step, step * input) pairs, padded by 16 bytes against bank conflicts between rows.
constexpr int STEPS_ROW = WARP_CHANNELS + 2;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr u32 ALL = 0xffffffffu;

DEVICE float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float rcp(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float sigmoid(float x) { return rcp(1.f + ex2(-LOG2E * x)); }

// max(x, 0) + log1p(exp(-|x|)), where log1p(e) = e p(e) with the minimax polynomial p on [0, 1], relative error 3e-8.
// lg2 would cancel for small e.
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

// N neighbouring elements in their memory format: a load is issued early and converted when the values are used.
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

    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < WORDS; i++) w[i] = 0;
    }

    // The first `count` of the N elements exist; where WHOLE, all of them or none.
    template <bool WHOLE = ALIGNED != 0> DEVICE void load(const T* p, int count) {
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

// Asynchronous copies to shared memory, for loads that are issued a whole round before they are used. Registers would
// not do: moving a register from one loop iteration to the next waits for its load. Each lane reads back only what it
// copied itself.
template <int N> DEVICE void load_async(T* shared, const T* p, int count) {
    constexpr int BYTES = N * sizeof(T);
    if constexpr (ALIGNED && BYTES >= 4) {
        u32 to = (u32)__cvta_generic_to_shared(shared);
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(p), "n"(BYTES),
                     "r"(count > 0 ? BYTES : 0));
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

DEVICE void commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LATER> DEVICE void wait_groups() { asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory"); }

template <int N> DEVICE Raw<N> read_async(const T* shared) {
    Raw<N> raw;
    if constexpr (N * sizeof(T) < 4) {
        raw.w[0] = *(const unsigned short*)shared;
    } else if constexpr (Raw<N>::WORDS % 4 == 0) {
#pragma unroll
        for (int i = 0; i < Raw<N>::WORDS; i += 4) {
            uint4 x = *(const uint4*)((const u32*)shared + i);
            raw.w[i] = x.x, raw.w[i + 1] = x.y, raw.w[i + 2] = x.z, raw.w[i + 3] = x.w;
        }
    } else if constexpr (Raw<N>::WORDS == 2) {
        uint2 x = *(const uint2*)shared;
        raw.w[0] = x.x, raw.w[1] = x.y;
    } else {
        raw.w[0] = *(const u32*)shared;
    }
    return raw;
}

// The first `count` of N neighbouring elements; where WHOLE, all of them or none, at once.
template <int N, bool WHOLE = ALIGNED != 0> DEVICE void store(T* p, const float* v, int count) {
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

DEVICE T to_element(float x) {
#if DTYPE == 0
    return x;
#else
    return (T)to_half_pair(x, 0.f);
#endif
}

// N elements that are `stride` elements apart, one word each: a load is not waited for before its value is used.
template <int N> struct Apart {
    u32 w[N];

    DEVICE float get(int i) const {
#if DTYPE == 0
        return __uint_as_float(w[i]);
#else
        return from_half(w[i], false);
#endif
    }

    DEVICE void load(const T* p, i64 stride, int count) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            w[i] = 0;
            if (i < count) {
#if DTYPE == 0
                w[i] = __ldg((const u32*)(p + i * stride));
#else
                w[i] = __ldg((const unsigned short*)(p + i * stride));
#endif
            }
        }
    }
};

// What was loaded in as few registers as it takes. It waits for the loads.
template <int N> DEVICE Raw<N> together(const Raw<N>& x) { return x; }

template <int N> DEVICE Raw<N> together(const Apart<N>& x) {
    Raw<N> raw;
#pragma unroll
    for (int i = 0; i < Raw<N>::WORDS; i++) {
#if DTYPE == 0
        raw.w[i] = x.w[i];
#else
        raw.w[i] = x.w[2 * i] | (2 * i + 1 < N ? x.w[2 * i + 1] << 16 : 0);
#endif
    }
    return raw;
}

template <int N> DEVICE void store_apart(T* p, i64 stride, const float* v, int count) {
#pragma unroll
    for (int i = 0; i < N; i++)
        if (i < count) p[i * stride] = to_element(v[i]);
}

// Loads of read-only memory that ask for the whole line of 128 bytes.
DEVICE uint4 load_line(const uint4* p) {
    uint4 x;
    asm("ld.global.nc.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}

DEVICE uint2 load_line(const uint2* p) {
    uint2 x;
    asm("ld.global.nc.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p));
    return x;
}

// N neighbouring tokens of a channel, at a multiple of their bytes. The next tiles' tokens are in the same line.
template <int N> struct Tokens : Raw<N> {
    DEVICE void load(const T* p, int count) {
        if constexpr (N * sizeof(T) == 16) {
            const uint4 x = count > 0 ? load_line((const uint4*)p) : make_uint4(0, 0, 0, 0);
            this->w[0] = x.x, this->w[1] = x.y, this->w[2] = x.z, this->w[3] = x.w;
        } else if constexpr (N * sizeof(T) == 8) {
            const uint2 x = count > 0 ? load_line((const uint2*)p) : make_uint2(0, 0);
            this->w[0] = x.x, this->w[1] = x.y;
        } else {
            Raw<N>::template load<true>(p, count);
        }
    }

    // From shared memory.
    DEVICE void read(const T* p) { (Raw<N>&)*this = read_async<N>(p); }
};

// Sums M values over the lanes that differ only in the bits from LOW (inclusive) to HIGH (exclusive): a reduce-scatter.
// Each shuffle halves the values that a lane holds, M - 1 shuffles instead of M log2. Afterwards lane `bits = (lane %
// HIGH) / LOW` holds the sums bits * (M * LOW / HIGH) + i in v[i] or, with fewer values than lanes, the sum bits /
// (HIGH / LOW / M).
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

// The channels of a CTA: from `first` to `end`, those of a group or what is left of them, for the tile of channels.
struct ChannelTile {
    int group, first, end;

    DEVICE ChannelTile(int tile, int tiles, int group_channels, int d) {
        if constexpr (GROUPED) {
            group = tile / tiles;
            first = group * group_channels + tile % tiles * CTA_CHANNELS;
            end = (group + 1) * group_channels;
        } else {
            group = 0, first = tile * CTA_CHANNELS, end = d;
        }
    }
};

// This thread's states of (..., d, n) in memory: K channels of NS states, zero where there is no channel or no state.
struct StateSlice {
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

// CHAINED: a chained scan. The chunks of a row are scanned by different CTAs, each of which waits for the carry (the
// state after the chunk) of its predecessor, so that rows fill the card evenly whatever their number. tickets[0]
// numbers the CTAs in the order in which they start: a predecessor has a smaller ticket, so it is running or done, and
// no CTA waits for one that is not resident. tickets[1 + c] counts the finished chunks of chain c, the chunks of one
// (row, channel tile).
DEVICE int take_ticket(int* tickets, char* memory) {
    if (threadIdx.x == 0) *(int*)memory = atomicAdd(tickets, 1);
    __syncthreads();
    const int ticket = *(int*)memory;
    __syncthreads();
    return ticket;
}

// Acquires the carry of the predecessor: returns when `done` chunks of the chain are finished.
DEVICE void wait_for_carry(const int* finished, int done) {
    while (*(const volatile int*)finished < done) __nanosleep(100);
    __threadfence();
}

// Releases this CTA's carry: what its threads stored before is visible to who sees `done`.
DEVICE void publish_carry(int* finished, int done) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *(volatile int*)finished = done;
}

// Sequence boundaries of a packed row within one tile. Bit j: token t + j is the first of its sequence; bit j + 1:
// token t + j is the last of its sequence. of(j) is the sequence of token t + j.
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

// Rows of B and C (PARTS = 2), or of one of them (1), of TOKENS tokens, prefetched into registers and stored to shared
// memory as float32: [token][part][NP].
template <int TOKENS, int PARTS> struct Rows {
    static constexpr int ITEMS = (TOKENS * PARTS * QUADS + THREADS - 1) / THREADS;
    const T* at[ITEMS];
    i64 move[PARTS];
    Raw<4> raw[ITEMS];

    DEVICE int token(int i) const { return (int)(threadIdx.x + i * THREADS) / (PARTS * QUADS); }
    DEVICE int rest(int i) const { return (int)(threadIdx.x + i * THREADS) % (PARTS * QUADS); }
    DEVICE int part(int i) const { return PARTS == 2 && rest(i) >= QUADS; }

    // Begin at token t. Each fetch advances by TOKENS tokens, or goes back with `direction` -1.
    DEVICE void set(const T* first, const T* second, i64 stride1, i64 stride2, int t, int direction) {
        move[0] = direction * TOKENS * stride1;
        move[PARTS - 1] = direction * TOKENS * (PARTS == 2 ? stride2 : stride1);
#pragma unroll
        for (int i = 0; i < ITEMS; i++)
            at[i] = (part(i) ? second + (i64)(t + token(i)) * stride2 : first + (i64)(t + token(i)) * stride1) +
                    rest(i) % QUADS * 4;
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

// The elements of a tile that this lane loads and computes step sizes for: VECS vectors of VEC neighbouring channels of a
// token or, along, tokens of a channel.
struct Elements {
    int token[VECS], column[VECS], count[VECS];  // of a vector's first element; its channels, or tokens, that exist

    DEVICE void set(int lane, int first_channel, int d) {
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            int at = lane + 32 * v;
            if constexpr (ALONG) {
                token[v] = at / WARP_CHANNELS * VEC;
                column[v] = at % WARP_CHANNELS;
                count[v] = token[v] < TILE && first_channel + column[v] < d ? VEC : 0;
            } else {
                token[v] = at / ROW_VECS;
                column[v] = at % ROW_VECS * VEC;
                count[v] = token[v] < TILE ? min(VEC, d - first_channel - column[v]) : 0;
            }
        }
    }

    // How many elements of a vector exist where the tile has `left` tokens.
    DEVICE int existing(int v, int left) const {
        if constexpr (ALONG) return min(count[v], left - token[v]);
        else return token[v] < left ? count[v] : 0;
    }
};

// The lane's vector of N floats in rows of one token each, `pitch` floats apart, of which `p` is the first element.
template <int N> DEVICE void read_elements(float* out, const float* p, int pitch) {
    if constexpr (ALONG) {
#pragma unroll
        for (int i = 0; i < N; i++) out[i] = p[i * pitch];
    } else {
        read_floats<N>(out, p);
    }
}

template <int N> DEVICE void write_elements(float* p, const float* v, int pitch) {
    if constexpr (ALONG) {
#pragma unroll
        for (int i = 0; i < N; i++) p[i * pitch] = v[i];
    } else {
        write_floats<N>(p, v);
    }
}

// The same of pairs.
template <int N> DEVICE void read_pairs(float2* out, const float2* p, int pitch) {
    if constexpr (ALONG) {
#pragma unroll
        for (int i = 0; i < N; i++) out[i] = p[i * pitch];
    } else {
        read_floats<2 * N>((float*)out, (const float*)p);
    }
}

template <int N> DEVICE void write_pairs(float2* p, const float2* v, int pitch) {
    if constexpr (ALONG) {
#pragma unroll
        for (int i = 0; i < N; i++) p[i * pitch] = v[i];
    } else {
        write_floats<2 * N>((float*)p, (const float*)v);
    }
}

// Runs before the passes of a packed call, one or more CTAs per sequence: writes the sequence of each token, and copies
// the state of an empty sequence, which no token updates, from `source` (null: zeros) to `target` (null: no copy).
struct SequencesParams {  // cuda_parameters.py mirrors it
    const int* cu;
    int* ids;
    const float* source;
    float* target;
    i64 state_size;  // d * n
};

extern "C" __global__ void __launch_bounds__(256) selective_scan_sequences(const __grid_constant__ SequencesParams p) {
    const int s = blockIdx.x, begin = p.cu[s], end = p.cu[s + 1];
    const i64 at = (i64)blockIdx.y * 256 + threadIdx.x, step = (i64)gridDim.y * 256;
    for (i64 t = begin + at; t < end; t += step) p.ids[t] = s;
    if (begin == end && p.target)
        for (i64 i = at; i < p.state_size; i += step)
            p.target[s * p.state_size + i] = p.source ? p.source[s * p.state_size + i] : 0.f;
}
