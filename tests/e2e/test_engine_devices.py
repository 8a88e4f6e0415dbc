"""Virtual GPUs and the CPU engine, as a client of real vLLM sees them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import aiohttp
import pytest

from serving.engine.launch import Engine, EngineSpec, start_engines
from serving.engine.tiny_model import WORDS
from tests.support.engines import (
    MODEL,
    Answer,
    complete,
    free_port,
    metric,
    profile_of,
    prompt_of,
    read_stream,
    until,
    virtual_spec,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

STEP_S = 0.005
#: Room for three of the preemption test's eight requests.
SMALL_KV = {"kv_tokens": 640, "max_model_len": 256, "max_num_seqs": 16, "max_num_batched_tokens": 64}


class Devices(NamedTuple):
    """One engine of each kind that these tests need."""

    plain: Engine
    small_kv: Engine
    cpu: Engine


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Devices]:
    specs = [
        virtual_spec(profile_of(STEP_S)),
        virtual_spec(profile_of(**SMALL_KV)),
        EngineSpec("cpu", MODEL, free_port()),
    ]
    engines = asyncio.run(start_engines(specs, tmp_path_factory.mktemp("devices"), timeout_s=240))
    yield Devices(*engines)

    async def stop() -> None:
        await asyncio.gather(*(engine.stop() for engine in engines))

    asyncio.run(stop())


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as client:
        yield client


async def test_every_token_is_a_chunk_with_text(devices: Devices, session: aiohttp.ClientSession) -> None:
    """Trap 1: a token that prints nothing would hide the first token from every client."""
    answer = await read_stream(session, devices.plain.url, Answer(), prompt=prompt_of(10), max_tokens=20)
    assert answer.text.split() == list(WORDS[:20])
    assert all(answer.texts)
    assert len(answer.texts) > 10  # a slow reader may get two tokens in one chunk
    assert (answer.finish_reason, answer.done) == ("length", True)
    assert answer.usage is not None
    assert (answer.usage["prompt_tokens"], answer.usage["completion_tokens"]) == (10, 20)


async def test_preempted_answers_have_exact_counts(devices: Devices, session: aiohttp.ClientSession) -> None:
    """Trap 2: recomputed output is neither emitted again nor lost."""
    url = devices.small_kv.url
    preempted = await metric(session, url, "num_preemptions_total")
    answers = await asyncio.gather(
        *(read_stream(session, url, Answer(), prompt=prompt_of(32, first=n), max_tokens=150) for n in range(8))
    )
    for answer in answers:
        assert answer.text.split() == list(WORDS[:150])
        assert answer.usage is not None
        assert answer.usage["completion_tokens"] == 150
    assert await metric(session, url, "num_preemptions_total") > preempted


async def test_kv_cache_is_as_large_as_the_profile_says(devices: Devices, session: aiohttp.ClientSession) -> None:
    """The number of blocks that vLLM reports is the profile's KV tokens over the block size."""
    async with session.get(f"{devices.small_kv.url}/metrics") as response:
        info = next(line for line in (await response.text()).splitlines() if line.startswith("vllm:cache_config_info{"))
    assert 'num_gpu_blocks="40"' in info
    assert 'block_size="16"' in info


async def test_steps_take_the_predicted_time(devices: Devices, session: aiohttp.ClientSession) -> None:
    """Trap 3, in situ (the clock has unit tests): never faster than predicted, nor much slower."""
    start_s = time.monotonic()
    await complete(session, devices.plain.url, prompt=prompt_of(10), max_tokens=200)
    ratio = (time.monotonic() - start_s) / (200 * STEP_S)
    assert 1.0 <= ratio < 2.0


async def test_answers_end_by_themselves(devices: Devices, session: aiohttp.ClientSession) -> None:
    """Trap 4: the seed is the length; without one it is drawn from the prompt, the same each time."""
    url, chat = devices.plain.url, {"model": MODEL, "messages": [{"role": "user", "content": prompt_of(3)}]}
    seeded = await complete(session, url, prompt=prompt_of(4), max_tokens=50, seed=7)
    assert seeded["usage"]["completion_tokens"] == 7
    assert seeded["choices"][0]["finish_reason"] == "stop"
    lengths = []
    for _ in range(2):
        async with session.post(f"{url}/v1/chat/completions", json=chat) as response:
            drawn = await response.json()
        assert drawn["choices"][0]["finish_reason"] == "stop"
        lengths.append(drawn["usage"]["completion_tokens"])
    assert lengths[0] == lengths[1]
    assert 16 <= lengths[0] <= 512


