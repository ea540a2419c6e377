"""Opens files that a job left. The job may still run and may be hostile, so no name in the path is ever trusted."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from meshgpu.errors import MeshgpuError

_BENEATH = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def open_beneath(root: Path, path: str) -> BinaryIO:
    """Open a regular file below `root`, name by name, following no symlink: one may change while we look.

    Raises MeshgpuError `unknown-file`. O_NONBLOCK: a fifo must not stop us.
    """
    names = path.split("/")
    if any(name in ("", ".", "..") for name in names):
        raise _unknown(path)
    try:
        directory = os.open(root, _BENEATH | os.O_DIRECTORY)
        try:
            for name in names[:-1]:
                inner = os.open(name, _BENEATH | os.O_DIRECTORY, dir_fd=directory)
                os.close(directory)
                directory = inner
            file = os.open(names[-1], _BENEATH, dir_fd=directory)
        finally:
            os.close(directory)
    except (OSError, ValueError) as error:
        raise _unknown(path) from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise _unknown(path)
    return os.fdopen(file, "rb")


def _unknown(path: str) -> MeshgpuError:
    return MeshgpuError("unknown-file", f"cannot fetch {path}: the job left no such file")
