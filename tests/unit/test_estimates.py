"""What requests are expected to need: learned, and not trainable into a burst."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.gateway.estimates import (
    FEWEST_DELTAS,
    FLOOR_SHARE,
    MOST_PER_DELTA,
    MOST_REMEMBERED,
    PRIOR_WEIGHT,
    RATIO_BOUNDS,
    RATIO_STEP,
    Estimates,
    TextRates,
)

PRIOR = 400
RATIO = 0.25

answers = st.lists(st.tuples(st.integers(0, 100_000), st.booleans()), max_size=400)


def expected_output(estimates: Estimates, key: str = "k1") -> int:
    """What is expected of the key's next answer."""
    return estimates.expected(key, "m", PRIOR, RATIO).output_tokens


def note(estimates: Estimates, tokens: int, times: int = 1, ended: bool = True, key: str = "k1") -> None:
    """So many answers of this length."""
    for _ in range(times):
        estimates.note_output(key, "m", tokens, PRIOR, ended)


def test_a_new_key_is_expected_to_need_the_prior() -> None:
    """Nobody is punished for being unknown."""
    assert expected_output(Estimates()) == PRIOR


@given(answers)
def test_nothing_trains_it_below_the_floor(history: list[tuple[int, bool]]) -> None:
    """Whatever a caller's answers are, a quarter of the prior is held for each."""
    estimates = Estimates()
    for tokens, ended in history:
        note(estimates, tokens, ended=ended)
    assert expected_output(estimates) >= ceil(PRIOR * FLOOR_SHARE)


@given(st.lists(st.integers(0, PRIOR), max_size=int(9 * PRIOR_WEIGHT) - 1))
def test_it_takes_many_answers_to_move_it_down(history: list[int]) -> None:
    """Fewer short answers than nine times the prior's weight do not lower the expectation at all."""
    estimates = Estimates()
    for tokens in history:
        note(estimates, tokens)
    assert expected_output(estimates) >= PRIOR


@given(answers)
def test_it_is_never_above_what_was_seen(history: list[tuple[int, bool]]) -> None:
    """Held is at most the prior, or the longest answer and a fifth: a caller is not locked out by its own past."""
    estimates = Estimates()
    for tokens, ended in history:
        note(estimates, tokens, ended=ended)
    longest = max((tokens for tokens, _ in history), default=0)
    assert expected_output(estimates) <= max(PRIOR, ceil(1.2 * longest) + 1)


def test_short_answers_are_learned() -> None:
    """A caller whose answers are short has little held for them."""
    estimates = Estimates()
    note(estimates, 150, times=600)
    assert 150 <= expected_output(estimates) <= 180


def test_what_was_cut_short_teaches_nothing_downwards() -> None:
    """A small maximum, or leaving early, does not make the next answer short."""
    estimates = Estimates()
    note(estimates, 1, times=5_000, ended=False)
    assert expected_output(estimates) == PRIOR
    note(estimates, 150, times=600)
    usual = expected_output(estimates)
    note(estimates, 1, times=5_000, ended=False)
    assert expected_output(estimates) == usual


def test_long_answers_are_learned_at_once_however_they_ended() -> None:
    """A tenth of the prior's weight is enough to raise the expectation."""
    estimates = Estimates()
    note(estimates, 4_000, times=3, ended=False)
    assert expected_output(estimates) >= 4_000


@pytest.mark.parametrize("short", [1, 50, 399])
def test_a_burst_after_training_gains_at_most_the_floors_share(short: int) -> None:
    """Trained down for as long as one likes, a bucket lets through at most 4 × as many long answers at once as for a
    new key; and after a tenth of the memory's weight of them it expects long answers again.
    """
    estimates = Estimates()
    note(estimates, short, times=3_000)
    bucket, at_once_new = 40 * PRIOR, 40
    assert bucket // expected_output(estimates) <= at_once_new / FLOOR_SHARE
    note(estimates, 4_096, times=40)
    assert expected_output(estimates) >= 4_096


def test_old_answers_fade() -> None:
    """A caller that changes its ways is followed, in either direction."""
    estimates = Estimates()
    note(estimates, 4_000, times=1_000)
    note(estimates, 150, times=1_500)
    assert expected_output(estimates) <= 180


def test_no_key_learns_from_another() -> None:
    """One caller's answers change nothing for the others, nor for itself on another model."""
    estimates = Estimates()
    note(estimates, 4_000, times=100, key="k1")
    assert expected_output(estimates, "k2") == PRIOR
    assert estimates.expected("k1", "other", PRIOR, RATIO).output_tokens == PRIOR


def test_only_so_many_keys_are_remembered() -> None:
    """The key that was idle longest is forgotten first, and is new again."""
    estimates = Estimates(most_remembered=2)
    for key in ("k1", "k2", "k1", "k3"):
        note(estimates, 4_000, times=10, key=key)
    assert [expected_output(estimates, key) > PRIOR for key in ("k1", "k2", "k3")] == [True, False, True]
    assert MOST_REMEMBERED >= 10_000


