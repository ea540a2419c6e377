"""What a job wants installed: read from its spec and from the lock and requirements files of its tree."""

import os
import re
import shlex
import tomllib
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

from meshgpu.errors import MeshgpuError
from meshgpu.model.job import JobSpec

REQUIREMENTS_FILE: Final = "requirements.txt"

_SETTINGS: Final = ("pyproject.toml", "uv.toml")
"""Files in a project that uv reads its index settings from."""

LOCAL_LINE: Final = re.compile(r"-e\s.*|(\.{1,2}(/.*)?|/.*|file:.*|\S+ @ file:.*)")
"""A requirement that is a file or a directory of the machine."""

_INDEX_OPTIONS: Final = frozenset({"-i", "--index-url", "--extra-index-url", "-f", "--find-links", "--no-index"})
_INCLUDE_OPTIONS: Final = frozenset({"-r", "--requirement", "-c", "--constraint"})
_UNSAFE: Final = ("--no-binary", "${")

_FILE_LIMIT_BYTES: Final = 16 * 2**20
"""The largest locks are a few megabytes; what is above is no text that somebody wrote."""

_SCRIPT_BLOCK: Final = re.compile(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$")
"""Inline metadata, the expression of PEP 723 for blocks of type `script`."""

_VERSION: Final = re.compile(r"(?:cpython[-@]?)?\d+(?:\.\d+)*")
"""What `.python-version` may say; other tools keep names of their own environments there."""


class Origin(StrEnum):
    NOTHING = "nothing"
    TEXT = "text"
    FILE = "file"
    PYLOCK = "pylock"
    UV_LOCK = "uv-lock"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to install, and all that it follows from.

    source: what people know it by. text: requirements, for TEXT. files: (path, content) of all that was read. options:
    (name, value or empty) of index options in requirements files. python: a version or range, empty for any, and
    python_from says who asks for it.
    """

    source: str
    origin: Origin
    text: str = ""
    files: tuple[tuple[str, str], ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    python: str = ""
    python_from: str = ""

    @property
    def requirements(self) -> str:
        """The text of all requirements, included files too."""
        return "\n".join([self.text, *(text for name, text in self.files if name not in _SETTINGS)])

    @property
    def has_hashes(self) -> bool:
        return "--hash" in self.requirements

    @property
    def unsafe_words(self) -> list[str]:
        """What lets requirements run code while they are installed, or send off variables of the agent."""
        return [word for word in _UNSAFE if word in self.requirements] if self.origin is not Origin.UV_LOCK else []

    @property
    def reads_local_files(self) -> bool:
        """Whether packages come from files of the tree, which change under the same name and version."""
        if any(option in ("-f", "--find-links") and "://" not in value for option, value in self.options):
            return True
        return any(LOCAL_LINE.fullmatch(line.strip()) for line in self.requirements.splitlines())


def find_wanted(spec: JobSpec, tree: Path) -> Wanted:
    """Raises MeshgpuError `environment` for files that cannot be read or lead out of the tree."""
    request = spec.environment
    if request.pip or request.requirements:
        sources = ["--pip-req"] * bool(request.requirements) + ["--pip"] * bool(request.pip)
        wanted = _from_text(tree, " and ".join(sources), "\n".join([request.requirements, *request.pip]).strip())
    elif request.from_project:
        wanted = _from_project(spec, tree)
    else:
        wanted = Wanted("empty", Origin.NOTHING)
    pinned = (_read(tree, ".python-version") or "").split()[:1] if request.from_project else []
    if pinned and _VERSION.fullmatch(pinned[0]):
        return _with_python(wanted, pinned[0], ".python-version")
    return wanted


def _from_project(spec: JobSpec, tree: Path) -> Wanted:
    project = _read(tree, "pyproject.toml")
    python = _requires_python(project)
    if project is not None and (lock := _read(tree, "uv.lock")) is not None:
        files = (("pyproject.toml", project), ("uv.lock", lock))
        return _with_python(Wanted("uv.lock", Origin.UV_LOCK, files=files), python, "pyproject.toml")
    if (lock := _read(tree, "pylock.toml")) is not None:
        wanted = Wanted("pylock.toml", Origin.PYLOCK, files=(("pylock.toml", lock), *_settings(tree)))
        return _with_python(wanted, python, "pyproject.toml")
    if (text := _read(tree, REQUIREMENTS_FILE)) is not None:
        reader = _Reader(tree)
        reader.read(REQUIREMENTS_FILE, text)
        wanted = reader.wanted(REQUIREMENTS_FILE, Origin.FILE)
        return _with_python(wanted, python, "pyproject.toml")
    return _from_script(spec, tree) or Wanted("empty", Origin.NOTHING)


def _from_text(tree: Path, source: str, text: str) -> Wanted:
    reader = _Reader(tree)
    reader.read("", text)
    return reader.wanted(source, Origin.TEXT, text)


def _from_script(spec: JobSpec, tree: Path) -> Wanted | None:
    """The inline metadata of the script that the command runs."""
    try:
        words = shlex.split(spec.command[0]) if spec.shell else list(spec.command)
    except ValueError:  # a quote that the shell may understand better
        return None
    script = next((word for word in words if word.endswith(".py")), None)
    found = _SCRIPT_BLOCK.search(f"{_read(tree, script) or ''}\n") if script else None
    if script is None or found is None:
        return None
    lines = found["content"].splitlines()
    try:
        metadata = tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))
    except tomllib.TOMLDecodeError as error:
        raise _unusable(script, f"its inline metadata is no TOML: {error}") from error
    dependencies = metadata.get("dependencies", [])
    if not isinstance(dependencies, list):
        raise _unusable(script, "`dependencies` in its inline metadata is no list")
    wanted = _from_text(tree, script, "\n".join(str(dependency) for dependency in dependencies))
    return _with_python(wanted, str(metadata.get("requires-python", "")), script)


def _requires_python(project: str | None) -> str:
    try:
        table = tomllib.loads(project or "").get("project", {})
    except tomllib.TOMLDecodeError:
        return ""  # uv explains it better, where it needs the file at all
    return str(table.get("requires-python", "")) if isinstance(table, dict) else ""


def _with_python(wanted: Wanted, python: str, python_from: str) -> Wanted:
    return replace(wanted, python=python, python_from=python_from) if python else wanted


# -- requirements files ----------------------------------------------------------------------------------------------


class _Reader:
    """Follows `-r` and `-c`, and collects what pinned requirements no longer say: where to get them from."""

    def __init__(self, tree: Path) -> None:
        self._tree = tree
        self._files: dict[str, str] = {}
        self._options: list[tuple[str, str]] = []

    def wanted(self, source: str, origin: Origin, text: str = "") -> Wanted:
        files = (*self._files.items(), *_settings(self._tree))
        return Wanted(source, origin, text, files, tuple(self._options))

    def read(self, path: str, text: str) -> None:
        """Take in `text`, the content of `path`; an empty path is none in the tree."""
        if path:
            self._files[path] = text
        for line in text.replace("\\\n", " ").splitlines():
            if not line.lstrip().startswith("-"):
                continue
            option, value = _split_option(line)
            if option in _INDEX_OPTIONS:
                self._options.append((option, value))
            elif option in _INCLUDE_OPTIONS and "://" not in value:
                self._include(path, value)

    def _include(self, path: str, name: str) -> None:
        inner = os.path.normpath(Path(path).parent / name)
        if inner in self._files:
            return
        text = _read(self._tree, inner)
        if text is None:
            raise _unusable(path or name, f"it includes {name}, which is not in the directory that was shipped")
        self.read(inner, text)


def _split_option(line: str) -> tuple[str, str]:
    """(option, value) of `--option value`, `--option=value` or `-ovalue`."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return "", ""
    option, equals, value = words[0].partition("=") if words else ("", "", "")
    if option.startswith("--"):
        return option, value if equals else "".join(words[1:2])
    rest = words[0][2:] if words else ""
    return option[:2], rest or "".join(words[1:2])


def _settings(tree: Path) -> tuple[tuple[str, str], ...]:
    """Files of the project that change what the same requirements resolve to."""
    return tuple((name, text) for name in _SETTINGS if (text := _read(tree, name)) is not None)


def _read(tree: Path, name: str) -> str | None:
    """The text of a file of the tree; None where there is none, or where it lies outside through a symlink."""
    try:
        path = Path(os.path.realpath(tree / name))
        if not path.is_relative_to(os.path.realpath(tree)) or not path.is_file():
            return None
        if path.stat().st_size > _FILE_LIMIT_BYTES:
            raise _unusable(name, f"it is larger than {_FILE_LIMIT_BYTES} bytes")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise _unusable(name, f"it cannot be read: {error}") from error


def _unusable(name: str, reason: str) -> MeshgpuError:
    return MeshgpuError("environment", f"cannot build the environment from {name}: {reason}")
