"""Usage records: what every settled request took, for bills. No prompt text, no answers.

A gateway hands a record over when it settles, and the settle script puts it into the cell's usage stream, so that it
is there exactly once. A reservation that expired unsettled leaves its memo (the same record, as it stood at admission)
and what was held.
"""

from __future__ import annotations

from typing import Literal

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
