// One token through a whole Mamba model in one kernel: a block stays on each multiprocessor, and the blocks exchange values three
// times a layer. Compiled at run time; the macros come from cuda_persistent.py.
//
//   DTYPE 1 bfloat16, 2 float16: weights and activations      BITS 0: the large weights too; 8 or 4: packed integers, GROUP
//   ROWS 1 to 8 texts; GRID blocks; H, D, RANK, WIDTH, VOCABULARY, LAYERS: the model's; 16 states
//   TRIAL 1: the rows are the next tokens of one text, on trial. The state before them is in slot `from` of ROWS + 1; the state after
//     each of them goes into the slots that follow, round and round, so that keeping some is naming another slot
//   WARPS, 4 to 16, that work; CLOCK, where a benchmark asks which part takes how long
//   SCAN_FLOAT: 1 where A_log, D and dt_proj's bias are float32; CONV_FLOAT: 1 where the convolution's windows are
//   SLOTS of each warp's ring, the last DEFER of a phase filled again one by one, PACE cycles apart; BUFFERS, 1 or 2, of small weights; SHARED bytes
//
// The channels, the rows of the residual stream and the vocabulary are dealt out to the blocks. A layer is
//
//   first    with the whole stream, every block forms x and z of its channels (in_proj), convolves, and adds its channels' share
//            of x_proj to the sums of all blocks
//   second   dt_proj, the state and the gate of its channels: y
//   third    with all of y, out_proj's rows of the stream
//
// Values are their own flags, and nothing is fenced on the way. A place where a value will be holds SILENCE, a NaN that no computation
// gives, and who needs it looks until something else is there; a sum of all blocks carries in its last byte how many have added to
// it. (Of x_proj's sums, which are many, a count of the blocks says when looking is worth it.) Who passes an exchange knows that all have passed the one before. So once y is whole, the
// layer's stream and sums and the y before it have been read by all, and are silenced again, two layers before their places are
// used anew. Only these silences are fenced, by a warp that waits for nothing else.
//
// The stream is handed over times the norm's weight and the layer before's 1 / rms, which keeps it in range; the sums of in_proj
// are multiplied by what the right 1 / rms is of that one. Its sum of squares comes besides, one sum of all blocks for a text.
//
// Weights never wait for that. Each warp knows all the pieces of weights that it will multiply, in order to the end of the step, and
// keeps a ring of them on their way into shared memory: a piece is 128 bytes, a whole line, of 16 rows. So the memory
// works on while blocks wait for each other. But what blocks tell each other queues behind the weights that are on their
// way: towards the end of a phase slots are left free, and filled when the block has what it waited for. A piece is multiplied on
// the tensor cores as 16 rows by as many columns by 8 texts; within a piece the columns may come in any order, as long as the activations
// come in the same. The last warp has no pieces: it listens to the sums of squares, silences places and fetches the small weights of the
// next layer.
//
// Every sum has a fixed order, or is of integers (x_proj's: fixed point of 2^-32, up to 2^23): same inputs, same bits, whatever the other rows hold.

#include "primitives.cuh"

