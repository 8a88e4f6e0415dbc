"""Holds, headers and refusals: the pure parts of what a caller is told and charged."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.gateway.admission import (
    LEAST_ESTIMATED_US,
    SPREAD_SHARE,
    Durations,
    answer_headers,
    estimated_wait_us,
    refusal,
)
from ratelimit.gateway.charges import amounts, charges_for, used_charges
from ratelimit.gateway.errors import Rejection, retry_headers
from ratelimit.gateway.headers import (
    Room,
    anthropic_limit_headers,
    go_duration,
    limit_headers,
    policy_header,
    rfc3339,
)
from ratelimit.gateway.hold import Usage, estimate, pool_cost_us
from ratelimit.gateway.terms import Terms, terms_by_tier
from ratelimit.gateway.wire import parse_request
from ratelimit.meter import Admitted, Denied
from ratelimit.publication import Limit
from serving.capacity import RequestShape, fleet_cost_s, merged_groups
from tests.support.gateway import MAX_MODEL_LEN, MODEL, group, publication


def terms(**limits: Any) -> Terms:
    """The terms of the test pool."""
    return terms_by_tier(publication(["http://a", "http://b"], **limits))["pro", MODEL]


def chat(**members: object) -> bytes:
    """A chat body with 40 bytes of prompt."""
    return msgspec.json.encode({"model": MODEL, "messages": [{"role": "user", "content": "x" * 40}], **members})


@pytest.mark.parametrize(
    ("members", "held"),
    [
        ({}, Usage(14, MAX_MODEL_LEN - 14)),
        ({"max_tokens": 100}, Usage(14, 100)),
        ({"max_tokens": 100, "n": 3}, Usage(14, 300)),
        ({"n": 2}, Usage(14, 2 * (MAX_MODEL_LEN - 14))),
        ({"max_tokens": 0}, Usage(14, 1)),
        ({"max_tokens": MAX_MODEL_LEN}, Usage(14, MAX_MODEL_LEN)),
    ],
)
def test_holds(members: dict[str, int], held: Usage) -> None:
    """Output is held at its maximum times the choices; the prompt by its bytes and messages."""
    assert estimate(parse_request("chat", chat(**members)), terms().pool) == held


def test_prompt_beyond_the_context_is_left_to_the_engine() -> None:
    """An estimated prompt never makes a request final: it is held at the context's length."""
    body = msgspec.json.encode({"model": MODEL, "messages": [{"content": "x" * 100_000}]})
    assert estimate(parse_request("chat", body), terms().pool).prompt_tokens == MAX_MODEL_LEN


def test_exact_prompt_beyond_the_context_is_refused() -> None:
    """Token ids and output that exceed the context together can never fit, and are refused as such."""
    body = msgspec.json.encode({"model": MODEL, "prompt": [1] * 4000, "max_tokens": 200})
    with pytest.raises(Rejection) as caught:
        estimate(parse_request("completions", body), terms().pool)
    assert caught.value.code == "context_length_exceeded"


def test_identical_replicas_are_counted_together() -> None:
    """Merging groups changes no cost."""
    groups = [group(1), group(1), group(2)]
    merged = merged_groups(groups)
    assert [each.count for each in merged] == [4]
    shape = RequestShape(100, 50)
    assert fleet_cost_s(merged, shape) == pytest.approx(fleet_cost_s(groups, shape))


def test_further_choices_cost_less_than_further_requests() -> None:
    """Choices share their prompt, so two of them cost more than one request and less than two."""
    one = pool_cost_us([group()], Usage(2000, 50), choices=1, prompts=1)
    two = pool_cost_us([group()], Usage(2000, 100), choices=2, prompts=1)
    assert one < two < 2 * one


def test_settled_charges_leave_the_gauge_out() -> None:
    """True costs replace the held ones; the place in flight is the store's to give back."""
    held = charges_for("k1", terms(), Usage(10, 20), 1000)
    used = used_charges(held, amounts(Usage(12, 5, 2), 700))
    assert [(charge.bucket, charge.cost) for charge in used] == [
        ("k:k1:requests", 1),
        ("k:k1:input_tokens", 10),
        ("k:k1:output_tokens", 5),
        ("pool:work", 700),
    ]
    assert [charge.bucket for charge in held][3] == "k:k1:concurrency"


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [
        (0, b"0ms"),
        (1, b"1ms"),
        (12_000, b"12ms"),
        (1_000_000, b"1s"),
        (1_500_000, b"1.5s"),
        (360_000_000, b"6m0s"),
        (3_723_004_000, b"1h2m3.004s"),
    ],
)
def test_durations_as_openai_writes_them(microseconds: int, text: bytes) -> None:
    """Resets have Go's form, rounded up."""
    assert go_duration(microseconds) == text


