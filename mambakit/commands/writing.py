"""Texts after one prompt after another, as `mambakit generate` writes them: streamed, or as JSON objects."""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mambakit.commands.loading import load
from mambakit.commands.texts import read_text
from mambakit.errors import UsageError
from mambakit.output import literal, say, terminal
from mambakit.quoting import brief

# What the options are where they are not given.
_CACHE_MB, _DRAFT_TOKENS = 4096, 4


# A sign that every text of a form has; a file's name that is mistyped has it rarely.
_SIGNS = {"json_schema": "{", "grammar": ":"}


def check_forms(args: argparse.Namespace) -> None:
    """UsageError for a form that is neither a file nor what its option takes."""
    for name, sign in _SIGNS.items():
        value = getattr(args, name)
        if value is not None and sign not in value and _text_or_file(value) is value:
            option = "--" + name.replace("_", "-")
            raise UsageError(
                f"{option} {brief(value)}: there is no such file, and a form has {sign!r} in it; correct the name"
            )


def _text_or_file(value: str | None) -> str | None:
    if value is None or "\n" in value or len(value) > 255 or not Path(value).is_file():
        return value
    return read_text(value, "form")


class Writer:
    """Reads a prompt once, and writes as many texts after it as were asked for."""

    def __init__(self, args: argparse.Namespace, model: Any, tokenizer: Any, loaded: Any):
        self.args, self.model, self.tokenizer, self.loaded = args, model, tokenizer, loaded
        if args.logprobs is not None and args.logprobs > model.config.vocab_size:
            raise UsageError(f"--logprobs is {args.logprobs}; the model has {model.config.vocab_size} tokens")
        self.constraint = self._constraint()
        self.drafter = self._drafter()
        self.prefix_cache = self._prefix_cache()

    @functools.cached_property
    def console(self) -> Any:
        """Made when something is said: rich is imported then, after the text."""
        return terminal(stderr=True)

    def _constraint(self) -> Any:
        names = ("json_schema", "regex", "grammar")
        given = {name: _text_or_file(getattr(self.args, name)) for name in names}
        if all(value is None for value in given.values()):
            return None
        from mambakit.generation.constrain import Constraint
        from mambakit.models.inference_tokenizer import InferenceTokenizer

        known = self.tokenizer  # llguidance knows transformers' classes
        tokenizer = known.of_transformers() if isinstance(known, InferenceTokenizer) else known
        try:
            return Constraint(self.model, tokenizer, **given)
        except ImportError as error:
            raise UsageError(str(error)) from error

    def _drafter(self) -> Any:
        if not (self.args.draft_model or self.args.prompt_lookup):
            return None
        from mambakit.generation.drafters import DraftModel, PromptLookup

        if self.args.prompt_lookup:
            return PromptLookup()
        args = self.args
        small = argparse.Namespace(
            model=args.draft_model, device=args.device, dtype=args.dtype, tokenizer=args.tokenizer
        )
        return DraftModel(load(small, inference=True)[0])

    def _prefix_cache(self) -> Any:
        if not self.args.prefix_cache:
            return None
        from mambakit.generation.prefix_cache import PrefixCache

        megabytes = _CACHE_MB if self.args.prefix_cache_mb is None else self.args.prefix_cache_mb
        return PrefixCache(self.model, folder=self.args.prefix_cache, disk_bytes=megabytes << 20)

    def write(self, prompt: str) -> None:
        began = time.perf_counter()
        ids = self._ids(prompt)
        saved = 0 if self.prefix_cache is None else self.prefix_cache.statistics.tokens_saved
        state = self._read(ids)
        cached = None if self.prefix_cache is None else self.prefix_cache.statistics.tokens_saved - saved
        args = self.args
        together = args.num_return_sequences > 1 and self.drafter is None and args.max_new_tokens > 0
        texts = self._together(state, ids) if together else self._one_by_one(state, ids)
        for copy, text in enumerate(texts):
            if copy and not self.args.json:
                print("\n---")
            if not self.args.json:
                print(prompt, end="", flush=True)
            for piece in text:
                if not self.args.json:
                    print(piece, end="", flush=True)
            seconds = time.perf_counter() - began
            self._keep(text, state, ids)
            self._tell(prompt, ids, state, text, seconds, cached)
            if not together:
                began = time.perf_counter()

    def _one_by_one(self, state: Any, ids: Any) -> Iterator[Any]:
        for copy in range(self.args.num_return_sequences):
            yield self._stream(state, ids, copy)  # errors in its arguments come before the prompt is shown

    def _together(self, state: Any, ids: Any) -> Iterator[Any]:
        """All texts, written in one batch; the first is shown as it is made, the others as soon as it is their turn."""
        from mambakit.generation.engine import Engine, Request
        from mambakit.generation.engine_stream import stream_together

        args, prompt = self.args, state.prompt()
        requests = [
            Request(
                prompt["prompt_ids"], self._sampling(copy), args.max_new_tokens, state=prompt["cache"],
                keep_state=self.prefix_cache is not None, context=self._context(ids),
            )
            for copy in range(args.num_return_sequences)
        ]  # fmt: skip
        yield from stream_together(Engine(self.model, len(requests)), self.tokenizer, requests, tuple(args.stop))

    def _keep(self, text: Any, state: Any, ids: Any) -> None:
        """What follows this text later need not read it either."""
        if self.prefix_cache is not None and text.cache is not None:
            read = [*ids.tolist(), *text.tokens][: text.cache.get_seq_length()]
            self.prefix_cache.store(read, text.cache)
        if self.args.save_state:
            _after(text, state).save(self.args.save_state, self.model)

    def _tell(self, prompt: str, ids: Any, state: Any, text: Any, seconds: float, cached: int | None) -> None:
        args, rate = self.args, len(text.tokens) / seconds if seconds else 0.0
        if args.json:
            result = {
                "prompt": prompt, "text": (prompt if args.echo else "") + text.text, "tokens": text.tokens,
                "finish_reason": text.finish_reason, "prompt_tokens": len(ids), "seconds": round(seconds, 4),
                "tokens_per_second": round(rate, 2),
            }  # fmt: skip
            if cached is not None:
                result["cached_tokens"] = cached
            if self.drafter is not None:
                result |= {"guessed_tokens": text.proposed, "accepted_tokens": text.accepted}
            if args.logprobs is not None:
                result["logprobs"] = self._logprobs(prompt, ids, state, text.tokens)
            print(json.dumps(result, ensure_ascii=False), flush=True)
            return
        print(flush=True)
        if self.console.is_terminal:
            line = f"{len(ids)} tokens read, {len(text.tokens)} written, {rate:.1f} a second in all"
            if self.drafter is not None:
                line += f", {text.accepted} of {text.proposed} guesses right"
            say(self.console, line, "dim")

    def _ids(self, prompt: str) -> Any:
        import torch

        from mambakit.generation.start_token import find_start_token
        from mambakit.generation.token_ids import require_in_vocabulary

        ids = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0].long()
        require_in_vocabulary("the prompt", ids, self.model.config.vocab_size)  # the tokenizer may be another model's
        if len(ids) or self.loaded is not None:
            return ids
        start = find_start_token(self.tokenizer)
        if start is None:
            raise UsageError("the prompt is empty and the tokenizer has no bos token to start from; give a prompt")
        return torch.tensor([start], dtype=torch.int64, device="cpu")

    def _read(self, ids: Any) -> Any:
        """The state after the prompt, with its last token unread."""
        from contextlib import nullcontext

        from mambakit.decoding.chunks import chunk_sizes
        from mambakit.generation.state import State

        chunk = self.args.prefill_chunk_size or chunk_sizes(self.model.device).single
        status = (
            self.console.status(literal("reading the prompt"))
            if len(ids) > chunk and self.console.is_terminal
            else None
        )

        def progress(done: int) -> None:
            if status is not None:
                status.update(literal(f"reading the prompt: {done:,} of {len(ids):,} tokens"))

        with status or nullcontext():
            if self.loaded is not None:
                if not len(ids):
                    return self.loaded
                return self.loaded.extend(self.model, ids, chunk_size=chunk, progress=progress)
            if self.prefix_cache is not None:
                return self.prefix_cache.read(ids, progress=progress)
            return State.read(self.model, ids, chunk_size=chunk, progress=progress)

    def _sampling(self, copy: int) -> Any:
        """How the tokens of text number ``copy`` are chosen."""
        from mambakit.generation.stream import SamplingParams

        args = self.args
        sampling = SamplingParams(
            0.0 if args.greedy else args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty,
            None if args.seed is None else args.seed + copy,
        )  # fmt: skip
        return sampling if self.constraint is None else self.constraint.sampling(sampling)

    def _context(self, ids: Any) -> Any:
        """The tokens that a repetition penalty counts besides the state's last one, which comes with its prompt: those
        of the prompt, and of a loaded state the ones that it had not read."""
        import torch

        if self.loaded is None or not len(ids):
            return ids[:-1]
        return torch.cat([self.loaded.pending[0].cpu(), ids[:-1]])

    def _stream(self, state: Any, ids: Any, copy: int) -> Any:
        """Text number ``copy`` after the prompt: a fork of its state."""
        from mambakit.generation.speculative import SpeculativeStream
        from mambakit.generation.stream import Stream

        args, sampling = self.args, self._sampling(copy)
        options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "stop": tuple(args.stop), **state.prompt()}
        options["context"] = self._context(ids)
        if self.drafter is not None:
            guesses = {"drafter": self.drafter, "draft_tokens": args.draft_tokens or _DRAFT_TOKENS}
            return SpeculativeStream(self.model, self.tokenizer, sampling=sampling, **guesses, **options)
        return Stream(self.model, self.tokenizer, sampling=sampling, **options)

    def _logprobs(self, prompt: str, ids: Any, state: Any, tokens: list[int]) -> dict[str, list]:
        import torch

        from mambakit.generation.logprobs import as_logprobs, echo, token_log_probs

        if self.args.echo:
            return echo(
                self.model,
                self.tokenizer,
                torch.cat([ids, torch.tensor(tokens, dtype=torch.long, device="cpu")]),
                top=self.args.logprobs,
            )
        if not tokens:
            return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        scored = token_log_probs(
            self.model, torch.tensor(tokens, dtype=torch.int64, device="cpu"), top=self.args.logprobs, state=state
        )
        return as_logprobs(self.tokenizer, scored)


def _after(stream: Any, before: Any) -> Any:
    """The state after a whole text. The last token of a text that reached its length is not read yet."""
    import torch

    from mambakit.generation.state import State

    if not stream.tokens:
        return before
    last = stream.tokens[-1:] if stream.finish_reason == "length" else []
    return State(stream.cache, torch.tensor([last], dtype=torch.long, device="cpu").reshape(1, len(last)))
