"""Devices of which benchmarks are recorded, and how others are put beside them."""

from __future__ import annotations

import functools
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mambakit.errors import UsageError
from mambakit.quoting import brief


@dataclass(frozen=True)
class Device:
    """A device to plan for.

    Attributes:
        name: for people.
        gib: its memory; None: not known.
        bandwidth: bytes a second that a kernel reads.
        train, step: recorded rows of training steps and of decoding steps.
        scaled: why figures are scaled from another machine's, or "".
        speed: of training, against the recorded machine's.
        reading: of decoding, against the recorded machine's.
        sources: the records.
    """

    name: str
    kind: str
    gib: float | None
    bandwidth: float
    train: list[dict[str, Any]]
    step: list[dict[str, Any]]
    sources: list[str]
    scaled: str = ""
    speed: float = 1.0
    reading: float = 1.0
    more: dict[str, Any] = field(default_factory=dict)


@functools.cache
def recorded() -> dict[str, Any]:
    """The benchmarks that plans are made from, by the device's short name."""
    return json.loads(Path(__file__).with_name("recorded.json").read_text(encoding="utf-8"))


def device(name: str) -> Device:
    """The device ``name``: "h100", "h200", "cpu", or "here" for the best one of this machine.

    Raises:
        UsageError: nothing is recorded under the name.
    """
    if name in ("here", "cuda", "cpu"):
        return _here(name)
    if name not in recorded():
        raise UsageError(f"no benchmarks are recorded on {brief(name)}; choose among {', '.join(recorded())}, here")
    return _recorded(name)


def _recorded(short: str, **changes: Any) -> Device:
    fields = recorded()[short]
    return Device(**{**fields, **changes})


def _here(name: str) -> Device:
    import torch

    if name != "cpu" and torch.cuda.is_available():
        return _gpu(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 2**30)
    if name == "cuda":
        raise UsageError("PyTorch sees no NVIDIA GPU here; name one that is recorded: --device h100")
    threads = torch.get_num_threads()
    found = read_bandwidth()
    record = _recorded("cpu")
    scale = threads / record.more["threads"]
    return _recorded(
        "cpu", name=f"this machine's CPU, {threads} threads", gib=_memory(), speed=scale,
        reading=found / record.bandwidth, bandwidth=found,
        scaled=f"scaled from {record.name}: training by threads, decoding by the read bandwidth measured here "
        f"({found / 1e9:.1f} GB/s)",
    )  # fmt: skip


def _gpu(name: str, gib: float) -> Device:
    from mambakit.training.throughput import PEAKS

    for short in ("h200", "h100"):
        if short.upper() in name:
            return _recorded(short, name=name, gib=gib)
    peak = next((half for known, half, _ in PEAKS if known in name), None)
    record = _recorded("h100")
    if peak is None:
        raise UsageError(
            f"nothing is known of {name}'s speed; --device h100 plans for another GPU, whose memory needs are the same"
        )
    scale = peak / record.more["peak"]
    return _recorded(
        "h100", name=name, gib=gib, speed=scale, reading=scale,
        scaled=f"scaled from {record.name} by the data sheets' peak; nothing was measured on this GPU",
    )  # fmt: skip


def _memory() -> float | None:
    import os

    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def read_bandwidth() -> float:
    """Bytes a second that this CPU's threads read from memory: the best of a few passes over 256 MiB."""
    import torch

    x = torch.ones(2**26, dtype=torch.float32, device="cpu")
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        x.sum()
        best = max(best, 4 * x.numel() / (time.perf_counter() - began))
    return best
