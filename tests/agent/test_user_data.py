"""The script of an instance's first boot, run for real with every program that touches the machine replaced."""

import json
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509

from meshgpu.agent.user_data import LIMIT_BYTES, make_user_data, read_boot
from meshgpu.errors import MeshgpuError
from meshgpu.model.cloud import LaunchId
from meshgpu.model.enrolment import BootTerms, InstanceTerms
from meshgpu.model.ids import MeshId
from meshgpu.wire.certificates import launch_of_bootstrap

LAUNCH = LaunchId("l" * 26)
NOW_S = 1_800_000_000.0
TERMS = BootTerms(MeshId("ab" * 32), LAUNCH, b"k" * 32, 443, InstanceTerms(NOW_S + 3600.5, 600.0, 900.0))
WALL = "iptables -I OUTPUT -d 169.254.169.254 -m owner ! --uid-owner 0 -j REJECT"
INSTALL = 'echo installing >> "$CALLS"; printf \'#!/bin/sh\\n\' > "$BIN/meshgpu"; chmod +x "$BIN/meshgpu"'


class Machine:
    """A place where the script runs: its calls in order, and the files that it wrote."""

    def __init__(self, directory: Path) -> None:
        self.bin, self.calls_file = directory / "bin", directory / "calls"
        self.units, self.state = directory / "units", directory / "state"
        for place in (self.bin, self.units, self.state):
            place.mkdir(parents=True)
        self.calls_file.touch()
        for name in ("shutdown", "systemctl", "iptables"):
            self.fake(name)

    def fake(self, name: str, code: int = 0) -> None:
        program = self.bin / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> "$CALLS"\nexit {code}\n')
        program.chmod(0o755)

    def boot(self, install: str = INSTALL, terms: BootTerms = TERMS) -> int:
        data, self.bootstrap = make_user_data(terms, install, NOW_S)
        script = data.decode().replace("/etc/systemd/system", str(self.units))
        script = script.replace("/var/lib/meshgpu", str(self.state / "meshgpu"))
        environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "BIN": str(self.bin),
            "HOME": str(self.state),
        }
        done = subprocess.run(["bash"], input=script, env=environment, text=True, capture_output=True, timeout=20)
        self.errors = done.stderr
        return done.returncode

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()

    @property
    def directory(self) -> Path:
        return self.state / "meshgpu" / "boot"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


SWITCHES = ["shutdown -P +61", "systemctl daemon-reload", "systemctl enable --now meshgpu-lease.timer"]
AGENT = ["systemctl daemon-reload", "systemctl enable --now meshgpu.service"]


def test_switches_come_first_and_the_agent_last(machine: Machine) -> None:
    assert machine.boot() == 0, machine.errors
    assert machine.calls == [*SWITCHES, WALL, "installing", *AGENT]
    unit = (machine.units / "meshgpu.service").read_text()
    assert f"ExecStart={machine.bin}/meshgpu agent --cloud {machine.directory}\n" in unit
    assert "Restart=always" in unit
    assert "KillMode=process" in unit


def test_what_the_agent_reads_is_what_was_meant_and_secret(machine: Machine) -> None:
    machine.boot()
    boot = read_boot(machine.directory)
    assert boot.terms == TERMS
    assert launch_of_bootstrap(boot.parsed) == LAUNCH
    assert boot.parsed == x509.load_der_x509_certificate(machine.bootstrap)
    assert boot.expires_wall_s == NOW_S + 900
    assert stat.S_IMODE(machine.directory.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in machine.directory.iterdir()] == [0o600] * 3


def test_key_that_others_can_read_is_refused(machine: Machine) -> None:
    machine.boot()
    (machine.directory / "key.pem").chmod(0o640)
    with pytest.raises(MeshgpuError, match="0640, expected 0600"):
        read_boot(machine.directory)


@pytest.mark.parametrize(
    "install",
    [
        "exit 3",
        "if then (",
        f"false; {INSTALL}",
        f"no-such-program-here; {INSTALL}",
        f'echo "$UNSET"; {INSTALL}',
        f"false | true; {INSTALL}",
        "true",
    ],
)
def test_failed_install_powers_off_below_the_switches(machine: Machine, install: str) -> None:
    """The last one installs nothing at all."""
    assert machine.boot(install) != 0
    assert machine.calls == [*SWITCHES, WALL, "shutdown -P now"]


def test_switches_work_whatever_else_is_broken(machine: Machine) -> None:
    machine.fake("systemctl", 1)
    shutil.rmtree(machine.units)
    assert machine.boot("false") != 0
    assert machine.calls == [*SWITCHES, WALL, "shutdown -P now"]


def test_agent_that_does_not_start_powers_off(machine: Machine) -> None:
    (machine.bin / "systemctl").write_text('#!/bin/sh\necho "systemctl $*" >> "$CALLS"\n[ "$3" != meshgpu.service ]\n')
    assert machine.boot() != 0
    assert machine.calls == [*SWITCHES, WALL, "installing", *AGENT, "shutdown -P now"]


