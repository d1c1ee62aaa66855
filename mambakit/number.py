"""Checks of numbers that a caller gives: converted to int or float, or refused by name. Imports no torch."""

from __future__ import annotations

import math
import numbers
import operator
import sys
from dataclasses import dataclass
from typing import Any

from mambakit.quoting import quoted

INT64 = (-(1 << 63), (1 << 63) - 1)
LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Number:
    """The type and range of one numeric argument.

    Attributes:
        default: the value that None stands for.
        low, high: its range, both included unless ``above`` excludes ``low``.
        whole: the number is an int, and a float without a fraction is accepted; else it is a float, and an int is
            accepted.
        remedy: added to the message about a value outside of the range.
    """

    default: float | int | None
    low: float
    high: float
    whole: bool = False
    above: bool = False
    remedy: str = ""

    def read(self, name: str, value: Any) -> Any:
        """``value`` as a Python int or float; the default for None.

        Args:
            name: of the argument, for errors.
            value: an int, a float, or a scalar of NumPy or torch.

        Raises:
            TypeError: it is not a number. A bool or a string of digits is not a number.
            ValueError: it is outside of the range, not finite, or has a fraction and ``whole`` is set.
        """
        if value is None:
            return self.default
        number = _plain(value)
        if number is None:
            raise TypeError(f"{name} is {quoted(value)}; it must be {self.kind}")
        if self.whole and isinstance(number, float) and not number.is_integer():
            raise ValueError(f"{name} is {quoted(value)}; it must be {self.kind}")
        if not self.low <= number <= self.high or (self.above and number == self.low):
            message = f"{name} is {quoted(value)}; it must be {self.kind}, {self.range}"
            raise ValueError(f"{message}; {self.remedy}" if self.remedy else message)
        return int(number) if self.whole else float(number) + 0.0  # -0.0 is 0.0

    @property
    def kind(self) -> str:
        return "a whole number" if self.whole else "a number"

    @property
    def range(self) -> str:
        low = f"above {self.low}" if self.above else f"at least {self.low}"
        return f"{low} and {'finite' if self.high == LARGEST else f'at most {self.high}'}"


SEED = Number(None, -(1 << 63), (1 << 64) - 1, whole=True)
"""A seed, as torch's generators accept it."""


def _plain(value: Any) -> int | float | None:
    """A Python number of the same value; None where ``value`` is not a number."""
    if isinstance(value, bool):
        return None
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    if isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:  # fractions may have any size
            return math.inf  # outside of every range, on either side
    if getattr(value, "ndim", None) != 0:  # an array of one number is not a number
        return None
    item = value.item()  # of NumPy or torch
    return item if isinstance(item, (int, float)) and not isinstance(item, bool) else None
