"""A pool of state slots that decode together. Every text is written through one."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.eligibility import skipped_modules
from mambakit.decoding.logits import are_numbers
from mambakit.decoding.registry import Decoder, ForwardDecoder, choose, choose_verifier, kept_decoder, verifier
from mambakit.decoding.verify import DeviceVerifier, Verifier
from mambakit.modules import StateCache
from mambakit.modules.interception import Watch
from mambakit.ops.sampling.api import NO_TOKEN


class SlotPool:
    """A pool of slots, one recurrent state each, and the decoder that steps all of them (`mambakit.decoding.registry`).

    `generate` makes a pool over the cache that its prompts were read into. `Engine` starts with an empty pool, grows it
    when a text finds no free slot, and reuses a slot once its text has ended. The pool's owner decides which text is in
    which slot.

    With the native library a slot's bits do not depend on the number of slots. Such a pool is ``elastic``: `grow`
    doubles it, and `shrink` drops the slots whose texts have ended. Any other pool has ``most`` slots from the first
    `grow` on, and free slots are stepped with the others.

    A step reads the weights without calling the modules. Once a module has a hook or a replaced forward, each step is
    the model's forward instead.

    Args:
        model: a causal language model in eval mode.
        most: the maximum number of slots.
        states: a cache of ``most`` rows to start from. A captured decoder copies it, and `close` copies the result
            back; other decoders update it in place.
        called: whether the pool is used inside the model's own forward, whose hooks have run already.

    Attributes:
        states: the cache of all slots.
        elastic: whether the number of slots may change without changing bits (see above).
        occupants: the text in each slot, set by the pool's owner; None where a slot is free. `grow` and `shrink` move
            the entries along with the slots.
    """

    def __init__(self, model: Any, most: int, states: StateCache | None = None, called: bool = False):
        self.model, self.most = model, most
        self._watch = Watch(skipped_modules(model, called))
        self._given, self._steps = states, 0
        # Data per slot besides its state. Only `_resize` changes the number of slots.
        size = 0 if states is None else states.max_batch_size
        self.occupants: list[Any] = [None] * size
        # Per slot: the number of tokens seen when it was filled, minus the pool's steps until then.
        self._began = [0 if states is None else states.get_seq_length()] * size
        self._last: Tensor | None = None  # (size, v) logits of the last step; None after a commit
        self._verifier: Verifier | None = None  # the last one that was used
        self._most = 0  # tokens of a draft that it serves
        self._verifiers: dict[int, Verifier] = {}  # those that are captured, by that number
        self._on_device: bool | None = None
        # Slots whose states are ahead of `seen` by a number of tokens that is not on the host yet.
        self.ahead: set[int] = set()
        self._draft: Tensor | None = None  # (size, t, v) logits of drafts that are not committed yet
        self._decoder: Decoder | None = None  # None while there are no slots
        # The captured decoder that is kept with the model, if it serves: it holds the given states until `close`.
        self._graph: Any = None
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
        if self._graph.holder is not None and self._graph.holder() is not None:  # another pool uses it
            self._graph = choose(model, most, called=called).make(model, model.backbone.new_cache(most))
        self._graph.holder = weakref.ref(self)
        self._graph.load(states)
        self._decoder, self.states = self._graph, self._graph.states

    @property
    def size(self) -> int:
        """The current number of slots."""
        return self.states.max_batch_size

    @property
    def captured(self) -> bool:
        """Whether a step of the current slots is launched without the host waiting for it."""
        return self.graph is not None

    @property
    def graph(self) -> Any:
        """The captured decoder (`graph_step.GraphDecoder`) of the current slots; None where another one serves."""
        captured = self._graph is not None or (self._decoder is not None and self._kind.captured)
        return self._decoder if captured and self._watch.holds() else None

    @property
    def by_forward(self) -> bool:
        """Whether a step of the current slots is a plain call of the model."""
        return (isinstance(self._decoder, ForwardDecoder | None) and not self.elastic) or not self._watch.holds()

    # -- tokens ----------------------------------------------------------------------------------------------------

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token per slot, ``tokens`` (size,). Returns the logits (size, v), valid until the next step."""
        assert len(tokens) == self.size
        self._steps += 1
        self.changed()
        self._last = self._decoder_now().step(tokens)
        return self._last

    def likeliest(self, tokens: Tensor, count: int, check: bool = False) -> Tensor:
        """Greedy decoding: (size, count) int64, each token the most probable one after the token before it.

        Slots start with ``tokens`` (size,), and read all of the result but the last column. A decoder with a
        ``capacity`` chooses the tokens on the device, without a device-to-host sync. With ``check``, `NO_TOKEN` stands
        where a slot's logits were NaN.
        """
        decoder: Any = self._decoder_now()
        if not decoder.capacity:
            found = []
            for _ in range(count):
                tokens = self.step(tokens).argmax(-1)
                found.append(tokens.masked_fill(~self.are_numbers(tokens), NO_TOKEN) if check else tokens)
            return torch.stack(found, 1)
        self._steps += count
        self.changed()
        chosen: Tensor = decoder.likeliest(tokens, count, check)
        self._last = decoder.logits
        return chosen

    def are_numbers(self, tokens: Tensor) -> Tensor:
        """(size,) bool: `logits.are_numbers` of the last step. A NaN stays in a slot's state, and in all its logits."""
        return torch.ones_like(tokens, dtype=torch.bool) if self._last is None else are_numbers(self._last, tokens)

    def _decoder_now(self) -> Decoder:
        """The pool's decoder, or the model's forward as soon as a module has a hook or a replaced forward."""
        assert self._decoder is not None, "nothing is stepped before the first grow"
        return self._decoder if self._watch.holds() else ForwardDecoder(self.model, self.states)

    # -- drafts ----------------------------------------------------------------------------------------------------

    def verify(self, tokens: Tensor, most: int = 0) -> Tensor:
        """Read a draft for each slot without changing its state.

        `commit` then keeps a prefix of each draft. Shorter drafts are padded at the end. The fastest verifier that
        serves is used (`mambakit.decoding.registry.verifier`); a native call and the persistent kernel give the bits
        of `step`.

        Args:
            tokens: (size, t) int64, the drafts.
            most: the maximum number of tokens of this and later drafts, so that what is captured or compiled is made
                once.

        Returns:
            (size, t, v) logits after each token, valid until the next `verify`.
        """
        size, t = tokens.shape
        assert size == self.size
        most = max(t, most)
        another = most != self._most if self.captured else t > self._most  # a graph's work does not shrink with t
        if self._verifier is None or another or not self._watch.holds():
            self._use(most)
        assert self._verifier is not None
        self._draft = self._verifier(tokens)
        return self._draft

    def verifies_on_device(self, tokens: int) -> bool:
        """Whether `device_verifier` serves drafts of up to ``tokens`` tokens while there is a `graph`; asked once."""
        if self._on_device is None:
            self._on_device = self.captured and choose_verifier(self.model, self.states, tokens).on_device
        return self._on_device

    def device_verifier(self, tokens: int) -> DeviceVerifier:
        """The verifier of drafts of ``tokens`` tokens, for a CUDA graph to hold. `verify` and `commit` then use it."""
        self.prepare_verifier(tokens)
        one: Any = self._verifier
        return one

    def prepare_verifier(self, tokens: int) -> None:
        """Make the verifier of drafts of ``tokens`` tokens, which is kept."""
        if self._most != tokens or self._verifier is None:
            self._use(tokens)

    def read_on(self, slot: int, tokens: int) -> None:
        """Count ``tokens`` more that the state of ``slot`` has read, by a `DeviceVerifier`."""
        self._began[slot] += tokens

    def commit(self, kept: Sequence[int]) -> None:
        """Advance the state of slot i by the first ``kept[i]`` tokens of its last verified draft.

        Raises:
            ValueError: more tokens than the draft had, or no `verify` since the last `commit` or `step`.
        """
        if self._verifier is None or self._draft is None:
            raise ValueError("no draft was verified since the last commit or step; call verify first")
        assert len(kept) == self.size
        self._verifier.commit(list(kept))
        self._began = [began + m for began, m in zip(self._began, kept, strict=True)]
        self._draft = self._last = None

    def _use(self, tokens: int) -> None:
        """Let ``_verifier`` be one of drafts of ``tokens`` tokens, which reads the states as they are."""
        self._most = tokens
        kept: dict[int, Verifier] = self._verifiers if self._graph is None else self._graph.verifiers
        if not self._watch.holds() or not self.captured:
            self._verifier = verifier(self.model, self.states, tokens)
        elif tokens in kept:
            self._verifier = kept[tokens]
            self._verifier.reload()
        else:
            self._verifier = made = verifier(self.model, self.states, tokens)
            if not made.holds_model or self._graph is None:
                kept[tokens] = made

    # -- slots -----------------------------------------------------------------------------------------------------

    def grow(self) -> int:
        """Add slots, free and with zero states. Returns the number of new slots."""
        before = self.size
        size = min(self.most, max(1, 2 * before)) if self.elastic else self.most
        kept = list(range(before))
        assert not (before and self._kind.captured), "a captured decoder has all its slots from the first"
        states = self.model.backbone.new_cache(size)
        self._resize(states.copy_(self.states, kept, kept) if kept else states, [*kept, *[None] * (size - before)])
        return size - before

    def shrink(self, kept: list[int]) -> bool:
        """Keep only the slots ``kept``, renumbered 0, 1, ..., in new memory; the cache given to the constructor is no
        longer updated.

        Returns:
            False, and nothing is changed, where that could change bits or where more than half of the slots are kept.
        """
        if not self.elastic or 2 * len(kept) > self.size:
            return False
        self._resize(self.states.select(kept), list(kept))
        return True

    def _resize(self, states: StateCache, origins: Sequence[int | None]) -> None:
        """Slot i becomes the former slot ``origins[i]``, or a new one where that is None, with all its data."""
        self.occupants = [None if slot is None else self.occupants[slot] for slot in origins]
        self._began = [0 if slot is None else self._began[slot] for slot in origins]
        if self._last is not None:
            last = self._last
            self._last = last.new_zeros(len(origins), last.shape[1])  # a slot that was never stepped has no NaN
            for slot, origin in enumerate(origins):
                if origin is not None:
                    self._last[slot] = last[origin]
        self.states, self._verifier, self._draft = states, None, None
        self._verifiers.clear()
        self._make()

    def _make(self) -> None:
        """Make the decoder over the current states: the pool's own, not the one kept with the model, as slots outlive a
        call."""
        self._decoder = self._kind.make(self.model, self.states) if self.size else None

    def put(self, slot: int, state: StateCache) -> None:
        """Copy a state of one row into ``slot``.

        Raises:
            ValueError: a state of another model, or of several rows.
        """
        if state.max_batch_size != 1:
            raise ValueError(f"the state has {state.max_batch_size} rows; a slot goes on from one: select it")
        self.states.copy_(state, [0], [slot])
        self.changed()
        self.ahead.discard(slot)
        self._began[slot] = state.get_seq_length() - self._steps

    def load_slots(self, source: StateCache, slots: list[int]) -> None:
        """Slot ``slots[i]`` continues from row i of ``source``. The numbers of tokens seen stay as they are."""
        self.states.copy_(source, list(range(len(slots))), slots)
        self.changed()

    def changed(self) -> None:
        """Forget drafts: the states were changed by something other than a commit."""
        self._draft = None
        if self._verifier is not None:
            self._verifier.reload()

    def seen(self, slot: int) -> int:
        """The number of tokens that the state of ``slot`` has read."""
        return self._began[slot] + self._steps

    def copy_of(self, slot: int) -> StateCache:
        """A copy of the current state of ``slot``."""
        state = self.states.select([slot])
        state.advance(self.seen(slot) - state.get_seq_length())
        return state

    # -- all of them -----------------------------------------------------------------------------------------------

    def snapshot(self) -> tuple[StateCache, int, list[int]]:
        """A copy of all states, for `go_back`."""
        return self.states.clone(), self._steps, list(self._began)

    def go_back(self, snapshot: tuple[StateCache, int, list[int]]) -> None:
        """Restore a snapshot, in place, because a decoder may hold on to the states' memory."""
        states, self._steps, began = snapshot
        self._began = list(began)
        self.states.load_(states)
        self.changed()

    def close(self) -> None:
        """Update the cache given to the constructor. The pool must not be stepped afterwards."""
        if self._given is None:
            return
        read = max(self._began, default=0) + self._steps - self._given.get_seq_length()
        if self._graph is not None:
            if read:
                self._graph.store(self._given, read)
            self._graph.holder = None
        elif read and self.states is self._given:  # after commits of different lengths
            self._given.advance(read)
