"""Store port over SQLite: the agent's durable records in one file, owned by one process."""

import contextlib
import errno
import fcntl
import os
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from meshgpu.errors import MeshgpuError

SCHEMA_VERSION: Final = 1
"""Kept in `user_version`; raised when an older agent could no longer read the file."""

NETWORK_FILE_SYSTEMS: Final = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "afs",
        "ceph",
        "lustre",
        "beegfs",
        "gpfs",
        "fuse.sshfs",
        "fuse.glusterfs",
        "fuse.rclone",
        "fuse.s3fs",
    }
)
"""Where two machines may see one file: their agents would share keys, and SQLite's log needs local shared memory."""

_SCHEMA: Final = f"""
CREATE TABLE records (kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY (kind, key));
PRAGMA user_version = {SCHEMA_VERSION};
"""
_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_PRIMARY_CODE: Final = 0xFF
"""SQLite's extended result codes carry the primary code in their low byte."""


class SqliteStore:
    """Opens `path`, made where there is none, and holds a lock beside it until `close`.

    Every method blocks; they may be called from any thread, one at a time. Raises MeshgpuError: `in-use`,
    `network-file-system`, `newer-state`, `damaged-state`, `disk-full`, `state-unusable`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with contextlib.ExitStack() as undo:
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                refuse_network_filesystem(path.resolve(), Path("/proc/mounts").read_text(errors="replace"))
                self._lock = _lock(path)
                undo.callback(os.close, self._lock)
                path.touch(mode=0o600)
                self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
                undo.callback(self._connection.close)
                self._prepare()
            except (OSError, sqlite3.Error) as error:
                self._fail("open", error)
            undo.pop_all()
        self._is_open = True

    def load(self, but: str = "") -> dict[tuple[str, str], bytes]:
        rows = self._read("SELECT kind, key, value FROM records WHERE kind != ?", but)
        return {(kind, key): value for kind, key, value in rows}

    def read(self, kind: str, start: str, limit: int) -> list[tuple[str, bytes]]:
        query = "SELECT key, value FROM records WHERE kind = ? AND key >= ? ORDER BY key LIMIT ?"
        return [(key, value) for key, value in self._read(query, kind, start, limit)]

    def last(self, kind: str, limit: int) -> list[tuple[str, bytes]]:
        query = "SELECT key, value FROM records WHERE kind = ? ORDER BY key DESC LIMIT ?"
        return [(key, value) for key, value in reversed(self._read(query, kind, limit))]

    def _read(self, query: str, *arguments: str | int) -> list[tuple[Any, ...]]:  # Any: whatever a column holds
        try:
            return self._connection.execute(query, arguments).fetchall()
        except sqlite3.Error as error:
            self._fail("read", error)

    def write(self, records: Sequence[tuple[str, str, bytes | None]]) -> None:
        """All of `records` or, where it raises, none of them."""
        try:
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                for kind, key, value in records:
                    if value is None:
                        self._connection.execute("DELETE FROM records WHERE kind = ? AND key = ?", (kind, key))
                    else:
                        self._connection.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", (kind, key, value))
        except sqlite3.Error as error:
            self._fail("write", error)

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._connection.close()
            os.close(self._lock)

    def _prepare(self) -> None:
        # Alone on the file by our own lock; SQLite then keeps its index of the log in memory and not in a mapped file,
        # which would kill the process on a full disk.
        self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._connection.execute("PRAGMA synchronous = FULL")
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise MeshgpuError(
                "newer-state",
                f"cannot open {self._path}: a newer meshgpu wrote it (schema {version}, known: {SCHEMA_VERSION})",
                "install the newer meshgpu again, or set MESHGPU_HOME to an empty directory",
            )
        (mode,) = self._connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise MeshgpuError(
                "state-unusable",
                f"cannot open {self._path}: its file system does not carry a write-ahead log (journal mode {mode})",
                "set MESHGPU_HOME to a directory on a local disk",
            )
        if version == 0:
            self._connection.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}COMMIT;")

    def _fail(self, verb: str, error: OSError | sqlite3.Error) -> NoReturn:
        """Raise what `error` means for the person at the keyboard."""
        code = getattr(error, "sqlite_errorcode", 0) & _PRIMARY_CODE
        if code in _DAMAGED:
            raise MeshgpuError(
                "damaged-state",
                f"cannot {verb} {self._path}: the file is damaged ({error})",
                f"bring it back from a backup, or `mv {self._path} {self._path}.damaged` and join the mesh again",
            ) from error
        if code == sqlite3.SQLITE_FULL or getattr(error, "errno", 0) == errno.ENOSPC:
            raise MeshgpuError(
                "disk-full", f"cannot {verb} {self._path}: the disk is full", f"df -h {self._path.parent}"
            ) from error
        raise MeshgpuError(
            "state-unusable", f"cannot {verb} {self._path}: {error}", f"ls -ld {self._path.parent} {self._path}"
        ) from error


def refuse_network_filesystem(path: Path, mounts_text: str) -> None:
    """Raise MeshgpuError `network-file-system` if `path` (absolute, resolved) lies on one.

    mounts_text: as /proc/mounts; a later mount covers what lies below its point.
    """
    holder, kind = Path("/"), ""
    for line in mounts_text.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = Path(_unescaped(fields[1]))
        if path.is_relative_to(point):
            holder, kind = point, fields[2]
    if kind in NETWORK_FILE_SYSTEMS:
        raise MeshgpuError(
            "network-file-system",
            f"cannot keep this machine's state in {path.parent}: {holder} is a network file system ({kind}), "
            "which other machines may see too",
            "set MESHGPU_HOME to a directory on a local disk",
        )


def _unescaped(field: str) -> str:
    """/proc/mounts writes a blank as `\\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _lock(path: Path) -> int:
    """Lock the file beside `path`, with our process id in it; the kernel lets go when the process ends."""
    lock_path = path.with_name(f"{path.name}.lock")
    descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise MeshgpuError(
            "in-use",
            f"cannot open {path}: another agent uses it (process {holder})",
            "meshgpu down, or set MESHGPU_HOME to another directory",
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor
