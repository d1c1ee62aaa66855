"""Prefill, decoding and the choice of tokens for many texts at once: the layer between `modules` and `models`."""

from mambakit._versions import check_models

check_models()
