"""What a measurement found, from its recorded runs: verdicts of rates, figures with intervals, and the knee. Pure.

The knee of a mix is the largest rate tried that met the SLO below every rate that missed it. How sure it is, a
bootstrap says: each replicate draws the requests of every rate anew, in batches, and finds where the load (the SLO's
percentile over its bound) crosses 1 between two rates; below an over-saturated rate, which has no load, anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from serving.capacity import Slo
from serving.intervals import (
    BATCHES,
    REPLICATES,
    Interval,
    interval,
    mean_interval,
    middle_interval,
    percentile_of,
    resampled,
)
from serving.outcomes import RequestOutcome, Window, output_slices, slo_load, spells, watched
from serving.records import Record
from serving.search import Tried, bracket, contradictions
from serving.stepsim import percentile

#: A fit takes a run as a sum of steps. At the edges of each spell of work there is time that nobody sees, so a spell
#: must last for many steps.
LEAST_SPELL_STEPS = 20
#: A lone request is judged by its median at most: of the few that an anchor has, a higher percentile is one hiccup.
_ALONE_PERCENTILE = 50.0


class PointReport(msgspec.Struct, frozen=True):
    """One run as people read it; latencies in seconds at the SLO's percentile, ``goodput`` the share that met both."""

    kind: str
    mix: str
    level: float
    state: str
    why: str
    requests: int
    output_per_s: Interval
    ttft_s: Interval
    tpot_s: Interval
    slo_load: float
    goodput: float
    lag_p99_s: float
    fitted: bool


class KneeReport(msgspec.Struct, frozen=True):
    """The knee of one mix in requests a second, where the load crosses its bound, or why there is none."""

    mix: str
    requests_per_s: float | None
    missed_per_s: float | None
    crossing_per_s: Interval | None
    reason: str


def is_met(record: Record, slo: Slo) -> bool:
    """Whether a run was steady and met the SLO."""
    return record.run.state == "steady" and load_of(record, slo) <= 1


def load_of(record: Record, slo: Slo) -> float:
    """The run's percentiles over their bounds; infinite for one that was not steady."""
    due = due_in(record)
    return slo_load(due, slo) if record.run.state == "steady" and due else float("inf")


def due_in(record: Record) -> list[RequestOutcome]:
    """The requests that were due while the run was watched."""
    return watched(record.run.outcomes, Window(*record.run.window_s))


def is_fitted(record: Record) -> bool:
    """Whether a run can be fitted: steady, and its engine worked for many steps on end."""
    count = len(spells(record.run.outcomes, Window(*record.run.window_s)))
    steps = record.run.point.steps or 0.0
    return record.run.state == "steady" and steps >= LEAST_SPELL_STEPS * count > 0


def verdicts(records: Sequence[Record], mix: str, slo: Slo) -> list[Tried]:
    """What the open loops of a mix say of their rates, in order; the last run at a rate decides."""
    last = {record.level: record for record in records if record.kind == "open" and record.mix == mix}
    return [Tried(rate, is_met(record, slo)) for rate, record in last.items()]


def infeasible(anchor: Record, slo: Slo) -> str:
    """Why no load meets the SLO, where most requests already miss it alone; empty otherwise.

    Where only the long ones do, the search finds that out from the many requests of its runs.
    """
    due, percent = due_in(anchor), min(slo.percentile, _ALONE_PERCENTILE)
    ttft_s = percentile([o.ttft_s for o in due], percent)
    tpot_s = percentile([o.tpot_s for o in due if o.output_tokens > 1], percent)
    for name, seen_s, bound_s in (("TTFT", ttft_s, slo.ttft_s), ("TPOT", tpot_s, slo.tpot_s)):
        if seen_s > bound_s:
            return (
                f"infeasible: p{percent:g} {name} of a lone request is {seen_s * 1e3:.4g} ms, "
                f"the bound is {bound_s * 1e3:.4g} ms"
            )
    return ""


