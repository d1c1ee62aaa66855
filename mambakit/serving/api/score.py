"""`POST /v1/score`: log-likelihoods of continuations of one text, which is read once."""

from __future__ import annotations

import math
import time
import uuid
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mambakit.quoting import quoted
from mambakit.serving.api.answers import Usage
from mambakit.serving.api.asked import parse_body
from mambakit.serving.api.checks import check_length, check_texts, check_tokens, ids_schema, read_ids
from mambakit.serving.api.declarations import Field, Fields, Limits, read, wrong
from mambakit.serving.api.fields import MODEL
from mambakit.serving.api.log_probs import LEAST
from mambakit.serving.api.prompts import Codec, depth_is_bounded
from mambakit.serving.api.states import QUEUE, TEXT_STATES, Keep
from mambakit.serving.api.values import flag, require_unicode, text
from mambakit.serving.messages import Continuation

MOST_CONTINUATIONS = 1024


def _text_or_ids(name: str, value: Any, limits: Limits) -> str | list[int]:
    if isinstance(value, str):
        require_unicode(name, value)
        return value
    if not isinstance(value, list):
        raise TypeError(f"{name} is {quoted(value)}; it must be a string or a list of token ids")
    return read_ids(value, limits)


def _continuations(name: str, value: Any, limits: Limits) -> list[str | list[int]]:
    if not isinstance(value, list) or not value:
        raise TypeError(f"{name} is {quoted(value)}; it must be a list of strings or of lists of token ids, not empty")
    if len(value) > MOST_CONTINUATIONS:
        raise ValueError(f"{name} has {len(value):,} entries; at most {MOST_CONTINUATIONS:,} are served")
    return [_text_or_ids(f"{name}[{index}]", one, limits) for index, one in enumerate(value)]


def _schema(limits: Limits) -> dict[str, Any]:
    return {"anyOf": [{"type": "string"}, ids_schema(limits)]}


def _continuation_schema(limits: Limits) -> dict[str, Any]:
    return {"anyOf": [{"type": "string", "minLength": 1}, ids_schema(limits)]}


SCORE: Fields = {
    "model": MODEL,
    "prompt": Field(_text_or_ids, _schema, "give a string or token ids: what comes first", required=True),
    "continuations": Field(
        _continuations,
        lambda limits: {
            "type": "array",
            "items": _continuation_schema(limits),
            "minItems": 1,
            "maxItems": MOST_CONTINUATIONS,
        },
        "give strings or lists of token ids: what may come next",
        required=True,
    ),
    "log_probs": flag("Whether the log-probability of each token comes, too."),
    **TEXT_STATES,
    **QUEUE,
    "user": text("Of no effect."),
}


@dataclass(frozen=True)
class Prefix:
    """A text and those of the continuations that follow exactly its tokens.

    Attributes:
        ids: int64, as bytes.
        continuations: int64 each.
        places: of each in the request.
    """

    ids: bytes
    continuations: tuple[bytes, ...]
    places: tuple[int, ...]


@dataclass(frozen=True)
class PreparedScores:
    """A valid request for scores.

    Attributes:
        prefixes: usually one. A tokenizer may split the prompt's end differently before some continuations.
        log_probs: whether each token's is shown.
        state: the id of the state that the prompt follows; "" for none.
        keep: how the state after prompt and continuation is kept; None: it is not.
        priority, deadline, cache_salt: as of a request for texts.
    """

    prefixes: tuple[Prefix, ...]
    log_probs: bool
    state: str = ""
    keep: Keep | None = None
    priority: int = 0
    deadline: float = math.inf
    cache_salt: str = ""


def prepare(body: bytes, codec: Codec, limits: Limits) -> PreparedScores:
    """Parse and tokenise a body. Raises an `ApiError` for an invalid request.

    A prompt and a continuation that are both text are tokenised together, and the continuation's tokens are those after
    the prompt's own. Where a tokenizer would merge the two, white space at the prompt's end counts as the
    continuation's.
    """
    with depth_is_bounded():
        values = read(SCORE, parse_body(body), limits)
    prompt, total = values["prompt"], 0
    state, keep = values["state"] or "", values["keep_state"]
    if keep is not None and len(values["continuations"]) > 1:
        message = f"there are {len(values['continuations'])} continuations, and a state goes on from one; give one"
        raise wrong("keep_state", message)
    own = prompt if isinstance(prompt, list) else codec.encode(prompt, limits) if prompt or not state else []
    bare = prompt.rstrip() if isinstance(prompt, str) else ""
    split = len(codec.encode(bare, limits)) if bare else 0
    found: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    for place, one in enumerate(values["continuations"]):
        param = f"continuations[{place}]"
        if isinstance(one, list):
            before, after = own, one
        elif not one:
            raise wrong(param, f"{param} is empty; give at least one token")
        elif not isinstance(prompt, str) or not prompt:
            before, after = own, codec.encode(one, limits, param)
        else:
            whole = codec.encode(prompt + one, limits, param)
            before, after = (whole[:split] or own), whole[split:]
            if not after:
                raise wrong(param, f"{param} is {quoted(one)}, which adds no token to the prompt; give a longer one")
        check_tokens(before, limits)
        check_tokens(after, limits, param)
        total += len(after)
        found.setdefault(tuple(before), []).append((place, after))
    check_length(total, limits, "continuations")
    check_texts(1, len(found), limits, "continuations")
    return PreparedScores(
        tuple(
            Prefix(
                array("q", before).tobytes(),
                tuple(array("q", ids).tobytes() for _, ids in members),
                tuple(place for place, _ in members),
            )
            for before, members in found.items()
        ),
        values["log_probs"],
        state,
        keep,
        values["priority"],
        values["deadline"] or math.inf,
        values["cache_salt"] or "",
    )


def answer(
    model: str, scores: Iterable[Continuation], usage: Usage, shown: bool, state: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The response, of the continuations in their order. No number is infinite."""
    data = []
    for index, score in enumerate(scores):
        values = [max(LEAST, p) for p in array("f", score.log_probs)]
        one = {"index": index, "log_prob": math.fsum(values), "tokens": len(values), "greedy": score.greedy}
        data.append(one | ({"log_probs": values} if shown else {}) | ({} if state is None else {"state": state}))
    return {
        "id": f"score-{uuid.uuid4().hex}", "object": "score", "created": int(time.time()), "model": model, "data": data,
        "usage": usage.body,
    }  # fmt: skip
