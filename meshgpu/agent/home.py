"""Where one agent keeps its things: everything below one directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import JobId

SOCKET_PATH_LIMIT: Final = 107
"""Bytes in a Unix socket's path: sun_path holds 108 with its end."""


@dataclass(frozen=True, slots=True)
class Home:
    """Paths of one agent. `directory` is private to the account that runs it."""

    directory: Path

    @property
    def socket(self) -> Path:
        return self.directory / "agent.sock"

    @property
    def config(self) -> Path:
        return self.directory / "config.toml"

    @property
    def keys(self) -> Path:
        return self.directory / "keys"

    @property
    def database(self) -> Path:
        return self.directory / "state.db"

    @property
    def chunks(self) -> Path:
        return self.directory / "chunks"

    @property
    def environments(self) -> Path:
        return self.directory / "environments"

    @property
    def jobs(self) -> Path:
        return self.directory / "jobs"

    def attempt(self, job: JobId, epoch: int) -> Path:
        return self.jobs / job / str(epoch)

    def prepare(self) -> None:
        """Make the directory. Raises MeshgpuError where its path is too long for the control socket."""
        length = len(str(self.socket).encode())
        if length > SOCKET_PATH_LIMIT:
            raise MeshgpuError(
                "path-too-long",
                f"cannot use {self.directory}: its socket's path has {length} bytes, expected {SOCKET_PATH_LIMIT}",
                "set MESHGPU_HOME to a shorter path",
            )
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.jobs.mkdir(mode=0o700, exist_ok=True)
