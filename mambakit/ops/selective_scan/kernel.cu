// The selective scan on NVIDIA GPUs, compiled at run time for one combination of the macros in common.cuh.
#include "common.cuh"
#ifdef FORWARD
#include "forward.cuh"
#else
#include "backward.cuh"
#endif
