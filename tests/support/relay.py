"""Lets a socket that listens in one network namespace lead to an address in another, as `kubectl port-forward` does.

python -m tests.support.relay FD HOST PORT     runs in the namespace of HOST, with a listening socket that it inherits
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys


async def relay(listening: socket.socket, host: str, port: int) -> None:
    """Join every connection to one of its own, until cancelled; a refused one is closed."""

    async def joined(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(host, port)
            with contextlib.closing(far_writer):
                await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))
        writer.close()

    async with await asyncio.start_server(joined, sock=listening) as server:
        await server.serve_forever()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """All bytes, and then their end; each ends by itself, since one side may be silent while the other speaks."""
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


if __name__ == "__main__":
    asyncio.run(relay(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], int(sys.argv[3])))
