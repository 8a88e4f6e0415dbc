"""The limiter of one cell, in Redis: each call is one script, so one decision and one round trip.

Redis's clock is the only one. Every key carries the cell's hash tag, and every key that a script touches is passed
to it, so a cell lives in one slot of a cluster. The rules are those of ``meter``, the scripts are in ``scripts/``.

When Redis cannot be used, each call raises StoreUnavailableError within ``timeout_s`` and decides nothing: whether to
serve without a limiter is the caller's policy. A call that timed out may have taken effect; repeating it with the same
request id is safe, and what nobody settles is reaped at the end of its lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import cache, partial
from hashlib import sha1
from importlib.resources import files
from typing import Any, Final, NamedTuple

import msgspec
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

_CONSTANTS: Final = {
    **{
        name: getattr(meter, name)
        for name in ("MINUTE_US", "EXACT", "LONGEST_WAIT_US", "SPREAD_US", "NO_EPOCH", "THOUSANDTHS", "GAUGE")
    },
    **{name: getattr(life, name) for name in ("TOMBSTONE_US", "REAPED_PER_ADMIT", "OPEN", "REAPED", "SETTLED")},
    **{role.name: role.value for role in meter.Role},
    "POOL_SCOPE": f"'{meter.POOL_SCOPE}'",
    "TRIM_USAGE_TO": MOST_USAGE_RECORDS,
}


class StoreUnavailableError(RuntimeError):
    """Redis did not answer in time, or could not. The call may or may not have taken effect: repeat it, same id."""


class Script(NamedTuple):
    """A script's whole text, and the digest that Redis knows it by."""

    text: str
    digest: str


@cache
def script(name: str) -> Script:
    """The script ``scripts/<name>.lua`` below the constants of ``meter`` and the shared ``lib.lua``."""
    folder = files("ratelimit") / "scripts"
    constants = "".join(f"local {name} = {value}\n" for name, value in _CONSTANTS.items())
    text = constants + (folder / "lib.lua").read_text("utf-8") + (folder / f"{name}.lua").read_text("utf-8")
    return Script(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


_ADMIT_ANSWER: Final = msgspec.msgpack.Decoder(list[int])
_PEEK_ANSWER: Final = msgspec.msgpack.Decoder(tuple[tuple[int, int, int], ...])


class Store:
    """The meters and reservations of one cell of a pool. The client stays its owner's, who closes it."""

    def __init__(self, redis: Redis, cell: str, timeout_s: float) -> None:
        if not cell or "{" in cell or "}" in cell:
            raise ValueError(f"a cell needs a name without braces (it is the hash tag of its keys), not {cell!r}")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be above 0, not {timeout_s}")
        self._redis = redis
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
        meter.check_terms(epoch, lease_ms)
        keys, told = self._told(charges, self._reservation_prefix + request_id)
        call = (request_id, told, epoch, lease_ms, memo.decode())
        answer = _ADMIT_ANSWER.decode(await self._run("admit", keys, call))
        if answer[0] >= 0:
            return Admitted(tuple(answer[1::2]), tuple(answer[2::2]), answer[0] == 1)
        wait_us = None if answer[1] < 0 else answer[1]
        return Denied(charges[-answer[0] - 1].bucket, wait_us, tuple(answer[2::2]), tuple(answer[3::2]))

    async def extend(self, request_id: str, usage: Sequence[Charge], lease_ms: int) -> bool:
        """Hold these amounts from now on, and renew the lease; False where the request is unknown or settled."""
        meter.check_terms(0, lease_ms)
        keys, told = self._told(usage, self._reservation_prefix + request_id)
        return bool(await self._run("extend", keys, (request_id, told, lease_ms)))

    async def settle(self, request_id: str, usage: Sequence[Charge], record: bytes = b"") -> bool:
        """Correct the hold to what was used and give gauges back; False where it was settled before.

        With the first settlement ``record`` goes into the cell's usage stream.
        """
        keys, told = self._told(usage, self._reservation_prefix + request_id)
        return bool(await self._run("settle", keys, (request_id, told, record.decode())))

    async def reap(self, most: int = 100) -> int:
        """End up to ``most`` reservations whose lease is over, or forget those reaped long ago; how many were ended."""
        if not 0 < most <= MOST_REAPED:
            raise ValueError(f"reap ends 1 to {MOST_REAPED} reservations at a time, not {most}")
        return int(await self._run("reap", self._cell_keys, (most,)))

    async def configure(self, charges: Sequence[Charge], epoch: int) -> None:
        """Put limits in force in these buckets at once, where the epoch is newer than theirs."""
        meter.check_terms(epoch, 1)
        keys, told = self._told(charges)
        await self._run("configure", keys, (told, epoch))

    async def peek(self, charges: Sequence[Charge]) -> tuple[Reading, ...]:
        """The buckets as they stand, under the limits that the charges state; nothing is written."""
        keys, told = self._told(charges)
        found = _PEEK_ANSWER.decode(await self._run("peek", keys, (told,)))
        return tuple(Reading(charge.bucket, *numbers) for charge, numbers in zip(charges, found, strict=True))

    def _told(self, charges: Sequence[Charge], *reservation: str) -> tuple[list[str], list[tuple[object, ...]]]:
        """The keys of a call, and its charges as the scripts read them."""
        meter.check_charges(charges)
        keys = [*self._cell_keys, *reservation]
        index: dict[str, int] = {}
        told: list[tuple[object, ...]] = []
        for bucket, cost, capacity, rate, tick_us, role, window_s, at_reap, borrow_up_to in charges:
            scope, _, name = bucket.rpartition(":")
            at = index.get(scope)
            if at is None:
                keys.append(self._scope_prefix + scope)
                at = index[scope] = len(keys)
            kind = tick_us if rate else -window_s
            told.append((at, name, cost, capacity, rate, kind, role, at_reap, borrow_up_to))
        return keys, told

    async def _run(self, name: str, keys: Sequence[str], call: Sequence[object]) -> Any:
        """One script; raises StoreUnavailableError whatever keeps Redis from it."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._evaluate(script(name), keys, (msgspec.msgpack.encode(call),))
        except TimeoutError as error:
            raise StoreUnavailableError(f"Redis did not answer {name} in {self._timeout_s} s") from error
        except (RedisError, OSError) as error:
            raise StoreUnavailableError(f"Redis failed at {name}: {error}") from error

    async def _evaluate(self, chosen: Script, keys: Sequence[str], arguments: Sequence[bytes]) -> Any:
        """EVALSHA; a server that does not know the script (a new one, or a failover) is sent its text."""
        tail = (len(keys), *keys, *arguments)
        execute: Callable[..., Awaitable[Any]] = partial(self._redis.execute_command, **{NEVER_DECODE: True})
        try:
            return await execute("EVALSHA", chosen.digest, *tail)
        except NoScriptError:
            return await execute("EVAL", chosen.text, *tail)
