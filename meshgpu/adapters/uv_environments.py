"""Environments port over uv: Python environments that are built once for each (user, lock) and kept."""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

import uv

from meshgpu.adapters.requirements import LOCAL_LINE, REQUIREMENTS_FILE, Origin, Wanted, find_wanted
from meshgpu.errors import MeshgpuError
from meshgpu.model.job import AttemptPlan
from meshgpu.ports import Environment

BUILD_DEADLINE_S: Final = 1800.0
"""A CUDA build of PyTorch over a slow office line takes ten minutes; what takes longer hangs."""

TAG_CHARACTERS: Final = 4
KEY_CHARACTERS: Final = 32
"""128 bits of a digest: short, as the path stands in the first line of every console script."""

COMPLETE: Final = ".complete"
"""Written into an environment last; one without it is what a crash left."""

_FORMAT: Final = 1
"""Raised when environments are built in another way: none of before is used again."""

_DROPPED: Final = frozenset(
    {"VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP"}
    | {"UV_PYTHON", "UV_SYSTEM_PYTHON", "UV_PROJECT", "UV_PROJECT_ENVIRONMENT", "UV_WORKING_DIRECTORY", "UV_TARGET"}
    | {"UV_LOCKED", "UV_FROZEN", "UV_CONSTRAINT", "UV_OVERRIDE", "UV_REQUIRE_HASHES"}
)
"""Variables of the agent's own environment that would make uv work on another one."""

_FENCED_KEEP: Final = re.compile(r"PATH|HOME|TMPDIR|LANG|LC_.*|SSL_CERT_.*|(?i:(http|https|all|no)_proxy)|UV_.*")
"""What uv gets to see for another user's job: requirements may name variables and send them anywhere."""

_NOISE: Final = (
    "warning:",
    "Using ",
    "Creating ",
    "Activate ",
    "Resolved ",
    "Downloading ",
    "Downloaded ",
    "Building ",
)
_WORTH_TELLING: Final = ("Downloading ", "Building ", "Prepared ")
_ERROR_LINES: Final = 6
_LINE_CHARACTERS: Final = 400

_ARCHIVE: Final = re.compile(r".*\.(whl|tar\.gz|zip|tar\.bz2|tgz)(#\S*)?(\s*;.*)?")

Wrap = Callable[[Sequence[str], Path], Sequence[str]]
"""(argv, tree) -> argv that runs it shut in: it may read the tree, and write below the directory of environments."""


