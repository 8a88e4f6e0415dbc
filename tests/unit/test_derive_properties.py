"""What holds of every derivation, whatever the fleet, the tiers, their promises, minima and trims."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from itertools import combinations
from random import Random
from typing import get_args

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as replaced

from ratelimit.decided import held_together
from ratelimit.derive import GroupSupply, Promise, SupplyError, Trim, derive
from ratelimit.gputypes import by_gpu
from ratelimit.keylimits import lengths_of
from ratelimit.overrides import FrozenLimit, Override
from ratelimit.policy import KeyAmounts, Policy, PoolPolicy, TierPolicy, promise_carriers, promise_of, promises_of
from ratelimit.poolsupply import supply_of
from ratelimit.publication import MOST_PER_MINUTE, Limit, LimitName, Publication
from serving.capacity import (
    EngineLimits,
    ReplicaGroup,
    RequestShape,
    Slo,
    StepTimeModel,
    WorkloadMix,
    fleet_cost_s,
    replica_seconds,
)
from serving.fleetcost import fleet_costs_s
from serving.stepsim import Knee
from tests.support.explained import check_explained

MODEL = "m"
SLO = Slo(1.0, 0.05)
STRICT = Slo(0.5, 0.03, 99)
STEP_TIME = StepTimeModel(0.0045, 2.2e-5, 2.5e-5, 4e-8)
LIMITS = EngineLimits(1024, 8192, 450_000, 32_768)
CHAT = WorkloadMix("chat", tuple(RequestShape(20 * k, 5 * k) for k in range(1, 21)))
LONG = WorkloadMix("long", (RequestShape(9_000, 33, 1_000), RequestShape(7_001, 450)))
#: The pool's own comes first, as in ``promises_of``.
PROMISES = tuple(Promise(mix, slo) for mix in (CHAT, LONG) for slo in (SLO, STRICT))


class Drawn(msgspec.Struct, frozen=True):
    """A group to be: what a fleet is drawn as."""

    count: int
    gpu: str
    slowdown: float
    rates: tuple[float, ...]
    able: tuple[bool, ...]
    domain_replicas: int
    domains: tuple[int, ...]

    def labelled(self) -> tuple[int, ...]:
        """The replicas of the labelled domains that it has replicas for."""
        kept: tuple[int, ...] = ()
        for count in self.domains:
            if sum(kept) + count > self.count:
                break
            kept = (*kept, count)
        return kept

    def group(self) -> GroupSupply:
        """``rates`` are those of each promise at full speed; the pool's own is always kept."""
        found = {p: rate for p, rate, able in zip(PROMISES, self.rates, (True, *self.able), strict=True) if able}
        labelled = {f"rack-{i}": count for i, count in enumerate(self.labelled())}
        return GroupSupply(
            group=ReplicaGroup(self.count, STEP_TIME.slowed(self.slowdown), LIMITS, SLO.slowed(self.slowdown)),
            gpu=self.gpu,
            gpus_per_replica=1,
            profile=f"{self.gpu}-8b",
            slowdown=self.slowdown,
            knees={promise: Knee(rate, 0.873, 0.5, 0.049, "tpot") for promise, rate in found.items()},
            provenance=f"{self.gpu}-8b, estimated 2026-11-21",
            domain_replicas=self.domain_replicas,
            domains=labelled,
            infeasible={p: "p95 TTFT of long is 3 s on an idle replica" for p in PROMISES if p not in found},
        )


drawn_groups = st.builds(
    Drawn,
    count=st.integers(1, 40),
    gpu=st.sampled_from(["H100", "H200", "GB200"]),
    slowdown=st.sampled_from([1.0, 2.5, 10.0]),
    rates=st.tuples(*[st.floats(0.05, 500)] * 4),
    able=st.tuples(*[st.booleans()] * 3),
    domain_replicas=st.sampled_from([1, 4, 8, 72]),
    domains=st.sampled_from([(), (3,), (2, 5), (1, 1, 1)]),
)
drawn_fleets = st.lists(drawn_groups, min_size=1, max_size=5)
large_fleets = st.lists(drawn_groups, min_size=14, max_size=18)
amounts = st.one_of(st.none(), st.integers(1, 2_000), st.integers(1, 2_000_000))


