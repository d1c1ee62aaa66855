"""`POST /v1/completions`: its fields, and a body to a valid request with its prompts as token ids."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mambakit.decoding.parameters import SAMPLING
from mambakit.serving.api.asked import Asked, parse_body
from mambakit.serving.api.checks import check_texts, check_tokens, prompts_schema, read_prompts
from mambakit.serving.api.declarations import Field, Fields, Limits, read, wrong
from mambakit.serving.api.fields import GENERATION
from mambakit.serving.api.prompts import Codec, Prepared, check_echo, depth_is_bounded
from mambakit.serving.api.values import flag, unserved

COMPLETIONS: Fields = {
    **GENERATION,
    "echo": flag("Whether the answer begins with the prompt."),
    "prompt": Field(
        read_prompts, prompts_schema, "give a string, a list of strings, or token ids", required=True,
    ),
    "logprobs": unserved(
        {"type": "null"}, (),
        "leave it out; `mambakit score` and `mambakit generate --logprobs` give log-probabilities",
    ),
    "logit_bias": unserved({"type": "object", "maxProperties": 0}, ({},), "leave it out"),
    "best_of": unserved({"const": 1}, (1,), "leave it out; n gives several texts to choose from"),
    "suffix": unserved({"type": "null"}, (), "leave it out; the model only continues text"),
}  # fmt: skip


def parse(body: Mapping[str, Any], limits: Limits) -> Asked:
    """Check a request.

    Raises:
        ApiError: a field is unknown, not served or wrong, or the request is for another model.
    """
    values = read(COMPLETIONS, body, limits)
    prompts, n, options = values["prompt"], values["n"], values["stream_options"]
    check_texts(len(prompts), n, limits)
    if options is not None and not values["stream"]:
        raise wrong("stream_options", "stream_options belong to a stream; add stream: true, or leave them out")
    return Asked(
        prompts=prompts,
        max_tokens=values["max_tokens"],
        sampling={name: values[name] for name in SAMPLING},
        stop=values["stop"],
        n=n,
        stream=values["stream"],
        include_usage=bool(options and options["include_usage"]),
        echo=values["echo"],
    )


def prepare(body: bytes, codec: Codec, limits: Limits) -> Prepared:
    """Parse and tokenise a body. Raises an `ApiError` for an invalid request."""
    with depth_is_bounded():
        asked = parse(parse_body(body), limits)
    prompts, texts = [], []
    for prompt in asked.prompts:
        ids = codec.encode(prompt, limits) if isinstance(prompt, str) else prompt
        check_tokens(ids, limits)
        prompts.append(array("q", ids).tobytes())
        texts.append(prompt if asked.echo and isinstance(prompt, str) else None)
    if asked.echo:
        check_echo(asked.n * sum(len(text or "") for text in texts))
        check_echo(asked.n * sum(len(ids) // 8 for ids in prompts))  # the text of ids is not known yet
    return Prepared(replace(asked, prompts=[]), prompts, texts)
