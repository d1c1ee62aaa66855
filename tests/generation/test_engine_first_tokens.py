"""First tokens that are waited for behind the next look, beside all that a text may ask for: each text as alone."""

from __future__ import annotations

import pytest
import torch

from mambakit.generation.engine import Engine, Request
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.stream import Sampling
from tests.decoding.eager_graph import decode_by, read_in_buckets
from tests.models.configurations import pair

pytestmark = pytest.mark.filterwarnings("ignore")


def requests(kind: str) -> list[Request]:
    generator = torch.Generator().manual_seed(5)
    lengths = [7] * 9 if kind == "one prompt" else range(3, 48, 5)
    prompts = [torch.randint(1, 50, (length,), generator=generator) for length in lengths]
    return [
        Request(
            prompts[0] if kind == "one prompt" else ids,
            Sampling(seed=i, repetition_penalty=1.4 if kind == "penalty" else 1.0),
            1 if kind == "one token" and i % 2 else 12,
            share=("key", i % 2), keep_state=i % 3 == 0, log_probs=i % 3 if kind == "log-probabilities" else None,
        )
        for i, ids in enumerate(prompts)
    ]  # fmt: skip


@pytest.mark.parametrize("cached", [False, True], ids=["", "prefix cache"])
@pytest.mark.parametrize("kind", ["log-probabilities", "penalty", "one token", "one prompt", "ends"])
def test_texts_that_come_while_others_write(monkeypatch, kind, cached):
    model = pair("untied")[0].eval()
    model.generation_config.eos_token_id = [3, 9] if kind == "ends" else None
    alone = [Engine(model, 1).write([request])[0] for request in requests(kind)]
    decode_by("graph", monkeypatch)
    read_in_buckets(monkeypatch)
    prefixes = PrefixCache(model, chunk_size=8) if cached else None
    engine = Engine(model, 3, tokens_per_look=4, slice_tokens=3, prefix_cache=prefixes)
    together = requests(kind)
    coming = iter(together)
    engine.submit(next(coming))
    while engine.busy or engine.waiting:
        engine.step()
        for request in (next(coming, None), next(coming, None)):
            if request is not None:
                engine.submit(request)
    for one, expected in zip(together, alone, strict=True):
        assert (one.tokens, one.finish_reason) == (expected.tokens, expected.finish_reason)
        assert len(one.token_log_probs) == (len(one.tokens) if one.log_probs is not None else 0)
        if one.keep_state:
            assert torch.allclose(one.final_state.ssm_states, expected.final_state.ssm_states, atol=1e-5)
