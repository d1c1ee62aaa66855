"""The operations of `/v1/states`."""

from __future__ import annotations

from mambakit.serving.api.declarations import Operation, Parameter
from mambakit.serving.api.shapes import BOOLEAN, INTEGER, STATE, STRING, array, constant, record
from mambakit.serving.api.state_bodies import CREATE as CREATE_FIELDS
from mambakit.serving.api.states import BRANCH as BRANCH_FIELDS
from mambakit.serving.api.states import FORK as FORK_FIELDS

_ID = Parameter("state", "Its id.", STRING)
_READ = (404, 408, 409, 410, 413, 415, 429, 503, 504, 507)
_EXPIRES = Parameter("expires_after", "Seconds.", {"type": "number", "minimum": 1}, "query")

LIST = Operation(
    "GET",
    "/v1/states",
    "Your states, the newest first.",
    result=record({"object": constant("list"), "data": array(STATE), "has_more": BOOLEAN}),
    parameters=(
        Parameter("limit", "How many.", {"type": "integer", "minimum": 1, "maximum": 1000}, "query"),
        Parameter("after", "The id of the last one of the page before.", STRING, "query"),
    ),
    statuses=(404,),
)
CREATE = Operation(
    "POST", "/v1/states", "Read a prompt, and keep the state after it.", result=STATE, fields=CREATE_FIELDS,
    either=("prompt", "state"),
    statuses=_READ,
)  # fmt: skip
IMPORT = Operation(
    "POST",
    "/v1/states/import",
    "Keep a state's file (safetensors), sent as it is, as application/octet-stream.",
    result=STATE,
    parameters=(_EXPIRES,),
    statuses=(409, 413, 415, 503, 507),
)
SHOW = Operation(
    "GET", "/v1/states/{state}", "What is known of a state.", result=STATE, parameters=(_ID,), statuses=(404,)
)
DELETE = Operation(
    "DELETE",
    "/v1/states/{state}",
    "Delete a state; its forks live on.",
    result=record({"id": STRING, "object": constant("state"), "deleted": BOOLEAN}),
    parameters=(_ID,),
    statuses=(404,),
)
TEXT = Operation(
    "GET",
    "/v1/states/{state}/text",
    "The text that a state stands after.",
    result=record({"id": STRING, "tokens": array(INTEGER), "text": STRING}),
    parameters=(_ID,),
    statuses=(404, 409, 410, 503),
)
EXPORT = Operation(
    "GET",
    "/v1/states/{state}/export",
    "The state's file (safetensors), which `mambakit generate --load-state` reads, too.",
    parameters=(_ID,),
    media=("application/octet-stream",),
    statuses=(404, 410),
)
FORK = Operation(
    "POST", "/v1/states/{state}/fork", "Another state at the same place, which lives on its own.", result=STATE,
    fields=FORK_FIELDS, parameters=(_ID,), statuses=(404, 408, 410, 413, 415, 503, 507),
)  # fmt: skip
BRANCH = Operation(
    "POST", "/v1/states/{state}/branch", "A state at an earlier token of the text, read from the nearest one.",
    result=STATE, fields=BRANCH_FIELDS, parameters=(_ID,), statuses=_READ,
)  # fmt: skip