typedef unsigned short E;               // bits of the dtype
constexpr u32 SILENCE = 0xffffffffu;    // where no value is yet, a NaN in each half; computed NaNs are positive
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
constexpr int RUNS = 4 + 2 * ROUNDS + 1;  // of a warp, two at most of a phase: a layer's, the head's, and one that has no end
constexpr int FIELDS = 14;
constexpr int SLICES = 8;  // of a token's embedding, each summed by a warp
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
constexpr int AT_RUNS = up((LAYERS + 1) * FIELDS * 8);
constexpr int AT_ACT = AT_RUNS + up(WARPS * RUNS * 32);
constexpr int AT_PART = AT_ACT + up(ROWS * ACT_ROW);
constexpr int AT_SMALL = AT_PART + WARPS * 2 * 16 * 8 * 4;
constexpr int AT_U = AT_SMALL + BUFFERS * SMALL;
constexpr int AT_Z = AT_U + up(8 * U_ROW * 2);
constexpr int AT_DELTA = AT_Z + up(ROWS * CHANNELS * 4);
constexpr int AT_DT = AT_DELTA + up(C_TILES * 16 * 8 * 4);
constexpr int AT_BC = AT_DT + up(8 * DT_ROW * 2);
constexpr int AT_OWN = AT_BC + up(ROWS * 2 * N * 4);
constexpr int AT_SQUARES = AT_OWN + up(STREAM * ROWS * 4);
constexpr int AT_RATE = AT_SQUARES + up(ROWS * SLICES * 4);
constexpr int AT_BEST = AT_RATE + up(ROWS * 8);
constexpr int AT_MET = AT_BEST + up(ROWS * 8);
constexpr int AT_RING = AT_MET + up(4);
static_assert(AT_RING + WARPS * SLOTS * SLOT == SHARED, "cuda_persistent.py counts the shared memory otherwise");
static_assert(C_TILES * 2 <= WARPS && S_TILES <= WARPS, "a phase has more tiles than a warp's two sums allow");
static_assert((GRID + COPIES - 1) / COPIES < 256, "a byte does not count the blocks that add to a sum");
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
    E* stream;      // (4, rows, h): of layers by turns, of the head by turns of steps; silent between steps, but the head's last
    u64* squares;   // (4, rows, 16), the first of 16: likewise, zero where the stream is silent
    E* y;           // (2, rows, d): silent between steps
    u64* sums;      // (2, COPIES, rows, r): zero between steps
    u64* best;      // (rows,): zero between steps
    u32* counter;   // [0] arrivals, [32] arrivals at the step's start, [33] steps
    const i64* slot;  // with TRIAL: of the state before the first token
    i64 eps_bits;     // of a float
    i64 capacity;
    i64 choose;
    u32* cycles;  // (PARTS,) of one block, added up over the layers; read by benchmarks, with CLOCK
};

// With CLOCK: the time of block CLOCK's first thread, by what it did until the mark.
enum { DID_STREAM, DID_IN_PROJ, DID_CONV, DID_X_PROJ, DID_MEET, DID_STEP, DID_SCAN, DID_MEET_AGAIN, DID_OUT_PROJ, DID_SUM, DID_HEAD, PARTS };
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

DEVICE float over_warp(float sum) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
}
DEVICE float rounded(float x) { return widen((E)narrow(x, 0.f)); }
DEVICE float silu(float x) { return quotient(x, 1.f + ex2(-1.4426950408889634f * x)); }
DEVICE float scan_weight(i64 weights, int i) { return SCAN_FLOAT ? ((const float*)weights)[i] : widen(((const E*)weights)[i]); }
DEVICE int begin_of(int total, int block) { return (int)((i64)total * block / GRID); }

// A warp's part of a phase: where it begins, and how many pieces; of two tiles at most.
struct Share { int tile, piece, count; };
DEVICE Share share_of(int warp, int tiles, int pieces) {
    const int from = warp * tiles * pieces / WARPS;
    return {from / pieces, from % pieces, (warp + 1) * tiles * pieces / WARPS - from};
}

// Pieces that follow each other in 16 rows of a weight.
struct alignas(16) Run {
    int row, rows;     // the first, and how many there are of it and those after it
    int pieces;        // how many
    int field, begin;  // of the layer's table, and the first piece
};
static_assert(sizeof(Run) == 32, "cuda_persistent.py counts the shared memory otherwise");

