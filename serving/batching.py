"""A continuous-batching scheduler in virtual time: the state of one replica from step to step.

It schedules as vLLM's V1 scheduler does. Each step, every running decode gets one token; what is left of
``max_num_batched_tokens`` goes to prompts in chunks, those already started first, then waiting ones in order of
arrival while there is a slot and the KV cache has blocks for the whole prompt. When a decode finds no free block, the
request admitted last is preempted and recomputed later. A request's first token comes at the end of the step that
finishes its prompt.

What a step is charged for: its uncached prompt tokens; one sequence for each token it emits; and the context of each
sequence that emits one. Summed over a request this is ``capacity.work_s`` (to half a KV token per output token).

Steps in which only decodes run differ by a constant increment, so a run of them up to the next arrival or finish is
one arithmetic series: simulating costs time per event, not per token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush
from math import ceil, sqrt

from serving.capacity import EngineLimits, RequestShape, StepTimeModel


class SimulatedRequest:
    """One request inside the replica, and in the end what became of it.

    ``context`` and ``left`` describe it as of its last admission: the tokens its prompt has (input, and after a
    preemption the output so far), and those it still has to emit. ``todo`` is what is left of the prefill.
    ``joined_step`` and ``finish_step`` are the first step of its decode and the one after the last, -1 before.
    """

    __slots__ = (
        "arrival_s",
        "context",
        "finish_s",
        "finish_step",
        "first_token_s",
        "joined_step",
        "left",
        "shape",
        "todo",
    )

    def __init__(self, arrival_s: float, shape: RequestShape) -> None:
        self.arrival_s = arrival_s
        self.shape = shape
        self.context = shape.input_tokens
        self.todo = shape.input_tokens - shape.cached_tokens
        self.left = shape.output_tokens
        self.joined_step = -1
        self.finish_step = -1
        self.first_token_s = -1.0
        self.finish_s = -1.0


class BatchingReplica:
    """The replica between two steps.

    All decodes advance together. So a decode is known by the number of the step in which it finishes; its context by
    the steps since it joined; and which decodes next need a KV block, by step number modulo block size.
    """

    def __init__(self, step_time: StepTimeModel, limits: EngineLimits, requests: Sequence[SimulatedRequest]) -> None:
        self._step_time = step_time
        self._limits = limits
        self._requests = requests
        self._arrived = 0
        self._now_s = 0.0
        self._step = 0
        self._waiting: deque[SimulatedRequest] = deque()
        self._prefilling: deque[SimulatedRequest] = deque()
        self._running: dict[SimulatedRequest, None] = {}
        self._finishes: list[tuple[int, int, SimulatedRequest]] = []
        self._heap_ties = 0
        self._decodes = 0
        self._decode_context = 0
        self._free_blocks = limits.request_kv_blocks
        self._block_due = [0] * limits.block_size

    def run(self) -> None:
        """Step until every request has finished."""
        requests, total = self._requests, len(self._requests)
        while True:
            if not self._running and not self._waiting:
                if self._arrived == total:
                    return
                self._now_s = max(self._now_s, requests[self._arrived].arrival_s)
            while self._arrived < total and requests[self._arrived].arrival_s <= self._now_s:
                self._waiting.append(requests[self._arrived])
                self._arrived += 1
            self._advance()

    def _advance(self) -> None:
        """One step with prompts in it, or as many pure decode steps as nothing interrupts."""
        preempted = self._make_room()
        prefilled, prompt_tokens = self._schedule_prompts(may_admit=not preempted)
        if not prompt_tokens:
            self._decode(1 if preempted else self._undisturbed_steps())
            return
        prefilled_context = sum(request.context for request in prefilled)
        self._now_s += self._step_time.step_s(
            prompt_tokens, self._decodes + len(prefilled), self._decode_context + self._decodes + prefilled_context
        )
        self._count_steps(1)
        for request in prefilled:
            self._join_decodes(request)

    def _make_room(self) -> bool:
        """Give this step's decodes their KV blocks, preempting the latest admitted until they suffice. True if any."""
        preempted = False
        while self._free_blocks < self._block_due[self._step % self._limits.block_size]:
            self._preempt()
            preempted = True
        self._free_blocks -= self._block_due[self._step % self._limits.block_size]
        return preempted

    def _preempt(self) -> None:
        request, _ = self._running.popitem()
        self._free_blocks += self._blocks(self._held_context(request))
        if request.finish_step < 0:
            self._prefilling.remove(request)
        else:
            emitted = self._step - request.joined_step
            self._leave_decodes(request, request.context + emitted)
            request.context += emitted + 1
            request.left -= emitted + 1
            request.finish_step = -1
        request.todo = request.context
        self._waiting.appendleft(request)

    def _schedule_prompts(self, may_admit: bool) -> tuple[list[SimulatedRequest], int]:
        """The prompts finished in this step, and the prompt tokens it computes."""
        budget = self._limits.max_num_batched_tokens - self._decodes
        prefilled: list[SimulatedRequest] = []
        spent = 0
        while spent < budget:
            if not self._prefilling and not (may_admit and self._admit()):
                break
            request = self._prefilling[0]
            chunk = min(budget - spent, request.todo)
            request.todo -= chunk
            spent += chunk
            if not request.todo:
                prefilled.append(self._prefilling.popleft())
        return prefilled, spent

    def _admit(self) -> bool:
        """Start the first waiting request, if a slot and the blocks of its whole prompt are free."""
        if not self._waiting or len(self._running) >= self._limits.max_num_seqs:
            return False
        blocks = self._blocks(self._waiting[0].context)
        if blocks > self._free_blocks:
            return False
        self._free_blocks -= blocks
        request = self._waiting.popleft()
        self._running[request] = None
        self._prefilling.append(request)
        return True

    def _join_decodes(self, request: SimulatedRequest) -> None:
        """Its prompt is computed and a token emitted; it decodes from the next step on, or is done."""
        if request.first_token_s < 0:
            request.first_token_s = self._now_s
        if request.left == 1:
            self._finish(request)
            return
        request.joined_step = self._step
        request.finish_step = self._step + request.left - 1
        self._decodes += 1
        self._decode_context += request.context
        self._block_due[(self._step - request.context) % self._limits.block_size] += 1
        self._heap_ties += 1
        heappush(self._finishes, (request.finish_step, self._heap_ties, request))

    def _leave_decodes(self, request: SimulatedRequest, context: int) -> None:
        self._decodes -= 1
        self._decode_context -= context
        self._block_due[(request.joined_step - request.context) % self._limits.block_size] -= 1

    def _finish(self, request: SimulatedRequest) -> None:
        request.finish_s = self._now_s
        self._free_blocks += self._blocks(self._held_context(request))
        del self._running[request]

    def _decode(self, steps: int) -> None:
        """Run that many steps of decodes alone; their contexts grow by one token each step."""
        self._free_blocks -= self._later_blocks(steps)
        growing_context = self._decodes * (steps * (steps + 1) // 2)
        self._now_s += steps * self._step_time.step_s(0, self._decodes, self._decode_context)
        self._now_s += self._step_time.kv_token_s * growing_context
        self._count_steps(steps)

    def _count_steps(self, steps: int) -> None:
        """Every decode has emitted ``steps`` tokens: finish those that are done."""
        self._decode_context += self._decodes * steps
        self._step += steps
        while self._finishes and self._finishes[0][0] <= self._step:
            finish_step, _, request = heappop(self._finishes)
            if request.finish_step == finish_step:
                self._leave_decodes(request, request.context + finish_step - request.joined_step)
                self._finish(request)

    def _undisturbed_steps(self) -> int:
        """Decode steps until the next finish or arrival, as far as the KV cache is sure to suffice; at least 1."""
        steps = self._next_finish_step() - self._step
        if self._arrived < len(self._requests):
            steps = min(steps, self._steps_until(self._requests[self._arrived].arrival_s))
        while steps > 1 and self._later_blocks(steps) > self._free_blocks:
            steps //= 2
        return max(1, steps)

    def _next_finish_step(self) -> int:
        while self._finishes[0][2].finish_step != self._finishes[0][0]:
            heappop(self._finishes)
        return self._finishes[0][0]

    def _steps_until(self, time_s: float) -> int:
        """Decode steps after which ``time_s`` has been reached: n·first + growth·n(n−1)/2 ≥ the time left."""
        left_s = time_s - self._now_s
        growth_s = self._step_time.kv_token_s * self._decodes
        first_s = self._step_time.step_s(0, self._decodes, self._decode_context + self._decodes)
        linear = first_s - growth_s / 2
        return ceil(2 * left_s / (linear + sqrt(linear * linear + 2 * growth_s * left_s)))

    def _later_blocks(self, steps: int) -> int:
        """KV blocks that the decodes take in the next ``steps`` steps but the first, which has its own."""
        block_size = self._limits.block_size
        cycles, rest = divmod(steps - 1, block_size)
        start = self._step + 1
        return cycles * self._decodes + sum(self._block_due[(start + k) % block_size] for k in range(rest))

    def _held_context(self, request: SimulatedRequest) -> int:
        """Tokens of the request in the KV cache."""
        return request.context if request.finish_step < 0 else request.context + self._step - request.joined_step

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._limits.block_size)
