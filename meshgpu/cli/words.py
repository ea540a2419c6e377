"""Jobs in words: how the state, the place and the end of a job are told, and the exit code they give."""

import re
from typing import Final

from meshgpu.cli.render import ago, clock, count, plain, size
from meshgpu.client.views import JobView

EXIT_FAILED_CHECK: Final = 1
EXIT_USAGE: Final = 2
EXIT_TIME_LIMIT: Final = 124
EXIT_MESH_FAILED: Final = 125
EXIT_INTERRUPTED: Final = 130
"""128 + SIGINT: what a shell expects of a program that Ctrl-C ended."""

FINAL_STATES: Final = frozenset({"succeeded", "failed", "cancelled", "expired", "lost"})
WAITING_STATES: Final = frozenset({"draft", "queued", "placing"})
NOWHERE_STATES: Final = frozenset({"draft", "queued"})
"""The machine and the GPUs that such a job names are those of an attempt that is over."""
_SHARED_REQUEST: Final = re.compile(r"(\d+(?:\.\d+)?)GB")


def is_final(job: JobView) -> bool:
    return job["state"] in FINAL_STATES


def goes_on(job: JobView) -> str:
    """What a job does that nobody looks at any more."""
    return "waits on" if job["state"] in WAITING_STATES else "goes on"


def exit_code(job: JobView) -> int:
    """The job's own code; never 0 for a job that did not record one and succeed or was not stopped with it."""
    code = job["exit_code"]
    if job["timed_out"] and job["state"] == "failed":
        return EXIT_TIME_LIMIT
    if code is None or job["state"] not in ("succeeded", "failed", "cancelled"):
        return EXIT_MESH_FAILED
    if not 0 <= code <= 255 or (code == 0 and job["state"] == "failed"):
        return EXIT_MESH_FAILED
    return code


def status(job: JobView) -> str:
    """What stands in the column ST."""
    if job["state"] == "unknown":
        seconds = job["out_of_touch_s"]
        return "out of touch" if seconds is None else f"out of touch {ago(seconds)}"
    if job["timed_out"] and job["state"] == "failed":
        return "timed out"
    if job["state"] in ("failed", "cancelled") and job["exit_code"] is not None:
        return f"{job['state']} ({job['exit_code']})"
    if job["space"] and job["state"] == "active":
        return "sweep"
    return job["phase"] or job["state"]


def run_time(job: JobView, now: float) -> str:
    """How long it ran so far; before that, how long it has been waiting."""
    begin = job["started_at"] or job["submitted_at"]
    return clock((job["ended_at"] or now) - begin)


def where(job: JobView) -> str:
    """Its machine, and why it waits or ended as it did: `rig-b`, `(rig-b is busy)`."""
    waits = job["state"] in NOWHERE_STATES
    machine = None if waits else job["machine"]
    reason = f"({job['reason']})" if job["reason"] else ""
    if waits and not reason and (wanted := job["requested_machine"]):
        reason = f"(waits for {wanted})"
    return " ".join(part for part in (machine, reason) if part) or "-"


def short_gpu(name: str) -> str:
    """`NVIDIA GeForce RTX 4090` as people say it (as model.inventory, whose import takes `ps` 8 ms)."""
    return name.removeprefix("NVIDIA ").removeprefix("GeForce ")


def sold_gigabytes(memory_bytes: int) -> int:
    """The number on the card's box: makers count in GiB."""
    return round(memory_bytes / 2**30)


def gpus(job: JobView) -> str:
    """The GPUs a job has or had: `RTX 4090 24 GB`, `2 × RTX 4090 24 GB`, `8 GB of RTX 4090`; empty for none."""
    if job["state"] in NOWHERE_STATES:
        return ""
    labels: dict[str, int] = {}
    shared = _SHARED_REQUEST.fullmatch(job["gpu_request"].upper())
    for gpu in job["gpus"]:
        label = short_gpu(gpu["name"])
        if shared:
            label = f"{shared[1]} GB of {label}"
        elif gpu["memory_bytes"]:
            label = f"{label} {sold_gigabytes(gpu['memory_bytes'])} GB"
        labels[label] = labels.get(label, 0) + 1
    return ", ".join(label if number == 1 else f"{number} × {label}" for label, number in labels.items())


def headline(job: JobView) -> str:
    """One line that says what runs where, before the log: `train-k7q → rig-b · RTX 4090 24 GB · 12 files 41 kB · …`."""
    parts = [f"{job['display']} → {job['machine'] or 'no machine yet'}", gpus(job) or "no GPU"]
    if job["tree_files"]:
        parts.append(f"{count(job['tree_files'], 'file')} {size(job['tree_bytes'])}")
    if job["detail"] and ": " not in job["detail"]:  # with a colon it is progress: see waiting
        parts.append(job["detail"])
    if leaves := {"ok": "may leave the office", "only": "for the cloud only"}.get(job["cloud"]):
        parts.append(leaves)
    if len(job["held_by"]) == 1:
        parts.append(f"held by {job['held_by'][0]} only")
    return plain(" · ".join(parts))


def waiting(job: JobView) -> str:
    """Why nothing runs yet: `train-k7q waits: rig-b is busy`; what is being made ready; empty where it runs or ran."""
    name = job["display"]
    if job["state"] in WAITING_STATES:
        return plain(f"{name} waits: {job['reason']}") if job["reason"] else ""
    if job["state"] == "cancelling":
        return plain(f"{name} is being stopped")
    if job["phase"] == "staging" and ": " in job["detail"]:  # what came of it belongs into the headline
        return plain(f"{name} · {job['machine']} · {job['detail']}")
    if job["phase"] == "paused":
        return plain(f"{name} is paused{': ' + job['reason'] if job['reason'] else ''}")
    return ""


def ending(job: JobView) -> str:
    """How it ended, where that is worth a line; empty for a job that succeeded."""
    name, state, code = job["display"], job["state"], job["exit_code"]
    because = f": {job['reason']}" if job["reason"] else ""
    told = {
        "cancelled": "was stopped" if job["started_at"] else "was cancelled before it started",
        "expired": "expired",
        "lost": "is lost: its end was never recorded",
        "failed": "was ended"
        if job["timed_out"]
        else f"failed with exit code {code}"
        if code is not None
        else "failed without an exit code",
    }
    return plain(f"{name} {told[state]}{because}") if state in told else ""
