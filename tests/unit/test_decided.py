"""What was decided is taken apart into changes that lead to it, and a count of keys that is held oversells nothing."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.decided import Adopted, Decided, KeptDecided, changes, held_together, kept, resumed
from ratelimit.overrides import Override, setting
from ratelimit.policy import Policy
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
counts = st.dictionaries(st.tuples(st.sampled_from("ab"), st.sampled_from("mn")), st.integers(0, 9))
states = st.builds(
    Decided,
    st.sampled_from(ADOPTED),
    st.lists(st.sampled_from(OVERRIDES), unique=True).map(tuple),
    counts,
)


def counted(decided: Decided) -> dict[tuple[str, str], int]:
    return {where: count for where, count in decided.active_keys.items() if count}


@given(states, states)
def test_all_changes_together_lead_from_one_state_to_the_other(now: Decided, wanted: Decided) -> None:
    """No change is missing and none is too many; each has a digest of its own."""
    found = changes(now, wanted)
    reached = now
    for change in found:
        after = change.applied(reached)
        assert after != reached
        reached = after

    assert (reached.adopted, reached.overrides) == (wanted.adopted, wanted.overrides)
    assert counted(reached) == counted(wanted)
    assert len({change.digest for change in found}) == len(found)


@given(states, states)
def test_a_digest_says_where_from_and_where_to(now: Decided, wanted: Decided) -> None:
    """The same change has the same digest again, also after a restart; the way back has another."""
    again = resumed(msgspec.json.decode(msgspec.json.encode(kept(now)), type=KeptDecided))
    digests = [change.digest for change in changes(now, wanted)]

    assert again == now
    assert [change.digest for change in changes(again, wanted)] == digests
    assert not {change.digest for change in changes(wanted, now)} & set(digests)


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
    assert "waits for approval" in together.explanation


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
