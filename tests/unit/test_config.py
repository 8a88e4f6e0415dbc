"""A config is taken whole or refused with every mistake, its line, and what would be right."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ratelimit.config import ConfigError, load_config, policy_of
from ratelimit.configcheck import changes_at_restart, live_change_problems
from ratelimit.policy import LimitRule, OrgPolicy, TierPolicy
from serving.capacity import Slo
from serving.profile import dump_profile, load_profile, shipped_profiles

ROOT = Path(__file__).parents[2]
MINIMAL = """\
pools:
  - model: llama-3.1-8b
    engines:
      - {device: virtual, profile: h100-llama-3.1-8b, port: 8100}
tiers:
  - {name: pro, share: 0.6}
orgs:
  - {name: acme}
"""


def problems(folder: Path, text: str | bytes) -> list[str]:
    """What ``load_config`` says about this text, with the path cut off."""
    path = folder / "penstock.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert all(problem.startswith(f"{path}:") for problem in caught.value.problems)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return [problem.removeprefix(f"{path}:") for problem in caught.value.problems]


def problem(folder: Path, old: str, new: str) -> str:
    """The one mistake that replacing ``old`` makes of the minimal config."""
    assert old in MINIMAL
    (only,) = problems(folder, MINIMAL.replace(old, new))
    return only


def test_the_example_at_the_root_is_valid() -> None:
    """The config that the README names loads, and is one virtual H100 at a tenth of its speed for two tiers."""
    config = load_config(ROOT / "penstock.yaml")
    (engine,) = config.pools[0].engines
    assert (engine.device, engine.profile, engine.slowdown) == ("virtual", "h100-llama-3.1-8b", 10)
    assert [tier.name for tier in config.tiers] == ["pro", "free"]
    assert config.state_dir == ROOT / ".penstock"


def test_defaults(tmp_path: Path) -> None:
    """A config of nine lines is complete: everything else has its documented default."""
    (tmp_path / "penstock.yaml").write_text(MINIMAL)
    config = load_config(tmp_path / "penstock.yaml")
    assert config.state_dir == tmp_path / ".penstock"
    assert config.redis == "embedded"
    assert (config.gateway.host, config.gateway.port, config.gateway.admin_port) == ("127.0.0.1", 8080, 9090)
    assert (config.gateway.workers, config.gateway.enforce, config.gateway.request_timeout_s) == (1, True, 600)
    assert (config.gateway.max_body_bytes, config.gateway.body_timeout_s) == (8_388_608, 20)
    pool, tier = config.pools[0], config.tiers[0]
    assert (pool.slo.ttft_ms, pool.slo.tpot_ms, pool.slo.percentile) == (1000, 50, 95)
    assert (pool.default_max_output, pool.spare_domains, pool.raise_after_s, pool.stuck_after_s) == (None, 0, 5, 5)
    assert (tier.ceiling, tier.priority, tier.burst_s) == (1.0, 0, 5)
    assert (tier.unlimited, tier.holds, tier.shadow) == ((), "learned", False)
    assert (config.limits, config.shadow_keys, config.gateway.redis_timeout_ms) == ((), (), 30)
    assert config.orgs[0].models is None


def test_a_full_config(tmp_path: Path) -> None:
    """Every section and field is read; ports count up from the first."""
    path = tmp_path / "penstock.yaml"
    path.write_text("""\
state_dir: /var/lib/penstock
redis: redis://:secret@cache:6379/0
gateway: {host: 0.0.0.0, port: 80, admin_port: 9000, workers: 2, enforce: false, redis_timeout_ms: 50}
pools:
  - model: meta-llama/Llama-3.1-8B
    slo: {ttft_ms: 500, tpot_ms: 30, percentile: 99}
    mix: {name: decode-heavy, scale: 0.5}
    default_max_output: 256
    spare_domains: 1
    raise_after_s: 0
    stuck_after_s: 2.5
    engines:
      - {device: virtual, profile: h100-llama-3.1-8b, count: 2, slowdown: 10, port: 8100, extra_args: [--seed, "8"]}
      - {device: gpu, profile: h100-llama-3.1-8b, port: 8102, model_path: meta-llama/Llama-3.1-8B}
    replicas: [{url: "http://gpu1:8001/", profile: h100-llama-3.1-8b}]
