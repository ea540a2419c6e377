import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from meshgpu import guard
from meshgpu.adapters import guards
from meshgpu.adapters.fences import Fence, _try_fence
from meshgpu.adapters.inside import LIBRARY
from meshgpu.adapters.log_ledger import LedgerReader, follow
from meshgpu.adapters.process_executor import ProcessExecutor
from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.ids import Digest, GpuId, JobId, MeshId, NodeId
from meshgpu.model.job import (
    AttemptPlan,
    AttemptState,
    EnvironmentRequest,
    JobSpec,
    Phase,
    Result,
    StopMode,
)
from meshgpu.model.logs import LogRecord, LogStream
from meshgpu.model.resources import NO_GPU, GpuShare, Resources
from meshgpu.model.sweep import Goal, Metric, Objective
from meshgpu.ports import AttemptEnded, AttemptMeasured, AttemptProgress, AttemptStarted, Environment, ExecutorEvent

DEADLINE_S = 30.0
NO_FENCE = Fence("")
BIN = Path(sys.executable).parent
DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open("daemon", "w").write("here")
        time.sleep(600)
    os._exit(0)
os.wait()
while not os.path.exists("daemon"):
    time.sleep(0.005)
print("ready")
if len(sys.argv) > 1:
    time.sleep(600)
"""


class FakeEnvironments:
    """The interpreter of these tests; `hold` keeps staging going until it is cancelled."""

    def __init__(self) -> None:
        self.hold = False
        self.error: MeshgpuError | None = None
        self.cancelled = False

    async def build(self, plan: AttemptPlan, tree: Path, progress: Callable[[str], None]) -> Environment:
        progress("environment: 12 packages")
        if self.error:
            raise self.error
        if self.hold:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled = True
                raise
        return Environment(BIN, "k7qd", cached=True, source="requirements.txt")


@dataclass
class Run:
    """What one attempt came to."""

    events: list[ExecutorEvent]
    result: Result
    stdout: str
    stderr: str


class Rig:
    """One executor and its events."""

    def __init__(self, jobs_dir: Path, fence: Fence | None = NO_FENCE, grace_s: float = DEADLINE_S) -> None:
        self.jobs_dir = jobs_dir
        self.environments = FakeEnvironments()
        self.secrets: dict[str, str] = {}
        self.executor = ProcessExecutor(
            jobs_dir, self.environments, fence=fence, grace_s=grace_s, unseal=lambda _plan: self.secrets
        )
        self.events: list[ExecutorEvent] = []
        self._news = asyncio.Event()

    async def start(self) -> None:
        def emit(event: ExecutorEvent) -> None:
            self.events.append(event)
            self._news.set()

        await self.executor.start(emit)

    def attempt(self, job: str) -> Path:
        return self.jobs_dir / job / "1"

    def submit(self, plan: AttemptPlan) -> None:
        work = self.attempt(plan.spec.job) / "work"
        work.mkdir(parents=True, exist_ok=True)
        self.executor.run(plan, work)

    async def until(self, wanted: type[ExecutorEvent], job: str = "job") -> ExecutorEvent:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for event in self.events:
                    if isinstance(event, wanted) and event.job == job:
                        return event
                self._news.clear()
                await self._news.wait()

    async def ended(self, job: str = "job") -> Run:
        end = await self.until(AttemptEnded, job)
        assert isinstance(end, AttemptEnded)
        records = records_of(self.attempt(job) / "log")
        stdout, stderr = (
            b"".join(record.data for record in records if record.stream is stream).decode(errors="surrogateescape")
            for stream in LogStream
        )
        mine = [event for event in self.events if event.job == job]
        return Run(mine, end.result, stdout, stderr)

    async def run(self, *command: str, job: str = "job", **options: object) -> Run:
        self.submit(plan(*command, job=job, **options))  # type: ignore[arg-type]  # the options of `plan`
        return await self.ended(job)

    async def says(self, text: str, job: str = "job") -> None:
        """Wait until the job printed `text`."""
        seen = b""
        async with asyncio.timeout(DEADLINE_S):
            async for pieces in follow(LedgerReader(self.attempt(job) / "log"), lambda: False):
                seen += b"".join(piece.data for piece in pieces if isinstance(piece, LogRecord))
                if text.encode() in seen:
                    return


def plan(
    *command: str,
    job: str = "job",
    shell: bool = False,
    env: tuple[tuple[str, str], ...] = (),
    gpus: tuple[str, ...] = (),
    fenced: bool = False,
    objective: Objective | None = None,
) -> AttemptPlan:
    spec = JobSpec(
        mesh=MeshId("mesh"),
        job=JobId(job),
        nonce=b"n" * 16,
        name="train",
        user="ada",  # type: ignore[arg-type]  # a UserName
        submitter=NodeId("node"),
        command=command,
        shell=shell,
        env=env,
        environment=EnvironmentRequest(),
        tree=Digest("tree"),
        tree_bytes=0,
        tree_files=0,
        resources=Resources(NO_GPU),
        machine=None,
        stewards=(),
        issued_wall_s=0.0,
        objective=objective,
    )
    return AttemptPlan(spec, 1, tuple(GpuShare(GpuId(gpu)) for gpu in gpus), fenced, "rig7")


def records_of(ledger: Path, position: int = 0) -> list[LogRecord]:
    """What a ledger holds from `position` on."""
    reader = LedgerReader(ledger, position)
    return [
        piece
        for piece in itertools.chain.from_iterable(iter(lambda: reader.read(2**20), []))
        if isinstance(piece, LogRecord)
    ]


def processes_below(top: Path) -> set[int]:
    """Pids of all processes that were started for, stand in, or hold a file open below `top`."""
    found = set()
    mark = os.fsencode(top) + b"/"
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            held = [os.fsencode(link.readlink()) for link in (process / "cwd", *(process / "fd").iterdir())]
            if any(path.startswith(mark) for path in held) or mark in (process / "environ").read_bytes():
                found.add(int(process.name))
    return found


def wait_until_none(top: Path) -> set[int]:
    """Processes that are still there after the time that guards need to leave."""
    deadline = time.monotonic() + DEADLINE_S
    while (left := processes_below(top)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


@pytest.fixture(autouse=True)
def no_leaks(tmp_path: Path) -> Iterator[None]:
    descriptors = len([*Path("/proc/self/fd").iterdir()])
    children = set(guard._children(os.getpid()))
    yield
    left = wait_until_none(tmp_path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    assert set(guard._children(os.getpid())) <= children
    assert len([*Path("/proc/self/fd").iterdir()]) <= descriptors


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path / "jobs")
    await rig.start()
    yield rig
    await rig.executor.close()


def force_isolation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, isolation: str) -> None:
    """Have fork servers use `isolation`, whatever works here."""
    server = tmp_path / "server.py"
    source = Path(guard.__file__).read_text().replace('if __name__ == "__main__":\n    serve()\n', "")
    server.write_text(f"{source}\n\ndef find_isolation():\n    return {isolation!r}\n\nserve()\n")
    monkeypatch.setattr(guard, "__file__", str(server))


@pytest.fixture(params=["pid", "user", "subreaper"])
async def isolated_rig(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> AsyncIterator[Rig]:
    """A rig for each way to hold a job's tree together."""
    if request.param != "subreaper":
        trial = f"import sys; sys.path.insert(0, {str(Path(guard.__file__).parent)!r}); import guard\n"
        trial += f"sys.exit(guard._try_isolation({request.param!r}))"
        tried = await asyncio.create_subprocess_exec(sys.executable, "-c", trial)
        if await asyncio.wait_for(tried.wait(), DEADLINE_S):
            pytest.skip(f"no {request.param} namespaces here")
    force_isolation(monkeypatch, tmp_path, request.param)
    rig = Rig(tmp_path / "jobs")
    await rig.start()
    yield rig
    await rig.executor.close()


