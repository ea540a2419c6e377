"""UvEnvironments: what a job asks for is installed once, found again without a process, and fails in plain words."""

import asyncio
import hashlib
import io
import os
import select
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import uv

from meshgpu.adapters import fences, uv_environments
from meshgpu.adapters.requirements import Wanted, find_wanted
from meshgpu.adapters.uv_environments import COMPLETE, UvEnvironments
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import JobId, MeshId, NodeId, UserName, digest
from meshgpu.model.job import AttemptPlan, EnvironmentRequest, JobSpec
from meshgpu.model.resources import NO_GPU, Resources
from meshgpu.ports import Environment

DEADLINE_S = 60
LOCAL = "--no-index\n--find-links wheels\n"
"""Requirements that come from wheels in the tree: no index is asked."""

FAKE_UV = """#!/bin/sh
echo "$@" >> {log}
env > {log}.env
case "$1 $2" in
venv*) for path; do :; done; mkdir -p "$path/bin"; ln -s {python} "$path/bin/python";;
"pip compile") {compile};;
esac
"""


def plan_for(
    *pip: str,
    requirements: str = "",
    from_project: bool = True,
    command: tuple[str, ...] = ("python", "train.py"),
    shell: bool = False,
    user: str = "ada",
    fenced: bool = False,
    tree: bytes = b"tree",
) -> AttemptPlan:
    spec = JobSpec(
        mesh=MeshId("0" * 64),
        job=JobId("a" * 26),
        nonce=b"n" * 16,
        name="train",
        user=UserName(user),
        submitter=NodeId("b" * 52),
        command=command,
        shell=shell,
        env=(),
        environment=EnvironmentRequest(pip, requirements, from_project),
        tree=digest(tree),
        tree_bytes=0,
        tree_files=0,
        resources=Resources(NO_GPU),
        machine=None,
        stewards=(),
        issued_wall_s=0.0,
    )
    return AttemptPlan(spec, 1, (), fenced, "rig1")


class Bench:
    """A tree, a directory of environments, and what was said about them."""

    def __init__(self, top: Path) -> None:
        self.tree = top / "tree"
        self.tree.mkdir()
        self.home = top / "environments"
        self.log = top / "calls"
        self.said: list[str] = []

    async def build(self, environments: UvEnvironments, plan: AttemptPlan) -> Environment:
        async with asyncio.timeout(DEADLINE_S):
            return await environments.build(plan, self.tree, self.said.append)

    async def refusal(self, environments: UvEnvironments, plan: AttemptPlan) -> MeshgpuError:
        """Why a build fails; checks that it leaves nothing."""
        before = self.built()
        with pytest.raises(MeshgpuError) as refused:
            await self.build(environments, plan)
        assert self.built() == before
        assert refused.value.code == "environment"
        return refused.value

    def built(self) -> list[str]:
        return sorted(path.name for path in (self.home / "built").iterdir())

    def write(self, name: str, text: str) -> Path:
        path = self.tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def wheel(self, name: str, version: str = "1.0", value: str = "1") -> None:
        """A wheel with one module and a console script of that name."""
        path = self.tree / f"wheels/{name}-{version}-py3-none-any.whl"
        path.parent.mkdir(exist_ok=True)
        about = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name}.py", f"VALUE = {value}\ndef main(): print('{name} runs')\n")
            archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{about}/entry_points.txt", f"[console_scripts]\n{name}={name}:main\n")
            archive.writestr(f"{about}/RECORD", "")

    def uv(self, *arguments: str) -> None:
        """Run the real uv in the tree, as a user does."""
        command = [uv.find_uv_bin(), *arguments]
        subprocess.run(command, cwd=self.tree, check=True, capture_output=True, timeout=30)

    def fake(self, compile_step: str = "echo demo==1.0", **options: object) -> UvEnvironments:
        """Environments whose uv only writes down how it was called."""
        script = self.log.with_name("fake-uv")
        script.write_text(FAKE_UV.format(log=self.log, python=sys.executable, compile=compile_step))
        script.chmod(0o755)
        return UvEnvironments(self.home, script, **options)  # type: ignore[arg-type]  # passed on as they are

    def calls(self, first: str) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if line.startswith(first)]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def environments(bench: Bench) -> UvEnvironments:
    return UvEnvironments(bench.home)


