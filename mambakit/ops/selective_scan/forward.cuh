// The scan. See common.cuh for the layout.
//
// One block walks one chunk of one row for BLOCK_CHANNELS channels. pass 0: a chunk is a whole row. When b * d is too
// small to fill the card, rows are cut into `chunks` and walked in two launches: pass 1 walks chunk 0 for good, and of
// the other chunks but the last finds what they add to a zero state and sum(delta); pass 2 first combines those into
// the state that enters its chunk (a chunk's decay is exp(A sum(delta))), then walks it for good.
//
// For a caller that learns the state which enters a row only from what its chunks add (cuda_split_scan.py) there are two other passes:
// 3 finds what every chunk adds to a zero state, 4 walks all of them for good, from the initial state that is known by then.
// In a RELAY (common.cuh) every chunk is walked once, for good.

struct ForwardParams {
    const T *u, *delta, *z, *B, *C;
    const float *A, *D, *bias, *initial;
    const int *slots, *ids, *cu;
    T* y;
    float *final, *checkpoints, *local, *sums;
    int* turns;
    i64 u_b, delta_b, z_b, B_b, C_b, u_t, delta_t, z_t, B_t, C_t;
    i64 l, d, n, tiles, chunk_length, chunks, pass, interval;
};

// A row is walked in rounds of ROUND tokens (a macro, 8 to 32), whose inputs are in shared memory, twice: while one round is
// walked, the next one's are loaded.
constexpr int EARLY = WHOLE == 8 && WARP_CHANNELS % 8 == 0 && sizeof(T) == 2 ? 8 : VEC;  // neighbouring channels that a lane loads
constexpr int ROW_LOADS = WARP_CHANNELS / EARLY;
constexpr int STEP = 32 / ROW_LOADS;              // tokens of one vector for every lane
constexpr int LOADS = (ROUND + STEP - 1) / STEP;  // vectors of a lane in one round, of one tensor
constexpr int INPUT = WARPS * ROUND * WARP_CHANNELS;
// Outputs are sums over a channel's lanes: of few lanes whoever stores them adds them. A token's row of those sums lies half the banks
// away from the one before.
constexpr int SHARES = LANES <= 4 ? LANES : 1;
constexpr int SHARES_ROW = SHARES * WARP_CHANNELS + (SHARES > 1 ? 16 : 0);

struct ForwardShared {
    T inputs[2][2 + HAS_Z][WARPS][ROUND][WARP_CHANNELS];
    float rows[2][ROUND * 2 * NP];
    float2 steps[WARPS][ROUND][STEPS_ROW];  // delta, delta * u
    float y[WARPS][TILE][SHARES_ROW];
};

template <bool FULL> DEVICE void walk(const ForwardParams& p, ForwardShared& shared, int row, int chunk, int tile) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int part = lane % LANES, group = lane / LANES;
    const int l = (int)p.l, d = (int)p.d, n = (int)p.n;
    const int t0 = chunk * (int)p.chunk_length, t1 = min(l, t0 + (int)p.chunk_length);
    const int warp_channel = tile * BLOCK_CHANNELS + warp * WARP_CHANNELS;
    const StatePlace place{warp_channel + group * K, d, n, part * NS};
    const StatePlace padded{place.first, d, NP, part * NS};  // in p.local

    float A[K][NS], h[K][NS], sum[K];
    place.load(A, p.A);
