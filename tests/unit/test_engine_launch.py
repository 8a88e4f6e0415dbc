"""Engines that cannot start say so, and say what to do; the parts of a start that need no vLLM."""

from __future__ import annotations

import itertools
import socket
import sys
from itertools import pairwise
from pathlib import Path
from typing import Literal

import msgspec
import psutil
import pytest

from serving.engine import launch
from serving.engine.command import EnginePaths, EngineSpec, engine_argv, engine_environment, schedules_by_priority
from serving.engine.control import ControlError, ControlState, VirtualGpuControl
from serving.engine.guard import GuardedProcess, GuardError
from serving.engine.launch import Engine, EngineError, start_engines
from serving.engine.tiny_model import WORDS, make_tiny_model
from tests.support.engines import free_port, profile_of

PATHS = EnginePaths(Path("/w/log"), Path("/w/profile.json"), Path("/w/control.json"))


def spec_of(python: str = sys.executable) -> EngineSpec:
    return EngineSpec("virtual", "tiny", free_port(), profile=profile_of(), python=python)


def fake_python(folder: Path, server: str) -> str:
    """An interpreter that claims to have vLLM and runs ``server`` in its place."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\n{server}\n')
    path.chmod(0o755)
    return str(path)


async def test_taken_port_is_named(tmp_path: Path) -> None:
    """A busy port is found before vLLM spends half a minute to trip over it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        spec = msgspec.structs.replace(spec_of(), port=port)
        with pytest.raises(EngineError, match=f"127.0.0.1:{port}: Address already in use; choose another port"):
            await Engine.start(spec, tmp_path)


async def test_missing_vllm_is_named(tmp_path: Path) -> None:
    """An interpreter without vLLM is refused with what to install."""
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(EngineError, match=r"has no vLLM; install penstock\[vllm\]"):
        await Engine.start(spec_of(str(tmp_path / "python")), tmp_path)


async def test_missing_interpreter_is_named(tmp_path: Path) -> None:
    """A Python that is not there is an error of the engine, not a traceback."""
    with pytest.raises(EngineError, match="cannot run /no/python: No such file"):
        await Engine.start(spec_of("/no/python"), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile": None}, "a virtual GPU needs a profile"),
        ({"slowdown": 0.0}, "slowdown is 0.0, it must be a positive number"),
        ({"slowdown": float("nan")}, "slowdown is nan, it must be a positive number"),
        ({"gpu_index": -1}, "gpu_index is -1, the first GPU is 0"),
        ({"device": "cpu", "slowdown": 2.0}, "only a virtual GPU can be slowed down"),
    ],
)
async def test_impossible_spec_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    """What no device can be is refused before anything is started."""
    with pytest.raises(EngineError, match=message):
        await Engine.start(msgspec.structs.replace(spec_of(), **change), tmp_path)


async def test_a_folder_that_cannot_be_written_is_an_engine_error(tmp_path: Path) -> None:
    """A full or broken disk is told of as every failed start is."""
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=r"cannot start engine http://127.0.0.1:\d+: .*Not a directory"):
        await Engine.start(spec_of(fake_python(tmp_path, "exit")), tmp_path / "file" / "engines")


