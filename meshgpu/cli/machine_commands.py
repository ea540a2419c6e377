"""Commands about machines and this machine's agent: up, down, machines, version."""

import json
import time
from collections.abc import Iterator
from typing import Annotated, Final

import typer

from meshgpu import __version__
from meshgpu.cli.launch import ensure_agent, listening_s, running_agent, stop_agent
from meshgpu.cli.render import ago, count, note, plain, print_table
from meshgpu.cli.watch import Json, Watch, repeat
from meshgpu.cli.words import short_gpu, sold_gigabytes
from meshgpu.client.agent import AgentClient
from meshgpu.client.home import find_home
from meshgpu.client.views import AgentView, GpuJobView, GpuView, MachineView, SightingView

COLUMNS: Final = ("MACHINE", "GPU", "TEMP", "UTIL", "MEMORY", "STATE")
NUMBERS: Final = frozenset({"TEMP", "UTIL", "MEMORY"})
SAID_COLUMNS: Final = (
    *(
        "MACHINE",
        "STATE",
        "HEARD",
        "OWNER",
        "LENDS",
        "FENCE",
        "LOAD",
        "JOBS",
        "AS OF",
        "ADDRESS",
        "AGENT",
        "DOUBTED BY",
    ),
)
SAID_NUMBERS: Final = frozenset({"HEARD", "LOAD", "JOBS", "AS OF"})

Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Also what each machine says of itself, how old it is, and who doubts whom."),
]


def up() -> None:
    """Start this machine's agent if none answers, and show what is around."""
    client, agent = ensure_agent()
    nearby = client.discover(listening_s(agent))
    for line in around(agent, nearby):
        print(plain(line))


def down() -> None:
    """Stop this machine's agent; jobs that run go on."""
    if not stop_agent(find_home()):
        note("no agent runs here")
        return
    note("the agent is stopped; jobs run on (meshgpu up brings it back)")


def machines(verbose: Verbose = False, as_json: Json = False, watch: Watch = False) -> None:
    """Show the machines of the mesh, one line for each GPU."""
    client = AgentClient.found()

    def show() -> None:
        found = client.machines()["machines"]
        if as_json:
            print(json.dumps({"machines": found}), flush=True)
        else:
            print_table(COLUMNS, [row for machine in found for row in machine_rows(machine)], NUMBERS)
            if verbose:
                print()
                print_table(SAID_COLUMNS, [_said_row(machine) for machine in found], SAID_NUMBERS)

    repeat(show, watch=watch)


def version(as_json: Json = False) -> None:
    """Show the version of this program and of the agent."""
    agent = running_agent(find_home())
    if as_json:
        print(json.dumps({"version": __version__, "agent": agent["version"] if agent else None}))
        return
    print(f"meshgpu {__version__}")
    if agent and agent["version"] != __version__:
        note(f"the agent is {agent['version']}: meshgpu down && meshgpu up")


def around(agent: AgentView, nearby: list[SightingView]) -> Iterator[str]:
    """What `up` says: this machine, its mesh, who else is there, what to type next."""
    mesh = agent["mesh"]
    gpus = ", ".join(agent["gpus"]) or agent["gpu_note"] or "no GPU"
    yield f"this machine: {agent['name']} · {gpus} · agent {agent['version']} in {agent['home']}"
    if agent["wanted_port"] not in (0, agent["link_port"]):
        yield f"port {agent['wanted_port']} was taken: the other machines reach this one at port {agent['link_port']}"
    meshes: dict[str, list[SightingView]] = {}
    for machine in nearby:
        if not machine["self"] and not machine["ours"]:
            meshes.setdefault(machine["mesh_name"] or machine["mesh_tag"] or "in no mesh yet", []).append(machine)
    for name, members in meshes.items():
        yield f"on this network: {name} · {count(len(members), 'machine')} · {all_gpus(members)}"
    if mesh is not None:
        others = sum(1 for machine in nearby if machine["ours"] and not machine["self"])
        yield f"mesh {mesh['name']} · you are {agent['user']} · {count(others, 'other member')} seen"
        yield "next: meshgpu machines, meshgpu run -- python train.py, meshgpu admit"
    elif meshes:
        yield "next: meshgpu join (an admin runs: meshgpu admit), or meshgpu init (your own mesh)"
    else:
        yield "next: meshgpu init (start a mesh), or meshgpu join (an admin runs: meshgpu admit)"


