"""Starts the background agent and waits until it answers."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import typer

from meshgpu.cli.render import note
from meshgpu.client.agent import AgentClient
from meshgpu.client.home import find_home, socket_path
from meshgpu.client.views import AgentView
from meshgpu.errors import AgentUnreachable, MeshgpuError

START_LIMIT_S: Final = 15.0
"""How long an agent may take to answer: on a cold disk its imports alone take seconds."""

POLL_S: Final = 0.05
ANSWER_TIMEOUT_S: Final = 2.0
LOG_NAME: Final = "agent.log"
SHOWN_LOG_LINES: Final = 12


def running_agent(home: Path) -> AgentView | None:
    """The agent of `home`, None where none answers."""
    try:
        return AgentClient(home, ANSWER_TIMEOUT_S).agent()
    except AgentUnreachable:
        return None


def ensure_agent() -> tuple[AgentClient, AgentView]:
    """This machine's agent, started where none answers; raises MeshgpuError `agent-failed` with its last words."""
    home = find_home()
    agent = running_agent(home)
    if agent is None:
        note(f"starting the agent in {home}")
        agent = start_agent(home)
    return AgentClient(home), agent


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
        raise MeshgpuError("agent-failed", f"cannot start the agent in {home}: {error}", "df -h; id") from error
    return _await_answer(home, process, begin)


def confirmed(question: str, *, yes: bool) -> bool:
    """Ask [Y/n]; yes without asking where `yes` or where nobody sits at the terminal."""
    if yes or not sys.stdin.isatty():
        return True
    return typer.confirm(question, default=True, err=True)


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
    told = "".join(f"\n  {line}" for line in lines)
    return MeshgpuError("agent-failed", f"the agent in {home} {found}{told}", f"less {log_path}")
