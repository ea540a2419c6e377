"""The command `agent`: the only one that loads the agent itself."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from meshgpu.client.home import find_home, socket_path


def agent(
    home: Annotated[
        Path | None, typer.Option("--home", help="Where the agent keeps its state (default: as MESHGPU_HOME says).")
    ] = None,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay in the foreground: what it always does.")] = (
        True
    ),
    cloud: Annotated[
        Path | None,
        typer.Option("--cloud", metavar="DIR", help="On a rented machine: what its user data left in DIR."),
    ] = None,
) -> None:
    """Run the agent in the foreground, for services; `meshgpu up` starts it in the background."""
    _ = foreground
    place = home.absolute() if home else find_home()
    socket_path(place)
    if cloud is not None:
        raise typer.Exit(int(import_module("meshgpu.agent.cloud").main(place, cloud)))
    raise typer.Exit(int(import_module("meshgpu.agent.main").main(place)))
