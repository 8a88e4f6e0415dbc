"""A request's usage record: the fixed part as it stands at admission, and the whole when it is settled. Pure."""

from __future__ import annotations

import msgspec

from ratelimit.gateway.hold import Usage
from ratelimit.gateway.terms import Terms
from ratelimit.gateway.wire import ParsedRequest
from ratelimit.keys import KeyRecord
from ratelimit.usage import Outcome, UsageRecord

_encoder = msgspec.json.Encoder()


class Entry(msgspec.Struct, frozen=True):
    """What is known of a request when it comes."""

    id: str
    key: str
    org: str
    tier: str
    model: str
    route: str
    stream: bool

    def written(
        self, now_s: float, usage: Usage, cost_us: int, green: bool, outcome: Outcome, marks: tuple[str, ...] = ()
    ) -> bytes:
        """The record as JSON; ``now_s`` is in seconds since 1970."""
        return _encoder.encode(
            UsageRecord(
                id=self.id,
                time=now_s,
                key=self.key,
                org=self.org,
                tier=self.tier,
                model=self.model,
                route=self.route,
                stream=self.stream,
                input_tokens=usage.input_tokens,
                cached_tokens=usage.cached_tokens,
                output_tokens=usage.output_tokens,
                cost_us=cost_us,
                green=green,
                outcome=outcome,
                marks=marks,
            )
        )


def entry_of(request_id: str, record: KeyRecord, terms: Terms, request: ParsedRequest) -> Entry:
    """The record of a request, before anything came of it."""
    model = terms.pool.model
    return Entry(request_id, record.id, record.org, record.tier, model, request.route, request.stream)
