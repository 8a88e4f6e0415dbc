"""Limits follow from capacity and policy, hold what they promise, and say where they come from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from itertools import combinations
from math import fsum
from typing import NamedTuple, get_args

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ratelimit.derive import TTFT_SLACK_SHARE, GroupSupply, derive
from ratelimit.explain import shown
from ratelimit.gateway.charges import charges_for
from ratelimit.gateway.hold import Usage
from ratelimit.gateway.terms import terms_by_tier
from ratelimit.keylimits import REQUEST_HEADROOM
from ratelimit.overrides import FrozenLimit, Override, active, freezing
from ratelimit.policy import (
    BEST_BORROW,
    LEAST_BORROW,
    Policy,
    PoolPolicy,
    Promise,
    TierPolicy,
    borrow_thresholds,
    promise_carriers,
    promises_of,
)
from ratelimit.publication import (
    MOST_BUDGET_BURST,
    MOST_BURST,
    POOL_TICK_US,
    Limit,
    LimitName,
    LimitRule,
    Publication,
    PublishedPool,
    PublishedReplica,
)
from serving.capacity import EngineLimits, ReplicaGroup, RequestShape, Slo, StepTimeModel, WorkloadMix, fleet_cost_s
from serving.stepsim import Knee

MODEL = "llama-3.1-8b"
SLO = Slo(1.0, 0.05)
STEP_TIME = StepTimeModel(0.0045, 2.2e-5, 2.5e-5, 4e-8)
LIMITS = EngineLimits(1024, 8192, 450_000, 32_768)
KNEE = Knee(14.2, 0.9, 0.5, 0.049, "tpot")
MIX = WorkloadMix("test", tuple(RequestShape(20 * k, 5 * k) for k in range(1, 21)))
PRO = TierPolicy("pro", 0.6, 0.6, 0, 5.0)
FREE = TierPolicy("free", 0.3, 0.3, 1, 5.0)


class One(NamedTuple):
    """A replica that serves ``requests_per_s``, slowed as it is, of whatever is promised."""

    requests_per_s: float = 14.2
    slowdown: float = 1.0
    gpu: str = "H100"

    def group(self, promises: Iterable[Promise]) -> GroupSupply:
        at_full_speed = self.requests_per_s * self.slowdown
        return GroupSupply(
            ReplicaGroup(1, STEP_TIME.slowed(self.slowdown), LIMITS, SLO.slowed(self.slowdown)),
            self.gpu,
            1,
            f"{self.gpu}-8b",
            self.slowdown,
            {promise: msgspec.structs.replace(KNEE, requests_per_s=at_full_speed) for promise in promises},
            f"{self.gpu}-8b, estimated 2026-11-21",
            replicas=(
                PublishedReplica(
                    "http://127.0.0.1:8100", self.gpu, f"{self.gpu}-8b", self.slowdown, self.requests_per_s
                ),
            ),
        )


def supply(requests_per_s: float = 14.2, slowdown: float = 1.0, gpu: str = "H100") -> One:
    return One(requests_per_s, slowdown, gpu)


def assured(name: str, share: float, burst_s: float = 5.0) -> TierPolicy:
    """A tier that never borrows."""
    return TierPolicy(name, share, share, 0, burst_s)


def policy(*tiers: TierPolicy, mix: WorkloadMix = MIX, spare_domains: int = 0) -> Policy:
    pool = PoolPolicy(MODEL, SLO, mix, 512, spare_domains, 32_768, 0.25)
    return Policy(tiers or (PRO, FREE), (pool,), enforce=True)


def published(
    *supplies: One,
    rules: Policy | None = None,
    keys: dict[str, int] | None = None,
    overrides: tuple[Override, ...] = (),
) -> Publication:
    counts = {"pro": 3, "free": 3} if keys is None else keys
    rules = rules or policy()
    groups = [one.group(promises_of(rules.tiers, rules.pools[0])) for one in supplies]
    active_keys = {(tier, MODEL): count for tier, count in counts.items()}
    return derive(7, "2026-11-21T10:00:00Z", "test", rules, {MODEL: groups}, active_keys, overrides)


def limits(publication: Publication, tier: str = "pro") -> dict[str, Limit]:
    """The limits of each key of a tier."""
    return {limit.name: limit for limit in publication.limits(tier, MODEL) if limit.per == "key"}


def together(publication: Publication, tier: str = "pro") -> dict[str, Limit]:
    """The limits of all keys of a tier together."""
    return {limit.name: limit for limit in publication.limits(tier, MODEL) if limit.per == "tier"}


#: On a shared machine a single example may be slow; pytest's timeout bounds the whole.
unhurried = settings(deadline=None, max_examples=50)

rates = st.floats(0.01, 5000, allow_nan=False)
fleets = st.lists(rates, min_size=1, max_size=6)
mixes = st.lists(st.builds(RequestShape, st.integers(1, 30_000), st.integers(1, 4_000)), min_size=1, max_size=8).map(
    lambda shapes: WorkloadMix("drawn", tuple(shapes))
)


def test_limits_of_a_plain_fleet() -> None:
    """The four limits of a fleet small enough to compute by hand are those numbers."""
    derived = limits(published(supply(), supply()))
    # 28.4 requests/s × 0.6 ÷ 3 = 5.68 a key; mean input 210, mean output 52.5
    assert {name: limit.per_minute for name, limit in derived.items()} == {
        "requests": 680,
        "input_tokens": 71_000,
        "output_tokens": 17_000,
        "concurrency": 0,
    }
    # 5 s of 5.68 requests/s; Little: 5.68 × (1 s + 52.5 × 0.05 s) × 4
    assert derived["output_tokens"].burst == 1_400
    assert derived["requests"].burst == 56
    assert derived["concurrency"].burst == 82


def test_explanation_names_every_factor_and_its_source() -> None:
    """A limit tells count, device, speed, supply, provenance, SLO, share and keys."""
    text = limits(published(supply(1.42, 10), supply(1.42, 10)))["output_tokens"].explanation
    assert text == (
        "2 × H100 (1:10 speed) × 1.42 requests/s [H100-8b, estimated 2026-11-21; knee at p95 TTFT ≤ 10 s, "
        "TPOT ≤ 500 ms; 0.9 of the closed form] = 2.84 usable requests/s\n"
        "2.84 requests/s × 0.6 tier share ÷ 3 active keys × 52.5 output tokens × 60 s = 1,789 → 1,700/min; "
        "burst 140: 5 s of it, at least 110 (1.905 mean requests, the p99)"
    )


def recomputed(limit: Limit) -> int:
    """The limit as someone with the explanation and a calculator finds it, the supply line included."""
    supply_line, formula = re.sub(r"\([^()]*\)|\[[^]]*\]", "", limit.explanation).split("\n")[:2]
    supplied, usable = supply_line.split(" = ")
    supplied, _, spare = supplied.partition(" − ")
    kinds = [re.findall(r"(?:^|× )([\d.,]+)", kind) for kind in supplied.split(" + ")]
    total = sum(Fraction(count.replace(",", "")) * Fraction(rate.replace(",", "")) for count, rate in kinds)
    total -= Fraction((re.findall(r"[\d.,]+", spare) or ["0"])[0].replace(",", ""))
    assert total == Fraction(usable.split()[0].replace(",", ""))
    for sign, value in re.findall(r"([×÷]) ([\d.,]+)", formula.split(" = ")[0]):
        factor = Fraction(value.replace(",", ""))
        total = total * factor if sign == "×" else total / factor
    return shown(total)


@unhurried
@given(fleet=fleets, mix=mixes, keys=st.integers(1, 500), share=st.floats(0.01, 1), spare=st.integers(0, 3))
def test_printed_factors_give_the_enforced_number(
    fleet: list[float], mix: WorkloadMix, keys: int, share: float, spare: int
) -> None:
    """Multiplying what the explanation prints gives exactly the limit that is enforced."""
    rules = policy(assured("pro", share), mix=mix, spare_domains=spare)
    derived = limits(published(*map(supply, fleet), rules=rules, keys={"pro": keys}))
    for limit in derived.values():
        enforced = limit.per_minute or limit.burst
        assert recomputed(limit) == enforced or (limit.name == "concurrency" and recomputed(limit) < enforced)
        assert f"→ {enforced:,}" in limit.explanation


@unhurried
@given(fleet=fleets, more=rates, keys=st.integers(1, 50), spare=st.integers(0, 4))
def test_another_replica_never_lowers_a_limit(fleet: list[float], more: float, keys: int, spare: int) -> None:
    """Adding a replica of any size leaves every rate and burst at least where it was, spares or not."""
    rules = policy(spare_domains=spare)
    before = limits(published(*map(supply, fleet), rules=rules, keys={"pro": keys}))
    after = limits(published(*map(supply, fleet), supply(more), rules=rules, keys={"pro": keys}))
    for name, limit in before.items():
        assert after[name].per_minute >= limit.per_minute
        assert after[name].burst >= limit.burst


@unhurried
@given(fleet=fleets, factor=st.floats(1, 20))
def test_faster_replicas_never_lower_a_limit(fleet: list[float], factor: float) -> None:
    """The same replicas with more requests/s each leave every limit at least where it was."""
    before = limits(published(*map(supply, fleet)))
    after = limits(published(*(supply(rate * factor) for rate in fleet)))
    assert all(after[name].per_minute >= before[name].per_minute for name in before)
    assert all(after[name].burst >= before[name].burst for name in before)


@unhurried
@given(
    fleet=fleets,
    mix=mixes,
    parts=st.lists(st.integers(1, 100), min_size=1, max_size=5),
    counts=st.lists(st.integers(0, 100), min_size=5, max_size=5),
    ceiling=st.floats(0.01, 1),
)
def test_assured_tokens_never_exceed_the_usable_capacity(
    fleet: list[float], mix: WorkloadMix, parts: list[int], counts: list[int], ceiling: float
) -> None:
    """Summed over all keys of all assured tiers, token limits stay within capacity, but for the floor of 1 per key."""
    shares = [part / sum(parts) for part in parts]
    tiers = [TierPolicy(f"t{i}", share, max(share, ceiling), 0, 5.0) for i, share in enumerate(shares)]
    rules = policy(*tiers, mix=mix)
    keys = {tier.name: count for tier, count in zip(tiers, counts, strict=False)}
    publication = published(*map(supply, fleet), rules=rules, keys=keys)
    usable_per_minute = {
        "input_tokens": publication.pools[0].usable_input_tokens_per_s * 60,
        "output_tokens": publication.pools[0].usable_output_tokens_per_s * 60,
    }
    for name, usable in usable_per_minute.items():
        promised = [(limits(publication, t.name)[name].per_minute, max(1, keys[t.name])) for t in tiers]
        above_floor = sum(per_minute * count for per_minute, count in promised if per_minute > 1)
        assert above_floor <= usable * (1 + 1e-9)


@unhurried
@given(fleet=fleets, factor=st.sampled_from([10, 100, 1000]))
def test_token_limits_scale_with_the_lengths(fleet: list[float], factor: int) -> None:
    """Requests ten times as long get ten times the tokens a minute, and the same number of requests."""
    longer = tuple(RequestShape(s.input_tokens * factor, s.output_tokens * factor) for s in MIX.shapes)
    before = limits(published(*map(supply, fleet)))
    after = limits(published(*map(supply, fleet), rules=policy(mix=WorkloadMix("longer", longer))))
    for name in ("input_tokens", "output_tokens"):
        # Both are cut to two digits, and small ones to whole tokens.
        assert before[name].per_minute * factor <= after[name].per_minute < (before[name].per_minute * 1.1 + 1) * factor
    assert after["requests"].per_minute == before["requests"].per_minute


@unhurried
@given(others=st.integers(0, 1000))
def test_a_tier_is_not_changed_by_the_keys_of_another(others: int) -> None:
    """However many keys another tier has, none included, the limits of this one stay."""
    assert limits(published(supply(), keys={"pro": 4})) == limits(published(supply(), keys={"pro": 4, "free": others}))


def test_a_tier_without_keys_is_shown_what_its_first_key_would_get() -> None:
    """With no active key the share is divided by one, not by zero."""
    assert limits(published(supply(), keys={})) == limits(published(supply(), keys={"pro": 1}))


def test_requests_do_not_bind_before_tokens_in_the_mix() -> None:
    """At the rate at which the mix uses up its tokens, half of the request limit is free, of rate and burst."""
    derived = limits(published(supply()))
    requests_by_tokens = derived["output_tokens"].per_minute / MIX.mean_output_tokens
    assert derived["requests"].per_minute >= requests_by_tokens * REQUEST_HEADROOM * 0.9
    assert derived["concurrency"].burst >= derived["requests"].burst


@unhurried
@given(rate=rates, mix=mixes, burst_s=st.floats(0.001, 60))
@example(rate=1.0, mix=WorkloadMix("means are cut", tuple(RequestShape(1, n) for n in (1, 1, 1199, 2901))), burst_s=1.0)
def test_a_burst_admits_a_p99_request_of_the_mix(rate: float, mix: WorkloadMix, burst_s: float) -> None:
    """However short the burst, its buckets have room for the largest ordinary request."""
    rules = policy(TierPolicy("pro", 0.5, 1.0, 0, burst_s), mix=mix)
    derived = limits(published(supply(rate), rules=rules))
    assert derived["input_tokens"].burst >= max(s.input_tokens for s in mix.shapes)
    assert derived["output_tokens"].burst >= max(s.output_tokens for s in mix.shapes)
    assert derived["requests"].burst >= 1


@unhurried
@given(rate=st.floats(1e-9, 1e-3), keys=st.integers(1, 100_000))
def test_no_limit_is_zero_while_a_replica_is_healthy(rate: float, keys: int) -> None:
    """However little there is to share, nobody is shut out by a limit of 0."""
    derived = limits(published(supply(rate), keys={"pro": keys}))
    assert all(limit.burst >= 1 for limit in derived.values())
    assert all(limit.per_minute >= 1 for name, limit in derived.items() if name != "concurrency")


def test_concurrency_has_room_for_a_burst_of_requests() -> None:
    """A burst that the request limit admits is not refused for being in flight at once, and two always may be."""
    bursty = limits(published(supply(), rules=policy(assured("pro", 0.6, 60.0))))
    assert bursty["concurrency"].burst == bursty["requests"].burst == 340
    uniform = WorkloadMix("uniform", (RequestShape(10, 10),))
    tiny = policy(assured("pro", 0.6, 0.001), mix=uniform)
    assert limits(published(supply(0.001), rules=tiny))["concurrency"].burst == 2


def test_no_healthy_replica() -> None:
    """Without replicas the pool stays known but has no budget, and its tiers have no limits."""
    publication = published()
    pool = publication.pool(MODEL)
    assert pool is not None
    assert (pool.replicas, pool.groups, pool.budget_per_minute, pool.budget_burst) == ((), (), 0, 0)
    assert (pool.max_model_len, pool.tokens_per_byte) == (32_768, 0.25)
    assert pool.explanation.startswith("no replica is healthy = 0 usable requests/s")
    assert publication.limits("pro", MODEL) == ()


def test_spares_are_the_largest_replicas_but_never_the_last() -> None:
    """The largest are kept free, as far as the worth of one replica is still given out."""
    fleet = (supply(30.0), supply(20.0), supply(10.0))
    usable = [published(*fleet, rules=policy(spare_domains=n)).pools[0].usable_requests_per_s for n in (0, 1, 2, 3)]
    assert usable == [60.0, 30.0, 30.0, 30.0]
    assert "− 30 kept spare (spare_domains: 1)" in published(*fleet, rules=policy(spare_domains=1)).pools[0].explanation


def mean_cost_s(pool: PublishedPool) -> float:
    return fsum(fleet_cost_s(pool.groups, shape) for shape in MIX.shapes) / len(MIX.shapes)


def test_pool_budget_is_the_cost_of_the_usable_requests() -> None:
    """The budget's rate lets the usable rate of the mix through, and no more."""
    pool = published(supply(), supply()).pools[0]
    assert pool.budget_per_minute == pytest.approx(28.4 * mean_cost_s(pool) * 60e6, rel=1e-3)
    assert pool.groups == (ReplicaGroup(2, STEP_TIME, LIMITS, SLO),)


