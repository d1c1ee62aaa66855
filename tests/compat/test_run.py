"""`mambakit run`: scripts and modules as Python runs them, and the processes that they start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mambakit.commands.run import split
from mambakit.compat.children import environment

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import multiprocessing, subprocess, sys
import mamba_ssm

def child(queue):
    import causal_conv1d
    queue.put((mamba_ssm.__version__, causal_conv1d.__version__))

if __name__ == "__main__":
    print(sys.argv[1:], sys.path[0] == {folder!r}, __file__, mamba_ssm.__version__, "torch" in sys.modules)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print(queue.get())
    process.join()
    code = "import selective_scan_cuda, sitecustomize; print(selective_scan_cuda.fwd.__name__, sitecustomize.__file__)"
    print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    sys.exit(7)
"""


def run(folder: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")}
    variables = {**inherited, "PYTHONPATH": os.pathsep.join(filter(None, [path, str(ROOT)]))}
    command = [sys.executable, "-m", "mambakit", "run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=variables)


def test_a_script_and_its_children(tmp_path):
    """Arguments, paths and the exit status are the script's; an installation's own sitecustomize still runs."""
    (tmp_path / "train.py").write_text(SCRIPT.format(folder=str(tmp_path)))
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("import sys; sys.custom = True")
    done = run(tmp_path, "train.py", "--override", "-m", "x", path=str(own))
    first, second, third, *_ = done.stdout.splitlines()
    assert done.returncode == 7, done.stderr
    assert first.startswith("['--override', '-m', 'x'] True")
    assert first.endswith("train.py 1.2.2+mambakit False")
    assert second == "('1.2.2+mambakit', '1.5.2+mambakit')"
    assert third == f"scan_fwd {own / 'sitecustomize.py'}"


def test_the_path_of_modules_keeps_its_entries():
    """An empty one is the current folder: `export PYTHONPATH=$PYTHONPATH:tools` makes one."""
    missing, override = (environment(value, {})["PYTHONPATH"] for value in (False, True))
    assert [Path(place).name for place in (missing, override)] == ["missing", "override"]
    assert environment(False, {"PYTHONPATH": f"{override}{os.pathsep}{os.pathsep}tools"}) == {
        "PYTHONPATH": f"{missing}{os.pathsep}{os.pathsep}tools"
    }
    assert environment(False, {"PYTHONPATH": ""})["PYTHONPATH"] == missing


def test_a_module(tmp_path):
    (tmp_path / "package").mkdir()
    code = "import os, sys, mamba_ssm; print(sys.argv[1:], __package__, os.environ.get('GOMP_SPINCOUNT'))"
    (tmp_path / "package" / "__main__.py").write_text(code)
    done = run(tmp_path, "-m", "package", "--foo", "1")
    # Threads spin as the program's own Python has it.
    assert done.stdout == "['--foo', '1'] package None\n", done.stderr


def test_code(tmp_path):
    code = "import sys, mamba_ssm; print(sys.argv, sys.path[0] == '', mamba_ssm.__version__)"
    done = run(tmp_path, "--override", "-c", code, "-m", "1")
    assert done.stdout == "['-c', '-m', '1'] True 1.2.2+mambakit\n", done.stderr


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
def test_a_shell_script(tmp_path):
    """As repositories start their training; its arguments and exit status are its own."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.sh").write_text(
        f"set -e\n{sys.executable} -c 'import mamba_ssm; print(mamba_ssm.__version__)'\necho $0 $1\nexit 5\n"
    )
    done = run(tmp_path, "scripts/train.sh", "--override")
    assert (done.stdout, done.returncode) == ("1.2.2+mambakit\nscripts/train.sh --override\n", 5), done.stderr


def test_override(tmp_path):
    (tmp_path / "mamba_ssm.py").write_text("__version__ = 'vendored'")
    (tmp_path / "show.py").write_text("import mamba_ssm; print(mamba_ssm.__version__)")
    assert run(tmp_path, "show.py").stdout == "vendored\n"
    assert run(tmp_path, "--override", "show.py").stdout == "1.2.2+mambakit\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "run has nothing to run"), (("nothing.py",), "there is no script 'nothing.py'; for a module use"),
     (("ls", "-l"), "there is no script 'ls'; for the installed command"),
     (("--what", "x.py"), "unrecognized arguments: --what")],
)  # fmt: skip
def test_what_cannot_be_run(tmp_path, arguments, message):
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("given", "own"),
    [(["run", "a.py", "--debug", "run"], 2), (["run", "-m", "a", "-m"], 3), (["run", "-ma", "b"], 2),
     (["run", "-c", "print()", "-m"], 3),
     (["run", "--override", "-", "x"], 3), (["run", "--override"], 2), (["env", "--json"], 2), (["run", "-m"], 2)],
)  # fmt: skip
def test_whose_arguments_they_are(given, own):
    assert split(given) == (given[:own], given[own:])
