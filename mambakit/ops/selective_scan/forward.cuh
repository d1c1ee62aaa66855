// The scan. See common.cuh for the layout.
//
// One block walks one chunk of one row for BLOCK_CHANNELS channels. pass 0: a chunk is a whole row. When b * d is too
// small to fill the card, rows are cut into `chunks` and walked in two launches: pass 1 walks chunk 0 for good, and of
// the other chunks but the last finds what they add to a zero state and sum(delta); pass 2 first combines those into
// the state that enters its chunk (a chunk's decay is exp(A sum(delta))), then walks it for good.

struct ForwardParams {
    const T *u, *delta, *z, *B, *C;
    const float *A, *D, *bias, *initial;
    const int *slots, *ids, *cu;
    T* y;
    float *final, *checkpoints, *local, *sums;
    i64 u_b, delta_b, z_b, B_b, C_b, u_t, delta_t, z_t, B_t, C_t;
    i64 l, d, n, tiles, chunk_length, chunks, pass, interval;
};

constexpr int ROWS = NP <= 32 ? 32 : 8;  // tokens of B and C in shared memory, twice

constexpr int SLOTS = 4, AHEAD = 2;  // tiles of inputs in shared memory, and how many tiles early they are loaded

struct ForwardShared {
    u32 inputs[SLOTS][2 + HAS_Z][WARPS][VECS][32 * Raw<VEC>::WORDS];
    float rows[2][ROWS * 2 * NP];
    float2 steps[2][WARPS][TILE][STEPS_ROW];  // delta, delta * u
    float y[2][WARPS][TILE][WARP_CHANNELS];
};

template <bool FULL> DEVICE void walk(const ForwardParams& p, ForwardShared& shared, int row, int chunk, int tile) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int part = lane % LANES, group = lane / LANES;
    const int l = (int)p.l, d = (int)p.d, n = (int)p.n;
    const int t0 = chunk * (int)p.chunk_length, t1 = min(l, t0 + (int)p.chunk_length);
    const int warp_channel = tile * BLOCK_CHANNELS + warp * WARP_CHANNELS;
    const StatePlace place{warp_channel + group * K, d, n, part * NS};

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
    } else if (FULL) {
        int c = PACKED ? __ldg(p.cu + __ldg(p.ids + t0 - 1)) / (int)p.chunk_length : 0;
        place.load(h, p.local + ((i64)row * p.chunks + c) * d * n);
        for (c++; c < chunk; c++) {
            float add[K][NS];
            place.load(add, p.local + ((i64)row * p.chunks + c) * d * n);
#pragma unroll
            for (int k = 0; k < K; k++) {
                float delta = place.first + k < d ? p.sums[((i64)row * p.chunks + c) * d + place.first + k] : 0.f;
#pragma unroll
                for (int i = 0; i < NS; i++) h[k][i] = fmaf(ex2(delta * A[k][i]), h[k][i], add[k][i]);
            }
        }
    }

    Elements mine;
    mine.set(lane, warp_channel, d);
    const T *u_at[VECS], *delta_at[VECS], *z_at[VECS];
    T* y_at[VECS];
    float D[VECS][VEC], bias[VECS][VEC];
