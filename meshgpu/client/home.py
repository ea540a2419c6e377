"""Where the agent's home is, and the socket in it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from meshgpu.errors import MeshgpuError

SOCKET_NAME: Final = "agent.sock"
SYSTEM_HOME: Final = Path("/var/lib/meshgpu")
MACHINE_ID: Final = Path("/etc/machine-id")
MACHINE_ID_CHARACTERS: Final = 12
"""Enough to tell the machines apart that share one home directory over the network."""

SOCKET_PATH_LIMIT_BYTES: Final = 107
"""sun_path of unix(7) holds 108 bytes, the closing zero included."""


def find_home(
    environ: Mapping[str, str] = os.environ, system_home: Path = SYSTEM_HOME, machine_id: Path = MACHINE_ID
) -> Path:
    """MESHGPU_HOME, else the user's own home if an agent was started there, else the system's, else the user's own.

    Raises MeshgpuError `bad-home` for a `~` that no shell has expanded.
    """
    if chosen := environ.get("MESHGPU_HOME"):
        if chosen.startswith("~"):
            raise MeshgpuError(
                "bad-home",
                f"cannot use MESHGPU_HOME={chosen}: the shell left its ~ as it is",
                f'export MESHGPU_HOME="$HOME{chosen[1:]}"',
            )
        return Path(chosen).absolute()
    own = _user_home(environ, machine_id)
    if not (own / SOCKET_NAME).exists() and (system_home / SOCKET_NAME).exists():
        return system_home
    return own


def socket_path(home: Path) -> Path:
    """The control socket of `home`.

    Raises MeshgpuError: `socket-path` where the kernel could not hold its name, `bad-home` where `home` is a file.
    """
    if home.exists() and not home.is_dir():
        raise MeshgpuError("bad-home", f"cannot keep an agent in {home}: it is no directory", f"ls -l {home}")
    path = home / SOCKET_NAME
    size = len(os.fsencode(path))
    if size > SOCKET_PATH_LIMIT_BYTES:
        raise MeshgpuError(
            "socket-path",
            f"cannot use the socket {path}: its path has {size} bytes, {SOCKET_PATH_LIMIT_BYTES} at most",
            "export MESHGPU_HOME=<a shorter directory>",
        )
    return path


def _user_home(environ: Mapping[str, str], machine_id: Path) -> Path:
    """State is per machine, never per home directory: that one may be shared over the network."""
    data = environ.get("XDG_DATA_HOME", "")
    root = Path(data) if data.startswith("/") else Path.home() / ".local/share"
    try:
        machine = machine_id.read_text().strip()[:MACHINE_ID_CHARACTERS]
    except (OSError, UnicodeDecodeError):
        machine = ""
    return root / "meshgpu" / (machine or "this-machine")
