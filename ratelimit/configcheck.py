"""What can be wrong with a config: fields that do not fit, and parts that contradict each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ratelimit.finding import Finding, dotted
from ratelimit.labelselector import is_label_value
from ratelimit.promisecheck import hopeless_slo, tier_problems, too_long_mix, unknown_mix, unmeasured_mix
from ratelimit.publication import MOST_BURST
from ratelimit.yamlfile import Where
from serving import plausible
from serving.profile import ProfileError, load_profile

if TYPE_CHECKING:
    from ratelimit.config import Config, EngineConfig, LimitConfig, PoolConfig, TierConfig

#: Fields whose value may hold a password, or a key where its id is meant.
_SECRET_FIELDS = frozenset({"redis", "keys", "shadow_keys"})
_LAST_PORT = 65535
_SHARE_TOLERANCE = 1e-9
#: Fields of older versions, and what takes their place.
_REPLACED = {
    "spare_replicas": "is no longer there; write spare_domains: how many failure domains (nodes, racks) may be lost "
    "with every limit still served, and label replicas that fail together with the same domain",
}


def invalid_fields(error: ValidationError, root: type[BaseModel]) -> list[Finding]:
    """The mistakes that pydantic found, in words."""
    return [Finding(tuple(detail["loc"]), _what(detail, root)) for detail in error.errors(include_url=False)]


def _what(detail: ErrorDetails, root: type[BaseModel]) -> str:
    where = tuple(detail["loc"])
    name = str(where[-1]) if where else ""
    match detail["type"]:
        case "missing":
            return f"is missing; every {dotted(where[:-1]) or 'config'} needs {name!r}"
        case "extra_forbidden":
            return _unknown_field(name, _fields_at(root, where[:-1]))
        case "string_pattern_mismatch":
            return f"{detail['input']!r} is not a name; use letters, digits and . _ - (models also / and :)"
        case "value_error":
            problem = str(detail["ctx"]["error"])
        case _:
            problem = detail["msg"][0].lower() + detail["msg"][1:]
    return problem if _SECRET_FIELDS.intersection(where) else f"{problem} (it is {_short(detail['input'])})"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unknown_field(name: str, known: list[str]) -> str:
    if name in _REPLACED:
        return _REPLACED[name]
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
    return f"there is no field {name!r}; {hint}"


def _fields_at(root: type[BaseModel], where: Where) -> list[str]:
    """The fields of the section at a path of the config."""
    section = root
    for part in where:
        if isinstance(part, str) and part in section.model_fields:
            section = _section(section.model_fields[part].annotation) or section
    return list(section.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, (_section(argument) for argument in get_args(annotation))), None)


def contradictions(config: Config) -> list[Finding]:
    """The mistakes that only show when parts are seen together, each once, in the order of the file."""
    found = (
        *_empty(config),
        *_ports(config),
        *_twice("pools", "model", [pool.model for pool in config.pools]),
        *(finding for i, pool in enumerate(config.pools) for finding in _pool(("pools", i), pool)),
        *_same_urls(config),
        *_twice("tiers", "name", [tier.name for tier in config.tiers]),
        *_tiers(config.tiers),
        *tier_problems(config.tiers, config.pools),
        *_twice("orgs", "name", [org.name for org in config.orgs]),
        *_org_models(config),
        *_rules(config),
    )
    return list(dict.fromkeys(found))


def live_change_problems(old: Config, new: Config) -> list[str]:
    """Why ``new`` cannot take the place of ``old`` while Penstock runs: the state and Redis are where they are."""
    return [
        f"{name}: cannot change while Penstock runs; restart it to use the new one, or put the old one back"
        for name in ("state_dir", "redis")
        if getattr(old, name) != getattr(new, name)
    ]


def changes_at_restart(old: Config, new: Config) -> list[str]:
    """What ``new`` changes that takes effect only at the next start: settings of processes, enforce aside."""
    sections: dict[str, tuple[BaseModel, BaseModel]] = {
        "gateway": (old.gateway, new.gateway),
        "controller": (old.controller, new.controller),
    }
    return [
        f"{section}.{name}: changed from {getattr(before, name)} to {getattr(after, name)}, "
        "which takes effect at the next start"
        for section, (before, after) in sections.items()
        for name in type(after).model_fields
        if name != "enforce" and getattr(before, name) != getattr(after, name)
    ]


def _empty(config: Config) -> Iterator[Finding]:
    for section, entries in (("pools", config.pools), ("tiers", config.tiers), ("orgs", config.orgs)):
        if not entries:
            yield Finding((section,), "is empty; name at least one")


def _twice(section: str, field: str, names: list[str]) -> Iterator[Finding]:
    for position, name in enumerate(names):
        first = names.index(name)
        if first < position:
            yield Finding((section, position, field), f"{name!r} is {section}[{first}].{field} too; give each its own")


def _ports(config: Config) -> Iterator[Finding]:
    """Ports used twice, among the gateway's data port, its workers' admin ports and the engines."""
    taken: dict[int, Where] = {}
    for where, ports in _port_uses(config):
        if ports and ports[-1] > _LAST_PORT:
            yield Finding(
                where, f"the last of {len(ports)} ports would be {ports[-1]}; the highest there is is {_LAST_PORT}"
            )
            continue
        clash = next((port for port in ports if port in taken), None)
        if clash is not None:
            span = f" (this takes {ports[0]} to {ports[-1]})" if len(ports) > 1 else ""
            yield Finding(where, f"port {clash} is taken by {dotted(taken[clash])}{span}; choose another")
        taken |= {port: where for port in ports if port not in taken}


def _port_uses(config: Config) -> Iterator[tuple[Where, list[int]]]:
    yield ("gateway", "port"), [config.gateway.port]
    yield ("gateway", "admin_port"), config.gateway.admin_ports()
    if config.controller.metrics_port is not None:
        yield ("controller", "metrics_port"), [config.controller.metrics_port]
    for i, pool in enumerate(config.pools):
        for j, engine in enumerate(pool.engines):
            yield ("pools", i, "engines", j, "port"), engine.ports()


def _pool(where: Where, pool: PoolConfig) -> Iterator[Finding]:
    if not pool.engines and not pool.replicas and pool.discover is None:
        yield Finding(
            where,
            "has neither engines nor replicas nor discover; name one (count: 0 keeps a pool without running any)",
        )
    yield from unknown_mix(where, pool.mix)
    for j, engine in enumerate(pool.engines):
        at = (*where, "engines", j)
        yield from _engine(at, engine)
        yield from _profile((*at, "profile"), engine.profile, pool)
    for j, replica in enumerate(pool.replicas):
        yield from _profile((*where, "replicas", j, "profile"), replica.profile, pool)
    if pool.discover is not None:
        yield from _discover((*where, "discover", "profiles"), pool.discover.profiles, pool)


def _discover(where: Where, references: Sequence[str], pool: PoolConfig) -> Iterator[Finding]:
    """Profiles that a label could not name, or could name two of."""
    known: dict[str, str] = {}
    for j, reference in enumerate(references):
        yield from _profile((*where, j), reference, pool)
        with suppress(ProfileError, OSError, ValueError):
            name = load_profile(reference).name
            if name in known:
                yield Finding((*where, j), f"is named {name!r}, as {known[name]} is; a label names only one, keep one")
            if not is_label_value(name):
                yield Finding((*where, j), f"is named {name!r}, which no label can be; give it a name of letters and -")
            known.setdefault(name, reference)


def _engine(where: Where, engine: EngineConfig) -> Iterator[Finding]:
    if engine.device == "gpu" and engine.model_path is None:
        yield Finding((*where, "model_path"), "is missing; a gpu engine needs the model that vLLM is to serve")
    if engine.device != "gpu" and engine.model_path is not None:
        yield Finding((*where, "model_path"), f"only a gpu engine has one, this is {engine.device}; take it out")
    if engine.device != "virtual" and engine.slowdown != 1:
        yield Finding(
            (*where, "slowdown"), f"only a virtual engine can be slowed, this is {engine.device}; take it out"
        )


def _profile(where: Where, name: str, pool: PoolConfig) -> Iterator[Finding]:
    try:
        profile = load_profile(name)
    except ProfileError as error:
        yield Finding(where, str(error))
    except (OSError, ValueError) as error:
        yield Finding(where, f"{_short(name)} cannot name a profile: {error}")
    else:
        yield from (Finding(where, f"{profile.name}: {problem}") for problem in plausible.contradictions(profile))
        yield from hopeless_slo(where[:2], profile, pool.slo)
        yield from too_long_mix(where[:2], profile, pool.mix)
        if not pool.extrapolate:
            yield from unmeasured_mix(where[:2], profile, pool.mix)
        if pool.default_max_output is not None and pool.default_max_output >= profile.limits.max_model_len:
            yield Finding(
                (*where[:2], "default_max_output"),
                f"{pool.default_max_output} leaves no room for a prompt: the context of {profile.name} has "
                f"{profile.limits.max_model_len} tokens",
            )


def _same_urls(config: Config) -> Iterator[Finding]:
    """Replicas listed twice, or at the address of an engine that is started here."""
    taken: dict[str, Where] = {}
    for i, pool in enumerate(config.pools):
        for j, engine in enumerate(pool.engines):
            taken |= {f"http://127.0.0.1:{port}": ("pools", i, "engines", j) for port in engine.ports()}
    for i, pool in enumerate(config.pools):
        for j, replica in enumerate(pool.replicas):
            where: Where = ("pools", i, "replicas", j)
            if replica.url in taken:
                yield Finding((*where, "url"), f"{replica.url} is {dotted(taken[replica.url])} already; count it once")
            taken.setdefault(replica.url, where)


def _tiers(tiers: Iterable[TierConfig]) -> Iterator[Finding]:
    shares = [tier.share for tier in tiers]
    if sum(shares) > 1 + _SHARE_TOLERANCE:
        said = " + ".join(f"{share:g}" for share in shares)
        yield Finding(("tiers",), f"the shares add up to {said} = {sum(shares):g}; together they are at most 1")
    for i, tier in enumerate(tiers):
        if tier.ceiling < tier.share:
            yield Finding(
                ("tiers", i, "ceiling"),
                f"{tier.ceiling:g} is below the share of {tier.share:g} that is assured; allow at least that",
            )


def _org_models(config: Config) -> Iterator[Finding]:
    served = [pool.model for pool in config.pools]
    for i, org in enumerate(config.orgs):
        for j, model in enumerate(org.models or ()):
            if model not in served:
                yield Finding(("orgs", i, "models", j), f"no pool serves {model!r}; there are {', '.join(served)}")


def _rules(config: Config) -> Iterator[Finding]:
    """The operator's own limits: names that are not there, numbers that mean nothing, and buckets that two share."""
    known = {
        "tiers": [tier.name for tier in config.tiers],
        "orgs": [org.name for org in config.orgs],
        "models": [pool.model for pool in config.pools],
    }
    for i, limit in enumerate(config.limits):
        where: Where = ("limits", i)
        for selector, names in known.items():
            for j, name in enumerate(getattr(limit, selector) or ()):
                if name not in names:
                    yield Finding(
                        (*where, selector, j), f"there is no {selector[:-1]} {name!r}; there are {', '.join(names)}"
                    )
        for selector in (*known, "keys"):
            if getattr(limit, selector) == ():
                yield Finding((*where, selector), "names nobody; take it out to mean all")
        yield from _rule_numbers(where, limit)
        yield from _rule_bucket(where, limit, config.limits[:i])


