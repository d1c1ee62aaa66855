"""The --model, --device and --dtype arguments that several commands share."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mambakit._versions import check_models
from mambakit.commands.options import dtype_name


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="hub id, folder or .gguf file (default: the model that ships with mambakit)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument(
        "--dtype",
        type=dtype_name,
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the weights (default: float32 on a CPU, the checkpoint's on a GPU)",
    )


def add_tokenizer_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer", metavar="NAME",
        help="hub id or folder of the tokenizer, hyena-dna, or raw-bytes (default: the model's; for state-spaces' "
        "original format GPT-NeoX's)",
    )  # fmt: skip


def hide_progress_bars() -> None:
    """transformers shows none of its own from here on.

    Raises:
        RequirementError: it is missing, or too old.
    """
    check_models()
    import transformers

    transformers.utils.logging.disable_progress_bar()


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection within: imports make a million objects that stay, and to look at them again and again takes
    a fifth of their time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_uncollected()
def load(args: argparse.Namespace, inference: bool = False) -> tuple[Any, Any]:
    """(model in eval mode on its device, tokenizer).

    Args:
        inference: what is done with them needs nothing of transformers' classes: they are loaded without transformers
            where their files ask for no more, in half the time.
    """
    check_models()
    from mambakit.assets import default_model_path
    from mambakit.models.checkpoints.storage import holds_adapters, locate
    from mambakit.models.devices import default_device, default_dtype, usable_device
    from mambakit.models.mamba.inference import InferenceCausalLM
    from mambakit.models.mamba.inference_config import InferenceConfig

    name = default_model_path() if args.model is None else args.model
    device = default_device() if args.device is None else usable_device(args.device, "--device")
    dtype = args.dtype or default_dtype(device)
    config: Any = InferenceConfig.of(name) if inference else None
    if config is None:
        hide_progress_bars()
        from mambakit.models.auto import AutoConfig, require_text

        config = AutoConfig.from_pretrained(name)  # what the checkpoint is comes before what it lacks
        require_text(name, config)
    tokenizer = _tokenizer(getattr(args, "tokenizer", None) or name, inference)
    if inference and InferenceCausalLM.loads(config) and not holds_adapters(locate(name)):
        return InferenceCausalLM.from_pretrained(name, config=config, dtype=dtype).to(device), tokenizer
    from mambakit.models.auto import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    if hasattr(model, "peft_config"):
        from mambakit.models.adapters import merge_adapters

        merge_adapters(model)  # plain layers: the decoders read their weights
    return model.to(device).eval(), tokenizer


def _tokenizer(name: Any, inference: bool) -> Any:
    from mambakit.models.inference_tokenizer import InferenceTokenizer

    if inference and (found := InferenceTokenizer.of(name)) is not None:
        return found
    hide_progress_bars()
    from mambakit.models.auto import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)
