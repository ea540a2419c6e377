"""What a job wants installed: read from its spec and from the lock and requirements files of its tree.

The tree may be hostile. Requirements are read here, included files too, and uv is given what this module wrote: what
the one understands in another way than the other cannot slip through between them. Reading blocks, up to seconds.
"""

import itertools
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
_OPTION: Final = re.compile(r"(--[a-z-]+|-[a-z])(?:=| )?(.*)")
_INCLUDED: Final = re.compile(r"[^\s'\"$:\\]+")
"""A path that uv cannot take for anything else: neither quoted nor an address."""

_SAFE_OPTION: Final = re.compile(r"--pre|--prefer-binary|--require-hashes|--only-binary[= ][A-Za-z0-9:._,-]+")
_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_CLAUSE: Final = r"(?:[<>]=?|[=!~]=|===) ?[0-9A-Za-z.*+!_-]+"
_SAFE_REQUIREMENT: Final = re.compile(
    rf"(?P<name>{_NAME}) ?(?:\[[A-Za-z0-9._, -]*\])? ?(?:{_CLAUSE}(?: ?, ?{_CLAUSE})*)?"
    r"(?: ?;[A-Za-z0-9_.'\"<>=!~() ,*+-]+)?"
)
"""Name, extras, versions and marker of PEP 508, the lines that neither name a place nor a variable."""
_SAFE_HASH: Final = re.compile(r"(?:md5|sha256|sha384|sha512):[0-9a-f]+ ?")
_ARCHIVE_NAME: Final = re.compile(r".*\.(?:whl|egg|zip|tar|tgz|tbz|txz|tlz|gz|bz2|xz|lz|lzma|zst)", re.IGNORECASE)
"""A name that uv takes for a file."""
_LINE_CHARACTERS: Final = 1000
"""The longest safe requirement without its hashes; people write up to 200."""

_FILE_LIMIT_BYTES: Final = 256 * 2**10
"""A hundred times what people write."""
_LOCK_LIMIT_BYTES: Final = 4 * 2**20
"""The largest locks are a few megabytes."""
_FILES_LIMIT: Final = 32
_TOML_LIMIT: Final = 100_000_000
"""Steps through the parts of dotted keys: two seconds, several times what the largest locks take."""

_VERSION: Final = re.compile(r"(?:cpython[-@]?)?\d+(?:\.\d+)*")
"""What `.python-version` may say; other tools keep names of their own environments there."""
_RELEASE: Final = r"\d{1,4}(?:\.\d{1,4}){0,2}(?:(?:a|b|rc)\d{1,3})?"
_PYTHON_CLAUSE: Final = rf" *(?:[<>]=?|[=!~]=) *{_RELEASE}(?:\.\*)? *"
_PYTHON: Final = re.compile(rf"(?:cpython[-@]?)?{_RELEASE}|{_PYTHON_CLAUSE}(?:,{_PYTHON_CLAUSE})*")
"""A version or a specifier of PEP 440: uv runs what else it is asked to find, as it takes it for a path."""
_PYTHON_CHARACTERS: Final = 100


