"""The connection of a link against a transport that only records: what is written when, and who gets which reply."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from redis.exceptions import (
    BusyLoadingError,
    MovedError,
    NoScriptError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from ratelimit.link.pipeline import (
    MOST_UNSENT_BYTES,
    MOST_WAITING,
    LinkOverloadedError,
    Pipeline,
    reply_error,
)

LONG_S = 60.0


class RecordingTransport:
    """What a pipeline asks of its transport."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.aborted = False

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def abort(self) -> None:
        self.aborted = True


class Bench:
    """A pipeline on a recording transport, and the reasons for which it ended."""

    def __init__(self, silence_s: float = LONG_S) -> None:
        self.ends: list[str] = []
        self.transport = RecordingTransport()
        self.pipeline = Pipeline(silence_s, self.ends.append)
        self.pipeline.connection_made(cast("asyncio.Transport", self.transport))


async def turn() -> None:
    """Let the event loop do what it has to do now."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_commands_of_one_turn_leave_in_one_write() -> None:
    """Ten commands of one turn of the loop are one write, in their order, and ten replies in one read reach them."""
    bench = Bench()
    replies = [bench.pipeline.request(("GET", number)) for number in range(10)]
    await turn()
    (written,) = bench.transport.writes
    assert written == b"".join(b"*2\r\n$3\r\nGET\r\n$1\r\n%d\r\n" % number for number in range(10))
    bench.pipeline.data_received(b"".join(b":%d\r\n" % number for number in range(10)))
    assert [await reply for reply in replies] == list(range(10))


async def test_a_caller_who_left_does_not_shift_replies() -> None:
    """The reply of a command whose caller was cancelled after it was sent is dropped; the next one gets its own."""
    bench = Bench()
    left, stayed = bench.pipeline.request(("A",)), bench.pipeline.request(("B",))
    await turn()
    left.cancel()
    bench.pipeline.data_received(b"+for a\r\n+for")
    bench.pipeline.data_received(b" b\r\n")
    assert await stayed == b"for b"


async def test_a_command_whose_caller_left_before_the_write_is_not_sent() -> None:
    """Cancelled in the turn that made it, a command never reaches Redis, and takes no reply."""
    bench = Bench()
    left, stayed = bench.pipeline.request(("A",)), bench.pipeline.request(("B",))
    left.cancel()
    await turn()
    assert bench.transport.writes == [b"*1\r\n$1\r\nB\r\n"]
    bench.pipeline.data_received(b"+for b\r\n")
    assert await stayed == b"for b"


async def test_commands_of_one_request_stay_together_and_answer_with_the_last() -> None:
    """ASKING and the command it is for are neighbours, and the reply of ASKING reaches nobody."""
    bench = Bench()
    both, other = bench.pipeline.request(("ASKING",), ("GET", "k")), bench.pipeline.request(("B",))
    await turn()
    bench.pipeline.data_received(b"+OK\r\n$1\r\nv\r\n:7\r\n")
    assert (await both, await other) == (b"v", 7)


async def test_replies_of_every_type_arrive_undecoded() -> None:
    """Numbers, strings, nil and nested arrays with errors in them are handed over as they came."""
    bench = Bench()
    replies = [bench.pipeline.request(("X",)) for _ in range(4)]
    await turn()
    bench.pipeline.data_received(b":-1\r\n$-1\r\n$2\r\n\xff\x00\r\n*2\r\n*1\r\n:5\r\n-ERR inner\r\n")
    number, nil, raw, nested = [await reply for reply in replies]
    assert (number, nil, raw, nested[0]) == (-1, None, b"\xff\x00", [5])
    assert isinstance(nested[1], ResponseError)


async def test_an_error_reply_is_its_callers_alone() -> None:
    """A refused command raises for its own caller; the connection and its neighbours go on."""
    bench = Bench()
    refused, served = bench.pipeline.request(("A",)), bench.pipeline.request(("B",))
    await turn()
    bench.pipeline.data_received(b"-NOSCRIPT No matching script.\r\n+OK\r\n")
    with pytest.raises(NoScriptError):
        await refused
    assert await served == b"OK"
    assert bench.pipeline.is_idle
    assert not bench.ends


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("NOSCRIPT No matching script. Please use EVAL.", NoScriptError),
        ("MOVED 3999 127.0.0.1:6381", MovedError),
        ("LOADING Redis is loading the dataset in memory", BusyLoadingError),
        ("READONLY You can't write against a read only replica.", ReadOnlyError),
        (
            "ERR Error running script (call to f_a8e0): @user_script:1: @user_script: 1: -READONLY You can't write",
            ReadOnlyError,
        ),
        ("ERR Error running script (call to f_a8e0): @user_script:1: boom", ResponseError),
        ("WHATEVER else", ResponseError),
    ],
)
def test_error_replies_have_the_class_of_their_first_word(text: str, error: type[Exception]) -> None:
    """Each prefix maps to redis-py's class, also where Redis 6 wraps what was said inside a script."""
    assert type(reply_error(text)) is error


