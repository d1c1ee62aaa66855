"""A valid request for texts, and the JSON that it is read from."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mambakit.decoding.parameters import SAMPLING
from mambakit.quoting import quoted
from mambakit.serving.api.checks import check_texts
from mambakit.serving.api.declarations import Limits, wrong
from mambakit.serving.api.formats import read_form
from mambakit.serving.api.states import Keep
from mambakit.serving.errors import ApiError
from mambakit.serving.messages import TextOptions


@dataclass(frozen=True)
class Asked:
    """A valid request for texts, completions or chat.

    Attributes:
        best_of: texts that are written for each prompt; the ``n`` likeliest are in the answer.
        options: of each text.
        shows_log_probs: whether the answer has log-probabilities.
        state: the id of the state to start from; "" for none.
        keep: how the states of its texts are kept; None: they are not.
        priority: among the texts of its key, the smallest first.
        deadline: in so many seconds it is of no use any more.
    """

    prompts: list[str] | list[list[int]]
    max_tokens: int
    sampling: dict[str, Any]
    stop: tuple[str, ...]
    n: int
    best_of: int
    stream: bool
    include_usage: bool
    options: TextOptions
    shows_log_probs: bool = False
    echo: bool = False
    state: str = ""
    keep: Keep | None = None
    priority: int = 0
    deadline: float = math.inf
    metadata: dict[str, str] | None = None

    def sampling_of(self, copy: int) -> dict[str, Any]:
        """The sampling parameters of text ``copy`` of a prompt: the n texts differ in their seeds."""
        seed = self.sampling["seed"]
        return self.sampling | {"seed": None if seed is None else seed + copy}


def asked(
    values: Mapping[str, Any],
    prompts: list[str] | list[list[int]],
    max_tokens: int,
    limits: Limits,
    *,
    best_of: int | None = None,
    log_probs: int | None = None,
    echo: bool = False,
) -> Asked:
    """The request of valid ``values`` of `mambakit.serving.api.fields.GENERATION`.

    Args:
        log_probs: how many of the likeliest tokens to show at every token; None: no log-probabilities.

    Raises:
        ApiError: fields that contradict each other, or too many texts.
    """
    n, least = values["n"], values["min_tokens"]
    check_texts(len(prompts), n if best_of is None else best_of, limits, "n" if best_of is None else "best_of")
    best_of = n if best_of is None else best_of
    if best_of < n:
        raise wrong("best_of", f"best_of is {best_of}, less than n, {n}; write at least as many texts as you want")
    if best_of > n and values["stream"]:
        raise wrong("best_of", f"best_of is {best_of} and n is {n}: the best are known at the end; leave stream out")
    if values["stream_options"] is not None and not values["stream"]:
        raise wrong("stream_options", "stream_options belong to a stream; add stream: true, or leave them out")
    if least > max_tokens:
        raise wrong(
            "min_tokens", f"min_tokens is {least}, more than the limit of {max_tokens} new tokens; ask for less"
        )
    constraint = read_form(values)
    for name in ("min_tokens", "ignore_eos"):
        if constraint is not None and values[name]:
            raise wrong(name, f"{name} cannot hold where a grammar says where the text ends; leave one of them out")
    sampling = {name: values[name] for name in SAMPLING}
    if values["logit_bias"] is not None:
        sampling["logit_bias"] = values["logit_bias"]
    return Asked(
        prompts=prompts,
        max_tokens=max_tokens,
        sampling=sampling,
        stop=values["stop"],
        n=n,
        best_of=best_of,
        stream=values["stream"],
        include_usage=bool(values["stream_options"] and values["stream_options"]["include_usage"]),
        options=TextOptions(
            min_new_tokens=least,
            ignore_ends=values["ignore_eos"],
            log_probs=0 if log_probs is None and best_of > n else log_probs,  # texts are ranked by theirs
            prompt_log_probs=echo and log_probs is not None,
            constraint=constraint,
            cache_salt=values["cache_salt"] or "",
        ),
        shows_log_probs=log_probs is not None,
        echo=echo,
        state=values["state"] or "",
        keep=values["keep_state"],
        priority=values["priority"],
        deadline=values["deadline"] or math.inf,
        metadata=values["metadata"],
    )


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. NaN and infinities, which Python accepts, are refused later by their fields' checks.

    Raises:
        ApiError: it is no JSON object, or an object in it has a field twice.
    """
    try:
        found = json.loads(body, object_pairs_hook=_object)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({error}); send a JSON object as application/json") from error
    except ValueError as error:  # Python parses integers of up to 4,300 digits
        raise ApiError(
            400, "the body is not JSON (a number has thousands of digits); send numbers that a float64 holds"
        ) from error
    if not isinstance(found, dict):
        raise ApiError(400, f"the body is a JSON {type(found).__name__}; send an object of fields")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise wrong(twice, f"the field {quoted(twice)} is there twice; send it once")
    return found
