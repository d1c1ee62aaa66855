// What is not a kernel: which instruction sets this processor has, and the threads. Compiled once, for the baseline.
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include <atomic>
#include <new>
#include <thread>

#include "parallel.h"

#if defined(_WIN32)
#include <malloc.h>
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Counters shared by the threads of one loop. Its items are split into as many runs as there are threads, up to kRuns.
// A thread takes the items of its own run first (the same channels in every loop of a step, which stay in its cache,
// and weights at consecutive addresses), then items left in other runs. `done` counts finished items. A loop ends when
// all items are finished, so a thread that the system has put to sleep between two items delays no other thread.
constexpr int64_t kRuns = 16;
struct alignas(64) Counter {
  std::atomic<int64_t> value{0};
};

struct MambakitWork {
  Counter* counters;  // of the runs, then `done`
  std::atomic<int>* failed;
  int64_t items, runs, run, left;  // the run it takes from now, and how many it has not been through
};

namespace {

// The signature of GOMP_parallel, which GCC's, LLVM's and Intel's OpenMP runtimes all have.
typedef void (*Team)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
Team team = nullptr;

constexpr int kMaxThreads = 256;

void run_on_threads(void (*body)(void*), void* data, int64_t threads) {
  if (threads <= 1) return body(data);
  if (team) return team(body, data, static_cast<unsigned>(threads), 0);
  std::thread others[kMaxThreads];
  if (threads > kMaxThreads) threads = kMaxThreads;
  for (int64_t i = 1; i < threads; ++i) others[i] = std::thread(body, data);
  body(data);
  for (int64_t i = 1; i < threads; ++i) others[i].join();
}

// A kernel call on its own: its loop starts the threads.
struct Single {
  Counter counters[kRuns + 1];
  std::atomic<int> failed{0};
  std::atomic<int64_t> started{0};  // threads, so far
  int64_t items, runs;
  void (*worker)(void*, MambakitWork*);
  void* context;
};
void run_single(void* data) {
  Single* single = static_cast<Single*>(data);
  MambakitWork work{single->counters, &single->failed, single->items, single->runs,
                    single->started.fetch_add(1) % single->runs, single->runs};
  single->worker(single->context, &work);
}

// A program: every thread runs all of its calls, and waits at the end of each loop until all items are finished.
struct MambakitCall {
  int (*kernel)(const void* arguments, int64_t variant);
  const void* arguments;
  int64_t variant;
};
struct Program {
  const MambakitCall* calls;
  int64_t count, runs;
  Counter* counters;  // runs + 1 per call: a kernel in a program has one loop at most
  std::atomic<int> failed{0};
  std::atomic<int64_t> started{0};  // threads, so far
};
thread_local Program* program = nullptr;
thread_local int64_t position, own_run;

// Wait until every item is finished, or one has failed for lack of memory.
void wait_for(const std::atomic<int64_t>& done, int64_t items, const std::atomic<int>& failed) {
  for (int spins = 0; done.load(std::memory_order_acquire) < items && !failed.load(); ++spins) {
    if (spins >= 1 << 12) std::this_thread::yield();  // more threads than processors: let the one with the item run
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }
}

void run_program(void* data) {
  program = static_cast<Program*>(data);
  own_run = program->started.fetch_add(1) % program->runs;
  for (position = 0; position < program->count; ++position) {
    const MambakitCall& call = program->calls[position];
    if (call.kernel(call.arguments, call.variant)) break;
  }
  program = nullptr;
}

}  // namespace

EXPORT void mambakit_use_team(void* gomp_parallel) { team = reinterpret_cast<Team>(gomp_parallel); }

EXPORT int mambakit_parallel(int64_t items, int64_t threads, void (*worker)(void*, MambakitWork*), void* context) {
  if (items <= 0) return 0;
  if (program) {
    Counter* counters = program->counters + position * (program->runs + 1);
    MambakitWork work{counters, &program->failed, items, program->runs, own_run, program->runs};
    const std::atomic<int64_t>& done = counters[program->runs].value;
    if (done.load(std::memory_order_acquire) < items) worker(context, &work);
    wait_for(done, items, program->failed);
    return program->failed.load();
  }
  Single single;
  single.items = items;
  single.worker = worker;
  single.context = context;
  threads = threads < items ? threads : items;
  single.runs = threads < 1 ? 1 : threads < kRuns ? threads : kRuns;
  run_on_threads(run_single, &single, threads);
  return single.failed.load();
}

