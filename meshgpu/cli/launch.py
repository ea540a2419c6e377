"""Starts the background agent and waits until it answers."""

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import typer

from meshgpu.cli import service
from meshgpu.cli.render import note
from meshgpu.client.agent import AgentClient
from meshgpu.client.home import find_home, socket_path
from meshgpu.client.views import AgentView
from meshgpu.errors import AgentUnreachable, MeshgpuError

START_LIMIT_S: Final = 15.0
"""How long an agent may take to answer: on a cold disk its imports alone take seconds."""

STOP_LIMIT_S: Final = 10.0
POLL_S: Final = 0.05
ANSWER_TIMEOUT_S: Final = 2.0
DISCOVER_S: Final = 1.5
"""Two mDNS announcements are a second apart (RFC 6762, section 8.3)."""

REDISCOVER_S: Final = 0.3
"""Enough for an agent that remembers what it has heard."""

NEW_AGENT_S: Final = 5.0
LOG_NAME: Final = "agent.log"
SHOWN_LOG_LINES: Final = 12


def running_agent(home: Path) -> AgentView | None:
    """The agent of `home`, None where none answers."""
    try:
        return AgentClient(home, ANSWER_TIMEOUT_S).agent()
    except AgentUnreachable:
        return None


def listening_s(agent: AgentView) -> float:
    """How long `agent` is to listen for other machines before it says which it knows."""
    return REDISCOVER_S if time.time() - agent["started_at"] > NEW_AGENT_S else DISCOVER_S


def ensure_agent() -> tuple[AgentClient, AgentView]:
    """This machine's agent, started where none answers; raises MeshgpuError `agent-failed` with its last words."""
    home = find_home()
    agent = running_agent(home)
    if agent is None:
        is_service = service.is_installed(home)
        note(f"starting the {'service' if is_service else 'agent'} in {home}")
        agent = start_service(home) if is_service else start_agent(home)
    return AgentClient(home), agent


def start_service(home: Path) -> AgentView:
    """Have systemd start the agent of `home`. Raises MeshgpuError `service-failed` or `agent-failed`."""
    service.systemctl("start", service.UNIT)
    missing = f"the service was started, but no agent answers in {home}"
    return _await_meant(home, lambda _: True, missing, f"journalctl --user -u {service.UNIT}")


def stop_agent(home: Path) -> bool:
    """Stop the agent of `home`; jobs run on. Returns when its process is gone, False where none runs.

    Raises MeshgpuError `agent-stays`.
    """
    agent = running_agent(home)
    if agent is None:
        return False
    process = _pidfd(agent["pid"])
    try:
        with contextlib.suppress(AgentUnreachable):  # it may go before its answer does
            AgentClient(home).down()
        deadline = time.monotonic() + STOP_LIMIT_S
        while not _has_ended(process) or running_agent(home) is not None:
            if time.monotonic() > deadline:
                raise MeshgpuError(
                    "agent-stays",
                    f"the agent in {home} still runs after {STOP_LIMIT_S:.0f} s",
                    f"less {home / LOG_NAME}",
                )
            time.sleep(POLL_S)
    finally:
        if process is not None:
            os.close(process)
    return True


def await_agent(home: Path, node: str) -> AgentView:
    """Wait until the agent of `home` answers as `node`, as it does once it has begun anew. Raises `agent-failed`."""
    missing = f"the agent in {home} does not answer under its new keys"
    return _await_meant(home, lambda agent: agent["node"] == node, missing, f"meshgpu up; less {home / LOG_NAME}")


def _await_meant(home: Path, is_it: Callable[[AgentView], bool], missing: str, hint: str) -> AgentView:
    """Wait for the agent of `home` that is meant. Raises MeshgpuError `agent-failed`."""
    deadline = time.monotonic() + START_LIMIT_S
    while (agent := running_agent(home)) is None or not is_it(agent):
        if time.monotonic() > deadline:
            raise MeshgpuError("agent-failed", f"{missing} after {START_LIMIT_S:.0f} s", hint)
        time.sleep(POLL_S)
    return agent


def start_agent(home: Path) -> AgentView:
    """Start a detached agent; its output goes to agent.log in `home`."""
    socket_path(home)
    log_path = home / LOG_NAME
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        with log_path.open("ab") as log:
            log_path.chmod(0o600)
            begin = log.tell()
            process = subprocess.Popen(
                # -P: a file of the directory the user stands in must not shadow a module of the agent
                [sys.executable, "-P", "-m", "meshgpu", "agent", "--home", str(home)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=home,
                start_new_session=True,
            )
    except OSError as error:
        raise MeshgpuError(
            "agent-failed", f"cannot start the agent in {home}: {error.strerror}", "df -h; id"
        ) from error
    return _await_answer(home, process, begin)


def confirmed(question: str, *, yes: bool) -> bool:
    """Ask [Y/n]; yes without asking where `yes` or where nobody sits at the terminal."""
    if yes or not is_attended():
        return True
    return typer.confirm(question, default=True, err=True)


def is_attended() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty()


def _pidfd(pid: int) -> int | None:
    """A descriptor of the process; None where it is not seen from here, as from a container."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _has_ended(process: int | None) -> bool:
    """Whether the process of a pidfd has ended; one that is not seen counts as ended."""
    if process is None:
        return True
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(0))


def _await_answer(home: Path, process: subprocess.Popen[bytes], begin: int) -> AgentView:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        ended = process.poll()
        if (agent := running_agent(home)) is not None:
            process.returncode = process.returncode or 0  # it outlives us: no warning about a child not waited for
            return agent
        if ended is not None:
            raise _failed(home, begin, f"ended with exit code {ended}")
        time.sleep(POLL_S)
    process.kill()
    process.wait()
    raise _failed(home, begin, f"did not answer within {START_LIMIT_S:.0f} s")


def _failed(home: Path, begin: int, found: str) -> MeshgpuError:
    log_path = home / LOG_NAME
    with log_path.open("rb") as log:
        log.seek(begin)
        lines = log.read().decode(errors="replace").splitlines()[-SHOWN_LOG_LINES:]
    for position, line in reversed([*enumerate(lines)]):
        if line.startswith("error: "):  # the agent's own last word, with its hint
            hint = next((rest[6:] for rest in lines[position:] if rest.startswith("hint: ")), f"less {log_path}")
            return MeshgpuError("agent-failed", f"cannot start the agent in {home}: {line[7:]}", hint)
    told = "".join(f"\n  {line}" for line in lines)
    return MeshgpuError("agent-failed", f"the agent in {home} {found}{told}", f"less {log_path}")
