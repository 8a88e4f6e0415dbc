from __future__ import annotations

import msgspec
import pytest

from ratelimit.usage import EntryId, UsageRecord, ledger_line
from tests.support.usage import usage_record

ENTRY = EntryId(1_700_000_000_123, 4)


def memo() -> bytes:
    return msgspec.json.encode(usage_record("r1", outcome="unknown"))


def test_a_settled_record_is_kept_with_its_cell_and_entry() -> None:
    """What the gateway wrote stays as it was, and can be told from every other line."""
    record = usage_record("r1", marks=("shadow",))

    line = ledger_line("llama", ENTRY, {b"record": msgspec.json.encode(record)})

    assert line is not None
    assert (line.cell, line.entry) == ("llama", "1700000000123-4")
    assert msgspec.convert(msgspec.structs.asdict(line), UsageRecord) == record


def test_what_expired_owes_what_stays_charged() -> None:
    """The memo tells whose it was; tokens and cost are those still charged, the time is when it was given up."""
    held = [("k:k_1:requests", 1), ("k:k_1:input_tokens", 70), ("k:k_1:output_tokens", 33), ("pool:work", 900)]

    line = ledger_line("llama", ENTRY, {b"expired": memo(), b"held": msgspec.msgpack.encode(held)})

    assert line is not None
    assert (line.id, line.key, line.outcome, line.time) == ("r1", "k_1", "expired", 1_700_000_000.123)
    assert (line.input_tokens, line.output_tokens, line.cost_us) == (70, 33, 900)


def test_a_limit_that_is_not_there_leaves_the_estimate() -> None:
    """Where a key has no token limit nothing is held of it, and the record keeps what the memo says."""
    line = ledger_line("llama", ENTRY, {b"expired": memo(), b"held": msgspec.msgpack.encode([("pool:work", 900)])})

    assert line is not None
    assert (line.input_tokens, line.output_tokens, line.cost_us) == (10, 5, 900)


def test_windows_and_ceilings_are_of_the_same_tokens() -> None:
    """A weekly window, a ceiling and an org's limit on one meter do not add up."""
    held = [("k:k_1:output_tokens.week", 33), ("k:k_1:output_tokens.ceiling", 33), ("o:acme:output_tokens", 33)]

    line = ledger_line("llama", ENTRY, {b"expired": memo(), b"held": msgspec.msgpack.encode(held)})

    assert line is not None
    assert line.output_tokens == 33


def test_what_expired_without_a_memo_is_nobodys() -> None:
    """A reservation that carried no record, as of a benchmark, leaves none."""
    assert ledger_line("llama", ENTRY, {b"expired": b"", b"held": b"\x90"}) is None


@pytest.mark.parametrize("fields", [{}, {b"record": b"{"}, {b"record": b"{}"}, {b"expired": memo(), b"held": b"\xc1"}])
def test_what_is_no_record_is_an_error(fields: dict[bytes, bytes]) -> None:
    """An entry that cannot be read is told, so that it can be set aside."""
    with pytest.raises(ValueError, match=r"has \[\]|missing|truncated|malformed|MessagePack"):
        ledger_line("llama", ENTRY, fields)


def test_entry_ids_are_ordered_by_number() -> None:
    """The 10th entry of a millisecond comes after the 9th."""
    assert EntryId.parse("5-9") < EntryId.parse("5-10") < EntryId.parse("5-10").after() < EntryId.parse("10-0")
    assert str(EntryId.parse("5-10")) == "5-10"
