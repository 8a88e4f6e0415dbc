"""The sweep over open accounts."""

from __future__ import annotations

import pytest

from ratelimit.gateway.ledger import Ledger
from ratelimit.gateway.metrics import GatewayMetrics


class Open:
    """An account that counts its renewals, and may fail at them."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.renewed = 0
        self._fault = fault

    def renew(self) -> None:
        """Count it."""
        self.renewed += 1
        if self._fault is not None:
            raise self._fault


async def test_one_accounts_fault_does_not_keep_the_others_from_renewal(caplog: pytest.LogCaptureFixture) -> None:
    """It is counted and logged once a sweep, and the sweep goes on, to it as well."""
    metrics = GatewayMetrics()
    ledger = Ledger(metrics, 30)
    accounts = [Open(), *(Open(ValueError("odd")) for _ in range(3)), Open()]
    for account in accounts:
        ledger.opened(account)
    await ledger.sweep()
    await ledger.sweep()
    assert [account.renewed for account in accounts] == 5 * [2]
    assert metrics.registry.get_sample_value("penstock_renewal_faults_total") == 6
    assert len(caplog.records) == 2
