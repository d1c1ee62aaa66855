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

from mambakit._versions import TESTED, check_versions

ROOT = Path(__file__).parents[1]


def installed(monkeypatch, **versions):
    def version(package: str) -> str:
        if versions.get(package) is None:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(metadata, "version", version)


INSIDE = {"torch": "2.13.0+cpu", "transformers": "5.23.0"}


@pytest.mark.parametrize("versions", [
    INSIDE, {"torch": "2.9.0", "transformers": "5.17.0"}, {"torch": "2.13.9", "transformers": "5.24.7"},
    {"torch": "2.13.0a0+git12"},
    {}, {"torch": "nightly", "transformers": "5.24.0.dev0"},
])  # fmt: skip
def test_tested_releases_are_silent(monkeypatch, versions):
    installed(monkeypatch, **versions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_versions()


@pytest.mark.parametrize("package, version", [
    ("torch", "2.8.1"), ("torch", "1.13.1+cu117"), ("torch", "2.8.0rc1"), ("transformers", "5.16.2"),
    ("transformers", "4.57.0"),
])  # fmt: skip
def test_an_older_release_ends_the_import(monkeypatch, package, version):
    installed(monkeypatch, **{**INSIDE, package: version})
    with pytest.raises(
        ImportError, match=rf"needs {package} .* or newer and found {re.escape(version)}: pip install '{package}>="
    ) as e:
        check_versions()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "package, version",
    [("torch", "2.99.0"), ("torch", "3.0.0.dev1"), ("transformers", "5.99.0"), ("transformers", "6.0.0")],
)
def test_a_newer_release_is_warned_of(monkeypatch, package, version):
    installed(monkeypatch, **{**INSIDE, package: version})
    with pytest.warns(
        UserWarning, match=f"was tested with {package} .* and found {re.escape(version)}.*: pip install '{package}<"
    ) as told:
        check_versions()
    assert len(told) == 1


def test_at_import_and_once(tmp_path):
    """By a fake distribution in front of the installed one."""
    for version, ends in (("99.1.0", False), ("1.0.0", True)):
        folder = tmp_path / version / f"transformers-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n")
        code = (
            f"import sys; sys.path.insert(0, {str(tmp_path / version)!r}); import mambakit; import mambakit.ops; "
            "assert 'torch' not in dir()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert (done.returncode != 0) == ends, done.stderr
        assert done.stderr.count(f"found {version}") == 1


def test_pyproject_asks_for_the_same():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package, (oldest, newest) in TESTED.items():
        wanted = f'"{package}>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"'
        assert wanted in text, wanted
