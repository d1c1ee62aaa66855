// The gradient of the scan. See common.cuh for the layout, reference.py for the equations.
//
// With g_t the gradient of h_t, walking time backwards:
//     g_t += dy_t silu(z_t) C_t;  dC_t = sum_d dy_t silu(z_t) h_t;  dB_t = sum_d delta_t u_t g_t;  gB_t = g_t . B_t
//     d delta_t = sum_n g_t a_t h_{t-1} A + gB_t u_t;  dA += g_t a_t h_{t-1} delta_t;  g_{t-1} = g_t a_t
//
// States are recomputed. A block takes its chunk in segments, last first: it walks forward through one from the checkpoint
// before it and keeps the state at every tile in shared memory, then goes back tile by tile: the states and decays of SUB
// tokens at a time in registers, then those tokens in reverse. dB and dC are summed over the block's channels (shuffles,
// then shared memory) and written as one partial per block of channels; `finish` adds the partials in a fixed order.
//
// When b * d is too small to fill the card, rows are cut into `chunks`: `arrive` first finds, for all chunks but the first,
// the gradient that leaves it to the left when nothing enters from the right, and sum(delta).

struct BackwardParams {
    const T *dy, *u, *delta, *z, *B, *C;
    const float *A, *D, *bias, *initial, *dfinal, *checkpoints;
    const int *ids, *cu;
    T *du, *ddelta, *dz;
    float *dinitial, *local, *sums, *partial, *dA, *dD, *dbias;
    i64 dy_b, u_b, delta_b, z_b, B_b, C_b, dy_t, u_t, delta_t, z_t, B_t, C_t;
    i64 l, d, n, tiles, chunk_length, chunks, rows, interval, softplus, whole, whole_n;
};

// The pointers of this lane's elements, at token t0 of the chunk, and their values in flight.
struct Stream {
    const T* at[VECS];
    Raw<VEC> next[VECS];

    DEVICE void set(const T* base, i64 t, i64 stride, const Elements& mine) {
#pragma unroll
        for (int v = 0; v < VECS; v++) at[v] = base + (t + mine.token[v]) * stride + mine.column[v];
    }

    // The elements of the tile `tokens` after the one that `set` named, of which `left` tokens exist.
    DEVICE void fetch(i64 tokens, i64 stride, int left, const Elements& mine, bool whole) {
#pragma unroll
        for (int v = 0; v < VECS; v++)
            next[v].load(at[v] + tokens * stride, mine.token[v] < left ? mine.count[v] : 0, whole);
    }
};

DEVICE void clear(float (*h)[NS]) {
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int i = 0; i < NS; i++) h[k][i] = 0.f;
}

constexpr int ARRIVE_ROWS = NP <= 32 ? 32 : 8;

struct ArriveShared {
    float rows[2][ARRIVE_ROWS * NP];
    float2 steps[WARPS][TILE][WARP_CHANNELS];  // delta, gradient of the output before the gate
};

