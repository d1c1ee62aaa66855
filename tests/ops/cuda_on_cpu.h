// CUDA C++ on one CPU thread: each thread of a block is a fiber that runs to the next barrier or shuffle. Enough of the
// language to run kernels whose inline assembly is replaced. Asynchronous copies land when they are waited for, warps
// and lanes run far apart, and shared memory starts as NaN, so that a missing barrier shows. Blocks run one after the
// other, or all together where they wait for each other.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
using std::max;
using std::min;

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx, gridDim;
inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline void aligned(const void* p, size_t bytes) {
    if ((uintptr_t)p % bytes) {
        fprintf(stderr, "an access of %zu bytes is not aligned\n", bytes);
        abort();
    }
}
template <typename V> inline V __ldg(const V* p) { aligned(p, sizeof(V)); return *p; }
template <typename V> inline V __ldcs(const V* p) { return *p; }

enum State { READY, WARP, BLOCK, PART, LATER, DONE };  // LATER: it asked for something that others must do first
struct Copy { void* to; const void* from; int bytes, all; };
struct Fiber {
    State state;
    jmp_buf at;
    ucontext_t start;
    unsigned parity;
    std::vector<Copy> group;
    std::vector<std::vector<Copy>> groups;
};
static std::vector<Fiber> fibers;
static jmp_buf scheduler;
static unsigned current;
static unsigned values[1024][2][32];  // warp, parity, lane
static char* shared_memory;
static std::function<void()> body;