def test_it_is_published_of_which_group_each_replica_is() -> None:
    """Runs in the order of the replicas: two supplies of one kind, with another between them, are of one group."""
    (pool,) = published(supply(), supply(slowdown=2.0, gpu="H200"), supply(gpu="B200")).pools
    slow = ReplicaGroup(1, STEP_TIME.slowed(2.0), LIMITS, SLO.slowed(2.0))
    assert pool.groups == (ReplicaGroup(2, STEP_TIME, LIMITS, SLO), slow)
    assert [replica.gpu for replica in pool.replicas] == ["H100", "H200", "B200"]
    assert pool.runs == ((0, 1), (1, 1), (0, 1))


@unhurried
@given(fleet=fleets, mix=mixes)
def test_pool_burst_is_what_may_wait_within_the_ttft_bound(fleet: list[float], mix: WorkloadMix) -> None:
    """A full pool bucket drains in half of the TTFT bound, unless one p99 request alone takes longer."""
    pool = published(*map(supply, fleet), rules=policy(mix=mix)).pools[0]
    waiting_us = pool.budget_per_minute / 60 * SLO.ttft_s * TTFT_SLACK_SHARE
    costs_us = [fleet_cost_s(pool.groups, shape) * 1e6 for shape in mix.shapes]
    lowest = min(filter(None, borrow_thresholds(policy(mix=mix).tiers).values()), default=1000)
    assert pool.budget_burst == pytest.approx(max(waiting_us, *(c * 1000 / lowest for c in costs_us)), rel=1e-6, abs=3)
    assert pool.budget_burst * lowest // 1000 >= max(costs_us) - 1


