"""Emergency overrides: limits that an operator sets or freezes for a while, whatever is derived."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from pathlib import Path

import msgspec

from ratelimit.publication import MOST_PER_MINUTE, LimitName, Publication
from ratelimit.statefile import StateFile

MOST_OVERRIDES = 1000
_ID_BYTES = 4


class OverrideError(ValueError):
    """An override that makes no sense; the message says what would."""


class FrozenLimit(msgspec.Struct, frozen=True):
    """A key's limit as it was when it was frozen."""

    model: str
    name: LimitName
    per_minute: int
    burst: int
    ceiling_per_minute: int = 0
    ceiling_burst: int = 0


class Override(msgspec.Struct, frozen=True):
    """One decision of an operator about the keys of one tier, in force before ``until`` (seconds since 1970).

    It sets one ``limit`` to ``per_minute`` (for ``concurrency``: requests in flight) on one model, or on all where
    ``model`` is None; nothing is borrowed beyond it. With ``limit`` None it freezes all the tier's limits at
    the values in ``frozen``.
    """

    tier: str
    model: str | None
    limit: LimitName | None
    per_minute: int | None
    until: float
    reason: str
    frozen: tuple[FrozenLimit, ...] = ()
    id: str = ""

    def freezes(self, model: str, name: LimitName) -> FrozenLimit | None:
        """The frozen value of one limit, where this override has one."""
        if self.limit is not None:
            return None
        return next((f for f in self.frozen if f.model == model and f.name == name), None)

    def sets(self, model: str, name: LimitName) -> int | None:
        """The value that one limit is set to, where this override sets it."""
        return self.per_minute if self.limit == name and self.model in (None, model) else None


def setting(
    tier: str, limit: LimitName, per_minute: int, until: float, reason: str, model: str | None = None
) -> Override:
    """An override that sets one limit of a tier. Raises ``OverrideError``."""
    if per_minute < 1:
        raise OverrideError(
            f"{limit} cannot be set to {per_minute}; the least is 1 (to shut a caller out, revoke its key)"
        )
    if per_minute > MOST_PER_MINUTE:
        raise OverrideError(
            f"{limit} cannot be set to {per_minute}; the largest that can be counted is {MOST_PER_MINUTE}"
        )
    return Override(tier, model, limit, per_minute, until, reason, id=_new_id())


def freezing(publication: Publication, tier: str, until: float, reason: str, model: str | None = None) -> Override:
    """An override that keeps a tier's limits as they are published now. Raises ``OverrideError``."""
    frozen = tuple(
        FrozenLimit(
            of_tier.model, limit.name, limit.per_minute, limit.burst, limit.ceiling_per_minute, limit.ceiling_burst
        )
        for of_tier in publication.tiers
        if of_tier.tier == tier and model in (None, of_tier.model)
        for limit in of_tier.limits
        if limit.per == "key"
    )
    if not frozen:
        known = sorted({of_tier.tier for of_tier in publication.tiers if of_tier.limits})
        raise OverrideError(
            f"tier {tier!r} has no published limits to freeze; tiers with limits: {', '.join(known) or 'none'}"
        )
    return Override(tier, model, None, None, until, reason, frozen, _new_id())


def active(overrides: Iterable[Override], now_s: float) -> tuple[Override, ...]:
    """The overrides still in force at ``now_s``; of two about the same limit, derivation takes the later one."""
    return tuple(override for override in overrides if now_s < override.until)


class OverrideFile:
    """The overrides of one installation, in ``overrides.json``. Every method may raise ``StateFileError``."""

    def __init__(self, state_dir: Path) -> None:
        self._file = StateFile(state_dir / "overrides.json", Override)

    def active(self, now_s: float) -> tuple[Override, ...]:
        """Those in force at ``now_s``, oldest first."""
        return active(self._file.read(), now_s)

    def add(self, override: Override, now_s: float) -> None:
        """Keep an override; those expired by ``now_s`` are dropped. Raises ``OverrideError``."""
        if override.until <= now_s:
            raise OverrideError("the override would have ended already; give it a time in the future")
        with self._file.changing() as overrides:
            overrides[:] = active(overrides, now_s)
            if len(overrides) >= MOST_OVERRIDES:
                raise OverrideError(f"there are {MOST_OVERRIDES} overrides already; remove some")
            overrides.append(override)

    def remove(self, override_id: str, now_s: float) -> Override:
        """End an override before its time. Raises ``OverrideError``."""
        with self._file.changing() as overrides:
            overrides[:] = active(overrides, now_s)
            found = next((override for override in overrides if override.id == override_id), None)
            if found is None:
                known = ", ".join(override.id for override in overrides) or "none"
                raise OverrideError(f"no override {override_id!r} is in force; there are: {known}")
            overrides.remove(found)
            return found


def _new_id() -> str:
    return "o_" + secrets.token_hex(_ID_BYTES)
