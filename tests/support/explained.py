"""A printed explanation computed again: what someone with a calculator finds, from the words alone."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from ratelimit.explain import shown, shown_up
from ratelimit.publication import MOST_BURST, MOST_PER_MINUTE, Publication

_NUMBER = r"\d[\d,]*(?:\.\d+)?"


class Amount(NamedTuple):
    """A rate per minute (0 for requests in flight) and a burst."""

    per_minute: int
    burst: int


class Found(NamedTuple):
    """What an explanation comes to; ``ceiling`` where it has one."""

    amount: Amount
    ceiling: Amount | None


def check_explained(publication: Publication) -> None:
    """Every limit of a publication is what its explanation comes to, and bounds on a tier are of its keys' limits."""
    for tier in publication.tiers:
        keyed = {limit.name: Amount(limit.per_minute, limit.burst) for limit in tier.limits if limit.per == "key"}
        for limit in tier.limits:
            ceiling = Amount(limit.ceiling_per_minute, limit.ceiling_burst)
            found = recomputed(limit.explanation)
            assert found.amount == Amount(limit.per_minute, limit.burst), limit
            assert (found.ceiling or Amount(0, 0)) == ceiling, limit
            each = re.search(r"; of each: (.*) → ", limit.explanation)
            assert each is None or _amounts(each[1]).amount == keyed[limit.name], limit


def recomputed(explanation: str) -> Found:
    """The numbers of a limit, its supply line included. Fails where a printed step is wrong."""
    whole, cut, _ = explanation.partition("\ncut to ")
    overridden, _, without = whole.partition("\nwithout it: ")
    by_operator = re.match(
        r"(?:set to|set, with a burst of (\S+) s, to|frozen at) (.*?) by operator until ", overridden
    )
    if by_operator is None:
        found = _of_lines([line for line in whole.split("\n") if not line.startswith("nothing from ")])
    else:
        found = _amounts(by_operator[2])
        recomputed(without)
        assert by_operator[1] is None or found.amount.burst == shown(
            found.amount.per_minute * Fraction(by_operator[1]) / 60
        )
    return Found(_cut(found.amount), found.ceiling and _cut(found.ceiling)) if cut else found


def _cut(amount: Amount) -> Amount:
    most_at_once = MOST_BURST if amount.per_minute else MOST_PER_MINUTE
    return Amount(min(amount.per_minute, MOST_PER_MINUTE), min(amount.burst, most_at_once))


def _of_lines(lines: list[str]) -> Found:
    at = next((i for i, line in enumerate(lines) if line.startswith("all keys of ")), None)
    if at is None:
        return _derived(lines[:-1], lines[-1])
    said = lines[at].partition(" together: ")[2]
    if said.startswith("what one alone may take → "):
        return _amounts(said)
    added = re.fullmatch(rf"({_NUMBER}) × what each is assured.*; of each: (.*) → (.*)", said)
    if added is None:
        return Found(_rated(said, usable_requests_per_s(lines[:at])), None)
    keys, each = int(_value(added[1])), _amounts(added[2])
    found = Found(Amount(keys * each.amount.per_minute, keys * each.amount.burst), None)
    if each.ceiling is not None:
        found = Found(found.amount, _most(found.amount, each.ceiling))
    assert found == _amounts(added[3])
    if lines[at + 1 :]:
        without_bounds = lines[at + 1].removeprefix("that ceiling without bounds: ")
        assert _rated(without_bounds, usable_requests_per_s(lines[:at])) == each.ceiling
    return found


def _amounts(text: str) -> Found:
    """Amounts as they are printed: a rate and a burst, perhaps the ceiling's too, or requests in flight."""
    in_flight = re.search(rf"({_NUMBER}) in flight", text)
    if in_flight is not None:
        return Found(Amount(0, int(_value(in_flight[1]))), None)
    rates = re.findall(rf"({_NUMBER})/min, burst ({_NUMBER})", text)
    amount, *ceilings = (Amount(int(_value(rate)), int(_value(burst))) for rate, burst in rates)
    return Found(amount, ceilings[0] if ceilings else None)


def _most(one: Amount, other: Amount) -> Amount:
    return Amount(max(one.per_minute, other.per_minute), max(one.burst, other.burst))


def _derived(supply: list[str], last: str) -> Found:
    if last.startswith("ceiling, while others leave it idle: "):
        assured = supply.pop().removeprefix("assured: ")
        usable = usable_requests_per_s(supply)
        ceiling = _rated(last.partition(": ")[2], usable)
        amount = _rated(assured, usable)
        return Found(amount, _most(amount, ceiling))
    usable = usable_requests_per_s(supply)
    return Found(_in_flight(last, usable) if " in flight" in last else _rated(last, usable), None)


