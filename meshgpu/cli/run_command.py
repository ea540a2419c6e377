"""The command `run`: ships the working directory, submits the job, follows it."""

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Final

import typer

from meshgpu.cli.attach import Attachment, conclude, detached, events
from meshgpu.cli.files import fetch, inside, keep_both
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
from meshgpu.cli.launch import confirmed, running_agent, start_agent
from meshgpu.cli.render import count, note, plain, show_error, size
from meshgpu.cli.ship import ship, submit
from meshgpu.cli.spans import parse_moment, parse_span
from meshgpu.cli.watch import Json
from meshgpu.cli.words import EXIT_INTERRUPTED, EXIT_MESH_FAILED, exit_code
from meshgpu.client.agent import AgentClient
from meshgpu.client.home import find_home
from meshgpu.client.tree import capture
from meshgpu.client.views import JobRequest, JobView
from meshgpu.errors import MeshgpuError
from meshgpu.model.constraints import join
from meshgpu.model.ids import as_name
from meshgpu.model.resources import GB, parse_gpus

_MEMORY: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([mgt])b?", re.IGNORECASE)
_MEMORY_UNITS: Final = {"m": GB // 1000, "g": GB, "t": GB * 1000}
_SCRIPT: Final = re.compile(r"(?:.*/)?([^/]+)\.(?:py|sh|ipynb|jl|R)")


def run(
    command: Command,
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
    retries: Retries = 0,
    priority: Priority = "normal",
    preemptible: Preemptible = False,
    timeout: Timeout = "",
    start_by: Annotated[
        str, typer.Option("--start-by", metavar="18:00|TIME", help="Give up unless it starts by then, or within 30m.")
    ] = "",
    secret: Secret = None,
    share: Share = False,
    name: Name = None,
    detach: Detach = False,
    fetch_here: Annotated[bool, typer.Option("--fetch", help="Bring back what the job left.")] = False,
    fetch_to: Annotated[Path | None, typer.Option("--fetch-to", metavar="DIR", help="--fetch, into DIR.")] = None,
    as_json: Json = False,
    yes: Yes = False,
) -> None:
    """Run a command on a machine of the mesh, in a copy of this directory, and follow it.

    Options end at CMD or at --. Standard input is not passed on. The exit code is the job's; 125: the mesh failed,
    124: it ran out of time, 130: Ctrl-C, after which the job goes on.
    """
    request = job_request(command, name, env, pip, pip_req, image)
    place(request, machine, gpus, cpus, memory, on, not_on, cloud, no_env=no_env)
    request["priority"], request["preemptible"] = checked_priority(priority), preemptible
    request["retries"], request["timeout_s"] = retries, time_limit(timeout)
    request["start_by"] = parse_moment(start_by, time.time(), "--start-by 30m") if start_by else None
    request["shared"], request["secrets"] = share, read_secrets(secret or [], request["env"])
    client = agent_for(yes=yes)
    job = ship_and_submit(client, request)
    if detach:
        _hand_over(job, as_json=as_json)
        return
    target = fetch_to or (Path() if fetch_here else None)
    job = _follow(client, job, as_json=as_json, will_fetch=target is not None)
    code = exit_code(job)
    if target is not None and job["output_files"]:
        try:
            _bring_back(client, job, target)
        except MeshgpuError as error:
            show_error(error)
            code = code or EXIT_MESH_FAILED
    raise typer.Exit(code)


def job_request(
    command: list[str],
    name: str | None,
    env: list[str] | None,
    pip: list[str] | None,
    pip_req: Path | None,
    image: str,
) -> JobRequest:
    """What is asked for, of the command; the rest as it is where nothing is said."""
    return JobRequest(
        name=as_name(job_name(command) if name is None else not_empty(name, "--name"), "job"),
        command=command,
        shell=is_shell(command),
        env=parse_env(env or []),
        pip=pip or [],
        requirements=_read(pip_req) if pip_req else "",
        from_project=True,
        tree="",
        machine="",
        gpus=None,
        cpus=0,
        memory_bytes=0,
        on="",
        not_on="",
        image=_checked_image(image, has_packages=bool(pip or pip_req)),
        retries=0,
        cloud=None,
        sweep=None,
        metric="",
        metric_pattern="",
        secrets={},
        shared=False,
        priority="normal",
        preemptible=False,
        timeout_s=None,
        start_by=None,
    )


def place(
    request: JobRequest,
    machine: str | None,
    gpus: str | None,
    cpus: int,
    memory: str,
    on: str,
    not_on: str,
    cloud: str | None,
    *,
    no_env: bool,
) -> None:
    """Say in the request where it may run, with what. Raises MeshgpuError `bad-request`."""
    request["from_project"] = not no_env
    request["machine"] = "" if machine is None else not_empty(machine, "-m")
    request["gpus"] = None if gpus is None else str(parse_gpus(gpus))
    request["cpus"] = cpus
    request["memory_bytes"] = parse_memory(memory) if memory else 0
    join(on, not_on)  # an error in them is better told before anything is shipped
    request["on"], request["not_on"] = on, not_on
    request["cloud"] = checked_cloud(cloud)


def job_name(command: list[str]) -> str:
    """The script's name, else the module's of `python -m`, else the program's."""
    words = _shell_words(command[0]) if is_shell(command) else command
    is_python = False
    for index, word in enumerate(words):
        if match := _SCRIPT.fullmatch(word):
            return match[1]
        if word == "-m" and is_python and index + 1 < len(words):
            return words[index + 1].rpartition(".")[2]
        is_python = is_python or Path(word).name.startswith("python")
    return next((name for name in (Path(word).name for word in words) if re.search(r"[A-Za-z0-9]", name)), "job")


def _shell_words(text: str) -> list[str]:
    """The words of a shell's command line; its operators are words of their own."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        return list(lexer)
    except ValueError:  # an unclosed quotation mark: the shell will say so
        return text.split()


def is_shell(command: list[str]) -> bool:
    """A single argument with white space in it was quoted on purpose: it is for a shell."""
    return len(command) == 1 and len(command[0].split()) > 1


def parse_env(pairs: list[str]) -> dict[str, str]:
    """`K=V` as it says, `K` as it is here; raises MeshgpuError `bad-request` for a name that is none or is not set."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, is_set, value = pair.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise MeshgpuError(
                "bad-request", f"cannot set the variable {name!r}: expected K=V", "meshgpu run -e SEED=1 …"
            )
        if not is_set and name not in os.environ:
            raise MeshgpuError(
                "bad-request", f"cannot pass on {name}: it is not set here", f"meshgpu run -e {name}=… …"
            )
        found[name] = value if is_set else os.environ[name]
    return found


