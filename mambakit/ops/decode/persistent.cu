// One token through a whole Mamba model in one kernel: a block stays on each multiprocessor, and the blocks meet three times a
// layer. Compiled at run time; the macros come from persistent.py.
//
//   DTYPE 1 bfloat16, 2 float16: weights and activations      BITS 0: the large weights too; 8 or 4: packed integers, GROUP
//   ROWS 1 to 8 texts; GRID blocks; H, D, RANK, WIDTH, VOCABULARY, LAYERS: the model's; 16 states
//   TRIAL 1: the rows are the next tokens of one text, on trial. The state before them is in slot `from` of ROWS + 1; the state after
//     each of them goes into the slots that follow, round and round, so that keeping some is naming another slot
//   WARPS, 4 to 16, that work; CLOCK, where a benchmark asks which part takes how long
//   SCAN_FLOAT: 1 where A_log, D and dt_proj's bias are float32; CONV_FLOAT: 1 where the convolution's windows are
//   SLOTS of each warp's ring, the last DEFER of a phase filled again one by one; BUFFERS, 1 or 2, of small weights; SHARED bytes
//
// The channels, the rows of the residual stream and the vocabulary are dealt out to the blocks. A layer is
//
//   first    every block norms the stream, forms x and z of its channels (in_proj), convolves, and adds its channels' share of
//            x_proj to the sums of all blocks
//   second   dt_proj, the state and the gate of its channels
//   third    out_proj's rows of the stream
//
// Weights never wait for that. Each warp knows all the pieces of weights that it will multiply, in order to the end of the step, and
// keeps a ring of them on their way into shared memory: a piece is 128 bytes, a whole line, of 16 rows. So the memory
// works on while blocks wait for each other. But what blocks tell each other queues behind the weights that are on their
// way: towards the end of a phase slots are left free, and filled a few at a time while the block waits. A piece is multiplied on
// the tensor cores as 16 rows by as many columns by 8 texts; within a piece the columns may come in any order, as long as the activations
// come in the same. The last warp speaks for the block and fetches the small weights of the next layer; it has nothing on its way
// when it meets the others, so that its fence, which waits for the memory, is a short one.
//
// Every sum has a fixed order, or is of integers (x_proj's: fixed point of 2^-36): same inputs, same bits, whatever the other rows hold.

#include "primitives.cuh"

typedef unsigned short E;  // bits of the dtype
constexpr int N = 16;
constexpr int WORKERS = WARPS * 32, THREADS = WORKERS + 32;
constexpr int R = RANK + 2 * N;
constexpr int PIECE = BITS == 8 ? 128 : BITS == 4 ? 256 : 64;  // columns
constexpr int H_PIECES = H / PIECE, D_PIECES = D / PIECE;
constexpr int H_BYTES = H_PIECES * 128, D_BYTES = D_PIECES * 128;  // of a row
constexpr int SCALES = BITS && PIECE > GROUP ? PIECE / GROUP : 1;  // of a row in a piece
constexpr int SLOT = 2048 + (BITS ? 512 : 0);
constexpr int CHANNELS = (D + GRID - 1) / GRID, STREAM = (H + GRID - 1) / GRID, WORDS = (VOCABULARY + GRID - 1) / GRID;
constexpr int C_TILES = (CHANNELS + 15) / 16, S_TILES = (STREAM + 15) / 16, W_TILES = (WORDS + 15) / 16;
constexpr int ROUNDS = (W_TILES + WARPS - 1) / WARPS, LAST_TILES = W_TILES - (ROUNDS - 1) * WARPS;
constexpr int STATES = TRIAL ? ROWS + 1 : ROWS;  // of a layer
constexpr int PHASES = 2 * LAYERS + ROUNDS;
constexpr int FIELDS = 14;
enum { NORM, IN, IN_SCALES, IN_BIAS, CONV, CONV_BIAS, X_PROJ, DT_PROJ, DT_BIAS, A_LOG, SKIP, OUT, OUT_SCALES, OUT_BIAS };

