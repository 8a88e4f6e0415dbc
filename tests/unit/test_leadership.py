"""The rule of leading: by one's own clock, and by what Redis has said."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from ratelimit.controllermetrics import ControllerMetrics
from ratelimit.installation import Installation
from ratelimit.leadership import ASK_TIMEOUT_S, LEASE_S, MARGIN_S, RENEW_S, RETRY_S, Answer, Leadership, Standing

OURS = Installation("ours", Path("ours"))
HELD_S = LEASE_S - MARGIN_S


def test_nobody_leads_who_was_not_told_so() -> None:
    """Neither at first, nor by an answer that names another's term."""
    assert not Standing().leads(0.0)
    assert not Standing().after(Answer(7, is_ours=False), asked_s=0.0).leads(0.0)


def test_a_lease_counts_from_before_it_was_asked_for() -> None:
    """However late the answer comes, it ends by the clock of whoever asked, and before Redis ends it."""
    standing = Standing().after(Answer(3, is_ours=True), asked_s=100.0)

    assert standing.leads(100.0 + HELD_S - 0.001)
    assert not standing.leads(100.0 + HELD_S)


def test_a_refused_renewal_ends_the_term_at_once() -> None:
    """Whatever is left of the lease by the own clock."""
    standing = Standing().after(Answer(3, is_ours=True), asked_s=0.0).after(Answer(4, is_ours=False), asked_s=1.0)

    assert not standing.leads(1.0)
    assert standing.newest_term == 4


def test_a_candidate_goes_on_from_the_newest_term_that_it_has_heard_of() -> None:
    """Also over its own standing down, and over a Redis that knows of no term any more."""
    standing = Standing().after(Answer(9, is_ours=True), asked_s=0.0).stood_down()

    assert standing.after(Answer(0, is_ours=False), asked_s=1.0).newest_term == 9


def test_an_asking_never_outlasts_the_lease() -> None:
    """A leader that hears nothing knows by the end of its time; one that slept through it asks once more."""
    standing = Standing().after(Answer(1, is_ours=True), asked_s=0.0)

    assert standing.asking_timeout_s(HELD_S - 0.25) == 0.25
    assert standing.asking_timeout_s(0.0) == ASK_TIMEOUT_S
    assert standing.asking_timeout_s(HELD_S + 60.0) == ASK_TIMEOUT_S


def test_two_renewals_may_fail_before_a_term_ends() -> None:
    """One lost packet costs nobody the lead."""
    assert RENEW_S + ASK_TIMEOUT_S + RETRY_S + ASK_TIMEOUT_S <= HELD_S


class _Redis:
    """What ``lead.lua`` does, in seconds of true time; it may forget everything."""

    def __init__(self) -> None:
        self.lease: tuple[int, str] | None = None
        self.ends_s = 0.0
        self.newest = 0

    def ask(self, holder: str, term: int, heard: int, now_s: float) -> Answer:
        lease = self.lease if self.lease and now_s < self.ends_s else None
        if lease == (term, holder):
            self.ends_s = now_s + LEASE_S
            return Answer(term, is_ours=True)
        taken = lease is not None and lease[1] != holder
        if taken or term:
            return Answer(lease[0] if taken and lease else 0, is_ours=False)
        self.newest = max(self.newest, heard) + 1
        self.lease, self.ends_s = (self.newest, holder), now_s + LEASE_S
        return Answer(self.newest, is_ours=True)


_STEP = st.tuples(
    st.sampled_from(["a", "b", "c"]),
    st.floats(0.0, 3.0),  # until it asks
    st.floats(0.0, 2.0),  # until Redis hears of it
    st.floats(0.0, 8.0),  # until it hears of that: it may have been paused
    st.booleans(),  # it never does
)


@given(st.lists(_STEP, max_size=60))
def test_never_do_two_lead_at_once(steps: list[tuple[str, float, float, float, bool]]) -> None:
    """Whoever asks when, however long each way takes, and whatever is lost: by one true time, one leads at most."""
    redis, now_s = _Redis(), 0.0
    standings = {name: Standing() for name in "abc"}
    given_out: list[int] = []
    for name, wait_s, there_s, back_s, is_lost in steps:
        asked_s = now_s + wait_s
        standing = standings[name]
        answer = redis.ask(name, standing.term, standing.newest_term, asked_s + there_s)
        now_s = asked_s + there_s
        if answer.is_ours and answer.term != standing.term:
            given_out.append(answer.term)
        standings[name] = standing.stood_down() if is_lost else standing.after(answer, asked_s)
        assert sum(standing.leads(now_s) for standing in standings.values()) <= 1
        assert sum(standing.leads(now_s + back_s) for standing in standings.values()) <= 1
    assert given_out == sorted(set(given_out))


class _DeafScript:
    """Answers after a turn, also to a caller that was cancelled meanwhile: Redis traffic may swallow that."""

    def __init__(self, answers: list[object]) -> None:
        self.asked = asyncio.Event()
        self._answers = answers

    async def __call__(self, keys: list[str], args: list[object]) -> object:
        self.asked.set()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.05)
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


class _DeafRedis:
    def __init__(self, *scripts: _DeafScript) -> None:
        self._scripts = list(scripts)

    def register_script(self, _text: str) -> _DeafScript:
        return self._scripts.pop(0)


@pytest.mark.parametrize("is_ours", [0, 1])
async def test_a_candidate_that_is_stopped_does_not_lead(is_ours: int) -> None:
    """Though the cancellation is lost in the asking for the lease, which is granted then or by the next."""
    asking, giving_back = _DeafScript([[5, is_ours, b""], [6, 1, b""]]), _DeafScript([1])
    redis = cast("Redis", _DeafRedis(asking, giving_back))
    led: list[bool] = []

    async def work() -> None:
        led.append(True)
        await asyncio.Event().wait()

    task = asyncio.create_task(Leadership(redis, ControllerMetrics(), OURS).run(work))
    await asking.asked.wait()
    task.cancel()
    async with asyncio.timeout(10):
        await asyncio.wait((task,))

    assert led == []
    assert giving_back.asked.is_set() == bool(is_ours)


async def test_a_lease_that_is_lost_already_is_not_kept() -> None:
    """Nothing is asked of Redis before the work is laid down."""
    asking = _DeafScript([[6, 1, b""]])
    leadership = Leadership(cast("Redis", _DeafRedis(asking, _DeafScript([1]))), ControllerMetrics(), OURS)

    async with asyncio.timeout(10):
        await leadership._keep()

    assert not asking.asked.is_set()
