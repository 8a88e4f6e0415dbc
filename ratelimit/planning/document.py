"""The file of a plan: fleet, policy, demand and assumptions, checked as a whole, every mistake named with its line."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError

from ratelimit.config import (
    ConfigError,
    LocalPath,
    MixConfig,
    ModelName,
    Name,
    ProfileName,
    Section,
    SloConfig,
    TierConfig,
)
from ratelimit.configcheck import invalid_fields
from ratelimit.finding import Finding
from ratelimit.planning.sites import MOST_GPUS, Site
from ratelimit.yamlfile import Document, YamlFileError, parse_document, read_document
from serving.gpus import GPUS
from serving.mixes import MIX_NAMES
from serving.plausible import contradictions
from serving.profile import Profile, ProfileError, load_profile, shipped_profiles

#: Bounds beyond these are in other units than they say: 10 minutes to a first token, 5 s for each later one.
_MOST_TTFT_MS, _MOST_TPOT_MS = 600_000, 5_000
_NAME_ONE = "name one under profiles, as `profiles: {H100: my-profile.json}`"
#: A GPU draws more than 1 W and less than this.
_MOST_GPU_W = 10_000.0
#: A GPU's hour costs less than this in any currency that is meant.
_MOST_HOURLY = 1_000.0


def _finite(value: float) -> float:
    if not isfinite(value):
        raise ValueError("is not a finite number; write one")
    return value


Count = Annotated[int, Field(ge=0, le=MOST_GPUS)]
Rate = Annotated[float, Field(gt=0), AfterValidator(_finite)]
Price = Annotated[float, Field(gt=0, le=_MOST_HOURLY)]
Watts = Annotated[float, Field(ge=1, le=_MOST_GPU_W)]


class SiteConfig(Section):
    """GPUs by type at one place; ``joins``: the plan compares the fleet without and with it."""

    name: Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[^:=,]+$")]
    gpus: dict[Name, Count]
    joins: bool = False
    power_limit_mw: Rate | None = None

    def site(self) -> Site:
        """The same as a pure value."""
        limit_w = None if self.power_limit_mw is None else self.power_limit_mw * 1e6
        return Site(self.name, self.gpus, self.joins, limit_w)


class CallersConfig(Section):
    """``keys`` keys of a tier that ask for ``requests_per_s`` together, at the worst for ``peak_factor`` times that.

    ``mix`` is what they ask for; unset, what their tier is promised.
    """

    tier: Name
    keys: Annotated[int, Field(ge=1, le=100_000_000)]
    requests_per_s: Rate
    peak_factor: Annotated[float, Field(ge=1, le=1000)] = 1.0
    mix: MixConfig | None = None


class PowerConfig(Section):
    """What a site draws for a watt of its GPUs: ``server_factor`` watts in the servers, times ``pue`` with cooling.

    ``gpu_w``: other figures than the data sheets', and those of types that have none.
    """

    server_factor: Annotated[float, Field(ge=1, le=5)] = 1.5
    pue: Annotated[float, Field(ge=1, le=5)] = 1.2
    gpu_w: dict[Name, Watts] = Field(default={})


class RedisConfig(Section):
    """What one primary decides in a second when it does nothing else (``docs/bench.md``), and how far it is loaded."""

    admits_per_s: Annotated[float, Field(ge=100, le=10_000_000)] = 26_497
    utilization: Annotated[float, Field(gt=0, le=1)] = 0.6


class PlanConfig(Section):
    """The whole file. Everything in it is an assumption of whoever wrote it, and is printed as one.

    ``profiles`` names the profile of a GPU type where the shipped one for the model is not meant. ``replay``: recorded
    traffic, in place of the callers declared (records), or for its course over time and its lengths (a trace).
    ``extrapolate``: mixes whose context a profile was not measured at are planned all the same, and marked.
    ``demand_within``: the demand is refused as one in wrong units if it is not within these multiples of the supply.
    """

    name: Name
    title: str = Field(default="", max_length=200)
    model: ModelName
    slo: SloConfig = SloConfig()
    mix: MixConfig = MixConfig()
    spare_domains: int = Field(default=0, ge=0, le=1000)
    extrapolate: bool = False
    profiles: dict[Name, ProfileName] = Field(default={})
    sites: Annotated[tuple[SiteConfig, ...], Field(min_length=1, max_length=100)]
    tiers: Annotated[tuple[TierConfig, ...], Field(min_length=1, max_length=100)]
    demand: Annotated[tuple[CallersConfig, ...], Field(min_length=1, max_length=1000)]
    replay: LocalPath | None = None
    demand_within: tuple[Rate, Rate] = (0.001, 100.0)
    power: PowerConfig = PowerConfig()
    prices_per_gpu_hour: dict[Name, Price] = Field(default={})
    currency: str = Field(default="USD", min_length=1, max_length=8)
    redis: RedisConfig = RedisConfig()
    assumptions: tuple[Annotated[str, Field(min_length=1, max_length=500)], ...] = ()

    def tier(self, name: str) -> TierConfig:
        """The tier of that name, which there is."""
        return next(tier for tier in self.tiers if tier.name == name)


def examples() -> list[str]:
    """Names of the plans that come with Penstock."""
    folder = files("ratelimit.planning") / "examples"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_example(name: str) -> PlanConfig:
    """A plan that comes with Penstock. Raises ``ConfigError``."""
    return _checked(Path(f"{name}.yaml"), parse_document(example_text(name)))


def example_text(name: str) -> str:
    """Its file, to start one's own from. Raises ``ConfigError``."""
    if name not in examples():
        raise ConfigError([f"there is no example {name!r}; there are {', '.join(examples())}"])
    return (files("ratelimit.planning") / "examples" / f"{name}.yaml").read_text(encoding="utf-8")


