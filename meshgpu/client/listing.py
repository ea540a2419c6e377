"""Which paths of a directory travel with a job: what git would commit, or everything but the usual clutter."""

import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from meshgpu.client.ignore import IgnoreRules
from meshgpu.errors import MeshgpuError

IGNORE_FILE: Final = ".meshgpuignore"

ALWAYS_IGNORED: Final = (".git/", ".git")
"""History is not code that runs; in a worktree or submodule `.git` is a file."""

IGNORED_WITHOUT_GIT: Final = (
    *ALWAYS_IGNORED,
    *(".hg/", ".svn/", "__pycache__/", "*.pyc", ".venv/", "venv/", "node_modules/", ".tox/", ".nox/", ".DS_Store"),
    *(".mypy_cache/", ".pytest_cache/", ".ruff_cache/", ".ipynb_checkpoints/", ".eggs/"),
)
"""What tools make again by themselves and no `.gitignore` keeps out here; `!venv/` in IGNORE_FILE brings one back."""

GIT_DEADLINE_S: Final = 60.0
"""A work tree of a million files on a slow disk lists in less."""

_REDIRECTIONS: Final = frozenset({"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR"})
"""Set inside git hooks; they would make git list another repository."""


@dataclass(slots=True)
class Listing:
    """Relative paths with their lstat, unordered. empty: directories without entries."""

    files: dict[str, os.stat_result] = field(default_factory=dict)
    empty: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)

    def take(self, path: str, status: os.stat_result) -> None:
        if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
            self.files[path] = status
        else:
            self.warnings.append(f"{path} is left out: it is a socket, a pipe or a device")


def list_tree(root: str, private: str = "") -> Listing:
    """List `root` (absolute). Raises MeshgpuError `unreadable`, or `git` where git refuses to answer.

    private: relative path of a directory that never travels, whatever IGNORE_FILE says of it; "" for none.
    """
    listing = Listing()
    own = _own_rules(root)
    if private:
        own.append("/" + re.sub(r"([\\*?\[ ])", r"\\\1", private) + "/")  # the last rule decides
    clutter = IgnoreRules([*IGNORED_WITHOUT_GIT, *own])
    is_in_git = any((directory / ".git").exists() for directory in (Path(root), *Path(root).parents))
    if is_in_git and shutil.which("git"):
        _GitLister(root, IgnoreRules([*ALWAYS_IGNORED, *own]), clutter, listing).list_repository("")
        return listing
    if is_in_git:
        listing.warnings.append("git is not installed here: .gitignore is not applied")
    _walk(root, "", clutter, listing)
    return listing


def _own_rules(root: str) -> list[str]:
    path = Path(root, IGNORE_FILE)
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable(IGNORE_FILE, error) from error
    return text.removeprefix("\N{BOM}").split("\n")


def unreadable(path: str, error: OSError) -> MeshgpuError:
    return MeshgpuError(
        "unreadable",
        f"cannot read {path}: {error.strerror}",
        f"make it readable, or list it in {IGNORE_FILE}",
    )


# -- without git -----------------------------------------------------------------------------------------------------


def _walk(root: str, directory: str, rules: IgnoreRules, listing: Listing) -> None:
    pending = [directory]
    while pending:
        directory = pending.pop()
        is_empty = True
        for path, entry in _scan(root, directory):
            is_empty = False
            is_directory = entry.is_dir(follow_symlinks=False)
            if rules.ignores(path, is_directory=is_directory):
                continue
            if is_directory:
                pending.append(path)
            else:
                _take(root, path, listing)
        if is_empty and directory:
            listing.empty.add(directory)


def _scan(root: str, directory: str) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    """(relative path, entry) of what lies in `directory`."""
    prefix = f"{directory}/" if directory else ""
    try:
        with os.scandir(f"{root}/{directory}") as entries:
            for entry in entries:
                yield prefix + entry.name, entry
    except FileNotFoundError:
        return  # removed since it was listed
    except OSError as error:
        raise unreadable(directory or root, error) from error


def _take(root: str, path: str, listing: Listing) -> None:
    try:
        listing.take(path, os.lstat(f"{root}/{path}"))
    except (FileNotFoundError, NotADirectoryError):
        return  # tracked but deleted, or gone since it was listed
    except OSError as error:
        raise unreadable(path, error) from error


# -- with git --------------------------------------------------------------------------------------------------------


