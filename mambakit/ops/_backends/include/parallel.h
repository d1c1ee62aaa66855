// Work shared among threads. The team is the process's OpenMP team (torch's own) when Python has found it, so that the
// threads of torch and of these kernels are the same threads and never compete for a core.
#pragma once

#include <stdint.h>

struct MambakitWork;
extern "C" {
// Calls worker(context, work) on up to `threads` threads; returns 1 when a worker ran out of memory.
int mambakit_parallel(int64_t items, int64_t threads, void (*worker)(void*, MambakitWork*), void* context);
// The next item for this thread, or -1 when none is left.
int64_t mambakit_next(MambakitWork* work);
// So many more items are finished: what they wrote may be read by others.
void mambakit_done(MambakitWork* work, int64_t items);
// `count` floats on a 64-byte boundary, freed by the caller with mambakit_release; null, and the call fails, without
// memory.
float* mambakit_scratch(MambakitWork* work, int64_t count);
void mambakit_release(float* scratch);
}

namespace {

// body(item, scratch) for every item, with `scratch_floats` of private memory per thread; prepare(scratch) before a
// thread's first item.
template <class Prepare, class Body>
int for_each(int64_t items, int64_t threads, int64_t scratch_floats, const Prepare& prepare, const Body& body) {
  struct Context {
    const Prepare* prepare;
    const Body* body;
    int64_t scratch_floats;
  } context{&prepare, &body, scratch_floats};
  return mambakit_parallel(
      items, threads,
      [](void* opaque, MambakitWork* work) {
        const Context& c = *static_cast<const Context*>(opaque);
        float* scratch = nullptr;
        if (c.scratch_floats && !(scratch = mambakit_scratch(work, c.scratch_floats))) return;
        int64_t count = 0;
        for (int64_t item; (item = mambakit_next(work)) >= 0; ++count) {
          if (count == 0) (*c.prepare)(scratch);
          (*c.body)(item, scratch);
        }
        if (count) mambakit_done(work, count);
        mambakit_release(scratch);
      },
      &context);
}
template <class Body>
int for_each(int64_t items, int64_t threads, int64_t scratch_floats, const Body& body) {
  return for_each(items, threads, scratch_floats, [](float*) {}, body);
}

}  // namespace
