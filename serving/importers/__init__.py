"""Results of other benchmark tools, as this project's measured points. Pure: bytes in, values out.

Each importer reads one format that a real tool writes, and refuses what it cannot vouch for: a run without a success,
totals and rates that contradict each other, a latency in another unit.
"""

from __future__ import annotations

from serving.importers.detect import import_results
from serving.importers.results import Anchor, Imported, ImporterError, Refusal, Run, Subject

__all__ = ["Anchor", "Imported", "ImporterError", "Refusal", "Run", "Subject", "import_results"]
