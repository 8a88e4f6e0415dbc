"""Files that benchmark tools wrote, as ``tests/data/README.md`` tells."""

from __future__ import annotations

import gzip
from pathlib import Path

DATA = Path(__file__).parents[1] / "data"
#: Files of which every run is sound.
SOUND = (
    "vllm/closed_loop.json",
    "vllm/open_loop.json",
    "vllm/detailed.json",
    "guidellm/sweep.json.gz",
    "guidellm/concurrent.json.gz",
    "aiperf/profile_export_aiperf.json",
)
#: Files of runs in which much or everything failed.
FAILED = (
    "vllm/all_failed.json",
    "vllm/some_failed.json",
    "guidellm/all_failed.json.gz",
    "aiperf/some_failed.json",
)
#: Runs of one server with four mixes, at unlike loads.
FITTING = tuple(sorted(path.name for path in (DATA / "vllm").glob("fit_*.json")))


def content(name: str) -> bytes:
    """What the tool wrote."""
    raw = (DATA / name).read_bytes()
    return gzip.decompress(raw) if name.endswith(".gz") else raw


def file_name(name: str) -> str:
    """The name under which the tool wrote it."""
    return Path(name).name.removesuffix(".gz")