tiers:
  - {name: pro, share: 0.6, ceiling: 0.9, priority: 1, burst_s: 2}
  - {name: batch, share: 0, ceiling: 0.5, unlimited: [requests, concurrency], holds: maximum, shadow: true}
orgs: [{name: acme, models: [meta-llama/Llama-3.1-8B]}]
limits:
  - {name: output_tokens, amount: 1000000, per: org, window: week, orgs: [acme], reason: contract 7}
  - {name: requests, amount: 60, burst: 5, tiers: [batch], models: [meta-llama/Llama-3.1-8B], keys: [k_1a2b3c4d]}
shadow_keys: [k_1a2b3c4d]
""")
    config = load_config(path)
    assert config.state_dir == Path("/var/lib/penstock")
    assert config.gateway.admin_ports() == [9000, 9001]
    engine = config.pools[0].engines[0]
    assert (engine.ports(), engine.extra_args) == ([8100, 8101], ("--seed", "8"))
    assert config.pools[0].replicas[0].url == "http://gpu1:8001"
    assert "secret" not in repr(config)
    policy = policy_of(config)
    assert policy.tiers[1] == TierPolicy("batch", 0, 0.5, 0, 5.0, ("requests", "concurrency"), "maximum", shadow=True)
    model = "meta-llama/Llama-3.1-8B"
    assert policy.rules == (
        LimitRule("output_tokens", 1_000_000, "org", "week", orgs=("acme",), reason="contract 7"),
        LimitRule("requests", 60, burst=5, tiers=("batch",), models=(model,), keys=("k_1a2b3c4d",)),
    )
    assert policy.shadow_keys == ("k_1a2b3c4d",)


def test_policy_of_a_config(tmp_path: Path) -> None:
    """The pure policy has the tiers, the SLO in seconds, the scaled mix and what the profiles say."""
    path = tmp_path / "penstock.yaml"
    path.write_text(MINIMAL.replace("    engines:", "    mix: {name: chat, scale: 0.125}\n    engines:"))
    policy = policy_of(load_config(path))
    (pool,) = policy.pools
    profile = load_profile("h100-llama-3.1-8b")
    assert policy.tiers == (TierPolicy("pro", 0.6, 1.0, 0, 5.0),)
    assert (pool.model, pool.slo) == ("llama-3.1-8b", Slo(1.0, 0.05, 95.0))
    assert pool.mix.name == "chat"
    assert 100 < pool.mix.mean_input_tokens < 200
    assert (pool.max_model_len, pool.tokens_per_byte) == (profile.limits.max_model_len, profile.tokens_per_byte)
    assert policy.enforce
    assert policy.orgs == (OrgPolicy("acme"),)


def test_promises_and_bounds_of_a_tier(tmp_path: Path) -> None:
    """A tier's own mix, SLO, bounds and oversell, a cached share, failure domains and the approval rule are read."""
    path = tmp_path / "penstock.yaml"
    path.write_text("""\
pools:
  - model: llama-3.1-8b
    mix: {name: chat, cached_share: 0.25}
    spare_domains: 2
    replicas:
      - {url: "http://gpu1:8001", profile: h100-llama-3.1-8b, domain: rack-1}
      - {url: "http://gpu2:8001", profile: h100-llama-3.1-8b}
tiers:
  - {name: pro, share: 0.6, mix: {name: decode-heavy}, slo: {ttft_ms: 500, tpot_ms: 30, percentile: 99},
     minimum: {output_tokens: 600}, maximum: {output_tokens: 60000, concurrency: 9}}
  - {name: batch, share: 0, oversell: 4}
orgs: [{name: acme}]
approval: {falls_above: 0.5}
""")
    config = load_config(path)
    policy = policy_of(config)
    pool, (pro, batch) = policy.pools[0], policy.tiers
    assert config.approval.falls_above == 0.5
    assert [replica.domain for replica in config.pools[0].replicas] == ["rack-1", None]
    assert pool.spare_domains == 2
    assert all(shape.cached_tokens == shape.input_tokens // 4 for shape in pool.mix.shapes)
    assert pro.mix is not None
    assert pro.mix.name == "decode-heavy"
    assert pro.slo == Slo(0.5, 0.03, 99)
    assert (pro.minimum.of("output_tokens"), pro.maximum.of("concurrency"), pro.maximum.of("requests")) == (
        600,
        9,
        None,
    )
    assert (batch.mix, batch.slo, batch.oversell) == (None, None, 4)
    assert policy.orgs == (OrgPolicy("acme"),)


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State folder and profile files are found beside the config, wherever the command is run."""
    folder = tmp_path / "etc"
    folder.mkdir()
    shipped = ROOT / "serving" / "profiles" / "h100-llama-3.1-8b.json"
    (folder / "ours.json").write_bytes(shipped.read_bytes())
    text = MINIMAL.replace("h100-llama-3.1-8b", "ours.json") + "state_dir: state\n"
    (folder / "penstock.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("etc/penstock.yaml"))
    assert config.state_dir == folder / "state"
    assert config.pools[0].engines[0].profile == str(folder / "ours.json")


def test_a_pool_scaled_to_zero_stays(tmp_path: Path) -> None:
    """An engine with count 0 takes no port and leaves the pool known."""
    path = tmp_path / "penstock.yaml"
    path.write_text(MINIMAL.replace("port: 8100", "port: 8080, count: 0"))
    assert load_config(path).pools[0].engines[0].ports() == []
    assert policy_of(load_config(path)).pools[0].max_model_len > 0


def test_a_missing_file(tmp_path: Path) -> None:
    """A path that is not there is named."""
    with pytest.raises(ConfigError, match=r"nowhere\.yaml:1: cannot be read: No such file or directory"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "1: is empty; write pools, tiers and orgs"),
        ("# nothing\n", "1: is empty"),
        ("- a\n", "1: is not a mapping but list"),
        ("pools\n", "1: is not a mapping but str"),
        ("pools: [\n", "2: is not valid YAML: "),
        ("a: 1\nb: 'x\n", "3: is not valid YAML: "),
        ("a: 1\n\tb: 2\n", "2: is not valid YAML: "),
        ("a: 1\n---\nb: 2\n", "2: is not valid YAML: but found another document"),
        ("a: &x 1\nb: *x\n", "2: is not valid YAML: aliases are not supported; write it out"),
        ("a: !!python/object:os.system x\n", "1: is not valid YAML: could not determine a constructor"),
        ("a: 1\nb: {c: 1, c: 2}\n", "2: 'c' is given twice, first on line 2; keep one"),
        ("tiers: []\norgs: []\ntiers: []\n", "3: 'tiers' is given twice, first on line 1; keep one"),
        ("? [a]\n: 1\n", "1: a name must be plain text"),
        ("a: !!int ''\n", "1: '': string index out of range; quote it"),
        ("a: !!bool x\n", "1: 'x': 'x'; quote it"),
        ("a: !!timestamp x\n", "1: 'x': "),
        ("a: 9" + ":0" * 200 + ".0\n", "1: '9:0:0"),
        ("a: 2026-13-45\n", "1: '2026-13-45': month must be in 1..12; quote it"),
        (b"a: 1\nb: \xff\n", "2: is not UTF-8 text"),
        ("a: \x00\n", "1: is not valid YAML"),
        ("[" * 5000, "1: is nested too deeply"),
        ("#" * (1 << 20) + "\n", "1: is larger than 1048576 bytes"),
    ],
)
def test_what_is_not_one_plain_mapping(tmp_path: Path, text: str | bytes, said: str) -> None:
    """Text that is no config is refused on its line, before any field is looked at."""
    (only,) = problems(tmp_path, text)
    assert only.startswith(said)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("engines:", "engine:", "3: pools[0].engine: there is no field 'engine'; did you mean 'engines'?"),
        ("share:", "shair:", "6: tiers[0].shair: there is no field 'shair'; did you mean 'share'?"),
        ("orgs:", "state-dir: x\norgs:", "7: state-dir: there is no field 'state-dir'; did you mean 'state_dir'?"),
        (
            "port: 8100",
            "port: 8100, gpus: 4",
            "4: pools[0].engines[0].gpus: there is no field 'gpus'; there are device",
        ),
    ],
)
def test_unknown_fields(tmp_path: Path, old: str, new: str, said: str) -> None:
    """A field that does not exist is met with the nearest that does."""
    assert any(each.startswith(said) for each in problems(tmp_path, MINIMAL.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            ", profile: h100-llama-3.1-8b",
            "",
            "4: pools[0].engines[0].profile: is missing; every pools[0].engines[0] needs",
        ),
        (
            "h100-llama-3.1-8b",
            "h1000",
            f"4: pools[0].engines[0].profile: no shipped profile 'h1000'; there are {', '.join(shipped_profiles())}",
        ),
        ("h100-llama-3.1-8b", "./none.json", "4: pools[0].engines[0].profile: cannot read profile "),
        (
            "device: virtual",
            "device: tpu",
            "4: pools[0].engines[0].device: input should be 'virtual', 'cpu' or 'gpu' (it is",
        ),
        (
            "device: virtual",
            "device: gpu",
            "4: pools[0].engines[0].model_path: is missing; a gpu engine needs the model",
        ),
        ("port: 8100", "port: 8100, model_path: x", "4: pools[0].engines[0].model_path: only a gpu engine has one"),
        (
            "device: virtual",
            "device: cpu, slowdown: 2",
            "4: pools[0].engines[0].slowdown: only a virtual engine can be slowed, this is cpu",
        ),
        ("port: 8100", "port: 0", "4: pools[0].engines[0].port: input should be greater than or equal to 1 (it is 0)"),
        ("port: 8100", "port: 65535, count: 2", "4: pools[0].engines[0].port: the last of 2 ports would be 65536"),
        (
            "port: 8100",
            "port: 8079, count: 3",
            "4: pools[0].engines[0].port: port 8080 is taken by gateway.port (this takes 8079 to 8081); choose another",
        ),
        (
            "orgs:",
            "gateway: {port: 80, admin_port: 80}\norgs:",
            "7: gateway.admin_port: port 80 is taken by gateway.port",
        ),
        (
            "orgs:",
            "gateway: {port: 9091, workers: 2}\norgs:",
            "7: gateway.admin_port: port 9091 is taken by gateway.port (this takes 9090 to 9091)",
        ),
        ("orgs:", "gateway: {workers: none}\norgs:", "7: gateway.workers: input should be a valid integer"),
        ("share: 0.6", "share: 1.2", "6: tiers[0].share: input should be less than or equal to 1 (it is 1.2)"),
        ("share: 0.6", "share: .nan", "6: tiers[0].share: input should be"),
        (
            "share: 0.6",
            "share: 0.6, ceiling: 0.5",
            "6: tiers[0].ceiling: 0.5 is below the share of 0.6 that is assured",
        ),
        ("share: 0.6", "share: 0.6, burst_s: 0", "6: tiers[0].burst_s: input should be greater than 0 (it is 0)"),
        (
            "orgs:",
            "  - {name: free, share: 0.5}\norgs:",
            "5: tiers: the shares add up to 0.6 + 0.5 = 1.1; together they are at most 1",
        ),
        (
            "orgs:",
            "  - {name: pro, share: 0.1}\norgs:",
            "7: tiers[1].name: 'pro' is tiers[0].name too; give each its own",
        ),
        ("name: pro", "name: the pros", "6: tiers[0].name: 'the pros' is not a name; use letters"),
        (
            "name: acme",
            "name: acme, models: [llama-70b]",
            "8: orgs[0].models[0]: no pool serves 'llama-70b'; there are llama",
        ),
        ("  - {name: acme}", "  []", "7: orgs: is empty; name at least one"),
        (
            "    engines:\n      - {device: virtual, profile: h100-llama-3.1-8b, port: 8100}\n",
            "",
            "2: pools[0]: has neither engines nor replicas nor discover; name one (count: 0 keeps a pool without",
        ),
        (
            "    engines:",
            "    mix: {name: chats}\n    engines:",
            "3: pools[0].mix.name: no mix 'chats'; there are chat, ",
        ),
        (
            "    engines:",
            "    slo: {ttft_ms: 1000, tpot_ms: 0.1}\n    engines:",
            "3: pools[0].slo.tpot_ms: 0.1 ms cannot be met: an empty step of h100-llama-3.1-8b takes",
        ),
        (
            "    engines:",
            "    default_max_output: 10000000\n    engines:",
            "3: pools[0].default_max_output: 10000000 leaves no room for a prompt: the context of h100",
        ),
        (
            "    engines:",
            "    replicas: [{url: gpu1, profile: h100-llama-3.1-8b}]\n    engines:",
            "3: pools[0].replicas[0].url: not an http URL; write one such as http://127.0.0.1:8001 (it is 'gpu1')",
        ),
        (
            "    engines:",
            "    replicas: [{url: 'http://gpu1:1/v1', profile: h100-llama-3.1-8b}]\n    engines:",
            "3: pools[0].replicas[0].url: names more than a server; write only http://HOST:PORT, without /v1",
        ),
        (
            "    engines:",
            "    replicas: [{url: 'http://gpu1:99999', profile: h100-llama-3.1-8b}]\n    engines:",
            "3: pools[0].replicas[0].url: Port out of range 0-65535",
        ),
        (
            "    engines:",
            "    replicas: [{url: 'http://127.0.0.1:8100', profile: h100-llama-3.1-8b}]\n    engines:",
            "3: pools[0].replicas[0].url: http://127.0.0.1:8100 is pools[0].engines[0] already; count it once",
        ),
        (
            "h100-llama-3.1-8b, port",
            "cpu-tiny-llama, port",
            "2: pools[0].mix: the longest request of chat at scale 1 has 4966 tokens, cpu-tiny-llama holds 4096",
        ),
        (
            "    engines:",
            "    mix: {scale: 101}\n    engines:",
            "3: pools[0].mix.scale: input should be less than or equal to 100 (it is 101)",
        ),
        (
            "    engines:",
            "    slo: {ttft_ms: 1.0e+300}\n    engines:",
            "3: pools[0].slo.ttft_ms: input should be less than or equal to 3600000 (it is 1e+300)",
        ),
        (
            "port: 8100",
            "port: 8100, slowdown: 1.0e+300",
            "4: pools[0].engines[0].slowdown: input should be less than or equal to 10000 (it is 1e+300)",
        ),
        (
            "    engines:",
            "    slo: {tpot_ms: 60001}\n    engines:",
            "3: pools[0].slo.tpot_ms: input should be less than or equal to 60000 (it is 60001)",
        ),
        (
            "    engines:",
            "    slo: {tpot_ms: .nan}\n    engines:",
            "3: pools[0].slo.tpot_ms: input should be",
        ),
        (
            "    engines:",
            "    spare_replicas: 1\n    engines:",
            "3: pools[0].spare_replicas: is no longer there; write spare_domains: how many failure domains",
        ),
        (
            "    engines:",
            "    spare_domains: -1\n    engines:",
            "3: pools[0].spare_domains: input should be greater than or equal to 0 (it is -1)",
        ),
        (
            "    engines:",
            "    mix: {cached_share: 1}\n    engines:",
            "3: pools[0].mix.cached_share: input should be less than 1 (it is 1)",
        ),
        (
            "share: 0.6",
            "share: 0.6, slo: {tpot_ms: 0.05}",
            "6: tiers[0].slo.tpot_ms: 0.05 ms cannot be met: an empty step of h100-llama-3.1-8b takes",
        ),
        ("share: 0.6", "share: 0.6, mix: {name: chats}", "6: tiers[0].mix.name: no mix 'chats'; there are chat, "),
        (
            "share: 0.6",
            "share: 0.6, mix: {name: long-context, scale: 100}",
            "6: tiers[0].mix: the longest request of long-context at scale 100 has",
        ),
        (
            "share: 0.6",
            "share: 0.6, oversell: 2",
            "6: tiers[0].oversell: what is assured (share: 0.6) is never oversold; take it out, or share: 0",
        ),
        ("share: 0.6", "share: 0, oversell: 0.5", "6: tiers[0].oversell: input should be greater than or equal to 1"),
        (
            "share: 0.6",
            "share: 0.6, minimum: {requests: 9}, maximum: {requests: 8}",
            "6: tiers[0].minimum.requests: 9 is above the maximum of 8; lower one of them",
        ),
        (
            "share: 0.6",
            "share: 0, minimum: {requests: 9}",
            "6: tiers[0].minimum.requests: a tier without a share is promised nothing; give it one, or take this out",
        ),
        (
            "share: 0.6",
            "share: 0.6, unlimited: [concurrency], maximum: {concurrency: 9}",
            "6: tiers[0].maximum.concurrency: concurrency is unlimited for this tier; take one of the two out",
        ),
        ("orgs:", "approval: {falls_above: 1.5}\norgs:", "7: approval.falls_above: input should be less than 1"),
        ("share: 0.6", "share: 0.6, burst_s: 3601", "6: tiers[0].burst_s: input should be less than or equal to 3600"),
        (
            "h100-llama-3.1-8b, port",
            "~nosuch/x.json, port",
            "4: pools[0].engines[0].profile: '~nosuch/x.json' begins with the home of nobody here; write the path out",
        ),
        ("orgs:", "state_dir: ~nosuch/x\norgs:", "7: state_dir: '~nosuch/x' begins with the home of nobody here"),
        ("orgs:", 'state_dir: "a\\0b"\norgs:', "7: state_dir: a path cannot hold a null character; take it out"),
        ("h100-llama-3.1-8b, port", "h" * 300 + ", port", "4: pools[0].engines[0].profile: 'hhhh"),
        ("port: 8100", "port: 0x" + "f" * 5000, "4: a number is above 9223372036854775807; lower it"),
        ("orgs:", "redis: localhost:6379\norgs:", "7: redis: not a Redis; write embedded, redis://HOST:PORT/0"),
        ("llama-3.1-8b\n", "8\n", "2: pools[0].model: input should be a valid string (it is 8)"),
        ("llama-3.1-8b\n", "'{x}'\n", "2: pools[0].model: '{x}' is not a name"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_its_remedy(tmp_path: Path, old: str, new: str, said: str) -> None:
    """One mistake gives one problem: line, place, what is wrong, what would be right."""
    assert problem(tmp_path, old, new).startswith(said)


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    """Nobody has to mend a file one error message at a time."""
    text = MINIMAL.replace("share: 0.6", "share: 2").replace("port: 8100", "port: -1").replace("orgs:", "org:")
    found = problems(tmp_path, text)
    assert sorted(each.split(":")[0] for each in found) == ["1", "4", "6", "7"]


def test_a_redis_password_is_not_repeated(tmp_path: Path) -> None:
    """A wrong Redis URL is not shown, for it may hold a password."""
    assert "hunter2" not in problem(tmp_path, "orgs:", "redis: http://:hunter2@cache\norgs:")


def test_two_pools_for_one_model_are_refused(tmp_path: Path) -> None:
    """A model has one pool; a second one is shown where the first is."""
    text = MINIMAL.replace(
        "tiers:", "  - {model: llama-3.1-8b, replicas: [{url: 'http://a:1', profile: h100-llama-3.1-8b}]}\ntiers:"
    )
    assert problems(tmp_path, text) == ["5: pools[1].model: 'llama-3.1-8b' is pools[0].model too; give each its own"]


def test_what_cannot_change_while_running_is_named(tmp_path: Path) -> None:
    """A new state folder or Redis is a problem, named without its password; anything else is none."""
    path = tmp_path / "penstock.yaml"
    path.write_text(MINIMAL)
    old = load_config(path)
    path.write_text(MINIMAL.replace("share: 0.6", "share: 0.5") + "gateway: {port: 81}\n")
    assert live_change_problems(old, load_config(path)) == []
    path.write_text(MINIMAL + "state_dir: elsewhere\nredis: redis://:hunter2@cache:6379/0\n")
    found = live_change_problems(old, load_config(path))
    assert [each.split(":")[0] for each in found] == ["state_dir", "redis"]
    assert "hunter2" not in "".join(found)


def test_what_changes_only_at_the_next_start_is_named(tmp_path: Path) -> None:
    """Of the gateway's settings only ``enforce`` changes at once; each other one that differs is named."""
    path = tmp_path / "penstock.yaml"
    path.write_text(MINIMAL)
    old = load_config(path)
    path.write_text(MINIMAL + "gateway: {port: 81, workers: 2, enforce: false}\n")
    assert changes_at_restart(old, load_config(path)) == [
        "gateway.port: changed from 8080 to 81, which takes effect at the next start",
        "gateway.workers: changed from 1 to 2, which takes effect at the next start",
    ]
    path.write_text(MINIMAL + "gateway: {enforce: false}\n")
    assert changes_at_restart(old, load_config(path)) == []


def test_a_mix_that_no_replica_can_hold_comes_with_the_scale_that_fits(tmp_path: Path) -> None:
    """A request longer than a profile's context is found before anything starts; the advised scale is accepted."""
    text = MINIMAL.replace("device: virtual, profile: h100-llama-3.1-8b", "device: cpu, profile: cpu-tiny-llama")
    (only,) = problems(tmp_path, text)
    assert only.endswith("(context 4096, KV cache 524288); a scale of at most 0.82 fits")
    (tmp_path / "penstock.yaml").write_text(text.replace("    engines:", "    mix: {scale: 0.82}\n    engines:"))
    assert load_config(tmp_path / "penstock.yaml").pools[0].mix.scale == 0.82


RULES = MINIMAL.replace("orgs:", "  - {name: free, share: 0.2}\norgs:") + "limits:\n"


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (
            "{name: tokens, amount: 5}",
            "11: limits[0].name: input should be 'requests', 'input_tokens', 'output_tokens'",
        ),
        ("{name: requests, amount: 0}", "11: limits[0].amount: input should be greater than or equal to 1 (it is 0)"),
        (
            "{name: requests, amount: 9007199254740992}",
            "11: limits[0].amount: input should be less than or equal to 90",
        ),
        ("{name: requests, amount: 5, per: caller}", "11: limits[0].per: input should be 'key', 'org', 'tier' or 'mo"),
        ("{name: requests, amount: 5, window: day}", "11: limits[0].window: input should be 'minute', '5h' or 'week'"),
        (
            "{name: requests, amount: 5, tiers: [gold]}",
            "11: limits[0].tiers[0]: there is no tier 'gold'; there are pro, ",
        ),
        ("{name: requests, amount: 5, orgs: [x]}", "11: limits[0].orgs[0]: there is no org 'x'; there are acme"),
        (
            "{name: requests, amount: 5, models: [x]}",
            "11: limits[0].models[0]: there is no model 'x'; there are llama-",
        ),
        (
            "{name: requests, amount: 5, keys: [pn-x]}",
            "11: limits[0].keys[0]: not a key's id; `penstock keys list` shows them",
        ),
        ("{name: requests, amount: 5, tiers: []}", "11: limits[0].tiers: names nobody; take it out to mean all"),
        (
            "{name: concurrency, amount: 5, window: week}",
            "11: limits[0].window: requests in flight are counted at each moment, not in a window; take window out",
        ),
        (
            "{name: requests, amount: 5, window: week, burst: 2}",
            "11: limits[0].burst: only a rate per minute has a burst; take it out",
        ),
        ("{name: concurrency, amount: 5, burst: 2}", "11: limits[0].burst: only a rate per minute has a burst"),
        ("{name: requests, amount: 200000000}", "11: limits[0].burst: is missing, so all of 200000000 might come at o"),
        (
            "{name: requests, amount: 5, tiers: [pro, free]}\n  - {name: requests, amount: 6, tiers: [free, pro]}",
            "12: limits[1]: limits the same callers' requests as limits[0]; keep one",
        ),
        (
            "{name: requests, amount: 5, per: org, tiers: [pro]}\n  - {name: requests, amount: 6, per: org}",
            "12: limits[1]: shares a bucket per org with limits[0], which names other callers; give both the same",
        ),
        (
            "{name: requests, amount: 5, per: model}\n  - {name: requests, amount: 6, per: model, orgs: [acme]}",
            "12: limits[1]: shares a bucket per model with limits[0]",
        ),
        (
            "{name: output_tokens, amount: 5, per: tier, orgs: [acme]}",
            "11: limits[0].orgs: limits per tier are derived too, for all its callers; take orgs out, or limit per key",
        ),
    ],
)
def test_a_mistaken_rule_is_named(tmp_path: Path, rules: str, said: str) -> None:
    """Names that are not there, numbers that cannot be counted, and buckets of two sizes are found before they act."""
    (only,) = problems(tmp_path, f"{RULES}  - {rules}\n")
    assert only.startswith(said)