@st.composite
def drawn_tiers(draw: st.DrawFn) -> tuple[TierPolicy, ...]:
    """Tiers whose shares come to at most 1, some of them best effort, with bounds and promises of their own."""
    parts = draw(st.lists(st.integers(0, 10), min_size=1, max_size=4))
    whole = sum(parts) + draw(st.integers(1, 10))
    return tuple(_drawn_tier(draw, f"tier-{i}", part / whole) for i, part in enumerate(parts))


def _drawn_tier(draw: st.DrawFn, name: str, share: float) -> TierPolicy:
    least, most = {}, {}
    for limit in ("requests", "input_tokens", "output_tokens", "concurrency"):
        first, second = draw(amounts), draw(amounts)
        if first is not None and second is not None:
            first, second = sorted([first, second])
        least[limit], most[limit] = first if share else None, second
    return TierPolicy(
        name=name,
        share=share,
        ceiling=max(share, draw(st.sampled_from([share, 0.5, 1.0])) or 0.3),
        priority=0,
        burst_s=draw(st.floats(0.001, 60)),
        unlimited=draw(st.sampled_from([(), ("input_tokens",), ("input_tokens", "output_tokens")])),
        mix=draw(st.sampled_from([None, CHAT, LONG])),
        slo=draw(st.sampled_from([None, STRICT])),
        minimum=KeyAmounts(**least),
        maximum=KeyAmounts(**most),
        oversell=None if share else draw(st.sampled_from([None, 1.0, 2.5, 100.0])),
    )


@st.composite
def drawn_overrides(draw: st.DrawFn) -> Override:
    """A limit that an operator set, of any size, or limits that one froze."""
    tier, value = f"tier-{draw(st.integers(0, 3))}", st.one_of(st.integers(1, 3_000), st.integers(1, MOST_PER_MINUTE))
    if draw(st.booleans()):
        return Override(tier, draw(st.sampled_from([None, MODEL])), draw(limit_names), draw(value), 1e9, "incident 12")
    frozen = []
    for name in draw(st.lists(limit_names, unique=True)):
        per_minute, ceiling = (0, 0) if name == "concurrency" else (draw(value), draw(value))
        frozen.append(FrozenLimit(MODEL, name, per_minute, draw(value), ceiling, draw(value)))
    return Override(tier, None, None, None, 1e9, "migration", tuple(frozen))


limit_names = st.sampled_from(get_args(LimitName))
#: As ``ratelimit.feedback`` says it, numbers and brackets included.
TRIM_REASON = (
    "44% of 60369 requests were beyond the TTFT bound of 1 s (0.05 of them may be), while 97% of the measured supply "
    "was taken in"
)
trims = st.one_of(st.none(), st.builds(Trim, st.floats(0.5, 1), st.just(TRIM_REASON)))
key_counts = st.lists(st.integers(0, 200), min_size=4, max_size=4)
unhurried = settings(deadline=None, max_examples=100)


def policy_of(tiers: tuple[TierPolicy, ...], spare_domains: int = 0) -> Policy:
    return Policy(tiers, (PoolPolicy(MODEL, SLO, CHAT, 64, spare_domains, 32_768, 0.25),), enforce=True)


def derived(
    fleet: list[GroupSupply],
    tiers: tuple[TierPolicy, ...],
    keys: list[int],
    spare_domains: int = 0,
    trim: Trim | None = None,
    overrides: tuple[Override, ...] = (),
) -> Publication:
    counts = {(tier.name, MODEL): count for tier, count in zip(tiers, keys, strict=False)}
    trims = {} if trim is None else {MODEL: trim}
    return derive(1, "", "", policy_of(tiers, spare_domains), {MODEL: fleet}, counts, overrides, trims)


def by_name(publication: Publication, tier: str, per: str = "key") -> dict[str, Limit]:
    return {limit.name: limit for limit in publication.limits(tier, MODEL) if limit.per == per}


@unhurried
@given(
    fleet=st.one_of(drawn_fleets, large_fleets),
    tiers=drawn_tiers(),
    keys=key_counts,
    spare=st.integers(0, 3),
    trim=trims,
    overrides=st.lists(drawn_overrides(), max_size=3).map(tuple),
    in_use=key_counts,
)
def test_every_printed_explanation_gives_its_limit(
    fleet: list[Drawn],
    tiers: tuple[TierPolicy, ...],
    keys: list[int],
    spare: int,
    trim: Trim | None,
    overrides: tuple[Override, ...],
    in_use: list[int],
) -> None:
    """Whoever parses what is printed and computes by hand finds each limit, its burst and its ceilings, exactly.

    That is of each key and of all of a tier's, of those that an operator set or froze, and while new keys wait.
    """
    publication = derived([each.group() for each in fleet], tiers, keys, spare, trim, overrides)
    check_explained(publication)
    counts = {(tier.name, MODEL): count for tier, count in zip(tiers, in_use, strict=False)}
    check_explained(held_together(publication, counts, overrides))


