"""Prefill, decoding and the choice of tokens for many texts at once: the layer between `modules` and `models`."""