def test_the_pool_waits_as_the_slowest_bound_allows_on_each_replica() -> None:
    """Of replicas at unlike speeds, the tightest TTFT bound decides what may wait; the explanation says how long."""
    pool = published(supply(1.42, 10), supply(14.2)).pools[0]
    assert pool.budget_burst == pytest.approx(pool.usable_requests_per_s * mean_cost_s(pool) * 0.5e6, rel=1e-3)
    assert "replica-seconds: 0.5 s of it, the part of the TTFT bound that a request may wait" in pool.explanation


def test_limits_stay_within_what_the_meter_counts() -> None:
    """However large supply, burst and overrides are, a gateway can charge every limit, and a cut one says so."""
    rules = policy(TierPolicy("pro", 1.0, 1.0, 0, 3600.0))
    overrides = (
        Override("pro", None, "requests", 2**53 - 1, 1e10, "x"),
        Override("pro", None, None, None, 1e10, "x", (FrozenLimit(MODEL, "concurrency", 0, 2**60),)),
    )
    publication = published(supply(1e15), rules=rules, keys={"pro": 10}, overrides=overrides)
    for terms in terms_by_tier(publication).values():
        charges = charges_for("k_0", terms, Usage(0, 0), 0)
    assert [charge.capacity for charge in charges] == [MOST_BURST] * 3 + [2**53 - 1, MOST_BUDGET_BURST]
    assert charges[-1].tick_us == POOL_TICK_US
    assert charges[0].rate == charges[-1].rate == 2**53 - 1
    assert limits(publication)["requests"].explanation.endswith(
        "\ncut to 9,007,199,254,740,991/min, burst 150,119,987: more cannot be counted exactly"
    )
    assert limits(publication)["concurrency"].explanation.endswith(
        "\ncut to 9,007,199,254,740,991 in flight: more cannot be counted exactly"
    )
    assert publication.pools[0].explanation.endswith(
        "(the p99 request within 1 of it), cut to what can be counted exactly"
    )


