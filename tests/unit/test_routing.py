"""Which replica takes a request: within a kind the least laden, among unlike kinds each its part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import fsum
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.capacity import (
    EngineLimits,
    ReplicaGroup,
    RequestShape,
    Slo,
    StepTimeModel,
    WorkloadMix,
    fleet_cost_s,
    replica_seconds,
    replica_share,
    work_s,
)
from serving.mixes import load_mix
from serving.profile import load_profile
from serving.routing import Alike, Load, Place, Router, least_laden
from tests.support.routed import Named, RoutedFleet

SLO = Slo(1.0, 0.05)
LIMITS = EngineLimits(256, 8192, 450_000, 32_768)
H100 = ReplicaGroup(1, StepTimeModel(0.0037, 2.2e-5, 2.5e-5, 4e-8), LIMITS, SLO)
H200 = ReplicaGroup(1, StepTimeModel(0.0027, 1.9e-5, 2e-5, 2.5e-8), LIMITS, SLO)
CHAT = RequestShape(800, 200)
#: Turns, at equal distances, over which a kind's part of a request is counted.
TURNS = 400

kinds = st.builds(
    lambda base, prompt, sequence, kv, slots: ReplicaGroup(
        1, StepTimeModel(base, prompt, sequence, kv), msgspec.structs.replace(LIMITS, max_num_seqs=slots), SLO
    ),
    base=st.floats(0.001, 0.04),
    prompt=st.floats(1e-6, 1e-4),
    sequence=st.floats(0, 1e-4),
    kv=st.floats(0, 1e-6),
    slots=st.sampled_from([16, 256, 1024]),
)
shapes = st.builds(RequestShape, st.integers(1, 30_000), st.integers(1, 4_000))
fleets = st.lists(st.tuples(kinds, st.integers(1, 6)), min_size=1, max_size=5, unique_by=lambda each: each[0])


def alike(kind: ReplicaGroup | None, *replicas: tuple[str, float]) -> Alike[Named]:
    return Alike("pool", kind, [Named(url, rate) for url, rate in replicas])


def fleet_of(drawn: Sequence[tuple[ReplicaGroup, int]]) -> list[Alike[Named]]:
    return [alike(kind, *((f"{n}.{i}", 1.0) for i in range(count))) for n, (kind, count) in enumerate(drawn)]


def router(turn: float = 0.0, senders: int = 1) -> Router:
    return Router(turn, lambda: senders)


def load(shape: RequestShape = CHAT, cost: float = 1.0) -> Load:
    return Load(shape, 1, cost)


def placed(place: Place[Named] | None) -> Place[Named]:
    assert place is not None
    return place


def parts(fleet: Sequence[Alike[Named]], shape: RequestShape) -> list[float]:
    """The part of such requests that goes to each kind of an idle fleet, over all that the turn may be."""
    chosen = Counter(placed(router(i / TURNS).choose(fleet, load(shape))).among.kind for i in range(TURNS))
    return [chosen[each.kind] / TURNS for each in fleet]


def test_an_idle_replica_is_preferred_to_a_busy_one() -> None:
    """The replica without outstanding cost takes the request."""
    assert least_laden([Named("a", 1.0), Named("b", 1.0)], {"a": 3.0}) == Named("b", 1.0)


def test_excluded_and_incapable_replicas_take_nothing() -> None:
    """With every replica excluded or without capacity there is no choice."""
    assert router().choose([alike(None, ("a", 1.0), ("b", 0.0))], load(), exclude={"a"}) is None
    assert router().choose([], load()) is None


@given(st.lists(st.floats(0.5, 8.0), min_size=1, max_size=6), st.integers(50, 400))
def test_work_is_shared_in_proportion_to_capacity(speeds: list[float], requests: int) -> None:
    """Sending many equal requests that never finish, no replica holds more than its share plus one request."""
    fleet, sender = [alike(None, *((str(i), speed) for i, speed in enumerate(speeds)))], router()
    taken: Counter[str] = Counter()
    for _ in range(requests):
        place = placed(sender.choose(fleet, load()))
        sender.take(place)
        taken[place.replica.url] += 1

    for replica in fleet[0].replicas:
        share = requests * replica.requests_per_s / sum(speeds)
        assert taken[replica.url] <= share + 1.0 + 1e-9


@given(
    speeds=st.lists(st.sampled_from([1.0, 2.0, 3.5]), min_size=1, max_size=4),
    steps=st.lists(st.tuples(shapes, st.floats(0.1, 9.0), st.integers(0, 5)), min_size=1, max_size=60),
    is_told=st.booleans(),
)
def test_replicas_of_one_kind_are_chosen_by_their_outstanding_cost_alone(
    speeds: list[float], steps: list[tuple[RequestShape, float, int]], is_told: bool
) -> None:
    """Whatever comes and ends: the least outstanding cost for the capacity, then the faster one, then the first."""
    sender, held = router(), list[Place[Named]]()
    fleet = [alike(H100 if is_told else None, *((str(i), speed) for i, speed in enumerate(speeds)))]
    for shape, cost, ends in steps:
        costs = [fsum(place.cost for place in held if place.replica is each) for each in fleet[0].replicas]
        ranks = [(round(c / s, 9), -s, i) for i, (c, s) in enumerate(zip(costs, speeds, strict=True))]
        place = placed(sender.choose(fleet, load(shape, round(cost))))
        assert place.replica.url == str(min(ranks)[2])
        sender.take(place)
        held.append(place)
        for _ in range(min(ends, len(held) - 1)):
            sender.leave(held.pop(0))


@settings(max_examples=60)
@given(fleet=fleets, classes=st.lists(st.tuples(shapes, st.floats(0.01, 100)), min_size=1, max_size=5))
def test_no_kind_is_loaded_beyond_the_cost_of_what_is_admitted(
    fleet: list[tuple[ReplicaGroup, int]], classes: list[tuple[RequestShape, float]]
) -> None:
    """Each kind of request goes to each kind of replica in proportion to n/u, so no load exceeds Σ λ × cost."""
    groups = [msgspec.structs.replace(kind, count=count) for kind, count in fleet]
    routed = [(parts(fleet_of(fleet), shape), shape, rate) for shape, rate in classes]
    most = fsum(rate * fleet_cost_s(groups, shape) for _, shape, rate in routed) / sum(group.count for group in groups)
    for index, group in enumerate(groups):
        of_one = [(rate * replica_seconds(group, shape) / group.count, part) for part, shape, rate in routed]
        rounded = fsum(each for each, _ in of_one) * 2 / TURNS
        assert fsum(each * part[index] for each, part in of_one) <= most * (1 + 1e-9) + rounded


@settings(max_examples=30)
@given(
    fleet=fleets, classes=st.lists(shapes, min_size=1, max_size=4, unique=True), turn=st.floats(0, 1, exclude_max=True)
)
def test_turns_are_even_in_a_run_too(
    fleet: list[tuple[ReplicaGroup, int]], classes: list[RequestShape], turn: float
) -> None:
    """Of 500 requests of several kinds in turn, each kind of replica gets its part of each, to a few requests."""
    told, sender = fleet_of(fleet), router(turn)
    got: Counter[tuple[RequestShape, ReplicaGroup | None]] = Counter()
    for number in range(500):
        shape = classes[number % len(classes)]
        got[shape, placed(sender.choose(told, load(shape))).among.kind] += 1
    for shape in classes:
        rates = [len(each.replicas) / replica_seconds(each.kind, shape) for each in told if each.kind]
        for each, rate in zip(told, rates, strict=True):
            assert got[shape, each.kind] == pytest.approx(500 / len(classes) * rate / fsum(rates), abs=12)


@given(fleet=fleets, turn=st.floats(0, 1, exclude_max=True), shape=shapes)
def test_a_request_that_is_refused_everywhere_has_tried_every_replica_once(
    fleet: list[tuple[ReplicaGroup, int]], turn: float, shape: RequestShape
) -> None:
    """Each retry is on a replica that was not tried, whatever its kind, until there is none."""
    told, sender, tried = fleet_of(fleet), router(turn), list[str]()
    while place := sender.choose(told, load(shape), tried):
        assert place.replica.url not in tried
        tried.append(place.replica.url)
    assert len(tried) == sum(count for _, count in fleet)


def test_a_request_without_tokens_goes_to_any_kind() -> None:
    """What only has its tokens counted is spread over the replicas, and takes no share of what they may hold."""
    fleet = [alike(H100, ("a", 1.0), ("b", 1.0)), alike(H200, ("c", 1.0))]
    assert parts(fleet, RequestShape(0, 0)) == pytest.approx([2 / 3, 1 / 3], abs=2 / TURNS)
    assert placed(router().choose(fleet, load(RequestShape(0, 0)))).share == 0


@pytest.mark.parametrize(("senders", "held", "fullness"), [(1, 96, 0.8), (2, 48, 0.8), (1, 60, 0.5), (1, 30, 0.5)])
def test_a_kind_that_is_fuller_than_half_gets_less(senders: int, held: int, fullness: float) -> None:
    """Its part shrinks as it fills beyond half, by what all gateways are taken to hold; below half it does not."""
    fleet = [alike(H100, ("a", 1.0)), alike(H200, ("b", 1.0))]
    sender = router(senders=senders)
    among = fleet[0]
    sequences = held / 120 / replica_share(H100, CHAT)[1]
    sender.take(Place(among, among.replicas[0], 1.0, sequences * replica_share(H100, CHAT)[1]))
    got = Counter(placed(sender.choose(fleet, load())).replica.url for _ in range(1000))

    left, other = (0.5 / fullness) ** 6 / replica_seconds(H100, CHAT), 1 / replica_seconds(H200, CHAT)
    assert got["a"] / 1000 == pytest.approx(left / (left + other), abs=0.01)


def fill(sender: Router, among: Alike[Named], fullness: float) -> None:
    """Let a kind hold so much of what it may."""
    sender.take(Place(among, among.replicas[0], 1.0, fullness * len(among.replicas)))


def test_a_kind_that_is_full_gets_nothing_while_another_has_room() -> None:
    """However slow a kind is against its profile, what waits there is bounded; where all are full, all get some."""
    fleet = [alike(H100, ("a", 1.0)), alike(H200, ("b", 1.0))]
    sender = router()
    fill(sender, fleet[0], 1.0)
    assert {placed(sender.choose(fleet, load())).replica.url for _ in range(1000)} == {"b"}
    fill(sender, fleet[1], 1.0)
    assert {placed(sender.choose(fleet, load())).replica.url for _ in range(1000)} == {"a", "b"}


@pytest.mark.parametrize("period", [2, 13, 21, 34, 89])
def test_large_requests_that_come_at_a_period_do_not_meet_on_one_kind(period: int) -> None:
    """Every so many requests a large one: of two equal kinds no one gets more than a few of them in a row."""
    other = msgspec.structs.replace(H100, slo=Slo(1.0, 0.0501))
    fleet, sender = [alike(H100, ("a", 1.0)), alike(other, ("b", 1.0))], router()
    row = list[str]()
    for _ in range(60):
        row.append(placed(sender.choose(fleet, load(RequestShape(20_000, 200)))).replica.url)
        for _ in range(period - 1):
            sender.choose(fleet, load())
    assert not any(len(set(row[at : at + 5])) == 1 for at in range(len(row) - 4))


class Looked(Sequence[Named]):
    """Many replicas, and how many of them were looked at."""

    def __init__(self, count: int) -> None:
        self._all = [Named(str(n), 1.0) for n in range(count)]
        self.looks = 0

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, at: Any) -> Any:
        self.looks += 1
        return self._all[at]


def test_a_choice_among_many_looks_at_a_few() -> None:
    """What a choice costs does not grow with the replicas of a kind, nor does a retry."""
    many = Looked(10_000)
    sender, tried = router(), set[str]()
    for _ in range(8):
        place = placed(sender.choose([Alike("pool", H100, many)], load(), tried))
        tried.add(place.replica.url)
    assert len(tried) == 8
    assert many.looks <= 8 * 16


@given(count=st.integers(60, 90), excluded=st.integers(0, 95), serving=st.integers(0, 3), turn=st.floats(0, 1))
def test_of_many_too_one_that_is_open_is_found_where_there_is_one(
    count: int, excluded: int, serving: int, turn: float
) -> None:
    """Never an excluded one, nor one that serves nothing, and None only where there is no other."""
    replicas = [(str(n), 1.0 if n >= count - serving else 0.0) for n in range(count)]
    exclude = {str(n) for n in range(excluded)}
    place = router(turn).choose([alike(H100, *replicas)], load(), exclude)
    if place is None:
        assert excluded >= count or not serving
    else:
        assert place.replica.requests_per_s
        assert place.replica.url not in exclude


def test_of_many_the_load_stays_even() -> None:
    """The best of a few is nearly the best of all: no replica gets twice its part."""
    fleet, sender = [alike(H100, *((str(n), 1.0) for n in range(200)))], router()
    taken: Counter[str] = Counter()
    for _ in range(4000):
        place = placed(sender.choose(fleet, load()))
        sender.take(place)
        taken[place.replica.url] += 1
    assert len(taken) == 200
    assert max(taken.values()) <= 25


def test_among_many_of_which_half_are_dead_a_retry_finds_one_that_lives() -> None:
    """Dead ones hold nothing, and so look least laden; the more tries were in vain, the less that counts."""
    fleet, sender = [alike(H100, *((str(n), 1.0) for n in range(200)))], router()
    for replica in fleet[0].replicas[100:]:
        sender.take(Place(fleet[0], replica, 1.0, 0.0))
    for _ in range(50):
        tried = list[str]()
        while (url := placed(sender.choose(fleet, load(), tried)).replica.url) < "100" or len(url) < 3:
            tried.append(url)
        assert len(tried) < 64


def test_what_has_ended_leaves_nothing_behind() -> None:
    """A fleet that was full and is idle again is routed as at first."""
    fleet, sender = [alike(H100, ("a", 1.0)), alike(H200, ("b", 1.0))], router()
    held = list[Place[Named]]()
    for number in range(500):
        held.append(placed(sender.choose(fleet, load(RequestShape(number + 1, 100), 0.1 * number))))
        sender.take(held[-1])
    for place in held:
        sender.leave(place)
    assert not sender._outstanding
    assert not sender._held


@given(kind=kinds, shape=shapes)
def test_the_share_of_a_request_is_one_of_those_held_at_saturation(kind: ReplicaGroup, shape: RequestShape) -> None:
    """1 / share such requests are in flight, by Little's law, where they come alone at the closed form's rate."""
    seconds, share = replica_share(kind, shape)
    step_s = kind.step_time.base_s / (1 - work_s(kind.step_time, shape) / seconds)
    steps = shape.output_tokens + shape.input_tokens / LIMITS.max_num_batched_tokens
    assert seconds == replica_seconds(kind, shape)
    assert share * steps * step_s / seconds == pytest.approx(1, rel=1e-6)


def shipped() -> dict[str, ReplicaGroup]:
    profiles = {gpu: load_profile(f"{gpu}-llama-3.1-8b") for gpu in ("h100", "h200", "gb200")}
    return {gpu: ReplicaGroup(1, profile.step_time, profile.limits, SLO) for gpu, profile in profiles.items()}


SHORT_DECODES = load_mix("decode-heavy", 0.25).shapes
CHATS = load_mix("chat").shapes
MIXED = SHORT_DECODES * 10 + load_mix("prefill-heavy", 0.5).shapes * 10 + CHATS


@pytest.mark.parametrize("utilization", [0.5, 0.85])
def test_simulated_gpu_types_are_loaded_alike(utilization: float) -> None:
    """Behind the router, real steps and three mixes at once: no type is loaded beyond Σ λ × cost, to 3 %."""
    found = RoutedFleet(shipped(), MIXED).run(utilization, 4000)
    assert max(found.loads.values()) <= 1.03, found
    assert found.in_time > 0.999


@pytest.mark.slow  # long answers at full load: some 10 s
def test_a_fast_gpu_type_is_not_filled_before_the_others() -> None:
    """At full load of long answers the fastest type's slots do not run out; weighed for one mix, they did."""
    weighed = RoutedFleet(shipped(), SHORT_DECODES, WorkloadMix("chat", CHATS)).run(1.0, 12_000)
    by_shape = RoutedFleet(shipped(), SHORT_DECODES).run(1.0, 12_000)
    assert weighed.p95_ttft_s > 0.5
    assert weighed.loads["gb200"] > 1.05
    assert by_shape.p95_ttft_s < 0.1
    assert max(by_shape.loads.values()) <= 1.04


def test_a_gpu_type_that_does_less_than_its_profile_says_gets_less() -> None:
    """Steps that last 25 % longer than the profile says do not drown a type: others take what it cannot."""
    found = RoutedFleet(shipped(), CHATS, slower={"gb200": 1.25}).run(0.85, 6000)
    assert found.loads["gb200"] < 0.97
    assert found.in_time > 0.99


@pytest.mark.parametrize(
    ("slower", "utilization", "at_most"), [({"gb200": 10}, 0.35, 0.35), ({"h100": 10}, 0.55, 0.25)]
)
def test_a_gpu_type_that_is_sick_does_not_take_the_pool_with_it(
    slower: dict[str, float], utilization: float, at_most: float
) -> None:
    """Ten times slower than told, it gets little of what its profile would give it, and the first tokens come."""
    found = RoutedFleet(shipped(), CHATS, slower=slower).run(utilization, 3000)
    [sick] = slower
    assert found.loads[sick] < at_most
    assert found.p95_ttft_s < 1.5
