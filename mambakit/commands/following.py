"""`mambakit score --follow`: the surprise of every line of a log as it comes, and a mark on what lies above a running
quantile."""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from mambakit.commands.options import check_output_file, integer, real, require_with
from mambakit.commands.tail import StandardInput, Tail
from mambakit.errors import UsageError
from mambakit.opening import COMPRESSED
from mambakit.output import printable, say, terminal

# Seconds between two looks at files that have not grown.
_POLL = 0.2
# Bytes of new lines that are scored together, over all files: the first of them is printed after the last was read.
_AT_ONCE = {"cpu": 1 << 13, "cuda": 1 << 18}
_RANKS = ("mean", "total", "peak")
# The options that have an effect only here, and their defaults.
_DEFAULTS = {
    "state": None, "quantile": 0.99, "window": 10_000, "rank": "mean", "only_marked": False, "once": False,
    "from_end": False, "save_every": 10.0,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "follow", "every line of growing files as it comes, each file a stream of its own"
    )
    group.add_argument("--follow", action="store_true", help='follow FILEs as they grow, or standard input ("-")')
    group.add_argument(
        "--state", metavar="FILE", help="keep the streams' states here, and go on from them after a stop"
    )
    group.add_argument(
        "--quantile", type=real(0, 1), metavar="Q", help="mark lines above this quantile of earlier ones (default 0.99)"
    )
    group.add_argument(
        "--window",
        type=integer(2),
        metavar="N",
        help="the quantile is of the latest N lines of the file (default 10000)",
    )
    group.add_argument(
        "--rank",
        choices=_RANKS,
        help="what is compared: nats per token, of the line, or of its worst token (default mean)",
    )
    group.add_argument("--only-marked", action="store_true", help="print marked lines alone")
    group.add_argument("--once", action="store_true", help="stop at the end of the files as they are now")
    group.add_argument("--from-end", action="store_true", help="begin with what is written from now on")
    group.add_argument(
        "--save-every",
        type=real(0),
        metavar="SECONDS",
        help="time between writes of --state (default 10; 0: every batch)",
    )


def check(args: argparse.Namespace) -> None:
    """UsageError for options that do not fit; sets the defaults of those that were not given."""
    for name, default in _DEFAULTS.items():
        value = getattr(args, name)
        require_with("--" + name.replace("_", "-"), value not in (None, False), "--follow", args.follow)
        setattr(args, name, default if value is None else value)
    if not args.follow:
        return
    require_with("--save-every", args.save_every != _DEFAULTS["save_every"], "--state", args.state is not None)
    if not args.files:
        raise UsageError('--follow needs a FILE, or "-" for standard input')
    if "-" in args.files and len(args.files) > 1:
        raise UsageError("standard input is followed alone; name files, or -")
    for name in args.files:
        if Path(name).suffix in COMPRESSED:
            raise UsageError(
                f"{name} is compressed: what is appended to it cannot be read as it comes; name the log itself"
            )
        if name != "-" and Path(name).exists() and not (Path(name).is_file() or Path(name).is_dir()):
            raise UsageError(f"{name} is a pipe or a device, not a file that grows: --follow - < {name} reads it")
    if len(set(map(os.path.realpath, args.files))) < len(args.files):
        raise UsageError("--follow was given a file twice; each is a stream of its own: name it once")
    if args.state:
        check_output_file("--state", args.state)
    from mambakit.generation.quantile import RunningQuantile

    RunningQuantile(args.quantile, args.window)