class UvEnvironments:
    """Keeps environments below `directory`, made of the interpreter `python` where nothing asks for another.

    Requirements without a lock are resolved once: the same text gives the same environment from then on.

    wrap shuts in builds for fenced plans. Without it these install wheels only: no code of theirs runs before the job.
    Packages are hard links into uv's cache where the disk allows, so a job of another user must see them read-only.
    """

    def __init__(
        self, directory: Path, uv_path: Path | None = None, python: Path | None = None, wrap: Wrap | None = None
    ) -> None:
        self._built = directory / "built"
        self._known = directory / "known"
        self._cache = directory / "cache"
        self._uv = uv_path or Path(uv.find_uv_bin())
        self._python = python or Path(getattr(sys, "_base_executable", "") or sys.executable)
        self._wrap = wrap
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        for made in (self._built, self._known):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in self._built.iterdir():
            if not (left / COMPLETE).exists():
                shutil.rmtree(left, ignore_errors=True)

    async def build(self, plan: AttemptPlan, tree: Path, progress: Callable[[str], None]) -> Environment:
        """The environment that the plan's spec asks for; a known one takes a few file reads and no process.

        Raises MeshgpuError `environment`. Cancelling it ends uv and all its children, and leaves nothing behind.
        """
        wanted = find_wanted(plan.spec, tree)
        try:
            async with asyncio.timeout(BUILD_DEADLINE_S):
                return await self._find_or_build(plan, tree, wanted, progress)
        except TimeoutError as error:
            raise _failure(wanted, f"it was not ready after {BUILD_DEADLINE_S / 60:.0f} min") from error
        except OSError as error:
            raise _failure(wanted, f"{error.strerror}: {error.filename}") from error

    async def _find_or_build(
        self, plan: AttemptPlan, tree: Path, wanted: Wanted, progress: Callable[[str], None]
    ) -> Environment:
        if plan.fenced and wanted.unsafe_words:
            words = " and ".join(wanted.unsafe_words)
            raise _failure(wanted, f"requirements with {words} are refused on another user's machine")
        fingerprint = self._fingerprint(plan, wanted)
        async with self._lock(fingerprint):
            key = self._key_of(fingerprint)
            if key is not None and self._is_complete(key):
                return self._environment(key, wanted, cached=True)
            build = _Build(self._uv_for(plan), tree, wanted, progress)
            python = await build.interpreter(self._python)
            lock = await build.resolve(python)
            key = _key(plan, wanted, python, lock)
            async with self._lock(key):
                cached = self._is_complete(key)
                if not cached:
                    await self._make(build, key, python, lock)
            self._remember(fingerprint, key)
            return self._environment(key, wanted, cached=cached)

    async def _make(self, build: "_Build", key: str, python: Path, lock: str) -> None:
        path = self._built / key
        await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
        try:
            await build.install(python, lock, path)
            (path / COMPLETE).write_text(lock)
        finally:
            if not (path / COMPLETE).exists():
                # In a thread that a second cancellation does not stop; the loop must not wait for a thousand files.
                await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    def _environment(self, key: str, wanted: Wanted, *, cached: bool) -> Environment:
        return Environment(self._built / key / "bin", key[:TAG_CHARACTERS], cached, wanted.source)

    def _is_complete(self, key: str) -> bool:
        """An environment whose interpreter was removed meanwhile is none."""
        path = self._built / key
        return (path / COMPLETE).exists() and (path / "bin/python").exists()

    # -- what is known -----------------------------------------------------------------------------------------------

    def _fingerprint(self, plan: AttemptPlan, wanted: Wanted) -> str:
        """Names everything that decides what is installed, as far as it is known before it is resolved."""
        facts = [plan.fenced, wanted.origin, wanted.text, wanted.files, wanted.options, wanted.python]
        local = plan.spec.tree if wanted.reads_local_files else ""
        return _digest([_FORMAT, plan.spec.user, _identity(self._python), *facts, local])

    def _key_of(self, fingerprint: str) -> str | None:
        try:
            key = (self._known / fingerprint).read_text()
        except FileNotFoundError:
            return None
        return key if re.fullmatch(r"[0-9a-f]+", key) else None

    def _remember(self, fingerprint: str, key: str) -> None:
        temporary = self._known / f"{fingerprint}.new"
        temporary.write_text(key)
        temporary.replace(self._known / fingerprint)

    def _lock(self, name: str) -> asyncio.Lock:
        """One for each name while somebody uses it."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock

    def _uv_for(self, plan: AttemptPlan) -> "_Uv":
        variables = {name: value for name, value in os.environ.items() if name not in _DROPPED}
        wheels_only = plan.fenced and self._wrap is None
        if plan.fenced:
            variables = {name: value for name, value in variables.items() if _FENCED_KEEP.fullmatch(name)}
        if wheels_only:
            variables |= _machine_settings()
        variables = {
            "UV_CACHE_DIR": str(self._cache),
            **variables,
            "NO_COLOR": "1",
            "UV_NO_PROGRESS": "1",
            "UV_PYTHON_DOWNLOADS": "never",
        }
        return _Uv(self._uv, variables, self._wrap if plan.fenced else None, wheels_only)


def _machine_settings() -> dict[str, str]:
    """Let uv read this machine's settings and not the tree's, which could ask for builds again."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    for path in (home / "uv/uv.toml", Path("/etc/uv/uv.toml")):
        if path.exists():
            return {"UV_CONFIG_FILE": str(path)}
    return {"UV_NO_CONFIG": "1"}