#pragma unroll
    for (int k = 0; k < K; k++) {
        sum[k] = 0.f;
#pragma unroll
        for (int i = 0; i < NS; i++) A[k][i] *= LOG2E, h[k][i] = 0.f;
    }
    // Where sequence s keeps its state: a negative slot is nowhere.
    auto slot = [&](int s) { return p.slots ? __ldg(p.slots + s) : s; };
    auto load_initial = [&](int s) {
        int at = slot(s);
        if (p.initial && at >= 0) {
            place.load(h, p.initial + (i64)at * d * n);
        } else {
#pragma unroll
            for (int k = 0; k < K; k++)
#pragma unroll
                for (int i = 0; i < NS; i++) h[k][i] = 0.f;
        }
    };
    auto store_final = [&](int s) {
        int at = slot(s);
        if (at >= 0) place.store(p.final + (i64)at * d * n, h);
    };
    if (chunk == 0) {
        if (!PACKED) load_initial(row);
    } else if (FULL && !RELAY) {
        const int s = PACKED ? __ldg(p.ids + t0 - 1) : row, begin = PACKED ? __ldg(p.cu + s) : 0;
        int c = begin / (int)p.chunk_length;
        if (p.pass == 4 && begin == 0) {
            load_initial(s);
        } else {
            padded.load(h, p.local + ((i64)row * p.chunks + c) * d * NP);
            c++;
        }
        // Channels that do not exist read another one's, so that without a branch the loads of several chunks are waited for
        // together.
#pragma unroll 4
        for (; c < chunk; c++) {
            const i64 at = ((i64)row * p.chunks + c) * d;
#pragma unroll
            for (int k = 0; k < K; k++) {
                const i64 channel = at + min(place.first + k, d - 1);
                const float delta = p.sums[channel];
                float add[NS];
                read_floats<NS>(add, p.local + channel * NP + place.s0);
#pragma unroll
                for (int i = 0; i < NS; i++) h[k][i] = fmaf(ex2(delta * A[k][i]), h[k][i], add[i]);
            }
        }
    }

    // What this lane loads and makes step sizes of: EARLY channels of every STEP-th token.
    const int token = lane / ROW_LOADS, column = lane % ROW_LOADS * EARLY, count = min(EARLY, d - warp_channel - column);
    const i64 at = t0 + token;
    const T* u_at = p.u + row * p.u_b + at * p.u_t + warp_channel + column;
    const T* delta_at = p.delta + row * p.delta_b + at * p.delta_t + warp_channel + column;
    const T* z_at = HAS_Z && FULL ? p.z + row * p.z_b + at * p.z_t + warp_channel + column : nullptr;
    float bias[EARLY];
