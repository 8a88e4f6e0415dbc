"""Whatever a config file holds, it is taken or refused with problems; nothing else comes out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ratelimit.config import ConfigError, load_config, policy_of
from ratelimit.policy import Policy

TEXT = """\
state_dir: state
redis: redis://cache:6379/0
gateway: {host: 127.0.0.1, port: 80, admin_port: 9000, workers: 2, enforce: false, request_timeout_s: 30}
pools:
  - model: llama-3.1-8b
    slo: {ttft_ms: 500, tpot_ms: 30, percentile: 99}
    mix: {name: decode-heavy, scale: 0.5}
    default_max_output: 256
    spare_domains: 1
    engines:
      - {device: virtual, profile: h100-llama-3.1-8b, count: 2, slowdown: 10, port: 8100, extra_args: [seed]}
    replicas: [{url: http://gpu1:8001, profile: ./none.json}]
tiers:
  - {name: pro, share: 0.6, ceiling: 0.9, priority: 1, burst_s: 2}
orgs: [{name: acme, models: [llama-3.1-8b]}]
"""
#: The places between which a piece of the text is exchanged: words, marks and blanks.
EDGES = [0, *(match.start() for match in re.finditer(r"\b|[^\w\s]|\s", TEXT)), len(TEXT)]

scalars = st.one_of(
    st.integers().map(str),
    st.floats().map(repr),
    st.sampled_from(
        ["", "~", "null", ".inf", "-.nan", "1e999", "0x" + "f" * 5000, "9" * 5000, "1" + ":0" * 300 + ".0"]
    ),
    st.sampled_from(["~nosuch/x", "~/x.json", "/", "..", "http://[", "http://[::1", "x" * 300, "<<", "=", "%41"]),
    st.sampled_from(
        ['"\\0"', '"\\ud800/"', '"\\udcff"', "!!int ''", "!!float ''", "!!bool x", "!!binary x", "!!set {a}"]
    ),
    st.sampled_from(
        ["[]", "{}", "[[]]", "{a: [1]}", "2026-02-30", "2026-01-01T00:00:00+99:99", "!!timestamp x", "? a"]
    ),
    st.text(max_size=12),
)
edits = st.lists(st.tuples(st.integers(0, len(EDGES) - 1), st.integers(0, 3), scalars), min_size=1, max_size=3)


def edited(edits: list[tuple[int, int, str]]) -> str:
    """The text with some pieces exchanged, the last place first."""
    text = TEXT
    for place, pieces, scalar in sorted(edits, reverse=True):
        text = text[: EDGES[place]] + scalar + text[EDGES[min(place + pieces, len(EDGES) - 1)] :]
    return text


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "penstock.yaml"


def outcome(path: Path, content: bytes) -> Policy | ConfigError:
    """What a file of this content is taken for, or how it is refused."""
    path.write_bytes(content)
    try:
        return policy_of(load_config(path))
    except ConfigError as error:
        return error


def is_sound(found: Policy | ConfigError) -> bool:
    """Whether a refusal says what is wrong in the file, and a policy promises something, and nothing twice."""
    if isinstance(found, ConfigError):
        return bool(found.problems) and all("penstock.yaml" in problem for problem in found.problems)
    return bool(found.pools) and bool(found.tiers) and sum(tier.share for tier in found.tiers) <= 1 + 1e-9


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(edits=edits)
@example(edits=[(0, 0, 'state_dir: "\\0"\n')])
def test_a_damaged_config_is_refused_in_words(path: Path, edits: list[tuple[int, int, str]]) -> None:
    """A config with any pieces exchanged loads, or raises ``ConfigError``."""
    text = edited(edits).replace("./none.json", "h200-llama-3.1-8b")
    assert is_sound(outcome(path, text.encode(errors="replace")))


@settings(deadline=None, max_examples=50)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_refused_in_words(path: Path, content: bytes) -> None:
    """A file of any bytes loads, or raises ``ConfigError``."""
    assert is_sound(outcome(path, content))


@pytest.mark.parametrize("field", sorted(set(re.findall(r"(\w+): [^\s{\[]", TEXT))))
@settings(deadline=None, max_examples=25)
@given(scalar=scalars)
def test_any_value_of_a_field_is_refused_in_words(path: Path, field: str, scalar: str) -> None:
    """Each field with any scalar in its place loads, or raises ``ConfigError``."""
    text = re.sub(rf"\b{field}: [^\s,}}]+", lambda _: f"{field}: {scalar}", TEXT).replace(
        "./none.json", "h200-llama-3.1-8b"
    )
    assert is_sound(outcome(path, text.encode(errors="replace")))
