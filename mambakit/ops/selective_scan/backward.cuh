// The gradient of the scan. See common.cuh for the layout, reference.py for the equations.
//
// With g_t the gradient of h_t, backwards in time:
//     g_t += dy_t silu(z_t) C_t;  dC_t = sum_d dy_t silu(z_t) h_t;  dB_t = sum_d delta_t u_t g_t;  gB_t = g_t . B_t
//     d delta_t = sum_n g_t a_t h_{t-1} A + gB_t u_t;  dA += g_t a_t h_{t-1} delta_t;  g_{t-1} = g_t a_t
//
// States are recomputed. A CTA processes its chunk in segments, last first. It scans a segment forward from its
// checkpoint and saves the state at every SAVE-th token in shared memory, then goes back tile by tile: states and
// decays of SUB tokens in registers, then those tokens in reverse. dB and dC are summed over the CTA's channels in
// shared memory and written as one partial sum per channel tile; selective_scan_reduce adds the partial sums in a fixed
// order.
//
// Where b * d is too small to fill the card, rows are cut into `chunks`. selective_scan_backward_carries first
// computes, of all chunks but the first, the aggregate: the gradient of the state before the chunk if that of the state
// after it were zero, and sum(delta). selective_scan_backward combines them in its look-back. A split scan
// (cuda_split_scan.py) learns dfinal only after it has reported the aggregates: those of every chunk are computed
// (first_chunk 0) without dfinal, which the look-back adds. In a CHAINED scan (common.cuh) the chunks of a row pass
// their carry on, last chunk first.

struct BackwardParams {  // cuda_parameters.py mirrors it
    const T *dy, *u, *delta, *z, *B, *C;
    const float *A, *D, *bias, *initial, *dfinal, *checkpoints;
    const int *ids, *cu;  // packed: the sequence of each token, cu_seqlens
    T *du, *ddelta, *dz;
    float* dinitial;
    float *carries, *delta_sums;               // (b, chunks, d, n): aggregates, or carries; (b, chunks, d)
    float* partial;                            // (channel tiles, b * l, dB and dC, NP): partial sums of dB and dC
    float *dA_parts, *dD_parts, *dbias_parts;  // (b * chunks, ...)
    float *dB_parts, *dC_parts;                // of constants, (b * chunks, d, n)
    int* tickets;                              // of a chained scan
    i64 dy_b, u_b, delta_b, z_b, B_b, C_b, dy_t, u_t, delta_t, z_t, B_t, C_t;  // strides over rows and over tokens
    i64 dz_b, dz_t, l, d, n, channel_tiles, chunk_length, chunks, first_chunk, rows, interval;
    i64 dy_c, u_c, delta_c, z_c;                // strides over channels, of transposed inputs
    i64 B_g, C_g, group_tiles, group_channels;  // strides over groups; a group's channel tiles and channels
};

constexpr bool U_TRANSPOSED = TRANSPOSED & 1, DELTA_TRANSPOSED = TRANSPOSED & 2, Z_TRANSPOSED = TRANSPOSED & 4,
               DY_TRANSPOSED = TRANSPOSED & 8;

// The stride that an operand is read by: over channels where tokens are adjacent (TOKENS_ADJACENT), else over tokens. As
// an expression where it is used it takes no register.
template <bool TOKENS_ADJACENT> DEVICE i64 step_of(const i64& token_stride, const i64& channel_stride) {
    return TOKENS_ADJACENT ? channel_stride : token_stride;
}

// This lane's elements of one tensor: a tile's address, which is uniform over the warp and changes, and the lane's
// offset in a tile, which does not. Registers limit occupancy, and a uniform address takes none of a lane's.
template <typename E, bool TOKENS_ADJACENT> struct LanePointer {
    static constexpr bool APART = TOKENS_ADJACENT != ALONG;  // a vector's elements are `stride` elements apart
    E* tile;
    u32 offset[VECS];  // bytes; cuda_launch.py bounds the strides

    DEVICE void set(E* base, i64 t, i64 stride, int first_channel, const Elements& mine) {
        if constexpr (TOKENS_ADJACENT) {
            tile = base + t + first_channel * stride;
#pragma unroll
            for (int v = 0; v < VECS; v++)
                offset[v] = (u32)(sizeof(E) * (mine.token[v] + mine.column[v] * (u32)stride));
            return;
        }
        tile = base + t * stride;
#pragma unroll
        for (int v = 0; v < VECS; v++)
            offset[v] = (u32)(sizeof(E) * (mine.token[v] * (u32)stride + first_channel + mine.column[v]));
    }

    DEVICE E* at(int v) const { return (E*)((char*)tile + offset[v]); }
    DEVICE void move(i64 tokens, i64 stride) { tile += TOKENS_ADJACENT ? tokens : tokens * stride; }

    DEVICE void store_at(int v, i64 stride, const float* values, int count) const {
        if constexpr (APART) store_apart<VEC>(at(v), stride, values, count);
        else store<VEC, ALONG || ALIGNED != 0>(at(v), values, count);
    }
};

template <bool APART, bool TOKENS_ADJACENT> struct LaneValues { typedef Apart<VEC> type; };
template <> struct LaneValues<false, false> { typedef Raw<VEC> type; };
template <> struct LaneValues<false, true> { typedef Tokens<VEC> type; };

// The same of an input, with the values of the tile that was loaded last.
template <bool TOKENS_ADJACENT> struct LaneStream : LanePointer<const T, TOKENS_ADJACENT> {
    using LanePointer<const T, TOKENS_ADJACENT>::APART;
    typedef typename LaneValues<APART, TOKENS_ADJACENT>::type Values;
    Values next[VECS];

    // Loads a tile of which `left` tokens exist, and advances by `tokens`.
    DEVICE void fetch(int left, i64 tokens, i64 stride, const Elements& mine) {
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            const int count = mine.existing(v, left);
            if constexpr (APART) next[v].load(this->at(v), stride, count);
            else next[v].load(this->at(v), count);
        }
        this->move(tokens, stride);
    }
};

