// One token through a whole Mamba model in one kernel: a block stays on each multiprocessor, and the blocks meet three times a
// layer. Compiled at run time; the macros come from persistent.py.
//
//   DTYPE 1 bfloat16, 2 float16: weights and activations      BITS 0: the large weights too; 8 or 4: packed integers, GROUP
//   ROWS 1 to 8 texts; GRID blocks; H, D, RANK, WIDTH, VOCABULARY, LAYERS: the model's; 16 states
//   SCAN_FLOAT: 1 where A_log, D and dt_proj's bias are float32; CONV_FLOAT: 1 where the convolution's windows are
//   SLOTS of each warp's ring; SHARED bytes
//
// The channels, the rows of the residual stream and the vocabulary are dealt out to the blocks. A layer is
//
//   first    every block norms the stream, forms x and z of its channels (in_proj), convolves, and adds its channels' share of
//            x_proj to the sums of all blocks
//   second   dt_proj, the state and the gate of its channels
//   third    out_proj's rows of the stream
//
// Weights never wait for that. Each warp knows all the pieces of weights that it will multiply, in order to the end of the step, and
// keeps a ring of them on their way into shared memory: a piece is 64 bytes of 16 rows, a lane reads only what it copied, and a
// slot is filled again as soon as it is used. So the memory works on while blocks wait for each other. A piece is multiplied on
// the tensor cores as 16 rows by as many columns by 8 texts; within a piece the columns may come in any order, as long as the activations
// come in the same. The 17th warp has no weights on their way, so that its fence, which waits for the memory, is a short one.
//
// Every sum has a fixed order, or is of integers (x_proj's: fixed point of 2^-36): same inputs, same bits, whatever the other rows hold.

#include "primitives.cuh"

typedef unsigned short E;  // bits of the dtype
constexpr int N = 16;
constexpr int WARPS = 16, WORKERS = WARPS * 32, THREADS = WORKERS + 32;
constexpr int R = RANK + 2 * N;
constexpr int PIECE = BITS == 8 ? 64 : BITS == 4 ? 128 : 32;  // columns
constexpr int H_PIECES = H / PIECE, D_PIECES = D / PIECE;
constexpr int H_BYTES = H_PIECES * 64, D_BYTES = D_PIECES * 64;  // of a row
constexpr int SCALES = BITS && PIECE > GROUP ? PIECE / GROUP : 1;  // of a row in a piece
constexpr int SLOT = 1024 + (BITS ? 256 : 0);
constexpr int CHANNELS = (D + GRID - 1) / GRID, STREAM = (H + GRID - 1) / GRID, WORDS = (VOCABULARY + GRID - 1) / GRID;
constexpr int C_TILES = (CHANNELS + 15) / 16, S_TILES = (STREAM + 15) / 16, W_TILES = (WORDS + 15) / 16;
constexpr int ROUNDS = (W_TILES + WARPS - 1) / WARPS, LAST_TILES = W_TILES - (ROUNDS - 1) * WARPS;
constexpr int PHASES = 2 * LAYERS + ROUNDS;
constexpr int FIELDS = 14;
enum { NORM, IN, IN_SCALES, IN_BIAS, CONV, CONV_BIAS, X_PROJ, DT_PROJ, DT_BIAS, A_LOG, SKIP, OUT, OUT_SCALES, OUT_BIAS };

