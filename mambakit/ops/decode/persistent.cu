// One token through a whole Mamba model in one persistent kernel: one CTA per SM stays resident, and the CTAs exchange
// activations through global memory three times a layer. Compiled at run time; the macros come from persistent_plan.py:
//
//   DTYPE 1 bfloat16, 2 float16: weights and activations
//   BITS 0: the large weights too; 8 or 4: packed integers, one scale per GROUP columns
//   FLOAT8 1: the 8 bits are e4m3, one scale per row
//   ROWS 1 to 8: sequences of the batch. H, D, RANK, WIDTH, VOCABULARY, LAYERS: the model's; the state size is 16
//   GRID: CTAs, one per SM. WARPS, 4 to 16: compute warps of a CTA; one more is the producer warp
//   VERIFY 1: draft verification. The ROWS are the next tokens of one sequence. The state before them is in `slot`, one
//     of ROWS + 1; the state after each of them goes into the following slots, cyclically, so that accepting some
//     tokens is naming another slot
//   NORMS of dt, B and C: 0 none, 1 without weights (FalconMamba), 2 with weights (Jamba)
//   SCAN_FLOAT 1: A_log, D and dt_proj's bias are float32. CONV_FLOAT 1: the convolution's windows are
//   STAGES of each warp's ring of weight tiles, of STAGE_BYTES; the last DEFER of a phase are refilled one by one, PACE
//     cycles apart. BUFFERS, 1 or 2, of small weights
//   SHARED bytes of shared memory, their offsets (AT_...) and strides
//   CLOCK: the CTA whose time is measured, for benchmarks
//
// Channels, rows of the residual stream and the vocabulary are partitioned over the CTAs. A layer is
//
//   first    from the whole residual stream, each CTA computes x and z of its channels (in_proj), convolves, and adds
//            its channels' contribution to x_proj to a sum over all CTAs
//   second   the norms of dt, B and C where the model has them; dt_proj, the state update and the gate of its channels:
//            y
//   third    from the whole y, out_proj's rows of the residual stream
//
// The grid exchange needs no fences: values are their own flags. A location that will receive a value holds SENTINEL, a
// NaN that no computation produces, and its readers spin until they read something else. A sum over all CTAs counts in
// its last byte how many have added to it. (x_proj has many sums: a grid barrier says when polling them is worthwhile.)
// A CTA that passes one exchange knows that all CTAs have passed the one before. So once y is complete, all have read
// the layer's stream and sums and the previous y, and their locations are reset, two layers before they are used again.
// Only these resets are fenced, by the producer warp, which waits for nothing else.
//
// The residual stream is exchanged multiplied by the norm's weight and by the previous layer's 1 / rms, which keeps it
// in range; the sums of in_proj are rescaled by the ratio of the right 1 / rms to that one. Its sum of squares is
// exchanged separately, one sum over all CTAs per sequence.
//
// Weights are prefetched across exchanges. Each warp knows the order of all weight tiles that it multiplies until the
// end of the step, and keeps a ring of asynchronous copies to shared memory in flight: a tile is 16 rows of 128 bytes,
// a whole line. So memory stays busy while CTAs wait for each other. But exchanged values queue behind weights in
// flight: towards the end of a phase some stages stay empty, and are refilled when the CTA has what it waited for. A
// tile is multiplied on the tensor cores, 16 rows by K_TILE columns by 8 sequences; its columns may come in any order,
// as long as the activations come in the same. The producer warp has no weight tiles: it polls the sums of squares,
// resets exchanged locations, and prefetches the next layer's small weights.
//
// Every sum has a fixed order, or is of integers (x_proj's: fixed point of 2^-32, up to 2^23): the same inputs give the
// same bits, whatever the other rows hold.

#include "primitives.cuh"

typedef unsigned short E;               // bits of the dtype
constexpr u32 SENTINEL = 0xffffffffu;   // no value yet: a NaN in each half; computed NaNs are positive
constexpr int N = 16;                   // states of a channel
constexpr int COMPUTE_THREADS = WARPS * 32, THREADS = COMPUTE_THREADS + 32;
constexpr int R = RANK + 2 * N;         // rows of x_proj
constexpr int K_TILE = BITS == 8 ? 128 : BITS == 4 ? 256 : 64;  // columns of a weight tile: 128 bytes
constexpr int H_K_TILES = H / K_TILE, D_K_TILES = D / K_TILE;
constexpr int H_BYTES = H_K_TILES * 128, D_BYTES = D_K_TILES * 128;    // of a weight's row
constexpr int SCALES = BITS && K_TILE > GROUP ? K_TILE / GROUP : 1;  // of a row in a weight tile
// Of each CTA: channels, rows of the residual stream, logits; and their tiles of 16 rows.
constexpr int CHANNELS = (D + GRID - 1) / GRID, STREAM = (H + GRID - 1) / GRID, LOGITS = (VOCABULARY + GRID - 1) / GRID;
constexpr int C_TILES = (CHANNELS + 15) / 16, S_TILES = (STREAM + 15) / 16, L_TILES = (LOGITS + 15) / 16;
constexpr int ROUNDS = (L_TILES + WARPS - 1) / WARPS, LAST_TILES = L_TILES - (ROUNDS - 1) * WARPS;  // of the head
constexpr int STATE_SLOTS = VERIFY ? ROWS + 1 : ROWS;  // of a layer
constexpr int RUNS = 4 + 2 * ROUNDS + 1;  // of a warp, two per phase: a layer's, the head's, and an endless one
constexpr int FIELDS = NORMS == 2 ? 17 : 14;
constexpr int SLICES = 8;  // of a token's embedding, each summed by a warp
enum {
    NORM, IN, IN_SCALES, IN_BIAS, CONV, CONV_BIAS, X_PROJ, DT_PROJ, DT_BIAS, A_LOG, SKIP, OUT, OUT_SCALES, OUT_BIAS,
    DT_NORM, B_NORM, C_NORM  // with weights only
};
constexpr int A_BYTES = SCAN_FLOAT ? 4 : 2;
constexpr int COPIES = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;  // of x_proj's sums: fewer CTAs add to one address

static_assert(AT_RING + WARPS * STAGES * STAGE_BYTES == SHARED, "the ring is what ends the shared memory");
static_assert(AT_RUNS >= (LAYERS + 1) * FIELDS * 8, "the table of addresses is larger than planned");
static_assert(AT_ACT - AT_RUNS >= WARPS * RUNS * 32, "the runs are larger than planned");
static_assert(X_COLUMNS % 16 == 0 && X_COLUMNS >= CHANNELS + 7, "channels from a multiple of 8 on fit X_COLUMNS");
static_assert(C_TILES * 2 <= WARPS && S_TILES <= WARPS, "a phase has more tiles than a warp's two sums allow");
static_assert((GRID + COPIES - 1) / COPIES < 256, "a byte does not count the CTAs that add to a sum");
static_assert(H % K_TILE == 0 && D % K_TILE == 0 && RANK % 16 == 0 && D % 8 == 0, "widths do not fit weight tiles");

