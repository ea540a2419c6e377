"""The command `why`: where a job is and why there, or what every machine and every GPU says to it."""

import json
import time
from collections.abc import Iterator, Mapping
from typing import Final

from meshgpu.cli.job_commands import JobId
from meshgpu.cli.render import ago, count, plain, table
from meshgpu.cli.watch import Json
from meshgpu.cli.words import ending, gpus, is_final, short_gpu, sold_gigabytes, status
from meshgpu.client.agent import AgentClient
from meshgpu.client.views import GpuVerdictView, JobView, MachineVerdictView

COLUMNS: Final = ("MACHINE", "GPU", "NOW", "WHAT WOULD CHANGE IT")
WAITING: Final = frozenset({"draft", "queued", "placing"})


def why(job: JobId, as_json: Json = False) -> None:
    """Say why a job waits (each machine's and each GPU's answer), or why it runs or ran where it did."""
    view = AgentClient.found().why(job)
    if as_json:
        print(json.dumps(view))
        return
    for line in story(view["job"], view["before"], time.time()):
        print(plain(line))
    if view["job"]["state"] in WAITING:
        print("\n".join(["", *table(COLUMNS, [row for machine in view["machines"] for row in rows(machine)])]))


def story(job: JobView, before: Mapping[str, int], now: float) -> Iterator[str]:
    """How the job stands, who holds it, since when; then why it is where it is."""
    waits = job["state"] in WAITING
    since = job["submitted_at"] if waits else job["ended_at"] or job["started_at"] or job["submitted_at"]
    word = "waits, submitted" if waits else "ended" if job["ended_at"] else "runs, started"
    if not waits and not job["ended_at"] and not job["started_at"]:
        word = "prepares, submitted"
    held = ", ".join(job["held_by"])
    yield f"{job['display']} is {status(job)} · {word} {ago(now - since)} ago · held by {held}"
    wanted = job["requested_machine"] or "any machine"
    asked = [wanted, f"-g {job['gpu_request']}"]
    if job["on"]:
        asked.append(f"--on '{job['on']}'")
    if job["priority"] != "normal":
        asked.append(f"--priority {job['priority']}")
    yield f"asked for: {' · '.join(asked)}"
    if waits:
        if job["epoch"]:
            yield f"was placed {count(job['epoch'], 'time')} before, and waits again"
        if job["reason"]:
            yield f"{', '.join(job['held_by'])} says: {job['reason']}"
        yield queue(job, before)
        return
    if is_final(job) and (end := ending(job)):
        yield end
    yield place(job)


def queue(job: JobView, before: Mapping[str, int]) -> str:
    """Who goes first where room appears for both."""
    if not before:
        return "queue: no other job goes first"
    whose = ", ".join(f"{'yours' if user == job['user'] else user} {jobs}" for user, jobs in before.items())
    return f"queue: at most {count(sum(before.values()), 'job')} first ({whose})"


def place(job: JobView) -> str:
    """Where it runs or ran, and why there."""
    machine = job["machine"]
    if machine is None:
        return "where: nowhere, it never began"
    what = f"where: {machine} · {gpus(job) or 'no GPU'}"
    if job["requested_machine"]:
        return f"{what} · why there: -m named it"
    if not job["gpus"]:
        return f"{what} · why there: one of the machines that had room, at random"
    return f"{what} · why there: of the machines that had room, one with the smallest GPUs that fit, at random"


def rows(machine: MachineVerdictView) -> Iterator[tuple[str, ...]]:
    """One row for the machine; where it has several GPUs, one more for each."""
    verdicts = sorted(machine["gpus"], key=lambda gpu: gpu["index"])
    answer = "takes it" if machine["takes"] else machine["refusal"]
    if len(verdicts) == 1:
        own = verdicts[0] if machine["rule"] in ("lacks", "faulty", "busy") and not verdicts[0]["takes"] else machine
        answer = answer if machine["takes"] else own["refusal"]
        yield machine["name"], label(verdicts[0]), answer, own["remedy"]
        return
    yield machine["name"], count(len(verdicts), "GPU") if verdicts else "-", answer, machine["remedy"]
    for gpu in verdicts:
        chosen = "would be given" if gpu["uuid"] in machine["gives"] else "free and fits"
        yield f"  [{gpu['index']}]", label(gpu), chosen if gpu["takes"] else gpu["refusal"], gpu["remedy"]


def label(gpu: GpuVerdictView) -> str:
    return f"{short_gpu(gpu['name'])} {sold_gigabytes(gpu['memory_total_bytes'])} GB"
