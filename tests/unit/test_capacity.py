from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.capacity import (
    USABLE_KV_SHARE,
    EngineLimits,
    InfeasibleSloError,
    ReplicaGroup,
    RequestShape,
    Slo,
    StepTimeModel,
    WorkloadMix,
    closed_form_requests_per_s,
    fleet_cost_s,
    mean_replica_seconds,
    mean_work_s,
    replica_seconds,
    resource_bounds_s,
    work_s,
)

STEP_TIME = StepTimeModel(base_s=4e-3, prompt_token_s=2e-5, sequence_s=2.5e-5, kv_token_s=3e-8)
LIMITS = EngineLimits(max_num_seqs=256, max_num_batched_tokens=2048, kv_tokens=400_000, max_model_len=8192)
SLO = Slo(ttft_s=1.0, tpot_s=0.05)
GROUP = ReplicaGroup(1, STEP_TIME, LIMITS, SLO)

shapes = st.builds(RequestShape, st.integers(1, 4000), st.integers(1, 2000))
step_times = st.builds(
    StepTimeModel, st.floats(1e-3, 2e-2), st.floats(1e-6, 1e-4), st.floats(1e-6, 1e-4), st.floats(1e-9, 1e-7)
)
groups = st.builds(ReplicaGroup, st.integers(1, 40), step_times, st.just(LIMITS), st.just(SLO))
fleets = st.lists(groups, min_size=1, max_size=4)


def test_work_by_hand() -> None:
    """One shape, computed on paper: 900 uncached prompt tokens, 100 emitted, 100 × (1000 + 50) KV tokens read."""
    assert work_s(STEP_TIME, RequestShape(1000, 100, 100)) == pytest.approx(900 * 2e-5 + 100 * 2.5e-5 + 105_000 * 3e-8)


def test_step_time_is_the_sum_of_its_parts() -> None:
    """Base, prompt tokens, sequences and KV tokens each at their own price."""
    assert STEP_TIME.step_s(100, 8, 5000) == pytest.approx(4e-3 + 100 * 2e-5 + 8 * 2.5e-5 + 5000 * 3e-8)


@given(shapes, st.floats(1.1, 100))
def test_a_slower_device_needs_more_of_itself(shape: RequestShape, factor: float) -> None:
    """Slowing device and SLO together multiplies work and replica-seconds by the factor."""
    slowed = ReplicaGroup(1, STEP_TIME.slowed(factor), LIMITS, SLO.slowed(factor))

    assert work_s(slowed.step_time, shape) == pytest.approx(work_s(STEP_TIME, shape) * factor)
    assert replica_seconds(slowed, shape) == pytest.approx(replica_seconds(GROUP, shape) * factor)


@pytest.mark.parametrize(
    ("resource", "limits", "shape"),
    [
        (0, LIMITS, RequestShape(1000, 100)),
        (1, EngineLimits(4, 2048, 400_000, 8192), RequestShape(1000, 100)),
        (2, EngineLimits(256, 2048, 4_000, 8192), RequestShape(1000, 100)),
        (3, EngineLimits(256, 64, 400_000, 8192), RequestShape(1000, 1)),
    ],
)
def test_the_scarcest_resource_sets_the_cost(resource: int, limits: EngineLimits, shape: RequestShape) -> None:
    """Each of TPOT, slots, KV cache and step tokens can be the one that binds."""
    group = ReplicaGroup(1, STEP_TIME, limits, SLO)
    bounds = resource_bounds_s(group, shape)

    assert max(bounds) == bounds[resource] == replica_seconds(group, shape)


def test_the_kv_bound_by_hand() -> None:
    """Only the usable share of the KV cache counts."""
    shape = RequestShape(1000, 100)

    _, _, kv, _ = resource_bounds_s(GROUP, shape)

    assert kv == pytest.approx(work_s(STEP_TIME, shape) + 4e-3 * 105_000 / (USABLE_KV_SHARE * 400_000))


