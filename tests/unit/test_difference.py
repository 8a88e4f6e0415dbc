"""A change of limits is told limit by limit, and its fall is the largest share that anybody loses."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.difference import Amount, Difference, LimitChange, NoAmount, difference, fall, snapshot
from ratelimit.policy import LimitRule, OrgPolicy
from ratelimit.publication import Limit, Publication, PublishedPool, PublishedReplica, TierLimits

MODEL = "m"

amounts = st.builds(Amount, st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9))
anything = st.one_of(amounts, st.sampled_from(["unlimited", "borrowed", "nothing"]))


def pool(*gpus: str, rate: float = 10.0, model: str = MODEL) -> PublishedPool:
    replicas = tuple(PublishedReplica(f"http://r{i}", gpu, gpu, 1.0, rate) for i, gpu in enumerate(gpus))
    usable = rate * len(gpus)
    return PublishedPool(model, replicas, (), 4096, 0.25, 64, int(usable * 60_000_000), 1, usable, usable, usable, "")


def tier(*limits: Limit, name: str = "pro", keys: int = 1, assured: bool = True) -> TierLimits:
    return TierLimits(name, MODEL, keys, limits, assured=assured)


def rated(per_minute: int, ceiling: int = 0, burst: int = 10) -> Limit:
    return Limit(
        "output_tokens", per_minute, burst, "", ceiling_per_minute=ceiling, ceiling_burst=burst if ceiling else 0
    )


def published(*tiers: TierLimits, pools: tuple[PublishedPool, ...] = (), epoch: int = 1) -> Publication:
    return Publication(epoch, "", "", True, pools or (pool("H100"),), tiers, (OrgPolicy("acme"),))


def between(before: Publication | None, after: Publication) -> Difference:
    return difference(snapshot(before) if before else None, snapshot(after))


def only(found: Difference) -> LimitChange:
    (change,) = found.limits
    return change


@given(amounts, amounts)
def test_a_fall_is_the_largest_share_lost(before: Amount, after: Amount) -> None:
    """No number of the limit loses more than the fall, and one loses just that."""
    lost = [
        1 - now / was if was else 0.0
        for was, now in zip(msgspec.structs.astuple(before), msgspec.structs.astuple(after), strict=True)
    ]

    assert fall(before, after) == max(0.0, *lost)
    assert 0 <= fall(before, after) <= 1


@given(anything)
def test_what_stays_has_not_fallen(amount: Amount | NoAmount) -> None:
    """A limit compared with itself falls by nothing, whatever it is."""
    assert fall(amount, amount) == 0


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("unlimited", Amount(1, 1), 1.0),
        ("unlimited", "nothing", 1.0),
        ("nothing", Amount(1, 1), 0.0),
        ("nothing", "unlimited", 0.0),
        (Amount(1, 1), "nothing", 1.0),
        (Amount(1, 1), "unlimited", 0.0),
        (Amount(0, 10), Amount(5, 8), pytest.approx(0.2)),
        (Amount(1, 1), "borrowed", 1.0),
        (Amount(0, 10), "borrowed", 0.0),
        ("unlimited", "borrowed", 0.0),
        ("borrowed", Amount(1, 1), 1.0),
        ("borrowed", "nothing", 1.0),
    ],
)
def test_falls_from_and_to_no_amount(before: Amount | NoAmount, after: Amount | NoAmount, expected: float) -> None:
    """A first bound is a fall from no bound, an end of service is a fall to nothing, and neither is one backwards."""
    assert fall(before, after) == expected


def test_the_same_limits_under_another_epoch_are_no_difference() -> None:
    """What callers would not notice is not told."""
    before = published(tier(rated(100)))

    assert between(before, msgspec.structs.replace(before, epoch=2, reason="again")) == Difference()


def test_a_limit_that_is_halved_is_told_with_whom_it_concerns() -> None:
    """The change names tier, limit, amounts, keys and the share that is lost."""
    found = only(between(published(tier(rated(100), keys=2)), published(tier(rated(50), keys=4))))

    assert (found.who, found.limit, found.per) == ("pro", "output_tokens", "key")
    assert (found.before, found.after) == (Amount(100, 100, 10), Amount(50, 50, 10))
    assert (found.keys_before, found.keys_after, found.fall, found.change) == (2, 4, 0.5, -0.5)


def test_a_rise_is_told_as_one() -> None:
    """The relative change of a limit that only rises is its largest rise."""
    assert only(between(published(tier(rated(100))), published(tier(rated(150))))).change == pytest.approx(0.5)


def test_a_ceiling_that_falls_is_a_fall() -> None:
    """What may be borrowed counts as much as what is assured."""
    found = between(published(tier(rated(10, ceiling=100))), published(tier(rated(10, ceiling=20))))

    assert found.largest_fall == pytest.approx(0.8)


def test_best_effort_that_becomes_assured_loses_nothing_by_it() -> None:
    """A tier that only borrowed was assured nothing, so that what it is assured now cannot be less."""
    before = published(tier(rated(100), assured=False))

    assert between(before, published(tier(rated(10, ceiling=100)))).largest_fall == 0


def test_a_bound_on_all_keys_that_only_becomes_visible_is_no_fall() -> None:
    """With the second key a tier's own bound is published; it is what the one key had before."""
    before = published(tier(rated(100, ceiling=200), keys=1))
    together = msgspec.structs.replace(rated(100, ceiling=200), per="tier")

    assert between(before, published(tier(rated(50, ceiling=200), together, keys=2))).largest_fall == 0.5

    several = published(tier(rated(100, ceiling=200), keys=5))
    bound = msgspec.structs.replace(rated(500, ceiling=500, burst=50), per="tier")
    assert between(several, published(tier(rated(100, ceiling=200), bound, keys=5))) == Difference()