struct Params {  // cuda_persistent.py mirrors it
    const i64* layers;  // LAYERS x FIELDS addresses
    const E* embeddings;
    const E* final_norm;
    const char* head;
    const float* head_scales;
    void* conv_states;  // (layers, STATE_SLOTS, d, width - 1)
    float* ssm_states;  // (layers, STATE_SLOTS, d, n)
    i64* tokens;
    i64* position;
    i64* history;
    float* logits;
    // Exchanged. Between steps all locations are reset to SENTINEL, sums to zero, but for the head's last stream.
    E* stream;        // (4, rows, h): of even layers, of odd ones, of the head in even steps, in odd ones
    u64* squares;     // (4, rows, 16), of which the first of 16 is used: its sums of squares
    E* y;             // (2, rows, d): of even and odd layers
    u64* sums;        // (2, COPIES, rows, r): x_proj's
    u64* best;        // (rows,): the largest logit
    u32* counter;     // [0] arrivals at the grid barrier, [32] those before the step, [33] parity of the step
    const i64* slot;  // with VERIFY: of the state before the first token
    i64 eps_bits;     // of a float
    i64 capacity;     // of history, in tokens
    i64 choose;       // 1: the most probable token becomes the next step's
    u32* cycles;      // (PARTS,) of one CTA, summed over the layers; with CLOCK
    i64 mixer_eps_bits;  // of a float: of the norms of dt, B and C
};

// With CLOCK: cycles of CTA CLOCK's first thread, by what it did before each mark.
enum {
    TIME_STREAM, TIME_IN_PROJ, TIME_CONV, TIME_X_PROJ, TIME_SUMS_EXCHANGE, TIME_STEP, TIME_SCAN, TIME_Y_EXCHANGE,
    TIME_OUT_PROJ, TIME_SUM, TIME_HEAD, PARTS
};
#ifdef CLOCK
struct Stopwatch {
    u32 since, spent[PARTS] = {};
    DEVICE void mark(int part) {
        const u32 now = clock();
        spent[part] += now - since;
        since = now;
    }
};
#else
struct Stopwatch {
    u32 since;
    DEVICE void mark(int) {}
};
#endif

DEVICE float warp_sum(float sum) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
}
DEVICE float rounded(float x) { return from_half((E)to_half_pair(x, 0.f)); }
DEVICE float silu(float x) { return fast_divide(x, 1.f + ex2(-1.4426950408889634f * x)); }
DEVICE float scan_weight(i64 weights, int i) {
    return SCAN_FLOAT ? ((const float*)weights)[i] : from_half(((const E*)weights)[i]);
}
DEVICE int begin_of(int total, int block) { return (int)((i64)total * block / GRID); }

// A warp's share of a phase's weight tiles: the first (row tile and k-tile) and their number; of two row tiles at most.
struct Share { int tile, k_tile, count; };
DEVICE Share share_of(int warp, int tiles, int k_tiles) {
    const int from = warp * tiles * k_tiles / WARPS;
    return {from / k_tiles, from % k_tiles, (warp + 1) * tiles * k_tiles / WARPS - from};
}

// Neighbouring weight tiles of 16 rows of a weight.
struct alignas(16) Run {
    int row, rows;     // the first row, and how many there are from it on
    int k_tiles;
    int field, begin;  // of the layer's table, and the first k-tile
};
static_assert(sizeof(Run) == 32, "persistent_plan.py counts 32 bytes");

// The runs of a warp in every layer, then of the head, then an endless empty one; returns the number of a layer's.
DEVICE int plan_runs(Run* runs, int warp, int lane) {
    const int block = blockIdx.x;
    int planned = 0, of_layer = 0;
#pragma unroll 1
    for (int begin = 0; begin < RUNS; begin += 32) {
        const int i = begin + lane, second = i & 1, round = (i - 4) / 2;
        Run run = {0, 0, 0, IN, 0};
        if (i == RUNS - 1) {
            run.k_tiles = 0x7fffffff;
        } else if (i < RUNS) {
            const bool head = i >= 4, wide = i / 2 == 1;
            const int tiles = head ? round == ROUNDS - 1 ? LAST_TILES : WARPS : wide ? S_TILES : 2 * C_TILES;
            const int k_tiles = wide ? D_K_TILES : H_K_TILES;
            const Share share = share_of(warp, tiles, k_tiles);
            const int before = min(share.count, k_tiles - share.k_tile), tile = share.tile + second;
            const int total = head ? VOCABULARY : wide ? H : D, half = !head && !wide && tile >= C_TILES;
            const int first = begin_of(total, block) + (head ? round * WARPS * 16 : 0) + (tile - half * C_TILES) * 16;
            run.row = half * D + first, run.rows = begin_of(total, block + 1) - first;
            run.k_tiles = second ? share.count - before : before;
            run.field = wide ? OUT : IN, run.begin = second ? 0 : share.k_tile;
        }
        const u32 some = __ballot_sync(0xffffffffu, run.k_tiles > 0);
        if (run.k_tiles > 0) runs[planned + __popc(some & ((1u << lane) - 1))] = run;
        planned += __popc(some);
        if (begin == 0) of_layer = __popc(some & 15);
    }
    __syncwarp();
    return of_layer;
}

// The weight tiles of one warp, from the first to the last of the step: a ring of asynchronous copies in flight.
struct Ring {
    const i64 *fields, *head;         // addresses of the layer of the next run, and of the head
    const Run *runs, *run_next, *runs_end;  // of a layer
    char *begin, *end, *stage, *fill;  // the stages, the oldest one, and the next one to fill
    const char* next;                 // this lane's 16 bytes of the next tile; a lane copies every fourth row
    const float* scales;              // of the row whose scales this lane copies
    int four_rows;                    // bytes from a row to the fourth after it
    int rows_left;                    // rows of the open run, less this lane's first
    int deferred;                     // empty stages, whose refill is deferred
    u32 last_issue;                   // clock at the last paced refill
    int tiles_left;                   // tiles still to issue of the open run
    int warp, lane, g, t;
    int write_at, read_at;  // offsets in a stage; the halves of odd rows are swapped, against bank conflicts

