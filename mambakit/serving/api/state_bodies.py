"""Bodies of `/v1/states` to valid requests."""

from __future__ import annotations

from mambakit.serving.api.asked import parse_body
from mambakit.serving.api.declarations import Fields, Limits, read, wrong
from mambakit.serving.api.fields import MODEL
from mambakit.serving.api.prompts import Codec, depth_is_bounded
from mambakit.serving.api.states import BRANCH, FORK, Created, create_fields, created

CREATE: Fields = create_fields(MODEL)


def prepare_create(body: bytes, codec: Codec, limits: Limits) -> Created:
    """Of `POST /v1/states`."""
    with depth_is_bounded():
        values = read(CREATE, parse_body(body), limits)
    prompt = values["prompt"]
    if not prompt and not values["state"]:
        raise wrong("prompt", "there is nothing to read; give a prompt, or a state to go on from, or both")
    ids = prompt if isinstance(prompt, list) else codec.encode(prompt, limits) if prompt else []
    return created(values, ids, limits)


def prepare_fork(body: bytes, codec: Codec, limits: Limits) -> Created:
    """Of `POST /v1/states/{id}/fork`."""
    with depth_is_bounded():
        return created(read(FORK, parse_body(body), limits), [], limits)


def prepare_branch(body: bytes, codec: Codec, limits: Limits) -> Created:
    """Of `POST /v1/states/{id}/branch`."""
    with depth_is_bounded():
        return created(read(BRANCH, parse_body(body), limits), [], limits)
