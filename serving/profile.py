"""The profile document: what one replica of one model on one GPU type can do, and how that is known."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

import msgspec

from serving.capacity import EngineLimits, StepTimeModel
from serving.points import MeasuredPoint

SCHEMA_VERSION = 1

ProvenanceKind = Literal["measured", "published", "estimated"]


class ProfileError(ValueError):
    """A profile that cannot be used; the message says where it is wrong and what would be right."""


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


class Fit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How well the step-time model gives the measured points back, as relative errors of the token rate."""

    points: tuple[MeasuredPoint, ...]
    residual_median: float
    residual_max: float


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
    return None
