"""A link over TLS: real Redis behind a listener that speaks TLS for it, since the test servers are built without."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from ratelimit.link import Link
from tests.support.tls import tls_in_front_of

CONNECT_S = 10.0


async def test_a_certificate_that_the_url_trusts_is_accepted(redis_url: str, certificate: Path) -> None:
    """With the authority named in the URL, many commands of all sizes pass over TLS."""
    async with tls_in_front_of(redis_url.removeprefix("unix://"), certificate) as port:
        url = f"rediss://localhost:{port}/0?ssl_ca_certs={certificate / 'cert.pem'}"
        async with aclosing(Link(url, CONNECT_S)) as link:
            sent = ["x" * (number * 97 % 5_000) for number in range(300)]
            replies = await asyncio.gather(*(link.command("k", "ECHO", text) for text in sent))
            assert [reply.decode() for reply in replies] == sent


@pytest.mark.parametrize(("host", "trusted"), [("localhost", False), ("127.0.0.1", True)])
async def test_a_certificate_that_proves_nothing_is_refused(
    redis_url: str, certificate: Path, host: str, trusted: bool
) -> None:
    """An unknown authority, and a certificate for another host name, are refused before any password is sent."""
    async with tls_in_front_of(redis_url.removeprefix("unix://"), certificate) as port:
        options = f"?ssl_ca_certs={certificate / 'cert.pem'}" if trusted else ""
        async with aclosing(Link(f"rediss://:secret@{host}:{port}/0{options}", CONNECT_S)) as link:
            with pytest.raises(RedisConnectionError, match="certificate verify failed") as caught:
                await link.command("k", "PING")
    assert "secret" not in str(caught.value)
