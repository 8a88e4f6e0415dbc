"""What a URL says about Redis, and that no error or repr tells its password."""

from __future__ import annotations

import ssl

import pytest

from ratelimit.link import open_link
from ratelimit.link.endpoint import Address, NodeUrls, parse_endpoint

PASSWORD = "s3cret/with@signs"
ESCAPED = "s3cret%2Fwith%40signs"


def test_a_tcp_url_names_host_port_database_and_user() -> None:
    """Credentials are percent-decoded; without TLS there is no context."""
    found = parse_endpoint(f"redis://us%40er:{ESCAPED}@redis.example:7000/3")
    assert (found.address, found.db, found.tls) == (Address("redis.example", 7000), 3, None)
    assert (found.username, found.password) == ("us@er", PASSWORD)


def test_a_unix_url_names_a_socket() -> None:
    """The path is the socket's; the database is an option."""
    found = parse_endpoint(f"unix://:{ESCAPED}@/run/redis.sock?db=2")
    assert (found.path, found.db, found.password) == ("/run/redis.sock", 2, PASSWORD)


def test_tls_checks_certificates_and_host_names_unless_told_otherwise() -> None:
    """A TLS link verifies by default; an option of the URL can turn it off, for a test server say."""
    checked, unchecked = parse_endpoint("rediss://h"), parse_endpoint("rediss://h?ssl_cert_reqs=none")
    assert checked.tls is not None
    assert unchecked.tls is not None
    assert (checked.tls.verify_mode, checked.tls.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert unchecked.tls.verify_mode == ssl.CERT_NONE


def test_missing_tls_files_are_said() -> None:
    """A certificate file that is not there is an error that says so, without the password."""
    with pytest.raises(ValueError, match=r"TLS files .*cannot be read") as caught:
        parse_endpoint(f"rediss://:{ESCAPED}@h?ssl_ca_certs=/nowhere/ca.pem")
    assert PASSWORD[:6] not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://:s3cret@h",
        "redis://:s3cret/with/slashes@h",
        "redis://:s3cret@h:port",
        "rediss://:s3cret@h?ssl_cert_reqs=maybe",
        "rediss://:s3cret@h?ssl_unknown=1",
        "redis+cluster://:s3cret@",
        "redis+cluster://:s3cret@h:port,h:2",
        "redis+sentinel://:s3cret@h:1",
        "redis+sentinel://:s3cret@h:1/service/first",
        "http+cluster://:s3cret@h",
        "s3cret",
    ],
)
def test_a_url_that_names_no_redis_is_refused_without_its_password(url: str) -> None:
    """The error says what to write, and neither it nor its cause holds a part of the password."""
    with pytest.raises(ValueError, match=r"redis(\+\w+)?://") as caught:
        open_link(url, 1.0)
    assert "s3cret" not in f"{caught.value!r}"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_url_of_several_servers_gives_each_its_own_url() -> None:
    """Nodes have the credentials and TLS options of the whole, sentinels theirs; IPv6 hosts are understood."""
    urls = NodeUrls.parse(
        f"redis+sentinel://user:{ESCAPED}@a:1,[::1]:2,c/main/4?ssl_cert_reqs=none&sentinel_password=other%40", 26379
    )
    assert urls.seeds == (Address("a", 1), Address("::1", 2), Address("c", 26379))
    assert urls.path == "main/4"
    node, sentinel = (
        parse_endpoint(urls.at(Address("::2", 6379), 4)),
        parse_endpoint(urls.sentinel_at(urls.seeds[1])),
    )
    assert (node.address, node.db, node.username, node.password) == (Address("::2", 6379), 4, "user", PASSWORD)
    assert (sentinel.address, sentinel.username, sentinel.password) == (Address("::1", 2), "", "other@")


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3cret@h:1",
        "unix://:s3cret@/run/s",
        "redis+cluster://:s3cret@h:1,i:2",
        "redis+sentinel://:s3cret@h:1/main",
    ],
)
def test_no_repr_tells_the_password(url: str) -> None:
    """A link can be logged."""
    assert "s3cret" not in repr(open_link(url, 1.0))
    assert "s3cret" not in repr(parse_endpoint("redis://:s3cret@h"))
    assert "s3cret" not in repr(NodeUrls.parse("redis+cluster://:s3cret@h?sentinel_password=s3cret", 1))