// Shared memory.
constexpr int up(int bytes) { return (bytes + 127) / 128 * 128; }
constexpr int ACT_ROW = (H > D ? H : D) * 2 + 64;  // bytes; 64 more than whole lines, so that two rows' reads meet in no bank
constexpr int X_CHUNKS = (CHANNELS + 7 + 7) / 8;   // of 8 channels, with those before the block's first
constexpr int X_ROW = (X_CHUNKS | 1) * 16;
constexpr int A_BYTES = SCAN_FLOAT ? 4 : 2;
constexpr int SMALL_DT = up(R * X_ROW), SMALL_A = SMALL_DT + up(C_TILES * 16 * RANK * 2), SMALL = SMALL_A + up(CHANNELS * N * A_BYTES);
constexpr int U_ROW = X_CHUNKS * 8;
constexpr int DT_ROW = RANK + 8;
constexpr int AT_ACT = up(LAYERS * FIELDS * 8);
constexpr int AT_PART = AT_ACT + up(ROWS * ACT_ROW);
constexpr int AT_SMALL = AT_PART + WARPS * 2 * 16 * 8 * 4;
constexpr int AT_U = AT_SMALL + 2 * SMALL;
constexpr int AT_Z = AT_U + up(ROWS * U_ROW * 4);
constexpr int AT_DELTA = AT_Z + up(ROWS * CHANNELS * 4);
constexpr int AT_DT = AT_DELTA + up(C_TILES * 16 * 8 * 4);
constexpr int AT_BC = AT_DT + up(8 * DT_ROW * 2);
constexpr int AT_OWN = AT_BC + up(ROWS * 2 * N * 4);
constexpr int AT_SQUARES = AT_OWN + up(STREAM * ROWS * 4);
constexpr int AT_BEST = AT_SQUARES + up(WARPS * 4);
constexpr int AT_RING = AT_BEST + up(ROWS * 8);
static_assert(AT_RING + WARPS * SLOTS * SLOT == SHARED, "persistent.py counts the shared memory otherwise");
static_assert(C_TILES * 2 <= WARPS && S_TILES <= WARPS, "a phase has more tiles than a warp's two sums allow");
static_assert(ROWS * CHANNELS <= WORKERS, "a thread convolves one channel of one text");
// The small weights of a layer are sent a layer ahead, with the first piece that follows; by the time they are read, so many pieces
// have been waited for. Where the ring is longer than that (a small model), they are waited for by themselves.
constexpr int FIRST_PIECES = 2 * C_TILES * H_PIECES / WARPS, THIRD_PIECES = S_TILES * D_PIECES / WARPS;
constexpr bool SMALL_IN_TIME = FIRST_PIECES > 0 && SLOTS <= 2 * FIRST_PIECES + THIRD_PIECES - 1;
static_assert(H % PIECE == 0 && D % PIECE == 0 && RANK % 16 == 0 && D % 8 == 0, "widths that pieces do not fit");

struct Params {
    const i64* layers;  // LAYERS x FIELDS addresses
    const E* embeddings;
    const E* final_norm;
    const char* head;
    const float* head_scales;
    void* conv_states;  // (layers, rows, d, width - 1)
    float* ssm_states;  // (layers, rows, d, n)
    i64* tokens;
    i64* position;
    i64* history;
    float* logits;
    float* residual;  // (rows, h)
    E* y;             // (rows, d)
    u64* sums;        // (2, rows, r): zero between steps
    u64* best;        // (rows,): zero between steps
    u32* counter;     // [0] arrivals, [32] arrivals at the step's start
    i64 eps;          // the bits of a float
    i64 capacity;
    i64 choose;
};

DEVICE float rounded(float x) { return widen((E)narrow(x, 0.f)); }
DEVICE float silu(float x) { return x / (1.f + ex2(-1.4426950408889634f * x)); }
DEVICE float scan_weight(i64 weights, int i) { return SCAN_FLOAT ? ((const float*)weights)[i] : widen(((const E*)weights)[i]); }
DEVICE int begin_of(int total, int block) { return (int)((i64)total * block / GRID); }

// The pieces of weights of one warp, from the first to the last of the step.
struct Ring {
    const i64* table;
    const Params& p;
    char* slots;
    const char *low, *high;  // this lane's 16 bytes of rows g and g + 8 of the tile, in piece 0
    const float *low_scales, *high_scales;
    int phase, tile, piece, pieces, left, slot, there;
    int warp, lane, g, t, channels, channels_end, stream, stream_end, words, words_end;

