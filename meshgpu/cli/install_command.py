"""The command `install`: makes the agent a user-level systemd service, or undoes that."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from meshgpu.cli import service
from meshgpu.cli.launch import confirmed, running_agent, start_service, stop_agent
from meshgpu.cli.render import note, plain
from meshgpu.cli.words import EXIT_FAILED_CHECK
from meshgpu.client.home import find_home, socket_path
from meshgpu.errors import MeshgpuError


def install(
    undo: Annotated[bool, typer.Option("--undo", help="Remove the service and what came with it.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Start the agent with this machine, as a systemd service of yours (no root needed); jobs live through it all."""
    if undo:
        _undo(yes=yes)
        return
    home = find_home()
    socket_path(home)
    service.check_systemd()
    is_running = running_agent(home) is not None
    is_lingering = service.is_lingering()
    for line in plan(home, is_running=is_running, is_lingering=is_lingering):
        note(plain(line))
    if not confirmed("Install?", yes=yes):
        raise typer.Exit(EXIT_FAILED_CHECK)
    _write(home, turned_lingering_on=service.turned_lingering_on() or not is_lingering)
    service.systemctl("daemon-reload")
    service.systemctl("enable", service.UNIT)
    stop_agent(home)
    agent = start_service(home)
    note(f"the service runs: agent {agent['version']} answers (systemctl --user status {service.UNIT})")
    if not is_lingering:
        _linger()


def plan(home: Path, *, is_running: bool, is_lingering: bool) -> Iterator[str]:
    """What will be done, and why."""
    yield "This will:"
    yield f"- write {service.unit_path()}, which runs {' '.join(service.argv(home))}"
    if is_running:
        yield "- stop the agent that runs now; the service's agent takes its place, and jobs run on"
    yield "- start the service now and with this machine (systemctl --user enable, start)"
    if is_lingering:
        yield f"- leave lingering on for {service.account()}: the service needs it"
    else:
        yield (
            f"- turn on lingering (loginctl enable-linger {service.account()}): without it systemd starts the agent"
            " only when you log in, and ends it and its jobs when you log out"
        )
    yield "To reverse it: meshgpu install --undo"


def _write(home: Path, *, turned_lingering_on: bool) -> None:
    path = service.unit_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(service.unit_text(home, turned_lingering_on=turned_lingering_on))
    except OSError as error:
        raise MeshgpuError("service-failed", f"cannot write {path}: {error.strerror}", "df -h; id") from error


def _linger() -> None:
    """Turn it on; where that is forbidden, the service is still worth having."""
    try:
        service.loginctl("enable-linger", service.account())
    except MeshgpuError as error:
        note(plain(f"lingering stays off: {error.message}"))
        note("the agent and its jobs end when you log out")
        note(f"hint: sudo loginctl enable-linger {service.account()}")


def _undo(*, yes: bool) -> None:
    path = service.unit_path()
    if not path.exists():
        note(f"no service is installed ({path} is not there)")
        return
    service.check_systemd()
    was_turned_on = service.turned_lingering_on()
    note("This will:")
    note(f"- stop the agent and remove {path} (systemctl --user disable --now)")
    if was_turned_on:
        note(plain(f"- turn off lingering for {service.account()}, which meshgpu install turned on"))
        note("Jobs that run go on, but no longer than you stay logged in (meshgpu up brings an agent back).")
    else:
        note("Jobs that run go on (meshgpu up brings an agent back).")
    if not confirmed("Undo?", yes=yes):
        raise typer.Exit(EXIT_FAILED_CHECK)
    service.systemctl("disable", "--now", service.UNIT)
    path.unlink()
    service.systemctl("daemon-reload")
    if was_turned_on:
        service.loginctl("disable-linger", service.account())
    note("the service is removed")
