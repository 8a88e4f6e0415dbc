"""A crowd that is refused at one instant, and comes back when it was told to: everybody is served in the end."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import httpx
import openai
import pytest

from tests.integration.gateway_bench import Bench
from tests.support.gateway import MODEL

PATH = "/v1/chat/completions"
OUTPUT = 8
ASKED: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 44}], "max_tokens": OUTPUT}


@pytest.mark.parametrize(
    ("callers", "refills_s", "debt_s", "clients"),
    [
        (40, 1, 1, "one each"),
        pytest.param(200, 6, 3, "one each", marks=pytest.mark.slow),
        pytest.param(200, 6, 3, "one", marks=pytest.mark.slow),
    ],
)
async def test_a_crowd_is_served_within_the_default_retries(
    bench: Bench, callers: int, refills_s: int, debt_s: int, clients: str
) -> None:
    """Refused at one instant by a bucket that refills for all of them in some seconds, all are served with the two
    retries that the official client makes by itself, whether they share a client and its connections or not.

    The instant lasts as long as this process takes to send that much: the bucket has a debt, so that nobody who comes
    late in it finds room.
    """
    burst = callers * OUTPUT
    debt = burst * debt_s // refills_s
    await bench.publish(output_tokens=(burst * 60 // refills_s, burst))
    attempts: Counter[int] = Counter()

    async def note(response: httpx.Response) -> None:
        attempts[response.status_code] += 1

    def client() -> openai.AsyncOpenAI:
        http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [note]})
        return openai.AsyncOpenAI(base_url=bench.url + "/v1", api_key=bench.secret, http_client=http)

    asking = [client() for _ in range(callers if clients == "one each" else 1)]
    async with bench.http() as http:
        drained = await http.post(PATH, json={**ASKED, "max_tokens": burst + debt})
    answers = await asyncio.gather(
        *(asking[number % len(asking)].chat.completions.create(**ASKED) for number in range(callers)),
        return_exceptions=True,
    )
    await asyncio.gather(*(each.close() for each in asking))
    assert drained.status_code == 200
    assert Counter(type(answer).__name__ for answer in answers) == {"ChatCompletion": callers}
    assert attempts == {200: callers, 429: callers}  # no retry was in vain: each was told a moment of its own


@pytest.mark.parametrize("stream", [True, False])
async def test_alone_the_time_told_is_enough(bench: Bench, stream: bool) -> None:
    """A caller alone who waits as long as it was told, to the millisecond, is served every time."""
    await bench.publish(output_tokens=(60 * 100, OUTPUT))
    statuses = []
    async with bench.http() as http:
        assert (await http.post(PATH, json=ASKED)).status_code == 200
        for _ in range(5):
            refused = await http.post(PATH, json={**ASKED, "stream": stream})
            await asyncio.sleep(int(refused.headers["retry-after-ms"]) / 1000)
            served = await http.post(PATH, json={**ASKED, "stream": stream})
            statuses.append((refused.status_code, served.status_code))
    assert statuses == [(429, 200)] * 5