    DEVICE Ring(const Params& p_, const i64* table_, char* slots_, int warp_, int lane_)
        : table(table_), p(p_), slots(slots_), phase(-1), left(0), slot(0), warp(warp_), lane(lane_), g(lane_ / 4), t(lane_ % 4) {
        const int block = blockIdx.x;
        channels = begin_of(D, block), channels_end = begin_of(D, block + 1);
        stream = begin_of(H, block), stream_end = begin_of(H, block + 1);
        words = begin_of(VOCABULARY, block), words_end = begin_of(VOCABULARY, block + 1);
    }
    DEVICE void open_tile() {
        int row, end;
        const char* weight;
        const float* scales;
        bool wide = false;  // rows of d columns
        if (phase >= 2 * LAYERS) {
            row = words + ((phase - 2 * LAYERS) * WARPS + tile) * 16, end = words_end;
            weight = p.head, scales = p.head_scales;
        } else {
            const i64* fields = table + phase / 2 * FIELDS;
            if (phase & 1) {
                row = stream + tile * 16, end = stream_end, wide = true;
                weight = (const char*)fields[OUT], scales = (const float*)fields[OUT_SCALES];
            } else {
                const int half = tile >= C_TILES;
                row = half * D + channels + (tile - half * C_TILES) * 16, end = half * D + channels_end;
                weight = (const char*)fields[IN], scales = (const float*)fields[IN_SCALES];
            }
        }
        there = end - row;
        const size_t bytes = wide ? D_BYTES : H_BYTES;
        low = weight + (size_t)(row + g) * bytes + t * 16;
        high = low + 8 * bytes;
        if constexpr (BITS != 0) {
            const size_t groups = (wide ? D : H) / GROUP;
            low_scales = scales + (size_t)(row + g) * groups;
            high_scales = low_scales + 8 * groups;
        }
    }
    // The next piece on its way into the slot that was used last.
    DEVICE void issue() {
        while (left == 0 && phase < PHASES) {
            if (++phase == PHASES) break;
            int tiles = S_TILES;
            pieces = D_PIECES;
            if (phase >= 2 * LAYERS)
                tiles = phase == PHASES - 1 ? LAST_TILES : WARPS, pieces = H_PIECES;
            else if (!(phase & 1))
                tiles = 2 * C_TILES, pieces = H_PIECES;
            const int first = warp * tiles * pieces / WARPS;
            left = (warp + 1) * tiles * pieces / WARPS - first;
            tile = first / pieces, piece = first % pieces;
            if (left > 0) open_tile();
        }
        if (left > 0) {
            char* to = slots + slot * SLOT;
            if (g < there) copy_later<16>(to + lane * 16, low + piece * 64);
            if (g + 8 < there) copy_later<16>(to + 512 + lane * 16, high + piece * 64);
            if constexpr (BITS != 0)
                if (t == 0) {
                    const int at = PIECE >= GROUP ? piece * SCALES : piece / (GROUP / PIECE);
                    if (g < there) copy_later<SCALES * 4>(to + 1024 + g * 16, low_scales + at);
                    if (g + 8 < there) copy_later<SCALES * 4>(to + 1024 + (g + 8) * 16, high_scales + at);
                }
            left--;
            if (++piece == pieces) {
                piece = 0, tile++;
                if (left > 0) open_tile();
            }
        }
        close_group();
        slot = slot + 1 == SLOTS ? 0 : slot + 1;
    }
    // total += the oldest piece times the texts' activations from column `column` on.
    DEVICE void multiply_piece(float (&total)[4], const char* act, int column) {
        wait_groups<SLOTS - 1>();
        const char* from = slots + slot * SLOT;
        const char* x = act + g * ACT_ROW + column * 2;
        const bool text = g < ROWS;
        if constexpr (BITS == 0) {
            const uint4 a = *(const uint4*)(from + lane * 16), c = *(const uint4*)(from + 512 + lane * 16);
            const uint4 b = text ? *(const uint4*)(x + t * 16) : make_uint4(0, 0, 0, 0);
            multiply(total, a.x, c.x, a.y, c.y, b.x, b.y);
            multiply(total, a.z, c.z, a.w, c.w, b.z, b.w);
        } else {
            __syncwarp();  // the scales were copied by the quad's first lane
            const uint4 a = *(const uint4*)(from + lane * 16), c = *(const uint4*)(from + 512 + lane * 16);
            const u32 as[4] = {a.x, a.y, a.z, a.w}, cs[4] = {c.x, c.y, c.z, c.w};
            const float* low_scale = (const float*)(from + 1024 + g * 16);
            const float* high_scale = low_scale + 32;
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
                    const uint4 b = text ? *(const uint4*)(x + k * 2) : make_uint4(0, 0, 0, 0);
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
            __syncwarp();
        }
        issue();
    }
    // Bytes 2 h and 2 h + 1 of a word, signed, as two numbers of the dtype.
    DEVICE static u32 bytes(u32 word, int h) {
        word ^= 0x80808080u;
        const float first = __uint_as_float(0x4b000000u | (word >> (16 * h) & 255)) - 8388736.f;
        const float second = __uint_as_float(0x4b000000u | (word >> (16 * h + 8) & 255)) - 8388736.f;
        return narrow(first, second);
    }
    // This warp's pieces of a phase; sums of 16 rows x 8 texts for each tile that it touches, two at most.
    template <int TILES, int PIECES> DEVICE void run(const char* act, float* part) {
        const int first = warp * TILES * PIECES / WARPS, last = (warp + 1) * TILES * PIECES / WARPS;
        int at = first % PIECES, segment = 0;
        float total[4] = {};
        for (int i = first; i < last; i++) {
            multiply_piece(total, act, at * PIECE);
            if (++at == PIECES || i + 1 == last) {
                float* to = part + ((warp * 2 + segment) * 16 + g) * 8 + 2 * t;
                *(float2*)to = make_float2(total[0], total[1]);
                *(float2*)(to + 64) = make_float2(total[2], total[3]);
                total[0] = total[1] = total[2] = total[3] = 0.f;
                at = 0, segment++;
            }
        }
    }
};