@given(st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**7)), max_size=60))
def test_tokens_per_byte_stay_near_the_profiles(prompts: list[tuple[int, int]]) -> None:
    """However odd the prompts, what is held of the next differs by at most a factor of two, and moves slowly."""
    estimates, before = Estimates(), RATIO
    for prompt_bytes, tokens in prompts:
        estimates.note_prompt("k1", "m", prompt_bytes, tokens, RATIO)
        now = estimates.expected("k1", "m", PRIOR, RATIO).tokens_per_byte
        assert RATIO * RATIO_BOUNDS[0] <= now <= RATIO * RATIO_BOUNDS[1]
        assert abs(now - before) <= (RATIO_BOUNDS[1] - RATIO_BOUNDS[0]) * RATIO * RATIO_STEP + 1e-12
        before = now


@given(st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**7)), max_size=60))
def test_no_callers_prompts_move_what_is_held_of_anothers(prompts: list[tuple[int, int]]) -> None:
    """Whatever one key sends, what is expected of another's prompts stays, and of its own on another model."""
    estimates = Estimates()
    estimates.note_prompt("k2", "m", 1_000, 180, RATIO)
    before = [estimates.expected(key, "m", PRIOR, RATIO) for key in ("k2", "new")]
    for prompt_bytes, tokens in prompts:
        estimates.note_prompt("k1", "m", prompt_bytes, tokens, RATIO)
    assert [estimates.expected(key, "m", PRIOR, RATIO) for key in ("k2", "new")] == before
    assert estimates.expected("k1", "other", PRIOR, RATIO).tokens_per_byte == RATIO


def test_only_so_many_keys_prompts_are_remembered() -> None:
    """The key that was idle longest starts from the profile's ratio again."""
    estimates = Estimates(most_remembered=2)
    for key in ("k1", "k2", "k1", "k3"):
        estimates.note_prompt(key, "m", 1_000, 500, RATIO)
    ratios = [estimates.expected(key, "m", PRIOR, RATIO).tokens_per_byte for key in ("k1", "k2", "k3")]
    assert [ratio > RATIO for ratio in ratios] == [True, False, True]


def test_tokens_per_byte_are_learned() -> None:
    """A caller whose tokens are longer than the profile says has less held for its prompts."""
    estimates = Estimates()
    for _ in range(2_000):
        estimates.note_prompt("k1", "m", 1_000, 180, RATIO)
    assert estimates.expected("k1", "m", PRIOR, RATIO).tokens_per_byte == pytest.approx(0.18, rel=0.01)
    estimates.note_prompt("k1", "m", 10, 1_000, RATIO)  # too short to say anything
    assert estimates.expected("k1", "m", PRIOR, RATIO).tokens_per_byte == pytest.approx(0.18, rel=0.01)


def test_dear_deltas_count_at_once_and_cheap_ones_slowly() -> None:
    """Reading cheap streams to their end does not make the dear ones cheap that are left."""
    estimates = Estimates()
    assert estimates.text_rates("k1", "m", RATIO).tokens(100, 4_000) == 4_000 * RATIO
    estimates.note_deltas("k1", "m", 100, 100)
    assert estimates.text_rates("k1", "m", RATIO).tokens(100, 400) == 100
    estimates.note_deltas("k1", "m", 100, 300)
    assert estimates.text_rates("k1", "m", RATIO).tokens(100, 400) == 300
    for _ in range(20):
        estimates.note_deltas("k1", "m", 100, 100)
    assert 240 < estimates.text_rates("k1", "m", RATIO).tokens(100, 400) < 260
    estimates.note_deltas("k1", "m", FEWEST_DELTAS - 1, 10_000)  # too few to say anything
    assert estimates.text_rates("k1", "m", RATIO).tokens(100, 400) < 260
    assert estimates.text_rates("k2", "m", RATIO) == TextRates(RATIO)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**7)), max_size=60))
def test_a_text_is_never_nearly_free(streams: list[tuple[int, int]]) -> None:
    """Whatever a caller's streams taught, one that is left owes a token for each delta and half of what its text says,
    and no more than the most for each delta.
    """
    estimates = Estimates(most_remembered=1)
    for deltas, tokens in streams:
        estimates.note_deltas("k1", "m", deltas, tokens)
    owed = estimates.text_rates("k1", "m", RATIO).tokens(100, 4_000)
    assert max(100, 2_000 * RATIO) <= owed <= max(100 * MOST_PER_DELTA, 4_000 * RATIO)
    estimates.note_deltas("k2", "m", 100, 500)
    assert estimates.text_rates("k1", "m", RATIO).tokens_per_delta is None