def test_timer_fires_at_the_moment_of_the_lease_and_after_a_reboot(machine: Machine) -> None:
    machine.boot()
    timer = (machine.units / "meshgpu-lease.timer").read_text()
    moment = datetime.fromtimestamp(NOW_S + 3601, UTC)
    assert f"OnCalendar={moment:%Y-%m-%d %H:%M:%S} UTC\n" in timer
    assert "Persistent=true\n" in timer
    assert "WantedBy=timers.target\n" in timer
    assert "ExecStart=/usr/sbin/poweroff\n" in (machine.units / "meshgpu-lease.service").read_text()
    if shutil.which("systemd-analyze"):
        for unit in ("meshgpu-lease.timer", "meshgpu.service"):
            checked = subprocess.run(
                ["systemd-analyze", "verify", "--man=no", str(machine.units / unit)], capture_output=True, text=True
            )
            assert str(machine.units) not in checked.stderr


@pytest.mark.parametrize(("left_s", "minutes"), [(60.0, 1), (60.1, 2), (0.5, 1), (7200.0, 120)])
def test_first_switch_never_comes_before_the_lease_ends(left_s: float, minutes: int) -> None:
    terms = replace(TERMS, terms=replace(TERMS.terms, lease_ends_wall_s=NOW_S + left_s))
    data, _ = make_user_data(terms, "true", NOW_S)
    commands = [line for line in data.decode().splitlines() if not line.startswith("#")]
    assert commands[0] == f"shutdown -P +{minutes}"


def test_each_launch_has_secrets_of_its_own(machine: Machine) -> None:
    first, second = (make_user_data(TERMS, "true", NOW_S) for _ in range(2))
    assert first != second


def test_it_fits_with_room_for_an_install_command() -> None:
    data, _ = make_user_data(TERMS, "i" * 8_000, NOW_S)
    assert len(data) <= LIMIT_BYTES
    with pytest.raises(MeshgpuError) as raised:
        make_user_data(TERMS, "i" * LIMIT_BYTES, NOW_S)
    assert raised.value.code == "too-large"


def test_lease_that_is_over_is_refused() -> None:
    with pytest.raises(MeshgpuError, match="over before it boots"):
        make_user_data(TERMS, "true", TERMS.terms.lease_ends_wall_s)


def test_install_command_is_taken_literally(machine: Machine) -> None:
    """Quotes, placeholders and ends of here-documents in it change nothing around it."""
    odd = INSTALL + "\n: 'it''s' \"@KEY@\" $(true)\ncat <<'END' > /dev/null\nEND\n"
    assert machine.boot(odd) == 0, machine.errors
    assert machine.calls == [*SWITCHES, WALL, "installing", *AGENT]


def test_script_passes_the_shells_linter(tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck (Debian: shellcheck)")
    script = tmp_path / "user_data.sh"
    script.write_bytes(make_user_data(TERMS, "true", NOW_S)[0])
    subprocess.run(["shellcheck", str(script)], check=True)


def _without(directory: Path, name: str) -> None:
    (directory / name).unlink()


def _with(name: str, text: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        (directory / name).write_text(text)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda directory: _without(directory, "terms.json"), "terms.json"),
        (lambda directory: _without(directory, "key.pem"), "key.pem"),
        (_with("terms.json", "{}"), "terms.json"),
        (_with("terms.json", "[1]"), "terms.json"),
        (_with("terms.json", "nonsense"), "terms.json"),
        (_with("certificate.pem", "nonsense"), "certificate.pem"),
    ],
)
def test_spoilt_directory_is_named(machine: Machine, spoil: Callable[[Path], None], named: str) -> None:
    machine.boot()
    spoil(machine.directory)
    with pytest.raises(MeshgpuError, match=named) as raised:
        read_boot(machine.directory)
    assert raised.value.code == "bad-boot"


@pytest.mark.parametrize("field", ["lease_ends_wall_s", "idle_s"])
def test_terms_without_an_end_are_refused(machine: Machine, field: str) -> None:
    machine.boot()
    path = machine.directory / "terms.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: float("inf")}))
    with pytest.raises(MeshgpuError) as raised:
        read_boot(machine.directory)
    assert raised.value.code == "bad-boot"


def test_now_is_only_an_argument() -> None:
    """A burst peer whose clock is wrong by days still makes a certificate that it accepts itself."""
    for moment in (time.time() - 1e6, time.time() + 1e6):
        terms = replace(TERMS, terms=replace(TERMS.terms, lease_ends_wall_s=moment + 3600))
        _, bootstrap = make_user_data(terms, "true", moment)
        certificate = x509.load_der_x509_certificate(bootstrap)
        assert certificate.not_valid_before_utc.timestamp() < moment < certificate.not_valid_after_utc.timestamp()