def test_best_effort_tier_is_limited_by_its_ceiling() -> None:
    """Each key of a tier with share 0 may take the tier's ceiling, all together too, and nothing is assured."""
    batch = TierPolicy("batch", 0.0, 0.2, 9, 5.0)
    publication = published(supply(), rules=policy(batch), keys={"batch": 2})
    derived = limits(publication, "batch")
    assert derived["output_tokens"].per_minute == shown(Fraction("14.2") * Fraction("0.2") * Fraction("52.5") * 60)
    assert "× 0.2 best-effort ceiling × 52.5" in derived["output_tokens"].explanation


def test_unlike_replicas_are_listed_apart() -> None:
    """Each kind of replica has its own count, supply and source in the explanation."""
    publication = published(supply(14.2), supply(20.5, gpu="H200"), supply(14.2))
    assert publication.pools[0].usable_requests_per_s == float(Decimal("48.9"))
    text = limits(publication)["requests"].explanation
    assert "2 × H100 × 14.2 requests/s [H100-8b, " in text
    assert " + 1 × H200 × 20.5 requests/s [H200-8b, " in text


def test_set_override_is_enforced_and_visible() -> None:
    """A limit that an operator set has that number, and says who, until when, why, and what it would be."""
    until = 1_795_262_400.0
    override = Override("pro", None, "output_tokens", 5_000, until, "incident 12")
    plain, derived = limits(published(supply())), limits(published(supply(), overrides=(override,)))
    assert (derived["output_tokens"].per_minute, derived["output_tokens"].burst) == (5_000, 410)
    assert derived["output_tokens"].explanation.startswith(
        "set, with a burst of 5 s, to 5,000/min, burst 410 by operator until 2026-11-21T12:00Z: incident 12\n"
        "without it: 1 × H100"
    )
    assert derived["input_tokens"] == plain["input_tokens"]


