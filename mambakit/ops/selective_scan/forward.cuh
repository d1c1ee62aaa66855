// The forward scan. See common.cuh for the layout of channels and states over lanes.
//
// One CTA scans one chunk of one row for CTA_CHANNELS channels; the launch's `phase` says how. Where b * d fills the
// card, a chunk is a whole row (SCAN_ROWS). Else rows are cut into `chunks` and scanned in two launches.
// SCAN_AGGREGATES scans chunk 0 in full, and of the other chunks but the last only computes the aggregate: the final
// state from a zero state, and sum(delta), as exp(A sum(delta)) is the decay over the chunk. SCAN_CHUNKS combines the
// aggregates of its predecessors into the carry that enters its chunk (the look-back), then scans it in full.
//
// A split scan (cuda_split_scan.py) learns the initial state only after it has reported the aggregates:
// SPLIT_AGGREGATES computes those of every chunk, SPLIT_CHUNKS scans every chunk in full, from the initial state. A
// CHAINED scan (common.cuh) scans every chunk once.
enum Phase { SCAN_ROWS, SCAN_AGGREGATES, SCAN_CHUNKS, SPLIT_AGGREGATES, SPLIT_CHUNKS };  // cuda_forward.py has the same

struct ForwardParams {  // cuda_parameters.py mirrors it
    const T *u, *delta, *z, *B, *C;
    const float *A, *D, *bias, *initial;
    const int *slots, *ids, *cu;  // slots of the pool of states; packed: the sequence of each token, cu_seqlens
    T* y;
    float *final, *checkpoints;
    float *carries, *delta_sums;  // (b, chunks, d, NP): aggregates, or carries after a chunk; (b, chunks, d)
    int* tickets;                 // of a chained scan
    i64 u_b, delta_b, z_b, B_b, C_b, u_t, delta_t, z_t, B_t, C_t;  // strides over rows and over tokens, in elements
    i64 l, d, n, channel_tiles, chunk_length, chunks, phase, interval;
    i64 u_c, delta_c, z_c;                            // strides over channels, of transposed inputs
    i64 B_g, C_g, group_tiles, group_channels;        // strides over groups; a group's channel tiles and channels
};

// Tokens go by in rounds of ROUND (a macro, 8 to 32). Inputs are double-buffered in shared memory: the next round's are
// loaded while this one's are scanned.
constexpr int ASYNC_VEC = ALIGNED == 8 && WARP_CHANNELS % 8 == 0 && sizeof(T) == 2 ? 8 : VEC;  // channels of one copy
constexpr int ROW_LOADS = WARP_CHANNELS / ASYNC_VEC;
constexpr int STEP = 32 / ROW_LOADS;              // tokens that one copy of every lane covers
constexpr int LOADS = (ROUND + STEP - 1) / STEP;  // copies of a lane in one round, of one tensor
// Where tokens are adjacent, a channel's are copied in pieces of 16 bytes, from the last 16-byte boundary before the
// first one: any length of a row will do. PITCH: elements from one channel to the next in shared memory.
constexpr int PIECE = 16 / sizeof(T);
constexpr int PITCH = ROUND + PIECE;
constexpr int PIECES = PITCH / PIECE;
constexpr int SPACE = TRANSPOSED & 7 ? WARP_CHANNELS * PITCH : ROUND * WARP_CHANNELS;  // of a warp
constexpr int INPUT = WARPS * SPACE;
// Along (common.cuh), a lane reads, and computes the step sizes of, RUN neighbouring tokens of a channel.
constexpr int RUN = WARP_CHANNELS * ROUND >= 256 ? 8 : 4;
constexpr int RUNS = WARP_CHANNELS * ROUND / RUN;  // of a warp in one round
constexpr int LANE_RUNS = (RUNS + 31) / 32;
// Outputs are sums over a channel's lanes. With few lanes each writes its partial sum, and the lane that stores the
// output adds them. A token's row of partial sums lies 16 banks from the one before or, of lanes that read four tokens,
// from the fourth before.
constexpr int PARTIALS = LANES <= 4 ? LANES : 1;
constexpr int PARTIALS_ROW = PARTIALS * WARP_CHANNELS + (ALONG ? 4 : PARTIALS > 1 ? 16 : 0);