def grown(fleet: list[Drawn], how: str, at: int, more: Drawn) -> list[Drawn]:
    """The fleet with more capacity of one sort."""
    chosen = fleet[at % len(fleet)]
    others = [each for each in fleet if each is not chosen]
    group = replaced(chosen, domains=chosen.labelled())  # what there is keeps the labels that it has
    match how:
        case "another group":
            return [*fleet, more]
        case "a replica more":
            return [*others, replaced(group, count=group.count + 1)]
        case "a labelled domain more":
            return [*others, replaced(group, count=group.count + 4, domains=(*group.domains, 4))]
        case _:
            return [*others, replaced(group, rates=tuple(2 * rate for rate in group.rates))]


@unhurried
@given(
    fleet=drawn_fleets,
    how=st.sampled_from(["another group", "a replica more", "a labelled domain more", "faster"]),
    at=st.integers(0, 4),
    more=drawn_groups,
    tiers=drawn_tiers(),
    keys=key_counts,
    spare=st.integers(0, 3),
)
def test_more_capacity_never_lowers_a_limit(
    fleet: list[Drawn], how: str, at: int, more: Drawn, tiers: tuple[TierPolicy, ...], keys: list[int], spare: int
) -> None:
    """A replica, a domain or a group more, or faster replicas, leave every limit of every tier at least where it was.

    That is with the same policy and keys, and for a policy whose every promise some replica could keep before: one that
    only the new replica keeps is a new claim, which those in force make room for where it has a minimum.
    """
    before = derived([each.group() for each in fleet], tiers, keys, spare)
    assume(all(tier.limits for tier in before.tiers))
    after = derived([each.group() for each in grown(fleet, how, at, more)], tiers, keys, spare)
    for tier in tiers:
        now = by_name(after, tier.name)
        for name, limit in by_name(before, tier.name).items():
            assert now[name].per_minute >= limit.per_minute
            assert now[name].burst >= limit.burst
            assert now[name].ceiling_per_minute >= limit.ceiling_per_minute


def assured_requests_per_s(publication: Publication, tier: TierPolicy, pool: PoolPolicy) -> Fraction:
    """What the keys of a tier are assured together, in requests/s of its own mix; 1 a minute is only the floor."""
    lengths = lengths_of(promise_of(tier, pool).mix)
    sizes = {"requests": Decimal(1), "input_tokens": lengths.mean_input, "output_tokens": lengths.mean_output}
    (of_tier,) = (each for each in publication.tiers if each.tier == tier.name)
    each = [
        Fraction(limit.per_minute) / 60 / Fraction(sizes[name])
        for name, limit in by_name(publication, tier.name).items()
        if name in promise_carriers(tier) and limit.per_minute > 1
    ]
    return of_tier.active_keys * max(each, default=Fraction(0)) if of_tier.assured else Fraction(0)


def load(
    publication: Publication,
    tiers: tuple[TierPolicy, ...],
    fleet: list[GroupSupply],
    spare: int = 0,
    trim: Trim | None = None,
) -> Fraction:
    """The part of a fleet that all assured callers at their limits take; 1 is all of it."""
    pool = policy_of(tiers).pools[0]
    found = {promise: supply_of(promise, by_gpu(fleet), spare, trim).usable for promise in promises_of(tiers, pool)}
    taken = [(assured_requests_per_s(publication, tier, pool), found[promise_of(tier, pool)]) for tier in tiers]
    return sum((assured / Fraction(usable) for assured, usable in taken if assured), Fraction(0))


@unhurried
@given(fleet=drawn_fleets, tiers=drawn_tiers(), keys=key_counts, spare=st.integers(0, 3), trim=trims)
def test_what_is_assured_is_never_oversold(
    fleet: list[Drawn], tiers: tuple[TierPolicy, ...], keys: list[int], spare: int, trim: Trim | None
) -> None:
    """All assured callers at their limits take at most what is usable, whatever minima ask, but for the floor of 1."""
    groups = [each.group() for each in fleet]
    publication = derived(groups, tiers, keys, spare, trim)
    assert load(publication, tiers, groups, spare, trim) <= 1


