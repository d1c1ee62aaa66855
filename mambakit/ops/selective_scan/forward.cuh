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
};

// Tokens go by in rounds of ROUND (a macro, 8 to 32). Inputs are double-buffered in shared memory: the next round's are
// loaded while this one's are scanned.
constexpr int ASYNC_VEC = ALIGNED == 8 && WARP_CHANNELS % 8 == 0 && sizeof(T) == 2 ? 8 : VEC;  // channels of one copy
constexpr int ROW_LOADS = WARP_CHANNELS / ASYNC_VEC;
constexpr int STEP = 32 / ROW_LOADS;              // tokens that one copy of every lane covers
constexpr int LOADS = (ROUND + STEP - 1) / STEP;  // copies of a lane in one round, of one tensor
constexpr int INPUT = WARPS * ROUND * WARP_CHANNELS;
// Outputs are sums over a channel's lanes. With few lanes each writes its partial sum, and the lane that stores the
// output adds them. A token's row of partial sums lies 16 banks from the one before.
constexpr int PARTIALS = LANES <= 4 ? LANES : 1;
constexpr int PARTIALS_ROW = PARTIALS * WARP_CHANNELS + (PARTIALS > 1 ? 16 : 0);

struct ForwardShared {  // plan.py counts its bytes
    T inputs[2][2 + HAS_Z][WARPS][ROUND][WARP_CHANNELS];
    float rows[2][ROUND * 2 * NP];
    float2 steps[WARPS][ROUND][STEPS_ROW];  // delta, delta * u
    float y[WARPS][TILE][PARTIALS_ROW];
};
static_assert(sizeof(ForwardShared) == SHARED, "plan.py counts other bytes of shared memory");

// FULL: outputs and states; else the aggregate of the chunk only.
template <bool FULL>
DEVICE void scan_chunk(const ForwardParams& p, ForwardShared& shared, int row, int chunk, int channel_tile) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int part = lane % LANES, group = lane / LANES;
    const int l = (int)p.l, d = (int)p.d, n = (int)p.n;
    const int t0 = chunk * (int)p.chunk_length, t1 = min(l, t0 + (int)p.chunk_length);
    const int warp_channel = channel_tile * CTA_CHANNELS + warp * WARP_CHANNELS;
    const StateSlice states{warp_channel + group * K, d, n, part * NS};
    const StateSlice padded{states.first, d, NP, part * NS};  // of p.carries

    float A[K][NS], h[K][NS], sum[K];
    states.load(A, p.A);
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
    const int count = min(ASYNC_VEC, d - warp_channel - column);
    const i64 at = t0 + token;
    const T* u_at = p.u + row * p.u_b + at * p.u_t + warp_channel + column;
    const T* delta_at = p.delta + row * p.delta_b + at * p.delta_t + warp_channel + column;
    const T* z_at = HAS_Z && FULL ? p.z + row * p.z_b + at * p.z_t + warp_channel + column : nullptr;
    float bias[ASYNC_VEC];
