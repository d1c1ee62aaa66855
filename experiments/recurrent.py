"""`MambaStack` beside `torch.nn.LSTM` of equal size: learning curves on a chaotic series and on a pole without speeds.

    python experiments/recurrent.py --device cuda --json docs/benchmarks/DATE-MACHINE-recurrent.json
    python experiments/recurrent.py --plot docs/experiments/recurrent.png --json docs/benchmarks/....json  # draw it

series    Mackey-Glass (delay 30), observed with noise of a tenth of its spread; predict it 20 steps ahead. The measure
          is the root mean square error as a fraction of the spread, on another part of the series.
cartpole  CartPole-v1 whose velocities are masked (`experiments/cartpole.py`), by PPO over whole sequences: states are
          carried from batch to batch and reset where episodes begin. The measure is the mean length of the episodes
          that ended since the last point, 500 at most.

Both get the same data, losses and numbers of steps. Each takes of ``--rates`` the one that is best with a seed that is
not reported, and the LSTM's width is the one whose number of parameters is nearest to the Mamba's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from experiments.cartpole import ACTIONS, OBSERVATIONS, CartPoles
from experiments.curves import draw
from mambakit.nn import MambaStack

MAMBA, LSTM = "MambaStack", "LSTM"
TUNING_SEED = 1000
_AHEAD, _DELAY = 20, 30


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class Net(nn.Module):
    """A recurrent layer, batch first, and a linear head for each of ``heads``."""

    def __init__(self, kind: str, inputs: int, width: int, layers: int, heads: tuple[int, ...]):
        super().__init__()
        make: Any = MambaStack if kind == MAMBA else nn.LSTM
        self.recurrent = make(inputs, width, layers, batch_first=True)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in heads)
        self.kind, self.layers, self.width = kind, layers, width

    def forward(self, x: Tensor, state: Any = None, starts: Tensor | None = None) -> tuple[list[Tensor], Any]:
        """(b, l, inputs) -> each head's (b, l, size), and the state. ``starts`` (b, l): episodes begin."""
        if self.kind == MAMBA:
            y, state = self.recurrent(x, state, starts)
        elif starts is None:
            y, state = self.recurrent(x, state)
        else:
            y, state = self._step_by_step(x, state, starts)
        return [head(y) for head in self.heads], state

    def _step_by_step(self, x: Tensor, state: Any, starts: Tensor) -> tuple[Tensor, Any]:
        """cuDNN's LSTM cannot be reset inside a sequence: it is read in the pieces between any resets of the batch."""
        if state is None:
            zero = x.new_zeros(self.layers, x.shape[0], self.width)
            state = zero, zero
        cuts = [0, *(starts[:, 1:].any(0).nonzero()[:, 0] + 1).tolist(), x.shape[1]]
        found = []
        for begin, end in pairwise(cuts):
            kept = (~starts[:, begin])[None, :, None]
            y, state = self.recurrent(x[:, begin:end].contiguous(), tuple(t * kept for t in state))
            found.append(y)
        return torch.cat(found, 1), state


def make_net(kind: str, inputs: int, options: argparse.Namespace, heads: tuple[int, ...]) -> Net:
    """The Mamba of ``--width``, or the LSTM of as many parameters."""
    mamba = Net(MAMBA, inputs, options.width, options.layers, heads)
    if kind == MAMBA:
        return mamba
    wanted = parameter_count(mamba)
    with torch.device("meta"):
        sizes = {w: parameter_count(Net(LSTM, inputs, w, options.layers, heads)) for w in range(4, 4 * options.width)}
    return Net(LSTM, inputs, min(sizes, key=lambda w: abs(sizes[w] - wanted)), options.layers, heads)


# -- the series --------------------------------------------------------------------------------------------------------


def mackey_glass(length: int, generator: torch.Generator) -> Tensor:
    """dx/dt = 0.2 x(t - 30) / (1 + x(t - 30)^10) - 0.1 x, in Euler steps of 0.1, a value per unit time, standardised"""
    fine, history = 10, _DELAY * 10
    x = (1.2 + 0.2 * torch.rand(history, generator=generator)).tolist()
    for _ in range((length + 500) * fine):
        late = x[-history]
        x.append(x[-1] + 0.1 * (0.2 * late / (1 + late**10) - 0.1 * x[-1]))
    series = torch.tensor(x[history + 500 * fine :: fine][:length])
    return (series - series.mean()) / series.std()


