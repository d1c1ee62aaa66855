"""What the experiments share: the clock, one training step as one CUDA graph, and the file of results."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mambakit
from experiments.settings import Settings
from mambakit.training.optimizer import set_learning_rate

_LEAST_SECONDS = 3.0  # a run with less is not begun
TUNING_SEED = 1000  # of runs that only choose a learning rate


def device_of(settings: Settings) -> torch.device:
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(settings.device)


class Budget:
    """Wall-clock seconds from its making; ``seconds`` 0 is no limit."""

    def __init__(self, seconds: float):
        if seconds < 0:
            raise ValueError(f"a budget of {seconds} seconds; give 0 for no limit, or more")
        self.began, self.seconds = time.monotonic(), seconds or math.inf

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def left(self) -> float:
        return self.seconds - self.elapsed()


def half_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 matrix products on CUDA, float32 elsewhere."""
    # Without the cache of cast weights: it would keep a captured graph's tensors alive between replays.
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()


class Step:
    """One optimiser step: draw a batch, forward, backward, clip, update. On CUDA captured once and replayed.

    Args:
        model: its parameters are clipped together.
        optimizer: of `mambakit.training.optimizer.make_optimizer`, whose rate is a tensor on CUDA.
        draw: draws a batch on the device and returns its loss and any further numbers to average, as tensors of no
            dimensions. It takes its random numbers from the device's default generator (a captured graph advances it)
            and must not wait for the device.
        clip: largest norm of the gradient.
        capture: on CUDA, replay a captured graph after a few eager steps.
    """

    _EAGER_CALLS = 3

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        draw: Callable[[], tuple[Tensor, ...]],
        clip: float = 1.0,
        capture: bool = True,
    ):
        self.model, self.optimizer, self.draw, self.clip = model, optimizer, draw, clip
        self.device = next(model.parameters()).device
        self.capture = capture and self.device.type == "cuda"
        self.sums: Tensor | None = None
        self.count = self.calls = 0
        self.preparing = 0.0  # seconds that the eager steps and the capture took
        self.graph: torch.cuda.CUDAGraph | None = None
        if self.capture:
            self.stream = torch.cuda.Stream()

    def __call__(self) -> None:
        self.count += 1
        self.calls += 1
        if self.graph is not None:
            self.graph.replay()
        elif not self.capture:
            self._step()
        else:
            began = time.monotonic()
            self._prepare()
            torch.cuda.synchronize()
            self.preparing += time.monotonic() - began

    def _prepare(self) -> None:
        if self.calls <= self._EAGER_CALLS:  # kernels are compiled and the optimiser's state is made
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self._step()
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        gc.collect()  # an earlier graph freed during the capture would spoil it
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self._step()
        self.graph.replay()

    def _step(self) -> None:
        numbers = self.draw()
        numbers[0].backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        values = torch.stack([number.detach().float() for number in numbers])
        if self.sums is None:
            self.sums = torch.zeros_like(values)
        self.sums.add_(values)

    def means(self) -> list[float]:
        """Means of what ``draw`` returned since the last call; waits for the device."""
        if self.sums is None:
            raise ValueError("no step has been taken yet")
        means = (self.sums / max(1, self.count)).tolist()
        self.sums.zero_()
        self.count = 0
        return means

    def seconds_per_step(self, steps: int) -> float:
        """Time ``steps`` steps after those that warm up; they train the model as any others do."""
        for _ in range(self._EAGER_CALLS + 2):
            self()
        self.means()
        began = time.monotonic()
        for _ in range(steps):
            self()
        self.means()
        return (time.monotonic() - began) / steps


def train(
    step: Step,
    steps: int,
    rate: Callable[[float], float],
    every: int,
    check: Callable[[int, list[float]], bool],
    deadline: Callable[[], bool] = lambda: False,
) -> tuple[int, str]:
    """Take up to ``steps`` steps.

    Args:
        rate: the learning rate, given how much of ``steps`` is done (0 to 1).
        every: steps between calls of ``check``.
        check: given the number of steps taken and the means since it was last called; True stops.
        deadline: True stops too; asked after each step, without waiting for the device.

    Returns:
        The steps taken, and why it ended: "steps", "check" or "budget".
    """
    for taken in range(1, steps + 1):
        set_learning_rate(step.optimizer, rate((taken - 1) / steps))
        step()
        over = deadline()
        if taken % every == 0 or taken == steps or over:
            if check(taken, step.means()):
                return taken, "check"
            if over:
                return taken, "budget"
    return steps, "steps"


def choose_rates(
    kinds: Iterable[str], rates: tuple[float, ...], trial: Callable[[str, float], float]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Each kind's rate with the least validation loss, which ``trial(kind, rate)`` finds, and every trial; one rate is
    not tried."""
    kinds = list(kinds)
    if len(rates) == 1:
        return dict.fromkeys(kinds, rates[0]), []
    best: dict[str, float] = {}
    trials: list[dict[str, Any]] = []
    for kind in kinds:
        losses = {}
        for rate in rates:
            losses[rate] = trial(kind, rate)
            trials.append({"model": kind, "learning_rate": rate, "validation_loss": losses[rate]})
            say(f"  {trials[-1]}")
        best[kind] = min(losses, key=losses.__getitem__)
    return best, trials


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class Results:
    """``NAME.json`` in the folder of results, written anew (and whole) each time something is added.

    ``complete`` becomes True only when every run was made and none was cut short by the budget.
    """

    def __init__(self, name: str, settings: Settings):
        self.path = Path(settings.out, f"{name}.json")
        self.budget = Budget(settings.budget_seconds)
        self.cut = False
        self.record: dict[str, Any] = {
            "experiment": name,
            "settings": dataclasses.asdict(settings),
            "environment": environment(device_of(settings)),
            "complete": False,
            "runs": [],
        }
        self._write()

    def shares(self, runs: Iterable[tuple]) -> Iterator[tuple]:
        """Each of ``runs`` with its share of the seconds that are left as one more item; ends when too few are left."""
        waiting = list(runs)
        for index, run in enumerate(waiting):
            if self.budget.left() < _LEAST_SECONDS:
                self.cut = True
                say(f"out of time: {len(waiting) - index} of {len(waiting)} runs are left out")
                return
            yield *run, 0.97 * self.budget.left() / (len(waiting) - index)

    def note(self, **values: Any) -> None:
        """Set values of the whole experiment."""
        self.record.update(values)
        self._write()

    def add(self, run: dict[str, Any], cut_short: bool = False) -> None:
        """Add a finished run, or one that the budget stopped."""
        self.record["runs"].append(run)
        self.cut = self.cut or cut_short
        self._write()

    def finish(self) -> Results:
        self.note(complete=not self.cut)
        return self

    def _write(self) -> None:
        self.record["seconds"] = round(self.budget.elapsed(), 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(json.dumps(self.record, indent=1), encoding="utf-8")
        os.replace(temporary, self.path)


def environment(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"{platform.machine()}, {os.cpu_count()} threads",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "mambakit": mambakit.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def say(text: str) -> None:
    print(text, flush=True)


def require_file(path: Path, what: str) -> Path:
    if not path.is_file():
        raise ValueError(f"there is no {path} ({what}); give the folder that holds it with --data")
    return path
