"""A rig and a rented machine as real agents on loopback: booted by real user data, enrolled, put to work, ended."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aiohttp import web

from meshgpu.adapters.boot_clock import BootClock
from meshgpu.adapters.sqlite_store import SqliteStore
from meshgpu.agent.cloud import first_records
from meshgpu.agent.enrolment import Enroller, InstanceDialog
from meshgpu.agent.home import Home
from meshgpu.agent.main import Agent, Room
from meshgpu.agent.user_data import make_user_data
from meshgpu.config import Config
from meshgpu.core import events as ev
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.errors import MeshgpuError
from meshgpu.model.cloud import LaunchId
from meshgpu.model.enrolment import BootTerms, InstanceTerms
from meshgpu.model.gossip import Sighting
from meshgpu.model.ids import Address, KeyId, MeshId, NodeId, UserName, key_id, node_id
from meshgpu.model.trust import AddNode, Role, SetPolicy, SetRole
from meshgpu.wire.endpoints import certificate_at
from tests.adapters.test_imds import Service

pytestmark = pytest.mark.slow

MESHGPU = str(Path(sys.executable).parent / "meshgpu")
LAUNCH = LaunchId("l" * 26)
NAME = "cloud-1"
PROGRAM = """
import hashlib, pathlib, signal, sys, time
data = pathlib.Path("big.bin").read_bytes()
print(len(data), hashlib.sha256(data).hexdigest(), flush=True)
pathlib.Path("model.bin").write_bytes(data[::-1])
"""
SLEEPER = "import time\nprint('sleeps', flush=True)\ntime.sleep(600)\n"


@dataclass
class Rented:
    """A machine that boots user data: its programs that end machines are fakes, and it can be asked what it is told."""

    directory: Path
    port: int
    metadata: Service
    environment: dict[str, str]
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def home(self) -> Path:
        return self.directory / "var" / "meshgpu"

    @property
    def log(self) -> str:
        return (self.directory / "agent.log").read_text()

    @property
    def switched_off(self) -> list[str]:
        path = self.directory / "shutdowns"
        return path.read_text().splitlines() if path.exists() else []

    def boot(self, data: bytes) -> None:
        """Run the script, as the first boot does, up to the agent's start."""
        units = self.directory / "units"
        units.mkdir()
        script = data.decode().replace("/etc/systemd/system", str(units))
        script = script.replace("/var/lib/meshgpu", str(self.home))
        environment = self.environment | {"HOME": str(self.directory)}
        subprocess.run(["bash"], input=script, env=environment, text=True, check=True, timeout=20)
        self.start()

    def start(self) -> None:
        """Start the agent as its unit says."""
        unit = (self.directory / "units" / "meshgpu.service").read_text()
        (command,) = [line.removeprefix("ExecStart=") for line in unit.splitlines() if line.startswith("ExecStart=")]
        with (self.directory / "agent.log").open("ab") as log:
            environment = self.environment | {"MESHGPU_HOME": str(self.home)}
            self.process = subprocess.Popen(command.split(), env=environment, stdout=log, stderr=log)

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(20)
            self.process = None


