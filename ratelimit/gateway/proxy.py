"""The data plane: one request from its headers to its settlement. A raw ASGI endpoint.

The order is fixed: key, body, shape, admission, replica, relay, settlement. Whatever happens after admission, the
account is settled; whatever happens after a replica was called, the call is closed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import perf_counter, time

import msgspec

from ratelimit.gateway.accounting import Account, Ledger, Limiter
from ratelimit.gateway.admission import Durations, answer_headers, refusal
from ratelimit.gateway.asgi import (
    LAST_SEND_S,
    BodyRoom,
    ClientLeftError,
    ClientWatch,
    HeldBody,
    Receive,
    Scope,
    Send,
    credential,
    header,
    new_request_id,
    read_body,
    request_id_for,
    send_rejection,
    send_whole,
    send_within,
)
from ratelimit.gateway.charges import limit_of, rooms
from ratelimit.gateway.demand import RETRY_HEADER, Asked, Demand, attempt_of
from ratelimit.gateway.dialects import Dialect, dialect_of, engine_refusal, id_headers
from ratelimit.gateway.directory import Directory
from ratelimit.gateway.drain import Drain
from ratelimit.gateway.errors import (
    Headers,
    Rejection,
    answer_too_large,
    going_away,
    internal_error,
    reduced_capacity,
    timed_out,
    with_reset_at,
)
from ratelimit.gateway.formats.answers import answer_outcome
from ratelimit.gateway.formats.streams import AnswerStream, answer_stream, stream_error
from ratelimit.gateway.forward import BrokeOffError, Call, Forwarder, no_replica
from ratelimit.gateway.headers import anthropic_limit_headers, rfc3339
from ratelimit.gateway.hold import most_output
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.gateway.relay import Relay
from ratelimit.gateway.settings import GatewaySettings
from ratelimit.gateway.terms import Terms
from ratelimit.gateway.upstream import AnswerTooLargeError
from ratelimit.gateway.wire import PATHS, ParsedRequest, Route, parse_request, upstream_body, upstream_headers
from ratelimit.keys import KeyRecord
from ratelimit.meter import Denied
from ratelimit.store import StoreUnavailableError

log = logging.getLogger(__name__)

_SERVED = 200
_CLIENT_LEFT_STATUS = 499
_STORE_RETRY_US = 1_000_000
#: Room for this many bodies of the greatest size at a time.
_LARGEST_BODIES = 64
_UNKNOWN = ""
#: Added to the priority of what is borrowed: it goes behind all that is assured.
_BEHIND_ASSURED = 1_000
#: The ends of the names of buckets that are long windows.
_WINDOWS = (".5h", ".week")


class _Exchange(msgspec.Struct):
    """One request as far as it is known; the metrics want it however it ends."""

    route: Route
    scope: Scope
    send: Send
    reservation_id: str
    request_id: bytes
    dialect: Dialect
    body: HeldBody
    model: str = _UNKNOWN
    tier: str = _UNKNOWN
    status: int = 500
    answered: bool = False


class Proxy:
    """Serves the routes that reach an engine."""

    def __init__(
        self,
        settings: GatewaySettings,
        directory: Directory,
        limiter_for: Callable[[str], Limiter],
        forwarder: Forwarder,
        ledger: Ledger,
        metrics: GatewayMetrics,
        drain: Drain,
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._limiter_for = limiter_for
        self._forwarder = forwarder
        self._ledger = ledger
        self._metrics = metrics
        self._drain = drain
        self._durations = Durations()
        self._demand = Demand(metrics)
        self._bodies = BodyRoom(_LARGEST_BODIES * settings.max_body_bytes)

    async def serve(self, route: Route, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        reservation_id = new_request_id()
        request_id = request_id_for(scope, reservation_id)
        held = HeldBody(self._bodies)
        exchange = _Exchange(route, scope, send, reservation_id, request_id, dialect_of(PATHS[route]), held)
        self._metrics.open_requests.inc()
        try:
            await self._serve(exchange, receive)
        except Rejection as rejection:
            exchange.status = rejection.status
            if rejection.denied_by:
                self._metrics.denied(exchange.model, exchange.tier, rejection.denied_by)
            await send_rejection(receive, send, rejection, exchange.dialect, request_id)
        except ClientLeftError:
            exchange.status = _CLIENT_LEFT_STATUS
        except Exception:
            # Counted as status 500, and told to the caller where nothing else was.
            exchange.status = 500
            log.exception("request %s failed", reservation_id)
            if exchange.answered:
                raise
            await send_rejection(receive, send, internal_error(), exchange.dialect, request_id)
        finally:
            held.release()
            self._metrics.open_requests.dec()
            self._metrics.finished(route, exchange.model, exchange.tier, exchange.status)

    async def _read(self, exchange: _Exchange, receive: Receive) -> bytes:
        settings = self._settings
        try:
            async with self._drain.until(None):
                return await read_body(
                    exchange.scope, receive, settings.max_body_bytes, settings.body_timeout_s, exchange.body
                )
        except TimeoutError as error:
            raise going_away() from error

    async def _serve(self, exchange: _Exchange, receive: Receive) -> None:
        record = self._directory.authenticate(credential(exchange.scope))
        exchange.tier = record.tier
        body = await self._read(exchange, receive)
        received = perf_counter()
        request = parse_request(exchange.route, body)
        del body  # here and below: a large request is not kept while its answer comes
        terms = self._directory.terms(record, request.model)
        exchange.model = terms.pool.model
        self._directory.activity.note(record.id, exchange.model)
        held = self._ledger.held(record, terms, request)
        attempt = attempt_of(header(exchange.scope, RETRY_HEADER))
        if not terms.groups:
            self._demand.ended(Asked(terms, record.tier, 0, attempt), None)
            raise reduced_capacity("No replica serves this model at the moment.", _STORE_RETRY_US, "replicas")
        limiter, client = self._limiter_for(terms.pool.model), exchange.scope.get("client")
        account = Account(self._ledger, limiter, exchange.reservation_id, record, terms, request, held, client)
        asked = Asked(terms, record.tier, account.cost_us, attempt)
        async with ClientWatch(receive) as watch:
            admitted = await self._admit(exchange, account, record, asked)
            self._metrics.added_latency_of(terms.pool.model).observe(perf_counter() - received)
            try:
                await self._answer(exchange, account, record, terms, request, admitted, watch)
            finally:
                account.settle_unserved()  # does nothing where a more exact settlement came before
                self._demand.ended(asked, account.spent_us)
        if exchange.status == _SERVED and exchange.route != "count_tokens":
            self._durations.note((record.id, terms.pool.model), perf_counter() - received)

    async def _admit(self, exchange: _Exchange, account: Account, record: KeyRecord, asked: Asked) -> Headers:
        """The rate-limit headers of the answer; raises ``Rejection`` where the request is refused."""
        terms = asked.terms
        try:
            answer = await account.admit()
        except StoreUnavailableError as error:
            self._demand.refused(asked)
            detail = "The rate limiter cannot be reached. Please try again."
            raise reduced_capacity(detail, _STORE_RETRY_US, "store") from error
        now_s = time()
        told: Headers = ()
        if answer is not None and exchange.dialect == "anthropic":
            told = anthropic_limit_headers(rooms(terms, answer), now_s)
        if isinstance(answer, Denied):
            limit = limit_of(terms, answer.bucket)
            is_capped = limit is not None and limit not in terms.derived
            self._demand.refused(asked, is_capped=is_capped, is_repeated=account.is_repeated)
            mean_us = self._durations.mean_us((record.id, terms.pool.model))
            refused = refusal(terms, record.tier, answer, mean_us, exchange.reservation_id)
            refused.headers = (*refused.headers, *told)
            if answer.wait_us is not None and answer.bucket.endswith(_WINDOWS):
                refused = with_reset_at(refused, rfc3339(now_s, answer.wait_us))
            raise refused
        return (*answer_headers(terms, answer), *told)

    async def _answer(
        self,
        exchange: _Exchange,
        account: Account,
        record: KeyRecord,
        terms: Terms,
        request: ParsedRequest,
        limits: Headers,
        watch: ClientWatch,
    ) -> None:
        deadline = asyncio.get_running_loop().time() + self._settings.request_timeout_s
        call = await self._call(exchange, account, record, terms, request)
        try:
            exchange.status = call.answer.status
            if request.stream and call.answer.status == _SERVED:
                prompt_tokens = account.held.prompt_tokens
                most = most_output(request, terms.pool, prompt_tokens)
                stream = answer_stream(request, prompt_tokens, account.text_rates, most)
                told = id_headers(exchange.dialect, exchange.request_id)
                headers = ((b"content-type", call.answer.content_type), *told, *limits)
                await self._relay(exchange, account, call, stream, headers, watch, deadline)
            else:
                self._settle_whole(exchange.route, account, call)
                watch.stop()
                exchange.answered = True
                await self._send_whole(exchange, call, limits)
        finally:
            call.close()

    async def _call(
        self, exchange: _Exchange, account: Account, record: KeyRecord, terms: Terms, request: ParsedRequest
    ) -> Call:
        """Reach a replica. Once one may be at work, its work is paid for, however the wait for its answer ends."""
        timeout_s = self._settings.request_timeout_s
        priority = priority_of(terms, account.green)
        headers = upstream_headers(exchange.route, exchange.reservation_id, priority)
        body = upstream_body(request, cache_salt_of(record.org), priority)
        load = self._ledger.load(record, terms, request, account.held, account.cost_us)
        request.members.clear()
        try:
            async with self._drain.until(None):
                return await self._forwarder.call(
                    terms, PATHS[exchange.route], body, headers, load, timeout_s, request.stream
                )
        except (asyncio.CancelledError, TimeoutError) as error:
            if request.stream:
                account.settle_used(None, ended=False)
            else:
                account.settle_as_held()
            if isinstance(error, TimeoutError):
                raise (going_away() if self._drain.is_over else timed_out(timeout_s)) from error
            raise
        except BrokeOffError as error:  # perhaps for this request's sake: it is not free
            account.settle_used(None, ended=False)
            raise no_replica(error.tried) from error
        except AnswerTooLargeError as error:
            account.settle_as_held()
            raise answer_too_large(error.max_bytes) from error
        finally:
            exchange.body.release()

    @staticmethod
    def _settle_whole(route: Route, account: Account, call: Call) -> None:
        if call.answer.status < 400:
            outcome = answer_outcome(route, call.first)
            if outcome.usage is None:
                account.settle_as_held()
            else:
                account.settle_used(outcome.usage, outcome.ended)
        elif call.answer.status < 500:
            account.settle_refused()
        else:
            account.settle_unserved()

    @staticmethod
    async def _send_whole(exchange: _Exchange, call: Call, limits: Headers) -> None:
        status, content_type = call.answer.status, call.answer.content_type
        headers, body = id_headers(exchange.dialect, exchange.request_id), call.first
        if status >= 400:
            told = engine_refusal(status, body, exchange.dialect, exchange.request_id)
            if told.body is not body:
                content_type = b"application/json"
            headers, body = told.headers, told.body
        await send_whole(exchange.send, status, ((b"content-type", content_type), *headers, *limits), body)

    async def _relay(
        self,
        exchange: _Exchange,
        account: Account,
        call: Call,
        stream: AnswerStream,
        headers: Headers,
        watch: ClientWatch,
        deadline: float,
    ) -> None:
        """Pass a stream on as it comes; its end is kept back until the account is settled."""
        relay = Relay(account, call, stream, exchange.send)
        exchange.answered = True
        head = {"type": "http.response.start", "status": _SERVED, "headers": headers}
        await relay.run(head, self._drain, deadline, exchange.reservation_id)
        watch.stop()
        reason = relay.broke_off
        if reason:
            self._metrics.broken_streams.labels(exchange.model, reason).inc()
        message = f"The answer broke off before it was complete ({reason})."
        last = relay.ending(stream_error(exchange.route, message, exchange.request_id))
        await send_within(exchange.send, LAST_SEND_S, {"type": "http.response.body", "body": last, "more_body": False})


def priority_of(terms: Terms, green: bool) -> int | None:
    """The engine's priority of a request, lower first; ``None`` where not all replicas schedule by it."""
    if not terms.pool.priority_scheduling:
        return None
    return terms.priority if green else terms.priority + _BEHIND_ASSURED


def cache_salt_of(org: str) -> str:
    """The prefix-cache salt of an org: only requests of one org share cached prompts."""
    return f"org:{org}"