def series_curve(kind: str, seed: int, rate: float, options: argparse.Namespace) -> tuple[list[dict], Net]:
    device, length = torch.device(options.device), options.length
    whole = mackey_glass(30_000, torch.Generator().manual_seed(7)).to(device)
    torch.manual_seed(seed)
    net = make_net(kind, 1, options, (1,)).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.01)
    noisy = whole + 0.1 * torch.randn(whole.shape, generator=torch.Generator().manual_seed(8)).to(device)
    train, test = 20_000, 21_000  # the series between them is left out
    offsets = torch.arange(length, device=device)
    draws = torch.Generator().manual_seed(seed)
    # The first steps of a sequence have seen too little: they are neither trained on nor measured.
    seen = slice(min(100, length // 4), None)

    def error(starts: Tensor) -> Tensor:
        at = starts[:, None].to(device) + offsets
        (y,), _ = net(noisy[at][..., None])
        return (y[..., 0] - whole[at + _AHEAD])[:, seen].square().mean()

    tests = torch.arange(test, len(whole) - length - _AHEAD, length // 2)
    points = []
    for step in range(options.steps + 1):
        if step % max(1, options.steps // options.points) == 0 or step == options.steps:
            with torch.no_grad():
                points.append({"step": step, "error": float(error(tests).sqrt())})
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * (1 - step / (options.steps + 1))
        loss = error(torch.randint(0, train - length - _AHEAD, (options.batch,), generator=draws))
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return points, net


# -- the pole ----------------------------------------------------------------------------------------------------------


def cartpole_curve(kind: str, seed: int, rate: float, options: argparse.Namespace) -> tuple[list[dict], Net]:
    """PPO (arXiv 1707.06347): clipped at 0.2, discount 0.99, lambda 0.95, whole sequences as minibatches."""
    device = torch.device(options.device)
    torch.manual_seed(seed)
    net = make_net(kind, OBSERVATIONS, options, (ACTIONS, 1)).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate, eps=1e-5)
    poles = CartPoles(options.poles, device, torch.Generator(device=device).manual_seed(seed))
    starts, state, points = torch.ones(options.poles, dtype=torch.bool, device=device), None, []
    last, updates = 0.0, options.updates
    for update in range(updates):
        before = None if state is None else tuple(t.detach() for t in state)
        rows: dict[str, list[Tensor]] = {}
        for _ in range(options.horizon):
            with torch.no_grad():
                (logits, value), state = net(poles.observations()[:, None], state, starts[:, None])
            choice = torch.distributions.Categorical(logits=logits[:, 0])
            actions = choice.sample()
            seen = {"x": poles.observations(), "starts": starts, "actions": actions, "old": choice.log_prob(actions)}
            fell, starts = poles.step(actions)
            # An episode that was long enough is cut, not lost: its last value stands for what would have come.
            cut = (starts & ~fell) * value[:, 0, 0]
            for name, t in {**seen, "value": value[:, 0, 0], "reward": 1 + 0.99 * cut, "ended": starts}.items():
                rows.setdefault(name, []).append(t)
        batch = {name: torch.stack(some, 1) for name, some in rows.items()}
        with torch.no_grad():
            (_, after), _ = net(poles.observations()[:, None], state, starts[:, None])
        batch["advantage"] = advantages(batch, after[:, 0, 0])
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - update / updates)
        learn(net, optimizer, batch, before, options.epochs)
        if (update + 1) % max(1, updates // options.points) == 0 or update == updates - 1:
            lengths = poles.take_lengths()
            last = statistics.fmean(lengths) if lengths else last
            points.append({"step": (update + 1) * options.horizon * options.poles, "length": round(last, 2)})
    return points, net


def advantages(batch: dict[str, Tensor], after: Tensor) -> Tensor:
    """Generalised advantage estimation (arXiv 1506.02438), (b, l)."""
    found, carried, following = [], torch.zeros_like(after), after
    for t in range(batch["reward"].shape[1] - 1, -1, -1):
        going = (~batch["ended"][:, t]).float()
        delta = batch["reward"][:, t] + 0.99 * going * following - batch["value"][:, t]
        carried = delta + 0.99 * 0.95 * going * carried
        following = batch["value"][:, t]
        found.append(carried)
    return torch.stack(found[::-1], 1)


def learn(net: Net, optimizer: Any, batch: dict[str, Tensor], before: Any, epochs: int, minibatches: int = 4) -> None:
    target = batch["advantage"] + batch["value"]
    advantage = (batch["advantage"] - batch["advantage"].mean()) / (batch["advantage"].std() + 1e-8)
    for _ in range(epochs):
        for some in torch.randperm(len(target), device=target.device).chunk(minibatches):
            state = None if before is None else tuple(t[:, some].contiguous() for t in before)
            (logits, value), _ = net(batch["x"][some], state, batch["starts"][some])
            choice = torch.distributions.Categorical(logits=logits)
            ratio = (choice.log_prob(batch["actions"][some]) - batch["old"][some]).exp()
            gain = torch.minimum(ratio * advantage[some], ratio.clamp(0.8, 1.2) * advantage[some]).mean()
            error = (value[..., 0] - target[some]).square().mean()
            loss = -gain + 0.5 * error / 100 - 0.01 * choice.entropy().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()


# -- both --------------------------------------------------------------------------------------------------------------

TASKS: dict[str, tuple[Callable[..., tuple[list[dict], Net]], str, bool]] = {  # its curve, its measure, less is better
    "series": (series_curve, "error", True),
    "cartpole": (cartpole_curve, "length", False),
}


Run = tuple[str, str, int, float]  # task, model, seed, rate


def measured(run: Run, options: argparse.Namespace) -> tuple[list[dict], dict[str, Any]]:
    """A run's curve, and its row of the summary."""
    task, kind, seed, rate = run
    curve, measure, _ = TASKS[task]
    began = time.perf_counter()
    points, net = curve(kind, seed, rate, options)
    row = {
        "task": task, "model": kind, "seed": seed, "parameters": parameter_count(net), "rate": rate,
        "measure": measure, "at the end": round(statistics.fmean(point[measure] for point in points[-3:]), 4),
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    print(row, flush=True)
    return [{"model": kind, "seed": seed, **point} for point in points], row


def all_measured(runs: list[Run], options: argparse.Namespace) -> Iterator[tuple[list[dict], dict[str, Any]]]:
    """`measured` of each, ``--workers`` at a time."""
    if options.workers == 1:
        yield from (measured(run, options) for run in runs)
        return
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, torch.set_num_threads, (threads,)) as pool:
        yield from pool.map(measured, runs, [options] * len(runs))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--width", type=int, default=32, help="of the Mamba")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--points", type=int, default=20, help="of a curve")
    parser.add_argument("--steps", type=int, default=1500, help="series: optimiser steps")
    parser.add_argument("--batch", type=int, default=32, help="series: sequences of a step")
    parser.add_argument("--length", type=int, default=400, help="series: values of a sequence")
    parser.add_argument("--updates", type=int, default=150, help="cartpole: PPO's updates")
    parser.add_argument("--poles", type=int, default=64)
    parser.add_argument("--horizon", type=int, default=32, help="cartpole: steps of every pole between updates")
    parser.add_argument("--epochs", type=int, default=4, help="cartpole: passes over an update's steps")
    parser.add_argument("--workers", type=int, default=1, help="processes, a run each")
    parser.add_argument("--plot", type=Path, help="draw the curves of --json, run nothing")
    record.add_argument(parser)
    options = parser.parse_args(arguments)
    if options.plot:
        return draw(options.json, options.plot, {"series": ("step", "error"), "cartpole": ("step", "length")})
    results: dict[str, Any] = {"summary": [], "tuning": [], **{task: [] for task in options.tasks}}
    contenders = [(task, kind) for task in options.tasks for kind in (MAMBA, LSTM)]
    rates = dict.fromkeys(contenders, options.rates[0])
    if len(options.rates) > 1:
        trials = [(*contender, TUNING_SEED, rate) for contender in contenders for rate in options.rates]
        results["tuning"] = [row for _, row in all_measured(trials, options)]
        for task, kind in contenders:
            rows = [row for row in results["tuning"] if (row["task"], row["model"]) == (task, kind)]
            best = (min if TASKS[task][2] else max)(rows, key=lambda row: row["at the end"])
            rates[task, kind] = best["rate"]
    runs = [(*contender, seed, rates[contender]) for contender in contenders for seed in options.seeds]
    for points, row in all_measured(runs, options):
        results[row["task"]] += points
        results["summary"].append(row)
        record.write(options.json, results, gpus=int(options.device.startswith("cuda")))
    return results


if __name__ == "__main__":
    main()
