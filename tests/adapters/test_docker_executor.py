import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

import pytest

from meshgpu import container
from meshgpu.adapters import docker_executor, guards, inside
from meshgpu.adapters.docker_executor import DockerExecutor, examine_engine, find_engine
from meshgpu.adapters.guarded import GuardedExecutor
from meshgpu.adapters.log_ledger import LedgerReader, follow
from meshgpu.agent.executors import Executors
from meshgpu.errors import MeshgpuError
from meshgpu.model.doctor import EngineFacts
from meshgpu.model.ids import Digest, GpuId, JobId, MeshId, NodeId, UserName
from meshgpu.model.job import AttemptPlan, AttemptState, EnvironmentRequest, JobSpec, Result, SecretBox, StopMode
from meshgpu.model.logs import LogRecord, LogStream
from meshgpu.model.resources import NO_GPU, GpuShare, Resources
from meshgpu.ports import AttemptEnded, AttemptProgress, AttemptStarted, ExecutorEvent
from tests.images.busybox import BUSYBOX, IMAGE, make_image

DEADLINE_S = 60.0
GPU = "GPU-8d1b6d8e-1111-4222-8333-000000000001"
JOB = JobId("job")


class Rig:
    """One executor, its events, and its containers on the engine."""

    def __init__(
        self,
        jobs_dir: Path,
        engine: Path,
        node: str,
        grace_s: float = DEADLINE_S,
        executor: GuardedExecutor | Executors | None = None,
    ) -> None:
        self.jobs_dir, self.engine, self.node = jobs_dir, engine, node
        self.executor = executor or DockerExecutor(jobs_dir, NodeId(node), engine=engine, grace_s=grace_s)
        self.events: list[ExecutorEvent] = []
        self._news = asyncio.Event()

    async def start(self) -> None:
        def emit(event: ExecutorEvent) -> None:
            self.events.append(event)
            self._news.set()

        await self.executor.start(emit)

    @property
    def attempt(self) -> Path:
        return self.jobs_dir / JOB / "1"

    @property
    def work(self) -> Path:
        return self.attempt / "work"

    def submit(self, plan: AttemptPlan) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        self.executor.run(plan, self.work)

    async def until(self, wanted: type[ExecutorEvent]) -> ExecutorEvent:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for event in self.events:
                    if isinstance(event, wanted):
                        return event
                self._news.clear()
                await self._news.wait()

    async def ended(self) -> Result:
        end = await self.until(AttemptEnded)
        assert isinstance(end, AttemptEnded)
        return end.result

    async def run(self, *command: str, **options: Any) -> Result:
        self.submit(plan(*command, **options))
        return await self.ended()

    def printed(self, stream: LogStream = LogStream.STDOUT) -> str:
        reader = LedgerReader(self.attempt / "log")
        pieces = [piece for read in iter(lambda: reader.read(2**22), []) for piece in read]
        data = (piece.data for piece in pieces if isinstance(piece, LogRecord) and piece.stream is stream)
        return b"".join(data).decode()

    async def says(self, text: str) -> None:
        """Wait until the job printed `text`."""
        seen = b""
        async with asyncio.timeout(DEADLINE_S):
            async for pieces in follow(LedgerReader(self.attempt / "log"), lambda: False):
                seen += b"".join(piece.data for piece in pieces if isinstance(piece, LogRecord))
                if text.encode() in seen:
                    return

    def containers(self) -> list[dict[str, Any]]:
        """What the engine says of this node's containers, in any state."""
        import docker

        client = docker.DockerClient(base_url=f"unix://{self.engine}")
        try:
            mine = {"label": f"meshgpu.node={self.node}"}
            found = client.containers.list(all=True, filters=mine, ignore_removed=True)
            return [one.attrs for one in found]
        finally:
            client.close()

    def progress(self) -> list[str]:
        return [event.detail for event in self.events if isinstance(event, AttemptProgress)]


def container_name(rig: Rig) -> str:
    assert isinstance(rig.executor, DockerExecutor)
    return rig.executor._name(plan("true"))


