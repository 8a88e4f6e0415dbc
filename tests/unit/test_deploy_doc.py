"""docs/deploy.md holds: what it names is there, its values render, and its commands are those of the real tools."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import helm_python
import msgspec
import pytest
import typer
import yaml
from typer.core import TyperGroup

from ratelimit.cli import app
from serving.engine.command import EngineSpec, engine_argv
from serving.profile import dump_profile, load_profile
from tests.support import chart
from tests.support.chart import Manifest
from tests.support.commands import options, read_page
from tests.support.dockerfile import parse
from tests.support.netpol import Peer, reaches

REPOSITORY = Path(__file__).parents[2]
TEXT = (REPOSITORY / "docs" / "deploy.md").read_text()
#: What the reader has set when the page says so, beside what the page itself exports.
VARIABLES = {"KEY": "pn-key", "HF_TOKEN": "hf-token", "REDIS_PASSWORD": "password"}
PAGE = read_page(TEXT, VARIABLES)
JOB_FILE = "charts/penstock/examples/measure-job.yaml"
JOB: Manifest = yaml.safe_load((REPOSITORY / JOB_FILE).read_text())
STATE_POD: Manifest = yaml.safe_load((chart.CHART / "examples" / "state-pod.yaml").read_text())
#: Files that the reader makes by the page's own commands, or has.
MADE_BY_THE_READER = {"our-h200.json", "penstock-state.tar.gz", "january.csv", "ca.crt", "tls.crt"}
HELM_FLAGS = {
    "lint": {"--strict", "--values", "--set-file"},
    "template": {"--namespace", "--values", "--set-file", "--show-only"},
    "install": {"--namespace", "--values", "--set-file"},
    "upgrade": {"--namespace", "--values", "--set", "--set-file", "--install", "--wait", "--timeout"},
    "rollback": {"--namespace", "--wait", "--timeout"},
    "history": {"--namespace"},
    "uninstall": {"--namespace"},
    "test": {"--namespace", "--logs"},
}


def our_profile() -> bytes:
    """A profile as the page's Job makes one."""
    return dump_profile(msgspec.structs.replace(load_profile("h200-llama-3.1-8b"), name="our-h200"))


@pytest.fixture(autouse=True)
def _readers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests stand where the reader does: the repository beside the files that the page has made."""
    for name in ("charts", "docs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    for name, text in PAGE.files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "our-h200.json").write_bytes(our_profile())
    monkeypatch.chdir(tmp_path)


def values_of(command: Sequence[str]) -> dict[str, Any]:
    """The values that a helm command gives, files first, each as Helm's library reads it."""
    values: dict[str, Any] = {}
    for name in options(command, "--values"):
        values = chart.merged(values, helm_python.values_from_yaml(Path(name).read_text()))
    for setting in options(command, "--set"):
        values = chart.with_setting(values, setting)
    for setting in options(command, "--set-file"):
        values = chart.merged(values, helm_python.parse_set_file(setting))
    return values


@functools.cache
def rendered(*command: str) -> list[Manifest]:
    """What a helm command gives; to be read, not changed."""
    return chart.render(values_of(command))


def with_values() -> list[list[str]]:
    """The helm commands that render something."""
    return [command for command in PAGE.of("helm") if command[1] in ("lint", "template", "install", "upgrade")]


def penstock_commands() -> list[list[str]]:
    """Every `penstock` command of the page, also those inside `kubectl exec` and the Job."""
    containers = [*JOB["spec"]["template"]["spec"]["initContainers"], *JOB["spec"]["template"]["spec"]["containers"]]
    in_job = [[*one["command"], *one.get("args", ())] for one in containers if one["command"][0] == "penstock"]
    inside = [command[command.index("--") + 1 :] for command in PAGE.of("kubectl") if "--" in command]
    return [*PAGE.of("penstock"), *(command for command in inside if command[0] == "penstock"), *in_job]


def test_the_page_has_its_commands() -> None:
    """The reader of the page finds them at all, so that the tests below test something."""
    assert len(PAGE.of("kubectl")) > 25
    assert len(PAGE.of("helm", "install")) == 2
    assert {command[1] for command in penstock_commands()} >= {
        "keys",
        "limits",
        "measure",
        "engine",
        "profiles",
        "usage",
    }
    assert set(PAGE.files) == {"images.yaml", "site.yaml", "shared-claim.yaml"}


@pytest.mark.parametrize("command", with_values(), ids=lambda command: " ".join(command[1:9]))
def test_the_chart_renders_with_the_pages_values(command: list[str]) -> None:
    """Each helm command's values lint without a finding and give objects that Kubernetes takes."""
    values = values_of(command)
    assert chart.lint_findings(values) == []
    manifests = rendered(*command)
    newest = chart.KUBERNETES_VERSIONS[-1]
    assert [problem for manifest in manifests for problem in chart.schema_problems(manifest, newest)] == []
    images = {container["image"] for pod in chart.pods(manifests) for container in pod.containers}
    assert not [image for image in images if image.startswith("ghcr.io/penstock/")]


