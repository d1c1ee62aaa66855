"""PEFT adapters on a Mamba model: add low-rank ones (arXiv 2106.09685), load any that PEFT saves, merge, save.

PEFT refuses out_proj and conv1d for the model types "mamba" and "falcon_mamba", since transformers' fused path passes
by their modules. Ours does not, so these functions let PEFT work without asking for the model's type.
"""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from mambakit.models.adapter_config import read_adapter_config
from mambakit.models.quantization import is_quantized
from mambakit.quoting import brief
from mambakit.reading import read_file

_PEFT_PREFIX = "base_model.model."
_FILE = "adapter_model.safetensors"
_NAME = "default"


def add_adapters(model: Any, rank: int, alpha: float, targets: list[str]) -> None:
    """Freeze ``model`` and put trainable adapters of this rank on its linear layers ``targets``.

    They are injected into the layers rather than wrapped around the model: PEFT refuses out_proj for the model type
    "mamba", since transformers' fused path passes by it there. Ours does not.

    Raises:
        ValueError: PEFT is not installed, the model is quantised, or a target is no linear layer of it.
    """
    _require(model)
    import peft

    layers = model.backbone.layers
    known = {name.rsplit(".", 1)[-1] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    for target in targets:
        if target not in known:
            raise ValueError(
                f"lora_targets: {brief(target)} is no linear layer; choose among {', '.join(sorted(known))}"
            )
    if not targets:
        raise ValueError(f"lora_targets is empty; choose among {', '.join(sorted(known))}")
    scale: Any = alpha or 2 * rank  # a float is as good as the integer that PEFT asks for
    _inject(model, peft.LoraConfig(r=rank, lora_alpha=scale, target_modules=list(targets), task_type="CAUSAL_LM"))


def get_peft_model(model: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    """``peft.get_peft_model`` for targets that PEFT refuses for Mamba: "all-linear", out_proj, conv1d.

    A head that is tied to the embeddings becomes a tensor of its own where one of them gets an adapter, unless the
    configuration says ``ensure_weight_tying``: merging would change the other, too.

    Args:
        config: of PEFT, with any of its methods.
        args, kwargs: PEFT's.

    Returns:
        PEFT's wrapper of the model.
    """
    _require(model)
    import peft

    with _of_no_type(model):
        wrapped = peft.get_peft_model(model, config, *args, **kwargs)
    _untie(model, config)
    return wrapped


def load_peft_model(model: Any, folder: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
    """``peft.PeftModel.from_pretrained`` for adapters on layers that PEFT refuses for Mamba.

    Raises:
        ValueError: they do not fit the model, where PEFT warns of layers without and is silent of adapters too many.
    """
    _require(model)
    import peft

    with _of_no_type(model), warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            wrapped = peft.PeftModel.from_pretrained(model, os.fspath(folder), *args, **kwargs)
        except UserWarning as error:
            raise _misfit(folder, str(error)) from error
    config = wrapped.peft_config[wrapped.active_adapter]
    if (Path(folder) / _FILE).is_file() and not config.is_prompt_learning:
        stored = {name.removeprefix(_PEFT_PREFIX) for name in read_file(Path(folder) / _FILE)}
        layers = {name for name, _ in model.named_modules()}
        if lost := sorted(name for name in stored if not _has_place(name, layers)):
            raise _misfit(folder, f"the model has no place for {lost[0]}")
    _untie(model, config)
    return wrapped


def _has_place(name: str, modules: Container[str]) -> bool:
    """Whether a stored tensor is of a layer that the model has; one that is of no layer has its place in PEFT."""
    found = re.match(r"(?:\w+\.)*?layers\.\d+", name)
    return found is None or found[0] in modules


def _misfit(folder: str | os.PathLike, why: str) -> ValueError:
    return ValueError(f"the adapters of {folder} do not fit the model: {why}; load their base model")


def _untie(model: Any, config: Any) -> None:
    """Give a head with an adapter a weight of its own, or one whose tied embeddings have an adapter."""
    head, embeddings = getattr(model, "lm_head", None), model.get_input_embeddings()
    if head is None or not model.config.tie_word_embeddings or getattr(config, "ensure_weight_tying", False):
        return
    adapted = [layer for layer in (head, embeddings) if hasattr(layer, "get_base_layer")]  # no whole copy to train
    if not adapted:
        return
    plain = head.get_base_layer() if head in adapted else head
    plain.weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}  # transformers read it from the configuration when the model was made


@contextmanager
def _of_no_type(model: Any) -> Iterator[None]:
    """Within it the configuration names no model type, by which PEFT would refuse layers."""
    own = vars(model.config)
    before = own.get("model_type")  # of the class where the instance has none
    own["model_type"] = ""
    try:
        yield
    finally:
        del own["model_type"]
        if before is not None:
            own["model_type"] = before


def merge_adapters(model: Any) -> None:
    """Add every adapter's update to its layer's weight and drop the adapter: the model is a plain one again.

    Raises:
        ValueError: adapters of a method that cannot be merged.
    """
    _take_off(model, merge=True)
    model.requires_grad_(True)


def _take_off(model: Any, merge: bool) -> None:
    """Replace each adapted layer by its base layer, with the adapter's update merged into its weight or dropped."""
    for parent, name, adapter in list(_adapters(model)):
        if hasattr(adapter, "unload_and_optionally_merge_module"):  # modules_to_save, trainable tokens
            plain = adapter.unload_and_optionally_merge_module(merge=merge, safe_merge=False, adapter_names=None)
        else:
            try:
                if merge:
                    adapter.merge()
            except NotImplementedError as error:
                raise ValueError(
                    f"{name}: a {type(adapter).__name__} cannot be merged ({error}); keep the adapters"
                ) from error
            plain = adapter.get_base_layer()
        setattr(parent, name, plain)
    if hasattr(model, "peft_config"):
        del model.peft_config


def adapted_layer(model: Any) -> str | None:
    """The name of a layer that has an adapter; None where none has."""
    return next((f"{type(parent).__name__}.{name}" for parent, name, _ in _adapters(model)), None)


def save_adapters(model: Any, folder: str | os.PathLike, state_dict: dict[str, Any] | None = None) -> None:
    """Write the adapters alone, in PEFT's files and names: adapter_model.safetensors and adapter_config.json.

    ``state_dict`` is the model's, where it was gathered already.
    """
    from safetensors.torch import save_file

    if not any(True for _ in _adapters(model)):
        raise ValueError("the model has no adapters to save; add_adapters puts them on, merge_adapters takes them off")
    import copy

    import peft

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = peft.get_peft_model_state_dict(_bare(model), state_dict, adapter_name=_NAME, save_embedding_layers=False)
    temporary = folder / (_FILE + ".tmp")
    save_file({_PEFT_PREFIX + name: t.detach().cpu().clone().contiguous() for name, t in state.items()}, temporary)
    os.replace(temporary, folder / _FILE)
    config = copy.copy(model.peft_config[_NAME])
    config.base_model_name_or_path, config.inference_mode = model.config.name_or_path, True
    config.save_pretrained(str(folder))


def load_adapters(model: Any, folder: str | os.PathLike) -> None:
    """Load adapters saved by `save_adapters` or PEFT onto ``model``: PEFT injects them by the folder's configuration.

    A model whose adapters were refused is what it was.

    Raises:
        ValueError: PEFT is not installed, the model is quantised or has adapters already, the folder holds none, its
            method is none that is injected into layers, or they do not fit the model.
    """
    folder = Path(folder)
    if not (folder / _FILE).exists():
        raise ValueError(f"there are no adapters {folder / _FILE}")
    _require(model)

    config = read_adapter_config(folder)
    stored = read_file(folder / _FILE)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(
            f"{folder}: {config.peft_type.value} adapters put tokens before the text and are not injected into layers; "
            "load them with "
            "peft.PeftModel.from_pretrained"
        )
    if not hasattr(model, "backbone") and all(n.startswith(f"{_PEFT_PREFIX}backbone.") for n in stored):
        raise ValueError(
            f"the adapters of {folder} are a language model's: load it with AutoModelForCausalLM, take its .backbone"
        )
    learned = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    # PiSSA, OLoRA and similar methods subtract their initial update from the weights.
    moves = isinstance(getattr(config, "init_lora_weights", None), str)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()} if moves else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on how the folder ought to have been made
        try:
            copies = _load(model, config, stored, folder)
        except ValueError:
            _take_off(model, merge=False)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(learned[name])
                if name in weights:
                    parameter.data.copy_(weights[name])
            raise
    for name, parameter in model.named_parameters():
        if name in copies:
            parameter.data.copy_(stored[_PEFT_PREFIX + name] if _PEFT_PREFIX + name in stored else stored[name])


def _load(model: Any, config: Any, stored: dict[str, Any], folder: Path) -> list[str]:
    """Inject the adapters and fill them; the names of the tensors beside them that are the model's own.

    Raises:
        ValueError: they do not fit the model.
    """
    import peft

    _inject(model, config, str(folder))
    bare = _bare(model)
    wanted = peft.get_peft_model_state_dict(bare, adapter_name=_NAME, save_embedding_layers=False)
    given = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in stored.items()}
    # Beside the adapters PEFT saves embeddings that it takes for resized, and a head with an adapter. In a model of the
    # same size they equal the base model's.
    ends = ("embeddings.weight", "lm_head.weight")
    copies = [n for n in given if n not in wanted and n.replace(".base_layer.", ".").endswith(ends)]
    different = sorted((given.keys() ^ wanted.keys()) - set(copies))
    base = dict(model.named_parameters())
    different = different or sorted(n for n in wanted if wanted[n].shape != given[n].shape)
    different = different or sorted(n for n in copies if n in base and base[n].shape != given[n].shape)
    if different:
        raise _misfit(folder, f"{different[0]} differs")
    peft.set_peft_model_state_dict(bare, given, adapter_name=_NAME)
    return copies


