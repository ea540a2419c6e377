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

from meshgpu.adapters.requirements import LOCAL_LINE, Origin, Wanted, find_wanted, unsafe_source
from meshgpu.errors import MeshgpuError
from meshgpu.model.job import AttemptPlan
from meshgpu.ports import Environment

BUILD_DEADLINE_S: Final = 1800.0
"""A CUDA build of PyTorch over a slow office line takes ten minutes; what takes longer hangs."""

KEY_CHARACTERS: Final = 32
"""128 bits of a digest: short, as the path stands in the first line of every console script."""

COMPLETE: Final = "complete"
"""Directory with a file for each whole environment, which names its interpreter; one without is what a crash left.

Not in the environment: packages may write anything there.
"""

_FORMAT: Final = 2
"""Raised when environments are built in another way: none of before is used again."""

_DROPPED: Final = frozenset(
    {"VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP"}
    | {"UV_PYTHON", "UV_SYSTEM_PYTHON", "UV_PROJECT", "UV_PROJECT_ENVIRONMENT", "UV_WORKING_DIRECTORY", "UV_TARGET"}
    | {"UV_LOCKED", "UV_FROZEN", "UV_CONSTRAINT", "UV_OVERRIDE", "UV_REQUIRE_HASHES"}
)
"""Variables of the agent's own environment that would make uv work on another one."""

_FENCED_KEEP: Final = re.compile(
    r"PATH|HOME|TMPDIR|LANG|LC_.*|SSL_CERT_.*|(?i:(http|https|all|no)_proxy)"
    r"|UV_(CACHE_DIR|DEFAULT_INDEX|INDEX|INDEX_URL|EXTRA_INDEX_URL|FIND_LINKS|NO_INDEX|INSECURE_HOST|HTTP_TIMEOUT)"
    r"|UV_(OFFLINE|NATIVE_TLS|SYSTEM_CERTS|LINK_MODE|CONCURRENT_[A-Z]+)"
)
"""What uv gets to see for another user's job: where this machine gets packages. Credentials of indexes that a project
names (UV_INDEX_<NAME>_PASSWORD) are not among it, as another user's project may name them too."""

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

    Fenced plans get wheels only, from this machine's indexes or those of a lock, so no code of theirs runs before the
    job; wrap shuts their builds in besides.
    Packages are hard links into uv's cache where the disk allows, so a job of another user must see them read-only.
    """

    def __init__(
        self, directory: Path, uv_path: Path | None = None, python: Path | None = None, wrap: Wrap | None = None
    ) -> None:
        self._built = directory / "built"
        self._complete = directory / COMPLETE
        self._known = directory / "known"
        self._cache = directory / "cache"
        self._uv = uv_path or Path(uv.find_uv_bin())
        self._python = python or Path(getattr(sys, "_base_executable", "") or sys.executable)
        self._wrap = wrap
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        for made in (self._built, self._complete, self._known):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in self._built.iterdir():
            if not (self._complete / left.name).exists():
                shutil.rmtree(left, ignore_errors=True)

    async def build(self, plan: AttemptPlan, tree: Path, progress: Callable[[str], None]) -> Environment:
        """The environment that the plan's spec asks for; a known one takes a few file reads and no process.

        Raises MeshgpuError `environment`. Cancelling it ends uv and all its children, and leaves nothing behind.
        """
        wanted, fingerprint = await asyncio.to_thread(self._read, plan, tree)
        try:
            async with asyncio.timeout(BUILD_DEADLINE_S):
                return await self._find_or_build(plan, tree, wanted, fingerprint, progress)
        except TimeoutError as error:
            raise _failure(wanted, f"it was not ready after {BUILD_DEADLINE_S / 60:.0f} min") from error
        except OSError as error:
            raise _failure(wanted, f"{error.strerror}: {error.filename}") from error

    async def _find_or_build(
        self, plan: AttemptPlan, tree: Path, wanted: Wanted, fingerprint: str, progress: Callable[[str], None]
    ) -> Environment:
        async with self._lock(fingerprint):
            key = self._key_of(fingerprint)
            if key is not None and (made_of := self._interpreter_of(key)):
                return self._environment(key, wanted, made_of, cached=True)
            if plan.fenced:
                await asyncio.to_thread(_refuse_unsafe, wanted)
            build = _Build(self._uv_for(plan), tree, wanted, progress)
            python = await build.interpreter(self._python)
            lock = await build.resolve(python)
            key = _key(plan, wanted, python, lock)
            async with self._lock(key):
                made_of = self._interpreter_of(key)
                cached = made_of is not None
                if made_of is None:
                    made_of = await self._make(build, key, python, lock)
            _store(self._known / fingerprint, key)
            return self._environment(key, wanted, made_of, cached=cached)

    async def _make(self, build: "_Build", key: str, python: Path, lock: str) -> Path:
        """The interpreter of the environment made."""
        path, complete = self._built / key, self._complete / key
        complete.unlink(missing_ok=True)
        await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
        try:
            made_of = await build.create(python, path)
            await build.install(python, lock, path)
            _store(complete, str(made_of))
            return made_of
        finally:
            if not complete.exists():
                # In a thread that a second cancellation does not stop; the loop must not wait for a thousand files.
                await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    def _environment(self, key: str, wanted: Wanted, made_of: Path, *, cached: bool) -> Environment:
        return Environment(self._built / key / "bin", key, cached, wanted.source, made_of)

    def _interpreter_of(self, key: str) -> Path | None:
        """What a whole environment was made of; one whose interpreter was removed meanwhile is none."""
        try:
            made_of = Path((self._complete / key).read_text())
        except FileNotFoundError:
            return None
        return made_of if (self._built / key / "bin/python").exists() else None

    # -- what is known -----------------------------------------------------------------------------------------------

    def _read(self, plan: AttemptPlan, tree: Path) -> tuple[Wanted, str]:
        """What is asked for, and a fingerprint of all that decides what is installed before it is resolved. Blocks."""
        wanted = find_wanted(plan.spec, tree)
        facts = [plan.fenced, wanted.origin, wanted.text, wanted.constraints, wanted.files, wanted.python]
        local = plan.spec.tree if wanted.reads_local_files else ""
        return wanted, _digest([_FORMAT, plan.spec.user, _identity(self._python), *facts, local])

    def _key_of(self, fingerprint: str) -> str | None:
        try:
            key = (self._known / fingerprint).read_text()
        except FileNotFoundError:
            return None
        return key if re.fullmatch(r"[0-9a-f]+", key) else None

    def _lock(self, name: str) -> asyncio.Lock:
        """One for each name while somebody uses it."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock

    def _uv_for(self, plan: AttemptPlan) -> "_Uv":
        variables = {name: value for name, value in os.environ.items() if name not in _DROPPED}
        if plan.fenced:
            variables = {name: value for name, value in variables.items() if _FENCED_KEEP.fullmatch(name)}
            variables |= _machine_settings()
        variables = {
            "UV_CACHE_DIR": str(self._cache),
            **variables,
            "NO_COLOR": "1",
            "UV_NO_PROGRESS": "1",
            "UV_PYTHON_DOWNLOADS": "never",
        }
        return _Uv(self._uv, variables, self._wrap if plan.fenced else None, self._known, wheels_only=plan.fenced)