DEVICE void clear(float (*h)[NS]) {
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int i = 0; i < NS; i++) h[k][i] = 0.f;
}

constexpr int CARRY_ROWS = NP <= 32 ? 32 : 8;

struct CarryShared {
    float rows[2][CARRY_ROWS * NP];
    float2 steps[WARPS][TILE][STEPS_ROW];  // delta, gradient of the output before the gate
};

extern "C" __global__ void __launch_bounds__(THREADS) selective_scan_backward_carries(
    const __grid_constant__ BackwardParams p) {
    __shared__ __align__(16) CarryShared shared;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int part = lane % LANES, group = lane / LANES;
    const int l = (int)p.l, d = (int)p.d, n = (int)p.n;
    i64 block = blockIdx.x;
    const int channel_tile = (int)(block % p.channel_tiles);
    block /= p.channel_tiles;
    const int count = (int)(p.chunks - p.first_chunk);
    const int chunk = (int)p.first_chunk + (int)(block % count), row = (int)(block / count);
    const int t0 = chunk * (int)p.chunk_length, t1 = min(l, t0 + (int)p.chunk_length);
    const ChannelTile channels(channel_tile, (int)p.group_tiles, (int)p.group_channels, d);
    const int warp_channel = channels.first + warp * WARP_CHANNELS, end = channels.end;
    const StateSlice states{warp_channel + group * K, end, n, part * NS};

    float A[K][NS], g[K][NS], sum[K], own_C[K][NS];
    states.load(A, p.A);
    if constexpr (CONSTANT & 2) states.load(own_C, (const float*)p.C + row * p.C_b);
    clear(g);
#pragma unroll
    for (int k = 0; k < K; k++) {
        sum[k] = 0.f;
#pragma unroll
        for (int i = 0; i < NS; i++) A[k][i] *= LOG2E;
    }
    auto load_dfinal = [&](int s) {
        if (p.dfinal) states.load(g, p.dfinal + (i64)s * d * n);
        else clear(g);
    };
    if (!PACKED && t1 == l) load_dfinal(row);

    Elements mine;
    mine.set(lane, warp_channel, end);
    LaneStream<DY_TRANSPOSED> dy;
    LaneStream<DELTA_TRANSPOSED> delta;
    LaneStream<Z_TRANSPOSED> z;
    int t = t0 + (t1 - t0 - 1) / TILE * TILE;
    dy.set(p.dy + row * p.dy_b, t, step_of<DY_TRANSPOSED>(p.dy_t, p.dy_c), warp_channel, mine);
    delta.set(p.delta + row * p.delta_b, t, step_of<DELTA_TRANSPOSED>(p.delta_t, p.delta_c), warp_channel, mine);
    if (HAS_Z) z.set(p.z + row * p.z_b, t, step_of<Z_TRANSPOSED>(p.z_t, p.z_c), warp_channel, mine);
    float bias[VECS][VEC_CHANNELS];
#pragma unroll
    for (int v = 0; v < VECS; v++)
#pragma unroll
        for (int i = 0; i < VEC_CHANNELS; i++)
            bias[v][i] = p.bias && i < mine.count[v] ? p.bias[warp_channel + mine.column[v] + i] : 0.f;
    auto fetch = [&](int t) {
        int left = t < t0 ? 0 : t1 - t;
        dy.fetch(left, -TILE, step_of<DY_TRANSPOSED>(p.dy_t, p.dy_c), mine);
        delta.fetch(left, -TILE, step_of<DELTA_TRANSPOSED>(p.delta_t, p.delta_c), mine);
        if (HAS_Z) z.fetch(left, -TILE, step_of<Z_TRANSPOSED>(p.z_t, p.z_c), mine);
    };
    const T* C = p.C + row * p.C_b + channels.group * p.C_g;
    Rows<CARRY_ROWS, 1> rows;

    int tb = t0 + (t1 - t0 - 1) / CARRY_ROWS * CARRY_ROWS;
    fetch(t);
    int next_ids = Starts::fetch(p.ids, t, l, lane);
    if constexpr (!(CONSTANT & 2)) {
        rows.set(C, C, p.C_t, p.C_t, tb, -1);
        rows.fetch(t1 - tb, n);
    }
    int buffer = 0;
    for (; tb >= t0; tb -= CARRY_ROWS, buffer ^= 1) {
        if constexpr (!(CONSTANT & 2)) {
            rows.put(shared.rows[buffer]);
            __syncthreads();
            rows.fetch(tb > t0 ? CARRY_ROWS : 0, n);
        }
        for (; t >= tb; t -= TILE) {
#pragma unroll
            for (int v = 0; v < VECS; v++) {
                float2 steps[VEC];
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    float x = delta.next[v].get(i) + bias[v][ALONG ? 0 : i];
                    if (SOFTPLUS) x = softplus(x);
                    if (t + mine.token[v] + (ALONG ? i : 0) >= t1) x = 0.f;
                    float out = dy.next[v].get(i);
                    if (HAS_Z) {
                        float gate = z.next[v].get(i);
                        out *= gate * sigmoid(gate);
                    }
                    steps[i] = make_float2(x, out);
                }
                if (mine.token[v] < TILE)
                    write_pairs<VEC>(&shared.steps[warp][mine.token[v]][mine.column[v]], steps, STEPS_ROW);
            }
            Starts starts;
            if (PACKED) starts.set(next_ids, lane);
            fetch(t - TILE);
            next_ids = Starts::fetch(p.ids, t - TILE, l, lane);
            __syncwarp();
#pragma unroll
            for (int j = TILE - 1; j >= 0; j--) {
                if (PACKED && starts.ends(j) && t + j < t1) load_dfinal(starts.of(j));
                float step[2 * K], Cs[NS];
                read_floats<2 * K>(step, (const float*)&shared.steps[warp][j][group * K]);
                if (!(CONSTANT & 2)) read_floats<NS>(Cs, shared.rows[buffer] + (t - tb + j) * NP + part * NS);
#pragma unroll
                for (int k = 0; k < K; k++) {
                    sum[k] += step[2 * k];
#pragma unroll
                    for (int i = 0; i < NS; i++)
                        g[k][i] = fmaf(step[2 * k + 1], CONSTANT & 2 ? own_C[k][i] : Cs[i], g[k][i]) *
                                  ex2(step[2 * k] * A[k][i]);
                }
                if (PACKED && starts.starts(j) && t + j > 0) clear(g);  // only the row's first sequence has a carry out
            }
            __syncwarp();
        }
    }
    states.store(p.carries + ((i64)row * p.chunks + chunk) * d * n, g);
    if (part == 0)