@pytest.mark.parametrize("text", [b"-READONLY replica\r\n", b"-LOADING dataset\r\n", b"-MASTERDOWN link\r\n"])
async def test_a_server_that_cannot_serve_loses_the_connection(text: bytes) -> None:
    """The caller is told what the server said, and everyone behind it that the connection is gone."""
    bench = Bench()
    first, second = bench.pipeline.request(("A",)), bench.pipeline.request(("B",))
    await turn()
    bench.pipeline.data_received(text)
    assert type(first.exception()) is type(reply_error(text[1:-2].decode()))
    with pytest.raises(RedisConnectionError, match="cannot serve now"):
        await second
    assert bench.transport.aborted
    assert len(bench.ends) == 1


@pytest.mark.parametrize("data", [b"+nobody asked\r\n", b"?junk\r\n", b"-MOVED nowhere\r\n"])
async def test_what_is_no_reply_loses_the_connection(data: bytes) -> None:
    """An unasked reply, bytes that are no RESP and a malformed redirection end the connection, and shift nothing."""
    bench = Bench()
    pending = [] if data.startswith(b"+") else [bench.pipeline.request(("A",))]
    await turn()
    bench.pipeline.data_received(data)
    assert len(bench.ends) == 1
    for reply in pending:
        with pytest.raises(RedisConnectionError, match="no reply"):
            await reply


async def test_a_lost_connection_fails_everything_in_flight_and_what_comes_after() -> None:
    """Sent and unsent commands raise ConnectionError, as does a later one; nobody else is told twice."""
    bench = Bench()
    sent = bench.pipeline.request(("A",))
    await turn()
    unsent = bench.pipeline.request(("B",))
    bench.pipeline.connection_lost(ConnectionResetError("reset by peer"))
    for reply in (sent, unsent):
        with pytest.raises(RedisConnectionError, match="reset by peer"):
            await reply
    with pytest.raises(RedisConnectionError, match="reset by peer"):
        bench.pipeline.request(("C",))
    await turn()
    assert bench.ends == ["the connection broke: reset by peer"]


async def test_commands_waiting_for_a_slow_server_are_bounded() -> None:
    """Beyond the bound a command is refused at once, also when the callers before it have left."""
    bench = Bench()
    for _ in range(MOST_WAITING):
        bench.pipeline.request(("A",))
    await turn()
    with pytest.raises(LinkOverloadedError, match="slow, or stopped"):
        bench.pipeline.request(("B",))
    bench.pipeline.data_received(b"+OK\r\n")
    bench.pipeline.request(("B",)).cancel()
    bench.pipeline.connection_lost(None)
    await turn()


async def test_bytes_waiting_to_be_written_are_bounded() -> None:
    """While the transport wants nothing, unsent bytes add up to the bound; they go out once it takes more."""
    bench = Bench()
    bench.pipeline.pause_writing()
    half = b"x" * (MOST_UNSENT_BYTES // 2)
    waiting = bench.pipeline.request((half,))
    with pytest.raises(LinkOverloadedError):
        bench.pipeline.request((half,))
    await turn()
    assert not bench.transport.writes
    bench.pipeline.resume_writing()
    assert len(bench.transport.writes) == 1
    bench.pipeline.data_received(b"+OK\r\n")
    assert await waiting == b"OK"


async def test_silence_while_replies_are_owed_loses_the_connection() -> None:
    """A server that answers nothing fails even a caller without a timeout; an idle connection is left alone."""
    idle, stuck = Bench(silence_s=0.05), Bench(silence_s=0.05)
    answered = idle.pipeline.request(("A",))
    waiting = stuck.pipeline.request(("A",))
    await turn()
    idle.pipeline.data_received(b"+OK\r\n")
    await answered
    with pytest.raises(RedisConnectionError, match=r"nothing for 0\.05 s"):
        await waiting
    assert not idle.ends
