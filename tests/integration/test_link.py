"""A link to one real server, Redis 6.2 and Valkey: replies, cancellation, lost and silent servers, greetings."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ReadOnlyError

from ratelimit.link import Link, LinkOverloadedError
from ratelimit.link.pipeline import MOST_WAITING
from tests.support.servers import Server
from tests.support.waiting import eventually_async

CONNECT_S = 10.0
#: Longer than any test: silence is not what it is about.
LONG_S = 60.0
PASSWORD = "pass/word@1"
ESCAPED = "pass%2Fword%401"


@pytest.fixture
async def link(server_url: str) -> AsyncIterator[Link]:
    """A link to the session's Redis, then to its Valkey."""
    async with aclosing(Link(server_url, CONNECT_S)) as opened:
        yield opened


async def echoes(link: Link, number: int) -> bool:
    """Whether the reply to a command is its own; False while there is no connection."""
    try:
        return bool(await link.command("k", "ECHO", f"after {number}") == b"after %d" % number)
    except RedisConnectionError:
        return False


async def test_each_of_many_callers_gets_its_own_reply(link: Link) -> None:
    """A thousand callers, with replies of all sizes, share one connection."""
    sent = [str(number) * (1 + 37 * number % 900) for number in range(1_000)]
    replies = await asyncio.gather(*(link.command("k", "ECHO", text) for text in sent))
    assert [reply.decode() for reply in replies] == sent
    assert int(await link.command("k", "CLIENT", "ID")) == await link.command("k", "CLIENT", "ID")


async def test_a_script_is_unknown_then_run_then_known(link: Link) -> None:
    """EVALSHA raises NoScriptError until EVAL brought the text; arguments and replies are bytes untouched."""
    text, raw = "return {KEYS[1], ARGV[1], 3, false}", b"\x00\xff\r\n"
    digest = await link.command("k", "SCRIPT", "LOAD", text)
    await link.command("k", "SCRIPT", "FLUSH")
    with pytest.raises(NoScriptError):
        await link.command("k", "EVALSHA", digest, 1, "k", raw)
    assert await link.command("k", "EVAL", text, 1, "k", raw) == [b"k", raw, 3, None]
    assert await link.command("k", "EVALSHA", digest, 1, "k", raw) == [b"k", raw, 3, None]


async def test_callers_who_time_out_on_a_stopped_server_shift_no_replies(own_server: Server) -> None:
    """While the server is stopped every caller leaves; once it goes on, each later caller gets its own reply."""
    async with aclosing(Link(own_server.url, CONNECT_S, silence_s=LONG_S)) as link:
        assert await echoes(link, 0)
        own_server.signal(signal.SIGSTOP)

        async def impatient(number: int) -> None:
            async with asyncio.timeout(0.05):
                await link.command("k", "ECHO", f"before {number}")

        for _ in range(3):
            outcomes = await asyncio.gather(*map(impatient, range(50)), return_exceptions=True)
            assert all(isinstance(outcome, TimeoutError) for outcome in outcomes)
        own_server.signal(signal.SIGCONT)
        assert all(await asyncio.gather(*(echoes(link, number) for number in range(100))))


