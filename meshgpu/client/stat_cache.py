"""What the files of one directory hashed to last time, so that an unchanged tree is not read again."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Final

from meshgpu.model.ids import Digest
from meshgpu.model.tree import CHUNK_BYTES, is_digest

RACY_NS: Final = 2 * 10**9
"""A file changed less than this before it was read may change again under the same time stamp (FAT counts in 2 s)."""

Stamp = tuple[int, int, int, int]
"""(size in bytes, mtime in ns, ctime in ns, inode)."""


def stamp_of(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


class StatCache:
    """One JSON file for each directory below `cache`. A broken or unwritable one only costs time."""

    def __init__(self, cache: Path | None, directory: str, now_wall_ns: int) -> None:
        name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:32]
        self._path = cache / f"{name}.json" if cache else None
        self._now_wall_ns = now_wall_ns
        self._old = _load(self._path) if self._path else {}
        self._new: dict[str, tuple[Stamp, tuple[Digest, ...]]] = {}

    def get(self, path: str, stamp: Stamp) -> tuple[Digest, ...] | None:
        entry = self._old.get(path)
        if entry is None or entry[0] != stamp:
            return None
        self._new[path] = entry
        return entry[1]

    def put(self, path: str, stamp: Stamp, chunks: tuple[Digest, ...]) -> None:
        """Remember what was just read; a file that changed less than RACY_NS ago is not remembered."""
        _, mtime_ns, ctime_ns, _ = stamp
        if max(mtime_ns, ctime_ns) < self._now_wall_ns - RACY_NS:
            self._new[path] = (stamp, chunks)

    def save(self) -> None:
        if self._path is None or self._new == self._old:
            return
        rows = {path: [*stamp, *chunks] for path, (stamp, chunks) in self._new.items()}
        temporary = self._path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary.write_text(json.dumps({"version": 1, "files": rows}, separators=(",", ":")))
            temporary.replace(self._path)

    def forget(self) -> None:
        """Drop everything, where it turned out to be wrong."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)


def _load(path: Path) -> dict[str, tuple[Stamp, tuple[Digest, ...]]]:
    try:
        document = json.loads(path.read_bytes())
        if document["version"] != 1:
            return {}
        return {
            name: ((int(size), int(mtime_ns), int(ctime_ns), int(inode)), tuple(Digest(c) for c in chunks))
            for name, (size, mtime_ns, ctime_ns, inode, *chunks) in document["files"].items()
            if len(chunks) == -(-size // CHUNK_BYTES) and all(is_digest(chunk) for chunk in chunks)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
