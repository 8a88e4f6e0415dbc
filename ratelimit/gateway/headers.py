"""Rate-limit response headers: OpenAI's ``x-ratelimit-*`` and the IETF ``RateLimit`` fields, from one set of readings.

Both families tell the same numbers. ``x-ratelimit-limit-*`` is the published limit a minute; *remaining* is what can be
taken at this moment, so at most the burst; *reset* is the time until the bucket is full again. The IETF policy states
the bucket itself: ``q`` units (its burst) in a window of ``w`` seconds (the time its rate takes to refill it).

``x-ratelimit-*-tokens`` repeats whichever of the two token limits has the smaller share of its burst left, because that
is the one to pace by; ``-input-tokens`` and ``-output-tokens`` are always both there.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ratelimit.publication import Limit

Headers = tuple[tuple[bytes, bytes], ...]

#: A limit's name in headers.
_WIRE_NAME = {
    "requests": b"requests",
    "input_tokens": b"input-tokens",
    "output_tokens": b"output-tokens",
    "concurrency": b"concurrency",
}
_IETF_UNIT = {"requests": "requests", "concurrency": "concurrent-requests"}


class Room(msgspec.Struct, frozen=True):
    """What is left of one limit: units that can be taken now, and microseconds until it is full again."""

    limit: Limit
    remaining: int
    reset_us: int

    @property
    def share_left(self) -> float:
        """Remaining as a share of the burst."""
        return self.remaining / self.limit.burst if self.limit.burst else 0.0


def go_duration(microseconds: int) -> bytes:
    """A duration as OpenAI writes it (``12ms``, ``1.5s``, ``6m0s``), rounded up to a millisecond."""
    milliseconds = -(-microseconds // 1_000)
    if milliseconds < 1_000:
        return b"%dms" % milliseconds
    seconds, rest_ms = divmod(milliseconds, 1_000)
    minutes, seconds = divmod(seconds, 60)
    shown = (b"%d.%03d" % (seconds, rest_ms)).rstrip(b"0") if rest_ms else b"%d" % seconds
    hours, minutes = divmod(minutes, 60)
    if hours:
        return b"%dh%dm%ss" % (hours, minutes, shown)
    return b"%dm%ss" % (minutes, shown) if minutes else shown + b"s"


def policy_header(limits: Sequence[Limit]) -> tuple[bytes, bytes]:
    """``RateLimit-Policy`` of a key's limits; it changes with the publication only."""
    return b"ratelimit-policy", ", ".join(map(_policy, limits)).encode()


def _policy(limit: Limit) -> str:
    unit = _IETF_UNIT.get(limit.name, "tokens")
    if limit.per_minute == 0:
        return f'"{limit.name}";q={limit.burst};qu="{unit}"'
    window_s = max(1, -(-limit.burst * 60 // limit.per_minute))
    return f'"{limit.name}";q={limit.burst};qu="{unit}";w={window_s}'


def limit_headers(rooms: Sequence[Room]) -> Headers:
    """The headers that change from request to request; concurrency, which has no rate, is told by IETF fields only."""
    rated = [room for room in rooms if room.limit.per_minute]
    headers: list[tuple[bytes, bytes]] = []
    for room in rated:
        headers += _openai_headers(_WIRE_NAME[room.limit.name], room)
    tokens = [room for room in rated if room.limit.name != "requests"]
    if tokens:
        headers += _openai_headers(b"tokens", min(tokens, key=lambda room: room.share_left))
    if rooms:
        headers.append((b"ratelimit", ", ".join(map(_ietf_item, rooms)).encode()))
    return tuple(headers)


def _openai_headers(name: bytes, room: Room) -> Headers:
    return (
        (b"x-ratelimit-limit-" + name, b"%d" % room.limit.per_minute),
        (b"x-ratelimit-remaining-" + name, b"%d" % max(0, room.remaining)),
        (b"x-ratelimit-reset-" + name, go_duration(room.reset_us)),
    )


def _ietf_item(room: Room) -> str:
    remaining = max(0, room.remaining)
    if room.limit.per_minute == 0:
        return f'"{room.limit.name}";r={remaining}'
    return f'"{room.limit.name}";r={remaining};t={-(-room.reset_us // 1_000_000)}'
