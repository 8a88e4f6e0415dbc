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

from ratelimit import meter
from ratelimit.meter import Admitted, Charge, Denied, Reading

#: Names the layout of keys and values. A change of either takes a new one, so that two versions never share a key.
KEY_VERSION: Final = "pn1"
#: The most reservations that one ``reap`` ends: Redis serves nobody else meanwhile.
MOST_REAPED: Final = 1000

_CONSTANTS: Final = (
    *("MINUTE_US", "EXACT", "LONGEST_WAIT_US", "TOMBSTONE_US", "REAPED_PER_ADMIT", "NO_EPOCH"),
    *("OPEN", "REAPED", "SETTLED"),
)


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
    constants = "".join(f"local {constant} = {getattr(meter, constant)}\n" for constant in _CONSTANTS)
    text = constants + (folder / "lib.lua").read_text("utf-8") + (folder / f"{name}.lua").read_text("utf-8")
    return Script(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


class _AdmitAnswer(msgspec.Struct, array_like=True):
    remaining: tuple[int, ...]
    reset_us: tuple[int, ...]
    denied_by: int = -1
    wait_us: int = -1


_ADMIT_ANSWER: Final = msgspec.msgpack.Decoder(_AdmitAnswer)
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
        self._bucket_prefix = f"{prefix}b:"
        self._cell_keys = tuple(prefix + name for name in ("reservations", "leases", "tombstones", "gauges"))

    async def admit(self, request_id: str, charges: Sequence[Charge], epoch: int, lease_ms: int) -> Admitted | Denied:
        """Charge every bucket, or none; the same request id gets the same answer."""
        meter.check_terms(epoch, lease_ms)
        answer = _ADMIT_ANSWER.decode(await self._run("admit", charges, [request_id, charges, epoch, lease_ms]))
        if answer.denied_by < 0:
            return Admitted(answer.remaining, answer.reset_us)
        wait_us = None if answer.wait_us < 0 else answer.wait_us
        return Denied(charges[answer.denied_by].bucket, wait_us, answer.remaining, answer.reset_us)

    async def extend(self, request_id: str, usage: Sequence[Charge], lease_ms: int) -> bool:
        """Hold these amounts from now on, and renew the lease; False where the request is unknown or settled."""
        meter.check_terms(0, lease_ms)
        return bool(await self._run("extend", usage, [request_id, usage, lease_ms]))

    async def settle(self, request_id: str, usage: Sequence[Charge]) -> bool:
        """Correct the hold to what was used and give gauges back; False where it was settled before."""
        return bool(await self._run("settle", usage, [request_id, usage]))

    async def reap(self, most: int = 100) -> int:
        """End up to ``most`` reservations whose lease is over; how many were ended."""
        if not 0 < most <= MOST_REAPED:
            raise ValueError(f"reap ends 1 to {MOST_REAPED} reservations at a time, not {most}")
        return int(await self._run("reap", (), [most]))

    async def peek(self, charges: Sequence[Charge]) -> tuple[Reading, ...]:
        """The buckets as they stand, under the limits that the charges state; nothing is written."""
        found = _PEEK_ANSWER.decode(await self._run("peek", charges, [charges]))
        return tuple(Reading(charge.bucket, *numbers) for charge, numbers in zip(charges, found, strict=True))

    async def _run(self, name: str, charges: Sequence[Charge], call: Sequence[object]) -> Any:
        """One script over the keys of these charges; raises StoreUnavailableError whatever keeps Redis from it."""
        meter.check_charges(charges)
        keys = (*self._cell_keys, *(self._bucket_prefix + charge.bucket for charge in charges if charge.rate))
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
