"""Values that cannot be meant are refused before anything is installed, with a message that names them."""

from __future__ import annotations

from functools import reduce
from json import dumps
from re import MULTILINE, findall
from typing import Any

import pytest
from helm_python import HelmError
from yaml import safe_load

from tests.support import chart, chart_parts

VIRTUAL = chart.values_of("virtual")
MIXED = chart.values_of("mixed")


def _engine(changes: dict[str, Any], base: dict[str, Any] = VIRTUAL) -> dict[str, Any]:
    return chart.merged(base, {"engines": [chart.merged(base["engines"][0], changes), *base["engines"][1:]]})


def _refused(values: dict[str, Any]) -> str:
    with pytest.raises(HelmError) as caught:
        chart.render(values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"gatway": {}}, "additional properties 'gatway' not allowed", id="typo"),
        pytest.param({"gateway": {"replica": 2}}, "at '/gateway': additional properties 'replica'", id="deep typo"),
        pytest.param({"gateway": {"replicas": -1}}, "at '/gateway/replicas': minimum: got -1", id="negative"),
        pytest.param({"gateway": {"replicas": 1.5}}, "at '/gateway/replicas': got number, want integer", id="fraction"),
        pytest.param({"gateway": {"replicas": "2"}}, "at '/gateway/replicas': got string, want integer", id="string"),
        pytest.param({"controller": {"replicas": 3}}, "at '/controller/replicas': maximum: got 3, want 2", id="three"),
        pytest.param({"image": {"digest": "sha256:12"}}, "at '/image/digest': 'sha256:12' does not match", id="digest"),
        pytest.param({"image": {"pullPolicy": "always"}}, "at '/image/pullPolicy': value must be one of", id="enum"),
        pytest.param({"ingress": {"enabled": True}}, "at '/ingress/hosts': minItems: got 0, want 1", id="no host"),
        pytest.param({"commonLabels": {"a b": "c"}}, "at '/commonLabels': additional properties 'a b'", id="label"),
        pytest.param({"engines": [{"name": "h100"}]}, "at '/engines/0': missing properties 'model'", id="incomplete"),
        pytest.param({"profiles": {"ours": "{}"}}, "at '/profiles': additional properties 'ours'", id="profile"),
        pytest.param({"config": {"pool": []}}, "at '/config': additional properties 'pool' not allowed", id="config"),
        pytest.param({"config": {"tiers": []}}, "at '/config/tiers': minItems: got 0, want 1", id="no tier"),
        pytest.param({"config": None}, "missing property 'config'", id="no config"),
        pytest.param(
            {"networkPolicy": {"prometheus": {"monitoring": True}}},
            "at '/networkPolicy/prometheus': got object, want array",
            id="peers",
        ),
    ],
)
def test_the_schema_refuses_what_cannot_be_meant(changes: dict[str, Any], message: str) -> None:
    """Typos, wrong types, numbers out of range: each is named by its path."""
    assert message in _refused(chart.merged(VIRTUAL, changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu"}, "at '/engines/0/device': value must be one of 'gpu', 'virtual'"),
        ({"replicas": -2}, "at '/engines/0/replicas': minimum: got -2, want 0"),
        ({"slowdown": 0.5}, "at '/engines/0/slowdown': minimum: got 0.5, want 1"),
        ({"name": "H100"}, "at '/engines/0/name': 'H100' does not match pattern"),
        ({"modelPath": "/models/x"}, "at '/engines/0/modelPath'"),
        ({"device": "gpu"}, "at '/engines/0': missing property 'modelPath'"),
        ({"extraArgs": ["--scheduling-policy=fcfs"]}, "at '/engines/0/extraArgs/0'"),
        ({"shmSize": "lots"}, "at '/engines/0/shmSize'"),
        ({"resources": {"limits": {"memory": "3 GiB"}}}, "at '/engines/0/resources/limits/memory'"),
        ({"name": "h200"}, 'engines "h200" is there twice; give each group a name of its own'),
        ({"gpu": "H200"}, 'engines "h100": gpu is H200, but its profile "h100-llama-3.1-8b" was made for H100'),
        ({"profile": "h100-llama"}, 'engines "h100": there is no shipped profile "h100-llama"; there are'),
        ({"profile": "ours.json"}, 'engines "h100": profile "ours.json" is not in `profiles`'),
        ({"model": "gpt-oss-20b"}, 'engines "h100": no pool in config.pools has the model "gpt-oss-20b"'),
        (
            {"autoscaling": {"enabled": True, "minReplicas": 3, "maxReplicas": 2}},
            'engines "h100": autoscaling.minReplicas is 3, above maxReplicas 2',
        ),
        ({"slowdown": 20}, 'engines of model "llama-3.1-8b" have different slowdowns'),
    ],
)
def test_an_engine_group_that_cannot_run_is_refused(changes: dict[str, Any], message: str) -> None:
    """By the schema where one value is wrong, by the templates where two contradict each other."""
    assert message in _refused(_engine(changes))