@unhurried
@given(fleet=drawn_fleets, tiers=drawn_tiers(), keys=key_counts)
def test_a_minimum_is_kept_or_its_loss_is_said(
    fleet: list[Drawn], tiers: tuple[TierPolicy, ...], keys: list[int]
) -> None:
    """Each assured key has its tier's minima, unless a warning says that the pool cannot serve them all."""
    publication = derived([each.group() for each in fleet], tiers, keys)
    conflict = any("minima" in warning for warning in publication.warnings)
    for tier in tiers:
        for name, limit in by_name(publication, tier.name).items():
            least, most = tier.minimum.of(limit.name), tier.maximum.of(limit.name)
            amount = limit.per_minute or limit.burst
            assert conflict or least is None or amount >= least, name
            assert most is None or max(amount, limit.ceiling_per_minute) <= most


def domains_of(fleet: list[GroupSupply], order: Random) -> list[list[int]]:
    """Every failure domain of one way to place the fleet, as the replicas of each group that are lost with it.

    Nodes of a GPU type hold the unlabelled replicas of all groups in a random order, as many as fit one after another.
    """
    labels = sorted({label for group in fleet for label in group.domains})
    domains = [[group.domains.get(label, 0) for group in fleet] for label in labels]
    for gpu in sorted({group.gpu for group in fleet}):
        replicas = [
            i
            for i, group in enumerate(fleet)
            if group.gpu == gpu
            for _ in range(group.group.count - sum(group.domains.values()))
        ]
        order.shuffle(replicas)
        if order.random() < 0.5:
            replicas.sort(key=lambda i: -fleet[i].rates[PROMISES[0]] * fleet[i].domain_replicas)
        room = Fraction(0)
        for i in replicas:
            takes = Fraction(1, fleet[i].domain_replicas)
            if takes > room:
                domains.append([0] * len(fleet))
                room = Fraction(1)
            domains[-1][i] += 1
            room -= takes
    return domains


def without(fleet: list[GroupSupply], lost: list[int]) -> list[GroupSupply]:
    counts = [group.group.count - gone for group, gone in zip(fleet, lost, strict=True)]
    return [
        msgspec.structs.replace(group, group=msgspec.structs.replace(group.group, count=count), domains={})
        for group, count in zip(fleet, counts, strict=True)
    ]


@unhurried
@given(
    fleet=st.lists(drawn_groups, min_size=2, max_size=4),
    tiers=drawn_tiers(),
    keys=key_counts,
    spare=st.integers(1, 2),
    order=st.randoms(use_true_random=False),
)
def test_losing_the_spare_domains_leaves_all_that_is_assured_servable(
    fleet: list[Drawn], tiers: tuple[TierPolicy, ...], keys: list[int], spare: int, order: Random
) -> None:
    """However replicas share nodes, losing any that many leaves every assured limit servable; or it was said."""
    groups = [each.group() for each in fleet]
    publication = derived(groups, tiers, keys, spare)
    if any("cannot be kept" in warning for warning in publication.warnings):
        return
    rates = [group.rates[PROMISES[0]] for group in groups]

    def worth(domain: list[int]) -> Decimal:
        return sum((count * rate for count, rate in zip(domain, rates, strict=True)), Decimal(0))

    largest = sorted(domains_of(groups, order), key=worth, reverse=True)[:6]
    for chosen in combinations(largest, min(spare, len(largest))):
        left = without(groups, [sum(gone) for gone in zip(*chosen, strict=True)])
        assert load(publication, tiers, left) <= 1


def test_spare_that_cannot_be_kept_is_said() -> None:
    """A fleet in one failure domain has none to spare: one replica's worth is given out, and the operator hears it."""
    group = Drawn(8, "H100", 1.0, (10.0,) * 4, (True,) * 3, 8, ()).group()
    publication = derived([group], (TierPolicy("pro", 0.5, 1.0, 0, 5.0),), [1], spare_domains=1)
    assert publication.pools[0].usable_requests_per_s == 10
    (warning,) = publication.warnings
    assert warning.startswith("m: 1 spare failure domain(s) cannot be kept: 70 kept spare (spare_domains: 1, which ")