    DEVICE Ring(const i64* table, const Run* runs_, int of_layer, char* memory, int warp_, int lane_)
        : fields(of_layer ? table : table + LAYERS * FIELDS), head(table + LAYERS * FIELDS), runs(runs_),
          run_next(runs_), runs_end(runs_ + of_layer), begin(memory), end(memory + STAGES * STAGE_BYTES), stage(memory),
          fill(memory), next(nullptr), scales(nullptr), four_rows(0), rows_left(0), deferred(0), last_issue(0),
          tiles_left(0), warp(warp_), lane(lane_), g(lane_ / 4), t(lane_ % 4) {
        const int row = lane / 8, chunk = lane % 8;
        write_at = row * 128 + (chunk ^ (row & 1) * 4) * 16;
        read_at = g * 128 + (t ^ (g & 1) * 4) * 16;
    }
    // Opens the next run. After the last one nothing is copied.
    DEVICE void advance() {
        const Run run = *run_next++;
        const bool wide = run.field == OUT;
        const int bytes = wide ? D_BYTES : H_BYTES;
        tiles_left = run.k_tiles, rows_left = run.rows - lane / 8, four_rows = 4 * bytes;
        next = (const char*)fields[run.field] + (size_t)(run.row + lane / 8) * bytes + run.begin * 128 + lane % 8 * 16;
        if constexpr (BITS != 0 && !FLOAT8) {
            const int groups = (wide ? D : H) / (GROUP ? GROUP : 1);
            scales = lane < 16 && lane < run.rows
                         ? (const float*)fields[run.field + 1] + (size_t)(run.row + lane) * groups + run.begin * SCALES
                         : nullptr;
        }
        if (run_next == runs_end) {
            fields += FIELDS;
            if (fields != head) run_next = runs;
        }
    }
    // Issues the copy of the next tile.
    DEVICE void issue() {
        if (tiles_left == 0) advance();
        tiles_left--;
        char* at = fill + write_at;
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (rows_left > 4 * i) copy_async<16>(at + i * 512, next + (i64)i * four_rows);
        next += 128;
        if constexpr (BITS != 0 && !FLOAT8)
            if (scales != nullptr) {
                char* row = fill + 2048 + lane * 32;
                copy_async<(SCALES > 4 ? 16 : SCALES * 4)>(row, scales);
                if constexpr (SCALES > 4) copy_async<16>(row + 16, scales + 4);
                scales += SCALES;
            }
        commit_group();
        fill = fill + STAGE_BYTES == end ? begin : fill + STAGE_BYTES;
    }
    // Issues up to `most` of the deferred copies.
    DEVICE void issue_deferred(int most) {
        if (DEFER == 0) return;
        most = min(most, deferred);
        deferred -= most;
#pragma unroll 1
        for (; most > 0; most--) issue();
    }
    // Issues one deferred copy if the last one is at least PACE cycles ago. Faster, copies would only queue at the
    // memory, and exchanged values behind them.
    DEVICE void issue_paced() {
        if (DEFER == 0 || deferred == 0 || (u32)clock() - last_issue < PACE) return;
        last_issue = (u32)clock();
        issue_deferred(1);
    }
    // total += the oldest tile times the activations of its columns. Columns of the result past ROWS repeat the last
    // and are not read.
    DEVICE void mma_k_tile(float (&total)[4], const char* x) {
        wait_groups<STAGES - 1>();
        __syncwarp();  // other lanes have copied what this one reads
        uint4 a[2], c[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const char* at = stage + (read_at ^ half * 64);
            a[half] = *(const uint4*)at, c[half] = *(const uint4*)(at + 1024);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const char* columns = x + half * K_TILE;  // PIECE / 2 columns of 2 bytes
            if constexpr (BITS == 0) {
                const uint4 b = *(const uint4*)(columns + t * 16);
                mma(total, a[half].x, c[half].x, a[half].y, c[half].y, b.x, b.y);
                mma(total, a[half].z, c[half].z, a[half].w, c[half].w, b.z, b.w);
            } else if constexpr (FLOAT8) {
                mma_float8(total, a[half], c[half], columns);
            } else {
                const float* low_scale = (const float*)(stage + 2048 + g * 32) + half * (K_TILE / 2) / GROUP;
                mma_integers(total, a[half], c[half], columns, low_scale, low_scale + 64);
            }
        }
        __syncwarp();  // the stage is free
        stage = stage + STAGE_BYTES == end ? begin : stage + STAGE_BYTES;
    }
    // The same of 64 bytes of e4m3, without the scales of the rows.
    DEVICE void mma_float8(float (&total)[4], const uint4& a, const uint4& c, const char* x) {
        const u32 as[4] = {a.x, a.y, a.z, a.w}, cs[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
        for (int i = 0; i < 2; i++) {  // 8 columns of this lane, from 16 t + 8 i on
            const uint4 b = *(const uint4*)(x + t * 32 + i * 16);
            mma(total, unpack_e4m3(as[i * 2], 0), unpack_e4m3(cs[i * 2], 0), unpack_e4m3(as[i * 2], 1),
                unpack_e4m3(cs[i * 2], 1), b.x, b.y);
            mma(total, unpack_e4m3(as[i * 2 + 1], 0), unpack_e4m3(cs[i * 2 + 1], 0), unpack_e4m3(as[i * 2 + 1], 1),
                unpack_e4m3(cs[i * 2 + 1], 1), b.z, b.w);
        }
    }
    // The same of 64 bytes of packed integers.
    DEVICE void mma_integers(
        float (&total)[4], const uint4& a, const uint4& c, const char* x, const float* low_scale,
        const float* high_scale) {
        const u32 as[4] = {a.x, a.y, a.z, a.w}, cs[4] = {c.x, c.y, c.z, c.w};
        // The columns of one mma share a scale: lanes of another group contribute zeros.
        constexpr int LANE_GROUPS = (BITS == 8 ? GROUP == 32 : GROUP <= 64) ? 2 : 1;
        constexpr int PART_GROUPS = BITS == 4 && GROUP == 32 ? 2 : 1;
#pragma unroll
        for (int part = 0; part < PART_GROUPS; part++) {
            float sum[LANE_GROUPS][4] = {};
            constexpr int STEPS = (BITS == 8 ? 2 : 4) / PART_GROUPS;
#pragma unroll
            for (int i = part * STEPS; i < (part + 1) * STEPS; i++) {
                // 8 columns of this lane. int8: from 16 t + 8 i on. int4: nibble i of 8 words.
                const int k = BITS == 8 ? t * 16 + i * 8 : (t / 2) * 64 + i * 16 + (t & 1) * 8;
                const uint4 b = *(const uint4*)(x + k * 2);
                u32 v[4], w[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    if constexpr (BITS == 8) {
                        v[j] = unpack_int8(as[i * 2 + j / 2], j % 2), w[j] = unpack_int8(cs[i * 2 + j / 2], j % 2);
                    } else {
                        v[j] = unpack_int4(as[j] >> (4 * i)), w[j] = unpack_int4(cs[j] >> (4 * i));
                    }
                }
#pragma unroll
                for (int s = 0; s < LANE_GROUPS; s++) {
                    const bool mine = LANE_GROUPS == 1 || t / 2 == s;
                    mma(sum[s], v[0], w[0], v[1], w[1], mine ? b.x : 0, mine ? b.y : 0);
                    mma(sum[s], v[2], w[2], v[3], w[3], mine ? b.z : 0, mine ? b.w : 0);
                }
            }
#pragma unroll
            for (int s = 0; s < LANE_GROUPS; s++) {
                const float lower = low_scale[s * PART_GROUPS + part], upper = high_scale[s * PART_GROUPS + part];
                total[0] += lower * sum[s][0], total[1] += lower * sum[s][1];
                total[2] += upper * sum[s][2], total[3] += upper * sum[s][3];
            }
        }
    }
    // Bytes 2 h and 2 h + 1 of a word, signed, as two numbers of the dtype.
    DEVICE static u32 unpack_int8(u32 word, int h) {
        word ^= 0x80808080u;
        const float first = __uint_as_float(0x4b000000u | (word >> (16 * h) & 255)) - 8388736.f;
        const float second = __uint_as_float(0x4b000000u | (word >> (16 * h + 8) & 255)) - 8388736.f;
        return to_half_pair(first, second);
    }
    // This warp's weight tiles of a phase: sums of 16 rows x 8 sequences for each row tile that it touches, two at
    // most.
    template <int TILES, int K_TILES> DEVICE void products(const char* act, float* part) {
        const Share share = share_of(warp, TILES, K_TILES);
        const char* row = act + min(g, ROWS - 1) * ACT_ROW;
        float* to = part + (warp * 32 + g) * 8 + 2 * t;
        const char* x = row + share.k_tile * (K_TILE * 2);
        int rest = share.count, run_here = min(rest, K_TILES - share.k_tile), now = share.count - DEFER;
#pragma unroll 1
        while (rest > 0) {
            rest -= run_here;
            float total[4] = {};
#pragma unroll 1
            for (; run_here > 0; run_here--) {
                mma_k_tile(total, x);
                x += K_TILE * 2;
                if (now-- > 0)
                    issue();
                else
                    commit_group(), deferred++;  // an empty group, so that groups count tiles
            }
            *(float2*)to = make_float2(total[0], total[1]);
            *(float2*)(to + 64) = make_float2(total[2], total[3]);
            to += 128, x = row, run_here = min(rest, K_TILES);
        }
    }
};

// The sum over the warps of one row (of 16) of a row tile, for one sequence.
template <int TILES, int K_TILES> DEVICE float sum_over_warps(const float* part, int tile, int row, int seq) {
    float sum = 0.f;
    const float* from = part + row * 8 + seq;
    if constexpr (WARPS % TILES == 0) {  // the same number of warps for each tile
#pragma unroll
        for (int w = 0; w < WARPS / TILES; w++)
            if (K_TILES * TILES >= WARPS || (tile * (WARPS / TILES) + w) * TILES * K_TILES / WARPS <
                                                (tile * (WARPS / TILES) + w + 1) * TILES * K_TILES / WARPS)
                sum += from[(tile * (WARPS / TILES) + w) * 256];
    } else {
        const int begin = tile * K_TILES, end = begin + K_TILES;
#pragma unroll
        for (int j = 0; j <= (WARPS + TILES - 1) / TILES; j++) {
            const int w = tile * WARPS / TILES + j;
            const int first = w * TILES * K_TILES / WARPS, last = (w + 1) * TILES * K_TILES / WARPS;
            if (w < WARPS && first < end && last > begin && first < last) sum += from[(w * 2 + (first < begin)) * 128];
        }
    }
    return sum;
}

constexpr u32 SPIN_LIMIT = 1u << 25;  // about half a minute: a missing CTA is an error, not a hang

// Polls until poll() returns true. With a ring, by a whole warp, which meanwhile issues deferred copies.
template <typename Poll> DEVICE void spin_until(Poll poll) {
    for (u32 spins = 0; !poll(); spins++) {
        if (spins == SPIN_LIMIT) trap();
        spin_pause();
    }
}
template <typename Poll> DEVICE void spin_until(Ring& ring, Poll poll) {
    for (u32 spins = 0; !__all_sync(0xffffffffu, poll()); spins++) {
        if (spins == SPIN_LIMIT) trap();
        ring.issue_paced();
        spin_pause();
    }
}

// A barrier of all CTAs, in two halves. It orders no memory accesses: exchanged values have flags of their own.
struct GridBarrier {
    u32* counter;
    volatile u32* reached;  // in shared memory: the last target that was reached
    u32 target;
    // By all threads of the CTA; the producer warp's first thread arrives and polls for it.
    DEVICE void arrive() {
        __syncthreads();
        if (threadIdx.x == COMPUTE_THREADS) barrier_arrive(counter);
        target += GRID;
    }
    DEVICE void wait(Ring& ring) {
        if (threadIdx.x == COMPUTE_THREADS) {
            spin_until([&] { return (int)(barrier_count(counter) - target) >= 0; });
            *reached = target;
        }
        __syncwarp();
        spin_until(ring, [&] { return *reached == target; });
    }
};

// Nonzero where a half of a word is SENTINEL (all ones).
DEVICE u32 sentinel_halves(u32 word) { return (~word - 0x00010001u) & word & 0x80008000u; }
DEVICE bool complete(const uint4& v) {
    return (sentinel_halves(v.x) | sentinel_halves(v.y) | sentinel_halves(v.z) | sentinel_halves(v.w)) == 0;
}

// Receives (ROWS, WIDTH_OF) exchanged activations into act; by the compute warps.
template <int WIDTH_OF> DEVICE void receive(Ring& ring, char* act, const E* from, int tid) {
    constexpr int ROW = WIDTH_OF / 8, ALL = ROWS * ROW, EACH = (ALL + COMPUTE_THREADS - 1) / COMPUTE_THREADS;
    constexpr int TOGETHER = EACH < 8 ? EACH : 8;
    if (EACH > 2) {  // first poll one value only: polling all of them would delay the writers
        const uint4* at = (const uint4*)from + tid;
        spin_until(ring, [&] { return complete(load_relaxed(at)); });
    }
#pragma unroll 1
    for (int begin = 0; begin < EACH; begin += TOGETHER) {
        uint4 got[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) got[i] = make_uint4(SENTINEL, 0, 0, 0);
        spin_until(ring, [&] {
            bool all = true;
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                const int at = tid + (begin + i) * COMPUTE_THREADS;
                if (at < ALL && !complete(got[i])) got[i] = load_relaxed((const uint4*)from + at);
            }
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) all &= tid + (begin + i) * COMPUTE_THREADS >= ALL || complete(got[i]);
            return all;
        });
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int at = tid + (begin + i) * COMPUTE_THREADS;
            if (at < ALL) *(uint4*)(act + at / ROW * ACT_ROW + at % ROW * 16) = got[i];
        }
    }
}

