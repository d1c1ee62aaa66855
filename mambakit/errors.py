"""The package's own errors: each says what is wrong, the value, and the remedy. Imports nothing.

They are also the built-in exceptions that callers expect, so that ``except ValueError`` goes on working.
"""

from __future__ import annotations


class MambakitError(Exception):
    """Any error that mambakit raises with a message for the user; the command line prints it in one line."""


class UsageError(MambakitError, ValueError):
    """Something that was asked for cannot be done as it was asked: an option, a path, a device."""


class CheckpointError(MambakitError, ValueError):
    """A checkpoint's file that cannot be used as it is; the message names the file, what is wrong in it, and the remedy."""


class LogitsError(MambakitError, RuntimeError):
    """The model's logits are NaN or infinite: its weights, or the dtype that it computes in, are to blame."""
