"""Requests that are refused before any capacity is taken, and gateways that cannot start."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import openai
import psutil
import pytest
from msgspec.structs import replace
from redis.asyncio import Redis

from ratelimit.gateway.hold import Usage
from ratelimit.gateway.settings import GatewaySettings
from ratelimit.keys import new_key
from ratelimit.policy import OrgPolicy
from ratelimit.publication import TierLimits
from ratelimit.publisher import CHANGED_CHANNEL, KEYS_KEY
from tests.integration.gateway_bench import Bench
from tests.support.gateway import MAX_MODEL_LEN, MODEL, GatewayProcess, gateway_settings, make_key, publication, publish

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hello"}]


async def post(bench: Bench, body: bytes | dict[str, Any], **headers: str) -> httpx.Response:
    """POST a chat request, raw or as JSON."""
    async with bench.http() as http:
        content = body if isinstance(body, bytes) else msgspec.json.encode(body)
        return await http.post(PATH, content=content, headers=headers)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"model": "tiny", "messages": []} trailing',
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"model":"tiny","messages":' + b"[" * 200_000,
        b'{"model": NaN}',
        b'\xef\xbb\xbf{"model":"tiny","messages":[]}',
        b'{"model":"tiny","messages":[],"temperature":1e999}',
        b'{"model":"tiny","messages":[],"user":"\\ud800"}',
        b'{"model":"tiny","messages":[],"user":"\xff"}',
        b'{"model":"tiny","messages":[],"model":"tiny"}',
        b'{"model":"tiny","messages":[],"n":' + b"9" * 5_000 + b"}",
    ],
    ids=[
        "empty", "cut", "array", "trailing", "not utf-8", "deep", "deep member", "nan", "byte order mark", "infinite",
        "lone surrogate", "latin-1", "twice", "huge",
    ],
)  # fmt: skip
async def test_malformed_json_is_a_400(bench: Bench, body: bytes) -> None:
    """A body that is no JSON object is refused in the form that the route's clients read."""
    answer = await post(bench, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    async with bench.http() as http:
        for path in ("/v1/responses", "/v1/completions"):
            other = await http.post(path, content=body)
            assert (other.status_code, other.json()["error"]["type"]) == (400, "invalid_request_error")
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            other = await http.post(path, content=body)
            assert other.status_code == 400
            assert (other.json()["type"], other.json()["error"]["type"]) == ("error", "invalid_request_error")
    assert bench.upstream.bodies == []
    await bench.settled(Usage(0, 0), requests=0)


@pytest.mark.parametrize(
    "change",
    [
        {"model": 7},
        {"max_tokens": "many"},
        {"max_tokens": -1},
        {"n": 0},
        {"n": 129},
        {"stream": "yes"},
        {"messages": "hello"},
        {"messages": ["hello"]},
        {"stream_options": []},
        {"stream_options": {"include_usage": "x"}},
    ],
)
async def test_wrong_types_are_a_400_that_says_where(bench: Bench, change: dict[str, Any]) -> None:
    """A member of the wrong type is named."""
    answer = await post(bench, {"model": MODEL, "messages": MESSAGES, **change})
    assert answer.status_code == 400
    assert next(iter(change)) in answer.json()["error"]["message"]
    assert bench.upstream.bodies == []


async def test_output_above_the_context_is_final(bench: Bench) -> None:
    """A maximum above the model's context can never be served, and is told in the wording that clients match."""
    async with bench.client(max_retries=2) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "x"}], max_tokens=MAX_MODEL_LEN + 1
            )
    assert caught.value.code == "context_length_exceeded"
    assert f"maximum context length is {MAX_MODEL_LEN} tokens" in caught.value.message


async def test_unknown_and_disallowed_models_look_the_same(bench: Bench) -> None:
    """A model that does not exist and one that the key may not use get the same 404."""
    secret, record = make_key(tier="guest")
    await bench.publish(None, record)
    async with bench.client() as client, bench.client(api_key=secret) as guest:
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.chat.completions.create(model="gone", messages=[], max_tokens=1)
        with pytest.raises(openai.NotFoundError) as disallowed:
            await guest.chat.completions.create(model=MODEL, messages=[], max_tokens=1)
    assert unknown.value.code == disallowed.value.code == "model_not_found"
    assert unknown.value.message.replace("gone", MODEL) == disallowed.value.message


