"""Brings files of a job here: never outside the destination, never half a file under its name."""

import filecmp
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from meshgpu.cli.progress import Progress
from meshgpu.cli.render import count, note, plain
from meshgpu.client.agent import AgentClient
from meshgpu.client.views import FileView
from meshgpu.errors import AgentUnreachable, MeshgpuError

PREFIX: Final = "runs/"
ENDS_ALL: Final = frozenset({"cannot-write", "no-answer"})
"""Errors after which the next file would fare no better."""


def parse_source(text: str) -> tuple[str, str]:
    """`runs/ID/DIR/FILE` as (ID, `DIR/FILE`); raises MeshgpuError `bad-request` for anything else."""
    job, _, path = text.removeprefix(PREFIX).partition("/")
    if not text.startswith(PREFIX) or not job:
        raise MeshgpuError(
            "bad-request", f"cannot read the place {text!r}: expected runs/ID or runs/ID/PATH", "meshgpu ps -a"
        )
    return job, path


def beneath(files: Iterable[FileView], path: str) -> list[FileView]:
    """The file `path`, or the files in the directory `path`; all for an empty one."""
    inside = path.rstrip("/")
    return [file for file in files if not inside or file["path"] == inside or file["path"].startswith(f"{inside}/")]


def inside(directory: Path, path: str) -> Path:
    """`path`, as another machine named it, beneath `directory`; raises MeshgpuError `unsafe-path` if it would leave it.

    Symlinks that lie there count: what they point to must be inside too.
    """
    parts = path.split("/")
    target = directory.joinpath(*parts)
    if "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise _unsafe(path, directory)
    if not target.parent.resolve().is_relative_to(directory.resolve()):
        raise _unsafe(path, directory)
    return target


def fetch(
    client: AgentClient, job: str, plan: list[tuple[FileView, Path]], place: Callable[[Path, Path], None]
) -> list[FileView]:
    """Bring each file to its path; returns those that came. `place(part, target)` moves a whole file to its name.

    A file that cannot be had is told and left out. Raises MeshgpuError where no other could be had either:
    `cannot-write` for what the disk refuses, `no-answer`, `agent-gone`; files that were whole by then stay.
    """
    came: list[FileView] = []
    errors: list[MeshgpuError] = []
    total_bytes = sum(file["size_bytes"] for file, _ in plan)
    progress = Progress(f"fetching {count(len(plan), 'file')}", total_bytes)
    try:
        for file, target in plan:
            try:
                _check_carriable(file["path"])
                _fetch_one(client.file(job, file["path"]), target, place, progress)
                came.append(file)
            except MeshgpuError as error:
                if isinstance(error, AgentUnreachable) or error.code in ENDS_ALL:
                    raise
                errors.append(error)
    finally:
        progress.close()
        for missed in errors:
            note(plain(missed.message))
    return came


def replace(part: Path, target: Path) -> None:
    """What `cp` does: the new file takes the name."""
    part.replace(target)


def keep_both(suffix: str, told: Callable[[str], None]) -> Callable[[Path, Path], None]:
    """What `run --fetch` does: a different file that lies there stays, the new one becomes `<name>.<suffix>`."""

    def place(part: Path, target: Path) -> None:
        if not os.path.lexists(target):
            part.replace(target)
        elif target.is_file() and filecmp.cmp(part, target, shallow=False):
            part.unlink()
        else:
            beside = target.with_name(f"{target.name}.{suffix}")
            part.replace(beside)
            told(f"{target} is different here and stays; the job's is {beside}")

    return place


def _check_carriable(path: str) -> None:
    """Raise MeshgpuError for a name whose bytes are not UTF-8 (lone surrogates, PEP 383): no message carries it."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise MeshgpuError("unknown-file", f"cannot fetch {path!r}: its name is not UTF-8") from error


def _fetch_one(blocks: Iterable[bytes], target: Path, place: Callable[[Path, Path], None], progress: Progress) -> None:
    part = target.with_name(f".meshgpu-{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as out:
                for block in blocks:
                    out.write(block)
                    progress.add(len(block))
            place(part, target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise MeshgpuError(
            "cannot-write", f"cannot write {target}: {error.strerror}", f"ls -ld {target.parent}"
        ) from error


def _unsafe(path: str, directory: Path) -> MeshgpuError:
    return MeshgpuError("unsafe-path", f"refused to write {path!r}: it would leave {directory}", None)
