"""The --model, --device and --dtype arguments that several commands share."""

from __future__ import annotations

import argparse
from typing import Any


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="hub id or folder (default: the model that ships with mambakit)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the weights (default: float32 on a CPU, the checkpoint's on a GPU)",
    )


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """(model in eval mode on its device, tokenizer)."""
    import torch
    import transformers

    from mambakit.assets import default_model_path
    from mambakit.models.auto import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    name = args.model or default_model_path()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {device}: {str(error).splitlines()[0]}; use one that `mambakit env` lists"
        ) from error
    dtype = args.dtype or ("float32" if device == "cpu" else "auto")
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    return model, tokenizer
