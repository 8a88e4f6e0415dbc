"""The keeper starts, stops and restarts engines as it should; the engines are fakes, so no vLLM is needed."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from ratelimit.supervisor import engines as engines_module
from ratelimit.supervisor.engines import EngineKeeper
from serving.engine.launch import Engine, EngineError, EngineSpec
from tests.support.engines import profile_of


class FakeEngine(Engine):
    """An engine that is ready, crashes and ends when a test says so."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.url = spec.url
        self.status: int | None = None
        self.stops = 0
        self.ready = asyncio.get_running_loop().create_future()
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait for the test's word; the timeout is the real engine's affair."""
        await self.ready

    def poll(self) -> int | None:
        """What the test has set."""
        return self.status

    async def stop(self) -> None:
        """End as soon as the test allows it."""
        self.stops += 1
        await self.may_end.wait()
        self.status = self.status or 0


class Machine:
    """Starts fake engines for a keeper, and remembers them all."""

    def __init__(self) -> None:
        self.started: list[FakeEngine] = []
        self.failures: defaultdict[int, list[Exception]] = defaultdict(list)
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.attempts = 0
        self.keeper = EngineKeeper(Path("/unused"), self.start)

    async def start(self, spec: EngineSpec, workdir: Path) -> Engine:
        """Start a fake, or fail as planned for that port."""
        assert workdir == Path("/unused")
        self.attempts += 1
        await self.may_start.wait()
        if self.failures[spec.port]:
            raise self.failures[spec.port].pop()
        self.started.append(FakeEngine(spec))
        return self.started[-1]

    @property
    def ports(self) -> list[int]:
        """Ports of all engines ever started, in order."""
        return [engine.spec.port for engine in self.started]


class Clock:
    """A clock that a test turns on."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
async def machine() -> Machine:
    """A keeper on a machine of fakes."""
    return Machine()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The keeper's clock."""
    clock = Clock()
    monkeypatch.setattr(engines_module, "monotonic", clock)
    return clock


def spec_of(port: int, slowdown: float = 1.0) -> EngineSpec:
    return EngineSpec("virtual", "tiny", port, profile=profile_of(), slowdown=slowdown)


def on_gpu(port: int, gpu_index: int, device: Literal["gpu", "cpu"] = "gpu") -> EngineSpec:
    return EngineSpec(device, "tiny", port, gpu_index=gpu_index)


async def settle() -> None:
    """Let every task run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_missing_engines_are_started_once(machine: Machine) -> None:
    """Each wanted engine is started by one check and left alone by the next."""
    assert machine.keeper.want([spec_of(1), spec_of(2)]) == []
    await machine.keeper.check()
    await machine.keeper.check()
    assert machine.ports == [1, 2]
    assert machine.keeper.engines == machine.started


async def test_a_profile_measured_again_restarts_nothing(machine: Machine) -> None:
    """A profile file with a new date and fit names the engine that runs already."""
    spec = spec_of(1)
    machine.keeper.want([spec])
    await machine.keeper.check()
    profile = profile_of()
    provenance = msgspec.structs.replace(profile.provenance, date="2030-12-31")
    measured = msgspec.structs.replace(profile, provenance=provenance)
    assert machine.keeper.want([msgspec.structs.replace(spec, profile=measured)]) == []
    await machine.keeper.check()
    assert machine.ports == [1]
    assert machine.started[0].stops == 0


async def test_an_unwanted_engine_runs_until_it_is_let_go(machine: Machine) -> None:
    """Wanting less names what is to go and stops nothing; letting go stops it and waits for its end."""
    machine.keeper.want([spec_of(1), spec_of(2)])
    await machine.keeper.check()
    kept, going = machine.started
    going.may_end.clear()

    assert machine.keeper.want([spec_of(1)]) == [going.url]
    await machine.keeper.check()
    await settle()
    assert going.stops == 0

    letting_go = asyncio.create_task(machine.keeper.let_go([kept.url, going.url]))
    await settle()
    assert (kept.stops, going.stops) == (0, 1)
    assert not letting_go.done()
    going.may_end.set()
    await letting_go
    assert machine.keeper.engines == [kept]


async def test_an_engine_wanted_again_in_time_is_kept(machine: Machine) -> None:
    """An edit taken back before the engine was let go costs nothing."""
    machine.keeper.want([spec_of(1)])
    await machine.keeper.check()
    going = machine.keeper.want([])
    machine.keeper.want([spec_of(1)])
    await machine.keeper.let_go(going)
    await machine.keeper.check()
    assert machine.ports == [1]
    assert machine.started[0].stops == 0


async def test_an_unwanted_engine_that_crashes_is_not_restarted(machine: Machine, clock: Clock) -> None:
    """What is to go may as well be gone already."""
    machine.keeper.want([spec_of(1)])
    await machine.keeper.check()
    machine.keeper.want([])
    machine.started[0].status = 9
    for _ in range(3):
        await machine.keeper.check()
        await settle()
        clock.now_s += 1000
    assert machine.ports == [1]
    assert machine.keeper.engines == []
    await machine.keeper.let_go([machine.started[0].url])


async def test_an_engine_unwanted_while_it_starts_is_stopped(machine: Machine) -> None:
    """It came too late to be named by ``want``, so nobody else would let it go."""
    machine.may_start.clear()
    machine.keeper.want([spec_of(1)])
    checking = asyncio.create_task(machine.keeper.check())
    await settle()
    assert machine.attempts == 1
    assert machine.keeper.want([]) == []
    machine.may_start.set()
    await checking
    await settle()
    assert machine.started[0].stops == 1
    assert machine.keeper.engines == []


async def test_a_replacement_waits_until_its_port_is_free(machine: Machine) -> None:
    """The successor at the same address is started after the old engine's end, and not counted as failed before."""
    machine.keeper.want([spec_of(1)])
    await machine.keeper.check()
    old = machine.started[0]
    old.may_end.clear()
    assert machine.keeper.want([spec_of(1, slowdown=2.0), spec_of(2)]) == []
    for _ in range(2):
        await machine.keeper.check()
        await settle()
    assert machine.ports == [1, 2]
    assert old.stops == 1
    old.may_end.set()
    await settle()
    await machine.keeper.check()
    assert machine.ports == [1, 2, 1]


