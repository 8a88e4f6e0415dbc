"""``penstock.yaml``: what the operator writes, checked as a whole, every mistake named with its line.

The classes describe the file; ``load_config`` is the door, and ``policy_of`` turns it into the pure ``Policy``.
Relative paths in the file are relative to the file's folder.
"""

from __future__ import annotations

from pathlib import Path
from re import fullmatch
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo

from ratelimit.configcheck import contradictions, invalid_fields
from ratelimit.labelselector import dns_label, label_selector
from ratelimit.policy import (
    Holds,
    KeyAmounts,
    LimitName,
    LimitRule,
    LimitScope,
    LimitWindow,
    OrgPolicy,
    Policy,
    PoolPolicy,
    TierPolicy,
)
from ratelimit.publication import MOST_BURST, MOST_PER_MINUTE
from ratelimit.yamlfile import YamlFileError, read_document
from serving.capacity import Slo, WorkloadMix
from serving.engine.command import schedules_by_priority
from serving.mixes import load_mix
from serving.profile import load_profile


class ConfigError(ValueError):
    """A config that cannot be used. Each of ``problems`` reads "FILE:LINE: where: what is wrong; what is right"."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def _in_folder(value: str | Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder", Path())
    if "\0" in str(value):
        raise ValueError("a path cannot hold a null character; take it out")
    try:
        return Path(folder) / Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{str(value)!r} begins with the home of nobody here; write the path out") from error


def _profile_path(value: str, info: ValidationInfo) -> str:
    """A profile given as a file is found beside the config; a shipped one keeps its name."""
    return str(_in_folder(value, info)) if value.endswith(".json") or "/" in value else value


def _http_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError("not an http URL; write one such as http://127.0.0.1:8001")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("names more than a server; write only http://HOST:PORT, without /v1")
    return value.rstrip("/")


def _key_id(value: str) -> str:
    if not fullmatch("k_[0-9a-f]{1,64}", value):
        raise ValueError("not a key's id; `penstock keys list` shows them, such as k_1a2b3c4d")
    return value


_REDIS_SCHEMES = ("redis://", "rediss://", "unix://", "redis+sentinel://", "rediss+sentinel://")


def _redis_url(value: str) -> str:
    if value.startswith(("redis+cluster://", "rediss+cluster://")):
        raise ValueError("a Redis Cluster cannot hold publications, keys and usage yet; use one Redis, or Sentinel")
    if value != "embedded" and not value.startswith(_REDIS_SCHEMES):
        raise ValueError(
            "not a Redis; write embedded, redis://HOST:PORT/0, rediss://… for TLS, unix:///PATH, or "
            "redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/0"
        )
    return value


Port = Annotated[int, Field(ge=1, le=65535)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}$")]
ProfileName = Annotated[str, Field(min_length=1), AfterValidator(_profile_path)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
SloBound = Annotated[float, Field(gt=0, le=3_600_000)]
TpotBound = Annotated[float, Field(gt=0, le=60_000)]
Slowdown = Annotated[float, Field(ge=1, le=10_000)]
Share = Annotated[float, Field(ge=0, le=1)]
KeyId = Annotated[str, AfterValidator(_key_id)]
Amount = Annotated[int, Field(ge=1, le=MOST_PER_MINUTE)]
LocalPath = Annotated[Path, AfterValidator(_in_folder)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
LabelSelector = Annotated[str, AfterValidator(label_selector)]
DnsLabel = Annotated[str, AfterValidator(dns_label)]


class Section(BaseModel):
    """A part of the file. Unknown fields are mistakes, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class GatewayConfig(Section):
    """The gateway's sockets and bounds. Worker i has its metrics and administration on ``admin_port`` + i.

    ``redis_timeout_ms`` bounds each decision of the limiter; a slower Redis counts as away. After SIGTERM connections
    are accepted for ``drain_delay_s`` more, for load balancers to hear of it; then open requests get ``drain_s`` to
    finish. ``admin_token_file`` holds what the admin ports ask for; unset, it is made once, as ``admin_token`` in
    ``state_dir``.
    """

    host: str = Field(default="127.0.0.1", min_length=1)
    port: Port = 8080
    admin_port: Port = 9090
    workers: int = Field(default=1, ge=1, le=64)
    enforce: bool = True
    request_timeout_s: Positive = 600
    max_body_bytes: int = Field(default=8 << 20, ge=1024)
    body_timeout_s: Positive = 20
    redis_timeout_ms: float = Field(default=30, ge=1, le=60_000)
    drain_s: float = Field(default=20, ge=0, le=3_600)
    drain_delay_s: float = Field(default=0, ge=0, le=300)
    admin_token_file: LocalPath | None = None

    def admin_ports(self) -> list[int]:
        """The admin port of each worker."""
        return list(range(self.admin_port, self.admin_port + self.workers))


