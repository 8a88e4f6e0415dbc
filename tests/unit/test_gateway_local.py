"""Serving while Redis is away, and paying afterwards."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from ratelimit.gateway import local as local_module
from ratelimit.gateway.accounting import Account, Ledger
from ratelimit.gateway.admission import refusal
from ratelimit.gateway.breaker import StoreAwayError
from ratelimit.gateway.hold import Usage, estimate
from ratelimit.gateway.local import CHUNK, LOCAL_BUCKET, LocalMode
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.gateway.terms import Terms, terms_by_tier
from ratelimit.gateway.wire import parse_request
from ratelimit.meter import Admitted, Charge, Denied
from ratelimit.publication import Limit
from ratelimit.store import StoreUnavailableError
from tests.support.gateway import MODEL, make_key, publication
from tests.support.limiter import CellLimiter

_, RECORD = make_key()
BUCKET = f"k:{RECORD.id}:output_tokens"
AWAY = StoreAwayError("known to be away")
LOST = StoreUnavailableError("no answer")


def some_terms(burst: int = 100, **changes: object) -> Terms:
    """Terms of an assured tier with one limit of output tokens."""
    terms = terms_by_tier(publication(["http://127.0.0.1:1"]))["pro", MODEL]
    limit = Limit("output_tokens", 1, burst, "why")
    return msgspec.structs.replace(terms, **{"limits": (limit,), **changes})


class Gateway:
    """A ledger in local mode among ``gateways``, and its cell's store."""

    def __init__(self, gateways: int = 1) -> None:
        self.metrics = GatewayMetrics()
        self.local = LocalMode(self.metrics, "g1", lambda: gateways, lease_s=600)
        self.ledger = Ledger(self.metrics, 15, self.local)
        self.store = CellLimiter()

    def account(self, terms: Terms, max_tokens: int = 40, request_id: str = "request") -> Account:
        """The account of one request, not admitted yet."""
        body = msgspec.json.encode({"model": MODEL, "prompt": "water", "max_tokens": max_tokens})
        request = parse_request("completions", body)
        return Account(self.ledger, self.store, request_id, RECORD, terms, request, estimate(request, terms.pool))

    async def flush(self) -> None:
        """Redis is back: all that is owed is told."""
        self.store.away = None
        await self.ledger.drain(timeout_s=30)
        await self.tell()

    async def tell(self) -> None:
        """Try to tell what is owed."""
        await self.local.flush({MODEL: self.store}.__getitem__)

    def value(self, name: str, /, **labels: str) -> float:
        """A metric's value."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize("away", [AWAY, LOST])
async def test_what_was_served_is_charged_on_return(away: StoreUnavailableError) -> None:
    """Exactly once, with one record, whether or not the store may have heard of the admission."""
    gateway = Gateway()
    gateway.store.away = away
    account = gateway.account(some_terms())
    assert isinstance(await account.admit(), Admitted)
    assert account.green
    account.settle_used(Usage(3, 25), ended=True)
    await gateway.flush()
    await gateway.flush()
    assert gateway.store.used()[BUCKET] == 25
    assert [(r.id, r.output_tokens, r.marks) for r in gateway.store.records()] == [("request", 25, ("local",))]
    assert gateway.local.owes == 0


async def test_an_admission_that_arrives_after_all_is_not_charged_twice() -> None:
    """A stopped Redis reads the admission when it goes on, perhaps after the settlement: it has paid."""
    gateway = Gateway()
    gateway.store.away = LOST
    account = gateway.account(some_terms())
    await account.admit()
    account.settle_used(Usage(3, 25), ended=True)
    await gateway.flush()
    late = await gateway.store.admit("request", account._charges, 1, 15_000)
    assert isinstance(late, Admitted)
    assert gateway.store.used()[BUCKET] == 25
    assert not gateway.store.cell.leases.at


async def test_each_gateway_gives_out_its_part() -> None:
    """Two gateways, 100 tokens: 40 each; what is beyond is refused as the fleet's fault, and leaves nothing behind."""
    gateway = Gateway(gateways=2)
    gateway.store.away = AWAY
    terms = some_terms()
    assert isinstance(await gateway.account(terms, 40, "1").admit(), Admitted)
    answer = await gateway.account(terms, 1, "2").admit()
    assert isinstance(answer, Denied)
    assert answer.bucket == LOCAL_BUCKET
    assert refusal(terms, "pro", answer, 1_000).status == 503
    assert gateway.value("penstock_local_decisions_total", model=MODEL, tier="pro", answer="refused") == 1
    assert gateway.local.owes == 0


@pytest.mark.parametrize(("gateways", "assured"), [(0, True), (1, False)])
async def test_who_is_not_served_alone(gateways: int, assured: bool) -> None:
    """Best effort waits for Redis, and so does everybody at a gateway that never reached it."""
    gateway = Gateway(gateways)
    gateway.store.away = AWAY
    with pytest.raises(StoreUnavailableError):
        await gateway.account(some_terms(assured=assured)).admit()
    await gateway.flush()
    assert [name for name, _ in gateway.store.calls] == ["admit"]