def test_replicas_of_one_domain_fail_together_across_groups() -> None:
    """A label that several groups share is one failure domain, and the largest of all is what is kept spare."""
    base = Drawn(8, "H100", 1.0, (10.0,) * 4, (True,) * 3, 1, ())
    racks = [replaced(base, gpu=gpu, domains=(4, 3)).group() for gpu in ("H100", "H200")]
    assert supply_of(PROMISES[0], by_gpu(racks), 0).usable == 160
    assert supply_of(PROMISES[0], by_gpu(racks), 1).usable == 160 - 2 * 40
    assert supply_of(PROMISES[0], by_gpu(racks), 2).usable == 160 - 2 * 40 - 2 * 30


def test_unlabelled_groups_may_share_their_nodes() -> None:
    """Four and four of two groups on each node of eight are lost together, the dearest where there are more."""
    base = Drawn(8, "H100", 1.0, (10.0,) * 4, (True,) * 3, 8, ())
    dear, slow = base.group(), replaced(base, count=16, slowdown=2.5).group()
    half = replaced(base, rates=(30.0,) * 4, domain_replicas=2, count=1).group()
    third = replaced(base, rates=(30.0,) * 4, domain_replicas=3, count=1).group()

    def usable(*groups: GroupSupply, spare: int = 1) -> Decimal:
        return supply_of(PROMISES[0], by_gpu(groups), spare).usable

    fours = [replaced(base, count=4, slowdown=slowdown).group() for slowdown in (1.0, 1.25)]
    assert usable(*fours, slow) == 40 + 32 + 64 - 72
    assert usable(*fours, slow, spare=2) == 64 - 32
    # A node holds eight eighths, or a half and four of them, and the dearer half of those is what the others leave.
    assert usable(dear, half) == 110 - 80
    assert usable(slow, half) == 94 - 30 - 4 * 4
    assert usable(replaced(slow, gpu="H200"), half) == 94 - 32
    assert usable(slow, third) == Decimal("42.666666666")


def test_a_promise_that_no_replica_keeps_is_named() -> None:
    """A tier whose SLO no load meets has no limits, not limits of 0: it borrows, and is told which bound is missed."""
    group = Drawn(8, "H100", 1.0, (10.0,) * 4, (False,) * 3, 8, ()).group()
    tiers = (TierPolicy("pro", 0.5, 0.5, 0, 5.0), TierPolicy("fast", 0.3, 0.3, 0, 5.0, slo=STRICT))
    publication = derived([group], tiers, [1, 1])
    pro, fast = publication.tiers
    assert (pro.assured, bool(pro.limits), pro.note) == (True, True, "")
    assert (fast.assured, fast.limits, fast.borrow_up_to) == (False, (), 500)
    assert fast.note.startswith(
        "no limits: nothing from 8 × H100 [H100-8b] for chat: p95 TTFT of long is 3 s on an idle"
    )
    assert publication.warnings[0].startswith("m, tier fast: nothing from 8 × H100")


def test_a_pool_that_keeps_no_promise_takes_no_requests() -> None:
    """Replicas that cannot meet their pool's own SLO are not routed to, and are named."""
    group = Drawn(8, "H100", 1.0, (10.0,) * 4, (True,) * 3, 8, ()).group()
    hopeless = msgspec.structs.replace(group, knees={}, infeasible=dict.fromkeys(PROMISES, "too slow"))
    publication = derived([hopeless], (TierPolicy("pro", 0.5, 0.5, 0, 5.0),), [1])
    assert publication.pools[0].groups == ()
    assert publication.warnings == ("m: nothing from 8 × H100 [H100-8b] for chat: too slow",)


def test_minima_come_before_shares_and_what_is_left_is_said() -> None:
    """A tier lifted to its minimum takes from the others in proportion, which their explanation shows."""
    group = Drawn(1, "H100", 1.0, (10.0,) * 4, (True,) * 3, 1, ()).group()
    tiers = (
        TierPolicy("pro", 0.2, 0.2, 0, 5.0, minimum=KeyAmounts(output_tokens=15_750)),
        TierPolicy("free", 0.8, 0.8, 0, 5.0),
    )
    publication = derived([group], tiers, [1, 1])
    pro, free = (by_name(publication, tier.name)["output_tokens"] for tier in tiers)
    # 15,750 of the 31,500 output tokens a minute that 10 requests/s have: half, which leaves 0.625 of a share of 0.8.
    assert pro.per_minute == 15_750
    assert "5 requests/s for the tier's minimum (1 active keys × 15,750 output_tokens ÷ 52.5 ÷ 60 s)" in pro.explanation
    assert free.per_minute == 15_000
    assert "× 0.8 tier share × 0.625 left by the minima of other tiers ÷ 1 active keys" in free.explanation


