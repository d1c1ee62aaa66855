"""Evaluation: minimal pairs, last words and bits per byte on local files, and the language model evaluation harness."""

from mambakit._versions import check_models

check_models()
