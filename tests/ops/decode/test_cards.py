"""What each card would get of the decode kernels: the plan of the persistent kernel, or what serves in its place."""

from __future__ import annotations

import pytest
import torch

from benchmarks.architectures import persistent
from benchmarks.kernel_cases import CARDS, SHAPES
from mambakit.ops.decode.persistent_plan import PersistentPlan
from mambakit.ops.decode.triton_many_rows import Product, plans
from mambakit.ops.linear import triton as linear
from mambakit.ops.linear import triton_plan

# The most rows that the persistent kernel serves of each shape in bfloat16, by compute capability. The decoding layer
# gives larger batches to Triton's kernels earlier where those are faster (`mambakit.decoding.graph_step`).
MOST_ROWS = {
    "130m": {80: 8, 86: 8, 89: 8, 90: 8, 100: 8, 120: 8},
    "370m": {80: 8, 86: 8, 89: 8, 90: 8, 100: 8, 120: 8},
    "1.4b": {80: 8, 86: 2, 89: 4, 90: 8, 100: 8, 120: 4},
    "2.8b": {80: 6, 86: 0, 89: 1, 90: 8, 100: 8, 120: 2},
    "7B": {80: 0, 86: 0, 89: 0, 90: 6, 100: 6, 120: 0},
}
ROWS = (1, 2, 4, 6, 8)


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_persistent_plan(shape, capability):
    card = CARDS[capability]
    served = []
    for rows in ROWS:
        plan = persistent(card, shape, None, rows)
        if isinstance(plan, PersistentPlan):
            assert plan.shared_bytes <= card.shared
            assert plan.grid == card.processors
            served.append(rows)
        else:
            assert "bytes of shared memory beside the weights' ring" in plan, "there is no other reason"
    assert served == [rows for rows in ROWS if rows <= MOST_ROWS[shape][capability]]


def test_a_deep_ring_where_there_is_room_and_one_stage_at_least():
    """1.4b at one row: stages of the ring of weight tiles, and buffers of small weights."""
    found = {}
    for capability, card in CARDS.items():
        macros = persistent(card, "1.4b", None, 1).macros
        found[capability] = macros["STAGES"], macros["BUFFERS"]
    assert found == {80: (4, 2), 86: (1, 1), 89: (2, 1), 90: (8, 2), 100: (8, 2), 120: (3, 1)}


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("rows", [1, 16, 64, 128, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_of_many_rows_fit(rows, dtype, capability):
    """What `ManyRowsStep` makes of its plans for a card: two stages at least."""
    limit = CARDS[capability].shared - 4096
    block = min(128, max(16, 1 << (rows - 1).bit_length()))
    for name, plan in plans(rows, 16).items():
        if not isinstance(plan, Product):
            continue
        fitted = plan.within(block, dtype.itemsize, limit)
        assert fitted.stages * (fitted.BN + block) * fitted.BK * dtype.itemsize <= limit, name
        assert fitted.stages >= 2
        assert fitted.BK >= 32
        if dtype == torch.bfloat16 and capability in (90, 100):
            assert fitted == plan, "these cards have room for what was measured"


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_products_of_packed_weights_fit(format, capability):
    """A tile of 256 rows of x is turned in 128 KiB of shared memory, which cards of 99 do not have."""
    limit = CARDS[capability].shared - linear.KEPT
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (1, 16, 32, 64, 128, 256, 512):
            plan = triton_plan.product_of(format, dtype, 64, rows, limit)
            if plan is None:
                continue
            assert plan.shared_bytes(format, dtype.itemsize) <= limit, rows
            assert plan.stages >= 2
            if capability in (90, 100) and dtype == torch.bfloat16:
                assert plan == triton_plan.tile_of(format, rows), "these cards have room for what was measured"
