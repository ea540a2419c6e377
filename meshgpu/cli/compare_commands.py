"""Joining by comparing six digits: the command admit, and what `join` does without an invite."""

import time
from collections.abc import Iterator
from typing import Annotated, Final

import typer

from meshgpu.cli.launch import is_attended
from meshgpu.cli.render import note, plain
from meshgpu.cli.trust_commands import advise_second_admin
from meshgpu.cli.words import EXIT_FAILED_CHECK
from meshgpu.client.agent import AgentClient
from meshgpu.client.views import AdmitEvent, DigitsEvent, JoinedView, SightingView
from meshgpu.core.trust.joining import GIVEN_ROLES
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import is_name
from meshgpu.model.trust import Role

WAIT_S: Final = 600.0
"""How long `join` waits for a window: as long as one stays open."""


def admit(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Let in only the machine of this name.")] = None,
    user: Annotated[
        str | None, typer.Option("--user", metavar="NAME", help="Whom it belongs to (whom it names itself).")
    ] = None,
    role: Annotated[str, typer.Option("--role", metavar="ROLE", help="rig, submitter or viewer.")] = "rig",
) -> None:
    """Let in one machine on which somebody runs `meshgpu join`, after you compared six digits."""
    for text, flag in ((name, "NAME"), (user, "--user")):
        if text is not None and not is_name(text):
            raise MeshgpuError(
                "bad-request", f"cannot use {text!r} as {flag}: expected 1 to 40 of a-z, 0-9 and hyphens"
            )
    checked_role(role)
    if not is_attended():
        raise MeshgpuError("bad-request", "cannot compare digits: no person sits at a terminal here", "meshgpu invite")
    client = AgentClient.found()
    _follow_window(client, client.admit(name, user, role), name)


def checked_role(text: str) -> Role:
    """A role that newcomers may get. Raises MeshgpuError `bad-request`."""
    if text not in GIVEN_ROLES:
        raise MeshgpuError("bad-request", f"there is no role {text!r}: expected {', '.join(GIVEN_ROLES)}")
    return Role(text)


def _follow_window(client: AgentClient, events: Iterator[AdmitEvent], wanted: str | None) -> None:
    is_open = False
    for event in events:
        if not is_open:
            is_open = True
            note(
                f"Waiting for {wanted or 'a machine'}, for ten minutes at most. There: meshgpu join   (Ctrl-C ends it)"
            )
        if event["type"] == "digits":
            note(plain(f"{event['other']} wants to join as a {event['role']} of {event['user']}."))
            _answer(client, event)
        elif event["type"] == "failed":
            note(plain(f"Not admitted: {event['why']}. Waiting for another try."))
        elif event["type"] == "admitted":
            print(plain(f"{event['name']} is a member now: a {event['role']} of {event['user']}."))
            advise_second_admin(client)


def _answer(client: AgentClient, event: DigitsEvent) -> bool:
    """Ask whether the other screen shows the same, and tell the agent; what is over by then is only said."""
    print(f"\n    Both screens must show   {event['digits']}\n")
    try:
        same = input("    Same there? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        same = False
    try:
        client.press(event["digits"], same=same)
    except MeshgpuError as error:
        note(plain(error.message))
    return same


def open_window(client: AgentClient, listening_s: float, mesh: str | None) -> str:
    """The node id of a machine that takes in others now; waits for one, and asks where there are several.

    mesh: the name or the tag of the only mesh that is meant, None for any. Raises MeshgpuError `no-answer` after ten
    minutes, `ambiguous` where there are several and nobody says which.
    """
    deadline, told = time.monotonic() + WAIT_S, False
    while True:
        others = [machine for machine in client.discover(listening_s) if machine["mesh_tag"] and not machine["self"]]
        doors = [machine for machine in others if machine["pairing"] and mesh in (None, *mesh_names(machine))]
        if doors:
            return _chosen(doors)["node"]
        if time.monotonic() > deadline:
            break
        if not told:
            told = True
            meshes = sorted({_mesh_of(machine) for machine in others})
            into = f"No machine takes in others{'' if mesh is None else f' into {mesh}'} now."
            note(plain(f"Meshes seen here: {', '.join(meshes) or 'none yet'}. {into}"))
            note("Waiting for ten minutes at most. On an admin's machine: meshgpu admit")
    raise MeshgpuError(
        "no-answer",
        f"cannot join{'' if mesh is None else f' {mesh}'}: no machine took in others for ten minutes",
        "meshgpu join --seed HOST, or meshgpu invite",
    )


def open_meshes(machines: list[SightingView]) -> list[str]:
    """The names of the meshes that take in machines now; of two that are named alike, with their tags."""
    names = {machine["mesh_tag"]: machine["mesh_name"] for machine in machines if machine["pairing"]}
    alike = [name for name in names.values() if [*names.values()].count(name) > 1]
    return sorted(f"{name} ({tag})" if name in alike else name or tag or "" for tag, name in names.items())


def mesh_names(machine: SightingView) -> tuple[str | None, str | None]:
    """What people may call the mesh of a machine: its name, its tag."""
    return machine["mesh_name"], machine["mesh_tag"]


def _mesh_of(machine: SightingView) -> str:
    return machine["mesh_name"] or machine["mesh_tag"] or ""


def _chosen(doors: list[SightingView]) -> SightingView:
    if len(doors) == 1:
        return doors[0]
    for number, door in enumerate(doors, 1):
        shown = f"{_mesh_of(door)} ({door['mesh_tag']}), at {', '.join(door['addresses'][:1])}"
        note(plain(f"  {number}  {shown}"))
    try:
        answer = input("Which? ").strip()
    except EOFError:
        meshes = open_meshes(doors)
        which = f"into {', '.join(meshes)}" if len(meshes) > 1 else f"of {meshes[0]}"
        raise MeshgpuError(
            "ambiguous",
            f"cannot join: several machines take in others now, {which}, and nobody said which",
            f"meshgpu join --mesh {doors[0]['mesh_tag']}" if len(meshes) > 1 else "meshgpu join --seed HOST",
        ) from None
    if not answer.isdigit() or not 1 <= int(answer) <= len(doors):
        raise typer.Exit(EXIT_FAILED_CHECK)
    return doors[int(answer) - 1]


def compare(client: AgentClient, node: str | None, seeds: list[str], machine: str, person: str) -> JoinedView:
    """Join by comparing digits, once: another try is another guess for who stands in between, and a person's choice."""
    for event in client.compare(node, seeds, machine, person):
        if event["type"] == "digits":
            note(plain(f"{machine} is to join {event['other']} as a {event['role']} of {event['user']}."))
            if _answer(client, event):
                note("Waiting for the admin's answer.")
        elif event["type"] == "joined":
            return event
    raise MeshgpuError("no-answer", "cannot join: the agent broke off", "meshgpu join")