def plan(
    *command: str,
    image: str = IMAGE,
    shell: bool = False,
    gpus: tuple[str, ...] = (),
    fenced: bool = False,
    env: tuple[tuple[str, str], ...] = (),
    memory_bytes: int = 0,
) -> AttemptPlan:
    spec = JobSpec(
        mesh=MeshId("mesh"),
        job=JOB,
        nonce=b"n" * 16,
        name="train",
        user=UserName("ada"),
        submitter=NodeId("node"),
        command=command,
        shell=shell,
        env=env,
        environment=EnvironmentRequest(),
        tree=Digest("tree"),
        tree_bytes=0,
        tree_files=0,
        resources=Resources(NO_GPU, 0, memory_bytes),
        machine=None,
        stewards=(),
        issued_wall_s=0.0,
        image=image,
    )
    return AttemptPlan(spec, 1, tuple(GpuShare(GpuId(gpu)) for gpu in gpus), fenced, "rig7", image)


@pytest.fixture(scope="module")
def engine() -> Path:
    """The engine's socket, with the test image; where CI promised an engine, none is a failure."""
    try:
        path = find_engine()
        with docker_executor._connected(path) as client:
            make_image(client)
    except (MeshgpuError, OSError) as error:
        if "docker" in os.environ.get("MESHGPU_CI_NEEDS", "").split(","):
            raise
        pytest.skip(f"{error}" if BUSYBOX.exists() else "no static busybox to make an image of")
    return path


@pytest.fixture
def node(tmp_path: Path) -> str:
    """Unique, so that tests at the same time do not see each other's containers."""
    return f"{os.getpid():x}{abs(hash(tmp_path)):x}".ljust(docker_executor.NODE_CHARACTERS, "0")[-12:]


@pytest.fixture
async def rig(tmp_path: Path, engine: Path, node: str) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path / "jobs", engine, node)
    await rig.start()
    yield rig
    await rig.executor.close()
    left = rig.containers()
    for one in left:
        container.Engine(str(engine)).remove(one["Id"])
    assert not left


# -- one job ---------------------------------------------------------------------------------------------------------


async def test_job_is_staged_started_saved_and_ended(rig: Rig) -> None:
    result = await rig.run("sh", "-c", "echo out; echo err >&2; pwd; echo data > result.txt; exit 7")
    assert result == Result(AttemptState.EXITED, 7, "", 1, 5)
    assert (rig.printed(), rig.printed(LogStream.STDERR)) == ("out\n/work\n", "err\n")
    assert rig.progress() == [f"image {IMAGE} (cached)", ""]
    kinds = [type(event) for event in rig.events]
    assert kinds == [AttemptProgress, AttemptStarted, AttemptProgress, AttemptEnded]
    assert json.loads((rig.attempt / "outputs.json").read_text()) == [["result.txt", 5]]
    assert rig.containers() == []


@pytest.mark.parametrize(("command", "code"), [("kill -9 $$", 137), ("kill -15 $$", 143), ("exit 255", 255)])
async def test_exit_code_is_the_jobs_own(rig: Rig, command: str, code: int) -> None:
    assert (await rig.run(command, shell=True)).exit_code == code


async def test_missing_command_is_told(rig: Rig) -> None:
    result = await rig.run("no-such-command")
    assert result.exit_code == 127
    assert "no-such-command" in rig.printed(LogStream.STDERR)


async def test_command_runs_whatever_the_images_entrypoint_is(rig: Rig) -> None:
    assert (await rig.run("echo", "$HOME", "a b")).exit_code == 0
    assert rig.printed() == "$HOME a b\n"


async def test_job_sees_the_images_variables_its_own_and_nothing_of_the_agents(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "s3cret")
    await rig.run("env", env=(("SEED", "1"), ("MESHGPU_JOB_ID", "forged")))
    seen = dict(line.split("=", 1) for line in rig.printed().splitlines())
    expected = {
        "FROM_IMAGE": "1",
        "SEED": "1",
        "MESHGPU_JOB_ID": "job",
        "MESHGPU_MACHINE": "rig7",
        "MESHGPU_OUTPUT_DIR": "/work",
        "CUDA_VISIBLE_DEVICES": "",
        "NVIDIA_VISIBLE_DEVICES": "void",
    }
    assert seen.items() >= expected.items()
    assert "SECRET" not in seen


