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
WHERE_CHARACTERS: Final = 60
"""A longer reason would push the command off every terminal; `info` and --json have it whole."""


def ps(
    everything: Annotated[bool, typer.Option("--all", "-a", help="Finished jobs too.")] = False,
    all_users: Annotated[bool, typer.Option("--all-users", help="What other users share, too.")] = False,
    watch: Watch = False,
    as_json: Json = False,
) -> None:
    """Show your jobs. TIME is how long a job ran, or how long it has been waiting."""
    client = AgentClient.found()

    def show() -> None:
        view = client.jobs(finished=everything, of_all_users=all_users)
        if as_json:
            print(json.dumps(view), flush=True)
            return
        silent = ", ".join(view["silent"])
        if view["jobs"]:
            print_table(COLUMNS, [row(job, time.time()) for job in view["jobs"]], RIGHT)
            if silent:
                note(plain(f"did not answer in time: {silent}"))
        elif silent:
            note(plain(f"no {'jobs' if everything else 'unfinished jobs'} found; {silent} did not answer"))
        else:
            note("no jobs" if everything else "no unfinished jobs (meshgpu ps -a shows all)")

    repeat(show, watch=watch)


def row(job: JobView, now: float) -> tuple[str, ...]:
    place = where(job)
    return (
        job["display"],
        job["user"],
        gpus(job) or "-",
        status(job),
        run_time(job, now),
        place if len(place) <= WHERE_CHARACTERS else f"{place[: WHERE_CHARACTERS - 1]}…",
        " ".join(job["command"].split()),
    )
