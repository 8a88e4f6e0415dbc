"""How many keys of each tier share what it is assured on a model: those in use, learned from traffic. Pure.

A tier's share is divided by the keys that use it. A key is in use on a model for ``idle_s`` after each use there, and
for as long after it was made: whoever gets a key is about to use it. The count rises at once, for every key that is in
use must have its share and all shares together must not exceed the tier's; it falls when keys have been idle for that
time. Counts above ``EXACT_UP_TO`` are rounded up to a grid of some 3 %, and fall only when they are well below the next
lower one, so that limits do not follow every key that comes or goes. Rounded up, the shares add up to at most the
tier's, and the next newcomers are in the count already.

Everything is told as it happens: a use, an idle key, one that expires each take constant time. For each use there is
one entry of a dictionary and of a list, with objects that others hold too; so a million keys have room.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from heapq import heapify, heappop, heappush
from math import ceil

import msgspec

from ratelimit.keys import KeyRecord

IDLE_S = 900.0
EXACT_UP_TO = 32
#: Steps of the grid in each doubling of the count, and how far below a step the count must be for the next lower one.
_STEPS_PER_DOUBLING = 32
_FALL_MARGIN = 1.03
#: Keys are looked at for idleness once in so long at most.
_GRAIN_S = 5.0

#: The ends of keys that ended otherwise, or not yet, are kept up to this number beyond those in force.
_MOST_VOID_ENDS = 1000


class Owner(msgspec.Struct, frozen=True):
    """Whose a key is, when it was made, and when the last of its secrets ends (seconds since 1970; None: never)."""

    id: str
    tier: str
    created_at: float
    until: float | None


def owners(records: Iterable[KeyRecord]) -> dict[str, Owner]:
    """The keys of these records by id; one with several secrets is one key, as the last to end has it."""
    found: dict[str, Owner] = {}
    for record in records:
        ends = [each for each in (record.expires_at, record.revoked_at) if each is not None]
        until = min(ends) if ends else None
        known = found.get(record.id)
        if known is None or _later(until, known.until):
            created_at = known.created_at if known else record.created_at
            found[record.id] = Owner(record.id, record.tier, created_at, until)
    return found


def _later(one: float | None, other: float | None) -> bool:
    return other is not None and (one is None or one > other)


class _Uses:
    """The uses of one model: by key the last one, and by time the keys to be looked at, both in grains of time."""

    def __init__(self) -> None:
        self.last: dict[str, int] = {}
        self.wheel: dict[int, list[str]] = defaultdict(list)


class ActiveKeys:
    """The keys in use by tier and model, ``idle_s`` after their last use. Times are seconds of one clock."""

    def __init__(self, idle_s: float = IDLE_S) -> None:
        self._idle_s = idle_s
        self._owners: dict[str, Owner] = {}
        self._models: tuple[str, ...] = ()
        self._uses: dict[str, _Uses] = defaultdict(_Uses)
        self._grains: dict[int, int] = {}
        self._swept = 0
        self._ends: list[tuple[float, str]] = []
        self._exact: Counter[tuple[str, str]] = Counter()
        self._shown: dict[tuple[str, str], int] = {}

    def adopt(self, known: Mapping[str, Owner], models: Iterable[str], now_s: float) -> None:
        """Have exactly these keys; the new ones that were made lately are in use on every one of the models.

        Where nothing is new of a key it costs a comparison.
        """
        changed = [owner for key_id, owner in known.items() if self._owners.get(key_id) != owner]
        came = sum(owner.id not in self._owners for owner in changed)
        if len(known) < len(self._owners) + came:
            for key_id in self._owners.keys() - known.keys():
                self._forget(key_id)
                del self._owners[key_id]
        for owner in changed:
            self._take_up(owner)
        if len(self._ends) > 2 * len(self._owners) + _MOST_VOID_ENDS:
            self._ends = [(owner.until, owner.id) for owner in self._owners.values() if owner.until is not None]
            heapify(self._ends)
        before, self._models = self._models, tuple(models)
        for owner in changed if before == self._models else self._owners.values():
            if now_s - owner.created_at < self._idle_s:
                for model in self._models:
                    self.used(owner.id, model, owner.created_at)

    def _take_up(self, owner: Owner) -> None:
        before = self._owners.get(owner.id)
        if before is not None and before.tier != owner.tier:
            self._forget(owner.id)
        self._owners[owner.id] = owner
        if owner.until is not None:
            heappush(self._ends, (owner.until, owner.id))

    def used(self, key_id: str, model: str, at_s: float) -> None:
        """A key was used on a model; one that is not known, or has ended, is left out."""
        owner = self._owners.get(key_id)
        if owner is None or (owner.until is not None and owner.until <= at_s):
            return
        uses, grain = self._uses[model], self._grain(at_s)
        before = uses.last.get(key_id)
        if before is None:
            self._exact[owner.tier, model] += 1
            uses.wheel[grain].append(owner.id)
            uses.last[owner.id] = grain
        elif grain > before:
            uses.last[key_id] = grain

    def counts(self, now_s: float) -> dict[tuple[str, str], int]:
        """By tier and model, the number to divide the tier's share by."""
        self._end_keys(now_s)
        self._sweep(now_s)
        self._shown = {
            pair: shown_count(self._shown.get(pair, 0), exact) for pair, exact in self._exact.items() if exact
        }
        return dict(self._shown)

    def _end_keys(self, now_s: float) -> None:
        while self._ends and self._ends[0][0] <= now_s:
            until, key_id = heappop(self._ends)
            owner = self._owners.get(key_id)
            if owner is not None and owner.until == until:
                self._forget(key_id)

    def _sweep(self, now_s: float) -> None:
        """Look at the uses whose time may be over; those repeated since wait for their new time."""
        idle_since = self._grain(now_s - self._idle_s)
        if idle_since <= self._swept:
            return
        self._swept = idle_since
        self._grains = {grain: grain for grain in self._grains if grain >= idle_since}
        for model, uses in self._uses.items():
            for grain in [grain for grain in uses.wheel if grain < idle_since]:
                for key_id in uses.wheel.pop(grain):
                    last = uses.last.get(key_id)
                    if last is None:
                        continue
                    if last < idle_since:
                        self._drop(key_id, model)
                    else:
                        uses.wheel[last].append(key_id)

    def _forget(self, key_id: str) -> None:
        for model, uses in self._uses.items():
            if key_id in uses.last:
                self._drop(key_id, model)

    def _drop(self, key_id: str, model: str) -> None:
        del self._uses[model].last[key_id]
        self._exact[self._owners[key_id].tier, model] -= 1

    def _grain(self, at_s: float) -> int:
        """The grain of a time: one object for all uses in it."""
        grain = int(at_s // _GRAIN_S)
        return self._grains.setdefault(grain, grain)


def shown_count(before: int, exact: int) -> int:
    """The count to go by: up at once, to the next step of the grid, and down when it is clearly below."""
    step = _grid(exact)
    if step >= before:
        return step
    return min(before, _grid(ceil(exact * _FALL_MARGIN))) if exact > EXACT_UP_TO else step


def _grid(count: int) -> int:
    """The smallest step that is not below the count."""
    if count <= EXACT_UP_TO:
        return count
    step = 1 << max(0, (count - 1).bit_length() - _STEPS_PER_DOUBLING.bit_length())
    return ceil(count / step) * step
