"""What torch.compile runs outside of its graphs. A trace imports this module: it loads torch._dynamo, which takes a
second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mambakit.ops._releases import outside_graphs

NOT_TRACED = (
    "position_ids, seq_idx, cu_seq_lens_q and cu_seq_lens_k: how many documents begin in a row is a matter of values, "
    "which a trace cannot follow; give cu_seqlens, whose shape says it, or none of them where every row is one document"
)


def _call(function: Callable, *args: Any) -> Any:
    return function(*args)


# ``function(*args)`` between two graphs; raises under fullgraph=True.
between_graphs = outside_graphs(_call, NOT_TRACED)
