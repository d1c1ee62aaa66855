// mambakit/ops/decode/primitives.cuh on a CPU.
#include "cuda_on_cpu.h"

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define DEVICE inline
#undef __launch_bounds__
#define __launch_bounds__(...)

inline int __popc(u32 x) { return __builtin_popcount(x); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline i64 __float2ll_rn(float x) { return llrintf(x); }
inline u64 atomicAdd(u64* p, u64 v) { u64 old = *p; *p += v; return old; }
inline u64 atomicMax(u64* p, u64 v) { u64 old = *p; *p = std::max(*p, v); return old; }
inline u64 __shfl_xor_sync(u32, u64 v, int mask) {
    u32 low = shuffle((u32)v, (current % 32) ^ mask), high = shuffle((u32)(v >> 32), (current % 32) ^ mask);
    return (u64)high << 32 | low;
}

// What the step was given: begin and end of each tensor. A copy from elsewhere is an error, also where the memory is
// readable.
static std::vector<std::pair<const char*, const char*>> given;
template <int BYTES> void copy_async(void* shared, const void* global) {
    const char* p = (const char*)global;
    bool inside = false;
    for (auto& range : given) inside |= p >= range.first && p + BYTES <= range.second;
    if (!inside) {
        fprintf(stderr, "a copy of %d bytes from outside of every tensor\n", BYTES);
        abort();
    }
    async_copy(shared, global, BYTES, BYTES);
}
inline void prefetch_l2(const void*) {}
inline bool __all_sync(u32 mask, bool vote) { return __ballot_sync(mask, vote) == mask; }
inline u32 ticks() { static u32 now; return now += 100; }
#define clock ticks
inline void commit_group() { async_commit(); }
template <int LATER_GROUPS> void wait_groups() { async_wait(LATER_GROUPS); }

inline float from_half(unsigned short bits) {
#if DTYPE == 1
    return __uint_as_float((u32)bits << 16);
#else
    _Float16 half;
    memcpy(&half, &bits, 2);
    return half;
#endif
}
inline u32 to_half_pair(float low, float high) {
#if DTYPE == 1
    return to_bfloat16(low) | to_bfloat16(high) << 16;
#else
    u32 w;
    _Float16 pair[2] = {(_Float16)low, (_Float16)high};
    memcpy(&w, pair, 4);
    return w;
#endif
}
inline u32 unpack_int4(u32 word) {
    int first = (word & 15) ^ 8, second = (word >> 16 & 15) ^ 8;
    return to_half_pair(first - 8, second - 8);
}
inline float of_e4m3(u32 byte) {
    const int exponent = byte >> 3 & 15, mantissa = byte & 7;
    const float size = exponent ? ldexpf(1.f + mantissa / 8.f, exponent - 7) : ldexpf(mantissa / 8.f, -6);
    return byte & 128 ? -size : size;
}
inline u32 unpack_e4m3(u32 word, int h) {
    return to_half_pair(of_e4m3(word >> 16 * h & 255), of_e4m3(word >> (16 * h + 8) & 255));
}
inline float ex2(float x) { float y = exp2f(x); return y < 1.17549435e-38f ? 0.f : y; }
inline float fast_divide(float x, float y) { return x / y; }

struct Fragments { u32 a[4], b[2]; };
static Fragments operands[1024][2][32];
inline void mma(float (&total)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    Fiber& f = fibers[current];
    const unsigned warp = current / 32, lane = current % 32, p = f.parity++ & 1;
    operands[warp][p][lane] = {{a0, a1, a2, a3}, {b0, b1}};
    pause_fiber(WARP);
    const Fragments* all = operands[warp][p];
    for (int i = 0; i < 4; i++) {
        const int g = lane / 4, column = lane % 4 * 2 + i % 2;  // row g (+ 8 of i >= 2), which text
        double sum = total[i];
        for (int t = 0; t < 4; t++)
            for (int k = 0; k < 2; k++) {
                const u32 a = all[g * 4 + t].a[i / 2 + 2 * k], b = all[column * 4 + t].b[k];
                sum += (double)from_half((unsigned short)a) * from_half((unsigned short)b);
                sum += (double)from_half((unsigned short)(a >> 16)) * from_half((unsigned short)(b >> 16));
            }
        total[i] = (float)sum;
    }
}

inline void store_relaxed(unsigned short* p, unsigned short v) { *p = v; }
inline uint4 load_relaxed(const uint4* p) { aligned(p, 16); return *p; }
inline u64 load_relaxed(const u64* p) { return *p; }
inline void spin_pause() { yield_fiber(); }
inline void fence() {}
template <int COUNT> void compute_barrier() { barrier_of_part(COUNT); }
inline void barrier_arrive(u32* counter) { ++*counter; }
inline u32 barrier_count(const u32* counter) { return *counter; }
inline void trap() { abort(); }
