"""A plan as a whole: the examples, what more hardware does, and plans that are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ratelimit.config import ConfigError, MixConfig
from ratelimit.planning.demand import DemandError
from ratelimit.planning.document import PlanConfig, example_text, examples, load_example, load_plan
from ratelimit.planning.knees import Found, KneeKey, find_knees
from ratelimit.planning.outcome import Outcome, TierOutcome
from ratelimit.planning.plan import _derived, outcome
from ratelimit.planning.sites import Change
from ratelimit.planning.wiring import inputs_of
from serving.operating import OperatingPoint
from serving.stepsim import Knee

pytestmark = pytest.mark.slow

#: A knee that is no simulation's, for tests of what follows from it.
_KNEES = {"h100": 25.0, "h200": 12.0, "b200": 44.0, "gb200": 46.0, "cpu-": 90.0}


def given_knees(keys: list[KneeKey]) -> Mapping[KneeKey, Found]:
    """Knees at once, by the GPU type in the profile's name."""
    rates = {key: next(rate for gpu, rate in _KNEES.items() if key.profile.name.startswith(gpu)) for key in keys}
    return {
        key: OperatingPoint(key.profile.step_time, Knee(rate, 0.9, 1.0, 0.05, "tpot"), "")
        for key, rate in rates.items()
    }


def planned(plan: PlanConfig, *changes: Change, times: float = 1.0, replay: Path | None = None) -> Outcome:
    """The plan's outcome at the given knees."""
    inputs = inputs_of(plan, changes, replay, times)
    return outcome(inputs, given_knees(inputs.knee_keys()))


def written(folder: Path, change: Callable[[dict[str, Any]], None], example: str = "mixed-rack") -> Path:
    """An example's file with something changed."""
    document = yaml.safe_load(example_text(example))
    change(document)
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.parametrize("name", examples())
def test_every_example_can_be_planned(name: str) -> None:
    """Each loads and plans, with knees found by simulation, and gives every tier limits."""
    inputs = inputs_of(load_example(name), [], None, 1.0)
    knees = find_knees(inputs.knee_keys(), lambda _: None)
    found = outcome(inputs, knees)
    assert found.after.usable.requests_per_s > 0
    assert all(tier.otpm and tier.itpm and tier.rpm and tier.concurrency for tier in found.after.tiers)
    assert not any(gpu.problems for gpu in found.after.supply.values())
    assert {"colossus-1", "laptop", "mixed-rack", "node-8xh100"} <= set(examples())


def test_colossus_joins_a_fleet() -> None:
    """220,000 GPUs more than before, on 300 MW; every limit rises, nobody is throttled more."""
    found = planned(load_example("colossus-1"))
    assert found.before is not None
    gpus = [sum(gpu.gpus for gpu in side.supply.values()) for side in (found.before, found.after)]
    assert gpus[1] - gpus[0] == 220_000
    site = found.after.energy.sites[-1]
    assert site.limit_w == 300e6
    assert site.share_of_limit is not None
    assert site.share_of_limit < 1
    for before, after in zip(found.before.tiers, found.after.tiers, strict=True):
        assert after.otpm is not None
        assert before.otpm is not None
        assert after.otpm > before.otpm
        assert after.throttled_share <= before.throttled_share


@settings(max_examples=25)
@given(st.sampled_from(["H100", "H200", "B200", "GB200"]), st.integers(1, 400))
def test_more_hardware_never_lowers_what_is_assured(gpu: str, count: int) -> None:
    """Whatever is added to a mixed fleet with a spare domain, no limit of any tier falls."""
    found = planned(load_example("mixed-rack"), Change(gpu, count))
    assert found.before is not None
    for before, after in zip(found.before.tiers, found.after.tiers, strict=True):
        assert all(more >= less for less, more in zip(_limits(before), _limits(after), strict=True))


