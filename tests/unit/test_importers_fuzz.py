from __future__ import annotations

import json
from copy import deepcopy
from importlib.resources import files
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.importers import Imported, ImporterError, import_results
from serving.profile import Fit
from tests.support.benchfiles import FAILED, SOUND, content

pytestmark = pytest.mark.slow

DOCUMENTS = {name: json.loads(content(name)) for name in (*SOUND, *FAILED)}
TABLES = {
    name: "\n".join((files("serving") / "profiles" / name).read_text().splitlines()[:6])
    for name in ("bench_serve_results.csv", "mlperf_rows.csv")
}
#: Values that tools have written, and worse.
STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(
        [0, -1, 1e308, 5e-324, 10**400, "inf", "", "nan", "\ud800", "\x1b[31m", [], {}, [None], {"avg": {}}]
    ),
    st.text(max_size=5),
)


def outcome(raw: bytes) -> Imported | ImporterError:
    """What the file is taken for, or how it is refused; nothing else may come out."""
    try:
        return import_results(raw, "fuzzed")
    except ImporterError as error:
        return error


def is_sound(found: Imported | ImporterError) -> bool:
    """Whether a refusal says something, and an import holds something that can be written down as JSON."""
    if isinstance(found, ImporterError):
        return bool(str(found))
    points = tuple(run.point for run in found.runs)
    again = msgspec.json.decode(msgspec.json.encode(Fit(points, 0.0, 0.0)), type=Fit)
    return bool(found.runs or found.anchors) and again.points == points and bool(msgspec.json.encode(found))


def mutated(draw: st.DrawFn, document: Any) -> Any:
    """The document with something in it replaced, removed, or moved elsewhere."""
    copy = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 4))):
        holder, key = _place(draw, copy)
        if isinstance(holder, dict) and draw(st.booleans()):
            del holder[key]
        else:
            holder[key] = deepcopy(draw(STRANGE))  # the samples are not to be mutated in their turn
    return copy


def _place(draw: st.DrawFn, node: Any) -> tuple[Any, Any]:
    """Some place in a nested document, near the top as often as far below."""
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = draw(st.sampled_from(keys))
        below = node[key]
        if not isinstance(below, dict | list) or not below or draw(st.integers(0, 3)) == 0:
            return node, key
        node = below


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_mutated_document_of_any_tool_gives_nothing_but_an_importer_error(data: st.DataObject) -> None:
    """Whatever was done to a file that a real tool wrote, no other exception comes out, and no unwritable point."""
    name = data.draw(st.sampled_from(sorted(DOCUMENTS)))
    document = data.draw(st.composite(lambda draw: mutated(draw, DOCUMENTS[name]))())
    assert is_sound(outcome(json.dumps(document).encode("utf-8")))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(TABLES)), st.data())
def test_a_mutated_table_gives_nothing_but_an_importer_error(name: str, data: st.DataObject) -> None:
    """The same of CSV: cells replaced, commas and quotes strewn in, lines cut."""
    text = TABLES[name]
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 30)))
        put_in = data.draw(st.one_of(STRANGE.map(str), st.sampled_from([",", '"', "\n", "\x00", "1e999", "-0", "1_0"])))
        text = text[:start] + put_in + text[end:]
    assert is_sound(outcome(text.encode("utf-8", "surrogatepass")))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_nothing_but_an_importer_error(raw: bytes) -> None:
    """Files of no tool at all."""
    assert is_sound(outcome(raw))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted((*SOUND, *FAILED))), st.integers(0, 10_000), st.binary(max_size=8))
def test_a_broken_file_gives_nothing_but_an_importer_error(name: str, at: int, put_in: bytes) -> None:
    """Cut short, or with bytes overwritten, as a full disk or a bad copy leaves it."""
    raw = content(name)[:20_000]
    assert is_sound(outcome(raw[: at % len(raw)] + put_in))
