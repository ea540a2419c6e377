"""The working directory as it is, captured for a job: its manifest, and its chunks read again as they are asked for."""

import os
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshgpu.client.listing import IGNORE_FILE, Listing, list_tree, unreadable
from meshgpu.client.stat_cache import StatCache, stamp_of
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import Digest, digest
from meshgpu.model.tree import CHUNK_BYTES, TREE_LIMIT_BYTES, TREE_LIMIT_FILES, FileKind, Manifest, TreeFile

_LARGEST_SHOWN: Final = 3
"""Top-level names that a refusal of a large tree lists: enough to see what to leave out."""

_WARNINGS_SHOWN: Final = 20
"""A `node_modules` full of odd links should not fill the terminal."""


@dataclass(frozen=True, slots=True)
class _Piece:
    path: str
    offset_bytes: int
    length_bytes: int


class Capture:
    """What `capture` found. warnings: one line for each thing that will not be the same where the job runs."""

    def __init__(self, root: str, manifest: Manifest, warnings: tuple[str, ...], cache: StatCache) -> None:
        self.manifest = manifest
        self.warnings = warnings
        self._root = root
        self._cache = cache
        self._pieces: dict[Digest, _Piece] = {}
        for file in manifest.files:
            for index, chunk in enumerate(file.chunks):
                offset = index * CHUNK_BYTES
                self._pieces[chunk] = _Piece(file.path, offset, min(CHUNK_BYTES, file.size_bytes - offset))

    @property
    def files(self) -> int:
        return len(self.manifest.files)

    @property
    def size_bytes(self) -> int:
        return self.manifest.size_bytes

    def read(self, chunk: Digest) -> bytes:
        """The bytes of a chunk of the manifest, at most CHUNK_BYTES, read from its file now.

        Raises MeshgpuError `tree-changed` where they are no longer what was captured.
        """
        piece = self._pieces[chunk]
        try:
            descriptor = _open(f"{self._root}/{piece.path}")
        except FileNotFoundError as error:
            raise _changed(piece.path) from error
        except OSError as error:
            raise unreadable(piece.path, error) from error
        try:
            data = _read_exactly(descriptor, piece.offset_bytes, piece.length_bytes)
        finally:
            os.close(descriptor)
        if digest(data) != chunk:
            self._cache.forget()
            raise _changed(piece.path)
        return data


def capture(directory: Path, cache: Path | None, home: Path | None = None) -> Capture:
    """Read `directory` as it is: what git tracks or does not ignore, without git all but the usual clutter.

    IGNORE_FILE at its root takes more out. `cache` is a directory that remembers what unchanged files hashed to.
    `home` is the agent's: its keys never travel.
    Raises MeshgpuError `not-a-project`, `unreadable`, `git`, `tree-too-large` or `tree-changed`.
    """
    root = os.path.realpath(directory)
    _check_root(root)
    private = _inside(root, home)
    known = StatCache(cache, root, time.time_ns())
    listing = list_tree(root, private)
    _check_size(root, listing)
    files = [_capture_file(root, path, status, known) for path, status in listing.files.items()]
    files += [TreeFile(path, FileKind.DIRECTORY) for path in listing.empty]
    known.save()
    files.sort(key=lambda file: file.path)
    warnings = [*listing.warnings, *_leaving(files)]
    if len(warnings) > _WARNINGS_SHOWN:
        warnings[_WARNINGS_SHOWN:] = [f"and {len(warnings) - _WARNINGS_SHOWN} more like these"]
    return Capture(root, Manifest(tuple(files)), tuple(warnings), known)


def _check_root(root: str) -> None:
    if not Path(root).is_dir():
        raise MeshgpuError("not-a-project", f"cannot ship {root}: it is not a directory")
    if root in ("/", os.path.realpath(_home())):
        what = "the whole file system" if root == "/" else "your whole home directory"
        raise MeshgpuError("not-a-project", f"cannot ship {root}: it is {what}", "cd into the project first")


def _inside(root: str, home: Path | None) -> str:
    """Where the agent's home lies below `root`, "" where it does not. Raises MeshgpuError `not-a-project` within it.

    What jobs left in the home may be shipped again.
    """
    if home is None:
        return ""
    own = Path(os.path.realpath(home))
    if Path(root).is_relative_to(own) and not Path(root).is_relative_to(own / "jobs"):
        raise MeshgpuError(
            "not-a-project", f"cannot ship {root}: the agent keeps its keys there", "cd into the project first"
        )
    return str(own.relative_to(root)) if own.is_relative_to(root) and own != Path(root) else ""


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and an account without an entry
        return Path("/")


