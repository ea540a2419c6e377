"""Trees that jobs made, which may be as deep as they like: looked through and removed without recursion."""

import contextlib
import itertools
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ENTRY_LIMIT: Final = 1_000_000
"""Directory entries that are looked at: more are no results, and each takes memory until the job has ended."""


def files_below(top: Path) -> Iterator[tuple[str, os.stat_result]]:
    """(relative path, facts) of regular files, in order; links are not followed. Blocks.

    Left out is what a path cannot name any more (PATH_MAX), what cannot be read, and what comes after ENTRY_LIMIT.
    """
    left, seen = [""], 0
    while left:
        directory = left.pop()
        inner: list[str] = []
        with contextlib.suppress(OSError), os.scandir(f"{top}/{directory}") as entries:
            for entry in sorted(itertools.islice(entries, ENTRY_LIMIT - seen), key=lambda entry: entry.name):
                seen += 1
                with contextlib.suppress(OSError):
                    facts = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(facts.st_mode):
                        yield f"{directory}{entry.name}", facts
                    elif stat.S_ISDIR(facts.st_mode):
                        inner.append(f"{directory}{entry.name}/")
        left += reversed(inner)


def remove_tree(top: Path) -> None:
    """Remove a directory with all that lies below it; what cannot be removed is left. Blocks.

    Directories move up to `top` before they are emptied: no path, stack or set of descriptors grows with their depth.
    """
    if top.is_symlink():
        return
    mark = f".{secrets.token_hex(8)}-"
    serial = itertools.count()
    with contextlib.suppress(OSError):
        top.chmod(0o700)
    left = [str(top)]
    while left:
        directory = left.pop()
        with contextlib.suppress(OSError):
            for name, descriptor in _unlinked(directory, mark):
                moved = f"{top}/{mark}{next(serial)}"
                with contextlib.suppress(OSError):
                    os.chmod(name, 0o700, dir_fd=descriptor)  # or it could be neither moved nor opened
                    os.rename(name, moved, src_dir_fd=descriptor)
                    left.append(moved)
            os.rmdir(directory)  # noqa: PTH106 - a str, of which there may be many
    with contextlib.suppress(OSError):
        top.rmdir()


def _unlinked(directory: str, mark: str) -> Iterator[tuple[str, int]]:
    """Unlink what is no directory; yield what is, as (name, descriptor of `directory`), unless `mark` begins it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with os.scandir(descriptor) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if not entry.name.startswith(mark):
                        yield entry.name, descriptor
                else:
                    with contextlib.suppress(OSError):
                        os.unlink(entry.name, dir_fd=descriptor)
    finally:
        os.close(descriptor)
