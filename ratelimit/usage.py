"""Usage records: what every settled request took, for bills. No prompt text, no answers.

A gateway hands a record over when it settles, and the settle script puts it into the cell's usage stream, so that it
is there exactly once. A reservation that expired unsettled leaves its memo (the same record, as it stood at admission)
and what stays charged of it. The controller writes the stream into day files (``usagefiles``, ``usagedrain``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import msgspec

#: How a request ended:
#:
#: - ended: the engine's answer ended by itself, or at the maximum that was asked for;
#: - cut: the client left, or the answer broke off; what it used until then;
#: - unknown: what it used is not known; all that was held is charged;
#: - refused: the engine refused it; no tokens;
#: - unserved: no replica served it; nothing;
#: - expired: nobody settled it; what was held when its lease ended.
Outcome = Literal["ended", "cut", "unknown", "refused", "unserved", "expired"]

_NOTHING_HELD = msgspec.msgpack.encode([])


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One request. ``id`` is its reservation's, ``key`` the API key's public id, ``time`` seconds since 1970.

    ``input_tokens`` are those that are charged for; ``cached_tokens`` came from the prefix cache on top of them.
    ``cost_us`` is the pool's, in replica-microseconds. ``marks`` say what else is worth knowing, as "shadow", "local".
    """

    id: str
    time: float
    key: str
    org: str
    tier: str
    model: str
    route: str
    stream: bool
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    cost_us: int
    green: bool
    outcome: Outcome
    marks: tuple[str, ...] = ()


class EntryId(NamedTuple):
    """The id of a stream's entry: Redis's clock in milliseconds, and a number within that millisecond."""

    time_ms: int
    number: int

    @classmethod
    def parse(cls, text: str) -> EntryId:
        """From ``1700000000000-0``. Raises ``ValueError``."""
        time_ms, _, number = text.partition("-")
        return cls(int(time_ms), int(number))

    def after(self) -> EntryId:
        """The least id above this one."""
        return EntryId(self.time_ms, self.number + 1)

    def __str__(self) -> str:
        return f"{self.time_ms}-{self.number}"


class LedgerLine(UsageRecord, frozen=True, kw_only=True):
    """A record as it is kept: with the cell whose stream it was in, and its entry there, which dates it."""

    cell: str
    entry: str


def ledger_line(cell: str, entry: EntryId, fields: Mapping[bytes, bytes]) -> LedgerLine | None:
    """The line for one entry of a usage stream; None for what expired and carries no memo, which nobody accounts for.

    Raises ``ValueError`` for an entry that cannot be read.
    """
    if b"expired" in fields:
        if not fields[b"expired"]:
            return None
        record = _expired(fields[b"expired"], fields.get(b"held", _NOTHING_HELD), entry)
    elif b"record" in fields:
        record = msgspec.json.decode(fields[b"record"], type=UsageRecord)
    else:
        raise ValueError(f"an entry has a record, or a memo that expired; this one has {sorted(fields)}")
    return LedgerLine(**msgspec.structs.asdict(record), cell=cell, entry=str(entry))


def _expired(memo: bytes, held: bytes, entry: EntryId) -> UsageRecord:
    """The memo's record, ended when its entry was made, at what stays charged; what is not charged is as it was."""
    record = msgspec.json.decode(memo, type=UsageRecord)
    charged = _by_meter(msgspec.msgpack.decode(held, type=list[tuple[str, int]]))
    return msgspec.structs.replace(
        record,
        time=entry.time_ms / 1000,
        input_tokens=charged.get("input_tokens", record.input_tokens),
        output_tokens=charged.get("output_tokens", record.output_tokens),
        cost_us=charged.get("work", record.cost_us),
        outcome="expired",
    )


def _by_meter(held: Iterable[tuple[str, int]]) -> dict[str, int]:
    """The most that is held of each meter, whoever's it is and whatever its window or colour."""
    found: dict[str, int] = {}
    for bucket, amount in held:
        meter = bucket.rpartition(":")[2].partition(".")[0]
        found[meter] = max(amount, found.get(meter, 0))
    return found
