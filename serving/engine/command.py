"""The command line and the environment of a vLLM server, for each of the three devices. Pure."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from serving.capacity import EngineLimits, StepTimeModel
from serving.engine import environment
from serving.engine.tiny_model import TinyModel
from serving.profile import Profile

#: What the tiny model on a CPU is given where no profile says otherwise.
CPU_LIMITS = EngineLimits(
    max_num_seqs=32, max_num_batched_tokens=2048, kv_tokens=65536, max_model_len=4096, block_size=32
)
_CPU_KV_CACHE_GIB = "1"
_EXECUTOR = "serving.engine.virtual_gpu.VirtualGpuExecutor"
_SERVERS: Mapping[str, Sequence[str]] = {
    "gpu": ("vllm.entrypoints.cli.main", "serve"),
    "cpu": ("vllm.entrypoints.openai.api_server", "--model"),
    "virtual": ("serving.engine.virtual_server", "--model"),
}
#: Options that say how vLLM spreads over its GPUs; whoever gives one decides for all.
_PARALLELISM_OPTIONS = frozenset(
    {"--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp"}
)


#: vLLM's policy that serves requests of lower priority first.
_SCHEDULING_OPTION, _BY_PRIORITY = "--scheduling-policy", "priority"


class EngineError(RuntimeError):
    """An engine that cannot start, or did not; says why, and what to do."""


class VirtualDevice(NamedTuple):
    """What makes a virtual GPU that its server's command line does not say."""

    step_time: StepTimeModel
    kv_tokens: int
    slowdown: float


class EngineIdentity(NamedTuple):
    """All that an engine is started with: two specs of one identity start the same engine."""

    argv: tuple[str, ...]
    gpus: range
    virtual: VirtualDevice | None


class EngineSpec(msgspec.Struct, frozen=True):
    """One vLLM server to start.

    ``model`` is the name that it serves under. ``profile`` says what a virtual GPU is, and bounds the batch of the
    other devices where given. ``slowdown`` is how many times slower than its profile a virtual GPU runs. ``model_path``
    is what a GPU loads: a folder or a hub's name. ``extra_args`` go to vLLM as they are. ``python`` is an interpreter
    that has vLLM, ours by default. ``gpu_index`` is the first of the GPUs that it runs on, counted among those that we
    may use; it takes as many as its profile's replica has, one without a profile.
    """

    device: Literal["gpu", "cpu", "virtual"]
    model: str
    port: int
    host: str = "127.0.0.1"
    profile: Profile | None = None
    slowdown: float = 1.0
    model_path: str | None = None
    extra_args: tuple[str, ...] = ()
    python: str = sys.executable
    gpu_index: int = 0

    @property
    def url(self) -> str:
        """Where the server answers, without a trailing slash."""
        return f"http://{self.host}:{self.port}"

    @property
    def limits(self) -> EngineLimits | None:
        """What bounds the batch; None leaves it to vLLM."""
        if self.profile is not None:
            return self.profile.limits
        return CPU_LIMITS if self.device == "cpu" else None

    @property
    def gpus(self) -> range:
        """The GPUs that it has to itself, as indices among those that we may use; none for the other devices."""
        if self.device != "gpu":
            return range(0)
        return range(self.gpu_index, self.gpu_index + (self.profile.gpus_per_replica if self.profile else 1))

    @property
    def identity(self) -> EngineIdentity:
        """What it is started with; where a profile comes from, or how well it fits, starts no other engine."""
        virtual = None
        if self.device == "virtual" and self.profile is not None:
            virtual = VirtualDevice(self.profile.step_time, self.profile.limits.kv_tokens, self.slowdown)
        return EngineIdentity(tuple(engine_argv(self, None)), self.gpus, virtual)

    def shares_with(self, other: EngineSpec) -> bool:
        """Whether the two cannot run at once, for want of a port or of a GPU of their own."""
        return self.port == other.port or not set(self.gpus).isdisjoint(other.gpus)


class EnginePaths(msgspec.Struct, frozen=True):
    """The files of one engine."""

    log: Path
    profile: Path
    control: Path