def test_set_concurrency_means_requests_in_flight() -> None:
    """An override of concurrency sets the number in flight, not a rate."""
    derived = limits(published(supply(), overrides=(Override("pro", MODEL, "concurrency", 3, 1e10, "calm"),)))
    assert (derived["concurrency"].per_minute, derived["concurrency"].burst) == (0, 3)
    assert derived["concurrency"].explanation.startswith("set to 3 in flight by operator until ")


def test_overrides_reach_only_their_tier_and_model() -> None:
    """Another tier, or another model, is not touched."""
    other_model = Override("pro", "other", "requests", 1, 1e10, "x")
    other_tier = Override("free", MODEL, "requests", 1, 1e10, "x")
    assert limits(published(supply(), overrides=(other_model, other_tier))) == limits(published(supply()))


def test_the_later_override_wins() -> None:
    """Of two overrides about one limit the one made last is enforced."""
    first, second = (Override("pro", None, "requests", n, 1e10, "x") for n in (10, 20))
    assert limits(published(supply(), overrides=(first, second)))["requests"].per_minute == 20


def test_frozen_limits_stay_while_the_fleet_changes() -> None:
    """A freeze keeps rate and burst as they were, in an explanation that gives today's derivation too."""
    frozen = tuple(
        FrozenLimit(MODEL, limit.name, limit.per_minute, limit.burst) for limit in limits(published(supply())).values()
    )
    override = Override("pro", None, None, None, 1e10, "migration", frozen)
    derived = limits(published(supply(), supply(), overrides=(override,)))
    assert [(f.per_minute, f.burst) for f in frozen] == [(x.per_minute, x.burst) for x in derived.values()]
    assert derived["requests"].explanation.startswith("frozen at 340/min, burst 28 by operator until ")
    assert "without it: 2 × H100" in derived["requests"].explanation


