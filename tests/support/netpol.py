"""Who reaches whom under Kubernetes' NetworkPolicies, as the API's documentation defines them. Pure.

A pod that no policy selects for a direction is open in it; one that is selected admits what the union of its policies'
rules admits. A connection needs the source's egress and the target's ingress.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tests.support.chart import Manifest


class Peer(NamedTuple):
    """A pod: where it is, what it is labelled, and the numbers of its named ports."""

    namespace: str
    labels: Mapping[str, str]
    ports: Mapping[str, int]


def reaches(policies: Sequence[Manifest], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether ``source`` may open a connection to that port of ``target``."""
    return _admits(policies, "Egress", source, target, target, port, protocol) and _admits(
        policies, "Ingress", target, source, target, port, protocol
    )


def _admits(
    policies: Sequence[Manifest], direction: str, subject: Peer, other: Peer, server: Peer, port: int, protocol: str
) -> bool:
    """Whether the policies that select ``subject`` let it speak with ``other`` in this direction."""
    selecting = [policy for policy in policies if _governs(policy, direction, subject)]
    if not selecting:
        return True
    rules, peers = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    return any(
        _has_port(rule.get("ports"), server, port, protocol) and _has_peer(rule.get(peers), policy, other)
        for policy in selecting
        for rule in policy["spec"].get(rules) or ()
    )


def _governs(policy: Manifest, direction: str, pod: Peer) -> bool:
    return (
        direction in policy["spec"]["policyTypes"]
        and policy["metadata"]["namespace"] == pod.namespace
        and _selects(policy["spec"]["podSelector"], pod.labels)
    )


def _has_port(ports: Sequence[Mapping[str, Any]] | None, server: Peer, port: int, protocol: str) -> bool:
    if not ports:
        return True
    return any(
        entry.get("protocol", "TCP") == protocol and server.ports.get(str(entry["port"]), entry["port"]) == port
        for entry in ports
    )


def _has_peer(peers: Sequence[Mapping[str, Any]] | None, policy: Manifest, other: Peer) -> bool:
    """No peers at all means everybody."""
    return not peers or any(_is_peer(peer, policy["metadata"]["namespace"], other) for peer in peers)


def _is_peer(peer: Mapping[str, Any], own_namespace: str, other: Peer) -> bool:
    if "ipBlock" in peer:
        raise NotImplementedError("the chart's own policies name no addresses")
    if "namespaceSelector" in peer:
        in_namespace = _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace})
    else:
        in_namespace = other.namespace == own_namespace
    return in_namespace and _selects(peer.get("podSelector", {}), other.labels)


def _selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    if "matchExpressions" in selector:
        raise NotImplementedError("the chart's own policies select by equality")
    wanted: Mapping[str, str] = selector.get("matchLabels") or {}
    return wanted.items() <= labels.items()
