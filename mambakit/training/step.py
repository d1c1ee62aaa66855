"""One optimiser step, run eagerly or captured once as a CUDA graph and replayed."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.ops import linear_cross_entropy


class TrainingStep:
    """Forward, backward, clip and update on one batch; returns the loss and the gradient's norm as device tensors."""

    def __init__(
        self, model: Any, optimizer: torch.optim.Optimizer, clip: float, autocast: str, respect_documents: bool
    ):
        self.model, self.optimizer, self.clip = model, optimizer, clip
        self.device = next(model.parameters()).device
        self.half = autocast == "bfloat16" and self.device.type == "cuda"
        self.respect_documents = respect_documents

    def autocast(self) -> contextlib.AbstractContextManager:
        # Without the cache of cast weights: it would keep a captured graph's tensors alive between replays.
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if self.half else contextlib.nullcontext()

    def loss(self, rows: Tensor, begins: Tensor) -> Tensor:
        """Mean next-token loss of rows (b, l + 1); a document's first token is not predicted across its boundary."""
        tokens, targets = rows[:, :-1], rows[:, 1:]
        position_ids = None
        if self.respect_documents:
            targets = targets.masked_fill(begins[:, 1:], -100)
            position_ids = _positions(begins[:, :-1])
        with self.autocast():
            hidden = self.model.backbone(tokens, use_cache=False, position_ids=position_ids).last_hidden_state
            return linear_cross_entropy(
                hidden.flatten(0, 1), self.model.get_output_embeddings().weight, targets.flatten().contiguous()
            )

    def run(self, rows: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
        loss = self.loss(rows, begins)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm


class CapturedStep:
    """A `TrainingStep` as one CUDA graph over fixed input memory.

    The first calls run eagerly (kernels are compiled, the optimiser's state is made), the next one is captured.
    """

    _EAGER_CALLS = 3

    def __init__(self, step: TrainingStep):
        if step.respect_documents:
            raise ValueError(
                "respect_documents packs rows of changing shapes, which a CUDA graph cannot hold; set cuda_graph=false"
            )
        self.step = step
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream()

    def run(self, rows: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
        if self.graph is None:
            if self.calls < self._EAGER_CALLS:
                self.calls += 1
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    result = self.step.run(rows, begins)
                torch.cuda.current_stream().wait_stream(self.stream)
                return result
            self.rows, self.begins = rows.clone(), begins.clone()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.result = self.step.run(self.rows, self.begins)
        self.rows.copy_(rows)
        self.graph.replay()
        return self.result[0].clone(), self.result[1].clone()


def _positions(begins: Tensor) -> Tensor:
    """Positions (b, l) that restart at 0 where a document begins."""
    index = torch.arange(begins.shape[1], device=begins.device).expand(begins.shape)
    start = torch.where(begins, index, 0).cummax(1).values
    return index - start
