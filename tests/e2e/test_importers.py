"""Results that the installed vLLM writes, imported as they are."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from serving.engine.launch import Engine, start_engines
from serving.importers import import_results
from serving.steady_points import unsteady_sign
from tests.support.engines import MODEL, profile_of, virtual_spec

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

STEP_S = 0.005
REPOSITORY = Path(__file__).parents[2]


class Served(NamedTuple):
    """A running engine, and the folder of its tokenizer."""

    engine: Engine
    tokenizer: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("engine")
    (engine,) = asyncio.run(start_engines([virtual_spec(profile_of(STEP_S))], folder, timeout_s=240))
    (tokenizer,) = (folder / "models").iterdir()
    yield Served(engine, tokenizer)
    asyncio.run(engine.stop())


def bench(served: Served, folder: Path, *options: str) -> bytes:
    """One run of `vllm bench serve`: 48 requests of 64 + 16 tokens, four at a time."""
    command = f"""
        {sys.executable} -m tests.support.vllm_bench --backend openai --base-url {served.engine.url}
        --endpoint /v1/completions --model {MODEL} --tokenizer {served.tokenizer} --dataset-name random
        --random-input-len 64 --random-output-len 16 --num-prompts 48 --max-concurrency 4 --ignore-eos --disable-tqdm
        --save-result --result-dir {folder} --result-filename result.json
    """
    subprocess.run([*command.split(), *options], cwd=REPOSITORY, check=True, timeout=120, capture_output=True)
    return (folder / "result.json").read_bytes()


@pytest.mark.parametrize("options", [("--seed", "1"), ("--seed", "2", "--save-detailed")])
def test_what_this_vllm_writes_is_imported(served: Served, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Plain and detailed: totals, the loop's bound, and times near the step time that the virtual GPU was given."""
    found = import_results(bench(served, tmp_path, *options), "result.json")

    (run,) = found.runs
    point = run.point
    assert (point.requests, point.output_tokens, point.concurrency, point.failed) == (48, 48 * 16, 4.0, 0)
    assert point.input_tokens == pytest.approx(48 * 64, rel=0.05)
    assert point.tpot_mean_s is not None
    assert point.tpot_mean_s > STEP_S
    assert unsteady_sign(point) is None
    assert (point.kv_token_steps is not None) == ("--save-detailed" in options)