// Shared memory.
constexpr int up(int bytes) { return (bytes + 127) / 128 * 128; }
constexpr int ACT_ROW = (H > D ? H : D) * 2 + 64;  // bytes; 64 more than whole lines, so that two rows' reads meet in no bank
constexpr int X_COLUMNS = (CHANNELS + 7 + 15) / 16 * 16;  // the block's channels from a multiple of 8 on; others are 0
constexpr int X_ROW = X_COLUMNS * 2 + 16;
constexpr int A_BYTES = SCAN_FLOAT ? 4 : 2;
constexpr int SMALL_DT = up(R * X_ROW), SMALL_A = SMALL_DT + up(C_TILES * 16 * RANK * 2), SMALL = SMALL_A + up(CHANNELS * N * A_BYTES);
constexpr int U_ROW = X_COLUMNS + 8;
constexpr int DT_ROW = RANK + 8;
constexpr int COPIES = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;  // of x_proj's sums: fewer blocks add to one address
constexpr int AT_ACT = up(LAYERS * FIELDS * 8);
constexpr int AT_PART = AT_ACT + up(ROWS * ACT_ROW);
constexpr int AT_SMALL = AT_PART + WARPS * 2 * 16 * 8 * 4;
constexpr int AT_U = AT_SMALL + BUFFERS * SMALL;
constexpr int AT_Z = AT_U + up(8 * U_ROW * 2);
constexpr int AT_DELTA = AT_Z + up(ROWS * CHANNELS * 4);
constexpr int AT_DT = AT_DELTA + up(C_TILES * 16 * 8 * 4);
constexpr int AT_BC = AT_DT + up(8 * DT_ROW * 2);
constexpr int AT_OWN = AT_BC + up(ROWS * 2 * N * 4);
constexpr int AT_SQUARES = AT_OWN + up(STREAM * ROWS * 4);
constexpr int AT_BEST = AT_SQUARES + up(WARPS * 4);
constexpr int AT_RING = AT_BEST + up(ROWS * 8);
static_assert(AT_RING + WARPS * SLOTS * SLOT == SHARED, "persistent.py counts the shared memory otherwise");
static_assert(C_TILES * 2 <= WARPS && S_TILES <= WARPS, "a phase has more tiles than a warp's two sums allow");
static_assert(H % PIECE == 0 && D % PIECE == 0 && RANK % 16 == 0 && D % 8 == 0, "widths that pieces do not fit");

struct Params {
    const i64* layers;  // LAYERS x FIELDS addresses
    const E* embeddings;
    const E* final_norm;
    const char* head;
    const float* head_scales;
    void* conv_states;  // (layers, STATES, d, width - 1)
    float* ssm_states;  // (layers, STATES, d, n)
    i64* tokens;
    i64* position;
    i64* history;
    float* logits;
    float* residual;  // (rows, h)
    E* y;             // (rows, d)
    u64* sums;        // (2, COPIES, rows, r): zero between steps
    u64* best;        // (rows,): zero between steps
    u32* counter;     // [0] arrivals, [32] arrivals at the step's start
    const i64* from;  // with TRIAL: the slot of the state before the first token
    i64 eps;          // the bits of a float
    i64 capacity;
    i64 choose;
    u32* cycles;  // (PARTS,) of one block, added up over the layers; read by benchmarks, with CLOCK
};

// With CLOCK: the time of block CLOCK's first thread, by what it did until the mark.
enum { DID_NORM, DID_IN_PROJ, DID_CONV, DID_X_PROJ, DID_MEET, DID_STEP, DID_SCAN, DID_MEET_AGAIN, DID_OUT_PROJ, DID_SUM, DID_HEAD, PARTS };
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

DEVICE float rounded(float x) { return widen((E)narrow(x, 0.f)); }
DEVICE float silu(float x) { return quotient(x, 1.f + ex2(-1.4426950408889634f * x)); }
DEVICE float scan_weight(i64 weights, int i) { return SCAN_FLOAT ? ((const float*)weights)[i] : widen(((const E*)weights)[i]); }
DEVICE int begin_of(int total, int block) { return (int)((i64)total * block / GRID); }

// The pieces of weights of one warp, from the first to the last of the step.
struct Ring {
    struct Share { int tile, piece, count; };  // of a phase: where it begins, and how many pieces
    const i64* table;
    const Params& p;
    char *begin, *end, *slot, *fill;  // the slots: of the oldest piece, and where the next one goes
    const char* next;                 // this lane's 16 bytes of the next piece: it copies one of every 4 rows
    const float* scales;              // of the row that this lane fetches the scales of
    int four;                         // bytes from a row to the fourth after it
    int there;                        // rows of the open tile, less this lane's first
    int owed;                         // pieces used whose places are still free
    int run, left;                    // pieces of this warp still to send, of the open tile and of the phase after it
    int phase, tile;
    int warp, lane, g, t, channels, channels_end, stream, stream_end, words, words_end;
    int to, from;  // where in a slot this lane copies to, and reads row g from: odd rows' halves change places, for the banks
    Share first, third;

