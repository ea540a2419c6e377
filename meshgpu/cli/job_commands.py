"""Commands about jobs that exist: stop, kill, info, wait."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from meshgpu.cli.attach import detached, events
from meshgpu.cli.complete import job_names
from meshgpu.cli.evidence_command import show_receipt, verify_receipt
from meshgpu.cli.render import ago, count, note, plain, show_error, size
from meshgpu.cli.spans import parse_span
from meshgpu.cli.watch import Json
from meshgpu.cli.words import (
    EXIT_INTERRUPTED,
    EXIT_MESH_FAILED,
    EXIT_TIME_LIMIT,
    ending,
    exit_code,
    goes_on,
    gpus,
    is_final,
    run_time,
    status,
    where,
)
from meshgpu.client.agent import AgentClient
from meshgpu.client.views import JobView
from meshgpu.errors import MeshgpuError
from meshgpu.model.clock import span

JobId = Annotated[
    str, typer.Argument(metavar="ID", help="A job's id or any unique part of it.", autocompletion=job_names)
]
JobIds = Annotated[
    list[str], typer.Argument(metavar="ID…", help="Jobs' ids or any unique parts.", autocompletion=job_names)
]


def stop(jobs: JobIds) -> None:
    """End jobs gently: SIGTERM, 30 s later SIGKILL; what they wrote is kept."""
    _stop(jobs, "stop")


def kill(jobs: JobIds) -> None:
    """End jobs at once (SIGKILL)."""
    _stop(jobs, "kill")


def info(
    job: JobId = "",
    receipt: Annotated[
        bool, typer.Option("--receipt", help="What its machine signed when it ended, checked here and now.")
    ] = False,
    verify: Annotated[
        Path | None, typer.Option("--verify", metavar="FILE", help="Check a receipt that was kept with --json.")
    ] = None,
    as_json: Json = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="The mesh's own terms too.")] = False,
) -> None:
    """Show everything about a job."""
    if (verify is None) == (not job):
        raise MeshgpuError("bad-request", "cannot show a job: name one, or a FILE to --verify", "meshgpu ps -a")
    if verify is not None:
        verify_receipt(verify)
        return
    if receipt:
        show_receipt(job, as_json=as_json)
        return
    view = AgentClient.found().job(job)
    if as_json:
        print(json.dumps({"job": view}))
        return
    facts = _facts(view) | (_inner_facts(view) if verbose else {})
    width = max(map(len, facts))
    for name, fact in facts.items():
        if fact:
            print(f"{name:{width}}  {plain(fact)}")


def wait(
    jobs: JobIds,
    timeout: Annotated[
        str, typer.Option("--timeout", metavar="TIME", help="Give up after 90s, 10m, 2h (exit code 124).")
    ] = "",
    as_json: Json = False,
) -> None:
    """Wait until jobs end; the exit code is the first one that is not 0."""
    until_s = time.monotonic() + parse_span(timeout, "--timeout 10m") if timeout else None
    client = AgentClient.found()
    ended: list[JobView] = []
    for job in [client.job(name) for name in jobs]:
        last = _await_end(client, job, until_s)
        if not is_final(last):
            note(plain(f"{last['display']} still {goes_on(last)} ({status(last)}) after {timeout}"))
            raise typer.Exit(EXIT_TIME_LIMIT)
        ended.append(last)
        if not as_json:
            note(ending(last) or f"{last['display']} {last['state']}")
    if as_json:
        print(json.dumps({"jobs": ended}))
    raise typer.Exit(next(filter(None, map(exit_code, ended)), 0))


def _await_end(client: AgentClient, job: JobView, until_s: float | None) -> JobView:
    try:
        for event in events(client, job["id"], logs=False, until_s=until_s):
            if event["type"] in ("job", "end"):
                job = event["job"]
    except KeyboardInterrupt:
        detached(job)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    return job


def _stop(jobs: list[str], mode: str) -> None:
    """Ask for each; one that cannot be stopped does not spare the others."""
    client = AgentClient.found()
    failed = False
    for job in jobs:
        try:
            view = client.stop(job, mode)
        except MeshgpuError as error:
            show_error(error)
            failed = True
            continue
        note(plain(f"{view['display']}: {'is being stopped' if view['state'] == 'cancelling' else status(view)}"))
    if failed:
        raise typer.Exit(EXIT_MESH_FAILED)


def _facts(job: JobView) -> dict[str, str]:
    """What people ask about; empty facts are left out."""
    left = f"{count(job['output_files'], 'file')}, {size(job['output_bytes'])}" if job["output_files"] else ""
    return {
        "job": job["display"],
        "user": job["user"],
        "state": status(job),
        "where": where(job),
        "asked for": " · ".join(
            filter(
                None,
                (job["requested_machine"] or "any machine", f"-g {job['gpu_request']}" if job["gpu_request"] else ""),
            )
        ),
        "GPU": gpus(job) or "none",
        "command": job["command"],
        "submitted": _moment(job["submitted_at"]),
        "started": _moment(job["started_at"]),
        "ended": _moment(job["ended_at"]),
        "time": run_time(job, time.time()),
        "limit": f"{span(job['timeout_s'])} of running time" if job["timeout_s"] else "",
        "start by": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job["start_by"])) if job["start_by"] else "",
        "exit code": "" if job["exit_code"] is None else str(job["exit_code"]),
        "environment": job["detail"],
        "secrets": ", ".join(job["secrets"]),
        "shared": "with every user of the mesh" if job["shared"] else "",
        "code": f"{count(job['tree_files'], 'file')}, {size(job['tree_bytes'])}",
        "left": f"{left} · meshgpu ls runs/{job['display']}" if left else "",
    }


def _inner_facts(job: JobView) -> dict[str, str]:
    return {
        "id": job["id"],
        "held by": ", ".join(job["held_by"]),
        "attempt": str(job["epoch"]),
        "register": job["state"],
    }


def _moment(at: float | None) -> str:
    if at is None:
        return ""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))} ({ago(time.time() - at)} ago)"
