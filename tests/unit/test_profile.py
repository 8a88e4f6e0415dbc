from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serving.profile import ProfileError, dump_profile, load_profile, parse_profile, shipped_profiles


def document() -> dict[str, Any]:
    """A shipped profile as plain JSON, to be broken."""
    decoded: dict[str, Any] = json.loads(dump_profile(load_profile("h100-llama-3.1-8b")))
    return decoded


@pytest.mark.parametrize("name", shipped_profiles())
def test_a_shipped_profile_survives_a_round_trip(name: str) -> None:
    """Every file in the package is valid, is named as it says, and is written back as it was."""
    profile = load_profile(name)

    assert profile.name == name
    assert parse_profile(dump_profile(profile)) == profile


def test_the_gpus_to_plan_for_are_shipped() -> None:
    """H100, H200, B200 and GB200, each for an 8B and a 70B Llama."""
    expected = {f"{gpu}-llama-3.1-{size}" for gpu in ("h100", "h200", "b200", "gb200") for size in ("8b", "70b")}

    assert expected <= set(shipped_profiles())


def test_a_profile_is_loaded_by_path_too(tmp_path: Path) -> None:
    """Anything with a slash or ending in .json is a path."""
    path = tmp_path / "mine.json"
    path.write_bytes(dump_profile(load_profile("h100-llama-3.1-8b")))

    assert load_profile(str(path)).gpu == "H100"


def test_an_unknown_name_lists_the_known_ones() -> None:
    """A typing error is answered with what there is."""
    with pytest.raises(ProfileError, match=r"no shipped profile 'h1000'; there are .*h100-llama-3\.1-8b"):
        load_profile("h1000")
    with pytest.raises(ProfileError, match=r"cannot read profile .*No such file"):
        load_profile("./nowhere.json")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema_version",), 9, "schema_version is 9, this Penstock reads 1"),
        (("gpus_per_replica",), 0, "gpus_per_replica is 0"),
        (("step_time", "base_s"), 0, "base_s is 0.0, it must be a positive"),
        (("step_time", "kv_token_s"), -1e-9, "kv_token_s is -1e-09"),
        (("limits", "max_num_seqs"), 0, "max_num_seqs is 0, it must be at least 1"),
        (("tokens_per_byte",), 5, "tokens_per_byte is 5"),
        (("provenance", "kind"), "guessed", "Invalid enum value 'guessed'"),
        (("surprise",), 1, "unknown field `surprise`"),
        (("limits", "kv_tokens"), "many", r"Expected `int`, got `str` - at `\$.limits.kv_tokens`"),
    ],
)
def test_a_bad_profile_is_refused_with_its_place(path: tuple[str, ...], value: object, message: str) -> None:
    """Each invalid value is named with where it stands and what would be right."""
    broken = document()
    target = broken
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value

    with pytest.raises(ProfileError, match=message):
        parse_profile(json.dumps(broken))


def test_what_is_no_document_is_refused() -> None:
    """Broken JSON and a list are not profiles."""
    with pytest.raises(ProfileError, match="not a profile document"):
        parse_profile(b"{")
    with pytest.raises(ProfileError, match="Expected `object`, got `array`"):
        parse_profile(b"[]")
