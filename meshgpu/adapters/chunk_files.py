"""ChunkStore port over a directory of files, one for each chunk, and trees laid out from them."""

import contextlib
import ctypes
import errno
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import Digest, digest
from meshgpu.model.tree import CHUNK_BYTES, FileKind, Manifest, TreeFile, decode_manifest, is_digest

KEEP_FREE_BYTES: Final = 10 * 10**9
KEEP_FREE_SHARE: Final = 0.05
"""The larger of the two stays free, so that a job's files never fill the owner's disk."""

_BLOCK_BYTES: Final = 4096
"""What even a file of one byte takes on the usual file systems."""

_CLONE_FROM_BYTES: Final = 64 * 2**10
"""Below this a write costs less than asking the kernel to share the blocks."""

_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class ChunkFiles:
    """Chunks below `directory`, as `ab/cdef…`; all calls block, and any thread may make them.

    `put` survives a crash of the agent at once (the rename makes a chunk appear whole), and a crash of the machine
    after `sync`. What a crash tears none the less, or a disk loses, is found by its digest and dropped.
    keep_free_bytes: what stays free on the disk; by default the larger of 10 GB and 5 % of it.
    """

    def __init__(self, directory: Path, keep_free_bytes: int | None = None) -> None:
        self._directory = directory
        self._incoming = directory / "incoming"
        self._serial = itertools.count()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        shutil.rmtree(self._incoming, ignore_errors=True)
        self._incoming.mkdir(mode=0o700)
        self._keep_free_bytes = keep_free_bytes
        self._libc = ctypes.CDLL(None, use_errno=True)

    def missing(self, chunks: Sequence[Digest]) -> list[Digest]:
        """Those that are not here, in the order given, each once. Costs a stat for each."""
        return [chunk for chunk in dict.fromkeys(chunks) if not self._size_bytes(chunk)]

    def put(self, data: bytes) -> Digest:
        """Keep a chunk, whole or not at all. Raises MeshgpuError `disk-full`."""
        chunk = digest(data)
        if self._size_bytes(chunk) == len(data):
            return chunk
        self._reserve("keep a chunk", self._directory, len(data))
        path = self._path(chunk)
        temporary = self._incoming / f"{chunk}.{next(self._serial)}"
        try:
            with _creating(temporary, 0o600) as descriptor:
                _write(descriptor, data)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._failed("keep a chunk", self._directory, len(data), error) from error
        return chunk

    def sync(self) -> None:
        """Return once everything that was put is on the disk: one call for the file system, not one for each chunk."""
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if self._libc.syncfs(descriptor) != 0:
                raise OSError(ctypes.get_errno(), "cannot sync the chunks to disk", str(self._directory))
        finally:
            os.close(descriptor)

    def get(self, chunk: Digest) -> bytes:
        """Raises MeshgpuError `missing-chunks` where it is not here or, then dropped, no longer what it was."""
        with self._opened(chunk) as (data, _):
            return data

    def manifest(self, tree: Digest) -> Manifest:
        """Raises MeshgpuError `missing-chunks` or `bad-manifest`."""
        return decode_manifest(self.get(tree))

    def materialise(self, tree: Digest, directory: Path) -> None:
        """Write the tree into `directory`, which appears when it is complete and holds files of its own.

        Raises MeshgpuError `disk-full`, `missing-chunks`, `bad-manifest`, `not-empty` or `cannot-write`; then nothing
        of it is left.
        """
        manifest = self.manifest(tree)
        if directory.is_symlink() or (directory.exists() and (not directory.is_dir() or any(directory.iterdir()))):
            raise MeshgpuError("not-empty", f"cannot lay out files in {directory}: something is there already")
        needed_bytes = sum(-(-file.size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES for file in manifest.files)
        needed_bytes += _BLOCK_BYTES * len(manifest.files)
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._reserve(f"lay out files in {directory}", directory.parent, needed_bytes)
        partial = directory.with_name(f"{directory.name}.partial")
        try:
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(mode=0o700)
            self._fill(manifest, partial)
            partial.replace(directory)
        except OSError as error:
            raise self._failed(f"lay out files in {directory}", directory.parent, needed_bytes, error) from error
        finally:
            if partial.exists():
                shutil.rmtree(partial, ignore_errors=True)

    def _fill(self, manifest: Manifest, directory: Path) -> None:
        # Symlinks come last: until then no path below `directory` can lead out of it.
        parents = {file.path.rpartition("/")[0] for file in manifest.files}
        parents |= {file.path for file in manifest.files if file.kind is FileKind.DIRECTORY}
        made: set[str] = set()
        for path in sorted(parents):
            # Name by name, for `mkdir(parents=True)` recurses.
            for above in itertools.accumulate(path.split("/"), "{}/{}".format):
                if above and above not in made:
                    (directory / above).mkdir()
                    made.add(above)
        for file in manifest.files:
            if file.kind is FileKind.FILE:
                self._write_file(file, f"{directory}/{file.path}")
        for file in manifest.files:
            if file.kind is FileKind.SYMLINK:
                (directory / file.path).symlink_to(file.target)

    def _write_file(self, file: TreeFile, path: str) -> None:
        with _creating(path, 0o755 if file.executable else 0o644) as target:
            for index, chunk in enumerate(file.chunks):
                with self._opened(chunk) as (data, source):
                    if len(data) != min(CHUNK_BYTES, file.size_bytes - index * CHUNK_BYTES):
                        raise MeshgpuError(
                            "bad-manifest", f"cannot use a tree: {file.path!r} has a chunk of {len(data)} bytes"
                        )
                    _append(target, data, source)

    # -- one chunk ---------------------------------------------------------------------------------------------------

    def _path(self, chunk: Digest) -> Path:
        """Raises MeshgpuError `missing-chunks` for what is no digest: it came from elsewhere and could be any path."""
        if not is_digest(chunk):
            raise MeshgpuError("missing-chunks", f"cannot read a chunk: {chunk[:80]!r} is no SHA-256")
        return self._directory / chunk[:2] / chunk[2:]

    def _size_bytes(self, chunk: Digest) -> int:
        """0 where it is not here, and after a crash that kept a name without its bytes: no chunk is empty."""
        if not is_digest(chunk):
            return 0
        try:
            return self._path(chunk).lstat().st_size
        except FileNotFoundError:
            return 0

    @contextlib.contextmanager
    def _opened(self, chunk: Digest) -> Iterator[tuple[bytes, int]]:
        """(bytes, descriptor) of a chunk, verified."""
        path = self._path(chunk)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            reason = "it is not here" if error.errno == errno.ENOENT else error.strerror
            raise MeshgpuError("missing-chunks", f"cannot read chunk {chunk[:12]}: {reason}") from error
        try:
            data = _read(descriptor)
            if digest(data) != chunk:
                path.unlink(missing_ok=True)
                raise MeshgpuError("missing-chunks", f"cannot use chunk {chunk[:12]}: it was damaged on the disk")
            yield data, descriptor
        finally:
            os.close(descriptor)

    # -- the disk ----------------------------------------------------------------------------------------------------

    def keep_free_bytes(self, directory: Path) -> int:
        """What is to stay free on the disk of `directory`."""
        if self._keep_free_bytes is not None:
            return self._keep_free_bytes
        disk = os.statvfs(directory)
        return max(KEEP_FREE_BYTES, int(disk.f_blocks * disk.f_frsize * KEEP_FREE_SHARE))

    def _reserve(self, attempt: str, directory: Path, needed_bytes: int) -> None:
        disk = os.statvfs(directory)
        keep_bytes = self.keep_free_bytes(directory)
        free_bytes = disk.f_bavail * disk.f_frsize
        if free_bytes - needed_bytes < keep_bytes:
            raise _disk_full(attempt, needed_bytes, free_bytes, keep_bytes)

    def _failed(self, attempt: str, directory: Path, needed_bytes: int, error: OSError) -> MeshgpuError:
        if error.errno in _NO_SPACE:
            disk = os.statvfs(directory)
            return _disk_full(attempt, needed_bytes, disk.f_bavail * disk.f_frsize, 0)
        return MeshgpuError("cannot-write", f"cannot {attempt}: {error.strerror} ({error.filename or directory})")


def _disk_full(attempt: str, needed_bytes: int, free_bytes: int, keep_bytes: int) -> MeshgpuError:
    kept = f", of which {keep_bytes / 1e9:.1f} GB stay free" if keep_bytes else ""
    return MeshgpuError(
        "disk-full",
        f"cannot {attempt}: {needed_bytes / 1e9:.3f} GB needed, {free_bytes / 1e9:.3f} GB free{kept}",
        "free some disk on that machine, or choose another one with -m",
    )


@contextlib.contextmanager
def _creating(path: Path | str, mode: int) -> Iterator[int]:
    """A descriptor of a new file: nothing that is there already is written to, nor followed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _append(target: int, data: bytes, source: int) -> None:
    """Write `data`, which is what `source` holds, at the end of `target`; blocks are shared where the disk can."""
    done_bytes = 0
    if len(data) >= _CLONE_FROM_BYTES:
        with contextlib.suppress(OSError):  # another file system, or one that cannot: written below
            while done_bytes < len(data):
                copied = os.copy_file_range(source, target, len(data) - done_bytes, offset_src=done_bytes)
                if copied == 0:
                    break
                done_bytes += copied
    _write(target, memoryview(data)[done_bytes:])


def _write(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read(descriptor: int) -> bytes:
    data = os.read(descriptor, os.fstat(descriptor).st_size + 1)
    while more := os.read(descriptor, CHUNK_BYTES):
        data += more
    return data