def test_minima_that_exceed_the_pool_are_cut_alike_and_said() -> None:
    """With less capacity than the minima ask, each keeps the same part, and a warning says which tiers it concerns."""
    group = Drawn(1, "H100", 1.0, (10.0,) * 4, (True,) * 3, 1, ()).group()
    least = KeyAmounts(output_tokens=31_500)
    tiers = (TierPolicy("pro", 0.2, 0.2, 0, 5.0, minimum=least), TierPolicy("free", 0.8, 0.8, 0, 5.0, minimum=least))
    publication = derived([group], tiers, [1, 1])
    assert [by_name(publication, tier.name)["output_tokens"].per_minute for tier in tiers] == [15_000, 15_000]
    (warning,) = publication.warnings
    assert "so 0.5 of each is kept" in warning
    assert "(pro, free)" in warning


def test_best_effort_is_oversold_by_the_factor_that_is_stated() -> None:
    """The limits of the keys of a best-effort tier add up to its ceiling × the oversell; one alone has its ceiling."""
    group = Drawn(1, "H100", 1.0, (100.0,) * 4, (True,) * 3, 1, ()).group()
    tier = TierPolicy("batch", 0.0, 0.5, 0, 5.0, oversell=4.0)
    alone = by_name(derived([group], (tier,), [3]), "batch")["output_tokens"]
    assert alone.per_minute == 150_000  # 50 requests/s × 52.5 tokens × 60 s = 157,500
    publication = derived([group], (tier,), [16])
    key = by_name(publication, "batch")["output_tokens"]
    assert key.per_minute == 39_000  # a quarter of it
    assert "× 0.5 best-effort ceiling × 4 oversell ÷ 16 active keys × 52.5 output tokens" in key.explanation
    assert by_name(publication, "batch", "tier")["output_tokens"].per_minute == 150_000


def test_a_trim_lowers_everything_and_is_told() -> None:
    """What live signals take off the supply is a factor of every limit and of the pool's budget, with its reason."""
    group = Drawn(2, "H100", 1.0, (10.0,) * 4, (True,) * 3, 1, ()).group()
    tiers = (TierPolicy("pro", 0.5, 0.5, 0, 5.0),)
    full, trimmed = derived([group], tiers, [1]), derived([group], tiers, [1], trim=Trim(0.75, "replicas answer 503"))
    assert trimmed.pools[0].usable_requests_per_s == 15
    assert trimmed.pools[0].budget_per_minute == pytest.approx(0.75 * full.pools[0].budget_per_minute, abs=1)
    text = by_name(trimmed, "pro")["requests"].explanation
    assert "\n20 requests/s × 0.75 trim (replicas answer 503) = 15 usable requests/s\n" in text


kinds = st.builds(
    lambda base, prompt, sequence, kv, slots: ReplicaGroup(
        1,
        StepTimeModel(base, prompt, sequence, kv),
        msgspec.structs.replace(LIMITS, max_num_seqs=slots),
        SLO,
    ),
    base=st.floats(0.001, 0.04),
    prompt=st.floats(1e-6, 1e-4),
    sequence=st.floats(0, 1e-4),
    kv=st.floats(0, 1e-6),
    slots=st.sampled_from([16, 256, 1024]),
)
shapes = st.builds(RequestShape, st.integers(1, 30_000), st.integers(1, 4_000))


