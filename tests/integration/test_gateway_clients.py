"""The gateway with real Redis, a stand-in replica, and the official client: what callers get."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion

from ratelimit.gateway.hold import Usage
from tests.integration.gateway_bench import Bench
from tests.support.fake_upstream import FINGERPRINT, stream_events
from tests.support.gateway import MODEL

MESSAGES: Any = [{"role": "user", "content": "Tell me about the sea, at length and in detail."}]
#: A tier that is promised nothing, and may fill the pool.
BORROWING: dict[str, Any] = {"assured": False, "borrow_up_to": 1000}


def chat(**more: Any) -> dict[str, Any]:
    """A chat request's body."""
    return {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, **more}


async def test_async_client_gets_a_whole_answer(bench: Bench) -> None:
    """The unchanged client gets the engine's answer, with headers that agree with what was used."""
    async with bench.client() as client:
        raw = await client.chat.completions.with_raw_response.create(**chat())
        answer: ChatCompletion = raw.parse()
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert raw.headers["x-ratelimit-limit-requests"] == "1"
    assert raw.headers["x-ratelimit-remaining-requests"] == "49999"
    assert '"requests";r=49999' in raw.headers["ratelimit"]
    assert raw.headers["x-request-id"]
    await bench.settled(Usage(answer.usage.prompt_tokens, 8))


async def test_sync_client_streams(bench: Bench) -> None:
    """The synchronous client's stream has every token, no usage that it did not ask for, and a finish reason."""

    def ask() -> list[Any]:
        with openai.OpenAI(base_url=bench.url + "/v1", api_key=bench.secret) as client:
            return list(client.chat.completions.create(**chat(stream=True)))

    chunks = await asyncio.to_thread(ask)
    assert all(chunk.choices for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].system_fingerprint == FINGERPRINT
    await bench.settled(Usage(11, 8))


@pytest.mark.parametrize("options", [None, {"include_usage": True}, {"include_usage": False}])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_stream_is_the_engines_own(bench: Bench, path: str, options: dict[str, bool] | None) -> None:
    """Byte for byte, a stream through the gateway is the one the engine would have sent directly."""
    told = {"messages": MESSAGES} if "chat" in path else {"prompt": "The sea is blue and wide."}
    body = {"model": MODEL, "max_tokens": 8, "stream": True, "stream_options": options, **told}
    async with bench.http() as http:
        response = await http.post(path, json=body)
    assert response.content == b"".join(stream_events(body, chat="chat" in path))
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"


async def test_client_retries_after_429_and_succeeds(bench: Bench) -> None:
    """The client's own retry, at the time it was told, is served."""
    await bench.publish(requests=(60, 1))
    async with bench.client(max_retries=2) as client:
        await client.chat.completions.create(**chat())
        again = await client.chat.completions.create(**chat())
    assert again.choices
    assert len(bench.upstream.bodies) == 2
    assert bench.denials("requests") >= 1


async def test_429_tells_the_true_wait(bench: Bench) -> None:
    """A refusal names the limit, and its wait is the time the bucket needs and no more."""
    await bench.publish(output_tokens=(600, 10))
    async with bench.http() as http:
        assert (await http.post("/v1/chat/completions", json=chat())).status_code == 200
        await bench.idle()
        refused = await http.post("/v1/chat/completions", json=chat())
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("tokens", "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after-ms"]) <= 600
    assert refused.headers["retry-after"] == "1"
    assert "x-should-retry" not in refused.headers
    assert refused.headers["x-ratelimit-limit-output-tokens"] == "600"


async def test_concurrency_wait_is_marked_as_an_estimate(bench: Bench) -> None:
    """A place in flight has no exact wait, and the answer says so; when the first ends, the next is served."""
    await bench.publish(concurrency=(0, 1))
    bench.upstream.gate.clear()
    async with bench.http() as http:
        first = asyncio.create_task(http.post("/v1/chat/completions", json=chat()))
        await bench.until(lambda: bench.upstream.open_requests == 1)
        refused = await http.post("/v1/chat/completions", json=chat())
        bench.upstream.gate.set()
        assert (await first).status_code == 200
        await bench.idle()
        assert (await http.post("/v1/chat/completions", json=chat())).status_code == 200
    assert refused.status_code == 429
    assert refused.json()["retry_after_estimated"] is True
    assert refused.headers["x-retry-after-estimated"] == "true"


