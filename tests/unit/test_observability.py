"""Rules, alerts, dashboard and examples name what the service exports, and promtool agrees with what they say."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from math import floor
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from ratelimit.controllermetrics import ControllerMetrics
from ratelimit.gateway.demand import Outcome
from ratelimit.gateway.metrics import GatewayMetrics
from serving.health import ReplicaPhase
from tests.support.needed import pool_replicas_needed, replicas_needed
from tests.support.promql import Names, names_in

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "penstock"
PROMTOOL_TESTS = sorted((ROOT / "tests" / "data" / "promtool").glob("*.yaml"))
#: What Prometheus itself gives every target, and the metric that it makes of each.
OF_TARGETS = frozenset({"namespace", "job", "instance"})
OF_PROMETHEUS = {"up": OF_TARGETS}
#: The values of labels that rules may ask for, where the code says what they can be.
VALUES = {
    "outcome": frozenset(get_args(Outcome)),
    "phase": frozenset(get_args(ReplicaPhase)),
    "unit": frozenset({"requests", "input_tokens", "output_tokens"}),
}

Exported = dict[str, frozenset[str]]


class Said(NamedTuple):
    """An expression, and where it stands."""

    where: str
    expression: str


def _exposition(metrics: GatewayMetrics | ControllerMetrics) -> str:
    """What Prometheus reads once every metric has been touched."""
    for collector in vars(metrics).values():
        if isinstance(collector, MetricWrapperBase) and collector._labelnames:
            collector.labels(*("x" for _ in collector._labelnames))
    return generate_latest(metrics.registry).decode()


def _rules() -> list[dict[str, Any]]:
    return [r for g in yaml.safe_load((CHART / "files" / "rules.yaml").read_text())["groups"] for r in g["rules"]]


@pytest.fixture(scope="module")
def exported() -> Exported:
    """Every metric of the gateway, the controller and the recording rules, with its labels."""
    found: Exported = dict(OF_PROMETHEUS)
    for metrics in (GatewayMetrics(), ControllerMetrics()):
        for family in text_string_to_metric_families(_exposition(metrics)):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, OF_TARGETS) | frozenset(sample.labels)
    for rule in _rules():
        if "record" in rule:
            names = names_in(rule["expr"])
            found[rule["record"]] = names.listed or frozenset[str]().union(*(found[name] for name in names.metrics))
    return found


def _dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((CHART / "files" / "dashboard.json").read_text())
    return read


def _of_dashboard() -> Iterator[Said]:
    dashboard = _dashboard()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield Said(f"panel {panel['title']!r}", target["expr"])
    for annotation in dashboard["annotations"]["list"]:
        if "expr" in annotation:
            yield Said(f"annotation {annotation['name']!r}", annotation["expr"])
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert asked, variable["query"]
            yield Said(f"variable {variable['name']!r}", f"max by ({asked[2]}) ({asked[1]})")


def _of_examples() -> Iterator[Said]:
    for path in sorted((CHART / "examples").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            for trigger in document["spec"].get("triggers", ()) if "spec" in document else ():
                yield Said(path.name, trigger["metadata"]["query"])
            for rule in document.get("rules", {}).get("external", ()):
                yield Said(path.name, rule["seriesQuery"].replace('{__name__="', "").replace('", ', "{"))


def everything_said() -> list[Said]:
    """Every expression in rules, dashboard and examples."""
    rules = [Said(f"rule {rule.get('record') or rule['alert']}", rule["expr"]) for rule in _rules()]
    return [*rules, *_of_dashboard(), *_of_examples()]


def wrong_names(names: Names, exported: Exported) -> list[str]:
    """What an expression names that is not exported."""
    wrong = [f"no metric {name}" for name in names.metrics if name not in exported]
    known = frozenset[str]().union(*(exported.get(name, frozenset()) for name in names.metrics))
    wrong += [f"no label {label}" for label in names.listed - known]
    for metric, label, value in names.matchers:
        if label not in exported.get(metric, ()):
            wrong.append(f"no label {label} on {metric}")
        if label in VALUES and not set(value.split("|")) <= VALUES[label]:
            wrong.append(f"{label} is never {value}")
    return wrong


@pytest.mark.parametrize("said", everything_said(), ids=lambda said: said.where)
def test_only_what_is_exported_is_named(said: Said, exported: Exported) -> None:
    """A metric that was renamed, or a label that was dropped, would leave an alert silent and a panel empty."""
    assert wrong_names(names_in(said.expression), exported) == []


@pytest.mark.parametrize(
    "expression",
    [
        "penstock_no_such_metric",
        "penstock_requests",
        'penstock_requests_total{colour="red"}',
        "sum by (colour) (rate(penstock_requests_total[5m]))",
        'penstock_offered_mix_requests_total{outcome="refused"}',
        'penstock:replicas_needed{tier="pro"}',
        "histogram_quantile(0.9, sum by (le) (rate(penstock_added_latency_seconds_sum[5m])))",
    ],
)
def test_what_is_not_exported_is_found(expression: str, exported: Exported) -> None:
    """The check above would find each of these mistakes."""
    assert wrong_names(names_in(expression), exported)


def test_names_are_found_in_any_expression() -> None:
    """Functions, keywords, durations, variables and texts are no metrics."""
    found = names_in('sum by (a) (rate(m_total{b=~"x|y", c!="z{"}[$__rate_interval] offset 5m)) / on (a) n > 0 and o')
    assert found.metrics == {"m_total", "n", "o"}
    assert found.listed == {"a"}
    assert found.matchers == {("m_total", "b", "x|y"), ("m_total", "c", "z{")}


def test_the_examples_are_looked_at() -> None:
    """Both ways to scale are in the check."""
    assert {said.where for said in _of_examples()} == {"prometheus-adapter-values.yaml", "keda-scaledobject.yaml"}


def test_every_alert_says_what_to_do() -> None:
    """Each has a severity, texts, and a section of its own in the runbook, which has no others."""
    text = (ROOT / "docs" / "alerts.md").read_text()
    sections = {title.lower() for title in re.findall(r"^### (Penstock\w+)$", text, re.MULTILINE)}
    alerts = [rule for rule in _rules() if "alert" in rule]
    for alert in alerts:
        assert alert["labels"]["severity"] in {"critical", "warning"}
        assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
        assert alert["annotations"]["runbook_url"] == f"docs/alerts.md#{alert['alert'].lower()}"
    assert {alert["alert"].lower() for alert in alerts} == sections


def test_every_alert_is_tested_both_ways() -> None:
    """By promtool each fires where it should, and keeps quiet where it should."""
    fires: set[str] = set()
    quiet: set[str] = set()
    for path in PROMTOOL_TESTS:
        for test in yaml.safe_load(path.read_text())["tests"]:
            for asked in test["promql_expr_test"]:
                named = re.search(r'alertname=~?"([^"]+)"', asked["expr"])
                (fires if asked.get("exp_samples") else quiet).update(named[1].split("|") if named else ())
    assert fires == quiet == {rule["alert"] for rule in _rules() if "alert" in rule}


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    """Its ids are its own, its panels do not overlap, and its data source is the reader's to choose."""
    dashboard = _dashboard()
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    sources = {t["datasource"]["uid"] for panel in panels for t in panel.get("targets", ())}
    assert sources == {"${datasource}"}
    assert [v["type"] for v in dashboard["templating"]["list"]] == ["datasource", "query", "query"]


