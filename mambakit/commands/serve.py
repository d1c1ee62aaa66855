"""Serve a model over HTTP (OpenAI's API), any number of replicas of it behind one address."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass
from typing import Any

from mambakit.commands.configuration import add_config_argument
from mambakit.commands.loading import add_model_arguments, add_tokenizer_argument
from mambakit.commands.options import require_with
from mambakit.commands.serve_operations import (
    add_access_arguments,
    add_operation_arguments,
    key_reader,
    keys_of,
    log_options,
    make_key,
    tls_options,
)
from mambakit.commands.served_model import (
    check_model,
    check_states,
    devices_of,
    own_name,
    prefix_folder,
    read_template,
)
from mambakit.commands.texts import require_file

_MOST = (1 << 31) - 1
_WEEK = 7 * 24 * 3600.0


@dataclass(frozen=True)
class _Number:
    """An option that is a number: its bounds are checked before anything is loaded."""

    name: str
    default: float | None
    low: float
    high: float
    help: str
    alias: str | None = None
    """Its earlier name, which is still accepted."""
    needs: str = ""
    """The option without which it has no effect; its own value is None where it is not given, until `_check`."""

    @property
    def field(self) -> str:
        return self.name[2:].replace("-", "_")


_UNREAD = 64  # bodies; a burst of as many requests as there are slots is taken, too
# Whole numbers have whole bounds.
_REPLICAS = (
    _Number("--replicas", None, 1, 1024, "how many (default: one for each of --devices, else 1)"),
    _Number("--slots", 8, 1, 1 << 16, "texts that a replica decodes together", alias="--rows"),
    _Number("--prefill-chunk-size", None, 1, _MOST, "prompt tokens per forward (default 512 on a CPU, 2048 elsewhere)"),
    _Number(
        "--prefix-cache-mb", 1024, 1, 1 << 30, "memory for the prefix cache of each replica", needs="--prefix-cache"
    ),
    _Number(
        "--heartbeat-seconds", 20.0, 0.5, _WEEK, "a replica that sends nothing for this long is killed and restarted"
    ),
    _Number("--progress-seconds", 300.0, 1.0, _WEEK, "the same for one that has work and completes no step"),
    _Number("--load-seconds", 1800.0, 1.0, _WEEK, "the same for one that takes longer to load the model"),
)
_DRAFTED = "--draft-model or --prompt-lookup"
_DRAFTS = (_Number("--draft-tokens", 4, 1, 15, "draft tokens per verification", needs=_DRAFTED),)
_STATES_CACHE = "--prefix-cache and --states"
_STATES = (
    _Number(
        "--states-mb", 16384, 1, 1 << 30, "disk for kept states; each API key may have an even part of it",
        needs="--states",
    ),
    _Number("--states-memory-mb", 256, 0, 1 << 30, "memory for kept states, at each replica", needs="--states"),
    _Number(
        "--states-seconds", None, 1.0, 10 * 366 * 86400.0, "after which a state expires (default: never)",
        needs="--states",
    ),
    _Number("--max-state-mb", 64, 1, 1 << 20, "of a state that is imported", needs="--states"),
    _Number(
        "--prefix-cache-disk-mb", 4096, 1, 1 << 30, "disk for the prefix cache, where states are kept",
        needs=_STATES_CACHE,
    ),
)  # fmt: skip
_LIMITS = (
    _Number("--max-waiting", 256, 0, _MOST, "texts that may wait for a slot"),
    _Number("--max-new-tokens", 4096, 1, _MOST, "of a text, at most"),
    _Number("--max-prompt-tokens", 65536, 1, _MOST, "of a prompt, at most"),
    _Number("--max-texts", 128, 1, _MOST, "of a request: prompts times n, at most"),
    _Number("--request-seconds", 1800.0, 0.1, _WEEK, "for a request, including the time in the queue"),
    _Number("--drain-seconds", 30.0, 0.0, _WEEK, "for running texts to end after a signal to stop"),
)
_CONNECTIONS = (
    _Number("--max-connections", None, 1, 1 << 20, "in all (default 1000, or as many as open files allow)"),
    _Number("--max-header-bytes", 16 << 10, 256, 1 << 20, "of a request's line and headers"),
    _Number("--max-headers", 100, 1, 10_000, "of a request"),
    _Number("--max-url-bytes", 8 << 10, 32, 1 << 16, "of a request's target"),
    _Number("--max-body-mb", 4, 1, 1024, "of a request"),
    _Number("--max-unfinished-mb", 64, 1, 1 << 20, "of all bodies that are being received or wait to be parsed"),
    _Number("--header-seconds", 10.0, 0.1, _WEEK, "for the headers to arrive"),
    _Number(
        "--body-seconds", 20.0, 0.1, _WEEK, "for a body to arrive, and a second more for each --min-rate bytes of it"
    ),
    _Number("--idle-seconds", 15.0, 0.1, _WEEK, "between a connection's requests"),
    _Number("--write-seconds", 30.0, 0.1, _WEEK, "for a client to read what was sent, and more as with --body-seconds"),
    _Number("--min-rate", 16 << 10, 1, _MOST, "bytes per second below which a client is too slow"),
    _Number(
        "--max-unread", None, 1, _MOST, f"received bodies that may wait to be parsed (default {_UNREAD}, or all slots)"
    ),
    _Number("--parse-seconds", 30.0, 0.1, _WEEK, "to parse and tokenise a large body"),
    _Number("--parse-processes", 2, 1, 64, "that parse large bodies; the first starts with the first such body"),
)
_PORT = _Number("--port", 8000, 0, 65535, "port to listen on; 0: any that is free")
_NUMBERS = (_PORT, *_REPLICAS, *_DRAFTS, *_STATES, *_LIMITS, *_CONNECTIONS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_tokenizer_argument(parser)
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="name of the model in the API (default: its own name)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1; 0.0.0.0: all)")
    _add(parser, (_PORT,))

    add_access_arguments(parser)

    parser.add_argument(
        "--load-state", metavar="FILE", help="start every text from this saved state (of a prompt, or a tuned one)"
    )

    parser.add_argument(
        "--chat-template", metavar="FILE", help="a chat template (Jinja) to use instead of the tokenizer's own"
    )

    replicas = parser.add_argument_group("replicas: processes with a model each")
    replicas.add_argument(
        "--devices",
        nargs="+",
        metavar="DEVICE",
        help="devices, assigned to the replicas in turn (default: the GPUs, or the CPU)",
    )
    replicas.add_argument(
        "--prefix-cache", action="store_true", help="keep states of prompts, and start from the longest known prefix"
    )
    _add(replicas, _REPLICAS)
    drafts = parser.add_argument_group("speculative decoding: draft tokens are verified several at a time")
    drafts.add_argument("--draft-model", metavar="MODEL", help="draft with this smaller model of the same vocabulary")
    drafts.add_argument(
        "--prompt-lookup", action="store_true", help="draft what followed the same tokens earlier in the text"
    )
    _add(drafts, _DRAFTS)
    states = parser.add_argument_group("states that clients keep")
    states.add_argument(
        "--states",
        metavar="FOLDER",
        help="keep states here, and the prefix cache's, also after a restart; or a URL as s3://..., for states alone",
    )
    _add(states, _STATES)
    _add(parser.add_argument_group("limits of texts"), _LIMITS)
    _add(parser.add_argument_group("limits of connections"), _CONNECTIONS)
    add_operation_arguments(parser)
    add_config_argument(parser)


def _add(group: Any, numbers: tuple[_Number, ...]) -> None:
    for number in numbers:
        default = "" if number.default is None else f" (default {number.default:g})"
        kind = float if isinstance(number.low, float) else int
        names = (number.name, number.alias) if number.alias else (number.name,)
        own = None if number.needs else number.default
        group.add_argument(*names, type=kind, default=own, metavar="N", help=number.help + default)


def run(args: argparse.Namespace) -> int:
    if args.make_key is not None:
        return make_key(args.make_key)
    for package in ("starlette", "uvicorn", "httptools", "prometheus_client", "jinja2", "llguidance"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f'serving needs {package}, which is not installed: pip install "mambakit[serve]"')
    _check(args)

    from mambakit.assets import default_model_path
    from mambakit.serving.api.intake import IntakeOptions
    from mambakit.serving.http.access import AccessRules, check_hosts, check_origins
    from mambakit.serving.http.connection_limits import ConnectionLimits
    from mambakit.serving.logs import configure
    from mambakit.serving.messages import WorkerOptions
    from mambakit.serving.server import ServerOptions, serve
    from mambakit.serving.states.options import StatesOptions

    access = AccessRules(
        keys=keys_of(args),
        hosts=check_hosts(args.allowed_host),
        origins=check_origins(args.allowed_origin),
    )

    logs, tls = log_options(args), tls_options(args)
    configure(logs)
    model = str(args.model or default_model_path())
    check_model(model)
    if args.draft_model is not None:
        check_model(args.draft_model)
    devices = devices_of(args)
    serve(
        ServerOptions(
            worker=WorkerOptions(
                model=model,
                tokenizer=args.tokenizer,
                dtype=args.dtype,
                slots=args.slots,
                chunk_size=args.prefill_chunk_size,
                draft_model=args.draft_model,
                prompt_lookup=args.prompt_lookup,
                draft_tokens=args.draft_tokens,
                state=args.load_state,
                prefix_cache_bytes=args.prefix_cache_mb << 20 if args.prefix_cache else 0,
                prefix_cache_folder=prefix_folder(args.states),
                prefix_cache_disk_bytes=args.prefix_cache_disk_mb << 20,
                states_folder=args.states,
                states_memory_bytes=args.states_memory_mb << 20,
                heartbeat_seconds=args.heartbeat_seconds,
                progress_seconds=args.progress_seconds,
                load_seconds=args.load_seconds,
                logs=logs,
            ),
            devices=devices,
            name=args.served_model_name or own_name(model),
            host=args.host,
            port=args.port,
            max_waiting=args.max_waiting,
            max_new_tokens=args.max_new_tokens,
            max_prompt_tokens=args.max_prompt_tokens,
            max_texts=args.max_texts,
            max_connections=args.max_connections,
            limits=ConnectionLimits(
                header_bytes=args.max_header_bytes,
                headers=args.max_headers,
                url_bytes=args.max_url_bytes,
                body_bytes=args.max_body_mb << 20,
                header_seconds=args.header_seconds,
                body_seconds=args.body_seconds,
                idle_seconds=args.idle_seconds,
                write_seconds=args.write_seconds,
                rate=args.min_rate,
            ),
            intake=IntakeOptions(
                processes=args.parse_processes,
                waiting=args.max_unread or max(_UNREAD, args.slots * len(devices)),
                seconds=args.parse_seconds,
                unfinished_bytes=args.max_unfinished_mb << 20,
            ),
            drain_seconds=args.drain_seconds,
            chat_template=None if args.chat_template is None else read_template(args.chat_template),
            request_seconds=args.request_seconds,
            states=StatesOptions(
                budget=args.states_mb << 20,
                seconds=args.states_seconds,
                upload_bytes=min(args.max_state_mb, args.max_unfinished_mb) << 20,
            ),
            access=access,
            tls=tls,
            logs=logs,
            read_keys=key_reader(args),
            playground=not args.no_playground,
        )
    )
    return 0


def _check(args: argparse.Namespace) -> None:
    for number in _NUMBERS:
        value = getattr(args, number.field)
        # Not a number is not within bounds, either.
        if value is not None and not number.low <= value <= number.high:
            low, high = (f"{bound:.10g}" for bound in (number.low, number.high))
            bound = f"{low} or more" if value < number.low else f"at most {high}" if value > number.high else "a number"
            raise ValueError(f"{number.name} is {value}; it must be {bound}")
    for name in ("host", "served_model_name", "device", "states", "tokenizer", "draft_model"):
        if getattr(args, name) == "":
            raise ValueError(
                f"--{name.replace('_', '-')} is empty, as an unset variable is; leave it out, or give a value"
            )
    if args.draft_model and args.prompt_lookup:
        raise ValueError("--draft-model and --prompt-lookup are two drafters; give one")
    if args.load_state is not None:
        require_file(args.load_state, "state", 'make one with mambakit generate --save-state, or tune = "state"')
        if args.prefix_cache:
            raise ValueError(
                "--prefix-cache finds a prompt by all of its tokens, which a saved state does not hold; drop one"
            )
    if args.states is not None:
        check_states(args.states)
    if args.max_state_mb is not None and args.max_state_mb > args.max_unfinished_mb:
        raise ValueError(
            f"--max-state-mb is {args.max_state_mb}, more than --max-unfinished-mb {args.max_unfinished_mb}, which "
            "bounds all bodies that are being received; give at least that"
        )
    if args.device and args.devices:
        raise ValueError("--device and --devices both say where; give one")
    if args.max_unfinished_mb < args.max_body_mb:
        raise ValueError(
            f"--max-unfinished-mb is {args.max_unfinished_mb}, less than --max-body-mb {args.max_body_mb}; give at "
            "least "
            "that"
        )
    used = {
        "--states": args.states is not None,
        "--prefix-cache": args.prefix_cache,
        _STATES_CACHE: args.prefix_cache and args.states is not None,
        _DRAFTED: bool(args.draft_model or args.prompt_lookup),
    }
    for number in _NUMBERS:
        if number.needs:
            given = getattr(args, number.field) is not None
            require_with(number.name, given, number.needs, used[number.needs])
            if not given:
                setattr(args, number.field, number.default)