// The sum over the warps of one row (of 16) of a tile, for one text.
template <int TILES, int PIECES> DEVICE float gathered(const float* part, int tile, int row, int text) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        const int first = w * TILES * PIECES / WARPS, last = (w + 1) * TILES * PIECES / WARPS;
        if (first < (tile + 1) * PIECES && last > tile * PIECES && first < last)
            sum += part[((w * 2 + tile - first / PIECES) * 16 + row) * 8 + text];
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
        if (threadIdx.x == WORKERS && (int)(arrived(counter) - target) < 0) {
            const u64 since = nanoseconds();
            while ((int)(arrived(counter) - target) < 0)
                if (nanoseconds() - since > 20000000000ull) give_up();  // a block that is not there: an error, not a hang
        }
        __syncthreads();
    }
};

constexpr int ROW_WARPS = ROWS == 1 ? 16 : ROWS == 2 ? 8 : ROWS <= 4 ? 4 : 2;  // that norm one text
constexpr int QUADS = (H / 4 + ROW_WARPS * 32 - 1) / (ROW_WARPS * 32);         // of a lane

// The norm of the stream, or of the tokens' embeddings, into act. Begins before the stream is there, to have the weights in time.
template <typename Wait>
DEVICE void normed(const Params& p, const E* norm, bool embedded, char* memory, int warp, int lane, Wait wait) {
    char* act = memory + AT_ACT;
    float* squares = (float*)(memory + AT_SQUARES);
    const int row = warp / ROW_WARPS, first = (warp % ROW_WARPS * 32 + lane) * 4;
    const bool mine = warp < WARPS && row < ROWS;
    uint2 scale[QUADS];
    float4 x[QUADS];
    if (mine)
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
            const u32 low = narrow(x[i].x * r * widen((E)scale[i].x), x[i].y * r * widen((E)(scale[i].x >> 16)));
            const u32 high = narrow(x[i].z * r * widen((E)scale[i].y), x[i].w * r * widen((E)(scale[i].y >> 16)));
            *(uint2*)(act + row * ACT_ROW + k * 2) = make_uint2(low, high);
        }
    }
    __syncthreads();
}