def _store(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(text)
    temporary.replace(path)


def _refuse_unsafe(wanted: Wanted) -> None:
    """Raises MeshgpuError `environment` for what another user's machine does not install. Blocks."""
    if wanted.unsafe:
        line = wanted.unsafe[:_LINE_CHARACTERS]
        reason = f"`{line}` is refused on another user's machine, which takes names, versions, markers and hashes only"
        raise _failure(wanted, reason)
    if package := unsafe_source(wanted):
        reason = f"{package[:_LINE_CHARACTERS]} is no wheel from an index, the only kind another user's machine takes"
        raise _failure(wanted, reason)


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
    """How uv is run for one plan. wheels_only: nothing is built, so no code of a package runs.

    own: a directory in which no name is another user's choice.
    """

    path: Path
    variables: Mapping[str, str]
    wrap: Wrap | None
    own: Path
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
        options = ["--no-project", "--system", "--python-preference", "system"]
        try:
            # Elsewhere, as uv runs a file of the tree that is called like a version it does not understand.
            found = await self._run(
                ["python", "find", *options, "--", wanted.python], variables=search, at=self._uv.own
            )
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
        hashes = ["--generate-hashes"] if wanted.has_hashes else []
        options = ["--no-header", "--no-annotate", *self._build_options, *hashes, "--python", str(python)]
        with tempfile.NamedTemporaryFile("w", dir=self._uv.own, suffix=".txt") as constraints:
            constraints.write(wanted.constraints)
            constraints.flush()
            limits = ["--constraints", constraints.name] if wanted.constraints else []
            pinned = await self._run(["pip", "compile", *options, *limits, "-"], stdin=wanted.text)
        # The job's own code is where it runs; an environment that other jobs share cannot hold it.
        lines = [line for line in pinned.splitlines() if not LOCAL_LINE.fullmatch(line) or _ARCHIVE.fullmatch(line)]
        return "\n".join(lines)

    async def create(self, python: Path, path: Path) -> Path:
        """Make an empty environment at `path`, where it stays: console scripts name it. Returns its interpreter.

        Asked now, as packages may replace pyvenv.cfg and bin/python: what they say opens directories to the job.
        """
        await self._run(["venv", "--no-project", "--no-config", "--python", str(python), str(path)])
        return path / "bin" / (path / "bin/python").readlink()

    async def install(self, python: Path, lock: str, path: Path) -> None:
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
            self._progress(f"environment: installing {packages} package{'' if packages == 1 else 's'}")
            options = [_expand(word, self._uv.variables) for pair in self._wanted.options for word in pair if word]
            await self._run([*pip_sync, *options, "-"], stdin=lock)

    async def _run(
        self,
        arguments: Sequence[str],
        *,
        stdin: str = "",
        variables: Mapping[str, str] | None = None,
        at: Path | None = None,
    ) -> str:
        """Output of uv; raises MeshgpuError with the last lines of its complaint. It never outlives this call."""
        argv: Sequence[str] = [str(self._uv.path), *arguments]
        if self._uv.wrap is not None:
            argv = self._uv.wrap(argv, self._tree)
        process = await self._start(argv, stdin, {**self._uv.variables, **(variables or {})}, at or self._tree)
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

    async def _start(
        self, argv: Sequence[str], stdin: str, variables: Mapping[str, str], at: Path
    ) -> asyncio.subprocess.Process:
        with tempfile.TemporaryFile() as given:
            given.write(stdin.encode("utf-8", "replace"))
            given.seek(0)
            starting = asyncio.get_running_loop().create_task(
                asyncio.create_subprocess_exec(
                    *argv,
                    cwd=at,
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