def test_two_groups_of_one_gpu_type_are_not_scaled_by_one_number() -> None:
    """The metric counts the replicas of a model on a GPU type: two groups would each bring all that are needed."""
    scaled = {"enabled": True, "minReplicas": 1, "maxReplicas": 9}
    group = VIRTUAL["engines"][0]
    for first, second in ((scaled, None), (None, scaled), (scaled, scaled)):
        engines = [
            group | {"name": name} | ({"autoscaling": how} if how else {})
            for name, how in (("a", first), ("b", second))
        ]
        assert "counts all replicas of llama-3.1-8b on H100" in _refused(chart.merged(VIRTUAL, {"engines": engines}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controller": {"replicas": 2}}, "controller.replicas is 2, but both need the same state"),
        ({"redis": {"bundled": {"enabled": False}}}, "redis.external.existingSecret is empty"),
        ({"loadTest": {"enabled": True}}, "loadTest.model is empty"),
        ({"loadTest": {"enabled": True, "model": "m"}}, "loadTest.apiKey.existingSecret is empty"),
        (
            {"gateway": {"autoscaling": {"enabled": True, "minReplicas": 30}}},
            "gateway.autoscaling.minReplicas is 30, above maxReplicas 20",
        ),
        ({"profiles": {"ours.json": "not JSON"}}, 'profiles["ours.json"] is not a profile'),
    ],
)
def test_values_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    """What a schema cannot see, a template says."""
    if "profiles" in changes:
        changes = chart.merged(_engine({"profile": "ours.json"}), changes)
    assert message in _refused(chart.merged(VIRTUAL, changes))


def test_two_controllers_need_a_volume_that_both_can_mount() -> None:
    """ReadWriteMany, or an existing claim of which its owner says so."""
    for persistence in (
        {"accessModes": ["ReadWriteMany"]},
        {"existingClaim": "state", "existingClaimIsShared": True},
    ):
        values = chart.merged(VIRTUAL, {"controller": {"replicas": 2, "persistence": persistence}})
        assert chart.find(chart.render(values), "Deployment", "penstock-controller")["spec"]["replicas"] == 2
    values = chart.merged(VIRTUAL, {"controller": {"replicas": 2, "persistence": {"existingClaim": "state"}}})
    assert "existingClaimIsShared: true" in _refused(values)


@pytest.mark.parametrize(
    ("changes", "policy", "message"),
    [
        ({}, {}, None),
        ({"modelPath": "org/model"}, {}, "is fetched from a hub, but networkPolicy.egress.enginesToInternet is false"),
        ({"modelPath": "s3://weights/model"}, {}, "is fetched from a hub, but networkPolicy"),
        ({"modelPath": "org/model", "offline": True}, {}, None),
        ({"modelPath": "org/model"}, {"egress": {"enginesToInternet": True}}, None),
        ({"modelPath": "org/model"}, {"egress": {"enabled": False}}, None),
        ({"modelPath": "org/model"}, {"enabled": False}, None),
    ],
)
def test_weights_from_a_hub_need_the_way_to_it(
    changes: dict[str, Any], policy: dict[str, Any], message: str | None
) -> None:
    """An engine that the policy cuts from where its weights are would load forever."""
    group = {**MIXED["engines"][0], "offline": False} | changes
    values = chart.merged(MIXED, {"engines": [group], "networkPolicy": policy})
    if message is None:
        chart.render(values)
    else:
        assert message in _refused(values)


