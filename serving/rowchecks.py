"""What cannot be true of a benchmark's row: as of any run (``pointchecks``), and of what only a row states. Pure.

Each check gives one sentence, what is wrong and how to mend it, or None.
"""

from __future__ import annotations

from serving import pointchecks
from serving.benchrows import BenchRow, points_of
from serving.gpus import GpuFacts, ModelFacts, WeightDtype
from serving.pointchecks import StatedRate, point_problems

#: Rates are printed with two decimals.
PRINTED_STEP = 0.005

ENGINES = ("vllm", "sglang", "tensorrt-llm")


def row_problem(row: BenchRow) -> str | None:
    """The first contradiction within the row; None where there is none."""
    own = _engine(row) or _peak(row)
    if own is not None:
        return own
    (point,) = points_of([row])
    return next(point_problems(point, _rates(row)), None)


def beyond_peak(row: BenchRow, gpu: GpuFacts, gpus: int, model: ModelFacts, dtype: WeightDtype) -> str | None:
    """Whether the tokens would need more arithmetic than the GPUs have."""
    (point,) = points_of([row])
    return pointchecks.beyond_peak(point, gpu, gpus, model, dtype)


def _engine(row: BenchRow) -> str | None:
    ends_in = row.text["section"].rpartition(">")[2].strip().lower()
    if ends_in in ENGINES and ends_in != row.served.engine.lower():
        return f"section is of {ends_in}, engine says {row.served.engine}: correct engine and serve_command"
    return None


def _peak(row: BenchRow) -> str | None:
    """The column counts requests that were in flight; the bound of a loop, as tools state it, may be any."""
    most, requests = row.numbers["peak_concurrency"], row.number("requests")
    if most is not None and most > requests:
        return f"peak_concurrency is {most:g} with {requests:g} requests: no more can be in flight than there are"
    return None


def _rates(row: BenchRow) -> tuple[StatedRate, ...]:
    requests, inputs, outputs = (row.number(column) for column in ("requests", "input_tokens", "output_tokens"))
    totals = {"req_s": requests, "output_tok_s": outputs, "total_tok_s": inputs + outputs}
    return tuple(StatedRate(column, row.numbers[column], total, PRINTED_STEP) for column, total in totals.items())