async def test_a_stopped_server_makes_callers_fail_at_once_not_memory_grow(own_server: Server) -> None:
    """Beyond the bound a command is refused without waiting; when the server goes on, commands are served again."""
    async with aclosing(Link(own_server.url, CONNECT_S, silence_s=LONG_S)) as link:
        await echoes(link, 0)
        own_server.signal(signal.SIGSTOP)
        waiting = [asyncio.create_task(link.command("k", "ECHO", "x" * 100)) for _ in range(MOST_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(LinkOverloadedError):
            await link.command("k", "PING")
        own_server.signal(signal.SIGCONT)
        assert set(await asyncio.gather(*waiting)) == {b"x" * 100}
        assert await echoes(link, 1)


async def test_a_silent_server_loses_its_connection_and_is_found_again(own_server: Server) -> None:
    """A caller without a timeout of its own is not left waiting; the link recovers with the server."""
    async with aclosing(Link(own_server.url, 0.2, silence_s=0.2)) as link:
        await eventually_async(partial(echoes, link, 0), LONG_S, "a first answer")
        own_server.signal(signal.SIGSTOP)
        with pytest.raises(RedisConnectionError, match="answered nothing"):
            await link.command("k", "PING")
        own_server.signal(signal.SIGCONT)
        await eventually_async(partial(echoes, link, 1), LONG_S, "an answer of the server that goes on")


async def test_a_killed_server_fails_what_is_in_flight_and_is_found_when_it_is_back(own_server: Server) -> None:
    """In flight: ConnectionError. While it is down: ConnectionError at once. Started anew: served."""
    async with aclosing(Link(own_server.url, CONNECT_S)) as link:
        await echoes(link, 0)
        own_server.signal(signal.SIGSTOP)
        waiting = [asyncio.create_task(link.command("k", "PING")) for _ in range(10)]
        await asyncio.sleep(0)
        await asyncio.to_thread(own_server.kill)
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(outcome, RedisConnectionError) for outcome in outcomes)
        with pytest.raises(RedisConnectionError, match="no connection to Redis"):
            await link.command("k", "PING")
        await asyncio.to_thread(own_server.start)
        await eventually_async(partial(echoes, link, 1), LONG_S, "an answer of the new server")
        named = (await link.command("k", "CLIENT", "LIST")).decode().count("name=penstock")
        assert named == 1


async def test_callers_wait_for_the_connect_under_way_but_no_longer_than_its_timeout() -> None:
    """A server that accepts and says nothing: every caller fails after the one timeout; one who leaves harms nobody."""
    accepted = 0

    async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        await reader.read()
        writer.close()

    server = await asyncio.start_server(ignore, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, aclosing(Link(f"redis://127.0.0.1:{port}", 0.3)) as link:
        callers = [asyncio.create_task(link.command("k", "PING")) for _ in range(5)]
        await asyncio.sleep(0)
        callers[0].cancel()
        outcomes = await asyncio.gather(*callers, return_exceptions=True)
    assert isinstance(outcomes[0], asyncio.CancelledError)
    assert all("no answer in 0.3 s" in str(outcome) for outcome in outcomes[1:])
    assert accepted == 1


async def test_a_server_that_is_down_is_not_asked_by_every_command() -> None:
    """A server that hangs up on every greeting is tried again after growing pauses, however many commands fail."""
    accepted = 0

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    commands = 500
    async with server, aclosing(Link(f"redis://127.0.0.1:{port}", CONNECT_S)) as link:
        for _ in range(commands):
            with pytest.raises(RedisConnectionError, match="no connection to Redis"):
                await link.command("k", "PING")
    assert 0 < accepted < commands / 10


async def test_a_closed_link_fails_its_callers(link: Link, server_url: str) -> None:
    """What is in flight, connecting too, raises ConnectionError, and so does every later command."""
    connecting = Link(server_url, CONNECT_S)
    await link.command("k", "PING")
    callers = [asyncio.create_task(each.command("k", "BLPOP", "nothing", 0)) for each in (link, connecting)]
    await asyncio.sleep(0)
    await link.aclose()
    await connecting.aclose()
    for outcome in await asyncio.gather(*callers, return_exceptions=True):
        assert isinstance(outcome, RedisConnectionError)
    with pytest.raises(RedisConnectionError, match="this link is closed"):
        await link.command("k", "PING")


async def test_a_server_that_became_a_replica_is_left_and_tried_again(own_server: Server) -> None:
    """A script refused with READONLY raises it and drops the connection; once it is a master again, it is served."""
    async with aclosing(Link(own_server.url, CONNECT_S)) as link:

        async def writes() -> bool:
            try:
                return bool(await link.command("k", "EVAL", "return redis.call('SET', KEYS[1], 1)", 1, "k"))
            except RedisConnectionError:
                return False

        first = await link.command("k", "CLIENT", "ID")
        own_server.call("REPLICAOF", "127.0.0.1", 1)
        with pytest.raises(ReadOnlyError):
            await writes()
        own_server.call("REPLICAOF", "NO", "ONE")
        await eventually_async(writes, LONG_S, "a write on the master")
        assert await link.command("k", "CLIENT", "ID") != first


@pytest.mark.parametrize("user", ["", "default"])
async def test_the_greeting_gives_password_database_and_name(own_server: Server, user: str) -> None:
    """User and password are percent-decoded; the database and a name for CLIENT LIST are set."""
    own_server.call("CONFIG", "SET", "requirepass", PASSWORD)
    url = own_server.url.replace("unix://", f"unix://{user}:{ESCAPED}@") + "?db=5"
    async with aclosing(Link(url, CONNECT_S)) as link:
        mine = (await link.command("k", "CLIENT", "LIST")).decode()
    assert "name=penstock" in mine
    assert "db=5" in mine


async def test_a_refused_password_is_said_but_never_told(own_server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong and a missing password raise ConnectionError with the server's reason; no text holds the password."""
    own_server.call("CONFIG", "SET", "requirepass", PASSWORD)
    wrong = own_server.url.replace("unix://", "unix://:wr%40ng-secret@")
    async with aclosing(Link(wrong, CONNECT_S)) as link, aclosing(Link(own_server.url, CONNECT_S)) as without:
        for each, reason in ((link, "WRONGPASS|invalid"), (without, "(?i)authentication required")):
            with pytest.raises(RedisConnectionError, match=reason) as caught:
                await each.command("k", "PING")
            told = f"{caught.value!r} {caught.value.__context__!r} {each!r} {caplog.text}"
            assert "secret" not in told
            assert PASSWORD not in told