async def test_container_is_shut_in(rig: Rig) -> None:
    commands = "grep -E 'NoNewPrivs|CapEff|CapBnd' /proc/self/status; ls /; exec sleep 600"
    rig.submit(plan(commands, shell=True, memory_bytes=64 * 1024**2))
    await rig.says("work")
    lines = [line.split() for line in rig.printed().splitlines()]
    zero = "0" * 16
    assert [["CapEff:", zero], ["CapBnd:", zero], ["NoNewPrivs:", "1"]] == lines[:3]
    (one,) = rig.containers()
    mounts = {(mount["Source"], mount["Destination"], mount["RW"]) for mount in one["Mounts"]}
    assert mounts == {(str(rig.work), "/work", True), (str(inside.LIBRARY), "/meshgpu", False)}
    assert one["Config"]["Labels"] == {"meshgpu.node": rig.node, "meshgpu.job": "job", "meshgpu.epoch": "1"}
    rig.executor.stop(JOB, 1, StopMode.KILL)
    await rig.ended()


async def test_job_has_the_account_that_owns_its_files(rig: Rig) -> None:
    rig.work.mkdir(parents=True)
    rig.work.chmod(0o755)
    os.chown(rig.work, 4321, 4321)
    await rig.run("id -u; id -g; touch mine", shell=True)
    assert rig.printed().split() == ["4321", "4321"]
    assert (rig.work / "mine").stat().st_uid == 4321


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
async def test_other_users_job_is_never_root(rig: Rig) -> None:
    rig.work.mkdir(parents=True)
    (rig.work / "train.py").touch()
    await rig.run("id -u; echo >> train.py", shell=True, fenced=True)
    assert rig.printed().split() == ["65534"]


async def test_job_over_its_memory_is_told_so(rig: Rig) -> None:
    result = await rig.run("head -c 200000000 /dev/zero | tail", shell=True, memory_bytes=32 * 1024**2)
    assert "out of memory" in result.reason
    assert result.outcome is AttemptState.EXITED


async def test_fifty_megabytes_arrive_whole(rig: Rig) -> None:
    assert (await rig.run("dd if=/dev/zero bs=1000000 count=50 2>/dev/null", shell=True)).exit_code == 0
    assert len(rig.printed()) == 50_000_000


# -- what goes wrong -------------------------------------------------------------------------------------------------


async def test_missing_image_fails_the_job_and_names_the_image(rig: Rig) -> None:
    result = await rig.run("true", image="127.0.0.1:9/none:1")
    assert (result.outcome, result.exit_code) == (AttemptState.EXITED, None)
    assert "cannot run in 127.0.0.1:9/none:1: no such image here, and pulling it failed" in result.reason
    assert rig.progress() == ["pulling 127.0.0.1:9/none:1"]


async def test_machine_without_engine_says_what_to_install(tmp_path: Path, node: str) -> None:
    rig = Rig(tmp_path / "jobs", tmp_path / "docker.sock", node)
    await rig.start()
    result = await rig.run("true")
    assert result.outcome is AttemptState.CRASHED
    assert f"no engine answers at {tmp_path / 'docker.sock'}" in result.reason
    assert "apt install docker.io" in result.reason
    await rig.executor.close()


async def test_engine_without_nvidia_runtime_is_told_before_a_container_is_made(rig: Rig) -> None:
    result = await rig.run("true", gpus=(GPU,))
    assert result.outcome is AttemptState.CRASHED
    assert "its engine has no NVIDIA runtime" in result.reason
    assert not any(isinstance(event, AttemptStarted) for event in rig.events)


