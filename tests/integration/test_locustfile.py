"""The Locust process against a small server of our own: open loop, honest lag, every outcome recorded."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from loadtests.__main__ import Summary
from loadtests.results import Fate, LoadRun
from loadtests.runner import LoadError, run_load
from loadtests.wire import Plan, PlannedCall

pytestmark = pytest.mark.slow

TOKENS_S = 0.3


class FakeGateway:
    """Answers by key: slow streams after a while, refused and misled get 429, broken is dropped, silent waits."""

    def __init__(self) -> None:
        self.url = ""
        self.in_flight = 0
        self.peak = 0
        self.left = 0

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """One answer; counts how many are open at once."""
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            body = await request.json()
            return await self._answer(request, request.headers["Authorization"], body["max_tokens"])
        except asyncio.CancelledError:
            self.left += 1
            raise
        finally:
            self.in_flight -= 1

    async def _answer(self, request: web.Request, key: str, tokens: int) -> web.StreamResponse:
        if key == "Bearer refused":
            return web.json_response({"error": {}}, status=429, headers={"Retry-After": "3", "retry-after-ms": "2500"})
        if key == "Bearer misled":
            return web.json_response({"error": {}}, status=429, headers={"Retry-After": "soon"})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n')
        await asyncio.sleep(3600 if key == "Bearer silent" else TOKENS_S)
        await response.write(b'data: {"choices":[{"delta":{"content":"word"}}]}\n\n')
        if key == "Bearer broken":
            assert request.transport is not None
            request.transport.abort()
            return response
        await response.write(b'data: {"choices":[{"delta":{},"finish_reason":"length"}]}\n\n')
        await response.write(b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":%d}}\n\n' % tokens)
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
async def gateway() -> AsyncIterator[FakeGateway]:
    fake = FakeGateway()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", fake.chat)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield fake
    await runner.cleanup()


def plan(gateway: FakeGateway, workdir: Path, keys: list[str], apart_s: float, patience_s: float = 10.0) -> Plan:
    """A plan of one call per key, ``apart_s`` between them."""
    calls = tuple(PlannedCall(i, i * apart_s, key, 5, 4) for i, key in enumerate(keys))
    secrets = {key: key for key in keys}
    return Plan(gateway.url, "m", secrets, calls, patience_s, "salt", str(workdir / "records.jsonl"))


async def run(a_plan: Plan, workdir: Path) -> tuple[LoadRun, Counter[Fate]]:
    """Run it; the records and the last progress told."""
    progress: list[Counter[Fate]] = []
    records = await run_load(a_plan, workdir, progress.append)
    return records, progress[-1]


async def test_arrivals_do_not_wait_for_answers(gateway: FakeGateway, tmp_path: Path) -> None:
    """Forty calls 5 ms apart are all open at once on a server that takes 300 ms, and none is sent late by as much."""
    records, progress = await run(plan(gateway, tmp_path, ["slow"] * 40, 0.005), tmp_path)

    assert [r.fate for r in records.records] == ["admitted"] * 40
    assert progress == {"admitted": 40}
    assert gateway.peak == records.peak_in_flight == 40
    assert all(0 <= r.sent_s - 0.005 * r.index < TOKENS_S for r in records.records)


async def test_first_token_is_the_first_content(gateway: FakeGateway, tmp_path: Path) -> None:
    """The empty first chunk does not count: the first token comes when text does, and tokens come from usage."""
    records, _ = await run(plan(gateway, tmp_path, ["slow"], 0.0), tmp_path)

    (record,) = records.records
    assert record.first_token_s is not None
    assert record.first_token_s - record.sent_s >= TOKENS_S
    assert (record.input_tokens, record.output_tokens, record.problem) == (9, 4, None)


async def test_every_outcome_is_recorded(gateway: FakeGateway, tmp_path: Path) -> None:
    """A refusal with a valid Retry-After is data; an invalid one, and a stream without an end, are failures."""
    records, _ = await run(plan(gateway, tmp_path, ["slow", "refused", "misled", "broken"], 0.01), tmp_path)

    assert [r.fate for r in records.records] == ["admitted", "throttled", "failed", "failed"]
    assert records.records[1].retry_after_s == 2.5
    assert "Retry-After is 'soon'" in (records.records[2].problem or "")
    assert "broke" in (records.records[3].problem or "")


async def test_open_answers_are_cut_at_the_end(gateway: FakeGateway, tmp_path: Path) -> None:
    """What is unanswered when patience ends is recorded as cut, and the server sees its client leave."""
    records, _ = await run(plan(gateway, tmp_path, ["silent", "slow"], 0.01, patience_s=1.0), tmp_path)

    assert [r.fate for r in records.records] == ["cut", "admitted"]
    assert records.records[0].first_token_s is None
    assert gateway.left == 1


async def test_secrets_do_not_stay(gateway: FakeGateway, tmp_path: Path) -> None:
    """The plan with the keys' secrets is gone after the load."""
    await run(plan(gateway, tmp_path, ["slow"], 0.0), tmp_path)

    assert sorted(await asyncio.to_thread(os.listdir, tmp_path)) == ["locust.log", "records.jsonl"]


async def test_a_load_that_cannot_run_says_why(tmp_path: Path) -> None:
    """Records that cannot be written end the load with Locust's own words, not with an empty result."""
    gateway = FakeGateway()
    gateway.url = "http://127.0.0.1:1"
    broken = plan(gateway, tmp_path / "missing", ["slow"], 0.0)

    with pytest.raises(LoadError, match="No such file"):
        await run_load(broken, tmp_path, lambda _: None)


async def command(url: str, key: str, *options: str) -> tuple[int, str, str]:
    """``python -m loadtests`` to its end: its status, what it printed, and what it complained of."""
    arguments = ("--url", url, "--model", "m", "--rate", "20", "--duration-s", "1", *options)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadtests", *arguments),
        env=os.environ | {"PENSTOCK_API_KEY": key},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    printed, complained = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, printed.decode(), complained.decode()


@pytest.mark.parametrize(
    ("key", "fate", "status"), [("slow", "admitted", 0), ("refused", "throttled", 0), ("broken", "failed", 1)]
)
async def test_the_command_says_what_became_of_its_load(
    gateway: FakeGateway, key: str, fate: Fate, status: int
) -> None:
    """One line of JSON with fates and figures; a refusal with its time to wait is no failure, a broken stream is."""
    code, printed, complained = await command(gateway.url, key, "--scale", "0.01")

    assert code == status, complained
    summary = msgspec.json.decode(printed, type=Summary)
    assert summary.requests > 5
    assert summary.fates == {fate: summary.requests}
    assert summary.figures.offered_rps == summary.requests
    assert bool(summary.problems) == (fate == "failed")
    assert key not in printed


async def test_the_command_asks_for_a_key() -> None:
    """Without PENSTOCK_API_KEY it sends nothing, and says what is missing."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadtests", "--url", "http://127.0.0.1:9", "--model", "m"),
        env={name: value for name, value in os.environ.items() if name != "PENSTOCK_API_KEY"},
        stderr=asyncio.subprocess.PIPE,
    )
    _, complained = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 2
    assert b"PENSTOCK_API_KEY" in complained
