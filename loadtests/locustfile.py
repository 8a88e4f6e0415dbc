"""Open-loop load in Locust: every request of the plan starts at its time, whether or not earlier ones have ended.

One Locust user holds the schedule and starts a greenlet per arrival. Two things would silently close the loop: a
connection pool smaller than the load (so it is as large as the plan), and a lag taken before the connection is there
(so it is taken when the pool has handed over the socket, right before the request is written).

Run as a process of its own, since importing Locust patches sockets, threads and locks: see ``runner``.
"""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

import gevent  # type: ignore[import-untyped]  # gevent ships no types
import msgspec
from geventhttpclient.client import HTTPClient, HTTPClientPool
from geventhttpclient.connectionpool import ConnectionPool
from geventhttpclient.url import URL
from locust import FastHttpUser, task

from loadtests.answers import StreamedAnswer, retry_after_s
from loadtests.prompts import chat_body, words
from loadtests.results import Fate, RequestRecord
from loadtests.wire import PLAN_VARIABLE, Ending, Plan, PlannedCall, read_plan

#: Both bound a read from the socket: an answer that is silent for longer has failed.
_SILENCE_S = 120.0
_CONNECT_S = 10.0
_PATH = "/v1/chat/completions"


class _StampingPool(ConnectionPool):
    """Notes on the calling greenlet when a connection was handed to it, which is when its request is written."""

    def get_socket(self) -> Any:
        socket = super().get_socket()
        gevent.getcurrent().sent_at = time.monotonic()
        return socket


class _StampingClients(HTTPClientPool):
    """Clients whose connections come from a ``_StampingPool``."""

    def get_client(self, url: str | URL) -> HTTPClient:
        client = super().get_client(url)
        pool = client._connection_pool  # noqa: SLF001 - the one place that knows when a request is written
        if not isinstance(pool, _StampingPool):
            client._connection_pool = _StampingPool(  # noqa: SLF001 - as above
                client.host,
                client.port or 80,
                client.host,
                client.port or 80,
                size=pool.size,
                connection_timeout=_CONNECT_S,
                network_timeout=_SILENCE_S,
            )
        return client


def _plan() -> Plan:
    path = os.environ.get(PLAN_VARIABLE)
    if not path:
        raise SystemExit(f"set {PLAN_VARIABLE} to a plan; python -m loadtests.scenario_01_added_capacity does")
    return read_plan(Path(path))


PLAN = _plan()


class OpenLoop(FastHttpUser):
    """The whole schedule, as one Locust user."""

    host = PLAN.url
    client_pool = _StampingClients(
        concurrency=len(PLAN.calls) + 1, network_timeout=_SILENCE_S, connection_timeout=_CONNECT_S
    )

    @task
    def load(self) -> None:
        """Send every call at its time, wait for the answers, write the records, end Locust."""
        try:
            with Path(PLAN.records_path).open("wb") as records:
                _Load(self, records).run()
        finally:
            self.environment.process_exit_code = 0
            self.environment.runner.quit()


class _Load:
    """One run of the plan."""

    def __init__(self, user: OpenLoop, records: BinaryIO) -> None:
        self._user = user
        self._records = records
        self._bodies = [
            chat_body(PLAN.model, words(call.words, f"{PLAN.salt}/{call.index}"), call.output_tokens)
            for call in PLAN.calls
        ]
        self._headers = {
            key: {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
            for key, secret in PLAN.secrets.items()
        }
        self._started = 0.0
        self._in_flight = 0
        self._peak = 0

    def run(self) -> None:
        gc.freeze()
        self._started = time.monotonic()
        greenlets = []
        for call in PLAN.calls:
            gevent.sleep(max(0.0, call.time_s - self._now_s()))
            greenlets.append(gevent.spawn(self._call, call))
        gevent.joinall(greenlets, timeout=PLAN.patience_s)
        gevent.killall(greenlets)
        self._write(Ending(self._peak))

    def _now_s(self) -> float:
        return time.monotonic() - self._started

    def _call(self, call: PlannedCall) -> None:
        self._in_flight += 1
        self._peak = max(self._peak, self._in_flight)
        attempt = _Attempt()
        try:
            attempt.send(self._user, self._bodies[call.index], self._headers[call.key], call.output_tokens)
        except gevent.GreenletExit:
            attempt.fate = "cut"
        finally:
            self._in_flight -= 1
            self._write(self._record(call, attempt))

    def _record(self, call: PlannedCall, attempt: _Attempt) -> RequestRecord:
        now_s = self._now_s()
        sent_at = getattr(gevent.getcurrent(), "sent_at", None)
        return RequestRecord(
            index=call.index,
            fate=attempt.fate,
            sent_s=sent_at - self._started if sent_at is not None else now_s,
            end_s=attempt.last_at - self._started if attempt.fate == "admitted" else now_s,
            status=attempt.status,
            first_token_s=attempt.first_at - self._started if attempt.first_at is not None else None,
            input_tokens=attempt.answer.input_tokens,
            output_tokens=attempt.answer.output_tokens,
            retry_after_s=attempt.retry_after_s,
            problem=attempt.problem,
        )

    def _write(self, line: RequestRecord | Ending) -> None:
        self._records.write(msgspec.json.encode(line) + b"\n")
        self._records.flush()


class _Attempt:
    """One request as it goes: what came back so far."""

    def __init__(self) -> None:
        self.answer = StreamedAnswer()
        self.fate: Fate = "failed"
        self.status = 0
        self.first_at: float | None = None
        self.last_at = 0.0
        self.retry_after_s: float | None = None
        self.problem: str | None = None

    def send(self, user: OpenLoop, body: bytes, headers: dict[str, str], output_tokens: int) -> None:
        """One POST, its answer read to the end and judged. Locust's own statistics see every outcome."""
        with user.client.post(
            _PATH,
            data=body,  # type: ignore[arg-type]  # annotated as text, sent as it is
            headers=headers,
            stream=True,
            catch_response=True,
        ) as response:
            self.status = response.status_code
            if self.status == 200:
                self._read_stream(response._response, output_tokens)  # noqa: SLF001 - its iterators wait for 1 KB
            elif self.status == 429:
                self._read_refusal({name.lower(): value for name, value in response.headers.items()})
            else:
                self.problem = f"status {self.status}: {response.text or response.error}"[:300]
            if self.problem is None:
                response.success()
            else:
                response.failure(self.problem)

    def _read_stream(self, stream: Any, output_tokens: int) -> None:
        try:
            while line := stream.readline(b"\n"):
                if self.answer.read(line) == "content":
                    self.last_at = time.monotonic()
                    self.first_at = self.first_at or self.last_at
        except Exception as error:
            # Counted: every such request is a record of fate "failed", which fails the run.
            self.problem = f"the stream broke: {type(error).__name__}: {error}"
            return
        self.problem = self.answer.incomplete(output_tokens)
        self.fate = "failed" if self.problem else "admitted"

    def _read_refusal(self, headers: dict[str, str]) -> None:
        self.retry_after_s = retry_after_s(headers)
        if self.retry_after_s is None:
            self.problem = f"a 429 whose Retry-After is {headers.get('retry-after')!r}"
        else:
            self.fate = "throttled"
