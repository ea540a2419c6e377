"""The command `completion`: the script that makes a shell complete commands, machines and jobs."""

import os
from typing import Annotated, Final

import typer
from typer.completion import get_completion_script  # type: ignore[attr-defined]  # typer keeps it there unlisted

from meshgpu.errors import MeshgpuError

SHELLS: Final = ("bash", "zsh", "fish")
PROGRAM: Final = "meshgpu"
VARIABLE: Final = "_MESHGPU_COMPLETE"


def completion(shell: Annotated[str, typer.Argument(metavar="[bash|zsh|fish]")] = "") -> None:
    """Print the completion script of a shell: eval "$(meshgpu completion)"."""
    chosen = shell or os.path.basename(os.environ.get("SHELL", "bash"))  # noqa: PTH119
    if chosen not in SHELLS:
        raise MeshgpuError(
            "bad-request", f"cannot complete for {chosen}: expected bash, zsh or fish", "meshgpu completion bash"
        )
    print(get_completion_script(prog_name=PROGRAM, complete_var=VARIABLE, shell=chosen))
