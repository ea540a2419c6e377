"""What tables have in common: `--json`, and `-w`, which shows one again and again."""

import sys
import time
from collections.abc import Callable
from typing import Annotated, Final

import typer

from meshgpu.cli.render import is_terminal

WATCH_S: Final = 2.0
"""As often as GPUs are sampled."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Show it again every 2 s, until Ctrl-C.")]


def repeat(show: Callable[[], None], *, watch: bool) -> None:
    """Show once, or with `watch` again and again on a cleared screen, until Ctrl-C."""
    if not watch:
        show()
        return
    try:
        while True:
            if is_terminal(sys.stdout):
                print("\x1b[H\x1b[2J", end="")
            show()
            time.sleep(WATCH_S)
    except KeyboardInterrupt:
        return
