"""The command `doctor`: what is well, what is worth a look, and last what is wrong, each with a command to mend it."""

import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from importlib import import_module
from shutil import get_terminal_size
from typing import Annotated, Final

import typer

from meshgpu.cli.launch import running_agent
from meshgpu.cli.render import BOLD, RED, colour, count, is_terminal, plain, print_table
from meshgpu.cli.watch import Json
from meshgpu.cli.words import EXIT_FAILED_CHECK
from meshgpu.client.agent import AgentClient
from meshgpu.client.home import find_home
from meshgpu.client.views import CheckView, FirewallView
from meshgpu.errors import AgentUnreachable

MARKS: Final = {"ok": "ok", "skipped": "-", "warn": "?", "fail": "BAD"}
"""By state, in the order in which findings are shown: the last one read is the worst."""

MARK_WIDTH: Final = 5
REMEDY: Final = "fix: "
LEAST_TEXT: Final = 30
"""Columns for what was found, however narrow the terminal."""

ROOM: Final = "meshgpu.agent.doctor"
"""Loaded only where no agent answers, or for the ports that config.toml asks for."""


def doctor(
    as_json: Json = False,
    for_firewall: Annotated[
        bool, typer.Option("--for-firewall", help="Only print what a firewall has to let through, for who keeps it.")
    ] = False,
) -> None:
    """Check what meshgpu needs, on this machine and with the help of others; exit code 1 where something is wrong."""
    if for_firewall:
        _print_firewall(as_json=as_json)
        return
    checks = _checks()
    if as_json:
        print(json.dumps({"checks": checks}))
    else:
        width = max(get_terminal_size().columns, 40) if is_terminal(sys.stdout) else 0
        print("\n".join(_report(checks, width)), flush=True)
    if any(check["state"] == "fail" for check in checks):
        raise typer.Exit(EXIT_FAILED_CHECK)


def _checks() -> list[CheckView]:
    """By the agent; without one, what can be said all the same."""
    try:
        return AgentClient.found().doctor()["checks"]
    except AgentUnreachable as error:
        alone: list[CheckView] = import_module(ROOM).examine_alone(find_home(), error.message, error.hint)
        return alone


def _report(checks: Sequence[CheckView], width: int) -> Iterator[str]:
    """Lines, the worst last, and a verdict. width: of the terminal; 0 breaks no line. Remedies are never broken."""
    order = list(MARKS)
    shown = sorted(_gathered(checks), key=lambda check: order.index(check["state"]))
    name_width = max(len(check["name"]) for check in shown)
    indent = MARK_WIDTH + name_width + 2
    for check in shown:
        found = plain(check["found"])
        lines = textwrap.wrap(found, max(width - indent, LEAST_TEXT)) if width else [found]
        mark = f"{MARKS[check['state']]:{MARK_WIDTH}}"
        code = {"fail": RED, "warn": BOLD}.get(check["state"])
        mark = colour(mark, code, sys.stdout) if code else mark
        yield f"{mark}{check['name']:{name_width}}  {lines[0] if lines else ''}".rstrip()
        yield from (f"{'':{indent}}{line}" for line in lines[1:])
        if check["hint"]:
            yield f"{'':{indent}}{REMEDY}{plain(check['hint'])}"
    yield ""
    yield _verdict(checks)


def _gathered(checks: Sequence[CheckView]) -> Iterator[CheckView]:
    """The same, with those that were not tried for one and the same reason in one line."""
    skipped = [check for check in checks if check["state"] == "skipped"]
    for check in checks:
        alike = [other["name"] for other in skipped if other["found"] == check["found"]] if check in skipped else []
        if len(alike) < 2:
            yield check
        elif check["name"] == alike[0]:
            yield {**check, "name": "more", "found": f"{', '.join(alike)}: {check['found']}"}


def _verdict(checks: Sequence[CheckView]) -> str:
    wrong = sum(1 for check in checks if check["state"] == "fail")
    doubtful = sum(1 for check in checks if check["state"] == "warn")
    parts = [f"{count(wrong, 'thing is', 'things are')} wrong"] if wrong else []
    parts += [f"{doubtful} worth a look"] if doubtful else []
    return ", ".join(parts) or "all is well"


# -- firewall --------------------------------------------------------------------------------------------------------


def _print_firewall(*, as_json: bool) -> None:
    room = import_module(ROOM)
    home = find_home()
    link_port, pairing_port = room.ports_of(home)
    agent = running_agent(home)
    link_port = agent["link_port"] if agent else link_port
    view: FirewallView = room.firewall_document(link_port, pairing_port)
    if as_json:
        print(json.dumps(view))
        return
    rows = [
        (str(rule["port"]), rule["protocol"], _DIRECTIONS[rule["direction"]], rule["peer"], rule["purpose"])
        for rule in view["rules"]
    ]
    print_table(("PORT", "PROTOCOL", "DIRECTION", "OTHER END", "WHAT FOR"), rows, frozenset({"PORT"}))
    for name in ("ufw", "firewalld"):
        lines = view["ufw"] if name == "ufw" else view["firewalld"]
        print("\n".join(["", f"# {name}", *lines]))


_DIRECTIONS: Final = {"both": "in and out", "out": "out"}
