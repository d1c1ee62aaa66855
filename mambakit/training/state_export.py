"""The end of a run that tuned a state: the state file, its card, and the held-out score with and without it."""

from __future__ import annotations

import datetime
import json
import shlex
from pathlib import Path
from typing import Any

import torch

from mambakit.generation.state import State
from mambakit.modules import StateCache
from mambakit.training.config import TrainConfig
from mambakit.training.evaluate import score_documents
from mambakit.training.folder import RunFolder
from mambakit.training.prepare import Prepared
from mambakit.training.report import FinalLoss, state_command
from mambakit.training.state_tuning import take_initial_state

STATE_FILE = "state.safetensors"
_CARD = """---
library_name: mambakit
tags: [mamba]
---
# {name}

An initial state of {count:,} numbers for the model `{model}`, tuned by `mambakit train` on {date}. The model's weights
are as they were. The state is read like any other: `--load-state`, `State.load`, `mambakit serve --load-state`.

    {command}

| | |
|---|---|
| trained on | {train_files}: {train_size:,} {unit}s in {documents:,} documents |
| steps | {steps:,} of {batch_size} x {sequence_length} tokens, peak rate {learning_rate}, {schedule} |
| time | {minutes:.1f} minutes on {device} |
| training loss | {training_loss} |
| held-out bits per {unit} | {bits} |
| the same without the state | {without} |

Each held-out document is read from its start: the state, the end-of-text token, then the document.

## Recipe

```json
{recipe}
```
"""


@torch.no_grad()
def export_state(
    model: Any, data: Prepared, config: TrainConfig, folder: RunFolder, *, steps: int, seconds: float,
    training_loss: FinalLoss,
) -> dict[str, Any]:  # fmt: skip
    """Write the learned state (`STATE_FILE`), README.md and summary.json into the run's folder; returns the summary."""
    model = model.eval()
    device = next(model.parameters()).device
    cache, mark = take_initial_state(model)
    end = torch.full((1, 1), data.vocabulary.end, dtype=torch.int64, device=device)
    state = State(cache, end)  # documents begin behind the end token, which is not read yet
    summary = _summary(model, cache, data, config, steps, seconds, training_loss)

    def write(temporary: Path) -> None:
        state.save_for(temporary / STATE_FILE, mark)
        (temporary / "README.md").write_text(_card(config, summary, data, device), encoding="utf-8")
        (temporary / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")

    folder.place("model", write)
    return summary


def _summary(
    model: Any, cache: StateCache, data: Prepared, config: TrainConfig, steps: int, seconds: float, loss: FinalLoss
) -> dict[str, Any]:
    vocabulary, measured = data.vocabulary, data.heldout is not None
    scores = []
    if data.heldout is not None:
        chunk_size = 8192 if next(model.parameters()).is_cuda else 1024
        masked = config.ambiguous == "mask"
        scores = [score_documents(model, data.heldout, vocabulary, masked, chunk_size, s) for s in (cache, None)]
    unit = vocabulary.unit
    return {
        "parameters": sum(t.numel() for t in cache.tensors().values()),
        "steps": steps,
        "tokens": steps * config.batch_size * config.sequence_length,
        "seconds": round(seconds, 1),
        "training_loss": None if loss.mean is None else round(loss.mean, 4),
        "training_loss_steps": [loss.first, loss.last],
        "heldout_loss": round(scores[0].nats_per_token, 4) if measured else None,
        f"heldout_bits_per_{unit}": round(scores[0].bits_per_character, 4) if measured else None,
        f"heldout_bits_per_{unit}_without_state": round(scores[1].bits_per_character, 4) if measured else None,
        f"heldout_{unit}s": scores[0].characters if measured else 0,
        "model": str(config.init_from),
        "state": str(Path(config.out) / STATE_FILE),
        "generate": state_command(config, vocabulary, STATE_FILE),
    }


def _card(config: TrainConfig, summary: dict[str, Any], data: Prepared, device: torch.device) -> str:
    unit = data.vocabulary.unit
    recipe = {
        k: v
        for k, v in vars(config).items()
        if k not in ("train_files", "heldout_files", "token_cache", "out", "resume", "overwrite", "export_only")
    }

    def shown(key: str) -> str:
        return "not measured" if summary[key] is None else f"{summary[key]:.4f}"

    loss = summary["training_loss"]
    return _CARD.format(
        name=Path(config.out).name, count=summary["parameters"], model=shlex.quote(config.init_from),
        date=datetime.date.today().isoformat(), command=summary["generate"],
        train_files=", ".join(f"`{Path(f).name}`" for f in config.train_files) or "none",
        train_size=int(data.train.characters.sum()), unit=unit, documents=len(data.train), steps=summary["steps"],
        batch_size=config.batch_size, sequence_length=config.sequence_length, learning_rate=config.learning_rate,
        schedule=config.schedule, minutes=summary["seconds"] / 60,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "a CPU",
        training_loss="not on record" if loss is None else f"{loss:.4f} nats per token",
        bits=shown(f"heldout_bits_per_{unit}"), without=shown(f"heldout_bits_per_{unit}_without_state"),
        recipe=json.dumps(recipe, indent=2),
    )  # fmt: skip