def engine_argv(spec: EngineSpec, model: TinyModel | None) -> list[str]:
    """The server's command line; ``model`` is the tiny model of the two devices that need no GPU.

    A GPU's is ``vllm serve``, by its module so that it is this interpreter's. That command fails with the CPU wheel,
    whose distribution has another name; the API server's own module takes the same options and runs with it.
    """
    return [
        spec.python,
        "-m",
        *_SERVERS[spec.device],
        str(model.path) if model else spec.model_path or spec.model,
        *("--served-model-name", spec.model),
        *("--host", spec.host, "--port", str(spec.port)),
        "--enable-prompt-tokens-details",
        "--enable-prefix-caching",
        # Its count of open requests tells of work that a frozen engine has not taken up.
        "--enable-server-load-tracking",
        "--disable-uvicorn-access-log",
        # Without a priority in a request it is first come, first served, as without this.
        *(_SCHEDULING_OPTION, _BY_PRIORITY),
        *_limit_options(spec),
        *_parallelism_options(spec),
        *_DEVICE_OPTIONS[spec.device],
        *spec.extra_args,
    ]


def schedules_by_priority(extra_args: Sequence[str]) -> bool:
    """Whether an engine started here serves lower priorities first: it does, unless its arguments say otherwise."""
    policy = _BY_PRIORITY
    for argument, following in pairwise((*extra_args, "")):
        option, is_joined, joined = argument.partition("=")
        if option.replace("_", "-") == _SCHEDULING_OPTION:
            policy = joined if is_joined else following
    return policy == _BY_PRIORITY


def engine_environment(
    spec: EngineSpec, inherited: Mapping[str, str], paths: EnginePaths, model: TinyModel | None, cores: int
) -> dict[str, str]:
    """Our own environment, kept offline, with what the device needs. Raises ``EngineError`` for want of GPUs."""
    result = {**inherited, **environment.PRIVATE}
    if spec.device == "gpu":
        return result | {environment.GPUS_VARIABLE: _visible_gpus(spec, inherited.get(environment.GPUS_VARIABLE))}
    result |= environment.OFFLINE
    if spec.device == "cpu":
        threads = str(max(1, cores - 1))  # one core is left to the API server and to whoever calls it
        return result | {
            "VLLM_CPU_KVCACHE_SPACE": _CPU_KV_CACHE_GIB,
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": threads,
        }
    return (
        result
        | environment.SINGLE_THREADED
        | {
            "PYTHONPATH": _with_penstock(inherited.get("PYTHONPATH", "")),
            environment.PROFILE_VARIABLE: str(paths.profile),
            environment.SLOWDOWN_VARIABLE: repr(spec.slowdown),
            environment.CONTROL_VARIABLE: str(paths.control),
            environment.WORDS_VARIABLE: ",".join(map(str, model.word_ids if model else ())),
        }
    )


#: What makes each device: a random model on the CPU in eager mode, or the executor that computes nothing.
_DEVICE_OPTIONS: Mapping[str, Sequence[str]] = {
    "gpu": (),
    "cpu": ("--load-format", "dummy", "--enforce-eager"),
    "virtual": (
        "--load-format",
        "dummy",
        "--enforce-eager",
        "--no-async-scheduling",
        "--distributed-executor-backend",
        _EXECUTOR,
    ),
}


def _limit_options(spec: EngineSpec) -> list[str]:
    limits = spec.limits
    if limits is None:
        return []
    options = [
        *("--max-num-seqs", str(limits.max_num_seqs)),
        *("--max-num-batched-tokens", str(limits.max_num_batched_tokens)),
        *("--max-model-len", str(limits.max_model_len)),
    ]
    return options if spec.device == "gpu" else [*options, "--block-size", str(limits.block_size)]


def _parallelism_options(spec: EngineSpec) -> list[str]:
    given = {argument.partition("=")[0].replace("_", "-") for argument in spec.extra_args}
    if len(spec.gpus) < 2 or given & _PARALLELISM_OPTIONS:
        return []
    return ["--tensor-parallel-size", str(len(spec.gpus))]


def _visible_gpus(spec: EngineSpec, ours: str | None) -> str:
    """The engine's GPUs, out of ``ours`` where that list bounds us."""
    if ours is None:
        return ",".join(map(str, spec.gpus))
    names = [name.strip() for name in ours.split(",") if name.strip()]
    if len(names) < spec.gpus.stop:
        raise EngineError(
            f"engine {spec.url} needs {len(spec.gpus)} GPU(s) from index {spec.gpu_index} on, but "
            f"{environment.GPUS_VARIABLE}={ours!r} names {len(names)}; start fewer engines, or name more GPUs there"
        )
    return ",".join(names[spec.gpus.start : spec.gpus.stop])


def _with_penstock(python_path: str) -> str:
    """The engine imports the executor from here, also when it runs in an environment of its own."""
    here = str(Path(__file__).parents[2])
    return f"{here}:{python_path}" if python_path else here
