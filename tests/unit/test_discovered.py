"""Discovered replicas as fleet state: what they come to with a config, and what is told of those left out."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from ratelimit.config import Config, ConfigError, load_config, policy_of
from ratelimit.decided import Adopted
from ratelimit.discovered import Discovered, PoolDiscovery, discovered
from ratelimit.fleetspecs import FleetSpecs
from ratelimit.publication import Publication
from ratelimit.replicaspecs import check_can_discover, pool_discoveries, replica_specs
from serving import discovery
from serving.discovery import Discovery, DiscoveryError
from serving.endpointslices import EndpointSlice, Listing
from serving.profile import load_profile
from tests.support.gateway import publication
from tests.support.kube_api import Slice, endpoint, endpoint_slice

CHAT = Listing("inference", "penstock.io/pool=chat")
PROFILES = {name: load_profile(name) for name in ("h100-llama-3.1-8b", "h200-llama-3.1-8b")}


def pool(model: str = "m", listing: Listing = CHAT) -> PoolDiscovery:
    names = dict.fromkeys(PROFILES, "")
    return PoolDiscovery(model, *listing, "http", {name: name for name in names}, 1.0, 5.0)


def slices(*found: Slice) -> dict[str, EndpointSlice]:
    return {each.metadata.name: each for each in msgspec.convert(found, list[EndpointSlice])}


def seen(pools: Iterable[PoolDiscovery], *found: Slice, configured: tuple[str, ...] = ()) -> Discovered:
    return discovered(pools, PROFILES, {CHAT: slices(*found)}, {}, configured)


def test_a_discovered_replica_has_its_profile_its_gpu_and_its_node() -> None:
    """It is watched, sized and spared like one that the config names."""
    (spec,) = seen([pool()], endpoint_slice("a", [endpoint("10.0.0.1", "gpu-7")])).specs

    assert (spec.url, spec.model, spec.gpu, spec.profile) == ("http://10.0.0.1:8000", "m", "H100", "h100-llama-3.1-8b")
    assert spec.domain == "gpu-7"
    assert spec.stuck_after_s >= 5.0


def test_what_the_config_names_is_not_discovered_too() -> None:
    """A URL counts once, as the config has it."""
    assert not seen([pool()], endpoint_slice("a", [endpoint("10.0.0.1")]), configured=("http://10.0.0.1:8000",)).specs


def test_a_replica_that_two_pools_find_is_the_first_ones_and_is_told() -> None:
    """A vLLM server serves one model: two selectors that overlap are a mistake."""
    result = seen([pool("m"), pool("n")], endpoint_slice("a", [endpoint("10.0.0.1")]))

    assert [spec.model for spec in result.specs] == ["m"]
    assert [(each.what, "is a replica of m too" in each.why) for each in result.refused] == [
        ("http://10.0.0.1:8000 of n", True)
    ]


def test_a_replica_that_is_taken_to_be_there_still_is_where_it_was() -> None:
    """Without its node it would fail with others of its kind for all that is known, and more would be kept spare."""
    before = publication(["http://10.0.0.1:8000", "http://10.0.0.2:8000"])
    (served,) = before.pools
    one, two = (replace(each, profile="h100-llama-3.1-8b") for each in served.replicas)
    known = replace(before, pools=(replace(served, replicas=(replace(one, domain="gpu-7"), two)),))
    read = msgspec.json.decode(msgspec.json.encode(known), type=Publication)

    found = discovered([pool(served.model)], PROFILES, {}, {CHAT: read}, ()).specs

    assert [(spec.url, spec.domain) for spec in found] == [(one.url, "gpu-7"), (two.url, None)]
    assert "domain" not in msgspec.to_builtins(two)


def test_what_was_kept_before_discovery_existed_can_still_be_read() -> None:
    """decided.json of an older controller has no field for it."""
    adopted = Adopted(policy_of(_config({})), tuple(replica_specs(_config({}))), {}, {"m": 5.0}, 0.5)
    old = msgspec.to_builtins(adopted)
    del old["discover"]

    assert msgspec.convert(old, Adopted) == adopted
    kept = msgspec.structs.replace(adopted, discover=(pool(),))
    assert msgspec.json.decode(msgspec.json.encode(kept), type=Adopted) == kept


class Found(Discovery):
    """A discovery that has listed what the test says."""

    def __init__(self, *found: Slice) -> None:
        super().__init__(lambda: None)
        self.found = slices(*found)

    def watch(self, listings: Iterable[Listing]) -> None:
        """Follows nothing."""

    def slices(self) -> dict[Listing, dict[str, EndpointSlice]]:
        return {CHAT: self.found}


def test_each_refusal_is_said_once_while_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    """A wrong label is one line in the log, not one a round; mended and broken again it is said again."""
    caplog.set_level(logging.WARNING)
    wrong = endpoint_slice("a", [endpoint("10.0.0.1")], profile="nonsense")
    found = Found(wrong)
    specs, adopted = FleetSpecs(found), Adopted(policy_of(_config({})), (), PROFILES, {"m": 5.0}, None, (pool(),))

    def look(*now: Slice) -> int:
        found.found = slices(*now)
        found.version += 1
        specs.look([adopted])
        return len(caplog.records)

    assert [look(wrong), look(wrong), look(), look(wrong)] == [1, 1, 1, 2]
    assert "discovery leaves out slice a of Service engine: its label penstock.io/profile" in caplog.text


def _config(discover: dict[str, object]) -> Config:
    profiles = {"selector": "penstock.io/pool=chat", "profiles": list(PROFILES)}
    document = {
        "pools": [{"model": "m", "stuck_after_s": 7, "discover": {**profiles, **discover}}],
        "tiers": [{"name": "pro", "share": 0.5}],
        "orgs": [{"name": "acme"}],
    }
    return Config.model_validate(document, context={"folder": Path()})


def test_a_pool_that_is_only_discovered_is_a_pool() -> None:
    """Its policy rests on the profiles that may come; priorities are the engines' only where it says so."""
    plain, by_priority = _config({}), _config({"priority_scheduling": True})
    (found,) = pool_discoveries(plain)

    assert found.listing == Listing(None, "penstock.io/pool=chat")
    assert (found.stuck_after_s, found.profiles) == (7, {name: name for name in PROFILES})
    assert policy_of(plain).pools[0].max_model_len == min(each.limits.max_model_len for each in PROFILES.values())
    assert [policy_of(each).pools[0].priority_scheduling for each in (plain, by_priority)] == [False, True]


