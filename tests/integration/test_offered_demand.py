"""A real gateway counts what is offered to it, served or not, and no request twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import msgspec
import openai
import pytest

from ratelimit.policy import LimitRule
from serving.capacity import RequestShape
from tests.integration.gateway_bench import Bench
from tests.support.gateway import MODEL, GatewayProcess, gateway_settings
from tests.unit.test_gateway_demand import in_mix_requests

PATH = "/v1/chat/completions"
OUTPUT = 8
ASKED: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 44}], "max_tokens": OUTPUT}
#: 44 bytes, four to a token.
PROMPT = 11
CALLERS = 20
NAME = "penstock_offered_mix_requests_total"


@pytest.fixture
def gateway(redis_url: str) -> Iterator[GatewayProcess]:
    """A gateway of the test's own: one that served others before has learned what their holds cost in the end."""
    with GatewayProcess(gateway_settings(redis_url)) as process:
        yield process


def demand(bench: Bench, *outcomes: str) -> float:
    """What was counted in this test, in requests like the one that is asked for; of all outcomes unless told."""
    one = in_mix_requests(bench.published.pools[0], RequestShape(PROMPT, OUTPUT))
    return sum(bench.metric(NAME, outcome=outcome) for outcome in outcomes) / one


async def test_twice_the_capacity_is_seen_as_offered_and_retries_are_not(bench: Bench) -> None:
    """Half of a crowd is refused and comes back by the official client's own retries: the demand is the crowd's.

    The limit has room for half of it, and refills for the other half in two seconds.
    """
    burst = CALLERS // 2 * OUTPUT
    await bench.publish(output_tokens=(burst * 30, burst))
    attempts: Counter[int] = Counter()

    async def note(response: httpx.Response) -> None:
        attempts[response.status_code] += 1

    http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [note]})
    async with openai.AsyncOpenAI(
        base_url=bench.url + "/v1", api_key=bench.secret, http_client=http, max_retries=8
    ) as c:
        await asyncio.gather(*(c.chat.completions.create(**ASKED) for _ in range(CALLERS)))
    await bench.idle()
    assert attempts[200] == CALLERS
    assert attempts[429] >= CALLERS // 3
    assert demand(bench, "admitted", "throttled", "unserved", "capped") == pytest.approx(CALLERS, rel=0.15)
    assert demand(bench, "throttled") > 0


async def test_what_gives_up_was_offered_all_the_same(bench: Bench) -> None:
    """Twice what there is room for, and nobody retries: served and refused are half each."""
    await bench.publish(output_tokens=(1, CALLERS // 2 * OUTPUT))
    async with bench.client() as client:
        made = [client.chat.completions.create(**ASKED) for _ in range(CALLERS)]
        answers = await asyncio.gather(*made, return_exceptions=True)
    await bench.idle()
    assert sum(isinstance(answer, openai.RateLimitError) for answer in answers) == CALLERS // 2
    assert demand(bench, "admitted") == pytest.approx(CALLERS / 2, rel=0.01)
    assert demand(bench, "throttled") == pytest.approx(CALLERS / 2, rel=0.3)


async def test_the_other_official_client_numbers_its_attempts_too(bench: Bench) -> None:
    """A refused request of Anthropic's client is one demand, whatever its retries."""
    await bench.publish(output_tokens=(1, 0))
    with anthropic.Anthropic(base_url=bench.url, api_key=bench.secret, max_retries=1) as client:

        def ask() -> None:
            with pytest.raises(anthropic.APIStatusError):
                client.messages.create(model=MODEL, max_tokens=OUTPUT, messages=ASKED["messages"])

        await asyncio.to_thread(ask)
    assert bench.metric("penstock_requests_total", route="messages") == 2
    assert demand(bench, "throttled") == pytest.approx(1, rel=0.3)


async def test_an_operators_own_number_asks_for_no_replica(bench: Bench) -> None:
    """Its refusals are told apart: more capacity would not raise it."""
    rule = LimitRule("requests", 1, per="org")
    await bench.publish(rules=[rule])
    async with bench.client() as client:
        made = [client.chat.completions.create(**ASKED) for _ in range(4)]
        await asyncio.gather(*made, return_exceptions=True)
    await bench.idle()
    assert demand(bench, "admitted") == pytest.approx(1, rel=0.01)
    assert demand(bench, "capped") == pytest.approx(3, rel=0.3)
    assert demand(bench, "throttled", "unserved") == 0


async def test_a_pool_without_replicas_is_asked_for_all_the_same(bench: Bench) -> None:
    """Each request counts as one of the mix, so that a scaler brings the first replica."""
    await bench.publish()
    pool = bench.published.pools[0]
    lost = {"replicas": (), "groups": (), "budget_per_minute": 0, "usable_requests_per_s": 0.0}
    await bench.republish(pools=(msgspec.structs.replace(pool, **lost),))
    async with bench.http() as http:
        statuses = [(await http.post(PATH, json=ASKED)).status_code for _ in range(3)]
    assert statuses == [503] * 3
    assert bench.metric(NAME, outcome="unserved") == 3
