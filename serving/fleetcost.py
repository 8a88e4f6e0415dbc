"""The cost of a mix on a large mixed fleet, for all its shapes at once: ``capacity`` in NumPy.

One row per kind of replica holds the rates 1/u(x) at which it alone could serve each shape x of the mix. What a fleet
of n_g replicas of kind g charges for x is then N / Σ n_g/u_g(x): one product of a vector with a matrix. Rows and
matrices are kept, and the products of some kinds each, so that a fleet that loses a replica costs one such product.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from serving.capacity import USABLE_KV_SHARE, InfeasibleSloError, ReplicaGroup, WorkloadMix

Vector = NDArray[np.float64]

#: Kinds whose rows are one matrix.
_TOGETHER = 64
#: 2,048 rows of a mix of 1,000 shapes are 16 MB, and so are 32 matrices of 64 such rows; a product is 8 kB.
_ROWS = 2048
_MATRICES = 32
_PRODUCTS = 256


def fleet_costs_s(fleet: Mapping[ReplicaGroup, int], mix: WorkloadMix) -> Vector:
    """``capacity.fleet_cost_s`` of every shape of the mix, in their order.

    ``fleet`` counts its replicas by their kind, which is a group of one.

    Raises ``ValueError`` for an empty fleet, and ``InfeasibleSloError`` where an empty step exceeds the TPOT bound.
    """
    count = sum(fleet.values())
    if count == 0:
        raise ValueError("an empty fleet serves nothing, so a request has no cost on it")
    kinds, counts = tuple(fleet), tuple(fleet.values())
    starts = range(0, len(kinds), _TOGETHER)
    served = np.add.reduce([_served(kinds[i : i + _TOGETHER], counts[i : i + _TOGETHER], mix) for i in starts])
    costs: Vector = count / served
    return costs


def clear_costs() -> None:
    """Forget all rows and matrices, as in a process that has just started."""
    replica_rates.cache_clear()
    _rate_matrix.cache_clear()
    _served.cache_clear()
    _lengths.cache_clear()


@lru_cache(maxsize=_ROWS)
def replica_rates(kind: ReplicaGroup, mix: WorkloadMix) -> Vector:
    """1/u of one replica for every shape of the mix, requests/s. ``capacity.replica_seconds``, vectorised."""
    step_time, limits, tpot_s = kind.step_time, kind.limits, kind.slo.tpot_s
    if step_time.base_s >= tpot_s:
        raise InfeasibleSloError(
            f"an empty step takes {step_time.base_s:.4g} s, the TPOT bound is {tpot_s:.4g} s: raise it"
        )
    inputs, outputs, cached = _lengths(mix)
    base, kv_token_steps = step_time.base_s, outputs * (inputs + outputs / 2)
    work = (
        step_time.prompt_token_s * (inputs - cached)
        + step_time.sequence_s * outputs
        + step_time.kv_token_s * kv_token_steps
    )
    bounds = (
        work / (1 - base / tpot_s),
        work + base * outputs / limits.max_num_seqs,
        work + base * kv_token_steps / (USABLE_KV_SHARE * limits.kv_tokens),
        work + base * (inputs - cached + outputs) / limits.max_num_batched_tokens,
    )
    rates: Vector = 1 / np.maximum.reduce(bounds)
    rates.setflags(write=False)
    return rates


@lru_cache(maxsize=_PRODUCTS)
def _served(kinds: tuple[ReplicaGroup, ...], counts: tuple[int, ...], mix: WorkloadMix) -> Vector:
    """The rates at which so many of each kind could serve every shape."""
    # Not by BLAS: its threads would make the order of the sum, and so the last digit, depend on the machine's load.
    served: Vector = np.einsum("g,gx->x", np.array(counts, dtype=np.float64), _rate_matrix(kinds, mix))
    served.setflags(write=False)
    return served


@lru_cache(maxsize=_MATRICES)
def _rate_matrix(kinds: tuple[ReplicaGroup, ...], mix: WorkloadMix) -> Vector:
    return np.stack([replica_rates(kind, mix) for kind in kinds])


@lru_cache(maxsize=64)
def _lengths(mix: WorkloadMix) -> tuple[Vector, Vector, Vector]:
    """Input, output and cached tokens of every shape."""
    columns = [(s.input_tokens, s.output_tokens, s.cached_tokens) for s in mix.shapes]
    inputs, outputs, cached = np.array(columns, dtype=np.float64).T
    return inputs, outputs, cached