# -- one job ---------------------------------------------------------------------------------------------------------


async def test_job_is_staged_started_saved_and_ended(rig: Rig) -> None:
    done = await rig.run("sh", "-c", "echo out; echo err >&2; echo data > result.txt")
    progress = [AttemptProgress, AttemptProgress, AttemptStarted, AttemptProgress, AttemptEnded]
    assert [type(event) for event in done.events] == progress
    staging, built, _, saving, _ = done.events
    assert staging == AttemptProgress(JobId("job"), 1, Phase.STAGING, "environment: 12 packages")
    assert isinstance(built, AttemptProgress)
    assert built.detail.startswith("environment ")
    assert saving == AttemptProgress(JobId("job"), 1, Phase.SAVING, "")
    assert done.result == Result(AttemptState.EXITED, 0, "", output_files=1, output_bytes=5)
    assert (done.stdout, done.stderr) == ("out\n", "err\n")


@pytest.mark.parametrize(
    ("command", "code", "stderr"),
    [
        ("true", 0, ""),
        ("exit 7", 7, ""),
        ("kill -9 $$", 137, ""),
        ("kill -TERM $$", 143, ""),
        ("exec ./nosuch", 127, None),
    ],
)
async def test_exit_code_is_the_jobs_own(isolated_rig: Rig, command: str, code: int, stderr: str | None) -> None:
    done = await isolated_rig.run(command, shell=True)
    assert (done.result.outcome, done.result.exit_code, done.result.reason) == (AttemptState.EXITED, code, "")
    assert stderr is None or done.stderr == stderr


@pytest.mark.parametrize(
    ("command", "code", "stderr"),
    [
        ("train.sh", 127, "meshgpu: train.sh: command not found\n"),
        ("./train.sh", 127, "meshgpu: ./train.sh: command not found\n"),
        ("/etc/passwd", 126, "meshgpu: /etc/passwd: Permission denied\n"),
        ("/etc", 126, "meshgpu: /etc: Permission denied\n"),
    ],
)
async def test_command_that_cannot_run_is_named(rig: Rig, command: str, code: int, stderr: str) -> None:
    done = await rig.run(command)
    assert (done.result.exit_code, done.stderr) == (code, stderr)


async def test_script_without_interpreter_line_runs_in_a_shell(rig: Rig) -> None:
    work = rig.attempt("job") / "work"
    work.mkdir(parents=True)
    (work / "train.sh").write_text("echo $1")
    (work / "train.sh").chmod(0o755)
    assert (await rig.run("./train.sh", "ran")).stdout == "ran\n"


async def test_arguments_arrive_as_they_are(rig: Rig) -> None:
    odd = ("größe", "a b", "", "it's", "line\nbreak", "日本", os.fsdecode(b"\xff"))
    done = await rig.run(
        "python", "-c", "import sys, os; sys.stdout.buffer.write(os.fsencode(ascii(sys.argv[1:])))", *odd
    )
    assert done.stdout == ascii(list(odd))