// A layer's small weights of the block's channels on their way; they come in the next piece's group.
DEVICE void send_small(const i64* fields, char* small, int first, int count) {
    const E* x_proj = (const E*)fields[X_PROJ];
    const int before = first % 8, chunks = (before + count + 7) / 8;
    for (int i = threadIdx.x; i < R * X_CHUNKS; i += WORKERS) {
        const int r = i / X_CHUNKS, q = i % X_CHUNKS;
        if (q < chunks) copy_later<16>(small + r * X_ROW + q * 16, x_proj + (size_t)r * D + first - before + q * 8);
    }
    const E* dt = (const E*)fields[DT_PROJ] + (size_t)first * RANK;
    for (int i = threadIdx.x; i < count * RANK / 8; i += WORKERS) copy_later<16>(small + SMALL_DT + i * 16, dt + i * 8);
    const char* a = (const char*)fields[A_LOG] + (size_t)first * N * A_BYTES;
    for (int i = threadIdx.x; i < count * N * A_BYTES / 16; i += WORKERS) copy_later<16>(small + SMALL_A + i * 16, a + i * 16);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_step(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char memory[];
    i64* table = (i64*)memory;
    char* act = memory + AT_ACT;
    float* part = (float*)(memory + AT_PART);
    float* u = (float*)(memory + AT_U);          // [text][channel + before], others 0
    float* z = (float*)(memory + AT_Z);          // [text][channel]
    float* delta = (float*)(memory + AT_DELTA);  // [channel][text of 8]
    E* dt = (E*)(memory + AT_DT);                // [text][rank]
    float* bc = (float*)(memory + AT_BC);        // [text][B, C]
    float* own = (float*)(memory + AT_OWN);      // [row of the stream][text]
    u64* best = (u64*)(memory + AT_BEST);

    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const bool works = warp < WARPS;
    for (int i = tid; i < LAYERS * FIELDS; i += THREADS) table[i] = p.layers[i];
    for (int i = tid; i < ROWS * U_ROW; i += THREADS) u[i] = 0.f;
    if (tid < ROWS) best[tid] = 0;
    Meeting meeting = {p.counter, p.counter[32]};
    __syncthreads();

    Ring ring(p, table, memory + AT_RING + (works ? warp : 0) * SLOTS * SLOT, warp, lane);
    const int first = ring.channels, count = ring.channels_end - first, before = first % 8;
    const int stream = ring.stream, stream_count = ring.stream_end - stream;
    if (works) {
        send_small(table, memory + AT_SMALL, first, count);
        for (int i = 0; i < SLOTS; i++) ring.issue();
    }
    for (int i = tid; i < stream_count * ROWS; i += THREADS)
        own[i] = widen(p.embeddings[p.tokens[i % ROWS] * H + stream + i / ROWS]);

    for (int layer = 0; layer < LAYERS; layer++) {
        const i64* fields = table + layer * FIELDS;
        const char* small = memory + AT_SMALL + (layer & 1) * SMALL;
        u64* sums = p.sums + (layer & 1) * ROWS * R;

        // First. What does not depend on the stream is asked for beforehand.
        const int text = tid / CHANNELS, c = tid % CHANNELS;
        const bool convolves = tid < ROWS * CHANNELS && c < count;
        float taps[WIDTH], window[WIDTH - 1], conv_bias = 0.f, x_bias = 0.f, z_bias = 0.f;
        const size_t place = ((size_t)(layer * ROWS + text) * D + first + c) * (WIDTH - 1);
        if (convolves) {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) taps[j] = widen(((const E*)fields[CONV])[(first + c) * WIDTH + j]);
#pragma unroll
            for (int j = 0; j < WIDTH - 1; j++)
                window[j] = CONV_FLOAT ? ((const float*)p.conv_states)[place + j] : widen(((const E*)p.conv_states)[place + j]);
            if (fields[CONV_BIAS]) conv_bias = widen(((const E*)fields[CONV_BIAS])[first + c]);
            if (fields[IN_BIAS])
                x_bias = widen(((const E*)fields[IN_BIAS])[first + c]), z_bias = widen(((const E*)fields[IN_BIAS])[D + first + c]);
        }
        if (works && layer + 1 < LAYERS) send_small(fields + FIELDS, memory + AT_SMALL + (~layer & 1) * SMALL, first, count);
        normed(p, (const E*)fields[NORM], layer == 0, memory, warp, lane, [&] {
            if (layer > 0) meeting.wait();
        });
        if (works) ring.run<2 * C_TILES, H_PIECES>(act, part);
        if (!SMALL_IN_TIME) close_group(), wait_groups<0>();
        __syncthreads();
        if (convolves) {
            const int tile = c / 16, row = c % 16;
            const float x = rounded(gathered<2 * C_TILES, H_PIECES>(part, tile, row, text) + x_bias);
            z[text * CHANNELS + c] = rounded(gathered<2 * C_TILES, H_PIECES>(part, tile + C_TILES, row, text) + z_bias);
            float y = x * taps[WIDTH - 1] + conv_bias;
#pragma unroll
            for (int j = 0; j < WIDTH - 1; j++) {
                y += window[j] * taps[j];
                const float next = j + 2 < WIDTH ? window[j + 1 < WIDTH - 1 ? j + 1 : j] : x;
                if (CONV_FLOAT)
                    ((float*)p.conv_states)[place + j] = next;
                else
                    ((E*)p.conv_states)[place + j] = (E)narrow(next, 0.f);
            }
            u[text * U_ROW + before + c] = rounded(silu(y));
        }
        __syncthreads();
        constexpr int Q = X_CHUNKS <= 2 ? 2 : X_CHUNKS <= 4 ? 4 : X_CHUNKS <= 8 ? 8 : 16;  // lanes of a row
        static_assert(X_CHUNKS <= 16 && R * Q % 32 == 0, "x_proj's rows do not fill warps");
        if (works)
            for (int i = tid; i < R * Q; i += WORKERS) {
                const int r = i / Q, q = i % Q;
                float w[8];
                uint4 packed = make_uint4(0, 0, 0, 0);
                if (q * 8 < before + count) packed = *(const uint4*)(small + r * X_ROW + q * 16);
                w[0] = widen((E)packed.x), w[1] = widen((E)(packed.x >> 16)), w[2] = widen((E)packed.y), w[3] = widen((E)(packed.y >> 16));
                w[4] = widen((E)packed.z), w[5] = widen((E)(packed.z >> 16)), w[6] = widen((E)packed.w), w[7] = widen((E)(packed.w >> 16));
#pragma unroll
                for (int b = 0; b < ROWS; b++) {
                    float sum = 0.f;
                    if (q < X_CHUNKS) {
                        const float4 l = *(const float4*)(u + b * U_ROW + q * 8), h = *(const float4*)(u + b * U_ROW + q * 8 + 4);
                        sum = w[0] * l.x + w[1] * l.y + w[2] * l.z + w[3] * l.w + w[4] * h.x + w[5] * h.y + w[6] * h.z + w[7] * h.w;
                    }
#pragma unroll
                    for (int step = Q / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
                    if (q == b % Q) atomicAdd(sums + b * R + r, (u64)__float2ll_rn(sum * 68719476736.f));
                }
            }
        meeting.come();

        // Second.
        constexpr int ITEMS = (ROWS * CHANNELS * 4 + WORKERS - 1) / WORKERS;  // four states of a channel and text each
        float4 states[ITEMS];
        float4* states_at[ITEMS];
        float step_bias[ITEMS], skip[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int item = tid + i * WORKERS, quad = item & 3, channel = item / 4 % CHANNELS, b = item / 4 / CHANNELS;
            states_at[i] = nullptr;
            if (works && b < ROWS && channel < count) {
                states_at[i] = (float4*)(p.ssm_states + ((size_t)(layer * ROWS + b) * D + first + channel) * N) + quad;
                states[i] = *states_at[i];
                step_bias[i] = scan_weight(fields[DT_BIAS], first + channel);
                skip[i] = scan_weight(fields[SKIP], first + channel);
            }
        }
        meeting.wait();
        if (works)
            for (int i = tid; i < ROWS * R; i += WORKERS) {
                const int b = i / R, r = i % R;
                const float v = (float)(i64)fresh(sums + i) * (1.f / 68719476736.f);
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
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int item = tid + i * WORKERS, quad = item & 3, channel = item / 4 % CHANNELS, b = item / 4 / CHANNELS;
            float sum = 0.f, x = 0.f;
            if (states_at[i] != nullptr) {
                x = u[b * U_ROW + before + channel];
                float d = rounded(delta[channel * 8 + b]) + step_bias[i];
                d = d > 20.f ? d : log1pf(expf(d));
                float a[4];
                if (SCAN_FLOAT) {
                    const float4 v = *(const float4*)(small + SMALL_A + (channel * N + quad * 4) * 4);
                    a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
                } else {
                    const uint2 v = *(const uint2*)(small + SMALL_A + (channel * N + quad * 4) * 2);
                    a[0] = widen((E)v.x), a[1] = widen((E)(v.x >> 16)), a[2] = widen((E)v.y), a[3] = widen((E)(v.y >> 16));
                }
                float h[4] = {states[i].x, states[i].y, states[i].z, states[i].w};
                const float* B = bc + b * 2 * N + quad * 4;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    h[j] = ex2(-1.4426950408889634f * d * expf(a[j])) * h[j] + d * x * B[j];
                    sum += h[j] * B[N + j];
                }
                *states_at[i] = make_float4(h[0], h[1], h[2], h[3]);
            }
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            if (states_at[i] != nullptr && quad == 0)
                p.y[(size_t)b * D + first + channel] = (E)narrow((sum + skip[i] * x) * silu(z[b * CHANNELS + channel]), 0.f);
        }
        meeting.come();

        // Third. The sums of the next layer's first part must be zero by then: those of the layer before were read by all.
        for (int i = blockIdx.x * THREADS + tid; i < ROWS * R; i += GRID * THREADS) p.sums[(~layer & 1) * ROWS * R + i] = 0;
        meeting.wait();
        if (works)
            for (int i = tid; i < ROWS * (D / 8); i += WORKERS) {
                const int b = i / (D / 8), k = i % (D / 8);
                *(uint4*)(act + b * ACT_ROW + k * 16) = fresh((const uint4*)(p.y + (size_t)b * D) + k);
            }
        __syncthreads();
        if (works) ring.run<S_TILES, D_PIECES>(act, part);
        __syncthreads();
        for (int i = tid; i < ROWS * stream_count; i += THREADS) {
            const int b = i / stream_count, r = i % stream_count;
            float v = gathered<S_TILES, D_PIECES>(part, r / 16, r % 16, b);
            if (fields[OUT_BIAS]) v += widen(((const E*)fields[OUT_BIAS])[stream + r]);
            v = own[r * ROWS + b] += rounded(v);
            p.residual[(size_t)b * H + stream + r] = v;
        }
        meeting.come();
    }

    // The head. The last layer's sums are no longer read.
    normed(p, p.final_norm, LAYERS == 0, memory, warp, lane, [&] {
        if (LAYERS > 0) meeting.wait();
    });
    for (int i = blockIdx.x * THREADS + tid; i < ROWS * R; i += GRID * THREADS) p.sums[(~LAYERS & 1) * ROWS * R + i] = 0;
    const int words = ring.words, words_count = ring.words_end - words;
    for (int round = 0; round < ROUNDS; round++) {
        const bool last = round == ROUNDS - 1;
        if (works) {
            if (last)
                ring.run<LAST_TILES, H_PIECES>(act, part);
            else
                ring.run<WARPS, H_PIECES>(act, part);
        }
        __syncthreads();
        if (works)
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
}
