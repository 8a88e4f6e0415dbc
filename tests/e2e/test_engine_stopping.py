"""However an engine ends, in the middle of open streams, nothing of it stays; and its streams do not look complete."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import psutil
import pytest

from serving.engine.launch import Engine, start_engines
from serving.profile import dump_profile
from tests.support.engines import (
    Answer,
    engine_core_of,
    family_of,
    free_port,
    metric,
    profile_of,
    prompt_of,
    read_stream,
    until,
    virtual_spec,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

STREAMS = 10
#: The guard's grace for SIGTERM, and as much again for a busy machine.
CLEARED_WITHIN_S = 6.0
PARENT = """
import asyncio, sys
from pathlib import Path
from serving.engine.launch import Engine, EngineSpec
from serving.profile import load_profile

async def main():
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    spec = EngineSpec("virtual", "tiny", port, profile=load_profile(str(folder / "device.json")))
    engine = await Engine.start(spec, folder)
    await engine.wait_ready()
    print(engine.pid, engine.guard_pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Engine]]:
    """An engine for each way to die."""
    specs = [virtual_spec(profile_of(0.01)) for _ in range(4)]
    started = asyncio.run(start_engines(specs, tmp_path_factory.mktemp("stopping"), timeout_s=240))
    yield started

    async def stop() -> None:
        await asyncio.gather(*(engine.stop() for engine in started))

    asyncio.run(stop())


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as client:
        yield client


class Load:
    """Open streams on an engine, each long enough to outlast the test."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.answers = [Answer() for _ in range(STREAMS)]
        self._tasks = [
            asyncio.create_task(read_stream(session, url, answer, prompt=prompt_of(4), max_tokens=4000))
            for answer in self.answers
        ]

    async def open(self) -> None:
        """Wait until every stream has its first token."""

        async def all_stream() -> bool:
            return all(answer.texts for answer in self.answers)

        await until(all_stream, 30, "the first token of every stream")

    async def end(self) -> None:
        """Wait until every connection is closed; none of the answers may look complete."""
        async with asyncio.timeout(30):
            await asyncio.gather(*self._tasks)
        assert [answer.finish_reason for answer in self.answers] == [None] * STREAMS


async def until_gone(family: list[psutil.Process]) -> None:
    async def gone() -> bool:
        return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)

    await until(gone, CLEARED_WITHIN_S, "the end of every process")


async def test_stop_with_open_streams_clears_within_the_grace(
    engines: list[Engine], session: aiohttp.ClientSession
) -> None:
    """vLLM alone would hang for minutes on SIGTERM with streams open."""  # noqa: D403 - its name
    engine, load = engines[0], Load(session, engines[0].url)
    await load.open()
    family = family_of(engine.guard_pid)
    async with asyncio.timeout(CLEARED_WITHIN_S):
        await engine.stop()
    await until_gone(family)
    assert engine.poll() is not None
    await load.end()


async def test_killed_api_server_leaves_no_engine_core(engines: list[Engine], session: aiohttp.ClientSession) -> None:
    """The engine core does not survive its server as an orphan with all its memory."""
    engine, load = engines[1], Load(session, engines[1].url)
    await load.open()
    family = family_of(engine.guard_pid)
    psutil.Process(engine.pid).kill()
    await until_gone(family)
    assert engine.poll() == -signal.SIGKILL
    await load.end()


async def test_killed_engine_core_ends_streams_without_a_finish_reason(
    engines: list[Engine], session: aiohttp.ClientSession
) -> None:
    """An answer cut short is known by the missing finish_reason, for ``[DONE]`` may still come."""
    engine, load = engines[2], Load(session, engines[2].url)
    await load.open()
    engine_core_of(engine.pid).kill()
    await load.end()
    assert [answer.finish_reason for answer in load.answers] == [None] * STREAMS


async def test_crash_command_ends_the_engine_core(engines: list[Engine], session: aiohttp.ClientSession) -> None:
    """The control file can kill an idle device, and the server then ends too."""
    engine = engines[3]
    assert engine.control is not None
    assert await metric(session, engine.url, "num_requests_running") == 0
    core = engine_core_of(engine.pid)
    engine.control.crash()
    await until_gone([core])

    async def ended() -> bool:
        return engine.poll() is not None

    await until(ended, 30, "the end of the API server")


async def test_killed_parent_leaves_nothing_under_load(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """A SIGKILL of the process that started an engine, streams open, clears guard, server and engine core."""
    port = free_port()
    (tmp_path / "device.json").write_bytes(dump_profile(profile_of(0.01)))
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(tmp_path), str(port), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid, guard_pid = map(int, (await asyncio.wait_for(parent.stdout.readline(), 240)).split())
    family = family_of(guard_pid)
    assert pid in [process.pid for process in family]
    load = Load(session, f"http://127.0.0.1:{port}")
    await load.open()
    parent.kill()
    await parent.wait()
    await until_gone(family)
    await load.end()