@pytest.mark.parametrize(
    ("discover", "said"),
    [
        ("{selector: 'penstock.io/pool=', profiles: []}", "pools[0].discover.profiles: tuple should have at least 1"),
        ("{selector: '', profiles: [h100-llama-3.1-8b]}", "pools[0].discover.selector: '' is not a rule"),
        ("{profiles: [h100-llama-3.1-8b]}", "pools[0].discover.selector: is missing"),
        ("{selector: a, namespace: In, profiles: [h100-llama-3.1-8b]}", "pools[0].discover.namespace: is not a name"),
        ("{selector: a, profiles: [no-such]}", "pools[0].discover.profiles[0]: "),
        (
            "{selector: a, profile: h100-llama-3.1-8b}",
            "pools[0].discover.profile: there is no field 'profile'; did you",
        ),
        (
            "{selector: a, profiles: [h100-llama-3.1-8b, h100-llama-3.1-8b]}",
            "pools[0].discover.profiles[1]: is named 'h100-llama-3.1-8b', as h100-llama-3.1-8b is; a label names only",
        ),
    ],
)
def test_a_mistake_in_discover_is_named(tmp_path: Path, discover: str, said: str) -> None:
    """Each mistake is told with its place and its remedy, before anything asks the API server."""
    path = tmp_path / "penstock.yaml"
    path.write_text(
        f"pools: [{{model: m, discover: {discover}}}]\ntiers: [{{name: pro, share: 0.5}}]\norgs: [{{name: acme}}]\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert any(said in each for each in caught.value.problems), caught.value.problems


def test_a_client_that_is_not_installed_is_told_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who discovers nothing needs no client; who does is told what to install."""

    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(discovery, "import_module", absent)
    with pytest.raises(DiscoveryError, match=r"pip install 'penstock\[kubernetes\]'"):
        check_can_discover(_config({}))
    pools = [{"model": "m", "engines": []}]
    check_can_discover(Config.model_validate({"pools": pools, "tiers": [], "orgs": []}, context={"folder": Path()}))
