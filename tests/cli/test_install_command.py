"""The command `install`: what it asks of systemd, what it leaves when undone, and unit files that systemd accepts."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import Result

from meshgpu.cli import launch, service

if TYPE_CHECKING:
    from tests.cli.conftest import StubAgent

Cli = Callable[..., Result]
ROOT = Path(__file__).parents[2]
DEADLINE_S = 20.0

PROGRAM = """#!/bin/sh
echo "$(basename "$0") $*" >> {calls}
case "$(basename "$0") $*" in
    {cases}
    "loginctl show-user"*) cat {lingering} ;;
esac
"""


class Systemd:
    """Programs on PATH that record how they are called; `fail` makes one call go wrong."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.calls_path = directory / "calls"
        self.lingering = directory / "lingering"
        self.lingering.write_text("Linger=no\n")
        self._cases = ""
        self.install("systemctl", "loginctl")

    def install(self, *programs: str) -> None:
        for name in programs:
            path = self.directory / name
            path.write_text(
                PROGRAM.format(calls=self.calls_path, lingering=self.lingering, cases=self._cases or '"") ;;')
            )
            path.chmod(0o755)

    def fail(self, call: str, words: str) -> None:
        self._cases += f'"{call}"*) echo "{words}" >&2; exit 1 ;;\n'
        self.install("systemctl", "loginctl")

    def calls(self) -> list[str]:
        """What changed something, in order."""
        lines = self.calls_path.read_text().splitlines() if self.calls_path.exists() else []
        return [line for line in lines if " show" not in line]


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemd:
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(service, "account", lambda: "ada")
    monkeypatch.setattr(launch, "START_LIMIT_S", 0.2)
    return Systemd(directory)


@pytest.fixture
def agent(stub: "StubAgent", monkeypatch: pytest.MonkeyPatch) -> "StubAgent":
    """An agent that answers whenever it is asked; stopping it is another test's matter."""
    stub.on("GET /v1/agent", {"version": "0.1.0", "mesh": None})
    monkeypatch.setattr("meshgpu.cli.install_command.stop_agent", lambda home: True)
    return stub


def unit() -> Path:
    return service.unit_path()


INSTALLED = [
    "systemctl --user daemon-reload",
    "systemctl --user enable meshgpu.service",
    "systemctl --user start meshgpu.service",
    "loginctl enable-linger ada",
]


def test_install_says_what_it_does_and_why_and_does_it(cli: Cli, systemd: Systemd, agent: "StubAgent") -> None:
    done = cli("install", "--yes")
    assert done.exit_code == 0
    assert systemd.calls() == INSTALLED
    assert str(unit()) in done.stderr
    assert "stop the agent that runs now" in done.stderr
    assert "without it systemd starts the agent only when you log in" in done.stderr
    assert "meshgpu install --undo" in done.stderr
    text = unit().read_text()
    command = shlex.split(next(line for line in text.splitlines() if line.startswith("ExecStart="))[10:])
    assert command == [sys.executable, "-P", "-m", "meshgpu", "agent", "--home", str(agent.home)]


def test_undo_reverses_all_of_it(cli: Cli, systemd: Systemd, agent: "StubAgent") -> None:
    cli("install", "--yes")
    systemd.calls_path.unlink()
    done = cli("install", "--undo", "--yes")
    assert done.exit_code == 0
    assert systemd.calls() == [
        "systemctl --user disable --now meshgpu.service",
        "systemctl --user daemon-reload",
        "loginctl disable-linger ada",
    ]
    assert not unit().exists()
    assert "no service is installed" in cli("install", "--undo", "--yes").stderr


def test_lingering_that_was_on_before_is_left_alone(cli: Cli, systemd: Systemd, agent: "StubAgent") -> None:
    systemd.lingering.write_text("Linger=yes\n")
    cli("install", "--yes")
    cli("install", "--undo", "--yes")
    assert not [call for call in systemd.calls() if call.startswith("loginctl")]


def test_second_install_remembers_who_turned_lingering_on(cli: Cli, systemd: Systemd, agent: "StubAgent") -> None:
    cli("install", "--yes")
    systemd.lingering.write_text("Linger=yes\n")
    cli("install", "--yes")
    cli("install", "--undo", "--yes")
    assert systemd.calls()[-1] == "loginctl disable-linger ada"


def test_without_systemd_nothing_is_touched_and_up_is_named(cli: Cli, systemd: Systemd, agent: "StubAgent") -> None:
    systemd.fail("systemctl --user show", "Failed to connect to bus: No medium found")
    done = cli("install", "--yes")
    assert done.exit_code == 125
    assert "Failed to connect to bus: No medium found" in done.stderr
    assert "hint: meshgpu up" in done.stderr
    assert systemd.calls() == []
    assert not unit().exists()


