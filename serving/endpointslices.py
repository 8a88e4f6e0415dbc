"""Which replicas the EndpointSlices of Kubernetes name. Pure.

A slice belongs to a Service and has its labels: ``penstock.io/profile`` names the profile of every replica behind it,
``penstock.io/gpu``, where it is there, must be that profile's. An endpoint counts while it is ready and not
terminating; what says nothing of its readiness is ready, as the API has it. A slice of which no replica can be made is
refused with a reason, and is as if it were not there.

An endpoint may be in several slices while the cluster moves it, and a dual-stack Service has a slice for each address
family: a pod counts once, by its IPv4 address where it has one. A pod to which two Services give different profiles is
refused: the larger of two promises may be one that it cannot keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv6Address, ip_address
from typing import NamedTuple

import msgspec

PROFILE_LABEL = "penstock.io/profile"
GPU_LABEL = "penstock.io/gpu"
_SERVICE_LABEL = "kubernetes.io/service-name"


class Listing(NamedTuple):
    """The EndpointSlices to follow. ``namespace`` None: the one that this process runs in, else ``default``."""

    namespace: str | None
    selector: str

    def __str__(self) -> str:
        return f"EndpointSlices {self.selector} in namespace {self.namespace or 'of this pod'}"


class Conditions(msgspec.Struct, frozen=True):
    """The state of an endpoint; None where nobody says."""

    ready: bool | None = None
    terminating: bool | None = None


class TargetRef(msgspec.Struct, frozen=True):
    """The pod behind an endpoint."""

    uid: str = ""


class Endpoint(msgspec.Struct, frozen=True, rename="camel"):
    """One pod; its addresses are interchangeable, and by convention only the first is used."""

    addresses: tuple[str, ...] = ()
    conditions: Conditions | None = None
    node_name: str | None = None
    target_ref: TargetRef | None = None

    @property
    def is_usable(self) -> bool:
        """Whether it is to take requests."""
        states = self.conditions or Conditions()
        return bool(self.addresses) and states.ready is not False and not states.terminating


class Port(msgspec.Struct, frozen=True):
    """A port that every endpoint of a slice has."""

    name: str | None = None
    port: int | None = None
    protocol: str | None = None


class Metadata(msgspec.Struct, frozen=True):
    """What a slice is called, and its labels. Its version is left out: the same content is the same slice."""

    name: str
    namespace: str = ""
    labels: dict[str, str] | None = None


class EndpointSlice(msgspec.Struct, frozen=True, rename="camel"):
    """``discovery.k8s.io/v1`` EndpointSlice, as far as it tells of replicas."""

    metadata: Metadata
    address_type: str = ""
    endpoints: tuple[Endpoint, ...] | None = None
    ports: tuple[Port, ...] | None = None


class KnownProfile(msgspec.Struct, frozen=True):
    """A profile that a label may name: how the config calls it, and its GPU type."""

    reference: str
    gpu: str


class Rules(msgspec.Struct, frozen=True):
    """How slices are read: the port of the replicas (None: the only one) and the profiles by the name in a label."""

    port: str | None
    profiles: Mapping[str, KnownProfile]


class FoundReplica(msgspec.Struct, frozen=True):
    """A replica that a slice names; its failure domain is its node."""

    url: str
    profile: KnownProfile
    domain: str | None


class Refusal(msgspec.Struct, frozen=True, order=True):
    """What was left out, and why."""

    what: str
    why: str


class Found(msgspec.Struct, frozen=True):
    """The replicas, by URL in order, and what was refused."""

    replicas: tuple[FoundReplica, ...] = ()
    refused: tuple[Refusal, ...] = ()


class _UnusableError(ValueError):
    """Why no replica can be made of a slice or an endpoint."""


class _Candidate(msgspec.Struct, frozen=True):
    replica: FoundReplica
    pod: tuple[str, int]
    is_ipv6: bool
    slice_name: str


def found_in(slices: Iterable[EndpointSlice], rules: Rules) -> Found:
    """The replicas that these slices name. The order of the slices means nothing."""
    candidates: list[_Candidate] = []
    refused: set[Refusal] = set()
    for each in slices:
        if any(endpoint.is_usable for endpoint in each.endpoints or ()):
            try:
                read = _reader(each, rules)
            except _UnusableError as error:
                refused.add(Refusal(_called(each), str(error)))
            else:
                _read_endpoints(each, read, candidates, refused)
    replicas, conflicts = _each_once(candidates)
    return Found(tuple(replicas), tuple(sorted(refused | conflicts)))


def _read_endpoints(
    each: EndpointSlice,
    read: Callable[[Endpoint], _Candidate],
    candidates: list[_Candidate],
    refused: set[Refusal],
) -> None:
    for endpoint in each.endpoints or ():
        if endpoint.is_usable:
            try:
                candidates.append(read(endpoint))
            except _UnusableError as error:
                refused.add(Refusal(_called(each), str(error)))


def _reader(each: EndpointSlice, rules: Rules) -> Callable[[Endpoint], _Candidate]:
    """What makes a replica of an endpoint of this slice. Raises ``_UnusableError`` where that cannot be."""
    if each.address_type not in ("IPv4", "IPv6"):
        raise _UnusableError(f"its addresses are of type {each.address_type!r}; only IPv4 and IPv6 can be replicas")
    profile, port = _profile(each.metadata.labels or {}, rules), _port(each.ports or (), rules.port)

    def candidate(endpoint: Endpoint) -> _Candidate:
        try:
            address = ip_address(endpoint.addresses[0])
        except ValueError as error:
            raise _UnusableError(f"{endpoint.addresses[0][:64]!r} is not an IP address") from error
        is_ipv6 = isinstance(address, IPv6Address)
        url = f"http://[{address}]:{port}" if is_ipv6 else f"http://{address}:{port}"
        uid = endpoint.target_ref.uid if endpoint.target_ref else ""
        replica = FoundReplica(url, profile, endpoint.node_name or None)
        return _Candidate(replica, (uid or url, port), is_ipv6, each.metadata.name)

    return candidate


def _profile(labels: Mapping[str, str], rules: Rules) -> KnownProfile:
    allowed = ", ".join(sorted(rules.profiles))
    name = labels.get(PROFILE_LABEL)
    if not name:
        raise _UnusableError(f"it has no label {PROFILE_LABEL}; label the Service with one of {allowed}")
    profile = rules.profiles.get(name)
    if profile is None:
        raise _UnusableError(
            f"its label {PROFILE_LABEL} is {name!r}; discover.profiles has {allowed}: name one of these, or add it"
        )
    gpu = labels.get(GPU_LABEL) or profile.gpu
    if gpu != profile.gpu:
        raise _UnusableError(f"its label {GPU_LABEL} is {gpu!r}, but profile {name} is of {profile.gpu}")
    return profile


def _port(ports: Iterable[Port], name: str | None) -> int:
    usable = [(each.name or "", each.port) for each in ports if each.port and each.protocol in (None, "", "TCP")]
    named = [port for called, port in usable if name is None or called == name]
    if len(named) == 1:
        return named[0]
    there = ", ".join(repr(called) for called, _ in usable) or "none"
    if name is None:
        raise _UnusableError(f"its TCP ports are {there}; with discover.port say which the replicas listen on")
    raise _UnusableError(f"it has no TCP port named {name!r} (discover.port); there are {there}")


def _each_once(candidates: Sequence[_Candidate]) -> tuple[list[FoundReplica], set[Refusal]]:
    """Every pod and every URL once. One that has two profiles is left out: nobody can tell which promise it keeps."""
    by_pod: dict[tuple[str, int], _Candidate] = {}
    by_url: dict[str, _Candidate] = {}
    profiles = _profiles_of(candidates)
    conflicts: set[Refusal] = set()

    def rank(each: _Candidate) -> tuple[bool, str, str, str]:
        return each.is_ipv6, each.slice_name, each.replica.url, each.replica.domain or ""

    for each in sorted(candidates, key=rank):
        by = max(profiles[each.pod], profiles[each.replica.url], key=len)
        if len(by) > 1:
            told = " and ".join(f"{profile} by slice {name}" for profile, name in sorted(by.items()))
            conflicts.add(Refusal(each.replica.url, f"its profile is {told}; give its Services the same label"))
        elif by_pod.setdefault(each.pod, each) is each:
            by_url.setdefault(each.replica.url, each)
    return sorted((each.replica for each in by_url.values()), key=lambda replica: replica.url), conflicts


def _profiles_of(candidates: Iterable[_Candidate]) -> Mapping[tuple[str, int] | str, Mapping[str, str]]:
    """By pod and by URL, the profiles that slices give it, each with the first by name of them."""
    found: dict[tuple[str, int] | str, dict[str, str]] = {}
    for each in candidates:
        for known in (each.pod, each.replica.url):
            by, reference = found.setdefault(known, {}), each.replica.profile.reference
            by[reference] = min(by.get(reference, each.slice_name), each.slice_name)
    return found


def _called(each: EndpointSlice) -> str:
    service = (each.metadata.labels or {}).get(_SERVICE_LABEL)
    return f"slice {each.metadata.name}" + (f" of Service {service}" if service else "")
