"""Embeddings of texts: one vector for each, from the states after its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mambakit.generation.token_ids import texts as require_texts
from mambakit.models.families import CAUSAL_LM, FAMILIES
from mambakit.quoting import brief

Pooling = Literal["last", "mean"]
_POOLINGS = ("last", "mean")


@torch.inference_mode()
def embed(
    model: Any,
    tokenizer: Any,
    texts: str | Sequence[str],
    pooling: Pooling = "mean",
    normalize: bool = True,
    batch_size: int = 32,
) -> Tensor:
    """One vector for each text.

    Texts of a batch have nearly the same length and are padded; padding changes nothing.

    Args:
        model: `MambaModel` or `BiMambaModel`, or a model with one as its backbone.
        tokenizer: transformers'.
        texts: one text, or several.
        pooling: "mean" of the last hidden states of a text's tokens, or the "last" token's, which has read them all.
        normalize: to length 1, so that a product is the cosine.
        batch_size: texts that are read together.

    Returns:
        (texts, h) float32, on the model's device; (texts, 2 h) of a model that reads both strands.

    Raises:
        ValueError: an unknown pooling, "last" of a model that reads in both directions, or a text without tokens.
    """
    if pooling not in _POOLINGS:
        raise ValueError(f"pooling is {brief(pooling)}; choose one of {', '.join(_POOLINGS)}")
    both_ways = _reads_both_ways(model.config)
    if both_ways and pooling == "last":
        raise ValueError('pooling is "last", but in a model that reads both ways no token has read all: take "mean"')
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
    given = require_texts("texts", [texts] if isinstance(texts, str) else texts)
    rows = [tokenizer(text)["input_ids"] for text in given]
    for index, row in enumerate(rows):
        if not row:
            raise ValueError(f"text {index} ({brief(given[index])}) has no tokens, and so no state to pool; drop it")
    backbone = model.base_model
    vectors: list[Tensor] = [torch.empty(0, device="cpu", dtype=torch.float32)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for index, vector in zip(chosen, _pooled(backbone, [rows[i] for i in chosen], pooling), strict=True):
            vectors[index] = vector
    if not vectors:
        width = model.config.hidden_size * (2 if both_ways and model.config.complement else 1)
        return torch.empty(0, width, dtype=torch.float32, device=model.device)
    result = torch.stack(vectors)
    return torch.nn.functional.normalize(result, dim=-1) if normalize else result


def _reads_both_ways(config: Any) -> bool:
    """Whether a model is of a family that writes no text: it has no state, and its last token has not read all."""
    family = FAMILIES.get(config.model_type)
    return family is not None and CAUSAL_LM not in family.endings


def _pooled(backbone: Any, rows: list[list[int]], pooling: str) -> Tensor:
    """(b, h) float32."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64, device="cpu")
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device="cpu")
    mask = (torch.arange(longest, dtype=torch.int64, device="cpu") < lengths[:, None]).to(torch.int64)
    ids, mask, lengths = ids.to(backbone.device), mask.to(backbone.device), lengths.to(backbone.device)
    options = {} if _reads_both_ways(backbone.config) else {"use_cache": False}  # no state, no such option
    hidden = backbone(ids, attention_mask=mask, **options).last_hidden_state.float()
    if pooling == "last":
        return hidden[torch.arange(len(rows), dtype=torch.int64, device=hidden.device), lengths - 1]
    return (hidden * mask[..., None]).sum(1) / lengths[:, None]
