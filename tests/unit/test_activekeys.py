from __future__ import annotations

import tracemalloc
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.activekeys import EXACT_UP_TO, ActiveKeys, Owner, owners, shown_count
from ratelimit.keys import KeyRecord

IDLE_S = 900.0
LONG_AGO = -1e6


def old_keys(count: int, tier: str = "pro") -> dict[str, Owner]:
    """Keys that were made long ago."""
    return {f"k_{n}": Owner(f"k_{n}", tier, LONG_AGO, None) for n in range(count)}


def record(key_id: str, **changed: object) -> KeyRecord:
    fields: dict[str, object] = {"digest": "d", "org": "acme", "tier": "pro", "name": "n", "created_at": 0.0}
    return KeyRecord(id=key_id, **(fields | changed))  # type: ignore[arg-type]  # the names above are the struct's


def test_a_key_counts_on_the_model_it_is_used_on_until_it_is_idle() -> None:
    """The share of a tier is divided by those that use it, model by model."""
    keys = ActiveKeys(IDLE_S)
    keys.adopt(old_keys(3), ["a", "b"], 0.0)
    assert keys.counts(0.0) == {}

    keys.used("k_0", "a", 10.0)
    keys.used("k_1", "a", 10.0)
    keys.used("k_1", "b", 500.0)
    assert keys.counts(500.0) == {("pro", "a"): 2, ("pro", "b"): 1}

    keys.used("k_0", "a", 600.0)
    assert keys.counts(10.0 + IDLE_S + 10) == {("pro", "a"): 1, ("pro", "b"): 1}
    assert keys.counts(600.0 + IDLE_S + 10) == {}


def test_a_new_key_counts_on_every_model_at_once() -> None:
    """Whoever gets a key is about to use it; its share is there when it comes."""
    keys = ActiveKeys(IDLE_S)
    keys.adopt(old_keys(1) | {"k_new": Owner("k_new", "pro", 95.0, None)}, ["a", "b"], 100.0)

    assert keys.counts(100.0) == {("pro", "a"): 1, ("pro", "b"): 1}
    assert keys.counts(95.0 + IDLE_S + 10) == {}


def test_a_key_that_is_revoked_or_expires_counts_no_more_at_once() -> None:
    """It can use nothing, whenever it was last used; nor does a late word of its use bring it back."""
    keys = ActiveKeys(IDLE_S)
    known = old_keys(3)
    keys.adopt(known | {"k_1": Owner("k_1", "pro", LONG_AGO, 50.0)}, ["a"], 0.0)
    for key_id in known:
        keys.used(key_id, "a", 10.0)
    assert keys.counts(49.0) == {("pro", "a"): 3}
    assert keys.counts(50.0) == {("pro", "a"): 2}

    keys.adopt({"k_0": known["k_0"]}, ["a"], 60.0)
    keys.used("k_1", "a", 61.0)
    keys.used("k_2", "a", 61.0)
    assert keys.counts(61.0) == {("pro", "a"): 1}


def test_a_key_that_changes_its_tier_counts_in_the_new_one_from_its_next_use() -> None:
    """Its use in the old tier takes nothing from those who stay."""
    keys = ActiveKeys(IDLE_S)
    keys.adopt(old_keys(2), ["a"], 0.0)
    keys.used("k_0", "a", 1.0)
    keys.used("k_1", "a", 1.0)

    keys.adopt({"k_0": Owner("k_0", "pro", LONG_AGO, None), "k_1": Owner("k_1", "free", LONG_AGO, None)}, ["a"], 2.0)
    keys.used("k_1", "a", 3.0)

    assert keys.counts(3.0) == {("pro", "a"): 1, ("free", "a"): 1}


def test_a_key_with_several_secrets_is_one_key_until_the_last_ends() -> None:
    """A rotation gives its caller neither a second share nor an early end."""
    found = owners(
        [record("k_1", expires_at=100.0), record("k_1", digest="e", created_at=50.0), record("k_2", revoked_at=7.0)]
    )

    assert found == {"k_1": Owner("k_1", "pro", 0.0, None), "k_2": Owner("k_2", "pro", 0.0, 7.0)}


def test_a_key_that_may_be_used_for_longer_counts_beyond_its_old_end() -> None:
    """A rotation puts off its end; the old one is void."""
    keys = ActiveKeys(IDLE_S)
    for until in (50.0, 80.0):
        keys.adopt({"k_0": Owner("k_0", "pro", LONG_AGO, until)}, ["a"], 0.0)
    keys.used("k_0", "a", 10.0)

    assert keys.counts(60.0) == {("pro", "a"): 1}
    assert keys.counts(80.0) == {}


