"""A draft model: a smaller model of the same vocabulary as a `Drafter`, and the drafters of several slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.draft_slots import DraftSlots
from mambakit.decoding.drafting import Draft, Drafter, DrafterPerSlot, Scores, SlotDrafter
from mambakit.decoding.guess_count import Guesses, step_cost
from mambakit.decoding.sampling_params import SamplingParams


class DraftModel:
    """A `Drafter` by a smaller model of the same vocabulary. Several slots are drafted by `DraftSlots` of it.

    Args:
        model: a causal language model in eval mode.
    """

    def __init__(self, model: Any):
        self.model = model
        self._slots: DraftSlots | None = None

    def begin(self, ids: Tensor, sampling: SamplingParams, scores: Scores | None, generator: torch.Generator) -> None:
        if self._slots is not None:
            self._slots.close()
        self._slots = self.for_slots(1)
        self._slots.begin(0, ids, sampling)

    def propose(self, text: list[int], most: int) -> Draft:
        assert self._slots is not None
        return self._slots.propose([text], [Guesses(most, max(2, most + 1))])[0]

    def for_slots(self, slots: int) -> DraftSlots:
        """A `SlotDrafter` by this model."""
        return DraftSlots(self.model, slots)

    def require_fit(self, model: Any) -> None:
        """
        Raises:
            ValueError: the draft model has another vocabulary than ``model``, or is on another device.
        """
        draft = self.model
        ours, theirs = model.config.vocab_size, draft.config.vocab_size
        if ours != theirs:
            raise ValueError(
                f"the draft model has a vocabulary of {theirs} tokens and the model one of {ours}; "
                "they must be the same"
            )
        if draft.device != model.device:
            raise ValueError(f"the draft model is on {draft.device} and the model on {model.device}; move one")


def slot_drafter(drafter: Drafter, model: Any, slots: int) -> SlotDrafter:
    """A drafter for ``slots`` texts of ``model``: a draft model drafts them together, any other drafter is copied for
    each text.

    Raises:
        TypeError: ``drafter`` has no `begin` and `propose`.
        ValueError: a draft model that does not fit ``model``.
    """
    if not (callable(getattr(drafter, "begin", None)) and callable(getattr(drafter, "propose", None))):
        raise TypeError(f"drafter is a {type(drafter).__name__}; give a DraftModel, a PromptLookup or another Drafter")
    if isinstance(drafter, DraftModel):
        drafter.require_fit(model)
        return drafter.for_slots(slots)
    return DrafterPerSlot(drafter, slots, model.device)


def draft_cost(drafter: Drafter, model: Any) -> float:
    """The cost of a guess, in steps of ``model`` (`guess_count.step_cost`); 0 where it is not a model's."""
    return step_cost(model, drafter.model) if isinstance(drafter, DraftModel) else 0.0
