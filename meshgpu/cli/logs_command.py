"""`meshgpu logs`: what a job printed, from the machine that ran it."""

import time
from typing import Annotated

import typer

from meshgpu.cli.attach import Attachment, conclude, detached
from meshgpu.cli.job_commands import JobId
from meshgpu.cli.log_printer import LogPrinter
from meshgpu.cli.spans import parse_since
from meshgpu.cli.watch import Json
from meshgpu.cli.words import EXIT_INTERRUPTED, exit_code
from meshgpu.client.agent import AgentClient
from meshgpu.client.views import LogRequest


def logs(
    job: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Stay until the job ends, with its exit code.")
    ] = False,
    lines: Annotated[
        int | None, typer.Option("--lines", "--tail", "-n", metavar="N", min=0, help="Only the newest N lines.")
    ] = None,
    since: Annotated[
        str, typer.Option("--since", metavar="TIME", help="From 10m, 1h, 2d ago or 2026-11-27T10:00 (local) on.")
    ] = "",
    timestamps: Annotated[
        bool, typer.Option("--timestamps", "-t", help="Begin each line with the local time at which it came.")
    ] = False,
    stdout: Annotated[bool, typer.Option("--stdout", help="Only what the job wrote to its stdout.")] = False,
    stderr: Annotated[bool, typer.Option("--stderr", help="Only what the job wrote to its stderr.")] = False,
    attempt: Annotated[
        int | None, typer.Option("--attempt", metavar="N", min=1, help="An earlier attempt's log; the first is 1.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print a job's log: its stdout on stdout, its stderr on stderr, byte for byte."""
    client = AgentClient.found()
    view = client.job(job)
    wanted = LogRequest()
    if lines is not None:
        wanted["lines"] = lines
    if since:
        wanted["since"] = parse_since(since, time.time())
    if stdout != stderr:
        wanted["stream"] = "stdout" if stdout else "stderr"
    if attempt is not None and attempt != view["epoch"]:
        wanted["attempt"] = attempt
        follow = False  # it has ended
    attachment = Attachment(view, speak=follow, printer=LogPrinter(timestamps=timestamps, as_json=as_json))
    if not follow:
        for event in client.history(view["id"], wanted):
            attachment.take(event)
        return
    try:
        view = attachment.follow(client, wanted)
    except KeyboardInterrupt:
        detached(attachment.job)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    conclude(client, view, attachment.missing_module())
    raise typer.Exit(exit_code(view))