async def test_failed_start_tells_why_and_leaves_no_container(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    request = docker_executor._gpu_request
    believing: dict[str, Any] = {"Runtimes": {"nvidia": {}}}
    monkeypatch.setattr(docker_executor, "_gpu_request", lambda facts, uuids: request(believing, uuids))
    result = await rig.run("true", gpus=(GPU,))
    assert (result.outcome, result.exit_code) == (AttemptState.CRASHED, None)
    assert 'could not select device driver "nvidia"' in result.reason
    assert rig.containers() == []


async def test_container_removed_by_a_stranger_ends_its_job(rig: Rig) -> None:
    rig.submit(plan("echo ready; exec sleep 600", shell=True))
    await rig.says("ready")
    (one,) = rig.containers()
    assert container.Engine(str(rig.engine)).remove(one["Id"])
    assert (await rig.ended()).outcome in (AttemptState.CRASHED, AttemptState.EXITED)


async def test_container_of_an_agent_that_died_while_staging_is_replaced(rig: Rig) -> None:
    with docker_executor._connected(rig.engine) as client:
        client.containers.create(IMAGE, ["true"], name=container_name(rig))
    assert (await rig.run("echo", "mine")).exit_code == 0
    assert rig.printed() == "mine\n"


# -- stop ------------------------------------------------------------------------------------------------------------


async def test_stop_leaves_time_to_save(rig: Rig) -> None:
    rig.submit(plan("trap 'echo saved > state; exit 3' TERM; echo ready; while :; do sleep 0.1; done", shell=True))
    await rig.says("ready")
    rig.executor.stop(JOB, 1, StopMode.STOP)
    assert await rig.ended() == Result(AttemptState.EXITED, 3, "", 1, 6)


async def test_stop_reaches_what_the_shell_started(rig: Rig) -> None:
    inner = "sh -c 'trap \"echo inner; exit\" TERM; echo ready; while :; do sleep 0.1; done'"
    rig.submit(plan(f"trap : TERM; {inner}; :", shell=True))
    await rig.says("ready")
    rig.executor.stop(JOB, 1, StopMode.STOP)
    await rig.ended()
    assert rig.printed() == "ready\ninner\n"


async def test_job_that_ignores_a_stop_is_killed_after_the_grace(tmp_path: Path, engine: Path, node: str) -> None:
    rig = Rig(tmp_path / "jobs", engine, node, grace_s=0.3)
    await rig.start()
    rig.submit(plan("trap '' TERM; echo ready; while :; do sleep 0.1; done", shell=True))
    await rig.says("ready")
    rig.executor.stop(JOB, 1, StopMode.STOP)
    result = await rig.ended()
    assert (result.exit_code, result.reason) == (137, "killed: it still ran 0.3 s after it was told to stop")
    assert rig.containers() == []
    await rig.executor.close()


async def test_kill_ends_the_container_at_once(rig: Rig) -> None:
    rig.submit(plan("trap '' TERM; setsid sleep 600 & echo ready; wait; sleep 600", shell=True))
    await rig.says("ready")
    rig.executor.stop(JOB, 1, StopMode.KILL)
    assert (await rig.ended()).exit_code == 137
    assert rig.containers() == []


@pytest.mark.parametrize("mode", StopMode)
@pytest.mark.parametrize("pause_s", [0.0, 0.05, 0.15, 0.25, 0.35, 0.5])
async def test_stop_at_any_moment_of_the_start_ends_the_job(rig: Rig, mode: StopMode, pause_s: float) -> None:
    rig.submit(plan("sleep", "600"))
    await asyncio.sleep(pause_s)  # the moment is the subject
    rig.executor.stop(JOB, 1, mode)
    await rig.ended()
    assert rig.containers() == []


# -- restarts --------------------------------------------------------------------------------------------------------


COUNTER = "i=0; while [ $i -lt {count} ]; do echo line $i; i=$((i+1)); sleep 0.005; done; exit 9"

AGENT = """
import asyncio
from pathlib import Path
from tests.adapters.test_docker_executor import Rig, plan
async def main():
    rig = Rig(Path({jobs!r}), Path({engine!r}), {node!r})
    await rig.start()
    rig.submit(plan({command!r}, shell=True))
    await rig.says("line 20")
    print("running", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_job_outlives_a_killed_agent_and_no_line_is_lost_or_doubled(rig: Rig) -> None:
    count = 300
    command = COUNTER.format(count=count)
    source = AGENT.format(jobs=str(rig.jobs_dir), engine=str(rig.engine), node=rig.node, command=command)
    root = str(Path(__file__).parents[2])
    agent = await asyncio.create_subprocess_exec(sys.executable, "-c", source, stdout=subprocess.PIPE, cwd=root)
    assert agent.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        assert await agent.stdout.readline() == b"running\n"
    agent.kill()
    await agent.wait()
    seen = rig.printed()
    fresh = Rig(rig.jobs_dir, rig.engine, rig.node)
    await fresh.start()
    (one,) = rig.containers()
    init = int(json.loads((rig.attempt / "container.json").read_text())["pid"])
    assert init in fresh.executor.guards()
    assert one["State"]["Status"] == "running"
    fresh.executor.adopt(plan(command, shell=True))
    assert await fresh.until(AttemptStarted)
    assert (await fresh.ended()).exit_code == 9
    assert fresh.printed().startswith(seen)
    assert fresh.printed().splitlines() == [f"line {number}" for number in range(count)]
    await fresh.executor.close()


async def test_stop_reaches_an_adopted_job(rig: Rig) -> None:
    job = plan("trap 'exit 4' TERM; echo ready; while :; do sleep 0.1; done", shell=True)
    rig.submit(job)
    await rig.says("ready")
    await rig.executor.close()
    fresh = Rig(rig.jobs_dir, rig.engine, rig.node)
    await fresh.start()
    fresh.executor.adopt(job)
    await fresh.until(AttemptStarted)
    fresh.executor.stop(JOB, 1, StopMode.STOP)
    assert (await fresh.ended()).exit_code == 4
    await fresh.executor.close()


async def test_close_during_staging_leaves_no_container_and_the_next_agent_tells_the_end(rig: Rig) -> None:
    rig.submit(plan("true"))
    await asyncio.sleep(0)
    await rig.executor.close()
    assert rig.containers() == []
    fresh = Rig(rig.jobs_dir, rig.engine, rig.node)
    await fresh.start()
    fresh.executor.adopt(plan("true"))
    assert (await fresh.ended()).outcome is AttemptState.CRASHED
    await fresh.executor.close()


async def test_container_that_was_made_and_never_started_is_removed_at_adoption(rig: Rig) -> None:
    rig.work.mkdir(parents=True)
    with docker_executor._connected(rig.engine) as client:
        client.containers.create(IMAGE, ["true"], name=container_name(rig), labels={"meshgpu.node": rig.node})
    assert len(rig.containers()) == 1
    rig.executor.adopt(plan("true"))
    assert (await rig.ended()).outcome is AttemptState.CRASHED
    assert rig.containers() == []


@pytest.mark.parametrize("is_agent_there", [True, False])
async def test_killed_guard_takes_its_container_along(rig: Rig, is_agent_there: bool) -> None:
    rig.submit(plan("echo ready; exec sleep 600", shell=True))
    await rig.says("ready")
    if not is_agent_there:
        await rig.executor.close()
    os.kill(guards.read_guard(rig.attempt)["pid"], signal.SIGKILL)
    if is_agent_there:
        result = await rig.ended()
        assert (result.outcome, result.reason) == (AttemptState.CRASHED, "the job's guard was killed")
    async with asyncio.timeout(DEADLINE_S):
        while rig.containers():  # noqa: ASYNC110  # the engine is not ours to be told by
            await asyncio.sleep(0.05)


# -- what the engine is asked ----------------------------------------------------------------------------------------


class FakeEngine(BaseHTTPRequestHandler):
    """Answers as far as the start of a container, and keeps what it was asked."""

    protocol_version = "HTTP/1.1"
    facts: dict[str, Any]
    created: list[dict[str, Any]]
    removed: list[str]

    def do_GET(self) -> None:
        if self.path.endswith("/version"):
            self._answer(200, {"ApiVersion": "1.41", "Version": "20.10.24"})
        elif self.path.endswith("/info"):
            self._answer(200, self.facts)
        else:
            self._answer(200, {"Id": "sha256:1", "State": {"Pid": 0}})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "/containers/create" in self.path:
            self.created.append(json.loads(body))
            self._answer(201, {"Id": "c1", "Warnings": []})
        else:
            self._answer(500, {"message": "this one only keeps what it is asked"})

    def do_DELETE(self) -> None:
        self.removed.append(self.path)
        self._answer(204, None)

    def _answer(self, status: int, document: object) -> None:
        body = b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # as its base class names it
        pass


@contextlib.contextmanager
def fake_engine(facts: dict[str, Any]) -> Iterator[tuple[Path, type[FakeEngine]]]:
    handler = type("Handler", (FakeEngine,), {"facts": facts, "created": [], "removed": []})
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "engine.sock"
        server = ThreadingUnixStreamServer(str(path), handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield path, handler
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


async def asked_of(facts: dict[str, Any], tmp_path: Path, **options: Any) -> tuple[dict[str, Any], Result, list[str]]:
    """(the create call as it went over the wire, how the attempt ended, what was removed)."""
    with fake_engine(facts) as (path, seen):
        rig = Rig(tmp_path / "jobs", path, "f" * 12)
        await rig.start()
        result = await rig.run("python", "train.py", **options)
        await rig.executor.close()
        (created,) = seen.created
        return created, result, seen.removed


async def test_gpus_are_asked_for_by_uuid_from_the_nvidia_runtime(tmp_path: Path) -> None:
    facts = {"Runtimes": {"nvidia": {}, "runc": {}}, "MemTotal": 64 * 10**9}
    created, result, removed = await asked_of(facts, tmp_path, gpus=(GPU, "GPU-2"), memory_bytes=8 * 10**9)
    host = created["HostConfig"]
    (request,) = host["DeviceRequests"]
    assert (request["Driver"], request["DeviceIDs"]) == ("nvidia", [GPU, "GPU-2"])
    assert (request["Count"], request["Capabilities"]) == (0, [["gpu", "compute", "utility"]])
    assert f"NVIDIA_VISIBLE_DEVICES={GPU},GPU-2" in created["Env"]
    assert (host["Memory"], host["MemorySwap"]) == (8 * 10**9, 8 * 10**9)
    assert host["ShmSize"] == 16 * 10**9
    assert "this one only keeps what it is asked" in result.reason
    assert result.outcome is AttemptState.CRASHED
    assert removed


@pytest.mark.parametrize("source", ["discovered", "file"])
async def test_gpus_are_asked_for_as_cdi_devices_where_the_engine_knows_them(tmp_path: Path, source: str) -> None:
    (tmp_path / "nvidia.yaml").write_text("cdiVersion: 0.6.0\nkind: nvidia.com/gpu\n")
    facts: dict[str, Any] = {"Runtimes": {"nvidia": {}}, "CDISpecDirs": [str(tmp_path)]}
    if source == "discovered":
        facts = {"DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}]}
    created, _, _ = await asked_of(facts, tmp_path, gpus=(GPU,))
    (request,) = created["HostConfig"]["DeviceRequests"]
    assert (request["Driver"], request["DeviceIDs"]) == ("cdi", [f"nvidia.com/gpu={GPU}"])
    assert "NVIDIA_VISIBLE_DEVICES=void" in created["Env"]


async def test_nothing_but_the_jobs_own_is_asked_for(tmp_path: Path) -> None:
    created, _, _ = await asked_of({}, tmp_path)
    host = created["HostConfig"]
    work = tmp_path / "jobs" / "job" / "1" / "work"
    assert (created["Entrypoint"], created["Cmd"], created["WorkingDir"]) == (["python"], ["train.py"], "/work")
    assert created["Labels"] == {"meshgpu.node": "f" * 12, "meshgpu.job": "job", "meshgpu.epoch": "1"}
    assert created["Image"] == "sha256:1"
    mounts = [(mount["Source"], mount["Target"], mount["ReadOnly"]) for mount in host["Mounts"]]
    assert mounts == [(str(work), "/work", False), (str(inside.LIBRARY), "/meshgpu", True)]
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert (host["Init"], host["PidsLimit"], host["LogConfig"]["Type"]) == (True, 16_384, "none")
    assert host["NetworkMode"] == "bridge"
    assert not host.get("DeviceRequests")
    assert not {"Privileged", "Binds", "Devices", "PidMode", "IpcMode", "CapAdd"} & {k for k, v in host.items() if v}


async def test_engine_without_root_maps_its_root_to_this_account(tmp_path: Path) -> None:
    facts = {"SecurityOptions": ["name=seccomp", "name=rootless"]}
    for security, user in ((facts, "0:0"), ({}, "4321:4321" if os.geteuid() == 0 else f"{os.getuid()}:{os.getgid()}")):
        top = tmp_path / user
        work = top / "jobs" / JOB / "1" / "work"
        work.mkdir(parents=True)
        if os.geteuid() == 0:
            os.chown(work, 4321, 4321)
        created, _, _ = await asked_of(security, top)
        assert created["User"] == user


@pytest.mark.parametrize(
    ("facts", "gives_gpus"),
    [
        ({"Runtimes": {"runc": {}}}, False),
        ({"Runtimes": {"runc": {}, "nvidia": {}}}, True),
        ({"DiscoveredDevices": [{"ID": "nvidia.com/gpu=GPU-1"}]}, True),
    ],
)
def test_engine_tells_whether_it_can_hand_out_gpus(
    facts: dict[str, Any], gives_gpus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_engine({"ServerVersion": "28.2"} | facts) as (path, _):
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        assert examine_engine() == EngineFacts("28.2", gives_gpus=gives_gpus)


def test_no_engine_is_no_fault_and_one_that_does_not_answer_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path / 'docker.sock'}")
    assert examine_engine() == EngineFacts()
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(tmp_path / "docker.sock"))
    silent = examine_engine()
    assert (silent.version, silent.remedy) == ("", "apt install docker.io")
    assert "no engine answers" in silent.fault


# -- finding the engine ----------------------------------------------------------------------------------------------


def test_engine_elsewhere_is_refused() -> None:
    with pytest.raises(MeshgpuError, match="the job's files lie here") as found:
        find_engine({"DOCKER_HOST": "tcp://10.0.0.1:2375"})
    assert found.value.code == "no-engine"


def test_engine_of_ones_own_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_engine({"DOCKER_HOST": "unix:///run/mine.sock"}) == Path("/run/mine.sock")
    (tmp_path / "docker.sock").touch()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert find_engine({"XDG_RUNTIME_DIR": str(tmp_path)}) == tmp_path / "docker.sock"


def test_sdk_is_not_imported_before_the_first_container() -> None:
    source = "import sys; import meshgpu.agent.main; sys.exit('docker' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], timeout=DEADLINE_S, check=False).returncode == 0


# -- secrets ---------------------------------------------------------------------------------------------------------


async def test_secrets_reach_the_container_and_the_engine_shows_none(rig: Rig) -> None:
    assert isinstance(rig.executor, DockerExecutor)
    value = "c4n4ry 'quoted' $HOME `id`\nline"
    rig.executor._unseal = lambda _plan: {"TOKEN": value}
    script = 'printf %s "$TOKEN" | sha256sum; cat; echo ready; while [ ! -e go ]; do sleep 0.05; done'
    job = plan(script, shell=True)
    box = SecretBox(("TOKEN",), b"", ())
    rig.submit(replace(job, spec=replace(job.spec, secrets=box)))
    await rig.says("ready")
    assert "c4n4ry" not in json.dumps(rig.containers())
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(b"c4n4ry" in line for line in lines)
    files = [path for path in rig.attempt.rglob("*") if path.is_file()]
    assert not any(b"c4n4ry" in path.read_bytes() for path in files)
    (rig.work / "go").touch()
    assert (await rig.ended()).exit_code == 0
    assert rig.printed().splitlines()[0].split()[0] == hashlib.sha256(value.encode()).hexdigest()
