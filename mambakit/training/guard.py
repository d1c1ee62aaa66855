"""Skips updates whose gradient is not finite, or whose norm is an outlier, and counts them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambakit.training.distributed import ProcessMesh, local

# Updates before the running mean of the gradient's norm is used, and the decay of that mean.
_WARM_UP = 50
_DECAY = 0.98


class UpdateGuard:
    """Decides about each update on the device, without a host synchronisation, so that the step can be a CUDA graph.

    `check` sets ``skip`` to 1 where the update is to be skipped; a fused optimiser whose ``found_inf`` is that tensor
    then changes neither parameters nor its own state.

    Args:
        device: the model's.
        spike_factor: skip a gradient norm above this many times the running mean of those accepted; 0: never.

    Attributes:
        skip: () float32, 1 where the latest update was skipped.
        skipped, in_a_row: () int64, updates skipped in all, and since the last one that was made.
        worst: () float32, the largest norm skipped (infinite where one was not a number).
    """

    def __init__(self, device: torch.device, spike_factor: float = 0.0):
        self.spike_factor = spike_factor
        self.skip = torch.zeros((), dtype=torch.float32, device=device)
        self.mean = torch.zeros((), dtype=torch.float32, device=device)
        self.accepted = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.worst = torch.zeros((), dtype=torch.float32, device=device)

    @torch.no_grad()
    def check(self, norm: Tensor) -> None:
        """Decide about the update whose gradient has this norm (), before clipping; it may be NaN or infinite."""
        norm = norm.float()
        finite = torch.isfinite(norm)
        made = finite
        if self.spike_factor:
            made = finite & ((self.accepted < _WARM_UP) | (norm <= self.spike_factor * self.mean))
        count = made.long()
        self.skip.copy_(1.0 - made.float())
        self.accepted.add_(count)
        self.skipped.add_(1 - count)
        self.in_a_row.add_(1).mul_(1 - count)
        # A plain mean at first, then an exponential moving average.
        weight = torch.clamp(1.0 / self.accepted.clamp(min=1), min=1 - _DECAY)
        self.mean.copy_(torch.where(made, self.mean + weight * (norm - self.mean), self.mean))
        bad = torch.where(finite, norm, torch.full_like(norm, torch.inf))
        self.worst.copy_(torch.where(made, self.worst, torch.maximum(self.worst, bad)))

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("mean", "accepted", "skipped", "in_a_row", "worst")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.state_dict().items():
            value.copy_(state[name])


def weights_are_finite(model: nn.Module, mesh: ProcessMesh) -> bool:
    """Whether all parameters of all processes are finite. A collective call: every process gets the same answer."""
    finite = torch.ones((), dtype=torch.float32, device=mesh.device)
    for parameter in model.parameters():
        finite *= torch.isfinite(local(parameter.detach())).all()
    return float(mesh.mean(finite)) == 1.0