#pragma unroll
        for (int k = 0; k < K; k++)
            if (states.first + k < end) p.delta_sums[((i64)row * p.chunks + chunk) * d + states.first + k] = sum[k];
}

// dB and dC are summed over a warp's groups, two tokens at a time: [token][group][dB or dC][NP]. Odd groups have dC
// first, against bank conflicts of both the writes and the reads.
constexpr int GROUP_SUMS = 2 * NP;
constexpr int TOKEN_SUMS = GROUPS * GROUP_SUMS;
DEVICE int exchange_offset(int group, int which) { return group * GROUP_SUMS + ((which ^ group) & 1) * NP; }

struct BackwardShared {  // plan.py counts its bytes
    float rows[SEGMENT * 2 * NP];
    float saved[SEGMENT / SAVE][K * NS][THREADS];  // the states at every SAVE-th token
    float partial[2][WARPS][TILE][2 * NP];
    float exchanged[WARPS][GROUPS > 1 ? 2 * TOKEN_SUMS : 4];
    float2 steps[2][WARPS][TILE][STEPS_ROW];    // delta, delta * u
    float dy[2][WARPS][TILE][WARP_CHANNELS];    // gradient of the output before the gate
    float sums[WARPS][3][TILE][WARP_CHANNELS];  // over states: C . h, g . B, (g a h) . A
};
static_assert(sizeof(BackwardShared) == SHARED, "plan.py counts other bytes of shared memory");

// Gradients of operands whose tokens are adjacent. A tile's part of a channel is 16 or 32 bytes, and memory takes whole
// lines faster. So they wait in shared memory until the segment is done, in the place of their tile's saved states, which
// nobody reads any more: in the words of the warp's own threads, K * NS lines of 128 bytes for every saved state.
constexpr int WAITING_BYTES = WARP_CHANNELS * TILE * sizeof(T);  // of a tile, a warp and an operand
constexpr int TILE_LINES = SAVE <= TILE ? TILE / SAVE * K * NS : 0;
constexpr int MOST_WAITING = WAITING_BYTES % 128 == 0 ? TILE_LINES * 128 / WAITING_BYTES : 0;  // operands
// The operands that wait are numbered; one that does not has -1.
constexpr int waiting(bool transposed, int before) { return transposed && before < MOST_WAITING ? before : -1; }
constexpr int DU_WAITS = waiting(U_TRANSPOSED, 0), DDELTA_WAITS = waiting(DELTA_TRANSPOSED, U_TRANSPOSED),
              DZ_WAITS = waiting(HAS_Z && Z_TRANSPOSED, U_TRANSPOSED + DELTA_TRANSPOSED);

// Where the tokens of a channel in the segment's tile `tile` wait. Channels of a line are rotated, tile by tile and line
// by line, against bank conflicts.
template <int OPERAND> DEVICE T* waiting_tokens(BackwardShared& shared, int warp, int tile, int channel) {
    constexpr int PER_LINE = 128 / (TILE * sizeof(T)), LINES = WAITING_BYTES / 128;
    const int line = channel / PER_LINE, at = (channel + tile + line * (PER_LINE / 4)) % PER_LINE;
    return (T*)(&shared.saved[0][0][0] + (tile * TILE_LINES + OPERAND * LINES + line) * THREADS + warp * 32) + at * TILE;
}

// A lane's vector of a tile, as `Elements` says.
template <int OPERAND>
DEVICE void put_waiting(BackwardShared& shared, int warp, int tile, int token, int column, const float* values) {
    if constexpr (ALONG) {
        store<VEC, true>(waiting_tokens<OPERAND>(shared, warp, tile, column) + token, values, VEC);
    } else {
#pragma unroll
        for (int i = 0; i < VEC; i++)
            waiting_tokens<OPERAND>(shared, warp, tile, column + i)[token] = to_element(values[i]);
    }
}

