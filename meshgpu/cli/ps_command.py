"""The command `ps`: the one that people type most; it loads as little as it can."""

import json
import time
from typing import Annotated, Final

import typer

from meshgpu.cli.render import count, note, plain, print_table
from meshgpu.cli.watch import Json, Watch, repeat
from meshgpu.cli.words import gpus, is_final, run_time, status, where
from meshgpu.client.agent import AgentClient
from meshgpu.client.views import JobView

COLUMNS: Final = ("ID", "USER", "GPU", "ST", "TIME", "WHERE(REASON)", "CMD")
RIGHT: Final = frozenset({"TIME"})
LIMIT: Final = 50
WHERE_CHARACTERS: Final = 60
"""A longer reason would push the command off every terminal; `info` and --json have it whole."""


def ps(
    everything: Annotated[bool, typer.Option("--all", "-a", help="Finished jobs too.")] = False,
    since: Annotated[
        str, typer.Option("--since", metavar="TIME", help="Of those, what ended since then: 7d, or 2026-11-27T10:00.")
    ] = "",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help=f"Finished jobs to show ({LIMIT}; --json: all).")
    ] = None,
    all_users: Annotated[bool, typer.Option("--all-users", help="What other users share, too.")] = False,
    watch: Watch = False,
    as_json: Json = False,
) -> None:
    """Show your jobs. TIME is how long a job ran, or how long it has been waiting."""
    client = AgentClient.found()
    everything = everything or bool(since)
    since_wall_s = _since(since) if since else 0.0

    def show() -> None:
        view = client.jobs(finished=everything, of_all_users=all_users)
        most = limit or (len(view["jobs"]) if as_json else LIMIT)
        view["jobs"], left_out = newest(view["jobs"], since_wall_s, most)
        if as_json:
            print(json.dumps(view), flush=True)
            return
        silent = ", ".join(view["silent"])
        if view["jobs"]:
            print_table(COLUMNS, [row(job, time.time()) for job in view["jobs"]], RIGHT)
            if left_out:
                note(f"{count(left_out, 'finished job')} more: meshgpu ps -a --limit {most + left_out}")
            if silent:
                note(plain(f"did not answer in time: {silent}"))
        elif silent:
            note(plain(f"no {'jobs' if everything else 'unfinished jobs'} found; {silent} did not answer"))
        else:
            note("no jobs" if everything else "no unfinished jobs (meshgpu ps -a shows all)")

    repeat(show, watch=watch)


def newest(jobs: list[JobView], since_wall_s: float, limit: int) -> tuple[list[JobView], int]:
    """All that has not ended, and of what ended since then the `limit` newest; and how many more there are of these."""
    ended = [job for job in jobs if is_final(job) and (job["ended_at"] or 0.0) >= since_wall_s]
    ended.sort(key=lambda job: -(job["ended_at"] or 0.0))
    shown = {job["id"] for job in ended[:limit]}
    return [job for job in jobs if not is_final(job) or job["id"] in shown], len(ended) - len(shown)


def _since(text: str) -> float:
    from meshgpu.cli.spans import parse_since  # datetime is not for everybody who asks how his jobs are

    return parse_since(text, time.time())


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
