"""The limiter's way to Redis: pipelined commands over one dedicated connection to each server that holds its keys.

``open_link`` chooses by the URL: one server, a server that Sentinel names, or a cluster. All answer the same call,
``command``. Waiting is bounded by the caller (``asyncio.timeout`` around ``command``); a cancelled call may have taken
effect. Every failure is an exception of redis-py's, so that callers handle both clients alike.
"""

from ratelimit.link.cluster import ClusterLink
from ratelimit.link.endpoint import NodeUrls
from ratelimit.link.node import Link
from ratelimit.link.pipeline import LinkOverloadedError
from ratelimit.link.sentinel import SentinelLink

__all__ = ["ClusterLink", "Link", "LinkOverloadedError", "SentinelLink", "open_link"]


def open_link(url: str, connect_timeout_s: float) -> Link | ClusterLink:
    """The link for ``url``, which connects at its first command; the caller closes it.

    Raises ValueError for a URL that names no Redis. URLs, each also with ``rediss`` for TLS:
    ``redis://[user:password@]host:port/db``, ``unix:///path?db=0``,
    ``redis+cluster://[user:password@]host:port[,host:port…]``,
    ``redis+sentinel://[user:password@]host:port[,host:port…]/service/db`` (the user is the master's; the sentinels'
    own are ``?sentinel_username=`` and ``?sentinel_password=``). TLS takes redis-py's ``ssl_*`` options.
    """
    scheme = url.partition("://")[0]
    if scheme.endswith("+cluster"):
        return ClusterLink(NodeUrls.parse(url, default_port=6379), connect_timeout_s)
    if scheme.endswith("+sentinel"):
        return SentinelLink(NodeUrls.parse(url, default_port=26379), connect_timeout_s)
    return Link(url, connect_timeout_s)
