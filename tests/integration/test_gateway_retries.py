"""The official clients' own retry logic against every answer the gateway gives: retried to success, or stopped at once.

Which answers are retryable is written out here once, and both clients are held to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import anthropic
import openai
import pytest

from ratelimit.policy import LimitRule
from tests.integration.gateway_bench import Bench
from tests.support.fake_upstream import Failure
from tests.support.gateway import MODEL

MESSAGES: Any = [{"role": "user", "content": "Tell me about the sea."}]
ASKED: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8}
#: From full to empty in a second; a new pool is full.
DRAINING: dict[str, Any] = {"pool_budget": (60 * 10**6, 10**6), "assured": False, "borrow_up_to": 1000}


class Caller:
    """One of the two clients, and the attempts that it made."""

    def __init__(self, client: Any, call: Any, error: type[Exception]) -> None:
        self.client = client
        self.call = call
        self.error = error
        self.statuses: list[int] = []

    async def ask(self, **more: Any) -> Any:
        """One call with whatever retries the client makes."""
        return await self.call(**{**ASKED, **more})


@asynccontextmanager
async def caller_of(kind: str, bench: Bench, max_retries: int = 2) -> AsyncIterator[Caller]:
    """The client of this kind; it notes the status of each attempt."""
    statuses: list[int] = []

    async def note(response: Any) -> None:
        statuses.append(response.status_code)

    if kind == "openai":
        http: Any = openai.DefaultAsyncHttpxClient(event_hooks={"response": [note]})
        url, made = bench.url + "/v1", openai.AsyncOpenAI
    else:
        http = anthropic.DefaultAsyncHttpxClient(event_hooks={"response": [note]})
        url, made = bench.url, anthropic.AsyncAnthropic  # type: ignore[assignment]  # both take the same arguments
    async with made(base_url=url, api_key=bench.secret, max_retries=max_retries, http_client=http) as client:
        call = client.chat.completions.create if kind == "openai" else client.messages.create  # type: ignore[attr-defined]
        error = openai.APIStatusError if kind == "openai" else anthropic.APIStatusError
        caller = Caller(client, call, error)
        caller.statuses = statuses
        yield caller


KINDS = pytest.mark.parametrize("kind", ["openai", "anthropic"])


@KINDS
async def test_429_is_retried_to_success(bench: Bench, kind: str) -> None:
    """The wait that is told is the one after which the next attempt is served."""
    await bench.publish(requests=(60, 1))
    async with caller_of(kind, bench) as caller:
        await caller.ask()
        await caller.ask()
    assert caller.statuses == [200, 429, 200]


@KINDS
async def test_a_full_pool_is_retried_to_success(bench: Bench, kind: str) -> None:
    """503, or Anthropic's 529, is retried after the time that was told."""
    await bench.publish(**DRAINING)
    async with caller_of(kind, bench) as caller:
        await caller.ask()
    assert caller.statuses == [503 if kind == "openai" else 529, 200]


@KINDS
async def test_a_place_in_flight_is_waited_for(bench: Bench, kind: str) -> None:
    """An estimated wait is retried like any other, and succeeds once the place is free."""
    await bench.publish(concurrency=(0, 1))
    bench.upstream.gate.clear()
    async with caller_of(kind, bench) as first, caller_of(kind, bench, max_retries=1_000) as second:
        running = asyncio.create_task(first.ask())
        await bench.until(lambda: bench.upstream.open_requests == 1)
        waiting = asyncio.create_task(second.ask())
        await bench.until(lambda: bench.denials("concurrency") >= 1)
        bench.upstream.gate.set()
        await asyncio.gather(running, waiting)
    assert (second.statuses[0], second.statuses[-1]) == (429, 200)


@KINDS
async def test_replicas_that_are_all_busy_are_retried_to_success(bench: Bench, kind: str) -> None:
    """A replica that says 503 of itself is the fleet being short, and the next attempt finds it free."""
    bench.upstream.failures.append("busy")
    async with caller_of(kind, bench) as caller:
        await caller.ask()
    assert caller.statuses == [503 if kind == "openai" else 529, 200]


@KINDS
async def test_an_engine_that_failed_is_asked_again(bench: Bench, kind: str) -> None:
    """An engine's own 500 is not marked as final: the next attempt may well be served."""
    bench.upstream.failures.append("broken")
    async with caller_of(kind, bench) as caller:
        await caller.ask()
    assert caller.statuses == [500, 200]


@KINDS
async def test_a_long_wait_is_not_slept_through(bench: Bench, kind: str) -> None:
    """A window that is used up says when it resets, and the client gives up at once instead of sleeping for days."""
    await bench.publish(rules=[LimitRule("requests", 1, "org", "week")])
    async with caller_of(kind, bench) as caller:
        await caller.ask()
        with pytest.raises(caller.error) as refused:
            await caller.ask()
    assert caller.statuses == [200, 429]
    error: Any = refused.value
    assert error.response.headers["x-should-retry"] == "false"
    assert '"org-requests-week";r=0;t=6048' in error.response.headers["ratelimit"]
    reset_at = datetime.fromisoformat(error.response.json()["reset_at"]) - datetime.now(UTC)
    assert timedelta(days=6, hours=23) < reset_at < timedelta(days=7, seconds=2)


@KINDS
@pytest.mark.parametrize(
    ("change", "failure", "status"),
    [
        ({"model": "gone"}, None, 404),
        ({"max_tokens": 5_000}, None, 400),
        ({"extra_body": {"prompt_embeds": "x"}}, None, 400),
        ({"messages": [{"role": "user", "content": "x" * 2_000_000}]}, None, 413),
        ({}, "bad request", 400),
    ],
)
async def test_final_answers_stop_at_once(
    bench: Bench, kind: str, change: dict[str, Any], failure: Failure | None, status: int
) -> None:
    """What would only be refused again is asked for once."""
    if failure is not None:
        bench.upstream.failures.append(failure)
    async with caller_of(kind, bench) as caller:
        with pytest.raises(caller.error):
            await caller.ask(**change)
    assert caller.statuses == [status]