async def test_an_org_uses_only_the_models_it_is_allowed(bench: Bench) -> None:
    """A model that the org may not use looks unknown to its keys and is not listed; an unknown org may use none."""
    outsiders = [new_key(org, "pro", "test", created_at=0.0) for org in ("elsewhere", "removed")]
    records = [record for _, record in outsiders]
    await bench.publish(None, *records)
    await bench.republish(*records, orgs=(OrgPolicy("acme"), OrgPolicy("elsewhere", ("other",))))
    async with bench.client() as insider:
        assert [model.id async for model in insider.models.list()] == [MODEL]
    for secret, _ in outsiders:
        async with bench.client(api_key=secret) as outsider:
            with pytest.raises(openai.NotFoundError) as refused:
                await outsider.chat.completions.create(model=MODEL, messages=[], max_tokens=1)
            assert refused.value.code == "model_not_found"
            assert [model.id async for model in outsider.models.list()] == []


async def test_a_model_that_lost_its_replicas_is_short_not_unknown(bench: Bench) -> None:
    """With every replica gone a caller is told to come back (503), not that the model does not exist (404)."""
    await bench.publish()
    bare = replace(bench.published.pools[0], replicas=(), groups=(), budget_per_minute=0, budget_burst=0)
    await bench.republish(pools=(bare,), tiers=(TierLimits("pro", MODEL, 1, ()),))
    refused = await post(bench, {"model": MODEL, "messages": MESSAGES})

    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1


async def test_bad_keys_all_look_the_same(bench: Bench) -> None:
    """A missing, malformed, unknown and expired key get the same 401, on every route that needs one."""
    secret, expired = make_key(expires_at=time.time() - 1)
    await bench.publish(None, expired)
    bad: list[dict[str, str]] = [
        {},
        {"authorization": "Basic abc"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer pn-unknown"},
        {"authorization": f"Bearer {secret}"},
        {"authorization": "Bearer \u00e9\u00ff"},
    ]
    bodies = set()
    async with httpx.AsyncClient(base_url=bench.url) as http:
        for headers in bad:
            raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            chat = await http.post(PATH, json={"model": MODEL, "messages": MESSAGES}, headers=raw)
            others = [await http.get(path, headers=raw) for path in ("/v1/models", "/v1/limits")]
            assert [answer.status_code for answer in (chat, *others)] == [401, 401, 401]
            bodies |= {answer.content for answer in (chat, *others)}
    assert len(bodies) == 1


async def test_revoked_key_stops_at_once(bench: Bench) -> None:
    """A key that is revoked is refused as soon as the change is announced."""
    revoked = msgspec.structs.replace(bench.record, revoked_at=1.0)
    await bench.redis.hset(KEYS_KEY, revoked.digest, msgspec.json.encode(revoked).decode())
    await bench.redis.publish(CHANGED_CHANNEL, "keys")
    async with bench.http() as http:
        await bench.until_answered(http, "/v1/models", 401)
        assert (await http.post(PATH, json={"model": MODEL, "messages": MESSAGES})).status_code == 401


async def test_declared_50_mb_is_refused_at_once(bench: Bench) -> None:
    """A body that declares 50 MB gets its 413 although the client is still sending, and is never kept."""
    before = memory_bytes(bench)
    async with bench.http() as http:
        answer = await http.post(PATH, content=b"x" * 50_000_000)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"
    assert memory_bytes(bench) - before < 20_000_000
    assert (await post(bench, {"model": MODEL, "messages": MESSAGES})).status_code == 200


async def test_undeclared_50_mb_is_refused_as_it_passes_the_bound(bench: Bench) -> None:
    """A body of undeclared length gets its 413 too, and is never kept."""

    async def body() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield b"x" * 1_000_000

    before = memory_bytes(bench)
    async with bench.http() as http:
        answer = await http.post(PATH, content=body())
    assert answer.status_code == 413
    assert memory_bytes(bench) - before < 20_000_000


def memory_bytes(bench: Bench) -> int:
    """Resident memory of the gateway."""
    return int(psutil.Process(bench.gateway.process.pid).memory_info().rss)


async def test_slow_body_is_a_408(bench: Bench) -> None:
    """A body that does not arrive in time is given up, before any capacity is taken."""

    async def body() -> AsyncIterator[bytes]:
        yield b'{"model":'
        await asyncio.sleep(3)
        yield b'"tiny"}'

    async with bench.http() as http:
        answer = await http.post(PATH, content=body())
    assert answer.status_code == 408
    await bench.settled(Usage(0, 0), requests=0)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/metrics", 404),
        ("GET", "/docs", 404),
        ("POST", "/tokenize", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/invocations", 404),
        ("POST", "/inference/v1/generate", 404),
        ("POST", "/v1/messages/batches", 404),
        ("GET", "/v1/messages", 405),
        ("GET", "/v1/responses", 405),
        ("GET", PATH, 405),
        ("DELETE", "/v1/models", 405),
    ],
)
async def test_only_the_listed_routes_exist(bench: Bench, method: str, path: str, status: int) -> None:
    """Everything else of an engine's surface is a 404 or 405 in the form that clients read, with a request id."""
    async with bench.http() as http:
        answer = await http.request(method, path)
    assert answer.status_code == status
    anthropic = path.startswith("/v1/messages")
    assert answer.json()["error"]["type"] == (
        "not_found_error" if anthropic and status == 404 else "invalid_request_error"
    )
    assert answer.headers["x-request-id"]
    assert answer.headers.get("request-id") == (answer.headers["x-request-id"] if anthropic else None)
    assert bench.upstream.bodies == []