@dataclass
class Story:
    rig: Agent
    rig_environment: dict[str, str]
    rented: Rented
    dialogs: list[InstanceDialog] = field(default_factory=list)

    @property
    def mesh(self) -> MeshId:
        mesh = self.rig._node.log.mesh
        assert mesh is not None
        return mesh

    @property
    def address(self) -> Address:
        return Address(f"127.0.0.1:{self.rented.port}")

    def terms(self, lease_s: float = 3600.0, idle_s: float = 600.0) -> BootTerms:
        ends = InstanceTerms(time.time() + lease_s, idle_s, 900.0)
        return BootTerms(self.mesh, LAUNCH, self.rig._keys.node_key(), self.rented.port, ends)

    async def dial(self, bootstrap: bytes) -> InstanceDialog:
        """Dial until the machine has booted."""
        enroller = Enroller(
            self.rig._keys, self.rig._notary, BootClock(), random.SystemRandom(), lambda: self.rig._node.log.mesh
        )
        async with asyncio.timeout(30):
            while True:
                try:
                    self.dialogs.append(await enroller.dial(self.address, bootstrap))
                    return self.dialogs[-1]
                except MeshgpuError as error:
                    if error.code != "no-answer":
                        raise
                await asyncio.sleep(0.2)

    async def enter(self, dialog: InstanceDialog) -> NodeId:
        """The rig's own chain lets the machine in, for an hour."""
        node = node_id(dialog.public_key)
        body = AddNode(node, dialog.public_key, dialog.device_ca, NAME, Role.CLOUD, UserName("ada"), time.time() + 3600)
        await self.write(key_id(self.rig._keys.node_key()), body)
        return node

    async def write(self, key: KeyId, *bodies: AddNode | SetRole | SetPolicy) -> None:
        await self.rig._runtime.settle(ev.LogWritten(self.rig._node.log.write(key, bodies)))

    async def link(self, node: NodeId) -> None:
        """Tell the rig where the machine is, as the burst peer knows from EC2."""
        self.rig._runtime.post(ev.MachineSighted(Sighting(node, self.mesh[:12], "lab", 1, (self.address,))))
        await eventually(lambda: node in self.rig._node._links.open, 20)

    async def meshgpu(self, *arguments: str, directory: Path | None = None, code: int = 0) -> str:
        def call() -> "subprocess.CompletedProcess[str]":
            return subprocess.run(
                [MESHGPU, *arguments],
                env=self.rig_environment,
                cwd=directory,
                text=True,
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=60,
            )

        done = await asyncio.to_thread(call)
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}\n{self.rented.log}"
        return done.stdout


async def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # nothing to wait for
            await asyncio.sleep(0.05)


