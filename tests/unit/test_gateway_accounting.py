"""One request's account: leases, colours, usage records, and settlements while the store is away."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from ratelimit.cell import REAPED_KEPT_US, TOMBSTONE_US
from ratelimit.gateway import accounting
from ratelimit.gateway import ledger as ledgers
from ratelimit.gateway.accounting import Account, Ledger, Limiter
from ratelimit.gateway.breaker import StoreAwayError
from ratelimit.gateway.hold import FASTEST_TOKENS_PER_S, Usage, estimate
from ratelimit.gateway.local import LONGEST_TELLING_S
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.gateway.terms import Terms, terms_by_tier
from ratelimit.gateway.wire import parse_request
from ratelimit.meter import Admitted, Denied
from ratelimit.publication import Limit
from ratelimit.store import StoreUnavailableError
from ratelimit.usage import EntryId, UsageRecord, ledger_line
from tests.support.gateway import MODEL, make_key, publication
from tests.support.limiter import AwayLimiter, CellLimiter
from tests.support.waiting import eventually_async

FOR_EVER = 10**9
USED = Usage(prompt_tokens=3, output_tokens=5)
CLIENT = ("10.0.0.1", 5000)
_, RECORD = make_key()


def plain_terms(**changes: object) -> Terms:
    """The test pool's terms, changed."""
    return msgspec.structs.replace(terms_by_tier(publication(["http://127.0.0.1:1"]))["pro", MODEL], **changes)


def two_coloured(assured: int = 100, ceiling: int = 300, **changes: object) -> Terms:
    """Terms with one limit: output tokens, so many assured at once, so many by borrowing."""
    limit = Limit("output_tokens", 1, assured, "why", ceiling_per_minute=1, ceiling_burst=ceiling)
    return plain_terms(limits=(limit,), borrow_up_to=1000, **changes)


def account_of(
    ledger: Ledger,
    limiter: Limiter,
    terms: Terms | None = None,
    max_tokens: int = 9,
    request_id: str = "request",
    client: tuple[str, int] | None = None,
) -> Account:
    """One request's account, not admitted yet, with its output held at its maximum."""
    body = msgspec.json.encode({"model": MODEL, "prompt": "water", "max_tokens": max_tokens})
    request, terms = parse_request("completions", body), terms or plain_terms()
    return Account(ledger, limiter, request_id, RECORD, terms, request, estimate(request, terms.pool), client)


async def admitted(limiter: AwayLimiter) -> tuple[Account, Ledger]:
    """An admitted account, and its ledger."""
    ledger = Ledger(GatewayMetrics(), 15)
    account = account_of(ledger, limiter)
    await account.admit()
    return account, ledger


def value(ledger: Ledger, name: str, **labels: str) -> float:
    """A metric's value."""
    return ledger.metrics.registry.get_sample_value(name, labels) or 0.0


def unsettled(ledger: Ledger, reason: str) -> float:
    """The reservations left to their leases for this reason."""
    return value(ledger, "penstock_unsettled_total", reason=reason)


async def test_a_settlement_outlasts_a_store_that_is_away() -> None:
    """What was used is charged exactly once, however many attempts it took."""
    limiter = AwayLimiter(failures=4)
    account, ledger = await admitted(limiter)

    account.settle_used(USED, ended=True)
    await ledger.drain(timeout_s=30)

    assert [settled["output_tokens"] for settled in limiter.settled] == [5]
    assert limiter.attempts == 5


async def test_settling_ends_while_the_store_knows_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts end well before the store forgets an attempt whose answer was lost: it would be charged twice."""
    assert TOMBSTONE_US / 1e6 - 20 >= accounting.LONGEST_SETTLING_S
    monkeypatch.setattr(accounting, "LONGEST_SETTLING_S", 0.2)
    limiter = AwayLimiter(FOR_EVER)
    account, ledger = await admitted(limiter)

    account.settle_used(USED, ended=True)
    await ledger.drain(timeout_s=30)

    assert not ledger._tasks
    assert unsettled(ledger, "store away") == 1
    assert value(ledger, "penstock_expired_tokens_total", model=MODEL, tier="pro", kind="output") == 9


async def test_a_settlement_that_was_never_sent_waits_out_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the store may have heard of it, it can be told whenever the store is back, and is then charged in full."""
    monkeypatch.setattr(accounting, "LONGEST_SETTLING_S", 0.0)
    limiter, ledger = CellLimiter(), Ledger(GatewayMetrics(), 15)
    account = account_of(ledger, limiter)
    await account.admit()
    limiter.away = StoreAwayError("known to be away")
    account.settle_used(USED, ended=True)

    async def refused_twice() -> bool:
        return len(limiter.calls) >= 3

    await eventually_async(refused_twice, within_s=10, what="a second attempt")
    limiter.away = None
    await ledger.drain(timeout_s=30)
    assert [(record.outcome, record.output_tokens) for record in limiter.records()] == [("ended", 5)]
    assert limiter.used()[f"k:{RECORD.id}:output_tokens"] == 5


