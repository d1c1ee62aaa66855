// Loads a native library and compares kernels of every instruction set that runs here with plain loops in double. For
// platforms whose wheel cannot be tested under Python on this machine:
//
//     zig c++ -std=c++17 -target x86_64-windows-gnu .ci/check_library.cpp -o check.exe
//     wine check.exe libmambakit_native.dll
//
//     aarch64-linux-gnu-g++ -std=c++17 .ci/check_library.cpp -o check -ldl
//     qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu ./check libmambakit_native.so
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string>
#include <vector>

#if defined(_WIN32)
#include <windows.h>
static void* library(const char* path) { return reinterpret_cast<void*>(LoadLibraryA(path)); }
static void* symbol(void* from, const std::string& name) {
  return reinterpret_cast<void*>(GetProcAddress(reinterpret_cast<HMODULE>(from), name.c_str()));
}
#else
#include <dlfcn.h>
static void* library(const char* path) { return dlopen(path, RTLD_NOW); }
static void* symbol(void* from, const std::string& name) { return dlsym(from, name.c_str()); }
#endif

// As rms_norm/native.cpp and linear/product.h have them.
struct Norm {
  const void* x;
  const float* weight;
  const void* residual;
  void *y, *residual_out;
  int64_t rows, h, x_half, residual_half, y_half, out_half, threads, x_stride, residual_stride;
  double eps;
};
struct Linear {
  const float* x;
  const void* weight;
  const float *scales, *bias;
  float* y;
  const int32_t *starts, *columns;
  const float* values;
  int64_t b, in, out, group, threads, x_stride, y_stride;
};
typedef int (*Kernel)(const void* arguments, int64_t variant);

// Every instruction set, and the one that has its other kernels: INSTRUCTION_SETS and EXTENDS of _backends/native.py.
struct Set {
  const char *isa, *base;
};
static const Set kSets[] = {
    {"avx512vnni", "avx512"}, {"avx512", "avx512"}, {"avx2vnni", "avx2"}, {"avx2", "avx2"},
    {"i8mm", "neon"},         {"dotprod", "neon"},  {"neon", "neon"},     {"portable", "portable"},
};

static double drawn() { return rand() / (double)RAND_MAX * 2 - 1; }

static double norm_error(Kernel kernel) {
  const int64_t rows = 37, h = 259;
  std::vector<float> x(rows * h), weight(h), y(rows * h), kept(rows * h);
  for (float& v : x) v = (float)drawn();
  for (float& v : weight) v = (float)drawn();
  Norm a{x.data(), weight.data(), nullptr, y.data(), kept.data(), rows, h, 0, 0, 0, 0, 3, h, h, 1e-5};
  if (kernel(&a, 0)) return INFINITY;
  double worst = 0;
  for (int64_t r = 0; r < rows; ++r) {
    double squares = 0;
    for (int64_t i = 0; i < h; ++i) squares += (double)x[r * h + i] * x[r * h + i];
    const double inverse = 1 / sqrt(squares / h + 1e-5);
    for (int64_t i = 0; i < h; ++i) worst = fmax(worst, fabs(y[r * h + i] - x[r * h + i] * inverse * weight[i]));
  }
  return worst;
}

// Kind 0 is float32; 2 is int8 with a scale for every 32.
static double linear_error(Kernel kernel, int64_t kind) {
  const int64_t b = 5, in = 300, out = 101, groups = (in + 31) / 32;
  std::vector<float> x(b * in), w(out * in), scales(out * groups), y(b * out);
  std::vector<int8_t> q(out * in);
  for (float& v : x) v = (float)drawn();
  for (float& v : scales) v = 0.01f + (float)fabs(drawn()) * 0.01f;
  for (int64_t i = 0; i < out * in; ++i) {
    q[i] = (int8_t)(drawn() * 127);
    w[i] = kind == 0 ? (float)drawn() : q[i] * scales[i / in * groups + i % in / 32];
  }
  const void* weight = kind == 0 ? (const void*)w.data() : (const void*)q.data();
  Linear a{x.data(), weight, scales.data(), nullptr, y.data(), nullptr, nullptr, nullptr, b, in, out, 32, 3, in, out};
  if (kernel(&a, kind)) return INFINITY;
  double worst = 0;
  for (int64_t r = 0; r < b; ++r)
    for (int64_t o = 0; o < out; ++o) {
      double sum = 0;
      for (int64_t i = 0; i < in; ++i) sum += (double)x[r * in + i] * w[o * in + i];
      worst = fmax(worst, fabs(y[r * out + o] - sum));
    }
  return worst;
}

int main(int count, char** arguments) {
  if (count != 2) return fprintf(stderr, "usage: check LIBRARY\n"), 2;
  void* opened = library(arguments[1]);
  if (!opened) return fprintf(stderr, "%s cannot be loaded\n", arguments[1]), 1;
  auto supports = reinterpret_cast<int (*)(const char*)>(symbol(opened, "mambakit_supports"));
  if (!supports) return fprintf(stderr, "%s has no mambakit_supports\n", arguments[1]), 1;
  int checked = 0, failed = 0;
  for (const auto& [isa, base] : kSets) {
    auto linear = reinterpret_cast<Kernel>(symbol(opened, std::string("linear_") + isa));
    if (!linear) continue;  // another processor's
    if (!supports(isa)) {
      printf("%s: not checked, this processor does not run it\n", isa);
      continue;
    }
    auto norm = reinterpret_cast<Kernel>(symbol(opened, std::string("rms_norm_") + base));
    if (!norm) return fprintf(stderr, "%s has linear_%s and no rms_norm_%s\n", arguments[1], isa, base), 1;
    const double errors[] = {norm_error(norm), linear_error(linear, 0), linear_error(linear, 2)};
    const bool fine = errors[0] < 1e-5 && errors[1] < 1e-4 && errors[2] < 1e-2;  // int8: x in 16 bits
    printf("%s: %s (norm %.1e, float32 %.1e, int8 %.1e)\n", isa, fine ? "ok" : "WRONG", errors[0], errors[1], errors[2]);
    ++checked;
    failed += !fine;
  }
  if (!checked) fprintf(stderr, "no instruction set of the library runs here\n");
  return failed || !checked;
}
