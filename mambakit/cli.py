"""The command line: a table of commands, the parser made from it, and exit statuses."""

from __future__ import annotations

import difflib
import gc
import importlib
import io
import os
import sys
from typing import Any, NoReturn

from mambakit.commands.options import Parser
from mambakit.commands.run import split
from mambakit.errors import MambakitError
from mambakit.output import error_line
from mambakit.threads import bound_spinning

# name -> one line of help. The module is mambakit.commands.<name>; it imports torch only when it runs.
COMMANDS = {
    "generate": "write text that continues a prompt",
    "chat": "talk with a model in the terminal",
    "score": "log-likelihood, perplexity and bits per character of text files",
    "serve": "serve a model over HTTP (OpenAI's completions API), on any number of GPUs",
    "train": "train or fine-tune a model on your own text, DNA or sound",
    "plan": "what a shape takes on a device: memory, tokens a second, a recipe",
    "evaluate": "BLiMP, LAMBADA, bits per byte, and the lm-evaluation-harness",
    "inspect": "what a model does with a text: surprise, step sizes, memory, implicit attention, as a page",
    "info": "what a checkpoint is, from its headers alone",
    "convert": "rewrite a checkpoint in another format",
    "quantize": "rewrite a checkpoint with int8, int4, fp8 or losslessly packed weights",
    "export": "write a model for another runtime: ONNX, PyTorch's pt2, or C++ (AOTInductor)",
    "run": "run a script that needs mamba_ssm or causal_conv1d, neither of which need be installed",
    "env": "versions, devices, and what serves each op",
}
# Errors that the user can correct end with status 2, all others with 1.
_MISTAKES = (MambakitError, ValueError, TypeError, OSError, ArithmeticError, NotImplementedError)


def _parser() -> Parser:
    from mambakit import __version__

    parser = Parser(prog="mambakit", description="Run, train and score Mamba (selective state space) models.")
    parser.add_argument("--version", action="version", version=f"mambakit {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"mambakit.commands.{name}")
        sub = parser.commands[name] = subparsers.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def _parse(argv: list[str]) -> Any:
    argv, of_program = split(argv)
    parser = _parser()
    commands = parser.commands
    before = next((i for i, a in enumerate(argv) if a in commands), len(argv))
    for argument in argv[:before]:
        if argument.startswith("-") and argument.partition("=")[0] not in (*parser.option_names(), "-h", "--"):
            _misplaced(parser, argument.partition("=")[0])
    word = next((a for a in argv if not a.startswith("-")), "")
    near = difflib.get_close_matches(word, commands, 1)
    if word and word not in commands and near:
        parser.error(f"there is no command {word!r}; did you mean {near[0]!r}?")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.parser.unknown(unknown)
    args.program_arguments = of_program
    return args


def _misplaced(parser: Parser, option: str) -> NoReturn:
    """Refuse an option that stands before the command, and name the command that has it."""
    known = {option: name for name, command in reversed(parser.commands.items()) for option in command.option_names()}
    near = difflib.get_close_matches(option, known, 1)
    if near:
        name = known[near[0]]
        parser.commands[name].error(f"unrecognized arguments: {option}; did you mean `mambakit {name} {near[0]} ...`?")
    parser.error(f"unrecognized arguments: {option}; options come after the command")


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 done, 2 an error that the user can correct, 1 any other error, 130 interrupted. An error is
        printed in one line.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    command = next((a for a in argv if a in COMMANDS), None)
    if command != "run":  # whose process is the user's program
        bound_spinning()  # before torch is loaded: the commands load it
    name, debug = f"mambakit {command}" if command else "mambakit", "--debug" in argv
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the encoding lacks is printed escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = _parse(argv)
        name, debug = args.parser.prog, hasattr(args, "debug")
        code = args.run(args)
        sys.stdout.flush()
        gc.freeze()  # else the interpreter looks at every object before it ends: 0.4 s
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader (head, less) has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        print(f"{name}: error: {error_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, _MISTAKES) else 1


if __name__ == "__main__":
    sys.exit(main())