def load_plan(path: Path) -> PlanConfig:
    """One's own plan. Raises ``ConfigError`` with every problem found."""
    try:
        return _checked(path, read_document(path))
    except YamlFileError as error:
        raise ConfigError([f"{path}:{problem.line}: {problem.what}" for problem in error.problems]) from error


def _checked(path: Path, document: Document) -> PlanConfig:
    if not isinstance(document.value, dict):
        said = "is no plan; write name, model, sites, tiers and demand, as `penstock plan --example laptop --yaml` does"
        raise ConfigError([f"{path}:1: {said}"])
    try:
        plan = PlanConfig.model_validate(document.value, context={"folder": path.absolute().parent})
    except ValidationError as error:
        found = invalid_fields(error, PlanConfig)
    else:
        found = list(_contradictions(plan))
        if not found:
            return plan
    raise ConfigError([finding.text(path, document) for finding in found])


def _contradictions(plan: PlanConfig) -> Iterator[Finding]:
    yield from _hardware(plan)
    yield from _promises(plan)
    tiers = [tier.name for tier in plan.tiers]
    for i, callers in enumerate(plan.demand):
        if callers.tier not in tiers:
            what = f"there is no tier {callers.tier!r}; there are {', '.join(tiers)}"
            yield Finding(("demand", i, "tier"), what)
    if plan.demand_within[0] >= plan.demand_within[1]:
        yield Finding(("demand_within",), "the first bound is not below the second; write [0.001, 100]")


def _hardware(plan: PlanConfig) -> Iterator[Finding]:
    names = [site.name for site in plan.sites]
    for i, site in enumerate(plan.sites):
        if names.index(site.name) < i:
            yield Finding(("sites", i, "name"), f"{site.name!r} is another site's name too; give each its own")
        for gpu in site.gpus:
            try:
                profile_for(plan, gpu)
                gpu_power_w(plan, gpu)
            except ConfigError as error:
                yield Finding(("sites", i, "gpus", gpu), error.problems[0])


def _promises(plan: PlanConfig) -> Iterator[Finding]:
    names = [tier.name for tier in plan.tiers]
    for i, tier in enumerate(plan.tiers):
        if names.index(tier.name) < i:
            yield Finding(("tiers", i, "name"), f"{tier.name!r} is another tier's name too; give each its own")
        if tier.ceiling < tier.share:
            what = f"{tier.ceiling:g} is below the share of {tier.share:g} that is assured; allow at least that"
            yield Finding(("tiers", i, "ceiling"), what)
    shares = sum(tier.share for tier in plan.tiers)
    if shares > 1 + 1e-9:
        yield Finding(("tiers",), f"the shares add up to {shares:g}; together they are at most 1")
    slos = [(("slo",), plan.slo), *((("tiers", i, "slo"), t.slo) for i, t in enumerate(plan.tiers) if t.slo)]
    for where, slo in slos:
        if slo.ttft_ms > _MOST_TTFT_MS or slo.tpot_ms > _MOST_TPOT_MS:
            what = f"{slo.ttft_ms:g} ms to the first token and {slo.tpot_ms:g} ms for each is no promise"
            yield Finding(where, f"{what}; both are in milliseconds, such as {{ttft_ms: 1000, tpot_ms: 50}}")
    mixes = [(("mix",), plan.mix), *((("tiers", i, "mix"), t.mix) for i, t in enumerate(plan.tiers) if t.mix)]
    mixes += [(("demand", i, "mix"), callers.mix) for i, callers in enumerate(plan.demand) if callers.mix]
    for where, mix in mixes:
        if mix.name not in MIX_NAMES:
            yield Finding((*where, "name"), f"no workload mix {mix.name!r}; there are {', '.join(MIX_NAMES)}")


def profile_for(plan: PlanConfig, gpu: str) -> Profile:
    """The profile that a GPU type has in this plan. Raises ``ConfigError`` saying what to write."""
    named = plan.profiles.get(gpu)
    if named is None and gpu not in GPUS:
        raise ConfigError([f"there is no GPU type {gpu!r}; there are {', '.join(GPUS)}, and those named in profiles"])
    try:
        profile = load_profile(named or f"{gpu.lower()}-{plan.model}")
    except ProfileError as error:
        if named:
            raise ConfigError([str(error)]) from error
        raise ConfigError(
            [f"no shipped profile of {plan.model} on {gpu} ({_shipped(plan.model)}); {_NAME_ONE}"]
        ) from error
    if problems := contradictions(profile):
        raise ConfigError([f"{profile.name}: {problem}" for problem in problems])
    if profile.model != plan.model:
        raise ConfigError(
            [f"profile {profile.name} is of {profile.model}, the plan's model is {plan.model}; {_NAME_ONE}"]
        )
    return profile


def _shipped(model: str) -> str:
    there = [name for name in shipped_profiles() if name.endswith(model)]
    return f"there are {', '.join(there)}" if there else f"there are none of it among {', '.join(shipped_profiles())}"


def gpu_power_w(plan: PlanConfig, gpu: str) -> float:
    """What one GPU of this type draws at most. Raises ``ConfigError`` where nothing is known."""
    stated = plan.power.gpu_w.get(gpu)
    if stated is not None:
        return stated
    if gpu not in GPUS:
        raise ConfigError([f"no data sheet says what {gpu!r} draws; write it, as `power: {{gpu_w: {{{gpu}: 65}}}}`"])
    return GPUS[gpu].power_w