def run_to_its_end(settings: GatewaySettings) -> subprocess.CompletedProcess[str]:
    """Start a gateway that is expected to fail."""
    argv = [sys.executable, "-m", "tests.support.gateway", msgspec.json.encode(settings).decode()]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("which", ["port", "admin_port"])
def test_busy_port_is_told(redis_url: str, which: str) -> None:
    """A port that another program listens on ends the start with a message that names it."""
    settings = gateway_settings(redis_url)
    with socket.socket() as taken:
        taken.bind((settings.host, getattr(settings, which)))
        taken.listen()
        ended = run_to_its_end(settings)
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1:{getattr(settings, which)}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_dead_redis_is_waited_for() -> None:
    """One that does not answer is told in the log, without its password; the gateway lives, and is not ready."""
    with GatewayProcess(gateway_settings("redis://:hunter2@127.0.0.1:1/0")) as waiting:
        health, live = (httpx.get(waiting.admin_url + path, timeout=10) for path in ("/health", "/live"))
        assert waiting.stop() == 0
        assert "no Redis at redis://127.0.0.1:1/0 yet" in waiting.log()
        assert "hunter2" not in waiting.log()
    assert (health.status_code, live.status_code) == (503, 200)
    assert "Redis has not answered" in health.json()["why"]


@pytest.mark.parametrize("url", ["redis://:hunter/2@127.0.0.1:1/0", "redis+cluster://:hunter2@127.0.0.1:1"])
def test_a_url_that_cannot_be_used_is_told(url: str) -> None:
    """What no waiting would mend ends the start, without the password."""
    ended = run_to_its_end(gateway_settings(url))
    assert ended.returncode == 1
    assert "redis: " in ended.stderr
    assert "hunter" not in ended.stderr
    assert "Traceback" not in ended.stderr


async def test_not_ready_before_the_first_publication(redis_url: str) -> None:
    """Until limits have been read, health is 503 on both ports and requests are refused as retryable."""
    _, record = make_key()
    async with Redis.from_url(redis_url) as redis:
        await redis.flushall()
        with GatewayProcess(gateway_settings(redis_url)) as own:
            async with httpx.AsyncClient() as http:
                health = [(await http.get(url + "/health")).status_code for url in (own.url, own.admin_url)]
                assert health == [503, 503]
                await publish(redis, publication(["http://127.0.0.1:9"]), record)
                async with asyncio.timeout(5):
                    while (await http.get(own.url + "/health")).status_code != 200:
                        pass