@settings(max_examples=25)
@given(st.sampled_from(["H100", "H200", "B200"]), st.integers(1, 16), st.floats(0.1, 3.0))
def test_shares_stay_whole_whatever_is_lost(gpu: str, count: int, times: float) -> None:
    """Green, borrowed and throttled make up what was offered, and a fleet that lost hardware serves no more."""
    found = planned(load_example("mixed-rack"), Change(gpu, -count), times=times)
    assert found.before is not None
    for side in (found.before, found.after):
        for tier in side.tiers:
            assert tier.green_share + tier.borrowed_share + tier.throttled_share == pytest.approx(1)
    served = [
        sum((1 - tier.throttled_share) * tier.offered_requests_per_s for tier in side.tiers)
        for side in (found.before, found.after)
    ]
    assert served[1] <= served[0] * (1 + 1e-9)


def test_the_document_has_what_scripts_ask_for() -> None:
    """Fleet, supply with provenance, usable, tiers and assumptions at the top, and numbers that JSON can hold."""
    document = msgspec.json.decode(msgspec.json.encode(planned(load_example("colossus-1")).document()))
    assert {"fleet", "supply", "usable", "tiers", "assumptions", "before", "cells", "energy"} <= set(document)
    assert document["fleet"]["gpus"] == {"H100": 166_000, "H200": 58_000, "GB200": 20_000}
    for gpu in document["supply"].values():
        assert gpu["provenance"]["kind"] in ("measured", "published", "estimated")
        assert gpu["provenance"]["source"]
    wanted = {"tier", "rpm", "itpm", "otpm", "concurrency", "keys", "throttled_share"}
    assert all(wanted <= set(tier) for tier in document["tiers"])
    assert any("150,000 H100" in text for text in document["assumptions"])
    assert any("estimated" in text for text in document["assumptions"])


def test_every_input_is_printed(tmp_path: Path) -> None:
    """Demand, peaks, tiers, bounds and replays are assumptions too; prices of types that are not there are none."""

    def change(document: dict[str, Any]) -> None:
        document["tiers"][0] |= {"ceiling": 0.87, "unlimited": ["requests"], "maximum": {"output_tokens": 4321}}
        document["demand"][0] |= {
            "keys": 1234,
            "requests_per_s": 7.25,
            "peak_factor": 1.75,
            "mix": {"name": "decode-heavy"},
        }
        document |= {"demand_within": [0.002, 77], "prices_per_gpu_hour": {"H100": 2.125, "GB200": 4.375}}

    plan = load_plan(written(tmp_path, change, example="node-8xh100"))
    trace = Path(__file__).parents[2] / "serving" / "mixes" / "azure_llm_2023_conversation.csv"
    said = "\n".join(planned(plan, times=0.5).assumptions)
    for text in ("1,234 keys ask for 7.25 requests/s of mix decode-heavy", "1.75 times that", "× 0.5", "ceiling 0.87"):
        assert text in said
    for text in ("unlimited requests", "maximum output_tokens 4,321", "less than 0.002 or more than 77", "H100 2.125"):
        assert text in said
    assert all(f"tier {tier.name}: share {tier.share:g}" in said for tier in plan.tiers)
    assert "4.375" not in said
    assert f"lengths are those of {trace.name}" in "\n".join(planned(plan, replay=trace).assumptions)
    log = tmp_path / "log.csv"
    rows = "".join(f"{i},pro,k{i % 3},100,50\n" for i in range(600))
    log.write_text("time,tier,key,input_tokens,output_tokens\n" + rows)
    assert (
        "demand of pro: 3 keys ask for 1 requests/s in the mean, replayed from log.csv × 1"
        in planned(plan, replay=log).assumptions
    )


def test_gpus_that_make_no_whole_replica_are_idle() -> None:
    """Ten H100 are two replicas of four GPUs, and two GPUs are told to be left over."""
    found = planned(load_example("node-8xh100"), Change("H100", 2))
    assert found.after.supply["H100"].replicas == 2
    assert found.after.supply["H100"].idle_gpus == 2


def test_a_fleet_that_loses_everything_serves_nothing() -> None:
    """All is throttled, and limits are 0 rather than absent."""
    found = planned(load_example("node-8xh100"), Change("H100", -8))
    assert [tier.throttled_share for tier in found.after.tiers] == [1, 1, 1]
    assert [tier.otpm for tier in found.after.tiers] == [0, 0, 0]
    assert found.after.supply == {}


