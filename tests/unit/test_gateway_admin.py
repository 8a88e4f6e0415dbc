"""The admin port's application, called as an ASGI server calls it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import httpx
import msgspec
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from ratelimit.gateway.admin import TokenGuard, admin_app, known_keys
from ratelimit.gateway.app import _other_routes
from ratelimit.gateway.directory import Directory
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.gateway.readiness import Readiness
from ratelimit.keys import KeyRecord, digest
from tests.support.limiter import AwayLimiter

TOKEN = "a-token-of-our-own"
SECRET = "pn-secret"
KEY = KeyRecord("k_1", digest(SECRET), "acme", "pro", "private name", created_at=1.0)


async def no_uses() -> Mapping[str, int]:
    return {}


def not_ready() -> Readiness:
    return Readiness(False, "a reason")


async def redis_is_away() -> Mapping[str, int]:
    raise RedisConnectionError("password of redis")


@pytest.fixture
async def directory() -> AsyncIterator[Directory]:
    """One that knows a key and no limits; its Redis is never asked."""
    async with Redis() as unused:
        made = Directory(unused, GatewayMetrics())
        made._keys = {KEY.digest: KEY}
        yield made


async def get(app: TokenGuard, path: str, authorization: str | None = None, method: str = "GET") -> httpx.Response:
    transport = httpx.ASGITransport(app)
    headers = {} if authorization is None else {"authorization": authorization}
    async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
        return await client.request(method, path, headers=headers)


@pytest.mark.parametrize(
    "path", ["/metrics", "/limits", "/keys", "/health/", "/live/", "/", "/docs", "/nothing", "//health"]
)
@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {SECRET}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Basic {TOKEN}",
        TOKEN,
    ],
)
async def test_nothing_but_health_is_told_without_the_token(
    directory: Directory, path: str, authorization: str | None
) -> None:
    """Whoever has no token, or an API key, learns not even which paths there are."""
    app = admin_app(directory, GatewayMetrics(), TOKEN, no_uses, not_ready)

    answer = await get(app, path, authorization)

    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer realm="penstock admin"')
    assert answer.json()["error"]["code"] == "invalid_admin_token"
    assert TOKEN not in answer.text


async def test_probes_need_no_token(directory: Directory) -> None:
    """Those of an orchestrator carry none; what they learn is whether the gateway is ready, and that it lives."""
    app = admin_app(directory, GatewayMetrics(), TOKEN, no_uses, not_ready)
    answers = [await get(app, path) for path in ("/health", "/live")]
    assert [answer.status_code for answer in answers] == [503, 200]
    assert answers[0].json() == {"ready": False, "why": "a reason"}


async def test_probes_may_ask_for_the_head_alone(directory: Directory) -> None:
    """Some load balancers probe so: on the admin port and on callers' port they are answered as with GET."""
    app = admin_app(directory, GatewayMetrics(), TOKEN, no_uses, not_ready)
    assert [(await get(app, path, method="HEAD")).status_code for path in ("/health", "/live")] == [503, 200]
    callers = _other_routes(directory, lambda _: AwayLimiter(), not_ready)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(callers), base_url="http://gateway") as client:
        assert (await client.head("/health")).status_code == 503


@pytest.mark.parametrize("authorization", [f"Bearer {TOKEN}", f"bearer   {TOKEN}"])
async def test_the_token_opens_the_rest(directory: Directory, authorization: str) -> None:
    """Metrics and keys are told, and what is not there is a 404."""
    app = admin_app(directory, GatewayMetrics(), TOKEN, no_uses, not_ready)
    statuses = [(await get(app, path, authorization)).status_code for path in ("/metrics", "/keys", "/nothing")]
    assert statuses == [200, 200, 404]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("path", ["/metrics", "/health", "/limits", "/keys"])
async def test_nothing_changes_state(directory: Directory, method: str, path: str) -> None:
    """Whoever has the token can read, and nothing else."""
    app = admin_app(directory, GatewayMetrics(), TOKEN, no_uses, not_ready)
    assert (await get(app, path, f"Bearer {TOKEN}", method)).status_code == 405


async def test_keys_are_told_without_what_they_could_be_known_by(directory: Directory) -> None:
    """Ids, orgs, tiers and last uses, and no digest."""

    async def uses() -> Mapping[str, int]:
        return {"k_1": 1_700_000_000}

    answer = await get(admin_app(directory, GatewayMetrics(), TOKEN, uses, not_ready), "/keys", f"Bearer {TOKEN}")

    (told,) = answer.json()
    assert (told["id"], told["org"], told["tier"], told["last_used_at"]) == ("k_1", "acme", "pro", 1_700_000_000)
    assert KEY.digest not in answer.text


async def test_keys_while_redis_is_away(directory: Directory) -> None:
    """A clear answer, without Redis's own words."""
    answer = await get(
        admin_app(directory, GatewayMetrics(), TOKEN, redis_is_away, not_ready), "/keys", f"Bearer {TOKEN}"
    )
    assert answer.status_code == 503
    assert "password" not in answer.text


async def test_without_a_token_the_port_is_open(directory: Directory) -> None:
    """As tests of other things have it; config and supervisor always set one."""
    assert (await get(admin_app(directory, GatewayMetrics(), "", no_uses, not_ready), "/keys")).status_code == 200


def test_a_rotated_key_is_told_once() -> None:
    """One row for an id, with how many of its secrets are active; a key that has ended says how."""
    older = msgspec.structs.replace(KEY, expires_at=50.0)
    newer = msgspec.structs.replace(KEY, digest="other", created_at=10.0)
    revoked = msgspec.structs.replace(KEY, id="k_0", revoked_at=20.0)
    records = [newer, older, revoked]

    told = [(key.id, key.status, key.active_secrets) for key in known_keys(records, {}, 40.0)]
    later = [(key.id, key.status, key.active_secrets) for key in known_keys(records, {}, 60.0)]

    assert told == [("k_0", "revoked", 0), ("k_1", "active", 2)]
    assert later == [("k_0", "revoked", 0), ("k_1", "active", 1)]
