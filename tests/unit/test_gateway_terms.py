"""From a publication to one caller's terms and charges."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import msgspec
import pytest

from ratelimit.cell import Cell
from ratelimit.gateway.charges import charges_for, check_countable, limit_of, rooms
from ratelimit.gateway.hold import Usage
from ratelimit.gateway.limits_route import key_charges, limits_body
from ratelimit.gateway.terms import Terms, TermsBook, fleet_of
from ratelimit.meter import Admitted, Role
from ratelimit.publication import Limit, LimitRule, Publication, PublishedPool, PublishedReplica
from tests.support.gateway import MODEL, make_key, publication

_, RECORD = make_key()
USAGE = Usage(10, 20, 2)
OUTPUT = Limit("output_tokens", 60, 100, "assured")


def published(*rules: LimitRule, shadow_keys: tuple[str, ...] = (), **tier: Any) -> Publication:
    """The test publication with rules, its tier changed."""
    base = publication(["http://a"])
    tiers = tuple(msgspec.structs.replace(each, **tier) for each in base.tiers)
    return msgspec.structs.replace(base, rules=rules, shadow_keys=shadow_keys, tiers=tiers)


def find(book: TermsBook, key_id: str = "k_1", org: str = "acme") -> Terms:
    """The terms of a key of the tier pro."""
    found = book.find(key_id, org, "pro", MODEL)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("ceiling", "assured", "roles"),
    [
        (0, True, [Role.PLAIN, Role.COUNTED]),
        (300, True, [Role.ASSURED, Role.CEILING, Role.POOL]),
        (0, False, [Role.PLAIN, Role.POOL]),
    ],
)
def test_the_roles_by_kind_of_tier(ceiling: int, assured: bool, roles: list[Role]) -> None:
    """Never borrows, borrows beyond what is assured, only borrows."""
    limit = Limit("output_tokens", 60, 100, "why", ceiling_per_minute=ceiling, ceiling_burst=5 * ceiling)
    terms = find(TermsBook(published(limits=(limit,), assured=assured, borrow_up_to=700)))
    charges = charges_for("k_1", terms, USAGE, 1_000)
    assert [charge.role for charge in charges] == roles
    assert charges[-1].bucket == "pool:work"
    assert charges[-1].borrow_up_to == 700
    assert [charge.cost for charge in charges] == [20] * (len(roles) - 1) + [1_000]


def test_buckets_are_named_by_who_shares_them() -> None:
    """By key, org, tier or model, and by window; each at the request's cost of what it counts."""
    rules = (
        LimitRule("output_tokens", 900, per="org", window="week"),
        LimitRule("requests", 50, per="tier"),
        LimitRule("input_tokens", 70, per="model", window="5h"),
        LimitRule("concurrency", 9, per="org"),
    )
    terms = find(TermsBook(published(*rules, limits=(OUTPUT,))))
    charges = charges_for("k_1", terms, USAGE, 1_000)
    assert [(c.bucket, c.cost, c.capacity, c.rate, c.window_s) for c in charges[:-1]] == [
        ("k:k_1:output_tokens", 20, 100, 60, 0),
        ("o:acme:output_tokens.week", 20, 900, 0, 604_800),
        ("t:pro:requests", 1, 50, 50, 0),
        (f"m:{MODEL}:input_tokens.5h", 8, 70, 0, 18_000),
        ("o:acme:concurrency", 1, 9, 0, 0),
    ]
    assert [limit_of(terms, charge.bucket) for charge in charges] == [*terms.limits, None]


def test_callers_that_no_rule_tells_apart_share_their_terms() -> None:
    """What is kept grows with the publication, not with the number of keys; names nobody published are not kept."""
    rules = (LimitRule("requests", 5, keys=("k_special",)), LimitRule("requests", 9, orgs=("acme",)))
    book = TermsBook(published(*rules, limits=(OUTPUT,), shadow=False))
    assert find(book, "k_1") is find(book, "k_2")
    assert find(book, "k_1", "unknown") is find(book, "k_1", "other")
    assert [len(find(book, key).limits) for key in ("k_1", "k_special")] == [2, 2]
    assert [find(book, key).limits[1].burst for key in ("k_1", "k_special")] == [9, 5]
    assert book.find("k_1", "acme", "pro", "unknown") is None
    assert len(book._found) == 3


def test_a_shadow_key_is_alone_in_shadow() -> None:
    """Others of its tier are refused as before."""
    book = TermsBook(published(shadow_keys=("k_shadow",)))
    assert [find(book, key).shadow for key in ("k_1", "k_shadow")] == [False, True]


def every_limit() -> list[Limit]:
    """One of each kind that people expect."""
    return [
        Limit("requests", 60, 10, ""),
        Limit("input_tokens", 600, 100, ""),
        Limit("output_tokens", 60, 100, "", ceiling_per_minute=90, ceiling_burst=300),
        Limit("concurrency", 0, 4, ""),
        Limit("output_tokens", 0, 5_000, "", per="org", window="5h"),
        Limit("output_tokens", 0, 9_000, "", per="org", window="week"),
        Limit("requests", 600, 100, "", per="model"),
    ]


