"""The package's own errors. A message names what is wrong, the value, and the remedy. Imports nothing.

Each is also the built-in exception that callers expect, so that ``except ValueError`` catches it.
"""

from __future__ import annotations


class MambakitError(Exception):
    """An error whose message is for the user: the command line prints it in one line."""


class UsageError(MambakitError, ValueError):
    """An option, a path or a device that cannot be used as given."""


class CheckpointError(MambakitError, ValueError):
    """A checkpoint's file that cannot be used; the message names the file, what is wrong in it, and the remedy."""


class RequirementError(MambakitError, ImportError):
    """A package that is missing, or installed in a release that does not do; the message is the command that helps."""


class LogitsError(MambakitError, RuntimeError):
    """The model's logits are NaN or infinite, because of its weights or of the dtype that it computes in."""


class ConstraintError(MambakitError, ValueError):
    """A schema, regular expression or grammar that compiles, and becomes too complex to follow within a text."""
