"""What `mambakit serve` is given, checked before anything is loaded: model, template, folder of states, devices."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from mambakit.commands.texts import require_file
from mambakit.errors import CheckpointError
from mambakit.quoting import brief


def own_name(model: str) -> str:
    """A folder's name, a GGUF file's without its ending, or the hub id."""
    path = Path(model)
    if path.suffix == ".gguf":
        return path.stem
    return path.resolve().name if path.is_dir() else model


def check_model(name: str) -> None:
    """Refuse a folder that is missing or holds no model before the port is open; the replica checks the rest."""
    folder = Path(name)
    if folder.suffix == ".gguf" and folder.is_file():
        return
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise CheckpointError(
                f"there is no config.json in {brief(name)}; give a folder that holds a model, or a hub id"
            )
    elif folder.is_absolute() or name.startswith((".", "~")):
        raise CheckpointError(f"there is no folder {brief(name)}; give a folder that holds a model, or a hub id")


def read_template(file: str) -> str:
    """The text of --chat-template, its syntax checked."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    require_file(file, "chat template", "write one in Jinja, as a tokenizer's chat_template")
    wrong: Exception | None = None
    try:
        text = Path(file).read_text(encoding="utf-8")
        render_jinja_template([[{"role": "user", "content": ""}]], chat_template=text)
    except (TemplateSyntaxError, UnicodeDecodeError) as error:
        wrong = error
    except Exception:  # it compiles, and may refuse this message
        pass
    if wrong is not None:
        raise ValueError(f"--chat-template {brief(file)} is no template ({wrong}); give a file of Jinja")
    return text


def prefix_folder(states: str | None) -> str | None:
    """The folder of the prefix cache: beside the states, where those are in a folder of this machine."""
    return None if states is None or "://" in states else str(Path(states) / "prefixes")


def check_states(name: str) -> None:
    """Refuse a folder that files cannot be written to before the model is loaded."""
    if "://" in name:
        from mambakit.serving.states.remote import RemoteFolder

        RemoteFolder(name)
        return
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=name):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"--states {brief(name)} cannot be written to ({reason}); name a folder that can") from None


def devices_of(args: argparse.Namespace) -> tuple[str, ...]:
    """One for each replica."""
    devices = [args.device] if args.device else args.devices
    if devices is None or any(device.startswith("cuda") for device in devices):
        import torch

        gpus = torch.cuda.device_count()  # makes no CUDA context here: each GPU is its replica's own
    if devices is None:
        devices = [f"cuda:{i}" for i in range(gpus)] or ["cpu"]
        if args.replicas is None:
            devices = devices[:1]
    devices = ["cuda:0" if device == "cuda" else device for device in devices]
    for device in devices:
        kind, _, index = device.partition(":")
        if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
            raise ValueError(f"there is no device {brief(device)}; give cpu, cuda:0, cuda:1, ...")
        if kind == "cuda" and int(index) >= gpus:
            raise ValueError(f"{device} is not here: there are {gpus} NVIDIA GPUs; use one that `mambakit env` lists")
    count = args.replicas or len(devices)
    if args.devices and count < len(devices):
        raise ValueError(
            f"--replicas is {count}, but {len(devices)} --devices are named; name fewer, or have a replica on each"
        )
    return tuple(devices[i % len(devices)] for i in range(count))
