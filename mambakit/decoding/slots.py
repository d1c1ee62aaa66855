"""A pool of state slots that decode together: what every text is written with."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.eligibility import skipped_modules
from mambakit.decoding.logits import are_numbers
from mambakit.decoding.registry import Decoder, ForwardDecoder, choose, kept_decoder, verifier
from mambakit.decoding.verify import PackedVerifier, Verifier
from mambakit.modules import StateCache
from mambakit.modules.interception import Watch
from mambakit.ops.linear.api import MOST_ROWS


class SlotPool:
    """A pool of states and the decoder that steps all of them (`mambakit.decoding.registry`).

    `generate` makes it over the cache that its prompts were read into. `Engine` begins with no slots, has the pool grow when it has a
    text and no slot for it, and puts the next text where one has ended. Which text is in which slot is theirs to know.

    Where a slot's bits do not depend on how many there are (the native library), the pool is ``elastic``: `grow` doubles it, and
    `shrink` leaves out the slots whose texts have ended. Elsewhere it has ``most`` slots from the first `grow` on, and free ones are
    stepped with the others.

    Args:
        model: a causal language model in eval mode.
        most: how many slots there are at most.
        states: a cache of ``most`` rows to go on from. A captured decoder takes its states over, and they come back in `close`; the
            others write into it.
        called: the model is in its own forward: its hooks have been called.

    A step reads the weights without calling the modules; once one has a hook or a replaced forward, it is the model's forward.

    Attributes:
        states: the cache of all slots.
        elastic: see above.
        held: for each slot, what its owner keeps with it; None where the slot is free. It moves with the slots.
    """

    def __init__(self, model: Any, most: int, states: StateCache | None = None, called: bool = False):
        self.model, self.most = model, most
        self._watch = Watch(skipped_modules(model, called))
        self._given, self._steps = states, 0
        # What is kept per slot, besides its state; `_resize` alone changes how many slots there are.
        size = 0 if states is None else states.max_batch_size
        self.held: list[Any] = [None] * size
        self._began = [0 if states is None else states.get_seq_length()] * size  # less the steps taken until it came
        self._last: Tensor | None = None  # (size, v), the logits of the last step
        self._verification: _DraftVerification | None = None
        self._draft: Tensor | None = None  # (size, t, v), what was verified and is not committed
        self._decoder: Decoder | None = None  # None while there is no slot
        self._graph: Any = None  # the decoder, where it is the model's and the given states are in it until `close`
        if states is not None:
            self._graph = kept_decoder(model, most, called=called)
        if self._graph is None:
            self._kind = choose(model, most, states=states, called=called)
            self.elastic = self._kind.elastic
            self.states = model.backbone.new_cache(0) if states is None else states
            self._make()
            return
        assert states is not None
        self.elastic = False
        if self._graph.holder is not None and self._graph.holder() is not None:  # another text is under way in it
            self._graph = choose(model, most, called=called).make(model, model.backbone.new_cache(most))
        self._graph.holder = weakref.ref(self)
        self._graph.load(states)
        self._decoder, self.states = self._graph, self._graph.states

    @property
    def size(self) -> int:
        """How many slots there are now."""
        return self.states.max_batch_size

    @property
    def by_forward(self) -> bool:
        """Whether a step of the slots that there are is nothing but a call of the model."""
        return (isinstance(self._decoder, ForwardDecoder | None) and not self.elastic) or not self._watch.holds()

    # -- tokens ----------------------------------------------------------------------------------------------------

    def step(self, tokens: Tensor) -> Tensor:
        """Each slot reads its one of ``tokens`` (size,); the logits (size, v) after it, valid until the next step."""
        assert len(tokens) == self.size
        self._steps += 1
        self._states_changed()
        self._last = self._decoder_now().step(tokens)
        return self._last

    def likeliest(self, tokens: Tensor, count: int) -> Tensor:
        """(size, count) the most probable tokens after ``tokens`` (size,); all but the last are read. A decoder of enough ``capacity``
        chooses them itself, and the host does not wait."""
        decoder: Any = self._decoder_now()
        if not decoder.capacity:
            found = []
            for _ in range(count):
                tokens = self.step(tokens).argmax(-1)
                found.append(tokens)
            return torch.stack(found, 1)
        self._steps += count
        self._states_changed()
        chosen: Tensor = decoder.likeliest(tokens, count)
        self._last = decoder.logits
        return chosen

    def are_numbers(self, tokens: Tensor) -> Tensor:
        """(size,) bool: `choosing.are_numbers` of the last step. A slot with NaN in its state has no other logits ever after."""
        return torch.ones_like(tokens, dtype=torch.bool) if self._last is None else are_numbers(self._last, tokens)

    def _decoder_now(self) -> Decoder:
        """The pool's decoder, or the model's forward where somebody has put a hook or a forward on a module."""
        assert self._decoder is not None, "nothing is stepped before the first grow"
        return self._decoder if self._watch.holds() else ForwardDecoder(self.model, self.states)

    # -- drafts ----------------------------------------------------------------------------------------------------

    def verify(self, tokens: Tensor, most: int = 0) -> Tensor:
        """Read a draft of each slot without changing its state: the logits (size, t, v) after each of ``tokens`` (size, t) int64.

        `commit` then keeps a beginning of each draft. What fills a shorter draft up comes after it. One slot is verified as fast as
        there is a way (`mambakit.decoding.registry.verifier`), with the bits of `step` where that is a native call or the persistent
        kernel; several by a forward over a copy of their states.

        Args:
            most: the most tokens of this and later drafts, for what is captured or compiled once.
        """
        size, t = tokens.shape
        assert size == self.size
        if self._verification is None or t > self._verification.most or not self._watch.holds():
            self._verification = _DraftVerification(self.model, self.states, max(t, most))
        self._draft = self._verification(tokens)
        return self._draft

    def commit(self, kept: Sequence[int]) -> None:
        """Bring slot i to after the first ``kept[i]`` tokens of the draft that was verified last.

        Raises:
            ValueError: more than there were, or no draft since the last `commit` or `step`.
        """
        if self._verification is None or self._draft is None:
            raise ValueError("no draft was verified since the last commit or step; call verify first")
        assert len(kept) == self.size
        self._verification.commit(list(kept))
        read = torch.tensor(kept, dtype=torch.int64, device="cpu").to(self._draft.device)
        after = self._draft[torch.arange(self.size, dtype=torch.int64, device=read.device), (read - 1).clamp(min=0)]
        self._last = after if self._last is None else torch.where((read > 0)[:, None], after, self._last)
        self._began = [began + m for began, m in zip(self._began, kept, strict=True)]
        self._draft = None

    def _states_changed(self) -> None:
        """By something else than a commit."""
        self._draft = None
        if self._verification is not None:
            self._verification.reload()

    # -- slots -----------------------------------------------------------------------------------------------------

    def grow(self) -> int:
        """Add slots, which are free and empty until `put`; returns how many."""
        before = self.size
        size = min(self.most, max(1, 2 * before)) if self.elastic else self.most
        kept = list(range(before))
        assert not (before and self._kind.captured), "a captured decoder has all its slots from the first"
        states = self.model.backbone.new_cache(size)
        self._resize(states.copy_(self.states, kept, kept) if kept else states, [*kept, *[None] * (size - before)])
        return size - before

    def shrink(self, kept: list[int]) -> bool:
        """Go on with the slots ``kept`` alone, from now on slots 0, 1, ..., in new memory; given states are then left behind. False, and
        nothing is done, where that could change bits or more than half of the slots are kept."""
        if not self.elastic or 2 * len(kept) > self.size:
            return False
        self._resize(self.states.select(kept), list(kept))
        return True

    def _resize(self, states: StateCache, origins: Sequence[int | None]) -> None:
        """Slot i is from now on what slot ``origins[i]`` was, or a new one: everything that is kept per slot follows."""
        self.held = [None if slot is None else self.held[slot] for slot in origins]
        self._began = [0 if slot is None else self._began[slot] for slot in origins]
        if self._last is not None:
            last = self._last
            self._last = last.new_zeros(len(origins), last.shape[1])  # numbers, where a slot has made no step yet
            for slot, origin in enumerate(origins):
                if origin is not None:
                    self._last[slot] = last[origin]
        self.states, self._verification, self._draft = states, None, None
        self._make()

    def _make(self) -> None:
        """The decoder over the states that there are: one of the pool's own, for its slots stay whatever else the model writes."""
        self._decoder = self._kind.make(self.model, self.states) if self.size else None

    def put(self, slot: int, state: StateCache) -> None:
        """``slot`` goes on from this state of one row, which is copied.

        Raises:
            ValueError: a state of another model, or of several rows.
        """
        if state.max_batch_size != 1:
            raise ValueError(f"the state has {state.max_batch_size} rows; a slot goes on from one: select it")
        self.states.copy_(state, [0], [slot])
        self._states_changed()
        self._began[slot] = state.get_seq_length() - self._steps

    def copy_of(self, slot: int) -> StateCache:
        """What has become of the state that was put into ``slot``."""
        state = self.states.select([slot])
        state.advance(self._began[slot] + self._steps - state.get_seq_length())
        return state

    # -- all of them -----------------------------------------------------------------------------------------------

    def snapshot(self) -> tuple[StateCache, int, list[int]]:
        """What `go_back` needs to return to this moment."""
        return self.states.clone(), self._steps, list(self._began)

    def go_back(self, snapshot: tuple[StateCache, int, list[int]]) -> None:
        """Every slot as it was then; in place, for a decoder holds on to its memory."""
        states, self._steps, began = snapshot
        self._began = list(began)
        self.states.load_(states)
        self._states_changed()

    def close(self) -> None:
        """Bring the given states up to date; nothing is stepped afterwards."""
        if self._given is None:
            return
        read = max(self._began, default=0) + self._steps - self._given.get_seq_length()
        if self._graph is not None:
            if read:
                self._graph.store(self._given, read)
            self._graph.holder = None
        elif read and self.states is self._given:  # after commits of different lengths
            self._given.advance(read)


class _DraftVerification:
    """Drafts of the rows of a cache: of one row by the fastest verifier, of several, and of longer drafts, by the model's forward.

    Args:
        states: the cache; it must not be replaced meanwhile.
        most: the most tokens of a draft.
    """

    def __init__(self, model: Any, states: StateCache, most: int):
        self.most = most
        one = states.max_batch_size == 1 and most <= MOST_ROWS
        self._one: Verifier | None = verifier(model, states, most) if one else None
        self._several = PackedVerifier(model, states)

    def __call__(self, tokens: Tensor) -> Tensor:
        """(b, t, v) logits after each of ``tokens`` (b, t) int64; the states are as they were."""
        return self._several(tokens) if self._one is None else self._one(tokens[0].tolist())[None]

    def commit(self, kept: list[int]) -> None:
        """Bring row i to after the first ``kept[i]`` of its tokens."""
        if self._one is None:
            self._several.commit(kept)
        else:
            self._one.commit(kept[0])

    def reload(self) -> None:
        """The states were changed by others than `commit`."""
        (self._several if self._one is None else self._one).reload()
