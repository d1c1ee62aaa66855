"""The CUDA kernels' parameter structures: a struct in a .cu or .cuh file, and the ctypes structure that mirrors it."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from mambakit.ops.decode import cuda_persistent
from mambakit.ops.selective_scan import cuda_forward, cuda_parameters

SCAN, DECODE = Path(cuda_parameters.__file__).parent, Path(cuda_persistent.__file__).parent
MIRRORS = {
    "ForwardParams": (SCAN / "forward.cuh", cuda_parameters.ForwardParams),
    "BackwardParams": (SCAN / "backward.cuh", cuda_parameters.BackwardParams),
    "ReduceParams": (SCAN / "backward.cuh", cuda_parameters.ReduceParams),
    "SequencesParams": (SCAN / "common.cuh", cuda_parameters.SequencesParams),
    "Params": (DECODE / "persistent.cu", cuda_persistent.Params),
}


def declared(source: str, name: str) -> list[tuple[str, type]]:
    """The fields of a struct, in order: pointers and 64-bit integers, the only kinds that kernels take."""
    (body,) = re.findall(rf"struct {name} \{{(.*?)\n\}};", source, re.DOTALL)
    fields: list[tuple[str, type]] = []
    for statement in re.sub(r"//.*", "", body).split(";")[:-1]:
        type_, names = re.fullmatch(r"\s*((?:const )?\w+)\s*(.*)", statement, re.DOTALL).groups()
        for declarator in names.split(","):
            field = declarator.strip()
            assert field.startswith("*") or type_ == "i64", f"{name}: {type_} {field} is neither a pointer nor an i64"
            fields.append((field.lstrip("* "), ctypes.c_void_p if field.startswith("*") else ctypes.c_int64))
    return fields


@pytest.mark.parametrize("name", MIRRORS)
def test_the_mirror_has_the_fields_of_the_struct(name):
    path, mirror = MIRRORS[name]
    assert [tuple(field) for field in mirror._fields_] == declared(path.read_text(), name)


def test_declarations_of_every_form_are_read():
    source = "struct P {  // why\n    const float *a, *b;\n    T* c;  // d;\n    i64 e, f;\n};\n"
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    assert declared(source, "P") == [("a", pointer), ("b", pointer), ("c", pointer), ("e", integer), ("f", integer)]
    with pytest.raises(AssertionError, match="int g is neither"):
        declared("struct P {\n    int g;\n};\n", "P")


def test_the_forward_scans_phases():
    (names,) = re.findall(r"enum Phase \{(.*?)\};", (SCAN / "forward.cuh").read_text())
    assert [phase.name for phase in cuda_forward.Phase] == names.replace(" ", "").split(",")
    assert [phase.value for phase in cuda_forward.Phase] == list(range(len(cuda_forward.Phase)))
