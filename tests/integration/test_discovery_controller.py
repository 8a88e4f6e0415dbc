"""The controller with a fleet out of Kubernetes: a real Redis, a local API server, replicas as the test says."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from ratelimit import fleetspecs
from ratelimit.config import Config
from ratelimit.governor import waiting_file
from serving import discovery
from tests.integration.test_controller import A, Knees, knees, rates, running, urls
from tests.support.kube_api import KubeApi, Slice, endpoint, endpoint_slice
from tests.support.waiting import eventually_async

__all__ = ["knees"]  # a fixture that these tests ask for

ONE, TWO, THREE = "http://10.0.0.1:8000", "http://10.0.0.2:8000", "http://10.0.0.3:8000"
WAIT_S = 20.0


@pytest.fixture
async def api(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[KubeApi]:
    """A server with two H100 replicas in pool chat, which discovery finds by KUBECONFIG."""
    monkeypatch.setattr(discovery, "LEAST_WAIT_S", 0.01)
    monkeypatch.setattr(discovery, "MOST_WAIT_S", 0.05)
    async with KubeApi([h100("10.0.0.1", "10.0.0.2")]) as made:
        monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig))
        yield made


def h100(*addresses: str) -> Slice:
    return endpoint_slice("h100", [endpoint(address, f"node-{address}") for address in addresses])


def h200(*addresses: str) -> Slice:
    return endpoint_slice("h200", [endpoint(each) for each in addresses], profile="h200-llama-3.1-8b", gpu="H200")


def config_of(
    state_dir: Path, *, falls_above: float | None = None, raise_after_s: float = 0, share: float = 0.5, engines: int = 0
) -> Config:
    profiles = ["h100-llama-3.1-8b", "h200-llama-3.1-8b"]
    discover = {"selector": "penstock.io/pool=chat", "namespace": "inference", "port": "http", "profiles": profiles}
    own = [{"device": "virtual", "profile": profiles[0], "port": 8100, "count": engines}]
    pool = {"model": "m", "raise_after_s": raise_after_s, "discover": discover, "engines": own}
    document = {
        "state_dir": str(state_dir),
        "pools": [pool],
        "tiers": [{"name": "pro", "share": share}],
        "orgs": [{"name": "acme"}],
        "approval": {"falls_above": falls_above},
    }
    return Config.model_validate(document, context={"folder": state_dir})


async def test_the_first_limits_are_of_the_whole_fleet_that_kubernetes_tells(
    redis_client: Redis, tmp_path: Path, knees: Knees, api: KubeApi
) -> None:
    """A controller that starts publishes nothing before it has seen the list; a pool may have engines too."""
    async with running(config_of(tmp_path, engines=1), redis_client) as stack:
        first = await stack.until(lambda seen: seen.epoch)

        assert urls(first) == {ONE, TWO, A}
        assert first.reason == "the controller started"
        assert {(each.gpu, each.profile) for pool in first.pools for each in pool.replicas} == {
            ("H100", "h100-llama-3.1-8b")
        }


async def test_the_limits_follow_a_fleet_that_is_scaled(
    redis_client: Redis, tmp_path: Path, knees: Knees, api: KubeApi
) -> None:
    """Replicas that Kubernetes adds, of another GPU type too, are published; those that it takes away are gone."""
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await stack.until(lambda seen: urls(seen) == {ONE, TWO})
        api.apply(h200("10.0.0.3"))
        grown = await stack.until(lambda seen: urls(seen) == {ONE, TWO, THREE})
        assert sum(rates(grown)) > sum(rates(before))
        assert f"{THREE} joined" in grown.reason

        api.apply(h100("10.0.0.1"))
        shrunk = await stack.until(lambda seen: urls(seen) == {ONE, THREE})
        assert shrunk.reason == f"{TWO} left"
        api.remove("h200")
        await stack.until(lambda seen: urls(seen) == {ONE})
        assert "the config changed" not in grown.reason + shrunk.reason

        shown = stack.controller.metrics.registry.get_sample_value(
            "penstock_discovered_replicas", {"model": "m", "gpu": "H100", "profile": "h100-llama-3.1-8b"}
        )
        assert shown == 1


async def test_a_replica_that_appears_is_probed_like_any_other(
    redis_client: Redis, tmp_path: Path, knees: Knees, api: KubeApi
) -> None:
    """Kubernetes' word is not enough: a replica that it calls ready and that is down is watched, and in no limits."""
    async with running(config_of(tmp_path, raise_after_s=5), redis_client) as stack:
        await stack.until(lambda seen: urls(seen) == {ONE, TWO})
        stack.fleet.phases[THREE] = "down"
        api.apply(h100("10.0.0.1", "10.0.0.2", "10.0.0.3"))

        async def watched() -> bool:
            return THREE in stack.fleet.statuses()

        await eventually_async(watched, WAIT_S, "a watch of the third")
        api.apply(h100("10.0.0.2", "10.0.0.3"))
        assert urls(await stack.until(lambda seen: ONE not in urls(seen))) == {TWO}
        stack.fleet.turn(THREE, "healthy")
        await stack.until(lambda seen: urls(seen) == {TWO, THREE})