@unhurried
@given(
    fleet=st.lists(st.tuples(kinds, st.integers(1, 100)), min_size=1, max_size=5, unique_by=lambda each: each[0]),
    classes=st.lists(st.tuples(shapes, st.floats(0.01, 100)), min_size=1, max_size=5),
)
def test_no_gpu_type_is_loaded_beyond_the_cost_of_what_is_admitted(
    fleet: list[tuple[ReplicaGroup, int]], classes: list[tuple[RequestShape, float]]
) -> None:
    """With each class routed in proportion to n/u, the load of every GPU type is Σ λ × cost of the fleet's replicas."""
    groups = [msgspec.structs.replace(kind, count=count) for kind, count in fleet]
    replicas = sum(group.count for group in groups)
    most = sum(rate * fleet_cost_s(groups, shape) for shape, rate in classes) / replicas
    for group in groups:
        load_of_one = 0.0
        for shape, rate in classes:
            weights = {g: g.count / replica_seconds(g, shape) for g in groups}
            routed = rate * weights[group] / sum(weights.values())
            load_of_one += routed * replica_seconds(group, shape) / group.count
        assert load_of_one <= most * (1 + 1e-9)


@unhurried
@given(
    fleet=st.lists(st.tuples(kinds, st.integers(1, 100)), min_size=1, max_size=5, unique_by=lambda each: each[0]),
    mix=st.lists(shapes, min_size=1, max_size=8).map(lambda drawn: WorkloadMix("drawn", tuple(drawn))),
)
def test_costs_of_a_mix_at_once_are_those_of_each_shape(
    fleet: list[tuple[ReplicaGroup, int]], mix: WorkloadMix
) -> None:
    """The vectorised cost is the cost that gateways charge, shape by shape."""
    groups = [msgspec.structs.replace(kind, count=count) for kind, count in fleet]
    expected = [fleet_cost_s(groups, shape) for shape in mix.shapes]
    assert fleet_costs_s(dict(fleet), mix).tolist() == pytest.approx(expected, rel=1e-12)


@unhurried
@given(fleet=drawn_fleets, factor=st.sampled_from([10, 1000]), tiers=drawn_tiers())
def test_ten_times_the_supply_is_ten_times_the_limits(
    fleet: list[Drawn], factor: int, tiers: tuple[TierPolicy, ...]
) -> None:
    """Rates scale with capacity, digit for digit, where neither bounds nor the floor of 1 hold them."""
    plain = tuple(
        msgspec.structs.replace(tier, minimum=KeyAmounts(), maximum=KeyAmounts(), oversell=None) for tier in tiers
    )
    rates = [replaced(each, rates=tuple(round(rate, 2) for rate in each.rates)) for each in fleet]
    faster = [replaced(each, rates=tuple(rate * factor for rate in each.rates)) for each in rates]
    before, after = (derived([each.group() for each in some], plain, [1] * 4) for some in (rates, faster))
    for tier in plain:
        now = by_name(after, tier.name)
        for name, limit in by_name(before, tier.name).items():
            if limit.per_minute >= 10:
                assert now[name].per_minute == pytest.approx(limit.per_minute * factor, rel=2e-3 + 0.1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"slowdown": -1.0}, "slowdown is -1.0; 1 is full speed"),
        ({"slowdown": float("nan")}, "slowdown is nan"),
        ({"gpus_per_replica": 0}, "a replica has at least one GPU"),
        ({"domain_replicas": 0}, "a failure domain holds at least one replica"),
        ({"domains": {"rack-1": 9}}, "the failure domains hold {'rack-1': 9}, the group 8; count each once"),
        ({"knees": {PROMISES[0]: Knee(-1.0, 0.9, 0.5, 0.04, "tpot")}}, "the knee for chat is -1.0 requests/s"),
        ({"knees": {PROMISES[0]: Knee(float("nan"), 0.9, 0.5, 0.04, "tpot")}}, "the knee for chat is nan requests/s"),
    ],
)
def test_a_supply_that_means_nothing_is_refused(changes: dict[str, object], said: str) -> None:
    """Negative, missing and contradictory numbers are refused with what is wrong and what would be right."""
    group = Drawn(8, "H100", 1.0, (10.0,) * 4, (True,) * 3, 8, ()).group()
    with pytest.raises(SupplyError) as refused:
        msgspec.structs.replace(group, **changes)
    assert said in str(refused.value)


def test_counts_and_trims_that_mean_nothing_are_refused() -> None:
    """Negative key counts and trims outside their range never become limits."""
    with pytest.raises(SupplyError, match="has -1 active keys"):
        derived([], (TierPolicy("pro", 0.5, 0.5, 0, 5.0),), [-1])
    for factor in (0.4, 1.1, float("nan")):
        with pytest.raises(SupplyError, match="outside"):
            Trim(factor, "x")
