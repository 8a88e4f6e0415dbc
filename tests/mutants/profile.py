"""A pytest plugin: Hypothesis looks for a failure, the same way each time, and does not make it small."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

NAME = "mutants"

settings.register_profile(
    NAME,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
