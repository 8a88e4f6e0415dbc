"""The profile document: what one replica of one model on one GPU type can do, and how that is known."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

import msgspec

from serving.capacity import EngineLimits, StepTimeModel
from serving.points import MeasuredPoint
from serving.surface import Surface

SCHEMA_VERSION = 1

ProvenanceKind = Literal["measured", "published", "estimated"]
#: linear: least squares alone; bounded: held to the roofline; surface: linear, times a surface of measured factors.
ModelForm = Literal["linear", "bounded", "surface"]


class ProfileError(ValueError):
    """A profile that cannot be used; the message says where it is wrong and what would be right."""


#: How far the mean context of a run's requests may lie from that of their mix, as a factor.
_DRAWN_MEAN_ERROR = 1.05


class OutOfRangeError(ProfileError):
    """The context asked for is outside what was measured; the message says how to extrapolate all the same."""


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the numbers are known: measured by us, a published result, or computed from named facts."""

    kind: ProvenanceKind
    date: str
    engine: str
    engine_version: str
    dtype: str
    parallelism: str
    source: str
    anchors: tuple[str, ...] = ()


class ContextRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The mean contexts (input + half the output) that were measured, in tokens."""

    least_tokens: float
    most_tokens: float


class Fit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How well the step-time model gives the measured points back, as relative errors of the token rate.

    ``residual_*`` are those of the whole model: a surface gives each point that it was laid through back.
    ``loo_error_*`` are its errors at mixes that were left out of the fit, of the token rate, or of the step time in an
    open loop (``unseen``); None where too few mixes were measured to leave one out. ``two_rate_error_median`` is that
    of the plain envelope in/P_in + out/P_out = 1 at the same points left out in the same way, and None with open loops.
    """

    points: tuple[MeasuredPoint, ...]
    residual_median: float
    residual_max: float
    model_form: ModelForm = "linear"
    loo_error_median: float | None = None
    loo_error_max: float | None = None
    two_rate_error_median: float | None = None
    context: ContextRange | None = None


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one replica can do: its step-time model, its limits, where they come from, how well they fit."""

    name: str
    model: str
    gpu: str
    gpus_per_replica: int
    step_time: StepTimeModel
    limits: EngineLimits
    provenance: Provenance
    tokens_per_byte: float = 0.3
    fit: Fit | None = None
    schema_version: int = SCHEMA_VERSION
    surface: Surface | None = None

    def covers_context(self, context_tokens: float) -> bool:
        """Whether requests of this mean context were measured; an estimate without a range claims nothing more.

        A run draws its requests, so its mean context is a little off that of the mix that it was drawn from.
        """
        measured = None if self.fit is None else self.fit.context
        if measured is None:
            return True
        least, most = measured.least_tokens / _DRAWN_MEAN_ERROR, measured.most_tokens * _DRAWN_MEAN_ERROR
        return least <= context_tokens <= most

    def extrapolated_step_time(self, kv_tokens: float, context_tokens: float) -> tuple[StepTimeModel, str]:
        """The step-time model around that KV use (tokens read by a step) and mean context (I + O/2, tokens).

        With a note to show beside whatever follows from it: empty where that context was measured.
        """
        note = "" if self.covers_context(context_tokens) else f"extrapolated: {self._outside(context_tokens)}"
        if self.surface is None:
            return self.step_time, note
        return self.surface.step_time_at(self.step_time, kv_tokens, context_tokens), note

    def _outside(self, context_tokens: float) -> str:
        measured = None if self.fit is None else self.fit.context
        span = "" if measured is None else f" of {measured.least_tokens:.0f} to {measured.most_tokens:.0f} tokens"
        return f"a mean context of {context_tokens:.0f} tokens is outside the measured range{span}"


def parse_profile(text: bytes | str) -> Profile:
    """Decode and validate a profile document. Raises ``ProfileError``."""
    try:
        profile = msgspec.json.decode(text, type=Profile)
    except msgspec.MsgspecError as error:
        raise ProfileError(f"not a profile document: {error}") from error
    problem = _problem(profile)
    if problem:
        raise ProfileError(f"profile {profile.name!r}: {problem}")
    return profile


def dump_profile(profile: Profile) -> bytes:
    """The document as indented JSON, ending in a newline."""
    return msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n"


def load_profile(name_or_path: str) -> Profile:
    """A shipped profile by its name, or any profile by its path. Raises ``ProfileError``."""
    if name_or_path.endswith(".json") or "/" in name_or_path:
        path = Path(name_or_path)
        try:
            return parse_profile(path.read_bytes())
        except OSError as error:
            raise ProfileError(f"cannot read profile {path}: {error.strerror}") from error
    shipped = files("serving") / "profiles" / f"{name_or_path}.json"
    if not shipped.is_file():
        raise ProfileError(f"no shipped profile {name_or_path!r}; there are {', '.join(shipped_profiles())}")
    return parse_profile(shipped.read_bytes())


def shipped_profiles() -> list[str]:
    """Names of the profiles that come with Penstock."""
    folder = files("serving") / "profiles"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def _problem(profile: Profile) -> str | None:
    if profile.schema_version != SCHEMA_VERSION:
        return f"schema_version is {profile.schema_version}, this Penstock reads {SCHEMA_VERSION}"
    if profile.gpus_per_replica < 1:
        return f"gpus_per_replica is {profile.gpus_per_replica}, it must be at least 1"
    step = profile.step_time
    if not 0 < step.base_s < float("inf"):
        return f"step_time.base_s is {step.base_s}, it must be a positive number of seconds"
    for field in ("prompt_token_s", "sequence_s", "kv_token_s"):
        value = getattr(step, field)
        if not 0 <= value < float("inf"):
            return f"step_time.{field} is {value}, it must be zero or a positive number of seconds"
    for field in EngineLimits.__struct_fields__:
        value = getattr(profile.limits, field)
        if value < 1:
            return f"limits.{field} is {value}, it must be at least 1"
    if not 0 < profile.tokens_per_byte <= 4:
        return f"tokens_per_byte is {profile.tokens_per_byte}, it must be above 0 and at most 4"
    return _range_problem(profile)


def _range_problem(profile: Profile) -> str | None:
    """What is wrong with the surface, or with the measured range."""
    for number, point in enumerate(profile.surface.points if profile.surface else ()):
        if min(point.kv_tokens, point.context_tokens, point.factor) <= 0:
            return f"surface.points[{number}] is {point}, its numbers must be positive"
    if profile.surface is not None and not profile.surface.points:
        return "surface.points is empty; leave the surface out where the linear model holds"
    measured = None if profile.fit is None else profile.fit.context
    if measured is not None and not 0 < measured.least_tokens <= measured.most_tokens:
        return f"fit.context is {measured}, it must run from a positive number of tokens upwards"
    return None
