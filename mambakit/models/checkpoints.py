"""Checkpoint formats in and out."""

from __future__ import annotations


class CheckpointMixin:
    """from_pretrained and save_pretrained for every Mamba-1 checkpoint format."""