// Stores what waits, `tokens` of each of `channels` channels. `to`: the first channel's first token of the segment.
template <int OPERAND>
DEVICE void store_waiting(BackwardShared& shared, int warp, int lane, T* to, i64 stride, int channels, int tokens) {
    constexpr int N = ALONG ? 16 / sizeof(T) : 1;                       // tokens of a lane
    constexpr int LANES_OF_CHANNEL = SEGMENT / N < 32 ? SEGMENT / N : 32;
    constexpr int TOGETHER = 32 / LANES_OF_CHANNEL;                    // channels
#pragma unroll 1
    for (int token = lane % LANES_OF_CHANNEL * N; token < tokens; token += LANES_OF_CHANNEL * N)
#pragma unroll 4
        for (int c = lane / LANES_OF_CHANNEL; c < WARP_CHANNELS; c += TOGETHER) {
            if (c >= channels) break;
            const T* from = waiting_tokens<OPERAND>(shared, warp, token / TILE, c) + token % TILE;
            T* at = to + c * stride + token;
            if constexpr (ALONG) *(uint4*)at = *(const uint4*)from;
            else *at = *from;
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS) selective_scan_backward(
    const __grid_constant__ BackwardParams p) {
    extern __shared__ __align__(16) char memory[];
    BackwardShared& shared = *(BackwardShared*)memory;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int part = lane % LANES, group = lane / LANES;
    const int l = (int)p.l, d = (int)p.d, n = (int)p.n;
#if CHAINED
    const int ticket = take_ticket(p.tickets, memory), chains = (int)(gridDim.x / p.chunks), chain = ticket % chains;
    const int chunk = (int)p.chunks - 1 - ticket / chains;
    const int row = chain / (int)p.channel_tiles, channel_tile = chain % (int)p.channel_tiles;
#else
    i64 block = blockIdx.x;
    const int channel_tile = (int)(block % p.channel_tiles);
    block /= p.channel_tiles;
    const int chunk = (int)(block % p.chunks), row = (int)(block / p.chunks);
#endif
    const int t0 = chunk * (int)p.chunk_length, t1 = min(l, t0 + (int)p.chunk_length);
    const ChannelTile channels(channel_tile, (int)p.group_tiles, (int)p.group_channels, d);
    const int warp_channel = channels.first + warp * WARP_CHANNELS, end = channels.end;
    const StateSlice states{warp_channel + group * K, end, n, part * NS};
    const int interval = (int)p.interval, segment = min(SEGMENT, interval);
    const i64 check_row = (i64)row * ((l + interval - 1) / interval);

    float A[K][NS], g[K][NS], dA[K][NS], h[K][NS], own_B[K][NS], own_C[K][NS], own_dB[K][NS], own_dC[K][NS];
    states.load(A, p.A);
    clear(g);
    clear(dA);
    if constexpr (CONSTANT & 1) states.load(own_B, (const float*)p.B + row * p.B_b), clear(own_dB);
    if constexpr (CONSTANT & 2) states.load(own_C, (const float*)p.C + row * p.C_b), clear(own_dC);
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int i = 0; i < NS; i++) A[k][i] *= LOG2E;
    auto load_initial = [&](int s) {
        if (p.initial) states.load(h, p.initial + (i64)s * d * n);
        else clear(h);
    };
    auto load_dfinal = [&](int s) {
        if (p.dfinal) states.load(g, p.dfinal + (i64)s * d * n);
        else clear(g);
    };
    auto store_dinitial = [&](int s) {
        if (p.dinitial) states.store(p.dinitial + (i64)s * d * n, g);
    };
    if (t1 == l) {
        if (!PACKED) load_dfinal(row);
    } else if (CHAINED) {
        wait_for_carry(p.tickets + 1 + row * p.channel_tiles + channel_tile, (int)p.chunks - 1 - chunk);
        states.load(g, p.carries + ((i64)row * p.chunks + chunk + 1) * d * n);
    } else {
        // The look-back, from the chunk where the sequence of token t1 ends down to the next one.
        int last = (int)p.chunks - 1, s = row;
        if (PACKED) {
            s = __ldg(p.ids + t1);
            last = __ldg(p.cu + s) == t1 ? chunk : (__ldg(p.cu + s + 1) - 1) / (int)p.chunk_length;
        }
        if (p.first_chunk == 0 && last > chunk) load_dfinal(s);  // 0 but for a sequence that ends with the row
        for (int c = last; c > chunk; c--) {
            float add[K][NS];
            states.load(add, p.carries + ((i64)row * p.chunks + c) * d * n);
#pragma unroll
            for (int k = 0; k < K; k++) {
                float delta =
                    states.first + k < end ? p.delta_sums[((i64)row * p.chunks + c) * d + states.first + k] : 0.f;
#pragma unroll
                for (int i = 0; i < NS; i++)
                    g[k][i] = c == last && p.first_chunk ? add[k][i] : fmaf(ex2(delta * A[k][i]), g[k][i], add[k][i]);
            }
        }
    }

    Elements mine;
    mine.set(lane, warp_channel, end);
    LaneStream<DY_TRANSPOSED> dy;
    LaneStream<U_TRANSPOSED> u;
    LaneStream<DELTA_TRANSPOSED> delta;
    LaneStream<Z_TRANSPOSED> z;
    float D[VECS][VEC_CHANNELS], bias[VECS][VEC_CHANNELS];
    float dD[VEC_CHANNELS], dbias[VEC_CHANNELS], sum_D[VEC_CHANNELS], lost_D[VEC_CHANNELS];
#pragma unroll
    for (int v = 0; v < VECS; v++)
#pragma unroll
        for (int i = 0; i < VEC_CHANNELS; i++) {
            int c = warp_channel + mine.column[v] + i;
            D[v][i] = p.D && i < mine.count[v] ? p.D[c] : 0.f;
            bias[v][i] = p.bias && i < mine.count[v] ? p.bias[c] : 0.f;
            dD[i] = dbias[i] = sum_D[i] = lost_D[i] = 0.f;
        }
    // Where one of them is constant, the other one stands in for its rows, which nobody reads.
    const T *B = p.B + row * p.B_b + channels.group * p.B_g, *C = p.C + row * p.C_b + channels.group * p.C_g;
    if (CONSTANT == 1) B = C;
    if (CONSTANT == 2) C = B;

    // (delta, delta u) of tile t, from the prefetched values, to shared memory.
    auto put_steps = [&](int t, int to) {
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            float2 steps[VEC];
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                float x = delta.next[v].get(i) + bias[v][ALONG ? 0 : i];
                if (SOFTPLUS) x = softplus(x);
                if (t + mine.token[v] + (ALONG ? i : 0) >= t1) x = 0.f;
                steps[i] = make_float2(x, x * u.next[v].get(i));
            }
            if (TILE * ROW_VECS % 32 == 0 || mine.token[v] < TILE)
                write_pairs<VEC>(&shared.steps[to][warp][mine.token[v]][mine.column[v]], steps, STEPS_ROW);
        }
    };
    // Its output gradients before the gate, likewise.
    auto put_gradients = [&](int to) {
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            float out[VEC];
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                out[i] = dy.next[v].get(i);
                if (HAS_Z) {
                    float gate = z.next[v].get(i);
                    out[i] *= gate * sigmoid(gate);
                }
            }
            if (TILE * ROW_VECS % 32 == 0 || mine.token[v] < TILE)
                write_elements<VEC>(&shared.dy[to][warp][mine.token[v]][mine.column[v]], out, WARP_CHANNELS);
        }
    };
    // SUB tokens forward from token j0 of a tile.
    auto forward = [&](int j0, int now, const float* rows, const Starts& starts, auto keep) {
#pragma unroll
        for (int jj = 0; jj < SUB; jj++) {
            const int j = j0 + jj;
            if (PACKED && starts.starts(j) && starts.of(j) >= 0) load_initial(starts.of(j));
            float step[2 * K], Bs[NS];
            read_floats<2 * K>(step, (const float*)&shared.steps[now][warp][j][group * K]);
            if (!(CONSTANT & 1)) read_floats<NS>(Bs, rows + j * 2 * NP + part * NS);
#pragma unroll
            for (int k = 0; k < K; k++)
#pragma unroll
                for (int i = 0; i < NS; i++) {
                    float a = ex2(step[2 * k] * A[k][i]);
                    keep(jj, k, i, h[k][i], a);
                    h[k][i] = fmaf(a, h[k][i], step[2 * k + 1] * (CONSTANT & 1 ? own_B[k][i] : Bs[i]));
                }
        }
    };
    auto discard = [](int, int, int, float, float) {};
    auto save = [&](int at) {
#pragma unroll
        for (int i = 0; i < K * NS; i++) shared.saved[at][i][threadIdx.x] = h[i / NS][i % NS];
    };

    int now = 0;
    for (int ts = t0 + (t1 - t0 - 1) / segment * segment; ts >= t0; ts -= segment) {
        const int te = min(t1, ts + segment);
        int base = ts / interval * interval;
        states.load(h, p.checkpoints + (check_row + base / interval) * d * n);
        const int last_tile = ts + (te - ts - 1) / TILE * TILE;
        u.set(p.u + row * p.u_b, base, step_of<U_TRANSPOSED>(p.u_t, p.u_c), warp_channel, mine);
        delta.set(p.delta + row * p.delta_b, base, step_of<DELTA_TRANSPOSED>(p.delta_t, p.delta_c), warp_channel, mine);
        u.fetch(t1 - base, TILE, step_of<U_TRANSPOSED>(p.u_t, p.u_c), mine);
        delta.fetch(t1 - base, TILE, step_of<DELTA_TRANSPOSED>(p.delta_t, p.delta_c), mine);
        int next_ids = Starts::fetch(p.ids, base, l, lane);
        for (; base <= ts; base += segment) {
            __syncthreads();  // the last readers of the rows
            if constexpr (CONSTANT != 3)
            for (int item = threadIdx.x; item < segment * 2 * QUADS; item += THREADS) {
                int t = base + item / (2 * QUADS), rest = item % (2 * QUADS), s = rest % QUADS * 4;
                const T* from = rest < QUADS ? B + t * (CONSTANT == 1 ? p.C_t : p.B_t)
                                             : C + t * (CONSTANT == 2 ? p.B_t : p.C_t);
                Raw<4> raw;
                raw.load(from + s, t < t1 ? min(4, n - s) : 0);
                *(float4*)(shared.rows + item * 4) = make_float4(raw.get(0), raw.get(1), raw.get(2), raw.get(3));
            }
            __syncthreads();
            const float* rows = shared.rows;
#pragma unroll 1
            for (int t = base; t < min(base + segment, last_tile); t += TILE, rows += TILE * 2 * NP, now ^= 1) {
                put_steps(t, now);
                Starts starts;
                if (PACKED) {
                    starts.set(next_ids, lane);
                    next_ids = Starts::fetch(p.ids, t + TILE, l, lane);
                }
                u.fetch(t1 - t - TILE, TILE, step_of<U_TRANSPOSED>(p.u_t, p.u_c), mine);
                delta.fetch(t1 - t - TILE, TILE, step_of<DELTA_TRANSPOSED>(p.delta_t, p.delta_c), mine);
                __syncwarp();  // all lanes have read the tile before last, whose buffer is written next
#pragma unroll
                for (int j = 0; j < TILE; j += SUB) {
                    if (j % SAVE == 0 && base == ts) save((t - ts + j) / SAVE);
                    forward(j, now, rows, starts, discard);
                }
            }
        }
        dy.set(p.dy + row * p.dy_b, last_tile, step_of<DY_TRANSPOSED>(p.dy_t, p.dy_c), warp_channel, mine);
        if (HAS_Z) z.set(p.z + row * p.z_b, last_tile, step_of<Z_TRANSPOSED>(p.z_t, p.z_c), warp_channel, mine);
        dy.fetch(t1 - last_tile, -TILE, step_of<DY_TRANSPOSED>(p.dy_t, p.dy_c), mine);
        if (HAS_Z) z.fetch(t1 - last_tile, -TILE, step_of<Z_TRANSPOSED>(p.z_t, p.z_c), mine);
        u.move(-2 * TILE, step_of<U_TRANSPOSED>(p.u_t, p.u_c));
        delta.move(-2 * TILE, step_of<DELTA_TRANSPOSED>(p.delta_t, p.delta_c));
        put_steps(last_tile, now);
        put_gradients(now);
        LanePointer<T, U_TRANSPOSED> du_at;
        LanePointer<T, DELTA_TRANSPOSED> ddelta_at;
        LanePointer<T, Z_TRANSPOSED> dz_at;
        T *du = p.du + (i64)row * l * d, *ddelta = p.ddelta + (i64)row * l * d, *dz = p.dz + row * p.dz_b;
        if (DU_WAITS < 0) du_at.set(du, last_tile, U_TRANSPOSED ? l : d, warp_channel, mine);
        if (DDELTA_WAITS < 0) ddelta_at.set(ddelta, last_tile, DELTA_TRANSPOSED ? l : d, warp_channel, mine);
        if (HAS_Z && DZ_WAITS < 0) dz_at.set(dz, last_tile, Z_TRANSPOSED ? (i64)l : p.dz_t, warp_channel, mine);
        float* exchanged = shared.exchanged[warp];
        float* partial_to = p.partial + ((i64)channel_tile * p.rows + (i64)row * l + last_tile) * 2 * NP;
        __syncwarp();
        {
            Starts starts;
            if (PACKED && SAVE < TILE) starts.set(next_ids, lane);
#pragma unroll
            for (int j = 0; j < TILE; j += SAVE) {
                save((last_tile - ts + j) / SAVE);
                if (j + SAVE < TILE)
#pragma unroll
                    for (int jj = 0; jj < SAVE; jj += SUB)
                        forward(j + jj, now, shared.rows + (last_tile - ts) * 2 * NP, starts, discard);
            }
        }

        // Software pipeline: the step sizes of a tile are computed one iteration ahead, so `next` holds the tile before
        // t, and u_now, delta_now, z_now and dy_now hold tile t.
#pragma unroll 1
        for (int t = last_tile; t >= ts; t -= TILE, now ^= 1, partial_to -= TILE * 2 * NP) {
            Raw<VEC> u_now[VECS], delta_now[VECS], z_now[VECS], dy_now[VECS];
#pragma unroll
            for (int v = 0; v < VECS; v++) {
                u_now[v] = together(u.next[v]), delta_now[v] = together(delta.next[v]), dy_now[v] = together(dy.next[v]);
                if (HAS_Z) z_now[v] = together(z.next[v]);
            }
            Starts starts;
            if (PACKED) starts.set(next_ids, lane);
            if (t > ts) {
                u.fetch(TILE, -TILE, step_of<U_TRANSPOSED>(p.u_t, p.u_c), mine);
                delta.fetch(TILE, -TILE, step_of<DELTA_TRANSPOSED>(p.delta_t, p.delta_c), mine);
                dy.fetch(TILE, -TILE, step_of<DY_TRANSPOSED>(p.dy_t, p.dy_c), mine);
                if (HAS_Z) z.fetch(TILE, -TILE, step_of<Z_TRANSPOSED>(p.z_t, p.z_c), mine);
                next_ids = Starts::fetch(p.ids, t - TILE, l, lane);
            }
            const float* rows = shared.rows + (t - ts) * 2 * NP;
#pragma unroll 1
            for (int j0 = TILE - SUB; j0 >= 0; j0 -= SUB) {
#pragma unroll
                for (int i = 0; i < K * NS; i++)
                    h[i / NS][i % NS] = shared.saved[(u32)(t - ts + j0) / SAVE][i][threadIdx.x];
#pragma unroll 1
                for (int j = (u32)j0 / SAVE * SAVE; j < j0; j += SUB) forward(j, now, rows, starts, discard);
                float before[SUB][K][NS], decay[SUB][K][NS];  // h_{t-1} (after a start) and exp(delta A)
                forward(j0, now, rows, starts, [&](int jj, int k, int i, float state, float a) {
                    before[jj][k][i] = state;
                    decay[jj][k][i] = a;
                });
                // In pairs, which share their reductions over lanes and over channels.
#pragma unroll
                for (int pair = SUB - 2; pair >= 0; pair -= 2) {
                    float over_states[3][2 * K];
#pragma unroll
                    for (int jj = pair + 1; jj >= pair; jj--) {
                        const int j = j0 + jj;
                        if (PACKED && starts.ends(j) && t + j < t1) load_dfinal(starts.of(j));
                        float step[2 * K], out[K], Bs[NS], Cs[NS];
                        read_floats<2 * K>(step, (const float*)&shared.steps[now][warp][j][group * K]);
                        read_floats<K>(out, &shared.dy[now][warp][j][group * K]);
                        if (!(CONSTANT & 1)) read_floats<NS>(Bs, rows + j * 2 * NP + part * NS);
                        if (!(CONSTANT & 2)) read_floats<NS>(Cs, rows + j * 2 * NP + NP + part * NS);
                        float over_channels[2 * NS];
#pragma unroll
                        for (int k = 0; k < K; k++) {
                            float y = 0.f, gB = 0.f, gA = 0.f;
#pragma unroll
                            for (int i = 0; i < NS; i++) {
                                const float B_i = CONSTANT & 1 ? own_B[k][i] : Bs[i];
                                const float C_i = CONSTANT & 2 ? own_C[k][i] : Cs[i];
                                float state;  // h_t
                                if (PACKED) state = fmaf(decay[jj][k][i], before[jj][k][i], step[2 * k + 1] * B_i);
                                else state = jj + 1 < SUB ? before[jj + 1 < SUB ? jj + 1 : jj][k][i] : h[k][i];
                                g[k][i] = fmaf(out[k], C_i, g[k][i]);
                                if (k == 0) {
                                    over_channels[i] = CONSTANT & 1 ? 0.f : step[2 * k + 1] * g[k][i];
                                    over_channels[NS + i] = CONSTANT & 2 ? 0.f : out[k] * state;
                                } else {
                                    if (!(CONSTANT & 1))
                                        over_channels[i] = fmaf(step[2 * k + 1], g[k][i], over_channels[i]);
                                    if (!(CONSTANT & 2))
                                        over_channels[NS + i] = fmaf(out[k], state, over_channels[NS + i]);
                                }
                                if (CONSTANT & 1) own_dB[k][i] = fmaf(step[2 * k + 1], g[k][i], own_dB[k][i]);
                                if (CONSTANT & 2) own_dC[k][i] = fmaf(out[k], state, own_dC[k][i]);
                                y = i == 0 ? C_i * state : fmaf(C_i, state, y);
                                gB = i == 0 ? g[k][i] * B_i : fmaf(g[k][i], B_i, gB);
                                g[k][i] *= decay[jj][k][i];
                                float gah = g[k][i] * before[jj][k][i];
                                gA = i == 0 ? gah * A[k][i] : fmaf(gah, A[k][i], gA);
                                dA[k][i] = fmaf(gah, step[2 * k], dA[k][i]);
                            }
                            over_states[0][(jj - pair) * K + k] = y;
                            over_states[1][(jj - pair) * K + k] = gB;
                            over_states[2][(jj - pair) * K + k] = gA;
                        }
                        if (PACKED && starts.starts(j) && t + j < t1) {
                            store_dinitial(starts.of(j));
                            clear(g);
                        }
#pragma unroll
                        for (int which = 0; which < (CONSTANT == 3 ? 0 : 2); which++) {
                            float* to = GROUPS > 1
                                ? exchanged + (jj - pair) * TOKEN_SUMS + exchange_offset(group, which)
                                : shared.partial[now][warp][j] + which * NP;
                            write_floats<NS>(to + part * NS, over_channels + which * NS);
                        }
                    }
                    if (GROUPS > 1 && CONSTANT != 3) {
                        constexpr int RUN = NP >= 32 ? 4 : NP >= 16 ? 2 : 1;  // neighbouring sums of a lane
                        __syncwarp();
#pragma unroll
                        for (int first = 0; first < 2 * GROUP_SUMS; first += 32 * RUN) {
                            const int i = first + lane * RUN;
                            if (2 * GROUP_SUMS % (32 * RUN) != 0 && i >= 2 * GROUP_SUMS) break;
                            const int which = i / NP % 2;
                            const float* from = exchanged + i / GROUP_SUMS * TOKEN_SUMS + i % NP;
                            float total[RUN], more[RUN];
                            read_floats<RUN>(total, from + exchange_offset(0, which));
#pragma unroll
                            for (int g = 1; g < GROUPS; g++) {
                                read_floats<RUN>(more, from + exchange_offset(g, which));
#pragma unroll
                                for (int r = 0; r < RUN; r++) total[r] += more[r];
                            }
                            write_floats<RUN>(&shared.partial[now][warp][j0 + pair][0] + i, total);
                        }
                        __syncwarp();
                    }
                    constexpr int KEPT = 2 * K > LANES ? 2 * K / LANES : 1;
                    constexpr int SAME = LANES > 2 * K ? LANES / (2 * K) : 1;
                    constexpr int RUN = KEPT < K ? KEPT : K;
                    int at = part / SAME * KEPT;
#pragma unroll
                    for (int q = 0; q < 3; q++) {
                        sum_lanes<2 * K, LANES, 1>(over_states[q], lane);
                        if (part % SAME == 0)
#pragma unroll
                            for (int i = 0; i < KEPT; i += RUN)
                                write_floats<RUN>(
                                    &shared.sums[warp][q][j0 + pair + (at + i) / K][group * K + (at + i) % K],
                                    over_states[q] + i);
                    }
                }
            }
            put_steps(t - TILE, now ^ 1);
            put_gradients(now ^ 1);
            __syncthreads();
            // Every reader of this buffer of partial sums passes the next tile's barrier before it is written again.
            constexpr int RUN = NP >= 16 ? 2 : 1;  // neighbouring sums of a thread
            const int sums = CONSTANT == 3 ? 0 : min(TILE, t1 - t) * 2 * NP;
#pragma unroll
            for (int first = 0; first < TILE * 2 * NP; first += THREADS * RUN) {
                int i = first + threadIdx.x * RUN;
                if (i >= sums) continue;
                float total[RUN], add[RUN];
                read_floats<RUN>(total, &shared.partial[now][0][0][0] + i);
#pragma unroll
                for (int w = 1; w < WARPS; w++) {
                    read_floats<RUN>(add, &shared.partial[now][w][0][0] + i);
#pragma unroll
                    for (int r = 0; r < RUN; r++) total[r] += add[r];
                }
                write_floats<RUN>(partial_to + i, total);
            }
#pragma unroll
            for (int v = 0; v < VECS; v++) {
                if (TILE * ROW_VECS % 32 != 0 && mine.token[v] >= TILE) continue;
                const int j = mine.token[v], column = mine.column[v];
                float y[VEC], gB[VEC], gA[VEC], out[VEC], gradient_u[VEC], gradient_delta[VEC], gradient_z[VEC];
                float2 step[VEC];
                read_elements<VEC>(y, &shared.sums[warp][0][j][column], WARP_CHANNELS);
                read_elements<VEC>(gB, &shared.sums[warp][1][j][column], WARP_CHANNELS);
                read_elements<VEC>(gA, &shared.sums[warp][2][j][column], WARP_CHANNELS);
                read_pairs<VEC>(step, &shared.steps[now][warp][j][column], STEPS_ROW);
                read_elements<VEC>(out, &shared.dy[now][warp][j][column], WARP_CHANNELS);
                const int count = mine.existing(v, t1 - t);
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    const int c = ALONG ? 0 : i;
                    float u_i = u_now[v].get(i);
                    gradient_u[i] = fmaf(gB[i], step[i].x, D[v][c] * out[i]);
                    gradient_delta[i] = fmaf(gA[i], LN2, gB[i] * u_i);
                    if (SOFTPLUS) gradient_delta[i] *= sigmoid(delta_now[v].get(i) + bias[v][c]);
                    if (HAS_Z) {
                        float gate = z_now[v].get(i), s = sigmoid(gate);
                        gradient_z[i] = dy_now[v].get(i) * fmaf(D[v][c], u_i, y[i]) * s * fmaf(gate, 1.f - s, 1.f);
                    }
                    dD[c] = fmaf(out[i], u_i, dD[c]);  // zero past the end: dy is
                    if (t + j + (ALONG ? i : 0) < t1) dbias[c] += gradient_delta[i];
                }
                const int tile = (t - ts) / TILE;
                if constexpr (DU_WAITS >= 0) put_waiting<DU_WAITS>(shared, warp, tile, j, column, gradient_u);
                else du_at.store_at(v, l, gradient_u, count);
                if constexpr (DDELTA_WAITS >= 0) put_waiting<DDELTA_WAITS>(shared, warp, tile, j, column, gradient_delta);
                else ddelta_at.store_at(v, l, gradient_delta, count);
                if constexpr (DZ_WAITS >= 0) put_waiting<DZ_WAITS>(shared, warp, tile, j, column, gradient_z);
                else if (HAS_Z) dz_at.store_at(v, l, gradient_z, count);
            }
            if (DU_WAITS < 0) du_at.move(-TILE, d);
            if (DDELTA_WAITS < 0) ddelta_at.move(-TILE, d);
            if (HAS_Z && DZ_WAITS < 0) dz_at.move(-TILE, p.dz_t);
            __syncwarp();
        }
        const i64 first = warp_channel * (i64)l + ts;
        const int have = end - warp_channel, tokens = te - ts;
        if constexpr (DU_WAITS >= 0) store_waiting<DU_WAITS>(shared, warp, lane, du + first, l, have, tokens);
        if constexpr (DDELTA_WAITS >= 0) store_waiting<DDELTA_WAITS>(shared, warp, lane, ddelta + first, l, have, tokens);
        if constexpr (DZ_WAITS >= 0) store_waiting<DZ_WAITS>(shared, warp, lane, dz + first, l, have, tokens);
        // Kahan summation of dD over segments: one float32 sum over a whole chunk would add up a rounding error per
        // token.
