"""Speculative sampling: which guesses of a draft are accepted (arXiv 2211.17192, algorithm 1; arXiv 2302.01318).

Let q be the distribution that a guess d was drawn from, and p the one that `Sampler` would draw the token from. The
guess is accepted with probability min(1, p(d) / q(d)). Otherwise the token is drawn from max(p - q, 0), normalised. The
tokens then have the distribution p, whatever the guesses are. Greedy tokens are those of p alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mambakit.decoding.drafting import Draft
from mambakit.decoding.logits import are_numbers
from mambakit.decoding.sampled_text import SampledText
from mambakit.decoding.sampling_params import ACCEPT, SamplingParams
from mambakit.decoding.tables import Tables
from mambakit.ops.sampling import reference
from mambakit.ops.sampling.api import NO_TOKEN, OFF, sample


def probabilities(params: SamplingParams, logits: Tensor) -> Tensor:
    """The distributions that `mambakit.ops.sampling` draws from.

    Args:
        params: not greedy.
        logits: (t, v).

    Returns:
        (t, v) float64; NaN where a row has no distribution.
    """
    temperature, top_k, top_p, min_p, typical_p, epsilon = params.columns
    logits = logits.double()
    s = (logits - logits.amax(-1, keepdim=True)) / temperature
    if typical_p < 1 or epsilon > 0:
        columns = torch.tensor(params.columns[1:], dtype=torch.float64, device="cpu").to(s.device)
        w = reference.kept(s, *columns.expand(len(s), -1)[:, :, None].unbind(1))
    else:  # the same result without the sorts of filters that are off
        w = s.exp()
        if 0 < top_k < w.shape[1]:
            w = torch.where(w >= w.topk(int(top_k)).values[:, -1:], w, 0.0)
        if top_p < 1:
            descending = w.sort(-1, descending=True).values
            before = descending.cumsum(-1) - descending
            kept = (before < top_p * descending.sum(-1, keepdim=True)).sum(-1, keepdim=True).clamp(min=1)
            w = torch.where(w >= descending.gather(-1, kept - 1), w, 0.0)
        w = torch.where(w >= min_p, w, 0.0) if min_p > 0 else w
    return w / w.sum(-1, keepdim=True)


def draw(weights: Tensor, uniform: np.ndarray) -> Tensor:
    """Draw a token for each row of ``weights`` (t, v), which need not sum to 1.

    Returns:
        (t,) int64 on the device; `NO_TOKEN` where a row is no distribution.
    """
    return _drawn(weights.log(), uniform, [OFF] * len(weights))


def _drawn(logits: Tensor, uniform: np.ndarray, columns: Sequence[tuple[float, ...]]) -> Tensor:
    numbers = torch.from_numpy(uniform).to(logits.device, non_blocking=True)
    parameters = torch.tensor(columns, dtype=torch.float32, device="cpu").to(logits.device, non_blocking=True)
    return sample(logits, numbers, parameters)


def likeliest(logits: Tensor) -> Tensor:
    """(t,) int64, the most probable token of each row of ``logits`` (t, v); `NO_TOKEN` where that logit is NaN."""
    tokens = logits.argmax(-1)
    return tokens.masked_fill(~are_numbers(logits, tokens), NO_TOKEN)


class Acceptance:
    """Chooses the tokens of one text, several at a time where guesses are accepted. A token's random numbers depend on
    its position in the text only.

    Args:
        text: it must not be in a `Sampler` at the same time.
        device: of the logits.
    """

    def __init__(self, text: SampledText, device: torch.device):
        self.text = text
        self._tables = Tables([text], device) if text.changes_logits else None

    @torch.no_grad()
    def choose(self, logits: Tensor, draft: Draft) -> list[int]:
        """The accepted guesses and one more token.

        Args:
            logits: (t + 1, v), after the text and after each of the t guesses.
            draft: the t guesses.

        Returns:
            1 to t + 1 tokens. The last is `NO_TOKEN` where none can be chosen; the text's ``error`` then says why.
        """
        text = self.text
        if self._tables is None:
            chosen = self._choose(logits, draft, 0)
            chosen[-1] = text.accept(chosen[-1])
        else:  # penalties and constraints depend on the tokens before
            chosen = []
            for i in range(len(draft.tokens) + 1):
                part = slice(i, i + 1)
                q = None if draft.probabilities is None else draft.probabilities[part]
                changed = self._tables.change(logits[part])
                if not text.error:
                    token = self._choose(changed, Draft(draft.tokens[part], q), i)[0]
                token = text.accept(NO_TOKEN if text.error else token)
                self._tables.count(torch.tensor([token], dtype=torch.int64, device="cpu").to(logits.device))
                chosen.append(token)
                if draft.tokens[part] != [token]:
                    break
        text.position += len(chosen)
        return chosen

    def _choose(self, logits: Tensor, draft: Draft, offset: int) -> list[int]:
        """`choose` without tables.

        Args:
            logits: (t + 1, v), or (1, v) to decide about one guess only.
            draft: the guesses.
            offset: the number of tokens between the text and the first row of ``logits``.
        """
        guesses, rows = draft.tokens, len(logits)
        if self.text.params.greedy:
            tokens = likeliest(logits).tolist()
            right = [guess == best for guess, best in zip(guesses, tokens, strict=False)]
            first = right.index(False) if False in right else len(guesses)
            return [*guesses[:first], *tokens[first : first + 1]]
        params, n, start = self.text.params, len(guesses), self.text.position + offset
        columns = [OFF] * n + [params.columns] * (rows - n)
        weights, stays = logits, logits.new_empty(0, dtype=torch.int64)
        if n:
            p = probabilities(params, logits[:n])
            at = torch.tensor(guesses, dtype=torch.int64, device="cpu").to(p.device)[:, None]
            q = draft.probabilities  # None: the guess is certain, q = 1
            q = torch.zeros_like(p).scatter_(1, at, 1.0) if q is None else q.to(p)
            chance = torch.from_numpy(self.text.numbers(start, n, ACCEPT)).to(p.device)[:, None]
            stays = (chance * q.gather(1, at) < p.gather(1, at))[:, 0].long()
            left = (p - q).clamp(min=0)
            left = torch.where(left.sum(-1, keepdim=True) > 0, left, p)
            weights = torch.cat([left.log(), logits[n:].double()])
        drawn = _drawn(weights, self.text.numbers(start, rows), columns)
        found = torch.cat([stays, drawn]).tolist()  # the only device-to-host sync
        first = found[:n].index(0) if 0 in found[:n] else n
        return [*guesses[:first], *found[n + first : n + first + 1]]
