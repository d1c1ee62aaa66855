"""How long the threads of OpenMP wait for work by spinning, in processes that are mambakit's own.

A thread that spins keeps its processor. On a machine that others use, it spins through the time in which a neighbour's thread,
or another of the team's, could run: everything that waits for that one waits longer. GNU's runtime, which torch brings on
Linux, spins 300,000 times (5 to 15 ms) before it sleeps; LLVM's and Intel's 200 ms.
"""

from __future__ import annotations

import os
import sys

# docs/guides/cpu.md has the measurement (benchmarks/busy_machine.py): enough for the gaps between two ops, far less than a time slice.
SPINS = 300
MILLISECONDS = 1
# Any of these is the user's own word on the matter.
_SETTINGS = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")


def bound_spinning() -> bool:
    """Bound the spinning of this process's threads, and of processes that it starts; whether it did.

    The runtime reads the environment when it is loaded, with torch: afterwards nothing is changed, and neither is anything
    where the user has set one of `GOMP_SPINCOUNT`, `KMP_BLOCKTIME` and `OMP_WAIT_POLICY`.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _SETTINGS):
        return False
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    os.environ["KMP_BLOCKTIME"] = str(MILLISECONDS)
    return True
