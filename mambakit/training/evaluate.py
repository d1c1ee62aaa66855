"""Held-out loss during a run, on a fixed sample; `mambakit.generation.score` scores whole texts."""

from __future__ import annotations

import numpy as np
import torch

from mambakit.training.step import TrainingStep


@torch.no_grad()
def sample_loss(step: TrainingStep, documents: list[np.ndarray], length: int, rows: int = 64) -> float:
    """Mean loss in nats per token over ``rows`` evenly spaced rows of the joined documents, each from a zero state."""
    tokens = np.concatenate(documents)
    length = min(length, len(tokens) - 1)
    starts = np.linspace(0, len(tokens) - length - 1, num=min(rows, max(1, (len(tokens) - 1) // length))).astype(int)
    batch = torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts])).long().to(step.device)
    step.model.eval()
    losses = [step.loss(part, torch.zeros_like(part, dtype=torch.bool)) * part.shape[0] for part in batch.split(32)]
    step.model.train()
    return float(torch.stack(losses).sum() / batch.shape[0])
