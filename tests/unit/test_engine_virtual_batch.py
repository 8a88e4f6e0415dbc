"""What a virtual GPU emits in a step, what the step is timed by, and when it is over."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.virtual_batch import (
    LONGEST_ANSWER,
    MAX_LAG_S,
    SHORTEST_ANSWER,
    Answer,
    ScheduledRequest,
    StepClock,
    StepLoad,
    VirtualBatch,
    answer_length,
)

WORD_IDS = (10, 11, 12)
EOS_ID = 1


def batch_with(**answers: Answer) -> VirtualBatch:
    batch = VirtualBatch(WORD_IDS, EOS_ID)
    for request_id, answer in answers.items():
        batch.admit(request_id, answer)
    return batch


def test_unfinished_prefill_emits_nothing() -> None:
    """A chunk of a prompt takes time and yields no token."""
    emitted, load = batch_with(a=Answer(100, 5)).step([ScheduledRequest("a", 0, 60, 0)])
    assert emitted == [[]]
    assert load == StepLoad(prompt_tokens=60, sequences=0, kv_tokens=0)


def test_last_chunk_emits_the_first_token() -> None:
    """The step that completes a prompt emits, and reads all of the context."""
    emitted, load = batch_with(a=Answer(100, 5)).step([ScheduledRequest("a", 60, 40, 0)])
    assert emitted == [[WORD_IDS[0]]]
    assert load == StepLoad(prompt_tokens=40, sequences=1, kv_tokens=100)


def test_cached_prompt_tokens_are_not_charged() -> None:
    """Tokens found in the prefix cache count as computed before the first step."""
    _, load = batch_with(a=Answer(100, 5)).step([ScheduledRequest("a", 96, 4, 0)])
    assert load == StepLoad(prompt_tokens=4, sequences=1, kv_tokens=100)


def test_decode_reads_its_context_and_no_prompt() -> None:
    """A decode is charged for one sequence and the context that it reads, its new token's included."""
    emitted, load = batch_with(a=Answer(100, 5)).step([ScheduledRequest("a", 101, 1, 2)])
    assert emitted == [[WORD_IDS[2]]]
    assert load == StepLoad(prompt_tokens=0, sequences=1, kv_tokens=102)


def test_preempted_request_emits_only_when_its_output_is_computed_again() -> None:
    """After a preemption the prompt and the output so far are prefilled; nothing is emitted twice."""
    batch = batch_with(a=Answer(100, 50))
    emitted, load = batch.step([ScheduledRequest("a", 0, 105, 10)])
    assert (emitted, load) == ([[]], StepLoad(105, 0, 0))
    emitted, load = batch.step([ScheduledRequest("a", 105, 5, 10)])
    assert (emitted, load) == ([[WORD_IDS[10 % 3]]], StepLoad(5, 1, 110))


def test_answer_ends_with_eos_at_its_length() -> None:
    """The last of a request's own tokens is EOS, which ends it in vLLM."""
    batch = batch_with(a=Answer(4, 3))
    emitted = [batch.step([ScheduledRequest("a", 4 + n, 1, n + 1)])[0] for n in (0, 1)]
    assert emitted == [[[WORD_IDS[1]]], [[EOS_ID]]]


def test_loads_of_a_mixed_step_add_up() -> None:
    """Prefills and decodes share a step; the emitted lists keep the schedule's order."""
    emitted, load = batch_with(a=Answer(8, 9), b=Answer(20, 9)).step(
        [ScheduledRequest("b", 0, 16, 0), ScheduledRequest("a", 8, 1, 1)]
    )
    assert emitted == [[], [WORD_IDS[1]]]
    assert load == StepLoad(16, 1, 9)


def test_released_request_is_forgotten() -> None:
    """What has ended takes no memory, and releasing it twice is harmless."""
    batch = batch_with(a=Answer(8, 9))
    batch.release(["a"])
    batch.release(["a", "never seen"])
    with pytest.raises(KeyError):
        batch.step([ScheduledRequest("a", 0, 8, 0)])


@given(
    durations_s=st.lists(st.floats(0.001, 0.2), min_size=1, max_size=50),
    overheads_s=st.lists(st.floats(0.0, 0.01), min_size=50, max_size=50),
)
def test_late_wake_ups_do_not_add_up(durations_s: list[float], overheads_s: list[float]) -> None:
    """However late each step was woken, the last deadline is the sum of the durations after the start."""
    clock, now_s = StepClock(), 1000.0
    clock.restart(now_s)
    for duration_s, overhead_s in zip(durations_s, overheads_s, strict=False):
        deadline_s = clock.advance(duration_s, now_s)
        now_s = max(now_s, deadline_s) + overhead_s
    assert deadline_s == pytest.approx(1000.0 + sum(durations_s))


def test_long_stall_is_not_made_good() -> None:
    """A host that stood still for a minute must not serve that minute in a burst."""
    clock = StepClock()
    clock.restart(0.0)
    clock.advance(0.01, 0.0)
    assert clock.advance(0.01, 60.0) == pytest.approx(60.0 - MAX_LAG_S + 0.01)


@pytest.mark.parametrize(
    ("seed", "max_tokens", "room", "length"),
    [
        (7, 100, 4000, 7),  # the seed is the length
        (100, 100, 4000, 100),
        (101, 100, 4000, 101),  # out of reach: as without a seed
        (0, 100, 4000, 101),
        (-5, 100, 4000, 101),
        (None, 100, 4000, 101),  # beyond max_tokens: the request runs to them
        (None, 4000, 4000, SHORTEST_ANSWER),  # nothing was asked for: drawn
        (None, 10, 10, 10),  # never beyond the context
    ],
)
def test_answer_length(seed: int | None, max_tokens: int, room: int, length: int) -> None:
    """The request's own choice comes first, then its max_tokens, then a drawn length."""
    assert answer_length(seed, 0, max_tokens, room) == length


@given(prompt_hash=st.integers(-(2**62), 2**62))
def test_drawn_length_is_bounded(prompt_hash: int) -> None:
    """No prompt draws an answer that runs to the end of the context."""
    assert SHORTEST_ANSWER <= answer_length(None, prompt_hash, 10**6, 10**6) <= LONGEST_ANSWER