def test_a_claim_of_weights_is_mounted_read_only_where_that_is_said() -> None:
    """The other files of vLLM go to /tmp then, and only a claim that holds the weights can be so."""

    def values(changes: dict[str, Any]) -> dict[str, Any]:
        return chart.merged(MIXED, {"engines": [{**MIXED["engines"][0], "offline": False} | changes]})

    pod = chart.pod(chart.render(values({"modelCache": {"existingClaim": "models", "readOnly": True}})), "engine-h100")
    (container,) = pod.containers
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in container["volumeMounts"]
    (volume,) = [volume for volume in pod.spec["volumes"] if volume["name"] == "models"]
    assert volume["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert environment["HF_HOME"].startswith("/tmp/")  # noqa: S108 - the container's own
    assert environment["HF_HUB_CACHE"] == "/models/hub"
    assert "at '/engines/0/modelCache'" in _refused(values({"modelCache": {"hostPath": "/data", "readOnly": True}}))
    assert "at '/engines/0/modelCache'" in _refused(values({"modelCache": {"hostPath": "/a", "existingClaim": "b"}}))
    hub = {"modelCache": {"existingClaim": "models", "readOnly": True}, "modelPath": "org/model"}
    opened = chart.merged(values(hub), {"networkPolicy": {"egress": {"enginesToInternet": True}}})
    assert "is fetched from a hub, but modelCache.readOnly is true" in _refused(opened)


def test_no_replica_need_be_missing_while_engines_change() -> None:
    """0 is a number of its own, not the default's place; both 0 would never change anything."""
    values = _engine({"maxUnavailable": 0, "maxSurge": 1})
    rolling = chart.find(chart.render(values), "Deployment", "penstock-engine-h100")["spec"]["strategy"]
    assert rolling["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    for nothing in (0, "0%"):
        assert "maxUnavailable and maxSurge are both 0" in _refused(_engine({"maxUnavailable": nothing}))


def test_a_gpu_type_that_is_no_label_is_refused() -> None:
    """A profile may call its GPU anything; Kubernetes takes few characters."""
    profile = {"name": "ours", "model": "m", "gpu": "H100 SXM", "gpus_per_replica": 1, "limits": {"max_num_seqs": 1}}
    values = chart.merged(_engine({"profile": "ours.json"}), {"profiles": {"ours.json": dumps(profile)}})
    del values["engines"][0]["gpu"]
    assert 'the GPU type "H100 SXM" of its profile does not fit in a label' in _refused(values)


def test_a_pool_is_found_in_one_way_alone() -> None:
    """A `discover` of one's own beside engine groups of the chart would hide one of them."""
    values = chart.values_of("virtual")
    values["config"]["pools"][0]["discover"] = {"selector": "a=b", "profiles": ["h100-llama-3.1-8b"]}
    assert '"llama-3.1-8b" has a discover of its own and engine groups of the chart' in _refused(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gateway": {"enforced": False}}, "at '/config/gateway': additional properties 'enforced' not allowed"),
        ({"gateway": {"port": 80}}, "at '/config/gateway': additional properties 'port' not allowed"),
        ({"state_dir": "/tmp"}, "at '/config': additional properties 'state_dir' not allowed"),  # noqa: S108 - refused
        ({"tiers": [{"name": "pro", "share": 1.2}]}, "at '/config/tiers/0/share': maximum: got 1.2, want 1"),
        ({"pools": [{"modle": "m"}]}, "at '/config/pools/0': additional properties 'modle' not allowed"),
        ({"pools": [{"model": "m", "engines": []}]}, "at '/config/pools/0': additional properties 'engines'"),
    ],
)
def test_a_mistake_in_the_config_is_refused_before_it_is_installed(changes: dict[str, Any], message: str) -> None:
    """The schema knows the fields of penstock.yaml, and which of them are the chart's own business."""
    assert message in _refused(chart.merged(VIRTUAL, {"config": changes}))


def test_the_chart_knows_what_the_service_knows() -> None:
    """Its profiles and the schema of its config follow the code; `python -m tests.support.chart_parts` renews them."""
    assert chart_parts.outdated() == []


def test_the_readme_names_values_that_there_are() -> None:
    """Each value of its table is in values.yaml, and each values file too."""
    readme = (chart.CHART / "README.md").read_text()
    rows = findall(r"^\| (`.*?) \|", readme[readme.index("## Main values") :], flags=MULTILINE)
    named = [name for row in rows for name in findall(r"`([^`]+)`", row)]
    defaults = safe_load((chart.CHART / "values.yaml").read_text())
    for name in named:
        assert reduce(lambda part, key: part[key], name.split("."), defaults) is not None
    assert len(named) > 15
    assert {f"values-{name}.yaml" for name in chart.VALUES_FILES} == {
        path.name for path in chart.CHART.glob("values-*.yaml")
    }