struct ForwardShared {  // plan.py counts its bytes
    T inputs[2][2 + HAS_Z][WARPS][SPACE];  // [ROUND][WARP_CHANNELS] or, transposed, [WARP_CHANNELS][PITCH]
    float rows[2][ROUND * 2 * NP];
    float2 steps[WARPS][ROUND][STEPS_ROW];  // delta, delta * u
    float y[WARPS][TILE][PARTIALS_ROW];
};
static_assert(sizeof(ForwardShared) == SHARED, "plan.py counts other bytes of shared memory");

// Of even rows, the next rounds' tokens are in the same line of 128 bytes; others share pieces with the round before.
#if TRANSPOSED & 16
#define COPY_PIECE "cp.async.cg.shared.global.L2::128B"
#else
#define COPY_PIECE "cp.async.ca.shared.global"
#endif

// The copies of a warp's transposed input: `left` tokens exist from `base` on, of `channels` channels.
DEVICE void copy_piece(T* shared, const T* p, int count) {
    constexpr int BYTES = 16;
    u32 to = (u32)__cvta_generic_to_shared(shared);
    asm volatile(COPY_PIECE " [%0], [%1], %2, %3;" ::"r"(to), "l"(p), "n"(BYTES), "r"(count > 0 ? BYTES : 0));
}

DEVICE int past_boundary(const T* p) { return EVEN ? 0 : (int)((size_t)p / sizeof(T)) & (PIECE - 1); }

// A lane's part of those copies, of one input. Only the base changes from round to round, uniformly over the warp.
struct TokenCopies {
    static constexpr int COPIED = EVEN ? ROUND / PIECE : PIECES, ITEMS = WARP_CHANNELS * COPIED;
    static constexpr int OWN = (ITEMS + 31) / 32;
    int offset[OWN];  // elements from the base, which is the first channel's first token; cuda_launch.py bounds strides
    int first[OWN];   // the first token of the piece, past every round's end where there is none

    DEVICE void set(const T* base, i64 stride, int channels, int lane) {
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int item = lane + 32 * i, c = item / COPIED, piece = item % COPIED * PIECE;
            const int before = past_boundary(base + c * stride);
            offset[i] = c * (int)stride + piece - before;
            first[i] = c < channels && item < ITEMS ? piece - before : ROUND;
        }
    }

    DEVICE void fetch(T* shared, const T* base, int left, int lane) const {
        const int limit = left > 0 ? min(left, ROUND) : -PIECE;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int item = lane + 32 * i;
            if (ITEMS % 32 != 0 && item >= ITEMS) break;
            T* to = shared + item / COPIED * PITCH + item % COPIED * PIECE;
            copy_piece(to, base + offset[i], first[i] < limit);
        }
    }
};

// N neighbouring channels at one token of what `TokenCopies` have copied.
template <int N> DEVICE Raw<N> read_tokens(const T* shared, const T* base, i64 stride, int token, int column) {
    Raw<N> raw;
    raw.clear();
    const int first = past_boundary(base), step = (int)stride;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int c = column + i, before = EVEN ? 0 : (first + c * step) & (PIECE - 1);
        const T* at = shared + c * PITCH + before + token;
#if DTYPE == 0
        raw.w[i] = __float_as_uint(*at);
#else
        raw.w[i / 2] |= (u32)*at << (i & 1 ? 16 : 0);
#endif
    }
    return raw;
}

// Of one input, the elements of one vector of outputs.
template <bool ALONG_TOKENS> struct OutputInput : Raw<VEC> {
    template <bool TRANSPOSED_INPUT>
    DEVICE void read(const T* shared, const T* slot, const T* base, i64 stride, int token, int column) {
        if constexpr (TRANSPOSED_INPUT)
            (Raw<VEC>&)*this = read_tokens<VEC>(slot, base, stride, token, column);
        else (Raw<VEC>&)*this = read_async<VEC>(shared);
    }
};
template <> struct OutputInput<true> : Tokens<VEC> {
    template <bool> DEVICE void read(const T*, const T* slot, const T*, i64, int token, int column) {
        Tokens<VEC>::read(slot + column * PITCH + token);
    }
};

