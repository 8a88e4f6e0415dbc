"""How many replicas a request is sent to before its caller is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from ratelimit.gateway.errors import Rejection
from ratelimit.gateway.forward import MAX_BUSY, MAX_TRIED, BrokeOffError, Forwarder
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.gateway.terms import terms_by_tier
from ratelimit.gateway.upstream import UpstreamError
from serving.capacity import RequestShape
from serving.routing import Load, Router
from tests.support.gateway import MODEL, publication


class Failing:
    """Replicas that all fail alike."""

    def __init__(self, error: UpstreamError) -> None:
        self._error = error
        self.asked: list[str] = []

    async def open(self, url: str, body: bytes, headers: Mapping[str, str]) -> Any:
        """Fail."""
        self.asked.append(url)
        raise self._error


@pytest.mark.parametrize(
    ("error", "replicas", "asked"),
    [
        (UpstreamError("busy", reached=False), 5, 5),
        (UpstreamError("busy", reached=False), 100, MAX_BUSY),
        (UpstreamError("unreachable", reached=False), 40, 40),
        (UpstreamError("unreachable", reached=False), 100, MAX_TRIED),
        (UpstreamError("broken", reached=True), 100, 2),
    ],
)
async def test_a_request_is_tried_a_bounded_number_of_times(error: UpstreamError, replicas: int, asked: int) -> None:
    """A full pool is told by few; of replicas that are gone many are tried, none of them twice."""
    upstream = Failing(error)
    terms = terms_by_tier(publication([f"http://replica:{n}" for n in range(replicas)]))["pro", MODEL]
    forwarder = Forwarder(upstream, GatewayMetrics(), 1.0, Router(0.0, lambda: 1))
    with pytest.raises((Rejection, BrokeOffError)):
        await forwarder.call(terms, "/v1/chat/completions", b"{}", {}, Load(RequestShape(10, 10), 1, 1.0), 5.0, False)
    assert len(upstream.asked) == len(set(upstream.asked)) == asked