// The tokens' embeddings times the first norm's weight into act, and their sums of squares by slices.
DEVICE void embed(const Params& p, const E* norm, char* memory, int warp, int lane) {
    constexpr int SLICE = H / SLICES, EACH = (SLICE + 31) / 32;
    float* squares = (float*)(memory + AT_SQUARES);
#pragma unroll 1
    for (int task = warp; task < ROWS * SLICES; task += WARPS) {
        const int seq = task / SLICES, begin = task % SLICES * SLICE;
        const E* embedding = p.embeddings + p.tokens[seq] * H;
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int k = lane + i * 32;
            if (k >= SLICE) continue;
            const float x = from_half(embedding[begin + k]);
            sum += x * x;
            *(E*)(memory + AT_ACT + seq * ACT_ROW + (begin + k) * 2) =
                (E)to_half_pair(x * from_half(norm[begin + k]), 0.f);
        }
        sum = warp_sum(sum);
        if (lane == 0) squares[task] = sum;
    }
}
constexpr float SQUARE_UNIT = 262144.f;  // fixed point of the sums of squares of a stream with an rms near 1

// From the sums of squares of the exchanged stream, which was multiplied by the last inv_rms: the new inv_rms, and its
// ratio to the last. One warp.
DEVICE void update_inv_rms(const Params& p, const u64* squares, float* inv_rms, float* rescale, int lane) {
    u64 sum = 0;
    if (lane < ROWS) spin_until([&] { return ((sum = load_relaxed(squares + lane * 16)) & 255) == GRID % 256; });
    if (lane < ROWS) {
        const float before = inv_rms[lane], mean = (float)(sum >> 8) * (1.f / (SQUARE_UNIT * H));
        rescale[lane] = rsqrtf(mean + __uint_as_float((u32)p.eps_bits) * before * before);
        inv_rms[lane] = before * rescale[lane];
    }
    __syncwarp();
}

