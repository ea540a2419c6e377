"""Commands that make, enlarge and look for a mesh: init, join, invite, discover."""

import json
import os
import pwd
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Annotated, Final

import typer

from meshgpu.cli.compare_commands import checked_role, compare, open_meshes, open_window
from meshgpu.cli.launch import confirmed, ensure_agent, is_attended, listening_s
from meshgpu.cli.render import ago, note, plain, print_table
from meshgpu.cli.spans import parse_span
from meshgpu.cli.trust_commands import advise_second_admin
from meshgpu.cli.watch import Json
from meshgpu.cli.words import EXIT_FAILED_CHECK
from meshgpu.client.agent import AgentClient
from meshgpu.client.views import AgentView, JoinedView, SightingView
from meshgpu.core.trust.joining import check_grant, read_invite
from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.ids import as_name, is_name

DEFAULT_MESH: Final = "lab"
INVITE_CHARACTERS: Final = 4096
"""More than any invite has."""

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
MachineName = Annotated[
    str | None, typer.Option("--name", metavar="MACHINE", help="This machine's name (its host name).")
]

FIRST: Final = {
    "polite": "You come first: when another program uses a GPU, the job on it leaves within 30 s.",
    "shared": "Jobs run beside your own programs (policy = shared in config.toml).",
    "dedicated": "Jobs come first here (policy = dedicated in config.toml).",
}
"""Who comes first on the GPUs, by the owner's policy."""