def test_an_override_gives_nothing_where_there_is_no_replica() -> None:
    """Frozen limits do not outlive the last replica: there is nothing behind them."""
    override = Override("pro", None, "requests", 100, 1e10, "x")
    assert published(overrides=(override,)).limits("pro", MODEL) == ()


@unhurried
@given(now_s=st.floats(0, 2e9), until=st.floats(0, 2e9))
def test_overrides_expire(now_s: float, until: float) -> None:
    """An override changes limits before its end and not from then on."""
    override = Override("pro", None, "requests", 1, until, "x")
    derived = limits(published(supply(), overrides=active([override], now_s)))
    assert (derived["requests"].per_minute == 1) == (now_s < until)


def test_publication_survives_json() -> None:
    """What the controller writes, a gateway reads back equal."""
    publication = published(supply(), supply(20.0, 10, "H200"))
    assert msgspec.json.decode(msgspec.json.encode(publication), type=Publication) == publication


def test_shown_numbers_have_two_significant_digits() -> None:
    """Every published rate is cut to two digits, never raised."""
    for limit in limits(published(supply(14.27), supply(3.333))).values():
        value = limit.per_minute or limit.burst
        assert value == shown(Fraction(value))


ANY_LIMITS = [names for count in range(5) for names in combinations(get_args(LimitName), count)]
tier_policies = st.builds(
    lambda share, above, priority, burst_s, unlimited: TierPolicy(
        "pro", share, min(1.0, share + above) or 0.1, priority, burst_s, unlimited
    ),
    share=st.sampled_from([0.0, 0.25, 0.6, 1.0]),
    above=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    priority=st.integers(0, 9),
    burst_s=st.floats(0.001, 60),
    unlimited=st.sampled_from(ANY_LIMITS),
).filter(lambda tier: tier.ceiling > 0)


def test_a_share_below_its_ceiling_has_two_colours() -> None:
    """Tokens are assured by share and active keys, and may be exceeded up to the ceiling, undivided."""
    publication = published(supply(), supply(), rules=policy(TierPolicy("pro", 0.6, 0.9, 0, 5.0)), keys={"pro": 3})
    output = limits(publication)["output_tokens"]
    # 28.4 × 0.6 ÷ 3 × 52.5 × 60 and 28.4 × 0.9 × 52.5 × 60
    assert (output.per_minute, output.burst) == (17_000, 1_400)
    assert (output.ceiling_per_minute, output.ceiling_burst) == (80_000, 6_700)
    _, first, second = output.explanation.split("\n")
    assert first.startswith("assured: 28.4 requests/s × 0.6 tier share ÷ 3 active keys × 52.5 output tokens × 60 s = ")
    assert second.startswith("ceiling, while others leave it idle: 28.4 requests/s × 0.9 ceiling × 52.5 output tokens ")
    assert limits(publication)["requests"].per_minute == shown(Fraction("28.4") * Fraction("0.9") * 2 * 60)
    assert limits(publication)["requests"].ceiling_per_minute == 0


@unhurried
@given(fleet=fleets, mix=mixes, tier=tier_policies, keys=st.integers(1, 40))
def test_every_tier_derives(fleet: list[float], mix: WorkloadMix, tier: TierPolicy, keys: int) -> None:
    """Any share, ceiling and set of unlimited names derive: the rest has limits, and only promises have ceilings."""
    publication = published(*map(supply, fleet), rules=policy(tier, mix=mix), keys={"pro": keys})
    derived = limits(publication)
    (of_tier,) = publication.tiers

    assert set(derived) == set(get_args(LimitName)) - set(tier.unlimited)
    two_colours = {name for name, limit in derived.items() if limit.ceiling_per_minute}
    assert two_colours == (set(promise_carriers(tier)) if 0 < tier.share < tier.ceiling else set())
    for limit in publication.limits("pro", MODEL):
        assert limit.burst >= 1
        if limit.ceiling_per_minute:
            assert limit.ceiling_per_minute >= limit.per_minute
            assert limit.ceiling_burst >= limit.burst
    assert (of_tier.borrow_up_to > 0) == (tier.share < tier.ceiling or not promise_carriers(tier))
    assert of_tier.assured == (tier.share > 0 and bool(promise_carriers(tier)))