// Issues the copies of a layer's small weights of the CTA's channels; one warp.
DEVICE void prefetch_small(const i64* fields, char* small, int first, int count, int lane) {
    const E* x_proj = (const E*)fields[X_PROJ];
    constexpr int CHUNKS = X_COLUMNS / 8;
    const int before = first % 8, chunks = (before + count + 7) / 8;
#pragma unroll 4
    for (int i = lane; i < R * CHUNKS; i += 32) {
        const int r = i / CHUNKS, q = i % CHUNKS;
        if (q < chunks) copy_async<16>(small + r * X_ROW + q * 16, x_proj + (size_t)r * D + first - before + q * 8);
    }
    const E* dt = (const E*)fields[DT_PROJ] + (size_t)first * RANK;
#pragma unroll 4
    for (int i = lane; i < count * RANK / 8; i += 32) copy_async<16>(small + SMALL_DT + i * 16, dt + i * 8);
    const char* a = (const char*)fields[A_LOG] + (size_t)first * N * A_BYTES;
#pragma unroll 2
    for (int i = lane; i < count * N * A_BYTES / 16; i += 32) copy_async<16>(small + SMALL_A + i * 16, a + i * 16);
    if constexpr (NORMS == 2) {  // side by side, as dt, B and C are
        constexpr int OF_DT = RANK / 8, OF_B = N / 8;
        for (int i = lane; i < R / 8; i += 32) {
            const int part = i < OF_DT ? DT_NORM : i < OF_DT + OF_B ? B_NORM : C_NORM;
            const int at = i < OF_DT ? i : (i - OF_DT) % OF_B;
            copy_async<16>(small + SMALL_NORM + i * 16, (const E*)fields[part] + at * 8);
        }
    }
    commit_group();
}

// The norms of dt, B and C in place; by the compute warps, a warp for a sequence's dt or for its B and C.
DEVICE void normalise_selection(const Params& p, const char* small, E* dt, float* bc, int warp, int lane) {
    const E* weight = (const E*)(small + (NORMS == 2 ? SMALL_NORM : 0));
    const float eps = __uint_as_float((u32)p.mixer_eps_bits);
#pragma unroll 1
    for (int task = warp; task < 2 * ROWS; task += WARPS) {
        const int b = task / 2;
        if (task % 2 == 0) {
            constexpr int EACH = (RANK + 31) / 32;
            E* row = dt + b * DT_ROW;
            float x[EACH], sum = 0.f;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int r = lane + i * 32;
                x[i] = r < RANK ? from_half(row[r]) : 0.f;
                sum += x[i] * x[i];
            }
            const float inverse = rsqrtf(warp_sum(sum) * (1.f / RANK) + eps);
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int r = lane + i * 32;
                if (r >= RANK) continue;
                row[r] = (E)to_half_pair(x[i] * inverse * (NORMS == 2 ? from_half(weight[r]) : 1.f), 0.f);
            }
        } else {  // B by the first 16 lanes, C by the others
            float* row = bc + b * 2 * N;
            const float x = row[lane];
            float sum = x * x;
#pragma unroll
            for (int step = N / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
            const float inverse = rsqrtf(sum * (1.f / N) + eps);
            row[lane] = rounded(x * inverse * (NORMS == 2 ? from_half(weight[RANK + lane]) : 1.f));
        }
    }
}

