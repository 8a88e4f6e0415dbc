"""Watches what the replicas do of their measured supply, window by window, and keeps each pool's trim.

The factors are kept in the state folder: a controller that starts anew would otherwise promise again at once what its
predecessor has seen to be missed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from ratelimit.feedback import Feedback, after
from ratelimit.groupsupply import GroupSupply, Trim
from ratelimit.policy import PoolPolicy, Promise
from ratelimit.poolsignals import pool_signals
from ratelimit.statefile import StateFile, StateFileError
from serving.signals import Activity, Counters, between

log = logging.getLogger(__name__)

WINDOW_S = 15.0


class PoolFeedback(msgspec.Struct, frozen=True):
    """What is known of one pool's supply, and the requests/s (by profile and slowdown) that it is measured by."""

    model: str
    knees: dict[str, float] = {}
    feedback: Feedback = Feedback()


class LiveFeedback:
    """The trims of all pools. The times handed in are of one steady clock, that of the counters."""

    def __init__(self, state_dir: Path) -> None:
        self._file = StateFile(state_dir / "feedback.json", PoolFeedback)
        self._known = self._kept()
        self._window: Mapping[str, Counters] = {}
        self._began_s = float("-inf")

    def trims(self) -> dict[str, Trim]:
        """What is in force of each pool's supply, where that is not all."""
        trimmed = [known for known in self._known.values() if known.feedback.factor < 1]
        return {known.model: Trim(known.feedback.factor, known.feedback.reason) for known in trimmed}

    def look(
        self,
        pools: Sequence[PoolPolicy],
        supplies: Mapping[str, Sequence[GroupSupply]],
        counters: Mapping[str, Counters],
        now_s: float,
    ) -> None:
        """Judge the window that has ended, if one has."""
        if now_s - self._began_s < WINDOW_S:
            return
        done = {
            url: activity
            for url, reading in counters.items()
            if (last := self._window.get(url)) and (activity := between(last, reading))
        }
        self._window, self._began_s = counters, now_s
        fresh = {pool.model: self._known.get(pool.model, PoolFeedback(pool.model)) for pool in pools}
        before = _factors(self._known)
        self._known = {pool.model: _judged(fresh[pool.model], pool, supplies[pool.model], done) for pool in pools}
        if _factors(self._known) != before:
            self._save()

    def _kept(self) -> dict[str, PoolFeedback]:
        """What the controller before knew; nothing, which is said, where that cannot be read."""
        try:
            return {known.model: known for known in self._file.read()}
        except StateFileError as error:
            log.error("supplies begin untrimmed: %s", error)
            return {}

    def _save(self) -> None:
        """A failure is logged: the trims hold while this controller lives, and are written with the next change."""
        try:
            with self._file.changing() as kept:
                kept[:] = self._known.values()
        except (StateFileError, OSError) as error:
            log.error("the trims of supplies are in force but not on disk: %s", error)


def _judged(
    known: PoolFeedback, pool: PoolPolicy, groups: Sequence[GroupSupply], done: Mapping[str, Activity]
) -> PoolFeedback:
    own = Promise(pool.mix, pool.slo)
    knees = {_kind(group): float(group.rates[own]) for group in groups if own in group.rates}
    if any(known.knees.get(kind, rate) != rate for kind, rate in knees.items()):
        known = PoolFeedback(known.model)  # what was seen was seen of another measurement
    feedback = after(known.feedback, pool_signals(own, groups, done))
    if feedback.factor != known.feedback.factor:
        log.warning(
            "%s: supply is trimmed to %g of what was measured: %s", known.model, feedback.factor, feedback.reason
        )
    return PoolFeedback(known.model, knees or known.knees, feedback)


def _kind(group: GroupSupply) -> str:
    return f"{group.profile} at 1:{group.slowdown:g}"


def _factors(known: Mapping[str, PoolFeedback]) -> dict[str, float]:
    return {model: pool.feedback.factor for model, pool in known.items()}