@pytest.mark.parametrize(
    "change",
    [{"unlimited": ["requests", "input_tokens", "output_tokens", "concurrency"]}, {"slo": {"tpot_ms": 0.5}}],
    ids=["unlimited", "promised what nothing keeps"],
)
def test_a_tier_without_limits_is_planned_as_a_borrower(tmp_path: Path, change: dict[str, Any]) -> None:
    """In a pool that serves, who has no limits is unlimited, not refused; JSON says null."""
    path = written(tmp_path, lambda document: document["tiers"][1].update(change), example="node-8xh100")
    inputs = inputs_of(load_plan(path), [], None, 1.0)
    knees = {
        key: "too slow" if key.promise.slo.tpot_s < 0.001 else found
        for key, found in given_knees(inputs.knee_keys()).items()
    }
    found = outcome(inputs, knees)
    pro = msgspec.to_builtins(found.document())["tiers"][1]
    assert [pro[name] for name in ("rpm", "itpm", "otpm", "concurrency")] == [None] * 4
    assert pro["throttled_share"] < 1
    assert pro["borrowed_share"] > 0


def test_a_trace_gives_the_course_of_the_demand() -> None:
    """With a trace the declared mean stays, and the share throttled lies between that at the mean and at the peak."""
    trace = Path(__file__).parents[2] / "serving" / "mixes" / "azure_llm_2023_conversation.csv"
    found = planned(load_example("node-8xh100"), replay=trace)
    free = found.after.tiers[-1]
    assert free.offered_requests_per_s == pytest.approx(10)
    assert 0 < free.throttled_share < 1
    assert "azure" in found.demand


def test_records_of_tiers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    """A replay names its tiers as the plan does, or is refused with both."""
    log = tmp_path / "log.csv"
    log.write_text("time,tier,key,input_tokens,output_tokens\n1,gold,k,10,5\n")
    with pytest.raises(DemandError, match=r"gold.*enterprise"):
        planned(load_example("node-8xh100"), replay=log)


def _limits(tier: TierOutcome) -> list[int]:
    return [tier.rpm or 0, tier.itpm or 0, tier.otpm or 0, tier.concurrency or 0, *tier.ceilings.values()]


