from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.support.redis", "tests.support.servers", "tests.support.tls"]

# No absolute timing in tests: an example that is slow because the machine is busy proves nothing. CI tries the same
# examples each time, so that what fails there fails everywhere; machines of developers go on looking for new ones.
settings.register_profile("developer", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("developer"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "developer")
