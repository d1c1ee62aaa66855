// What is not a kernel: which instruction sets this processor has, and the threads. Compiled once, for the baseline.
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <thread>

#include "parallel.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

struct MambakitWork {
  std::atomic<int64_t> next{0};
  std::atomic<int> failed{0};
  int64_t items;
  void (*worker)(void*, MambakitWork*);
  void* context;
};

namespace {

// The signature of GOMP_parallel, which GCC's, LLVM's and Intel's OpenMP runtimes all have.
typedef void (*Team)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
Team team = nullptr;

void run(void* data) {
  MambakitWork* work = static_cast<MambakitWork*>(data);
  work->worker(work->context, work);
}

constexpr int kMaxThreads = 256;

void run_on_own_threads(MambakitWork* work, int64_t threads) {
  std::thread others[kMaxThreads];
  if (threads > kMaxThreads) threads = kMaxThreads;
  for (int64_t i = 1; i < threads; ++i) others[i] = std::thread(run, work);
  run(work);
  for (int64_t i = 1; i < threads; ++i) others[i].join();
}

}  // namespace

EXPORT void mambakit_use_team(void* gomp_parallel) { team = reinterpret_cast<Team>(gomp_parallel); }

EXPORT int mambakit_parallel(int64_t items, int64_t threads, void (*worker)(void*, MambakitWork*), void* context) {
  if (items <= 0) return 0;
  MambakitWork work;
  work.items = items;
  work.worker = worker;
  work.context = context;
  if (threads > items) threads = items;
  if (threads <= 1)
    run(&work);
  else if (team)
    team(run, &work, static_cast<unsigned>(threads), 0);
  else
    run_on_own_threads(&work, threads);
  return work.failed.load();
}

EXPORT int64_t mambakit_next(MambakitWork* work) {
  int64_t item = work->next.fetch_add(1, std::memory_order_relaxed);
  return item < work->items ? item : -1;
}

EXPORT float* mambakit_scratch(MambakitWork* work, int64_t count) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, static_cast<size_t>(count) * sizeof(float)) != 0) {
    work->failed.store(1);
    return nullptr;
  }
  return static_cast<float*>(memory);
}

EXPORT void mambakit_release(float* scratch) { free(scratch); }

// A program: kernel calls whose arguments stay in place, run one after the other. Returns the first code that is not 0.
struct MambakitCall {
  int (*kernel)(const void* arguments, int64_t variant);
  const void* arguments;
  int64_t variant;
};
EXPORT int mambakit_run(const MambakitCall* calls, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (int code = calls[i].kernel(calls[i].arguments, calls[i].variant)) return code;
  return 0;
}

// Whether this processor and operating system run what was compiled as `isa`.
EXPORT int mambakit_supports(const char* isa) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  if (strcmp(isa, "avx512") == 0)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx2") &&
           __builtin_cpu_supports("fma");
  if (strcmp(isa, "avx2") == 0) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return strcmp(isa, "portable") == 0 || strcmp(isa, "neon") == 0;
}