class _GitLister:
    """Lists the work tree `root` is or lies in, and the repositories inside it, each by its own rules.

    clutter: rules for directories that git has nothing to say about.
    """

    def __init__(self, root: str, rules: IgnoreRules, clutter: IgnoreRules, listing: Listing) -> None:
        self._root = root
        self._rules = rules
        self._clutter = clutter
        self._listing = listing
        self._real = {"": True}

    def list_repository(self, inner: str) -> None:
        """List `inner`, the relative path of a repository or, for "", of a directory of one."""
        top = f"{self._root}/{inner}".rstrip("/")
        names = _git(top, ["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        if names is None or (not names and _git_ignored(top, ["."])):
            _walk(self._root, inner, self._clutter, self._listing)
            return
        prefix = f"{inner}/" if inner else ""
        repositories = self._take_all(prefix + name for name in dict.fromkeys(names) if name not in ("", "./"))
        for path in repositories:
            if Path(self._root, path, ".git").exists():
                self.list_repository(path)
            else:
                _walk(self._root, path, self._clutter, self._listing)
        self._find_empty(inner, repositories)

    def _take_all(self, paths: Iterable[str]) -> list[str]:
        """Take the files among `paths`; returns the directories: submodules, and repositories that git leaves alone."""
        repositories: list[str] = []
        for name in paths:
            path = name.rstrip("/")
            # git also lists tracked files that now lie beneath a symlink.
            if not self._is_directory(path.rpartition("/")[0]):
                continue
            is_directory = name.endswith("/") or _is_real_directory(self._root, path)
            if self._rules.ignores(path, is_directory=is_directory):
                continue
            if is_directory:
                repositories.append(path)
            else:
                _take(self._root, path, self._listing)
        return repositories

    def _find_empty(self, inner: str, repositories: Sequence[str]) -> None:
        """Add the empty directories, which git does not list."""
        top = f"{self._root}/{inner}".rstrip("/")
        start = len(inner) + 1 if inner else 0
        bare = self._bare_directories(inner, repositories)
        ignored = _git_ignored(top, [path[start:] for path in bare])
        found = Listing()
        for path in bare:
            if path[start:] not in ignored:
                _walk(self._root, path, self._clutter, found)
        ignored = _git_ignored(top, [path[start:] for path in found.empty])
        self._listing.empty.update(path for path in found.empty if path[start:] not in ignored)

    def _bare_directories(self, inner: str, repositories: Sequence[str]) -> list[str]:
        """The topmost directories below `inner` that hold nothing listed; not read, as ignored ones are large."""
        occupied = {inner}
        for path in self._listing.files:
            parent = path.rpartition("/")[0]
            while parent not in occupied:
                occupied.add(parent)
                parent = parent.rpartition("/")[0]
        bare: list[str] = []
        pending = [inner]
        while pending:
            for path, entry in _scan(self._root, pending.pop()):
                if not entry.is_dir(follow_symlinks=False) or path in repositories:
                    continue
                if path in occupied:
                    pending.append(path)
                elif not self._rules.ignores(path, is_directory=True):
                    bare.append(path)
        return bare

    def _is_directory(self, path: str) -> bool:
        """Whether `path` and all above it are real directories, no symlinks."""
        known = self._real.get(path)
        if known is None:
            known = self._is_directory(path.rpartition("/")[0]) and _is_real_directory(self._root, path)
            self._real[path] = known
        return known


def _is_real_directory(root: str, path: str) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(f"{root}/{path}").st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, error) from error


def _git_ignored(directory: str, names: Sequence[str]) -> set[str]:
    """Those of `names`, relative to `directory`, that git ignores."""
    return set(_git(directory, ["check-ignore", "-z", "--stdin"], names) or ()) if names else set()


def _git(directory: str, arguments: Sequence[str], names: Sequence[str] = ()) -> list[str] | None:
    """NUL-separated output of git in `directory`; None where it is in no repository after all."""
    import subprocess  # only capture needs it, and every command of the CLI loads this package

    environment = {name: value for name, value in os.environ.items() if name not in _REDIRECTIONS}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=directory,
            env={**environment, "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"},
            input=b"\0".join(os.fsencode(name) for name in names),
            capture_output=True,
            timeout=GIT_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MeshgpuError("git", f"cannot list {directory}: git gave no answer for {GIT_DEADLINE_S:.0f} s") from error
    complaint = done.stderr.decode("utf-8", "replace").strip()
    if done.returncode > 1:
        if "not a git repository" in complaint:
            return None
        line = complaint.splitlines()[0] if complaint else f"git ended with {done.returncode}"
        raise MeshgpuError("git", f"cannot list {directory}: {line}", f"git -C {directory} status")
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]
