"""A config that is mounted from a ConfigMap: the kubelet swaps a symbolic link, and never writes the file itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from ratelimit.watch import ConfigWatch
from tests.support import chart


def _projected(folder: Path, version: str, text: str) -> None:
    """Have the kubelet's way of it: a folder for each version, and ``..data`` that names the one in force."""
    (folder / version).mkdir()
    (folder / version / "penstock.yaml").write_text(text)
    (folder / "..new").symlink_to(version)
    (folder / "..new").replace(folder / "..data")


@pytest.fixture
def text(tmp_path: Path) -> str:
    """The config of a chart."""
    return chart.write_config(chart.render(chart.values_of("virtual")), tmp_path / "rendered").read_text()


def test_a_swapped_config_map_is_taken_up(text: str, tmp_path: Path) -> None:
    """The file's own path never changes, and yet the new content is seen, once."""
    _projected(tmp_path, "..one", text)
    (tmp_path / "penstock.yaml").symlink_to("..data/penstock.yaml")
    watch = ConfigWatch(tmp_path / "penstock.yaml")
    assert watch.poll() is None
    _projected(tmp_path, "..two", text.replace("name: demo", "name: other"))
    config = watch.poll()
    assert config is not None
    assert [org.name for org in config.orgs] == ["other"]
    assert watch.poll() is None


def test_a_broken_config_map_leaves_the_last_good_config(text: str, tmp_path: Path) -> None:
    """A typo in an upgrade stops nothing, and the next good one is taken up."""
    _projected(tmp_path, "..one", text)
    (tmp_path / "penstock.yaml").symlink_to("..data/penstock.yaml")
    watch = ConfigWatch(tmp_path / "penstock.yaml")
    _projected(tmp_path, "..two", "pools: [")
    assert watch.poll() is None
    _projected(tmp_path, "..three", text.replace("name: demo", "name: other"))
    assert watch.poll() is not None