// FULL: outputs and states; else the aggregate of the chunk only.
template <bool FULL>
DEVICE void scan_chunk(const ForwardParams& p, ForwardShared& shared, int row, int chunk, int channel_tile) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int part = lane % LANES, group = lane / LANES;
    const int l = (int)p.l, d = (int)p.d, n = (int)p.n;
    const int t0 = chunk * (int)p.chunk_length, t1 = min(l, t0 + (int)p.chunk_length);
    const ChannelTile channels(channel_tile, (int)p.group_tiles, (int)p.group_channels, d);
    const int warp_channel = channels.first + warp * WARP_CHANNELS, end = channels.end;
    const StateSlice states{warp_channel + group * K, end, n, part * NS};
    const StateSlice padded{states.first, end, NP, part * NS};  // of p.carries

    float A[K][NS], h[K][NS], sum[K], own_B[K][NS], own_C[K][NS];
    states.load(A, p.A);
    if constexpr (CONSTANT & 1) states.load(own_B, (const float*)p.B + row * p.B_b);
    if constexpr (CONSTANT & 2) states.load(own_C, (const float*)p.C + row * p.C_b);
#pragma unroll
    for (int k = 0; k < K; k++) {
        sum[k] = 0.f;
#pragma unroll
        for (int i = 0; i < NS; i++) A[k][i] *= LOG2E, h[k][i] = 0.f;
    }
    // The slot of sequence s in the pool of states; a negative slot is none.
    auto slot = [&](int s) { return p.slots ? __ldg(p.slots + s) : s; };
    auto load_initial = [&](int s) {
        int at = slot(s);
        if (p.initial && at >= 0) {
            states.load(h, p.initial + (i64)at * d * n);
        } else {
#pragma unroll
            for (int k = 0; k < K; k++)
#pragma unroll
                for (int i = 0; i < NS; i++) h[k][i] = 0.f;
        }
    };
    auto store_final = [&](int s) {
        int at = slot(s);
        if (at >= 0) states.store(p.final + (i64)at * d * n, h);
    };
    if (chunk == 0) {
        if (!PACKED) load_initial(row);
    } else if (FULL && !CHAINED) {
        const int s = PACKED ? __ldg(p.ids + t0 - 1) : row, begin = PACKED ? __ldg(p.cu + s) : 0;
        int c = begin / (int)p.chunk_length;
        if (p.phase == SPLIT_CHUNKS && begin == 0) {
            load_initial(s);
        } else {
            padded.load(h, p.carries + ((i64)row * p.chunks + c) * d * NP);
            c++;
        }
        // The look-back. Channels past d read the last one's, so that no branch separates the loads of several chunks.
#pragma unroll 4
        for (; c < chunk; c++) {
            const i64 at = ((i64)row * p.chunks + c) * d;
#pragma unroll
            for (int k = 0; k < K; k++) {
                const i64 channel = at + min(states.first + k, d - 1);
                const float delta = p.delta_sums[channel];
                float add[NS];
                read_floats<NS>(add, p.carries + channel * NP + states.s0);
#pragma unroll
                for (int i = 0; i < NS; i++) h[k][i] = fmaf(ex2(delta * A[k][i]), h[k][i], add[i]);
            }
        }
    }

    // This lane loads, and computes the step sizes of, ASYNC_VEC channels of every STEP-th token.
    const int token = lane / ROW_LOADS, column = lane % ROW_LOADS * ASYNC_VEC;
    const int count = min(ASYNC_VEC, end - warp_channel - column);
    const i64 at = t0 + token;
    // Of a transposed input, the warp's first channel at the first token of the round.
    auto place = [&](const T* base, bool transposed, i64 row_stride, i64 token_stride, i64 channel_stride) {
        return transposed ? base + row * row_stride + t0 + warp_channel * channel_stride
                          : base + row * row_stride + at * token_stride + warp_channel + column;
    };
    const T* u_at = place(p.u, TRANSPOSED & 1, p.u_b, p.u_t, p.u_c);
    const T* delta_at = place(p.delta, TRANSPOSED & 2, p.delta_b, p.delta_t, p.delta_c);
    const T* z_at = HAS_Z && FULL ? place(p.z, TRANSPOSED & 4, p.z_b, p.z_t, p.z_c) : nullptr;
    float bias[ALONG ? LANE_RUNS : ASYNC_VEC];
    if constexpr (ALONG) {
#pragma unroll
        for (int i = 0; i < LANE_RUNS; i++) {
            const int c = warp_channel + (lane + 32 * i) % WARP_CHANNELS;
            bias[i] = p.bias && c < end ? p.bias[c] : 0.f;
        }
    } else {
#pragma unroll
        for (int i = 0; i < ASYNC_VEC; i++) bias[i] = p.bias && i < count ? p.bias[warp_channel + column + i] : 0.f;
    }
    TokenCopies u_copies, delta_copies, z_copies;
    if (TRANSPOSED & 1) u_copies.set(u_at, p.u_c, end - warp_channel, lane);
    if (TRANSPOSED & 2) delta_copies.set(delta_at, p.delta_c, end - warp_channel, lane);
    if (HAS_Z && FULL && (TRANSPOSED & 4)) z_copies.set(z_at, p.z_c, end - warp_channel, lane);
    const int last = count > 0 ? t1 - token : t0;  // no load at or after this token
    auto fetch = [&](int to, int t) {
#pragma unroll
        for (int v = 0; v < LOADS; v++) {
            if (STEP > ROUND && token >= ROUND) break;
            int exist = t + v * STEP < last ? count : 0;
            T* shared_at = &shared.inputs[to][0][warp][(token + v * STEP) * WARP_CHANNELS + column];
            if (!(TRANSPOSED & 1)) load_async<ASYNC_VEC>(shared_at, u_at + v * STEP * p.u_t, exist);
            if (!(TRANSPOSED & 2)) load_async<ASYNC_VEC>(shared_at + INPUT, delta_at + v * STEP * p.delta_t, exist);
            if (HAS_Z && FULL && !(TRANSPOSED & 4))
                load_async<ASYNC_VEC>(shared_at + 2 * INPUT, z_at + v * STEP * p.z_t, exist);
        }
        T* slot = shared.inputs[to][0][warp];
        if (TRANSPOSED & 1) u_copies.fetch(slot, u_at, t1 - t, lane);
        if (TRANSPOSED & 2) delta_copies.fetch(slot + INPUT, delta_at, t1 - t, lane);
        if (HAS_Z && FULL && (TRANSPOSED & 4)) z_copies.fetch(slot + 2 * INPUT, z_at, t1 - t, lane);
        u_at += TRANSPOSED & 1 ? ROUND : ROUND * p.u_t;
        delta_at += TRANSPOSED & 2 ? ROUND : ROUND * p.delta_t;
        if (HAS_Z && FULL) z_at += TRANSPOSED & 4 ? ROUND : ROUND * p.z_t;
        commit_group();
    };
    auto put_steps = [&](int from, int left) {
        if constexpr (ALONG) {
            const T* slot = shared.inputs[from][0][warp];
#pragma unroll
            for (int i = 0; i < LANE_RUNS; i++) {
                const int item = lane + 32 * i, c = item % WARP_CHANNELS, t = item / WARP_CHANNELS * RUN;
                if (RUNS % 32 != 0 && item >= RUNS) break;
                Tokens<RUN> u, delta;
                u.read(slot + c * PITCH + t);
                delta.read(slot + INPUT + c * PITCH + t);
#pragma unroll
                for (int e = 0; e < RUN; e++) {
                    float x = delta.get(e) + bias[i];
                    if (SOFTPLUS) x = softplus(x);
                    shared.steps[warp][t + e][c] = make_float2(x, x * u.get(e));
                }
                if (left < ROUND)  // tokens past the end leave the state unchanged
#pragma unroll
                    for (int e = 0; e < RUN; e++)
                        if (t + e >= left) shared.steps[warp][t + e][c] = make_float2(0.f, 0.f);
            }
            return;
        }
#pragma unroll
        for (int v = 0; v < LOADS; v++) {
            if (STEP > ROUND && token >= ROUND) break;
            const T* slot = shared.inputs[from][0][warp];
            const T* shared_at = slot + (token + v * STEP) * WARP_CHANNELS + column;
            Raw<ASYNC_VEC> u, delta;
            if constexpr (TRANSPOSED & 1) u = read_tokens<ASYNC_VEC>(slot, u_at, p.u_c, token + v * STEP, column);
            else u = read_async<ASYNC_VEC>(shared_at);
            if constexpr (TRANSPOSED & 2)
                delta = read_tokens<ASYNC_VEC>(slot + INPUT, delta_at, p.delta_c, token + v * STEP, column);
            else delta = read_async<ASYNC_VEC>(shared_at + INPUT);
            float2 steps[ASYNC_VEC];
#pragma unroll
            for (int e = 0; e < ASYNC_VEC; e++) {
                float x = delta.get(e) + bias[e];
                if (SOFTPLUS) x = softplus(x);
                steps[e] = make_float2(x, x * u.get(e));
            }
            write_floats<2 * ASYNC_VEC>((float*)&shared.steps[warp][token + v * STEP][column], (float*)steps);
        }
        if (left < ROUND)  // tokens past the end leave the state unchanged
#pragma unroll
            for (int v = 0; v < LOADS; v++) {
                if (STEP > ROUND && token >= ROUND) break;
                if (token + v * STEP >= left)
#pragma unroll
                    for (int e = 0; e < ASYNC_VEC; e++)
                        shared.steps[warp][token + v * STEP][column + e] = make_float2(0.f, 0.f);
            }
    };

    // The elements of a tile that this lane gates and stores.
    Elements mine;
    mine.set(lane, warp_channel, end);
    float D[VECS][VEC_CHANNELS];
    T* y_at[VECS];
