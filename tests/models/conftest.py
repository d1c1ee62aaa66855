"""Fixtures of the model tests."""

from tests.decoding.conftest import way  # noqa: F401
