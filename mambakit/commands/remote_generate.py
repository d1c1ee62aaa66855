"""`mambakit generate --server`: a server's model writes in the place of one in this process."""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

from mambakit.commands.remote import Remote
from mambakit.errors import UsageError

# Options of a model in this process; a server has its own.
_LOCAL = (
    "model", "device", "dtype", "tokenizer", "output", "prefill_chunk_size", "load_state", "save_state", "prefix_cache",
    "prefix_cache_mb", "draft_model", "prompt_lookup", "draft_tokens", "logprobs", "echo", "json_schema", "regex",
    "grammar",
)  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """UsageError for an option that would have no effect."""
    if args.server is None:
        if args.api_key is not None:
            raise UsageError("--api-key has no effect without --server; add --server, or drop --api-key")
        return
    for name in _LOCAL:
        if getattr(args, name) not in (None, False):
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} is of a model in this process; drop it, or drop --server")
    if args.max_new_tokens == 0:
        raise UsageError("--max-new-tokens is 0; a server writes at least one token")


def write(args: argparse.Namespace, prompts: list[str]) -> None:
    """All texts after all prompts, streamed, or as JSON objects."""
    server = Remote(args.server, args.api_key or os.environ.get("MAMBAKIT_API_KEY"))
    first = True
    for prompt in prompts:
        for copy in range(args.num_return_sequences):
            if not first and not args.json:
                print("\n---")
            first = False
            _one(args, server, prompt, copy)


def _one(args: argparse.Namespace, server: Remote, prompt: str, copy: int) -> None:
    body = {
        "prompt": prompt, "max_tokens": args.max_new_tokens, "temperature": 0.0 if args.greedy else args.temperature,
        "top_k": args.top_k, "top_p": args.top_p, "min_p": args.min_p, "repetition_penalty": args.repetition_penalty,
        "seed": None if args.seed is None else args.seed + copy, "stop": list(args.stop) or None,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    began = time.perf_counter()
    text, reason = "", ""
    usage: dict[str, Any] = {}
    for number, event in enumerate(server.stream("/v1/completions", body)):
        if not args.json and not number:
            print(prompt, end="", flush=True)
        for choice in event["choices"]:
            text += choice["text"]
            reason = choice["finish_reason"] or reason
            if not args.json:
                print(choice["text"], end="", flush=True)
        usage = event.get("usage") or usage
    if not args.json:
        print(flush=True)
        return
    seconds = time.perf_counter() - began
    written = usage.get("completion_tokens", 0)
    result = {
        "prompt": prompt, "text": text, "finish_reason": reason, "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": written, "seconds": round(seconds, 4),
        "tokens_per_second": round(written / seconds, 2) if seconds else 0.0,
    }  # fmt: skip
    print(json.dumps(result, ensure_ascii=False), flush=True)