class ControllerConfig(Section):
    """The controller's own metrics, where a port is named, and how it counts keys.

    A key takes part in its tier's share on a model until it has been idle there for ``key_idle_s``.
    """

    metrics_host: str = Field(default="127.0.0.1", min_length=1)
    metrics_port: Port | None = None
    key_idle_s: float = Field(default=900.0, ge=60, le=7 * 86_400)


class SloConfig(Section):
    """The bounds on time to first token and time per output token, for a device at full speed."""

    ttft_ms: SloBound = 1000
    tpot_ms: TpotBound = 50
    percentile: float = Field(default=95, ge=50, lt=100)

    def slo(self) -> Slo:
        """The same in seconds, as a pure value."""
        return Slo(self.ttft_ms / 1000, self.tpot_ms / 1000, self.percentile)


class MixConfig(Section):
    """The traffic a pool or a tier is sized for: a named mix, its lengths multiplied by ``scale``.

    ``cached_share`` of each prompt is taken to be in the prefix cache. Write a low quantile of what is seen, not the
    mean: whoever is promised capacity has it when the cache is cold too.
    """

    name: str = "chat"
    scale: float = Field(default=1.0, gt=0, le=100)
    cached_share: float = Field(default=0.0, ge=0, lt=1)

    def shapes(self) -> WorkloadMix:
        """The mix itself. Raises ``UnknownMixError``."""
        return load_mix(self.name, self.scale, self.cached_share)


class EngineConfig(Section):
    """``count`` replicas that ``penstock up`` starts, on ``port`` and the ports after it."""

    device: Literal["virtual", "cpu", "gpu"]
    profile: ProfileName
    port: Port
    count: int = Field(default=1, ge=0, le=64)
    slowdown: Slowdown = 1.0
    model_path: str | None = None
    extra_args: tuple[str, ...] = ()

    def ports(self) -> list[int]:
        """The port of each replica."""
        return list(range(self.port, self.port + self.count))


class ReplicaConfig(Section):
    """One vLLM server that runs elsewhere. ``priority_scheduling``: it was started with that scheduling policy.

    ``domain`` labels the failure domain (node, rack) that it shares with others of the same label; without one, as many
    replicas as a failure domain of its GPU type usually holds are taken to fail together.
    """

    url: HttpUrl
    profile: ProfileName
    slowdown: Slowdown = 1.0
    priority_scheduling: bool = False
    domain: Name | None = None


class DiscoverConfig(Section):
    """Replicas that Kubernetes knows of: the endpoints of the EndpointSlices in ``namespace`` that ``selector`` picks.

    Their labels name one of the ``profiles`` by its name. ``namespace`` unset: that of the controller's pod, or else
    ``default``. ``port``: the name of the slices' port, which may be left out where they have only one.
    """

    selector: LabelSelector
    namespace: DnsLabel | None = None
    port: DnsLabel | None = None
    profiles: tuple[ProfileName, ...] = Field(min_length=1)
    slowdown: Slowdown = 1.0
    priority_scheduling: bool = False


class PoolConfig(Section):
    """One model: its promise, its traffic and its replicas.

    ``default_max_output``: the tokens that an answer is expected to need while nothing is learned of it; if unset, the
    90th percentile of the mix. ``extrapolate``: limits may rest on profiles that were not measured at the mix's
    context; they are marked. What the ``spare_domains`` largest failure domains serve is kept free.
    """

    model: ModelName
    slo: SloConfig = SloConfig()
    mix: MixConfig = MixConfig()
    default_max_output: int | None = Field(default=None, ge=1)
    spare_domains: int = Field(default=0, ge=0, le=1000)
    extrapolate: bool = False
    raise_after_s: float = Field(default=5.0, ge=0, allow_inf_nan=False)
    stuck_after_s: Positive = 5.0
    engines: tuple[EngineConfig, ...] = ()
    replicas: tuple[ReplicaConfig, ...] = ()
    discover: DiscoverConfig | None = None

    def profiles(self) -> list[str]:
        """The profiles that its replicas have, or that those to be discovered may have, each once."""
        named = {engine.profile for engine in self.engines} | {replica.profile for replica in self.replicas}
        return sorted(named | set(self.discover.profiles if self.discover else ()))


class KeyAmountsConfig(Section):
    """Amounts of each key, per minute (``concurrency``: in flight)."""

    requests: Amount | None = None
    input_tokens: Amount | None = None
    output_tokens: Amount | None = None
    concurrency: Amount | None = None

    def amounts(self) -> KeyAmounts:
        """The same as a pure value."""
        return KeyAmounts(**self.model_dump())