async def test_job_sees_only_what_it_is_given(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "MESHGPU_HOME", "LD_PRELOAD_X", "SSH_AUTH_SOCK"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("LC_TIME", "de_DE.UTF-8")
    env = (("LR", "0.1"), ("PYTHONUNBUFFERED", "0"), ("CUDA_VISIBLE_DEVICES", "0,1"))
    script = "import os,json; print(json.dumps(dict(os.environ)))"
    done = await rig.run("python", "-c", script, env=env, gpus=("GPU-b", "GPU-a"))
    seen = json.loads(done.stdout)
    assert "secret" not in done.stdout
    assert seen.pop("PATH").split(":")[:2] == [str(BIN), "/usr/local/sbin"]
    assert {name: seen.pop(name) for name in ("HOME", "USER")}["HOME"] == str(Path.home())
    for name in ("LANG", "TZ", "LC_ALL", "LC_CTYPE"):
        seen.pop(name, None)
    assert seen == {
        "LC_TIME": "de_DE.UTF-8",
        "LR": "0.1",
        "MESHGPU_JOB_ID": "job",
        "MESHGPU_MACHINE": "rig7",
        "MESHGPU_OUTPUT_DIR": str(rig.attempt("job") / "work"),
        "CUDA_VISIBLE_DEVICES": "GPU-b,GPU-a",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "PYTHONUNBUFFERED": "1",
        "VIRTUAL_ENV": str(BIN.parent),
        "PYTHONPATH": str(LIBRARY),
        "MESHGPU_METRICS": str(rig.attempt("job") / "work" / "meshgpu-metrics.jsonl"),
    }


async def test_job_reports_numbers_which_are_told_while_it_runs_and_in_its_result(rig: Rig) -> None:
    script = "import meshgpu, time; meshgpu.log(step=1, loss=0.5); time.sleep(0.5); meshgpu.log(step=2, loss=0.7)"
    done = await rig.run("python", "-c", script, objective=Objective("loss", Goal.MIN, ""))
    assert done.result.metric == Metric(0.7, 0.5, 2)
    assert all(isinstance(e.metric, Metric) for e in rig.events if isinstance(e, AttemptMeasured))


async def test_users_own_import_path_comes_after_ours(rig: Rig) -> None:
    script = "import os; print(os.environ['PYTHONPATH'])"
    done = await rig.run("python", "-c", script, env=(("PYTHONPATH", "/opt/mine"),))
    assert done.stdout == f"{LIBRARY}:/opt/mine\n"


async def test_job_without_gpu_sees_none(rig: Rig) -> None:
    assert (await rig.run('echo "[$CUDA_VISIBLE_DEVICES]${CUDA_VISIBLE_DEVICES-unset}"', shell=True)).stdout == "[]\n"


async def test_job_inherits_three_descriptors_and_plain_signals(isolated_rig: Rig) -> None:
    done = await isolated_rig.run("grep", "-E", "SigBlk|SigIgn", "/proc/self/status", job="signals")
    # 32 and 33 belong to libc, which ignores them in what posix_spawn starts: under make, in everything.
    masks = [int(line.split()[1], 16) & ~(0b11 << 31) for line in done.stdout.splitlines()]
    assert masks == [0, 0]
    script = "import os; print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1], os.read(0, 1), os.umask(0))"
    done = await isolated_rig.run("python", "-c", script)
    assert done.stdout == f"[0, 1, 2] b'' {0o022}\n"
    done = await isolated_rig.run("pwd", job="directory")
    assert done.stdout == f"{isolated_rig.attempt('directory') / 'work'}\n"


async def test_job_is_never_pid_1(isolated_rig: Rig) -> None:
    assert (await isolated_rig.run("sh", "-c", "test $$ -ne 1")).result.exit_code == 0


async def test_outputs_are_what_is_new_or_changed(rig: Rig) -> None:
    work = rig.attempt("job") / "work"
    (work / "src").mkdir(parents=True)
    (work / "src" / "model.py").write_text("x = 1")
    (work / "old.txt").write_text("old")
    script = "import src.model; open('old.txt', 'a').write('er'); open('größe.bin', 'wb').write(bytes(10))\n"
    script += "import os; os.symlink('/etc/passwd', 'link'); os.mkdir('empty'); os.mkdir('d'); open('d/x', 'w').close()"
    done = await rig.run("python", "-c", script)
    outputs = json.loads((rig.attempt("job") / "outputs.json").read_bytes())
    assert sorted(outputs) == [["d/x", 0], ["größe.bin", 10], ["old.txt", 5]]
    assert (done.result.output_files, done.result.output_bytes) == (3, 15)


async def test_two_hundred_megabytes_flow_while_both_streams_stay_apart(rig: Rig) -> None:
    script = "import os, threading\n"
    script += "def fill(fd, byte):\n for _ in range(1600): os.write(fd, byte * 65536)\n"
    script += "threads = [threading.Thread(target=fill, args=(fd, byte)) for fd, byte in ((1, b'o'), (2, b'e'))]\n"
    script += "[thread.start() for thread in threads]; [thread.join() for thread in threads]"
    done = await rig.run("python", "-c", script)
    size = 1600 * 65536
    assert done.result.exit_code == 0, done.stderr[:500]
    assert (len(done.stdout), len(done.stderr)) == (size, size)
    assert (done.stdout.count("o"), done.stderr.count("e")) == (size, size)


async def test_many_jobs_at_once(rig: Rig) -> None:
    names = [f"job{number}" for number in range(40)]
    for name in names:
        rig.submit(plan("sh", "-c", f"echo {name}", job=name))
    done = [await rig.ended(name) for name in names]
    assert [(run.stdout, run.result.exit_code) for run in done] == [(f"{name}\n", 0) for name in names]


async def test_second_run_of_an_attempt_is_ignored(rig: Rig) -> None:
    rig.submit(plan("sh", "-c", "echo once"))
    rig.submit(plan("sh", "-c", "echo twice"))
    done = await rig.ended()
    assert done.stdout == "once\n"
    assert sum(isinstance(event, AttemptEnded) for event in rig.events) == 1


# -- nothing is left -------------------------------------------------------------------------------------------------


async def test_daemon_ends_with_its_job(isolated_rig: Rig) -> None:
    done = await isolated_rig.run("python", "-c", DAEMON)
    assert done.result.exit_code == 0
    assert done.stdout == "ready\n"
    assert wait_until_none(isolated_rig.jobs_dir) == set()


@pytest.mark.parametrize("mode", StopMode)
async def test_whole_tree_is_gone_after_a_stop(isolated_rig: Rig, mode: StopMode) -> None:
    isolated_rig.submit(plan("python", "-c", DAEMON, "stay"))
    await isolated_rig.says("ready")
    isolated_rig.executor.stop(JobId("job"), 1, mode)
    done = await isolated_rig.ended()
    assert processes_below(isolated_rig.attempt("job") / "work") == set()
    assert done.result == Result(
        AttemptState.EXITED, 143 if mode is StopMode.STOP else 137, "", output_files=1, output_bytes=4
    )


async def test_killed_guard_takes_its_job_along(isolated_rig: Rig) -> None:
    isolated_rig.submit(plan("python", "-c", DAEMON, "stay"))
    await isolated_rig.says("ready")
    (pid,) = isolated_rig.executor.guards()
    os.kill(pid, signal.SIGKILL)
    done = await isolated_rig.ended()
    assert done.result == Result(AttemptState.CRASHED, None, "the job's guard was killed")
    assert processes_below(isolated_rig.attempt("job") / "work") == set()


async def test_job_that_kills_its_init_is_cleaned_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only without a namespace can a job do that; the guard is then who its orphans come to."""
    force_isolation(monkeypatch, tmp_path, "subreaper")
    rig = Rig(tmp_path / "jobs")
    await rig.start()
    done = await rig.run("python", "-c", DAEMON + "import os; os.kill(os.getppid(), 9); time.sleep(600)")
    assert (done.result.exit_code, done.result.reason) == (137, "something killed the job's init process")
    assert processes_below(rig.attempt("job") / "work") == set()
    await rig.executor.close()


async def test_guards_are_told_while_they_live(rig: Rig) -> None:
    assert rig.executor.guards() == frozenset()
    rig.submit(plan("sleep", "600"))
    await rig.until(AttemptStarted)
    (pid,) = rig.executor.guards()
    record = json.loads((rig.attempt("job") / "guard.json").read_bytes())
    assert record["pid"] == pid
    ancestor = record["job_pid"]
    while ancestor not in (1, pid):
        ancestor = int(guard._stat(ancestor)[1])
    assert ancestor == pid
    rig.executor.stop(JobId("job"), 1, StopMode.KILL)
    await rig.ended()
    assert rig.executor.guards() == frozenset()


# -- stop and kill ---------------------------------------------------------------------------------------------------

CAREFUL = """
import signal, sys, time
def save(*_):
    open("checkpoint", "w").write("saved")
    print("saved", flush=True)
    {after}
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
while True:
    time.sleep(600)
"""


async def test_stop_leaves_time_to_save(isolated_rig: Rig) -> None:
    isolated_rig.submit(plan("python", "-c", CAREFUL.format(after="sys.exit(3)")))
    await isolated_rig.says("ready")
    isolated_rig.executor.stop(JobId("job"), 1, StopMode.STOP)
    done = await isolated_rig.ended()
    assert done.result == Result(AttemptState.EXITED, 3, "", output_files=1, output_bytes=5)
    exited = json.loads((isolated_rig.attempt("job") / "exit.json").read_bytes())
    assert exited["stopped_by"] == "stop"


async def test_stop_reaches_the_whole_process_group(rig: Rig) -> None:
    child = 'trap "echo child; exit" TERM; echo ready; sleep 600 & wait'
    script = f"trap 'echo parent; wait; exit 5' TERM; sh -c '{child}' & wait"
    rig.submit(plan(script, shell=True))
    await rig.says("ready")
    rig.executor.stop(JobId("job"), 1, StopMode.STOP)
    done = await rig.ended()
    assert sorted(done.stdout.split()) == ["child", "parent", "ready"]
    assert done.result.exit_code == 5


async def test_job_that_ignores_a_stop_is_killed_after_the_grace(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "jobs", grace_s=0.2)
    await rig.start()
    rig.submit(plan("python", "-c", CAREFUL.format(after="")))
    await rig.says("ready")
    rig.executor.stop(JobId("job"), 1, StopMode.STOP)
    done = await rig.ended()
    assert done.result.exit_code == 137
    assert done.result.reason == "killed: it still ran 0.2 s after it was told to stop"
    assert done.result.output_files == 1
    await rig.executor.close()


async def test_kill_overrides_a_stop_that_is_waiting(isolated_rig: Rig) -> None:
    isolated_rig.submit(plan("python", "-c", CAREFUL.format(after="")))
    await isolated_rig.says("ready")
    isolated_rig.executor.stop(JobId("job"), 1, StopMode.STOP)
    await isolated_rig.says("saved")
    isolated_rig.executor.stop(JobId("job"), 1, StopMode.KILL)
    assert (await isolated_rig.ended()).result.exit_code == 137


async def test_stop_after_a_kill_changes_nothing(rig: Rig) -> None:
    rig.submit(plan("sh", "-c", "echo ready; sleep 600"))
    await rig.says("ready")
    rig.executor.stop(JobId("job"), 1, StopMode.KILL)
    rig.executor.stop(JobId("job"), 1, StopMode.STOP)
    assert (await rig.ended()).result.exit_code == 137


@pytest.mark.parametrize("mode", StopMode)
async def test_stop_at_any_moment_of_the_start_ends_the_job(rig: Rig, mode: StopMode) -> None:
    """The grace is longer than the deadline: a stop that gets lost in the start would fail here."""
    for delay in range(24):
        job = f"job{delay}"
        rig.submit(plan("sleep", "600", job=job))
        await asyncio.sleep(delay * 0.0005)
        rig.executor.stop(JobId(job), 1, mode)
        done = await rig.ended(job)
        if done.result.outcome is AttemptState.EXITED:
            assert done.result.exit_code == (143 if mode is StopMode.STOP else 137)
        else:
            assert done.result == Result(AttemptState.ABANDONED, None, "stopped before it started")


async def test_stop_of_an_unknown_attempt_is_ignored(rig: Rig) -> None:
    rig.executor.stop(JobId("job"), 1, StopMode.KILL)
    assert rig.events == []


# -- staging ---------------------------------------------------------------------------------------------------------


async def test_stop_during_staging_abandons_the_attempt(rig: Rig) -> None:
    rig.environments.hold = True
    rig.submit(plan("true"))
    await rig.until(AttemptProgress)
    rig.executor.stop(JobId("job"), 1, StopMode.STOP)
    done = await rig.ended()
    assert done.result == Result(AttemptState.ABANDONED, None, "stopped before it started")
    assert rig.environments.cancelled
    assert not (rig.attempt("job") / "guard.json").exists()


async def test_environment_that_cannot_be_built_ends_the_attempt(rig: Rig) -> None:
    rig.environments.error = MeshgpuError("environment", "cannot build the environment: no torch==99")
    done = await rig.run("true")
    assert done.result == Result(AttemptState.EXITED, None, "cannot build the environment: no torch==99")
    assert not any(isinstance(event, AttemptStarted) for event in done.events)


async def test_fault_of_the_agent_ends_the_attempt(rig: Rig) -> None:
    """Or the attempt holds its GPUs for ever. A shell without a command came from a member's own client."""
    rig.submit(plan(shell=True))
    done = await rig.ended()
    assert done.result == Result(
        AttemptState.CRASHED, None, "a fault of the agent: IndexError: tuple index out of range"
    )
    assert guards.read_guard(rig.attempt("job"))["pid"] == 0  # claimed, so that no guard can start it any more


async def test_fault_of_the_agent_ends_the_job_first(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_: int) -> None:
        raise RecursionError("too deep")

    rig.submit(plan("python", "-c", DAEMON, "stay"))
    await rig.says("ready")
    fresh = Rig(rig.jobs_dir)
    await fresh.start()
    watched = guards.ended
    calls = iter((fail, watched))
    monkeypatch.setattr(guards, "ended", lambda descriptor: next(calls)(descriptor))
    fresh.executor.adopt(plan("sh"))
    done = await fresh.ended()
    assert done.result == Result(AttemptState.CRASHED, None, "a fault of the agent: RecursionError: too deep")
    assert processes_below(rig.attempt("job") / "work") == set()
    await fresh.executor.close()
    await rig.ended()


async def test_job_that_digs_deep_ends_like_any_other(rig: Rig) -> None:
    attempt = rig.attempt("job")
    (attempt / "home").mkdir(parents=True)
    dig = "import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')\n"
    try:
        done = await rig.run("python", "-c", f"{dig}os.chdir({str(attempt / 'home')!r})\n{dig}")
        assert (done.result.outcome, done.result.exit_code, done.stderr) == (AttemptState.EXITED, 0, "")
        assert not (attempt / "home").exists()
    finally:
        remove = await asyncio.create_subprocess_exec("rm", "-rf", str(attempt))
        await asyncio.wait_for(remove.wait(), DEADLINE_S)


async def test_close_during_staging_emits_nothing(rig: Rig) -> None:
    rig.environments.hold = True
    rig.submit(plan("true"))
    await rig.until(AttemptProgress)
    await rig.executor.close()
    assert [type(event) for event in rig.events] == [AttemptProgress]
    assert rig.environments.cancelled


# -- agents come and go ----------------------------------------------------------------------------------------------

COUNTER = "i=0; while [ $i -lt {count} ]; do echo line $i; i=$((i+1)); {pause}; done; exit 9"
AGENT = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_process_executor import Rig, plan
async def main():
    rig = Rig(Path({jobs!r}))
    await rig.start()
    rig.submit(plan("sh", "-c", {command!r}))
    await rig.says("line 20")
    print("running", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_agent_restart_loses_and_doubles_no_line(rig: Rig) -> None:
    count = 3000
    job = plan("sh", "-c", COUNTER.format(count=count, pause="[ $((i%100)) -eq 0 ] && sleep 0.02"))
    rig.submit(job)
    await rig.says("line 20")
    await rig.executor.close()
    position, seen = 0, b""
    for _ in range(3):
        for record in records_of(rig.attempt("job") / "log", position):
            position, seen = record.position, seen + record.data
        again = Rig(rig.jobs_dir)
        await again.start()
        assert again.events == []
        again.executor.adopt(job)
        await again.until(AttemptStarted)
        await again.executor.close()
    last = Rig(rig.jobs_dir)
    await last.start()
    last.executor.adopt(job)
    done = await last.ended()
    for record in records_of(rig.attempt("job") / "log", position):
        seen += record.data
    assert done.result.exit_code == 9
    assert seen.decode().splitlines() == [f"line {number}" for number in range(count)]
    await last.executor.close()


async def test_job_outlives_a_killed_agent(rig: Rig) -> None:
    count = 300
    command = COUNTER.format(count=count, pause="sleep 0.005")
    source = AGENT.format(tests=str(Path(__file__).parent), jobs=str(rig.jobs_dir), command=command)
    agent = await asyncio.create_subprocess_exec(sys.executable, "-c", source, stdout=subprocess.PIPE)
    assert agent.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        assert await agent.stdout.readline() == b"running\n"
    agent.kill()
    await agent.wait()
    fresh = Rig(rig.jobs_dir)
    await fresh.start()
    assert len(fresh.executor.guards()) == 1
    fresh.executor.adopt(plan("sh", "-c", command))
    assert await fresh.until(AttemptStarted)
    done = await fresh.ended()
    assert done.result.exit_code == 9
    assert done.stdout.splitlines() == [f"line {number}" for number in range(count)]
    await fresh.executor.close()


async def test_stop_reaches_an_adopted_job(rig: Rig) -> None:
    job = plan("sh", "-c", "echo ready; exec sleep 600")
    rig.submit(job)
    await rig.says("ready")
    await rig.executor.close()
    fresh = Rig(rig.jobs_dir)
    await fresh.start()
    fresh.executor.adopt(job)
    fresh.executor.stop(JobId("job"), 1, StopMode.STOP)
    assert (await fresh.ended()).result.exit_code == 143
    await fresh.executor.close()


async def test_attempt_that_ended_meanwhile_is_told_once(rig: Rig) -> None:
    await rig.run("sh", "-c", "echo x > out; exit 7")
    fresh = Rig(rig.jobs_dir)
    await fresh.start()
    fresh.executor.adopt(plan("sh"))
    fresh.executor.adopt(plan("sh"))
    done = await fresh.ended()
    assert done.result == Result(AttemptState.EXITED, 7, "", output_files=1, output_bytes=2)
    assert [type(event) for event in fresh.events] == [AttemptProgress, AttemptEnded]
    await fresh.executor.close()


@pytest.mark.parametrize("has_directory", [True, False])
async def test_adopted_attempt_that_never_started_cannot_start_later(
    rig: Rig, has_directory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that an earlier fork server still holds must find the attempt taken."""
    monkeypatch.setattr("meshgpu.adapters.guarded.CLAIM_LIMIT_S", 1.0)  # the refusal is final: no need to wait for long
    if has_directory:
        (rig.attempt("job") / "work").mkdir(parents=True)
    rig.executor.adopt(plan("sh", "-c", "touch ran"))
    done = await rig.ended()
    assert done.result == Result(AttemptState.CRASHED, None, "the agent stopped while the job was being prepared")
    if has_directory:
        late = Rig(rig.jobs_dir)
        await late.start()
        await late.run("sh", "-c", "touch ran")
        assert not (rig.attempt("job") / "work" / "ran").exists()
        await late.executor.close()


@pytest.mark.parametrize("is_same_boot", [True, False])
async def test_process_that_reuses_a_guards_number_is_left_alone(rig: Rig, is_same_boot: bool) -> None:
    attempt = rig.attempt("job")
    (attempt / "work").mkdir(parents=True)
    stranger = await asyncio.create_subprocess_exec("sleep", "600")
    record = guard.new_record(stranger.pid, "pid")
    if is_same_boot:
        record["start_ticks"] -= 1
    else:
        record["boot_id"] = "another"
    (attempt / "guard.json").write_text(json.dumps(record))
    fresh = Rig(rig.jobs_dir)
    await fresh.start()
    assert fresh.executor.guards() == frozenset()
    fresh.executor.adopt(plan("true"))
    fresh.executor.stop(JobId("job"), 1, StopMode.KILL)
    reason = "the job's guard was killed" if is_same_boot else "the machine restarted"
    assert (await fresh.ended()).result == Result(AttemptState.CRASHED, None, reason)
    assert stranger.returncode is None
    stranger.kill()
    assert await stranger.wait() == -signal.SIGKILL
    await fresh.executor.close()


async def test_killed_fork_server_is_replaced_and_its_jobs_run_on(rig: Rig) -> None:
    rig.submit(plan("sh", "-c", "echo ready; while [ ! -e go ]; do sleep 0.01; done; exit 4", job="first"))
    await rig.says("ready", "first")
    server = rig.executor._server._process
    assert server is not None
    server.kill()
    assert (await rig.run("sh", "-c", "exit 5", job="second")).result.exit_code == 5
    (rig.attempt("first") / "work" / "go").touch()
    assert (await rig.ended("first")).result.exit_code == 4


# -- fenced jobs -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["bubblewrap", "landlock"])
async def fenced_rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    fence = Fence(request.param)
    if request.param == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")
    if reason := _try_fence(fence):
        pytest.skip(reason)
    rig = Rig(tmp_path / "jobs", fence)
    await rig.start()
    yield rig
    await rig.executor.close()


async def test_fenced_job_runs_and_leaves_its_outputs(fenced_rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("the agent's key")
    work = fenced_rig.attempt("job") / "work"
    work.mkdir(parents=True)
    (work / "train.py").write_text(
        "open('model.bin', 'wb').write(bytes(10))\nprint(open(__import__('sys').argv[1]).read())"
    )
    done = await fenced_rig.run("python", "train.py", str(tmp_path / "secret"), fenced=True)
    assert done.result == Result(AttemptState.EXITED, 1, "", output_files=1, output_bytes=10)
    assert "the agent's key" not in done.stdout
    assert sorted(path.name for path in fenced_rig.attempt("job").iterdir()) == [
        "before.json",
        "exit.json",
        "guard.err",
        "guard.json",
        "log",
        "outputs.json",
        "staged.json",
        "work",
    ]
    assert (fenced_rig.attempt("job") / "guard.err").read_text() == ""


async def test_fenced_jobs_preloaded_library_stays_inside(fenced_rig: Rig) -> None:
    """The loader complains once for each program that starts with it: the job's, and none that makes the fence."""
    done = await fenced_rig.run("true", env=(("LD_PRELOAD", "/evil.so"),), fenced=True)
    assert (done.result.exit_code, done.stderr.count("/evil.so")) == (0, 1)


async def test_fenced_job_has_a_home_tmp_and_shared_memory_of_its_own(fenced_rig: Rig) -> None:
    script = 'echo "$HOME"; touch "$HOME/h" "$TMPDIR/own" /dev/shm/s && ls -A /dev/shm "$HOME" "$TMPDIR/own"; exit $?'
    done = await fenced_rig.run(script, shell=True, fenced=True)
    assert done.result.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(fenced_rig.attempt("job") / "home")
    assert not (fenced_rig.attempt("job") / "home").exists()
    assert not Path("/dev/shm/s").exists()


async def test_fenced_job_can_save_when_it_is_stopped(fenced_rig: Rig) -> None:
    fenced_rig.submit(plan("python", "-c", CAREFUL.format(after="sys.exit(3)"), fenced=True))
    await fenced_rig.says("ready")
    fenced_rig.executor.stop(JobId("job"), 1, StopMode.STOP)
    done = await fenced_rig.ended()
    assert done.result == Result(AttemptState.EXITED, 3, "", output_files=1, output_bytes=5)


async def test_stop_at_any_moment_of_a_fenced_start_ends_the_job(fenced_rig: Rig) -> None:
    for delay in range(24):
        job = f"job{delay}"
        fenced_rig.submit(plan("sleep", "600", job=job, fenced=True))
        await asyncio.sleep(delay * 0.0015)
        fenced_rig.executor.stop(JobId(job), 1, StopMode.STOP)
        done = await fenced_rig.ended(job)
        assert done.result.exit_code in (143, None), delay
        assert "killed" not in done.result.reason


@pytest.mark.parametrize("mode", StopMode)
async def test_fenced_tree_is_gone_after_a_stop(fenced_rig: Rig, mode: StopMode) -> None:
    fenced_rig.submit(plan("python", "-c", DAEMON, "stay", fenced=True))
    await fenced_rig.says("ready")
    fenced_rig.executor.stop(JobId("job"), 1, mode)
    done = await fenced_rig.ended()
    assert processes_below(fenced_rig.attempt("job") / "work") == set()
    assert done.result.exit_code == (143 if mode is StopMode.STOP else 137)


async def test_fenced_job_is_refused_where_nothing_shuts_it_in(rig: Rig) -> None:
    done = await rig.run("sh", "-c", "touch ran", fenced=True)
    assert done.result == Result(
        AttemptState.CRASHED, None, "cannot run ada's job: nothing shuts it in on this machine"
    )
    assert not (rig.attempt("job") / "work" / "ran").exists()


async def test_fence_is_found_at_start(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "jobs", fence=None)
    assert rig.executor.fence() == ""
    await rig.start()
    assert rig.executor.fence() in ("bubblewrap", "landlock", "")
    assert rig.executor.fence() == "bubblewrap" or rig.executor.fence_reason()
    await rig.executor.close()


async def test_fenced_job_reports_numbers_too(fenced_rig: Rig) -> None:
    script = "import meshgpu; meshgpu.log(loss=0.25)"
    done = await fenced_rig.run("python", "-c", script, fenced=True, objective=Objective("loss", Goal.MIN, ""))
    assert done.result.metric == Metric(0.25, 0.25)


ORDINARY = """
import asyncio, sys
from pathlib import Path
from types import SimpleNamespace
from meshgpu.adapters.fences import Fence, find_fence
from meshgpu.adapters.log_ledger import LedgerReader
from meshgpu.adapters.process_executor import ProcessExecutor
from meshgpu.ports import AttemptEnded, Environment

class Environments:
    async def build(self, plan, tree, progress):
        return Environment(Path("/usr/bin"), "k7qd", True, "")

async def main(top, name, script):
    executor = ProcessExecutor(top / "jobs", Environments(), fence=Fence(name) if name == "landlock" else find_fence())
    assert executor.fence() == name, executor.fence_reason()
    events = asyncio.Queue()
    await executor.start(events.put_nowait)
    spec = SimpleNamespace(
        job="job", user="ada", command=(script,), shell=True, env=(), objective=None, secrets=None, timeout_s=None
    )
    work = top / "jobs" / "job" / "1" / "work"
    work.mkdir(parents=True)
    (top / "secret").write_text("the agent's key")
    executor.run(SimpleNamespace(spec=spec, epoch=1, gpus=(), fenced=True, machine="rig7", is_tailed=False), work)
    while not isinstance(event := await asyncio.wait_for(events.get(), 30), AttemptEnded):
        pass
    await executor.close()
    records = LedgerReader(work.parent / "log").read(10**6)
    print(b"".join(record.data for record in records if record.stream == "stdout").decode(), end="")
    print(event.result.exit_code, event.result.output_files)

asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
"""


@pytest.mark.parametrize("fence", ["bubblewrap", "landlock"])
def test_ordinary_users_agent_shuts_jobs_in_too(fence: str, tmp_path: Path) -> None:
    """The other half of the fences: no root to drop, a user namespace to make."""
    python = Path("/usr/bin/python3")
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    if os.geteuid() != 0 or not python.exists() or subprocess.run([python, "-c", check], check=False).returncode:
        pytest.skip("needs root, to become an ordinary user, and the system's Python 3.11")
    top = Path(tempfile.mkdtemp(prefix="meshgpu-ordinary-"))
    try:
        shutil.copytree(Path(guard.__file__).parent, top / "meshgpu", ignore=shutil.ignore_patterns("__pycache__"))
        top.chmod(0o755)
        (top / "state").mkdir()
        os.chown(top / "state", 65534, 65534)
        script = f"cat {top}/state/secret; echo x > out; touch /dev/shm/mine && ls -A /dev/shm; exit 7"
        ordinary = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--")
        done = subprocess.run(
            [*ordinary, python, "-c", ORDINARY, top / "state", fence, script],
            env={"PYTHONPATH": str(top), "PYTHONDONTWRITEBYTECODE": "1", "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert "the agent's key" not in done.stdout
        assert done.stdout.splitlines() == ["mine", "7 1"], done.stderr
    finally:
        shutil.rmtree(top)


# -- secrets ---------------------------------------------------------------------------------------------------------

CANARY = "c4n4ry 'quoted' $HOME `id`\n\"second line\""
"""What a shell would make something else of, if it were let."""


def fence_of(kind: str) -> Fence:
    """None, or a fence that works here."""
    if kind == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    if kind and (reason := _try_fence(Fence(kind))):
        pytest.skip(reason)
    return Fence(kind)


@pytest.mark.parametrize("kind", ["", "bubblewrap", "landlock"])
async def test_secrets_reach_the_job_and_no_file_or_command_line(kind: str, tmp_path: Path) -> None:
    fence = fence_of(kind)
    rig = Rig(tmp_path / "jobs", fence=fence)
    await rig.start()
    try:
        rig.secrets = {"TOKEN": CANARY, "SEED": "hidden", "MESHGPU_JOB_ID": "evil"}
        waits = "while [ ! -e go ]; do sleep 0.05; done"
        script = f'printf %s "$TOKEN" | sha256sum; echo $SEED $MESHGPU_JOB_ID; cat; echo ready; {waits}'
        rig.submit(plan("sh", "-c", script, fenced=bool(kind), env=(("SEED", "7"),)))
        await rig.says("ready")
        needle = CANARY.split()[0].encode()
        command_lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        assert command_lines
        assert not any(needle in line for line in command_lines)
        files = [path for path in rig.jobs_dir.rglob("*") if path.is_file()]
        assert len(files) >= 3
        assert not any(needle in path.read_bytes() for path in files)
        (rig.attempt("job") / "work" / "go").touch()
        done = await rig.ended()
    finally:
        await rig.executor.close()
    assert done.stdout.splitlines()[:2] == [f"{hashlib.sha256(CANARY.encode()).hexdigest()}  -", "7 job"]
    assert "c4n4ry" not in done.stdout + done.stderr + str(done.events)


async def test_job_whose_secrets_do_not_open_never_starts(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "jobs")

    def closed(_plan: AttemptPlan) -> dict[str, str]:
        raise TrustError("sealed", "cannot open the job's secrets: they were not sealed to this machine")

    rig.executor._unseal = closed
    await rig.start()
    try:
        done = await rig.run("touch", "started")
    finally:
        await rig.executor.close()
    assert done.result.outcome is AttemptState.CRASHED
    assert "not sealed to this machine" in done.result.reason
    assert not (rig.attempt("job") / "work" / "started").exists()
    assert not (rig.attempt("job") / "guard.err").exists()
