"""The fleet as deriving sees it: groups of replicas alike, what each serves of every promise, and how that is known."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from functools import cached_property
from math import isfinite
from typing import NamedTuple

import msgspec

from ratelimit.explain import factor_value
from ratelimit.policy import Promise
from ratelimit.publication import PublishedReplica
from serving.capacity import ReplicaGroup
from serving.stepsim import Knee

LEAST_TRIM = 0.5


class SupplyError(ValueError):
    """A supply that means nothing; the message says what is wrong and what would be right."""


class Trim(msgspec.Struct, frozen=True):
    """What live signals say that a pool does of its measured supply: ``factor`` in [0.5, 1], and why."""

    factor: float
    reason: str

    def __post_init__(self) -> None:
        if not LEAST_TRIM <= self.factor <= 1:
            raise SupplyError(f"a trim of {self.factor} is outside [{LEAST_TRIM:g}, 1]; keep it between them")


class Worth(NamedTuple):
    """Requests/s of one replica of a group, of all of them, and of a failure domain full of such replicas.

    The last is for putting groups in order, which four digits times a count survive as a float.
    """

    of_one: Decimal
    of_all: Decimal
    of_full_domain: float


class GroupSupply(msgspec.Struct, frozen=True, dict=True):
    """Replicas alike in GPU, profile and slowdown.

    ``group`` counts them, slowed as they are. ``knees`` are those of one replica at full speed, per promise; a promise
    that no load meets is in ``infeasible`` with the reason instead. ``replicas`` are those that take requests, empty in
    a plan. ``domains`` says how many of them each labelled failure domain holds (a label may hold replicas of several
    groups); those without a label stand anywhere, with others of their GPU, ``domain_replicas`` of them to a domain.
    """

    group: ReplicaGroup
    gpu: str
    gpus_per_replica: int
    profile: str
    slowdown: float
    knees: Mapping[Promise, Knee]
    provenance: str
    replicas: tuple[PublishedReplica, ...] = ()
    domain_replicas: int = 1
    domains: Mapping[str, int] = {}
    infeasible: Mapping[Promise, str] = {}

    def __post_init__(self) -> None:
        """Raises ``SupplyError``."""
        problem = _problem(self)
        if problem:
            raise SupplyError(f"the {self.gpu} replicas of {self.profile}: {problem}")

    @cached_property
    def kind(self) -> ReplicaGroup:
        """One replica of the group."""
        return msgspec.structs.replace(self.group, count=1)

    @cached_property
    def rates(self) -> Mapping[Promise, Decimal]:
        """Requests/s of one replica per promise, as printed. Promises that it cannot meet are not in it."""
        return {promise: factor_value(knee.requests_per_s / self.slowdown) for promise, knee in self.knees.items()}

    @cached_property
    def worth(self) -> Mapping[Promise, Worth]:
        """What they are worth together, per promise that they can meet; nothing where there are none of them."""
        rates = self.rates if self.group.count else {}
        return {
            promise: Worth(rate, self.group.count * rate, float(self.domain_replicas * rate))
            for promise, rate in rates.items()
        }

    @cached_property
    def unlabelled(self) -> int:
        """How many of the replicas stand in no labelled failure domain."""
        return self.group.count - sum(self.domains.values())


def _problem(supply: GroupSupply) -> str | None:
    if supply.group.count < 0:
        return f"there are {supply.group.count} of them; count none or more"
    if supply.replicas and len(supply.replicas) != supply.group.count:
        return f"{len(supply.replicas)} are named and {supply.group.count} are counted; count those named"
    if supply.gpus_per_replica < 1:
        return f"gpus_per_replica is {supply.gpus_per_replica}; a replica has at least one GPU"
    if not (isfinite(supply.slowdown) and supply.slowdown > 0):
        return f"slowdown is {supply.slowdown}; 1 is full speed, 2 half of it"
    if supply.domain_replicas < 1:
        return f"domain_replicas is {supply.domain_replicas}; a failure domain holds at least one replica"
    if any(count < 0 for count in supply.domains.values()) or sum(supply.domains.values()) > supply.group.count:
        return f"the failure domains hold {dict(supply.domains)}, the group {supply.group.count}; count each once"
    for promise, knee in supply.knees.items():
        if not (isfinite(knee.requests_per_s) and knee.requests_per_s > 0):
            return (
                f"the knee for {promise.mix.name} is {knee.requests_per_s} requests/s; it is positive, and a promise "
                "that no load meets is in infeasible instead"
            )
    return None
