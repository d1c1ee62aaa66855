"""The --model, --device and --dtype arguments that several commands share."""

from __future__ import annotations

import argparse
from typing import Any

from mambakit._versions import check_models


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="hub id, folder or .gguf file (default: the model that ships with mambakit)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument(
        "--dtype",
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


def load(args: argparse.Namespace, inference: bool = False) -> tuple[Any, Any]:
    """(model in eval mode on its device, tokenizer).

    Args:
        inference: what is done with the model needs nothing of transformers' classes: one is loaded without them, in
            half the time.
    """
    hide_progress_bars()
    from mambakit.assets import default_model_path
    from mambakit.models.auto import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from mambakit.models.checkpoints.storage import holds_adapters, locate
    from mambakit.models.devices import default_device, default_dtype, usable_device
    from mambakit.models.mamba.inference import InferenceCausalLM

    name = default_model_path() if args.model is None else args.model
    device = default_device() if args.device is None else usable_device(args.device, "--device")
    dtype = args.dtype or default_dtype(device)
    config = AutoConfig.from_pretrained(name)  # what the checkpoint is comes before what it lacks
    tokenizer = AutoTokenizer.from_pretrained(getattr(args, "tokenizer", None) or name)
    if inference and InferenceCausalLM.loads(config) and not holds_adapters(locate(name)):
        return InferenceCausalLM.from_pretrained(name, config=config, dtype=dtype).to(device), tokenizer
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    if hasattr(model, "peft_config"):
        from mambakit.models.adapters import merge_adapters

        merge_adapters(model)  # plain layers: the decoders read their weights
    return model.to(device).eval(), tokenizer
