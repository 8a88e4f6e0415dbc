"""What the replicas of one pool serve together of one promise, and the words and factors that say so. Pure.

    usable = (Σ replicas × requests/s of one − what the ``spare_domains`` largest failure domains serve) × trim

Which unlabelled replicas of a GPU type share a node is not known, so the dearest are taken to (decision 12).
The largest domains are taken one by one, not the largest several times: then whichever of them are lost, ``usable`` is
still served, and one more replica never makes it less. The worth of the largest replica is always given out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import ROUND_UP, Decimal
from fractions import Fraction
from heapq import nlargest
from itertools import chain
from typing import NamedTuple

import msgspec

from ratelimit.explain import factor_value, factor_value_up, number
from ratelimit.gputypes import AbleGroups, GpuType
from ratelimit.groupsupply import Trim
from ratelimit.policy import Promise

#: More kinds of replica than this are printed as one sum for each GPU type.
MOST_KINDS = 12
_FULL = Trim(1.0, "")
_NANO = Decimal("1e-9")


class Supply(msgspec.Struct, frozen=True):
    """What one pool can serve, in requests/s of one promise, and how long a request may stay within its SLO.

    The texts are the printed derivations: of ``usable``, and of what ``residence_s`` is made of. ``problems`` are what
    the operator must hear: spare that cannot be kept, and replicas that cannot meet the promise.
    """

    usable: Decimal
    text: str
    residence_s: Decimal
    residence_text: str
    problems: tuple[str, ...] = ()


class _Spare(NamedTuple):
    requests_per_s: Decimal
    text: str
    kept: bool


def supply_of(promise: Promise, fleet: Sequence[GpuType], spare_domains: int, trim: Trim | None = None) -> Supply:
    """The supply of these groups; those that cannot meet the promise add nothing, and are named with the reason."""
    able = [found for gpu_type in fleet if (found := gpu_type.able(promise))]
    are_all = sum(len(each.groups) for each in able) == sum(len(gpu_type.groups) for gpu_type in fleet)
    hopeless = [] if are_all else _hopeless(promise, fleet)
    total = sum([each.total for each in able], Decimal(0))
    spare = _spare(able, spare_domains, total)
    text = " + ".join(_kinds(promise, able)) or "no replica is healthy"
    usable, text = _trimmed(total - spare.requests_per_s, text + spare.text, trim or _FULL)
    slowest = max([each.slowest for each in able], default=1.0)
    ttft_s, tpot_s = promise.slo.ttft_s * slowest, promise.slo.tpot_s * slowest
    mean_output = promise.mix.mean_output_tokens
    unkept = [] if spare.kept else [f"{spare_domains} spare failure domain(s) cannot be kept: {spare.text[3:]}"]
    return Supply(
        usable=usable,
        text="\n".join([*hopeless, text]),
        residence_s=factor_value_up(ttft_s + mean_output * tpot_s),
        residence_text=f"s residence ({ttft_s:g} s to the first of {mean_output:.4g} tokens, {tpot_s:g} s for each)",
        problems=(*hopeless, *unkept),
    )


def _trimmed(supplied: Decimal, text: str, trim: Trim) -> tuple[Decimal, str]:
    if trim.factor == 1:
        return supplied, f"{text} = {number(supplied)} usable requests/s"
    factor = factor_value(trim.factor)
    usable = supplied * factor
    return usable, (
        f"{text} = {number(supplied)} requests/s\n{number(supplied)} requests/s × {number(factor)} trim "
        f"({trim.reason}) = {number(usable)} usable requests/s"
    )


def _hopeless(promise: Promise, fleet: Iterable[GpuType]) -> list[str]:
    kinds: Counter[tuple[str, str, str]] = Counter()
    for group in chain.from_iterable(gpu_type.groups for gpu_type in fleet):
        if promise not in group.rates and group.group.count:
            reason = group.infeasible.get(promise, "its knee is not known yet")
            kinds[group.gpu, group.profile, reason] += group.group.count
    return [
        f"nothing from {count:,} × {gpu} [{profile}] for {promise.mix.name}: {reason}"
        for (gpu, profile, reason), count in sorted(kinds.items())[:MOST_KINDS]
    ]


def _spare(able: Sequence[AbleGroups], spare_domains: int, total: Decimal) -> _Spare:
    """What the largest failure domains serve, less what must be given out whatever the policy says."""
    if not spare_domains or not able:
        return _Spare(Decimal(0), "", kept=True)
    wanted = sum(nlargest(spare_domains, _domains(able, spare_domains)), Decimal(0))
    most = total - max([each.most_of_one for each in able])
    said = f"spare_domains: {spare_domains}"
    if wanted > most:
        said += f", which serve {number(wanted)}: one replica's worth is given out all the same"
    kept = min(wanted, most)
    return _Spare(kept, f" − {number(kept)} kept spare ({said})", kept=wanted <= most)


def _domains(able: Iterable[AbleGroups], at_most: int) -> list[Decimal]:
    """The requests/s of failure domains, the ``at_most`` largest among them.

    Those are all that are labelled, and of the unlabelled replicas of each GPU type the first that are full, where the
    dearest stand together: which share a node is not known, and no other way to place them loses more.
    """
    labelled: dict[str, Decimal] = {}
    pooled: list[Decimal] = []
    for each in able:
        for group, of_one in zip(each.groups, each.of_one, strict=True):
            if group.domains:
                for label, count in group.domains.items():
                    labelled[label] = labelled.get(label, Decimal(0)) + count * of_one
        pooled += _filled(each, at_most)
    return [*labelled.values(), *pooled]


def _filled(able: AbleGroups, at_most: int) -> list[Decimal]:
    """The requests/s of the first ``at_most`` domains, the last perhaps not full; a replica may be cut between two."""
    domains, room = [Decimal(0)], Fraction(1)
    for i in able.dearest_first:
        group, of_one = able.groups[i], able.of_one[i]
        left = Fraction(group.unlabelled, group.domain_replicas)
        while left:
            if not room:
                if len(domains) == at_most:
                    return domains
                domains.append(Decimal(0))
                room = Fraction(1)
            taken = min(left, room)
            domains[-1] += _of_replicas(taken * group.domain_replicas, of_one)
            left, room = left - taken, room - taken
    return domains


def _of_replicas(replicas: Fraction, rate: Decimal) -> Decimal:
    """The requests/s of so many replicas, exact where that ends; else the next nano-request above."""
    worth = replicas.numerator * rate / replicas.denominator
    return worth if Fraction(worth) == replicas * Fraction(rate) else worth.quantize(_NANO, rounding=ROUND_UP)


def _kinds(promise: Promise, able: Sequence[AbleGroups]) -> list[str]:
    """The addends of the supply: each kind of replica, or where there are many, each GPU type."""
    counts: Counter[tuple[str, float, Decimal, str, float]] = Counter()
    for each in able:
        for group, of_one in zip(each.groups, each.of_one, strict=True):
            utilization = group.knees[promise].utilization
            counts[group.gpu, group.slowdown, of_one, group.provenance, utilization] += group.group.count
            if len(counts) > MOST_KINDS:
                return [those.text for those in able]
    slo = promise.slo
    return [
        f"{count} × {gpu}{'' if slowdown == 1 else f' (1:{slowdown:g} speed)'} × {number(rate)} requests/s "
        f"[{provenance}; knee at p{slo.percentile:g} TTFT ≤ {slo.ttft_s * slowdown:g} s, TPOT ≤ "
        f"{slo.tpot_s * slowdown * 1000:g} ms; {number(factor_value(utilization))} of the closed form]"
        for (gpu, slowdown, rate, provenance, utilization), count in sorted(counts.items())
    ]
