"""Adding and losing hardware, and what running it takes: every factor by hand."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from ratelimit.gateway.ledger import RENEWED_AFTER
from ratelimit.gateway.settings import GatewaySettings
from ratelimit.planning.document import RedisConfig
from ratelimit.planning.running import RENEWED_EACH_S, Power, Prices, Redis, cells, energy, power_problem
from ratelimit.planning.sites import Change, FleetError, Site, fleets, parse_changes, totals

OLD = Site("old", {"H100": 16, "H200": 8}, power_limit_w=50_000)
NEW = Site("new", {"GB200": 72}, joins=True)
POWER = Power({"H100": 700.0, "H200": 700.0, "GB200": 1200.0}, 1.5, 1.2)


def test_changes_are_read_as_people_write_them() -> None:
    """Several types, in one option or several, with a site or without."""
    assert parse_changes(["H200=1000, H100=8", "my site:B200=16"], -1) == [
        Change("H200", -1000),
        Change("H100", -8),
        Change("B200", -16, "my site"),
    ]


NO_CHANGES = ["H200", "H200=-5", "H200=0", "H200=1.5", "=5", "H200=nan", "H200=1e3", "H200=²", ""]
NO_COUNTS = ["H200=1__0", "H200=_1", "H200=1_", f"H200={'1' * 5000}"]


@pytest.mark.parametrize("text", [*NO_CHANGES, *NO_COUNTS])
def test_a_change_that_is_none_is_refused(text: str) -> None:
    """Counts are whole and above 0; adding and losing are told apart by the option."""
    with pytest.raises(FleetError, match="H200=1000"):
        parse_changes([text], 1)


def test_a_site_that_joins_is_not_there_before() -> None:
    """Without other changes the plan compares the fleet without and with the sites that join."""
    before, after, change = fleets([OLD, NEW], [])
    assert before == (OLD,)
    assert after == (OLD, NEW)
    assert change == "new joins"


def test_a_change_is_compared_with_the_whole_fleet() -> None:
    """Hardware goes where that type is, the last such site; a new type to the last site; losing is from there too."""
    changes = [Change("H100", -8), Change("GB200", 72), Change("B200", 8), Change("H200", 4, "new")]
    before, after, _ = fleets([OLD, NEW], changes)
    assert before == (OLD, NEW)
    assert [dict(site.gpus) for site in after] == [{"H100": 8, "H200": 8}, {"GB200": 144, "B200": 8, "H200": 4}]
    assert totals(after) == {"H100": 8, "H200": 12, "GB200": 144, "B200": 8}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Change("H100", -17), "cannot lose 17"),
        (Change("B200", -1), "no site has B200"),
        (Change("H100", 1, "elsewhere"), "no site 'elsewhere'"),
        (Change("H100", 10**11), "at most"),
    ],
)
def test_hardware_that_is_not_there_cannot_be_lost(change: Change, said: str) -> None:
    """More than there is, a type or a site that is not there: each is named with what there is."""
    with pytest.raises(FleetError, match=said):
        fleets([OLD, NEW], [change])


def test_power_is_boards_times_server_times_cooling() -> None:
    """24 boards of 700 W × 1.5 × 1.2 = 30.24 kW of 50 kW; without a limit there is no share of it."""
    found = energy([OLD, NEW], {}, POWER, Prices({"H100": 2.0, "H200": 3.0, "GB200": 5.0}, "EUR"))
    assert found.sites[0].site_w == pytest.approx(24 * 700 * 1.5 * 1.2)
    assert found.sites[0].share_of_limit == pytest.approx(0.6048)
    assert found.sites[1].share_of_limit is None
    assert found.cost_per_hour == 16 * 2 + 8 * 3 + 72 * 5
    assert found.cost_per_million_output_tokens is None


def test_too_much_power_is_a_problem_and_other_units_an_error() -> None:
    """Beyond its limit a site is told to cap its GPUs; a limit a thousand times off is asked for in megawatts."""
    tight = Site("tight", {"H100": 100}, power_limit_w=100_000.0)
    assert "79%" in (energy([tight], {}, POWER, Prices({}, "USD")).sites[0].problem or "")
    assert power_problem(tight, POWER) is None
    wrong = Site("wrong", {"H100": 100}, power_limit_w=100_000.0 * 1e3)
    assert "megawatts" in (power_problem(wrong, POWER) or "")


def test_a_price_that_is_missing_makes_the_cost_unknown() -> None:
    """Half a bill is none."""
    assert energy([OLD], {}, POWER, Prices({"H100": 2.0}, "USD")).cost_per_hour is None


def test_primaries_follow_from_calls() -> None:
    """1,000 admits + 1,000 × (1 settle + 1 + 20 s ÷ 5 s extends) = 7,000 calls/s ÷ (26,497 × 0.1) = 3 primaries."""
    found = cells(800.0, 1000.0, 20.0, 300, Redis(26_497, 0.1))
    assert found.calls_per_s == 7000
    assert found.redis_primaries == found.cells == 3
    assert found.gpus_per_primary == 100
    assert "7,000 calls/s" in found.arithmetic


def test_what_a_primary_is_planned_with_is_what_was_measured_and_what_runs() -> None:
    """Admissions a second are those of docs/bench.md, and a lease is renewed as often as the gateways do."""
    bench = (Path(__file__).parents[2] / "docs" / "bench.md").read_text()
    measured = re.search(r"\| admit, six buckets, with its reservation \| ([\d,]+) \|", bench)
    assert measured is not None
    assert int(measured[1].replace(",", "")) == RedisConfig().admits_per_s
    (lease,) = (field for field in msgspec.structs.fields(GatewaySettings) if field.name == "lease_s")
    assert pytest.approx(lease.default * RENEWED_AFTER) == RENEWED_EACH_S


def test_what_is_asked_in_vain_is_decided_too() -> None:
    """Refusals load Redis: more is asked than can be served, and the admits count."""
    assert cells(50_000.0, 1000.0, 20.0, 300, Redis(26_497, 1.0)).calls_per_s == 56_000
