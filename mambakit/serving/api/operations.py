"""The operations of the API: which method of which path takes which fields, and what it answers."""

from __future__ import annotations

from dataclasses import replace

from mambakit.serving.api.chat import CHAT
from mambakit.serving.api.completions import COMPLETIONS
from mambakit.serving.api.declarations import Operation, Parameter
from mambakit.serving.api.log_probs import CHAT_LOG_PROBS, COMPLETION_LOG_PROBS
from mambakit.serving.api.score import SCORE
from mambakit.serving.api.shapes import (
    ANY_OBJECT,
    BOOLEAN,
    INTEGER,
    KEPT_STATE,
    NUMBER,
    STRING,
    USAGE,
    array,
    constant,
    nullable,
    record,
)
from mambakit.serving.api.tokens import DETOKENIZE, TOKENIZE

_STREAMED = ("application/json", "text/event-stream")
# 429 and 503: queues that are full, no replica that is ready. 504: --request-seconds.
_QUEUED = (404, 408, 409, 410, 413, 415, 429, 503, 504, 507)

COMPLETE = Operation(
    "POST",
    "/v1/completions",
    "Continue prompts.",
    fields=COMPLETIONS,
    result=record(
        {
            "id": STRING,
            "object": constant("text_completion"),
            "created": INTEGER,
            "model": STRING,
            "choices": array(
                record(
                    {
                        "index": INTEGER,
                        "text": STRING,
                        "logprobs": COMPLETION_LOG_PROBS,
                        "finish_reason": {"type": "string", "enum": ["stop", "length"]},
                        "state": KEPT_STATE,
                    },
                    optional=("state",),
                )
            ),
            "usage": USAGE,
            "metadata": ANY_OBJECT,
        },
        optional=("metadata",),
    ),
    media=_STREAMED,
    statuses=_QUEUED,
)

_CALL = record({"id": STRING, "type": constant("function"), "function": record({"name": STRING, "arguments": STRING})})
CHAT_COMPLETE = Operation(
    "POST",
    "/v1/chat/completions",
    "Reply to a chat.",
    fields=CHAT,
    result=record(
        {
            "id": STRING,
            "object": constant("chat.completion"),
            "created": INTEGER,
            "model": STRING,
            "choices": array(
                record(
                    {
                        "index": INTEGER,
                        "message": record(
                            {
                                "role": constant("assistant"),
                                "content": nullable(STRING),
                                "refusal": nullable(STRING),
                                "reasoning_content": STRING,
                                "tool_calls": array(_CALL),
                            },
                            optional=("reasoning_content", "tool_calls"),
                        ),
                        "logprobs": CHAT_LOG_PROBS,
                        "finish_reason": {"type": "string", "enum": ["stop", "length", "tool_calls"]},
                        "state": KEPT_STATE,
                    },
                    optional=("state",),
                )
            ),
            "usage": USAGE,
            "metadata": ANY_OBJECT,
        },
        optional=("metadata",),
    ),
    media=_STREAMED,
    statuses=_QUEUED,
)

SCORE_TEXTS = Operation(
    "POST",
    "/v1/score",
    "Log-likelihoods of continuations of one text.",
    fields=SCORE,
    result=record(
        {
            "id": STRING,
            "object": constant("score"),
            "created": INTEGER,
            "model": STRING,
            "data": array(
                record(
                    {
                        "index": INTEGER,
                        "log_prob": NUMBER,
                        "tokens": INTEGER,
                        "greedy": BOOLEAN,
                        "log_probs": array(NUMBER),
                        "state": KEPT_STATE,
                    },
                    optional=("log_probs", "state"),
                )
            ),
            "usage": USAGE,
        }
    ),
    statuses=_QUEUED,
)
_READ = (404, 408, 413, 415, 503)
TOKENIZE_TEXT = Operation(
    "POST",
    "/tokenize",
    "The tokens of a text or a chat.",
    fields=TOKENIZE,
    either=("prompt", "messages"),
    exclusive=True,
    result=record(
        {
            "tokens": array(INTEGER),
            "count": INTEGER,
            "max_model_len": nullable(INTEGER),
            "token_strs": array(STRING),
        },
        optional=("token_strs",),
    ),
    statuses=_READ,
)
DETOKENIZE_TOKENS = Operation(
    "POST",
    "/detokenize",
    "The text of tokens.",
    fields=DETOKENIZE,
    result=record({"prompt": STRING}),
    statuses=_READ,
)

_MODEL = record({"id": STRING, "object": constant("model"), "created": INTEGER, "owned_by": STRING})
LIST_MODELS = Operation(
    "GET",
    "/v1/models",
    "The model, as a list of one.",
    result=record({"object": constant("list"), "data": array(_MODEL)}),
)
SHOW_MODEL = Operation(
    "GET",
    "/v1/models/{model:path}",
    "The model of this name.",
    result=_MODEL,
    parameters=(Parameter("model", "Its name, which may have slashes.", STRING),),
    statuses=(404,),
)

_STATUS = record({"status": STRING})
HEALTH = Operation(
    "GET",
    "/health",
    "The server's and each replica's condition. 503 where no replica is ready.",
    result=record({"status": STRING, "waiting": INTEGER, "replicas": array(ANY_OBJECT)}),
    statuses=(503,),
    open=True,
)
LIVE = Operation("GET", "/live", "The API server runs, whatever its replicas do.", result=_STATUS, open=True)
READY = Operation(
    "GET", "/ready", "Whether a request that comes now is answered.", result=_STATUS, statuses=(503,), open=True
)
# As Kubernetes' own components name them.
LIVEZ, READYZ = replace(LIVE, path="/livez"), replace(READY, path="/readyz")
METRICS = Operation("GET", "/metrics", "Prometheus series.", media=("text/plain",), open=True)
DOCUMENT = Operation("GET", "/openapi.json", "This document.", result=ANY_OBJECT, statuses=(503,), open=True)

PAGE = Operation("GET", "/", "The playground: a page to write with the model.", media=("text/html",), open=True)
PAGE_FILE = Operation(
    "GET",
    "/playground/{name}",
    "A file of the playground.",
    media=("text/html", "text/css", "text/javascript", "image/svg+xml"),
    parameters=(Parameter("name", "Its name.", STRING),),
    statuses=(404,),
    open=True,
)
PAGE_MODEL = Operation(
    "GET",
    "/playground/model.json",
    "What the playground shows of the model: its size, its state's, and a Transformer's in its place.",
    result=record(
        {
            "id": STRING,
            "chat_template": {"type": "boolean"},
            "states": {"type": "boolean"},
            "layers": INTEGER,
            "hidden_size": INTEGER,
            "vocab_size": INTEGER,
            "state_bytes": INTEGER,
            "transformer_bytes_per_token": INTEGER,
        }
    ),
    statuses=(503,),
)