class _Stop:
    """Set by SIGINT and SIGTERM, so that a batch is finished and saved; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number


class Follower:
    """Reads the new lines of all files, scores them in one batch, prints them, and saves the streams at intervals."""

    def __init__(self, args: argparse.Namespace, model: Any, tokenizer: Any):
        from mambakit.generation.quantile import RunningQuantile
        from mambakit.generation.stream_scorer import StreamScorer

        self.args, self.errors, self.console = args, terminal(stderr=True), terminal()
        known = args.state is not None and Path(args.state).exists()
        self.scorer = StreamScorer.load(args.state, model, tokenizer) if known else StreamScorer(model, tokenizer)
        files = self.scorer.notes.setdefault("files", {})
        self.tails: dict[str, Tail] = {}
        self.quantiles: dict[str, RunningQuantile] = {}
        for name in args.files:
            note = files.get(name, {})
            if name == "-":
                self.tails[name] = StandardInput()
            else:
                self.tails[name] = Tail(name, note.get("place"), args.from_end)
                if self.tails[name].anew:
                    say(
                        self.errors,
                        f"{name} is another file than before: it is read from its start, as what comes next",
                    )
            earlier = note.get("values", []) if note.get("rank") == args.rank else []
            self.quantiles[name] = RunningQuantile(args.quantile, args.window, values=earlier[-args.window :])
        self.counts = {name: files.get(name, {}).get("lines", 0) for name in args.files}
        self.share = _AT_ONCE.get(model.device.type, _AT_ONCE["cuda"]) // len(args.files)
        self.saved = time.monotonic()

    def run(self) -> int:
        with _Stop() as stop:
            while not stop.signal:
                lines = {name: tail.read(max(256, self.share)) for name, tail in self.tails.items()}
                over = not any(lines.values()) and self._over()
                if over and not (self.args.once and self.args.state):  # it goes on here later
                    lines = {name: tail.rest() for name, tail in self.tails.items()}
                if any(lines.values()):
                    self._score(lines)
                if over:
                    break
                if time.monotonic() - self.saved >= self.args.save_every:
                    self._save()
                if not any(lines.values()):
                    time.sleep(_POLL)
            self._save()
            for tail in self.tails.values():
                tail.close()
            if stop.signal and self.args.state:
                say(self.errors, f"stopped; the same command goes on from {self.args.state}")
            return 128 + stop.signal if stop.signal else 0

    def _over(self) -> bool:
        return self.args.once or any(isinstance(tail, StandardInput) and tail.ended for tail in self.tails.values())

    def _score(self, lines: dict[str, list[bytes]]) -> None:
        texts = {name: [line.decode("utf-8", "replace") for line in some] for name, some in lines.items() if some}
        for name, scores in self.scorer.score_lines(texts).items():
            for score in scores:
                self._print(name, score)

    def _print(self, name: str, score: Any) -> None:
        args, quantile = self.args, self.quantiles[name]
        value = {"mean": score.nats_per_token, "total": score.nats, "peak": score.peak}[args.rank]
        threshold = quantile.value
        above = threshold is not None and value > threshold
        quantile.add(value)
        self.counts[name] += 1
        if args.only_marked and not above:
            return
        text = score.text.rstrip("\r\n")
        if args.json:
            result = {
                "file": name, "line": self.counts[name], "text": text, "tokens": score.tokens, "nats": score.nats,
                "nats_per_token": score.nats_per_token, "peak": score.peak, "threshold": threshold, "above": above,
            }  # fmt: skip
            if args.per_token:
                result["log_probs"] = (-score.surprises).tolist()
            print(json.dumps(result, ensure_ascii=False), flush=True)
            return
        named = [name] if len(args.files) > 1 else []
        numbers = f"{score.nats:.2f}", f"{score.nats_per_token:.3f}", f"{score.peak:.2f}"
        if self.console.is_terminal:
            columns = "  ".join((*named, f"{numbers[0]:>8}", f"{numbers[1]:>7}", f"{numbers[2]:>6}"))
            say(self.console, f"{'*' if above else ' '} {columns}  {printable(text)}", "bold red" if above else "")
        else:
            print("\t".join((*named, "*" if above else "", *numbers, printable(text))), flush=True)

    def _save(self) -> None:
        if self.args.state is None:
            return
        files = self.scorer.notes["files"]
        for name, tail in self.tails.items():
            files[name] = {
                "place": tail.place(), "lines": self.counts[name], "rank": self.args.rank,
                "values": self.quantiles[name].values,
            }  # fmt: skip
        self.scorer.save(self.args.state)
        self.saved = time.monotonic()


def follow(args: argparse.Namespace, model: Any, tokenizer: Any) -> int:
    return Follower(args, model, tokenizer).run()