async def test_ignore_eos_runs_to_max_tokens(devices: Devices, session: aiohttp.ClientSession) -> None:
    """A caller that wants an exact length gets it, whatever its seed."""
    answer = await complete(session, devices.plain.url, prompt=prompt_of(4), max_tokens=30, seed=7, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 30


async def test_prefix_cache_reports_cached_tokens(devices: Devices, session: aiohttp.ClientSession) -> None:
    """The second of two equal prompts finds all full blocks but the last in the cache."""
    prompt, url = prompt_of(100, first=50), devices.plain.url
    usages = [(await complete(session, url, prompt=prompt, max_tokens=1))["usage"] for _ in range(2)]
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, 96]


async def test_parallel_answers_are_counted_each(devices: Devices, session: aiohttp.ClientSession) -> None:
    """With n = 3 the usage is three answers and one prompt."""
    answer = await complete(session, devices.plain.url, prompt=prompt_of(10), max_tokens=20, n=3)
    assert len(answer["choices"]) == 3
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (10, 60)


async def test_disconnect_ends_the_request(devices: Devices, session: aiohttp.ClientSession) -> None:
    """A client that leaves takes its request with it."""
    url, body = devices.plain.url, {"model": MODEL, "prompt": prompt_of(4), "max_tokens": 4000, "stream": True}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        await response.content.readline()
        assert await metric(session, url, "num_requests_running") == 1
        response.close()

    async def nothing_runs() -> bool:
        return await metric(session, url, "num_requests_running") == 0

    await until(nothing_runs, 10, "the end of the request")


async def test_logprobs_do_not_hurt_the_engine(devices: Devices, session: aiohttp.ClientSession) -> None:
    """What a virtual GPU cannot tell is that one request's error."""
    url = devices.plain.url
    body = {"model": MODEL, "prompt": prompt_of(4), "max_tokens": 2, "logprobs": 1}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        assert response.status in {200, 500}
    async with aiohttp.ClientSession() as fresh:
        assert (await complete(fresh, url, prompt=prompt_of(4), max_tokens=2))["usage"]["completion_tokens"] == 2


async def test_frozen_device_is_healthy_and_makes_no_step(devices: Devices, session: aiohttp.ClientSession) -> None:
    """A freeze looks like a hung GPU: health says yes, a running request gets nothing, a thaw goes on."""
    url, control = devices.plain.url, devices.plain.control
    assert control is not None
    answer = Answer()
    stream = asyncio.create_task(read_stream(session, url, answer, prompt=prompt_of(4), max_tokens=200))

    async def has_begun() -> bool:
        return bool(answer.texts)

    await until(has_begun, 30, "the first token")
    control.freeze()
    try:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(stream), 3 * 200 * STEP_S)
        async with session.get(f"{url}/health") as response:
            assert response.status == 200
    finally:
        control.thaw()
    assert len((await stream).text.split()) == 200


async def test_speed_can_be_changed_while_running(devices: Devices, session: aiohttp.ClientSession) -> None:
    """The control file makes the device slower and faster again."""
    url, control = devices.plain.url, devices.plain.control
    assert control is not None

    async def duration_s() -> float:
        start_s = time.monotonic()
        await complete(session, url, prompt=prompt_of(4), max_tokens=10)
        return time.monotonic() - start_s

    control.set_speed(0.1)

    async def is_slow() -> bool:
        return await duration_s() >= 10 * STEP_S / 0.1

    await until(is_slow, 10, "the slower speed")
    control.set_speed(1.0)

    async def is_fast() -> bool:
        return await duration_s() < 10 * STEP_S / 0.1 / 2

    await until(is_fast, 20, "the old speed")


async def test_cpu_engine_serves_real_tokens(devices: Devices, session: aiohttp.ClientSession) -> None:
    """The tiny model on the CPU answers with what it computes, in the number asked for."""
    answer = await read_stream(
        session, devices.cpu.url, Answer(), prompt=prompt_of(10), max_tokens=32, ignore_eos=True, temperature=0
    )
    assert answer.usage is not None
    assert (answer.usage["prompt_tokens"], answer.usage["completion_tokens"]) == (10, 32)
    assert answer.text
    assert answer.text.split() != list(WORDS[:32])
    assert (answer.finish_reason, answer.done) == ("length", True)


def test_logs_lie_in_the_workdir(devices: Devices, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each engine's output is a file of its own, named by its port."""
    folders = [folder for folder in Path(tmp_path_factory.getbasetemp()).iterdir() if folder.name.startswith("devices")]
    names = {path.name for folder in folders for path in folder.glob("*.log")}
    assert {f"engine-{engine.spec.port}.log" for engine in devices} <= names
