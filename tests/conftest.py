from __future__ import annotations

from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.support.redis"]

# No absolute timing in tests: an example that is slow because the machine is busy proves nothing.
settings.register_profile("penstock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("penstock")