def usable_requests_per_s(lines: list[str]) -> Fraction:
    """The supply of a pool, less what is spare, trimmed."""
    text = re.sub(r"\([^()]*\)|\[[^]]*\]", "", lines[0])
    addends, result = text.split(" = ")
    addends, _, spare = addends.partition(" − ")
    total = sum((_addend(addend) for addend in addends.split(" + ")), Fraction(0))
    total -= _first_number(spare) if spare else 0
    assert total == _first_number(result)
    if len(lines) > 1:
        trim = re.fullmatch(
            rf"({_NUMBER}) requests/s × ({_NUMBER}) trim \(.*\) = ({_NUMBER}) usable requests/s", lines[1]
        )
        assert trim is not None, lines[1]
        assert _value(trim[1]) == total
        total *= _value(trim[2])
        assert total == _value(trim[3])
    return total


def _addend(text: str) -> Fraction:
    kind = re.match(rf"({_NUMBER}) × .* × ({_NUMBER}) requests/s", text)
    if kind is not None:
        return _value(kind[1]) * _value(kind[2])
    together = re.match(rf"({_NUMBER}) requests/s by ", text)
    assert together is not None, text
    return _value(together[1])


def _rated(text: str, usable: Fraction) -> Amount:
    formula, _, rest = text.partition(" → ")
    exact = _product(formula, usable)
    rounded, _, burst_text = rest.partition("; burst ")
    per_minute, exact = _bounded(rounded, shown(exact), exact)
    said = re.fullmatch(rf"({_NUMBER}): ({_NUMBER}) s of it, at least ({_NUMBER}) \(({_NUMBER}) mean .*", burst_text)
    assert said is not None, burst_text
    size = _factors(formula)[-2][1]
    big = shown_up(_value(said[4]) * size)
    burst = max(shown(exact * _value(said[2]) / 60), big)
    assert _value(said[1]) == burst
    assert _value(said[3]) == big
    return Amount(per_minute, burst)


def _in_flight(text: str, usable: Fraction) -> Amount:
    formula, _, rest = text.partition(" → ")
    least = re.match(rf"({_NUMBER}) in flight, at least ({_NUMBER}) \(a burst of requests\)", rest)
    assert least is not None, rest
    rounded = max(shown(_product(formula, usable)), int(_value(least[2])))
    assert _value(least[1]) == rounded
    in_flight, _ = _bounded(rest[least.end() :], rounded, Fraction(rounded))
    return Amount(0, in_flight)


def _bounded(text: str, rounded: int, exact: Fraction) -> tuple[int, Fraction]:
    """A rounded amount and its exact value within the tier's minimum and maximum, as far as they are printed."""
    least = re.search(rf"at least ({_NUMBER}) \(the tier's minimum(?:, ({_NUMBER}) of ({_NUMBER}))?\)", text)
    amount = rounded
    if least is not None:
        kept = Fraction(int(_value(least[1])))
        if least[2]:
            kept = _value(least[2]) * _value(least[3])
            assert shown(kept) == _value(least[1])
        amount, exact = max(amount, int(_value(least[1]))), max(exact, kept)
    most = re.search(rf"at most ({_NUMBER}) \(the tier's maximum\)", text)
    if most is not None:
        amount, exact = min(amount, int(_value(most[1]))), min(exact, _value(most[1]))
    return amount, exact


def _product(formula: str, usable: Fraction) -> Fraction:
    """A printed formula multiplied out; it starts from what is usable, or from what a minimum is worth."""
    start = _first_number(formula)
    minimum = re.search(r"for the tier's minimum \((\d+) active keys × ([\d,]+) \w+ ÷ ([\d.,]+) ÷ 60 s\)", formula)
    if minimum is None:
        assert start == usable
    else:
        keys, least, size = (_value(each) for each in minimum.groups())
        exact = keys * least / size / 60
        assert start <= exact < start * Fraction(10_011, 10_000)
    result = start
    for sign, factor in _factors(formula):
        result = result * factor if sign == "×" else result / factor
    return result


def _factors(formula: str) -> list[tuple[str, Fraction]]:
    plain = re.sub(r"\([^()]*\)", "", formula).split(" = ")[0]
    return [(sign, _value(number)) for sign, number in re.findall(rf"([×÷]) ({_NUMBER})", plain)]


def _first_number(text: str) -> Fraction:
    found = re.search(_NUMBER, text)
    assert found is not None, text
    return _value(found[0])


def _value(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))