async def test_a_settlement_is_given_up_before_its_reservation_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that this gateway is cut off from ends the reservation, and would charge it once more in the end."""
    assert REAPED_KEPT_US / 1e6 - 20 >= accounting.LONGEST_CUT_OFF_S > LONGEST_TELLING_S
    monkeypatch.setattr(accounting, "LONGEST_CUT_OFF_S", 0.0)
    limiter, ledger = CellLimiter(), Ledger(GatewayMetrics(), lease_s=0.01)
    account = account_of(ledger, limiter)
    await account.admit()
    limiter.away = StoreAwayError("known to be away")
    account.settle_used(USED, ended=True)
    await ledger.drain(timeout_s=30)
    assert not ledger._tasks
    assert unsettled(ledger, "store away") == 1


async def test_only_so_many_settlements_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is beyond the bound has one attempt, and is left to its lease and counted."""
    monkeypatch.setattr(ledgers, "MOST_WAITING", 2)
    limiter = AwayLimiter(FOR_EVER)
    ledger = Ledger(GatewayMetrics(), 15)
    accounts = [account_of(ledger, limiter) for _ in range(5)]
    for account in accounts:
        await account.admit()
        account.settle_used(USED, ended=True)
    async with asyncio.timeout(10):
        while len(ledger._tasks) > 2:  # noqa: ASYNC110 - the tasks end by themselves
            await asyncio.sleep(0)
    assert unsettled(ledger, "too many") == 3

    limiter.failures = 0
    await ledger.drain(timeout_s=30)
    assert len(limiter.settled) == 2


async def test_a_failed_admission_is_taken_back() -> None:
    """A request that is refused because the store did not answer owes it nothing, whatever came through there."""
    limiter = AwayLimiter(failures=1)
    limiter.refusing = True
    ledger = Ledger(GatewayMetrics(), 15)
    account = account_of(ledger, limiter)
    with pytest.raises(StoreUnavailableError):
        await account.admit()
    account.settle_unserved()
    await ledger.drain(timeout_s=30)

    assert limiter.settled == [{"requests": 0, "input_tokens": 0, "output_tokens": 0, "work": 0}]
    assert limiter.records == []
    assert not ledger._tasks


async def test_the_books_balance() -> None:
    """Held and overrun are settled and refunded, for each kind of token."""
    limiter, ledger = CellLimiter(), Ledger(GatewayMetrics(), 15)
    for number, output in enumerate((0, 5, 9, 40)):
        account = account_of(ledger, limiter, request_id=str(number))
        await account.admit()
        account.settle_used(Usage(3, output), ended=True)
    await ledger.drain(timeout_s=30)

    def total(what: str, kind: str) -> float:
        return value(ledger, f"penstock_{what}_tokens_total", model=MODEL, tier="pro", kind=kind)

    for kind in ("input", "output"):
        held, overrun, settled, refunded = (total(what, kind) for what in ("held", "overrun", "settled", "refunded"))
        assert held + overrun == settled + refunded
    assert (total("held", "output"), total("settled", "output"), total("overrun", "output")) == (36, 54, 31)
    assert limiter.used()[f"k:{RECORD.id}:output_tokens"] == 54


# Colours


async def test_a_request_within_what_is_assured_is_green() -> None:
    """It is charged to both its buckets; the next, which no longer fits, borrows and leaves the assured one alone."""
    limiter, ledger = CellLimiter(), Ledger(GatewayMetrics(), 15)
    terms = two_coloured(pool=msgspec.structs.replace(plain_terms().pool, budget_burst=10**9))
    green = account_of(ledger, limiter, terms, max_tokens=80, request_id="green")
    assert isinstance(await green.admit(), Admitted)
    assert green.green
    limiter.cell.buckets["pool:work"].level = 0  # a pool that Redis does not know starts full
    borrower = account_of(ledger, limiter, terms, max_tokens=80, request_id="borrower")
    answer = await borrower.admit()
    assert isinstance(answer, Admitted)
    assert not borrower.green
    assert answer.remaining[0] == 20

    borrower.settle_used(Usage(3, 50), ended=True)
    green.settle_used(Usage(3, 60), ended=True)
    await ledger.drain(timeout_s=30)
    used = limiter.used()
    assert used[f"k:{RECORD.id}:output_tokens"] == 60
    assert used[f"k:{RECORD.id}:output_tokens.ceiling"] == 110
    assert {record.id: record.green for record in limiter.records()} == {"green": True, "borrower": False}


