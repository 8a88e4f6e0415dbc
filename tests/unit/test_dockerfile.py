"""The Dockerfile, read: what its images are made of and run as."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import pytest

from tests.support.dockerfile import DockerfileError, Stage, is_sent, lineage, parse

REPOSITORY = Path(__file__).parents[2]
STAGES = parse((REPOSITORY / "Dockerfile").read_text(), {"PATH": "/usr/local/bin:/usr/bin:/bin"})
IGNORE = (REPOSITORY / ".dockerignore").read_text()
IMAGES = ("loadtest", "virtual-gpu", "penstock")


def stage_of(name: str) -> Stage:
    """The stage of that name."""
    return next(stage for stage in STAGES if stage.name == name)


def line_of(name: str) -> list[Stage]:
    """The image's stage and those that it is built FROM, bases first: every layer that a user pulls."""
    stage = stage_of(name)
    return [*(line_of(stage.base) if stage.base in {other.name for other in STAGES} else []), stage]


def test_the_targets_are_there_and_penstock_is_built_by_default() -> None:
    """`docker build .` makes the gateway's image."""
    assert set(IMAGES) < {stage.name for stage in STAGES}
    assert STAGES[-1].name == "penstock"


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_a_user_whose_number_says_that_it_is_not_root(image: str) -> None:
    """Kubernetes' runAsNonRoot refuses a user by name, whom it cannot tell from root."""
    user = stage_of(image).user.partition(":")[0]
    assert user.isdecimal()
    assert int(user) != 0


@pytest.mark.parametrize("image", IMAGES)
def test_a_final_image_has_no_compiler_and_no_package_cache(image: str) -> None:
    """No layer that is pulled installs a compiler or Python packages, or keeps what apt fetched."""
    commands = [step.text for stage in line_of(image) for step in stage.all("RUN")]
    assert not [text for text in commands if re.search(r"\b(gcc|g\+\+|clang|build-essential|python3?-dev)\b", text)]
    assert not [text for text in commands if re.search(r"\bpip3? .*\binstall\b", text.replace("uninstall", ""))]
    installing = [text for text in commands if "apt-get install" in text]
    assert all("--no-install-recommends" in text and "rm -rf /var/lib/apt/lists/*" in text for text in installing)


def test_bases_are_pinned_to_a_version() -> None:
    """No base is `latest` or untagged, which would be another image tomorrow."""
    names = {stage.name for stage in STAGES}
    bases = {stage.base for stage in STAGES} - names
    assert bases
    for base in bases:
        tag = base.rpartition("@sha256:")[0] or base
        assert re.search(r":[\w.-]*\d+\.\d+[\w.-]*$", tag), base


def test_pip_keeps_no_cache_builds_nothing_and_takes_hashes_where_a_lock_has_them() -> None:
    """Every installation of packages is from a lock or from our own wheel, and from wheels alone."""
    commands = [part for stage in STAGES for step in stage.all("RUN") for part in step.text.split("&&")]
    installs = [part for part in commands if re.search(r"\bpip .*\binstall\b", part.replace("uninstall", ""))]
    assert len(installs) >= 6
    for install in installs:
        assert "--no-cache-dir" in install, install
        assert "--only-binary :all:" in install or "dist/*.whl" in install, install
        for lock in re.findall(r"-r (\S+)", install):
            hashed = "--hash=" in (REPOSITORY / "requirements" / lock).read_text()
            assert hashed == ("--require-hashes" in install), install


def test_what_is_copied_exists_and_is_sent() -> None:
    """Each COPY's source is in the tree and not kept back by .dockerignore, or is a path of an earlier stage."""
    for stage in STAGES:
        earlier = [other.name for other in STAGES[: STAGES.index(stage)]]
        for copy in stage.all("COPY"):
            *sources, _ = copy.words
            if "from" in copy.flags:
                assert copy.flags["from"] in earlier
                continue
            for source in sources:
                assert (REPOSITORY / source).exists(), source
                assert is_sent(PurePosixPath(source), IGNORE), source


KEPT_BACK = (
    ".git/config",
    ".venv/bin/python",
    "tests/conftest.py",
    "reports/demo/report.json",
    ".penstock/admin_token",
    "serving/__pycache__/profile.pyc",
    "charts/penstock/Chart.yaml",
)


@pytest.mark.parametrize("path", KEPT_BACK)
def test_nothing_else_is_sent(path: str) -> None:
    """Neither tests, nor history, nor anybody's state and reports reach a build."""
    assert not is_sent(PurePosixPath(path), IGNORE)


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_says_what_it_is_and_how_it_is_stopped(image: str) -> None:
    """OCI labels with the package's version, a signal, and a command in exec form, which is sent that signal."""
    steps = [step for stage in line_of(image) for step in stage.steps]
    labels = dict(word.split("=", 1) for step in steps if step.instruction == "LABEL" for word in step.words)
    version = re.search(r'^version = "(.+)"$', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert labels["org.opencontainers.image.version"] == version[1]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.title"]
    assert [step.text for step in steps if step.instruction == "STOPSIGNAL"] == ["SIGTERM"]
    for instruction in ("ENTRYPOINT", "CMD"):
        last = stage_of(image).last(instruction)
        assert last
        assert last.text.startswith("[")


def test_writes_go_where_a_read_only_root_lets_them() -> None:
    """Home and working directory are /tmp, and Python writes no bytecode beside its modules."""
    for image in IMAGES:
        stage = stage_of(image)
        assert (stage.environment["HOME"], stage.workdir) == ("/tmp", "/tmp")  # noqa: S108 - the container's own
        assert stage.environment["PYTHONDONTWRITEBYTECODE"] == "1"


def test_only_the_virtual_gpu_has_vllm_and_only_the_load_test_scipy() -> None:
    """The gateway's image stays small: it is built from its own lock alone."""
    assert [stage.name for stage in lineage(STAGES, "penstock")] == ["build", "runtime", "penstock"]
    locks = {image: _locks(image) for image in IMAGES}
    assert locks["penstock"] == {"requirements/build.lock", "requirements/gateway.lock"}
    assert locks["loadtest"] - locks["penstock"] == {"requirements/loadtest.lock"}
    assert locks["virtual-gpu"] - locks["penstock"] == {"requirements/engine-cpu.lock"}


def _locks(image: str) -> set[str]:
    copies = [copy for stage in lineage(STAGES, image) for copy in stage.all("COPY")]
    return {word for copy in copies for word in copy.words if word.endswith(".lock")}


@pytest.mark.parametrize(
    "text", ["FROM a:1 AS b\nADD https://example.com/x /x\n", "RUN true\n", "FROM a:1 AS b\nUSER $WHO\n"]
)
def test_the_reader_refuses_what_it_does_not_know(text: str) -> None:
    """An ADD, a step before any stage, and a variable without a value are errors, not skipped."""
    with pytest.raises(DockerfileError):
        parse(text, {})


def test_a_stage_inherits_the_environment_of_its_base_but_not_its_arguments() -> None:
    """As Docker does it: ENV goes on to what is built FROM it, ARG ends with its stage."""
    text = 'ARG TAG=1\nFROM a:${TAG} AS one\nARG V=2\nENV X=$V \\\n    Y="a b"\nUSER 7\nFROM one AS two\nRUN true $X\n'
    one, two = parse(text, {"PATH": "/bin"}, {"V": "3"})
    assert one.base == "a:1"
    assert two.environment == {"PATH": "/bin", "X": "3", "Y": "a b"}
    assert (two.user, two.steps[0].text) == ("7", "true $X")
    assert one.steps[1].environment["V"] == "3"
    assert "V" not in two.steps[0].environment
