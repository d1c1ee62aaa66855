"""Write text that continues a prompt, streamed to standard output as it is made."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from mambakit.commands.loading import add_model_arguments, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help='text to continue; "-" or none reads standard input'
    )
    parser.add_argument("--file", action="append", default=[], metavar="FILE", help="a file as a prompt (repeatable)")
    add_model_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=200, help="at most this many tokens (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k likeliest tokens (default: off)")
    parser.add_argument("--top-p", type=float, default=0.95, help="among the likeliest that make up p (default 0.95)")
    parser.add_argument("--min-p", type=float, default=0.0, help="among those at least this fraction of the likeliest")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 discourages tokens used before")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    parser.add_argument("--num-return-sequences", type=int, default=1, metavar="N", help="N texts for every prompt")
    parser.add_argument(
        "--prefill-chunk-size", type=int, default=2048, metavar="N", help="prompt tokens read at a time"
    )
    parser.add_argument("--load-state", metavar="FILE", help="continue from a saved state; prompts are what comes next")
    parser.add_argument("--save-state", metavar="FILE", help="save the state after the text")
    parser.add_argument("--json", action="store_true", help="one JSON object for each text, nothing streamed")


def run(args: argparse.Namespace) -> int:
    prompts = _prompts(args)
    if args.num_return_sequences < 1:
        raise ValueError(f"--num-return-sequences is {args.num_return_sequences}; it must be 1 or more")
    if args.save_state and (len(prompts) > 1 or args.num_return_sequences > 1):
        raise ValueError("--save-state keeps the state of one text; give one prompt and one return sequence")

    from mambakit.generation.stream import Sampling
    from mambakit.modules import MambaCache

    model, tokenizer = load(args)
    state = None
    if args.load_state:
        if not Path(args.load_state).is_file():
            raise ValueError(f"there is no state file {args.load_state}; make one with --save-state")
        state = MambaCache.load(args.load_state, model.config, model.device)
        if state.max_batch_size != 1:
            raise ValueError(f"{args.load_state} holds {state.max_batch_size} rows; select one and save it alone")
    for number, (prompt, copy) in enumerate((p, c) for p in prompts for c in range(args.num_return_sequences)):
        sampling = Sampling(
            0.0 if args.greedy else args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty,
            None if args.seed is None else args.seed + copy,
        )  # fmt: skip
        if number and not args.json:
            print("\n---")
        _one(args, model, tokenizer, prompt, sampling, None if state is None else state.clone())
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = []
    for prompt in args.prompts or ([] if args.file else ["-"]):
        if prompt == "-":
            if sys.stdin.isatty():
                print("reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
            prompt = sys.stdin.read()
        prompts.append(prompt)
    for name in args.file:
        try:
            prompts.append(Path(name).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 text ({error})") from error
    return prompts


def _one(args: argparse.Namespace, model: Any, tokenizer: Any, prompt: str, sampling: Any, state: Any) -> None:
    import torch
    from rich.console import Console

    from mambakit.generation.stream import Stream

    console = Console(stderr=True)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0].long()
    if not len(ids):
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ValueError("the prompt is empty and the tokenizer has no bos token to start from; give a prompt")
        ids = torch.tensor([start])
    status = (
        console.status("reading the prompt") if console.is_terminal and len(ids) > args.prefill_chunk_size else None
    )

    def progress(done: int) -> None:
        if status is not None:
            status.update(f"reading the prompt: {done:,} of {len(ids):,} tokens")

    stream = Stream(
        model, tokenizer, ids, sampling, args.max_new_tokens, tuple(args.stop), state, args.prefill_chunk_size, progress
    )
    began = time.perf_counter()
    if status is not None:
        status.start()
    if not args.json:
        print(prompt, end="", flush=True)
    for piece in stream:
        if status is not None:
            status.stop()
        if not args.json:
            print(piece, end="", flush=True)
    seconds = time.perf_counter() - began
    if args.save_state:
        _save(model, stream, args.save_state)
    rate = len(stream.tokens) / seconds if seconds else 0.0
    if args.json:
        result = {
            "prompt": prompt, "text": stream.text, "tokens": stream.tokens, "finish_reason": stream.finish_reason,
            "prompt_tokens": len(ids), "seconds": round(seconds, 4), "tokens_per_second": round(rate, 2),
        }  # fmt: skip
        print(json.dumps(result, ensure_ascii=False), flush=True)
        return
    print(flush=True)
    if console.is_terminal:
        console.print(f"[dim]{len(ids)} tokens read, {len(stream.tokens)} written, {rate:.1f} a second in all[/dim]")


def _save(model: Any, stream: Any, path: str) -> None:
    """The state after the whole text: the last token was chosen but not yet read."""
    import torch

    seen, total = stream.cache.get_seq_length(), len(stream.prompt_ids) + len(stream.tokens)
    unread = stream.tokens[len(stream.tokens) - (total - seen) :] if total > seen else []
    if unread and stream.finish_reason == "length":
        with torch.no_grad():
            model(torch.tensor([unread], device=model.device), cache_params=stream.cache)
    stream.cache.save(path)
