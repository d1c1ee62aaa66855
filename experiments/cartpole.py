"""CartPole-v1 with its velocities masked, many poles at once as tensors: a task that needs memory.

The equations and limits are gymnasium's (`gymnasium.envs.classic_control.cartpole`, Euler integration, 500 steps at
most, reward 1 a step); a test steps both side by side. Of the four numbers the agent sees two: the cart's position and
the pole's angle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

OBSERVATIONS, ACTIONS, LONGEST = 2, 2, 500
_GRAVITY, _CART, _POLE, _HALF_LENGTH, _FORCE, _SECONDS = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
_FARTHEST, _STEEPEST = 2.4, 12 * 2 * math.pi / 360


def dynamics(state: Tensor, actions: Tensor) -> Tensor:
    """One step of (b, 4) position, velocity, angle and angular velocity, actions (b,) 0 or 1."""
    x, speed, angle, turning = state.unbind(-1)
    force = torch.where(actions == 1, _FORCE, -_FORCE)
    sine, cosine, mass = torch.sin(angle), torch.cos(angle), _CART + _POLE
    push = (force + _POLE * _HALF_LENGTH * turning**2 * sine) / mass
    torque = (_GRAVITY * sine - cosine * push) / (_HALF_LENGTH * (4 / 3 - _POLE * cosine**2 / mass))
    acceleration = push - _POLE * _HALF_LENGTH * torque * cosine / mass
    return torch.stack(
        (
            x + _SECONDS * speed,
            speed + _SECONDS * acceleration,
            angle + _SECONDS * turning,
            turning + _SECONDS * torque,
        ),
        -1,
    )


class CartPoles:
    """``b`` poles, each begun anew in the step after its episode ended.

    Attributes:
        lengths: of every episode that has ended since they were last taken, a tensor (e,) for each step.
    """

    def __init__(self, b: int, device: torch.device, generator: torch.Generator):
        self.device, self.generator = device, generator
        self.state = self._begin(b)
        self.steps = torch.zeros(b, dtype=torch.int64, device=device)
        self.lengths: list[Tensor] = []

    def _begin(self, b: int) -> Tensor:
        return torch.rand(b, 4, generator=self.generator, device=self.device) * 0.1 - 0.05

    def observations(self) -> Tensor:
        """(b, 2), scaled to about 1."""
        return torch.stack((self.state[:, 0] / _FARTHEST, self.state[:, 2] / _STEEPEST), -1)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """(b,) bool twice: which poles fell or left, and which episodes ended, by that or by their length."""
        self.state = dynamics(self.state, actions)
        self.steps += 1
        fell = (self.state[:, 0].abs() > _FARTHEST) | (self.state[:, 2].abs() > _STEEPEST)
        ended = fell | (self.steps >= LONGEST)
        self.lengths.append(self.steps[ended])
        self.state = torch.where(ended[:, None], self._begin(len(ended)), self.state)
        self.steps = torch.where(ended, 0, self.steps)
        return fell, ended

    def take_lengths(self) -> list[int]:
        """Lengths of the episodes that ended since the last call."""
        found = torch.cat(self.lengths).tolist() if self.lengths else []
        self.lengths = []
        return found
