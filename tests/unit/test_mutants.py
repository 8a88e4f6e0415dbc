"""The list of mutants is up to date."""

from __future__ import annotations

import pytest

from tests.mutants.__main__ import ROOT, mutants
from tests.mutants.mutant import Mutant


@pytest.mark.parametrize("mutant", mutants(), ids=lambda mutant: f"{mutant.file}: {mutant.rule}")
def test_what_a_mutant_breaks_is_there(mutant: Mutant) -> None:
    """The text is found once, and the test that must fail exists."""
    text = (ROOT / mutant.file).read_text("utf-8")
    assert mutant.broken(text) != text
    file, *_, test = mutant.test.partition("[")[0].split("::")
    assert f"def {test}(" in (ROOT / file).read_text("utf-8")


@pytest.mark.parametrize("where", ["ratelimit/scripts", "ratelimit/"])
def test_every_rule_is_broken_in_both_languages(where: str) -> None:
    """Rules 1 to 7 of the meter and 1 to 5 of a reservation's life have a mutant in Lua and in Python."""
    broken = {m.rule.partition(":")[0] for m in mutants() if ("/scripts/" in m.file) is (where == "ratelimit/scripts")}
    assert broken == {*(f"meter {number}" for number in range(1, 8)), *(f"cell {number}" for number in range(1, 6))}


def test_a_mutant_that_is_out_of_date_is_told() -> None:
    """Text that is not there, or is there twice, cannot be broken."""
    mutant = Mutant("a rule", "a file", "x", "y", "a test")
    for text in ("", "x x"):
        with pytest.raises(ValueError, match="times, not once"):
            mutant.broken(text)
