"""What the code blocks of a page may use: names that a reader has, files, and a hub's cache, all small."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mambakit
from tests.models.tiny import TEXT, save_tiny

HUB_IDS = ("state-spaces/mamba-130m-hf", "owner/name", "state-spaces/mamba-130m")
# 13 layers and 48 channels: pages name layer 12 and channel 40.
SHAPE = {"hidden_size": 24, "num_hidden_layers": 13}


def make_hub(folder: Path) -> Path:
    """huggingface_hub's cache with a tiny model under every id that pages name."""
    model = save_tiny(folder / "tiny", **SHAPE)
    tokenizer = mambakit.AutoTokenizer.from_pretrained(folder / "tiny")
    hub = folder / "hub"
    for name in HUB_IDS:
        place = hub / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder / "tiny", place / "snapshots" / ("0" * 40))
        model.save_gguf(place / "snapshots" / ("0" * 40) / "mamba.gguf", "Q8_0", tokenizer)
    return hub


def world(page: str, tiny: Path) -> dict[str, Any]:
    """The names that a page's blocks start with. Files are written to the current folder."""
    torch.manual_seed(0)
    model = mambakit.AutoModelForCausalLM.from_pretrained(tiny).eval()
    tokenizer = mambakit.AutoTokenizer.from_pretrained(tiny)
    text = TEXT[:60]
    inputs = tokenizer(text, return_tensors="pt")
    names: dict[str, Any] = {name: getattr(mambakit, name) for name in mambakit.__all__}
    names |= {
        "mambakit": mambakit, "torch": torch, "np": np, "model": model, "tokenizer": tokenizer, "text": text,
        "texts": [text, "The cat"], "inputs": inputs, "input_ids": inputs.input_ids, "ids": inputs.input_ids[0],
        "more_ids": tokenizer(" sat on the mat", return_tensors="pt").input_ids[0], "config": model.config,
    }  # fmt: skip
    names |= _MORE.get(page, lambda names, tiny: {})(names, tiny)
    return names


def _readme(names: dict[str, Any], tiny: Path) -> dict[str, Any]:
    return {
        "next_tokens": torch.tensor([[5, 6, 7]]), "packed": torch.arange(1, 11)[None],
        "cu_seqlens": torch.tensor([0, 4, 10], dtype=torch.int32),
    }  # fmt: skip


def _distributed(names: dict[str, Any], tiny: Path) -> dict[str, Any]:
    """A group of one process."""
    import torch.distributed as dist

    from mambakit.ops import linear_cross_entropy

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ids = torch.arange(1, 25)[None]
    return {
        "group": dist.group.WORLD, "rank": 0, "world": 1, "ids": ids, "count": torch.tensor(23),
        "linear_cross_entropy": linear_cross_entropy, "starts": torch.tensor([0, 9]),
    }  # fmt: skip


def _generation(names: dict[str, Any], tiny: Path) -> dict[str, Any]:
    from mambakit.decoding.sampling_params import SamplingParams

    ids = names["ids"]
    batch = names["tokenizer"](["The cat", "sat on the"], return_tensors="pt", padding=True)
    return {
        "small": mambakit.AutoModelForCausalLM.from_pretrained(tiny).eval(), "SamplingParams": SamplingParams,
        "schema": '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}',
        "inputs": batch, "ids": ids, "prefix_ids": ids, "variants": [ids[:2], ids[2:5]],
    }  # fmt: skip


def _export(names: dict[str, Any], tiny: Path) -> dict[str, Any]:
    from mambakit.export.onnx import to_onnx
    from mambakit.export.pt2 import to_pt2

    to_onnx(names["model"], Path("onnx"))
    to_pt2(names["model"], Path("mamba.pt2"))
    config = names["config"]
    layers, d, k, n = config.num_hidden_layers, config.intermediate_size, config.conv_kernel, config.state_size
    return {
        "ids": np.array([[5, 6, 7]]), "token": np.array([[8]]),
        "conv_states": torch.zeros(layers, 1, d, k - 1), "ssm_states": torch.zeros(layers, 1, d, n),
    }  # fmt: skip


def _gguf(names: dict[str, Any], tiny: Path) -> dict[str, Any]:
    names["model"].save_gguf("mamba.gguf", "Q8_0", names["tokenizer"])
    return {}


def _layers(names: dict[str, Any], tiny: Path) -> dict[str, Any]:
    from torch.nn.utils.rnn import pack_sequence

    return {
        "x": torch.randn(6, 4, 10), "more": torch.randn(3, 4, 10), "x_t": torch.randn(4, 10),
        "starts": torch.zeros(6, 4, dtype=torch.bool), "parts": [torch.randn(length, 10) for length in (3, 5, 1, 4)],
        "pack_sequence": pack_sequence,
    }  # fmt: skip


def _models(names: dict[str, Any], tiny: Path) -> dict[str, Any]:
    return {"device": "cpu"}


def _state_tuning(names: dict[str, Any], tiny: Path) -> dict[str, Any]:
    from mambakit.generation.state import State

    Path("runs/state").mkdir(parents=True)
    State.read(names["model"], names["ids"]).save("runs/state/state.safetensors", names["model"])
    return {}


def _streams(names: dict[str, Any], tiny: Path) -> dict[str, Any]:
    return {"lines": ["The cat sat\n", "on the mat\n"]}


def _tasks(names: dict[str, Any], tiny: Path) -> dict[str, Any]:
    ids = names["input_ids"]
    return {
        "mask": torch.ones_like(ids), "labels": ids % 5, "masked_ids": ids % 16,
    }  # fmt: skip


def _fine_tuning(names: dict[str, Any], tiny: Path) -> dict[str, Any]:
    import peft

    from mambakit.models.adapters import get_peft_model
    from mambakit.training.lora import add_adapters, save_adapters

    trained = mambakit.AutoModelForCausalLM.from_pretrained(tiny)
    add_adapters(trained, 2, 4.0, ["in_proj"])
    save_adapters(trained, Path("runs/finetune/adapter"))
    other = mambakit.AutoModelForCausalLM.from_pretrained(tiny)
    get_peft_model(other, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(
        "adapters"
    )
    return {"peft": peft, "base": mambakit.AutoModelForCausalLM.from_pretrained(tiny)}


_MORE = {
    "README.md": _readme, "docs/guides/distributed.md": _distributed, "docs/guides/generation.md": _generation,
    "docs/guides/export.md": _export, "docs/guides/gguf.md": _gguf, "docs/migration/llama-cpp.md": _gguf,
    "docs/guides/layers.md": _layers, "docs/guides/models.md": _models, "docs/guides/state-tuning.md": _state_tuning,
    "docs/guides/streams.md": _streams, "docs/guides/tasks.md": _tasks, "docs/guides/fine-tuning.md": _fine_tuning,
}  # fmt: skip