def read_secrets(asked: list[str], env: Mapping[str, str]) -> dict[str, str]:
    """`NAME` as it is here, `NAME=@FILE` from a file, without the file's last line end.

    Raises MeshgpuError `bad-request`, also for a value on the command line. No error shows a value, nor what may be
    one: of what is refused only the name stands in it.
    """
    found: dict[str, str] = {}
    for pair in asked:
        name, is_given, source = pair.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name.startswith("MESHGPU_"):
            raise MeshgpuError(
                "bad-request",
                "cannot pass a secret: expected the name of a variable",
                "meshgpu run --secret HF_TOKEN …",
            )
        if is_given and not source.startswith("@"):
            raise MeshgpuError(
                "bad-request",
                f"cannot take the secret {name} from the command line: every account of this machine reads it there",
                f"export {name}=…; meshgpu run --secret {name} …   or, from a file, --secret {name}=@FILE",
            )
        if name in found or name in env:
            raise MeshgpuError("bad-request", f"cannot pass the secret {name}: it is set twice", f"--secret {name}")
        found[name] = _secret_file(name, Path(source[1:])) if is_given else _secret_variable(name)
    return found


def _secret_variable(name: str) -> str:
    value = os.environ.get(name)
    if value is None:
        raise MeshgpuError(
            "bad-request", f"cannot pass the secret {name}: it is not set here", f"export {name}=…, or {name}=@FILE"
        )
    return value


def _secret_file(name: str, path: Path) -> str:
    try:
        return path.read_bytes().decode().removesuffix("\n").removesuffix("\r")
    except (OSError, UnicodeDecodeError) as error:
        found = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        # Without the cause: that of a decoding error holds the file's bytes.
        raise MeshgpuError(
            "bad-request", f"cannot read the secret {name} in {path}: {found}", f"ls -l {path}"
        ) from None


def parse_memory(text: str) -> int:
    """`8GB`, `500MB` in bytes, decimal; raises MeshgpuError `bad-request` otherwise."""
    match = _MEMORY.fullmatch(text.strip())
    if match is None:
        raise MeshgpuError("bad-request", f"cannot read the memory {text!r}: expected 8GB or 500MB", "--memory 8GB")
    return int(float(match[1]) * _MEMORY_UNITS[match[2].lower()])


