"""The commands `sweep …`: try a space of parameters, each trial a job; see how they stand, and which was best."""

import csv
import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from meshgpu.cli.complete import job_names
from meshgpu.cli.flags import (
    Cloud,
    Command,
    Cpus,
    Detach,
    Env,
    Gpus,
    Image,
    Machine,
    Memory,
    Name,
    NoEnv,
    NotOn,
    On,
    Pip,
    PipReq,
    Preemptible,
    Priority,
    Retries,
    Secret,
    Share,
    Timeout,
    Yes,
)
from meshgpu.cli.job_commands import kill as kill_jobs
from meshgpu.cli.job_commands import stop as stop_jobs
from meshgpu.cli.render import clock, count, note, plain, print_table
from meshgpu.cli.run_command import (
    agent_for,
    checked_priority,
    job_request,
    place,
    read_secrets,
    ship_and_submit,
    time_limit,
)
from meshgpu.cli.watch import Json, Watch, repeat
from meshgpu.cli.words import EXIT_FAILED_CHECK, EXIT_INTERRUPTED, EXIT_MESH_FAILED, is_final, run_time, status, where
from meshgpu.client.agent import AgentClient
from meshgpu.client.views import JobRequest, JobView, SweepRequest, SweepView
from meshgpu.errors import MeshgpuError
from meshgpu.model.sweep import parse_objective, parse_param

POLL_S: Final = 1.0
TRIAL_RETRIES: Final = 2
"""A machine that is switched off must not cost a point of the sweep."""

SweepId = Annotated[
    str, typer.Argument(metavar="ID", help="A sweep's id or any unique part of it.", autocompletion=job_names)
]
Params = Annotated[
    list[str], typer.Option("--param", metavar="NAME=…", help="lr=1e-4,1e-3 or, at random, lr=1e-5:1e-2[:log][:int].")
]
Parallel = Annotated[int, typer.Option("--parallel", min=1, metavar="N", help="Trials at a time.")]
Metric = Annotated[str, typer.Option("--metric", metavar="NAME:min|max", help="What trials are compared by.")]
Pattern = Annotated[
    str,
    typer.Option("--metric-regex", metavar="REGEX", help="Where the log has it; without: what meshgpu.log() reports."),
]

sweep = typer.Typer(
    name="sweep",
    help="Try a space of parameters: each trial is a job, as many at a time as you like.",
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
)


@sweep.command("grid", context_settings={"allow_interspersed_args": False})
def grid(
    command: Command,
    params: Params,
    metric: Metric = "",
    metric_regex: Pattern = "",
    parallel: Parallel = 4,
    machine: Machine = None,
    gpus: Gpus = None,
    env: Env = None,
    pip: Pip = None,
    pip_req: PipReq = None,
    no_env: NoEnv = False,
    image: Image = "",
    cpus: Cpus = 0,
    memory: Memory = "",
    on: On = "",
    not_on: NotOn = "",
    cloud: Cloud = None,
    retries: Retries = TRIAL_RETRIES,
    priority: Priority = "normal",
    preemptible: Preemptible = False,
    timeout: Timeout = "",
    secret: Secret = None,
    share: Share = False,
    name: Name = None,
    detach: Detach = False,
    as_json: Json = False,
    yes: Yes = False,
) -> None:
    """Try every combination of the parameters' values.

    {lr} or :lr: in the command stands for the value of lr. Exit code: 0 if all trials succeeded, 1 if one did not,
    130: Ctrl-C, after which the sweep goes on.
    """
    request = job_request(command, name, env, pip, pip_req, image)
    place(request, machine, gpus, cpus, memory, on, not_on, cloud, no_env=no_env)
    request["priority"], request["preemptible"] = checked_priority(priority), preemptible
    request["shared"], request["secrets"] = share, read_secrets(secret or [], request["env"])
    request["timeout_s"] = time_limit(timeout)
    space = SweepRequest(method="grid", params=params, trials=0, parallel=parallel, seed=0)
    _try_all(request, space, metric, metric_regex, retries)
    _start(request, detach=detach, as_json=as_json, yes=yes)


