"""The models' outputs: transformers' ModelOutput, so that fields, keys and tuples all work.

The state has three names in transformers: ``cache`` since 5.24, ``cache_params`` before, and ``past_key_values`` in
code for attention models. The field is ``cache``. All three work as attributes, as keys, with ``in``, in `get` and in
the constructor.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor
from transformers.utils import ModelOutput

from mambakit.modules import StateCache

CACHE_NAMES = ("cache", "cache_params", "past_key_values")
_Output = TypeVar("_Output")


def _name(key: Any) -> Any:
    return "cache" if isinstance(key, str) and key in CACHE_NAMES else key


def _takes_each_name(cls: type[_Output]) -> type[_Output]:
    """Class decorator: the constructor of a dataclass takes the field ``cache`` under its other names, too."""
    init = vars(cls)["__init__"]

    @functools.wraps(init)
    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: N807, the method itself
        init(self, *args, **{_name(key): value for key, value in kwargs.items()})

    setattr(cls, "__init__", __init__)  # noqa: B010, which mypy takes for an instance's
    return cls


class _WithCache(ModelOutput):
    """An output with the field ``cache`` under three names. Abstract."""

    cache: StateCache | None

    @property
    def cache_params(self) -> StateCache | None:
        return self.cache

    @property
    def past_key_values(self) -> StateCache | None:
        return self.cache

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_name(key))

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(_name(key))

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(_name(key), default)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(_name(key), value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(_name(name), value)


@_takes_each_name
@dataclass
class MambaOutput(_WithCache):
    """Output of `MambaModel`.

    Attributes:
        last_hidden_state: (b, l, h), after the final norm.
        cache: the state after the last token; also ``cache_params`` and ``past_key_values``.
        hidden_states: layers + 1 tensors (b, l, h): the residual stream after each layer, then ``last_hidden_state``.
    """

    last_hidden_state: Tensor | None = None
    cache: StateCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@_takes_each_name
@dataclass
class MambaCausalLMOutput(_WithCache):
    """Output of `MambaForCausalLM`: ``loss`` (), ``logits`` (b, l, v) float32, and the fields of `MambaOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: StateCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@_takes_each_name
@dataclass
class MambaSequenceClassifierOutput(_WithCache):
    """Output of `MambaForSequenceClassification`: ``loss`` (), ``logits`` (b, labels), and fields of `MambaOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: StateCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@_takes_each_name
@dataclass
class MambaTokenClassifierOutput(_WithCache):
    """Output of `MambaForTokenClassification`: ``loss`` (), ``logits`` (b, l, labels), and fields of `MambaOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: StateCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