// What a warp multiplies in every layer, then of the head, then nothing; returns how many runs are a layer's.
DEVICE int plan_runs(Run* runs, int warp, int lane) {
    const int block = blockIdx.x;
    int planned = 0, of_layer = 0;
#pragma unroll 1
    for (int begin = 0; begin < RUNS; begin += 32) {
        const int i = begin + lane, second = i & 1, round = (i - 4) / 2;
        Run run = {0, 0, 0, IN, 0};
        if (i == RUNS - 1) {
            run.pieces = 0x7fffffff;
        } else if (i < RUNS) {
            const bool head = i >= 4, wide = i / 2 == 1;
            const int tiles = head ? round == ROUNDS - 1 ? LAST_TILES : WARPS : wide ? S_TILES : 2 * C_TILES, pieces = wide ? D_PIECES : H_PIECES;
            const Share share = share_of(warp, tiles, pieces);
            const int before = min(share.count, pieces - share.piece), tile = share.tile + second;
            const int total = head ? VOCABULARY : wide ? H : D, half = !head && !wide && tile >= C_TILES;
            const int first = begin_of(total, block) + (head ? round * WARPS * 16 : 0) + (tile - half * C_TILES) * 16;
            run.row = half * D + first, run.rows = begin_of(total, block + 1) - first;
            run.pieces = second ? share.count - before : before;
            run.field = wide ? OUT : IN, run.begin = second ? 0 : share.piece;
        }
        const u32 some = __ballot_sync(0xffffffffu, run.pieces > 0);
        if (run.pieces > 0) runs[planned + __popc(some & ((1u << lane) - 1))] = run;
        planned += __popc(some);
        if (begin == 0) of_layer = __popc(some & 15);
    }
    __syncwarp();
    return of_layer;
}

// The pieces of weights of one warp, from the first to the last of the step.
struct Ring {
    const i64 *fields, *head;         // of the layer of the next run, and of the head
    const Run *runs, *run_next, *runs_end;  // of a layer
    char *begin, *end, *slot, *fill;  // the slots: of the oldest piece, and where the next one goes
    const char* next;                 // this lane's 16 bytes of the next piece: it copies one of every 4 rows
    const float* scales;              // of the row that this lane fetches the scales of
    int four;                         // bytes from a row to the fourth after it
    int there;                        // rows of the open run, less this lane's first
    int owed;                         // pieces used whose places are still free
    u32 paid;                         // when the last of those was sent
    int left;                         // pieces still to send of the open run
    int warp, lane, g, t;
    int to, from;  // where in a slot this lane copies to, and reads row g from: odd rows' halves change places, for the banks