    DEVICE static Share share_of(int warp, int tiles, int pieces) {
        const int from = warp * tiles * pieces / WARPS;
        return {from / pieces, from % pieces, (warp + 1) * tiles * pieces / WARPS - from};
    }
    DEVICE Ring(const Params& p_, const i64* table_, char* slots, int warp_, int lane_)
        : table(table_), p(p_), begin(slots), end(slots + SLOTS * SLOT), slot(slots), fill(slots), next(nullptr), scales(nullptr), four(0),
          there(0), owed(0), run(0), left(0), phase(-1), tile(0), warp(warp_), lane(lane_), g(lane_ / 4), t(lane_ % 4),
          first(share_of(warp_, 2 * C_TILES, H_PIECES)), third(share_of(warp_, S_TILES, D_PIECES)) {
        const int row = lane / 8, chunk = lane % 8;
        to = row * 128 + (chunk ^ (row & 1) * 4) * 16;
        from = g * 128 + (t ^ (g & 1) * 4) * 16;
        const int block = blockIdx.x;
        channels = begin_of(D, block), channels_end = begin_of(D, block + 1);
        stream = begin_of(H, block), stream_end = begin_of(H, block + 1);
        words = begin_of(VOCABULARY, block), words_end = begin_of(VOCABULARY, block + 1);
    }
    // Opens the next tile that has pieces of this warp; after the last one nothing is sent any more.
    DEVICE void advance() {
        int piece = 0;
        tile++;
        while (left == 0) {
            if (++phase >= PHASES) {
                run = 0x7fffffff, there = 0, scales = nullptr;
                return;
            }
            const Share share = phase >= 2 * LAYERS ? share_of(warp, phase == PHASES - 1 ? LAST_TILES : WARPS, H_PIECES)
                                : phase & 1         ? third
                                                    : first;
            tile = share.tile, piece = share.piece, left = share.count;
        }
        const bool head = phase >= 2 * LAYERS, wide = !head && phase & 1;
        run = min(left, (wide ? D_PIECES : H_PIECES) - piece);
        left -= run;
        int row, rows_end;
        const char* weight;
        const float* weight_scales;
        const i64* fields = table + phase / 2 * FIELDS;
        if (head) {
            row = words + ((phase - 2 * LAYERS) * WARPS + tile) * 16, rows_end = words_end;
            weight = p.head, weight_scales = p.head_scales;
        } else if (wide) {
            row = stream + tile * 16, rows_end = stream_end;
            weight = (const char*)fields[OUT], weight_scales = (const float*)fields[OUT_SCALES];
        } else {
            const int half = tile >= C_TILES;
            row = half * D + channels + (tile - half * C_TILES) * 16, rows_end = half * D + channels_end;
            weight = (const char*)fields[IN], weight_scales = (const float*)fields[IN_SCALES];
        }
        const int bytes = wide ? D_BYTES : H_BYTES, mine = row + lane / 8;
        there = rows_end - mine, four = 4 * bytes;
        next = weight + (size_t)mine * bytes + piece * 128 + lane % 8 * 16;
        if constexpr (BITS != 0) {
            const int groups = (wide ? D : H) / (GROUP ? GROUP : 1);
            scales = row + lane < rows_end && lane < 16 ? weight_scales + (size_t)(row + lane) * groups + piece * SCALES : nullptr;
        }
    }
    // The next piece on its way.
    DEVICE void issue() {
        if (run == 0) advance();
        run--;
        char* at = fill + to;
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (there > 4 * i) copy_later<16>(at + i * 512, next + (i64)i * four);
        next += 128;
        if constexpr (BITS != 0)
            if (scales != nullptr) {
                char* row = fill + 2048 + lane * 32;
                copy_later<(SCALES > 4 ? 16 : SCALES * 4)>(row, scales);
                if constexpr (SCALES > 4) copy_later<16>(row + 16, scales + 4);
                scales += SCALES;
            }
        close_group();
        fill = fill + SLOT == end ? begin : fill + SLOT;
    }
    // Up to so many of the pieces owed on their way.
    DEVICE void repay(int most) {
        most = min(most, owed);
        owed -= most;
#pragma unroll 1
        for (; most > 0; most--) issue();
    }
    // total += the oldest piece times the texts' activations in its columns. What is beyond the texts repeats the last and is not read.
    DEVICE void multiply_piece(float (&total)[4], const char* x) {
        wait_groups<SLOTS - 1>();
        __syncwarp();  // other lanes copied what this one reads
        uint4 a[2], c[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const char* at = slot + (from ^ half * 64);
            a[half] = *(const uint4*)at, c[half] = *(const uint4*)(at + 1024);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const char* columns = x + half * PIECE;  // PIECE / 2 columns of 2 bytes
            if constexpr (BITS == 0) {
                const uint4 b = *(const uint4*)(columns + t * 16);
                multiply(total, a[half].x, c[half].x, a[half].y, c[half].y, b.x, b.y);
                multiply(total, a[half].z, c[half].z, a[half].w, c[half].w, b.z, b.w);
            } else {
                const float* low_scale = (const float*)(slot + 2048 + g * 32) + half * (PIECE / 2) / GROUP;
                multiply_integers(total, a[half], c[half], columns, low_scale, low_scale + 64);
            }
        }
        __syncwarp();  // the slot is free
        slot = slot + SLOT == end ? begin : slot + SLOT;
    }
    // The same of 64 bytes of a row in packed integers.
    DEVICE void multiply_integers(
        float (&total)[4], const uint4& a, const uint4& c, const char* x, const float* low_scale, const float* high_scale) {
        const u32 as[4] = {a.x, a.y, a.z, a.w}, cs[4] = {c.x, c.y, c.z, c.w};
        // All of one matrix instruction's columns share a scale: lanes of another group put in zeros.
        constexpr int LANE_GROUPS = (BITS == 8 ? GROUP == 32 : GROUP <= 64) ? 2 : 1;
        constexpr int PART_GROUPS = BITS == 4 && GROUP == 32 ? 2 : 1;
#pragma unroll
        for (int part = 0; part < PART_GROUPS; part++) {
            float sum[LANE_GROUPS][4] = {};
            constexpr int STEPS = (BITS == 8 ? 2 : 4) / PART_GROUPS;
#pragma unroll
            for (int i = part * STEPS; i < (part + 1) * STEPS; i++) {
                // 8 columns of this lane. int8: 8 i on from 16 t. int4: nibble i of 8 words.
                const int k = BITS == 8 ? t * 16 + i * 8 : (t / 2) * 64 + i * 16 + (t & 1) * 8;
                const uint4 b = *(const uint4*)(x + k * 2);
                u32 v[4], w[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    if constexpr (BITS == 8) {
                        v[j] = bytes(as[i * 2 + j / 2], j % 2), w[j] = bytes(cs[i * 2 + j / 2], j % 2);
                    } else {
                        v[j] = nibbles(as[j] >> (4 * i)), w[j] = nibbles(cs[j] >> (4 * i));
                    }
                }
#pragma unroll
                for (int s = 0; s < LANE_GROUPS; s++) {
                    const bool mine = LANE_GROUPS == 1 || t / 2 == s;
                    multiply(sum[s], v[0], w[0], v[1], w[1], mine ? b.x : 0, mine ? b.y : 0);
                    multiply(sum[s], v[2], w[2], v[3], w[3], mine ? b.z : 0, mine ? b.w : 0);
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
    DEVICE static u32 bytes(u32 word, int h) {
        word ^= 0x80808080u;
        const float first = __uint_as_float(0x4b000000u | (word >> (16 * h) & 255)) - 8388736.f;
        const float second = __uint_as_float(0x4b000000u | (word >> (16 * h + 8) & 255)) - 8388736.f;
        return narrow(first, second);
    }
    // This warp's pieces of a phase; sums of 16 rows x 8 texts for each tile that it touches, two at most.
    template <int TILES, int PIECES> DEVICE void products(const char* act, float* part) {
        const Share share = share_of(warp, TILES, PIECES);
        const char* row = act + min(g, ROWS - 1) * ACT_ROW;
        float* to = part + (warp * 32 + g) * 8 + 2 * t;
        const char* x = row + share.piece * (PIECE * 2);
        int rest = share.count, run_here = min(rest, PIECES - share.piece), now = share.count - DEFER;
#pragma unroll 1
        while (rest > 0) {
            rest -= run_here;
            float total[4] = {};
#pragma unroll 1
            for (; run_here > 0; run_here--) {
                multiply_piece(total, x);
                x += PIECE * 2;
                if (now-- > 0)
                    issue();
                else
                    close_group(), owed++;  // an empty group: groups count pieces
            }
            *(float2*)to = make_float2(total[0], total[1]);
            *(float2*)(to + 64) = make_float2(total[2], total[3]);
            to += 128, x = row, run_here = min(rest, PIECES);
        }
    }
};

// The sum over the warps of one row (of 16) of a tile, for one text.
template <int TILES, int PIECES> DEVICE float gathered(const float* part, int tile, int row, int text) {
    float sum = 0.f;
    const float* from = part + row * 8 + text;
    if constexpr (WARPS % TILES == 0) {  // as many warps for each tile
#pragma unroll
        for (int w = 0; w < WARPS / TILES; w++)
            if (PIECES * TILES >= WARPS || (tile * (WARPS / TILES) + w) * TILES * PIECES / WARPS < (tile * (WARPS / TILES) + w + 1) * TILES * PIECES / WARPS)
                sum += from[(tile * (WARPS / TILES) + w) * 256];
    } else {
        const int begin = tile * PIECES, end = begin + PIECES;
#pragma unroll
        for (int j = 0; j <= (WARPS + TILES - 1) / TILES; j++) {
            const int w = tile * WARPS / TILES + j, first = w * TILES * PIECES / WARPS, last = (w + 1) * TILES * PIECES / WARPS;
            if (w < WARPS && first < end && last > begin && first < last) sum += from[(w * 2 + (first < begin)) * 128];
        }
    }
    return sum;
}

struct Meeting {
    u32* counter;
    u32 target;
    // Both are called by all threads of the block; the last warp's first thread speaks for it.
    DEVICE void come() {
        __syncthreads();
        if (threadIdx.x == WORKERS) arrive(counter);
        target += GRID;
    }
    DEVICE void wait() {
        if (threadIdx.x == WORKERS)
            for (u32 looks = 0; (int)(arrived(counter) - target) < 0; looks++)
                if (looks == 1u << 26) give_up();  // after half a minute without a block: an error, not a hang
        __syncthreads();
    }
};

constexpr int ROW_WARPS = WARPS / (ROWS <= 2 ? ROWS : ROWS <= 4 ? 4 : 8);       // that norm one text
constexpr int QUADS = (H / 4 + ROW_WARPS * 32 - 1) / (ROW_WARPS * 32);         // of a lane
constexpr bool SCALE_AHEAD = QUADS <= 4;                                       // its registers suffice for that

// The norm of the stream, or of the tokens' embeddings, into act. Begins before the stream is there, to have the weights in time.
template <typename Wait>
DEVICE void normed(const Params& p, const E* norm, bool embedded, char* memory, int warp, int lane, Wait wait) {
    char* act = memory + AT_ACT;
    float* squares = (float*)(memory + AT_SQUARES);
    const int row = warp / ROW_WARPS, first = (warp % ROW_WARPS * 32 + lane) * 4;
    const bool mine = warp < WARPS && row < ROWS;
    uint2 scale[QUADS];
    float4 x[QUADS];
    if (mine && SCALE_AHEAD)
#pragma unroll
        for (int i = 0; i < QUADS; i++)
            if (first + i * ROW_WARPS * 128 < H) scale[i] = *(const uint2*)(norm + first + i * ROW_WARPS * 128);
    wait();
    if (mine) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            const int k = first + i * ROW_WARPS * 128;
            if (k >= H) continue;
            if (embedded) {
                const uint2 e = *(const uint2*)(p.embeddings + p.tokens[row] * H + k);
                x[i] = make_float4(widen((E)e.x), widen((E)(e.x >> 16)), widen((E)e.y), widen((E)(e.y >> 16)));
            } else {
                x[i] = fresh((const float4*)(p.residual + row * H + k));
            }
        }
#pragma unroll
        for (int i = 0; i < QUADS; i++)
            if (first + i * ROW_WARPS * 128 < H) sum += x[i].x * x[i].x + x[i].y * x[i].y + x[i].z * x[i].z + x[i].w * x[i].w;
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane == 0) squares[warp] = sum;
    }
    __syncthreads();
    if (mine) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < ROW_WARPS; i++) sum += squares[row * ROW_WARPS + i];
        const float r = rsqrtf(sum / H + __uint_as_float((u32)p.eps));
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            const int k = first + i * ROW_WARPS * 128;
            if (k >= H) continue;
            const uint2 w = SCALE_AHEAD ? scale[i] : *(const uint2*)(norm + k);
            const u32 low = narrow(x[i].x * r * widen((E)w.x), x[i].y * r * widen((E)(w.x >> 16)));
            const u32 high = narrow(x[i].z * r * widen((E)w.y), x[i].w * r * widen((E)(w.y >> 16)));
            *(uint2*)(act + row * ACT_ROW + k * 2) = make_uint2(low, high);
        }
    }
    __syncthreads();
}