def all_gpus(machines: list[SightingView]) -> str:
    """The GPUs that some machines announce, added up: `3 × RTX 4090 24GB, 1 × RTX 3060 12GB`."""
    numbers: dict[str, int] = {}
    for part in ", ".join(machine["gpus"] or "" for machine in machines).split(", "):
        number, is_counted, name = part.partition("x ")
        if is_counted and number.isdigit():
            numbers[name] = numbers.get(name, 0) + int(number)
    return ", ".join(f"{number} × {name}" for name, number in numbers.items()) or "no GPU"


def machine_rows(machine: MachineView) -> Iterator[tuple[str, ...]]:
    """One row for each GPU, one for a machine without any."""
    marks = [*(["this"] if machine["self"] else []), *(role for role in machine["roles"] if role != "rig")]
    name = f"{machine['name']} ({', '.join(marks)})" if marks else machine["name"]
    gone = _absence(machine)
    if not machine["gpus"]:
        yield name, "no GPU", "-", "-", "-", gone or machine["gpu_note"] or ("ready" if _lends(machine) else "not lent")
        return
    for row, gpu in enumerate(sorted(machine["gpus"], key=lambda gpu: gpu["index"])):
        label = name if row == 0 else ""
        if len(machine["gpus"]) > 1:
            label = f"{label} [{gpu['index']}]".strip() if row == 0 else f"{'':{len(name)}} [{gpu['index']}]"
        yield (
            label,
            f"{short_gpu(gpu['name'])} {sold_gigabytes(gpu['memory_total_bytes'])} GB",
            "-" if gone else _measure(gpu["temperature_c"], "°C"),
            "-" if gone else _measure(gpu["utilization_percent"], "%"),
            "-" if gone else _memory(gpu),
            gone or _gpu_state(machine, gpu),
        )


def _said_row(machine: MachineView) -> tuple[str, ...]:
    """What the machine says of itself besides its GPUs, how old that is, and who else cannot reach it."""
    heard, said, load = machine["heard_s"], machine["capacity_s"], machine["load"]
    return (
        machine["name"],
        machine["state"],
        "-" if heard is None else ago(heard),
        machine["owner"] or "-",
        "nothing" if machine["paused"] or not _lends(machine) else machine["lending"] or "-",
        machine["fence"] or "none",
        "-" if load is None else f"{load} / {machine['cpus']}",
        str(machine["jobs"]),
        "-" if said is None else ago(said),
        machine["address"] or "-",
        machine["version"] or "-",
        ", ".join(machine["doubted_by"]) or "-",
    )


def _absence(machine: MachineView) -> str:
    """Why a machine takes no work now; empty for one that is there."""
    seconds = machine["down_s"]
    if machine["cloned"]:
        return "runs twice: meshgpu doctor"
    if machine["state"] == "down":
        return "out of touch" if seconds is None else f"out of touch {ago(seconds)}"
    if machine["paused"] and not any(gpu["jobs"] for gpu in machine["gpus"]):
        until = machine["paused_until"]
        return "paused by its owner" if until is None else f"paused by its owner, {ago(until - time.time())} left"
    return {"suspect": "does not answer", "left": "has left", "revoked": "was put out"}.get(machine["state"], "")


def _lends(machine: MachineView) -> bool:
    """Whether its role lets it run jobs at all."""
    return not {"submitter", "viewer"} & set(machine["roles"])


def _gpu_state(machine: MachineView, gpu: GpuView) -> str:
    if gpu["fault"]:
        return gpu["fault"]
    if not _lends(machine) and not gpu["jobs"]:
        return "not lent"
    if gpu["withheld"] and not gpu["jobs"]:
        return "in use by its owner"
    if gpu["jobs"]:
        return ", ".join(_holder(job) for job in sorted(gpu["jobs"], key=lambda job: job["waits"]))
    if not machine["fence"]:
        return f"free for {machine['owner'] or 'its owner'} only"
    return "free"


def _holder(job: GpuJobView) -> str:
    name = f"{job['display']} ({job['user']})"
    return f"kept free for {name}" if job["waits"] else name


def _measure(value: int | None, unit: str) -> str:
    return "-" if value is None else f"{value} {unit}"


def _memory(gpu: GpuView) -> str:
    total, free = gpu["memory_total_bytes"], gpu["memory_free_bytes"]
    if free is None:
        return "-"
    return f"{sold_gigabytes(max(0, total - free))} / {sold_gigabytes(total)} GB"
