from __future__ import annotations

from ratelimit.supervisor.backoff import LONGEST_DELAY_S, STEADY_AFTER_S, Backoff


def test_a_process_that_never_failed_may_start_at_once() -> None:
    """No delay is due before the first failure."""
    assert Backoff().may_start(0.0)


def test_delays_double_with_each_quick_failure_up_to_the_longest() -> None:
    """The n-th failure in a row waits 2^(n-1) s, and never longer than the bound."""
    backoff = Backoff()
    now_s = 0.0
    for expected_s in [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, LONGEST_DELAY_S, LONGEST_DELAY_S]:
        backoff.started(now_s)
        backoff.failed(now_s)

        assert not backoff.may_start(now_s + expected_s - 0.001)
        assert backoff.may_start(now_s + expected_s)

        now_s += expected_s


def test_a_failure_after_steady_running_starts_over() -> None:
    """A crash once a day is restarted after a second, however many there were before."""
    backoff = Backoff()
    for _ in range(6):
        backoff.started(0.0)
        backoff.failed(0.0)
    backoff.started(0.0)
    backoff.failed(STEADY_AFTER_S)

    assert backoff.may_start(STEADY_AFTER_S)
