"""What must not be done again is not: deriving after a change costs a small part of deriving at the start."""

from __future__ import annotations

from time import process_time

import pytest

from tests.bench.derive import bench_fleet, timed_knees

#: Measured: over 300 times. Below this something that is kept is computed again.
LEAST_GAIN = 20


@pytest.mark.slow
def test_a_lost_replica_costs_a_small_part_of_the_first_derivation() -> None:
    """With knees and costs kept, the limits after one replica is lost take at most a 20th of those at the start."""
    start = process_time()
    _, knees = timed_knees()
    fleet = bench_fleet(lambda name, promise: knees[name, promise])
    before = fleet.derived()
    first_s = process_time() - start
    after = fleet.after_a_loss()
    turns = []
    for groups in (after, fleet.groups, after):
        begun = process_time()
        now = fleet.derived(groups)
        turns.append(process_time() - begun)

    assert now.pools[0].usable_requests_per_s < before.pools[0].usable_requests_per_s
    assert min(turns) * LEAST_GAIN <= first_s
