"""A directory as content: its manifest, and the chunks that its files are made of."""

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import Digest, digest

CHUNK_BYTES: Final = 4 * 2**20
"""Files are cut at multiples of this: large enough for line rate, small enough to resume cheaply."""

DEPTH_LIMIT: Final = 64
PATH_LIMIT: Final = 1_024
"""Directories in, and characters of, one path: more than any project has, less than what recursion or PATH_MAX bear."""

MANIFEST_LIMIT_BYTES: Final = 64 * 2**20
"""A manifest of some 400,000 files."""

TREE_LIMIT_BYTES: Final = 2 * 10**9
"""A working directory above this is refused: it is data, not code."""

TREE_LIMIT_FILES: Final = 100_000
"""A working directory of more files is refused: its manifest (150 bytes a file) would no longer be small."""

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class FileKind(StrEnum):
    FILE = "file"
    SYMLINK = "symlink"
    DIRECTORY = "directory"
    """Only empty directories are listed; the others follow from their files."""


@dataclass(frozen=True, slots=True)
class TreeFile:
    """One path of a tree, relative, with `/`, never `..`, undecodable bytes as surrogates (PEP 383).

    chunks: digests of the file's pieces of CHUNK_BYTES, the last one shorter. target: where a symlink points.
    """

    path: str
    kind: FileKind
    executable: bool = False
    size_bytes: int = 0
    chunks: tuple[Digest, ...] = ()
    target: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """All files of a tree, ordered by path. Its canonical bytes are themselves a chunk; their digest names the tree."""

    files: tuple[TreeFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def chunks(self) -> dict[Digest, int]:
        """{digest: bytes} of every chunk, each once, in manifest order."""
        found: dict[Digest, int] = {}
        for file in self.files:
            for index, chunk in enumerate(file.chunks):
                found[chunk] = min(CHUNK_BYTES, file.size_bytes - index * CHUNK_BYTES)
        return found

    def encode(self) -> bytes:
        """Canonical JSON: equal manifests have equal bytes."""
        rows = [
            [file.path, file.kind.value, int(file.executable), file.size_bytes, list(file.chunks), file.target]
            for file in sorted(self.files, key=lambda file: file.path)
        ]
        document = {"version": 1, "files": rows}
        return json.dumps(document, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()

    @property
    def digest(self) -> Digest:
        return digest(self.encode())


def is_digest(text: str) -> bool:
    """Whether `text` has the form of a Digest: 64 lower-case hexadecimal characters, safe as a file name."""
    return _DIGEST.fullmatch(text) is not None


def decode_manifest(data: bytes) -> Manifest:
    """Read canonical bytes; raises MeshgpuError `bad-manifest` for anything that could leave its directory.

    Bytes that `Manifest.encode` would not have written are refused too: a tree has one name.
    """
    try:
        document = json.loads(data)
        if document["version"] != 1:
            raise MeshgpuError("bad-manifest", f"cannot read a tree of version {document['version']}: expected 1")
        files = tuple(
            TreeFile(path, FileKind(kind), executable == 1, size, tuple(Digest(c) for c in chunks), target)
            for path, kind, executable, size, chunks, target in document["files"]
        )
        canonical = _are_typed(files) and Manifest(files).encode() == data
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MeshgpuError("bad-manifest", f"cannot read a tree's manifest: {error}") from error
    if not canonical:
        raise MeshgpuError("bad-manifest", "cannot read a tree's manifest: its bytes are not in canonical form")
    _check_paths(files)
    for file in files:
        _check_content(file)
    return Manifest(files)


def _are_typed(files: tuple[TreeFile, ...]) -> bool:
    return all(
        type(file.size_bytes) is int and all(type(text) is str for text in (file.path, file.target, *file.chunks))
        for file in files
    )


def _check_paths(files: tuple[TreeFile, ...]) -> None:
    """No path leaves the tree, none appears twice, and none lies beneath a file or a symlink."""
    leaves = {file.path for file in files}
    if len(leaves) != len(files):
        raise MeshgpuError("bad-manifest", "cannot use a tree: it names a path twice")
    for file in files:
        parts = file.path.split("/")
        if len(parts) > DEPTH_LIMIT or len(file.path) > PATH_LIMIT:
            raise MeshgpuError("bad-manifest", f"cannot use a tree: its path {file.path[:60]!r}… is too long")
        if not _is_file_name(file.path) or any(part in ("", ".", "..") for part in parts):
            raise MeshgpuError("bad-manifest", f"cannot use a tree: its path {file.path!r} is not inside it")
        if any("/".join(parts[:depth]) in leaves for depth in range(1, len(parts))):
            raise MeshgpuError(
                "bad-manifest", f"cannot use a tree: {file.path!r} lies beneath something that is no directory"
            )


def _check_content(file: TreeFile) -> None:
    """Only files have content, in chunks that add up to their size; only symlinks have a target."""
    pieces = -(-file.size_bytes // CHUNK_BYTES)
    if file.size_bytes < 0 or len(file.chunks) != pieces:
        raise MeshgpuError(
            "bad-manifest", f"cannot use a tree: {file.path!r} has {len(file.chunks)} chunks, expected {pieces}"
        )
    if not all(is_digest(chunk) for chunk in file.chunks):
        raise MeshgpuError("bad-manifest", f"cannot use a tree: {file.path!r} names a chunk by no SHA-256")
    is_symlink = file.kind is FileKind.SYMLINK
    if (file.kind is not FileKind.FILE and (pieces or file.executable)) or is_symlink != _is_file_name(file.target):
        raise MeshgpuError("bad-manifest", f"cannot use a tree: {file.path!r} is no {file.kind.value}")


def _is_file_name(text: str) -> bool:
    """Whether the kernel takes `text` as a path: not empty, no NUL, and bytes in UTF-8 or as PEP 383 surrogates."""
    try:
        return bool(text) and "\0" not in text and bool(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return False
