"""What a virtual GPU does in one step: which requests emit a token, which token, and when the step is over.

Pure, and nothing of vLLM: ``virtual_gpu`` feeds it from the scheduler's output. Two rules differ from what a first
guess would write. A request emits only when the step completes all tokens known of it, the output so far included:
after a preemption the output is computed again and must not be emitted again. And a step is over at an absolute time
derived from the one before, since relative sleeps drift (6 % alone, 38 % at 100 streams, measured).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

#: Bounds of the answer's length where the request names none.
SHORTEST_ANSWER = 16
LONGEST_ANSWER = 512
#: How far behind its deadlines a device may catch up; the rest of a stall of the host is forgotten.
MAX_LAG_S = 0.25


class ScheduledRequest(NamedTuple):
    """One request in a step: its tokens in the KV cache before, those added, and its output tokens so far."""

    request_id: str
    computed_tokens: int
    scheduled_tokens: int
    output_tokens: int


class StepLoad(NamedTuple):
    """What a step is timed by: uncached prompt tokens, sequences that emit, and the KV tokens that those read."""

    prompt_tokens: int
    sequences: int
    kv_tokens: int


class Answer(NamedTuple):
    """What is known of a request from its admission: its prompt, and how many tokens it will emit before its EOS."""

    prompt_tokens: int
    output_tokens: int


class VirtualBatch:
    """The requests on the device, and the token that each emits next."""

    def __init__(self, word_ids: Sequence[int], eos_id: int) -> None:
        self._word_ids = tuple(word_ids)
        self._eos_id = eos_id
        self._answers: dict[str, Answer] = {}

    def admit(self, request_id: str, answer: Answer) -> None:
        """A request is scheduled for the first time."""
        self._answers[request_id] = answer

    def release(self, request_ids: Iterable[str]) -> None:
        """These requests have ended, whatever ended them."""
        for request_id in request_ids:
            self._answers.pop(request_id, None)

    def step(self, scheduled: Iterable[ScheduledRequest]) -> tuple[list[list[int]], StepLoad]:
        """The tokens emitted by each scheduled request, in order (none while its prefill lasts), and the load."""
        answers, words, eos = self._answers, self._word_ids, self._eos_id
        emitted: list[list[int]] = []
        prompt_tokens = sequences = kv_tokens = 0
        for request_id, computed, added, outputs in scheduled:
            answer = answers[request_id]
            known = answer.prompt_tokens + outputs
            if not outputs or computed < known - 1:
                prompt_tokens += added
            if computed + added < known:
                emitted.append([])
                continue
            sequences += 1
            kv_tokens += computed + added
            emitted.append([eos if outputs + 1 == answer.output_tokens else words[outputs % len(words)]])
        return emitted, StepLoad(prompt_tokens, sequences, kv_tokens)


class StepClock:
    """Absolute deadlines for steps that follow each other without a gap."""

    def __init__(self) -> None:
        self._deadline_s = 0.0

    def restart(self, now_s: float) -> None:
        """The device was idle until now."""
        self._deadline_s = now_s

    def advance(self, duration_s: float, now_s: float) -> float:
        """When the step that follows the last one is over; at most ``MAX_LAG_S`` of lateness is made good."""
        self._deadline_s = max(self._deadline_s, now_s - MAX_LAG_S) + duration_s
        return self._deadline_s


def answer_length(seed: int | None, prompt_hash: int, max_tokens: int, room: int) -> int:
    """Tokens of the answer, EOS included: the request's own choice, or one drawn from the request.

    A ``seed`` within ``max_tokens`` *is* the length, so that a caller can choose when the model "wants" to end.
    Without one, an answer runs to ``max_tokens`` where that is less than the ``room`` left in the context; where it is
    not, no length was asked for, and it is drawn from the prompt's hash, so that the same prompt has the same answer.
    """
    if seed is not None and 0 < seed <= max_tokens:
        return seed
    if max_tokens < room:
        return max_tokens + 1
    drawn = SHORTEST_ANSWER + prompt_hash % (LONGEST_ANSWER - SHORTEST_ANSWER + 1)
    return min(drawn, max_tokens)