async def test_a_successor_waits_for_its_gpu(machine: Machine) -> None:
    """An engine on another port but the same GPU would find no memory beside the one that is to go."""
    machine.keeper.want([on_gpu(1, 0), on_gpu(2, 1)])
    await machine.keeper.check()
    going = machine.keeper.want([on_gpu(1, 0), on_gpu(3, 1), on_gpu(4, 2), on_gpu(5, 1, "cpu")])
    await machine.keeper.check()
    assert machine.ports == [1, 2, 4, 5]
    await machine.keeper.let_go(going)
    await machine.keeper.check()
    assert machine.ports == [1, 2, 4, 5, 3]


async def test_a_crashed_engine_is_restarted_after_its_delay(machine: Machine, clock: Clock) -> None:
    """A crash counts as a failure of that engine, and holds up no other."""
    machine.keeper.want([spec_of(1), spec_of(2)])
    await machine.keeper.check()
    machine.started[0].status = -9
    await machine.keeper.check()
    await settle()
    await machine.keeper.check()
    assert machine.ports == [1, 2]
    clock.now_s += 1.0
    await machine.keeper.check()
    assert machine.ports == [1, 2, 1]


async def test_a_failed_start_is_tried_again_under_a_back_off(machine: Machine, clock: Clock) -> None:
    """A start that fails ends no check, delays its next try more each time, and leaves the others alone."""
    machine.failures[1] = [EngineError("port taken"), EngineError("disk full")]
    machine.keeper.want([spec_of(1), spec_of(2)])
    await machine.keeper.check()
    await machine.keeper.check()
    assert machine.ports == [2]
    assert machine.attempts == 2
    clock.now_s += 1.0
    await machine.keeper.check()
    clock.now_s += 1.0
    await machine.keeper.check()
    assert machine.attempts == 3
    clock.now_s += 1.0
    await machine.keeper.check()
    assert machine.ports == [2, 1]


async def test_start_raises_the_first_failure_and_leaves_the_rest_to_stop(machine: Machine) -> None:
    """The reason shown is the first engine's own, and everything started can be stopped after it."""
    machine.keeper.want([spec_of(1), spec_of(2), spec_of(3)])
    starting = asyncio.create_task(machine.keeper.start())
    await settle()
    first, second, third = machine.started
    second.ready.set_exception(EngineError("the second is on fire"))
    await settle()
    assert starting.done()
    with pytest.raises(EngineError, match="the second is on fire"):
        await starting
    assert first.ready.cancelled()
    assert third.ready.cancelled()
    await machine.keeper.stop()
    assert [engine.stops for engine in machine.started] == [1, 1, 1]
    assert machine.keeper.engines == []


async def test_start_waits_until_all_serve(machine: Machine) -> None:
    """The stack goes on when the last engine is ready."""
    machine.keeper.want([spec_of(1), spec_of(2)])
    starting = asyncio.create_task(machine.keeper.start())
    await settle()
    machine.started[0].ready.set_result(None)
    await settle()
    assert not starting.done()
    machine.started[1].ready.set_result(None)
    await starting


async def test_stop_waits_for_those_that_are_stopping_already(machine: Machine) -> None:
    """Nothing runs after ``stop``, whoever had begun to stop it."""
    machine.keeper.want([spec_of(1), spec_of(2)])
    await machine.keeper.check()
    slow = machine.started[0]
    slow.may_end.clear()
    letting_go = asyncio.create_task(machine.keeper.let_go(machine.keeper.want([spec_of(2)])))
    await settle()
    letting_go.cancel()
    stopping = asyncio.create_task(machine.keeper.stop())
    await settle()
    assert not stopping.done()
    slow.may_end.set()
    await stopping
    assert [engine.stops for engine in machine.started] == [1, 1]
