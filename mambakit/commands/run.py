"""Run code that imports mamba_ssm or causal_conv1d: what is missing of them is mambakit's."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path

from mambakit.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--override", action="store_true", help="mambakit's come first, whatever is installed or lies beside the script"
    )
    parser.add_argument("-m", dest="module", metavar="MODULE", help="a module to run, as `python -m` does")
    parser.add_argument("-c", dest="code", metavar="CODE", help="code to run, as `python -c` does")
    parser.add_argument(
        "script", nargs="?",
        help="a script to run, Python's or the shell's (*.sh); what follows it, the module or the code is for it",
    )  # fmt: skip


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The command line up to the program that `mambakit run` names, and the program's own arguments."""
    if argv[:1] != ["run"]:
        return argv, []
    for i, argument in enumerate(argv[1:], 1):
        if argument in ("-m", "-c"):
            return argv[: i + 2], argv[i + 2 :]
        if argument.startswith(("-m", "-c")) or not argument.startswith("-") or argument == "-":
            return argv[: i + 1], argv[i + 1 :]
    return argv, []


def run(args: argparse.Namespace) -> int:
    from mambakit.compat.children import environment

    if args.module is not None:
        command = ["-m", args.module]
    elif args.code is not None:
        command = ["-c", args.code]
    elif args.script is None:
        raise UsageError("run has nothing to run; name a script: mambakit run train.py, or mambakit run -m MODULE")
    elif args.script != "-" and not Path(args.script).exists():
        raise UsageError(f"there is no script {args.script!r}; {_where(args.script)}")
    elif args.script.endswith(".sh"):  # the processes of Python that it starts are given the modules
        shell = shutil.which("bash") or shutil.which("sh")
        if shell is None:
            raise UsageError(f"there is no shell for {args.script}; run the command of Python that it starts")
        return _become([shell, args.script, *args.program_arguments], environment(args.override, os.environ))
    else:
        command = [args.script]
    return _become([sys.executable, *command, *args.program_arguments], environment(args.override, os.environ))


def _where(name: str) -> str:
    """What to do about a script that is not there."""
    command = shutil.which(name)
    if command is None:
        return "for a module use mambakit run -m MODULE"
    return f"for the installed command, if it is one of Python's, use mambakit run {shlex.quote(command)}"


def _become(command: list[str], variables: dict[str, str]) -> int:
    """This process goes on as another: signals and the exit status are that program's."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.execve(command[0], command, variables)
    import subprocess

    return subprocess.run(command, env=variables).returncode
