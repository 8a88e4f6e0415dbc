"""What the workers of a config are told, and how long their end may take."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from ratelimit.config import Config, GatewayConfig
from ratelimit.gateway.settings import SETTLE_DRAIN_S
from ratelimit.supervisor.gateways import gateway_settings


def test_the_drain_reaches_the_workers() -> None:
    """What the config says of it, and a time to end that has room for all of it and for settling."""
    workers = gateway_settings(GatewayConfig(workers=2, drain_s=60, drain_delay_s=5), "unix:///r", "")
    assert [(each.drain_delay_s, each.drain_s) for each in workers] == [(5, 60), (5, 60)]
    assert all(each.longest_end_s > 5 + 60 + SETTLE_DRAIN_S for each in workers)


@pytest.mark.parametrize("wrong", [{"drain_s": -1}, {"drain_s": 3601}, {"drain_delay_s": -0.1}, {"drain_delay_s": 301}])
def test_a_drain_out_of_bounds_is_refused(wrong: dict[str, float]) -> None:
    """Nobody waits for hours, or for less than nothing."""
    with pytest.raises(ValidationError):
        GatewayConfig(**wrong)  # type: ignore[arg-type]  # one name at a time


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis+cluster://:hunter2@h:1", "Cluster"),
        ("http://:hunter2@h", "rediss://"),
        ("redis:hunter2", "redis\\+sentinel://"),
    ],
)
def test_a_redis_that_cannot_be_used_is_refused(url: str, told: str) -> None:
    """By its kind, with the kinds there are."""
    with pytest.raises(ValidationError, match=told):
        Config.model_validate({"redis": url, "pools": [], "tiers": [], "orgs": []})


@pytest.mark.parametrize("url", ["redis+sentinel://h:1/s/0", "rediss+sentinel://h:1/s", "rediss://h", "unix:///r"])
def test_each_kind_of_redis_is_known(url: str) -> None:
    """A server, TLS, a socket, and Sentinel with and without TLS."""
    assert Config.model_validate({"redis": url, "pools": [], "tiers": [], "orgs": []}).redis == url