#pragma unroll
    for (int v = 0; v < VECS; v++) {
        int c = warp_channel + mine.column[v];
        if (TRANSPOSED & 1) y_at[v] = FULL ? p.y + ((i64)row * d + c) * l + t0 + mine.token[v] : nullptr;
        else y_at[v] = FULL ? p.y + ((i64)row * l + t0 + mine.token[v]) * d + c : nullptr;
#pragma unroll
        for (int i = 0; i < VEC_CHANNELS; i++) D[v][i] = FULL && p.D && i < mine.count[v] ? p.D[c + i] : 0.f;
    }
    // An output is (C . h + D u) silu(z); u and silu(z) are read before the scan of the tile.
    float factor[VECS][VEC];
    OutputInput<ALONG> skipped[VECS];
    auto prepare_outputs = [&](const T* inputs, const T* slot, int tile) {
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            const T* shared_at = inputs + mine.token[v] % TILE * WARP_CHANNELS + mine.column[v];
            const int token = tile + mine.token[v] % TILE;
            skipped[v].template read<TRANSPOSED & 1>(shared_at, slot, u_at, p.u_c, token, mine.column[v]);
            OutputInput<ALONG> z;
            if (HAS_Z)
                z.template read<(TRANSPOSED & 4) != 0>(
                    shared_at + 2 * INPUT, slot + 2 * INPUT, z_at, p.z_c, token, mine.column[v]);
            if (HAS_Z)
#pragma unroll
                for (int e = 0; e < VEC; e++) factor[v][e] = z.get(e) * sigmoid(z.get(e));
        }
    };
    auto store_outputs = [&](int t) {
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            float y[VEC];
            const float* y_from = shared.y[warp][mine.token[v] % TILE] + mine.column[v];
            read_elements<VEC>(y, y_from, PARTIALS_ROW);
#pragma unroll
            for (int partial = 1; partial < PARTIALS; partial++) {
                float more[VEC];
                read_elements<VEC>(more, y_from + partial * WARP_CHANNELS, PARTIALS_ROW);
#pragma unroll
                for (int e = 0; e < VEC; e++) y[e] += more[e];
            }
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                y[e] = fmaf(D[v][ALONG ? 0 : e], skipped[v].get(e), y[e]);
                if (HAS_Z) y[e] *= factor[v][e];
            }
            const int exist = mine.existing(v, t1 - t);
            if constexpr (ALONG) store<VEC, true>(y_at[v], y, exist);
            else if constexpr (TRANSPOSED & 1) store_apart<VEC>(y_at[v], l, y, exist);
            else store<VEC>(y_at[v], y, exist);
            y_at[v] += TRANSPOSED & 1 ? TILE : (i64)TILE * d;
        }
    };

    Rows<ROUND, FULL ? 2 : 1> rows;
    constexpr int TOKEN = (FULL ? 2 : 1) * NP;
    // Where one of them is constant, the other one stands in for its rows, which nobody reads.
    const T *B = p.B + row * p.B_b + channels.group * p.B_g, *C = p.C + row * p.C_b + channels.group * p.C_g;
    if (CONSTANT == 1) B = C;
    if (CONSTANT == 2) C = B;

    Starts starts;
    int next_ids = Starts::fetch(p.ids, t0, l, lane);
    if constexpr (CONSTANT != 3) {
        rows.set(B, C, CONSTANT == 1 ? p.C_t : p.B_t, CONSTANT == 2 ? p.B_t : p.C_t, t0, 1);
        rows.fetch(t1 - t0, n);
    }
    fetch(0, t0);
    int buffer = 0;
    int check = FULL && p.interval ? t0 : t1;  // token of the next checkpoint
    float* check_at = p.checkpoints;
    if (CHAINED && chunk > 0) {
        wait_for_carry(p.tickets + 1 + row * p.channel_tiles + channel_tile, chunk);
        padded.load(h, p.carries + ((i64)row * p.chunks + chunk - 1) * d * NP);
    }
    if (check < t1) check_at += ((i64)row * ((l + p.interval - 1) / p.interval) + t0 / (int)p.interval) * d * n;
    for (int tb = t0; tb < t1; tb += ROUND, buffer ^= 1) {
        if constexpr (CONSTANT != 3) rows.put(shared.rows[buffer]);
        wait_groups<0>();
        __syncwarp();  // all lanes have read the last round's steps
        put_steps(buffer, t1 - tb);
        __syncthreads();  // all warps have finished the last round: its buffer is free
        if constexpr (CONSTANT != 3) rows.fetch(t1 - tb - ROUND, n);
        fetch(buffer ^ 1, tb + ROUND);
        const float* row_at = shared.rows[buffer] + part * NS;
        const float2* step_at = &shared.steps[warp][0][group * K];
        const T *slot = shared.inputs[buffer][0][warp], *inputs = slot;
        const int stop = min(tb + ROUND, t1);
#pragma unroll 1
        for (int t = tb; t < stop; t += TILE) {
            if (PACKED) {
                starts.set(next_ids, lane);
                next_ids = Starts::fetch(p.ids, t + TILE, l, lane);
                if (t == 0) load_initial(starts.of(0));
            }
            if (t == check) {
                states.store(check_at, h);
                check += (int)p.interval;
                check_at += (i64)d * n;
            }
            if (FULL) prepare_outputs(inputs, slot, t - tb);
            constexpr int BATCH = PARTIALS == LANES ? TILE : 4;  // tokens unrolled together; fewer is slower
#pragma unroll
            for (int j0 = 0; j0 < TILE; j0 += BATCH) {
                float y[BATCH * K];
#pragma unroll
                for (int jj = 0; jj < BATCH; jj++) {
                    const int j = j0 + jj;
                    if (PACKED && starts.starts(j) && t + j < t1) load_initial(starts.of(j));
                    float step[2 * K], Bs[NS], Cs[NS];
                    read_floats<2 * K>(step, (const float*)(step_at + j * STEPS_ROW));
                    if (!(CONSTANT & 1)) read_floats<NS>(Bs, row_at + j * TOKEN);
                    if (FULL && !(CONSTANT & 2)) read_floats<NS>(Cs, row_at + j * TOKEN + NP);
#pragma unroll
                    for (int k = 0; k < K; k++) {
                        float total = 0.f;
#pragma unroll
                        for (int i = 0; i < NS; i++) {
                            const float B_i = CONSTANT & 1 ? own_B[k][i] : Bs[i];
                            h[k][i] = fmaf(ex2(step[2 * k] * A[k][i]), h[k][i], step[2 * k + 1] * B_i);
                            if (FULL) total = fmaf(CONSTANT & 2 ? own_C[k][i] : Cs[i], h[k][i], total);
                        }
                        y[jj * K + k] = total;
                        if (!FULL) sum[k] += step[2 * k];
                    }
                    if (PACKED && FULL && starts.ends(j) && t + j < t1) store_final(starts.of(j));
                }
                if (FULL && PARTIALS == LANES) {
#pragma unroll
                    for (int jj = 0; jj < BATCH; jj++)
                        write_floats<K>(&shared.y[warp][j0 + jj][part * WARP_CHANNELS + group * K], y + jj * K);
                } else if (FULL) {
                    sum_lanes<BATCH * K, LANES, 1>(y, lane);
                    constexpr int KEPT = BATCH * K > LANES ? BATCH * K / LANES : 1;    // sums that a lane holds
                    constexpr int SAME = LANES > BATCH * K ? LANES / (BATCH * K) : 1;  // lanes that hold the same sum
                    int at = part / SAME * KEPT;
                    if (part % SAME == 0) {
                        constexpr int RUN = KEPT < K ? KEPT : K;  // of neighbouring channels
#pragma unroll
                        for (int i = 0; i < KEPT; i += RUN)
                            write_floats<RUN>(&shared.y[warp][j0 + (at + i) / K][group * K + (at + i) % K], y + i);
                    }
                }
            }
            if (FULL) {
                __syncwarp();
                store_outputs(t);
                __syncwarp();
            }
            row_at += TILE * TOKEN;
            step_at += TILE * STEPS_ROW;
            inputs += TILE * WARP_CHANNELS;
        }
    }
    if (FULL) {
        if (!PACKED && t1 == l) store_final(row);
        if (p.phase == SCAN_AGGREGATES || (CHAINED && t1 < l))
            padded.store(p.carries + ((i64)row * p.chunks + chunk) * d * NP, h);
        if (CHAINED) publish_carry(p.tickets + 1 + row * p.channel_tiles + channel_tile, chunk + 1);
        return;
    }
    padded.store(p.carries + ((i64)row * p.chunks + chunk) * d * NP, h);
    if (part == 0)
