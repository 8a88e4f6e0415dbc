"""Mutants of ``ratelimit/scripts``: any of them makes Redis differ from the model."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_SAME = "tests/integration/test_store_model.py::test_obligation_05_the_scripts_equal_the_model"
_ANY_CALLS, _CROWD = _SAME + "[any-calls]", _SAME + "[crowd]"


def _mutant(rule: str, script: str, old: str, new: str, test: str = _ANY_CALLS) -> Mutant:
    return Mutant(rule, f"ratelimit/scripts/{script}.lua", old, new, test)


MUTANTS = (
    _mutant("meter 1: time never moves back", "admit", "        if elapsed > 0 then", "        if elapsed ~= 0 then"),
    _mutant("meter 1: an older epoch is not adopted", "admit", "if epoch >= bucket[EPOCH] then", "if true then"),
    _mutant(
        "meter 1: leak at the stored rate",
        "admit",
        "level - elapsed * bucket[RATE], tick + elapsed",
        "level - elapsed * rate, tick + elapsed",
    ),
    _mutant(
        "meter 1: a window opens at its first use",
        "admit",
        "level > 0 and tick + windows * window_us or max(tick, now_us)",
        "tick + windows * window_us",
    ),
    _mutant(
        "meter 2: a request larger than the bucket waits for it to be empty",
        "admit",
        "(cost < allowed and allowed - cost or 0) * per_token",
        "(allowed - cost) * per_token",
    ),
    _mutant("meter 2: a capacity of 0 admits nothing", "admit", " or (allowed == 0 and cost > 0) then", " then"),
    _mutant(
        "meter 3: a borrower must fit what is shared",
        "admit",
        "if not known and not (plain_fits and (green or shared_fits)) then",
        "if not known and not plain_fits then",
    ),
    _mutant(
        "meter 3: what has no assured share is not green where it may borrow",
        "admit",
        "local green = assured_fits and (has_assured or not has_pool)",
        "local green = assured_fits",
    ),
    _mutant(
        "meter 3: a borrower fills its part of the pool only",
        "admit",
        "    local allowed = capacity\n    if borrow_up_to ~= THOUSANDTHS then",
        "    local allowed = capacity\n    if false then",
    ),
    _mutant(
        "meter 3: parts of a large capacity are exact",
        "admit",
        "    local allowed = capacity\n",
        "    local allowed = floor(capacity * borrow_up_to / THOUSANDTHS)\n",
        "tests/integration/test_store_model.py::test_the_largest_capacities_are_counted_exactly",
    ),
    _mutant(
        "meter 3: a counted pool refuses nothing",
        "admit",
        "local told = role ~= COUNTED and told_wait_us",
        "local told = told_wait_us",
    ),
    _mutant(
        "meter 4: a denial charges nothing",
        "admit",
        "local admitted, written = not named and not known, not known",
        "local admitted, written = not known, not known",
    ),
    _mutant(
        "meter 4: the same request gets the same answer", "admit", "elseif holds >= 0 then", "elseif holds < 0 then"
    ),
    _mutant(
        "meter 4: borrowed work is not charged to the assured bucket",
        "admit",
        "if admitted and (green or role ~= ASSURED) then",
        "if admitted then",
    ),
    _mutant(
        "meter 5: the wait is not a tick too short",
        "admit",
        "return min(ceil(level / bucket[RATE]), LONGEST_WAIT_US / bucket[KIND])",
        "return min(floor(level / bucket[RATE]), LONGEST_WAIT_US / bucket[KIND])",
    ),
    _mutant(
        "meter 5: the longest wait is told",
        "admit",
        "if not plain or told > plain_wait then\n          plain",
        "if true then\n          plain",
    ),
    _mutant(
        "meter 5: a borrower waits for whichever comes first",
        "admit",
        "if assured and assured_wait <= first_wait then",
        "if assured and assured_wait > first_wait then",
    ),
    _mutant(
        "meter 5: a borrower is told its assured bucket",
        "admit",
        "return false, assured or shared, first, first_wait",
        "return false, shared, first, first_wait",
    ),
    _mutant(
        "meter 6: refused callers stand in a line",
        "admit",
        "next_in_line <= exact + SPREAD_US / kind and next_in_line or exact) * kind",
        "next_in_line <= exact + SPREAD_US / kind and exact or exact) * kind",
        _CROWD,
    ),
    _mutant(
        "meter 6: a promise is of the promised one's own cost",
        "admit",
        "due + ticks_to_leak(bucket, min(charge[C_COST], capacity) * MINUTE_US / kind)",
        "due + ticks_to_leak(bucket, MINUTE_US / kind)",
        _CROWD,
    ),
    _mutant(
        "meter 6: debt of an oversized one is waited for",
        "admit",
        "bucket[DUE] = floor((now_us + wait) / kind) + ticks_to_leak(bucket, debt)",
        "bucket[DUE] = floor((now_us + wait) / kind)",
        _CROWD,
    ),
    _mutant(
        "meter 6: the line starts anew when all in it were admitted",
        "admit",
        "        due_tick = waiting > 0 and due_tick or 0\n",
        "",
        _CROWD,
    ),
    _mutant(
        "meter 6: strangers stand in no line",
        "admit",
        "if kind > 0 and (begins == KEY_SCOPE or begins == ORG_SCOPE) then",
        "if kind > 0 then",
    ),
    _mutant(
        "meter 6: the line starts anew when its end has passed",
        "admit",
        "if bucket[DUE] <= tick then",
        "if false then",
        _CROWD,
    ),
    _mutant(
        "meter 6: the line is never longer than the spread",
        "admit",
        "exact < next_in_line and next_in_line <= exact + SPREAD_US / kind and",
        "exact < next_in_line and",
        _CROWD,
    ),
    _mutant("meter 7: a lost pool starts full", "admit", "role >= POOL and limit * per_token or 0", "0"),
    _mutant("meter 7: also for what is charged unasked", "rules", "charge[C_ROLE] >= POOL and", "false and"),
    _mutant("meter 1: unasked charges leak too", "rules", "    leak(bucket)\n", ""),
    _mutant(
        "cell 1: a hold is what was last reported",
        "extend",
        "    hold[HELD], hold[AT_REAP] = charge[C_COST], charge[C_AT_REAP]\n",
        "",
    ),
    _mutant("cell 1: a report renews the lease", "extend", "lease(request_id, now_us + lease_ms * 1000)\n", ""),
    _mutant(
        "cell 2: the first settlement wins",
        "settle",
        "if record and record.phase == SETTLED then\n  return 0\nend\n",
        "",
    ),
    _mutant(
        "cell 2: a settlement gives gauges back",
        "settle",
        "if record and record.phase == OPEN then\n  shift_gauges(record, -1)\nend\n",
        "",
    ),
    _mutant(
        "cell 2: a level is never below 0",
        "rules",
        "min(max(bucket[LEVEL] + amount, 0), EXACT - 1)",
        "min(bucket[LEVEL] + amount, EXACT - 1)",
    ),
    _mutant(
        "cell 3: the end of a lease leaves at_reap",
        "reaping",
        "refund(hold, hold[HELD] - hold[AT_REAP])",
        "refund(hold, hold[HELD])",
    ),
    _mutant("cell 3: gauges end with the lease", "reaping", "  shift_gauges(record, -1)\n", ""),
    _mutant(
        "cell 3: a late report opens it again",
        "extend",
        "if record.phase == REAPED then\n  shift_gauges(record, 1)\nend\n",
        "",
        _CROWD,
    ),
    _mutant(
        "cell 3: what is forgotten is told",
        "reaping",
        "  record_usage('expired', record.memo, 'held', cmsgpack.pack(held))\n",
        "",
    ),
    _mutant(
        "cell 4: an unknown request is charged at its settlement",
        "settle",
        "    charge_unasked(key, meter, charge, charge[C_COST])\n",
        "",
    ),
    _mutant("cell 4: an unknown request is not charged by a report", "extend", "  return 0\n", "  return 1\n"),
    _mutant(
        "cell 4: a settled request that is admitted late has paid",
        "admit",
        "local admitted, written = not named and not known, not known",
        "local admitted, written = not named, true",
    ),
    _mutant(
        "cell 5: no later window is credited",
        "reservations",
        "      amount = min(amount, bucket[DUE])\n",
        "",
    ),
    _mutant(
        "cell 5: what a window took over is given back to it",
        "reservations",
        "      amount = min(amount, bucket[DUE])\n",
        "      amount = 0\n",
    ),
    _mutant(
        "cell 5: and no more than that",
        "reservations",
        "      bucket[DUE] = bucket[DUE] - amount\n",
        "",
    ),
)
