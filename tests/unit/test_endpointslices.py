"""Which replicas EndpointSlices name, for every oddity that the API allows."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.endpointslices import EndpointSlice, Found, KnownProfile, Rules, found_in
from tests.support.kube_api import Slice, endpoint, endpoint_slice, recorded_slices

H100 = KnownProfile("h100-llama-3.1-8b", "H100")
H200 = KnownProfile("profiles/our-h200.json", "H200")
RULES = Rules("http", {"h100-llama-3.1-8b": H100, "h200-llama-3.1-8b": H200})


def found(*slices: Slice, rules: Rules = RULES) -> Found:
    return found_in(msgspec.convert(slices, list[EndpointSlice]), rules)


def urls(*slices: Slice, rules: Rules = RULES) -> list[str]:
    return [replica.url for replica in found(*slices, rules=rules).replicas]


def why(*slices: Slice, rules: Rules = RULES) -> str:
    """Why nothing came of these slices."""
    result = found(*slices, rules=rules)
    assert not result.replicas
    assert len(result.refused) == 1
    return result.refused[0].why


def test_the_recorded_slices_are_a_mixed_fleet() -> None:
    """Two slices of one Service and an IPv6 slice of another give the ready pods, each with its profile and node."""
    result = found(*recorded_slices())

    assert [(replica.url, replica.profile, replica.domain) for replica in result.replicas] == [
        ("http://10.244.3.17:8000", H100, "gpu-a-03"),
        ("http://10.244.4.9:8000", H100, "gpu-a-04"),
        ("http://10.244.6.3:8000", H100, "gpu-b-01"),
        ("http://[fd00:10:244:7::2c]:8000", H200, "gpu-c-01"),
    ]
    assert not result.refused


@pytest.mark.parametrize(
    ("ready", "terminating", "counts"),
    [
        (True, False, True),
        (None, None, True),
        (False, False, False),
        (False, True, False),
        (True, True, False),
    ],
)
def test_an_endpoint_counts_while_it_is_ready_and_not_terminating(
    ready: bool | None, terminating: bool | None, counts: bool
) -> None:
    """Unknown readiness is ready, as the API says; a terminating pod never counts, whatever a Service publishes."""
    assert bool(urls(endpoint_slice("a", [endpoint("10.0.0.1", ready=ready, terminating=terminating)]))) is counts


def test_an_endpoint_without_conditions_counts() -> None:
    """Conditions are optional."""
    assert urls(endpoint_slice("a", [{"addresses": ["10.0.0.1"]}])) == ["http://10.0.0.1:8000"]


def test_what_is_in_several_slices_counts_once() -> None:
    """An endpoint on its way from one slice to another is in both; one that either holds ready is there."""
    ending = endpoint("10.0.0.1", ready=False)
    assert urls(endpoint_slice("a", [endpoint("10.0.0.1"), endpoint("10.0.0.1")]), endpoint_slice("b", [ending])) == [
        "http://10.0.0.1:8000"
    ]


def test_a_pod_of_a_dual_stack_service_counts_once() -> None:
    """A dual-stack Service has a slice for each family: counted twice, a fleet would promise twice what it serves."""
    pod = {"targetRef": {"kind": "Pod", "uid": "u-1"}}
    v4 = endpoint_slice("b", [endpoint("10.0.0.1") | pod])
    v6 = endpoint_slice("a", [endpoint("fd00::1") | pod], address_type="IPv6")

    assert urls(v4, v6) == urls(v6, v4) == ["http://10.0.0.1:8000"]
    assert urls(v6) == ["http://[fd00::1]:8000"]


def test_a_pod_of_two_profiles_is_left_out_and_told() -> None:
    """Nobody can tell which of two Services is right, and the faster profile may promise what the pod does not keep."""
    one = endpoint_slice("a", [endpoint("10.0.0.1"), endpoint("10.0.0.2")])
    other = endpoint_slice("b", [endpoint("10.0.0.1")], profile="h200-llama-3.1-8b", gpu="H200")

    for result in (found(one, other), found(other, one)):
        assert [replica.url for replica in result.replicas] == ["http://10.0.0.2:8000"]
        assert [each.what for each in result.refused] == ["http://10.0.0.1:8000"]
        assert "h100-llama-3.1-8b by slice a and profiles/our-h200.json by slice b" in result.refused[0].why


def test_a_dual_stack_pod_of_two_profiles_is_left_out_by_both_addresses() -> None:
    """The slice of the other address family is no way around it."""
    pod = {"targetRef": {"kind": "Pod", "uid": "u-1"}}
    v4 = endpoint_slice("a", [endpoint("10.0.0.1") | pod])
    v6 = endpoint_slice("b", [endpoint("fd00::1") | pod], profile="h200-llama-3.1-8b", gpu="H200", address_type="IPv6")

    assert not found(v4, v6).replicas
    assert len(found(v4, v6).refused) == 2


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"address_type": "FQDN"}, "of type 'FQDN'"),
        ({"profile": "b200-unheard-of"}, "discover.profiles has h100-llama-3.1-8b, h200-llama-3.1-8b"),
        ({"profile": ""}, "has no label penstock.io/profile; label the Service with one of h100-llama-3.1-8b"),
        ({"gpu": "H200"}, "its label penstock.io/gpu is 'H200', but profile h100-llama-3.1-8b is of H100"),
        ({"port": None}, "no TCP port named 'http' (discover.port); there are none"),
    ],
)
def test_a_slice_of_which_nothing_can_be_made_is_refused_with_its_reason(changed: dict[str, Any], reason: str) -> None:
    """The reason names the label or field, and what would be right."""
    assert reason in why(endpoint_slice("a", [endpoint("10.0.0.1")], **changed))


def test_an_address_that_is_none_is_refused_and_the_others_count() -> None:
    """One bad endpoint does not cost the slice."""
    result = found(endpoint_slice("a", [endpoint("engine-0.engine"), endpoint("10.0.0.2")]))

    assert [replica.url for replica in result.replicas] == ["http://10.0.0.2:8000"]
    assert [each.why for each in result.refused] == ["'engine-0.engine' is not an IP address"]


def test_labels_and_ports_of_an_empty_slice_are_no_fault() -> None:
    """A Service without pods has a slice without endpoints and ports, which is nothing to complain of."""
    empty = endpoint_slice("a", [], port=None, profile="nonsense")
    none: Slice = {**empty, "endpoints": None, "ports": None}
    assert found(empty, none) == Found()


def test_the_only_port_needs_no_name_and_one_of_several_does() -> None:
    """Without discover.port the only TCP port is taken; where there are two nobody guesses."""
    rules = Rules(None, RULES.profiles)
    two = endpoint_slice("a", [endpoint("10.0.0.1")])
    two["ports"] = [*two["ports"], {"name": "metrics", "port": 9100}, {"name": "dns", "port": 53, "protocol": "UDP"}]

    assert urls(endpoint_slice("a", [endpoint("10.0.0.1")], port=9999), rules=rules) == ["http://10.0.0.1:9999"]
    assert urls(two) == ["http://10.0.0.1:8000"]
    assert "its TCP ports are 'http', 'metrics'; with discover.port say" in why(two, rules=rules)


_addresses = st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1"])
_endpoints = st.lists(
    st.builds(endpoint, _addresses, st.sampled_from([None, "n1", "n2"]), ready=st.sampled_from([True, False, None])),
    max_size=3,
)
_slices = st.builds(
    endpoint_slice,
    st.sampled_from(["a", "b", "c"]),
    _endpoints,
    profile=st.sampled_from(["h100-llama-3.1-8b", "h200-llama-3.1-8b", "nonsense"]),
    gpu=st.sampled_from(["H100", "H200", ""]),
    address_type=st.sampled_from(["IPv4", "IPv6", "FQDN"]),
)


@given(st.lists(_slices, max_size=5), st.randoms())
def test_the_order_of_slices_means_nothing_and_no_url_is_there_twice(slices: list[Slice], random: Any) -> None:
    """Slices come in any order, from a list or from events; what is found is a function of the set of them."""
    by_name = list({each["metadata"]["name"]: each for each in slices}.values())
    shuffled = random.sample(by_name, len(by_name))

    result = found(*by_name)

    assert result == found(*shuffled)
    assert len({replica.url for replica in result.replicas}) == len(result.replicas)
