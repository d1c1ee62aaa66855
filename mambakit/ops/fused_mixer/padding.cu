// Padding on the left of each row changes no state: the convolution's window is moved next to the row's first token, and
// time steps at padding are ones whose softplus is 0. Compiled at run time; BYTES: of an element, NO_STEP: such a step's
// bits.
typedef long long i64;

struct PaddingParams {  // padding.py mirrors it
    const i64* pads;    // columns of padding of each row, 0 to length
    void *window, *x, *delta;
    i64 rows, length, channels, stride;  // stride: elements from a token of x to the next
};

#if BYTES == 4
typedef unsigned Element;
#else
typedef unsigned short Element;
#endif

constexpr int EACH = 16 / BYTES;  // neighbouring elements of a thread

// Of window (rows, channels, TAPS) and the first half of x (rows, length, stride): what is read before the first token is
// the window. A thread is a channel of a row.
extern "C" __global__ void __launch_bounds__(256) mixer_window(const __grid_constant__ PaddingParams p) {
    const i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i >= p.rows * p.channels) return;
    const i64 row = i / p.channels, pads = p.pads[row];
    if (pads == 0) return;
    Element* const window = (Element*)p.window + i * TAPS;
    Element* const x = (Element*)p.x + row * p.length * p.stride + i % p.channels;
    Element before[TAPS];
#pragma unroll
    for (int k = 0; k < TAPS; k++) before[k] = window[k];
#pragma unroll
    for (int k = 0; k < TAPS; k++) {
        const i64 column = pads + k;  // of the window and x as one row
        if (column < TAPS) window[column] = before[k];
        else x[(column - TAPS) * p.stride] = before[k];
    }
}

// delta (rows, length, channels) at padding. A thread has neighbouring channels of a token.
extern "C" __global__ void __launch_bounds__(256) mixer_steps(const __grid_constant__ PaddingParams p) {
    const i64 groups = p.channels / EACH, i = (i64)blockIdx.x * 256 + threadIdx.x;
    const i64 token = i / groups;
    if (token >= p.rows * p.length || token % p.length >= p.pads[token / p.length]) return;
    Element* const delta = (Element*)p.delta + token * p.channels + i % groups * EACH;
#pragma unroll
    for (int k = 0; k < EACH; k++) delta[k] = (Element)NO_STEP;
}
