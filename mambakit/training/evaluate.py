"""Held-out loss during a run, on a fixed sample, and of whole documents at its end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mambakit.generation.score import Score, TokenScorer
from mambakit.generation.token_scores import score_packed
from mambakit.modules import StateCache
from mambakit.training.data import TokenStore
from mambakit.training.data.rows import sample_rows
from mambakit.training.step import TrainingStep
from mambakit.training.tokenizer import Vocabulary


@torch.no_grad()
def sample_loss(step: TrainingStep, store: TokenStore, length: int, rows: int = 64) -> float:
    """Mean loss in nats per token over ``rows`` evenly spaced rows of the documents, each from a zero state."""
    batch = sample_rows(store, length, rows).to(step.device)
    step.model.eval()
    losses = [step.loss(part, torch.zeros_like(part, dtype=torch.bool)) * part.shape[0] for part in batch.split(32)]
    step.model.train()
    return float(torch.stack(losses).sum() / batch.shape[0])


@torch.no_grad()
def score_documents(
    model: Any,
    store: TokenStore,
    vocabulary: Vocabulary,
    masked: bool,
    chunk_size: int,
    state: StateCache | None = None,
) -> Score:
    """Score every document from its start to its end, the state carried; the end token is not counted.

    Args:
        masked: leave out tokens that are N (nucleotides).
        chunk_size: tokens of a forward pass; memory is proportional to it. Documents that fit are packed into one.
        state: of one row, before each document. None: zeros.
    """
    score = Score(characters=int(store.characters.sum()), bytes=int(store.bytes.sum()))
    unknown = vocabulary.unknown if masked else None
    for ids, log_probs in _scored(model, store, vocabulary.end, chunk_size, state):
        kept = log_probs.double()
        if unknown is not None:
            left_out = ids == unknown
            kept = kept[~left_out]
            score.characters -= int(left_out.sum())
            score.bytes -= int(left_out.sum())
        score.nats -= float(kept.sum())
        score.tokens += len(kept)
    return score


def _scored(
    model: Any, store: TokenStore, end: int, chunk_size: int, state: StateCache | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids (l,) int64, ln p of each (l,) float32) of every document, a chunk or several short documents at a time."""
    short: list[Tensor] = []
    size = 0
    for document in range(len(store)):
        body = int(store.lengths[document]) - 1
        if body > chunk_size:
            scorer = TokenScorer(model, end, state)
            for start in range(0, body, chunk_size):
                ids = _ids(store, document, start, min(body, start + chunk_size))
                yield ids, scorer(ids)
        elif body:
            if size + body > chunk_size:
                yield _packed(model, short, end, state)
                short, size = [], 0
            short.append(_ids(store, document, 0, body))
            size += body
    if short:
        yield _packed(model, short, end, state)


def _packed(model: Any, documents: list[Tensor], end: int, state: StateCache | None) -> tuple[Tensor, Tensor]:
    """Documents side by side in one row, each from the same state, the end token before it."""
    start = torch.tensor([end], dtype=torch.int64, device="cpu")
    scores = score_packed(model, [(start, document) for document in documents], state)
    return torch.cat(documents), torch.cat([found.log_probs for found in scores])


def _ids(store: TokenStore, document: int, start: int, stop: int) -> Tensor:
    return torch.from_numpy(store.read(document, start, stop).astype("int64"))