EXPORT int64_t mambakit_next(MambakitWork* work) {
  for (; work->left > 0; --work->left, work->run = (work->run + 1) % work->runs) {
    const int64_t begin = work->run * work->items / work->runs, end = (work->run + 1) * work->items / work->runs;
    std::atomic<int64_t>& taken = work->counters[work->run].value;
    if (taken.load(std::memory_order_relaxed) >= end - begin) continue;
    const int64_t item = begin + taken.fetch_add(1, std::memory_order_relaxed);
    if (item < end) return item;
  }
  return -1;
}

EXPORT void mambakit_done(MambakitWork* work, int64_t items) {
  work->counters[work->runs].value.fetch_add(items, std::memory_order_release);
}

EXPORT float* mambakit_scratch(MambakitWork* work, int64_t count) {
  const size_t size = static_cast<size_t>(count) * sizeof(float);
#if defined(_WIN32)
  void* memory = _aligned_malloc(size, 64);
#else
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, size) != 0) memory = nullptr;
#endif
  if (!memory) work->failed->store(1);
  return static_cast<float*>(memory);
}

EXPORT void mambakit_release(float* scratch) {
#if defined(_WIN32)
  _aligned_free(scratch);
#else
  free(scratch);
#endif
}

// Runs kernel calls whose arguments stay in place, one after the other, with the threads started once. Each kernel has
// at most one loop. Returns 0, or 1 when memory ran out.
EXPORT int mambakit_run(const MambakitCall* calls, int64_t count, int64_t threads) {
  Program all;
  all.calls = calls;
  all.count = count;
  all.runs = threads < 1 ? 1 : threads < kRuns ? threads : kRuns;
  all.counters = new (std::nothrow) Counter[static_cast<size_t>(count * (all.runs + 1))];
  if (!all.counters) return 1;
  run_on_threads(run_program, &all, threads);
  delete[] all.counters;
  return all.failed.load();
}

namespace {

#if defined(__x86_64__)
// What the processor has and the operating system keeps over a switch of threads. Asked by hand: with the toolchain that
// makes the wheels (zig) __builtin_cpu_supports says no to everything.
struct Processor {
  bool avx2 = false, avx512 = false, avx2vnni = false, avx512vnni = false, bfloat16 = false;
  Processor() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool saves = c >> 27 & 1, avx = c >> 28 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
    if (!saves || !avx) return;
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 0x6) != 0x6) return;  // the registers of SSE and AVX
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = (b >> 5 & 1) && fma && f16c;
    const bool kept = (low & 0xe0) == 0xe0;  // those of AVX-512
    avx512 = avx2 && kept && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);  // f, dq, bw, vl
    avx512vnni = avx512 && (c >> 11 & 1);
    const bool tiles = (low & 0x60000) == 0x60000 && (d >> 22 & 1) && (d >> 24 & 1);  // AMX, its bfloat16
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
      avx2vnni = avx2 && (a >> 4 & 1);
      bfloat16 = avx512 && (a >> 5 & 1);
    }
    bfloat16 |= avx512 && tiles;
  }
};
#elif defined(__aarch64__)
struct Processor {
  bool dotprod = false, i8mm = false, bfloat16 = false;
#if defined(__linux__)
  Processor() {
    dotprod = getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
    i8mm = dotprod && (getauxval(AT_HWCAP2) >> 13 & 1);  // HWCAP2_I8MM
    bfloat16 = getauxval(AT_HWCAP2) >> 14 & 1;  // HWCAP2_BF16
  }
#elif defined(__APPLE__)
  static bool has(const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
  }
  Processor() {
    dotprod = has("hw.optional.arm.FEAT_DotProd");
    i8mm = dotprod && has("hw.optional.arm.FEAT_I8MM");
    bfloat16 = has("hw.optional.arm.FEAT_BF16");
  }
#endif
};
#endif

}  // namespace

// Whether this processor and operating system run what was compiled as `isa`; "bfloat16": whether there are
// instructions for products of bfloat16 (AVX-512 BF16, AMX, Arm's BF16).
EXPORT int mambakit_supports(const char* isa) {
#if defined(__x86_64__)
  const Processor processor;
  if (strcmp(isa, "bfloat16") == 0) return processor.bfloat16;
  if (strcmp(isa, "avx512vnni") == 0) return processor.avx512vnni;
  if (strcmp(isa, "avx2vnni") == 0) return processor.avx2vnni;
  if (strcmp(isa, "avx512") == 0) return processor.avx512;
  if (strcmp(isa, "avx2") == 0) return processor.avx2;
#endif
#if defined(__aarch64__)
  const Processor processor;
  if (strcmp(isa, "bfloat16") == 0) return processor.bfloat16;
  if (strcmp(isa, "dotprod") == 0) return processor.dotprod;
  if (strcmp(isa, "i8mm") == 0) return processor.i8mm;
#endif
  return strcmp(isa, "portable") == 0 || strcmp(isa, "neon") == 0;
}