def test_a_pool_without_replicas_is_a_fall_to_nothing() -> None:
    """A tier that nothing serves has no limits, which is not the same as being unlimited."""
    before = published(tier(rated(100)))
    found = between(before, published(tier(), pools=(pool(),)))

    assert only(found).after == "nothing"
    assert found.largest_fall == 1
    assert found.pools[0].before is not None
    assert found.pools[0].before.replicas == {"H100": 1}
    assert found.pools[0].after is not None
    assert found.pools[0].after.requests_per_s == 0


def test_a_tier_whose_promise_nothing_can_keep_is_assured_nothing() -> None:
    """It has no limits because none meets its SLO; its pool serves it from what is idle, so only its promise falls."""
    hopeless = msgspec.structs.replace(tier(), note="no load meets its SLO", assured=False, borrow_up_to=500)
    found = only(between(published(tier(rated(100))), published(hopeless)))

    assert (found.after, found.fall) == ("borrowed", 1)
    best_effort = published(tier(rated(100), assured=False))
    assert between(best_effort, published(hopeless)).largest_fall == 0


@pytest.mark.parametrize("note", ["", "no limits: no load meets its SLO"])
def test_a_tier_without_limits_is_not_refused(note: str) -> None:
    """Its pool serves it from what is idle: the first limit takes from it, and so does the end of the pool."""
    free = msgspec.structs.replace(tier(assured=False), note=note)

    assert between(published(free), published(tier(rated(100)))).largest_fall == 1
    lost = only(between(published(free), published(free, pools=(pool(),))))
    assert (lost.after, lost.fall) == ("nothing", 1)
    assert between(published(free, pools=(pool(),)), published(free)).largest_fall == 0


def test_a_tier_that_is_gone_has_nothing_and_a_new_one_had_nothing() -> None:
    """Only the tier that is taken away loses."""
    pro, free = tier(rated(100)), tier(rated(100), name="free")

    assert between(published(pro, free), published(pro)).largest_fall == 1
    assert between(published(pro), published(pro, free)).largest_fall == 0


def test_a_limit_that_is_first_set_is_a_fall_from_no_bound() -> None:
    """A tier that was unlimited in tokens is bounded now."""
    concurrency = Limit("concurrency", 0, 9, "")
    found = only(between(published(tier(concurrency)), published(tier(concurrency, rated(100)))))

    assert (found.before, found.fall, found.change) == ("unlimited", 1, None)


def test_an_operators_rule_is_compared_with_the_one_about_the_same_callers() -> None:
    """A rule's amount is told before and after; its reason and its place in the file make no difference."""
    rule = LimitRule("requests", 100, "org", orgs=("acme",), reason="a")
    before = msgspec.structs.replace(published(tier(rated(100))), rules=(rule,))
    lower = msgspec.structs.replace(rule, amount=25, reason="b")
    found = only(between(before, msgspec.structs.replace(before, rules=(lower,))))

    assert (found.who, found.is_rule, found.fall) == ("org acme", True, 0.75)


def test_of_several_rules_the_lowest_of_each_number_counts() -> None:
    """A rule whose amount is not the lowest still takes away by its burst, and so it is told."""
    rules = (LimitRule("requests", 100, burst=100), LimitRule("requests", 200, burst=200))
    before = msgspec.structs.replace(published(tier(rated(100))), rules=rules)
    tight = (rules[0], LimitRule("requests", 200, burst=10))
    found = only(between(before, msgspec.structs.replace(before, rules=tight)))

    assert (found.before, found.after) == (Amount(0, 100, 100), Amount(0, 100, 10))
    assert found.fall == pytest.approx(0.9)


def test_an_org_that_loses_a_model_is_named() -> None:
    """Access that ends is the largest fall there is, though no number changes."""
    before = published(tier(rated(100)))
    found = between(before, msgspec.structs.replace(before, orgs=(OrgPolicy("acme", ()),)))

    assert found.lost_access == ("org acme may no longer use m",)
    assert found.largest_fall == 1


def test_settings_are_told_in_words() -> None:
    """What is no number is told too, and is no fall."""
    before = published(tier(rated(100)))
    found = between(before, msgspec.structs.replace(before, enforce=False))

    assert [(s.what, s.before, s.after) for s in found.settings] == [("enforce", "yes", "no")]
    assert found.largest_fall == 0


def test_the_first_publication_takes_nothing_away() -> None:
    """Where nothing was published every limit comes from nothing, also those that an operator sets."""
    first = msgspec.structs.replace(published(tier(rated(100))), rules=(LimitRule("requests", 1),))

    assert between(None, first).largest_fall == 0


def test_a_snapshot_names_no_replica_and_survives_json() -> None:
    """What is kept of an epoch does not grow with the fleet, and differs from the epoch by nothing."""
    publication = published(tier(rated(100)), pools=(pool("H100", "H100", "B200"),))
    kept = snapshot(publication)

    assert msgspec.json.decode(msgspec.json.encode(kept), type=type(kept)) == kept
    assert kept.publication.pools[0].replicas == ()
    assert kept.supplies[MODEL].replicas == {"B200": 1, "H100": 2}
    assert difference(kept, snapshot(publication)) == Difference()


def test_falls_are_listed_the_largest_first() -> None:
    """Those at the allowed share are not above it."""
    before = published(tier(rated(100)), tier(rated(100), name="free"), tier(rated(100), name="x"))
    after = published(tier(rated(40)), tier(rated(10), name="free"), tier(rated(50), name="x"))

    assert [change.who for change in between(before, after).falls_above(0.5)] == ["free", "pro"]
