"""Fixtures of the decoding tests."""

from __future__ import annotations

import pytest

from tests.decoding.eager_graph import WAYS, decode_by


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Each way in which rows decode."""
    decode_by(request.param, monkeypatch)
    return request.param