def _require(model: Any) -> None:
    if importlib.util.find_spec("peft") is None:
        raise ValueError('adapters (lora_rank) need PEFT: pip install "mambakit[peft]"')
    if is_quantized(model.config):
        raise ValueError("the model is quantised, and packed weights take no adapters; call model.dequantize() first")
    if hasattr(model, "peft_config") or any(True for _ in _adapters(model)):
        raise ValueError("the model has adapters already; merge_adapters(model) takes them in, then others go on")


def _bare(model: Any) -> nn.Module:
    """The model's children without its configuration, by whose type PEFT refuses out_proj and conv1d."""
    bare = nn.Module()
    for name, child in model.named_children():
        bare.add_module(name, child)
    if hasattr(model, "peft_config"):
        bare.peft_config = model.peft_config
    return bare


def _inject(model: Any, config: Any, folder: str = "") -> None:
    """Let PEFT put new adapters into ``model`` and freeze the rest.

    Raises:
        ValueError: PEFT finds the configuration wrong for this model.
    """
    import peft

    model.requires_grad_(False)
    bare = _bare(model)
    try:
        peft.inject_adapter_in_model(config, bare, _NAME)
    except (ValueError, NotImplementedError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder or 'the adapters'}: PEFT cannot put them on this model ({error})") from error
    for name, child in bare.named_children():  # a head that was wrapped
        setattr(model, name, child)
    model.peft_config = bare.peft_config
    _untie(model, config)


def _adapters(model: Any) -> Iterator[tuple[nn.Module, str, Any]]:
    """(parent, attribute, adapter) of every adapted layer; a model without PEFT's layers has none."""
    for name, child in model.named_children():
        module = type(child).__module__
        if module.startswith("peft.") and hasattr(child, "active_adapters"):
            yield model, name, child
        else:
            yield from _adapters(child)
