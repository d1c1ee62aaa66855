// The persistent step's inline assembly: asynchronous copies, matrix instructions, and the memory accesses of the grid
// exchange. Tests replace this file by one that runs on a CPU.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define DEVICE __device__ __forceinline__

// An asynchronous copy of 4, 8 or 16 bytes from global to shared memory.
template <int BYTES> DEVICE void copy_async(void* shared, const void* global) {
    u32 to = (u32)__cvta_generic_to_shared(shared);
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(BYTES) : "memory");
}
// Prefetches the 32 bytes around an address into L2.
DEVICE void prefetch_l2(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }
DEVICE void commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LATER> DEVICE void wait_groups() { asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory"); }

// total (16 x 8) += a (16 x 16) b (16 x 8). Lane 4 g + t holds rows g and g + 8 of a in columns 2t, 2t + 1, 2t + 8, 2t
// + 9, those columns' values of column g of b, and of the total rows g and g + 8, columns 2t and 2t + 1.
DEVICE void mma(float (&total)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if DTYPE == 1
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
                 : "+f"(total[0]), "+f"(total[1]), "+f"(total[2]), "+f"(total[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two numbers of the weights' dtype in a word, the first in the low half.
DEVICE u32 to_half_pair(float low, float high) {
    u32 w;
#if DTYPE == 1
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
#endif
    return w;
}
DEVICE float from_half(unsigned short bits) {
#if DTYPE == 1
    return __uint_as_float((u32)bits << 16);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
    return y;
#endif
}
// Two integers 0 .. 15 in the low nibbles of a word's halves, as numbers -8 .. 7 of the dtype (two's complement).
DEVICE u32 unpack_int4(u32 word) {
    u32 y;
#if DTYPE == 1  // 128 + (v ^ 8), less 136
    asm("fma.rn.bf16x2 %0, %1, %2, %3;"
        : "=r"(y) : "r"((word & 0x000f000fu) ^ 0x43084308u), "r"(0x3f803f80u), "r"(0xc308c308u));
#else  // 1024 + (v ^ 8), less 1032
    asm("fma.rn.f16x2 %0, %1, %2, %3;"
        : "=r"(y) : "r"((word & 0x000f000fu) ^ 0x64086408u), "r"(0x3c003c00u), "r"(0xe408e408u));
#endif
    return y;
}
// Bytes 2 h and 2 h + 1 of a word, e4m3, as two numbers of the dtype: shifted into place, times a power of two.
DEVICE u32 unpack_e4m3(u32 word, int h) {
    const u32 p = __byte_perm(word, 0, h ? 0x3424 : 0x1404);  // in the upper byte of each half
    u32 y;
#if DTYPE == 1
    asm("fma.rn.bf16x2 %0, %1, %2, %3;"
        : "=r"(y) : "r"((p & 0x7f007f00u) >> 4 | (p & 0x80008000u)), "r"(0x7b807b80u), "r"(0x80008000u));
#else
    asm("fma.rn.f16x2 %0, %1, %2, %3;"
        : "=r"(y) : "r"((p & 0x7f007f00u) >> 1 | (p & 0x80008000u)), "r"(0x5c005c00u), "r"(0x80008000u));
#endif
    return y;
}
DEVICE float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float fast_divide(float x, float y) { return __fdividef(x, y); }  // 2 units in the last place; y below 2^126

// Values that CTAs exchange: relaxed, past L1, each written and read by one access.
DEVICE void store_relaxed(unsigned short* p, unsigned short v) {
    asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(p), "h"(v) : "memory");
}
DEVICE uint4 load_relaxed(const uint4* p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
DEVICE u64 load_relaxed(const u64* p) {
    u64 v;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
DEVICE void spin_pause() {}  // between two polls; on a CPU another fiber runs
// A barrier of the CTA's first COUNT threads.
template <int COUNT> DEVICE void compute_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(COUNT) : "memory"); }
// All CTAs see what this thread wrote before they see what it, or its CTA after a barrier, writes from now on.
DEVICE void fence() { __threadfence(); }

// The counter of a grid barrier. Arriving does not order earlier writes, unless the thread has fenced.
DEVICE void barrier_arrive(u32* counter) {
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
DEVICE u32 barrier_count(const u32* counter) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
    return v;
}
DEVICE void trap() { asm volatile("trap;"); }
