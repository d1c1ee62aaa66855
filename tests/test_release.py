"""What a release says of itself: one version everywhere, a citation, a changelog; and the check of wheels."""

from __future__ import annotations

import importlib.util
import zipfile

import pytest
import yaml

import mambakit
from benchmarks.record import ROOT

spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
release = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release)


def test_one_version():
    assert set(release.versions().values()) == {mambakit.__version__}
    release.check_versions(mambakit.__version__)
    with pytest.raises(SystemExit, match=r"not 9.9.9: pyproject.toml says"):
        release.check_versions("9.9.9")


def test_the_citation():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["cff-version"] == "1.2.0"
    assert {"title", "message", "authors", "version", "license"} <= found.keys()
    assert all("name" in author or "family-names" in author for author in found["authors"])


def wheel(folder, names):
    path = folder / "mambakit-1.0.0-py3-none-win_amd64.whl"
    with zipfile.ZipFile(path, "w") as opened:
        for name in names:
            opened.writestr(name, "Version: 1.0.0\n")
    return path


def test_what_a_wheel_must_hold(tmp_path, capsys):
    whole = [
        "mambakit/ops/_backends/libmambakit_native.dll", "mambakit/assets/books/model.safetensors",
        "mambakit/py.typed", "mambakit-1.0.0.dist-info/METADATA",
    ]  # fmt: skip
    release.check_wheel(wheel(tmp_path, whole), "1.0.0")
    assert "4 files" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="missing .*libmambakit_native.dll"):
        release.check_wheel(wheel(tmp_path, whole[1:]), "1.0.0")
    with pytest.raises(SystemExit, match=r"not wanted .*tests/a.py"):
        release.check_wheel(wheel(tmp_path, [*whole, "tests/a.py"]), "1.0.0")