def test_a_step_longer_than_the_tpot_bound_is_infeasible() -> None:
    """No shape has a finite cost where even an empty step misses the SLO."""
    with pytest.raises(InfeasibleSloError, match=r"an empty step takes 0\.004 s, the TPOT bound is 0\.003 s"):
        replica_seconds(ReplicaGroup(1, STEP_TIME, LIMITS, Slo(1.0, 0.003)), RequestShape(10, 10))


def test_the_mean_is_taken_over_the_mix_not_of_its_lengths() -> None:
    """Work is convex in the output length, so the mean lengths would promise too much."""
    mix = WorkloadMix("two", (RequestShape(100, 10), RequestShape(100, 2000)))

    assert mean_work_s(STEP_TIME, mix) > 1.2 * work_s(STEP_TIME, RequestShape(100, 1005))


@given(st.lists(shapes, min_size=1, max_size=8))
def test_the_closed_form_is_at_least_what_per_request_costs_allow(sample: list[RequestShape]) -> None:
    """Choosing the scarcest resource for each request apart never promises more than choosing it for the mix."""
    mix = WorkloadMix("any", tuple(sample))
    bound = closed_form_requests_per_s(GROUP, mix)

    assert bound >= 1 / mean_replica_seconds(GROUP, mix) * (1 - 1e-12)
    assert bound * mean_work_s(STEP_TIME, mix) < 1


def test_in_a_fleet_of_one_kind_a_request_costs_what_it_takes() -> None:
    """However many replicas: u of that kind."""
    shape = RequestShape(1000, 100)

    assert fleet_cost_s([ReplicaGroup(7, STEP_TIME, LIMITS, SLO)], shape) == pytest.approx(
        replica_seconds(GROUP, shape)
    )


@given(fleets, st.lists(st.tuples(shapes, st.floats(0.01, 50)), min_size=1, max_size=6))
def test_routing_by_speed_loads_no_kind_above_the_charged_cost(
    fleet: list[ReplicaGroup], classes: list[tuple[RequestShape, float]]
) -> None:
    """Class x sent to kind g in proportion to n_g/u_g(x): every kind's share of busy time is Σ λ·cost ÷ N.

    This is the property that lets unlike GPUs add up in one bucket, whichever replica serves a request.
    """
    total = sum(group.count for group in fleet)
    charged = sum(rate * fleet_cost_s(fleet, shape) for shape, rate in classes) / total
    for group in fleet:
        busy = 0.0
        for shape, rate in classes:
            speeds = [g.count / replica_seconds(g, shape) for g in fleet]
            to_group = rate * (group.count / replica_seconds(group, shape)) / sum(speeds)
            busy += to_group * replica_seconds(group, shape) / group.count
        assert busy <= charged * (1 + 1e-9)


@given(fleets, groups, shapes)
def test_more_replicas_serve_more_of_any_shape(
    fleet: list[ReplicaGroup], more: ReplicaGroup, shape: RequestShape
) -> None:
    """Adding any kind raises the rate N ÷ cost at which the fleet could serve a shape alone."""

    def rate(groups: list[ReplicaGroup]) -> float:
        return sum(group.count for group in groups) / fleet_cost_s(groups, shape)

    assert rate([*fleet, more]) > rate(fleet)
    assert rate([*fleet, more]) == pytest.approx(rate(fleet) + more.count / replica_seconds(more, shape))


def test_an_empty_fleet_has_no_cost() -> None:
    """Not a division by zero: a sentence."""
    with pytest.raises(ValueError, match="empty fleet"):
        fleet_cost_s([], RequestShape(1, 1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Slo(-1.0, 0.05),
        lambda: Slo(1.0, 0.0),
        lambda: Slo(float("nan"), 0.05),
        lambda: Slo(1.0, 0.05, 101.0),
        lambda: WorkloadMix("none", ()),
        lambda: WorkloadMix("negative", (RequestShape(10, -1),)),
        lambda: WorkloadMix("all cached twice", (RequestShape(10, 1, 11),)),
    ],
)
def test_promises_that_mean_nothing_are_refused(make: Callable[[], object]) -> None:
    """Bounds that are no time, and mixes without requests or with impossible ones, are refused where they are made."""
    with pytest.raises(ValueError, match=r"must be|is empty|counts are positive"):
        make()