    DEVICE Ring(const i64* table, const Run* runs_, int of_layer, char* slots, int warp_, int lane_)
        : fields(of_layer ? table : table + LAYERS * FIELDS), head(table + LAYERS * FIELDS), runs(runs_), run_next(runs_), runs_end(runs_ + of_layer), begin(slots),
          end(slots + SLOTS * SLOT), slot(slots), fill(slots), next(nullptr), scales(nullptr), four(0), there(0), owed(0), paid(0), left(0),
          warp(warp_), lane(lane_), g(lane_ / 4), t(lane_ % 4) {
        const int row = lane / 8, chunk = lane % 8;
        to = row * 128 + (chunk ^ (row & 1) * 4) * 16;
        from = g * 128 + (t ^ (g & 1) * 4) * 16;
    }
    // Opens the next run. After the last one nothing is sent any more.
    DEVICE void advance() {
        const Run run = *run_next++;
        const bool wide = run.field == OUT;
        const int bytes = wide ? D_BYTES : H_BYTES;
        left = run.pieces, there = run.rows - lane / 8, four = 4 * bytes;
        next = (const char*)fields[run.field] + (size_t)(run.row + lane / 8) * bytes + run.begin * 128 + lane % 8 * 16;
        if constexpr (BITS != 0) {
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
    // The next piece on its way.
    DEVICE void issue() {
        if (left == 0) advance();
        left--;
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
        if (DEFER == 0) return;
        most = min(most, owed);
        owed -= most;
#pragma unroll 1
        for (; most > 0; most--) issue();
    }
    // One of the pieces owed on its way, if the last such is long enough ago. Faster, they would only queue at the memory, and what
    // the blocks tell each other behind them.
    DEVICE void pace() {
        if (DEFER == 0 || owed == 0 || (u32)clock() - paid < PACE) return;
        paid = (u32)clock();
        repay(1);
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

constexpr u32 MOST_LOOKS = 1u << 25;  // about half a minute without another block: an error, not a hang

// Repeats look(), which says whether all is there. With a ring, by a whole warp: its weights go on coming meanwhile.
template <typename Look> DEVICE void listen(Look look) {
    for (u32 looks = 0; !look(); looks++) {
        if (looks == MOST_LOOKS) give_up();
        let_others_go();
    }
}
template <typename Look> DEVICE void listen(Ring& ring, Look look) {
    for (u32 looks = 0; !__all_sync(0xffffffffu, look()); looks++) {
        if (looks == MOST_LOOKS) give_up();
        ring.pace();
        let_others_go();
    }
}

// A count of the blocks that have come so far. It promises nothing about what they wrote.
struct Meeting {
    u32* counter;
    volatile u32* met;  // shared: the last target that was reached
    u32 target;
    // By all threads of the block; the last warp's first thread counts and listens for it.
    DEVICE void come() {
        __syncthreads();
        if (threadIdx.x == WORKERS) arrive(counter);
        target += GRID;
    }
    DEVICE void wait(Ring& ring) {
        if (threadIdx.x == WORKERS) {
            listen([&] { return (int)(arrived(counter) - target) >= 0; });
            *met = target;
        }
        __syncwarp();
        listen(ring, [&] { return *met == target; });
    }
};

// Whether none of a word's halves is silent (all ones).
DEVICE u32 silent_halves(u32 word) { return (~word - 0x00010001u) & word & 0x80008000u; }
DEVICE bool whole(const uint4& v) {
    return (silent_halves(v.x) | silent_halves(v.y) | silent_halves(v.z) | silent_halves(v.w)) == 0;
}

// What the blocks hand over, (ROWS, WIDTH_OF) numbers of the dtype, into act; by the workers.
template <int WIDTH_OF> DEVICE void receive(Ring& ring, char* act, const E* from, int tid) {
    constexpr int ROW = WIDTH_OF / 8, ALL = ROWS * ROW, EACH = (ALL + WORKERS - 1) / WORKERS, TOGETHER = EACH < 8 ? EACH : 8;
    if (EACH > 2) {  // looking for all of it again and again would be in the way of those who write
        const uint4* at = (const uint4*)from + tid;
        listen(ring, [&] { return whole(heard(at)); });
    }
#pragma unroll 1
    for (int begin = 0; begin < EACH; begin += TOGETHER) {
        uint4 got[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) got[i] = make_uint4(SILENCE, 0, 0, 0);
        listen(ring, [&] {
            bool all = true;
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                const int at = tid + (begin + i) * WORKERS;
                if (at < ALL && !whole(got[i])) got[i] = heard((const uint4*)from + at);
            }
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) all &= tid + (begin + i) * WORKERS >= ALL || whole(got[i]);
            return all;
        });
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int at = tid + (begin + i) * WORKERS;
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
        const int text = task / SLICES, begin = task % SLICES * SLICE;
        const E* embedding = p.embeddings + p.tokens[text] * H;
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int k = lane + i * 32;
            if (k >= SLICE) continue;
            const float x = widen(embedding[begin + k]);
            sum += x * x;
            *(E*)(memory + AT_ACT + text * ACT_ROW + (begin + k) * 2) = (E)narrow(x * widen(norm[begin + k]), 0.f);
        }
        sum = over_warp(sum);
        if (lane == 0) squares[task] = sum;
    }
}
constexpr float SQUARE = 262144.f;  // fixed point of the sums of squares, of a stream with an rms near 1

// From the sums of squares of the stream as it was handed over: the norm's 1 / rms of it, and of what it was before that. One warp.
DEVICE void rate_texts(const Params& p, const u64* squares, float* rate, float* scale, int lane) {
    u64 sum = 0;
    if (lane < ROWS) listen([&] { return ((sum = heard(squares + lane * 16)) & 255) == GRID % 256; });
    if (lane < ROWS) {
        const float before = rate[lane], mean = (float)(sum >> 8) * (1.f / (SQUARE * H));
        scale[lane] = rsqrtf(mean + __uint_as_float((u32)p.eps_bits) * before * before), rate[lane] = before * scale[lane];
    }
    __syncwarp();
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

// The block's places of a layer's stream and of a y, silent again; by one warp.
DEVICE void silence(const Params& p, int stream_of, int y_of, int stream, int stream_count, int first, int count, int lane) {
#pragma unroll 1
    for (int b = 0; b < ROWS; b++) {
#pragma unroll 1
        for (int r = lane; r < stream_count; r += 32) p.stream[(stream_of * ROWS + b) * H + stream + r] = (E)SILENCE;
#pragma unroll 1
        for (int c = lane; c < count; c += 32) p.y[(y_of * ROWS + b) * D + first + c] = (E)SILENCE;
    }
    if (blockIdx.x == 0 && lane < ROWS) p.squares[(stream_of * ROWS + lane) * 16] = 0;
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
    float* own = (float*)(memory + AT_OWN);      // [text][row of the stream]
    float* rate = (float*)(memory + AT_RATE);    // [text]: the norm's 1 / rms
    float* scale = rate + ROWS;                  // [text]: what it is of the one that the stream was handed over with
    u64* best = (u64*)(memory + AT_BEST);

    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const bool works = warp < WARPS;
    for (int i = tid; i < LAYERS * FIELDS; i += THREADS) table[i] = p.layers[i];
    if (tid == 0) table[LAYERS * FIELDS + IN] = (i64)p.head, table[LAYERS * FIELDS + IN_SCALES] = (i64)p.head_scales;
    for (int i = tid; i < 8 * U_ROW; i += THREADS) u[i] = 0;
    for (int i = tid; i < BUFFERS * SMALL / 4; i += THREADS) ((u32*)(memory + AT_SMALL))[i] = 0;  // x_proj's other columns
    if (tid < ROWS) best[tid] = 0;
    if (tid == 0) *(u32*)(memory + AT_MET) = p.counter[32];
    Meeting sums_there = {p.counter, (volatile u32*)(memory + AT_MET), p.counter[32]};
    const u32 turn = 2 + (p.counter[33] & 1);
    const int from = TRIAL ? (int)*p.slot : 0;
    __syncthreads();

    Run* runs = (Run*)(memory + AT_RUNS) + (works ? warp : 0) * RUNS;
    Ring ring(table, runs, works ? plan_runs(runs, warp, lane) : 0, memory + AT_RING + (works ? warp : 0) * SLOTS * SLOT, warp, lane);
    const int first = begin_of(D, blockIdx.x), count = begin_of(D, blockIdx.x + 1) - first, before = first % 8;
    const int stream = begin_of(H, blockIdx.x), stream_count = begin_of(H, blockIdx.x + 1) - stream;
    if (works)
#pragma unroll 1
        for (int i = 0; i < SLOTS; i++) ring.issue();
    else
        send_small(table, memory + AT_SMALL, first, count, lane);
#pragma unroll 1
    for (int i = tid; i < STREAM * ROWS; i += THREADS) {
        const int b = i / STREAM, r = i % STREAM;
        if (r >= stream_count) continue;
        own[i] = widen(p.embeddings[p.tokens[b] * H + stream + r]);
        p.stream[((turn ^ 1) * ROWS + b) * H + stream + r] = (E)SILENCE;  // the head's place of the step before
    }
    if (blockIdx.x == 0 && tid < ROWS) p.squares[((turn ^ 1) * ROWS + tid) * 16] = 0;

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
        // The states that the second part moves, as far as the second-level cache.
        constexpr int TEXTS = TRIAL ? 1 : ROWS, ITEMS = (TEXTS * CHANNELS * 4 + WORKERS - 1) / WORKERS;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int item = tid + i * WORKERS, channel = item / 4 % CHANNELS, b = item / 4 / CHANNELS;
            if (item % 2 != 0 || !works || b >= TEXTS || channel >= count) continue;
            ask(p.ssm_states + ((size_t)(layer * STATES + (TRIAL ? from : b)) * D + first + channel) * N + item % 4 * 4);
        }
        if (lane == 0 && warp == 0) {
            ask((const char*)fields[DT_BIAS] + first * A_BYTES), ask((const char*)fields[SKIP] + first * A_BYTES);
            ask((const char*)fields[DT_BIAS] + (first + count - 1) * A_BYTES), ask((const char*)fields[SKIP] + (first + count - 1) * A_BYTES);
        }
        if (layer == 0) {
            if (works) embed(p, (const E*)fields[NORM], memory, warp, lane);
        } else if (works) {
            receive<H>(ring, act, p.stream + (layer & 1) * ROWS * H, tid);
        }
        if (works) workers_meet<WORKERS>();
        watch.mark(DID_STREAM);
        if (layer == 0 && tid < ROWS) {
            float sum = 0.f;
            for (int i = 0; i < SLICES; i++) sum += ((const float*)(memory + AT_SQUARES))[tid * SLICES + i];
            rate[tid] = scale[tid] = rsqrtf(sum / H + __uint_as_float((u32)p.eps_bits));
        }
        ring.repay(SLOTS);
        if (works) {
            ring.products<2 * C_TILES, H_PIECES>(act, part);
        } else {  // this layer's small weights are here; the next layer's come until then
            if (layer > 0) rate_texts(p, p.squares + (layer & 1) * ROWS * 16, rate, scale, lane);
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
                delta[c * 8 + text] = rounded(gathered<2 * C_TILES, H_PIECES>(part, c / 16, c % 16, text) * scale[text] + x_bias[i]);
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
            const float x = TRIAL ? delta[c * 8 + text] : rounded(gathered<2 * C_TILES, H_PIECES>(part, tile, row, text) * scale[text] + x_bias[i]);
            z[text * CHANNELS + c] = rounded(gathered<2 * C_TILES, H_PIECES>(part, tile + C_TILES, row, text) * scale[text] + z_bias[i]);
            float sum = x * taps[i][WIDTH - 1] + conv_bias[i];
#pragma unroll
            for (int j = 0; j < WIDTH - 1; j++) {
                sum += window[i][j] * taps[i][j];
                const float next = j + 2 < WIDTH ? window[i][j + 1 < WIDTH - 1 ? j + 1 : j] : x;
                if (CONV_FLOAT)
                    ((float*)p.conv_states)[place + j] = next;
                else
                    ((E*)p.conv_states)[place + j] = (E)narrow(next, 0.f);
            }
            u[text * U_ROW + before + c] = (E)narrow(silu(sum), 0.f);
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
                    if (r < R && b < ROWS) atomicAdd(sums + (blockIdx.x % COPIES * ROWS + b) * R + r, ((u64)__float2ll_rn(total[i] * 4294967296.f) << 8) + 1);
                }
            }
        watch.mark(DID_X_PROJ);
        sums_there.come();

