"""The parts of the chart that follow from the service's code: its shipped profiles, and the schema of its config.

    python -m tests.support.chart_parts

writes them anew; ``outdated`` says which no longer fit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ratelimit.config import Config
from serving.profile import load_profile, shipped_profiles
from tests.support.chart import CHART

_PROFILES = CHART / "files" / "profiles.json"
_SCHEMA = CHART / "values.schema.json"
_PREFIX = "config."
#: What the chart decides itself, by section; it must not be in the values. The engines of a pool are those that
#: ``penstock up`` starts on its own machine.
_OF_THE_CHART = {
    "Config": ("state_dir", "redis"),
    "GatewayConfig": ("host", "port", "admin_port", "admin_token_file", "workers", "drain_s", "drain_delay_s"),
    "ControllerConfig": ("metrics_host", "metrics_port"),
    "PoolConfig": ("engines",),
}
_AT_LEAST_ONE = ("pools", "tiers", "orgs")
#: Of pydantic's keywords, those that say nothing to a validator.
_TALK = ("title", "default", "description", "format")


def profile_table() -> dict[str, Any]:
    """What the templates need to know of the shipped profiles."""
    return {
        name: {
            "model": profile.model,
            "gpu": profile.gpu,
            "gpus_per_replica": profile.gpus_per_replica,
            "limits": {
                "max_num_seqs": profile.limits.max_num_seqs,
                "max_num_batched_tokens": profile.limits.max_num_batched_tokens,
                "max_model_len": profile.limits.max_model_len,
            },
        }
        for name in shipped_profiles()
        for profile in [load_profile(name)]
    }


def config_schemas() -> dict[str, Any]:
    """Schemas of the sections of penstock.yaml, as far as they are the values', by the names they have in ``$defs``."""
    root = Config.model_json_schema()
    sections: dict[str, Any] = {**root.pop("$defs"), "Config": root}
    for section, fields in _OF_THE_CHART.items():
        for field in fields:
            sections[section]["properties"].pop(field, None)
    for field in _AT_LEAST_ONE:
        sections["Config"]["properties"][field]["minItems"] = 1
    used = _reachable("Config", sections)
    return {_PREFIX + name: _plain(section) for name, section in sorted(sections.items()) if name in used}


def outdated() -> list[str]:
    """The files that differ from what ``write`` would write."""
    return [path.name for path, text in _wanted().items() if path.read_text() != text]


def write() -> None:
    """Renew the files."""
    for path, text in _wanted().items():
        path.write_text(text)


def _wanted() -> dict[Path, str]:
    schema = json.loads(_SCHEMA.read_text())
    others = {name: part for name, part in schema["$defs"].items() if not name.startswith(_PREFIX)}
    schema["$defs"] = others | config_schemas()
    return {
        _PROFILES: json.dumps(profile_table(), indent=1, sort_keys=True) + "\n",
        _SCHEMA: json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
    }


def _reachable(start: str, sections: dict[str, Any]) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _references(sections[name])
    return found


def _references(part: object) -> list[str]:
    if isinstance(part, list):
        return [name for entry in part for name in _references(entry)]
    if not isinstance(part, dict):
        return []
    own = [str(part["$ref"]).rpartition("/")[2]] if "$ref" in part else []
    return own + [name for entry in part.values() for name in _references(entry)]


def _plain(part: Any, is_fields: bool = False) -> Any:
    """Without talk, and with references to where the sections are here; a field may have a keyword's name."""
    if isinstance(part, list):
        return [_plain(entry) for entry in part]
    if not isinstance(part, dict):
        return part
    kept = {name: entry for name, entry in part.items() if is_fields or name not in _TALK}
    if "$ref" in kept:
        return {"$ref": f"#/$defs/{_PREFIX}{str(kept['$ref']).rpartition('/')[2]}"}
    return {name: _plain(entry, is_fields=not is_fields and name == "properties") for name, entry in kept.items()}


if __name__ == "__main__":
    write()