def run(environment: Environment, program: str, *arguments: str) -> str:
    command = [str(environment.bin_path / program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def imports(environment: Environment, module: str) -> bool:
    command = [str(environment.bin_path / "python"), "-c", f"import {module}"]
    return subprocess.run(command, capture_output=True, timeout=30, check=False, cwd="/").returncode == 0


# -- what is installed -----------------------------------------------------------------------------------------------


async def test_nothing_asked_for_gives_a_bare_python(bench: Bench, environments: UvEnvironments) -> None:
    environment = await bench.build(environments, plan_for())
    assert environment.source == "empty"
    assert not environment.cached
    for program in ("python", "python3"):
        assert run(environment, program, "-c", "import sys; print(sys.prefix)") == str(environment.bin_path.parent)
    assert not imports(environment, "pip")
    assert environment.key == environment.bin_path.parent.name


async def test_requirements_are_installed_with_scripts_that_run(bench: Bench, environments: UvEnvironments) -> None:
    bench.wheel("alpha")
    bench.write("requirements.txt", f"{LOCAL}alpha\n")
    environment = await bench.build(environments, plan_for())
    assert environment.source == "requirements.txt"
    assert run(environment, "alpha") == "alpha runs"
    assert bench.said[0] == "environment: resolving requirements.txt"
    assert "environment: installing 1 package" in bench.said


async def test_included_requirements_and_constraints_count(bench: Bench, environments: UvEnvironments) -> None:
    for version in ("1.0", "2.0"):
        bench.wheel("alpha", version, value=version)
    bench.write("requirements.txt", f"{LOCAL}-r more/inner.txt\n")
    bench.write("more/inner.txt", "alpha\n-c limits.txt\n")
    bench.write("more/limits.txt", "alpha<2\n")
    first = await bench.build(environments, plan_for())
    assert run(first, "python", "-c", "import alpha; print(alpha.VALUE)") == "1.0"
    bench.write("more/limits.txt", "alpha>1\n")
    second = await bench.build(environments, plan_for())
    assert run(second, "python", "-c", "import alpha; print(alpha.VALUE)") == "2.0"
    assert first.bin_path != second.bin_path


async def test_pip_and_pip_req_go_before_the_project(bench: Bench, environments: UvEnvironments) -> None:
    bench.wheel("alpha")
    bench.wheel("beta")
    bench.write("requirements.txt", "this is not read")
    by_pip = await bench.build(environments, plan_for("./wheels/alpha-1.0-py3-none-any.whl"))
    assert (by_pip.source, imports(by_pip, "alpha")) == ("--pip", True)
    by_text = await bench.build(environments, plan_for(requirements=f"{LOCAL}beta"))
    assert (by_text.source, imports(by_text, "beta"), imports(by_text, "alpha")) == ("--pip-req", True, False)
    both = await bench.build(environments, plan_for("alpha", requirements=f"{LOCAL}beta"))
    assert (both.source, imports(both, "alpha"), imports(both, "beta")) == ("--pip-req and --pip", True, True)


async def test_a_uv_lock_is_installed_without_the_project(bench: Bench, environments: UvEnvironments) -> None:
    bench.wheel("alpha")
    settings = '[tool.uv]\nno-index = true\nfind-links = ["wheels"]\n'
    project = '[project]\nname = "proj"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = ["alpha"]\n'
    build = '[build-system]\nrequires = []\nbuild-backend = "none"\nbackend-path = ["."]\n'
    bench.write("pyproject.toml", project + build + settings)
    bench.write("requirements.txt", "not read")
    bench.uv("lock", "--python", sys.executable)
    before = sorted(bench.tree.rglob("*"))
    environment = await bench.build(environments, plan_for())
    assert environment.source == "uv.lock"
    assert run(environment, "alpha") == "alpha runs"
    assert not imports(environment, "proj")
    assert sorted(bench.tree.rglob("*")) == before


async def test_a_pylock_is_installed(bench: Bench, environments: UvEnvironments) -> None:
    bench.wheel("alpha")
    bench.write("alpha.in", f"{LOCAL}alpha\n")
    bench.uv("pip", "compile", "--format", "pylock.toml", "-o", "pylock.toml", "alpha.in")
    environment = await bench.build(environments, plan_for())
    assert (environment.source, run(environment, "alpha")) == ("pylock.toml", "alpha runs")


@pytest.mark.parametrize("shell", [False, True])
async def test_inline_metadata_of_the_script_is_used(bench: Bench, environments: UvEnvironments, shell: bool) -> None:
    bench.wheel("alpha")
    block = (
        '# /// script\n# requires-python = ">=3.11"\n# dependencies = ["./wheels/alpha-1.0-py3-none-any.whl"]\n# ///\n'
    )
    bench.write("src/train.py", f"#!/usr/bin/env python\n{block}import alpha\n")
    command = ("python src/train.py --rate '1e-3'",) if shell else ("python", "src/train.py", "other.py")
    environment = await bench.build(environments, plan_for(command=command, shell=shell))
    assert (environment.source, imports(environment, "alpha")) == ("src/train.py", True)


async def test_a_local_project_lends_its_requirements_but_is_not_installed(
    bench: Bench, environments: UvEnvironments
) -> None:
    bench.wheel("alpha")
    bench.write("pyproject.toml", '[project]\nname = "proj"\nversion = "1"\ndependencies = ["alpha"]\n')
    bench.write("requirements.txt", f"{LOCAL}-e .\n")
    environment = await bench.build(environments, plan_for())
    assert imports(environment, "alpha")
    assert not imports(environment, "proj")


async def test_the_project_is_left_alone_where_the_user_says_so(bench: Bench, environments: UvEnvironments) -> None:
    bench.write("requirements.txt", "not read")
    bench.write(".python-version", "3.99")
    assert (await bench.build(environments, plan_for(from_project=False))).source == "empty"


async def test_a_lock_without_its_project_is_passed_over(bench: Bench, environments: UvEnvironments) -> None:
    bench.wheel("alpha")
    bench.write("uv.lock", "version = 1")
    bench.write("requirements.txt", f"{LOCAL}alpha\n")
    assert (await bench.build(environments, plan_for())).source == "requirements.txt"


async def test_a_package_of_an_index_is_installed(bench: Bench, environments: UvEnvironments) -> None:
    try:
        environment = await bench.build(environments, plan_for("six"))
    except MeshgpuError as error:
        if "error sending request" in error.message or "dns error" in error.message:
            pytest.skip(f"no index can be reached: {error.message}")
        raise
    assert imports(environment, "six")


# -- which interpreter -----------------------------------------------------------------------------------------------


async def test_an_interpreter_that_is_not_here_is_named(bench: Bench, environments: UvEnvironments) -> None:
    bench.write(".python-version", "3.99\n")
    error = await bench.refusal(environments, plan_for())
    assert ".python-version asks for Python 3.99, and this machine has none" in error.message
    assert error.hint is not None
    assert "uv python install '3.99'" in error.hint


async def test_a_range_of_versions_takes_the_base_interpreter_where_it_fits(
    bench: Bench, environments: UvEnvironments
) -> None:
    bench.write("requirements.txt", "")
    bench.write("pyproject.toml", '[project]\nname = "proj"\nversion = "1"\nrequires-python = ">=3.11"\n')
    environment = await bench.build(environments, plan_for())
    base = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    assert os.path.realpath(environment.bin_path / "python") == base
    bench.write("pyproject.toml", '[project]\nname = "proj"\nversion = "1"\nrequires-python = ">=3.99"\n')
    error = await bench.refusal(environments, plan_for())
    assert "pyproject.toml asks for Python >=3.99" in error.message


@pytest.mark.parametrize(
    "python",
    [
        "./evil",
        "evil",
        "/bin/evil",
        "3.11evil",
        "3.*",
        ">=3.11/../evil",
        "--config-file=evil",
        "-h",
        "3" * 200,
        "3.9999999",
    ],
)
@pytest.mark.parametrize("place", ["pyproject.toml", "train.py"])
async def test_what_is_no_version_is_never_run(
    bench: Bench, environments: UvEnvironments, tmp_path: Path, python: str, place: str
) -> None:
    for name in ("evil", "3.11evil", "3.*", "3.9999999"):
        bench.write(name, f"#!/bin/sh\ntouch {tmp_path}/ran\n").chmod(0o755)
    text = f"[project]\nrequires-python = '{python}'\n"
    if place == "train.py":
        text = f"# /// script\n# requires-python = '{python}'\n# ///\n"
    bench.write(place, text)
    bench.write("requirements.txt", "") if place != "train.py" else None
    error = await bench.refusal(environments, plan_for())
    assert f"from {place}: it asks for Python {python[:100]!r}, expected a version or a range" in error.message
    assert not (tmp_path / "ran").exists()


async def test_a_version_is_looked_for_outside_the_tree(bench: Bench) -> None:
    bench.write(".python-version", "3.11")
    environments = bench.fake()
    script = bench.log.with_name("fake-uv")
    step = f'"python find") pwd > {bench.log}.at; echo {sys.executable};;'
    script.write_text(script.read_text().replace("esac", f"{step}\nesac"))
    await bench.build(environments, plan_for())
    assert bench.calls("python find")[0].endswith(" -- 3.11")
    assert not Path(bench.log.with_name("calls.at").read_text().strip()).is_relative_to(bench.tree)


@pytest.mark.parametrize(
    "python", ["3.11", ">=3.11", ">= 3.10, <4", "==3.*", "~=3.10", "!=3.10.*,>=3.9", "cpython@3.11"]
)
async def test_versions_and_ranges_are_looked_for(bench: Bench, environments: UvEnvironments, python: str) -> None:
    bench.write("train.py", f"# /// script\n# requires-python = '{python}'\n# ///\n")
    try:
        await bench.build(environments, plan_for())
    except MeshgpuError as error:
        assert "this machine has none" in error.message  # noqa: PT017 - another machine may lack it


async def test_a_name_of_another_tool_is_no_version(bench: Bench, environments: UvEnvironments) -> None:
    bench.write(".python-version", "my-virtualenv\n")
    assert (await bench.build(environments, plan_for())).source == "empty"


# -- once, and found again -------------------------------------------------------------------------------------------


async def test_a_known_environment_is_found_without_a_process(bench: Bench) -> None:
    bench.write("requirements.txt", "demo\n")
    first = await bench.build(bench.fake(), plan_for())
    again = await bench.build(UvEnvironments(bench.home, Path("/nonexistent/uv")), plan_for())
    assert not first.cached
    assert again == Environment(first.bin_path, first.key, True, "requirements.txt", first.interpreter)


async def test_other_words_for_the_same_packages_share_an_environment(bench: Bench) -> None:
    environments = bench.fake()
    first = await bench.build(environments, plan_for("demo"))
    second = await bench.build(environments, plan_for("demo>=1"))
    assert (second.bin_path, second.cached) == (first.bin_path, True)
    assert len(bench.calls("venv")) == 1


async def test_users_do_not_share_environments(bench: Bench) -> None:
    environments = bench.fake()
    ada = await bench.build(environments, plan_for("demo", user="ada"))
    bob = await bench.build(environments, plan_for("demo", user="bob"))
    assert ada.bin_path != bob.bin_path


async def test_concurrent_builds_of_one_environment_happen_once(bench: Bench) -> None:
    environments = bench.fake()
    plans = [plan_for("demo"), plan_for("demo"), plan_for("demo>=1"), plan_for("demo>=1")]
    built = await asyncio.gather(*(bench.build(environments, plan) for plan in plans))
    assert len({environment.bin_path for environment in built}) == 1
    assert len(bench.calls("venv")) == 1
    assert len(bench.calls("pip compile")) == 2
    assert sorted(environment.cached for environment in built) == [False, True, True, True]


async def test_local_wheels_belong_to_their_tree(bench: Bench, environments: UvEnvironments) -> None:
    bench.write("requirements.txt", "./wheels/alpha-1.0-py3-none-any.whl\n")
    values = []
    for value in ("1", "2"):
        bench.wheel("alpha", value=value)
        environment = await bench.build(environments, plan_for(tree=value.encode()))
        values.append(run(environment, "python", "-c", "import alpha; print(alpha.VALUE)"))
    assert values == ["1", "2"]


async def test_another_interpreter_means_another_environment(bench: Bench, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n")
    first = await bench.build(bench.fake(python=python), plan_for())
    python.write_text("#!/bin/sh\n# upgraded in place\n")
    second = await bench.build(bench.fake(python=python), plan_for())
    assert first.bin_path != second.bin_path


async def test_an_environment_without_its_interpreter_is_built_again(bench: Bench) -> None:
    first = await bench.build(bench.fake(), plan_for())
    (first.bin_path / "python").unlink()
    again = await bench.build(bench.fake(), plan_for())
    assert (again.bin_path, again.cached) == (first.bin_path, False)
    assert (first.bin_path / "python").exists()


async def test_what_a_crash_left_is_never_used(bench: Bench) -> None:
    first = await bench.build(bench.fake(), plan_for())
    (bench.home / COMPLETE / first.bin_path.parent.name).unlink()
    left = first.bin_path / "half"
    left.write_text("installed")
    running = bench.fake()
    assert bench.built() == []
    again = await bench.build(running, plan_for())
    assert (again.bin_path, again.cached, left.exists()) == (first.bin_path, False, False)


async def test_leftovers_under_a_running_agent_are_cleaned_by_the_next_build(bench: Bench) -> None:
    environments = bench.fake()
    first = await bench.build(environments, plan_for())
    (bench.home / COMPLETE / first.bin_path.parent.name).unlink()
    (first.bin_path / "half").write_text("installed")
    again = await bench.build(environments, plan_for())
    assert (again.bin_path, (again.bin_path / "half").exists()) == (first.bin_path, False)


# -- failures --------------------------------------------------------------------------------------------------------


async def test_a_failure_says_what_uv_said_and_leaves_nothing(bench: Bench, environments: UvEnvironments) -> None:
    bench.wheel("alpha")
    bench.write("requirements.txt", f"{LOCAL}no-such-thing\n")
    error = await bench.refusal(environments, plan_for())
    assert error.message.startswith("cannot build the environment from requirements.txt: No solution found")
    assert "no-such-thing was not found" in error.message
    assert error.hint is not None
    assert "uv pip compile requirements.txt" in error.hint


async def test_a_failed_installation_leaves_nothing_and_may_be_tried_again(bench: Bench) -> None:
    broken = bench.fake('[ -e mended ] || { echo "error: disk on fire" >&2; exit 3; }; echo demo==1')
    error = await bench.refusal(broken, plan_for("demo"))
    assert error.message == "cannot build the environment from --pip: disk on fire"
    bench.write("mended", "")
    assert not (await bench.build(broken, plan_for("demo"))).cached


async def test_a_failure_after_the_environment_was_begun_leaves_nothing(bench: Bench) -> None:
    environments = bench.fake()
    script = bench.log.with_name("fake-uv")
    script.write_text(script.read_text().replace("esac", '"pip sync") exit 1;;\nesac'))
    error = await bench.refusal(environments, plan_for("demo"))
    assert error.message.endswith("uv ended with 1")
    assert len(bench.calls("venv")) == 1


async def test_a_missing_uv_is_a_failure_in_words(bench: Bench) -> None:
    error = await bench.refusal(UvEnvironments(bench.home, Path("/nonexistent/uv")), plan_for())
    assert error.message == "cannot build the environment from empty: No such file or directory: /nonexistent/uv"


class Hang:
    """An installation that hangs with a child, and says so."""

    def __init__(self, bench: Bench) -> None:
        pipe = bench.log.with_name("pipe")
        os.mkfifo(pipe)
        self.environments = bench.fake()
        script = bench.log.with_name("fake-uv")
        step = f'"pip sync") sleep 600 & echo $$ $! > {pipe}; wait;;'
        script.write_text(script.read_text().replace("esac", f"{step}\nesac"))
        self._said: asyncio.Queue[list[int]] = asyncio.Queue()
        # Opened for both ways: the shell never waits for a reader, nor the test for a writer.
        self._pipe = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
        asyncio.get_running_loop().add_reader(self._pipe, self._read)

    def _read(self) -> None:
        self._said.put_nowait([int(word) for word in os.read(self._pipe, 100).split()])

    async def processes(self) -> list[int]:
        """Ids of uv and its child in the next installation to hang."""
        async with asyncio.timeout(DEADLINE_S):
            return await self._said.get()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pipe)
        os.close(self._pipe)


@pytest_asyncio.fixture
async def hang(bench: Bench) -> AsyncIterator[Hang]:
    hang = Hang(bench)
    yield hang
    hang.close()


async def until_gone(processes: list[int]) -> None:
    for process in processes:
        try:
            watch = os.pidfd_open(process)
        except ProcessLookupError:
            continue
        ended, _, _ = await asyncio.to_thread(select.select, [watch], [], [], 10)
        os.close(watch)
        assert ended, f"process {process} still runs"


def start(hang: Hang, bench: Bench) -> asyncio.Task[Environment]:
    return asyncio.get_running_loop().create_task(bench.build(hang.environments, plan_for("demo")))


async def test_cancelling_ends_uv_with_its_children_and_leaves_nothing(bench: Bench, hang: Hang) -> None:
    building = start(hang, bench)
    started = await hang.processes()
    assert len(bench.built()) == 1
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await building
    await until_gone(started)
    assert bench.built() == []


async def test_cancelling_while_uv_is_being_started_ends_its_children_too(
    bench: Bench, hang: Hang, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = asyncio.Event()
    real = asyncio.create_subprocess_exec

    async def slow(*argv: str, **options: Any) -> asyncio.subprocess.Process:
        process = await real(*argv, **options)
        if "sync" in argv:
            await release.wait()
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slow)
    building = start(hang, bench)
    started = await hang.processes()
    building.cancel()
    asyncio.get_running_loop().call_later(0.05, release.set)
    with pytest.raises(asyncio.CancelledError):
        await building
    await until_gone(started)
    assert bench.built() == []


async def test_a_cancelled_build_lets_the_next_one_in_line_build(bench: Bench, hang: Hang) -> None:
    said: list[list[str]] = [[], []]
    loop = asyncio.get_running_loop()
    building = [loop.create_task(hang.environments.build(plan_for("demo"), bench.tree, words.append)) for words in said]
    first = await hang.processes()
    leading = 0 if said[0] else 1
    assert not said[1 - leading]
    building[leading].cancel()
    second = await hang.processes()
    assert len(bench.calls("venv")) == 2
    building[1 - leading].cancel()
    await asyncio.gather(*building, return_exceptions=True)
    await until_gone(first + second)


async def test_a_build_that_hangs_ends_at_its_deadline(
    bench: Bench, hang: Hang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uv_environments, "BUILD_DEADLINE_S", 2.0)
    error = await bench.refusal(hang.environments, plan_for("demo"))
    assert "was not ready after" in error.message
    await until_gone(await hang.processes())


# -- other people's jobs, and the outside ----------------------------------------------------------------------------


def hostile_sdist(bench: Bench, marker: Path) -> None:
    """A source distribution whose build leaves `marker`."""
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "evil"\nbackend-path = ["."]\n',
        "evil.py": f"open({str(marker)!r}, 'w').close()\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n",
    }
    (bench.tree / "wheels").mkdir(exist_ok=True)
    with tarfile.open(bench.tree / "wheels/evil-1.0.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"evil-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))