def time_limit(text: str) -> float | None:
    """`--timeout` in seconds, None without. Raises MeshgpuError `bad-request`."""
    if not text:
        return None
    seconds = parse_span(text, "--timeout 2h")
    if seconds == 0:
        raise MeshgpuError("bad-request", "cannot run for no time at all: --timeout is 0", "--timeout 2h")
    return seconds


def _checked_image(image: str, *, has_packages: bool) -> str:
    """An image brings its own Python: what --pip names would be installed nowhere, so it is refused, not ignored."""
    if image and has_packages:
        raise MeshgpuError(
            "bad-request",
            "cannot install packages into an image: --image excludes --pip and --pip-req",
            "--image IMAGE",
        )
    return image


def checked_cloud(text: str | None) -> str | None:
    """Raises MeshgpuError `bad-request` for what is no such wish."""
    if text is not None and text not in ("never", "ok", "only"):
        raise MeshgpuError("bad-request", f"cannot use --cloud {text}: expected never, ok or only", "--cloud never")
    return text


def checked_priority(text: str) -> str:
    """Raises MeshgpuError `bad-request` for what is none."""
    if text not in ("low", "normal", "high"):
        raise MeshgpuError(
            "bad-request", f"cannot use --priority {text}: expected low, normal or high", "--priority low"
        )
    return text


def not_empty(text: str, flag: str) -> str:
    """A variable that is not set must not silently mean any machine."""
    if not text.strip():
        raise MeshgpuError("bad-request", f"cannot use {flag} '': it is empty", f"leave {flag} out")
    return text


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        found = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise MeshgpuError(
            "bad-request", f"cannot read the requirements in {path}: {found}", f"ls -l {path}"
        ) from error


def agent_for(*, yes: bool) -> AgentClient:
    """This machine's agent; where none answers, one is started if the person agrees."""
    home = find_home()
    client = AgentClient(home)
    if (
        running_agent(home) is None
        and (yes or sys.stdin.isatty())
        and confirmed("No agent answers. Start it?", yes=yes)
    ):
        start_agent(home)
    return client


def ship_and_submit(client: AgentClient, request: JobRequest) -> JobView:
    try:
        tree = capture(_here(), _cache(), find_home())
        for warning in tree.warnings:
            note(plain(f"note: {warning}"))
        request["tree"] = ship(client, tree)
        return submit(client, request)
    except KeyboardInterrupt:
        note("interrupted before the job was taken; nothing runs unless `meshgpu ps` shows it")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _here() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise MeshgpuError("not-a-project", "cannot ship the working directory: it was deleted", "cd …") from error


def _cache() -> Path:
    """Where what is known about files is kept between runs, to read only those that changed."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root.startswith("/") else Path.home() / ".cache") / "meshgpu"


def _hand_over(job: JobView, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"id": job["id"], "display": job["display"]}))
        return
    print(job["display"], flush=True)
    if job["cloud"] != "never":
        note(plain(f"{job['display']} may leave the office (--cloud {job['cloud']})"))
    if len(job["held_by"]) == 1:
        note(plain(f"{job['display']} is held by {job['held_by'][0]} only"))
    detached(job)


def _follow(client: AgentClient, job: JobView, *, as_json: bool, will_fetch: bool) -> JobView:
    """Until it ends; Ctrl-C lets it go on."""
    attachment = Attachment(job)
    try:
        if as_json:
            for event in events(client, job["id"]):
                print(json.dumps(event), flush=True)
                if event["type"] in ("job", "end"):
                    job = event["job"]
            return job
        job = attachment.follow(client)
    except KeyboardInterrupt:
        detached(job if as_json else attachment.job)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    conclude(client, job, attachment.missing_module(), tell_outputs=not will_fetch)
    return job


def _bring_back(client: AgentClient, job: JobView, target: Path) -> None:
    files = client.files(job["id"])
    told: Callable[[str], None] = lambda line: note(plain(line))  # noqa: E731
    plan = [(file, inside(target, file["path"])) for file in files]
    came = fetch(client, job["id"], plan, keep_both(job["display"], told))
    note(plain(f"{count(len(came), 'file')}, {size(sum(file['size_bytes'] for file in came))} fetched to {target}"))
