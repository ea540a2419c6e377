"""The command `ps`: the one that people type most; it loads as little as it can."""

import json
import time
from typing import Annotated, Final

import typer

from meshgpu.cli.render import note, plain, print_table
from meshgpu.cli.watch import Json, Watch, repeat
from meshgpu.cli.words import gpus, run_time, status, where
from meshgpu.client.agent import AgentClient
from meshgpu.client.views import JobView

COLUMNS: Final = ("ID", "USER", "GPU", "ST", "TIME", "WHERE(REASON)", "CMD")
RIGHT: Final = frozenset({"TIME"})


def ps(
    everything: Annotated[bool, typer.Option("--all", "-a", help="Finished jobs too.")] = False,
    watch: Watch = False,
    as_json: Json = False,
) -> None:
    """Show your jobs. TIME is how long a job ran, or how long it has been waiting."""
    client = AgentClient.found()

    def show() -> None:
        view = client.jobs(finished=everything)
        if as_json:
            print(json.dumps(view), flush=True)
            return
        if view["jobs"]:
            print_table(COLUMNS, [row(job, time.time()) for job in view["jobs"]], RIGHT)
        else:
            note("no jobs" if everything else "no unfinished jobs (meshgpu ps -a shows all)")
        if view["silent"]:
            note(plain(f"did not answer in time: {', '.join(view['silent'])}"))

    repeat(show, watch=watch)


def row(job: JobView, now: float) -> tuple[str, ...]:
    return (
        job["display"],
        job["user"],
        gpus(job) or "-",
        status(job),
        run_time(job, now),
        where(job),
        " ".join(job["command"].split()),
    )
