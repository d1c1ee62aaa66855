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

from mambakit.decoding.distributions import row_probabilities
from mambakit.decoding.drafting import Draft
from mambakit.decoding.logits import are_numbers
from mambakit.decoding.sampled_text import SampledText
from mambakit.decoding.sampling_params import ACCEPT
from mambakit.decoding.tables import Tables
from mambakit.decoding.transfers import integers, to_device
from mambakit.ops.sampling.api import NO_TOKEN, OFF, sample


def draw(weights: Tensor, uniform: np.ndarray) -> Tensor:
    """Draw a token for each row of ``weights`` (t, v), which need not sum to 1.

    Returns:
        (t,) int64 on the device; `NO_TOKEN` where a row is no distribution.
    """
    return _drawn(weights.log(), uniform, [OFF] * len(weights))


def _drawn(logits: Tensor, uniform: np.ndarray, columns: Sequence[tuple[float, ...]]) -> Tensor:
    numbers = to_device(logits.device, torch.from_numpy(uniform))
    parameters = to_device(logits.device, torch.tensor(columns, dtype=torch.float32, device="cpu"))
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

    @property
    def needs_each(self) -> bool:
        """Whether a token's logits depend on the choice of the tokens before it (penalties, biases, constraints)."""
        return self._tables is not None

    def choose(self, logits: Tensor, draft: Draft) -> list[int]:
        """`choose_together` of this text alone; ``logits`` are (t + 1, v)."""
        return choose_together([self], logits[None], [draft])[0]

    def _one_by_one(self, logits: Tensor, draft: Draft) -> list[int]:
        assert self._tables is not None
        text, chosen = self.text, []
        for i in range(len(draft.tokens) + 1):
            part = slice(i, i + 1)
            q = None if draft.probabilities is None else draft.probabilities[part]
            changed = self._tables.change(logits[part])
            if not text.error:
                token = _chosen([text], changed[None], [Draft(draft.tokens[part], q)], i, last=False)[0][0]
            token = text.accept(NO_TOKEN if text.error else token)
            self._tables.count(torch.tensor([token], dtype=torch.int64, device="cpu").to(logits.device))
            chosen.append(token)
            if draft.tokens[part] != [token]:
                break
        return chosen


@torch.no_grad()
def choose_together(acceptances: Sequence[Acceptance], logits: Tensor, drafts: Sequence[Draft]) -> list[list[int]]:
    """For each text its accepted guesses and one more token.

    One device-to-host sync serves all texts but those that have penalties, biases or constraints, which take one per
    token.

    Args:
        acceptances: of m texts.
        logits: (m, t + 1, v), after each text and after each of its guesses; rows beyond a text's own are ignored.
        drafts: at most t guesses of each text.

    Returns:
        Of each text with g guesses 1 to g + 1 tokens. The last is `NO_TOKEN` where none can be chosen; the text's
        ``error`` then says why.
    """
    together = [i for i, one in enumerate(acceptances) if not one.needs_each]
    found: list[list[int]] = [[] for _ in acceptances]
    if together:
        texts = [acceptances[i].text for i in together]
        part = logits if len(together) == len(logits) else logits[together]
        chosen = _chosen(texts, part, [drafts[i] for i in together], 0, last=True)
        for i, text, tokens in zip(together, texts, chosen, strict=True):
            tokens[-1] = text.accept(tokens[-1])
            found[i] = tokens
    for i, one in enumerate(acceptances):
        if one.needs_each:
            found[i] = one._one_by_one(logits[i], drafts[i])
        one.text.position += len(found[i])
    return found