class Origin(StrEnum):
    NOTHING = "nothing"
    TEXT = "text"
    FILE = "file"
    PYLOCK = "pylock"
    UV_LOCK = "uv-lock"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to install, and all that it follows from.

    source: what people know it by. text and constraints: lines for uv, of all files read. unsafe: the first of them
    that may run code while it is installed, read this machine's files or send off variables. files: (path, content) of
    locks and of settings. options: (name, value or empty) of index options in the text. python: a version or range,
    empty for any, and python_from says who asks for it.
    """

    source: str
    origin: Origin
    text: str = ""
    constraints: str = ""
    unsafe: str = ""
    files: tuple[tuple[str, str], ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    python: str = ""
    python_from: str = ""

    @property
    def has_hashes(self) -> bool:
        return "--hash" in self.text

    @property
    def reads_local_files(self) -> bool:
        """Whether packages come from files of the tree, which change under the same name and version."""
        if any(option in ("-f", "--find-links") and "://" not in value for option, value in self.options):
            return True
        return any(LOCAL_LINE.fullmatch(line) for line in self.text.splitlines())


def find_wanted(spec: JobSpec, tree: Path) -> Wanted:
    """Raises MeshgpuError `environment` for files that cannot be read or lead out of the tree. Blocks."""
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


def unsafe_source(wanted: Wanted) -> str:
    """The first package of a lock that does not come as a wheel from the web, empty for none. Blocks.

    Members of the project are passed over: they are not installed. Raises MeshgpuError `environment`.
    """
    for name, text in wanted.files if wanted.origin in (Origin.UV_LOCK, Origin.PYLOCK) else ():
        if name in _SETTINGS:
            continue
        metadata = _toml(name, text)
        for package in _tables(metadata.get("package")) + _tables(metadata.get("packages")):
            if not _is_from_web(package):
                return str(package.get("name", ""))
    return ""


def _is_from_web(package: dict[str, object]) -> bool:
    if any(key in package for key in ("vcs", "directory", "archive")):
        return False
    if isinstance(source := package.get("source"), dict):
        if source.keys() <= {"virtual", "editable", "directory"}:
            return True
        if source.keys() != {"registry"} or not _is_address(source["registry"]):
            return False
    wheels = _tables(package.get("wheels"))
    return all("path" not in wheel and _is_address(wheel.get("url")) for wheel in wheels)


def _is_address(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"https?://[^\s$]+", value) is not None


def _tables(value: object) -> list[dict[str, object]]:
    return [table for table in value if isinstance(table, dict)] if isinstance(value, list) else []


def _from_project(spec: JobSpec, tree: Path) -> Wanted:
    project = _read(tree, "pyproject.toml")
    python = _requires_python(project)
    if project is not None and (lock := _read(tree, "uv.lock", _LOCK_LIMIT_BYTES)) is not None:
        files = (("pyproject.toml", project), ("uv.lock", lock))
        return _with_python(Wanted("uv.lock", Origin.UV_LOCK, files=files), python, "pyproject.toml")
    if (lock := _read(tree, "pylock.toml", _LOCK_LIMIT_BYTES)) is not None:
        wanted = Wanted("pylock.toml", Origin.PYLOCK, files=(("pylock.toml", lock), *_settings(tree)))
        return _with_python(wanted, python, "pyproject.toml")
    if (text := _read(tree, REQUIREMENTS_FILE)) is not None:
        wanted = replace(_from_text(tree, REQUIREMENTS_FILE, text, REQUIREMENTS_FILE), origin=Origin.FILE)
        return _with_python(wanted, python, "pyproject.toml")
    return _from_script(spec, tree) or Wanted("empty", Origin.NOTHING)


def _from_text(tree: Path, source: str, text: str, path: str = "") -> Wanted:
    reader = _Reader(tree)
    reader.read(path, text)
    return reader.wanted(source)


def _from_script(spec: JobSpec, tree: Path) -> Wanted | None:
    """The inline metadata of the script that the command runs."""
    try:
        words = shlex.split(spec.command[0]) if spec.shell else list(spec.command)
    except ValueError:  # a quote that the shell may understand better
        return None
    script = next((word for word in words if word.endswith(".py")), None)
    block = _script_block(_read(tree, script) or "") if script else None
    if script is None or block is None:
        return None
    metadata = _toml(script, block, "its inline metadata is no TOML")
    dependencies = metadata.get("dependencies", [])
    if not isinstance(dependencies, list):
        raise _unusable(script, "`dependencies` in its inline metadata is no list")
    wanted = _from_text(tree, script, "\n".join(str(dependency) for dependency in dependencies))
    return _with_python(wanted, str(metadata.get("requires-python", "")), script)


def _script_block(text: str) -> str | None:
    """Inline metadata as PEP 723 finds it: the first block of type `script`, up to its last closing line."""
    lines = iter(text.splitlines())
    if "# /// script" not in lines:  # takes all lines up to it
        return None
    block = list(itertools.takewhile(lambda line: line == "#" or line.startswith("# "), lines))
    while block and block.pop() != "# ///":
        pass
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in block) if block else None


def _requires_python(project: str | None) -> str:
    table = _toml("pyproject.toml", project or "").get("project", {})
    return str(table.get("requires-python", "")) if isinstance(table, dict) else ""


def _with_python(wanted: Wanted, python: str, python_from: str) -> Wanted:
    if not python:
        return wanted
    if len(python) > _PYTHON_CHARACTERS or not _PYTHON.fullmatch(python):
        said = python[:_PYTHON_CHARACTERS]
        raise _unusable(python_from, f"it asks for Python {said!r}, expected a version or a range such as '>=3.11'")
    return replace(wanted, python=python, python_from=python_from)


# -- requirements files ----------------------------------------------------------------------------------------------


class _Reader:
    """Follows `-r` and `-c`, and collects what pinned requirements no longer say: where to get them from."""

    def __init__(self, tree: Path) -> None:
        self._tree = tree
        self._included: set[tuple[str, bool]] = set()
        self._lines: list[str] = []
        self._constraints: list[str] = []
        self._options: list[tuple[str, str]] = []
        self._unsafe = ""

    def wanted(self, source: str) -> Wanted:
        text, constraints = "\n".join(self._lines), "\n".join(self._constraints)
        files, options = _settings(self._tree), tuple(self._options)
        return Wanted(source, Origin.TEXT, text, constraints, self._unsafe, files, options)

    def read(self, path: str, text: str, *, constrains: bool = False) -> None:
        """Take in `text`, the content of `path`; an empty path is none in the tree."""
        self._included.add((path, constrains))
        if len(self._included) > _FILES_LIMIT:
            raise _unusable(path, f"more than {_FILES_LIMIT} files are included")
        if len(text) > _FILE_LIMIT_BYTES:
            raise _unusable(path or "the requirements", f"it is larger than {_FILE_LIMIT_BYTES} bytes")
        for line in re.sub(r"\\\r?\n", " ", text).splitlines():
            bare = " ".join(re.sub(r"(^|\s)#.*", "", line).split())
            if bare:
                self._take(path, bare, constrains=constrains)

    def _take(self, path: str, line: str, *, constrains: bool) -> None:
        option, value = _split_option(line)
        if option in _INCLUDE_OPTIONS and _INCLUDED.fullmatch(value):
            self._include(path, value, constrains=constrains or option in ("-c", "--constraint"))
            return
        if option in _INDEX_OPTIONS:
            self._options.append((option, value))
        if not self._unsafe and not _is_safe(line):
            self._unsafe = line
        (self._constraints if constrains and not option else self._lines).append(line)

    def _include(self, path: str, name: str, *, constrains: bool) -> None:
        inner = os.path.normpath(Path(path).parent / name)
        if (inner, constrains) in self._included:
            return
        text = _read(self._tree, inner)
        if text is None:
            raise _unusable(path or name, f"it includes {name}, which is not in the directory that was shipped")
        self.read(inner, text, constrains=constrains)


def _is_safe(line: str) -> bool:
    """Whether a line cannot run code while it is installed, read files of the machine or send off its variables."""
    requirement, *hashes = re.split(r" --hash[= ]", line)
    found = _SAFE_REQUIREMENT.fullmatch(requirement) if len(requirement) <= _LINE_CHARACTERS else None
    if found is None:
        return _SAFE_OPTION.fullmatch(line) is not None
    is_plain = not _ARCHIVE_NAME.fullmatch(found["name"]) and " -" not in requirement
    return is_plain and all(_SAFE_HASH.fullmatch(value) for value in hashes)


def _split_option(line: str) -> tuple[str, str]:
    """(option, value) of `--option value`, `--option=value` or `-ovalue`; both empty for what is no option."""
    found = _OPTION.fullmatch(line)
    if found is None:
        return "", ""
    value = found[2].strip()
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return found[1], value[1:-1] if is_quoted else value


# -- files -----------------------------------------------------------------------------------------------------------


def _settings(tree: Path) -> tuple[tuple[str, str], ...]:
    """Files of the project that change what the same requirements resolve to."""
    return tuple((name, text) for name in _SETTINGS if (text := _read(tree, name)) is not None)


def _read(tree: Path, name: str, limit_bytes: int = _FILE_LIMIT_BYTES) -> str | None:
    """The text of a file of the tree; None where there is none, or where it lies outside through a symlink."""
    try:
        path = Path(os.path.realpath(tree / name))
        if not path.is_relative_to(os.path.realpath(tree)) or not path.is_file():
            return None
        if path.stat().st_size > limit_bytes:
            raise _unusable(name, f"it is larger than {limit_bytes} bytes")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise _unusable(name, f"it cannot be read: {error}") from error


def _toml(name: str, text: str, complaint: str = "it is no TOML") -> dict[str, object]:
    """Raises MeshgpuError `environment`, also for what would take the parser minutes."""
    dots = [line.count(".") + 1 for line in text.split("\n")]
    deepest = max(dots)
    if sum(count * (count + deepest) for count in dots) > _TOML_LIMIT:  # the cost of dotted keys under dotted tables
        raise _unusable(name, "its keys are too deep")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unusable(name, f"{complaint}: {error}") from error


def _unusable(name: str, reason: str) -> MeshgpuError:
    return MeshgpuError("environment", f"cannot build the environment from {name}: {reason}")