// Resets the CTA's locations of one exchanged stream and of one y; one warp.
DEVICE void reset_sentinels(
    const Params& p, int stream_of, int y_of, int stream, int stream_count, int first, int count, int lane) {
#pragma unroll 1
    for (int b = 0; b < ROWS; b++) {
#pragma unroll 1
        for (int r = lane; r < stream_count; r += 32) p.stream[(stream_of * ROWS + b) * H + stream + r] = (E)SENTINEL;
#pragma unroll 1
        for (int c = lane; c < count; c += 32) p.y[(y_of * ROWS + b) * D + first + c] = (E)SENTINEL;
    }
    if (blockIdx.x == 0 && lane < ROWS) p.squares[(stream_of * ROWS + lane) * 16] = 0;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_step(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char memory[];
    i64* table = (i64*)(memory + AT_TABLE);
    char* act = memory + AT_ACT;
    float* part = (float*)(memory + AT_PART);
    E* u = (E*)(memory + AT_U);                  // [sequence of 8][channel + before], others 0
    float* z = (float*)(memory + AT_Z);          // [sequence][channel]
    float* delta = (float*)(memory + AT_DELTA);  // [channel][sequence of 8]
    E* dt = (E*)(memory + AT_DT);                // [sequence][rank]
    float* bc = (float*)(memory + AT_BC);        // [sequence][B, C]
    float* residual = (float*)(memory + AT_RESIDUAL);  // [sequence][row of the residual stream], this CTA's rows
    float* inv_rms = (float*)(memory + AT_INV_RMS);    // [sequence]: the norm's 1 / rms
    float* rescale = inv_rms + ROWS;  // [sequence]: its ratio to the one that the exchanged stream was multiplied by
    u64* best = (u64*)(memory + AT_BEST);

    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const bool computes = warp < WARPS;  // else this is the producer warp
    for (int i = tid; i < LAYERS * FIELDS; i += THREADS) table[i] = p.layers[i];
    if (tid == 0) table[LAYERS * FIELDS + IN] = (i64)p.head, table[LAYERS * FIELDS + IN_SCALES] = (i64)p.head_scales;
    for (int i = tid; i < 8 * U_ROW; i += THREADS) u[i] = 0;
    for (int i = tid; i < BUFFERS * SMALL / 4; i += THREADS) ((u32*)(memory + AT_SMALL))[i] = 0;  // x_proj's padding
    if (tid < ROWS) best[tid] = 0;
    if (tid == 0) *(u32*)(memory + AT_REACHED) = p.counter[32];
    GridBarrier barrier = {p.counter, (volatile u32*)(memory + AT_REACHED), p.counter[32]};
    const u32 head_stream = 2 + (p.counter[33] & 1);
    const int from = VERIFY ? (int)*p.slot : 0;
    __syncthreads();

    Run* runs = (Run*)(memory + AT_RUNS) + (computes ? warp : 0) * RUNS;
    Ring ring(
        table, runs, computes ? plan_runs(runs, warp, lane) : 0,
        memory + AT_RING + (computes ? warp : 0) * STAGES * STAGE_BYTES, warp, lane);
    const int first = begin_of(D, blockIdx.x), count = begin_of(D, blockIdx.x + 1) - first, before = first % 8;
    const int stream = begin_of(H, blockIdx.x), stream_count = begin_of(H, blockIdx.x + 1) - stream;
    if (computes)
#pragma unroll 1
        for (int i = 0; i < STAGES; i++) ring.issue();
    else
        prefetch_small(table, memory + AT_SMALL, first, count, lane);
#pragma unroll 1
    for (int i = tid; i < STREAM * ROWS; i += THREADS) {
        const int b = i / STREAM, r = i % STREAM;
        if (r >= stream_count) continue;
        residual[i] = from_half(p.embeddings[p.tokens[b] * H + stream + r]);
        p.stream[((head_stream ^ 1) * ROWS + b) * H + stream + r] = (E)SENTINEL;  // the head's of the last step
    }
    if (blockIdx.x == 0 && tid < ROWS) p.squares[((head_stream ^ 1) * ROWS + tid) * 16] = 0;

    Stopwatch watch;
#ifdef CLOCK
    watch.since = clock();
#endif
#pragma unroll 1
    for (int layer = 0; layer < LAYERS; layer++) {
        const i64* fields = table + layer * FIELDS;
        const char* small = memory + AT_SMALL + (BUFFERS == 2 ? (layer & 1) * SMALL : 0);
        u64* sums = p.sums + (layer & 1) * COPIES * ROWS * R;
        E* y = p.y + (layer & 1) * ROWS * D;

        // First. What does not depend on the residual stream is loaded before it is received.
        // (sequence, channel) pairs of each thread
        constexpr int CONV_ITEMS = (ROWS * CHANNELS + COMPUTE_THREADS - 1) / COMPUTE_THREADS;
        float taps[CONV_ITEMS][WIDTH], window[CONV_ITEMS][WIDTH - 1];
        float conv_bias[CONV_ITEMS], x_bias[CONV_ITEMS], z_bias[CONV_ITEMS], x_scale[CONV_ITEMS], z_scale[CONV_ITEMS];
#pragma unroll
        for (int i = 0; i < CONV_ITEMS; i++) {
            const int item = tid + i * COMPUTE_THREADS, seq = item / CHANNELS, c = item % CHANNELS;
            conv_bias[i] = x_bias[i] = z_bias[i] = 0.f, x_scale[i] = z_scale[i] = 1.f;
            if (!computes || seq >= ROWS || c >= count) continue;
            const size_t place = ((size_t)(layer * STATE_SLOTS + (VERIFY ? from : seq)) * D + first + c) * (WIDTH - 1);
#pragma unroll
            for (int j = 0; j < WIDTH; j++) taps[i][j] = from_half(((const E*)fields[CONV])[(first + c) * WIDTH + j]);
#pragma unroll
            for (int j = 0; j < WIDTH - 1; j++) {
                const int past = VERIFY ? seq + j : j;  // past the window: an input of this step, known later
                if (past < WIDTH - 1)
                    window[i][j] = CONV_FLOAT ? ((const float*)p.conv_states)[place + past]
                                              : from_half(((const E*)p.conv_states)[place + past]);
            }
            if constexpr (FLOAT8) {
                x_scale[i] = ((const float*)fields[IN_SCALES])[first + c];
                z_scale[i] = ((const float*)fields[IN_SCALES])[D + first + c];
            }
            if (fields[CONV_BIAS]) conv_bias[i] = from_half(((const E*)fields[CONV_BIAS])[first + c]);
            if (fields[IN_BIAS]) {
                x_bias[i] = from_half(((const E*)fields[IN_BIAS])[first + c]);
                z_bias[i] = from_half(((const E*)fields[IN_BIAS])[D + first + c]);
            }
        }
        // The states that the second part updates are prefetched into L2.
        constexpr int SEQUENCES = VERIFY ? 1 : ROWS;
        constexpr int SCAN_ITEMS = (SEQUENCES * CHANNELS * 4 + COMPUTE_THREADS - 1) / COMPUTE_THREADS;
#pragma unroll
        for (int i = 0; i < SCAN_ITEMS; i++) {
            const int item = tid + i * COMPUTE_THREADS, channel = item / 4 % CHANNELS, b = item / 4 / CHANNELS;
            if (item % 2 != 0 || !computes || b >= SEQUENCES || channel >= count) continue;
            prefetch_l2(
                p.ssm_states + ((size_t)(layer * STATE_SLOTS + (VERIFY ? from : b)) * D + first + channel) * N +
                item % 4 * 4);
        }
        if (lane == 0 && warp == 0) {
            prefetch_l2((const char*)fields[DT_BIAS] + first * A_BYTES);
            prefetch_l2((const char*)fields[SKIP] + first * A_BYTES);
            prefetch_l2((const char*)fields[DT_BIAS] + (first + count - 1) * A_BYTES);
            prefetch_l2((const char*)fields[SKIP] + (first + count - 1) * A_BYTES);
        }
        if (layer == 0) {
            if (computes) embed(p, (const E*)fields[NORM], memory, warp, lane);
        } else if (computes) {
            receive<H>(ring, act, p.stream + (layer & 1) * ROWS * H, tid);
        }
        if (computes) compute_barrier<COMPUTE_THREADS>();
        watch.mark(TIME_STREAM);
        if (layer == 0 && tid < ROWS) {
            float sum = 0.f;
            for (int i = 0; i < SLICES; i++) sum += ((const float*)(memory + AT_SQUARES))[tid * SLICES + i];
            inv_rms[tid] = rescale[tid] = rsqrtf(sum / H + __uint_as_float((u32)p.eps_bits));
        }
        ring.issue_deferred(STAGES);
        if (computes) {
            ring.products<2 * C_TILES, H_K_TILES>(act, part);
        } else {  // this layer's small weights have arrived; the next layer's are prefetched
            if (layer > 0) update_inv_rms(p, p.squares + (layer & 1) * ROWS * 16, inv_rms, rescale, lane);
            wait_groups<0>();
            if (BUFFERS == 2 && layer + 1 < LAYERS)
                prefetch_small(fields + FIELDS, memory + AT_SMALL + (~layer & 1) * SMALL, first, count, lane);
        }
        __syncthreads();
        watch.mark(TIME_IN_PROJ);
        if (VERIFY) {  // a token's convolution needs the tokens before it: [channel][token of 8]
#pragma unroll
            for (int i = 0; i < CONV_ITEMS; i++) {
                const int item = tid + i * COMPUTE_THREADS, seq = item / CHANNELS, c = item % CHANNELS;
                if (!computes || seq >= ROWS || c >= count) continue;
                delta[c * 8 + seq] = rounded(
                    sum_over_warps<2 * C_TILES, H_K_TILES>(part, c / 16, c % 16, seq) * (rescale[seq] * x_scale[i]) +
                    x_bias[i]);
            }
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < CONV_ITEMS; i++) {
            const int item = tid + i * COMPUTE_THREADS, seq = item / CHANNELS, c = item % CHANNELS;
            const int tile = c / 16, row = c % 16;
            if (!computes || seq >= ROWS || c >= count) continue;
            const int slot = VERIFY ? (from + 1 + seq) % STATE_SLOTS : seq;
            const size_t place = ((size_t)(layer * STATE_SLOTS + slot) * D + first + c) * (WIDTH - 1);
            if (VERIFY)
#pragma unroll
                for (int j = 0; j < WIDTH - 1; j++)
                    if (seq + j >= WIDTH - 1) window[i][j] = delta[c * 8 + seq + j - (WIDTH - 1)];
            const float x = VERIFY ? delta[c * 8 + seq]
                                   : rounded(
                                         sum_over_warps<2 * C_TILES, H_K_TILES>(part, tile, row, seq) *
                                             (rescale[seq] * x_scale[i]) +
                                         x_bias[i]);
            z[seq * CHANNELS + c] = rounded(
                sum_over_warps<2 * C_TILES, H_K_TILES>(part, tile + C_TILES, row, seq) * (rescale[seq] * z_scale[i]) +
                z_bias[i]);
            float sum = x * taps[i][WIDTH - 1] + conv_bias[i];
#pragma unroll
            for (int j = 0; j < WIDTH - 1; j++) {
                sum += window[i][j] * taps[i][j];
                const float next = j + 2 < WIDTH ? window[i][j + 1 < WIDTH - 1 ? j + 1 : j] : x;
                if (CONV_FLOAT)
                    ((float*)p.conv_states)[place + j] = next;
                else
                    ((E*)p.conv_states)[place + j] = (E)to_half_pair(next, 0.f);
            }
            u[seq * U_ROW + before + c] = (E)to_half_pair(silu(sum), 0.f);
        }
        __syncthreads();
        watch.mark(TIME_CONV);
        if (computes)
#pragma unroll 1
            for (int tile = warp; tile < (R + 15) / 16; tile += WARPS) {
                const int low = tile * 16 + ring.g, high = low + 8;
                const char* weight = small + ring.t * 8;
                const char* x = (const char*)u + ring.g * (U_ROW * 2) + ring.t * 8;
                float total[4] = {};
#pragma unroll
                for (int k = 0; k < X_COLUMNS * 2; k += 32) {
                    const uint2 a = *(const uint2*)(weight + min(low, R - 1) * X_ROW + k);
                    const uint2 d = *(const uint2*)(weight + min(high, R - 1) * X_ROW + k), b = *(const uint2*)(x + k);
                    mma(total, a.x, d.x, a.y, d.y, b.x, b.y);
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int r = i < 2 ? low : high, b = 2 * ring.t + i % 2;
                    if (r < R && b < ROWS)
                        atomicAdd(
                            sums + (blockIdx.x % COPIES * ROWS + b) * R + r,
                            ((u64)__float2ll_rn(total[i] * 4294967296.f) << 8) + 1);
                }
            }
        watch.mark(TIME_X_PROJ);
        barrier.arrive();

        // Second. Each thread has four states of a channel and sequence; with VERIFY the tokens go through them one
        // after the other.
        float4 states[SCAN_ITEMS];
        float4* states_at[SCAN_ITEMS];
        float step_bias[SCAN_ITEMS], skip[SCAN_ITEMS];
#pragma unroll
        for (int i = 0; i < SCAN_ITEMS; i++) {
            const int item = tid + i * COMPUTE_THREADS, quad = item & 3;
            const int channel = item / 4 % CHANNELS, b = item / 4 / CHANNELS;
            states_at[i] = nullptr;
            if (computes && b < SEQUENCES && channel < count) {
                const size_t slot = layer * STATE_SLOTS + (VERIFY ? from : b);
                states_at[i] = (float4*)(p.ssm_states + (slot * D + first + channel) * N) + quad;
                states[i] = *states_at[i];
                step_bias[i] = scan_weight(fields[DT_BIAS], first + channel);
                skip[i] = scan_weight(fields[SKIP], first + channel);
            }
        }
        barrier.wait(ring);
        if (computes) {
            constexpr int EACH = (ROWS * R + COMPUTE_THREADS - 1) / COMPUTE_THREADS;
            u64 got[EACH][COPIES];
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int copy = 0; copy < COPIES; copy++) got[i][copy] = 0;
            spin_until(ring, [&] {
                bool all = true;
#pragma unroll
                for (int i = 0; i < EACH; i++)
#pragma unroll
                    for (int copy = 0; copy < COPIES; copy++) {
                        const int at = tid + i * COMPUTE_THREADS, ctas = (GRID - copy + COPIES - 1) / COPIES;
                        if (at < ROWS * R && (got[i][copy] & 255) != ctas)
                            got[i][copy] = load_relaxed(sums + copy * ROWS * R + at);
                    }
#pragma unroll
                for (int i = 0; i < EACH; i++)
#pragma unroll
                    for (int copy = 0; copy < COPIES; copy++)
                        all &= tid + i * COMPUTE_THREADS >= ROWS * R ||
                               (got[i][copy] & 255) == (GRID - copy + COPIES - 1) / COPIES;
                return all;
            });
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int at = tid + i * COMPUTE_THREADS, b = at / R, r = at % R;
                if (at >= ROWS * R) continue;
                i64 sum = 0;
#pragma unroll
                for (int copy = 0; copy < COPIES; copy++) sum += (i64)got[i][copy] >> 8;
                const float v = (float)sum * (1.f / 4294967296.f);
                if (r < RANK)
                    dt[b * DT_ROW + r] = (E)to_half_pair(v, 0.f);
                else
                    bc[b * 2 * N + r - RANK] = rounded(v);
            }
        }
        __syncthreads();
        watch.mark(TIME_SUMS_EXCHANGE);
        if constexpr (NORMS != 0) {
            if (computes) normalise_selection(p, small, dt, bc, warp, lane);
            __syncthreads();
        }
        if (warp < C_TILES) {
            float total[4] = {};
            const E* weight = (const E*)(small + SMALL_DT) + (warp * 16 + ring.g) * RANK + ring.t * 4;
            const E* x = dt + ring.g * DT_ROW + ring.t * 4;
#pragma unroll
            for (int k = 0; k < RANK; k += 16) {
                const uint2 a = *(const uint2*)(weight + k), d = *(const uint2*)(weight + 8 * RANK + k);
                const uint2 b = ring.g < ROWS ? *(const uint2*)(x + k) : make_uint2(0, 0);
                mma(total, a.x, d.x, a.y, d.y, b.x, b.y);
            }
            float* to = delta + (warp * 16 + ring.g) * 8 + 2 * ring.t;
            *(float2*)to = make_float2(total[0], total[1]);
            *(float2*)(to + 64) = make_float2(total[2], total[3]);
        }
        __syncthreads();
        watch.mark(TIME_STEP);
#pragma unroll
        for (int i = 0; i < SCAN_ITEMS; i++) {
            const int item = tid + i * COMPUTE_THREADS, quad = item & 3, channel = item / 4 % CHANNELS;
            float h[4] = {states[i].x, states[i].y, states[i].z, states[i].w}, a[4] = {};
            if (states_at[i] != nullptr) {
                if (SCAN_FLOAT) {
                    const float4 v = *(const float4*)(small + SMALL_A + (channel * N + quad * 4) * 4);
                    a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
                } else {
                    const uint2 v = *(const uint2*)(small + SMALL_A + (channel * N + quad * 4) * 2);
                    a[0] = from_half((E)v.x), a[1] = from_half((E)(v.x >> 16));
                    a[2] = from_half((E)v.y), a[3] = from_half((E)(v.y >> 16));
                }
#pragma unroll
                for (int j = 0; j < 4; j++) a[j] = -1.4426950408889634f * expf(a[j]);
            }
#pragma unroll
            for (int token = 0; token < (VERIFY ? ROWS : 1); token++) {
                const int b = VERIFY ? token : item / 4 / CHANNELS;
                float sum = 0.f, x = 0.f;
                if (states_at[i] != nullptr) {
                    x = from_half(u[b * U_ROW + before + channel]);
                    float d = rounded(delta[channel * 8 + b]) + step_bias[i];
                    d = d > 20.f ? d : log1pf(expf(d));
                    const float* B = bc + b * 2 * N + quad * 4;
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        h[j] = ex2(d * a[j]) * h[j] + d * x * B[j];
                        sum += h[j] * B[N + j];
                    }
                    const i64 on = VERIFY ? ((from + 1 + token) % STATE_SLOTS - from) * (i64)(D * N / 4) : 0;
                    states_at[i][on] = make_float4(h[0], h[1], h[2], h[3]);
                }
                sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                if (states_at[i] != nullptr && quad == 0)
                    store_relaxed(
                        y + b * D + first + channel,
                        (E)to_half_pair((sum + skip[i] * x) * silu(z[b * CHANNELS + channel]), 0.f));
            }
        }
        watch.mark(TIME_SCAN);

        // Third.
        const bool last = layer + 1 == LAYERS;
        const u32 next = last ? head_stream : ~layer & 1;
        constexpr int ROUNDS_OF_LANES = (STREAM + 31) / 32;
        float next_norm[ROUNDS_OF_LANES], out_bias[ROUNDS_OF_LANES], out_scale[ROUNDS_OF_LANES];