def _rule_numbers(where: Where, limit: LimitConfig) -> Iterator[Finding]:
    if limit.name == "concurrency" and limit.window != "minute":
        yield Finding(
            (*where, "window"), "requests in flight are counted at each moment, not in a window; take window out"
        )
        return
    rated = limit.name != "concurrency" and limit.window == "minute"
    if limit.burst is not None and not rated:
        yield Finding((*where, "burst"), "only a rate per minute has a burst; take it out")
    elif rated and limit.burst is None and limit.amount > MOST_BURST:
        yield Finding(
            (*where, "burst"),
            f"is missing, so all of {limit.amount} might come at once; the most that can be counted is {MOST_BURST}, "
            "write a burst of at most that",
        )


#: The callers who share a bucket may still differ in these; those in one ``per`` are told apart by the others.
_MIXED_IN: dict[str, tuple[str, ...]] = {
    "key": (),
    "org": ("tiers", "keys"),
    "tier": ("orgs", "keys"),
    "model": ("tiers", "orgs", "keys"),
}


def _rule_bucket(where: Where, limit: LimitConfig, earlier: Sequence[LimitConfig]) -> Iterator[Finding]:
    """A bucket has one size for all who share it, so what is said of it is the same for all of them."""
    mixed = [selector for selector in _MIXED_IN[limit.per] if getattr(limit, selector) is not None]
    if mixed and limit.per == "tier" and limit.window == "minute":
        yield Finding(
            (*where, mixed[0]),
            f"limits per tier are derived too, for all its callers; take {mixed[0]} out, or limit per key or org",
        )
    for j, other in enumerate(earlier):
        if (other.name, other.per, other.window) != (limit.name, limit.per, limit.window):
            continue
        if _selectors(limit) == _selectors(other):
            yield Finding(where, f"limits the same callers' {limit.name} as limits[{j}]; keep one")
        elif any(getattr(limit, selector) != getattr(other, selector) for selector in _MIXED_IN[limit.per]):
            yield Finding(
                where,
                f"shares a bucket per {limit.per} with limits[{j}], which names other callers; give both the same "
                f"{' and '.join(_MIXED_IN[limit.per])}, or limit per key",
            )


def _selectors(limit: LimitConfig) -> tuple[frozenset[str] | None, ...]:
    chosen = (limit.tiers, limit.orgs, limit.models, limit.keys)
    return tuple(None if names is None else frozenset(names) for names in chosen)