// A layer's small weights of the block's channels on their way, by one warp.
DEVICE void send_small(const i64* fields, char* small, int first, int count, int lane) {
    const E* x_proj = (const E*)fields[X_PROJ];
    constexpr int CHUNKS = X_COLUMNS / 8;
    const int before = first % 8, chunks = (before + count + 7) / 8;
#pragma unroll 4
    for (int i = lane; i < R * CHUNKS; i += 32) {
        const int r = i / CHUNKS, q = i % CHUNKS;
        if (q < chunks) copy_later<16>(small + r * X_ROW + q * 16, x_proj + (size_t)r * D + first - before + q * 8);
    }
    const E* dt = (const E*)fields[DT_PROJ] + (size_t)first * RANK;
#pragma unroll 4
    for (int i = lane; i < count * RANK / 8; i += 32) copy_later<16>(small + SMALL_DT + i * 16, dt + i * 8);
    const char* a = (const char*)fields[A_LOG] + (size_t)first * N * A_BYTES;
#pragma unroll 2
    for (int i = lane; i < count * N * A_BYTES / 16; i += 32) copy_later<16>(small + SMALL_A + i * 16, a + i * 16);
    close_group();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_step(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char memory[];
    i64* table = (i64*)memory;
    char* act = memory + AT_ACT;
    float* part = (float*)(memory + AT_PART);
    E* u = (E*)(memory + AT_U);                  // [text of 8][channel + before], others 0
    float* z = (float*)(memory + AT_Z);          // [text][channel]
    float* delta = (float*)(memory + AT_DELTA);  // [channel][text of 8]
    E* dt = (E*)(memory + AT_DT);                // [text][rank]
    float* bc = (float*)(memory + AT_BC);        // [text][B, C]
    float* own = (float*)(memory + AT_OWN);      // [row of the stream][text]
    u64* best = (u64*)(memory + AT_BEST);

    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const bool works = warp < WARPS;
    for (int i = tid; i < LAYERS * FIELDS; i += THREADS) table[i] = p.layers[i];
    for (int i = tid; i < 8 * U_ROW; i += THREADS) u[i] = 0;
    for (int i = tid; i < BUFFERS * SMALL / 4; i += THREADS) ((u32*)(memory + AT_SMALL))[i] = 0;  // x_proj's other columns
    if (tid < ROWS) best[tid] = 0;
    Meeting meeting = {p.counter, p.counter[32]};
    const int from = TRIAL ? (int)*p.from : 0;
    __syncthreads();

    Ring ring(p, table, memory + AT_RING + (works ? warp : 0) * SLOTS * SLOT, warp, lane);
    const int first = ring.channels, count = ring.channels_end - first, before = first % 8;
    const int stream = ring.stream, stream_count = ring.stream_end - stream;
    if (works)
#pragma unroll 1
        for (int i = 0; i < SLOTS; i++) ring.issue();
    else
        send_small(table, memory + AT_SMALL, first, count, lane);
    for (int i = tid; i < stream_count * ROWS; i += THREADS)
        own[i] = widen(p.embeddings[p.tokens[i % ROWS] * H + stream + i / ROWS]);

    Stopwatch watch;
#ifdef CLOCK
    watch.since = clock();
#endif
#pragma unroll 1
    for (int layer = 0; layer < LAYERS; layer++) {
        const i64* fields = table + layer * FIELDS;
        const char* small = memory + AT_SMALL + (BUFFERS == 2 ? (layer & 1) * SMALL : 0);
        u64* sums = p.sums + (layer & 1) * COPIES * ROWS * R;

        // First. What does not depend on the stream is asked for beforehand.
        constexpr int CONVOLVED = (ROWS * CHANNELS + WORKERS - 1) / WORKERS;  // channels of a text, of each thread
        float taps[CONVOLVED][WIDTH], window[CONVOLVED][WIDTH - 1], conv_bias[CONVOLVED], x_bias[CONVOLVED], z_bias[CONVOLVED];
#pragma unroll
        for (int i = 0; i < CONVOLVED; i++) {
            const int item = tid + i * WORKERS, text = item / CHANNELS, c = item % CHANNELS;
            conv_bias[i] = x_bias[i] = z_bias[i] = 0.f;
            if (!works || text >= ROWS || c >= count) continue;
            const size_t place = ((size_t)(layer * STATES + (TRIAL ? from : text)) * D + first + c) * (WIDTH - 1);
#pragma unroll
            for (int j = 0; j < WIDTH; j++) taps[i][j] = widen(((const E*)fields[CONV])[(first + c) * WIDTH + j]);
#pragma unroll
            for (int j = 0; j < WIDTH - 1; j++) {
                const int past = TRIAL ? text + j : j;  // beyond the state: an input on trial, known later
                if (past < WIDTH - 1)
                    window[i][j] = CONV_FLOAT ? ((const float*)p.conv_states)[place + past] : widen(((const E*)p.conv_states)[place + past]);
            }
            if (fields[CONV_BIAS]) conv_bias[i] = widen(((const E*)fields[CONV_BIAS])[first + c]);
            if (fields[IN_BIAS]) {
                x_bias[i] = widen(((const E*)fields[IN_BIAS])[first + c]);
                z_bias[i] = widen(((const E*)fields[IN_BIAS])[D + first + c]);
            }
        }
        normed(p, (const E*)fields[NORM], layer == 0, memory, warp, lane, [&] {
            if (layer > 0) meeting.wait();
            ring.repay(1);
        });
        watch.mark(DID_NORM);
        ring.repay(SLOTS);
        if (works) {
            ring.products<2 * C_TILES, H_PIECES>(act, part);
        } else {  // this layer's small weights are here; the next layer's come until then
            wait_groups<0>();
            if (BUFFERS == 2 && layer + 1 < LAYERS)
                send_small(fields + FIELDS, memory + AT_SMALL + (~layer & 1) * SMALL, first, count, lane);
        }
        __syncthreads();
        watch.mark(DID_IN_PROJ);
        if (TRIAL) {  // the convolution of one token needs those of the tokens before it: [channel][token of 8]
#pragma unroll
            for (int i = 0; i < CONVOLVED; i++) {
                const int item = tid + i * WORKERS, text = item / CHANNELS, c = item % CHANNELS;
                if (!works || text >= ROWS || c >= count) continue;
                delta[c * 8 + text] = rounded(gathered<2 * C_TILES, H_PIECES>(part, c / 16, c % 16, text) + x_bias[i]);
            }
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < CONVOLVED; i++) {
            const int item = tid + i * WORKERS, text = item / CHANNELS, c = item % CHANNELS, tile = c / 16, row = c % 16;
            if (!works || text >= ROWS || c >= count) continue;
            const int slot = TRIAL ? (from + 1 + text) % STATES : text;
            const size_t place = ((size_t)(layer * STATES + slot) * D + first + c) * (WIDTH - 1);
            if (TRIAL)
#pragma unroll
                for (int j = 0; j < WIDTH - 1; j++)
                    if (text + j >= WIDTH - 1) window[i][j] = delta[c * 8 + text + j - (WIDTH - 1)];
            const float x = TRIAL ? delta[c * 8 + text] : rounded(gathered<2 * C_TILES, H_PIECES>(part, tile, row, text) + x_bias[i]);
            z[text * CHANNELS + c] = rounded(gathered<2 * C_TILES, H_PIECES>(part, tile + C_TILES, row, text) + z_bias[i]);
            float y = x * taps[i][WIDTH - 1] + conv_bias[i];
#pragma unroll
            for (int j = 0; j < WIDTH - 1; j++) {
                y += window[i][j] * taps[i][j];
                const float next = j + 2 < WIDTH ? window[i][j + 1 < WIDTH - 1 ? j + 1 : j] : x;
                if (CONV_FLOAT)
                    ((float*)p.conv_states)[place + j] = next;
                else
                    ((E*)p.conv_states)[place + j] = (E)narrow(next, 0.f);
            }
            u[text * U_ROW + before + c] = (E)narrow(silu(y), 0.f);
        }
        __syncthreads();
        watch.mark(DID_CONV);
        if (works)
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
                    multiply(total, a.x, d.x, a.y, d.y, b.x, b.y);
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int r = i < 2 ? low : high, b = 2 * ring.t + i % 2;
                    if (r < R && b < ROWS) atomicAdd(sums + (blockIdx.x % COPIES * ROWS + b) * R + r, (u64)__float2ll_rn(total[i] * 68719476736.f));
                }
            }
        watch.mark(DID_X_PROJ);
        meeting.come();
        ring.repay(1);

        // Second.
        // Four states of a channel and text each; of tokens on trial, one after the other.
        constexpr int TEXTS = TRIAL ? 1 : ROWS, ITEMS = (TEXTS * CHANNELS * 4 + WORKERS - 1) / WORKERS;
        float4 states[ITEMS];
        float4* states_at[ITEMS];
        float step_bias[ITEMS], skip[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int item = tid + i * WORKERS, quad = item & 3, channel = item / 4 % CHANNELS, b = item / 4 / CHANNELS;
            states_at[i] = nullptr;
            if (works && b < TEXTS && channel < count) {
                states_at[i] = (float4*)(p.ssm_states + ((size_t)(layer * STATES + (TRIAL ? from : b)) * D + first + channel) * N) + quad;
                states[i] = *states_at[i];
                step_bias[i] = scan_weight(fields[DT_BIAS], first + channel);
                skip[i] = scan_weight(fields[SKIP], first + channel);
            }
        }
        meeting.wait();
        ring.repay(1);
        watch.mark(DID_MEET);
        if (works)
#pragma unroll 1
            for (int i = tid; i < ROWS * R; i += WORKERS) {
                const int b = i / R, r = i % R;
                u64 sum = 0;
#pragma unroll
                for (int copy = 0; copy < COPIES; copy++) sum += fresh(sums + copy * ROWS * R + i);
                const float v = (float)(i64)sum * (1.f / 68719476736.f);
                if (r < RANK)
                    dt[b * DT_ROW + r] = (E)narrow(v, 0.f);
                else
                    bc[b * 2 * N + r - RANK] = rounded(v);
            }
        __syncthreads();
        if (warp < C_TILES) {
            float total[4] = {};
            const E* weight = (const E*)(small + SMALL_DT) + (warp * 16 + ring.g) * RANK + ring.t * 4;
            const E* x = dt + ring.g * DT_ROW + ring.t * 4;
#pragma unroll
            for (int k = 0; k < RANK; k += 16) {
                const uint2 a = *(const uint2*)(weight + k), d = *(const uint2*)(weight + 8 * RANK + k);
                const uint2 b = ring.g < ROWS ? *(const uint2*)(x + k) : make_uint2(0, 0);
                multiply(total, a.x, d.x, a.y, d.y, b.x, b.y);
            }
            float* to = delta + (warp * 16 + ring.g) * 8 + 2 * ring.t;
            *(float2*)to = make_float2(total[0], total[1]);
            *(float2*)(to + 64) = make_float2(total[2], total[3]);
        }
        __syncthreads();
        watch.mark(DID_STEP);
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int item = tid + i * WORKERS, quad = item & 3, channel = item / 4 % CHANNELS;
            float h[4] = {states[i].x, states[i].y, states[i].z, states[i].w}, a[4] = {};
            if (states_at[i] != nullptr) {
                if (SCAN_FLOAT) {
                    const float4 v = *(const float4*)(small + SMALL_A + (channel * N + quad * 4) * 4);
                    a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
                } else {
                    const uint2 v = *(const uint2*)(small + SMALL_A + (channel * N + quad * 4) * 2);
                    a[0] = widen((E)v.x), a[1] = widen((E)(v.x >> 16)), a[2] = widen((E)v.y), a[3] = widen((E)(v.y >> 16));
                }
#pragma unroll
                for (int j = 0; j < 4; j++) a[j] = -1.4426950408889634f * expf(a[j]);
            }
#pragma unroll
            for (int token = 0; token < (TRIAL ? ROWS : 1); token++) {
                const int b = TRIAL ? token : item / 4 / CHANNELS;
                float sum = 0.f, x = 0.f;
                if (states_at[i] != nullptr) {
                    x = widen(u[b * U_ROW + before + channel]);
                    float d = rounded(delta[channel * 8 + b]) + step_bias[i];
                    d = d > 20.f ? d : log1pf(expf(d));
                    const float* B = bc + b * 2 * N + quad * 4;
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        h[j] = ex2(d * a[j]) * h[j] + d * x * B[j];
                        sum += h[j] * B[N + j];
                    }
                    const i64 on = TRIAL ? ((from + 1 + token) % STATES - from) * (i64)(D * N / 4) : 0;
                    states_at[i][on] = make_float4(h[0], h[1], h[2], h[3]);
                }
                sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                if (states_at[i] != nullptr && quad == 0)
                    p.y[(size_t)b * D + first + channel] = (E)narrow((sum + skip[i] * x) * silu(z[b * CHANNELS + channel]), 0.f);
            }
        }
        watch.mark(DID_SCAN);
        meeting.come();
        ring.repay(1);

        // Third. The sums of the next layer's first part must be zero by then: those of the layer before were read by all.
        meeting.wait();
        watch.mark(DID_MEET_AGAIN);
        if (!works) {
            if (BUFFERS == 1 && layer + 1 < LAYERS) send_small(fields + FIELDS, memory + AT_SMALL, first, count, lane);
#pragma unroll 1
            for (int i = blockIdx.x * 32 + lane; i < COPIES * ROWS * R; i += GRID * 32) p.sums[(~layer & 1) * COPIES * ROWS * R + i] = 0;
        }
        if (works) {
            constexpr int VECTORS = (ROWS * (D / 8) + WORKERS - 1) / WORKERS, TOGETHER = VECTORS < 4 ? VECTORS : 4;
#pragma unroll TOGETHER
            for (int v = 0; v < VECTORS; v++) {
                const int i = tid + v * WORKERS, b = i / (D / 8), k = i % (D / 8);
                if (i < ROWS * (D / 8)) *(uint4*)(act + b * ACT_ROW + k * 16) = fresh((const uint4*)(p.y + (size_t)b * D) + k);
            }
        }
        ring.repay(SLOTS);
        __syncthreads();
        if (works) ring.products<S_TILES, D_PIECES>(act, part);
        __syncthreads();
        watch.mark(DID_OUT_PROJ);
