"""How `doctor` shows what was found: the worst last, its remedy whole, and an exit code that says whether it is bad."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from typer.testing import Result

from meshgpu.cli import doctor_command
from meshgpu.client.views import CheckView

if TYPE_CHECKING:
    from tests.cli.conftest import StubAgent

Cli = Callable[..., Result]


def check(name: str, state: str, found: str, hint: str | None = None) -> CheckView:
    ok = {"ok": True, "fail": False}.get(state)
    return {"name": name, "state": state, "ok": ok, "found": found, "hint": hint}


BAD = check("link port", "fail", "bob knocked and got no answer", "sudo ufw allow 7443/tcp")
DOUBTFUL = check("clock", "warn", "40 s behind", "sudo timedatectl set-ntp true")
GOOD = check("fence", "ok", "bubblewrap")
AWAY = check("gpus", "skipped", "no NVIDIA driver found")


def test_worst_comes_last_with_its_remedy_and_a_verdict(cli: Cli, stub: "StubAgent") -> None:
    stub.on("GET /v1/doctor", {"checks": [BAD, DOUBTFUL, AWAY, GOOD]})
    result = cli("doctor")
    assert (result.exit_code, result.stderr) == (1, "")
    assert result.stdout.splitlines() == [
        "ok   fence      bubblewrap",
        "-    gpus       no NVIDIA driver found",
        "?    clock      40 s behind",
        "                fix: sudo timedatectl set-ntp true",
        "BAD  link port  bob knocked and got no answer",
        "                fix: sudo ufw allow 7443/tcp",
        "",
        "1 thing is wrong, 1 worth a look",
    ]


@pytest.mark.parametrize(
    ("checks", "code", "verdict"),
    [
        ([GOOD, AWAY], 0, "all is well"),
        ([GOOD, DOUBTFUL], 0, "1 worth a look"),
        ([BAD, {**BAD, "name": "x"}], 1, "2 things are wrong"),
    ],
)
def test_only_what_is_wrong_makes_it_fail(
    cli: Cli, stub: "StubAgent", checks: list[CheckView], code: int, verdict: str
) -> None:
    stub.on("GET /v1/doctor", {"checks": checks})
    result = cli("doctor")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (code, verdict)
    assert cli("doctor", "--json").exit_code == code


def test_json_is_what_the_agent_said(cli: Cli, stub: "StubAgent") -> None:
    stub.on("GET /v1/doctor", {"checks": [BAD, GOOD]})
    assert json.loads(cli("doctor", "--json").stdout)["checks"] == [BAD, GOOD]


def test_what_was_not_tried_for_one_reason_is_one_line(cli: Cli, stub: "StubAgent") -> None:
    alike = [check(name, "skipped", "that needs the agent") for name in ("mesh", "links")]
    stub.on("GET /v1/doctor", {"checks": [*alike, AWAY]})
    assert cli("doctor").stdout.splitlines()[:2] == [
        "-    more  mesh, links: that needs the agent",
        "-    gpus  no NVIDIA driver found",
    ]


def test_what_was_found_is_broken_at_the_width_and_a_remedy_never() -> None:
    long = check("links", "warn", "word " * 30, "command " * 30)
    lines = list(doctor_command._report([long], 60))
    assert all(len(line) <= 60 for line in lines if "command" not in line)
    assert [line for line in lines if "command" in line] == ["            fix: " + "command " * 30]
    assert lines[1].startswith("            word")


def test_names_of_others_do_not_drive_the_terminal(cli: Cli, stub: "StubAgent") -> None:
    stub.on("GET /v1/doctor", {"checks": [check("links", "ok", "\x1b[31mred")]})
    assert "\x1b" not in cli("doctor").stdout


def test_without_an_agent_the_rest_is_looked_at(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    class Room:
        @staticmethod
        def examine_alone(home: object, found: str, hint: str | None) -> list[CheckView]:
            return [check("agent", "fail", found, hint), GOOD]

    monkeypatch.setattr(doctor_command, "import_module", lambda name: {"meshgpu.agent.doctor": Room}[name])
    result = cli("doctor")
    assert result.exit_code == 1
    assert "no agent answers" in result.stdout
    assert "fix: meshgpu up" in result.stdout
    assert "ok   fence" in result.stdout


def test_rules_for_a_firewall_are_a_table_and_lines_to_type(cli: Cli) -> None:
    result = cli("doctor", "--for-firewall")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["PORT", "PROTOCOL", "DIRECTION", "OTHER", "END", "WHAT", "FOR"]
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["7443", "tcp"],
        ["7444", "tcp"],
        ["5353", "udp"],
        ["443", "tcp"],
    ]
    at = lines.index("# ufw")
    assert lines[at + 1 : at + 4] == [
        "sudo ufw allow 7443/tcp",
        "sudo ufw allow 7444/tcp",
        "sudo ufw allow 5353/udp",
    ]
    assert lines[lines.index("# firewalld") + 1] == "sudo firewall-cmd --permanent --add-port=7443/tcp"


def test_rules_for_a_firewall_name_the_port_that_the_agent_has(cli: Cli, stub: "StubAgent") -> None:
    stub.on("GET /v1/agent", {"link_port": 40001})
    view = json.loads(cli("doctor", "--for-firewall", "--json").stdout)
    assert view["rules"][0]["port"] == 40001
    assert "sudo ufw allow 40001/tcp" in view["ufw"]
