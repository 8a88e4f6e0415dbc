"""Numbers that explain themselves: a limit is computed from the very factors that are printed.

Measured factors are first rounded down to four significant digits, and only what is printed is multiplied, exactly.
Whoever multiplies the printed factors by hand therefore finds the enforced number.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import ROUND_DOWN, ROUND_UP, Decimal
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor
from typing import Literal, NamedTuple

FACTOR_DIGITS = 4
SHOWN_DIGITS = 2

#: Results below this are printed with decimals, the others as whole numbers.
_WHOLE_FROM = 100


class Factor(NamedTuple):
    """One factor of a limit: how it enters, its exact printed value, and what it is."""

    sign: Literal["×", "÷"]
    value: Decimal
    what: str


def factor_value(value: float) -> Decimal:
    """A measured value as it is printed: rounded down to four significant digits."""
    return _round(Decimal(str(value)), FACTOR_DIGITS, ROUND_DOWN)


def factor_down(value: Fraction) -> Decimal:
    """As ``factor_value``, of an exact value; never above it."""
    unit = Fraction(10) ** (_magnitude(value) - FACTOR_DIGITS + 1) if value else Fraction(1)
    cut = floor(value / unit) * unit
    return Decimal(cut.numerator) / Decimal(cut.denominator)


def factor_value_up(value: float) -> Decimal:
    """As ``factor_value``, for what must not come out too small."""
    return _round(Decimal(str(value)), FACTOR_DIGITS, ROUND_UP)


def product(start: Decimal, factors: Sequence[Factor]) -> Fraction:
    """``start`` times (or divided by) every factor, exactly."""
    numerator, denominator = start.as_integer_ratio()
    for factor in factors:
        above, below = factor.value.as_integer_ratio()
        if factor.sign == "÷":
            above, below = below, above
        numerator, denominator = numerator * above, denominator * below
    return Fraction(numerator, denominator)


def shown(value: Fraction) -> int:
    """Rounded down to two significant digits, but at least 1: a limit of 0 would be a closed door."""
    whole = max(1, value.numerator // value.denominator)
    unit = _shown_unit(whole)
    return whole // unit * unit


def shown_up(value: Fraction) -> int:
    """Rounded up to two significant digits, and at least 1: for the least size a bucket must have."""
    whole = max(1, ceil(value))
    unit = _shown_unit(whole)
    return -(-whole // unit) * unit


@lru_cache(maxsize=4096)
def number(value: Decimal | float) -> str:
    """The value in full, with thousands separated and no trailing zeros."""
    exact = value if isinstance(value, Decimal) else Decimal(str(value))
    return f"{exact.normalize():,f}"


def formula(start: str, factors: Sequence[Factor], result: Fraction) -> str:
    """``start × factor … = result``; the result is cut, not rounded, like the number that follows from it."""
    parts = [start, *(f"{f.sign} {number(f.value)} {f.what}" for f in factors)]
    return f"{' '.join(parts)} = {approximate(result)}"


def approximate(value: Fraction) -> str:
    """A computed value cut to whole numbers, or to three significant digits where it is small."""
    whole = value.numerator // value.denominator  # floor() of a fraction takes several times as long
    if whole >= _WHOLE_FROM:
        return f"{whole:,}"
    return number(_round(Decimal(value.numerator) / Decimal(value.denominator), 3, ROUND_DOWN))


def timestamp(epoch_s: float) -> str:
    """Seconds since 1970 as UTC to the minute: ``2026-11-21T12:00Z``."""
    return datetime.fromtimestamp(epoch_s, UTC).strftime("%Y-%m-%dT%H:%MZ")


def _magnitude(value: Fraction) -> int:
    """The power of ten of the first digit of a positive value."""
    guess = len(str(value.numerator)) - len(str(value.denominator))
    return guess if Fraction(10) ** guess <= value else guess - 1


def _shown_unit(whole: int) -> int:
    return int(10 ** max(0, len(str(whole)) - SHOWN_DIGITS))


def _round(value: Decimal, digits: int, rounding: str) -> Decimal:
    if value == 0:
        return Decimal(0)
    return value.quantize(Decimal(1).scaleb(value.adjusted() - digits + 1), rounding=rounding)