@pytest.fixture
async def metadata() -> AsyncIterator[tuple[Service, str]]:
    service = Service({"meta-data/public-ipv4": "127.0.0.1"})
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", service.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield service, f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.fixture
async def story(tmp_path: Path, metadata: tuple[Service, str]) -> AsyncIterator[Story]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MESHGPU_")}
    common = kept | {"MESHGPU_LOOPBACK": "true", "MESHGPU_KEEP_FREE_GB": "0"}
    programs = tmp_path / "rented" / "bin"
    programs.mkdir(parents=True)
    for name, does in (("shutdown", f'echo "$*" >> {tmp_path}/rented/shutdowns'), ("systemctl", "true")):
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)
    (programs / "meshgpu").symlink_to(MESHGPU)
    path = {"PATH": f"{programs}:{os.environ['PATH']}", "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata[1]}
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    rented = Rented(tmp_path / "rented", port, metadata[0], common | path)
    home = Home(tmp_path / "rig")
    config = Config(loopback=True, link_port=0, pairing_port=0, keep_free_gb=0.0, advertise="off")
    async with contextlib.AsyncExitStack() as closing, asyncio.TaskGroup() as tasks:
        rig = Agent(home, config, Room(tasks, closing, lambda: None, lambda: None))
        await rig.start()
        story = Story(rig, common | {"MESHGPU_HOME": str(home.directory)}, rented)
        await story.meshgpu("init", "--mesh", "lab", "--name", "rig", "--user", "ada", "--yes")
        account = rig._node.log.account(rig._node.node, os.getuid())
        assert account is not None
        await story.write(account.key, SetRole(rig._node.node, Role.BURST), SetPolicy(may_leave=True))
        try:
            yield story
        finally:
            rented.end()
            for dialog in story.dialogs:
                await dialog.close()
            for task in list(tasks._tasks):  # the agent's tasks never end by themselves
                task.cancel()


async def test_rented_machine_works_for_the_office_and_goes(story: Story, tmp_path: Path) -> None:
    data, bootstrap = make_user_data(story.terms(), "true", time.time())
    story.rented.boot(data)
    assert story.rented.switched_off == ["-P +60"]
    assert await certificate_until(story) == bootstrap
    dialog = await story.dial(bootstrap)
    node = await story.enter(dialog)
    await dialog.welcome(story.rig._node.log.all_entries())
    await story.link(node)

    # Reverse bulk: the tree comes from the rig, which the machine cannot dial. Forward bulk: log and files come back.
    project = tmp_path / "project"
    project.mkdir()
    (project / "big.bin").write_bytes(random.Random(1).randbytes(12_000_000))
    (project / "train.py").write_text(PROGRAM)
    out = await story.meshgpu("run", "-m", NAME, "-g", "0", "--fetch", "--", "python", "train.py", directory=project)
    assert "12000000 " in out
    assert (project / "model.bin").read_bytes() == (project / "big.bin").read_bytes()[::-1]
    (machine,) = [m for m in json.loads(await story.meshgpu("machines", "--json"))["machines"] if m["name"] == NAME]
    assert machine["state"] == "alive"

    # It dials nobody, and says where the provider says that it is.
    record, _ = story.rig._node.heard(node)
    assert record is not None
    assert (record.addresses, record.may_steward) == ((story.address,), False)

    # Killed and started again it is the same member, with its own certificate: the bootstrap listener stays shut.
    story.rented.end()
    await eventually(lambda: node not in story.rig._node._links.open)
    story.rented.start()
    await eventually(lambda: node in story.rig._node._links.open, 30)
    assert await certificate_until(story) != bootstrap
    enroller = Enroller(
        story.rig._keys, story.rig._notary, BootClock(), random.SystemRandom(), lambda: story.rig._node.log.mesh
    )
    with pytest.raises(MeshgpuError) as raised:
        await enroller.dial(story.address, bootstrap)
    assert raised.value.code == "no-answer"

    # A spot notice stops what runs and, once that is told, the machine.
    (project / "sleep.py").write_text(SLEEPER)
    (project / "big.bin").unlink()
    await story.meshgpu("run", "-m", NAME, "-g", "0", "-d", "--", "python", "sleep.py", directory=project)
    await eventually(lambda: bool(running(story, node)), 20)
    assert story.rented.switched_off == ["-P +60"]
    notice = datetime.now(UTC) + timedelta(seconds=120)
    story.rented.metadata.facts["meta-data/spot/instance-action"] = json.dumps(
        {"action": "terminate", "time": f"{notice:%Y-%m-%dT%H:%M:%SZ}"}
    )
    await eventually(lambda: story.rented.switched_off == ["-P +60", "-P now"], 20)
    assert running(story, node) == []
    assert "the provider takes it back" in story.rented.log


def running(story: Story, node: NodeId) -> list[object]:
    """What runs on the rented machine, as its process group shows."""
    _, capacity = story.rig._node.heard(node)
    assert capacity is not None
    return list(capacity.allocations)


async def certificate_until(story: Story) -> bytes:
    """What the machine shows, once it shows anything."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await certificate_at(story.address, 2)
            except MeshgpuError:
                await asyncio.sleep(0.1)


async def test_machine_that_nobody_enrols_powers_off(story: Story) -> None:
    """Its user data is 14 minutes and 57 seconds old when it boots."""
    data, _ = make_user_data(story.terms(), "true", time.time() - 897)
    story.rented.boot(data)
    await eventually(lambda: story.rented.switched_off[1:] == ["-P now"], 20)
    assert story.rented.process is not None
    assert await asyncio.to_thread(story.rented.process.wait, 20) == 125
    assert "nobody enrolled this machine" in story.rented.log


async def test_idle_machine_powers_off(story: Story) -> None:
    data, bootstrap = make_user_data(story.terms(idle_s=3.0), "true", time.time())
    story.rented.boot(data)
    dialog = await story.dial(bootstrap)
    await story.enter(dialog)
    await dialog.welcome(story.rig._node.log.all_entries())
    await eventually(lambda: story.rented.switched_off[1:] == ["-P now"], 20)
    assert "nothing runs here" in story.rented.log


async def test_crash_before_the_welcome_keeps_the_key(story: Story) -> None:
    data, bootstrap = make_user_data(story.terms(), "true", time.time())
    story.rented.boot(data)
    first = await story.dial(bootstrap)
    story.rented.end()
    story.rented.start()
    again = await story.dial(bootstrap)
    assert again.public_key == first.public_key
    await story.enter(again)
    await again.welcome(story.rig._node.log.all_entries())


async def test_what_is_kept_is_what_a_node_starts_from(story: Story, tmp_path: Path) -> None:
    log = MeshLog(story.rig._notary)
    log.enter(story.mesh, story.rig._node.log.all_entries())
    store = SqliteStore(tmp_path / "state.db")
    store.write(first_records(story.rig._node.node, BootClock(), story.rig._notary, log))
    kept = store.load()
    store.close()
    assert len([key for key in kept if key[0] == "log"]) == len(log.all_entries())
    assert ("mesh", "mesh") in kept