def init(
    mesh: Annotated[str, typer.Option("--mesh", metavar="NAME", help="The mesh's name.")] = DEFAULT_MESH,
    name: MachineName = None,
    user: Annotated[str | None, typer.Option("--user", metavar="NAME", help="Your name (your account's).")] = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Start a mesh with this machine as its first."""
    machine = checked_name(host_name() if name is None else name, "--name")
    person = checked_name(account_name() if user is None else user, "--user")
    mesh = checked_name(mesh, "--mesh")
    client, _ = ensure_agent()
    if not confirmed(f"Start the mesh {mesh} with this machine as {machine} and you as {person}?", yes=yes or as_json):
        raise typer.Exit(EXIT_FAILED_CHECK)
    founded = client.init(mesh, machine, person)
    if as_json:
        print(json.dumps(founded))
        return
    print(f"{founded['name']} is the first machine of {founded['mesh']}; you are {founded['user']}.")
    print(f"Recovery key, shown once, to keep away from this machine: {founded['recovery_key']}")
    note("next: meshgpu admit (and on each other machine: meshgpu join), meshgpu machines")


def join(
    invite: Annotated[
        str | None,
        typer.Argument(
            metavar="[STRING]",
            help="What `meshgpu invite` printed, or - to read it from stdin; without it, compare digits.",
        ),
    ] = None,
    name: MachineName = None,
    seed: Annotated[
        list[str] | None,
        typer.Option("--seed", metavar="HOST[:PORT]", help="Where a member answers, if it is not found by itself."),
    ] = None,
    mesh: Annotated[
        str | None, typer.Option("--mesh", metavar="NAME", help="Which mesh, where several take in machines.")
    ] = None,
    as_user: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Your name, without an invite (your account's).")
    ] = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Make this machine a member of a mesh and lend it; without STRING, an admin there runs `meshgpu admit`."""
    machine = checked_name(host_name() if name is None else name, "--name")
    if invite is None and not as_json and is_attended():
        person = checked_name(account_name() if as_user is None else as_user, "--as")
        _join_by_digits(machine, person, seed or [], mesh, yes=yes)
        return
    if as_user is not None:
        raise MeshgpuError(
            "bad-request", "cannot choose a user's name: the invite says it", "meshgpu invite --user NAME"
        )
    if invite in (None, "-"):
        is_asked_for = invite == "-"
        invite = asked_invite()
        if not (invite.strip() or is_asked_for):
            raise _nobody_can_compare()
    if mesh is not None:
        raise MeshgpuError("bad-request", "cannot choose a mesh: the invite says it", "meshgpu join --mesh NAME")
    check_invite(invite)
    if not (yes or as_json or is_attended()):
        raise MeshgpuError("bad-request", "cannot ask whether to lend this machine: no terminal is here", "--yes")
    client, agent = ensure_agent()
    for line in consent(machine, agent):
        note(line)
    if not confirmed("Join?", yes=yes or as_json):
        raise typer.Exit(EXIT_FAILED_CHECK)
    joined = client.join(invite.strip(), machine, seed or [])
    if as_json:
        print(json.dumps(joined))
        return
    for line in welcome(joined):
        print(plain(line))


def _nobody_can_compare() -> MeshgpuError:
    """Why `join` does nothing where it got no string and no person sits at a terminal."""
    found = ""
    with suppress(MeshgpuError):  # what is around helps, and is not what was asked for
        client = AgentClient.found()
        meshes = open_meshes(client.discover(listening_s(client.agent())))
        found = f"; these take in machines now: {', '.join(meshes)}" if meshes else ""
    return MeshgpuError(
        "bad-request",
        f"cannot join: no invite came, and no person sits at a terminal to compare digits{found}",
        "meshgpu join < FILE, which `meshgpu invite --out FILE` wrote; or meshgpu join --mesh NAME at a terminal",
    )


def _join_by_digits(machine: str, person: str, seeds: list[str], mesh: str | None, *, yes: bool) -> None:
    if seeds and mesh is not None:
        raise MeshgpuError("bad-request", "cannot look for a mesh and at --seed: one says where to ask", "--seed alone")
    client, agent = ensure_agent()
    if agent["mesh"] is not None:
        raise MeshgpuError(
            "already-in-mesh", f"cannot join: this machine is in the mesh {agent['mesh']['name']}", "meshgpu machines"
        )
    for line in consent(machine, agent):
        note(line)
    if not confirmed("Join?", yes=yes):
        raise typer.Exit(EXIT_FAILED_CHECK)
    node = None if seeds else open_window(client, listening_s(agent), mesh)
    for line in welcome(compare(client, node, seeds, machine, person)):
        print(plain(line))


def invite(
    user: Annotated[
        str | None, typer.Option("--user", metavar="NAME", help="Whom the new machines belong to (you).")
    ] = None,
    uses: Annotated[int, typer.Option("--uses", metavar="N", help="How many machines may join: 1 to 100.")] = 1,
    life: Annotated[str, typer.Option("--for", metavar="TIME", help="For how long: 1m to 7d.")] = "10m",
    role: Annotated[str, typer.Option("--role", metavar="ROLE", help="rig, submitter or viewer.")] = "rig",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the string there, for your account alone.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print a string with which a machine may join; it is a secret."""
    person = None if user is None else checked_name(user, "--user")
    life_s = parse_span(life, "meshgpu invite --for 8h")
    check_grant(checked_role(role), uses, life_s)
    client = AgentClient.found()
    if out is None:
        view = client.invite(person, role, uses, life_s)
    else:
        with new_secret_file(out) as file:
            view = client.invite(person, role, uses, life_s)
            file.write(f"{view['invite']}\n")
    if as_json:
        print(json.dumps(view if out is None else view | {"invite": None}))
        return
    machines = "one machine" if view["uses"] == 1 else f"{view['uses']} machines"
    rights = "" if view["role"] == "rig" else f" as {view['role']}"
    good = f"Good for {machines} of {view['user']}{rights}, for {ago(view['expires_at'] - time.time())}"
    if out is None:
        note(plain(f"{good}. On that machine: meshgpu join …"))
        print(view["invite"])
    else:
        note(plain(f"{good}, while this agent runs. It is in {out}: a secret."))
        note("On those machines: meshgpu join < FILE, or put it in /etc/meshgpu/join before the agent starts")
    advise_second_admin(client)


@contextmanager
def new_secret_file(path: Path) -> Iterator[IO[str]]:
    """A file that was not there, for this account alone; gone again where the block fails.

    Raises MeshgpuError `bad-request`.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        found = "it is there already" if isinstance(error, FileExistsError) else error.strerror
        raise MeshgpuError(
            "bad-request", f"cannot write the invite to {path}: {found}", "meshgpu invite --out ANOTHER-FILE"
        ) from error
    try:
        with os.fdopen(descriptor, "w") as file:
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def discover(as_json: Json = False) -> None:
    """Show the machines that announce themselves on this network."""
    client = AgentClient.found()
    machines = client.discover(listening_s(client.agent()))
    if as_json:
        print(json.dumps({"machines": machines}))
    elif machines:
        print_table(("MESH", "MACHINE", "GPUS", "ADDRESS", "STATE"), [_sighting_row(machine) for machine in machines])
    else:
        note("no machine announces itself on this network")


def asked_invite() -> str:
    """A line of stdin: what stands among the arguments every account of this computer can read."""
    return sys.stdin.readline(INVITE_CHARACTERS)


def host_name() -> str:
    """The short host name as a machine's name."""
    return as_name(socket.gethostname().split(".")[0], "machine")


def account_name() -> str:
    """The OS account's name as a user's name."""
    try:
        return as_name(pwd.getpwuid(os.getuid()).pw_name, "user")
    except KeyError:  # a container may run under a number that no account has
        return "user"


def checked_name(text: str, flag: str) -> str:
    if not is_name(text):
        raise MeshgpuError(
            "bad-request",
            f"cannot use {text!r} as a name: expected 1 to 40 of a-z, 0-9 and inner hyphens",
            f"{flag} {as_name(text, 'lab')}",
        )
    return text


def check_invite(text: str) -> None:
    """Raise MeshgpuError `bad-request` for what cannot be an invite's string."""
    try:
        read_invite(text)
    except TrustError as error:
        raise MeshgpuError("bad-request", error.message, error.hint) from error


def consent(machine: str, agent: AgentView) -> list[str]:
    """What joining means: what is lent, to whom, how jobs are shut in, how to stop."""
    what = ", ".join(agent["gpus"]) or "its processors (no GPU was found)"
    if agent["fence"]:
        fence = f"Jobs of others are shut in by {agent['fence']}: they see the system read-only and their own files."
        whom = "every user of the mesh"
    else:
        fence = "Nothing here can shut in jobs of others (meshgpu doctor says what would)."
        whom = "its owner only, for that reason"
    return [
        plain(f"{machine} will lend: {what}"),
        f"To: {whom}",
        plain(fence),
        FIRST[agent["lending"]],
        "To take it back: meshgpu pause [2h]. To stop lending: meshgpu down (jobs that run go on)",
    ]


def welcome(joined: JoinedView) -> list[str]:
    """What a machine became by joining, and what to type next."""
    lent = ", ".join(joined["gpus"]) or "no GPU"
    fenced = f"fence: {joined['fence']}" if joined["fence"] else "for its owner's jobs only: no fence works here"
    means = {
        "submitter": ("It submits jobs and lends nothing.", ", meshgpu run -- python train.py"),
        "viewer": ("It looks on: it lends nothing and submits nothing.", ""),
    }
    does, more = means.get(joined["role"], (f"It lends {lent} ({fenced}).", ", meshgpu run -- python train.py"))
    return [
        f"{joined['name']} is in {joined['mesh']}, let in by {joined['inviter']}; you are {joined['user']}.",
        does,
        f"next: meshgpu machines{more}",
    ]


def _sighting_row(machine: SightingView) -> tuple[str, ...]:
    if machine["self"]:
        state = "this machine"
    elif machine["ours"]:
        state = "member"
    elif not machine["mesh_tag"]:
        state = "in no mesh"
    else:
        state = "takes in machines now" if machine["pairing"] else "another mesh"
    mesh = machine["mesh_name"] or machine["mesh_tag"] or "-"
    name = machine["name"] or machine["node"][:8]
    return mesh, name, machine["gpus"] or "-", ", ".join(machine["addresses"][:1]) or "-", state