#pragma unroll
    for (int i = 0; i < EARLY; i++) bias[i] = p.bias && i < count ? p.bias[warp_channel + column + i] : 0.f;
    const int last = count > 0 ? t1 - token : t0;  // loads begin before it
    auto fetch = [&](int to, int t) {
#pragma unroll
        for (int v = 0; v < LOADS; v++) {
            if (STEP > ROUND && token >= ROUND) break;
            int exist = t + v * STEP < last ? count : 0;
            T* shared_at = &shared.inputs[to][0][warp][token + v * STEP][column];
            load_early<EARLY>(shared_at, u_at + v * STEP * p.u_t, exist);
            load_early<EARLY>(shared_at + INPUT, delta_at + v * STEP * p.delta_t, exist);
            if (HAS_Z && FULL) load_early<EARLY>(shared_at + 2 * INPUT, z_at + v * STEP * p.z_t, exist);
        }
        u_at += ROUND * p.u_t;
        delta_at += ROUND * p.delta_t;
        if (HAS_Z && FULL) z_at += ROUND * p.z_t;
        end_of_group();
    };
    auto put_steps = [&](int from, int left) {
#pragma unroll
        for (int v = 0; v < LOADS; v++) {
            if (STEP > ROUND && token >= ROUND) break;
            const T* shared_at = &shared.inputs[from][0][warp][token + v * STEP][column];
            Raw<EARLY> u = read_early<EARLY>(shared_at), delta = read_early<EARLY>(shared_at + INPUT);
            float2 steps[EARLY];
#pragma unroll
            for (int e = 0; e < EARLY; e++) {
                float x = delta.get(e) + bias[e];
                if (SOFTPLUS) x = softplus(x);
                steps[e] = make_float2(x, x * u.get(e));
            }
            write_floats<2 * EARLY>((float*)&shared.steps[warp][token + v * STEP][column], (float*)steps);
        }
        if (left < ROUND)  // the states pass through tokens past the end
#pragma unroll
            for (int v = 0; v < LOADS; v++) {
                if (STEP > ROUND && token >= ROUND) break;
                if (token + v * STEP >= left)
#pragma unroll
                    for (int e = 0; e < EARLY; e++) shared.steps[warp][token + v * STEP][column + e] = make_float2(0.f, 0.f);
            }
    };

    // What this lane gates and stores of a tile.
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
    // Outputs are (sum + D u) factor; u and the factor do not wait for the scan.
    float factor[VECS][VEC];
    Raw<VEC> skipped[VECS];
    auto prepare_outputs = [&](const T* inputs) {
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            const T* shared_at = inputs + mine.token[v] % TILE * WARP_CHANNELS + mine.column[v];
            skipped[v] = read_early<VEC>(shared_at);
            if (HAS_Z) {
                Raw<VEC> z = read_early<VEC>(shared_at + 2 * INPUT);
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
            for (int share = 1; share < SHARES; share++) {
                float more[VEC];
                read_floats<VEC>(more, y_from + share * WARP_CHANNELS);
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
    int check = FULL && p.interval ? t0 : t1;  // where the next checkpoint is
    float* check_at = p.checkpoints;
    if (RELAY && chunk > 0) {
        wait_for_turn(p.turns + 1 + row * p.tiles + tile, chunk);
        padded.load(h, p.local + ((i64)row * p.chunks + chunk - 1) * d * NP);
    }
    if (check < t1) check_at += ((i64)row * ((l + p.interval - 1) / p.interval) + t0 / (int)p.interval) * d * n;
    for (int tb = t0; tb < t1; tb += ROUND, buffer ^= 1) {
        rows.put(shared.rows[buffer]);
        wait_for_groups<0>();
        __syncwarp();  // the last round's steps have been read
        put_steps(buffer, t1 - tb);
        __syncthreads();  // the other buffer's readers are past their round too
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
                place.store(check_at, h);
                check += (int)p.interval;
                check_at += (i64)d * n;
            }
            if (FULL) prepare_outputs(inputs);
            constexpr int BATCH = SHARES == LANES ? TILE : 4;  // tokens that the compiler may interleave; less is slower
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
                if (FULL && SHARES == LANES) {
#pragma unroll
                    for (int jj = 0; jj < BATCH; jj++)
                        write_floats<K>(&shared.y[warp][j0 + jj][part * WARP_CHANNELS + group * K], y + jj * K);
                } else if (FULL) {
                    sum_lanes<BATCH * K, LANES, 1>(y, lane);
                    constexpr int KEPT = BATCH * K > LANES ? BATCH * K / LANES : 1;  // sums that a lane holds now
                    constexpr int SAME = LANES > BATCH * K ? LANES / (BATCH * K) : 1;  // lanes that hold the same one
                    int at = part / SAME * KEPT;
                    if (part % SAME == 0) {
                        constexpr int RUN = KEPT < K ? KEPT : K;  // neighbouring channels among them
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
        if (p.pass == 1 || (RELAY && t1 < l)) padded.store(p.local + ((i64)row * p.chunks + chunk) * d * NP, h);
        if (RELAY) hand_on(p.turns + 1 + row * p.tiles + tile, chunk + 1);
        return;
    }
    padded.store(p.local + ((i64)row * p.chunks + chunk) * d * NP, h);
    if (part == 0)
#pragma unroll
        for (int k = 0; k < K; k++)
            if (place.first + k < d) p.sums[((i64)row * p.chunks + chunk) * d + place.first + k] = sum[k];
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) selective_scan_forward(
    const __grid_constant__ ForwardParams p) {
    extern __shared__ __align__(16) char memory[];
    ForwardShared& shared = *(ForwardShared*)memory;
#if RELAY
    const int number = number_of_block(p.turns, memory), relays = (int)(gridDim.x / p.chunks), relay = number % relays;
    walk<true>(p, shared, relay / (int)p.tiles, number / relays, relay % (int)p.tiles);
#else
    i64 block = blockIdx.x;
    int tile = (int)(block % p.tiles);
    block /= p.tiles;
    int count = p.pass == 0 ? 1 : p.pass > 2 ? (int)p.chunks : (int)p.chunks - 1;
    int chunk = (int)(block % count) + (p.pass == 2);
    int row = (int)(block / count);
    if (p.pass == 3 || (p.pass == 1 && chunk > 0)) {
        walk<false>(p, shared, row, chunk, tile);
    } else {
        walk<true>(p, shared, row, chunk, tile);
    }
#endif
}
