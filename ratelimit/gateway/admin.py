"""The admin port's application: metrics, health, and the publication in force. Not for callers."""

from __future__ import annotations

import msgspec
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from ratelimit.gateway.app import add_error_answers
from ratelimit.gateway.directory import Directory
from ratelimit.gateway.metrics import GatewayMetrics


def admin_app(directory: Directory, metrics: GatewayMetrics) -> FastAPI:
    """``/metrics``, ``/health`` (200 once limits are known) and ``/limits`` (the publication as JSON)."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    add_error_answers(app)

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"ready": directory.ready}, 200 if directory.ready else 503)

    @app.get("/limits")
    async def limits() -> Response:
        body = msgspec.json.encode(directory.publication)
        return Response(body, 200 if directory.ready else 503, media_type="application/json")

    return app
