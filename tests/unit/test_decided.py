"""What was decided is taken apart into changes that lead to it, and a count of keys that is held oversells nothing."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.decided import (
    Adopted,
    Decided,
    KeptKeys,
    changes,
    held_together,
    issued_keys,
    kept_keys,
    resumed,
    standing,
)
from ratelimit.keys import new_key
from ratelimit.overrides import Override, setting
from ratelimit.policy import OrgPolicy, Policy, TierPolicy
from ratelimit.publication import Limit, Publication, TierLimits
from serving.fleet import ReplicaSpec
from serving.profile import load_profile


def adopted(url: str = "http://a") -> Adopted:
    spec = ReplicaSpec(url, "m", "H100", "h100-llama-3.1-8b")
    profiles = {spec.profile: load_profile(spec.profile)}
    return Adopted(Policy((), (), enforce=True), (spec,), profiles, {"m": 5.0}, 0.5)


ADOPTED = (adopted("http://a"), adopted("http://b"))
OVERRIDES = (
    Override("pro", None, "requests", 1, 10.0, "x", id="o_1"),
    Override("pro", None, "requests", 2, 10.0, "y", id="o_2"),
)
pairs = st.tuples(st.sampled_from(["pro", "free"]), st.sampled_from("mn"))
counts = st.dictionaries(pairs, st.integers(0, 9))
issued = st.fixed_dictionaries({"pro": st.integers(0, 9), "free": st.integers(0, 9)})
overrides = st.lists(st.sampled_from(OVERRIDES), unique=True).map(tuple)
states = st.builds(Decided, st.sampled_from(ADOPTED), overrides, issued, counts)


@given(states, states)
def test_all_changes_together_lead_from_what_stands_to_what_is_wanted(before: Decided, wanted: Decided) -> None:
    """No change is missing and none is too many; each has a digest of its own."""
    reached = now = standing(before, wanted, 0)
    found = changes(now, wanted)
    for change in found:
        after = change.applied(reached)
        assert after != reached
        reached = after

    assert reached == wanted
    assert len({change.digest for change in found}) == len(found)


@given(states, states)
def test_a_digest_says_where_from_and_where_to(now: Decided, wanted: Decided) -> None:
    """The same change has the same digest again, also after a restart; the way back has another."""
    adopted = msgspec.json.decode(msgspec.json.encode(now.adopted), type=Adopted)
    again = resumed(adopted, msgspec.json.decode(msgspec.json.encode(kept_keys(now)), type=KeptKeys))
    digests = [change.digest for change in changes(now, wanted)]

    assert again == now
    assert [change.digest for change in changes(again, wanted)] == digests
    assert not {change.digest for change in changes(wanted, now)} & set(digests)


@given(states, counts)
def test_what_is_observed_is_no_decision(before: Decided, in_use: dict[tuple[str, str], int]) -> None:
    """Keys that come into use, or go out of it, change what stands at once: nothing is left to decide."""
    wanted = msgspec.structs.replace(before, active_keys=in_use)

    assert standing(before, wanted, 0) == wanted
    assert changes(standing(before, wanted, 0), wanted) == []


def test_while_more_keys_wait_their_tier_counts_no_more_than_before() -> None:
    """The limits of the keys that were there stay, or rise as some go out of use; other tiers are not held."""
    before = Decided(ADOPTED[0], (), {"pro": 4, "free": 2}, {("pro", "m"): 4, ("free", "m"): 1})
    wanted = Decided(ADOPTED[0], (), {"pro": 9, "free": 2}, {("pro", "m"): 9, ("free", "m"): 2, ("pro", "n"): 5})
    now = standing(before, wanted, 0)

    assert now.active_keys == {("pro", "m"): 4, ("free", "m"): 2, ("pro", "n"): 0}
    assert [change.cause for change in changes(now, wanted)] == ["keys issued to pro from 4 to 9"]


def test_revoked_keys_and_first_keys_are_no_decision_to_weigh() -> None:
    """Fewer keys take nothing from those that stay, and the first ones of a tier from nobody."""
    before = Decided(ADOPTED[0], (), {"pro": 9, "free": 0}, {("pro", "m"): 9})
    wanted = Decided(ADOPTED[0], (), {"pro": 1, "free": 7}, {("pro", "m"): 1, ("free", "m"): 7})

    assert standing(before, wanted, 0) == wanted


def test_overrides_end_at_their_time() -> None:
    """What was set until then was decided to end then."""
    before = Decided(ADOPTED[0], OVERRIDES, {}, {})

    assert standing(before, before, 9.0).overrides == OVERRIDES
    assert standing(before, before, 10.0).overrides == ()


def test_issued_keys_are_those_that_may_be_used_of_known_tiers() -> None:
    """A key with two secrets is one key; one that has expired, or of an unknown tier or org, is none."""
    policy = Policy((TierPolicy("pro", 0.5, 1.0, 0, 5.0),), (), enforce=True, orgs=(OrgPolicy("acme"),))
    one = new_key("acme", "pro", "a", 0.0, None)[1]
    records = [
        one,
        msgspec.structs.replace(one, digest="another"),
        new_key("acme", "pro", "b", 0.0, 5.0)[1],
        new_key("acme", "gone", "c", 0.0, None)[1],
        new_key("nobody", "pro", "d", 0.0, None)[1],
    ]

    assert issued_keys(records, [policy], 1.0) == {"pro": 2}
    assert issued_keys(records, [policy], 5.0) == {"pro": 1}


def two_coloured(keys: int) -> TierLimits:
    tokens = Limit("output_tokens", 100, 10, "", ceiling_per_minute=1000, ceiling_burst=90)
    return TierLimits("pro", "m", keys, (tokens, Limit("concurrency", 0, 5, "")))


def published(tier: TierLimits) -> Publication:
    return Publication(1, "", "", True, (), (tier,))


def test_more_keys_than_are_counted_are_bounded_together() -> None:
    """All of them are assured what those counted were; what may be borrowed stays."""
    held = held_together(published(two_coloured(3)), {("pro", "m"): 30}, ())
    (together,) = (limit for limit in held.limits("pro", "m") if limit.per == "tier")

    assert (together.per_minute, together.burst) == (300, 30)
    assert (together.ceiling_per_minute, together.ceiling_burst) == (1000, 90)
    assert "wait for approval" in together.explanation


def test_as_many_keys_as_are_counted_need_no_bound() -> None:
    """Fewer keys than counted, or another tier's, change nothing."""
    as_it_was = published(two_coloured(3))

    assert held_together(as_it_was, {("pro", "m"): 3, ("free", "m"): 30}, ()) == as_it_was


def test_a_bound_that_is_published_stays() -> None:
    """A tier that has a bound on all its keys is given no second one."""
    tier = two_coloured(3)
    bound = msgspec.structs.replace(tier.limits[0], per="tier", per_minute=300)
    as_it_was = published(msgspec.structs.replace(tier, limits=(*tier.limits, bound)))

    assert held_together(as_it_was, {("pro", "m"): 30}, ()) == as_it_was


def test_what_an_operator_has_set_for_each_key_bounds_nothing_else() -> None:
    """An override is about each key, however many there are."""
    override = setting("pro", "output_tokens", 100, 10.0, "trial")
    as_it_was = published(two_coloured(3))

    assert held_together(as_it_was, {("pro", "m"): 30}, (override,)) == as_it_was


def test_best_effort_is_bounded_by_the_pool() -> None:
    """A tier that is assured nothing cannot be assured too much."""
    as_it_was = published(msgspec.structs.replace(two_coloured(3), assured=False))

    assert held_together(as_it_was, {("pro", "m"): 30}, ()) == as_it_was
