"""How far the simulated knee lies below the closed forms, by what a replica is short of. Pure computation."""

from __future__ import annotations

from math import fsum
from typing import Literal, NamedTuple

import msgspec

from serving.capacity import ReplicaGroup, Slo, closed_form_requests_per_s, resource_bounds_s
from serving.mixes import load_mix
from serving.profile import load_profile
from serving.stepsim import knee
from tests.bench.fidelity_replay import PROFILE

Regime = Literal["slots", "KV", "step tokens", "TPOT", "TTFT"]
#: In the order of ``resource_bounds_s``. No closed form knows of TTFT.
_FORMS: tuple[Regime, ...] = ("TPOT", "slots", "KV", "step tokens")


class FormCase(NamedTuple):
    """A mix at full length and full speed, an SLO, and bounds of the batch that make one resource scarce."""

    regime: Regime
    mix: str
    slo: Slo
    limits: dict[str, int]


FORM_CASES = (
    FormCase("slots", "chat", Slo(2.0, 0.05), {"max_num_seqs": 64}),
    FormCase("slots", "decode-heavy", Slo(2.0, 0.05), {"max_num_seqs": 128}),
    FormCase("KV", "decode-heavy", Slo(2.0, 0.05), {"kv_tokens": 65_536}),
    FormCase("KV", "long-context", Slo(10.0, 0.2), {"kv_tokens": 131_072}),
    FormCase("step tokens", "prefill-heavy", Slo(2.0, 0.05), {"max_num_batched_tokens": 512}),
    FormCase("step tokens", "chat", Slo(2.0, 0.05), {"max_num_batched_tokens": 256}),
    FormCase("TPOT", "chat", Slo(2.0, 0.03), {}),
    FormCase("TPOT", "decode-heavy", Slo(2.0, 0.03), {}),
    FormCase("TPOT", "prefill-heavy", Slo(4.0, 0.10), {"max_num_batched_tokens": 8192}),
    FormCase("TTFT", "prefill-heavy", Slo(0.5, 0.20), {"max_num_batched_tokens": 2048}),
    FormCase("TTFT", "long-context", Slo(1.0, 0.20), {"max_num_batched_tokens": 2048}),
)


class FormResult(msgspec.Struct, frozen=True):
    """Rates in requests a second; ``closed_over_knee`` is how far the closed form is above the knee, as a share of it.

    ``scarcest`` is the resource that the closed form is bound by, ``missed`` the bound of the SLO that ends the knee.
    """

    regime: Regime
    mix: str
    slo: Slo
    limits: dict[str, int]
    scarcest: Regime
    missed: str
    knee_per_s: float
    closed_per_s: float
    closed_over_knee: float
    tpot_alone_over_knee: float


def compare_forms() -> tuple[FormResult, ...]:
    """Every case; ``tpot_alone_over_knee`` is the same for the mean formula w/(1 − c0/T*) alone."""
    return tuple(_compare(case) for case in FORM_CASES)


def _compare(case: FormCase) -> FormResult:
    profile = load_profile(PROFILE)
    limits = msgspec.structs.replace(profile.limits, **case.limits)
    group = ReplicaGroup(1, profile.step_time, limits, case.slo)
    mix = load_mix(case.mix)
    totals = [fsum(parts) for parts in zip(*(resource_bounds_s(group, s) for s in mix.shapes), strict=True)]
    found = knee(profile.step_time, limits, mix, case.slo)
    closed = closed_form_requests_per_s(group, mix)
    return FormResult(
        case.regime,
        case.mix,
        case.slo,
        case.limits,
        scarcest=_FORMS[totals.index(max(totals))],
        missed=found.bound.upper(),
        knee_per_s=found.requests_per_s,
        closed_per_s=closed,
        closed_over_knee=closed / found.requests_per_s - 1,
        tpot_alone_over_knee=len(mix.shapes) / totals[0] / found.requests_per_s - 1,
    )
