"""What torch.compile runs outside of its graphs. A trace imports this module: it loads torch._dynamo, which takes a
second."""

from __future__ import annotations

from mambakit.nn.segments import segments_of
from mambakit.ops._releases import outside_graphs

# `segments_of` between two graphs; raises under fullgraph=True.
segments_between_graphs = outside_graphs(
    segments_of, "MambaStack: how many episodes start in a row is a matter of values, which a graph lacks"
)
