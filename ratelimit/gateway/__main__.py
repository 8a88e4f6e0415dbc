"""One gateway worker, with the settings that its supervisor puts into the environment."""

from __future__ import annotations

import logging
import os
import sys

import msgspec

from ratelimit.gateway.server import GatewayStartError, run_gateway
from ratelimit.gateway.settings import SETTINGS_VARIABLE, GatewaySettings


def main() -> int:
    """Serve until SIGTERM; the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    settings = msgspec.json.decode(os.environ.pop(SETTINGS_VARIABLE), type=GatewaySettings)
    try:
        run_gateway(settings)
    except GatewayStartError as error:
        logging.getLogger(__name__).error("%s", error)
        return 1
    return 0


sys.exit(main())
