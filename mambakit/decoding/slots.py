"""Rows of states that decode together: what `generate` and the engine of `mambakit.generation` write their texts with."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.choosing import are_numbers
from mambakit.decoding.graph_step import GraphStep, graph_step, graphs_serve
from mambakit.decoding.step import forward_step, native_serves, native_step, passed_by
from mambakit.decoding.verify import PackedVerifier, Verifier, verifier
from mambakit.modules import StateCache as MambaCache
from mambakit.modules.interception import Watch
from mambakit.ops.linear.api import MOST_ROWS


class SlotPool:
    """A pool of state rows and the model's fastest step over all of them: a CUDA graph, the native library, or the model's forward.

    `generate` makes it over the cache that its prompts were read into. `Engine` begins with no rows, has the pool grow when it has a
    text and no row for it, and puts the next text where one has ended. Which text is in which row is theirs to know.

    Where a row's bits do not depend on how many there are (the native library), the pool is ``elastic``: `grow` doubles it, and
    `shrink` leaves out the rows whose texts have ended. Elsewhere it has ``most`` rows from the first `grow` on, and such rows go on
    in step with the others.

    Args:
        model: a causal language model in eval mode.
        most: how many rows there are at most.
        states: a cache of ``most`` rows to go on from. The native library and the forward write into it; a graph takes its states
            over, and they come back in `close`.
        called: the model is in its own forward: its hooks have been called.

    A step reads the weights without calling the modules; once one has a hook or a replaced forward, it is the model's forward.

    Attributes:
        held: for each row, what its owner keeps with it; None where the row is free. It moves with the rows.
    """

    def __init__(self, model: Any, most: int, states: MambaCache | None = None, called: bool = False):
        self.model, self.most, self._called = model, most, called
        self._watch = Watch(passed_by(model, called))
        alike = model.backbone.new_cache(1) if states is None else states
        self.elastic = most <= MOST_ROWS and native_serves(model, alike, called)
        self._graph: GraphStep | None = None
        self._given, self._steps = states, 0
        # What is kept per row, besides its state; `_resize` alone changes how many rows there are.
        size = 0 if states is None else states.max_batch_size
        self.held: list[Any] = [None] * size
        self._began = [0 if states is None else states.get_seq_length()] * size  # less the steps taken until it came
        self._last: Tensor | None = None  # (size, v), the logits of the last step
        self._verifying: _Verifying | None = None
        self._draft: Tensor | None = None  # (size, t, v), what was verified and is not committed
        if states is None:
            self.states = model.backbone.new_cache(0)
        elif graphs_serve(model, called):
            self._graph = graph_step(model, most)  # kept with the model: the states are in it until `close`
            if (
                self._graph.holder is not None and self._graph.holder() is not None
            ):  # a text within the choice of another's token
                self._graph = GraphStep(model, most)
            self._graph.holder = weakref.ref(self)
            self._graph.load(states)
            self.states = self._graph.cache
        else:
            self._over(states)

    @property
    def size(self) -> int:
        """How many rows there are now."""
        return self.states.max_batch_size

    @property
    def by_forward(self) -> bool:
        """Whether a step of the rows that there are is nothing but a call of the model."""
        return (self._graph is None and not self.elastic) or not self._watch.holds()

    def step(self, tokens: Tensor) -> Tensor:
        """Each row reads its one of ``tokens`` (size,); the logits (size, v) after it, valid until the next step."""
        assert len(tokens) == self.size
        self._steps += 1
        self._changed()
        if self._graph is None:
            self._last = self._step(tokens)  # watches for itself
        elif not self._watch.holds():
            self._last = forward_step(self.model, self.states)(tokens)
        else:
            self._graph.tokens.copy_(tokens)
            self._last = self._graph()
        return self._last

    def likeliest(self, tokens: Tensor, count: int) -> Tensor:
        """(size, count) the most probable tokens after ``tokens`` (size,); all but the last are read. A graph chooses them itself, at
        most its ``capacity``, and the host does not wait."""
        if self._graph is None or not self._watch.holds():
            found = []
            for _ in range(count):
                tokens = self.step(tokens).argmax(-1)
                found.append(tokens)
            return torch.stack(found, 1)
        assert count <= self._graph.capacity
        self._changed()
        self._graph.tokens.copy_(tokens)
        self._graph.position.zero_()
        for _ in range(count):
            self._last = self._graph()
        self._steps += count
        return self._graph.history[:, :count].clone()

    def verify(self, tokens: Tensor, most: int = 0) -> Tensor:
        """Read a draft of each slot without changing its state: the logits (size, t, v) after each of ``tokens`` (size, t) int64.

        `commit` then keeps a beginning of each draft. What fills a shorter draft up comes after it. One slot is verified as fast as
        there is a way (`mambakit.decoding.verify.verifier`), with the bits of `step` where that is a native call or the persistent
        kernel; several by a forward over a copy of their states.

        Args:
            most: the most tokens of this and later drafts, for what is captured or compiled once.
        """
        size, t = tokens.shape
        assert size == self.size
        if self._verifying is None or t > self._verifying.most or not self._watch.holds():
            self._verifying = _Verifying(self.model, self.states, max(t, most), self._watch.holds())
        self._draft = self._verifying(tokens)
        return self._draft

    def commit(self, kept: Sequence[int]) -> None:
        """Bring slot i to after the first ``kept[i]`` tokens of the draft that was verified last.

        Raises:
            ValueError: more than there were, or no draft since the last `commit` or `step`.
        """
        if self._verifying is None or self._draft is None:
            raise ValueError("no draft was verified since the last commit or step; call verify first")
        assert len(kept) == self.size
        self._verifying.commit(list(kept))
        read = torch.tensor(kept, dtype=torch.int64, device="cpu").to(self._draft.device)
        after = self._draft[torch.arange(self.size, dtype=torch.int64, device=read.device), (read - 1).clamp(min=0)]
        self._last = after if self._last is None else torch.where((read > 0)[:, None], after, self._last)
        self._began = [began + m for began, m in zip(self._began, kept, strict=True)]
        self._draft = None

    def _changed(self) -> None:
        """The states were written by something else than a commit."""
        self._draft = None
        if self._verifying is not None:
            self._verifying.reload()

    def are_numbers(self, tokens: Tensor) -> Tensor:
        """(size,) bool: `choosing.are_numbers` of the last step. A row with NaN in its state has no other logits ever after."""
        return torch.ones_like(tokens, dtype=torch.bool) if self._last is None else are_numbers(self._last, tokens)

    def grow(self) -> int:
        """Add rows, which are free and empty until `put`; returns how many."""
        before = self.size
        size = min(self.most, max(1, 2 * before)) if self.elastic else self.most
        kept = list(range(before))
        if graphs_serve(self.model):
            assert before == 0
            self._graph = GraphStep(self.model, size)  # of its own: its rows stay, whatever else the model writes
            self._resize(self._graph.cache, [None] * size)
        else:
            states = self.model.backbone.new_cache(size)
            self._resize(states.copy_(self.states, kept, kept) if kept else states, [*kept, *[None] * (size - before)])
        return size - before

    def shrink(self, kept: list[int]) -> bool:
        """Go on with the rows ``kept`` alone, from now on rows 0, 1, ..., in new memory; given states are then left behind. False, and
        nothing is done, where that could change bits or more than half of the rows are kept."""
        if not self.elastic or 2 * len(kept) > self.size:
            return False
        self._resize(self.states.select(kept), list(kept))
        return True

    def _resize(self, states: MambaCache, origins: Sequence[int | None]) -> None:
        """Row i is from now on what row ``origins[i]`` was, or a new one: everything that is kept per row follows."""
        self.held = [None if row is None else self.held[row] for row in origins]
        self._began = [0 if row is None else self._began[row] for row in origins]
        if self._last is not None:
            last = self._last
            self._last = last.new_zeros(len(origins), last.shape[1])  # numbers, where a row has made no step yet
            for row, origin in enumerate(origins):
                if origin is not None:
                    self._last[row] = last[origin]
        self.states, self._verifying, self._draft = states, None, None
        if self._graph is None:
            self._over(states)

    def put(self, row: int, state: MambaCache) -> None:
        """``row`` goes on from this state of one row, which is copied.

        Raises:
            ValueError: a state of another model, or of several rows.
        """
        if state.max_batch_size != 1:
            raise ValueError(f"the state has {state.max_batch_size} rows; a row goes on from one: select it")
        self.states.copy_(state, [0], [row])
        self._changed()
        self._began[row] = state.get_seq_length() - self._steps

    def copy_of(self, row: int) -> MambaCache:
        """What has become of the state that was put into ``row``."""
        state = self.states.select([row])
        state.advance(self._began[row] + self._steps - state.get_seq_length())
        return state

    def snapshot(self) -> tuple[MambaCache, int, list[int]]:
        """What `go_back` needs to return to this moment."""
        return self.states.clone(), self._steps, list(self._began)

    def go_back(self, snapshot: tuple[MambaCache, int, list[int]]) -> None:
        """Every row as it was then; in place, for a step holds on to its memory."""
        states, self._steps, began = snapshot
        self._began = list(began)
        self.states.load_(states)
        self._changed()

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

    def _over(self, states: MambaCache) -> None:
        self.states = states
        if states.max_batch_size:  # nothing is stepped before the next `grow` otherwise
            native = self.elastic
            self._step = native_step(self.model, states, self._called) if native else forward_step(self.model, states)


class _Verifying:
    """`SlotPool.verify` over these states: one slot by the fastest verifier, several, or longer drafts, by the model's forward."""

    def __init__(self, model: Any, states: MambaCache, most: int, untouched: bool):
        self.most = most
        self._one: Verifier | None = None
        if states.max_batch_size == 1 and most <= MOST_ROWS and untouched:
            self._one = verifier(model, states, most)
        self._several = PackedVerifier(model, states)

    def __call__(self, tokens: Tensor) -> Tensor:
        if self._one is None:
            return self._several(tokens)
        return self._one(tokens[0].tolist())[None]

    def commit(self, kept: list[int]) -> None:
        if self._one is None:
            self._several.commit(kept)
        else:
            self._one.commit(kept[0])

    def reload(self) -> None:
        (self._several if self._one is None else self._one).reload()