        // Second.
        // Four states of a channel and text each; of tokens on trial, one after the other.
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
        sums_there.wait(ring);
        if (works) {
            constexpr int EACH = (ROWS * R + WORKERS - 1) / WORKERS;
            u64 got[EACH][COPIES];
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int copy = 0; copy < COPIES; copy++) got[i][copy] = 0;
            listen(ring, [&] {
                bool all = true;
#pragma unroll
                for (int i = 0; i < EACH; i++)
#pragma unroll
                    for (int copy = 0; copy < COPIES; copy++) {
                        const int at = tid + i * WORKERS, blocks = (GRID - copy + COPIES - 1) / COPIES;
                        if (at < ROWS * R && (got[i][copy] & 255) != blocks) got[i][copy] = heard(sums + copy * ROWS * R + at);
                    }
#pragma unroll
                for (int i = 0; i < EACH; i++)
#pragma unroll
                    for (int copy = 0; copy < COPIES; copy++)
                        all &= tid + i * WORKERS >= ROWS * R || (got[i][copy] & 255) == (GRID - copy + COPIES - 1) / COPIES;
                return all;
            });
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int at = tid + i * WORKERS, b = at / R, r = at % R;
                if (at >= ROWS * R) continue;
                i64 sum = 0;
#pragma unroll
                for (int copy = 0; copy < COPIES; copy++) sum += (i64)got[i][copy] >> 8;
                const float v = (float)sum * (1.f / 4294967296.f);
                if (r < RANK)
                    dt[b * DT_ROW + r] = (E)narrow(v, 0.f);
                else
                    bc[b * 2 * N + r - RANK] = rounded(v);
            }
        }
        __syncthreads();
        watch.mark(DID_MEET);
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
                    say(y + b * D + first + channel, (E)narrow((sum + skip[i] * x) * silu(z[b * CHANNELS + channel]), 0.f));
            }
        }
        watch.mark(DID_SCAN);

        // Third.
        const bool last = layer + 1 == LAYERS;
        const u32 next = last ? turn : ~layer & 1;
        constexpr int ROUNDS_OF_LANES = (STREAM + 31) / 32;
        float next_norm[ROUNDS_OF_LANES], out_bias[ROUNDS_OF_LANES];
