from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from serving.fit import fit_profile
from serving.profile import (
    ContextRange,
    Fit,
    Profile,
    ProfileError,
    dump_profile,
    load_profile,
    parse_profile,
    shipped_profiles,
)
from serving.surface import surface_of


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


@pytest.mark.parametrize("name", shipped_profiles())
def test_a_shipped_profile_is_called_measured_only_where_its_own_points_say_so(name: str) -> None:
    """Today's fit of its points gives the same word, the same steps, an error at unseen mixes and a range; or it has
    no such points and says that it is estimated or published.
    """
    profile = load_profile(name)
    again = fit_profile(profile.fit.points) if profile.fit else None

    if profile.provenance.kind != "measured":
        assert again is None or again.provenance != "measured"
        return
    assert again is not None
    assert again.provenance == "measured"
    assert again.fit == profile.fit
    assert (again.model, again.surface) == (profile.step_time, profile.surface)
    assert again.fit.loo_error_median is not None
    assert again.fit.context is not None


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


def measured_from(least: float, most: float) -> Profile:
    """A profile of which only the measured range of contexts matters."""
    fit = Fit((), residual_median=0.0, residual_max=0.0, context=ContextRange(least, most))
    return replace(load_profile("h100-llama-3.1-8b"), fit=fit, surface=None)


def test_a_fit_of_an_earlier_version_still_loads() -> None:
    """Points and fits written before there were forms, ranges and errors at unseen mixes load with defaults."""
    broken = document()
    point = {"mix": "chat", "concurrency": 4, "duration_s": 9.0, "requests": 8, "input_tokens": 80, "output_tokens": 80}
    broken["fit"] = {"points": [point], "residual_median": 0.01, "residual_max": 0.02}
    fit = parse_profile(json.dumps(broken)).fit

    assert fit is not None
    assert (fit.model_form, fit.loo_error_median, fit.context) == ("linear", None, None)
    assert fit.points[0].concurrency == 4


def test_within_the_measured_range_the_model_is_given_plainly() -> None:
    """No note stands beside what was measured."""
    profile = measured_from(100, 5000)

    assert profile.extrapolated_step_time(1e4, 100) == (profile.step_time, "")
    assert profile.extrapolated_step_time(1e4, 5000) == (profile.step_time, "")


@pytest.mark.parametrize("context", [96, 5240])
def test_the_mix_that_was_measured_is_within_what_was_measured(context: float) -> None:
    """A run draws its requests from its mix, so the mean context that it measured is a little off the mix's own."""
    assert measured_from(100, 5000).covers_context(context)


@pytest.mark.parametrize("context", [95, 5251])
def test_beyond_the_measured_range_the_model_is_marked(context: float) -> None:
    """What is extrapolated says so, and names the range."""
    profile = measured_from(100, 5000)

    step_time, note = profile.extrapolated_step_time(1e4, context)
    assert step_time == profile.step_time
    assert note.startswith("extrapolated: ")
    assert "outside the measured range of 100 to 5000 tokens" in note


def test_an_estimate_without_a_range_claims_none() -> None:
    """Where no range was measured, there is none to leave."""
    assert replace(load_profile("h100-llama-3.1-8b"), fit=None).covers_context(10**6)


def test_a_surface_scales_the_model_around_each_place() -> None:
    """The step-time model for a place is the linear one, times the factor measured there."""
    profile = replace(measured_from(100, 5000), surface=surface_of([(1e4, 1000, 1.5), (1e6, 4000, 0.8)]))

    assert profile.extrapolated_step_time(1e4, 1000)[0] == profile.step_time.slowed(1.5)
    assert profile.extrapolated_step_time(1e6, 4000)[0] == profile.step_time.slowed(0.8)
    assert parse_profile(dump_profile(profile)) == profile


@pytest.mark.parametrize(
    ("surface", "message"),
    [
        ({"points": []}, "surface.points is empty"),
        ({"points": [{"kv_tokens": 10, "context_tokens": 10, "factor": -1}]}, r"surface.points\[0\]"),
    ],
)
def test_a_bad_surface_is_refused(surface: dict[str, Any], message: str) -> None:
    """A negative factor and a surface of nothing are named."""
    with pytest.raises(ProfileError, match=message):
        parse_profile(json.dumps(document() | {"surface": surface}))


def test_a_range_upside_down_is_refused() -> None:
    """The least context is not above the greatest."""
    with pytest.raises(ProfileError, match=r"fit\.context"):
        parse_profile(dump_profile(measured_from(5000, 100)))
