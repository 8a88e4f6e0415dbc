"""The limiter of one cell, in Redis: each call is one script, so one decision and one round trip.

Redis's clock is the only one. Every key carries the cell's hash tag, and every key that a script touches is passed
to it, so a cell lives in one slot of a cluster. The rules are those of ``meter``, the scripts are in ``scripts/``.

When Redis cannot be used, each call raises StoreUnavailableError within ``timeout_s`` and decides nothing: whether to
serve without a limiter is the caller's policy. A call that timed out may have taken effect; repeating it with the same
request id is safe, and what nobody settles is reaped at the end of its lease.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cache, partial
from hashlib import sha1
from importlib.resources import files
from struct import pack, unpack
from typing import Any, Final, NamedTuple, Protocol

from redis.asyncio import Redis
from redis.client import NEVER_DECODE
from redis.exceptions import NoScriptError, RedisError

from ratelimit import cell as life
from ratelimit import meter
from ratelimit.meter import Admitted, Charge, Denied, Reading

#: Names the layout of keys and values. A change of either takes a new one, so that two versions never share a key.
KEY_VERSION: Final = "pn2"
#: The most reservations that one ``reap`` ends: Redis serves nobody else meanwhile.
MOST_REAPED: Final = 1000

#: Usage records that the stream keeps while nobody takes them: the oldest are dropped beyond (approximately) this.
MOST_USAGE_RECORDS: Final = 1_000_000
#: An open reservation that nobody reaps is dropped this long after its lease: 40 days, longer than any scope is kept
#: for a window, so that what is in flight is given back as long as it is counted.
KEPT_UNREAPED_MS: Final = 40 * 86_400_000

_OF_METER: Final = (
    *("MINUTE_US", "EXACT", "LONGEST_WAIT_US", "SPREAD_US", "THOUSANDTHS"),
    *("NO_EPOCH", "GAUGE", "NEVER", "UNTOLD"),
)
_OF_CELL: Final = ("TOMBSTONE_US", "REAPED_KEPT_US", "REAPED_PER_ADMIT", "OPEN", "REAPED", "SETTLED")
_CONSTANTS: Final = {
    **{name: getattr(meter, name) for name in _OF_METER},
    **{name: getattr(life, name) for name in _OF_CELL},
    **{role.name: role.value for role in meter.Role},
    "POOL_SCOPE": f"'{meter.POOL_SCOPE}'",
    **{name: f"'{begins}'" for name, begins in zip(("KEY_SCOPE", "ORG_SCOPE"), meter.TENANT_SCOPES, strict=True)},
    "TRIM_USAGE_TO": MOST_USAGE_RECORDS,
    "KEPT_UNREAPED_MS": KEPT_UNREAPED_MS,
}


class StoreUnavailableError(RuntimeError):
    """Redis did not answer in time, or could not. The call may or may not have taken effect: repeat it, same id."""


class Script(NamedTuple):
    """A script's whole text, and the digest that Redis knows it by."""

    text: str
    digest: str


_PARTS: Final = {
    "admit": ("clock", "reap()", "admit"),
    "extend": ("clock", "rules", "reservations", "extend"),
    "settle": ("clock", "rules", "reservations", "settle"),
    "reap": ("clock", "reap()", "reap"),
    "configure": ("clock", "rules", "configure"),
    "peek": ("clock", "rules", "peek"),
}


