"""The one torch.library handle of the package, and the two ways an implementation is attached to an op."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from mambakit.ops._autocast import autocast_dtype, no_autocast
from mambakit.ops._memory import plain_arguments

LIBRARY = torch.library.Library("mambakit", "FRAGMENT")
_references: dict[str, Callable] = {}


def define(schema: str, reference: Callable, fake: Callable) -> None:
    """Define ``mambakit::<schema>``; ``reference`` serves every device that has no implementation of its own."""
    name = schema.split("(", 1)[0]
    _references[name] = without_autocast(reference)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, _references[name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"mambakit::{name}", fake, lib=LIBRARY)


def without_autocast(reference: Callable) -> Callable:
    """A reference chooses its own dtypes: the caller's autocast would round its matrix products to half."""

    def call(*args):
        device = next(a for a in args if isinstance(a, torch.Tensor)).device
        if autocast_dtype(device) is None:
            return reference(*args)
        with no_autocast(device):
            return reference(*args)

    return call


def implement_on_cuda(name: str, module: str, function: str) -> None:
    """Serve ``mambakit::<name>`` on CUDA by ``module.function``; the module is imported at the first CUDA call."""
    loaded: list[Callable] = []

    def call(*args):
        if not loaded:
            loaded.append(getattr(importlib.import_module(module), function))
        return loaded[0](*args)

    implement(name, call, "CUDA")


def implement(name: str, function: Callable, key: str) -> None:
    """Serve ``mambakit::<name>`` on a dispatch key by kernels that read memory: of plain tensors; of others the reference serves."""
    reference = _references[name]

    def call(*args):
        return function(*args) if plain_arguments(args) else reference(*args)

    LIBRARY.impl(name, call, key)
