"""Commands of a machine's owner: pause, resume."""

from typing import Annotated

import typer

from meshgpu.cli.render import ago, note
from meshgpu.cli.spans import parse_span
from meshgpu.client.agent import AgentClient
from meshgpu.errors import MeshgpuError

EXAMPLE = "meshgpu pause 2h"


def pause(
    span: Annotated[
        str | None, typer.Argument(metavar="[TIME]", help="For how long, as 30m or 2h; without it, until resume.")
    ] = None,
    let_run: Annotated[bool, typer.Option("--let-run", help="Let what runs here come to its end.")] = False,
) -> None:
    """Take this machine back: what runs leaves within 30 s and is placed elsewhere, and nothing new begins."""
    seconds = None if span is None else parse_span(span, EXAMPLE)
    if seconds == 0:
        raise MeshgpuError("bad-request", "cannot pause for no time at all", EXAMPLE)
    AgentClient.found().pause(seconds, let_run=let_run)
    until = "until: meshgpu resume" if seconds is None else f"for {ago(seconds)}, or until: meshgpu resume"
    runs = "what runs may end by itself" if let_run else "what runs leaves within 30 s and is placed elsewhere"
    note(f"this machine lends nothing {until}; {runs}")


def resume() -> None:
    """Lend this machine again."""
    AgentClient.found().resume()
    note("this machine lends again")
