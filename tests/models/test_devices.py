"""The dtype that a model's weights get where nothing else is asked for."""

from __future__ import annotations

import pytest
import torch

from mambakit.models.devices import default_dtype


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "auto"), ("cuda:1", "auto")])
def test_default_dtype(device, dtype):
    assert default_dtype(torch.device(device)) == dtype