#pragma unroll
        for (int k = 0; k < K; k++)
            if (states.first + k < end) p.delta_sums[((i64)row * p.chunks + chunk) * d + states.first + k] = sum[k];
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS) selective_scan_forward(
    const __grid_constant__ ForwardParams p) {
    extern __shared__ __align__(16) char memory[];
    ForwardShared& shared = *(ForwardShared*)memory;
#if CHAINED
    const int ticket = take_ticket(p.tickets, memory), chains = (int)(gridDim.x / p.chunks), chain = ticket % chains;
    scan_chunk<true>(p, shared, chain / (int)p.channel_tiles, ticket / chains, chain % (int)p.channel_tiles);
#else
    i64 block = blockIdx.x;
    int channel_tile = (int)(block % p.channel_tiles);
    block /= p.channel_tiles;
    int count = p.phase == SCAN_ROWS ? 1 : p.phase > SCAN_CHUNKS ? (int)p.chunks : (int)p.chunks - 1;
    int chunk = (int)(block % count) + (p.phase == SCAN_CHUNKS);
    int row = (int)(block / count);
    if (p.phase == SPLIT_AGGREGATES || (p.phase == SCAN_AGGREGATES && chunk > 0)) {
        scan_chunk<false>(p, shared, row, chunk, channel_tile);
    } else {
        scan_chunk<true>(p, shared, row, chunk, channel_tile);
    }
#endif
}