#pragma unroll
    for (int i = 0; i < ASYNC_VEC; i++) bias[i] = p.bias && i < count ? p.bias[warp_channel + column + i] : 0.f;
    const int last = count > 0 ? t1 - token : t0;  // no load at or after this token
    auto fetch = [&](int to, int t) {
#pragma unroll
        for (int v = 0; v < LOADS; v++) {
            if (STEP > ROUND && token >= ROUND) break;
            int exist = t + v * STEP < last ? count : 0;
            T* shared_at = &shared.inputs[to][0][warp][token + v * STEP][column];
            load_async<ASYNC_VEC>(shared_at, u_at + v * STEP * p.u_t, exist);
            load_async<ASYNC_VEC>(shared_at + INPUT, delta_at + v * STEP * p.delta_t, exist);
            if (HAS_Z && FULL) load_async<ASYNC_VEC>(shared_at + 2 * INPUT, z_at + v * STEP * p.z_t, exist);
        }
        u_at += ROUND * p.u_t;
        delta_at += ROUND * p.delta_t;
        if (HAS_Z && FULL) z_at += ROUND * p.z_t;
        commit_group();
    };
    auto put_steps = [&](int from, int left) {
#pragma unroll
        for (int v = 0; v < LOADS; v++) {
            if (STEP > ROUND && token >= ROUND) break;
            const T* shared_at = &shared.inputs[from][0][warp][token + v * STEP][column];
            Raw<ASYNC_VEC> u = read_async<ASYNC_VEC>(shared_at), delta = read_async<ASYNC_VEC>(shared_at + INPUT);
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
    mine.set(lane, warp_channel, d);
    float D[VECS][VEC];
    T* y_at[VECS];
#pragma unroll
    for (int v = 0; v < VECS; v++) {
        int c = warp_channel + mine.column[v];
        y_at[v] = FULL ? p.y + ((i64)row * l + t0 + mine.token[v]) * d + c : nullptr;
#pragma unroll
        for (int i = 0; i < VEC; i++) D[v][i] = FULL && p.D && i < mine.count[v] ? p.D[c + i] : 0.f;
    }
    // An output is (C . h + D u) silu(z); u and silu(z) are read before the scan of the tile.
    float factor[VECS][VEC];
    Raw<VEC> skipped[VECS];
    auto prepare_outputs = [&](const T* inputs) {
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            const T* shared_at = inputs + mine.token[v] % TILE * WARP_CHANNELS + mine.column[v];
            skipped[v] = read_async<VEC>(shared_at);
            if (HAS_Z) {
                Raw<VEC> z = read_async<VEC>(shared_at + 2 * INPUT);
#pragma unroll
                for (int e = 0; e < VEC; e++) factor[v][e] = z.get(e) * sigmoid(z.get(e));
            }
        }
    };
    auto store_outputs = [&](int t) {
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            float y[VEC];
            const float* y_from = shared.y[warp][mine.token[v] % TILE] + mine.column[v];
            read_floats<VEC>(y, y_from);
#pragma unroll
            for (int partial = 1; partial < PARTIALS; partial++) {
                float more[VEC];
                read_floats<VEC>(more, y_from + partial * WARP_CHANNELS);
#pragma unroll
                for (int e = 0; e < VEC; e++) y[e] += more[e];
            }
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                y[e] = fmaf(D[v][e], skipped[v].get(e), y[e]);
                if (HAS_Z) y[e] *= factor[v][e];
            }
            store<VEC>(y_at[v], y, t < t1 - mine.token[v] ? mine.count[v] : 0);
            y_at[v] += (i64)TILE * d;
        }
    };

    Rows<ROUND, FULL ? 2 : 1> rows;
    constexpr int TOKEN = (FULL ? 2 : 1) * NP;
    const T *B = p.B + row * p.B_b, *C = p.C + row * p.C_b;

    Starts starts;
    int next_ids = Starts::fetch(p.ids, t0, l, lane);
    rows.set(B, C, p.B_t, p.C_t, t0, 1);
    rows.fetch(t1 - t0, n);
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
        rows.put(shared.rows[buffer]);
        wait_groups<0>();
        __syncwarp();  // all lanes have read the last round's steps
        put_steps(buffer, t1 - tb);
        __syncthreads();  // all warps have finished the last round: its buffer is free
        rows.fetch(t1 - tb - ROUND, n);
        fetch(buffer ^ 1, tb + ROUND);
        const float* row_at = shared.rows[buffer] + part * NS;
        const float2* step_at = &shared.steps[warp][0][group * K];
        const T* inputs = &shared.inputs[buffer][0][warp][0][0];
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
            if (FULL) prepare_outputs(inputs);
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
                    read_floats<NS>(Bs, row_at + j * TOKEN);
                    if (FULL) read_floats<NS>(Cs, row_at + j * TOKEN + NP);
#pragma unroll
                    for (int k = 0; k < K; k++) {
                        float total = 0.f;
#pragma unroll
                        for (int i = 0; i < NS; i++) {
                            h[k][i] = fmaf(ex2(step[2 * k] * A[k][i]), h[k][i], step[2 * k + 1] * Bs[i]);
                            if (FULL) total = fmaf(Cs[i], h[k][i], total);
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
            if (states.first + k < d) p.delta_sums[((i64)row * p.chunks + chunk) * d + states.first + k] = sum[k];
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