@pytest.mark.parametrize("command", PAGE.of("helm"), ids=lambda command: " ".join(command[1:9]))
def test_helm_knows_the_options(command: list[str]) -> None:
    """Only Helm's own subcommands and options, the release `penstock`, the chart of this tree."""
    subcommand, *rest = command[1:]
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= HELM_FLAGS[subcommand]
    names = [word for word in rest if word.startswith("charts/") and not word.endswith(".yaml")]
    assert names == (["charts/penstock"] if subcommand in ("lint", "template", "install", "upgrade") else [])
    assert subcommand == "lint" or "penstock" in rest
    for template in options(command, "--show-only"):
        assert (chart.CHART / template).exists()


@pytest.mark.parametrize("command", penstock_commands(), ids=lambda command: " ".join(command[1:9]))
def test_penstock_takes_the_command(command: list[str]) -> None:
    """The real command line parses it, to the last option; nothing is run."""
    take(command)


def test_an_option_that_a_command_has_not_is_found() -> None:
    """The test above looks as far as the options of subcommands."""
    take(["penstock", "keys", "create", "--org", "a", "--tier", "b"])
    for wrong in (["keys", "create", "--org", "a", "--colour", "b"], ["keys", "forge"], ["engine", "--profile", "x"]):
        with pytest.raises(Exception, match=r"No such|Missing"):
            take(["penstock", *wrong])


def take(command: list[str]) -> None:
    """Parse it as the command line does, running nothing. Raises the error that would be shown."""
    found: Any = typer.main.get_command(app)
    arguments, context = command[1:], None
    while isinstance(found, TyperGroup):
        context = found.make_context(command[0], arguments, parent=context)
        name, found, arguments = found.resolve_command(context, [*context._protected_args, *context.args])
        assert name
        assert found
    found.make_context(command[0], arguments, parent=context)


def test_every_file_that_is_named_exists() -> None:
    """Files in commands and links are in the tree, written by the page, or made by its reader."""
    words = {word for command in PAGE.commands for word in command}
    paths = {word.rpartition("=")[2] for word in words if re.search(r"\.(yaml|json|md|crt|gz|csv)$", word)}
    linked = {f"docs/{name}" for name in re.findall(r"\]\(([^):]+)\)", TEXT)}
    quoted = {f"charts/penstock/{name}" for name in re.findall(r"`(values-[\w-]+\.yaml)`", TEXT)}
    templates = {name for command in PAGE.of("helm") for name in options(command, "--show-only")}
    named = {path for path in paths | linked | quoted if not path.startswith("/")} - templates
    assert [path for path in sorted(named - MADE_BY_THE_READER) if not Path(path).exists()] == []
    assert (REPOSITORY / "tests/unit/test_deploy_doc.py").exists()


def test_what_is_built_are_the_dockerfiles_targets() -> None:
    """Every image that is pushed is built before, from a target that there is."""
    targets = {stage.name for stage in parse((REPOSITORY / "Dockerfile").read_text(), {"PATH": "/bin"})}
    built = PAGE.of("docker", "build")
    assert {target for command in built for target in options(command, "--target")} < targets
    tags = [tag for command in built for tag in options(command, "--tag")]
    assert tags == [command[2] for command in PAGE.of("docker", "push")]
    assert all(tag.rpartition(":")[0] in PAGE.files["images.yaml"] for tag in tags)


def test_kubectl_speaks_of_objects_that_the_chart_makes() -> None:
    """Each deployment, service, job and secret that a command names is rendered by some set of the page's values."""
    known = {
        f"{manifest['kind'].lower()}/{manifest['metadata']['name']}"
        for command in with_values()
        for manifest in rendered(*command)
    } | {f"job/{JOB['metadata']['name']}", f"pod/{STATE_POD['metadata']['name']}"}
    named = {
        word
        for command in PAGE.of("kubectl")
        for word in command
        if re.fullmatch(r"(deployment|service|job|pod)/\S+", word)
    }
    assert len(named) >= 5
    assert named <= known
    containers = {c["name"] for key in ("initContainers", "containers") for c in JOB["spec"]["template"]["spec"][key]}
    assert {name for command in PAGE.of("kubectl") for name in options(command, "--container")} <= containers


def test_secrets_that_values_refer_to_are_made_by_the_page() -> None:
    """Every Secret that a pod needs is made by a command of the page, or by the chart."""
    made = {command[command.index("generic") + 1] for command in PAGE.of("kubectl") if "generic" in command}
    for command in [*PAGE.of("helm", "install"), *PAGE.of("helm", "upgrade")]:
        manifests = rendered(*command)
        ours = {manifest["metadata"]["name"] for manifest in chart.of_kind(manifests, "Secret")}
        assert _secrets_of([pod.spec for pod in chart.pods(manifests)]) <= made | ours
    assert _secrets_of(JOB) <= made


