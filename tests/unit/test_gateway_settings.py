from __future__ import annotations

import msgspec
from rich.pretty import pretty_repr

from ratelimit.gateway.settings import GatewaySettings


def test_settings_show_no_secret() -> None:
    """Neither the token nor the password of a Redis is in what a log or a traceback would print."""
    settings = GatewaySettings(redis_url="redis://:hunter2@host/0", admin_token="sesame")
    for shown in (repr(settings), str(settings), f"{settings}", pretty_repr(settings)):
        assert "hunter2" not in shown
        assert "sesame" not in shown
        assert "admin_port=9090" in shown


def test_settings_travel_whole() -> None:
    """A worker is told everything, secrets too."""
    settings = GatewaySettings(redis_url="redis://:hunter2@host/0", admin_token="sesame")
    assert msgspec.json.decode(msgspec.json.encode(settings), type=GatewaySettings) == settings


def test_every_gateway_has_its_own_id() -> None:
    """Two starts are told apart."""
    assert GatewaySettings(redis_url="").gateway_id != GatewaySettings(redis_url="").gateway_id