def _key(plan: AttemptPlan, wanted: Wanted, python: Path, lock: str) -> str:
    local = plan.spec.tree if replace(wanted, text=lock, files=()).reads_local_files else ""
    is_project = wanted.origin is Origin.UV_LOCK
    return _digest([_FORMAT, plan.spec.user, _identity(python), is_project, lock, wanted.options, local])


def _digest(facts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:KEY_CHARACTERS]


def _identity(python: Path) -> list[str | int]:
    """Another after an upgrade in place."""
    status = python.stat()
    return [os.path.realpath(python), status.st_size, status.st_mtime_ns]


# -- one build -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Uv:
    """How uv is run for one plan. wheels_only: nothing is built, so no code of a package runs."""

    path: Path
    variables: Mapping[str, str]
    wrap: Wrap | None
    wheels_only: bool


class _Build:
    """The steps of one build, each a run of uv."""

    def __init__(self, uv_for: _Uv, tree: Path, wanted: Wanted, progress: Callable[[str], None]) -> None:
        self._uv = uv_for
        self._tree = tree
        self._wanted = wanted
        self._progress = progress
        self._build_options = ["--no-build"] if uv_for.wheels_only else []

    async def interpreter(self, base: Path) -> Path:
        """The interpreter that is asked for, `base` where it will do."""
        wanted = self._wanted
        if not wanted.python:
            return base
        search = {"PATH": f"{base.parent}:{self._uv.variables.get('PATH', '')}"}
        arguments = ["python", "find", "--no-project", "--system", "--python-preference", "system", wanted.python]
        try:
            found = await self._run(arguments, variables=search)
        except MeshgpuError as error:
            raise MeshgpuError(
                "environment",
                f"cannot build the environment from {wanted.source}: {wanted.python_from} asks for Python "
                f"{wanted.python}, and this machine has none",
                f"on that machine: uv python install '{wanted.python}'",
            ) from error
        return Path(found.strip())

    async def resolve(self, python: Path) -> str:
        """What exactly to install, as text: pinned requirements, or the project's own lock."""
        wanted = self._wanted
        if wanted.origin in (Origin.UV_LOCK, Origin.PYLOCK):
            return "\0".join(text for _, text in wanted.files)
        if wanted.origin is Origin.NOTHING or (wanted.origin is Origin.TEXT and not wanted.text):
            return ""
        self._progress(f"environment: resolving {wanted.source}")
        name = REQUIREMENTS_FILE if wanted.origin is Origin.FILE else "-"
        hashes = ["--generate-hashes"] if wanted.has_hashes else []
        options = ["--no-header", "--no-annotate", *self._build_options, *hashes, "--python", str(python)]
        pinned = await self._run(["pip", "compile", *options, name], stdin=wanted.text)
        # The job's own code is where it runs; an environment that other jobs share cannot hold it.
        lines = [line for line in pinned.splitlines() if not LOCAL_LINE.fullmatch(line) or _ARCHIVE.fullmatch(line)]
        return "\n".join(lines)

    async def install(self, python: Path, lock: str, path: Path) -> None:
        """Make the environment at `path`, where it stays: console scripts name it."""
        await self._run(["venv", "--no-project", "--no-config", "--python", str(python), str(path)])
        if self._wanted.origin is Origin.UV_LOCK:
            self._progress("environment: installing from uv.lock")
            options = ["--frozen", "--no-install-workspace", "--no-install-local", *self._build_options]
            await self._run(
                ["sync", *options, "--python", str(python)], variables={"UV_PROJECT_ENVIRONMENT": str(path)}
            )
            return
        packages = len(re.findall(r"^[^\s#-]", lock, re.MULTILINE))
        pip_sync = ["pip", "sync", *self._build_options, "--python", str(path / "bin/python")]
        if self._wanted.origin is Origin.PYLOCK:
            self._progress("environment: installing from pylock.toml")
            await self._run([*pip_sync, "pylock.toml"])
        elif packages:
            self._progress(f"environment: installing {packages} packages")
            options = [_expand(word, self._uv.variables) for pair in self._wanted.options for word in pair if word]
            await self._run([*pip_sync, *options, "-"], stdin=lock)

    async def _run(
        self, arguments: Sequence[str], *, stdin: str = "", variables: Mapping[str, str] | None = None
    ) -> str:
        """Output of uv; raises MeshgpuError with the last lines of its complaint. It never outlives this call."""
        argv: Sequence[str] = [str(self._uv.path), *arguments]
        if self._uv.wrap is not None:
            argv = self._uv.wrap(argv, self._tree)
        process = await self._start(argv, stdin, {**self._uv.variables, **(variables or {})})
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            output, complaint = await asyncio.gather(process.stdout.read(), self._follow(process.stderr))
            code = await process.wait()
        finally:
            await _end(process)
        if code != 0:
            raise _failure(self._wanted, _last_words(complaint) or f"uv ended with {code}")
        return output.decode("utf-8", "replace")

    async def _start(self, argv: Sequence[str], stdin: str, variables: Mapping[str, str]) -> asyncio.subprocess.Process:
        with tempfile.TemporaryFile() as given:
            given.write(stdin.encode("utf-8", "replace"))
            given.seek(0)
            starting = asyncio.get_running_loop().create_task(
                asyncio.create_subprocess_exec(
                    *argv,
                    cwd=self._tree,
                    env=variables,
                    stdin=given,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                    start_new_session=True,
                )
            )
            try:
                return await asyncio.shield(starting)
            except asyncio.CancelledError:
                # Cancelled between fork and the connection of its pipes, asyncio would end uv but not its children.
                with contextlib.suppress(OSError):
                    await _end(await starting)
                raise

    async def _follow(self, stream: asyncio.StreamReader) -> list[str]:
        """The last lines of what uv says; what people may wait for is passed on as it comes."""
        lines: deque[str] = deque(maxlen=100)
        rest = b""
        while data := await stream.read(65536):
            *whole, rest = (rest + data).split(b"\n")
            rest = rest[-_LINE_CHARACTERS:]
            for piece in whole:
                line = piece.decode("utf-8", "replace").strip()[:_LINE_CHARACTERS]
                lines.append(line)
                if line.startswith(_WORTH_TELLING):
                    self._progress(f"environment: {line[0].lower()}{line[1:]}")
        return [*lines, rest.decode("utf-8", "replace").strip()]


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill uv with its children, build backends too, unless it has ended by itself."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _last_words(lines: Sequence[str]) -> str:
    """The meaningful end of uv's complaint, in one line."""
    bare = [re.sub(r"^(error:|cause:|×|╰─▶|├─▶|│)\s*", "", line) for line in lines if not line.startswith(_NOISE)]
    return ": ".join(line.rstrip(":") for line in [line for line in bare if line][-_ERROR_LINES:])


def _expand(option: str, variables: Mapping[str, str]) -> str:
    """`${NAME}` as requirements files allow it."""
    return re.sub(r"\$\{([A-Z0-9_]+)\}", lambda found: variables.get(found[1], found[0]), option)


def _failure(wanted: Wanted, reason: str) -> MeshgpuError:
    hint = {
        Origin.NOTHING: None,
        Origin.TEXT: "try the same where you are: uv pip install --dry-run …",
        Origin.FILE: f"try the same where you are: uv pip compile {wanted.source}",
        Origin.PYLOCK: f"try the same where you are: uv pip sync --dry-run {wanted.source}",
        Origin.UV_LOCK: "try the same where you are: uv sync --frozen --dry-run",
    }[wanted.origin]
    return MeshgpuError("environment", f"cannot build the environment from {wanted.source}: {reason}", hint)