@given(st.integers(0, 10**12))
def test_waits_are_never_told_too_short(wait_us: int) -> None:
    """A client that waits as told has waited long enough, and is never told zero."""
    told = dict(retry_headers(wait_us))
    assert int(told[b"retry-after"]) * 1_000_000 >= max(wait_us, 1)
    assert int(told[b"retry-after-ms"]) * 1_000 >= max(wait_us, 1)
    assert (told.get(b"x-should-retry") == b"false") == (wait_us > 60_000_000)


def test_both_header_families_agree() -> None:
    """OpenAI's and the IETF's fields tell the same limit, room and reset; tokens are those with less room."""
    rooms = [
        Room(Limit("requests", 600, 50, ""), 49, 100_000),
        Room(Limit("input_tokens", 6000, 500, ""), 400, 1_000_000),
        Room(Limit("output_tokens", 1200, 100, ""), 20, 4_000_000),
        Room(Limit("concurrency", 0, 8, ""), 7, 0),
    ]
    told = dict(limit_headers(rooms))
    assert told[b"x-ratelimit-limit-requests"] == b"600"
    assert told[b"x-ratelimit-remaining-requests"] == b"49"
    assert told[b"x-ratelimit-reset-requests"] == b"100ms"
    for field in (b"limit", b"remaining", b"reset"):
        assert told[b"x-ratelimit-%s-tokens" % field] == told[b"x-ratelimit-%s-output-tokens" % field]
    assert told[b"ratelimit"] == (
        b'"requests";r=49;t=1, "input_tokens";r=400;t=1, "output_tokens";r=20;t=4, "concurrency";r=7'
    )
    assert policy_header([room.limit for room in rooms])[1] == (
        b'"requests";q=50;qu="requests";w=5, "input_tokens";q=500;qu="tokens";w=5, '
        b'"output_tokens";q=100;qu="tokens";w=5, "concurrency";q=8;qu="concurrent-requests"'
    )


SHARED = (
    Room(Limit("requests", 600, 50, ""), 49, 100_000),
    Room(Limit("output_tokens", 1200, 100, ""), 60, 2_000_000),
    Room(Limit("output_tokens", 6000, 500, "", per="org"), 100, 4_000_000),
    Room(Limit("output_tokens", 0, 10**6, "", per="org", window="week"), 5, 3_600_000_001),
    Room(Limit("requests", 0, 1000, "", window="5h"), 999, 18_000_000_000),
    Room(Limit("concurrency", 0, 80, "", per="model"), 7, 0),
)


def test_of_several_limits_of_one_name_the_scarcest_is_told() -> None:
    """The families that know one limit of each name tell the minute limit with the smallest share left, and agree."""
    openai = dict(limit_headers(SHARED))
    anthropic = dict(anthropic_limit_headers(SHARED, now_s=1_767_225_600.0))
    assert openai[b"x-ratelimit-remaining-output-tokens"] == b"100"
    for name in (b"requests", b"output-tokens", b"tokens"):
        for field in (b"limit", b"remaining"):
            assert (
                anthropic[b"anthropic-ratelimit-%s-%s" % (name, field)] == openai[b"x-ratelimit-%s-%s" % (field, name)]
            )
    assert anthropic[b"anthropic-ratelimit-output-tokens-reset"] == b"2026-01-01T00:00:04Z"
    assert anthropic[b"anthropic-ratelimit-tokens-reset"] == b"2026-01-01T00:00:04Z"
    assert anthropic[b"anthropic-ratelimit-requests-reset"] == b"2026-01-01T00:00:01Z"
    assert len(anthropic) == 9