async def test_pool_shortage_is_the_fleets_fault(bench: Bench) -> None:
    """When the pool is used up, as a new one is, the answer is 503 with a wait, in the client's and the IETF's form."""
    await bench.publish(pool_budget=(60, 1), **BORROWING)
    async with bench.http() as http:
        refused = await http.post("/v1/chat/completions", json=chat())
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    body = refused.json()
    assert body["error"]["code"] == body["type"].rpartition("#")[2].replace("-", "_") == "temporary_reduced_capacity"
    assert bench.denials("pool") == 1


async def test_without_enforcement_everything_is_served_and_counted(bench: Bench) -> None:
    """With limits off nothing is refused or charged, and the metrics still count."""
    await bench.publish(enforce=False, requests=(60, 1))
    async with bench.http() as http:
        answers = [await http.post("/v1/chat/completions", json=chat()) for _ in range(3)]
        limits = (await http.get("/v1/limits")).json()
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert "x-ratelimit-limit-requests" not in answers[0].headers
    assert limits["limits"][0]["remaining"] == 1
    assert bench.metric("penstock_tokens_total", kind="output") == 24


async def test_limits_route(bench: Bench) -> None:
    """A caller sees each of its limits with unit, use and explanation."""
    async with bench.http() as http:
        await http.post("/v1/chat/completions", json=chat())
        await bench.settled(Usage(11, 8))
        body = (await http.get("/v1/limits")).json()
        named = (await http.get("/v1/limits", params={"model": MODEL})).json()
        unknown = await http.get("/v1/limits", params={"model": "other"})
    assert (body["tier"], body["model"], body["epoch"]) == ("pro", MODEL, bench.epoch)
    assert [limit["name"] for limit in body["limits"]] == ["requests", "input_tokens", "output_tokens", "concurrency"]
    assert set(body["limits"][0]) >= {
        "name", "unit", "per", "window", "per_minute", "burst", "remaining", "reset_s", "explanation",
    }  # fmt: skip
    assert named["epoch"] == body["epoch"]
    assert unknown.status_code == 404


async def test_models_are_those_of_the_key(bench: Bench) -> None:
    """The client lists the models its key may use."""
    async with bench.client() as client:
        assert [model.id async for model in await client.models.list()] == [MODEL]


async def test_request_id_of_the_client_is_kept_if_sane(bench: Bench) -> None:
    """A plain id comes back; a strange one is replaced; the engine always sees an id of ours."""
    async with bench.http() as http:
        kept = await http.post("/v1/chat/completions", json=chat(), headers={"x-request-id": "trace-1"})
        replaced = await http.post("/v1/chat/completions", json=chat(), headers={"x-request-id": "a b\tc"})
    assert kept.headers["x-request-id"] == "trace-1"
    assert replaced.headers["x-request-id"] != "a b\tc"
    assert bench.upstream.headers[0]["x-request-id"] != "trace-1"


async def test_the_gateways_own_members(bench: Bench) -> None:
    """A client cannot set its priority or cache salt, and its maximum is never rewritten."""
    async with bench.http() as http:
        await http.post("/v1/chat/completions", json=chat(priority=-5, cache_salt="theirs"))
        await http.post("/v1/chat/completions", json={"model": MODEL, "messages": MESSAGES})
    first, second = bench.upstream.bodies
    assert "priority" not in first
    assert first["cache_salt"] == second["cache_salt"] == "org:acme"
    assert first["max_tokens"] == 8
    assert "max_tokens" not in second
    assert first["messages"] == MESSAGES


async def test_answer_is_the_engines_own(bench: Bench) -> None:
    """An answer that is not streamed passes unchanged, and so does the engine's refusal."""
    bench.upstream.failures.append("bad request")
    async with bench.http() as http:
        refused = await http.post("/v1/chat/completions", json=chat())
        served = await http.post("/v1/chat/completions", json=chat())
    async with httpx.AsyncClient() as direct:
        same = await direct.post(bench.upstream.url + "/v1/chat/completions", json=chat())
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "bad request"
    assert served.content == same.content
    await bench.settled(Usage(11, 8), requests=2)
