"""Where guesses of the next tokens come from: the text itself, or a smaller model. `speculative` verifies them."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mambakit.decoding.cuda_graph import Placement, graphs_serve, placement_of
from mambakit.decoding.graph_step import GraphDecoder
from mambakit.decoding.prefill import prefill_states
from mambakit.decoding.registry import ForwardDecoder, choose, token_step
from mambakit.generation.stream import SamplingParams, drawn
from mambakit.modules import MambaCache
from mambakit.modules.interception import Watch, modules_of
from mambakit.quoting import brief

# Places that prompt lookup compares, from the latest back.
_CANDIDATES = 64

_Scores = Callable[[list[int], Tensor], Tensor]


@dataclass(frozen=True)
class Draft:
    """Guesses of the next tokens."""

    tokens: list[int]
    probabilities: Tensor | None = None
    """(t, v) float32, the distributions they were drawn from; None where they are certain (a rule, or greedy)."""


class Drafter(Protocol):
    """Guesses what comes next. One drafter serves one text at a time."""

    def begin(self, ids: Tensor, sampling: SamplingParams, scores: _Scores | None, generator: torch.Generator) -> None:
        """A new text: its prompt (l,), how its tokens are chosen, and where random numbers come from."""

    def propose(self, text: list[int], most: int) -> Draft:
        """At most ``most`` guesses of what follows ``text``, all tokens so far (the last one is not read by the model yet)."""


class PromptLookup:
    """Guesses that what followed these last tokens before follows them again; costs nothing, and needs no draft model.

    Good where text repeats itself: code, lists, quotations, summaries of the prompt.

    Args:
        longest, shortest: lengths of the run of last tokens that is looked for; longer ones first, the latest place wins.
    """

    def __init__(self, longest: int = 4, shortest: int = 2):
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"shortest is {brief(shortest)} and longest {brief(longest)}; they must be 1 <= shortest <= longest"
            )
        self.longest, self.shortest = longest, shortest

    def begin(self, ids: Tensor, sampling: SamplingParams, scores: _Scores | None, generator: torch.Generator) -> None:
        # Where the latest run of `shortest` tokens like this ends, and for each place where the one before it ends:
        # eight bytes for each token of the text, and an entry for each different run.
        self._latest: dict[tuple[int, ...], int] = {}
        self._earlier = array("q", [-1])

    def propose(self, text: list[int], most: int) -> Draft:
        n = self.shortest
        for end in range(len(self._earlier), len(text)):  # a run at the very end has nothing after it yet
            run = tuple(text[max(0, end - n) : end])
            self._earlier.append(self._latest.get(run, -1))
            self._latest[run] = end
        place, longest = -1, 0
        at = self._latest.get(tuple(text[-n:]), -1)
        for _ in range(_CANDIDATES):
            if at < 0 or longest == self.longest:
                break
            same = n
            while same < min(self.longest, at) and text[at - same - 1] == text[len(text) - same - 1]:
                same += 1
            if same > longest:
                place, longest = at, same
            at = self._earlier[at]
        return Draft(text[place : place + most] if place >= 0 else [])


class DraftModel:
    """Guesses with a smaller model of the same vocabulary, which chooses as the large one is to choose.

    Its own state is rolled back by copies, one for each guess: those of a small model cost less than reading it again. On CUDA its
    step is a graph, and greedy guesses come from one another without a word to the host.

    Args:
        model: a causal language model in eval mode.
    """

    def __init__(self, model: Any):
        self.model = model
        self._graph: Any = None
        self._placement: Placement | None = None

    @torch.no_grad()
    def begin(self, ids: Tensor, sampling: SamplingParams, scores: _Scores | None, generator: torch.Generator) -> None:
        self._scores, self._greedy, self._generator = scores, sampling.temperature == 0, generator
        self._cache: MambaCache = self.model.backbone.new_cache(1)
        ids = ids.to(self.model.device)
        prefill_states(self.model, [ids[:-1]], self._cache)
        if graphs_serve(self.model):
            if self._graph is None or self._placement is not placement_of(self.model):
                self._graph = choose(self.model, 1).make(self.model, self.model.backbone.new_cache(1))
                self._placement = placement_of(self.model)
            self._graph.load(self._cache)
            self._cache, self._watch = self._graph.states, Watch(modules_of(self.model))
        else:
            self._graph, self._step = None, token_step(self.model, self._cache)
        self._read: list[int] = ids[:-1].tolist()
        # snapshots[i]: the state after the first _base + i tokens of _read
        self._base, self._snapshots = len(self._read), [self._cache.clone()]

    @torch.no_grad()
    def propose(self, text: list[int], most: int) -> Draft:
        known = _agreement(self._read, text, self._base)
        if known < len(self._read):
            self._return_to(known)
        self._base, self._snapshots = known, []
        self._keep()
        for token in text[known:-1]:
            self._advance(token)
        if self._graph is not None and self._greedy and self._watch.holds():
            return Draft(self._guesses(self._graph, text[-1], most))
        tokens: list[int] = []
        rows: list[Tensor] = []
        while len(tokens) < most:
            logits = self._advance((text + tokens)[-1])
            scores = logits if self._scores is None else self._scores(text + tokens, logits)
            if self._greedy:
                tokens.append(int(scores.argmax()))
            else:
                rows.append(scores.softmax(-1))
                tokens.append(drawn(rows[-1][0], self._generator))
        return Draft(tokens, torch.cat(rows) if rows else None)

    def _advance(self, token: int) -> Tensor:
        ids = torch.tensor([token], dtype=torch.int64, device=self.model.device)
        if self._graph is None:
            logits = self._step(ids)
        elif not self._watch.holds():  # somebody has put a hook or a forward on a module since
            logits = ForwardDecoder(self.model, self._cache).step(ids)
        else:
            logits = self._graph.step(ids)
        self._read.append(token)
        self._keep()
        return logits

    def _guesses(self, graph: GraphDecoder, token: int, most: int) -> list[int]:
        """The likeliest tokens after ``token``: the graph leaves each where it reads the next."""
        if not most:
            return []
        graph.tokens.fill_(token)
        graph.position.zero_()
        for _ in range(most):
            graph()
            self._keep()
        guesses: list[int] = graph.history[0, :most].tolist()
        self._read += [token, *guesses[:-1]]
        return guesses

    def _keep(self) -> None:
        self._snapshots.append(self._cache.clone())

    def _return_to(self, tokens: int) -> None:
        """The cache as it was after so many tokens; in place, for the step holds on to its memory."""
        self._cache.restore_(self._snapshots[tokens - self._base])
        del self._read[tokens:]


def _agreement(read: list[int], text: list[int], start: int) -> int:
    """How many of ``read`` are the beginning of all but the last of ``text``, known to be so up to ``start``."""
    n = start
    while n < min(len(read), len(text) - 1) and read[n] == text[n]:
        n += 1
    return n
