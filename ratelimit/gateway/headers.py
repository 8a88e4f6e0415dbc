"""Rate-limit response headers: OpenAI's ``x-ratelimit-*``, Anthropic's ``anthropic-ratelimit-*`` and the IETF
``RateLimit`` fields, from one set of readings. All of them tell the same numbers.

The first two know one limit of each name, and tell the limit a minute with the smallest share left, because that is the
one to pace by: its rate a minute, what can be taken at this moment (so at most the burst), and when the bucket is full
again. ``tokens`` repeats whichever of the two token limits has the smaller share left. The IETF fields list every
limit, also those shared with others and those of long windows: the policy states the bucket itself, ``q`` units (its
burst) in a window of ``w`` seconds (the time its rate takes to refill it, or the window's length).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import msgspec

from ratelimit.publication import Limit, LimitName

Headers = tuple[tuple[bytes, bytes], ...]

#: A limit's name in OpenAI's and Anthropic's headers.
_WIRE_NAME: dict[LimitName, bytes] = {
    "requests": b"requests",
    "input_tokens": b"input-tokens",
    "output_tokens": b"output-tokens",
}
_IETF_UNIT = {"requests": "requests", "concurrency": "concurrent-requests"}
_WINDOW_S = {"5h": 5 * 3_600, "week": 7 * 86_400}


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


def rfc3339(now_s: float, after_us: int) -> str:
    """The time ``after_us`` microseconds from ``now_s`` (Unix seconds) as Anthropic writes it, rounded up."""
    told_s = -(-(round(now_s * 1e6) + after_us) // 1_000_000)
    return datetime.fromtimestamp(told_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def limit_label(limit: Limit) -> str:
    """A limit's name among all of a caller's: ``output_tokens``, ``org-output_tokens-week``."""
    scope = "" if limit.per == "key" else f"{limit.per}-"
    return scope + limit.name + ("" if limit.window == "minute" else f"-{limit.window}")


def policy_header(limits: Sequence[Limit]) -> tuple[bytes, bytes]:
    """``RateLimit-Policy`` of a caller's limits; it changes with the publication only."""
    return b"ratelimit-policy", ", ".join(map(_policy, limits)).encode()


def _policy(limit: Limit) -> str:
    told = f'"{limit_label(limit)}";q={limit.burst};qu="{_IETF_UNIT.get(limit.name, "tokens")}"'
    if limit.window != "minute":
        return f"{told};w={_WINDOW_S[limit.window]}"
    if limit.per_minute == 0:
        return told
    return f"{told};w={max(1, -(-limit.burst * 60 // limit.per_minute))}"


def limit_headers(rooms: Sequence[Room]) -> Headers:
    """OpenAI's and the IETF's; concurrency, which has no rate, is told by the IETF's only."""
    headers = [header for name, room in _told(rooms) for header in _openai_headers(name, room)]
    if rooms:
        headers.append((b"ratelimit", ", ".join(map(_ietf_item, rooms)).encode()))
    return tuple(headers)


def anthropic_limit_headers(rooms: Sequence[Room], now_s: float) -> Headers:
    """Anthropic's, from the same readings; ``now_s`` is Unix time, since they tell when and not how long."""
    return tuple(header for name, room in _told(rooms) for header in _anthropic_headers(name, room, now_s))


def _told(rooms: Sequence[Room]) -> Iterable[tuple[bytes, Room]]:
    """Of each name the limit a minute with the smallest share left, then the scarcer of the two token limits."""
    scarcest: dict[LimitName, Room] = {}
    for room in rooms:
        name = room.limit.name
        if room.limit.per_minute and (name not in scarcest or room.share_left < scarcest[name].share_left):
            scarcest[name] = room
    yield from ((_WIRE_NAME[name], room) for name, room in scarcest.items())
    if tokens := [room for name, room in scarcest.items() if name != "requests"]:
        yield b"tokens", min(tokens, key=lambda room: room.share_left)


def _openai_headers(name: bytes, room: Room) -> Headers:
    return (
        (b"x-ratelimit-limit-" + name, b"%d" % room.limit.per_minute),
        (b"x-ratelimit-remaining-" + name, b"%d" % max(0, room.remaining)),
        (b"x-ratelimit-reset-" + name, go_duration(room.reset_us)),
    )


def _anthropic_headers(name: bytes, room: Room, now_s: float) -> Headers:
    prefix = b"anthropic-ratelimit-" + name
    return (
        (prefix + b"-limit", b"%d" % room.limit.per_minute),
        (prefix + b"-remaining", b"%d" % max(0, room.remaining)),
        (prefix + b"-reset", rfc3339(now_s, room.reset_us).encode()),
    )


def _ietf_item(room: Room) -> str:
    remaining = max(0, room.remaining)
    told = f'"{limit_label(room.limit)}";r={remaining}'
    if room.limit.per_minute == 0 and room.limit.window == "minute":
        return told
    return f"{told};t={-(-room.reset_us // 1_000_000)}"
