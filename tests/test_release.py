"""What a release says of itself: one version everywhere, a citation, a changelog; and the check of wheels."""

from __future__ import annotations

import importlib.util
import re
import shutil
import struct
import subprocess
import sys
import venv
import zipfile
from typing import Any

import pytest
import yaml

import mambakit
from benchmarks.record import ROOT
from mambakit.ops._backends import native


def load(name: str) -> Any:
    """A program of .ci as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


release, wheels = load("release"), load("wheels")


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


def test_a_wheel_is_tried_beside_packages_and_not_beside_an_editable_install(tmp_path):
    theirs, own = tmp_path / "site-packages", tmp_path / "venv"
    theirs.mkdir()
    (theirs / "needed.py").write_text("", encoding="utf-8")
    # What an editable install leaves: a line that puts a finder before every folder.
    (theirs / "_editable.pth").write_text("import sys; sys.editable = True\n", encoding="utf-8")
    venv.create(own, with_pip=False)
    (packages,) = own.glob("lib/python*/site-packages")
    release.see_packages(packages, [str(tmp_path), str(theirs)])
    code = "import sys, needed; print(hasattr(sys, 'editable'))"
    done = subprocess.run([own / "bin" / "python", "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


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


def test_the_check_of_libraries_knows_every_instruction_set():
    source = (ROOT / ".ci" / "check_library.cpp").read_text(encoding="utf-8")
    (table,) = re.findall(r"kSets\[\] = \{(.*?)\};", source, re.DOTALL)
    expected = [(isa, native.EXTENDS.get(isa, isa)) for isa in native.INSTRUCTION_SETS]
    assert re.findall(r'\{"(\w+)", "(\w+)"\}', table) == expected


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_check_of_libraries_checks_what_runs_here(tmp_path):
    program = tmp_path / "check"
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-Werror", str(ROOT / ".ci" / "check_library.cpp"), "-o", str(program), "-ldl"],
        check=True,
    )
    done = subprocess.run([program, native.describe()["path"]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(\w+): ok", done.stdout, re.MULTILINE) == native.supported()
    missing = subprocess.run([program, str(tmp_path / "none.so")], capture_output=True, text=True)
    assert missing.returncode == 1
    assert "none.so cannot be loaded" in missing.stderr


def test_a_windows_library_has_no_time():
    header, optional, place = 0x78, 240, 0x400
    library = bytearray(0x600)
    struct.pack_into("<I", library, 0x3C, header)
    library[header : header + 4] = b"PE\0\0"
    struct.pack_into("<HIIIH", library, header + 6, 1, 0x12345678, 0, 0, optional)  # one section, the time, ...
    struct.pack_into("<II", library, header + 24 + 112 + 48, 0x1010, 28)  # the debug directory, in memory
    struct.pack_into("<IIII", library, header + 24 + optional + 8, 0x200, 0x1000, 0x200, place)  # its section
    struct.pack_into("<II12xII", library, place + 0x10, 0, 0x12345678, 0x1100, 0x500)  # its time; where RSDS is
    library[0x500:0x518] = b"RSDS" + bytes(range(1, 17)) + b"name"
    other = bytearray(library)
    struct.pack_into("<I", other, header + 8, 1)
    struct.pack_into("<I", other, place + 0x14, 1)
    other[0x504:0x514] = bytes(16)
    clean = wheels.without_time(bytes(library))
    assert clean == wheels.without_time(bytes(other)) != bytes(library)
    assert clean[0x514:0x518] == b"name"
    with pytest.raises(SystemExit, match="no PE header"):
        wheels.without_time(bytes(0x600))