extern "C" __global__ void __launch_bounds__(THREADS) selective_scan_arrive(const __grid_constant__ BackwardParams p) {
    __shared__ __align__(16) ArriveShared shared;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int part = lane % LANES, group = lane / LANES;
    const int l = (int)p.l, d = (int)p.d, n = (int)p.n;
    i64 block = blockIdx.x;
    const int tile = (int)(block % p.tiles);
    block /= p.tiles;
    const int chunk = 1 + (int)(block % (p.chunks - 1)), row = (int)(block / (p.chunks - 1));
    const int t0 = chunk * (int)p.chunk_length, t1 = min(l, t0 + (int)p.chunk_length);
    const int warp_channel = tile * BLOCK_CHANNELS + warp * WARP_CHANNELS;
    const StatePlace place{warp_channel + group * K, d, n, part * NS};

    float A[K][NS], g[K][NS], sum[K];
    place.load(A, p.A);
    clear(g);
#pragma unroll
    for (int k = 0; k < K; k++) {
        sum[k] = 0.f;
#pragma unroll
        for (int i = 0; i < NS; i++) A[k][i] *= LOG2E;
    }
    auto load_dfinal = [&](int s) {
        if (p.dfinal) place.load(g, p.dfinal + (i64)s * d * n);
        else clear(g);
    };
    if (!PACKED && t1 == l) load_dfinal(row);

    Elements mine;
    mine.set(lane, warp_channel, d);
    Stream dy, delta, z;
    dy.set(p.dy + row * p.dy_b + warp_channel, t0, p.dy_t, mine);
    delta.set(p.delta + row * p.delta_b + warp_channel, t0, p.delta_t, mine);
    if (HAS_Z) z.set(p.z + row * p.z_b + warp_channel, t0, p.z_t, mine);
    float bias[VECS][VEC];
#pragma unroll
    for (int v = 0; v < VECS; v++)
#pragma unroll
        for (int i = 0; i < VEC; i++) bias[v][i] = p.bias && i < mine.count[v] ? p.bias[warp_channel + mine.column[v] + i] : 0.f;
    auto fetch = [&](int t) {
        int left = t < t0 ? 0 : t1 - t;
        dy.fetch(t - t0, p.dy_t, left, mine, p.whole);
        delta.fetch(t - t0, p.delta_t, left, mine, p.whole);
        if (HAS_Z) z.fetch(t - t0, p.z_t, left, mine, p.whole);
    };
    const T* C = p.C + row * p.C_b;
    Rows<ARRIVE_ROWS, 1> rows;

    int tb = t0 + (t1 - t0 - 1) / ARRIVE_ROWS * ARRIVE_ROWS;
    int t = t0 + (t1 - t0 - 1) / TILE * TILE;
    fetch(t);
    int next_ids = Starts::fetch(p.ids, t, l, lane);
    rows.fetch(C, C, p.C_t, p.C_t, tb, t1, n, p.whole_n);
    int buffer = 0;
    for (; tb >= t0; tb -= ARRIVE_ROWS, buffer ^= 1) {
        rows.put(shared.rows[buffer]);
        __syncthreads();
        rows.fetch(C, C, p.C_t, p.C_t, tb - ARRIVE_ROWS, tb - ARRIVE_ROWS < t0 ? 0 : t1, n, p.whole_n);
        for (; t >= tb; t -= TILE) {
#pragma unroll
            for (int v = 0; v < VECS; v++) {
                float2 steps[VEC];
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    float x = delta.next[v].get(i) + bias[v][i];
                    if (p.softplus) x = softplus(x);
                    if (t + mine.token[v] >= t1) x = 0.f;
                    float out = dy.next[v].get(i);
                    if (HAS_Z) {
                        float gate = z.next[v].get(i);
                        out *= gate * sigmoid(gate);
                    }
                    steps[i] = make_float2(x, out);
                }
                if (mine.token[v] < TILE)
                    write_shared<2 * VEC>((float*)&shared.steps[warp][mine.token[v]][mine.column[v]], (float*)steps);
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
                read_shared<2 * K>(step, (const float*)&shared.steps[warp][j][group * K]);
                read_shared<NS>(Cs, shared.rows[buffer] + (t - tb + j) * NP + part * NS);
#pragma unroll
                for (int k = 0; k < K; k++) {
                    sum[k] += step[2 * k];
#pragma unroll
                    for (int i = 0; i < NS; i++) g[k][i] = fmaf(step[2 * k + 1], Cs[i], g[k][i]) * ex2(step[2 * k] * A[k][i]);
                }
                if (PACKED && starts.starts(j)) clear(g);
            }
            __syncwarp();
        }
    }
    place.store(p.local + ((i64)row * p.chunks + chunk) * d * n, g);
    if (part == 0)
#pragma unroll
        for (int k = 0; k < K; k++)
            if (place.first + k < d) p.sums[((i64)row * p.chunks + chunk) * d + place.first + k] = sum[k];
}

constexpr int SEGMENT_TILES = SEGMENT / TILE;

