"""Flags that `run` and `sweep` share: where a job runs, in what, with what."""

from pathlib import Path
from typing import Annotated

import typer

from meshgpu.cli.complete import machine_names

Command = Annotated[list[str], typer.Argument(metavar="CMD…", help="What to run; a quoted string runs in a shell.")]
Machine = Annotated[
    str | None, typer.Option("-m", "--machine", metavar="NAME", help="Only there.", autocompletion=machine_names)
]
Gpus = Annotated[
    str | None, typer.Option("-g", "--gpus", metavar="GPUS", help="2, 8GB, 2x24GB, 4090:2 or 0 (one if there is one).")
]
Env = Annotated[list[str] | None, typer.Option("-e", "--env", metavar="K[=V]", help="A variable; K alone: as here.")]
Pip = Annotated[list[str] | None, typer.Option("--pip", metavar="SPEC", help="A package to install.")]
PipReq = Annotated[Path | None, typer.Option("--pip-req", metavar="FILE", help="A requirements file.")]
NoEnv = Annotated[bool, typer.Option("--no-env", help="Not the environment that the project's files ask for.")]
Image = Annotated[
    str, typer.Option("--image", metavar="IMAGE", help="Run in a container of this image, not in an environment.")
]
Cpus = Annotated[int, typer.Option("--cpus", min=0, metavar="N", help="Processors to reserve.")]
Memory = Annotated[str, typer.Option("--memory", metavar="8GB", help="Main memory to reserve.")]
On = Annotated[
    str,
    typer.Option("--on", metavar="WHERE", help="Only there: 'vram>=24GB and name~4090', or names of machines."),
]
NotOn = Annotated[str, typer.Option("--not-on", metavar="WHERE", help="Not there: rig7,rig8, or as --on.")]
Priority = Annotated[
    str,
    typer.Option("--priority", metavar="low|normal|high", help="Goes first where jobs wait, or lets others go first."),
]
Preemptible = Annotated[
    bool, typer.Option("--preemptible", help="May be stopped and placed again for a job of higher priority.")
]
Name = Annotated[str | None, typer.Option("--name", metavar="NAME", help="The job's name (the script's).")]
Detach = Annotated[bool, typer.Option("--detach", "-d", help="Print the id and return.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Start the agent without asking.")]
Retries = Annotated[
    int,
    typer.Option("--retries", min=0, max=100, metavar="N", help="Start it again if it dies with its machine, N times."),
]
Timeout = Annotated[
    str, typer.Option("--timeout", metavar="TIME", help="End it after it ran for 90s, 10m, 2h (exit code 124).")
]
Cloud = Annotated[
    str | None,
    typer.Option("--cloud", metavar="never|ok|only", help="Whether it may leave the office (what the mesh allows)."),
]
Secret = Annotated[
    list[str] | None,
    typer.Option(
        "--secret", metavar="NAME[=@FILE]", help="A variable only machines that may run the job can read: as here."
    ),
]
Share = Annotated[bool, typer.Option("--share", help="Every user of the mesh may see it, its log and its files.")]
