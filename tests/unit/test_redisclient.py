"""Which Redis URLs are refused before anything is connected to."""

from __future__ import annotations

import pytest

from ratelimit.redisclient import RedisUrlError, redis_client


@pytest.mark.parametrize(
    "url",
    [
        "redis://h:6379/0?sokcet_timeout=hunter2",
        "unix:///run/redis.sock?hunter2=1",
        "redis://h:6379/0?ssl_ca_certs=hunter2",
        "redis://h:6379/0?socket_timeout=hunter2",
    ],
)
def test_an_option_that_is_not_known_is_told_and_not_shown(url: str) -> None:
    """A misspelt one, one of another kind of connection, and one with a value that is none: a clear error, at once."""
    with pytest.raises(RedisUrlError) as caught:
        redis_client(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:p@h:6379/0?socket_timeout=2",
        "unix:///run/redis.sock?db=1",
        "rediss://h/0?ssl_check_hostname=false",
        "redis+sentinel://u:p@a:1,b:2/master/0?sentinel_password=x",
    ],
)
async def test_options_that_are_known_are_taken(url: str) -> None:
    """Of each kind of URL, without a connection."""
    await redis_client(url).aclose()
