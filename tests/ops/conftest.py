"""Every test here runs once for each instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mambakit.ops._backends import native


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        isas = native.describe().get("supported") or []
        skip = pytest.mark.skip(reason="the native library is not built")
        metafunc.parametrize("isa", isas or [pytest.param(None, marks=skip)], indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native.use_isa(request.param)
    yield request.param
    native.use_isa(None)
