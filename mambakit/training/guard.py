"""Which updates are made: one that is not finite, or far out of the ordinary, is skipped and reported."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambakit.training.distributed import ProcessMesh, local

# The running mean of the gradient's norm means something after this many updates.
_SETTLING = 50
_MEMORY = 0.98


class UpdateGuard:
    """Decides about each update on the device, without a wait, so that the step can be a CUDA graph.

    `check` leaves 1 in ``skip`` where the update is not to be made; a fused optimiser whose ``found_inf`` is that tensor
    then changes neither parameters nor its own state.

    Args:
        device: the model's.
        spike_factor: skip a gradient norm above this many times the running mean of those accepted; 0: never.

    Attributes:
        skip: () float32, 1 where the latest update was skipped.
        skipped, in_a_row: () int64, updates skipped in all, and up to now without one made.
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
        """Judge the update whose gradient has this norm (), before clipping; NaN or infinite where the loss was."""
        norm = norm.float()
        finite = torch.isfinite(norm)
        made = finite
        if self.spike_factor:
            made = finite & ((self.accepted < _SETTLING) | (norm <= self.spike_factor * self.mean))
        count = made.long()
        self.skip.copy_(1.0 - made.float())
        self.accepted.add_(count)
        self.skipped.add_(1 - count)
        self.in_a_row.add_(1).mul_(1 - count)
        # A plain mean at first, then one that forgets.
        weight = torch.clamp(1.0 / self.accepted.clamp(min=1), min=1 - _MEMORY)
        self.mean.copy_(torch.where(made, self.mean + weight * (norm - self.mean), self.mean))
        bad = torch.where(finite, norm, torch.full_like(norm, torch.inf))
        self.worst.copy_(torch.where(made, self.worst, torch.maximum(self.worst, bad)))

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("mean", "accepted", "skipped", "in_a_row", "worst")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.state_dict().items():
            value.copy_(state[name])


def weights_are_finite(model: nn.Module, mesh: ProcessMesh) -> bool:
    """Whether every parameter is a number, at every process, so that all answer alike. All of them make the call."""
    finite = torch.ones((), dtype=torch.float32, device=mesh.device)
    for parameter in model.parameters():
        finite *= torch.isfinite(local(parameter.detach())).all()
    return float(mesh.mean(finite)) == 1.0
