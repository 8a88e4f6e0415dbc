"""Callers who try to get more than their share, through a gateway on real Redis: none of it pays."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from ratelimit.gateway.estimates import FLOOR_SHARE
from ratelimit.gateway.hold import Usage
from ratelimit.policy import LimitRule
from tests.integration.gateway_bench import Bench
from tests.support.callers import ask
from tests.support.gateway import MODEL, make_key

pytestmark = pytest.mark.slow

PATH = "/v1/chat/completions"
PROMPT_TOKENS = 11
PRIOR = 64


def chat(**more: Any) -> dict[str, Any]:
    """A chat request's body; its prompt is 11 tokens long on the stand-in replica."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "x" * 44}], **more}


async def test_training_the_estimate_down_gains_little(bench: Bench) -> None:
    """Hundreds of tiny answers do not open the bucket to a burst of long ones: at most as many pass at once as the
    floor of an estimate lets through, and what they used beyond it is a debt that those who come later wait for.
    """
    burst, long = 1_000, 500
    await bench.publish(default_max_output=PRIOR, holds="learned", output_tokens=(1, 10**6))
    bench.upstream.ends_after = 1
    for _ in range(10):
        trained = await asyncio.gather(*(ask(bench.url, bench.secret, chat()) for _ in range(40)))
        assert {answer.complaint for answer in trained} == {""}
    await bench.idle()
    async with bench.http() as http:
        spent = int((await bench.used())["output_tokens"])
        await bench.publish(default_max_output=PRIOR, holds="learned", output_tokens=(1, spent + burst))
        bench.upstream.ends_after = long
        bench.upstream.gate.clear()
        asking = [asyncio.create_task(ask(bench.url, bench.secret, chat(max_tokens=4_000))) for _ in range(120)]
        most = burst / (PRIOR * FLOOR_SHARE)
        await bench.until(lambda: bench.metric("penstock_requests_total", status="429") >= 120 - most)
        bench.upstream.gate.set()
        answers = Counter(answer.status for answer in await asyncio.gather(*asking))
        await bench.idle()
        assert burst / PRIOR < answers[200] <= most  # it was trained, and not below the floor
        assert answers[200] + answers[429] == 120
        after = await http.post(PATH, json=chat(max_tokens=1))
    assert after.status_code == 429
    used = await bench.used()
    assert used["concurrency"] == 0
    assert bench.metric("penstock_tokens_total", kind="output") == 10 * 40 + answers[200] * long


@pytest.mark.parametrize(
    ("asked", "held"),
    [
        ({"max_tokens": 1, "max_completion_tokens": 4_000}, 4_000),
        ({"max_completion_tokens": 1, "max_tokens": 4_000}, 4_000),
        ({"max_tokens": 100, "n": 40}, 4_000),
        ({"max_tokens": 100, "n": 2, "best_of": 40}, 4_000),
        ({"max_tokens": 100, "best_of": 40}, 4_000),
    ],
)
async def test_the_largest_reading_of_a_request_is_held(bench: Bench, asked: dict[str, Any], held: int) -> None:
    """Whatever the engine makes of members that contradict or multiply each other, the most that it may generate is
    held: it does not fit beside what is there, though its smallest reading would.
    """
    await bench.publish(output_tokens=(1, held))
    path = "/v1/completions" if "best_of" in asked else PATH
    body = {**chat(**asked), "prompt": "x"} if "best_of" in asked else chat(**asked)
    if "best_of" in asked:
        del body["messages"]
    async with bench.http() as http:
        bench.upstream.gate.clear()
        first = asyncio.create_task(http.post(path, json=body))
        await bench.until(lambda: bench.upstream.open_requests == 1)
        assert (await bench.used())["output_tokens"] == held
        refused = await http.post(PATH, json=chat(max_tokens=1))
        bench.upstream.gate.set()
        assert ((await first).status_code, refused.status_code) == (200, 429)


async def test_cancelling_banks_no_refunds(bench: Bench) -> None:
    """Taking much and giving it back, again and again, leaves no more than was there before."""
    burst = 100
    await bench.publish(output_tokens=(1, burst))
    async with bench.http() as http:
        for _ in range(10):
            bench.upstream.gate.clear()
            async with http.stream("POST", PATH, json=chat(stream=True, max_tokens=burst // 2)) as response:
                await anext(response.aiter_bytes())
            await bench.idle()
        bench.upstream.gate.set()
        used = await bench.used()
        charged = int(used["output_tokens"])
        assert used["requests"] == 10
        assert 0 <= charged <= 10 * 4
        refused = await http.post(PATH, json=chat(max_tokens=burst - charged + 1))
        served = await http.post(PATH, json=chat(max_tokens=burst - charged))
    assert (refused.status_code, served.status_code) == (429, 200)


async def test_many_keys_of_an_org_share_its_limit(bench: Bench) -> None:
    """A new key is no new limit where the org has one: all its keys together get just what it allows."""
    keys = [make_key() for _ in range(20)]
    rule = LimitRule("output_tokens", 1, "org", burst=80)
    await bench.publish(None, *(record for _, record in keys), rules=[rule])
    answers = await asyncio.gather(*(ask(bench.url, secret, chat(max_tokens=8)) for secret, _ in keys * 5))
    assert Counter(answer.status for answer in answers) == {200: 10, 429: 90}
    assert {answer.complaint for answer in answers} == {""}


async def test_huge_prompts_that_are_refused_cost_no_replica_anything(bench: Bench) -> None:
    """What does not fit is refused before any replica hears of it, and nothing of it is charged."""
    await bench.publish(input_tokens=(1, 1_000))
    async with bench.http() as http:
        assert (await http.post(PATH, json=chat(max_tokens=1))).status_code == 200
        huge = chat(max_tokens=1)
        huge["messages"][0]["content"] = "x" * 15_000
        answers = [await http.post(PATH, json=huge) for _ in range(20)]
    assert {answer.status_code for answer in answers} == {429}
    assert len(bench.upstream.bodies) == 1
    await bench.settled(Usage(PROMPT_TOKENS, 1))
