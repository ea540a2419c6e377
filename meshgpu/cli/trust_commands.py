"""Commands about who is in the mesh and what they may: revoke, leave, rekey, role, admin, recover."""

import json
import sys
from typing import Annotated, Final, Literal

import typer

from meshgpu.cli.launch import await_agent, is_attended, stop_agent
from meshgpu.cli.render import note, plain, print_table
from meshgpu.cli.watch import Json
from meshgpu.cli.words import EXIT_FAILED_CHECK
from meshgpu.client.agent import AgentClient
from meshgpu.client.home import find_home
from meshgpu.errors import MeshgpuError

WORDS_CHARACTERS: Final = 200
"""More than any recovery key has."""

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Machine = Annotated[str, typer.Argument(metavar="MACHINE", help="Its name, as in `meshgpu machines`.")]
Person = Annotated[str, typer.Argument(metavar="USER[@MACHINE]", help="Whose account, and on which machine.")]

admin = typer.Typer(no_args_is_help=True, help="Show and change who may change the mesh.")


def revoke(
    machine: Machine,
    jobs: Annotated[
        Literal["keep", "stop"], typer.Option("--jobs", help="What becomes of jobs submitted there that run elsewhere.")
    ] = "keep",
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Take a machine out of the mesh, for ever: one that was lost or stolen, or that nobody trusts any more."""
    client = AgentClient.found()
    fate = "go on" if jobs == "keep" else "are stopped"
    if not (yes or as_json):
        note(plain(f"{machine} and every account on it will be out, for ever: to come back it needs new keys."))
        note(f"Jobs submitted there that run elsewhere {fate}. What runs there nobody can reach.")
        _ask(f"Revoke {machine}?")
    view = client.revoke(machine, stops_jobs=jobs == "stop")
    if as_json:
        print(json.dumps(view))
        return
    print(plain(f"{view['name']} is out of the mesh."))
    note("its owner can see that by: meshgpu doctor. If it was an admin's machine, look who came in: meshgpu machines")


def role(
    machine: Machine,
    name: Annotated[Literal["rig", "submitter", "viewer"], typer.Argument(metavar="ROLE", help="What it may do.")],
    as_json: Json = False,
) -> None:
    """Say what a machine may do: rig (lends, holds jobs, submits), submitter (only submits), viewer (only looks on)."""
    view = AgentClient.found().set_role(machine, name)
    if as_json:
        print(json.dumps(view))
        return
    means = {"rig": "it lends and submits", "submitter": "it only submits", "viewer": "it only looks on"}[name]
    print(plain(f"{view['name']} is a {name} now: {means}."))


def leave(
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Although jobs run or are held here, or no admin would be left.")
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Take this machine out of its mesh; its agent stops, and forgets mesh and keys."""
    client = AgentClient.found()
    mesh = (client.agent()["mesh"] or {"name": ""})["name"]
    if not mesh:
        raise MeshgpuError("not-in-mesh", "cannot leave: this machine is in no mesh")
    if not (yes or as_json):
        _ask(f"Take this machine out of {mesh}?")
    view = client.leave(anyway=anyway)
    stop_agent(find_home())
    if as_json:
        print(json.dumps(view))
        return
    print(plain(f"This machine has left {view['mesh']}; its agent is stopped."))
    note("next: meshgpu join, or meshgpu init, under new keys")


def rekey(yes: Yes = False, as_json: Json = False) -> None:
    """Give this machine, and all accounts on it, new keys: somebody may have seen the old ones, which are void then."""
    client = AgentClient.found()
    if not (yes or as_json):
        note("This machine stays what it is: its name, owner, role and users, and who is an admin here.")
        note("It gets a new id. Invites made here end. Jobs that wait for it with secrets cannot run here any more.")
        _ask("Give this machine new keys?")
    view = client.rekey()
    await_agent(find_home(), view["node"])
    if as_json:
        print(json.dumps(view))
        return
    print(plain(f"{view['name']} has new keys; its id is {view['node'][:12]} now. The old ones are void."))
    if view["away"]:
        note(plain(f"told when they answer: {', '.join(view['away'])}. Until then these still trust the old keys."))


@admin.command("ls")
def admin_ls(as_json: Json = False) -> None:
    """Show who may admit, revoke and give roles."""
    view = AgentClient.found().admins()
    if as_json:
        print(json.dumps(view))
        return
    print_table(("USER", "MACHINE", "KEY"), [(row["user"], row["machine"], row["key"][:12]) for row in view["admins"]])
    if len(view["admins"]) == 1:
        note("only one: were it lost, only the recovery key would help. Make a second: meshgpu admin add USER")


def advise_second_admin(client: AgentClient) -> None:
    """One line for an admin who is the only one, where somebody could be another. Says nothing where it cannot ask."""
    try:
        view = client.admins()
    except MeshgpuError:
        return
    if len(view["admins"]) == 1 and view["candidates"]:
        who = view["candidates"][0]
        command = f"meshgpu admin add {who['user']}@{who['machine']}"
        note(plain(f"This mesh has one admin. A second is wise, should this machine be lost: {command}"))


@admin.command("add")
def admin_add(who: Person, as_json: Json = False) -> None:
    """Let an account change who is in the mesh."""
    view = AgentClient.found().add_admin(who)
    print(json.dumps(view) if as_json else plain(f"{view['user']} on {view['machine']} is an admin now."))


@admin.command("remove")
def admin_remove(who: Person, yes: Yes = False, as_json: Json = False) -> None:
    """Take that right from an account, for ever. What it did before stays."""
    client = AgentClient.found()
    if not (yes or as_json):
        _ask(f"Take the right from {who}? That account never gets it back.")
    view = client.remove_admin(who)
    print(json.dumps(view) if as_json else plain(f"{view['user']} on {view['machine']} is no admin any more."))


def recover(as_json: Json = False) -> None:
    """Become an admin by the recovery key that `meshgpu init` printed; it is read from the terminal or from stdin."""
    client = AgentClient.found()
    if is_attended():
        words = str(typer.prompt("Recovery key", hide_input=True, err=True))
    else:
        words = sys.stdin.readline(WORDS_CHARACTERS)
    if not words.strip():
        raise MeshgpuError("bad-request", "cannot recover: no recovery key was given", "meshgpu recover < FILE")
    view = client.recover(words.strip())
    print(json.dumps(view) if as_json else plain(f"{view['user']} on {view['machine']} is an admin now."))


def _ask(question: str) -> None:
    """Go on only if a person says yes: nobody at the terminal is no yes."""
    if not is_attended():
        raise MeshgpuError("bad-request", "cannot ask whether you mean it: no terminal is here", "--yes")
    if not typer.confirm(question, default=False, err=True):
        raise typer.Exit(EXIT_FAILED_CHECK)
