// One product of the linear kernels of the instruction set that this is compiled for, for processors that are emulated:
// reads kind, b, in, out, group and the bytes of x, weight and scales (int64 each), then those arrays, from standard
// input; writes y (b, out) float32. Links native.cpp and runtime.cpp; no scales, no bias.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

struct Arguments {  // as in product.h
  const float* x;
  const void* weight;
  const float *scales, *bias;
  float* y;
  const int32_t *starts, *columns;
  const float* values;
  int64_t b, in, out, group, threads, x_stride, y_stride;
};
#define JOIN(a, b) a##b
#define NAME(isa) JOIN(linear_, isa)
extern "C" int NAME(MAMBAKIT_ISA)(const Arguments*, int64_t kind);

static void read_exactly(void* to, size_t bytes) {
  if (bytes && std::fread(to, 1, bytes, stdin) != bytes) std::exit(3);
}

int main() {
  int64_t head[8];
  read_exactly(head, sizeof head);
  // Exactly as long as it is, so that reading beyond an end is seen by tools that look for it.
  std::vector<char> x(head[5]), weight(head[6]), scales(head[7]);
  for (std::vector<char>* each : {&x, &weight, &scales}) read_exactly(each->data(), each->size());
  std::vector<float> y(head[1] * head[3]);
  const Arguments a{reinterpret_cast<float*>(x.data()), weight.data(), reinterpret_cast<float*>(scales.data()), nullptr,
                    y.data(), nullptr, nullptr, nullptr, head[1], head[2], head[3], head[4], 1, head[2], head[3]};
  if (NAME(MAMBAKIT_ISA)(&a, head[0])) return 4;
  return std::fwrite(y.data(), sizeof(float), y.size(), stdout) == y.size() ? 0 : 5;
}
