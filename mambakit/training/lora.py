"""Low-rank adapters (arXiv 2106.09685) through PEFT, on every linear layer of a Mamba model: add, merge, save, load."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from mambakit.errors import CheckpointError
from mambakit.models.fields import check_adapter
from mambakit.models.quantization import is_quantized
from mambakit.quoting import brief
from mambakit.reading import read_file, read_json

_PEFT_PREFIX = "base_model.model."
_FILE = "adapter_model.safetensors"


def add_adapters(model: Any, rank: int, alpha: float, targets: list[str]) -> None:
    """Freeze ``model`` and put adapters of this rank on its linear layers ``targets``; they learn, nothing else does.

    They are injected into the layers rather than wrapped around the model: PEFT refuses out_proj for the model type
    "mamba", since transformers' fused path passes by it there. Ours does not.

    Raises:
        ValueError: PEFT is not installed, the model is quantised, or a target is no linear layer of it.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError('lora_rank needs PEFT: pip install "mambakit[peft]"')
    import peft

    if is_quantized(model.config):
        raise ValueError("the model is quantised, and packed weights take no adapters; call model.dequantize() first")
    layers = model.backbone.layers
    known = {name.rsplit(".", 1)[-1] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    for target in targets:
        if target not in known:
            raise ValueError(
                f"lora_targets: {brief(target)} is no linear layer; choose among {', '.join(sorted(known))}"
            )
    if not targets:
        raise ValueError(f"lora_targets is empty; choose among {', '.join(sorted(known))}")
    model.requires_grad_(False)
    scale: Any = alpha or 2 * rank  # a float is as good as the integer that PEFT asks for
    config = peft.LoraConfig(r=rank, lora_alpha=scale, target_modules=list(targets), lora_dropout=0.0)
    peft.inject_adapter_in_model(config, layers)


def merge_adapters(model: Any) -> None:
    """Add every adapter's product to its layer's weight and drop the adapter: the model is a plain one again."""
    for parent, name, adapter in list(_adapters(model)):
        adapter.merge()
        setattr(parent, name, adapter.get_base_layer())
    model.requires_grad_(True)


def save_adapters(model: Any, folder: str | os.PathLike) -> None:
    """Write the adapters alone, in PEFT's files and names: adapter_model.safetensors and adapter_config.json."""
    from safetensors.torch import save_file

    adapters = list(_adapters(model))
    if not adapters:
        raise ValueError("the model has no adapters to save; add_adapters puts them on, merge_adapters takes them off")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        _PEFT_PREFIX + name.replace(".default", ""): tensor.detach().cpu().contiguous()
        for name, tensor in model.named_parameters()
        if "lora_" in name
    }
    temporary = folder / (_FILE + ".tmp")
    save_file(tensors, temporary)
    os.replace(temporary, folder / _FILE)
    layer = adapters[0][2]
    import peft

    targets = sorted({name for _, name, _ in adapters})
    config = peft.LoraConfig(
        r=layer.r["default"], lora_alpha=layer.lora_alpha["default"], target_modules=targets, task_type="CAUSAL_LM",
        base_model_name_or_path=model.config.name_or_path, inference_mode=True,
    )  # fmt: skip
    config.save_pretrained(str(folder))


def load_adapters(model: Any, folder: str | os.PathLike) -> None:
    """Put adapters saved by `save_adapters` (or by PEFT, for a Mamba model) onto ``model``.

    Raises:
        ValueError: the folder holds none, or they do not fit the model.
    """
    folder = Path(folder)
    if not (folder / _FILE).exists():
        raise ValueError(f"there are no adapters {folder / _FILE}")
    config = _read_config(folder)
    add_adapters(model, config.r, config.lora_alpha, sorted(config.target_modules or []))
    stored = read_file(folder / _FILE)
    wanted = {_PEFT_PREFIX + n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    different = sorted(stored.keys() ^ wanted.keys()) or [k for k in wanted if wanted[k].shape != stored[k].shape]
    if different:
        raise ValueError(
            f"the adapters of {folder} do not fit the model: {different[0]} differs; load their base model"
        )
    for name, parameter in wanted.items():
        parameter.data.copy_(stored[name])


def _read_config(folder: Path) -> Any:
    import peft

    path = folder / "adapter_config.json"
    if not path.exists():
        raise CheckpointError(f"there is no {path}; fetch the adapters again")
    check_adapter(read_json(path), path)
    try:
        return peft.LoraConfig.from_pretrained(str(folder))
    except Exception as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}; correct it there or fetch it again") from error


def _adapters(model: Any) -> Iterator[tuple[nn.Module, str, Any]]:
    """(parent, attribute, adapter) of every adapted layer; a model without PEFT's layers has none."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child).__module__.startswith("peft.tuners.lora") and name != "default":
                yield parent, name, child