@pytest.mark.parametrize(
    "settings",
    [
        "",
        "[tool.uv]\nno-build = false\nno-binary = true\n",
        '[tool.uv]\nno-binary-package = ["evil"]\n',
        '[tool.uv.pip]\nno-binary = ["evil"]\n',
    ],
)
async def test_no_code_of_another_user_runs_while_it_is_installed(
    bench: Bench, environments: UvEnvironments, tmp_path: Path, settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"
    hostile_sdist(bench, marker)
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(bench.tree / "wheels"))
    bench.write("pyproject.toml", settings)
    bench.write("requirements.txt", "evil\n")
    await bench.refusal(environments, plan_for(fenced=True))
    assert not marker.exists()
    await bench.refusal(environments, plan_for(fenced=False))
    assert marker.exists()


@pytest.mark.parametrize(
    "line",
    [
        "--no-binary evil",
        "--no-binary :all:",
        "--index-url https://example.invalid/simple",
        "--extra-index-url https://example.invalid/${SECRET}",
        "--find-links wheels",
        "-f https://example.invalid/wheels",
        "--no-such-option",
        "-r https://example.invalid/inner.txt",
        "-r x://evil.txt",
        "-c x://evil.txt",
        "-r e'vil.txt",
        "-r 'e vil.txt'",
        "-e .",
        ".",
        "./evil-1.0.tar.gz",
        "evil-1.0.tar.gz",
        "evil-1.0-py3-none-any.WHL[more]; python_version > '3'",
        "/evil",
        "file:evil",
        "evil @ https://example.invalid/evil-1.0-py3-none-any.whl",
        "evil @ file:evil",
        "https://example.invalid/evil-1.0-py3-none-any.whl",
        "git+https://example.invalid/evil",
        "evil==${SECRET}",
        "evil==1 --no-binary evil",
        "evil==1 --hash=sha256:00 -r other.txt",
        "evil==1; python_version > '3' --no-binary evil",
        "evil -r other.txt",
        "evil" * 300,
    ],
)
async def test_lines_that_run_code_or_lead_elsewhere_are_refused_to_others(bench: Bench, line: str) -> None:
    bench.write("requirements.txt", "-r inner.txt\n")
    bench.write("inner.txt", f"demo\n{line}\n")
    for name in ("x:/evil.txt", "e'vil.txt", "e vil.txt"):
        bench.write(name, "--no-binary evil\n./evil-1.0.tar.gz\n")
    error = await bench.refusal(bench.fake(), plan_for(fenced=True))
    assert f"`{line[:400]}` is refused on another user's machine" in error.message
    assert bench.calls("") == []
    assert (await bench.build(bench.fake(), plan_for())).source == "requirements.txt"