@sweep.command("random", context_settings={"allow_interspersed_args": False})
def at_random(
    command: Command,
    params: Params,
    trials: Annotated[int, typer.Option("--trials", min=1, metavar="N", help="How many.")],
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="The same seed draws the same trials.")] = 0,
    metric: Metric = "",
    metric_regex: Pattern = "",
    parallel: Parallel = 4,
    machine: Machine = None,
    gpus: Gpus = None,
    env: Env = None,
    pip: Pip = None,
    pip_req: PipReq = None,
    no_env: NoEnv = False,
    image: Image = "",
    cpus: Cpus = 0,
    memory: Memory = "",
    on: On = "",
    not_on: NotOn = "",
    cloud: Cloud = None,
    retries: Retries = TRIAL_RETRIES,
    priority: Priority = "normal",
    preemptible: Preemptible = False,
    timeout: Timeout = "",
    secret: Secret = None,
    share: Share = False,
    name: Name = None,
    detach: Detach = False,
    as_json: Json = False,
    yes: Yes = False,
) -> None:
    """Try values drawn at random from the parameters' values and ranges.

    {lr} or :lr: in the command stands for the value of lr. Exit codes as of `sweep grid`.
    """
    request = job_request(command, name, env, pip, pip_req, image)
    place(request, machine, gpus, cpus, memory, on, not_on, cloud, no_env=no_env)
    request["priority"], request["preemptible"] = checked_priority(priority), preemptible
    request["shared"], request["secrets"] = share, read_secrets(secret or [], request["env"])
    request["timeout_s"] = time_limit(timeout)
    space = SweepRequest(method="random", params=params, trials=trials, parallel=parallel, seed=seed)
    _try_all(request, space, metric, metric_regex, retries)
    _start(request, detach=detach, as_json=as_json, yes=yes)


@sweep.command("status")
def show_status(job: SweepId, as_json: Json = False, watch: Watch = False) -> None:
    """Show a sweep's trials, and the best so far."""
    client = AgentClient.found()

    def show() -> None:
        view = client.sweep(job)
        if as_json:
            print(json.dumps(view), flush=True)
            return
        print(plain(_headline(view["sweep"])))
        print_table(*_table(view))
        for line in (_progress(view), _best_line(view)):
            if line:
                print(plain(line))
        if view["silent"]:
            note(plain(f"did not answer in time: {', '.join(view['silent'])}"))

    repeat(show, watch=watch)


@sweep.command("ls")
def ls(as_json: Json = False) -> None:
    """Show your sweeps, newest first."""
    found = [job for job in AgentClient.found().jobs(finished=True)["jobs"] if job["space"]]
    if as_json:
        print(json.dumps({"sweeps": found}))
    elif found:
        now = time.time()
        rows = [(job["display"], _space(job), status(job), run_time(job, now), job["command"]) for job in found]
        print_table(("ID", "TRIALS", "ST", "TIME", "CMD"), rows, frozenset({"TIME"}))
    else:
        note("no sweeps (meshgpu sweep grid --param lr=1e-4,1e-3 -- python train.py --lr {lr})")


@sweep.command("stop")
def stop(job: SweepId) -> None:
    """Stop a sweep: its trials are asked to end, and have 30 s."""
    stop_jobs([AgentClient.found().sweep(job)["sweep"]["id"]])


@sweep.command("kill")
def kill(job: SweepId) -> None:
    """Kill a sweep's trials at once."""
    kill_jobs([AgentClient.found().sweep(job)["sweep"]["id"]])


@sweep.command("export")
def export(
    job: SweepId,
    as_csv: Annotated[bool, typer.Option("--csv", help="Comma-separated values (this is the default).")] = False,
    as_json: Json = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Not on stdout.")] = None,
) -> None:
    """Print one row for each trial that has begun: its values, how it ended, what it reported."""
    if as_csv and as_json:
        raise MeshgpuError("bad-request", "cannot export in two forms at once", "--csv or --json")
    view = AgentClient.found().sweep(job)
    rows = [_record(trial) for trial in view["trials"]]
    text = json.dumps({"trials": rows}, indent=2) + "\n" if as_json else _csv(view, rows)
    if output is None:
        sys.stdout.write(text)
        return
    try:
        output.write_text(text)
    except OSError as error:
        raise MeshgpuError("bad-request", f"cannot write {output}: {error.strerror}", f"ls -ld {output}") from error


