"""A limit on how long OpenMP's threads spin while they wait for work, in processes that are mambakit's own.

A spinning thread keeps its core. On a shared machine that is time in which another process, or another thread of the
same OpenMP team, could run. GNU's runtime, which torch brings on Linux, spins 300,000 times (5 to 15 ms) before a
thread sleeps; LLVM's and Intel's spin for 200 ms.
"""

from __future__ import annotations

import os
import sys

# Longer than the gaps between two ops, far shorter than a time slice; measured with benchmarks/busy_machine.py.
SPINS = 300
MILLISECONDS = 1
# The user has decided where one of these is set.
_SETTINGS = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")


def bound_spinning() -> bool:
    """Set the limit for this process and those that it starts.

    OpenMP's runtime reads the environment when it is loaded, together with torch. So nothing is changed after that, nor
    where the user has set one of `GOMP_SPINCOUNT`, `KMP_BLOCKTIME` and `OMP_WAIT_POLICY`.

    Returns:
        Whether the limit was set.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _SETTINGS):
        return False
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    os.environ["KMP_BLOCKTIME"] = str(MILLISECONDS)
    return True
