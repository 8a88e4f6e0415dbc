"""``penstock up``: the whole stack on this machine, until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import msgspec
import typer
from rich.panel import Panel

from ratelimit.cli.common import DEFAULT_CONFIG, ConfigOption, JsonOption, failing_clearly, log_to_stderr, stderr
from ratelimit.supervisor.stack import START_ERRORS, Ready, run_stack
from ratelimit.watch import ConfigWatch


def up(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Start Redis, engines, controller and gateway; stop them all on Ctrl-C or SIGTERM."""
    log_to_stderr()
    with failing_clearly(*START_ERRORS):
        asyncio.run(_up(ConfigWatch(config), _say_json if as_json else _say))


Announce = Callable[[Ready], None]


async def _up(watch: ConfigWatch, say: Announce) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop.set)
    with stderr.status("starting") as status:

        def ready(stack: Ready) -> None:
            status.stop()
            say(stack)

        await run_stack(watch, stop, status.update, ready)
    stderr.print("stopped")


def _say_json(stack: Ready) -> None:
    typer.echo(msgspec.json.encode(stack).decode())


def _say(stack: Ready) -> None:
    lines = [
        f"gateway   {stack.url}/v1",
        f"admin     {stack.admin_url}/metrics  (its token is in {stack.admin_token_file})",
        *(f"replica   {replica['url']}  {replica['gpu']}" for replica in stack.replicas),
        f"demo key  {stack.key}  (tier {stack.tier}, valid for a day)",
        "",
        f"curl {stack.url}/v1/limits -H 'Authorization: Bearer {stack.key}'",
        "Ctrl-C stops it all.",
    ]
    stderr.print(Panel("\n".join(lines), title="Penstock is up", expand=False), soft_wrap=True)
