"""Talk with a model in the terminal. Its state is kept at every turn, so that no turn is read twice; /help lists what
else can be typed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mambakit.commands.chat_model import Answerer, LocalModel, Plain, RemoteModel
from mambakit.commands.conversation import Conversation, Turn
from mambakit.commands.loading import add_model_arguments
from mambakit.commands.options import LARGEST_SEED, check_output_file, integer, real, text
from mambakit.errors import UsageError
from mambakit.output import printable, say, terminal
from mambakit.quoting import brief

_STATES = ".safetensors"
_SETTINGS: dict[str, Any] = {
    "temperature": real(0, 2),
    "top_k": integer(0),
    "top_p": real(0, 1, above=True),
    "min_p": real(0, 1),
    "repetition_penalty": real(0, above=True),
    "max_new_tokens": integer(1),
    "seed": integer(0, LARGEST_SEED),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--server", metavar="URL", help="talk with the model of this server instead")
    parser.add_argument("--api-key", metavar="KEY", help="the server's key (default: $MAMBAKIT_API_KEY)")
    parser.add_argument("--system", metavar="TEXT", help="what is said before the first turn")
    parser.add_argument("--load", metavar="FILE", help="go on with a chat that /save wrote")
    parser.add_argument(
        "--plain", action="store_true", help="turns as plain text, also where the model has a chat template"
    )
    parser.add_argument("--labels", nargs=2, metavar=("YOU", "MODEL"), help="of plain turns (default: User Assistant)")
    parser.add_argument("--temperature", type=_SETTINGS["temperature"], default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=_SETTINGS["top_k"], default=0, help="among the k likeliest (default: off)")
    parser.add_argument(
        "--top-p", type=_SETTINGS["top_p"], default=0.95, help="among the likeliest that make up p (default 0.95)"
    )
    parser.add_argument("--min-p", type=_SETTINGS["min_p"], default=0.0, help="at least this share of the likeliest")
    parser.add_argument(
        "--repetition-penalty", type=_SETTINGS["repetition_penalty"], default=1.0, help="above 1 discourages repetition"
    )
    parser.add_argument("--max-new-tokens", type=_SETTINGS["max_new_tokens"], default=512, help="(default 512)")
    parser.add_argument("--seed", type=_SETTINGS["seed"], help="the same seed and words, the same replies")
    parser.add_argument(
        "--stop", type=text, action="append", default=[], metavar="TEXT", help="end replies before this"
    )


def run(args: argparse.Namespace) -> int:
    plain = Plain(*args.labels) if args.labels else Plain() if args.plain else None
    if args.server is not None and (args.model or args.device or args.dtype):
        raise UsageError("--server has its own model; drop --model, --device and --dtype")
    if args.load is not None and args.system:
        raise UsageError("--system begins a chat, and --load goes on with one; drop one")
    answerer: Answerer
    answerer = LocalModel(args, plain) if args.server is None else RemoteModel(args.server, args.api_key, plain)
    chat = Chat(answerer, {name: getattr(args, name) for name in _SETTINGS} | {"stop": list(args.stop)})
    if args.system:
        chat.conversation.add("system", args.system)
    if args.load is not None:
        chat.load(args.load)
    chat.run(_lines(chat))
    return 0


def _lines(chat: Chat) -> Iterator[str]:
    """What is typed, or piped: a line that ends in a backslash goes on in the next."""
    asked = sys.stdin.isatty()
    if asked:
        import importlib.util

        if importlib.util.find_spec("readline") is not None:  # arrow keys and the history of lines
            importlib.import_module("readline")
        chat.tell(f"{chat.answerer.name}. /help lists commands; Ctrl-C stops a reply, Ctrl-D ends.")
    parts: list[str] = []
    while True:
        try:
            line = input(("... " if parts else "> ") if asked else "")
        except EOFError:
            if asked:
                print()
            return
        except KeyboardInterrupt:
            print()
            parts = []
            continue
        if line.endswith("\\"):
            parts.append(line[:-1])
            continue
        yield "\n".join([*parts, line])
        parts = []


class Chat:
    """The loop: a line is a command or something said."""

    def __init__(self, answerer: Answerer, sampling: dict[str, Any]):
        self.answerer, self.sampling = answerer, sampling
        self.conversation = Conversation()
        self.console = terminal(stderr=True)
        self._commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/help": ("this list", lambda _: self._help()),
            "/history": ("what was said on the way here", lambda _: self._history()),
            "/again": ("another reply to your last words; the first stays as a fork", lambda _: self._again()),
            "/back": ("[N or NAME] before your last N exchanges (1), or to a fork", self._back),
            "/fork": ("[NAME] give this place a name, to come back to", self._fork),
            "/forks": ("the names", lambda _: self._forks()),
            "/save": ("FILE.json: the chat, and its state beside it", self._save),
            "/load": ("FILE.json: go on with a chat", self.load),
            "/system": ("TEXT: begin a new chat with it", self._system),
            "/new": ("begin a new chat", lambda _: self._begin("")),
            "/state": ("what is kept of this turn", lambda _: self._state()),
            "/set": ("NAME VALUE: a setting, as temperature 0.5; without: all of them", self._set),
        }

    def run(self, lines: Iterator[str]) -> None:
        for line in lines:
            if not line.strip():
                continue
            try:
                if line.startswith("/") and not line.startswith("//"):
                    name, _, rest = line.strip().partition(" ")
                    if name in ("/exit", "/quit"):
                        return
                    self._command(name, rest.strip())
                else:
                    self._say(line.removeprefix("/") if line.startswith("//") else line)
            except (ValueError, OSError) as error:  # of a command or a request; the chat goes on
                self.tell(f"error: {error}")

    def tell(self, message: str) -> None:
        say(self.console, message, "dim")

    def _command(self, name: str, rest: str) -> None:
        if name not in self._commands:
            raise UsageError(
                f"there is no command {brief(name)}; /help lists them (//... says a line that begins with /)"
            )
        self._commands[name][1](rest)

    # -- talking

    def _say(self, words: str) -> None:
        before = self.conversation.current
        self.conversation.add("user", words)
        try:
            self._answer()
        except BaseException:
            turn = self.conversation.current
            assert turn.parent is not None
            turn.parent.children.remove(turn)
            self.conversation.current = before
            raise

    def _answer(self) -> None:
        asked = self.conversation.current
        turn = self.conversation.add("assistant", "")
        began = time.perf_counter()
        pieces, begun = 0, False
        try:
            for piece in self.answerer.reply(turn, self.sampling):
                shown = piece if begun else piece.lstrip()  # a reply's first blanks belong to the form of the turn
                begun = begun or bool(shown)
                print(_harmless(shown), end="", flush=True)
                pieces += 1
        except KeyboardInterrupt:
            self.tell(" (stopped)")
        except BaseException:
            asked.children.remove(turn)
            self.conversation.current = asked
            print(flush=True)
            raise
        print(flush=True)
        if self.console.is_terminal:
            read = "" if self.answerer.reading is None else f"{self.answerer.reading:,} tokens read, "
            self.tell(f"{read}{pieces / max(1e-9, time.perf_counter() - began):.1f} pieces a second")

    def _again(self) -> None:
        turn = self.conversation.current
        if turn.role != "assistant" or turn.parent is None:
            raise UsageError("there is no reply here; say something first")
        self.conversation.current = turn.parent
        try:
            self._answer()
        except BaseException:
            self.conversation.current = turn
            raise

    # -- places

    def _back(self, where: str) -> None:
        self._show_place(self.conversation.back(where))

    def _show_place(self, turn: Turn) -> None:
        self.tell(f"after: {brief(turn.text.strip(), 70)}" if turn.parent else "at the beginning")

    def _fork(self, name: str) -> None:
        name = self.conversation.fork(name)
        self.tell(f"this place is {name}; /back {name} returns to it")

    def _forks(self) -> None:
        for name, turn in self.conversation.forks.items():
            self.tell(f"{name}: {len(turn.path())} turns, {brief(turn.text.strip(), 60)}")
        if not self.conversation.forks:
            self.tell("none; /fork NAME makes one")

    def _history(self) -> None:
        for turn in self.conversation.current.path():
            print(f"{turn.role}: {_harmless(turn.text.strip())}")

    def _system(self, words: str) -> None:
        if not words:
            raise UsageError("/system has no text; give it some, or /new")
        self._begin(words)

    def _begin(self, system: str) -> None:
        self.conversation = Conversation()
        if system:
            self.conversation.add("system", system)

    # -- files

    def _save(self, file: str) -> None:
        if not file:
            raise UsageError("/save has no file; give it a name, as /save talk.json")
        check_output_file("/save", file)
        if Path(file).suffix == _STATES:
            raise UsageError(f"/save {file}: states have such names, beside their chats; name the chat's file .json")
        turn = self.conversation.current
        kept = self.answerer.save(turn, _beside(file))
        self.conversation.save(file, self.answerer.name, kept)
        self.tell(f"{file} written" + (f", and the state in {_beside(file)}" if kept is not None else ""))

    def load(self, file: str) -> None:
        """Go on with a saved chat; where its state does not fit this model, its words are read again."""
        if not file:
            raise UsageError("/load has no file; give the name of one that /save wrote")
        found = Conversation.load(file)
        self.conversation = found
        if found.kept is not None and found.current.role == "assistant":
            try:
                self.answerer.load(found.current, _beside(file), found.kept)
            except (ValueError, OSError) as error:
                self.tell(f"without its state: {error}")
        self._show_place(found.current)

    def _state(self) -> None:
        self.tell(self.answerer.describe(self.conversation.current))

    # -- settings

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        name = name.replace("-", "_")
        if not name:
            self.tell(", ".join(f"{key} {value}" for key, value in self.sampling.items()))
            return
        if name not in _SETTINGS:
            raise UsageError(f"there is no setting {brief(name)}; there are {', '.join(_SETTINGS)}")
        kind = _SETTINGS[name]
        try:
            number = kind(value.strip())
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{name}: {error}") from error
        kind.check(name, number)
        self.sampling[name] = number

    def _help(self) -> None:
        for name, (about, _) in self._commands.items():
            self.tell(f"{name:9} {about}")
        self.tell("/exit      end (or Ctrl-D); a line that ends in \\ goes on in the next")


def _beside(file: str) -> str:
    """The file of a chat's state: another for each name of a chat."""
    return file + _STATES


def _harmless(text: str) -> str:
    """What a model writes cannot move the cursor."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