async def test_a_borrower_owes_nothing_of_what_is_assured() -> None:
    """Neither by its reservation nor where Redis has lost that and is told the whole use."""
    limiter, ledger = CellLimiter(), Ledger(GatewayMetrics(), 15)
    terms = two_coloured(pool=msgspec.structs.replace(plain_terms().pool, budget_burst=10**9))
    await account_of(ledger, limiter, terms, max_tokens=100, request_id="green").admit()
    limiter.cell.buckets["pool:work"].level = 0
    borrower = account_of(ledger, limiter, terms, max_tokens=80)
    await borrower.admit()
    limiter.cell.reservations.clear()
    limiter.cell.buckets.clear()
    borrower.settle_used(Usage(3, 50), ended=True)
    await ledger.drain(timeout_s=30)
    used = limiter.used()
    assert used[f"k:{RECORD.id}:output_tokens.ceiling"] == 50
    assert f"k:{RECORD.id}:output_tokens" not in used


# What cannot be, and what is not known


@pytest.mark.parametrize("usage", [Usage(10**12, 5), Usage(3, 10**12), Usage(3, -7), Usage(-3, 5), Usage(3, 5, 4)])
async def test_usage_that_cannot_be_is_unknown(usage: Usage) -> None:
    """A replica's nonsense is counted and charged as held; neither the caller's buckets nor what is learned take it."""
    limiter, ledger = CellLimiter(), Ledger(GatewayMetrics(), 15)
    account = account_of(ledger, limiter)
    await account.admit()
    account.correct(usage)
    account.settle_used(usage, ended=True)
    await ledger.drain(timeout_s=30)
    assert [name for name, _ in limiter.calls] == ["admit", "settle"]
    assert [(record.outcome, record.output_tokens) for record in limiter.records()] == [("unknown", 9)]
    assert limiter.used()[f"k:{RECORD.id}:output_tokens"] == 9
    assert value(ledger, "penstock_impossible_usage_total", model=MODEL) == 2