def _chosen(
    texts: Sequence[SampledText], logits: Tensor, drafts: Sequence[Draft], offset: int, last: bool
) -> list[list[int]]:
    """Each text's accepted guesses and one more token, with one device-to-host sync.

    Args:
        logits: (m, rows, v).
        offset: the number of tokens between each text and its first row of ``logits``.
        last: whether a text with g guesses has g + 1 rows. Otherwise it has one row, to decide about one guess at most.
    """
    device = logits.device
    if all(text.params.greedy for text in texts):
        best = likeliest(logits.flatten(0, 1)).view(logits.shape[:2]).tolist()
        return [_kept(draft.tokens, tokens) for draft, tokens in zip(drafts, best, strict=True)]
    # (text, row) of every guess, then of the tokens that follow the guesses.
    guessed = [(m, i) for m, draft in enumerate(drafts) for i in range(len(draft.tokens))]
    after = [(m, len(draft.tokens)) for m, draft in enumerate(drafts) if last or not draft.tokens]
    greedy = [text.params.greedy for text in texts]
    rows = _rows(logits, guessed + after)
    weights, stays = rows.double(), rows.new_empty(0, dtype=torch.int64)
    columns: list[tuple[float, ...]] = [OFF] * len(guessed)
    columns += [texts[m].params.columns for m, _ in after]
    if guessed:
        p = row_probabilities([texts[m].params for m, _ in guessed], rows[: len(guessed)])
        at = integers(device, [drafts[m].tokens[i] for m, i in guessed])[:, None]
        q = torch.cat([_guessed_from(draft, p) for draft in drafts if draft.tokens])
        numbers = np.concatenate([text.numbers(text.position + offset, len(d.tokens), ACCEPT)
                                  for text, d in zip(texts, drafts, strict=True)])  # fmt: skip
        chance = to_device(device, torch.from_numpy(numbers))[:, None]
        stays = (chance * q.gather(1, at) < p.gather(1, at))[:, 0].long()
        left = (p - q).clamp(min=0)
        left = torch.where(left.sum(-1, keepdim=True) > 0, left, p)
        weights = torch.cat([left.log(), weights[len(guessed) :]])
    uniform = [texts[m].numbers(texts[m].position + offset + i, 1) for m, i in guessed + after]
    drawn = _drawn(weights, np.concatenate(uniform), columns)
    most = likeliest(logits.flatten(0, 1)).flatten() if any(greedy) else stays[:0]
    found = torch.cat([stays, drawn, most]).tolist()  # the only device-to-host sync
    n, total, width = len(guessed), len(guessed) + len(after), logits.shape[1]
    of_row = dict(zip(guessed + after, found[n : n + total], strict=True))
    stay = dict(zip(guessed, found[:n], strict=True))
    result = []
    for m, draft in enumerate(drafts):
        guesses = draft.tokens
        if greedy[m]:
            result.append(_kept(guesses, found[n + total :][m * width : (m + 1) * width]))
            continue
        first = next((i for i in range(len(guesses)) if not stay[m, i]), len(guesses))
        result.append([*guesses[:first], *([of_row[m, first]] if (m, first) in of_row else [])])
    return result


def _kept(guesses: list[int], best: list[int]) -> list[int]:
    """The guesses that are the likeliest tokens, and the token after them where its row is there."""
    right = [guess == token for guess, token in zip(guesses, best, strict=False)]
    first = right.index(False) if False in right else len(guesses)
    return [*guesses[:first], *best[first : first + 1]]


def _rows(logits: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """(len(places), v): these (text, row) of (m, rows, v)."""
    if len(logits) == 1 and [i for _, i in places] == list(range(len(places))):
        return logits[0, : len(places)]
    width = logits.shape[1]
    return logits.flatten(0, 1)[integers(logits.device, [m * width + i for m, i in places])]


def _guessed_from(draft: Draft, like: Tensor) -> Tensor:
    """(t, v) the distributions that the guesses were drawn from; certain ones have all of the probability."""
    if draft.probabilities is not None:
        return draft.probabilities.to(like)
    at = integers(like.device, draft.tokens)[:, None]
    return like.new_zeros(len(draft.tokens), like.shape[1]).scatter_(1, at, 1.0)