def test_a_key_that_is_given_for_its_id_is_not_repeated(tmp_path: Path) -> None:
    """A key in the place of its id is refused without showing it."""
    assert "hunter2" not in problem(tmp_path, "orgs:", "shadow_keys: [pn-hunter2]\norgs:")


def test_rules_that_can_hold_together_are_taken(tmp_path: Path) -> None:
    """Rules for one bucket are taken where whoever shares it has the same ones; other buckets never clash."""
    rules = (
        "{name: requests, amount: 5}",
        "{name: requests, amount: 6, tiers: [pro]}",
        "{name: requests, amount: 5, window: 5h}",
        "{name: requests, amount: 5, window: week}",
        "{name: requests, amount: 5, per: org, tiers: [free]}",
        "{name: requests, amount: 4, per: org, tiers: [free], orgs: [acme]}",
        "{name: requests, amount: 5, per: tier}",
        "{name: concurrency, amount: 5, per: model}",
    )
    path = tmp_path / "penstock.yaml"
    path.write_text(RULES + "".join(f"  - {rule}\n" for rule in rules))
    assert len(policy_of(load_config(path)).rules) == len(rules)


@pytest.mark.parametrize(
    ("engine", "replica", "known"),
    [
        ("", "", True),
        (", extra_args: [--scheduling-policy, fcfs]", "", False),
        ("", "{url: 'http://gpu1:8001', profile: h100-llama-3.1-8b}", False),
        ("", "{url: 'http://gpu1:8001', profile: h100-llama-3.1-8b, priority_scheduling: true}", True),
    ],
)
def test_priorities_are_sent_only_where_every_replica_takes_them(
    tmp_path: Path, engine: str, replica: str, known: bool
) -> None:
    """Engines started here take priorities unless told otherwise; those that run elsewhere, only if marked."""
    text = MINIMAL.replace("port: 8100", f"port: 8100{engine}").replace("tiers:", f"    replicas: [{replica}]\ntiers:")
    path = tmp_path / "penstock.yaml"
    path.write_text(text)
    assert policy_of(load_config(path)).pools[0].priority_scheduling is known


