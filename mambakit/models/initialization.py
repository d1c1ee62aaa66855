"""The earlier home of `mambakit.models.mamba.initialization.initialize`, FSDP1's ``param_init_fn``."""

from __future__ import annotations

import warnings

from mambakit.models.mamba.initialization import initialize

__all__ = ["initialize"]

warnings.warn(
    "mambakit.models.initialization is now mambakit.models.mamba.initialization", DeprecationWarning, stacklevel=2
)
