"""The data port's application: the proxied routes as bare ASGI, everything else through FastAPI.

FastAPI's own routing would cost the proxied routes a third of their throughput, so they are picked out before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ratelimit.gateway.accounting import Limiter
from ratelimit.gateway.asgi import (
    Message,
    Receive,
    Scope,
    Send,
    credential,
    header,
    new_request_id,
    request_id_for,
    send_rejection,
)
from ratelimit.gateway.dialects import Dialect, dialect_of, id_headers, rendered
from ratelimit.gateway.directory import Directory
from ratelimit.gateway.errors import Rejection, reduced_capacity, unknown_route, wrong_method
from ratelimit.gateway.limits_route import key_charges, limits_body, terms_asked
from ratelimit.gateway.models_route import model_body, models_body
from ratelimit.gateway.proxy import Proxy
from ratelimit.gateway.readiness import Readiness
from ratelimit.gateway.readings import RecentReadings
from ratelimit.gateway.wire import ROUTES
from ratelimit.store import StoreUnavailableError

_STORE_RETRY_US = 1_000_000


class DataApp:
    """What the data port serves, and nothing else."""

    def __init__(
        self,
        proxy: Proxy,
        directory: Directory,
        limiter_for: Callable[[str], Limiter],
        readiness: Callable[[], Readiness],
    ) -> None:
        self._proxy = proxy
        self._other = _other_routes(directory, limiter_for, readiness)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = ROUTES.get(scope["path"])
        if route is None:
            await self._other(scope, receive, _with_request_id(scope, send))
        elif scope["method"] == "POST":
            await self._proxy.serve(route, scope, receive, send)
        else:
            rejection = wrong_method(scope["method"], scope["path"], "POST")
            request_id = request_id_for(scope, new_request_id())
            await send_rejection(receive, send, rejection, dialect_of(scope["path"]), request_id)


def _with_request_id(scope: Scope, send: Send) -> Send:
    async def send_with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = message["headers"]
            if all(name != b"x-request-id" for name, _ in headers):  # a refusal has its own
                ids = id_headers(_dialect(scope), request_id_for(scope, new_request_id()))
                message["headers"] = [*headers, *ids]
        await send(message)

    return send_with_id


def _dialect(scope: Scope) -> Dialect:
    """The form that a caller reads: both APIs list models at one path, and only Anthropic's tells its version."""
    path = scope["path"]
    if (path == "/v1/models" or path.startswith("/v1/models/")) and header(scope, b"anthropic-version") is not None:
        return "anthropic"
    return dialect_of(path)


def _other_routes(
    directory: Directory, limiter_for: Callable[[str], Limiter], readiness: Callable[[], Readiness]
) -> FastAPI:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    add_error_answers(app)
    recent = RecentReadings()

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        return health_answer(readiness())

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        record = directory.authenticate(credential(request.scope))
        return models_body(directory.models(record), _dialect(request.scope))

    @app.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> dict[str, Any]:
        record = directory.authenticate(credential(request.scope))
        served = directory.terms(record, model).pool.model
        return model_body(served, _dialect(request.scope))

    @app.get("/v1/limits")
    async def limits(request: Request, model: str | None = None) -> dict[str, Any]:
        record = directory.authenticate(credential(request.scope))
        terms = terms_asked(directory, record, model)
        charges = key_charges(record, terms)
        limiter = limiter_for(terms.pool.model)
        try:
            readings = await recent.of((terms.pool.model, charges), lambda: limiter.peek(charges))
        except StoreUnavailableError as error:
            raise reduced_capacity("The rate limiter cannot be reached.", _STORE_RETRY_US, "store") from error
        return limits_body(record, terms, readings)

    return app


def health_answer(state: Readiness) -> JSONResponse:
    """What a load balancer goes by, on either port."""
    return JSONResponse(msgspec.to_builtins(state), 200 if state.ready else 503)


def add_error_answers(app: FastAPI) -> None:
    """Let every refusal have the body that clients expect."""

    @app.exception_handler(Rejection)
    async def rejected(request: Request, rejection: Exception) -> Response:
        return _as_response(request, rejection)

    @app.exception_handler(HTTPException)
    async def not_routed(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "GET")
            return _as_response(request, wrong_method(request.method, request.url.path, allowed))
        return _as_response(request, unknown_route(request.method, request.url.path))


def _as_response(request: Request, rejection: Exception) -> Response:
    if not isinstance(rejection, Rejection):
        raise rejection
    told = rendered(rejection, _dialect(request.scope), request_id_for(request.scope, new_request_id()))
    headers = {name.decode(): value.decode() for name, value in told.headers}
    return Response(told.body, told.status, headers, "application/json")