def _secrets_of(value: object) -> set[str]:
    """The names of Secrets anywhere below, in environments and volumes."""
    if isinstance(value, list):
        return set().union(*map(_secrets_of, value))
    if not isinstance(value, dict):
        return set()
    own = {value["secretKeyRef"]["name"]} if "secretKeyRef" in value else set()
    own |= {value["secret"]["secretName"]} if "secretName" in (value.get("secret") or {}) else set()
    return own.union(*map(_secrets_of, value.values()))


@pytest.mark.parametrize("version", chart.KUBERNETES_VERSIONS)
def test_the_measuring_job_and_the_state_pod_are_valid(version: str) -> None:
    """Kubernetes takes them in every version that the chart is for."""
    for manifest in (JOB, STATE_POD, yaml.safe_load(PAGE.files["shared-claim.yaml"])):
        placed = manifest | {"metadata": manifest["metadata"] | {"namespace": "penstock"}}
        assert chart.schema_problems(placed, version) == []


def test_a_restart_of_the_engine_does_not_end_the_measurement() -> None:
    """Restarts of any container count against the Job's limit, which ends it with its pod."""
    assert JOB["spec"]["backoffLimit"] >= 6


def test_no_manifest_is_of_another_namespace_than_its_command() -> None:
    """`kubectl apply` refuses a file that contradicts its `--namespace`."""
    applied = [command for command in PAGE.of("kubectl") if "apply" in command and "-" not in command]
    assert len(applied) >= 3
    for command in applied:
        (file,), (namespace,) = options(command, "--filename"), options(command, "--namespace")
        for manifest in yaml.safe_load_all(Path(file).read_text()):
            assert manifest["metadata"].get("namespace", namespace) == namespace
            assert {"apiVersion", "kind"} <= manifest.keys()


def test_the_state_is_restored_where_the_controller_looks_for_it() -> None:
    """The pod has the claim and the user of the controller, and the folder that the archive is of."""
    manifests = chart.render(chart.values_of("virtual"))
    controller = chart.pod(manifests, "controller").spec
    (mount,) = [mount for mount in controller["containers"][0]["volumeMounts"] if mount["name"] == "state"]
    (container,) = STATE_POD["spec"]["containers"]
    assert mount in container["volumeMounts"]
    (state,) = [volume for volume in controller["volumes"] if volume["name"] == "state"]
    assert state in STATE_POD["spec"]["volumes"]
    assert STATE_POD["spec"]["securityContext"] == controller["securityContext"]
    folders = [folder for command in PAGE.of("kubectl") for folder in options(command, "--directory")]
    assert folders == [mount["mountPath"]] * 2


def test_the_sites_engines_reach_the_hub() -> None:
    """Production values keep engines from the internet; those of the page load their weights from there."""
    (command,) = [command for command in PAGE.of("helm", "install") if "site.yaml" in command]
    values = values_of(command)
    paths = [group["modelPath"] for group in values["engines"]]
    assert not any(path.startswith("/") for path in paths)
    policies = chart.of_kind(chart.render(values), "NetworkPolicy")
    engine = Peer("penstock", {"app.kubernetes.io/instance": "penstock", "penstock.io/role": "engine"}, {"http": 8000})
    assert reaches(policies, engine, Peer("outside", {}, {}), 443)


def test_a_setting_changes_one_entry_of_a_list() -> None:
    """As Helm itself does it, so that the page's second load meets three replicas of the group that was there."""
    (command,) = [
        c for c in PAGE.of("helm", "upgrade") if "engines[0].replicas=3" in c and "loadTest.enabled=true" in c
    ]
    before, values = chart.values_of("virtual")["engines"], values_of(command)
    assert values["engines"] == [before[0] | {"replicas": 3}, *before[1:]]
    assert values["loadTest"]["extraArgs"] == ["--scale", "0.125"]


def test_the_measured_engine_is_started_as_the_chart_starts_it() -> None:
    """The Job's vLLM has the arguments of its GPU's profile but for its address and the prefix cache."""
    engine, measure = JOB["spec"]["template"]["spec"]["initContainers"]
    path = engine["args"][0]
    spec = EngineSpec("gpu", "llama-3.1-8b", 8000, profile=load_profile("h200-llama-3.1-8b"), model_path=path)
    arguments = engine_argv(spec, None)[4:]
    assert engine["args"] == [word.replace("--enable-prefix", "--no-enable-prefix") for word in arguments]
    assert measure["args"][0] == spec.url
    assert engine["restartPolicy"] == "Always"
    (profile,) = JOB["spec"]["template"]["spec"]["containers"]
    assert profile["command"] == ["cat", measure["args"][measure["args"].index("--out") + 1]]


def test_the_measuring_job_can_write_what_it_writes() -> None:
    """Every container's root is read-only, its user is not root, and what it writes to is a volume."""
    spec = JOB["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    for container in [*spec["initContainers"], *spec["containers"]]:
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in spec["volumes"]}
    mounts = {mount["mountPath"] for container in spec["initContainers"] for mount in container["volumeMounts"]}
    assert {"/tmp", "/profiles", "/models", "/dev/shm"} <= mounts  # noqa: S108 - the container's own