def test_the_ietf_fields_list_every_limit() -> None:
    """Shared limits and long windows have names of their own, their window's length, and the time to its end."""
    assert dict(limit_headers(SHARED))[b"ratelimit"] == (
        b'"requests";r=49;t=1, "output_tokens";r=60;t=2, "org-output_tokens";r=100;t=4, '
        b'"org-output_tokens-week";r=5;t=3601, "requests-5h";r=999;t=18000, "model-concurrency";r=7'
    )
    assert policy_header([room.limit for room in SHARED])[1] == (
        b'"requests";q=50;qu="requests";w=5, "output_tokens";q=100;qu="tokens";w=5, '
        b'"org-output_tokens";q=500;qu="tokens";w=5, "org-output_tokens-week";q=1000000;qu="tokens";w=604800, '
        b'"requests-5h";q=1000;qu="requests";w=18000, "model-concurrency";q=80;qu="concurrent-requests"'
    )


@given(st.floats(0, 4e9), st.integers(0, 10**13))
def test_a_reset_is_never_told_too_early(now_s: float, after_us: int) -> None:
    """A client that waits until the time that is told has waited long enough, and at most a second too long."""
    told_s = datetime.fromisoformat(rfc3339(now_s, after_us)).timestamp()
    assert -1e-5 <= told_s - (now_s + after_us / 1e6) < 1 + 1e-5


def denied(bucket: str, wait_us: int | None) -> Denied:
    """A denial with five readings: four limits and the pool."""
    return Denied(bucket, wait_us, (5, 4, 3, 2, 1), (0, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("bucket", "wait_us", "status", "retry_ms"),
    [
        ("k:k1:requests", 1_500_000, 429, b"1500"),
        ("k:k1:output_tokens", 1, 429, b"1"),
        ("k:k1:concurrency", None, 429, b"1000"),
        ("pool:work", 250_000, 503, b"250"),
        ("pool:work", None, 503, b"1000"),
    ],
)
def test_who_is_to_blame(bucket: str, wait_us: int | None, status: int, retry_ms: bytes) -> None:
    """A key's own limit is a 429 with its true wait; the pool is a 503; a place in flight has an estimate."""
    rejection = refusal(terms(), "pro", denied(bucket, wait_us), mean_duration_us=2_000_000)
    told = dict(rejection.headers)
    assert (rejection.status, told[b"retry-after-ms"]) == (status, retry_ms)
    assert (b"x-retry-after-estimated" in told) == (bucket == "k:k1:concurrency")
    assert b"x-ratelimit-remaining-requests" in told


def test_a_limit_of_zero_is_the_fleets_fault() -> None:
    """Where the fleet has nothing left for a limit, the caller did nothing wrong."""
    rejection = refusal(terms(requests=(0, 0)), "pro", denied("k:k1:requests", None), 1)
    assert rejection.status == 503


def test_no_rate_limit_headers_without_enforcement() -> None:
    """Where nothing is enforced nothing is claimed."""
    assert answer_headers(terms(), None) == ()
    assert answer_headers(terms(), Admitted((5, 4, 3, 2, 1), (0,) * 5))


def test_mean_duration_follows_what_is_seen() -> None:
    """The estimate starts at the first request's duration and moves towards later ones."""
    durations = Durations()
    assert durations.mean_us("m") == 1_000_000
    durations.note("m", 4.0)
    assert durations.mean_us("m") == 4_000_000
    durations.note("m", 2.0)
    assert durations.mean_us("m") == 3_800_000


def test_a_mean_is_a_callers_own_and_few_are_kept() -> None:
    """Another caller's short requests shorten no wait, and the caller that was idle longest is forgotten."""
    durations = Durations(most_remembered=2)
    for caller, duration_s in (("a", 4.0), ("b", 9.0), ("a", 4.0), ("c", 0.01)):
        durations.note(caller, duration_s)
    assert [durations.mean_us(caller) for caller in "abc"] == [4_000_000, 1_000_000, 10_000]


def test_estimated_waits_have_a_floor_and_are_spread() -> None:
    """Short requests make no wait of milliseconds, and those refused together are not told the same."""
    waits = [estimated_wait_us(5_000, 10, f"request {number}") for number in range(100)]
    assert min(waits) >= LEAST_ESTIMATED_US
    assert max(waits) <= LEAST_ESTIMATED_US * (1 + SPREAD_SHARE)
    assert len({wait // 50_000 for wait in waits}) == 10
    assert estimated_wait_us(60_000_000, 2, "") == 30_000_000
    told = [dict(refusal(terms(), "pro", denied("k:k1:concurrency", None), 1, name).headers) for name in "ab"]
    assert told[0][b"retry-after-ms"] != told[1][b"retry-after-ms"]
    assert all(int(each[b"retry-after"]) >= 1 for each in told)