@unhurried
@given(fleet=fleets, mix=mixes, tier=tier_policies, keys=st.integers(1, 40))
def test_a_tier_never_takes_more_than_its_ceiling(
    fleet: list[float], mix: WorkloadMix, tier: TierPolicy, keys: int
) -> None:
    """Its keys together get at most the ceiling's tokens a minute: by the tier's own bucket, or as each is divided."""
    publication = published(*map(supply, fleet), rules=policy(tier, mix=mix), keys={"pro": keys})
    pool, derived, shared = publication.pools[0], limits(publication), together(publication)
    usable = {"input_tokens": pool.usable_input_tokens_per_s, "output_tokens": pool.usable_output_tokens_per_s}
    for name, per_s in usable.items():
        if name not in derived or tier.ceiling == 1:
            continue
        each = derived[name]
        most = keys * (each.ceiling_per_minute or each.per_minute)
        floor = keys * each.per_minute if each.ceiling_per_minute else keys
        if name in shared:
            most = min(most, shared[name].ceiling_per_minute or shared[name].per_minute)
        assert most <= max(per_s * 60 * tier.ceiling * (1 + 1e-9), floor)


def test_keys_that_may_take_all_are_bounded_together() -> None:
    """Below a ceiling of 1 several keys share the ceiling, and the sum of what each is assured stays assured."""
    rules = policy(TierPolicy("pro", 0.3, 0.5, 0, 5.0))
    publication = published(supply(), rules=rules, keys={"pro": 4})
    key, tier = limits(publication)["output_tokens"], together(publication)["output_tokens"]
    assert (tier.per_minute, tier.burst) == (4 * key.per_minute, 4 * key.burst)
    assert (tier.ceiling_per_minute, tier.ceiling_burst) == (key.ceiling_per_minute, key.ceiling_burst)
    assert tier.explanation.startswith("all keys of pro together: 4 × what each is assured")
    assert together(published(supply(), rules=rules, keys={"pro": 1})) == {}
    assert together(published(supply(), rules=policy(TierPolicy("pro", 0.3, 1.0, 0, 5.0)))) == {}


@unhurried
@given(
    priorities=st.lists(st.integers(0, 20), min_size=1, max_size=9),
    ceiling=st.sampled_from([0.1, 0.5]),
    shares=st.lists(st.sampled_from([0.0, 0.1]), min_size=9, max_size=9),
)
def test_a_better_priority_borrows_at_least_as_much(priorities: list[int], ceiling: float, shares: list[float]) -> None:
    """Thresholds never rise with the number of the priority, the best borrower has 0.9, and non-borrowers have none."""
    tiers = [TierPolicy(f"t{i}", shares[i], ceiling, p, 5.0) for i, p in enumerate(priorities)]
    thresholds = borrow_thresholds(tiers)
    borrowers = sorted((tier.priority, thresholds[tier.name]) for tier in tiers if tier.share < tier.ceiling)
    found = [threshold for _, threshold in borrowers]
    assert found == sorted(found, reverse=True)
    assert all(LEAST_BORROW <= threshold <= BEST_BORROW for threshold in found)
    assert found[:1] in ([], [BEST_BORROW])
    assert all(thresholds[tier.name] == 0 for tier in tiers if tier.share == tier.ceiling)


def test_thresholds_are_ranked() -> None:
    """Each distinct priority of the borrowers is a step below the one before, down to half."""
    tiers = [TierPolicy(str(i), 0.1, 0.1 if i == 0 else 1.0, i, 5.0) for i in range(7)]
    assert list(borrow_thresholds(tiers).values()) == [0, 900, 800, 700, 600, 500, 500]


@pytest.mark.parametrize("unlimited", ANY_LIMITS, ids=" ".join)
@pytest.mark.parametrize(("share", "ceiling"), [(0.3, 0.3), (0.3, 0.5), (0.0, 0.5)])
def test_every_set_of_limits_may_be_unset(share: float, ceiling: float, unlimited: tuple[LimitName, ...]) -> None:
    """Whatever is unset, the rest is derived, and whoever no rated limit bounds meets the pool."""
    tier = TierPolicy("pro", share, ceiling, 0, 5.0, unlimited)
    publication = published(supply(), rules=policy(tier))
    assert set(limits(publication)) == set(get_args(LimitName)) - set(unlimited)
    bounded = bool({"requests", "input_tokens", "output_tokens"} - set(unlimited))
    (of_tier,) = publication.tiers
    assert of_tier.assured == (share > 0 and bounded)
    assert of_tier.borrow_up_to == (0 if share == ceiling and bounded else BEST_BORROW)
    assert set(together(publication)) == (set() if share == ceiling else set(promise_carriers(tier)))


