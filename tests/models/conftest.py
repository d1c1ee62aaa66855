"""Fixtures of the model tests."""

from __future__ import annotations

import pytest

from tests.models.eager_graph import WAYS, decode_by


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Each way in which rows decode."""
    decode_by(request.param, monkeypatch)
    return request.param