async def test_plain_requirements_are_taken_from_others(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.wheel("alpha")
    bench.wheel("beta")
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(bench.tree / "wheels"))
    found = bench.tree / "wheels/beta-1.0-py3-none-any.whl"
    lines = [
        "# a comment",
        "--only-binary :all:",
        "--pre",
        "alpha >= 0.5, <2, !=1.1 ; python_version >= '3.8' and sys_platform == \"linux\"  # why",
        "Beta[more]==1.0 \\",
        f"    --hash=sha256:{hashlib.sha256(found.read_bytes()).hexdigest()} \\",
        f"    --hash=sha256:{'0' * 64}",
    ]
    alpha = hashlib.sha256((bench.tree / "wheels/alpha-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    lines[3] = lines[3].replace("  #", f" --hash sha256:{alpha}  #")
    bench.write("requirements.txt", "\r\n".join(lines))
    environment = await bench.build(UvEnvironments(bench.home), plan_for(fenced=True))
    assert imports(environment, "alpha")
    assert imports(environment, "beta")


async def test_uv_reads_no_requirements_file_of_the_tree(bench: Bench) -> None:
    bench.write("requirements.txt", "demo\n-r inner/more.txt\n")
    bench.write("inner/more.txt", "other\n-c limits.txt\n")
    bench.write("inner/limits.txt", "demo<2\n")
    step = "cat; while [ $# -gt 0 ]; do [ $1 = --constraints ] && cat $2; shift; done"
    environments = bench.fake(f"{{ {step}; }} > {bench.log}.given; echo demo==1")
    await bench.build(environments, plan_for(fenced=True))
    assert bench.log.with_name("calls.given").read_text().split() == ["demo", "otherdemo<2"]
    (call,) = bench.calls("pip compile")
    assert call.endswith(" -")
    assert str(bench.tree) not in call


LOCKED = """version = 1
requires-python = ">=3.11"
[[package]]
name = "alpha"
version = "1.0"
{alpha}
[[package]]
name = "proj"
version = "1"
source = {{ virtual = "." }}
dependencies = [{{ name = "alpha" }}]
"""
PYLOCKED = 'lock-version = "1.0"\ncreated-by = "x"\n[[packages]]\nname = "alpha"\nversion = "1.0"\n'
REGISTRY = 'source = { registry = "https://example.invalid/simple" }\n'


@pytest.mark.parametrize(
    "source",
    [
        'source = { git = "https://example.invalid/alpha?rev=1#1" }',
        'source = { url = "https://example.invalid/alpha-1.0.tar.gz" }',
        'source = { path = "alpha-1.0-py3-none-any.whl" }',
        'source = { registry = "wheels" }',
        'source = { registry = "https://example.invalid/${SECRET}" }',
        REGISTRY + 'wheels = [{ path = "alpha-1.0-py3-none-any.whl" }]',
        REGISTRY + 'wheels = [{ url = "file:///alpha-1.0-py3-none-any.whl" }]',
    ],
)
async def test_locks_that_lead_elsewhere_than_to_wheels_are_refused_to_others(bench: Bench, source: str) -> None:
    bench.write("pyproject.toml", "")
    bench.write("uv.lock", LOCKED.format(alpha=source))
    error = await bench.refusal(bench.fake(), plan_for(fenced=True))
    assert "alpha is no wheel from an index" in error.message
    assert bench.calls("") == []
    assert (await bench.build(bench.fake(), plan_for())).source == "uv.lock"


@pytest.mark.parametrize(
    "source",
    [
        'vcs = { type = "git", url = "https://example.invalid/alpha", commit-id = "1" }',
        'directory = { path = "." }',
        'archive = { url = "https://example.invalid/alpha.zip" }',
        'wheels = [{ path = "wheels/alpha-1.0-py3-none-any.whl" }]',
    ],
)
async def test_pylocks_that_lead_elsewhere_than_to_wheels_are_refused_to_others(bench: Bench, source: str) -> None:
    bench.write("pylock.toml", PYLOCKED + source)
    error = await bench.refusal(bench.fake(), plan_for(fenced=True))
    assert "alpha is no wheel from an index" in error.message
    assert bench.calls("") == []


@pytest_asyncio.fixture
async def web(bench: Bench) -> AsyncIterator[str]:
    """The tree as people reach it over HTTP."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n\r\n")).split()
        path = bench.tree / request[1].decode().lstrip("/")
        content = path.read_bytes() if path.is_file() else b""
        status = "200 found" if path.is_file() else "404 missing"
        head = f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + (content if request[0] == b"GET" else b""))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield "http://127.0.0.1:{1}".format(*server.sockets[0].getsockname())


@pytest.mark.parametrize("name", ["uv.lock", "pylock.toml"])
async def test_locks_of_wheels_are_taken_from_others(
    bench: Bench, environments: UvEnvironments, web: str, name: str
) -> None:
    bench.wheel("alpha")
    file = "alpha-1.0-py3-none-any.whl"
    known = hashlib.sha256((bench.tree / "wheels" / file).read_bytes()).hexdigest()
    if name == "uv.lock":
        bench.write("pyproject.toml", '[project]\nname="proj"\nversion="1"\ndependencies=["alpha"]\n')
        wheel = f'source = {{ registry = "{web}/simple" }}\n'
        wheel += f'wheels = [{{ url = "{web}/wheels/{file}", hash = "sha256:{known}" }}]'
        bench.write("uv.lock", LOCKED.format(alpha=wheel))
    else:
        wheel = f'wheels = [{{ url = "{web}/wheels/{file}", hashes = {{ sha256 = "{known}" }} }}]'
        bench.write("pylock.toml", PYLOCKED + wheel)
    environment = await bench.build(environments, plan_for(fenced=True))
    assert (environment.source, imports(environment, "alpha")) == (name, True)


async def test_no_code_of_another_user_runs_while_its_lock_is_installed(
    bench: Bench, environments: UvEnvironments, tmp_path: Path, web: str
) -> None:
    marker = tmp_path / "ran"
    hostile_sdist(bench, marker)
    about = '[project]\nname = "proj"\nversion = "1"\ndependencies = ["evil"]\n'
    bench.write("pyproject.toml", f'{about}[tool.uv]\nno-build = false\nno-binary-package = ["evil"]\n')
    known = hashlib.sha256((bench.tree / "wheels/evil-1.0.tar.gz").read_bytes()).hexdigest()
    source = f'source = {{ registry = "{web}/simple" }}\n'
    source += f'sdist = {{ url = "{web}/wheels/evil-1.0.tar.gz", hash = "sha256:{known}" }}'
    bench.write("uv.lock", LOCKED.format(alpha=source).replace("alpha", "evil"))
    await bench.refusal(environments, plan_for(fenced=True))
    assert not marker.exists()
    await bench.refusal(environments, plan_for(fenced=False))
    assert marker.exists()


async def test_builds_for_others_run_shut_in(bench: Bench) -> None:
    seen: list[tuple[str, Path]] = []

    def wrap(argv: Sequence[str], tree: Path) -> Sequence[str]:
        seen.append((argv[1], tree))
        return ["env", "SHUT_IN=1", *argv]

    environments = bench.fake(wrap=wrap)
    await bench.build(environments, plan_for("demo"))
    assert seen == []
    await bench.build(environments, plan_for("demo", user="bob", fenced=True))
    assert seen == [("pip", bench.tree), ("venv", bench.tree), ("pip", bench.tree)]
    assert "SHUT_IN=1" in bench.log.with_name("calls.env").read_text()


async def test_variables_of_the_agent_do_not_lead_uv_astray(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTUAL_ENV", "/somewhere")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.setenv("UV_INDEX_URL", "https://index.example.invalid/simple")
    for name in ("UV_SECRET_TOKEN", "UV_INDEX_OFFICE_PASSWORD", "UV_PUBLISH_TOKEN"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.delenv("UV_CACHE_DIR", raising=False)
    variables = bench.log.with_name("calls.env")
    await bench.build(bench.fake(), plan_for("demo"))
    mine = dict(line.partition("=")[::2] for line in variables.read_text().splitlines())
    assert {"VIRTUAL_ENV", "PYTHONPATH"}.isdisjoint(mine)
    assert mine["SECRET"] == "hunter2"
    assert mine["UV_INDEX_URL"] == "https://index.example.invalid/simple"
    assert mine["UV_CACHE_DIR"] == str(bench.home / "cache")
    await bench.build(bench.fake(), plan_for("demo", user="cyd", fenced=True))
    theirs = dict(line.partition("=")[::2] for line in variables.read_text().splitlines())
    assert "hunter2" not in theirs.values()
    assert theirs["UV_INDEX_URL"] == mine["UV_INDEX_URL"]
    monkeypatch.setenv("UV_CACHE_DIR", "/elsewhere")
    await bench.build(bench.fake(), plan_for("demo", user="bob"))
    assert "UV_CACHE_DIR=/elsewhere\n" in variables.read_text()


async def test_files_outside_the_tree_are_not_read(bench: Bench, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("demo\n")
    for name in ("requirements.txt", "pylock.toml", "train.py", ".python-version"):
        (bench.tree / name).symlink_to(secret)
    assert (await bench.build(bench.fake(), plan_for())).source == "empty"
    (bench.tree / "inner.txt").symlink_to(secret)
    for name in (str(secret), "../secret.txt", "inner.txt", "missing.txt"):
        error = await bench.refusal(bench.fake(), plan_for(requirements=f"-r {name}\n"))
        assert f"it includes {name}, which is not in the directory that was shipped" in error.message
    assert bench.calls("pip") == []


async def test_requirements_that_include_each_other_end(bench: Bench) -> None:
    bench.write("requirements.txt", "-r inner/more.txt\n")
    bench.write("inner/more.txt", "-r ../requirements.txt\n--requirement=../inner/more.txt\n")
    assert (await bench.build(bench.fake(), plan_for())).source == "requirements.txt"


@pytest.mark.parametrize("block", ["# dependencies = [", "# dependencies = 5", '# dependencies = ["a"'])
async def test_broken_inline_metadata_is_named(bench: Bench, block: str) -> None:
    bench.write("train.py", f"# /// script\n{block}\n# ///\n")
    error = await bench.refusal(bench.fake(), plan_for())
    assert error.message.startswith("cannot build the environment from train.py: ")


async def test_a_file_that_is_no_text_is_named(bench: Bench) -> None:
    (bench.tree / "requirements.txt").write_bytes(b"\xff\xfe\x00")
    error = await bench.refusal(bench.fake(), plan_for())
    assert "requirements.txt: it cannot be read" in error.message


# -- files made to harm ----------------------------------------------------------------------------------------------


async def test_what_a_package_says_of_its_interpreter_counts_for_nothing(
    bench: Bench, environments: UvEnvironments, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    bench.wheel("alpha")
    with zipfile.ZipFile(bench.tree / "wheels/alpha-1.0-py3-none-any.whl", "a") as archive:
        for name in ("pyvenv.cfg", ".complete", "complete"):
            archive.writestr(f"alpha-1.0.data/data/{name}", f"home = {secret}\n")
    bench.write("requirements.txt", f"{LOCAL}alpha\n")
    for cached in (False, True):
        environment = await bench.build(environments, plan_for())
        assert environment.cached == cached
        assert str(secret) in (environment.bin_path.parent / "pyvenv.cfg").read_text()
        assert environment.interpreter is not None
        base = getattr(sys, "_base_executable", sys.executable)
        assert os.path.realpath(environment.interpreter) == os.path.realpath(base)
        readable = fences.interpreter_paths(environment.bin_path, environment.interpreter)
        assert environment.bin_path.parent in readable
        assert secret not in readable
        assert secret not in fences.interpreter_paths(environment.bin_path)


async def test_a_package_cannot_pass_a_half_made_environment_off_as_whole(bench: Bench) -> None:
    first = await bench.build(bench.fake(), plan_for())
    (bench.home / COMPLETE / first.bin_path.parent.name).unlink()
    for name in (".complete", "complete"):
        (first.bin_path.parent / name).write_text("/bin/python")
    bench.fake()
    assert bench.built() == []


HOSTILE = {
    "many blocks": ("train.py", "# /// script\n" * 15_000 + "x"),
    "many nested lists": ("pyproject.toml", "a=" + "[" * 5000 + "]" * 5000),
    "many nested lists in a script": ("train.py", "# /// script\n# a=" + "[" * 5000 + "\n# ///\n"),
    "deep keys": ("pyproject.toml", "a." * 100_000 + "a=1"),
    "deep tables": ("pyproject.toml", "[" + "a." * 20_000 + "a]\n" + "".join(f"b{i}=1\n" for i in range(20_000))),
    "broken settings": ("pyproject.toml", "a = = b"),
    "large requirements": ("requirements.txt", "a\n" * 200_000),
    "a large script": ("train.py", "#\n" * 200_000),
    "one long line": ("requirements.txt", "a" * 250_000 + "; '" + " " * 10_000),
    "a chain": ("requirements.txt", "-r r0"),
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_hostile_files_hold_nobody_up(bench: Bench, case: str) -> None:
    name, text = HOSTILE[case]
    bench.write(name, text)
    for i in range(1200 if case == "a chain" else 0):
        bench.write(f"r{i}", f"-r r{i + 1}\n")
    loop = asyncio.get_running_loop()
    began = time.process_time()
    building = loop.create_task(bench.build(bench.fake(), plan_for(fenced=True)))
    late_s = 0.0
    while not building.done():
        asked = loop.time()
        await asyncio.wait([building], timeout=0.01)
        late_s = max(late_s, loop.time() - asked - 0.01)
    assert time.process_time() - began < 5
    assert late_s < 1
    if case == "many blocks":
        assert building.result().source == "empty"
    else:
        error = building.exception()
        assert isinstance(error, MeshgpuError)
        assert error.code == "environment"


async def test_files_are_read_off_the_loop(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    readers: list[threading.Thread] = []

    def read(spec: JobSpec, tree: Path) -> Wanted:
        readers.append(threading.current_thread())
        return find_wanted(spec, tree)

    monkeypatch.setattr(uv_environments, "find_wanted", read)
    await bench.build(bench.fake(), plan_for())
    assert readers
    assert threading.main_thread() not in readers


async def test_a_known_environment_is_found_in_milliseconds(bench: Bench) -> None:
    bench.write("requirements.txt", "demo\n" * 50)
    environments = bench.fake()
    await bench.build(environments, plan_for(fenced=True))
    took_s = []
    for _ in range(20):
        began = time.perf_counter()
        assert (await bench.build(environments, plan_for(fenced=True))).cached
        took_s.append(time.perf_counter() - began)
    assert min(took_s) < 0.005
