"""Numbers are rounded the way they are printed, and formulas print exactly what is multiplied."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.explain import (
    Factor,
    approximate,
    factor_value,
    factor_value_up,
    formula,
    number,
    product,
    shown,
    shown_up,
    timestamp,
)


@pytest.mark.parametrize(
    ("value", "printed"),
    [(14.2, "14.2"), (14.2999, "14.29"), (0.000123456, "0.0001234"), (123456, "123,400"), (26.0, "26"), (0, "0")],
)
def test_factors_are_cut_to_four_digits(value: float, printed: str) -> None:
    """A measured factor is cut, not rounded, to four significant digits and printed in full."""
    assert number(factor_value(value)) == printed


def test_factors_that_must_not_be_too_small_are_rounded_up() -> None:
    """The least size of a bucket is never below what it has to hold."""
    assert factor_value_up(3.59041) == Decimal("3.591")


@pytest.mark.parametrize(
    ("value", "down", "up"), [(13_345, 13_000, 14_000), (99, 99, 99), (101, 100, 110), (1_000, 1_000, 1_000), (7, 7, 7)]
)
def test_limits_have_two_significant_digits(value: int, down: int, up: int) -> None:
    """Shown limits keep two digits, downwards, or upwards for a least size."""
    assert (shown(Fraction(value)), shown_up(Fraction(value))) == (down, up)


def test_a_limit_is_at_least_one() -> None:
    """However small the computed value, the limit is not a closed door."""
    assert shown(Fraction(1, 1000)) == shown_up(Fraction(1, 1000)) == 1


@given(st.fractions(1, 10**12))
def test_rounding_brackets_the_value(value: Fraction) -> None:
    """Down is never above the value, up never below, and they are less than a tenth apart (or one)."""
    assert shown(value) <= value
    assert value <= shown_up(value)
    assert shown_up(value) - shown(value) <= max(Fraction(1), value / 10)


@given(st.fractions(1, 10**9), st.fractions(1, 10**9))
def test_rounding_keeps_order(one: Fraction, other: Fraction) -> None:
    """A larger value is never shown as the smaller."""
    smaller, larger = sorted([one, other])
    assert shown(smaller) <= shown(larger)


def test_products_are_exact() -> None:
    """Decimal factors multiply without binary rounding: 0.1 × 3 ÷ 0.3 is exactly 1."""
    factors = [Factor("×", Decimal(3), "parts"), Factor("÷", Decimal("0.3"), "s")]
    assert product(Decimal("0.1"), factors) == 1


def test_formula_prints_every_factor_and_the_result() -> None:
    """A formula reads from left to right with units, thousands separated, and ends in its value."""
    factors = [Factor("×", Decimal("0.6"), "tier share"), Factor("÷", Decimal(3), "active keys")]
    assert formula("28,400 tokens/s", factors, Fraction(5680)) == (
        "28,400 tokens/s × 0.6 tier share ÷ 3 active keys = 5,680"
    )


@pytest.mark.parametrize(
    ("value", "printed"),
    [(Fraction(40_039, 3), "13,346"), (Fraction(1, 3), "0.333"), (Fraction(199, 2), "99.5"), (Fraction(0), "0")],
)
def test_computed_values_are_cut(value: Fraction, printed: str) -> None:
    """Large results are whole numbers, small ones have three digits."""
    assert approximate(value) == printed


def test_times_are_utc_to_the_minute() -> None:
    """An override's end reads the same wherever the operator is."""
    assert timestamp(1_795_262_459.9) == "2026-11-21T12:00Z"
