"""A release of torch or transformers outside the tested ones is one sentence at import; the caps are the same
everywhere."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest

from mambakit._versions import TESTED, check_models, check_ops
from mambakit.errors import RequirementError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _anew():
    """The second check is made once in a process."""
    check_models.cache_clear()
    yield
    check_models.cache_clear()


def installed(monkeypatch, **versions):
    def version(package: str) -> str:
        if versions.get(package) is None:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(metadata, "version", version)


def check_both() -> None:
    check_ops()
    check_models()


INSIDE = {"torch": "2.13.0+cpu", "transformers": "5.23.0"}


@pytest.mark.parametrize("versions", [
    INSIDE, {"torch": "2.9.0", "transformers": "5.17.0"}, {"torch": "2.13.9", "transformers": "5.24.7"},
    {"torch": "2.13.0a0+git12", "transformers": "5.17.0"}, {"torch": "nightly", "transformers": "5.24.0.dev0"},
])  # fmt: skip
def test_tested_releases_are_silent(monkeypatch, versions):
    installed(monkeypatch, **versions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_ops()
        check_models()


@pytest.mark.parametrize("versions", [
    {}, {"torch": "2.4.0"}, {"torch": "2.8.1", "transformers": "4.35.2"}, {"torch": "2.13.0", "transformers": "9.0"},
])  # fmt: skip
def test_ops_ask_for_torch_alone(monkeypatch, versions):
    installed(monkeypatch, **versions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_ops()


@pytest.mark.parametrize("version", ["2.3.1", "1.13.1+cu117", "2.3.0rc1"])
def test_an_older_torch_ends_the_import(monkeypatch, version):
    installed(monkeypatch, **{**INSIDE, "torch": version})
    with pytest.raises(
        ImportError, match=rf'^mambakit needs torch 2\.4 .*found {re.escape(version)}: pip install "torch>='
    ) as e:
        check_ops()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("package, version", [
    ("torch", "2.8.1"), ("torch", "2.8.0rc1"), ("transformers", "5.16.2"), ("transformers", "4.57.0"),
])  # fmt: skip
def test_the_models_ask_for_more(monkeypatch, package, version):
    installed(monkeypatch, **{**INSIDE, package: version})
    check_ops()
    with pytest.raises(
        RequirementError,
        match=rf'models.*need {package} .* or newer and found {re.escape(version)}: pip install "{package}>=',
    ) as e:
        check_models()
    assert "\n" not in str(e.value)


def test_without_transformers_the_error_names_the_extra(monkeypatch):
    installed(monkeypatch, torch="2.13.0")
    for _ in range(2):
        with pytest.raises(RequirementError, match=r'need transformers.*not installed: pip install "mambakit\[hf\]"$'):
            check_models()


@pytest.mark.parametrize(
    "package, version",
    [("torch", "2.99.0"), ("torch", "3.0.0.dev1"), ("transformers", "5.99.0"), ("transformers", "6.0.0")],
)
def test_a_newer_release_is_warned_of(monkeypatch, package, version):
    installed(monkeypatch, **{**INSIDE, package: version})
    with pytest.warns(
        UserWarning, match=f'was tested with {package} .* and found {re.escape(version)}.*: pip install "{package}<'
    ) as told:
        check_both()
    assert len(told) == 1


@pytest.mark.parametrize("statement, package, version, ends", [
    ("import mambakit", "torch", "1.0.0", True),
    ("import mambakit", "torch", "99.1.0", False),
    ("import mambakit", "transformers", "1.0.0", None),
    ("import mambakit.models.mamba", "transformers", "1.0.0", True),
    ("import mambakit.models.mamba", "transformers", "99.1.0", False),
    ("from mambakit import MambaConfig", "torch", "2.8.0", True),
    ("import mambakit; mambakit.register()", "transformers", "4.57.1", True),
])  # fmt: skip
def test_when_and_how_often_it_is_said(tmp_path, statement, package, version, ends):
    """By a fake distribution in front of the installed one; ``ends`` is None where nothing is to be said."""
    folder = tmp_path / f"{package}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {statement}; import mambakit.decoding"
    if ends is None:
        code = code.rpartition(";")[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode != 0) == bool(ends), done.stderr
    assert done.stderr.count(f"found {version}") == (ends is not None)


def test_pyproject_asks_for_the_same():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for layer, asked in (("ops", project["dependencies"]), ("models", project["optional-dependencies"]["hf"])):
        for package, (oldest, newest) in TESTED[layer].items():
            assert f"{package}>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}" in asked


def test_every_extra_that_runs_models_brings_transformers():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for name, asked in extras.items():
        alone = name in ("hf", "gpu", "docs")  # they run no model
        assert alone or any(re.match(r"mambakit\[[^]]*\bhf\b", each) for each in asked), name
