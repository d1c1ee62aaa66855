// A layer's parameters as its kernels read them, in one launch: up to COUNT float32 tensors rounded to half, and
// A = -exp(A_log) in float32; and a bias in every row. Compiled at run time; DTYPE 0: none is rounded and a bias is
// float32, 1: bfloat16, 2: float16.
typedef long long i64;

struct Params {  // parameters.py mirrors it
    const float *from0, *from1, *from2, *from3, *from4, *from5, *A_log;
    void *to0, *to1, *to2, *to3, *to4, *to5;
    float* A;
    i64 end0, end1, end2, end3, end4, end5;  // CTAs up to the end of each tensor; the CTAs after them compute A
    i64 n0, n1, n2, n3, n4, n5, states;      // elements
};

struct BiasParams {  // parameters.py mirrors it, too
    const void* bias;
    void* to;
    i64 count, channels;
};

constexpr int EACH = 8;  // neighbouring elements of a thread

__device__ __forceinline__ unsigned half_pair(float low, float high) {
    unsigned w = 0;
#if DTYPE == 1
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
#elif DTYPE == 2
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
#endif
    return w;
}

extern "C" __global__ void __launch_bounds__(256) mixer_parameters(const __grid_constant__ Params p) {
    const float* const from[6] = {p.from0, p.from1, p.from2, p.from3, p.from4, p.from5};
    void* const to[6] = {p.to0, p.to1, p.to2, p.to3, p.to4, p.to5};
    const i64 ends[6] = {p.end0, p.end1, p.end2, p.end3, p.end4, p.end5};
    const i64 counts[6] = {p.n0, p.n1, p.n2, p.n3, p.n4, p.n5};
    const i64 block = blockIdx.x;
    i64 begin = 0;
#pragma unroll
    for (int s = 0; s < 6; s++) {
        if (block >= begin && block < ends[s]) {
            const i64 i = ((block - begin) * 256 + threadIdx.x) * EACH;
            if (i + EACH <= counts[s]) {
                const float4 a = *(const float4*)(from[s] + i), b = *(const float4*)(from[s] + i + 4);
                *(uint4*)((unsigned short*)to[s] + i) =
                    make_uint4(half_pair(a.x, a.y), half_pair(a.z, a.w), half_pair(b.x, b.y), half_pair(b.z, b.w));
            } else {
                for (i64 j = i; j < counts[s]; j++)
                    ((unsigned short*)to[s])[j] = (unsigned short)half_pair(from[s][j], 0.f);
            }
        }
        begin = ends[s];
    }
    if (block < begin) return;
    const i64 i = (block - begin) * 256 + threadIdx.x;
    if (i < p.states) p.A[i] = -expf(p.A_log[i]);
}

#if DTYPE == 0
typedef unsigned Element;
#else
typedef unsigned short Element;
#endif

// (rows, channels) of the bias, to which a product is added.
extern "C" __global__ void __launch_bounds__(256) mixer_bias(const __grid_constant__ BiasParams p) {
    const i64 begin = ((i64)blockIdx.x * 256 + threadIdx.x) * EACH;
    i64 channel = begin % p.channels;
    for (i64 i = begin; i < begin + EACH && i < p.count; i++) {
        ((Element*)p.to)[i] = ((const Element*)p.bias)[channel];
        channel = channel + 1 == p.channels ? 0 : channel + 1;
    }
}