@pytest.fixture(scope="module")
def promtool() -> str:
    """Prometheus's own checker; CI must have it."""
    found = shutil.which("promtool")
    if found is None:
        why = "promtool is not on PATH; Debian's package prometheus has it"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    return found


def run(*argv: str) -> None:
    """Run promtool; what it says is the message where it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]


def test_promtool_takes_the_rules(promtool: str) -> None:
    """They are well formed, and their templates can be filled in."""
    run(promtool, "check", "rules", str(CHART / "files" / "rules.yaml"))


def test_promtool_takes_the_expressions_of_dashboard_and_examples(promtool: str, tmp_path: Path) -> None:
    """They are PromQL, once Grafana's own variables are replaced."""
    said = [*_of_dashboard(), *_of_examples()]
    rules = [
        {"record": f"e{i}", "expr": each.expression.replace("$__rate_interval", "5m")} for i, each in enumerate(said)
    ]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "said", "rules": rules}]}))
    run(promtool, "check", "rules", str(path))


def test_promtools_unit_tests_hold(promtool: str) -> None:
    """Each alert fires and keeps quiet as meant, and replicas needed are those worked out by hand."""
    assert len(PROMTOOL_TESTS) >= 6
    run(promtool, "test", "rules", *map(str, PROMTOOL_TESTS))


def test_the_rules_compute_what_the_formula_says(promtool: str, tmp_path: Path) -> None:
    """Forty pools drawn at random: Prometheus finds for each the replicas that the formula in Python finds."""
    draw = random.Random(5)
    series: list[dict[str, str]] = []
    needed: list[dict[str, Any]] = []
    of_pool: list[dict[str, Any]] = []
    for number in range(40):
        model = f'model="m{number}"'
        counts = [draw.randrange(0, 9) for _ in range(draw.randrange(1, 4))]
        adds = [float(draw.randrange(1, 64)) for _ in counts]
        demand, usable = draw.randrange(0, 400), float(draw.randrange(0, 400))
        series += [_steady(f'penstock_offered_mix_requests_total{{{model}, outcome="admitted"}}', demand * 60)]
        series += [_flat(f"penstock_usable_requests_per_second{{{model}}}", usable)]
        for i, (count, add) in enumerate(zip(counts, adds, strict=True)):
            series += [_flat(f'penstock_fleet_replicas{{{model}, gpu="g{i}"}}', count)]
            series += [_flat(f'penstock_replica_adds_requests_per_second{{{model}, gpu="g{i}"}}', add)]
            found = replicas_needed(count, demand, usable, add)
            needed += [{"labels": f'{{{model}, gpu="g{i}"}}', "value": _rounded(found)}]
        found = pool_replicas_needed(dict(enumerate(counts)), demand, usable, dict(enumerate(adds)))
        of_pool += [{"labels": f"{{{model}}}", "value": _rounded(found)}]
    asked = [
        {"expr": "round(penstock:replicas_needed, 0.001)", "eval_time": "10m", "exp_samples": needed},
        {"expr": "round(penstock:pool_replicas_needed, 0.001)", "eval_time": "10m", "exp_samples": of_pool},
    ]
    test = {"interval": "1m", "input_series": series, "promql_expr_test": asked}
    path = tmp_path / "test.yaml"
    rules = [str(CHART / "files" / "rules.yaml")]
    path.write_text(yaml.safe_dump({"rule_files": rules, "evaluation_interval": "1m", "tests": [test]}))
    run(promtool, "test", "rules", str(path))


def _rounded(value: float) -> float:
    """As ``round(v, 0.001)`` of PromQL does it: the last bits depend on the order of a sum."""
    return floor(value * 1000 + 0.5) / 1000


def _steady(series: str, per_minute: int) -> dict[str, str]:
    return {"series": series, "values": f"0+{per_minute}x12"}


def _flat(series: str, value: float) -> dict[str, str]:
    return {"series": series, "values": f"{value}x12"}