#pragma unroll
        for (int i = 0; i < ROUNDS_OF_LANES; i++) {
            const int r = lane + i * 32;
            next_norm[i] = out_bias[i] = 0.f;
            if (r >= stream_count) continue;
            next_norm[i] = widen((last ? p.final_norm : (const E*)fields[FIELDS + NORM])[stream + r]);
            if (fields[OUT_BIAS]) out_bias[i] = widen(((const E*)fields[OUT_BIAS])[stream + r]);
        }
        if (works) receive<D>(ring, act, y, tid);
        __syncthreads();
        watch.mark(DID_MEET_AGAIN);
        ring.repay(SLOTS);
        if (works) {
            ring.products<S_TILES, D_PIECES>(act, part);
        } else {  // all have read the layer's stream and sums, and the y of the layer before
            silence(p, layer & 1, ~layer & 1, stream, stream_count, first, count, lane);
#pragma unroll 1
            for (int i = blockIdx.x * 32 + lane; i < COPIES * ROWS * R; i += GRID * 32) sums[i] = 0;
            fence();
            if (BUFFERS == 1 && !last) send_small(fields + FIELDS, memory + AT_SMALL, first, count, lane);
        }
        __syncthreads();
        watch.mark(DID_OUT_PROJ);
#pragma unroll 1
        for (int b = warp; b < ROWS; b += WARPS + 1) {
            float square = 0.f;
#pragma unroll
            for (int i = 0; i < ROUNDS_OF_LANES; i++) {
                const int r = lane + i * 32;
                if (r >= stream_count) continue;
                float v = gathered<S_TILES, D_PIECES>(part, r / 16, r % 16, b) + out_bias[i];
                v = own[b * STREAM + r] += rounded(v);
                v *= rate[b];
                say(p.stream + (next * ROWS + b) * H + stream + r, (E)narrow(v * next_norm[i], 0.f));
                square += v * v;
            }
            square = over_warp(square);
            if (lane == 0) atomicAdd(p.squares + (next * ROWS + b) * 16, ((u64)__float2ll_rn(square * SQUARE) << 8) + 1);
        }
        watch.mark(DID_SUM);
    }

    // The head.
    if (works) {
        receive<H>(ring, act, p.stream + turn * ROWS * H, tid);
        workers_meet<WORKERS>();
    } else {
        rate_texts(p, p.squares + turn * ROWS * 16, rate, scale, lane);
        silence(p, LAYERS & 1, ~LAYERS & 1, stream, stream_count, first, count, lane);  // the last y has been read by all
    }
    const int words = begin_of(VOCABULARY, blockIdx.x), words_count = begin_of(VOCABULARY, blockIdx.x + 1) - words;
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
                    const float v = rounded(scale[b] * (
                        last ? gathered<LAST_TILES, H_PIECES>(part, row / 16, row % 16, b)
                             : gathered<WARPS, H_PIECES>(part, row / 16, row % 16, b)));
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
        __syncthreads();
        if (tid == WORKERS) fence();  // it arrives for all
        sums_there.come();
        if (blockIdx.x == 0) sums_there.wait(ring);
    }
    if (blockIdx.x == 0 && warp == 0) {
        const i64 at = *p.position;
        if (p.choose && tid < ROWS) {
            const i64 token = (u32) ~(u32)heard(p.best + tid);
            p.tokens[tid] = token;
            if (at < p.capacity) p.history[tid * p.capacity + at] = token;
            p.best[tid] = 0;
        }
        __syncwarp();
        if (tid == 0) *p.position = at + 1, p.counter[32] = sums_there.target, p.counter[33] = turn ^ 1;
    }
#ifdef CLOCK
    if (blockIdx.x == CLOCK && tid == 0)
        for (int i = 0; i < PARTS; i++) p.cycles[i] = watch.spent[i];
#endif
}
