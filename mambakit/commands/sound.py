"""`mambakit generate --output x.wav`: models of sound, whose tokens are bytes of mu-law codes, write WAV files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mambakit.commands.loading import load
from mambakit.commands.options import check_output_file
from mambakit.commands.texts import require_file
from mambakit.errors import UsageError
from mambakit.output import literal, say, terminal
from mambakit.quoting import brief

_SECONDS = 2
# Options that are about text, or about several of them.
_OF_TEXT = (
    "json", "logprobs", "echo", "stop", "load_state", "save_state", "prefix_cache", "json_schema", "regex", "grammar",
    "draft_model", "prompt_lookup", "prefix_cache_mb", "draft_tokens",
)  # fmt: skip


def check_sound(args: argparse.Namespace) -> None:
    """UsageError for options that do not go with --output."""
    if Path(args.output).suffix.lower() != ".wav":
        raise UsageError(
            f"--output is {brief(args.output)}; it writes sound, to a name that ends with .wav (text: mambakit "
            "generate ... > file)"
        )
    for name in _OF_TEXT:
        if getattr(args, name) not in (None, False, []):
            raise UsageError(f"--{name.replace('_', '-')} is for text, which --output does not write; drop one")
    if args.num_return_sequences > 1 or len(args.file) > 1:
        raise UsageError("--output is one sound; give one --file, and no --num-return-sequences")
    if args.prompts:
        raise UsageError("a prompt of --output is a sound: --file start.wav, in place of text")
    check_output_file("--output", args.output)
    for name in args.file:
        require_file(name, "WAV")


def write_sound(args: argparse.Namespace) -> int:
    """Write a sound, after one of --file where it is given.

    Raises:
        UsageError: the model's tokens are not bytes, or its rate is not known.
    """
    import numpy as np
    import torch

    from mambakit.generation.stream import SamplingParams, Stream
    from mambakit.training.data.audio import mu_law_decode, read_wav, write_wav
    from mambakit.training.tokenizer import END, kind_of

    model, tokenizer = load(args, inference=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or kind_of(backend) != "bytes":
        raise UsageError(
            "--output writes sound, but this model's tokens are not the bytes that models of sound have; train one: "
            "mambakit train configs/audio.toml"
        )
    rate = _rate(args)
    console = terminal(stderr=True)
    end = backend.token_to_id(END)
    start = [end]
    for name in args.file:
        for piece in read_wav(Path(name), rate):
            start += [byte + 1 for byte in piece.data]  # type: ignore[operator]
    count = _SECONDS * rate if args.max_new_tokens is None else args.max_new_tokens
    sampling = SamplingParams(
        0.0 if args.greedy else args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed
    )
    ids = torch.tensor(start, dtype=torch.int64, device="cpu")
    stream = Stream(model, tokenizer, ids, sampling, count, chunk_size=args.prefill_chunk_size)
    if console.is_terminal:
        with console.status(literal("writing")) as status:
            for _ in stream:
                status.update(literal(f"writing: {len(stream.tokens) / rate:.2f} of {count / rate:.2f} s"))
    else:
        for _ in stream:
            pass
    codes = np.array([token - 1 for token in [*start[1:], *stream.tokens] if 1 <= token <= 256], dtype=np.uint8)
    write_wav(Path(args.output), mu_law_decode(codes), rate)
    say(console, f"{args.output}: {len(codes) / rate:.2f} s of sound at {rate} Hz")
    return 0


def _rate(args: argparse.Namespace) -> int:
    """Samples a second: --sample-rate, else what training noted beside the model."""
    if args.sample_rate is not None:
        return args.sample_rate
    from mambakit.assets import default_model_path
    from mambakit.models.checkpoints.storage import small_files
    from mambakit.reading import read_json

    name = args.model or default_model_path()
    path = small_files(name) / "preprocessor_config.json"
    found: Any = read_json(path).get("sampling_rate") if path.is_file() else None
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UsageError(f"{name} does not say how many samples a second it was trained on; give --sample-rate 8000")
    return found
