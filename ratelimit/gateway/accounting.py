"""A reservation's life within one request: admitted, corrected while it runs, settled once.

Only admission is waited for. All that follows goes to the store in tasks of the ``Ledger``, one after the other. While
the store is away a settlement is tried again, for a bounded time and in bounded numbers; what cannot be settled is
counted, and ends with its lease. What was admitted while the store was away is charged to it later (``local``).

What a request owes in the end:

- what the engine reported, also where the client left or the engine broke off mid-stream;
- the estimated prompt, where a stream ended before anything was reported;
- the estimated prompt too, where replicas broke off at it before they answered;
- all that was held, where what was generated is unknown: a client left a request that is not streamed, or what the
  engine reported cannot be; and more than that, where the request ran for so long that more may have been generated;
- one request and nothing else, where the engine refused it (4xx): nothing was generated;
- nothing, where no replica took it.

If this process dies, a lease ends: what was last reported stays charged, and of the rest what a stream may have
generated within a lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from time import time
from typing import Any

from ratelimit.cell import REAPED_KEPT_US, TOMBSTONE_US
from ratelimit.gateway.breaker import StoreAwayError
from ratelimit.gateway.charges import (
    Amounts,
    amounts,
    charges_for,
    counted_only,
    used_charges,
    without_assured,
)
from ratelimit.gateway.estimates import TextRates
from ratelimit.gateway.hold import (
    FASTEST_TOKENS_PER_S,
    Usage,
    generated_at_most,
    is_possible,
    most_output,
    pool_cost_us,
)
from ratelimit.gateway.ledger import FIRST_SETTLE_PAUSE_S, RENEWED_AFTER, Ledger, Limiter
from ratelimit.gateway.records import entry_of
from ratelimit.gateway.terms import Terms
from ratelimit.gateway.wire import ParsedRequest
from ratelimit.keys import KeyRecord
from ratelimit.meter import Admitted, Charge, Denied
from ratelimit.store import StoreUnavailableError
from ratelimit.usage import Outcome

__all__ = ["Account", "Ledger", "Limiter"]

#: From the first attempt to settle that may have reached the store to the last. An attempt whose answer was lost may
#: have settled; the store knows that for as long as its tombstone lasts, and a later attempt would charge once more.
LONGEST_SETTLING_S = TOMBSTONE_US / 1e6 - 20
#: From the end of a lease to the last attempt, where none has reached the store. It may have ended the reservation, and
#: would charge once more when it has forgotten it.
LONGEST_CUT_OFF_S = REAPED_KEPT_US / 1e6 - 20
#: Output that nobody waited to report is told to the store in steps of this many tokens while a stream runs.
OVERRUN_TOKENS = 256

_NOTHING = Usage(0, 0)


class Account:
    """One request's charges, from what it holds to what it owes.

    ``client`` is the address and port that the request came from. Where limits are not enforced nothing is charged, and
    only the usage record is written. ``green`` tells, once admitted, whether the request is within what is assured;
    ``is_repeated``, once refused, whether from memory; ``spent_us``, in the end, what it costs the pool, ``None`` where
    nobody served it.
    """

    def __init__(
        self,
        ledger: Ledger,
        limiter: Limiter,
        request_id: str,
        record: KeyRecord,
        terms: Terms,
        request: ParsedRequest,
        held: Usage,
        client: tuple[str, int] | None = None,
    ) -> None:
        self._ledger = ledger
        self._limiter = limiter
        self._request_id = request_id
        self._record = record
        self._terms = terms
        self._choices = request.choices
        self._generated_choices = request.generated_choices
        self._prompts = request.prompts
        self._request = request  # its body's members are let go when it is sent
        self._prompt_bytes = 0 if request.prompt_tokens is not None else request.prompt_bytes
        self._template_tokens = request.template_tokens
        self._client = client
        self._entry = entry_of(request_id, record, terms, request)
        self.held = held
        self.green = False
        self.is_repeated = False
        self.spent_us: int | None = None
        self.cost_us = self._cost_us(held, self._generated_choices)
        self._charges = charges_for(record.id, terms, held, self.cost_us, self._left(held.prompt_tokens, 0))
        self._told: Usage | None = None
        self._seen: Usage | None = None
        self._next_report = held.output_tokens
        self._renewed_s = 0.0
        self._begun_s = 0.0
        self._known_s: float | None = None  # when the store was last told, and agreed, to keep the reservation
        self._marks: tuple[str, ...] = ()
        self._in_store = True  # the store knows of this request, or may
        self._local = False
        self._reserved = False
        self._settled = False
        self._previous: asyncio.Task[None] | None = None

    def _cost_us(self, usage: Usage, choices: int) -> int:
        return pool_cost_us(self._terms.groups, usage, choices, self._prompts)

    def _left(self, prompt_tokens: int, output_tokens: int, cached_tokens: int = 0) -> Amounts | None:
        """What stays charged if the lease ends now, with so much used; None for all that is held."""
        usage = self._left_usage(Usage(prompt_tokens, output_tokens, cached_tokens))
        return None if usage is None else amounts(usage, self._cost_us(usage, self._generated_choices))

    def _left_usage(self, used: Usage) -> Usage | None:
        bound = round(self._ledger.lease_s * FASTEST_TOKENS_PER_S) * self._generated_choices
        output = used.output_tokens + bound
        return None if output >= self.held.output_tokens else Usage(used.prompt_tokens, output, used.cached_tokens)

    # Admission

    async def admit(self) -> Admitted | Denied | None:
        """Ask the store; None where limits are not enforced.

        While the store is away this gateway decides alone; raises ``StoreUnavailableError`` where it must not.
        """
        clock = asyncio.get_running_loop().time
        if not self._terms.enforce:
            self._charges = ()
            self._begun_s = clock()
            return None
        answer = self._refused_before() or await self._ask()
        self._begun_s = clock()
        if isinstance(answer, Denied):
            self._settled = True
            return answer
        self.green = answer.green
        if not answer.green:
            self._charges = without_assured(self._charges)
        self._reserved = True
        self._ledger.metrics.reserved(self._terms.pool.model, self._record.tier, self.held)
        if self._in_store:
            self._renewed_s = asyncio.get_running_loop().time()
            self._ledger.opened(self)
        return answer

    def _refused_before(self) -> Denied | None:
        if self._client is None or self._terms.shadow:
            return None
        caller = (self._record.id, self._terms.pool.model, self._client)
        known = self._ledger.denials.find(caller, self._charges, self._terms.epoch, _now_us())
        self.is_repeated = known is not None
        if known is not None:
            self._ledger.metrics.cached_denials.labels(self._terms.pool.model, self._record.tier).inc()
        return known

    async def _ask(self) -> Admitted | Denied:
        try:
            answer = await self._ask_store()
            if isinstance(answer, Denied) and self._terms.shadow:
                return await self._serve_in_shadow(answer)
        except StoreUnavailableError as error:
            return self._decide_alone(error)
        if isinstance(answer, Denied) and self._client is not None:
            caller = (self._record.id, self._terms.pool.model, self._client)
            self._ledger.denials.note(caller, answer, self._charges, self._terms.epoch, _now_us())
        return answer

    async def _ask_store(self) -> Admitted | Denied:
        left = self._left_usage(Usage(self.held.prompt_tokens, 0)) or self.held
        memo = self._entry.written(time(), left, self.cost_us, green=False, outcome="expired")
        self._known_s = asyncio.get_running_loop().time()
        try:
            return await self._limiter.admit(
                self._request_id, self._charges, self._terms.epoch, self._ledger.lease_ms, memo
            )
        except StoreUnavailableError:
            self._ledger.metrics.store_errors.labels("admit").inc()
            raise
        except BaseException:  # cancelled: the store may hold what was asked
            self.settle_unserved()
            raise

    async def _serve_in_shadow(self, denied: Denied) -> Admitted:
        """Count the refusal and serve the request, charged to the pool alone; what is left is told as it is."""
        bucket = denied.bucket.rpartition(":")[2]
        self._ledger.metrics.shadow_denials.labels(self._terms.pool.model, self._record.tier, bucket).inc()
        self._marks = ("shadow",)
        self._charges = counted_only(self._charges)
        await self._ask_store()
        return Admitted(denied.remaining, denied.reset_us, green=False)

    def _decide_alone(self, error: StoreUnavailableError) -> Admitted | Denied:
        self._in_store = not isinstance(error, StoreAwayError)
        self._marks = (*self._marks, "local")
        try:
            answer = self._ledger.local.admit(self._request_id, self._terms, self._charges)
        except StoreUnavailableError:
            if not self._terms.shadow:
                self._take_back()
                raise
            return Admitted((), (), green=False)
        if isinstance(answer, Admitted):
            self._local = True
        elif self._terms.shadow:
            return Admitted((), (), green=False)
        else:
            self._take_back()
        return answer

    def _take_back(self) -> None:
        """The request is refused here, though the store may have admitted it, or be about to."""
        self._settled = True
        if self._in_store:
            self._queue(self._give_back(used_charges(self._charges, amounts(_NOTHING, 0, requests=0))))

    # While it runs

    @property
    def text_rates(self) -> TextRates:
        """What the text of this request's stream tells of its tokens."""
        return self._ledger.text_rates(self._record, self._terms)

    def correct(self, usage: Usage) -> None:
        """So much is used by now: hold the true prompt in place of the estimated one, and overruns as debt.

        Cheap where little has changed; the sweep tells the rest.
        """
        if not self._is_possible(usage):
            return
        self._seen = usage
        if self._told is None or usage.output_tokens >= self._next_report:
            self._report()

    def renew(self) -> None:
        """Called now and then while the request runs: renew a lease in time, and tell an overrun."""
        if self._settled or (self._previous is not None and not self._previous.done()):
            return
        overrun = self._seen is not None and self._seen.output_tokens > max(
            self.held.output_tokens, self._told.output_tokens if self._told else 0
        )
        due_s = self._renewed_s + self._ledger.lease_s * RENEWED_AFTER
        if overrun or asyncio.get_running_loop().time() >= due_s:
            self._report()

    def _report(self) -> None:
        if self._settled or not self._charges or not self._in_store:
            return
        charges: tuple[Charge, ...] = ()
        if self._seen is not None and self._seen is not self._told:
            charges = self._charges_by_now(self._seen)
        self._told = self._seen
        self._renewed_s = asyncio.get_running_loop().time()
        self._queue(self._extend(charges))

    def _charges_by_now(self, used: Usage) -> tuple[Charge, ...]:
        output = max(self.held.output_tokens, used.output_tokens)
        self._next_report = output + OVERRUN_TOKENS
        holds = Usage(used.prompt_tokens, output, used.cached_tokens)
        left = self._left(used.prompt_tokens, used.output_tokens, used.cached_tokens)
        return used_charges(self._charges, amounts(holds, self._cost_us(holds, self._generated_choices)), left)

    # The end

    def settle_used(self, usage: Usage | None, ended: bool, whole: bool = True, deltas: int = 0) -> None:
        """The request used this much; where nothing was reported, its estimated prompt.

        ``ended``: the answer ended by itself, and so teaches how long this caller's answers are. ``whole``: it came to
        an end, by itself or at the maximum that was asked for; else it was cut off. ``deltas`` came of a whole stream
        that told its usage only at its end.
        """
        if usage is not None and not self._is_possible(usage):
            self.settle_as_held()
            return
        if usage is not None and usage.prompt_tokens and not self._settled:
            answer = -(-usage.output_tokens // self._choices)
            prompt = self._prompt_bytes, usage.prompt_tokens - self._template_tokens
            self._ledger.learn(self._record, self._terms, prompt, answer, ended, deltas)
        used = usage or Usage(self.held.prompt_tokens, 0)
        self._settle(used, self._choices, 1, "ended" if usage is not None and (ended or whole) else "cut")

    def settle_as_held(self) -> None:
        """What the request used is unknown: all it holds, or what it may have generated by now if that is more."""
        output = self.held.output_tokens
        if output:
            elapsed_s = asyncio.get_running_loop().time() - self._begun_s
            most = most_output(self._request, self._terms.pool, self.held.prompt_tokens)
            output = max(output, generated_at_most(elapsed_s, self._generated_choices, most))
        used = Usage(self.held.prompt_tokens, output, self.held.cached_tokens)
        self._settle(used, self._generated_choices, 1, "unknown")

    def _is_possible(self, usage: Usage) -> bool:
        if is_possible(usage, self._request, self._terms.pool):
            return True
        self._ledger.metrics.impossible_usage.labels(self._terms.pool.model).inc()
        return False

    def settle_refused(self) -> None:
        """The engine refused the request: it counts as one request without tokens."""
        self._settle(_NOTHING, 0, 1, "refused")

    def settle_unserved(self) -> None:
        """No replica served the request: all is given back. Does nothing where it was settled before."""
        self._settle(_NOTHING, 0, 0, "unserved")

    def _settle(self, used: Usage, choices: int, requests: int, outcome: Outcome) -> None:
        if self._settled:
            return
        # What may raise comes first: until it is settled, another settlement can still end the reservation.
        cost_us = self._cost_us(used, choices) if choices else 0
        charges = used_charges(self._charges, amounts(used, cost_us, requests))
        record = self._entry.written(time(), used, cost_us, self.green, outcome, self._marks)
        self._settled, self.spent_us = True, cost_us if requests else None
        self._ledger.closed(self)
        model, local = self._terms.pool.model, self._ledger.local
        if choices:
            self._ledger.metrics.used(model, self._record.tier, used, self.held)
        if self._local:
            local.settle(self._request_id, model, charges)
        if self._in_store:
            self._queue(self._settle_in_store(charges, record, used))
        else:
            local.owe(model, charges)
            local.keep(model, self._request_id, record)
            self._ledger.metrics.charged(model, self._record.tier, used, self.held)

    # In the background

    def _queue(self, work: Coroutine[Any, Any, None]) -> None:
        if self._previous is not None and not self._previous.done():
            work = _after(self._previous, work)
        self._previous = self._ledger.spawn(work)

    async def _extend(self, charges: Sequence[Charge]) -> None:
        begun_s = asyncio.get_running_loop().time()
        try:
            if await self._limiter.extend(self._request_id, charges, self._ledger.lease_ms):
                self._known_s = begun_s
        except StoreUnavailableError:
            self._ledger.metrics.store_errors.labels("extend").inc()
            self._renewed_s = 0.0  # the next sweep tries again
            self._told = None

    async def _settle_in_store(self, charges: Sequence[Charge], record: bytes, used: Usage) -> None:
        settled, metrics = await self._settles(charges, record), self._ledger.metrics
        if not self._reserved:
            return
        if settled:
            metrics.charged(self._terms.pool.model, self._record.tier, used, self.held)
        else:
            metrics.left_to_lease(self._terms.pool.model, self._record.tier, self.held)

    async def _give_back(self, charges: Sequence[Charge]) -> None:
        await self._settles(charges, b"")

    async def _settles(self, charges: Sequence[Charge], record: bytes) -> bool:
        clock = asyncio.get_running_loop().time
        known_s = clock() if self._known_s is None else self._known_s
        give_up_s, sent = known_s + self._ledger.lease_s + LONGEST_CUT_OFF_S, False
        pause_s: float | None = FIRST_SETTLE_PAUSE_S
        while True:
            begun_s = clock()
            try:
                await self._limiter.settle(self._request_id, charges, record)
            except StoreUnavailableError as error:
                self._ledger.metrics.store_errors.labels("settle").inc()
                if not sent and not isinstance(error, StoreAwayError):
                    give_up_s, sent = min(give_up_s, begun_s + LONGEST_SETTLING_S), True
            else:
                return True
            if pause_s is None or clock() + pause_s > give_up_s:
                self._ledger.metrics.unsettled.labels("store away" if pause_s else "too many").inc()
                return False
            pause_s = await self._ledger.pause(self._limiter, pause_s)


async def _after(previous: asyncio.Task[None], work: Coroutine[Any, Any, None]) -> None:
    await asyncio.wait({previous})
    await work


def _now_us() -> int:
    return round(asyncio.get_running_loop().time() * 1e6)