#pragma unroll 1
        for (int i = tid; i < ROWS * STREAM; i += THREADS) {
            const int b = i / STREAM, r = i % STREAM;
            if (r >= stream_count) continue;
            float v = gathered<S_TILES, D_PIECES>(part, r / 16, r % 16, b);
            if (fields[OUT_BIAS]) v += widen(((const E*)fields[OUT_BIAS])[stream + r]);
            v = own[r * ROWS + b] += rounded(v);
            p.residual[(size_t)b * H + stream + r] = v;
        }
        watch.mark(DID_SUM);
        meeting.come();
        ring.repay(1);
    }

    // The head. The last layer's sums are no longer read.
    normed(p, p.final_norm, LAYERS == 0, memory, warp, lane, [&] {
        if (LAYERS > 0) meeting.wait();
    });
    for (int i = blockIdx.x * THREADS + tid; i < COPIES * ROWS * R; i += GRID * THREADS) p.sums[(~LAYERS & 1) * COPIES * ROWS * R + i] = 0;
    const int words = ring.words, words_count = ring.words_end - words;
#pragma unroll 1
    for (int round = 0; round < ROUNDS; round++) {
        const bool last = round == ROUNDS - 1;
        ring.repay(SLOTS);
        if (works) {
            if (last)
                ring.products<LAST_TILES, H_PIECES>(act, part);
            else
                ring.products<WARPS, H_PIECES>(act, part);
        }
        __syncthreads();
        if (works)
#pragma unroll 1
            for (int i = tid; i < ROWS * WARPS * 16; i += WORKERS) {
                const int b = i / (WARPS * 16), row = i % (WARPS * 16), word = round * WARPS * 16 + row;
                u64 key = 0;
                if (word < words_count) {
                    const float v = rounded(
                        last ? gathered<LAST_TILES, H_PIECES>(part, row / 16, row % 16, b)
                             : gathered<WARPS, H_PIECES>(part, row / 16, row % 16, b));
                    p.logits[(size_t)b * VOCABULARY + words + word] = v;
                    const u32 bits = __float_as_uint(v + 0.f);  // -0 and 0 are equal
                    // The order of floats as the order of integers; of equal ones the first word.
                    key = (u64)(bits & 0x80000000u ? ~bits : bits | 0x80000000u) << 32 | (u32) ~(words + word);
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
    watch.mark(DID_HEAD);
    if (p.choose) {
        if (tid < ROWS) atomicMax(p.best + tid, best[tid]);
        meeting.come();
        if (blockIdx.x == 0) meeting.wait();
    }
    if (blockIdx.x == 0 && warp == 0) {
        const i64 at = *p.position;
        if (p.choose && tid < ROWS) {
            const i64 token = (u32) ~(u32)fresh(p.best + tid);
            p.tokens[tid] = token;
            if (at < p.capacity) p.history[tid * p.capacity + at] = token;
            p.best[tid] = 0;
        }
        __syncwarp();
        if (tid == 0) *p.position = at + 1, p.counter[32] = meeting.target;
    }
#ifdef CLOCK
    if (blockIdx.x == CLOCK && tid == 0)
        for (int i = 0; i < PARTS; i++) p.cycles[i] = watch.spent[i];
#endif
}
