"""Rows of MLPerf Inference results, as output tokens a second: anchors, never points. Pure.

A row states one rate at one load, and neither latencies, nor input tokens, nor steps. No step time follows from it; it
can anchor an estimate (``serving.estimate``) or check a measured profile. MLPerf counts output tokens only.
"""

from __future__ import annotations

from collections.abc import Mapping

from serving.importers.checks import check_flags
from serving.importers.results import Anchor, RunRefusedError
from serving.importers.table import typed
from serving.pointchecks import RATE_TOLERANCE

TOOL = "MLPerf rows"
SIGNATURE = frozenset({"gpu", "gpus", "model", "scenario", "output_tok_s", "result_id"})
NUMERIC = ("gpus", "nodes", "output_tok_s", "output_tok_s_per_gpu")


def anchor_of(row: Mapping[str, str | None]) -> Anchor:
    """One row. Raises ``RunRefusedError``."""
    check_flags(row.items())
    values = typed(row, NUMERIC)
    gpus, total_per_s = values.count("gpus"), values.positive("output_tok_s")
    if gpus < 1:
        raise RunRefusedError("gpus is 0, and its rate is of at least one; give the system's accelerators")
    per_s = total_per_s / gpus
    stated_per_s = values.optional("output_tok_s_per_gpu")
    if stated_per_s is not None and abs(stated_per_s - per_s) > RATE_TOLERANCE * per_s:
        raise RunRefusedError(
            f"output_tok_s_per_gpu is {stated_per_s:g}, but {total_per_s:g} tokens/s of {gpus} GPUs make {per_s:.4g} "
            f"each; one of them has another denominator, so take both from the same result"
        )
    gpu, model = values.text("gpu"), values.text("model")
    if not gpu or not model:
        raise RunRefusedError("it names no gpu or no model; an anchor is of one model on one GPU type")
    named = ", ".join(
        filter(None, (gpu, model, *(values.text(key) for key in ("scenario", "weight_dtype", "software"))))
    )
    result = " ".join(filter(None, ("MLPerf Inference", values.text("round"), values.text("result_id"))))
    submitter = values.text("submitter")
    text = f"{result} ({', '.join(filter(None, (submitter, named)))}): {per_s:g} output tokens/s per GPU"
    return Anchor(gpu=gpu, model=model, output_tokens_per_s_per_gpu=per_s, text=text)