@cache
def script(name: str) -> Script:
    """A script: the constants of ``meter`` and ``cell``, and the files of ``scripts/`` that it is made of."""
    text = folded("".join(map(_part, _PARTS[name])), _CONSTANTS)
    return Script(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


def folded(text: str, constants: Mapping[str, object]) -> str:
    """The text without comments, and with its constants (these, and upper-case locals that are literals) put in place.

    Redis makes every function of a script anew at each call, and Lua finds each local that one captures by walking
    along all that are captured: as locals, the constants took a fifth of an admission.
    """
    values = {name: str(value) for name, value in constants.items()}
    kept = []
    for line in text.splitlines():
        if definition := _CONSTANT_LINE.fullmatch(line):
            values |= zip(definition[1].split(", "), definition[2].split(", "), strict=True)
        elif not line.lstrip().startswith("--"):
            kept.append(line)
    return _WORD.sub(lambda word: values.get(word[0], word[0]), "\n".join(kept) + "\n")


_CONSTANT_LINE: Final = re.compile(r"local ([A-Z_]+(?:, [A-Z_]+)*) = ((?:-?\d+|'[^']*')(?:, (?:-?\d+|'[^']*'))*)")
_WORD: Final = re.compile(r"\b[A-Z][A-Z_]+\b")


def _part(name: str) -> str:
    """The text of one file, or for ``reap()`` of the function, within which what it needs is not made until called."""
    if name == "reap()":
        return f"local function reap(due)\n{_part('rules')}{_part('reservations')}{_part('reaping')}end\n"
    return (files("ratelimit") / "scripts" / f"{name}.lua").read_text("utf-8")


class _Listed(NamedTuple):
    """The charges of a call as a script takes them, scope by scope."""

    keys: tuple[str, ...]
    arguments: tuple[bytes | str, ...]


def _doubles(numbers: Sequence[int]) -> bytes:
    return pack(f"<{len(numbers)}d", *numbers)


def _numbers(doubles: bytes) -> list[int]:
    return [int(number) for number in unpack(f"<{len(doubles) // 8}d", doubles)]


class Commands(Protocol):
    """A way to Redis; ``ratelimit.link`` has the fast ones. Errors are redis-py's, replies undecoded."""

    async def command(self, key: str, *parts: bytes | str | int) -> Any:
        """One command; ``key`` is one of its keys, by which a cluster chooses the server."""


class RedisCommands:
    """The same through a redis-py client, for what runs seldom."""

    def __init__(self, redis: Redis) -> None:
        self._execute: Callable[..., Awaitable[Any]] = partial(redis.execute_command, **{NEVER_DECODE: True})

    async def command(self, key: str, *parts: bytes | str | int) -> Any:  # noqa: ARG002 - the client goes by the parts
        """One command."""
        return await self._execute(*parts)


class Store:
    """The meters and reservations of one cell of a pool. The client stays its owner's, who closes it."""

    def __init__(self, redis: Redis | Commands, cell: str, timeout_s: float) -> None:
        if not cell or "{" in cell or "}" in cell:
            raise ValueError(f"a cell needs a name without braces (it is the hash tag of its keys), not {cell!r}")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be above 0, not {timeout_s}")
        self._commands = RedisCommands(redis) if isinstance(redis, Redis) else redis
        self._timeout_s = timeout_s
        prefix = f"{KEY_VERSION}:{{{cell}}}:"
        self._scope_prefix = f"{prefix}s:"
        self._reservation_prefix = f"{prefix}r:"
        self._cell_keys = (f"{prefix}leases", f"{prefix}usage")

    async def admit(
        self, request_id: str, charges: Sequence[Charge], epoch: int, lease_ms: int, memo: bytes = b""
    ) -> Admitted | Denied:
        """Charge the buckets, or none; the same request id gets the same answer.

        ``memo`` is kept with the reservation, and comes out in the usage stream if nobody settles it.
        """
        life.check_terms(epoch, lease_ms)
        listed = self._listed(charges, request_id)
        names = "".join([f"{charge.bucket}\n" for charge in charges])
        terms = _doubles((epoch, lease_ms * 1_000))
        answer = _numbers(await self._run("admit", listed.keys, (request_id, terms, memo, names, *listed.arguments)))
        told = 1 if answer[0] >= 0 else 2
        room, reset = tuple(answer[told::2]), tuple(answer[told + 1 :: 2])
        if answer[0] >= 0:
            return Admitted(room, reset, answer[0] == 1)
        wait_us = None if answer[1] < 0 else answer[1]
        return Denied(charges[-answer[0] - 1].bucket, wait_us, room, reset)

    async def extend(self, request_id: str, usage: Sequence[Charge], lease_ms: int) -> bool:
        """Hold these amounts from now on, and renew the lease; False where the request is unknown or settled."""
        life.check_terms(0, lease_ms)
        listed = self._listed(usage, request_id)
        return bool(await self._run("extend", listed.keys, (request_id, lease_ms, *listed.arguments)))

    async def settle(self, request_id: str, usage: Sequence[Charge], record: bytes = b"") -> bool:
        """Correct the hold to what was used and give gauges back; False where it was settled before.

        With the first settlement ``record`` goes into the cell's usage stream.
        """
        listed = self._listed(usage, request_id)
        return bool(await self._run("settle", listed.keys, (request_id, record, *listed.arguments)))

    async def reap(self, most: int = 100) -> int:
        """End reservations whose lease is over, and forget those reaped long ago: up to ``most``; how many it did."""
        if not 0 < most <= MOST_REAPED:
            raise ValueError(f"reap ends 1 to {MOST_REAPED} reservations at a time, not {most}")
        return int(await self._run("reap", (*self._cell_keys, self._reservation_prefix), (most,)))

    async def configure(self, charges: Sequence[Charge], epoch: int) -> None:
        """Put limits in force in these buckets at once, where the epoch is newer than theirs."""
        life.check_terms(epoch, 1)
        listed = self._listed(charges)
        await self._run("configure", listed.keys, (epoch, *listed.arguments))

    async def peek(self, charges: Sequence[Charge]) -> tuple[Reading, ...]:
        """The buckets as they stand, under the limits that the charges state; nothing is written."""
        listed = self._listed(charges)
        found = _numbers(await self._run("peek", listed.keys, listed.arguments))
        readings = zip(charges, found[::3], found[1::3], found[2::3], strict=True)
        return tuple(Reading(charge.bucket, *numbers) for charge, *numbers in readings)

    def _listed(self, charges: Sequence[Charge], request_id: str = "") -> _Listed:
        """Charges as the scripts read them: scope by scope."""
        life.check_charges(charges)
        of_scope: dict[str, list[tuple[int, str, Charge]]] = {}
        for place, charge in enumerate(charges, 1):
            scope, _, name = charge.bucket.rpartition(":")
            of_scope.setdefault(scope, []).append((place, name, charge))
        numbers: list[int] = []
        names: list[str] = []
        for members in of_scope.values():
            for place, name, charge in members:
                _, cost, capacity, rate, _, role, _, at_reap, borrow_up_to = charge
                numbers += (cost, capacity, rate, charge.kind, role, at_reap, borrow_up_to, place)
                names.append(name)
        scopes = [self._scope_prefix + scope for scope in of_scope]
        counts = _doubles([len(members) for members in of_scope.values()])
        keys = (*self._cell_keys, self._reservation_prefix + request_id, *scopes)
        return _Listed(keys, (counts, _doubles(numbers), *names))

    async def _run(self, name: str, keys: Sequence[str], arguments: Sequence[bytes | str | int]) -> Any:
        """One script; raises StoreUnavailableError whatever keeps Redis from it."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._evaluate(script(name), keys, arguments)
        except TimeoutError as error:
            raise StoreUnavailableError(f"Redis did not answer {name} in {self._timeout_s} s") from error
        except (RedisError, OSError) as error:
            raise StoreUnavailableError(f"Redis failed at {name}: {error}") from error

    async def _evaluate(self, chosen: Script, keys: Sequence[str], arguments: Sequence[bytes | str | int]) -> Any:
        """EVALSHA; a server that does not know the script (a new one, or a failover) is sent its text."""
        tail = (len(keys), *keys, *arguments)
        try:
            return await self._commands.command(keys[0], "EVALSHA", chosen.digest, *tail)
        except NoScriptError:
            return await self._commands.command(keys[0], "EVAL", chosen.text, *tail)
