"""Shared pytest set-up: no CUDA test without a GPU, nothing reaches for the network, no thread spins for long."""

from __future__ import annotations

import importlib.util
import os
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from mambakit.threads import bound_spinning
from tests.requirements import needs_transformers

# A shell's background job ignores interrupts, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Before torch is imported: several workers and the processes that tests start share the processors.
bound_spinning()

import torch  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Where transformers is not installed, the files that need it are left out; CI runs the others so."""
    if collection_path.suffix != ".py" or importlib.util.find_spec("transformers") is not None:
        return None
    return needs_transformers(collection_path) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest) -> Iterator[object]:
    """Models that several tests share have the same weights whichever tests ran before them."""
    if fixturedef.scope != "function":
        torch.manual_seed(zlib.crc32(fixturedef.argname.encode()))
    return (yield)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The data that lies beside some checkouts, never in the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the data folder ../shared/data is not here")
    return folder