async def test_a_label_that_names_another_profile_is_another_replica(
    redis_client: Redis, tmp_path: Path, knees: Knees, api: KubeApi
) -> None:
    """What a replica is promised for follows its label; one that names no profile of the config takes it out."""
    async with running(config_of(tmp_path), redis_client) as stack:
        await stack.until(lambda seen: urls(seen) == {ONE, TWO})
        api.apply(endpoint_slice("h100", [endpoint("10.0.0.1")], profile="h200-llama-3.1-8b", gpu="H200"))
        await stack.until(lambda seen: [r.gpu for pool in seen.pools for r in pool.replicas] == ["H200"])

        api.apply(endpoint_slice("h100", [endpoint("10.0.0.1")], profile="h300-llama-3.1-8b", gpu="H200"))
        await stack.until(lambda seen: not urls(seen))
        value = stack.controller.metrics.registry.get_sample_value
        assert value("penstock_discovery_refused") == 1


async def test_an_api_server_that_is_away_changes_no_limit(
    redis_client: Redis, tmp_path: Path, knees: Knees, api: KubeApi
) -> None:
    """Attempts fail one after the other, the age grows, and the limits in force stay at their epoch."""
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await stack.until(lambda seen: urls(seen) == {ONE, TWO})
        await api.go_away()

        async def has_failed() -> bool:
            failed = stack.controller.metrics.registry.get_sample_value("penstock_discovery_failures_total") or 0
            return failed >= 5

        await eventually_async(has_failed, WAIT_S, "failures")
        assert await stack.publication() == before
        api.apply(h100("10.0.0.2"))
        await api.come_back()
        await stack.until(lambda seen: urls(seen) == {TWO})


async def test_a_controller_that_starts_while_the_api_server_is_away_goes_on_with_the_fleet_before(
    redis_client: Redis,
    tmp_path: Path,
    knees: Knees,
    api: KubeApi,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A restart is no reason to promise nothing: the replicas in force are taken to be there until a list."""
    monkeypatch.setattr(fleetspecs, "FIRST_LIST_TIMEOUT_S", 0.1)
    caplog.set_level(logging.WARNING)
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await stack.until(lambda seen: urls(seen) == {ONE, TWO})
    await api.go_away()
    async with running(config_of(tmp_path), redis_client) as stack:
        after = await stack.until(lambda seen: seen.epoch > before.epoch)
        assert urls(after) == {ONE, TWO}
        assert rates(after) == rates(before)
        assert "Kubernetes has not told its EndpointSlices" in caplog.text
        stack.fleet.turn(TWO, "down")
        await stack.until(lambda seen: urls(seen) == {ONE})
        stack.fleet.turn(TWO, "healthy")
        both = await stack.until(lambda seen: urls(seen) == {ONE, TWO})

        api.apply(h200("10.0.0.3"))
        await api.come_back()
        listed = await stack.until(lambda seen: urls(seen) == {ONE, TWO, THREE})
        assert listed.epoch == both.epoch + 1, "nothing fell while it was listed"


async def test_a_fleet_that_shrinks_waits_for_no_approval(
    redis_client: Redis, tmp_path: Path, knees: Knees, api: KubeApi
) -> None:
    """With approval.falls_above a config that lowers limits waits, and half of the fleet that goes does not."""
    async with running(config_of(tmp_path, falls_above=0.1), redis_client) as stack:
        await stack.until(lambda seen: urls(seen) == {ONE, TWO})
        stack.controller.adopt(config_of(tmp_path, falls_above=0.1, share=0.2))

        async def waits() -> bool:
            return len(waiting_file(tmp_path).read()) == 1

        await eventually_async(waits, WAIT_S, "a config that waits")
        api.apply(h100("10.0.0.1"))
        fallen = await stack.until(lambda seen: urls(seen) == {ONE})
        assert fallen.reason == f"{TWO} left"
        assert [each.cause for each in waiting_file(tmp_path).read()] == ["the config or a profile changed"]

        api.apply(h100("10.0.0.1", "10.0.0.3"))
        await stack.until(lambda seen: urls(seen) == {ONE, THREE})


async def test_a_pool_that_goes_over_to_discovery_loses_nothing_meanwhile(
    redis_client: Redis, tmp_path: Path, knees: Knees, api: KubeApi
) -> None:
    """Replicas that the config named and discovery finds again stay in force between the two, at every epoch."""
    discovering = config_of(tmp_path)
    profile = "h100-llama-3.1-8b"
    listed = [{"url": ONE, "profile": profile}, {"url": TWO, "profile": profile}]
    pool = discovering.pools[0].model_dump() | {"discover": None, "engines": [], "replicas": listed}
    static = Config.model_validate(discovering.model_dump() | {"pools": [pool]}, context={"folder": tmp_path})
    epochs: list[set[str]] = []
    async with running(static, redis_client) as stack:
        await stack.until(lambda seen: urls(seen) == {ONE, TWO})
        publish = stack.controller._publisher.publish

        async def noted(publication: object) -> None:
            epochs.append(urls(publication))  # type: ignore[arg-type] # a Publication
            await publish(publication)  # type: ignore[arg-type] # as above

        stack.controller._publisher.publish = noted  # type: ignore[method-assign] # as above
        stack.controller.adopt(discovering)
        api.apply(h100("10.0.0.1", "10.0.0.2", "10.0.0.3"))
        await stack.until(lambda seen: urls(seen) == {ONE, TWO, THREE})

    assert all({ONE, TWO} <= each for each in epochs)