def _check_size(root: str, listing: Listing) -> None:
    size_bytes = sum(status.st_size for status in listing.files.values())
    if size_bytes <= TREE_LIMIT_BYTES and len(listing.files) <= TREE_LIMIT_FILES:
        return
    by_top: dict[str, tuple[int, int]] = {}
    for path, status in listing.files.items():
        top = path.partition("/")[0]
        files, top_bytes = by_top.get(top, (0, 0))
        by_top[top] = (files + 1, top_bytes + status.st_size)
    by_bytes = size_bytes > TREE_LIMIT_BYTES
    largest = sorted(by_top, key=lambda top: by_top[top][by_bytes], reverse=True)[:_LARGEST_SHOWN]
    shown = ", ".join(f"{top} ({_size(by_top[top][1])}, {by_top[top][0]:,} files)" for top in largest)
    limit = _size(TREE_LIMIT_BYTES) if by_bytes else f"{TREE_LIMIT_FILES:,} files"
    raise MeshgpuError(
        "tree-too-large",
        f"cannot ship {root}: {_size(size_bytes)} in {len(listing.files):,} files, at most {limit}; largest: {shown}",
        f"list what the job does not need in {IGNORE_FILE}: echo /{largest[0]} >> {IGNORE_FILE}",
    )


def _size(size_bytes: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} B"


def _capture_file(root: str, path: str, status: os.stat_result, known: StatCache) -> TreeFile:
    if stat.S_ISLNK(status.st_mode):
        return TreeFile(path, FileKind.SYMLINK, target=_read_link(root, path))
    executable = bool(status.st_mode & stat.S_IXUSR)
    stamp = stamp_of(status)
    chunks = known.get(path, stamp)
    if chunks is None:
        status, chunks = _hash_file(root, path)
        known.put(path, stamp_of(status), chunks)
    return TreeFile(path, FileKind.FILE, executable, status.st_size, chunks)


def _read_link(root: str, path: str) -> str:
    try:
        return os.readlink(f"{root}/{path}")  # noqa: PTH115 - Path.readlink would tidy the target up
    except OSError as error:
        raise _changed(path) from error


def _hash_file(root: str, path: str) -> tuple[os.stat_result, tuple[Digest, ...]]:
    """Read a file whole; its stat is of the moment before. Raises `tree-changed` where it changes meanwhile."""
    try:
        descriptor = _open(f"{root}/{path}")
        try:
            before = os.fstat(descriptor)
            chunks = tuple(
                digest(_read_exactly(descriptor, offset, min(CHUNK_BYTES, before.st_size - offset)))
                for offset in range(0, before.st_size, CHUNK_BYTES)
            )
            after = os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise _changed(path) from error
    except OSError as error:
        raise unreadable(path, error) from error
    if stamp_of(before) != stamp_of(after) or not stat.S_ISREG(before.st_mode):
        raise _changed(path)
    return before, chunks


def _open(path: str) -> int:
    # Never through a symlink, and never waiting for a pipe, that took the file's place since it was listed.
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _read_exactly(descriptor: int, offset_bytes: int, length_bytes: int) -> bytes:
    """Up to `length_bytes`, fewer only at the end of the file."""
    data = os.pread(descriptor, length_bytes, offset_bytes)
    while len(data) < length_bytes and (
        more := os.pread(descriptor, length_bytes - len(data), offset_bytes + len(data))
    ):
        data += more
    return data


def _changed(path: str) -> MeshgpuError:
    return MeshgpuError(
        "tree-changed",
        f"cannot ship {path}: it changed while it was being read",
        f"submit again, or list it in {IGNORE_FILE}",
    )


def _leaving(files: Iterable[TreeFile]) -> list[str]:
    """A warning for each symlink that points out of the tree: it will dangle, or lead elsewhere, on another machine."""
    return [
        f"{file.path} is a symlink to {file.target}, outside this directory"
        for file in files
        if file.kind is FileKind.SYMLINK and _leaves(file)
    ]


def _leaves(link: TreeFile) -> bool:
    if link.target.startswith("/"):
        return True
    depth = link.path.count("/")
    for part in link.target.split("/"):
        depth += -1 if part == ".." else part not in ("", ".")
        if depth < 0:
            return True
    return False
