"""What one gateway process is told to do."""

from __future__ import annotations

from secrets import token_hex
from typing import Any

import msgspec

#: The environment variable by which a supervisor tells a worker its settings, as JSON.
SETTINGS_VARIABLE = "PENSTOCK_GATEWAY_SETTINGS"
#: For settlements that are under way when the last request has ended.
SETTLE_DRAIN_S = 5.0
#: For requests that are cut off to tell their clients so.
LAST_WORDS_S = 2.0
#: For all else that a process does at its end.
EXIT_ALLOWANCE_S = 2.0

_SECRET_FIELDS = frozenset({"admin_token", "redis_url"})


def new_gateway_id() -> str:
    """An id that no other start of a gateway has."""
    return "g_" + token_hex(6)


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """Addresses, bounds and timeouts of one gateway process.

    Several processes may share ``port``; each has an ``admin_port`` of its own. ``request_timeout_s`` bounds a request
    from its admission to its last byte. ``first_byte_timeout_s`` bounds the wait for a stream's first chunk on one
    replica, ``chunk_timeout_s`` the silence between two chunks. An answer that is not streamed is kept whole, up to
    ``max_answer_bytes``. After SIGTERM connections are accepted for ``drain_delay_s`` more, so that load balancers can
    hear of it; then open requests get ``drain_s`` to finish.

    ``admin_token`` is what the admin port asks for; where it is empty, as in tests, the admin port is open.
    ``gateway_id`` is unique to one start of one process. A call of the store may take ``store_timeout_s``, and a
    reservation that nobody renews ends after ``lease_s``.
    """

    redis_url: str
    host: str = "127.0.0.1"
    port: int = 8080
    admin_port: int = 9090
    request_timeout_s: float = 600.0
    max_body_bytes: int = 8 * 1024 * 1024
    body_timeout_s: float = 20.0
    max_answer_bytes: int = 64 * 1024 * 1024
    connect_timeout_s: float = 2.0
    first_byte_timeout_s: float = 120.0
    chunk_timeout_s: float = 60.0
    drain_s: float = 20.0
    drain_delay_s: float = 0.0
    store_timeout_s: float = 0.03
    lease_s: float = 15.0
    poll_interval_s: float = 1.0
    admin_token: str = ""
    gateway_id: str = msgspec.field(default_factory=new_gateway_id)

    @property
    def longest_end_s(self) -> float:
        """From SIGTERM until the process has exited, at most; whoever kills it sooner loses streams or settlements."""
        return self.drain_delay_s + self.drain_s + LAST_WORDS_S + SETTLE_DRAIN_S + EXIT_ALLOWANCE_S

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Every field but secrets: the token, and the Redis URL, which may hold a password."""
        fields = msgspec.structs.asdict(self)
        return [(name, "…" if value and name in _SECRET_FIELDS else value) for name, value in fields.items()]

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"GatewaySettings({fields})"