struct BackwardShared {
    float rows[SEGMENT * 2 * NP];
    float saved[SEGMENT_TILES][K * NS][THREADS];
    float partial[2][WARPS][TILE][2 * NP];
    float2 steps[WARPS][TILE][WARP_CHANNELS];  // delta, delta * u
    float dy[WARPS][TILE][WARP_CHANNELS];      // gradient of the output before the gate
    float sums[WARPS][3][TILE][WARP_CHANNELS];  // over states: C . h, g . B, (g a h) . A
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) selective_scan_backward(
    const __grid_constant__ BackwardParams p) {
    extern __shared__ __align__(16) char memory[];
    BackwardShared& shared = *(BackwardShared*)memory;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int part = lane % LANES, group = lane / LANES;
    const int l = (int)p.l, d = (int)p.d, n = (int)p.n;
    i64 block = blockIdx.x;
    const int tile = (int)(block % p.tiles);
    block /= p.tiles;
    const int chunk = (int)(block % p.chunks), row = (int)(block / p.chunks);
    const int t0 = chunk * (int)p.chunk_length, t1 = min(l, t0 + (int)p.chunk_length);
    const int warp_channel = tile * BLOCK_CHANNELS + warp * WARP_CHANNELS;
    const StatePlace place{warp_channel + group * K, d, n, part * NS};
    const int interval = (int)p.interval, segment = min(SEGMENT, interval);
    const i64 check_row = (i64)row * ((l + interval - 1) / interval);

    float A[K][NS], g[K][NS], dA[K][NS], h[K][NS];
    place.load(A, p.A);
    clear(g);
    clear(dA);
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int i = 0; i < NS; i++) A[k][i] *= LOG2E;
    auto load_initial = [&](int s) {
        if (p.initial) place.load(h, p.initial + (i64)s * d * n);
        else clear(h);
    };
    auto load_dfinal = [&](int s) {
        if (p.dfinal) place.load(g, p.dfinal + (i64)s * d * n);
        else clear(g);
    };
    auto store_dinitial = [&](int s) {
        if (p.dinitial) place.store(p.dinitial + (i64)s * d * n, g);
    };
    if (t1 == l) {
        if (!PACKED) load_dfinal(row);
    } else {
        // What arrives from the right: through the chunks up to the one where the sequence of token t1 ends.
        int last = (int)p.chunks - 1;
        if (PACKED) {
            int s = __ldg(p.ids + t1);
            last = __ldg(p.cu + s) == t1 ? chunk : (__ldg(p.cu + s + 1) - 1) / (int)p.chunk_length;
        }
        for (int c = last; c > chunk; c--) {
            float add[K][NS];
            place.load(add, p.local + ((i64)row * p.chunks + c) * d * n);
#pragma unroll
            for (int k = 0; k < K; k++) {
                float delta = place.first + k < d ? p.sums[((i64)row * p.chunks + c) * d + place.first + k] : 0.f;
#pragma unroll
                for (int i = 0; i < NS; i++)
                    g[k][i] = c == last ? add[k][i] : fmaf(ex2(delta * A[k][i]), g[k][i], add[k][i]);
            }
        }
    }

    Elements mine;
    mine.set(lane, warp_channel, d);
    Stream dy, u, delta, z;
    dy.set(p.dy + row * p.dy_b + warp_channel, t0, p.dy_t, mine);
    u.set(p.u + row * p.u_b + warp_channel, t0, p.u_t, mine);
    delta.set(p.delta + row * p.delta_b + warp_channel, t0, p.delta_t, mine);
    if (HAS_Z) z.set(p.z + row * p.z_b + warp_channel, t0, p.z_t, mine);
    float D[VECS][VEC], bias[VECS][VEC], dD[VEC], dbias[VEC];
