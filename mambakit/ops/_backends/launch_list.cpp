// A list of GPU work, enqueued by one call: kernels by the CUDA driver, matrix products by cuBLAS. Both libraries are
// the process's own; the caller gives the addresses of their functions, so nothing of CUDA is needed to build this.
// Compiled once, for the baseline. `launch_list.py` writes the lists.
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

struct Functions {
  int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                unsigned block_z, unsigned shared, void* stream, void** parameters, void** extra);
  int (*zeros)(uint64_t at, unsigned char value, size_t bytes, void* stream);
  int (*product)(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int type_a,
                 int lda, const void* b, int type_b, int ldb, const void* beta, void* c, int type_c, int ldc,
                 int compute, int algorithm);
  int (*math_mode)(void* handle, int mode);
};

// An item begins with its kind and the number of its words. A place is an array of the call, and bytes from its start.
enum Kind : int64_t { kLaunch, kZeros, kProduct };
constexpr int64_t kHeader = 2, kMostWords = 512, kMostParameters = 64;  // a kernel takes 4 KB of parameters

int launch(const Functions& f, const int64_t* w, const uint64_t* arrays, void* stream) {
  const int64_t parameters = w[6], words = w[7], patches = w[8];
  if (parameters > kMostParameters || words > kMostWords) return 1;
  const int64_t *offsets = w + 9, *values = offsets + parameters, *patch = values + words;
  uint64_t block[kMostWords];
  void* at[kMostParameters];
  memcpy(block, values, static_cast<size_t>(words) * 8);
  for (int64_t i = 0; i < patches; ++i, patch += 3) block[patch[0]] = arrays[patch[1]] + static_cast<uint64_t>(patch[2]);
  for (int64_t i = 0; i < parameters; ++i) at[i] = block + offsets[i];
  return f.launch(reinterpret_cast<void*>(w[0]), static_cast<unsigned>(w[1]), static_cast<unsigned>(w[2]),
                  static_cast<unsigned>(w[3]), static_cast<unsigned>(w[4]), 1, 1, static_cast<unsigned>(w[5]), stream,
                  at, nullptr);
}

constexpr int kCompute32F = 68;  // CUBLAS_COMPUTE_32F

int product(const Functions& f, const int64_t* w, const uint64_t* arrays, void* handle) {
  const auto number = [&](int i) { return static_cast<int>(w[i]); };
  const auto place = [&](int i) { return reinterpret_cast<void*>(arrays[w[i]] + static_cast<uint64_t>(w[i + 1])); };
  const float one = 1.f, beta = static_cast<float>(w[10]);
  return f.product(handle, number(0), number(1), number(2), number(3), number(4), &one, place(11), number(8), number(5),
                   place(13), number(8), number(6), &beta, place(15), number(9), number(7), kCompute32F, number(17));
}

}  // namespace

// Enqueues the items from word `begin` to word `end` on a stream. 0, or 65536 times the word of the item that failed
// plus the code of its library.
//
// arrays: addresses that the items' places count from. handle: cuBLAS's, on the same stream, its math mode 0;
// math_mode: of the products, or -1 to leave the handle's.
EXPORT int64_t mambakit_launch_list(const Functions* functions, const int64_t* words, int64_t begin, int64_t end,
                                    const uint64_t* arrays, void* stream, void* handle, int64_t math_mode) {
  const Functions& f = *functions;
  int64_t result = 0;
  if (math_mode > 0) f.math_mode(handle, static_cast<int>(math_mode));
  for (int64_t at = begin; at < end; at += words[at + 1]) {
    const int64_t* w = words + at + kHeader;
    int code = 1;
    if (words[at] == kLaunch) code = launch(f, w, arrays, stream);
    if (words[at] == kZeros)
      code = f.zeros(arrays[w[0]] + static_cast<uint64_t>(w[1]), 0, static_cast<size_t>(w[2]), stream);
    if (words[at] == kProduct) code = product(f, w, arrays, handle);
    if (code) {
      result = at * 65536 + code;
      break;
    }
  }
  if (math_mode > 0) f.math_mode(handle, 0);
  return result;
}