def test_machine_without_systemctl_says_so(
    cli: Cli, systemd: Systemd, agent: "StubAgent", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(systemd.directory / "nothing"))
    done = cli("install", "--yes")
    assert done.exit_code == 125
    assert "there is no systemctl on this machine" in done.stderr
    assert "hint: meshgpu up" in done.stderr


def test_lingering_that_is_forbidden_is_a_warning_with_its_remedy(
    cli: Cli, systemd: Systemd, agent: "StubAgent"
) -> None:
    systemd.fail("loginctl enable-linger", "Could not enable linger: Access denied")
    done = cli("install", "--yes")
    assert done.exit_code == 0
    assert "Access denied" in done.stderr
    assert "hint: sudo loginctl enable-linger ada" in done.stderr


def test_service_that_does_not_start_is_an_error_with_its_story(cli: Cli, systemd: Systemd, agent: "StubAgent") -> None:
    systemd.fail("systemctl --user start", "Job for meshgpu.service failed")
    done = cli("install", "--yes")
    assert done.exit_code == 125
    assert "systemctl --user start meshgpu.service failed: Job for meshgpu.service failed" in done.stderr
    assert cli("install", "--undo", "--yes").exit_code == 0
    assert not unit().exists()


def test_service_whose_agent_does_not_answer_names_the_journal(cli: Cli, systemd: Systemd, tmp_path: Path) -> None:
    done = cli("install", "--yes")
    assert done.exit_code == 125
    assert "hint: journalctl --user -u meshgpu.service" in done.stderr


def test_up_starts_the_service_where_it_is_installed(cli: Cli, systemd: Systemd, tmp_path: Path) -> None:
    unit().parent.mkdir(parents=True)
    unit().write_text(service.unit_text(tmp_path / "home", turned_lingering_on=False))
    done = cli("up")
    assert systemd.calls() == ["systemctl --user start meshgpu.service"]
    assert "starting the service" in done.stderr


def test_service_of_another_home_is_not_ours(systemd: Systemd, tmp_path: Path) -> None:
    unit().parent.mkdir(parents=True)
    unit().write_text(service.unit_text(tmp_path / "home", turned_lingering_on=False))
    assert service.is_installed(tmp_path / "home")
    assert not service.is_installed(tmp_path / "hom")
    assert not service.is_installed(tmp_path / "home2")


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("plain/path", "plain/path"),
        ("with space", '"with space"'),
        ('q"uote', '"q\\"uote"'),
        ("100%", '"100%%"'),
        ("$HOME", '"$$HOME"'),
        ("back\\slash", '"back\\\\slash"'),
    ],
)
def test_words_reach_the_program_as_they_are(word: str, written: str) -> None:
    assert service.quoted(word) == written


# -- the unit files ----------------------------------------------------------------------------------------------------


def settings(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


UNITS = ["meshgpu-user.service", "meshgpu.service"]


@pytest.mark.parametrize("name", UNITS)
def test_units_let_jobs_live_and_harden_nothing_that_jobs_inherit(name: str) -> None:
    found = settings((ROOT / "packaging/systemd" / name).read_text())
    assert found["KillMode"] == "process"
    assert found["Restart"] == "always"
    assert found["OOMPolicy"] == "continue"
    assert found["RestartPreventExitStatus"] == "0"
    inherited = ("Private", "Protect", "Restrict", "NoNew", "Memory", "SystemCall", "Capability", "ReadOnly", "Limit")
    assert not [key for key in found if key.startswith(inherited)]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze (Debian: systemd)")
@pytest.mark.parametrize("name", [*UNITS, "rendered"])
def test_systemd_accepts_the_unit(name: str, tmp_path: Path) -> None:
    if name == "rendered":
        text = service.unit_text(tmp_path / "with space %", turned_lingering_on=True)
    else:
        text = (ROOT / "packaging/systemd" / name).read_text()
        text = text.replace("%h/.local/bin/meshgpu", sys.executable).replace("/usr/bin/meshgpu", sys.executable)
    path = tmp_path / "meshgpu.service"
    path.write_text(text)
    scope = [] if name == "meshgpu.service" else ["--user"]
    done = subprocess.run(
        ["systemd-analyze", "verify", *scope, str(path)],
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if "meshgpu" in line]
    assert (done.returncode, ours) == (0, []), done.stderr