def test_a_new_model_is_in_use_by_the_keys_made_lately() -> None:
    """Nothing is new of them, but they may come there too."""
    keys = ActiveKeys(IDLE_S)
    for models in (["a"], ["a", "b"]):
        keys.adopt({"k_0": Owner("k_0", "pro", 0.0, None)}, models, 1.0)

    assert keys.counts(1.0) == {("pro", "a"): 1, ("pro", "b"): 1}


def test_a_new_key_costs_itself_not_all_keys() -> None:
    """Of those that are as they were, even if made lately, nothing is said again."""

    class Told(ActiveKeys):
        told = 0

        def used(self, key_id: str, model: str, at_s: float) -> None:
            self.told += 1
            super().used(key_id, model, at_s)

    keys = Told(IDLE_S)
    known = {f"k_{n}": Owner(f"k_{n}", "pro", 0.0, None) for n in range(100)}
    keys.adopt(known, ["a"], 1.0)
    assert keys.told == 100

    keys.adopt(known | {"k_new": Owner("k_new", "pro", 1.0, None)}, ["a"], 1.0)
    assert keys.told == 101


def test_a_million_keys_have_room() -> None:
    """A use takes an entry of a dictionary and of a list, some 66 bytes: not a set, a pair and a time of its own."""
    keys = ActiveKeys(IDLE_S)
    keys.adopt(old_keys(10_000), ["a", "b"], 0.0)
    keys.used("k_0", "a", 0.0)
    tracemalloc.start()
    try:
        for n in range(10_000):
            for model in "ab":
                keys.used("".join(("k_", str(n))), model, 1.0 + n / 1000)
        used_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert used_bytes / 20_000 < 120


def test_one_key_of_a_thousand_changes_no_limit() -> None:
    """The count is a step of a grid: keys that come and go one at a time leave it where it is."""
    shown = shown_count(0, 1000)
    for exact in (1001, 999, 1002, 998, 1000, 1003, 997):
        shown_now = shown_count(shown, exact)
        assert shown_now == shown
    assert shown <= 1.04 * 1000


@pytest.mark.parametrize("exact", [1, 7, EXACT_UP_TO])
def test_few_keys_are_counted_exactly(exact: int) -> None:
    """Where one key is a large part of the share, each counts, up and down."""
    assert shown_count(exact + 5, exact) == shown_count(max(0, exact - 5), exact) == exact


@given(st.lists(st.integers(0, 2_000_000), min_size=1, max_size=40))
def test_the_shown_count_never_lacks_a_key_and_has_few_too_many(counts: list[int]) -> None:
    """At once up: the shares of all keys in use add up to at most the tier's; and never far above the count."""
    shown = 0
    for exact in counts:
        shown = shown_count(shown, exact)
        assert exact <= shown <= 1.07 * exact + 1


@given(
    st.lists(
        st.tuples(
            st.floats(0, 60), st.sampled_from(["use", "remove", "add"]), st.integers(0, 5), st.sampled_from("ab")
        ),
        max_size=120,
    )
)
def test_counting_as_it_happens_is_counting_all(steps: list[tuple[float, str, int, str]]) -> None:
    """The incremental count is, within its grain, that of a book that looks at every key every time."""
    idle_s, now_s = 100.0, 0.0
    keys, known = ActiveKeys(idle_s), old_keys(6)
    keys.adopt(dict(known), ["a", "b"], now_s)
    last: dict[tuple[str, str], float] = {}
    for wait_s, what, number, model in steps:
        now_s += wait_s
        key_id = f"k_{number}"
        if what == "use" and key_id in known:
            keys.used(key_id, model, now_s)
            last[key_id, model] = now_s
        elif what == "remove":
            known.pop(key_id, None)
            last = {use: at_s for use, at_s in last.items() if use[0] != key_id}
        else:
            known.setdefault(key_id, Owner(key_id, "pro", LONG_AGO, None))
        keys.adopt(dict(known), ["a", "b"], now_s)
        least = Counter(("pro", model) for (_, model), at_s in last.items() if now_s - at_s < idle_s)
        most = Counter(("pro", model) for (_, model), at_s in last.items() if now_s - at_s < idle_s + 10)
        found = keys.counts(now_s)
        assert all(least[pair] <= found.get(pair, 0) <= most[pair] for pair in (("pro", "a"), ("pro", "b")))
