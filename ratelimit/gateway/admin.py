"""The admin port's application: metrics, health, the publication in force, and the keys. Nothing that changes anything.

Not for callers: everything but ``/health`` and ``/live`` asks for the admin token, an API key does not do.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from hashlib import sha256
from hmac import compare_digest
from time import time
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from redis.exceptions import RedisError

from ratelimit.gateway.app import add_error_answers, health_answer
from ratelimit.gateway.asgi import Receive, Scope, Send, header
from ratelimit.gateway.directory import Directory
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.gateway.readiness import Readiness
from ratelimit.keys import KeyRecord, KeyStatus, status

#: When each key was last used, in seconds since 1970, by id; may raise ``RedisError`` or ``OSError``.
ReadUses = Callable[[], Awaitable[Mapping[str, int]]]

#: Probes of an orchestrator carry no token.
_OPEN = frozenset({"/health", "/live"})
_UNAUTHORIZED = {
    "error": {
        "message": "The admin port needs its own token: Authorization: Bearer TOKEN. `penstock up` says where it is.",
        "type": "authentication_error",
        "code": "invalid_admin_token",
    }
}


class KnownKey(msgspec.Struct, frozen=True):
    """A key as this gateway knows it. ``active_secrets`` is above 1 while it is being rotated, 0 when it has ended."""

    id: str
    org: str
    tier: str
    status: KeyStatus
    active_secrets: int
    last_used_at: int | None


class TokenGuard:
    """Lets requests with the token through, and anybody to the probes; an empty token guards nothing."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], token: str) -> None:
        self._app = app
        self._digest = sha256(token.encode()).digest() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._digest is None or scope["path"] in _OPEN or self._is_shown(scope, self._digest):
            await self._app(scope, receive, send)
            return
        refusal = JSONResponse(_UNAUTHORIZED, 401, {"WWW-Authenticate": 'Bearer realm="penstock admin"'})
        await refusal(scope, receive, send)

    def _is_shown(self, scope: Scope, wanted: bytes) -> bool:
        """Digests are compared, in a time that tells neither the token's length nor how much of it was right."""
        kind, _, shown = (header(scope, b"authorization") or b"").partition(b" ")
        return kind.lower() == b"bearer" and compare_digest(sha256(shown.strip()).digest(), wanted)


def admin_app(
    directory: Directory, metrics: GatewayMetrics, token: str, read_uses: ReadUses, readiness: Callable[[], Readiness]
) -> TokenGuard:
    """``/metrics``, ``/limits`` (the publication as JSON), ``/keys``, and the probes.

    ``/health`` is readiness: 200 as long as requests are to be sent here. ``/live`` is liveness: 200 whenever the event
    loop turns, since a gateway whose background work fails ends by itself.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    add_error_answers(app)

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        return health_answer(readiness())

    @app.api_route("/live", methods=["GET", "HEAD"])
    async def live() -> JSONResponse:
        return JSONResponse({"live": True})

    @app.get("/limits")
    async def limits() -> Response:
        return _json(directory.publication, 200 if directory.ready else 503)

    @app.get("/keys")
    async def keys() -> Response:
        try:
            uses = await read_uses()
        except (RedisError, OSError):  # TimeoutError too; what failed is told by the metrics of whoever needs Redis
            return _json({"error": {"message": "Redis, which knows the last uses, cannot be reached."}}, 503)
        return _json(known_keys(directory.records(), uses, time()))

    return TokenGuard(app, token)


def known_keys(records: Iterable[KeyRecord], uses: Mapping[str, int], now_s: float) -> list[KnownKey]:
    """Each key once, by id, without anything that its secrets could be known by."""
    by_id: dict[str, list[KeyRecord]] = {}
    for record in records:
        by_id.setdefault(record.id, []).append(record)
    return [_known(secrets, uses.get(key_id), now_s) for key_id, secrets in sorted(by_id.items())]


def _known(secrets: list[KeyRecord], last_used_at: int | None, now_s: float) -> KnownKey:
    newest = max(secrets, key=lambda record: record.created_at)
    active = sum(status(record, now_s) == "active" for record in secrets)
    told: KeyStatus = "active" if active else status(newest, now_s)
    return KnownKey(newest.id, newest.org, newest.tier, told, active, last_used_at)


def _json(value: Any, code: int = 200) -> Response:
    return Response(msgspec.json.encode(value), code, media_type="application/json")
