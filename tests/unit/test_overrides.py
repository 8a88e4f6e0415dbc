"""Overrides say what they change, for how long, and are kept until then."""

from __future__ import annotations

from pathlib import Path

import pytest

from ratelimit.overrides import FrozenLimit, Override, OverrideError, OverrideFile, active, freezing, setting
from ratelimit.publication import Limit, Publication, TierLimits
from ratelimit.statefile import StateFileError

MODEL = "llama-3.1-8b"


def publication() -> Publication:
    limits = (
        Limit("requests", 600, 50, "x", ceiling_per_minute=900, ceiling_burst=70),
        Limit("concurrency", 0, 9, "x"),
        Limit("requests", 1200, 100, "x", per="tier"),
    )
    tiers = (
        TierLimits("pro", MODEL, 2, limits),
        TierLimits("pro", "other", 2, limits[:1]),
        TierLimits("free", MODEL, 1, ()),
    )
    return Publication(1, "now", "test", enforce=True, pools=(), tiers=tiers)


def test_setting_one_limit() -> None:
    """A set override speaks of one limit, on its model or on every one."""
    everywhere = setting("pro", "requests", 100, 50.0, "incident")
    assert everywhere.sets(MODEL, "requests") == everywhere.sets("other", "requests") == 100
    assert everywhere.sets(MODEL, "concurrency") is None
    assert everywhere.freezes(MODEL, "requests") is None
    one_model = setting("pro", "requests", 100, 50.0, "incident", model="other")
    assert (one_model.sets(MODEL, "requests"), one_model.sets("other", "requests")) == (None, 100)


def test_freezing_what_is_published() -> None:
    """A freeze holds rate, burst and ceiling of every limit a key of the tier has now; what follows from them does."""
    override = freezing(publication(), "pro", 50.0, "migration")
    assert override.freezes(MODEL, "requests") == FrozenLimit(MODEL, "requests", 600, 50, 900, 70)
    assert override.freezes(MODEL, "concurrency") == FrozenLimit(MODEL, "concurrency", 0, 9)
    assert override.freezes("other", "concurrency") is None
    assert len(override.frozen) == 3
    assert override.sets(MODEL, "requests") is None


def test_freezing_one_model() -> None:
    """A freeze can be kept to one model."""
    assert {frozen.model for frozen in freezing(publication(), "pro", 50.0, "x", model="other").frozen} == {"other"}


@pytest.mark.parametrize("tier", ["free", "nobody"])
def test_there_must_be_something_to_freeze(tier: str) -> None:
    """Freezing a tier without limits says which have some."""
    with pytest.raises(OverrideError, match=r"no published limits to freeze; tiers with limits: pro$"):
        freezing(publication(), tier, 50.0, "x")


@pytest.mark.parametrize("value", [0, -1])
def test_a_limit_cannot_be_set_to_nothing(value: int) -> None:
    """Shutting a caller out is not done by a limit, and the message says how it is."""
    with pytest.raises(OverrideError, match=r"the least is 1 .*revoke its key"):
        setting("pro", "requests", value, 50.0, "x")


def test_a_limit_cannot_be_set_beyond_what_is_counted() -> None:
    """A value that the meter could not count exactly is refused, and the largest it can is named."""
    with pytest.raises(OverrideError, match=f"the largest that can be counted is {2**53 - 1}"):
        setting("pro", "requests", 2**53, 50.0, "x")
    assert setting("pro", "requests", 2**53 - 1, 50.0, "x").per_minute == 2**53 - 1


def test_active_until_the_end() -> None:
    """An override is in force before its end and not at it."""
    overrides = [setting("pro", "requests", 1, until, "x") for until in (10.0, 20.0, 30.0)]
    assert active(overrides, 20.0) == (overrides[2],)


def test_file_keeps_overrides_in_order_and_drops_expired_ones(tmp_path: Path) -> None:
    """Another reader sees those in force, oldest first; adding one clears out the expired."""
    first, second, third = (setting("pro", "requests", 1, until, "x") for until in (10.0, 99.0, 99.0))
    overrides = OverrideFile(tmp_path)
    overrides.add(first, now_s=5.0)
    overrides.add(second, now_s=5.0)
    assert OverrideFile(tmp_path).active(9.0) == (first, second)
    assert OverrideFile(tmp_path).active(10.0) == (second,)
    overrides.add(third, now_s=11.0)
    assert first.id not in (tmp_path / "overrides.json").read_text()
    assert overrides.active(11.0) == (second, third)


def test_a_frozen_override_survives_the_file(tmp_path: Path) -> None:
    """A freeze reads back with all its values."""
    override = freezing(publication(), "pro", 50.0, "migration")
    OverrideFile(tmp_path).add(override, now_s=1.0)
    assert OverrideFile(tmp_path).active(1.0) == (override,)


def test_remove(tmp_path: Path) -> None:
    """An override can be ended early, once; a wrong id is answered with the right ones."""
    overrides = OverrideFile(tmp_path)
    override, other = (setting("pro", "requests", n, 50.0, "x") for n in (1, 2))
    overrides.add(override, now_s=1.0)
    overrides.add(other, now_s=1.0)
    assert overrides.remove(override.id, now_s=2.0) == override
    with pytest.raises(OverrideError, match=f"no override {override.id!r} is in force; there are: {other.id}"):
        overrides.remove(override.id, now_s=2.0)


def test_an_override_that_has_ended_is_refused(tmp_path: Path) -> None:
    """One that would never be in force is a slip."""
    with pytest.raises(OverrideError, match="in the future"):
        OverrideFile(tmp_path).add(Override("pro", None, "requests", 1, 5.0, "x"), now_s=5.0)


def test_a_damaged_file_is_reported(tmp_path: Path) -> None:
    """Overrides that cannot be read are not taken for none."""
    (tmp_path / "overrides.json").write_text("{")
    with pytest.raises(StateFileError, match=r"overrides\.json is damaged"):
        OverrideFile(tmp_path).active(0.0)
