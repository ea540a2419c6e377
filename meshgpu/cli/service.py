"""The user-level systemd service of this machine's agent: its unit file, and systemctl and loginctl."""

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from meshgpu.errors import MeshgpuError

UNIT: Final = "meshgpu.service"
TEMPLATE: Final = Path(__file__).with_name("meshgpu-user.service")
TEMPLATE_EXEC: Final = "ExecStart=%h/.local/bin/meshgpu agent\n"
LINGERING_MARK: Final = "# meshgpu install turned lingering on; --undo turns it off again.\n"
CALL_LIMIT_S: Final = 30.0
"""systemctl waits for a start or stop; the unit gives the agent 20 s to end."""


def unit_path() -> Path:
    return Path.home() / ".config/systemd/user" / UNIT


def unit_text(home: Path, *, turned_lingering_on: bool) -> str:
    """The unit file of the agent in `home`, run by this very interpreter."""
    template = TEMPLATE.read_text()
    assert TEMPLATE_EXEC in template
    text = template.replace(TEMPLATE_EXEC, f"ExecStart={' '.join(map(quoted, argv(home)))}\n")
    return (LINGERING_MARK if turned_lingering_on else "") + text


def argv(home: Path) -> list[str]:
    # -P: a file of the directory the service starts in must not shadow a module of the agent
    return [sys.executable, "-P", "-m", "meshgpu", "agent", "--home", str(home)]


def quoted(argument: str) -> str:
    """One word of ExecStart, as systemd.service(5) reads it: specifiers and variables are not expanded."""
    escaped = argument.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if escaped != argument or " " in argument or not argument else argument


def is_installed(home: Path) -> bool:
    """Whether the service runs the agent of `home`."""
    return f" --home {quoted(str(home))}\n" in _installed_text()


def turned_lingering_on() -> bool:
    """Whether the unit that is installed says that lingering was off before it."""
    return LINGERING_MARK in _installed_text()


def check_systemd() -> None:
    """Raise MeshgpuError `no-systemd` where no systemd of this user answers."""
    try:
        systemctl("show", "--property=Version")
    except MeshgpuError as error:
        raise MeshgpuError("no-systemd", f"cannot use a service: {error.message}", "meshgpu up") from error


def systemctl(*arguments: str) -> str:
    """`systemctl --user ARGUMENTS`; raises MeshgpuError `service-failed` with what it said."""
    return _call("systemctl", "--user", *arguments)


def loginctl(*arguments: str) -> str:
    return _call("loginctl", *arguments)


def is_lingering() -> bool:
    """Whether this account's services run without a login. False also where logind does not say."""
    try:
        return "Linger=yes" in loginctl("show-user", account(), "--property=Linger")
    except MeshgpuError:  # logind does not know an account that neither lingers nor is logged in
        return False


def account() -> str:
    """This OS account, as loginctl names it."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _installed_text() -> str:
    try:
        return unit_path().read_text()
    except FileNotFoundError:
        return ""


def _call(program: str, *arguments: str) -> str:
    shown = " ".join((program, *arguments))
    path = shutil.which(program)
    if path is None:
        raise MeshgpuError("service-failed", f"there is no {program} on this machine", "meshgpu up")
    try:
        done = subprocess.run(
            [path, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CALL_LIMIT_S
        )
    except subprocess.TimeoutExpired as error:
        raise MeshgpuError("service-failed", f"{shown} did not end within {CALL_LIMIT_S:.0f} s", shown) from error
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise MeshgpuError("service-failed", f"{shown} failed: {words}", f"systemctl --user status {UNIT}")
    return done.stdout