def test_profiles_that_cannot_be_true_give_no_limits(tmp_path: Path) -> None:
    """Coefficients in milliseconds where seconds are meant are found by the GPU's own bounds, before anything runs."""
    profile = load_profile("h100-llama-3.1-8b")
    step = profile.step_time
    quick = msgspec.structs.replace(
        step, base_s=step.base_s / 1000, prompt_token_s=step.prompt_token_s / 1000, kv_token_s=step.kv_token_s / 1000
    )
    (tmp_path / "wrong.json").write_bytes(dump_profile(msgspec.structs.replace(profile, step_time=quick)))
    told = problems(tmp_path, MINIMAL.replace("h100-llama-3.1-8b", "./wrong.json"))
    assert told
    assert all("pools[0].engines[0].profile: h100-llama-3.1-8b: " in line for line in told)


def test_contexts_that_were_not_measured_are_taken_on_request(tmp_path: Path) -> None:
    """Limits for much shorter requests than a profile was fitted from are refused, and with extrapolate: true taken."""
    text = MINIMAL.replace("h100-llama-3.1-8b", "h100-gpt-oss-20b").replace("model: llama-3.1-8b", "model: gpt-oss-20b")
    short = text.replace("    engines:", "    mix: {scale: 0.05}\n    engines:")
    (only,) = problems(tmp_path, short)
    assert "pools[0].mix: h100-gpt-oss-20b: extrapolated: a mean context of" in only
    tier = text.replace("share: 0.6", "share: 0.6, mix: {scale: 0.05}")
    (only,) = problems(tmp_path, tier)
    assert "tiers[0].mix: h100-gpt-oss-20b: extrapolated" in only
    for each in (short, tier):
        (tmp_path / "penstock.yaml").write_text(each.replace("    engines:", "    extrapolate: true\n    engines:"))
        assert load_config(tmp_path / "penstock.yaml").pools[0].extrapolate
