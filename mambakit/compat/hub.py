"""``mamba_ssm.utils.hf``: a model's configuration and weights in the original format, from a folder or the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambakit.reading import read_file, read_json

_WEIGHTS = ("pytorch_model.bin", "model.safetensors")


def load_config_hf(model_name: str | os.PathLike) -> dict[str, Any]:
    """The fields of config.json.

    Raises:
        FileNotFoundError: there is none, in the folder or on the hub.
    """
    return read_json(_file(model_name, ("config.json",)))


def load_state_dict_hf(
    model_name: str | os.PathLike, device: Any = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The weights, by upstream's names, in ``dtype`` (as stored when None) and on ``device`` (CPU when None)."""
    tensors = read_file(_file(model_name, _WEIGHTS))
    return {
        name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }


def _file(model_name: str | os.PathLike, names: tuple[str, ...]) -> Path:
    """The first of the files that there is."""
    folder = Path(model_name)
    if folder.is_dir():
        found = next((folder / name for name in names if (folder / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{folder} has no {' or '.join(names)}; give a folder that holds a model")
        return found
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    for name in names:
        try:
            return Path(hf_hub_download(str(model_name), name))
        except HFValidationError as error:
            raise FileNotFoundError(f"{str(model_name)!r} is neither a folder nor a hub id (owner/name)") from error
        except LocalEntryNotFoundError as error:
            raise FileNotFoundError(
                f"{str(model_name)!r} is not a folder, and the hub's {name} of it is neither in the cache nor within "
                "reach; check the connection, or download it first"
            ) from error
        except EntryNotFoundError:
            continue
    raise FileNotFoundError(f"{model_name} has no {' or '.join(names)} on the hub; is it in the original format?")