#pragma unroll
        for (int i = 0; i < ROUNDS_OF_LANES; i++) {
            const int r = lane + i * 32;
            next_norm[i] = out_bias[i] = 0.f, out_scale[i] = 1.f;
            if (r >= stream_count) continue;
            if constexpr (FLOAT8) out_scale[i] = ((const float*)fields[OUT_SCALES])[stream + r];
            next_norm[i] = from_half((last ? p.final_norm : (const E*)fields[FIELDS + NORM])[stream + r]);
            if (fields[OUT_BIAS]) out_bias[i] = from_half(((const E*)fields[OUT_BIAS])[stream + r]);
        }
        if (computes) receive<D>(ring, act, y, tid);
        __syncthreads();
        watch.mark(TIME_Y_EXCHANGE);
        ring.issue_deferred(STAGES);
        if (computes) {
            ring.products<S_TILES, D_K_TILES>(act, part);
        } else {  // all CTAs have read the layer's stream and sums, and the last layer's y
            reset_sentinels(p, layer & 1, ~layer & 1, stream, stream_count, first, count, lane);
#pragma unroll 1
            for (int i = blockIdx.x * 32 + lane; i < COPIES * ROWS * R; i += GRID * 32) sums[i] = 0;
            fence();
            if (BUFFERS == 1 && !last) prefetch_small(fields + FIELDS, memory + AT_SMALL, first, count, lane);
        }
        __syncthreads();
        watch.mark(TIME_OUT_PROJ);
