"""Finding a replica that answers: routing, and retries on other replicas.

A request moves on to another replica as long as its client has seen nothing:

- a replica that cannot be reached was not asked to do anything, so others are tried, up to ``MAX_TRIED``;
- so it is with one that answers 503, since its own queue is full; but where ``MAX_BUSY`` say so, the pool is full, and
  asking everybody for everybody would only make it busier;
- a replica that broke off may have been brought down by this very request, so only one other is tried after it;
- so it is with one that answers what no engine says: a page, nothing at all, or another address.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from time import perf_counter

from ratelimit.gateway.errors import Rejection, reduced_capacity
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.gateway.terms import Terms
from ratelimit.gateway.upstream import Upstream, UpstreamAnswer, UpstreamError
from ratelimit.publication import PublishedReplica
from serving.routing import Load, Place, Router

#: Replicas that one request may break off on.
MAX_BROKEN = 2
#: Replicas that one request may find busy.
MAX_BUSY = 8
#: Replicas that one request is sent to in all.
MAX_TRIED = 64
_BUSY = "busy"
_RETRY_US = 1_000_000
_SERVED, _LEAST_ERROR = 200, 400
_EVENT_STREAM = b"text/event-stream"
#: An answer in JSON may begin with this much that is blank.
_BLANKS_ALLOWED = 64


class BrokeOffError(Exception):
    """No replica answered, of ``tried``, and at least one broke off that may have been at work on the request."""

    def __init__(self, tried: int) -> None:
        super().__init__(f"none of {tried} replicas answered")
        self.tried = tried


class Call:
    """A request on one replica that has begun to answer: all of the body, or a stream's first part, is in ``first``.

    ``close`` it in any case, once or more: it ends the outstanding cost, and aborts what has not ended.
    """

    __slots__ = ("_place", "_router", "answer", "first")

    def __init__(self, router: Router, place: Place[PublishedReplica]) -> None:
        self._router = router
        self._place: Place[PublishedReplica] | None = place
        self.answer: UpstreamAnswer
        self.first = b""
        router.take(place)

    def close(self) -> None:
        """Let go of the replica."""
        if answer := getattr(self, "answer", None):
            answer.close()
        place, self._place = self._place, None
        if place is not None:
            self._router.leave(place)


class Forwarder:
    """Sends requests to the replicas that ``router`` chooses."""

    def __init__(
        self, upstream: Upstream, metrics: GatewayMetrics, first_byte_timeout_s: float, router: Router
    ) -> None:
        self._upstream = upstream
        self._metrics = metrics
        self._first_byte_timeout_s = first_byte_timeout_s
        self._router = router

    async def call(
        self,
        terms: Terms,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        load: Load,
        timeout_s: float,
        stream: bool,
    ) -> Call:
        """The first replica's answer that came; raises ``Rejection`` (503) where none took the request.

        Raises ``BrokeOffError`` where one took it, and broke off.
        Raises ``TimeoutError`` after ``timeout_s``, with a replica at work, and ``AnswerTooLargeError``.
        """
        async with asyncio.timeout(timeout_s):
            return await self._call_any(terms, path, body, headers, load, stream)

    async def _call_any(
        self, terms: Terms, path: str, body: bytes, headers: Mapping[str, str], load: Load, stream: bool
    ) -> Call:
        tried: set[str] = set()
        broken = busy = 0
        model = terms.pool.model
        while broken < MAX_BROKEN and busy < MAX_BUSY and len(tried) < MAX_TRIED:
            place = self._router.choose(terms.fleet, load, tried)
            if place is None:
                break
            url = place.replica.url
            tried.add(url)
            call = Call(self._router, place)
            try:
                started = perf_counter()
                await self._begin(call, url.rstrip("/") + path, body, headers, stream)
            except UpstreamError as error:
                call.close()
                self._metrics.upstream_failures.labels(model, error.reason).inc()
                broken += error.reached
                busy += error.reason == _BUSY
            except BaseException:
                call.close()
                raise
            else:
                self._metrics.upstream_latency_of(model).observe(perf_counter() - started)
                return call
        if broken:
            raise BrokeOffError(len(tried))
        raise no_replica(len(tried))

    async def _begin(self, call: Call, url: str, body: bytes, headers: Mapping[str, str], stream: bool) -> None:
        if not stream:
            answer = call.answer = await self._upstream.open(url, body, headers)
            self._check_accepted(answer)
            call.first = await answer.read_all()
            if answer.status == _SERVED and not call.first[:_BLANKS_ALLOWED].lstrip().startswith(b"{"):
                raise UpstreamError("nonsense", reached=True)
            return
        try:
            async with asyncio.timeout(self._first_byte_timeout_s):
                answer = call.answer = await self._upstream.open(url, body, headers)
                self._check_accepted(answer)
                if answer.status == _SERVED and not answer.content_type.startswith(_EVENT_STREAM):
                    raise UpstreamError("nonsense", reached=True)
                call.first = await (answer.read_some() if answer.status == _SERVED else answer.read_all())
        except TimeoutError as error:
            raise UpstreamError("first byte timeout", reached=True) from error
        if answer.status == _SERVED and not call.first:
            raise UpstreamError("empty", reached=True)

    @staticmethod
    def _check_accepted(answer: UpstreamAnswer) -> None:
        if answer.status == 503:
            raise UpstreamError(_BUSY, reached=False)
        if answer.status != _SERVED and answer.status < _LEAST_ERROR:
            raise UpstreamError("nonsense", reached=True)


def no_replica(tried: int) -> Rejection:
    """503: every replica that was asked failed, or there is none."""
    detail = f"None of {tried} replicas took the request." if tried else "No replica serves this model at the moment."
    return reduced_capacity(detail + " Please try again.", _RETRY_US, "replicas")