@pytest.mark.parametrize("error", [GuardError("no guard"), OSError("no processes left")])
async def test_a_guard_that_fails_is_an_engine_error(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever keeps the server from being spawned is an error of that engine."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(GuardedProcess, "start", fail)
    with pytest.raises(EngineError, match=f"cannot start engine .*: {error}"):
        await Engine.start(spec_of(fake_python(tmp_path, "exit")), tmp_path)


async def test_server_that_ends_while_starting_shows_its_last_words(tmp_path: Path) -> None:
    """The reason of a failed start is in the error, not only in a file."""
    engine = await Engine.start(spec_of(fake_python(tmp_path, "echo the GPU is on fire; exit 9")), tmp_path)
    with pytest.raises(EngineError, match=r"ended with status 9 while starting:\nthe GPU is on fire"):
        await engine.wait_ready()


async def test_server_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    """A start has a timeout."""
    engine = await Engine.start(spec_of(fake_python(tmp_path, "exec sleep 600")), tmp_path)
    with pytest.raises(EngineError, match="was not ready after 0 s"):
        await engine.wait_ready(timeout_s=0.01)
    await engine.stop()
    assert engine.poll() is not None


async def test_one_failed_start_stops_the_others(tmp_path: Path) -> None:
    """Engines start together or not at all."""
    good = fake_python(tmp_path, f"echo $$ >> {tmp_path}/pid; exec sleep 600")
    (tmp_path / "bad").mkdir()
    bad = fake_python(tmp_path / "bad", f"until [ -s {tmp_path}/pid ]; do sleep 0.01; done; exit 9")
    with pytest.raises(EngineError, match="ended with status 9"):
        await start_engines([spec_of(good), spec_of(bad)], tmp_path)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_virtual_command_names_executor_limits_and_block_size(tmp_path: Path) -> None:
    """The scheduler is bounded as the profile says, and blocks are as large as its own."""
    argv = engine_argv(spec_of(), make_tiny_model(tmp_path, 4096))
    options = dict(pairwise(argv))
    assert options["--distributed-executor-backend"] == "serving.engine.virtual_gpu.VirtualGpuExecutor"
    assert options["--max-num-seqs"] == "64"
    assert options["--max-num-batched-tokens"] == "512"
    assert options["--max-model-len"] == "4096"
    assert options["--block-size"] == "16"
    assert "--enable-prompt-tokens-details" in argv
    assert "--enable-force-include-usage" not in argv
    assert options["--scheduling-policy"] == "priority"


@pytest.mark.parametrize(
    ("extra_args", "is_so"),
    [
        ((), True),
        (("--seed", "8"), True),
        (("--scheduling-policy", "fcfs"), False),
        (("--seed", "8", "--scheduling-policy=fcfs"), False),
        (("--scheduling-policy=priority", "--seed", "8"), True),
        (("--scheduling_policy", "fcfs", "--scheduling-policy", "priority"), True),
    ],
)
def test_an_engine_schedules_by_priority_unless_told_otherwise(extra_args: tuple[str, ...], is_so: bool) -> None:
    """The last policy that an engine is given decides, and ours comes before the caller's."""
    assert schedules_by_priority(extra_args) is is_so
    spec = EngineSpec("gpu", "llama", 8000, extra_args=extra_args)
    argv = engine_argv(spec, None)
    assert argv[argv.index("--scheduling-policy") + 1] == "priority"
    assert tuple(argv[len(argv) - len(extra_args) :]) == extra_args


def test_gpu_command_is_what_users_run() -> None:
    """A GPU serves the model named, with the caller's options last, and may ask the model hub."""
    spec = EngineSpec("gpu", "llama", 8000, model_path="meta/llama", extra_args=("--dtype", "half"))
    argv = engine_argv(spec, None)
    assert argv[2:5] == ["vllm.entrypoints.cli.main", "serve", "meta/llama"]
    assert argv[-2:] == ["--dtype", "half"]
    assert "--max-num-seqs" not in argv
    env = engine_environment(spec, {"HOME": "/h"}, PATHS, None, cores=8)
    assert env["VLLM_NO_USAGE_STATS"] == env["DO_NOT_TRACK"] == "1"
    assert "HF_HUB_OFFLINE" not in env


def gpu_spec(gpus: int, *extra_args: str, gpu_index: int = 0) -> EngineSpec:
    profile = msgspec.structs.replace(profile_of(), gpus_per_replica=gpus)
    return EngineSpec("gpu", "llama", 8000, profile=profile, extra_args=extra_args, gpu_index=gpu_index)


@pytest.mark.parametrize(
    ("spec", "inherited", "visible"),
    [
        (gpu_spec(1), {}, "0"),
        (gpu_spec(1, gpu_index=1), {}, "1"),
        (gpu_spec(2, gpu_index=2), {}, "2,3"),
        (gpu_spec(1, gpu_index=1), {"CUDA_VISIBLE_DEVICES": "5, 7"}, "7"),
        (gpu_spec(2), {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b,GPU-c"}, "GPU-a,GPU-b"),
        (EngineSpec("gpu", "llama", 8000, gpu_index=3), {}, "3"),
    ],
)
def test_gpu_engine_sees_its_own_gpus_only(spec: EngineSpec, inherited: dict[str, str], visible: str) -> None:
    """Each engine gets its slice of the GPUs that we may use, so that two never share one."""
    assert engine_environment(spec, inherited, PATHS, None, cores=8)["CUDA_VISIBLE_DEVICES"] == visible


@pytest.mark.parametrize("ours", ["0,1,2", ""])
def test_too_few_gpus_are_named(ours: str) -> None:
    """An engine beyond the GPUs that we may use is refused with what to change."""
    with pytest.raises(EngineError, match=f"needs 2 GPU.* from index 2 on, but CUDA_VISIBLE_DEVICES='{ours}'"):
        engine_environment(gpu_spec(2, gpu_index=2), {"CUDA_VISIBLE_DEVICES": ours}, PATHS, None, cores=8)


def test_other_devices_leave_the_gpus_alone(tmp_path: Path) -> None:
    """What uses no GPU is given none and loses none."""
    env = engine_environment(spec_of(), {"CUDA_VISIBLE_DEVICES": ""}, PATHS, make_tiny_model(tmp_path, 4096), cores=4)
    assert env["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        (gpu_spec(1), None),
        (gpu_spec(4), "4"),
        (gpu_spec(4, "--tensor-parallel-size", "2"), "2"),
        (gpu_spec(4, "-tp", "2"), None),
        (gpu_spec(4, "--tensor_parallel_size=2"), None),
        (gpu_spec(4, "--pipeline-parallel-size=4"), None),
        (spec_of(), None),
    ],
)
def test_a_replica_of_several_gpus_is_spread_over_them(spec: EngineSpec, size: str | None) -> None:
    """The profile's GPUs are used, unless the caller says how vLLM is to spread."""
    options = dict(pairwise(engine_argv(spec, None)))
    assert options.get("--tensor-parallel-size") == size


@pytest.mark.parametrize(("device", "timeout_s"), [("gpu", 1800), ("cpu", 180), ("virtual", 180)])
async def test_a_start_may_take_what_its_device_needs(
    device: Literal["gpu", "cpu", "virtual"], timeout_s: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of a large model load for many minutes; the other devices load none."""
    clock = itertools.chain([0.0, timeout_s - 1.0], itertools.repeat(timeout_s + 1.0))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    spec = msgspec.structs.replace(spec_of(fake_python(tmp_path, "exec sleep 600")), device=device)
    engine = await Engine.start(spec, tmp_path)
    monkeypatch.setattr(launch, "_HEALTH_INTERVAL_S", 0.0)
    monkeypatch.setattr(launch, "monotonic", lambda: next(clock))
    with pytest.raises(EngineError, match=f"was not ready after {timeout_s} s"):
        await engine.wait_ready()
    await engine.stop()


def test_a_profile_measured_again_is_the_same_engine() -> None:
    """Only what an engine is started with tells it from another, so new provenance restarts none."""
    spec = spec_of()
    profile = spec.profile
    assert profile is not None
    provenance = msgspec.structs.replace(profile.provenance, date="2030-12-31")
    measured = msgspec.structs.replace(profile, name="again", provenance=provenance, tokens_per_byte=0.5)
    assert msgspec.structs.replace(spec, profile=measured).identity == spec.identity
    assert hash(msgspec.structs.replace(spec, profile=measured).identity) == hash(spec.identity)


def test_a_gpu_does_not_restart_for_a_new_step_time() -> None:
    """A real GPU has its own speed and finds its own KV space, whatever the profile says of them."""
    spec = gpu_spec(2)
    profile = msgspec.structs.replace(profile_of(base_s=0.5, kv_tokens=99), gpus_per_replica=2)
    assert msgspec.structs.replace(spec, profile=profile).identity == spec.identity


@pytest.mark.parametrize(
    "change",
    [
        {"profile": profile_of(base_s=0.003)},
        {"profile": profile_of(kv_tokens=4096)},
        {"profile": profile_of(max_num_seqs=8)},
        {"profile": profile_of(max_model_len=2048)},
        {"slowdown": 2.0},
        {"model": "other"},
        {"port": 1},
        {"extra_args": ("--seed", "1")},
        {"python": "/other/python"},
    ],
)
def test_whatever_an_engine_is_started_with_is_its_identity(change: dict[str, object]) -> None:
    """An edit that reaches the engine makes another engine of it."""
    spec = spec_of()
    assert msgspec.structs.replace(spec, **change).identity != spec.identity


def test_a_gpu_engine_moves_with_its_gpus() -> None:
    """Another slice of the GPUs is another engine, of a GPU engine only."""
    assert gpu_spec(1).identity != gpu_spec(1, gpu_index=1).identity
    virtual = spec_of()
    assert msgspec.structs.replace(virtual, gpu_index=1).identity == virtual.identity


def test_cpu_environment_bounds_threads_and_memory(tmp_path: Path) -> None:
    """A CPU engine leaves a core to the rest, and stays offline."""
    spec = EngineSpec("cpu", "tiny", 8000)
    env = engine_environment(spec, {}, PATHS, make_tiny_model(tmp_path, 4096), cores=4)
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert env["HF_HUB_OFFLINE"] == "1"


def test_tiny_model_is_made_once_and_named_by_content(tmp_path: Path) -> None:
    """The same model is the same folder; another context length is another one."""
    first = make_tiny_model(tmp_path, 4096)
    assert make_tiny_model(tmp_path, 4096) == first
    assert make_tiny_model(tmp_path, 8192).path != first.path
    assert len(list(tmp_path.iterdir())) == 2


def test_tiny_tokenizer_has_one_token_a_word_and_loses_nothing(tmp_path: Path) -> None:
    """Prompts of exact length can be written, and any text comes back unchanged."""
    tokenizers = pytest.importorskip("tokenizers", reason="comes with vLLM")
    model = make_tiny_model(tmp_path, 4096)
    tokenizer = tokenizers.Tokenizer.from_file(str(model.path / "tokenizer.json"))
    assert tuple(tokenizer.encode("".join(f" {word}" for word in WORDS)).ids) == model.word_ids
    text = "Héllo, wörld!\n\tδοκιμή 日本語 🚰"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_control_changes_one_thing_at_a_time(tmp_path: Path) -> None:
    """Speed survives a freeze, and each command is a new version of the file."""
    control = VirtualGpuControl(tmp_path / "control.json")
    assert (control.state(), control.version()) == (ControlState(), 0)
    control.set_speed(2.0)
    control.freeze()
    assert control.state() == ControlState(2.0, "frozen")
    control.thaw()
    assert control.state() == ControlState(2.0, "run")
    control.crash()
    assert control.state().mode == "crashed"
    control.reset()
    assert control.state() == ControlState()
    assert control.version() > 0


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_speed_is_refused(factor: float, tmp_path: Path) -> None:
    """A device does not run backwards."""
    with pytest.raises(ControlError, match="not a positive number"):
        VirtualGpuControl(tmp_path / "control.json").set_speed(factor)


def test_broken_control_file_is_named(tmp_path: Path) -> None:
    """A file that means nothing is an error that names it."""
    path = tmp_path / "control.json"
    path.write_text('{"speed": "fast"}')
    with pytest.raises(ControlError, match=r"control\.json is not a control file"):
        VirtualGpuControl(path).state()
