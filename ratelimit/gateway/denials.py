"""Refusals repeated from memory: a client that hammers is not worth a round trip each time. Pure.

Only to the connection that was refused, and for a tenth of a second at most: the store gives the callers of a crowd a
different moment each, and refunds may make room before the moment that was told. The same moment is told again. Only
to requests of at least the same size, and only under the same limits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from ratelimit.meter import Charge, Denied

LONGEST_US = 100_000
MOST_REMEMBERED = 4_096

#: A key's id, a model, and the client's address and port.
Caller = tuple[str, str, tuple[str, int]]


class _Refusal(msgspec.Struct, frozen=True):
    answer: Denied
    charges: Sequence[Charge]
    epoch: int
    at_us: int
    ends_us: int


class Denials:
    """The latest refusals; the oldest is forgotten where there are too many."""

    def __init__(self, most_remembered: int = MOST_REMEMBERED) -> None:
        self._most_remembered = most_remembered
        self._latest: OrderedDict[Caller, _Refusal] = OrderedDict()

    def note(self, caller: Caller, answer: Denied, charges: Sequence[Charge], epoch: int, now_us: int) -> None:
        """A caller was refused just now."""
        lasts_us = LONGEST_US if answer.wait_us is None else min(LONGEST_US, answer.wait_us)
        self._latest[caller] = _Refusal(answer, charges, epoch, now_us, now_us + lasts_us)
        self._latest.move_to_end(caller)
        if len(self._latest) > self._most_remembered:
            self._latest.popitem(last=False)

    def find(self, caller: Caller, charges: Sequence[Charge], epoch: int, now_us: int) -> Denied | None:
        """The refusal that holds for this request too, as of now."""
        refusal = self._latest.get(caller)
        if refusal is None:
            return None
        if now_us >= refusal.ends_us or epoch != refusal.epoch:
            del self._latest[caller]
            return None
        if not _covers(refusal.charges, charges):
            return None
        passed_us, answer = now_us - refusal.at_us, refusal.answer
        wait_us = None if answer.wait_us is None else answer.wait_us - passed_us
        resets = tuple(max(0, reset_us - passed_us) for reset_us in answer.reset_us)
        return Denied(answer.bucket, wait_us, answer.remaining, resets)


def _covers(refused: Sequence[Charge], charges: Sequence[Charge]) -> bool:
    """Whether these ask of the same buckets at least what was refused; a key may change its tier within an epoch."""
    return len(refused) == len(charges) and all(
        one.bucket == other.bucket and one.cost <= other.cost for one, other in zip(refused, charges, strict=True)
    )
