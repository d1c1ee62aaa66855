"""Layers of mamba_ssm that mambakit does not have, as names that can be imported and not used.

Copies of upstream's model file import every layer that it knows at the top, whichever the model has.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mambakit.compat.surface import absent_message


class _Absent(nn.Module):
    kind = ""

    def __init__(self, *args: Any, **kwargs: Any):
        raise ImportError(absent_message(type(self).__name__, self.kind))


class Mamba2(_Absent):
    """Raises an ImportError when it is made."""

    kind = "Mamba-2"


class Mamba3(_Absent):
    """Raises an ImportError when it is made."""

    kind = "Mamba-3"


class MHA(_Absent):
    """Raises an ImportError when it is made."""

    kind = "attention"