# -- what is asked for -----------------------------------------------------------------------------------------------


def _try_all(request: JobRequest, space: SweepRequest, metric: str, pattern: str, retries: int) -> None:
    """Say in the request what is tried, and what trials are compared by. Raises MeshgpuError `bad-request`."""
    for text in space["params"]:
        parse_param(text)
    if metric:
        parse_objective(metric)
    elif pattern:
        raise MeshgpuError("bad-request", "cannot use --metric-regex without --metric", "--metric loss:min")
    request["sweep"] = space
    request["metric"], request["metric_pattern"] = metric, pattern
    request["retries"] = retries


def _start(request: JobRequest, *, detach: bool, as_json: bool, yes: bool) -> None:
    client = agent_for(yes=yes)
    job = ship_and_submit(client, request)
    if detach:
        print(json.dumps({"id": job["id"], "display": job["display"]}) if as_json else job["display"], flush=True)
        if not as_json:
            _detached(job)
        return
    try:
        view = _follow(client, job, as_json=as_json)
    except KeyboardInterrupt:
        _detached(job)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    raise typer.Exit({"succeeded": 0, "failed": EXIT_FAILED_CHECK}.get(view["sweep"]["state"], EXIT_MESH_FAILED))


# -- following -------------------------------------------------------------------------------------------------------


def _follow(client: AgentClient, job: JobView, *, as_json: bool) -> SweepView:
    """Until it ends: one line when a trial starts somewhere, one when it ends."""
    note(plain(_headline(job)))
    told: dict[int, str] = {}
    while True:
        view = client.sweep(job["id"])
        for trial in view["trials"]:
            line = _news(view, trial)
            number = trial["trial"]["number"] if trial["trial"] else 0
            about = trial["state"] if is_final(trial) else line
            if line and told.get(number) != about:
                told[number] = about
                print(json.dumps(trial) if as_json else plain(line), flush=True)
        if is_final(view["sweep"]):
            for line in (_progress(view), _best_line(view)):
                if line:
                    note(plain(line))
            return view
        time.sleep(POLL_S)


def _news(view: SweepView, trial: JobView) -> str:
    """What is new of a trial; empty while it waits for its first machine."""
    name = f"{_label(trial)}  {_values(trial)}"
    if is_final(trial):
        took = (
            f" in {clock(trial['ended_at'] - trial['started_at'])}" if trial["started_at"] and trial["ended_at"] else ""
        )
        best = "  best so far" if trial is _best(view) else ""
        because = f": {trial['reason']}" if trial["reason"] else ""
        number = _number(trial)
        return f"{name}  {status(trial)}{because}{took}{'  ' + number if number else ''}{best}"
    if trial["machine"] and trial["phase"] == "running":
        again = " (again)" if trial["epoch"] > 1 else ""
        return f"{name} → {trial['machine']}{again}"
    if trial["state"] == "queued" and trial["epoch"]:
        return f"{name}  waits again: {trial['reason']}" if trial["reason"] else ""
    return ""


def _detached(job: JobView) -> None:
    name = job["display"]
    note(f"{name} goes on. To see it: meshgpu sweep status {name}   to stop it: meshgpu sweep stop {name}")


# -- words -----------------------------------------------------------------------------------------------------------


def _headline(job: JobView) -> str:
    held = f" · held by {job['held_by'][0]} only" if len(job["held_by"]) == 1 else ""
    leaves = {"ok": " · may leave the office", "only": " · for the cloud only"}.get(job["cloud"], "")
    return f"{job['display']} · {_space(job)}{leaves}{held}"


def _space(job: JobView) -> str:
    space = job["space"]
    if space is None:
        return ""
    over = f"{space['method']} over {', '.join(space['params'])}"
    return f"{count(space['trials'], 'trial')} ({over}), {space['parallel']} at a time"


