"""pipeline(): transformers' pipelines over a Mamba model; the embedded model when none is named."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers

from mambakit.assets import default_model_path
from mambakit.models.auto import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from mambakit.models.devices import default_dtype
from mambakit.models.options import check_loading
from mambakit.quoting import brief

_MODELS = {
    "text-generation": AutoModelForCausalLM,
    "text-classification": AutoModelForSequenceClassification,
    "sentiment-analysis": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "ner": AutoModelForTokenClassification,
    "fill-mask": AutoModelForMaskedLM,
}


def pipeline(
    task: str | None = None,
    model: Any = None,
    config: Any = None,
    tokenizer: Any = None,
    *,
    device: Any = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    device_map: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """transformers' `pipeline` for Mamba models.

    Args:
        task: "text-generation" (the default), "text-classification", "token-classification" or "fill-mask".
        model: hub id, folder or model object; the model that ships with mambakit when absent.
        tokenizer: id, folder or object; the model's own when absent.
        device, dtype, device_map, revision, token, model_kwargs: as in transformers. ``dtype`` is "auto" when absent,
            the checkpoint's; on a CPU the embedded model runs in float32. ``torch_dtype`` is its older name.

    Returns:
        transformers' pipeline object: call it with a prompt, a list of prompts, or chat messages.
    """
    task = "text-generation" if task is None else task
    if task not in _MODELS:
        raise ValueError(f"task is {brief(task)}; mambakit has {', '.join(_MODELS)}")
    dtype = torch_dtype if dtype is None else dtype
    if kwargs.get("use_fast") is False:
        raise ValueError("use_fast=False cannot be followed: tokenizers are the fast ones; give your own as tokenizer=")
    kwargs = check_loading(kwargs)
    if model is not None and not isinstance(model, (str, os.PathLike)):
        said = {"config": config, "dtype": dtype, "device_map": device_map, "model_kwargs": model_kwargs}
        if given := [name for name, value in said.items() if value is not None]:
            raise ValueError(
                f"{' and '.join(given)}: for loading a model, and model is one already; load it so, or drop them"
            )
    if model is None:
        if task != "text-generation":
            raise ValueError(f"no model ships with mambakit for {brief(task)}; name one with model=")
        model = default_model_path()
        if dtype is None:
            dtype = default_dtype(_device_of(device, device_map))
    if isinstance(model, (str, os.PathLike)):
        options = {"revision": revision, "token": token, "device_map": device_map, "config": config}
        options = {k: v for k, v in options.items() if v is not None} | (model_kwargs or {})
        if tokenizer is None:
            tokenizer = model
        model = _MODELS[task].from_pretrained(model, dtype="auto" if dtype is None else dtype, **options)
    if tokenizer is None:
        tokenizer = model.config.name_or_path
    if isinstance(tokenizer, (str, os.PathLike)):
        hub = {k: v for k, v in {"revision": revision, "token": token}.items() if v is not None}
        tokenizer = AutoTokenizer.from_pretrained(tokenizer, **hub)
    if device is not None:
        kwargs["device"] = device
    if _MODELS[task] in _PIPELINES:
        kwargs.setdefault("pipeline_class", _PIPELINES[_MODELS[task]])
    return transformers.pipeline(task, model=model, tokenizer=tokenizer, **kwargs)


class _TextClassification(transformers.TextClassificationPipeline):
    """transformers' pipeline, which would log that it does not know Mamba's classifier (transformers has none)."""

    def check_model_type(self, supported_models: Any) -> None:
        pass


class _TokenClassification(transformers.TokenClassificationPipeline):
    """The same for tokens."""

    def check_model_type(self, supported_models: Any) -> None:
        pass


class _FillMask(transformers.FillMaskPipeline):
    """The same for masked tokens."""

    def check_model_type(self, supported_models: Any) -> None:
        pass


_PIPELINES = {
    AutoModelForMaskedLM: _FillMask,
    AutoModelForSequenceClassification: _TextClassification,
    AutoModelForTokenClassification: _TokenClassification,
}


def _device_of(device: Any, device_map: Any) -> torch.device:
    """The kind of device that ``pipeline``'s arguments name: a CPU, or anything else."""
    if device is None:
        on_cpu = device_map in (None, "cpu") or not torch.cuda.is_available()
    else:
        on_cpu = str(device) in ("cpu", "-1")
    return torch.device("cpu" if on_cpu else "cuda")
