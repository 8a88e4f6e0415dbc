"""``penstock engine``: one vLLM server, for a container that holds nothing else."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ratelimit.cli.common import failing_clearly
from serving.engine.command import EngineSpec, engine_argv
from serving.engine.launch import EngineError, become_engine
from serving.profile import ProfileError, load_profile


class Device(StrEnum):
    """What the server runs on."""

    VIRTUAL = "virtual"
    CPU = "cpu"
    GPU = "gpu"


def engine(
    profile: Annotated[str, typer.Option(help="The replica's profile: a shipped one's name, or a file.")],
    model: Annotated[str, typer.Option(help="The name that it serves under.")],
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 in a container.")] = "127.0.0.1",
    device: Annotated[Device, typer.Option(help="What it runs on.")] = Device.VIRTUAL,
    slowdown: Annotated[float, typer.Option(help="How many times slower than its profile a virtual GPU runs.")] = 1.0,
    model_path: Annotated[str | None, typer.Option(help="What a GPU loads: a folder or a hub's name.")] = None,
    workdir: Annotated[Path, typer.Option(help="Where the files that it reads are written.")] = Path(
        ".penstock/engines"
    ),
    show: Annotated[
        bool, typer.Option("--show", help="Print vLLM's arguments, one a line, and start nothing.")
    ] = False,
    extra: Annotated[list[str] | None, typer.Argument(help="Further arguments of vLLM, after --.")] = None,
) -> None:
    """Become a vLLM server with its profile's bounds, as `penstock up` starts it, until SIGTERM.

    Let open streams finish before SIGTERM: vLLM does not end while any is open, and whoever runs it must then kill it.
    """
    with failing_clearly(ProfileError, EngineError):
        spec = EngineSpec(
            device.value,
            model,
            port,
            host=host,
            profile=load_profile(profile),
            slowdown=slowdown,
            model_path=model_path,
            extra_args=tuple(extra or ()),
        )
        if show:
            # Less the interpreter, its -m, and the module that stands for the command.
            typer.echo("\n".join(engine_argv(spec, None)[3:]))
            return
        become_engine(spec, workdir)