#pragma unroll
        for (int i = 0; i < VEC_CHANNELS; i++) {
            float add = dD[i] - lost_D[i], sum = sum_D[i] + add;
            lost_D[i] = (sum - sum_D[i]) - add, sum_D[i] = sum, dD[i] = 0.f;
        }
    }
    if (!PACKED && chunk == 0) store_dinitial(row);
    const i64 at = (i64)row * p.chunks + chunk;
    if (CHAINED) {
        if (chunk > 0) states.store(p.carries + at * d * n, g);
        publish_carry(p.tickets + 1 + row * p.channel_tiles + channel_tile, (int)p.chunks - chunk);
    }
    states.store(p.dA_parts + at * d * n, dA);
    if constexpr (CONSTANT & 1) states.store(p.dB_parts + at * d * n, own_dB);
    if constexpr (CONSTANT & 2) states.store(p.dC_parts + at * d * n, own_dC);
#pragma unroll
    for (int i = 0; i < VEC_CHANNELS; i++) {
        double all_D = (double)sum_D[i] - lost_D[i];
#pragma unroll
        for (int w = ROW_LANES; w < 32; w *= 2) {
            all_D += __shfl_xor_sync(ALL, all_D, w);
            dbias[i] += __shfl_xor_sync(ALL, dbias[i], w);
        }
        const int c = warp_channel + mine.column[0] + i;
        if (lane < ROW_LANES && c < end) p.dD_parts[at * d + c] = (float)all_D, p.dbias_parts[at * d + c] = dbias[i];
    }
}

