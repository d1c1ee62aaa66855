"""The one torch.library handle of the package, and how an implementation is attached to a dispatch key."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from mambakit.ops._autocast import autocast_dtype, no_autocast
from mambakit.ops._backends import native
from mambakit.ops._backends.memory import plain_arguments
from mambakit.ops._releases import bound_messages

LIBRARY = torch.library.Library("mambakit", "FRAGMENT")
_plain: dict[str, Callable] = {}  # op -> its plain PyTorch version


def define(schema: str, plain: Callable, fake: Callable) -> None:
    """Define ``mambakit::<schema>``.

    Args:
        plain: plain PyTorch; it serves every device and every tensor that no kernel serves.
        fake: shapes and dtypes of the results, for tracing.
    """
    name = schema.split("(", 1)[0]
    _plain[name] = without_autocast(plain)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, _plain[name], "CompositeExplicitAutograd")

    def traced(*args):
        bound_messages()
        return fake(*args)

    torch.library.register_fake(f"mambakit::{name}", traced, lib=LIBRARY)


def without_autocast(plain: Callable) -> Callable:
    """Plain PyTorch chooses its own dtypes: the caller's autocast would round its matrix products to half."""

    def call(*args):
        device = next(a for a in args if isinstance(a, torch.Tensor)).device
        if autocast_dtype(device) is None:
            return plain(*args)
        with no_autocast(device):
            return plain(*args)

    return call


def implement_on_cpu(name: str, launcher: Callable, serves: Callable[..., bool]) -> None:
    """Serve ``mambakit::<name>`` on the CPU by a native kernel, where the library is and ``serves(*args)``.

    Where the library is missing, the first call warns, and plain PyTorch serves.
    """
    implement(name, choose(launcher, _plain[name], serves), "CPU")


def choose(launcher: Callable, plain: Callable, serves: Callable[..., bool]) -> Callable:
    """``launcher`` where the native library is and serves the arguments, else ``plain``."""

    def call(*args):
        if not native.is_available():
            native.warn_missing()
            return plain(*args)
        return launcher(*args) if serves(*args) else plain(*args)

    return call


def plain_version(name: str) -> Callable:
    """Of ``mambakit::<name>``, with the caller's autocast off."""
    return _plain[name]


def implement_on_cuda(name: str, module: str, function: str, checks: bool = False) -> None:
    """Serve ``mambakit::<name>`` on CUDA by ``module.function``; the module is imported at the first CUDA call.

    Args:
        checks: the function looks at every tensor itself, and calls `plain_version` for what it does not serve.
    """
    loaded: list[Callable] = []

    def call(*args):
        if not loaded:
            loaded.append(getattr(importlib.import_module(module), function))
        return loaded[0](*args)

    if checks:
        LIBRARY.impl(name, call, "CUDA")
    else:
        implement(name, call, "CUDA")


def implement(name: str, function: Callable, key: str) -> None:
    """Serve ``mambakit::<name>`` on a dispatch key by kernels that read memory; plain PyTorch serves tensor
    subclasses."""
    plain = _plain[name]

    def call(*args):
        return function(*args) if plain_arguments(args) else plain(*args)

    LIBRARY.impl(name, call, key)