def _set(*path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        part: Any = document
        for name in path[:-1]:
            part = part[name]
        part[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("sites", 0, "gpus", "H100", to=-8), "greater than or equal to 0"),
        (_set("sites", 0, "gpus", "H100", to=float("nan")), "sites"),
        (_set("sites", 0, "gpus", "H100", to=2.5), "integer"),
        (_set("sites", 0, "gpus", "X9000", to=8), "no GPU type 'X9000'; there are A100, H100"),
        (_set("sites", to=[]), "sites"),
        (_set("profiles", to={"H100": "h100-llama-3.1-8b"}), "is of llama-3.1-8b"),
        (_set("model", to="no-such-model"), "no shipped profile"),
        (_set("mix", "name", to="chatter"), "no workload mix 'chatter'; there are chat"),
        (_set("mix", to={"name": "chat", "scale": 0}), "greater than 0"),
        (_set("slo", "ttft_ms", to=2_000_000), "in milliseconds"),
        (_set("slo", "tpot_ms", to=50_000), "in milliseconds"),
        (_set("tiers", 0, "share", to=0.9), "add up to 1.35"),
        (_set("tiers", 1, "name", to="enterprise"), "another tier's name"),
        (_set("tiers", 0, "ceiling", to=0.1), "below the share"),
        (_set("demand", 0, "tier", to="gold"), "no tier 'gold'"),
        (_set("demand", 0, "requests_per_s", to=-1), "greater than 0"),
        (_set("demand", 0, "requests_per_s", to=float("inf")), "finite"),
        (_set("demand", 0, "requests_per_s", to=float("nan")), "demand"),
        (_set("demand", 0, "keys", to=0), "greater than or equal to 1"),
        (_set("demand", 0, "peak_factor", to=0.5), "greater than or equal to 1"),
        (_set("demand", to=[]), "demand"),
        (_set("power", to={"pue": 0.5}), "greater than or equal to 1"),
        (_set("prices_per_gpu_hour", "H100", to=0), "greater than 0"),
        (_set("demand_within", to=[10, 1]), "not below the second"),
        (_set("sits", to=1), "did you mean 'sites'"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    """Each mistake is named with its file and line, and with what would be right."""
    path = written(tmp_path, change)
    with pytest.raises(ConfigError) as error:
        load_plan(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("times", [1e3, 1e-6])
def test_a_demand_in_other_units_is_refused(times: float) -> None:
    """A thousand times what the fleet serves, or next to nothing of it, is asked about; bounds may be widened."""
    plan = load_example("node-8xh100")
    with pytest.raises(DemandError, match="in requests a second"):
        planned(plan, times=times)
    widened = plan.model_copy(update={"demand_within": (1e-9, 1e9)})
    assert planned(widened, times=times).after.tiers


def test_a_power_limit_in_other_units_is_refused(tmp_path: Path) -> None:
    """A site's limit given in watts is a million times too high."""
    plan = load_plan(written(tmp_path, _set("sites", 0, "power_limit_mw", to=120_000)))
    with pytest.raises(ConfigError, match="megawatts"):
        planned(plan)


def test_a_request_beyond_the_context_is_refused(tmp_path: Path) -> None:
    """Lengths a hundred times too large do not fit the model, and the plan says so before it simulates."""
    plan = load_plan(written(tmp_path, _set("demand", 0, "mix", to={"name": "chat", "scale": 100})))
    with pytest.raises(DemandError, match="in tokens"):
        planned(plan)


def test_an_slo_that_no_load_meets_is_told() -> None:
    """A bound below what one lone request takes leaves the type without supply, and says why."""
    plan = load_example("node-8xh100")
    hopeless = plan.model_copy(update={"slo": plan.slo.model_copy(update={"tpot_ms": 2.0})})
    inputs = inputs_of(hopeless, [], None, 1.0)
    found = outcome(inputs, find_knees(inputs.knee_keys(), lambda _: None))
    assert found.after.usable.problems
    assert "TPOT" in found.after.supply["H100"].problems[0]
    assert [tier.throttled_share for tier in found.after.tiers] == [1, 1, 1]


def test_a_context_that_was_not_measured_is_planned_on_request_only() -> None:
    """A profile fitted from runs says so where the mix lies outside of them, and its supply is marked."""
    plan = load_example("node-8xh100").model_copy(
        update={"model": "gpt-oss-20b", "mix": MixConfig(name="chat", scale=0.05)}
    )
    with pytest.raises(ConfigError, match=r"outside the measured range .*write extrapolate: true"):
        inputs_of(plan, [], None, 1.0)
    inputs = inputs_of(plan.model_copy(update={"extrapolate": True}), [], None, 0.001)
    found = find_knees(inputs.knee_keys(), lambda _: None)
    groups, _, _ = _derived(inputs, inputs.fleets.after, found)
    assert "extrapolated: a mean context of" in groups["H100"].provenance
    (point,) = {found[key] for key in inputs.knee_keys() if key.promise.slo == inputs.pool.slo}
    assert isinstance(point, OperatingPoint)
    assert groups["H100"].group.step_time == point.step_time != inputs.profiles["H100"].step_time


def test_many_knees_are_those_of_one_at_a_time() -> None:
    """Knees found in processes of their own equal those found here, and are told of once each."""
    plan = load_example("laptop")
    keys = [
        inputs_of(
            plan.model_copy(update={"mix": plan.mix.model_copy(update={"scale": scale})}), [], None, 1.0
        ).knee_keys()[0]
        for scale in (0.1, 0.11, 0.12, 0.13)
    ]
    told: list[KneeKey] = []
    found = find_knees([*keys, keys[0]], told.append)
    assert len(told) == 4
    assert set(told) == set(keys)
    assert found[keys[2]] == find_knees([keys[2]], lambda _: None)[keys[2]]
