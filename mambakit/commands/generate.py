"""Write text that continues a prompt, streamed to standard output as it is made."""

from __future__ import annotations

import argparse
import sys

from mambakit.commands import remote_generate
from mambakit.commands.loading import add_model_arguments, add_tokenizer_argument, load
from mambakit.commands.options import (
    LARGEST_SEED,
    any_text,
    check_output_file,
    check_output_folder,
    integer,
    real,
    require_with,
    text,
)
from mambakit.commands.texts import read_text, require_file
from mambakit.commands.writing import Writer, check_forms
from mambakit.errors import UsageError

_NEW_TOKENS, _TEMPERATURE = 200, 0.8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", type=any_text, help='text to continue; "-" or none reads standard input'
    )
    parser.add_argument("--file", action="append", default=[], metavar="FILE", help="a file as a prompt (repeatable)")
    add_model_arguments(parser)
    parser.add_argument("--server", metavar="URL", help="let this server's model write (mambakit serve)")
    parser.add_argument("--api-key", metavar="KEY", help="the server's key (default: $MAMBAKIT_API_KEY)")
    add_tokenizer_argument(parser)
    parser.add_argument(
        "--max-new-tokens", type=integer(0), help="at most this many tokens (default 200; of sound 2 seconds)"
    )
    parser.add_argument("--temperature", type=real(0), help="0 is greedy (default 0.8)")
    parser.add_argument(
        "--top-k", type=integer(0), default=0, help="choose among the k likeliest tokens (default: off)"
    )
    parser.add_argument(
        "--top-p", type=real(0, 1, above=True), default=0.95, help="among the likeliest that make up p (default 0.95)"
    )
    parser.add_argument(
        "--min-p", type=real(0, 1), default=0.0, help="among those at least this fraction of the likeliest"
    )
    parser.add_argument(
        "--repetition-penalty", type=real(0, above=True), default=1.0, help="above 1 discourages tokens used before"
    )
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--seed", type=integer(0, LARGEST_SEED), help="the same seed gives the same text")
    parser.add_argument(
        "--stop", type=text, action="append", default=[], metavar="TEXT", help="end before this text (repeatable)"
    )
    parser.add_argument(
        "--num-return-sequences",
        type=integer(1),
        default=1,
        metavar="N",
        help="N texts for every prompt, which is read once",
    )
    parser.add_argument(
        "--prefill-chunk-size",
        type=integer(1),
        metavar="N",
        help="prompt tokens read at a time (default 512 on a CPU, 4096 elsewhere)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object for each text, nothing streamed")
    parser.add_argument(
        "--logprobs", type=integer(0), metavar="K", help="log-probabilities of the tokens and of K others (with --json)"
    )
    parser.add_argument(
        "--echo", action="store_true", help="the prompt's tokens, too, in text and logprobs (with --json)"
    )

    sound = parser.add_argument_group("sound (models trained on WAV files)")
    sound.add_argument("--output", metavar="FILE.wav", help="write a sound; --file is a WAV file that it continues")
    sound.add_argument("--sample-rate", type=integer(1, 10**6), metavar="HZ", help="where the model does not say it")

    state = parser.add_argument_group("state")
    state.add_argument(
        "--load-state", metavar="FILE", help="continue from a saved state; prompts, if any, are what comes next"
    )
    state.add_argument("--save-state", metavar="FILE", help="save the state after the text")
    state.add_argument(
        "--prefix-cache", metavar="FOLDER", help="keep states of prompts here, and start from the longest known prefix"
    )
    state.add_argument(
        "--prefix-cache-mb",
        type=integer(1),
        metavar="MB",
        help="size of the folder for one model (default 4096)",
    )

    form = parser.add_argument_group("form of the text (one of them; a file's name, or the thing itself)")
    form.add_argument("--json-schema", metavar="SCHEMA", help="a JSON text that this schema describes")
    form.add_argument("--regex", metavar="REGEX", help="a text that this regular expression matches")
    form.add_argument("--grammar", metavar="GRAMMAR", help="a sentence of this Lark grammar")

    speed = parser.add_argument_group("speculative decoding: draft tokens are verified several at a time")
    speed.add_argument("--draft-model", metavar="MODEL", help="draft with this smaller model of the same vocabulary")
    speed.add_argument(
        "--prompt-lookup", action="store_true", help="draft what followed the same tokens earlier in the text"
    )
    speed.add_argument("--draft-tokens", type=integer(1), metavar="N", help="draft tokens per verification (default 4)")


def run(args: argparse.Namespace) -> int:
    if args.greedy and args.temperature:
        raise UsageError(f"--greedy takes the likeliest token, whatever --temperature {args.temperature} is; drop one")
    if args.temperature is None:
        args.temperature = _TEMPERATURE
    remote_generate.check(args)
    require_with("--sample-rate", args.sample_rate is not None, "--output", args.output is not None)
    if args.output is not None:
        from mambakit.commands.sound import check_sound, write_sound

        check_sound(args)
        return write_sound(args)
    if args.max_new_tokens is None:
        args.max_new_tokens = _NEW_TOKENS
    _check(args)
    prompts = _prompts(args)
    if args.server is not None:
        remote_generate.write(args, prompts)
        return 0
    if args.save_state and (len(prompts) > 1 or args.num_return_sequences > 1):
        raise UsageError("--save-state keeps the state of one text; give one prompt and one return sequence")

    model, tokenizer = load(args, inference=True)
    loaded = None
    if args.load_state:
        from mambakit.generation.state import State

        loaded = State.load(args.load_state, model)
        if loaded.rows != 1:
            raise UsageError(f"{args.load_state} holds {loaded.rows} rows; select one and save it alone")
    writer = Writer(args, model, tokenizer, loaded)
    for number, prompt in enumerate(prompts):
        if number and not args.json:
            print("\n---")
        writer.write(prompt)
    return 0


def _check(args: argparse.Namespace) -> None:
    if (args.logprobs is not None or args.echo) and not args.json:
        raise UsageError("--logprobs and --echo are parts of a JSON object; add --json")
    if args.load_state and args.echo:
        raise UsageError(
            "--echo gives the prompt back, which a saved state does not hold; drop one of --echo and --load-state"
        )
    if args.load_state and args.prefix_cache:
        raise UsageError(
            "--prefix-cache finds a prompt by all of its tokens, which a saved state does not hold; drop one"
        )
    if args.draft_model and args.prompt_lookup:
        raise UsageError("--draft-model and --prompt-lookup are two drafters; give one")
    require_with("--prefix-cache-mb", args.prefix_cache_mb is not None, "--prefix-cache", bool(args.prefix_cache))
    drafted = bool(args.draft_model or args.prompt_lookup)
    require_with("--draft-tokens", args.draft_tokens is not None, "--draft-model or --prompt-lookup", drafted)
    if args.load_state:
        require_file(args.load_state, "state", "make one with --save-state")
    if args.save_state:
        check_output_file("--save-state", args.save_state)
    if args.prefix_cache:
        check_output_folder("--prefix-cache", args.prefix_cache)
    if sum(value is not None for value in (args.json_schema, args.regex, args.grammar)) > 1:
        raise UsageError("--json-schema, --regex and --grammar are three ways to give a form; give exactly one")
    check_forms(args)


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = []
    nothing = [""] if args.load_state else ["-"]
    for prompt in args.prompts or ([] if args.file else nothing):
        if prompt == "-":
            if sys.stdin.isatty():
                print("reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
            prompt = read_text("-", "prompt")
        prompts.append(prompt)
    return prompts + [read_text(name, "prompt") for name in args.file]
