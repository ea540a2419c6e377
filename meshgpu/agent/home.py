"""Where one agent keeps its things: everything below one directory."""

import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import JobId

logger = logging.getLogger(__name__)


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

    @property
    def join_file(self) -> Path:
        """Where a string may lie by which the agent is to join; looked at after the system's."""
        return self.directory / "join"

    @property
    def used_join_files(self) -> Path:
        """Digests of strings that were used and could not be removed."""
        return self.directory / "used-join-files"

    @property
    def left(self) -> Path:
        """There once this machine has left its mesh: the next agent starts with nothing of it."""
        return self.directory / "left-mesh"

    def start_anew(self) -> None:
        """Forget mesh and keys, if this machine has left. What jobs wrote stays."""
        if self.left.exists():
            for path in (self.database, *self.directory.glob(f"{self.database.name}-*")):
                path.unlink(missing_ok=True)
            for key in self.keys.glob("**/*.pem"):
                key.unlink()
            self.left.unlink()

    def prepare(self) -> None:
        """Make the directory, for this account alone; what others could read until now is closed, with a warning.

        What another account put there, this one cannot close, which is told and no more: nobody else gets into the
        directory. Keys and the join file are another matter: those that others could read or write are refused.
        Raises MeshgpuError `bad-home`.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self.directory.stat().st_uid
            if owner not in (0, os.geteuid()):
                raise self._is_bad(f"it belongs to the account {owner}, which could change everything in it")
            own = (self.directory, self.jobs, self.environments)
            for path in own:
                path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise self._is_bad(error.strerror or str(error)) from error
        for path in (*own, *(path for path in self.directory.iterdir() if path != self.join_file)):
            mode = stat.S_IMODE(path.lstat().st_mode)
            if mode & 0o077 and (path in own or path.is_file()) and not path.is_symlink():
                _close(path, mode)

    def _is_bad(self, found: str) -> MeshgpuError:
        return MeshgpuError("bad-home", f"cannot keep an agent in {self.directory}: {found}", "unset MESHGPU_HOME")


def _close(path: Path, mode: int) -> None:
    try:
        path.chmod(mode & 0o700)
    except PermissionError:
        owner = path.lstat().st_uid
        logger.warning(
            "%s is open to other accounts (mode %04o) and belongs to the account %d: chown it, or remove it",
            path, mode, owner,
        )  # fmt: skip
    else:
        logger.warning("%s was open to other accounts (mode %04o), and is closed now", path, mode)
