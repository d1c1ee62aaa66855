"""The command line: a table of commands. Each command's module is imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from mambakit.threads import bound_spinning

# name -> one line of help. The module is mambakit.commands.<name>; it imports torch only when it runs.
COMMANDS = {
    "generate": "write text that continues a prompt",
    "score": "log-likelihood, perplexity and bits per character of text files",
    "serve": "serve a model over HTTP (OpenAI's completions API), on any number of GPUs",
    "train": "train or fine-tune a model on your own text, DNA or sound",
    "evaluate": "BLiMP, LAMBADA, bits per byte, and the lm-evaluation-harness",
    "info": "what a checkpoint is, from its headers alone",
    "convert": "rewrite a checkpoint in another format",
    "quantize": "rewrite a checkpoint with int8, int4 or losslessly packed weights",
    "env": "versions, devices, and what serves each op",
}


def _parser() -> argparse.ArgumentParser:
    from mambakit import __version__

    parser = argparse.ArgumentParser(
        prog="mambakit", description="Run, train and score Mamba (selective state space) models."
    )
    parser.add_argument("--version", action="version", version=f"mambakit {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"mambakit.commands.{name}")
        sub = subparsers.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command. 0: done; 2: a mistake in what was asked, told in one line; 130: interrupted."""
    bound_spinning()  # before torch is loaded: the commands load it
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ArithmeticError, NotImplementedError) as error:
        if args.debug:
            raise
        print(f"mambakit {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