// Adds the partial sums: of dB and dC over channel tiles, of dA, dD and ddelta_bias over rows and chunks, in a fixed
// order.
struct ReduceParams {  // cuda_parameters.py mirrors it
    const float *partial, *dA_parts, *dD_parts, *dbias_parts;
    const float* dA_scale;  // (d, n), or null: dA is multiplied by it, A for the gradient of log(-A)
    T *dB, *dC;
    float *dA, *dD, *dbias;
    i64 rows, channel_tiles, n, d, parts;
    i64 groups;  // of channels, each with so many channel tiles
    i64 row_t;   // elements from a row of dB, and of dC, to the next
};

extern "C" __global__ void __launch_bounds__(256) selective_scan_reduce(const __grid_constant__ ReduceParams p) {
    i64 item = (i64)blockIdx.x * 256 + threadIdx.x;
    const i64 items = p.rows * 2 * QUADS, all = GROUPED ? items * p.groups : items;
    const i64 padded = (all + 255) / 256 * 256;
    if (item < padded) {
        if (item >= all) return;
        const i64 group = GROUPED ? item / items : 0;
        if (GROUPED) item %= items;
        const float4* from = (const float4*)p.partial + group * p.channel_tiles * items + item;
        float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
        for (i64 channel_tile = 0; channel_tile < p.channel_tiles; channel_tile++) {
            float4 x = __ldcs(from + channel_tile * items);
            total.x += x.x, total.y += x.y, total.z += x.z, total.w += x.w;
        }
        i64 row = item / (2 * QUADS);
        int rest = (int)(item % (2 * QUADS)), s = rest % QUADS * 4;
        float out[4] = {total.x, total.y, total.z, total.w};
        if (CONSTANT & (rest < QUADS ? 1 : 2)) return;
        if (GROUPED) row = row * p.groups + group;
        store<4>((rest < QUADS ? p.dB : p.dC) + row * p.row_t + s, out, min(4, (int)p.n - s));
        return;
    }
    item -= padded;
    const i64 states = p.d * p.n;
    const float* from;
    float* to;
    i64 stride = p.d;
    if (item < states) {
        from = p.dA_parts + item, to = p.dA + item, stride = states;
    } else if (item < states + p.d) {
        from = p.dD_parts + item - states, to = p.dD + item - states;
    } else if (item < states + 2 * p.d) {
        from = p.dbias_parts + item - states - p.d, to = p.dbias + item - states - p.d;
    } else {
        return;
    }
    double total = 0.;
#pragma unroll 8
    for (i64 i = 0; i < p.parts; i++) total += from[i * stride];
    *to = p.dA_scale && item < states ? (float)total * p.dA_scale[item] : (float)total;
}