#pragma unroll 1
        for (int b = warp; b < ROWS; b += WARPS + 1) {
            float square = 0.f;
#pragma unroll
            for (int i = 0; i < ROUNDS_OF_LANES; i++) {
                const int r = lane + i * 32;
                if (r >= stream_count) continue;
                float v = sum_over_warps<S_TILES, D_K_TILES>(part, r / 16, r % 16, b) * out_scale[i] + out_bias[i];
                v = residual[b * STREAM + r] += rounded(v);
                v *= inv_rms[b];
                store_relaxed(p.stream + (next * ROWS + b) * H + stream + r, (E)to_half_pair(v * next_norm[i], 0.f));
                square += v * v;
            }
            square = warp_sum(square);
            if (lane == 0)
                atomicAdd(p.squares + (next * ROWS + b) * 16, ((u64)__float2ll_rn(square * SQUARE_UNIT) << 8) + 1);
        }
        watch.mark(TIME_SUM);
    }

    // The head.
    if (computes) {
        receive<H>(ring, act, p.stream + head_stream * ROWS * H, tid);
        compute_barrier<COMPUTE_THREADS>();
    } else {
        update_inv_rms(p, p.squares + head_stream * ROWS * 16, inv_rms, rescale, lane);
        // All CTAs have read the last y.
        reset_sentinels(p, LAYERS & 1, ~LAYERS & 1, stream, stream_count, first, count, lane);
    }
    const int first_logit = begin_of(VOCABULARY, blockIdx.x);
    const int logit_count = begin_of(VOCABULARY, blockIdx.x + 1) - first_logit;
#pragma unroll 1
    for (int round = 0; round < ROUNDS; round++) {
        const bool last = round == ROUNDS - 1;
        ring.issue_deferred(STAGES);
        if (computes) {
            if (last)
                ring.products<LAST_TILES, H_K_TILES>(act, part);
            else
                ring.products<WARPS, H_K_TILES>(act, part);
        }
        __syncthreads();
        if (computes)
#pragma unroll 1
            for (int i = tid; i < ROWS * WARPS * 16; i += COMPUTE_THREADS) {
                const int b = i / (WARPS * 16), row = i % (WARPS * 16), logit = round * WARPS * 16 + row;
                u64 key = 0;
                if (logit < logit_count) {
                    const float scale = FLOAT8 ? p.head_scales[first_logit + logit] : 1.f;
                    const float v = rounded(rescale[b] * scale * (
                        last ? sum_over_warps<LAST_TILES, H_K_TILES>(part, row / 16, row % 16, b)
                             : sum_over_warps<WARPS, H_K_TILES>(part, row / 16, row % 16, b)));
                    p.logits[(size_t)b * VOCABULARY + first_logit + logit] = v;
                    const u32 bits = __float_as_uint(v + 0.f);  // -0 and 0 are equal
                    // Integers in the order of floats; of equal logits the first is the largest.
                    key = (u64)(bits & 0x80000000u ? ~bits : bits | 0x80000000u) << 32 | (u32) ~(first_logit + logit);
                }
#pragma unroll
                for (int step = 16; step > 0; step /= 2) {
                    const u64 other = __shfl_xor_sync(0xffffffffu, key, step);
                    key = other > key ? other : key;
                }
                if (lane == 0) atomicMax(best + b, key);
            }
        __syncthreads();
    }
    watch.mark(TIME_HEAD);
    if (p.choose) {
        if (tid < ROWS) atomicMax(p.best + tid, best[tid]);
        __syncthreads();
        if (tid == COMPUTE_THREADS) fence();  // the thread that arrives for the CTA
        barrier.arrive();
        if (blockIdx.x == 0) barrier.wait(ring);
    }
    if (blockIdx.x == 0 && warp == 0) {
        const i64 at = *p.position;
        if (p.choose && tid < ROWS) {
            const i64 token = (u32) ~(u32)load_relaxed(p.best + tid);
            p.tokens[tid] = token;
            if (at < p.capacity) p.history[tid * p.capacity + at] = token;
            p.best[tid] = 0;
        }
        __syncwarp();
        if (tid == 0) *p.position = at + 1, p.counter[32] = barrier.target, p.counter[33] = head_stream ^ 1;
    }
#ifdef CLOCK
    if (blockIdx.x == CLOCK && tid == 0)
        for (int i = 0; i < PARTS; i++) p.cycles[i] = watch.spent[i];
#endif
}
