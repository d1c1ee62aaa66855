"""The CPU implementations: C++ kernels in one shared library, loaded with ctypes, chosen by instruction set at run time.

register()   serve the ops' CPU dispatch key from here (called once, by mambakit.ops)
describe()   what `mambakit env` prints
use_isa()    run another instruction set's kernels than the best one, for tests and comparisons
"""

from mambakit.ops.native.library import describe, use_isa
from mambakit.ops.native.registration import register

__all__ = ["describe", "register", "use_isa"]