static void pause_fiber(State state) {
    Fiber& f = fibers[current];
    f.state = state;
    if (!_setjmp(f.at)) _longjmp(scheduler, 1);
}
inline void __syncthreads() { pause_fiber(BLOCK); }
static unsigned part_of_block;
inline void barrier_of_part(unsigned threads) { part_of_block = threads; pause_fiber(PART); }  // of the block's first threads
inline void __syncwarp() { pause_fiber(WARP); }
inline void yield_fiber() { pause_fiber(LATER); }
inline int atomicAdd(int* at, int by) { int before = *at; *at += by; return before; }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { yield_fiber(); }
inline unsigned exchange(unsigned value, unsigned from) {
    Fiber& f = fibers[current];
    unsigned warp = current / 32, p = f.parity++ & 1;
    values[warp][p][current % 32] = value;
    pause_fiber(WARP);
    return values[warp][p][from & 31];
}
template <typename V> V shuffle(V v, unsigned from) {
    unsigned bits[sizeof(V) / 4];
    memcpy(bits, &v, sizeof(V));
    for (unsigned& word : bits) word = exchange(word, from);
    memcpy(&v, bits, sizeof(V));
    return v;
}
template <typename V> V __shfl_xor_sync(unsigned, V v, int mask) { return shuffle(v, (current % 32) ^ mask); }
template <typename V> V __shfl_sync(unsigned, V v, int lane) { return shuffle(v, lane); }
template <typename V> V __shfl_up_sync(unsigned, V v, int by) { return shuffle(v, (int)(current % 32) < by ? current % 32 : current % 32 - by); }
inline unsigned __ballot_sync(unsigned, bool vote) {
    Fiber& f = fibers[current];
    unsigned p = f.parity & 1, warp = current / 32, mask = 0;
    exchange(vote, 0);
    for (int i = 0; i < 32; i++) mask |= (values[warp][p][i] & 1) << i;
    return mask;
}
inline unsigned to_bfloat16(float x) {
    unsigned bits = __float_as_uint(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
inline void async_copy(void* to, const void* from, int bytes, int all) {
    aligned(to, all);
    if (bytes > 0) aligned(from, all);
    fibers[current].group.push_back({to, from, bytes, all});
}
inline void async_commit() { Fiber& f = fibers[current]; f.groups.push_back(f.group); f.group.clear(); }
inline void async_wait(int later) {
    auto& g = fibers[current].groups;
    while ((int)g.size() > later) {
        for (auto& c : g.front()) {
            memset(c.to, 0, c.all);
            memcpy(c.to, c.from, c.bytes);
        }
        g.erase(g.begin());
    }
}

static void enter() {
    body();
    fibers[current].state = DONE;
    _longjmp(scheduler, 1);
}

static const size_t STACK = 256 << 10;

static void run_blocks(unsigned begin, unsigned count, unsigned by, unsigned threads, size_t shared, char* stacks) {
    const unsigned all = count * threads;
    std::vector<char*> memories;
    for (unsigned b = 0; b < count; b++) {
        memories.push_back((char*)aligned_alloc(128, (shared + 255) / 128 * 128));
        memset(memories[b], 0xff, shared + 64);  // NaN
    }
    fibers.assign(all, Fiber());
    static ucontext_t back;
    for (unsigned i = 0; i < all; i++) {
        fibers[i].state = READY;
        getcontext(&fibers[i].start);
        fibers[i].start.uc_stack.ss_sp = stacks + i * STACK;
        fibers[i].start.uc_stack.ss_size = STACK;
        fibers[i].start.uc_link = &back;
        makecontext(&fibers[i].start, enter, 0);
    }
    std::vector<bool> started(all, false);
    unsigned done = 0, idle = 0;
    // Each warp runs as far ahead as barriers let it, first to last and then last to first (every other block the other
    // way round); its lanes likewise. One warp of every block before the next one, blocks in either order, so that
    // those which wait for each other meet with some warps behind.
    for (unsigned sweep = 0; done < all; sweep++) {
        bool moved = false;
        for (unsigned k = 0; k < threads / 32; k++) {
            for (unsigned j = 0; j < count; j++) {
                const unsigned block = sweep & 2 ? count - 1 - j : j;
                const bool forwards = (sweep + block) % 2 == 0;
                shared_memory = memories[block];
                blockIdx = {begin + block, by, 0};
                const unsigned warp = block * threads + (forwards ? k : threads / 32 - 1 - k) * 32;
                for (bool ready = true, upwards = forwards; ready; upwards = !upwards) {
                    ready = false;
                    for (unsigned lane = 0; lane < 32; lane++) {
                        const unsigned i = warp + (upwards ? lane : 31 - lane);
                        if (fibers[i].state != READY) continue;
                        ready = moved = true;
                        current = i;
                        threadIdx = {i - block * threads, 0, 0};
                        if (!_setjmp(scheduler)) {
                            if (started[i]) _longjmp(fibers[i].at, 1);
                            started[i] = true;
                            setcontext(&fibers[i].start);
                        }
                        done += fibers[current].state == DONE;
                    }
                    bool met = true;
                    for (unsigned i = warp; i < warp + 32; i++) met &= fibers[i].state == WARP;
                    if (met)
                        for (unsigned i = warp; i < warp + 32; i++) fibers[i].state = READY;
                }
            }
        }
        for (unsigned block = 0; block < count; block++) {
            bool met = true;
            for (unsigned i = 0; i < threads; i++) met &= fibers[block * threads + i].state == BLOCK;
            if (met)
                for (unsigned i = 0; i < threads; i++) fibers[block * threads + i].state = READY;
            met = part_of_block > 0;
            for (unsigned i = 0; i < part_of_block; i++) met &= fibers[block * threads + i].state == PART;
            if (met)
                for (unsigned i = 0; i < part_of_block; i++) fibers[block * threads + i].state = READY;
        }
        bool waits = false;
        for (auto& f : fibers)
            if (f.state == LATER) f.state = READY, waits = true;
        idle = waits ? idle + 1 : 0;
        if ((!moved || idle > 100000) && done < all) {
            fprintf(stderr, "deadlock: a barrier that not every thread or block reaches\n");
            abort();
        }
    }
    for (char* memory : memories) free(memory);
}

static void run_grid(
    unsigned blocks, unsigned blocks_y, unsigned threads, size_t shared, std::function<void()> kernel, bool together = false) {
    body = kernel;
    gridDim = {blocks, blocks_y, 1};
    // Given back after each launch: a test process runs hundreds of kernels, each compiled into a library of its own.
    const size_t bytes = (together ? blocks : 1) * threads * STACK;
    char* stacks = (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) {
        fprintf(stderr, "no memory for the stacks of %zu bytes\n", bytes);
        abort();
    }
    for (unsigned by = 0; by < blocks_y; by++)
        if (together)
            run_blocks(0, blocks, by, threads, shared, stacks);
        else
            for (unsigned b = 0; b < blocks; b++) run_blocks(b, 1, by, threads, shared, stacks);
    munmap(stacks, bytes);
}
