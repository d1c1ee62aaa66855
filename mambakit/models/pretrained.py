"""The base class of all models: loading, saving, initialisation, and which parameters stay float32.

mambakit's models use PreTrainedModel, GenerationMixin and ModelOutput of transformers. Its other classes have changed
between releases.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mambakit.models.adapter_config import base_of
from mambakit.models.adapters import load_adapters
from mambakit.models.checkpoints.loading import load_pretrained
from mambakit.models.checkpoints.saving import save_gguf, save_original, save_pretrained
from mambakit.models.checkpoints.storage import HUB_ARGUMENTS, holds_adapters, locate
from mambakit.models.mamba.configuration import MambaConfig
from mambakit.models.mamba.initialization import initialize, initialize_in_turn
from mambakit.models.options import check_loading
from mambakit.models.quantization import dequantize, is_quantized, packed_numbers, quantize, require_plain
from mambakit.modules.placement import KEPT_IN_PLACE, computing_device, keep_in_place


class MambaPreTrainedModel(PreTrainedModel):
    """The base class of all models. Abstract."""

    config_class: Any = MambaConfig  # a family's models name its own
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch
    _no_split_modules = ["MambaBlock"]
    _is_stateful = True
    _keep_in_fp32_modules_strict = ["A_log", "mixer.D", "dt_proj.bias"]
    _skip_keys_device_placement = list(KEPT_IN_PLACE)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_hf_hook":  # accelerate puts a hook on the model
            keep_in_place(value)
        super().__setattr__(name, value)

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs: that of its first parameters, or of accelerate's hooks."""
        device = super().device
        return computing_device(self) if device.type == "meta" else device

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embeddings  # the backbone's, or its own

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.embeddings = value

    def _init_weights(self, module: nn.Module) -> None:
        initialize_in_turn(module, self.config)

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as for a new model; after ``to_empty``, for example.

        Raises:
            ValueError: the weights are packed.
        """
        if is_quantized(self.config):
            raise ValueError("packed weights are not drawn; dequantize() the model first")
        for parameter in self.parameters():
            if getattr(parameter, "_is_hf_initialized", False):  # else it would be passed over as loaded
                del parameter._is_hf_initialized
        for module in self.modules():
            initialize(module, self.config)
        self.tie_weights()  # to_empty makes two tensors of one

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint of any format (`mambakit.models.checkpoints`), from a folder, a hub id or a GGUF file
        (``gguf_file`` names one in a folder or on the hub). PEFT's adapters, in a folder or on the hub, are loaded on
        their base model.

        ``quantization`` ("int8", "int4", "fp8", "lossless") packs the weights once they are loaded; a checkpoint saved
        after `quantize` needs none. The other arguments are transformers' (``dtype``, "auto" for the checkpoint's own;
        ``device_map``, ``revision``, ``cache_dir``, ``local_files_only``, fields of the configuration, ...). One that
        cannot be followed raises, one without effect warns (`mambakit.models.options`).

        Raises:
            ValueError: an option that cannot be followed.
            CheckpointError: a file is missing, damaged, holds code, or does not fit the configuration.
        """
        quantization = kwargs.pop("quantization", None)
        name = pretrained_model_name_or_path
        place = locate(name, **{key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs})
        if holds_adapters(place):
            model = cls._with_adapters(place, *args, **kwargs)
        else:
            model = load_pretrained(cls, name, *args, **check_loading(kwargs))
        return model if quantization is None else model.quantize(quantization)

    @classmethod
    def _with_adapters(cls, folder: Path, *args: Any, **kwargs: Any) -> Any:
        """The base model of a folder of PEFT's adapters, with them on its layers.

        ``cache_dir``, ``token``, ``local_files_only`` and ``force_download`` are the base model's, too.
        """
        kwargs = {k: v for k, v in kwargs.items() if k not in ("revision", "subfolder")}
        model = cls.from_pretrained(base_of(folder), *args, **kwargs)
        load_adapters(model, folder)
        return model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return super()._from_config(config, **check_loading(kwargs))

    def quantize(self, format: str, group: int | None = None) -> MambaPreTrainedModel:
        """Pack the weights in place, for inference: "int8", "int4", "fp8" or "lossless".

        See `mambakit.models.quantization`.
        """
        return quantize(self, format, group)

    def dequantize(self, dtype: torch.dtype | str | None = None) -> MambaPreTrainedModel:
        """Unpack the weights in place, to train the model or to save it for transformers.

        ``dtype`` is the model's own when None. See `mambakit.models.quantization`.
        """
        return dequantize(self, dtype)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of weights, packed ones included; the arguments are transformers'. A tied head is not counted."""
        plain = super().num_parameters(only_trainable, exclude_embeddings)
        return plain if only_trainable else plain + packed_numbers(self)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """transformers'. Packed weights: `dequantize` first."""
        if new_num_tokens is None:
            return self.get_input_embeddings()
        require_plain(self, f"resize_token_embeddings({new_num_tokens})")
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Save in transformers' format, with its arguments; a model with packed weights in mambakit's own.

        config.json says ``rescale_prenorm_residual: false`` whatever the configuration says: the field is for weights
        that are yet to be drawn, and transformers applies it to those that it has just read.
        """
        save_pretrained(self, save_directory, is_main_process, state_dict, *args, **kwargs)

    def save_original(self, folder: str | os.PathLike) -> None:
        """Save in state-spaces' original format. Packed weights: `dequantize` first."""
        save_original(self, folder)

    def save_gguf(self, file: str | os.PathLike, type: str | None = None, tokenizer: Any = None) -> None:
        """Save as a GGUF file, for llama.cpp. Packed weights: `dequantize` first.

        ``type`` is the large weights': F32, F16, BF16, Q8_0 or Q4_0; the model's own dtype when None. ``tokenizer`` is
        written with them.
        """
        save_gguf(self, file, type, tokenizer)
