"""Links, file names, tests and commands in the documentation are there."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess

import pytest

from benchmarks.record import ROOT
from benchmarks.render import documents
from mambakit import cli

AT_THE_ROOT = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
DOCUMENTS = [*documents(), *AT_THE_ROOT, ROOT / "experiments" / "README.md"]
# Notes of what was tried are a record: their file names are those of their day.
TODAY = [path for path in DOCUMENTS if path.parent.name != "lab"]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FOLDERS = ("mambakit", "docs", "tests", "benchmarks", "examples", "experiments", "configs", ".ci")
INSIDE = ("ops", "modules", "models", "decoding", "generation", "serving", "training", "evaluation", "commands")


EXPERIMENTS = {
    name
    for file in ROOT.glob("experiments/*.py")
    for name in re.findall(r"^    (\w+):", file.read_text(encoding="utf-8"), re.MULTILINE)
}


def identify(path):
    return str(path.relative_to(ROOT))


def without_blocks(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=identify)
def test_links(path):
    for link in LINK.findall(without_blocks(path.read_text(encoding="utf-8"))):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def paths_of(text):
    """What stands in backticks and looks like a path of this repository, with the test's name behind `::`."""
    for code in CODE.findall(without_blocks(text)):
        name, _, test = code.partition("::")
        known = name.split("/")[0] in FOLDERS and "/" in name
        inside = name.split("/")[0] in INSIDE and re.search(r"\.(py|cu|cuh|cpp|h|md|toml)$|/$", name)
        if (known or inside) and re.fullmatch(r"[\w./*-]+", name):
            yield code, name if known else f"mambakit/{name}", test


@pytest.mark.parametrize("path", TODAY, ids=identify)
def test_file_names(path):
    for code, name, test in paths_of(path.read_text(encoding="utf-8")):
        found = list(ROOT.glob(name.rstrip("/")))
        assert found, f"{code} is not there"
        if test:
            assert f"def {test}(" in found[0].read_text(encoding="utf-8"), f"{code} is not there"


def test_what_looks_like_a_path():
    found = list(paths_of("`mambakit/no.py`, `ops/*/native.cpp`, `tests/a.py::test_b`, `rows/second`, `generation`"))
    assert [name for _, name, _ in found] == ["mambakit/no.py", "mambakit/ops/*/native.cpp", "tests/a.py"]


def test_documents_that_the_code_names():
    tracked = subprocess.run(
        ["git", "ls-files", "mambakit", "benchmarks", "experiments", "tests", "docs/*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.split():
        if (ROOT / name).is_file() and name.endswith((".py", ".cu", ".cuh", ".cpp", ".h")):
            for document in re.findall(r"\bdocs/[\w/-]+\.md", (ROOT / name).read_text(encoding="utf-8")):
                assert (ROOT / document).is_file(), f"{name} names {document}"


@pytest.mark.parametrize("path", [*TODAY, *sorted((ROOT / "examples").glob("*.py"))], ids=identify)
@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_imports_of_our_own(path):
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if path.suffix == ".md" else [text]
    for node in (node for block in blocks for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "mambakit":
            module = importlib.import_module(str(node.module))
            missing = [name.name for name in node.names if not hasattr(module, name.name)]
            assert not missing, f"{node.module} has no {missing}"


def commands_of(text):
    """Lines of `sh` blocks and spans in backticks that start with mambakit, and are no pattern of a command."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in joined(block)]
    for line in [*lines, *CODE.findall(without_blocks(text))]:
        for command in line.split(" && "):
            command = re.sub(r"^(\w+=\S+ )*(torchrun .*? -m )?", "", command)
            if command.startswith("mambakit ") and not re.search(r"\bCOMMAND\b|\.\.\.", command):
                yield command


def joined(block):
    return block.replace("\\\n", " ").splitlines()


def test_there_are_commands_to_check():
    found = [line for path in TODAY for line in commands_of(path.read_text(encoding="utf-8"))]
    assert len(found) > 30
    assert {line.split()[1] for line in found} >= {"generate", "serve", "train", "quantize", "env"}


@pytest.mark.parametrize("path", TODAY, ids=identify)
def test_commands_parse(path, capsys):
    for line in commands_of(path.read_text(encoding="utf-8")):
        arguments = shlex.split(line, comments=True)[1:]
        if len(arguments) == 1:
            assert arguments[0] in cli._parser().commands, f"{line}: there is no such command"
            continue
        code = 0
        try:
            cli._parse(arguments)
        except SystemExit as stop:
            code = stop.code
        assert code == 0, f"{line}: {capsys.readouterr().err}"


def test_options():
    """Options in backticks are of a command or of a script."""
    known = {option for command in cli._parser().commands.values() for option in command.option_names()}
    for script in [
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("experiments/*.py"),
        *ROOT.glob("mambakit/commands/*.py"),
        *ROOT.glob(".ci/*.py"),
    ]:
        known |= set(re.findall(r'"(--[\w-]+)"', script.read_text(encoding="utf-8")))
    known |= {"--version", "--help", "--config"}  # the last one is the evaluation harness's own
    for path in TODAY:
        text = without_blocks(path.read_text(encoding="utf-8"))
        if path.parent.name == "migration":  # the first column of a table is the other program's
            text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
        spans = CODE.findall(text)
        for option in re.findall(r"(?<!\S)--[\w-]+", " ".join(span for span in spans if span.startswith("--"))):
            settings = option[2:].replace("-", "_")  # experiments' flags are the fields of dataclasses
            assert option in known or settings in EXPERIMENTS, f"{path.name}: nothing has {option}"


SCRIPT = re.compile(r"python ((?:benchmarks|docs|examples)/\w+\.py)((?: +[^`\n#]*)?)")


@pytest.mark.parametrize("path", TODAY, ids=identify)
def test_scripts_and_their_options(path):
    for script, rest in SCRIPT.findall(path.read_text(encoding="utf-8")):
        assert (ROOT / script).is_file(), script
        text = (ROOT / script).read_text(encoding="utf-8")
        parts = re.findall(r"^    from benchmarks import (\w+)$", text, re.MULTILINE)  # which declare their own options
        text += "".join((ROOT / "benchmarks" / f"{part}.py").read_text(encoding="utf-8") for part in parts)
        declared = set(re.findall(r'"(--[\w-]+)"', text)) | ({"--json"} if "add_argument(parser)" in text else set())
        unknown = set(re.findall(r"(?<!\S)--[\w-]+", rest)) - declared
        assert not unknown, f"{script} has no {', '.join(sorted(unknown))}"


def test_pictures_are_drawn_and_shown():
    script = (ROOT / "docs" / "figures.py").read_text(encoding="utf-8")
    drawn = set(re.findall(r"^images/(\w+\.png)", script, re.MULTILINE))
    kept = {picture.name for picture in (ROOT / "docs" / "images").iterdir()}
    links = [link for path in DOCUMENTS for link in LINK.findall(path.read_text(encoding="utf-8"))]
    assert drawn == kept == {link.rsplit("/", 1)[1] for link in links if "images/" in link}
