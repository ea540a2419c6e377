"""Files in which an invite's string may lie, and the memory of those that were used and could not be removed."""

import errno
import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TEXT_LIMIT_BYTES: Final = 4096
"""More than any invite has."""

_ABSENT: Final = frozenset({errno.ENOENT, errno.ENOTDIR})


@dataclass(frozen=True, slots=True)
class JoinFile:
    """owner: uid. mode: permission bits. fault: why it could not be read; then `text` is empty and the rest is 0."""

    path: Path
    owner: int = 0
    mode: int = 0
    text: str = ""
    fault: str = ""


class JoinFiles:
    """Looks at `paths`, in this order. used: a file of digests, one a line, of what is not to be used again."""

    def __init__(self, paths: Sequence[Path], used: Path) -> None:
        self._paths = tuple(paths)
        self._used = used

    def present(self) -> list[JoinFile]:
        """Those that are there and were not used before."""
        used = self._used.read_text().split() if self._used.exists() else []
        found = [file for path in self._paths if (file := _read(path)) is not None]
        return [file for file in found if file.fault or _digest(file) not in used]

    def discard(self, file: JoinFile) -> None:
        """Remove it; where that may not be, never find the same string again. Raises OSError where neither can be."""
        try:
            file.path.unlink(missing_ok=True)
        except OSError:
            with self._used.open("a") as used:
                used.write(f"{_digest(file)}\n")


def _read(path: Path) -> JoinFile | None:
    try:
        # Neither a link that leads elsewhere nor a pipe that never ends; what is judged is what was opened.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _ABSENT or not _is_seen(path):
            return None
        return JoinFile(path, fault="it is a link" if error.errno == errno.ELOOP else str(error.strerror).lower())
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            return JoinFile(path, fault="it is no file")
        text = os.read(descriptor, TEXT_LIMIT_BYTES).decode("ascii", "replace").strip()
        return JoinFile(path, facts.st_uid, stat.S_IMODE(facts.st_mode), text)
    finally:
        os.close(descriptor)


def _is_seen(path: Path) -> bool:
    """Whether this account may know at all that something is there."""
    try:
        path.lstat()
    except OSError:
        return False
    return True


def _digest(file: JoinFile) -> str:
    return hashlib.sha256(file.text.encode()).hexdigest()
