"""What passes between the scenario and its Locust process: a plan as one JSON file, records as JSON lines.

Kept free of Locust, since importing that patches the whole process.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from loadtests.results import LoadRun, RequestRecord

#: The environment variable that tells the locustfile where its plan is.
PLAN_VARIABLE = "PENSTOCK_LOAD_PLAN"


class PlannedCall(msgspec.Struct, frozen=True):
    """One request to send: when, with whose key, and how many words its prompt has."""

    index: int
    time_s: float
    key: str
    words: int
    output_tokens: int


class Plan(msgspec.Struct, frozen=True):
    """Everything one load needs. It holds secrets: keep its file private, and delete it.

    ``patience_s`` is how long after the last arrival answers are waited for; what is then still open is closed and
    recorded as cut. ``salt`` makes the prompts of this load unlike those of every other.
    """

    url: str
    model: str
    secrets: dict[str, str]
    calls: tuple[PlannedCall, ...]
    patience_s: float
    salt: str
    records_path: str


class Ending(msgspec.Struct, frozen=True):
    """The last line of the records: the load was run to its end."""

    peak_in_flight: int


def write_plan(plan: Plan, path: Path) -> None:
    """Write the plan, readable by us alone."""
    path.touch(mode=0o600)
    path.write_bytes(msgspec.json.encode(plan))


def read_plan(path: Path) -> Plan:
    """The plan that ``write_plan`` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=Plan)


def read_run(lines: list[bytes], calls: int) -> LoadRun:
    """The records of that many calls, in order of the schedule. Raises ``ValueError`` where lines lack."""
    if not lines:
        raise ValueError("the load left no records")
    ending = msgspec.json.decode(lines[-1], type=Ending)
    decoder = msgspec.json.Decoder(RequestRecord)
    records = sorted((decoder.decode(line) for line in lines[:-1]), key=lambda record: record.index)
    if [record.index for record in records] != list(range(calls)):
        raise ValueError(f"the {len(records)} records are not one for each of {calls} requests")
    return LoadRun(tuple(records), ending.peak_in_flight)
