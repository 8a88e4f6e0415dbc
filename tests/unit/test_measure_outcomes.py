from __future__ import annotations

import msgspec
import pytest

from serving.capacity import Slo
from serving.measured_knees import infeasible, is_fitted
from serving.outcomes import (
    Load,
    RequestOutcome,
    Window,
    busy_s,
    most_in_flight,
    output_slices,
    slo_load,
    spells,
    summary,
    watched,
)
from serving.records import PointRun, Record

WINDOW = Window(0.0, 10.0)
#: Sent late by half a second; first token after 1 s, the other nine within 3 s more.
LATE = RequestOutcome(1.0, 1.5, 2.0, 5.0, input_tokens=100, output_tokens=10)


def test_latencies_count_from_when_a_request_was_due() -> None:
    """A late client hides nothing."""
    assert (LATE.lag_s, LATE.ttft_s, LATE.e2e_s) == (0.5, 1.0, 4.0)
    assert LATE.tpot_s == pytest.approx(3.0 / 9)
    assert slo_load([LATE], Slo(ttft_s=0.5, tpot_s=1.0)) == 2.0


@pytest.mark.parametrize(
    ("window", "inputs", "outputs"),
    [((0, 10), 100, 10), ((0, 2), 100, 0), ((2, 5), 0, 10), ((3.5, 9), 0, 5), ((6, 9), 0, 0)],
)
def test_tokens_count_by_the_share_of_their_time_watched(
    window: tuple[float, float], inputs: int, outputs: int
) -> None:
    """Prompts between sending and first token, output after it."""
    point = summary(Load("x", 1.0), [LATE], Window(*window), 7.0, 0.0)
    assert (point.input_tokens, point.output_tokens, point.steps) == (inputs, outputs, 7.0)


def test_a_request_belongs_to_the_window_in_which_it_was_due() -> None:
    """Whenever it was answered."""
    assert watched([LATE], Window(0.5, 1.2)) == [LATE]
    assert watched([LATE], Window(1.2, 9)) == []


def test_work_is_what_was_in_flight_less_the_way_of_each_spell() -> None:
    """Requests that overlap are one spell, and a spell shorter than its way is no work."""
    runs = [RequestOutcome(s, s, s + 0.1, s + 2, 10, 10) for s in (0.0, 1.0, 5.0)]
    blink = RequestOutcome(9.0, 9.0, 9.01, 9.02, 10, 1)

    assert spells([*runs, blink], WINDOW) == [Window(0, 3), Window(5, 7), Window(9.0, 9.02)]
    assert busy_s([*runs, blink], WINDOW, 0.5) == pytest.approx(2.5 + 1.5)
    assert most_in_flight(runs) == 2


def test_steps_are_reckoned_where_the_engine_does_not_count_them() -> None:
    """The time in which it worked, over the time between two tokens."""
    steady = [RequestOutcome(k / 10, k / 10, k / 10 + 0.05, k / 10 + 1.0, 10, 20) for k in range(100)]
    point = summary(Load("x", 10.0), steady, WINDOW, None, 0.0)

    assert point.steps == pytest.approx(10.0 / (0.95 / 19), rel=0.01)
    assert sum(output_slices(steady, WINDOW, 20)) / 20 == pytest.approx(point.output_tokens / 10, rel=0.01)


def test_runs_of_short_spells_are_not_fitted() -> None:
    """The time unseen at their edges would weigh too much; nor are runs that were not steady."""
    alone = [RequestOutcome(k, k, k + 0.1, k + 0.9, 10, 100) for k in range(10)]

    def fitted(steps: float, state: str = "steady") -> bool:
        run = PointRun(summary(Load("x", 1.0), alone, WINDOW, steps, 0.0), "steady", "", tuple(alone), (0.0, 10.0), 0.0)
        return is_fitted(Record("open", "x", 1.0, msgspec.structs.replace(run, state=state)))

    assert fitted(1000)
    assert not fitted(100)
    assert not fitted(1000, "over-saturated")


@pytest.mark.parametrize(("slow", "impossible"), [(0, False), (1, False), (4, False), (6, True), (10, True)])
def test_one_hiccup_of_a_lone_request_does_not_make_an_slo_infeasible(slow: int, impossible: bool) -> None:
    """Of the ten requests of an anchor, most must miss the bound before the search is given up."""
    firsts = [0.5 if k < slow else 0.05 for k in range(10)]
    alone = [RequestOutcome(k, k, k + first, k + 0.9, 10, 100) for k, first in enumerate(firsts)]
    run = PointRun(summary(Load("x", 1.0), alone, WINDOW, 900, 0.0), "steady", "", tuple(alone), (0.0, 10.0), 0.0)

    found = infeasible(Record("anchor", "x", 1.0, run), Slo(ttft_s=0.1, tpot_s=1.0))
    assert bool(found) is impossible
    assert ("p50 TTFT of a lone request is 500 ms" in found) is impossible
