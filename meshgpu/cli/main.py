"""The command line: finds a command, loads only its module, turns errors into words and exit codes.

Exit codes: the job's own (128+n for signal n); 125 the mesh failed, 124 time limit, 130 Ctrl-C, 2 usage (flags and
names that are wrong in themselves, code `bad-request`), 1 `doctor` found something or the person said no.
"""

import difflib
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

from meshgpu import __version__
from meshgpu.cli.render import ago, note, plain, show_error
from meshgpu.cli.words import EXIT_INTERRUPTED, EXIT_MESH_FAILED, EXIT_USAGE
from meshgpu.client.agent import AgentClient
from meshgpu.errors import MeshgpuError

if TYPE_CHECKING:
    from typer.core import TyperOption

PROGRAM: Final = "meshgpu"
COMPLETION_VARIABLE: Final = "_MESHGPU_COMPLETE"

COMMANDS: Final = {
    "init": "mesh_commands",
    "join": "mesh_commands",
    "discover": "mesh_commands",
    "invite": "mesh_commands",
    "admit": "compare_commands",
    "revoke": "trust_commands",
    "role": "trust_commands",
    "admin": "trust_commands",
    "recover": "trust_commands",
    "leave": "trust_commands",
    "rekey": "trust_commands",
    "up": "machine_commands",
    "down": "machine_commands",
    "pause": "owner_commands",
    "resume": "owner_commands",
    "agent": "agent_command",
    "machines": "machine_commands",
    "run": "run_command",
    "sweep": "sweep_command",
    "ps": "ps_command",
    "logs": "logs_command",
    "stop": "job_commands",
    "kill": "job_commands",
    "info": "job_commands",
    "why": "why_command",
    "wait": "job_commands",
    "ls": "file_commands",
    "cp": "file_commands",
    "burst": "burst_command",
    "cost": "cost_command",
    "audit": "evidence_command",
    "doctor": "doctor_command",
    "install": "install_command",
    "version": "machine_commands",
    "completion": "completion_command",
    "sim": "sim_command",
}
"""{command: module in meshgpu.cli whose function of the same name it is}."""

SETTINGS: Final = {"help_option_names": ["-h", "--help"]}
HIDDEN: Final = frozenset({"sim"})
"""For who works on meshgpu itself: left out of `--help`."""
OPTIONS_END_AT_COMMAND: Final = {"run": {"allow_interspersed_args": False}}
"""What follows the program's name belongs to the program: `run python train.py -g 3` passes -g on."""


class Command(TyperCommand):
    """A command whose flags cost nothing to read."""

    def get_help_option(self, ctx: Any) -> "TyperOption | None":  # Any: typer gives its context class no public name
        """The help option, off by default: where it is None, typer ≥ 0.29 loads pydantic (170 ms) to read it."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False
        return option


class Commands(TyperGroup):
    """All commands, each loaded when it is called for."""

    def get_help_option(self, ctx: Any) -> "TyperOption | None":
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False  # as above
        return option

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - typer's signature
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - typer's signature
        return load(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As typer does, but an unknown command is an error of ours, with the nearest one."""
        if args[0] not in COMMANDS and not ctx.resilient_parsing:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"{PROGRAM} {near[0]}" if near else f"{PROGRAM} --help"
            raise MeshgpuError("bad-request", f"there is no command {args[0]!r}", hint)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; its errors become words on stderr and an exit code."""
        try:
            return super().invoke(ctx)
        except MeshgpuError as error:
            show_error(error)
            raise typer.Exit(EXIT_USAGE if error.code == "bad-request" else EXIT_MESH_FAILED) from error
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None


def load(name: str) -> Any:
    """The command `name` as typer makes it from its function."""
    function = getattr(import_module(f"meshgpu.cli.{COMMANDS[name]}"), name)
    if isinstance(function, typer.Typer):  # a command with commands of its own
        return typer.main.get_command(function)
    app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
    settings = SETTINGS | OPTIONS_END_AT_COMMAND.get(name, {})
    app.command(name, cls=Command, context_settings=settings, hidden=name in HIDDEN)(function)
    return typer.main.get_command(app)


def _show_version(value: bool) -> None:
    if value:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


app = typer.Typer(
    name=PROGRAM,
    cls=Commands,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
    no_args_is_help=True,
)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    """The GPUs of an office as one mesh, without a central server."""
    _ = version


def clock_note() -> Callable[[str, float], None]:
    """Tells people once that clocks differ: nothing fails because of it, but times are shown wrong."""
    told: list[str] = []

    def tell(machine: str, ahead_s: float) -> None:
        if not told:
            told.append(machine)
            side = "behind" if ahead_s > 0 else "ahead of"
            note(
                f"note: the clock of this machine is {ago(abs(ahead_s))} {side} that of {plain(machine)}"
                " (timedatectl set-ntp true)"
            )

    return tell


def main() -> None:
    """Run the command line of this process and leave it."""
    try:
        _run()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _run() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal may not know every character
    AgentClient.on_clock = clock_note()
    if COMPLETION_VARIABLE in os.environ:
        typer.completion.get_completion_inspect_parameters()  # makes the shells known, which add_completion would do
    app(prog_name=PROGRAM)