def knee_report(records: Sequence[Record], mix: str, slo: Slo, seed: int) -> KneeReport:
    """The knee of a mix as far as its runs tell it."""
    anchor = next(record for record in records if record.kind == "anchor" and record.mix == mix)
    impossible = infeasible(anchor, slo)
    if impossible:
        return KneeReport(mix, None, None, None, impossible)
    tried = verdicts(records, mix, slo)
    found = bracket(tried)
    if found.met is None:
        return KneeReport(mix, None, found.missed, None, f"missed at every rate tried, the least {found.missed:.3g}/s")
    reason = "" if found.missed is not None else "a lower bound: no rate tried missed the SLO"
    against = contradictions(tried)
    if against:
        reason = f"though {', '.join(f'{rate:.3g}/s' for rate in against)} met it by chance; raise --point-s"
    return KneeReport(mix, found.met, found.missed, _crossing(records, mix, slo, seed), reason)


def point_report(record: Record, slo: Slo, seed: int) -> PointReport:
    """One run with the intervals of its figures."""
    run, due = record.run, due_in(record)
    window = Window(*run.window_s)
    good = [o.ttft_s <= slo.ttft_s and o.tpot_s <= slo.tpot_s for o in due]
    return PointReport(
        kind=record.kind,
        mix=record.mix,
        level=record.level,
        state=run.state,
        why=run.why,
        requests=len(due),
        output_per_s=mean_interval(output_slices(run.outcomes, window, BATCHES)),
        ttft_s=interval([o.ttft_s for o in due], lambda values: percentile_of(values, slo.percentile), seed),
        tpot_s=interval(
            [o.tpot_s for o in due if o.output_tokens > 1], lambda values: percentile_of(values, slo.percentile), seed
        ),
        slo_load=slo_load(due, slo),
        goodput=sum(good) / len(good) if good else 0.0,
        lag_p99_s=run.lag_p99_s,
        fitted=is_fitted(record),
    )


class _Rate(NamedTuple):
    """A rate, its load, and that load in every replicate."""

    requests_per_s: float
    load: float
    replicates: Sequence[float]


def _crossing(records: Sequence[Record], mix: str, slo: Slo, seed: int) -> Interval:
    last = {record.level: record for record in records if record.kind == "open" and record.mix == mix}
    rates = [_rate(record, slo, seed) for _, record in sorted(last.items())]
    shares = np.random.default_rng(seed).random(REPLICATES)
    drawn = [
        _crosses([(rate.requests_per_s, rate.replicates[k]) for rate in rates], float(share))
        for k, share in enumerate(shares)
    ]
    return middle_interval(_crosses([(rate.requests_per_s, rate.load) for rate in rates], 0.5), drawn)


def _rate(record: Record, slo: Slo, seed: int) -> _Rate:
    load, due = load_of(record, slo), due_in(record)
    if load == float("inf"):
        return _Rate(record.level, load, [load] * REPLICATES)
    ttft = np.array([o.ttft_s for o in due])
    tpot = np.array([o.tpot_s for o in due])
    has_tpot = np.array([o.output_tokens > 1 for o in due])

    def load_at(indices: np.ndarray) -> float:
        drawn_ttft = percentile_of(ttft[indices], slo.percentile)
        drawn_tpot = percentile_of(tpot[indices][has_tpot[indices]], slo.percentile)
        return max(drawn_ttft / slo.ttft_s, drawn_tpot / slo.tpot_s)

    return _Rate(record.level, load, [load_at(indices) for indices in resampled(len(due), seed)])


def _crosses(rates: Sequence[tuple[float, float]], share: float) -> float:
    """Where the load first passes 1; ``share`` of the way where the rate above has none. The top rate if nowhere."""
    below, load_below = 0.0, 0.0
    for rate, load in rates:
        if load > 1:
            way = share if load == float("inf") else (1 - load_below) / (load - load_below)
            return below + (rate - below) * way
        below, load_below = rate, load
    return below