#pragma unroll
    for (int v = 0; v < VECS; v++)
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            int c = warp_channel + mine.column[v] + i;
            D[v][i] = p.D && i < mine.count[v] ? p.D[c] : 0.f;
            bias[v][i] = p.bias && i < mine.count[v] ? p.bias[c] : 0.f;
            dD[i] = dbias[i] = 0.f;
        }
    const T *B = p.B + row * p.B_b, *C = p.C + row * p.C_b;
    const bool softplus_on = p.softplus;

    auto step_size = [&](int v, int i, bool exists) {
        float x = delta.next[v].get(i) + bias[v][i];
        if (softplus_on) x = softplus(x);
        return exists ? x : 0.f;
    };
    // (delta, delta u) of tile t, from the values in flight, to shared memory.
    auto put_steps = [&](int t) {
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            float2 steps[VEC];
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                float x = step_size(v, i, t + mine.token[v] < t1);
                steps[i] = make_float2(x, x * u.next[v].get(i));
            }
            if (mine.token[v] < TILE)
                write_shared<2 * VEC>((float*)&shared.steps[warp][mine.token[v]][mine.column[v]], (float*)steps);
        }
    };
    // Four tokens forward from token j of a tile.
    auto forward = [&](int j0, const float* rows, const Starts& starts, auto keep) {
#pragma unroll
        for (int jj = 0; jj < SUB; jj++) {
            const int j = j0 + jj;
            if (PACKED && starts.starts(j) && starts.of(j) >= 0) load_initial(starts.of(j));
            float step[2 * K], Bs[NS];
            read_shared<2 * K>(step, (const float*)&shared.steps[warp][j][group * K]);
            read_shared<NS>(Bs, rows + j * 2 * NP + part * NS);
#pragma unroll
            for (int k = 0; k < K; k++)
#pragma unroll
                for (int i = 0; i < NS; i++) {
                    float a = ex2(step[2 * k] * A[k][i]);
                    keep(jj, k, i, h[k][i], a);
                    h[k][i] = fmaf(a, h[k][i], step[2 * k + 1] * Bs[i]);
                }
        }
    };
    auto forget = [](int, int, int, float, float) {};

    int buffer = 0;
    for (int ts = t0 + (t1 - t0 - 1) / segment * segment; ts >= t0; ts -= segment) {
        const int te = min(t1, ts + segment);
        int base = ts / interval * interval;
        place.load(h, p.checkpoints + (check_row + base / interval) * d * n);
        const int last_tile = ts + (te - ts - 1) / TILE * TILE;
        u.fetch(base - t0, p.u_t, t1 - base, mine, p.whole);
        delta.fetch(base - t0, p.delta_t, t1 - base, mine, p.whole);
        int next_ids = Starts::fetch(p.ids, base, l, lane);
        for (; base <= ts; base += segment) {
            __syncthreads();  // the last readers of the rows
            for (int item = threadIdx.x; item < segment * 2 * QUADS; item += THREADS) {
                int t = base + item / (2 * QUADS), rest = item % (2 * QUADS), s = rest % QUADS * 4;
                const T* from = rest < QUADS ? B + t * p.B_t : C + t * p.C_t;
                Raw<4> raw;
                raw.load(from + s, t < t1 ? min(4, n - s) : 0, p.whole_n);
                *(float4*)(shared.rows + item * 4) = make_float4(raw.get(0), raw.get(1), raw.get(2), raw.get(3));
            }
            __syncthreads();
            for (int t = base; t < min(base + segment, last_tile); t += TILE) {
                put_steps(t);
                Starts starts;
                if (PACKED) starts.set(next_ids, lane);
                u.fetch(t + TILE - t0, p.u_t, t1 - t - TILE, mine, p.whole);
                delta.fetch(t + TILE - t0, p.delta_t, t1 - t - TILE, mine, p.whole);
                next_ids = Starts::fetch(p.ids, t + TILE, l, lane);
                if (base == ts)
#pragma unroll
                    for (int i = 0; i < K * NS; i++) shared.saved[(t - ts) / TILE][i][threadIdx.x] = h[i / NS][i % NS];
                __syncwarp();
                for (int j = 0; j < TILE; j += SUB) forward(j, shared.rows + (t - base) * 2 * NP, starts, forget);
                __syncwarp();
            }
        }
#pragma unroll
        for (int i = 0; i < K * NS; i++) shared.saved[(last_tile - ts) / TILE][i][threadIdx.x] = h[i / NS][i % NS];
        dy.fetch(last_tile - t0, p.dy_t, t1 - last_tile, mine, p.whole);
        if (HAS_Z) z.fetch(last_tile - t0, p.z_t, t1 - last_tile, mine, p.whole);

        for (int t = last_tile; t >= ts; t -= TILE, buffer ^= 1) {
            put_steps(t);
            Raw<VEC> u_now[VECS], delta_now[VECS], z_now[VECS], dy_now[VECS];
#pragma unroll
            for (int v = 0; v < VECS; v++) {
                u_now[v] = u.next[v], delta_now[v] = delta.next[v], dy_now[v] = dy.next[v];
                if (HAS_Z) z_now[v] = z.next[v];
                float out[VEC];
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    out[i] = dy_now[v].get(i);
                    if (HAS_Z) {
                        float gate = z_now[v].get(i);
                        out[i] *= gate * sigmoid(gate);
                    }
                }
                if (mine.token[v] < TILE) write_shared<VEC>(&shared.dy[warp][mine.token[v]][mine.column[v]], out);
            }
            Starts starts;
            if (PACKED) starts.set(next_ids, lane);
            if (t > ts) {
                u.fetch(t - TILE - t0, p.u_t, TILE, mine, p.whole);
                delta.fetch(t - TILE - t0, p.delta_t, TILE, mine, p.whole);
                dy.fetch(t - TILE - t0, p.dy_t, TILE, mine, p.whole);
                if (HAS_Z) z.fetch(t - TILE - t0, p.z_t, TILE, mine, p.whole);
                next_ids = Starts::fetch(p.ids, t - TILE, l, lane);
            }
            __syncwarp();
            const float* rows = shared.rows + (t - ts) * 2 * NP;
#pragma unroll 1
            for (int j0 = TILE - SUB; j0 >= 0; j0 -= SUB) {
#pragma unroll
                for (int i = 0; i < K * NS; i++) h[i / NS][i % NS] = shared.saved[(t - ts) / TILE][i][threadIdx.x];
#pragma unroll 1
                for (int j = 0; j < j0; j += SUB) forward(j, rows, starts, forget);
                float before[SUB][K][NS], decay[SUB][K][NS];  // h_{t-1} (after a start) and exp(delta A)
                forward(j0, rows, starts, [&](int jj, int k, int i, float state, float a) {
                    before[jj][k][i] = state;
                    decay[jj][k][i] = a;
                });
                float over_states[3][SUB * K];
#pragma unroll
                for (int jj = SUB - 1; jj >= 0; jj--) {
                    const int j = j0 + jj;
                    if (PACKED && starts.ends(j) && t + j < t1) load_dfinal(starts.of(j));
                    float step[2 * K], out[K], Bs[NS], Cs[NS];
                    read_shared<2 * K>(step, (const float*)&shared.steps[warp][j][group * K]);
                    read_shared<K>(out, &shared.dy[warp][j][group * K]);
                    read_shared<NS>(Bs, rows + j * 2 * NP + part * NS);
                    read_shared<NS>(Cs, rows + j * 2 * NP + NP + part * NS);
                    float over_channels[2 * NS];
#pragma unroll
                    for (int i = 0; i < 2 * NS; i++) over_channels[i] = 0.f;
#pragma unroll
                    for (int k = 0; k < K; k++) {
                        float y = 0.f, gB = 0.f, gA = 0.f;
#pragma unroll
                        for (int i = 0; i < NS; i++) {
                            float state;  // h_t
                            if (PACKED) state = fmaf(decay[jj][k][i], before[jj][k][i], step[2 * k + 1] * Bs[i]);
                            else state = jj + 1 < SUB ? before[jj + 1 < SUB ? jj + 1 : jj][k][i] : h[k][i];
                            g[k][i] = fmaf(out[k], Cs[i], g[k][i]);
                            over_channels[i] = fmaf(step[2 * k + 1], g[k][i], over_channels[i]);
                            over_channels[NS + i] = fmaf(out[k], state, over_channels[NS + i]);
                            y = fmaf(Cs[i], state, y);
                            gB = fmaf(g[k][i], Bs[i], gB);
                            g[k][i] *= decay[jj][k][i];
                            float gah = g[k][i] * before[jj][k][i];
                            gA = fmaf(gah, A[k][i], gA);
                            dA[k][i] = fmaf(gah, step[2 * k], dA[k][i]);
                        }
                        over_states[0][jj * K + k] = y;
                        over_states[1][jj * K + k] = gB;
                        over_states[2][jj * K + k] = gA;
                    }
                    if (PACKED && starts.starts(j) && t + j < t1) {
                        store_dinitial(starts.of(j));
                        clear(g);
                    }
                    sum_lanes<2 * NS, 32, LANES>(over_channels, lane);
                    constexpr int KEPT = 2 * NS > GROUPS ? 2 * NS / GROUPS : 1;
                    constexpr int SAME = GROUPS > 2 * NS ? GROUPS / (2 * NS) : 1;
                    int at = group / SAME * KEPT;
                    if (group % SAME == 0)
#pragma unroll
                        for (int i = 0; i < KEPT; i++)
                            shared.partial[buffer][warp][j][(at + i) / NS * NP + part * NS + (at + i) % NS] = over_channels[i];
                }
                constexpr int KEPT = SUB * K > LANES ? SUB * K / LANES : 1;
                constexpr int SAME = LANES > SUB * K ? LANES / (SUB * K) : 1;
                constexpr int RUN = KEPT < K ? KEPT : K;
                int at = part / SAME * KEPT;
#pragma unroll
                for (int q = 0; q < 3; q++) {
                    sum_lanes<SUB * K, LANES, 1>(over_states[q], lane);
                    if (part % SAME == 0)
#pragma unroll
                        for (int i = 0; i < KEPT; i += RUN)
                            write_shared<RUN>(
                                &shared.sums[warp][q][j0 + (at + i) / K][group * K + (at + i) % K], over_states[q] + i);
                }
            }
            __syncthreads();
#pragma unroll
            for (int v = 0; v < VECS; v++) {
                if (mine.token[v] >= TILE) continue;
                const int j = mine.token[v], column = mine.column[v];
                float y[VEC], gB[VEC], gA[VEC], step[2 * VEC], out[VEC], du[VEC], ddelta[VEC], dz[VEC];
                read_shared<VEC>(y, &shared.sums[warp][0][j][column]);
                read_shared<VEC>(gB, &shared.sums[warp][1][j][column]);
                read_shared<VEC>(gA, &shared.sums[warp][2][j][column]);
                read_shared<2 * VEC>(step, (const float*)&shared.steps[warp][j][column]);
                read_shared<VEC>(out, &shared.dy[warp][j][column]);
                const int count = t + j < t1 ? mine.count[v] : 0;
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    float u_i = u_now[v].get(i);
                    du[i] = fmaf(gB[i], step[2 * i], D[v][i] * out[i]);
                    ddelta[i] = fmaf(gA[i], LN2, gB[i] * u_i);
                    if (softplus_on) ddelta[i] *= sigmoid(delta_now[v].get(i) + bias[v][i]);
                    if (HAS_Z) {
                        float gate = z_now[v].get(i), s = sigmoid(gate);
                        dz[i] = dy_now[v].get(i) * fmaf(D[v][i], u_i, y[i]) * s * fmaf(gate, 1.f - s, 1.f);
                    }
                    if (i < count) {
                        dD[i] = fmaf(out[i], u_i, dD[i]);
                        dbias[i] += ddelta[i];
                    }
                }
                i64 to = ((i64)row * l + t + j) * d + warp_channel + column;
                store<VEC>(p.du + to, du, count, p.whole);
                store<VEC>(p.ddelta + to, ddelta, count, p.whole);
                if (HAS_Z) store<VEC>(p.dz + to, dz, count, p.whole);
            }
            // The buffer is written again after the next tile's barrier, which every reader of this one reaches later.
            float* to = p.partial + ((i64)tile * p.rows + (i64)row * l + t) * 2 * NP;
            for (int i = threadIdx.x; i < min(TILE, t1 - t) * 2 * NP; i += THREADS) {
                float total = 0.f;
#pragma unroll
                for (int w = 0; w < WARPS; w++) total += (&shared.partial[buffer][w][0][0])[i];
                to[i] = total;
            }
            __syncwarp();
        }
    }
    if (!PACKED && chunk == 0) store_dinitial(row);
    const i64 at = (i64)row * p.chunks + chunk;
    place.store(p.dA + at * d * n, dA);
