"""What the ops' implementations share: how they are registered, and what lies between Python and native code.

dispatch.py     the torch.library handle; which implementation serves which dispatch key
memory.py       memory for kernels, and the one check before an address is taken
native.py       the shared library of the C++ kernels: found, loaded, an instruction set chosen
structures.py   parameter structures of the C++ kernels
nvrtc.py        CUDA C++ compiled at run time, and its launches
prepared_triton.py      Triton's kernels launched with addresses alone
launch_list.py, .cpp    GPU work that is put together once and enqueued by one call
cublas.py       matrix products in such a list
runtime.cpp, include/   the native library's threads and vectors
"""
