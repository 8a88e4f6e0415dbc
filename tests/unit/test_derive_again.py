"""What is kept between derivations changes none of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as replaced

from ratelimit.gputypes import by_gpu, clear_gpu_types
from ratelimit.policy import TierPolicy
from serving.capacity import ReplicaGroup, fleet_cost_s
from serving.fleetcost import clear_costs, fleet_costs_s
from tests.unit.test_derive_properties import (
    LIMITS,
    LONG,
    SLO,
    STEP_TIME,
    Drawn,
    derived,
    drawn_fleets,
    drawn_groups,
    drawn_tiers,
    key_counts,
    large_fleets,
    unhurried,
)

changes = st.tuples(st.sampled_from(["one lost", "one more", "slower", "gone", "new", "moved"]), st.integers(0, 20))


def changed(fleet: list[Drawn], how: str, at: int, new: Drawn) -> list[Drawn]:
    """The fleet after one thing happened to it; all groups but one are the same objects."""
    at %= len(fleet) or 1
    if how == "new" or not fleet:
        return [*fleet, new]
    one, others = fleet[at], [*fleet[:at], *fleet[at + 1 :]]
    match how:
        case "gone":
            return others
        case "moved":
            return [*others, one]
        case "one lost":
            one = replaced(one, count=one.count - 1)
        case "one more":
            one = replaced(one, count=one.count + 1)
        case _:
            one = replaced(one, slowdown=2 * one.slowdown)
    return [*fleet[:at], one, *fleet[at + 1 :]]


@unhurried
@given(
    fleet=st.one_of(drawn_fleets, large_fleets),
    happened=st.lists(st.tuples(changes, drawn_groups), min_size=1, max_size=6),
    tiers=drawn_tiers(),
    keys=key_counts,
    spare=st.integers(0, 3),
)
def test_deriving_after_changes_gives_what_deriving_afresh_does(
    fleet: list[Drawn],
    happened: list[tuple[tuple[str, int], Drawn]],
    tiers: tuple[TierPolicy, ...],
    keys: list[int],
    spare: int,
) -> None:
    """After each change of a fleet whose other groups are the same objects as before, nothing kept shows."""
    known = {id(each): each.group() for each in fleet}
    standing = list(fleet)  # holds what the ids stand for
    derived(list(known.values()), tiers, keys, spare)
    for (how, at), new in happened:
        fleet = changed(fleet, how, at, new)
        standing += fleet
        groups = [known.setdefault(id(each), each.group()) for each in fleet]
        again = derived(groups, tiers, keys, spare)

        clear_costs()
        clear_gpu_types()
        assert again == derived([each.group() for each in fleet], tiers, keys, spare)


@given(fleet=st.one_of(drawn_fleets, large_fleets))
def test_only_the_gpu_type_that_changed_is_found_again(fleet: list[Drawn]) -> None:
    """The other types are the same objects, with all that was found of them."""
    groups = [each.group() for each in fleet]
    before = {of_gpu.groups[0].gpu: of_gpu for of_gpu in by_gpu(groups)}
    first, *others = groups
    after = {of_gpu.groups[0].gpu: of_gpu for of_gpu in by_gpu([replaced(first), *others])}
    assert [gpu for gpu in before if after[gpu] is not before[gpu]] == [first.gpu]


def test_the_costs_of_a_fleet_of_many_kinds_follow_each_change() -> None:
    """Of more kinds than are kept together: with every count that changes the costs are those of each shape alone."""
    fleet = {
        ReplicaGroup(1, STEP_TIME.slowed(1 + i / 100), LIMITS, SLO.slowed(1 + i / 100)): 1 + i % 7 for i in range(150)
    }
    for i in (0, 70, 149):
        fleet[list(fleet)[i]] += 5
        groups = [replaced(kind, count=count) for kind, count in fleet.items()]
        expected = [fleet_cost_s(groups, shape) for shape in LONG.shapes]
        assert fleet_costs_s(fleet, LONG).tolist() == pytest.approx(expected, rel=1e-12)