#pragma unroll
    for (int w = ROW_VECS; w < 32; w *= 2)
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            dD[i] += __shfl_xor_sync(ALL, dD[i], w);
            dbias[i] += __shfl_xor_sync(ALL, dbias[i], w);
        }
    if (lane < ROW_VECS)
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            int c = warp_channel + mine.column[0] + i;
            if (c < d) p.dD[at * d + c] = dD[i], p.dbias[at * d + c] = dbias[i];
        }
}

// The partial sums of dB and dC over blocks of channels, and of dA, dD and ddelta_bias over rows and chunks.
struct FinishParams {
    const float *partial, *dA_parts, *dD_parts, *dbias_parts;
    T *dB, *dC;
    float *dA, *dD, *dbias;
    i64 rows, tiles, n, d, parts;
};

extern "C" __global__ void __launch_bounds__(256) selective_scan_finish(const __grid_constant__ FinishParams p) {
    i64 item = (i64)blockIdx.x * 256 + threadIdx.x;
    const i64 items = p.rows * 2 * QUADS;
    const i64 padded = (items + 255) / 256 * 256;
    if (item < padded) {
        if (item >= items) return;
        const float4* from = (const float4*)p.partial + item;
        float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
        for (i64 tile = 0; tile < p.tiles; tile++) {
            float4 x = __ldcs(from + tile * items);
            total.x += x.x, total.y += x.y, total.z += x.z, total.w += x.w;
        }
        i64 row = item / (2 * QUADS);
        int rest = (int)(item % (2 * QUADS)), s = rest % QUADS * 4;
        float out[4] = {total.x, total.y, total.z, total.w};
        store<4>((rest < QUADS ? p.dB : p.dC) + row * p.n + s, out, min(4, (int)p.n - s), p.n % 4 == 0);
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
    float total = 0.f;
#pragma unroll 8
    for (i64 i = 0; i < p.parts; i++) total += from[i * stride];
    *to = total;
}