async def test_a_settlement_that_fails_leaves_room_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be charged raises before the account is taken for settled, so that the reservation is ended."""
    limiter, ledger = CellLimiter(), Ledger(GatewayMetrics(), 15)
    account = account_of(ledger, limiter)
    await account.admit()
    with monkeypatch.context() as failing:
        failing.setattr(accounting, "used_charges", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            account.settle_used(USED, ended=True)
    account.settle_unserved()
    await ledger.drain(timeout_s=30)
    assert [record.outcome for record in limiter.records()] == ["unserved"]
    assert not ledger._open


@pytest.mark.parametrize(
    ("max_tokens", "held", "elapsed_s", "output"),
    [(1_000, 9, 0, 9), (1_000, 9, 2, 400), (1_000, 9, 60, 1_000), (1_000, 1_000, 2, 1_000), (9, 0, 60, 0)],
)
async def test_what_is_unknown_is_the_hold_or_what_time_allowed(
    monkeypatch: pytest.MonkeyPatch, max_tokens: int, held: int, elapsed_s: int, output: int
) -> None:
    """A small learned hold does not make long answers free; where nothing is generated, nothing is owed."""
    limiter, ledger = CellLimiter(), Ledger(GatewayMetrics(), 15)
    body = msgspec.json.encode({"model": MODEL, "prompt": "water", "max_tokens": max_tokens})
    request = parse_request("completions", body)
    account = Account(ledger, limiter, "request", RECORD, plain_terms(), request, Usage(3 if held else 0, held))
    await account.admit()
    monkeypatch.setattr(account, "_begun_s", asyncio.get_running_loop().time() - elapsed_s)
    account.settle_as_held()
    await ledger.drain(timeout_s=30)
    [record] = limiter.records()
    assert output <= record.output_tokens <= output + (100 if elapsed_s == 2 and held == 9 else 0)
    assert (record.outcome, record.output_tokens) == ("unknown", limiter.used()[f"k:{RECORD.id}:output_tokens"])


# Leases


async def test_an_ended_lease_leaves_what_a_stream_may_have_generated() -> None:
    """A gateway that dies leaves of each stream what was reported, and what it may have generated in one lease."""
    limiter, ledger = CellLimiter(), Ledger(GatewayMetrics(), lease_s=0.5)
    account = account_of(ledger, limiter, max_tokens=1_000)
    await account.admit()
    account.correct(Usage(7, 40))
    await ledger.drain(timeout_s=30)
    limiter.now_us += 1_000_000
    assert limiter.cell.reap(limiter.now_us) == 1
    used = limiter.used()
    assert used[f"k:{RECORD.id}:output_tokens"] == 40 + 0.5 * FASTEST_TOKENS_PER_S
    assert used[f"k:{RECORD.id}:input_tokens"] == 7
    assert used[f"k:{RECORD.id}:concurrency"] == 0


async def test_the_sweep_keeps_every_open_lease() -> None:
    """A request that reports nothing, as one that is not streamed, keeps its lease while it runs, and no longer."""
    limiter, ledger = CellLimiter(), Ledger(GatewayMetrics(), lease_s=0.003)
    account = account_of(ledger, limiter)
    await account.admit()
    for _ in range(3):
        await asyncio.sleep(0.002)  # more than a third of the lease
        await ledger.sweep()
        await ledger.drain(timeout_s=30)
    assert [name for name, _ in limiter.calls] == ["admit", "extend", "extend", "extend"]
    assert limiter.extended == [{}, {}, {}]
    account.settle_used(USED, ended=True)
    await ledger.drain(timeout_s=30)
    await ledger.sweep()
    assert [name for name, _ in limiter.calls].count("extend") == 3
    assert not ledger._open


async def test_a_young_lease_is_not_renewed() -> None:
    """The sweep costs the store nothing where nothing is due."""
    limiter, ledger = CellLimiter(), Ledger(GatewayMetrics(), lease_s=15)
    await account_of(ledger, limiter).admit()
    await ledger.sweep()
    await ledger.drain(timeout_s=30)
    assert [name for name, _ in limiter.calls] == ["admit"]


async def test_a_renewal_that_failed_is_tried_at_the_next_sweep() -> None:
    """An overrun that the store did not hear of is told again."""
    limiter, ledger = CellLimiter(), Ledger(GatewayMetrics(), lease_s=15)
    account = account_of(ledger, limiter)
    await account.admit()
    limiter.away = StoreUnavailableError("away")
    account.correct(Usage(3, 100))
    await ledger.drain(timeout_s=30)
    limiter.away = None
    await ledger.sweep()
    await ledger.drain(timeout_s=30)
    assert limiter.used()[f"k:{RECORD.id}:output_tokens"] == 100


async def test_overruns_are_told_in_steps() -> None:
    """Output beyond the hold is charged every so many tokens at once, and by the sweep where a stream is slow."""
    limiter, ledger = CellLimiter(), Ledger(GatewayMetrics(), lease_s=15)
    account = account_of(ledger, limiter)
    await account.admit()
    bucket = f"k:{RECORD.id}:output_tokens"
    for output, told in ((1, 9), (9, 9), (200, 9), (9 + accounting.OVERRUN_TOKENS, 265), (300, 265)):
        account.correct(Usage(3, output))
        await ledger.drain(timeout_s=30)
        assert limiter.used()[bucket] == told
    await ledger.sweep()
    await ledger.drain(timeout_s=30)
    assert limiter.used()[bucket] == 300


# Usage records


@pytest.mark.parametrize(
    ("settle", "outcome", "output", "requests"),
    [
        (lambda account: account.settle_used(USED, ended=True), "ended", 5, 1),
        (lambda account: account.settle_used(USED, ended=False, whole=True), "ended", 5, 1),
        (lambda account: account.settle_used(USED, ended=False, whole=False), "cut", 5, 1),
        (lambda account: account.settle_used(None, ended=False), "cut", 0, 1),
        (lambda account: account.settle_as_held(), "unknown", 9, 1),
        (lambda account: account.settle_refused(), "refused", 0, 1),
        (lambda account: account.settle_unserved(), "unserved", 0, 0),
    ],
)
async def test_each_settled_request_leaves_one_record(settle: object, outcome: str, output: int, requests: int) -> None:
    """It says who used how much of what and how it ended, agrees with what is charged, and holds no text."""
    limiter, ledger = CellLimiter(), Ledger(GatewayMetrics(), 15)
    account = account_of(ledger, limiter)
    await account.admit()
    assert callable(settle)
    settle(account)
    settle(account)
    await ledger.drain(timeout_s=30)
    [record] = limiter.records()
    used = limiter.used()
    assert (record.id, record.key, record.org, record.tier) == ("request", RECORD.id, "acme", "pro")
    assert (record.model, record.route, record.stream, record.green) == (MODEL, "completions", False, True)
    assert (record.outcome, record.output_tokens, record.marks) == (outcome, output, ())
    assert used[f"k:{RECORD.id}:output_tokens"] == output
    assert used[f"k:{RECORD.id}:input_tokens"] == record.input_tokens
    assert used[f"k:{RECORD.id}:requests"] == requests
    assert record.cost_us > 0 or outcome in ("refused", "unserved")
    assert b"water" not in limiter.cell.usage[0].record


async def test_a_reservation_that_nobody_settles_leaves_its_memo() -> None:
    """The store can write a record of it by what it was told at admission."""
    limiter, ledger = CellLimiter(), Ledger(GatewayMetrics(), 15)
    await account_of(ledger, limiter).admit()
    memo = msgspec.json.decode(limiter.cell.reservations["request"].memo, type=UsageRecord)
    assert (memo.id, memo.key, memo.outcome, memo.output_tokens) == ("request", RECORD.id, "expired", 9)


async def test_what_expires_is_billed_no_more_than_its_lease_allowed() -> None:
    """A key without token limits holds nothing that says so: its memo does."""
    limiter, ledger = CellLimiter(), Ledger(GatewayMetrics(), lease_s=0.5)
    await account_of(ledger, limiter, plain_terms(limits=()), max_tokens=1_000).admit()
    limiter.now_us += 1_000_000
    limiter.cell.reap(limiter.now_us)
    limiter.now_us += REAPED_KEPT_US
    limiter.cell.reap(limiter.now_us)
    [entry] = limiter.cell.usage
    fields = {b"expired": entry.expired, b"held": msgspec.msgpack.encode(entry.held)}
    line = ledger_line("cell", EntryId(1, 0), fields)
    assert line is not None
    assert (line.outcome, line.output_tokens) == ("expired", 100)


async def test_without_enforcement_only_the_record_is_written() -> None:
    """Nothing is asked and nothing charged, and the bill can still be made."""
    limiter, ledger = CellLimiter(), Ledger(GatewayMetrics(), 15)
    account = account_of(ledger, limiter, plain_terms(enforce=False))
    assert await account.admit() is None
    account.correct(USED)
    account.settle_used(USED, ended=True)
    await ledger.drain(timeout_s=30)
    assert [name for name, _ in limiter.calls] == ["settle"]
    assert limiter.used() == {}
    assert [record.output_tokens for record in limiter.records()] == [5]


# Shadow


async def test_in_shadow_a_refusal_is_counted_and_the_request_served() -> None:
    """Its key's buckets stay as they are, the pool is charged, and the record is marked."""
    limiter, ledger = CellLimiter(), Ledger(GatewayMetrics(), 15)
    terms = two_coloured(100, 100, shadow=True)
    first = account_of(ledger, limiter, terms, max_tokens=100, request_id="first")
    await first.admit()
    before = limiter.used()["pool:work"]
    second = account_of(ledger, limiter, terms, max_tokens=100, request_id="second", client=CLIENT)
    answer = await second.admit()
    assert isinstance(answer, Admitted)
    assert (answer.remaining[0], second.green) == (0, False)
    labels = {"model": MODEL, "tier": "pro", "bucket": "output_tokens"}
    assert value(ledger, "penstock_shadow_denials_total", **labels) == 1
    assert limiter.used()["pool:work"] > before
    second.settle_used(Usage(3, 50), ended=True)
    await ledger.drain(timeout_s=30)
    assert limiter.used()[f"k:{RECORD.id}:output_tokens"] == 100
    assert [(record.id, record.marks) for record in limiter.records()] == [("second", ("shadow",))]


# Refusals from memory


async def test_a_caller_that_hammers_is_refused_from_memory() -> None:
    """The same connection is told the same moment without a call; another connection asks for itself."""
    limiter, ledger = CellLimiter(), Ledger(GatewayMetrics(), 15)
    terms = plain_terms(limits=(Limit("output_tokens", 60, 9, "why"),))

    async def ask(request_id: str, port: int = 1, max_tokens: int = 9) -> Admitted | Denied | None:
        client = ("10.0.0.1", port)
        return await account_of(ledger, limiter, terms, max_tokens, request_id, client).admit()

    assert isinstance(await ask("first"), Admitted)
    first, again = await ask("second"), await ask("third")
    assert isinstance(first, Denied)
    assert isinstance(again, Denied)
    assert first.wait_us is not None
    assert again.wait_us is not None
    assert 0 <= first.wait_us - again.wait_us < 100_000
    assert len(limiter.calls) == 2
    assert isinstance(await ask("smaller", max_tokens=8), Denied)
    assert isinstance(await ask("other", port=2), Denied)
    assert len(limiter.calls) == 4
    assert value(ledger, "penstock_cached_denials_total", model=MODEL, tier="pro") == 1
