"""Checkpoints: their formats, reading, writing."""