def test_every_combination_of_limits_is_charged_told_and_read() -> None:
    """Any of them may be unset: those that are set are charged in their order, told in headers and at /v1/limits."""
    for count in range(len(every_limit()) + 1):
        for chosen in combinations(every_limit(), count):
            terms = find(TermsBook(published(limits=chosen, borrow_up_to=1000)))
            charges = charges_for(RECORD.id, terms, USAGE, 5)
            cell = Cell()
            cell.configure(charges, 1, 0)
            answer = cell.admit("r", charges, 1, 1_000, 60_000_000_000)
            assert isinstance(answer, Admitted)
            assert [room.limit for room in rooms(terms, answer)] == list(chosen)
            body = limits_body(RECORD, terms, cell.peek(key_charges(RECORD, terms), 60_000_000_000))
            assert [(told["name"], told["per"], told["window"]) for told in body["limits"]] == [
                (limit.name, limit.per, limit.window) for limit in chosen
            ]
            for told, limit in zip(body["limits"], chosen, strict=True):
                cost = {"requests": 1, "input_tokens": 8, "output_tokens": 20, "concurrency": 1}[limit.name]
                assert told["remaining"] == limit.burst - cost
                assert ("reset_at" in told) == (limit.window != "minute")
                assert told.get("ceiling", {}).get("remaining") == (280 if limit.ceiling_burst else None)


def test_limits_tell_the_colour() -> None:
    """A caller that has used up what is assured sees that it borrows."""
    limit = Limit("output_tokens", 60, 20, "", ceiling_per_minute=90, ceiling_burst=300)
    terms = find(TermsBook(published(limits=(limit,), borrow_up_to=1000)))
    cell = Cell()
    before = limits_body(RECORD, terms, cell.peek(key_charges(RECORD, terms), 0))
    cell.admit("r", charges_for(RECORD.id, terms, USAGE, 5), 1, 1_000, 0)
    after = limits_body(RECORD, terms, cell.peek(key_charges(RECORD, terms), 0))
    assert (before["colour"], after["colour"]) == ("green", "borrowing")


def test_limits_that_cannot_be_counted_are_refused_whole() -> None:
    """A publication beyond what the meter counts exactly is found when it is read, not by a caller."""
    check_countable(published(LimitRule("output_tokens", 100, keys=("k_1",))))
    with pytest.raises(ValueError, match="output_tokens"):
        check_countable(published(LimitRule("output_tokens", 2**53, keys=("k_1",))))
    with pytest.raises(ValueError, match="output_tokens"):
        check_countable(published(limits=(Limit("output_tokens", 1, 2**50, ""),)))


def pool_of(runs: tuple[tuple[int, int], ...], *rates: float) -> PublishedPool:
    """The test pool with two kinds of replica, which differ in their slots, and a replica for each rate."""
    pool = publication(["http://a"]).pools[0]
    (kind,) = pool.groups
    other = msgspec.structs.replace(kind, limits=msgspec.structs.replace(kind.limits, max_num_seqs=7))
    named = tuple(PublishedReplica(f"http://{i}", "H100", "p", 1.0, rate) for i, rate in enumerate(rates))
    return msgspec.structs.replace(pool, replicas=named, groups=(kind, other), runs=runs)


def test_replicas_are_told_apart_by_their_runs() -> None:
    """Runs of one group are put together, wherever they stand; a replica that serves nothing is in none."""
    fleet = fleet_of(pool_of(((1, 2), (0, 1), (1, 1)), 3.0, 0.0, 1.0, 3.0))
    told = {each.kind.limits.max_num_seqs: [replica.url for replica in each.replicas] for each in fleet if each.kind}
    assert told == {7: ["http://0", "http://3"], 256: ["http://2"]}
    assert all(each.kind and each.kind.count == 1 for each in fleet)
    assert len(fleet_of(pool_of(((0, 1), (1, 1)), 0.0, 1.0))) == 1


@pytest.mark.parametrize("runs", [(), ((0, 1),), ((0, 3),), ((0, 1), (2, 1)), ((-1, 2),), ((0, 3), (1, -1))])
def test_replicas_of_which_the_kind_is_not_told_are_as_one(runs: tuple[tuple[int, int], ...]) -> None:
    """A publication without runs, or with some that do not fit, is served all the same, by the replicas' weights."""
    ((pool, kind, replicas),) = fleet_of(pool_of(runs, 1.0, 2.0))
    assert (pool, kind, [replica.url for replica in replicas]) == (MODEL, None, ["http://0", "http://1"])


def test_a_publication_of_before_there_were_runs_is_read() -> None:
    """Gateways and controllers are replaced one by one: what is missing is not known, what is new is passed over."""
    document = msgspec.to_builtins(publication(["http://a", "http://b"]))
    del document["pools"][0]["runs"]
    document["pools"][0]["later"] = 1
    read = msgspec.convert(document, Publication)
    (among,) = find(TermsBook(read)).fleet
    assert among.kind is None
    assert len(among.replicas) == 2