#pragma unroll
    for (int v = 0; v < VECS; v++) {
        int c = warp_channel + mine.column[v];
        i64 t = t0 + mine.token[v];
        u_at[v] = p.u + row * p.u_b + t * p.u_t + c;
        delta_at[v] = p.delta + row * p.delta_b + t * p.delta_t + c;
        if (HAS_Z && FULL) z_at[v] = p.z + row * p.z_b + t * p.z_t + c;
        if (FULL) y_at[v] = p.y + ((i64)row * l + t - TILE) * d + c;
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            D[v][i] = FULL && p.D && i < mine.count[v] ? p.D[c + i] : 0.f;
            bias[v][i] = p.bias && i < mine.count[v] ? p.bias[c + i] : 0.f;
        }
    }
    // Several tiles are in flight, so that none of their chains of operations is waited for: while tile i is scanned, the
    // step sizes of tile i + 1 are computed, the inputs of tile i + AHEAD are loaded, and the outputs of tile i - 1 are gated
    // and stored. The code's order of shared memory's loads and stores lets the compiler mix them.
    float2 steps[VECS][VEC];
    auto place_in = [&](int i, int tensor, int v) { return &shared.inputs[i % SLOTS][tensor][warp][v][lane * Raw<VEC>::WORDS]; };
    auto fetch = [&](int i) {
        const int left = t1 - t0 - i * TILE;
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            int count = mine.token[v] < left ? mine.count[v] : 0;
            load_early<VEC>(place_in(i, 0, v), u_at[v], count);
            load_early<VEC>(place_in(i, 1, v), delta_at[v], count);
            u_at[v] += TILE * p.u_t;
            delta_at[v] += TILE * p.delta_t;
            if (HAS_Z && FULL) {
                load_early<VEC>(place_in(i, 2, v), z_at[v], count);
                z_at[v] += TILE * p.z_t;
            }
        }
        end_of_group();
    };
    auto compute_steps = [&](int i) {
        const int left = t1 - t0 - i * TILE;
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            Raw<VEC> u = read_early<VEC>(place_in(i, 0, v)), delta = read_early<VEC>(place_in(i, 1, v));
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                float x = delta.get(e) + bias[v][e];
                if (SOFTPLUS) x = softplus(x);
                if (mine.token[v] >= left) x = 0.f;
                steps[v][e] = make_float2(x, x * u.get(e));
            }
        }
    };
    auto put_steps = [&](int to) {
#pragma unroll
        for (int v = 0; v < VECS; v++)
            if (TILE * ROW_VECS % 32 == 0 || mine.token[v] < TILE)
                write_shared<2 * VEC>((float*)&shared.steps[to][warp][mine.token[v]][mine.column[v]], (float*)steps[v]);
    };
    auto put_outputs = [&](int i) {
        const int left = i < 0 ? 0 : t1 - t0 - i * TILE;
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            Raw<VEC> u = read_early<VEC>(place_in(i & SLOTS - 1, 0, v)), z;
            if (HAS_Z) z = read_early<VEC>(place_in(i & SLOTS - 1, 2, v));
            float out[VEC];
            read_shared<VEC>(out, &shared.y[i & 1][warp][mine.token[v] % TILE][mine.column[v]]);
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                out[e] = fmaf(D[v][e], u.get(e), out[e]);
                if (HAS_Z) {
                    float gate = z.get(e);
                    out[e] *= gate * sigmoid(gate);
                }
            }
            store<VEC>(y_at[v], out, mine.token[v] < left ? mine.count[v] : 0);
            y_at[v] += (i64)TILE * d;
        }
    };
    Rows<ROWS, FULL ? 2 : 1> rows;
    constexpr int TOKEN = (FULL ? 2 : 1) * NP;
    const T *B = p.B + row * p.B_b, *C = p.C + row * p.C_b;

    Starts starts;
    int next_ids = Starts::fetch(p.ids, t0, l, lane);
    rows.fetch(B, C, p.B_t, p.C_t, t0, t1, n);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) fetch(i);
    wait_for_groups<AHEAD - 1>();
    compute_steps(0);
    put_steps(0);
    int buffer = 0, index = 0;
    int check = FULL && p.interval ? t0 : t1;  // where the next checkpoint is
    float* check_at = p.checkpoints;
    if (check < t1) check_at += ((i64)row * ((l + p.interval - 1) / p.interval) + t0 / (int)p.interval) * d * n;
    for (int tb = t0; tb < t1; tb += ROWS, buffer ^= 1) {
        rows.put(shared.rows[buffer]);
        __syncthreads();  // the buffer's readers of two rounds ago are past the last round's barrier
        rows.fetch(B, C, p.B_t, p.C_t, tb + ROWS, t1, n);
        const float* row_at = shared.rows[buffer] + part * NS;
        const int stop = min(tb + ROWS, t1);
#pragma unroll 1
        for (int t = tb; t < stop; t += TILE, index++, row_at += TILE * TOKEN) {
            const int now = index & 1;
            fetch(index + AHEAD);
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
            wait_for_groups<AHEAD - 1>();
            __syncwarp();  // this tile's steps are there, and the last tile's outputs
            compute_steps(index + 1);
            if (FULL) put_outputs(index - 1);
            constexpr int BATCH = 4;  // tokens whose outputs are summed over lanes together
#pragma unroll
            for (int j0 = 0; j0 < TILE; j0 += BATCH) {
                float y[BATCH * K];
#pragma unroll
                for (int jj = 0; jj < BATCH; jj++) {
                    const int j = j0 + jj;
                    if (PACKED && starts.starts(j) && t + j < t1) load_initial(starts.of(j));
                    float step[2 * K], Bs[NS], Cs[NS];
                    read_shared<2 * K>(step, (const float*)&shared.steps[now][warp][j][group * K]);
                    read_shared<NS>(Bs, row_at + j * TOKEN);
                    if (FULL) read_shared<NS>(Cs, row_at + j * TOKEN + NP);
#pragma unroll
                    for (int k = 0; k < K; k++) {
                        float total = 0.f;
#pragma unroll
                        for (int i = 0; i < NS; i++) {
                            float a = (k * NS + i) % 8 < POLYNOMIALS ? exp2_polynomial(step[2 * k], A[k][i])
                                                                     : ex2(step[2 * k] * A[k][i]);
                            h[k][i] = fmaf(a, h[k][i], step[2 * k + 1] * Bs[i]);
                            if (FULL) total = fmaf(Cs[i], h[k][i], total);
                        }
                        y[jj * K + k] = total;
                        if (!FULL) sum[k] += step[2 * k];
                    }
                    if (PACKED && FULL && starts.ends(j) && t + j < t1) store_final(starts.of(j));
                }
                if (FULL) {
                    sum_lanes<BATCH * K, LANES, 1>(y, lane);
                    constexpr int KEPT = BATCH * K > LANES ? BATCH * K / LANES : 1;  // sums that a lane holds now
                    constexpr int SAME = LANES > BATCH * K ? LANES / (BATCH * K) : 1;  // lanes that hold the same one
                    int at = part / SAME * KEPT;
                    if (part % SAME == 0) {
                        constexpr int RUN = KEPT < K ? KEPT : K;  // neighbouring channels among them
#pragma unroll
                        for (int i = 0; i < KEPT; i += RUN)
                            write_shared<RUN>(&shared.y[now][warp][j0 + (at + i) / K][group * K + (at + i) % K], y + i);
                    }
                }
            }
            put_steps(now ^ 1);
        }
    }
    if (FULL) {
        __syncwarp();
        put_outputs(index - 1);
    }
    if (FULL) {
        if (!PACKED && t1 == l) store_final(row);
        if (p.pass == 1) place.store(p.local + (i64)row * p.chunks * d * n, h);
        return;
    }
    place.store(p.local + ((i64)row * p.chunks + chunk) * d * n, h);
    if (part == 0)
#pragma unroll
        for (int k = 0; k < K; k++)
            if (place.first + k < d) p.sums[((i64)row * p.chunks + chunk) * d + place.first + k] = sum[k];
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) selective_scan_forward(
    const __grid_constant__ ForwardParams p) {
    extern __shared__ __align__(16) char memory[];
    ForwardShared& shared = *(ForwardShared*)memory;
    i64 block = blockIdx.x;
    int tile = (int)(block % p.tiles);
    block /= p.tiles;
    int count = p.pass ? (int)p.chunks - 1 : 1;
    int chunk = (int)(block % count) + (p.pass == 2);
    int row = (int)(block / count);
    if (p.pass == 1 && chunk > 0) {
        walk<false>(p, shared, row, chunk, tile);
    } else {
        walk<true>(p, shared, row, chunk, tile);
    }
}