def test_who_is_unlimited_by_policy_is_not_told_of_a_promise_that_nothing_keeps() -> None:
    """No note is of a limit that was never to be; where nothing serves the tier, the note says so all the same."""
    rules = policy(TierPolicy("pro", 0.3, 0.5, 0, 5.0, get_args(LimitName)))
    (served,), (unserved,) = published(supply(), rules=rules).tiers, published(rules=rules).tiers
    assert (served.limits, served.note) == ((), "")
    assert unserved.note.startswith("no limits: ")


def test_the_bursts_that_keys_are_assured_fit_the_tiers_ceiling() -> None:
    """Where many keys' least bursts exceed the ceiling's, the tier's bucket holds them all."""
    rules = policy(TierPolicy("pro", 0.3, 0.5, 0, 0.01))
    publication = published(supply(), rules=rules, keys={"pro": 50})
    tier = together(publication)["output_tokens"]
    assert tier.ceiling_burst == tier.burst == 50 * limits(publication)["output_tokens"].burst


def test_requests_carry_the_promise_where_tokens_are_unlimited() -> None:
    """Without token limits the request limit is assured at the mean rate, without headroom, and may borrow."""
    tier = TierPolicy("pro", 0.5, 1.0, 0, 5.0, ("input_tokens", "output_tokens"))
    requests = limits(published(supply(), rules=policy(tier), keys={"pro": 1}))["requests"]
    assert (requests.per_minute, requests.ceiling_per_minute) == (420, 850)
    assert "since the requests carry the promise alone" in requests.explanation


def test_a_set_override_allows_no_borrowing_beyond_it() -> None:
    """A limit of two colours that an operator sets is the ceiling too, and no longer bounds the tier as a whole."""
    rules = policy(TierPolicy("pro", 0.3, 0.5, 0, 5.0))
    override = Override("pro", None, "output_tokens", 500, 1e10, "x")
    publication = published(supply(), rules=rules, overrides=(override,))
    output = limits(publication)["output_tokens"]
    assert output.per_minute == output.ceiling_per_minute == 500
    assert output.burst == output.ceiling_burst
    assert set(together(publication)) == {"input_tokens"}


def test_frozen_ceilings_stay() -> None:
    """A freeze keeps what may be borrowed as it was, for each key and for the tier."""
    rules = policy(TierPolicy("pro", 0.3, 0.5, 0, 5.0))
    before = published(supply(), rules=rules)
    override = freezing(before, "pro", 1e10, "x")
    after = published(supply(), supply(), rules=rules, overrides=(override,))
    for found in (limits, together):
        for name, limit in found(before).items():
            now = found(after)[name]
            assert (now.per_minute, now.burst) == (limit.per_minute, limit.burst)
            assert (now.ceiling_per_minute, now.ceiling_burst) == (limit.ceiling_per_minute, limit.ceiling_burst)


def test_the_prior_of_an_answer_is_the_mixs_p90_unless_set() -> None:
    """Where the operator names no default the 90th percentile of the mix's outputs is published."""
    rules = policy()
    pool = msgspec.structs.replace(rules.pools[0], default_max_output=None)
    derived = published(supply(), rules=msgspec.structs.replace(rules, pools=(pool,))).pools[0]
    assert derived.default_max_output == 90
    assert published(supply()).pools[0].default_max_output == 512


def test_what_the_operator_decides_is_published() -> None:
    """Rules, shadow keys, shadow, holds and priority scheduling reach the gateways as they were decided."""
    tier = TierPolicy("pro", 0.5, 1.0, 3, 5.0, holds="maximum", shadow=True)
    rules = policy(tier)
    rule = LimitRule("requests", 10)
    pool = msgspec.structs.replace(rules.pools[0], priority_scheduling=True)
    rules = msgspec.structs.replace(rules, pools=(pool,), rules=(rule,), shadow_keys=("k_1",))
    publication = published(supply(), rules=rules)
    assert (publication.rules, publication.shadow_keys) == ((rule,), ("k_1",))
    assert publication.pools[0].priority_scheduling
    (of_tier,) = publication.tiers
    assert (of_tier.priority, of_tier.holds, of_tier.shadow) == (3, "maximum", True)
