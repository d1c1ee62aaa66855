"""What lies between the models' steps of a round of speculation: Triton's kernels against PyTorch, on random rows."""

import pytest
import torch

pytest.importorskip("triton")

from mambakit.decoding import round_steps
from mambakit.ops.decode import triton_round
from tests.ops.interpreter import DEVICES, INTERPRETED, run_interpreted

NAMES = [
    "LAST",
    "PREVIOUS",
    "LATE",
    "POSITION",
    "MOST",
    "ENDED",
    "FIELDS",
    "READ",
    "GUESSED",
    "ACCEPTED",
    "BROKEN",
    "TOKENS",
]


def test_columns_are_numbered_alike():
    for name in NAMES:
        assert getattr(triton_round, name).value == getattr(round_steps, name)


def rows_of(b: int, ends: int, generator: torch.Generator):
    def some(*shape: int, high: int = 5) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    rows = torch.cat([some(b, 2, high=9), some(b, 1, high=2), some(b, 1, high=30), some(b, 1, high=30),
                      some(b, 1, high=2), some(b, ends, high=9) - 1], 1)  # fmt: skip
    rows[:, round_steps.MOST] += rows[:, round_steps.POSITION] + 1
    asked = torch.stack([some(b), some(b) + 2, some(b, high=4).clamp(max=1)], 1)
    return rows, asked, some


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("b", "ends", "k", "steps"), [(1, 4, 3, 4), (5, 1, 1, 2), (8, 4, 4, 4), (3, 7, 0, 0)])
def test_kernels(device, b, ends, k, steps):
    generator = torch.Generator().manual_seed(b)
    for _ in range(8 if INTERPRETED else 40):
        rows, asked, some = rows_of(b, ends, generator)
        picks, best = some(steps, b, high=9), some(b, k + 1, high=9) - 1
        found = []
        for ops, where in ((round_steps, "cpu"), (triton_round, device)):
            mine, wanted, picked = (t.clone().to(where) for t in (rows, asked, picks))
            inputs, counts, accepted, kept, at = (torch.full((b,), -7, device=where) for _ in range(5))
            broken = (rows[:, 0] % 2).to(where)
            tokens = torch.full((b, k + 1), -7, device=where)
            result = torch.full((b, round_steps.TOKENS + k + 3), -7, device=where)
            ops.begin(mine, wanted, inputs, counts)
            counts.clamp_(max=k)
            first = inputs.clone()
            if steps:
                ops.second(mine, picked[0], inputs)
            ops.assemble(mine, picked, tokens)
            ops.accept(tokens, best.to(where), counts, accepted)
            chosen = best.to(where)
            ops.finish(mine, wanted, chosen, accepted, counts, broken, steps, result, kept, at)
            found.append([t.cpu() for t in (mine, first, inputs, counts, tokens, accepted, kept, at, result)])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="there is a GPU, or it is interpreted")
def test_interpreter():
    run_interpreted(__file__)
