"""Prompts on a CPU by the native library: the kernels of a step, over many tokens, in one call a layer.

The model's own forward widens packed weights for every part of a prompt, and goes through some fifteen ops a layer:
40 ms for a prompt of 4 tokens whose step takes 2 (embedded model, one thread). It serves where weights are in 8 or 4
bits; of others torch's product is faster. A text's bits do not depend on the other rows of the batch.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding import native_step
from mambakit.decoding.cuda_graph import kept_with, placement_of
from mambakit.decoding.eligibility import mixer_eps, weight_kinds
from mambakit.modules.interception import Watch, is_ours, modules_of
from mambakit.ops._backends.memory import observed, transformed
from mambakit.ops.decode.cpu_prefill import PrefillStep

# Of one call. More are not faster, as a product's rows meet its weights 16 at a time; a layer of so many takes half of
# a decode step (embedded model: 2.5 ms), so that texts that decode need not wait longer.
_MOST_TOKENS = 64


def why_not(model: Any, cache: Any) -> str | None:
    """Why prompts cannot be read into ``cache`` by `NativePrompts`, or None where they can."""
    if torch.is_grad_enabled():
        return "gradients are on"
    if (reason := native_step.why_not(model, 1, states=cache)) is not None:
        return reason
    plain = [kind for kind in weight_kinds(model) if not isinstance(kind, tuple) or kind[0] not in ("int8", "int4")]
    return f"weights of {', '.join(map(str, plain))}; it reads int8 and int4" if plain else None


class NativePrompts:
    """Reads prompts of one model, which it does not refer to; kept with the model by `native_prompts`."""

    def __init__(self, model: Any):
        layers, head = native_step.native_weights(model)
        self._embeddings = model.backbone.embeddings
        self._watch, self._versions = Watch(modules_of(model)[1:]), placement_of(model).versions()
        self._step = PrefillStep(
            layers, model.backbone.norm_f.weight, head, model.config.layer_norm_epsilon, model.dtype, _MOST_TOKENS,
            mixer_eps(model),
        )  # fmt: skip

    def holds(self, model: Any) -> bool:
        """Whether no module is intercepted, and no weight was written to since."""
        return self._watch.holds() and self._versions == placement_of(model).versions()

    def read(self, ids: Tensor, cache: Any, want_logits: bool) -> Generator[None, None, Tensor | None]:
        """Read (b, l) tokens into the cache; yields after each layer of a part.

        Returns:
            (b, v) logits after the last token of each row, if they are wanted.
        """
        rows, length = ids.shape
        found = []
        together = max(1, _MOST_TOKENS // length)
        for first in range(0, rows, together):
            own = slice(first, first + together)
            for part in ids[own].split(_MOST_TOKENS, dim=1):
                stream = self._step.begin(self._embeddings(part))
                for layer in range(self._step.layers):
                    conv_states, ssm_states = cache.memory(layer)
                    self._step.read(layer, stream, conv_states[own], ssm_states[own])
                    yield
            if want_logits:
                found.append(self._step.last_logits(stream))
        cache.advance(length)
        return torch.cat(found) if want_logits else None


def native_prompts(model: Any, cache: Any) -> NativePrompts | None:
    """What reads prompts into ``cache``; None where the model's forward does."""
    if model.device.type != "cpu" or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    if transformed() or observed() or not is_ours(model):
        return None
    held: list[NativePrompts | None] = kept_with(model, ("native prompts",), lambda: [None])
    if held[0] is None or not held[0].holds(model) or not native_step.fits(cache):
        held[0] = NativePrompts(model) if why_not(model, cache) is None else None
    return held[0]