def _table(view: SweepView) -> tuple[Sequence[str], list[tuple[str, ...]], frozenset[str]]:
    """Header, rows and right-aligned columns: one row for each trial that has begun."""
    params = view["sweep"]["space"]["params"] if view["sweep"]["space"] else []
    metric = view["sweep"]["metric"]
    header = ["TRIAL", *params, "ST", "TIME", *([metric["name"].upper()] if metric else []), "WHERE(REASON)"]
    best, now = _best(view), time.time()
    rows = []
    for trial in view["trials"]:
        values = trial["trial"]["values"] if trial["trial"] else {}
        number = [_short(trial["metric"]["best"] if trial["metric"] else None)] if metric else []
        mark = " ← best" if trial is best else ""
        state = (status(trial), run_time(trial, now))
        rows.append((_label(trial), *values.values(), *state, *number, where(trial) + mark))
    return header, rows, frozenset({"TIME", *(header[-2:-1] if metric else [])})


def _progress(view: SweepView) -> str:
    space = view["sweep"]["space"]
    total = space["trials"] if space else 0
    states = [trial["state"] for trial in view["trials"]]
    parts = [f"{states.count(state)} {state}" for state in ("succeeded", "failed", "cancelled") if state in states]
    running = sum(trial["phase"] == "running" for trial in view["trials"])
    waiting = total - sum(map(is_final, view["trials"])) - running
    parts += [f"{running} running"] * bool(running)
    if not is_final(view["sweep"]):
        parts += [f"{waiting} to come"] * bool(waiting)
    return f"{total} trials: {', '.join(parts) or 'none has begun'}"


def _best_line(view: SweepView) -> str:
    best = _best(view)
    return f"best: {_label(best)}  {_values(best)}  {_number(best)} · runs/{best['display']}" if best else ""


def _best(view: SweepView) -> JobView | None:
    """The trial with the best number that any has reported; of equal ones the first."""
    metric = view["sweep"]["metric"]
    reported = [(trial["metric"]["best"], trial) for trial in view["trials"] if trial["metric"]]
    found = [(value, trial) for value, trial in reported if value is not None]
    if metric is None or not found:
        return None
    return (min if metric["goal"] == "min" else max)(found, key=lambda pair: pair[0])[1]


def _label(trial: JobView) -> str:
    return f"#{trial['trial']['number']}" if trial["trial"] else trial["display"]


def _values(trial: JobView) -> str:
    return " ".join(f"{name}={value}" for name, value in (trial["trial"]["values"] if trial["trial"] else {}).items())


def _number(trial: JobView) -> str:
    metric = trial["metric"]
    return f"{metric['name']} {_short(metric['best'])}" if metric and metric["best"] is not None else ""


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


# -- export ----------------------------------------------------------------------------------------------------------


def _record(trial: JobView) -> dict[str, Any]:
    metric = trial["metric"]
    return {
        "trial": trial["trial"]["number"] if trial["trial"] else None,
        "id": trial["id"],
        "values": dict(trial["trial"]["values"]) if trial["trial"] else {},
        "state": trial["state"],
        "machine": trial["machine"],
        "exit_code": trial["exit_code"],
        "started_at": trial["started_at"],
        "ended_at": trial["ended_at"],
        "metric": metric["name"] if metric else None,
        "best": metric["best"] if metric else None,
        "last": metric["last"] if metric else None,
        "step": metric["step"] if metric else None,
    }


def _csv(view: SweepView, rows: list[dict[str, Any]]) -> str:
    """RFC 4180, with the parameters as columns named param.NAME."""
    params = view["sweep"]["space"]["params"] if view["sweep"]["space"] else []
    plain_columns = ("state", "machine", "exit_code", "started_at", "ended_at", "metric", "best", "last", "step", "id")
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["trial", *(f"param.{name}" for name in params), *plain_columns])
    writer.writerows(
        [row["trial"], *_in_order(row, params), *(row[column] for column in plain_columns)] for row in rows
    )
    return text.getvalue()


def _in_order(row: dict[str, Any], params: list[str]) -> Iterator[str]:
    return (row["values"].get(name, "") for name in params)