class TierConfig(Section):
    """A class of callers; see ``TierPolicy``."""

    name: Name
    share: Share
    ceiling: float = Field(default=1.0, gt=0, le=1)
    priority: int = Field(default=0, ge=0)
    burst_s: float = Field(default=5.0, gt=0, le=3600)
    unlimited: tuple[LimitName, ...] = ()
    holds: Holds = "learned"
    shadow: bool = False
    mix: MixConfig | None = None
    slo: SloConfig | None = None
    minimum: KeyAmountsConfig = KeyAmountsConfig()
    maximum: KeyAmountsConfig = KeyAmountsConfig()
    oversell: float | None = Field(default=None, ge=1, le=1_000_000)

    def policy(self) -> TierPolicy:
        """The same as a pure value."""
        return TierPolicy(
            name=self.name,
            share=self.share,
            ceiling=self.ceiling,
            priority=self.priority,
            burst_s=self.burst_s,
            unlimited=self.unlimited,
            holds=self.holds,
            shadow=self.shadow,
            mix=self.mix.shapes() if self.mix else None,
            slo=self.slo.slo() if self.slo else None,
            minimum=self.minimum.amounts(),
            maximum=self.maximum.amounts(),
            oversell=self.oversell,
        )


class ApprovalConfig(Section):
    """What waits for an operator: a publication in which a limit falls by more than ``falls_above`` of what it was.

    Unset, nothing waits.
    """

    falls_above: float | None = Field(default=None, ge=0, lt=1)


class OrgConfig(Section):
    """An organisation that has keys, and the models they may use; None means all."""

    name: Name
    models: tuple[ModelName, ...] | None = None


class LimitConfig(Section):
    """A limit that the operator sets, beside those derived; see ``LimitRule``."""

    name: LimitName
    amount: Amount
    per: LimitScope = "key"
    window: LimitWindow = "minute"
    burst: int | None = Field(default=None, ge=1, le=MOST_BURST)
    tiers: tuple[Name, ...] | None = None
    orgs: tuple[Name, ...] | None = None
    models: tuple[ModelName, ...] | None = None
    keys: tuple[KeyId, ...] | None = None
    reason: str = Field(default="", max_length=500)

    def rule(self) -> LimitRule:
        """The same as a pure value."""
        return LimitRule(**self.model_dump())


class Config(Section):
    """The whole file."""

    state_dir: LocalPath = Path(".penstock")
    redis: Annotated[str, AfterValidator(_redis_url), Field(repr=False)] = "embedded"
    gateway: GatewayConfig = GatewayConfig()
    controller: ControllerConfig = ControllerConfig()
    pools: tuple[PoolConfig, ...]
    tiers: tuple[TierConfig, ...]
    orgs: tuple[OrgConfig, ...]
    limits: tuple[LimitConfig, ...] = ()
    shadow_keys: tuple[KeyId, ...] = ()
    approval: ApprovalConfig = ApprovalConfig()


def load_config(path: Path) -> Config:
    """Read, parse and check a config file, whole. Raises ``ConfigError`` with every problem found."""
    try:
        document = read_document(path)
    except YamlFileError as error:
        raise ConfigError([f"{path}:{problem.line}: {problem.what}" for problem in error.problems]) from error
    if not isinstance(document.value, dict):
        what = "is empty" if document.value is None else f"is not a mapping but {type(document.value).__name__}"
        raise ConfigError([f"{path}:1: {what}; write pools, tiers and orgs, as in the example penstock.yaml"])
    try:
        config = Config.model_validate(document.value, context={"folder": path.absolute().parent})
    except ValidationError as error:
        findings = invalid_fields(error, Config)
    else:
        findings = contradictions(config)
        if not findings:
            return config
    raise ConfigError([finding.text(path, document) for finding in findings])


def policy_of(config: Config) -> Policy:
    """The rules of a config, as the pure values that limits are derived from."""
    return Policy(
        tiers=tuple(tier.policy() for tier in config.tiers),
        pools=tuple(_pool_policy(pool) for pool in config.pools),
        enforce=config.gateway.enforce,
        orgs=tuple(OrgPolicy(org.name, org.models) for org in config.orgs),
        rules=tuple(limit.rule() for limit in config.limits),
        shadow_keys=config.shadow_keys,
    )


def _pool_policy(pool: PoolConfig) -> PoolPolicy:
    profiles = [load_profile(name) for name in pool.profiles()]
    return PoolPolicy(
        model=pool.model,
        slo=pool.slo.slo(),
        mix=pool.mix.shapes(),
        default_max_output=pool.default_max_output,
        spare_domains=pool.spare_domains,
        max_model_len=min(profile.limits.max_model_len for profile in profiles),
        tokens_per_byte=max(profile.tokens_per_byte for profile in profiles),
        priority_scheduling=all(schedules_by_priority(engine.extra_args) for engine in pool.engines)
        and all(replica.priority_scheduling for replica in pool.replicas)
        and (pool.discover is None or pool.discover.priority_scheduling),
    )