async def test_a_refusal_here_is_taken_back_there() -> None:
    """Where the admission may have come through, the store is told that the request was not served."""
    gateway = Gateway()
    gateway.store.away = LOST
    assert isinstance(await gateway.account(some_terms(burst=10), 40).admit(), Admitted)  # leaves debt here
    assert isinstance(await gateway.account(some_terms(burst=10), 40, "refused").admit(), Denied)
    await gateway.flush()
    assert ("settle", "refused") in gateway.store.calls
    assert gateway.store.used().get(BUCKET, 0) == 0
    assert gateway.store.records() == []


async def test_in_shadow_everybody_is_served() -> None:
    """Shadow refuses nobody, whatever is away."""
    gateway = Gateway(gateways=0)
    gateway.store.away = AWAY
    account = gateway.account(some_terms(shadow=True))
    assert await account.admit() == Admitted((), (), green=False)
    account.settle_used(Usage(3, 25), ended=True)
    await gateway.flush()
    assert [record.marks for record in gateway.store.records()] == [("local",)]


async def test_many_buckets_are_told_in_few_calls() -> None:
    """What was used is added up per bucket; a call whose answer was lost is repeated as it was, under its own id."""
    gateway = Gateway()
    for _ in range(3):
        for number in range(CHUNK + 20):
            gateway.local.owe(MODEL, (Charge(f"k:k{number}:output_tokens", 5, 100, 100),))
    gateway.store.away = LOST
    await gateway.tell()
    gateway.local.owe(MODEL, (Charge("k:k0:output_tokens", 1, 100, 100),))
    await gateway.flush()
    told = [request_id for name, request_id in gateway.store.calls if name == "settle"]
    assert told == ["journal:g1:1", "journal:g1:1", "journal:g1:2"]
    assert gateway.store.used() == {f"k:k{n}:output_tokens": 16 if n == 0 else 15 for n in range(CHUNK + 20)}


async def test_nothing_is_repeated_that_would_be_charged_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that may have come through long ago is given up, and counted; one that was never sent waits on."""
    monkeypatch.setattr(local_module, "LONGEST_TELLING_S", 0.01)
    gateway = Gateway()
    gateway.local.owe(MODEL, (Charge(BUCKET, 5, 100, 100),))
    gateway.store.away = AWAY
    await gateway.tell()
    await asyncio.sleep(0.02)
    gateway.store.away = LOST
    await gateway.tell()
    assert gateway.local.owes == 1
    await asyncio.sleep(0.02)
    await gateway.flush()
    assert gateway.store.used() == {}
    assert gateway.value("penstock_lost_total", what="debt") == 1


async def test_what_is_owed_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bounds debts and records are counted as lost, and the rest is told."""
    monkeypatch.setattr(local_module, "MOST_OWED_BUCKETS", 2)
    monkeypatch.setattr(local_module, "MOST_RECORDS", 2)
    gateway = Gateway()
    for number in range(3):
        gateway.local.owe(MODEL, (Charge(f"k:k{number}:output_tokens", 5, 100, 100),))
        gateway.local.keep(MODEL, str(number), b"{}")
    assert gateway.local.owes == 4
    await gateway.flush()
    assert (len(gateway.store.used()), len(gateway.store.cell.usage)) == (2, 2)
    assert gateway.value("penstock_lost_total", what="debt") == 1
    assert gateway.value("penstock_lost_total", what="record") == 1


async def test_records_that_find_no_room_are_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line says that bills will lack records, and another when that begins again after an outage."""
    assert local_module.MOST_RECORDS >= 100_000
    monkeypatch.setattr(local_module, "MOST_RECORDS", 1)
    gateway = Gateway()
    for outage in (1, 2):
        for number in range(3):
            gateway.local.keep(MODEL, f"{outage}.{number}", b"{}")
        assert [record.levelname for record in caplog.records] == outage * ["ERROR"]
        await gateway.flush()
    assert gateway.value("penstock_lost_total", what="record") == 4


def test_the_bound_is_shown() -> None:
    """What this gateway would admit of a tier: its part of the limit, for each key that shares the tier."""
    gateway = Gateway(gateways=2)
    limit = Limit("output_tokens", 600, 100, "why")
    gateway.local.publish_bound([some_terms(limits=(limit,), active_keys=3), some_terms(tier="free", assured=False)])
    labels = {"model": MODEL, "tier": "pro", "name": "output_tokens"}
    assert gateway.value("penstock_local_bound", **labels, per="minute") == 3 * 240
    assert gateway.value("penstock_local_bound", **labels, per="burst") == 3 * 40
    assert not gateway.value("penstock_local_bound", **{**labels, "tier": "free"}, per="burst")


def test_the_bound_of_each_limit_is_shown_apart() -> None:
    """A rule's bound does not take the place of the tier's own: windows and scopes have names of their own, and of two
    limits of one name the smaller binds.
    """
    gateway = Gateway(gateways=2)
    limits = (
        Limit("output_tokens", 600, 100, "the tier's"),
        Limit("output_tokens", 6_000, 1_000, "a rule's"),
        Limit("output_tokens", 0, 10_000, "a rule's", window="5h"),
        Limit("output_tokens", 60_000, 100_000, "a rule's", per="org"),
    )
    gateway.local.publish_bound([some_terms(limits=limits, active_keys=1)])
    shown = {
        name: gateway.value("penstock_local_bound", model=MODEL, tier="pro", name=name, per="burst")
        for name in ("output_tokens", "output_tokens-5h", "org-output_tokens")
    }
    assert shown == {"output_tokens": 40, "output_tokens-5h": 4_000, "org-output_tokens": 40_000}
