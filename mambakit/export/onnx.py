"""`to_onnx`: a folder of two ONNX graphs that share one file of weights, checked in onnxruntime."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambakit.decoding.registry import token_step
from mambakit.errors import UsageError
from mambakit.export.checks import require_exportable, require_same
from mambakit.modules.cache import MambaCache

_FILES = {"model.onnx": False, "step.onnx": True}
_WEIGHTS = "model.onnx.data"


@dataclass(frozen=True)
class Report:
    """What a check of a folder found.

    Attributes:
        error: the largest difference from the model, relative to the largest value of its tensor.
        speeds: tokens/s by name, of onnxruntime and of the model, at batch 1.
    """

    error: float
    speeds: dict[str, float]


def require_packages() -> None:
    """UsageError where a package is missing."""
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f'exporting to ONNX needs {package}; pip install "mambakit[export]"')


def to_onnx(model: Any, folder: Path) -> None:
    """Write ``model.onnx`` (any number of tokens), ``step.onnx`` (one token) and their weights, float32.

    Raises:
        CheckpointError: the model has something that the graph has not.
        UsageError: a package is missing.
    """
    require_packages()
    require_exportable(model, only_silu="the graph")
    import onnx

    from mambakit.export.onnx_graph import build, tensors_of

    folder.mkdir(parents=True, exist_ok=True)
    weights = tensors_of(model)
    for name, one_token in _FILES.items():
        # The same weights in the same order: the second graph writes the file of the first again, and both name it.
        (folder / _WEIGHTS).unlink(missing_ok=True)
        onnx.save_model(
            build(model.config, weights, one_token), folder / name, save_as_external_data=True,
            all_tensors_to_one_file=True, location=_WEIGHTS, size_threshold=1024,
        )  # fmt: skip
        onnx.checker.check_model(str(folder / name))


def check(model: Any, folder: Path, tokens: int = 33, speed: bool = True) -> Report:
    """Run the graphs in onnxruntime beside the model: prompt, continuation from the state, single steps, two batches.

    Raises:
        CheckpointError: a difference beyond the limit (`mambakit.export.checks`).
    """
    require_packages()
    model = model.float().eval()
    sessions = {name: session(folder / name) for name in _FILES}

    def graphs(ids: Tensor, *states: Tensor) -> list[Tensor]:
        opened = sessions["step.onnx" if ids.shape[1] == 1 else "model.onnx"]
        return [torch.from_numpy(part) for part in run(opened, ids.numpy(), [state.numpy() for state in states])]

    worst = require_same(model, f"{folder}: onnxruntime", graphs, (tokens - 8, 8, 1, 1, 1))
    return Report(worst, speeds(model, sessions) if speed else {})


def session(path: Path) -> Any:
    """onnxruntime's session on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def first_states(config: Any, batch: int) -> list[np.ndarray]:
    """The state before the first token: zeros."""
    count, d = config.num_hidden_layers, config.intermediate_size
    return [np.zeros((count, batch, d, size), np.float32) for size in (config.conv_kernel - 1, config.state_size)]


def run(opened: Any, ids: np.ndarray, states: list[np.ndarray]) -> list[np.ndarray]:
    """logits, and both states after ``ids``."""
    result: list[np.ndarray] = opened.run(None, {"input_ids": ids, "conv_states": states[0], "ssm_states": states[1]})
    return result


def speeds(model: Any, sessions: dict[str, Any], prompt: int = 128, steps: int = 16) -> dict[str, float]:
    """Tokens/s at batch 1: a prompt, and single steps; of onnxruntime, and of the model's forward and decoder."""
    ids = torch.zeros(1, prompt, dtype=torch.int64, device="cpu")
    states = first_states(model.config, 1)
    cache = MambaCache(model.config, 1, dtype=torch.float32)
    with torch.no_grad():
        step = token_step(model, cache)
        return {
            "prompt, onnxruntime": _rate(lambda: run(sessions["model.onnx"], ids.numpy(), states), prompt, 2),
            "prompt, mambakit": _rate(lambda: model(ids, cache_params=cache, use_cache=True), prompt, 2),
            "step, onnxruntime": _rate(lambda: run(sessions["step.onnx"], ids[:, :1].numpy(), states), 1, steps),
            "step, mambakit": _rate(lambda: step(ids[:, 0]), 1, steps),
        }


def _rate(call: Callable[[], Any], tokens: int, times: int) -> float:
    call()
    start = time.perf_counter()
    for _ in range(times):
        call()
    return tokens * times / (time.perf_counter() - start)
