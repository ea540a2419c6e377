"""A rented machine's membership ends by the clock: real transports and nodes, and a wall clock that is set by hand."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from meshgpu.adapters.grpc_link import GrpcLink
from meshgpu.adapters.key_files import KeyFiles
from meshgpu.agent.runtime import Outside, Runtime
from meshgpu.core import events as ev
from meshgpu.core.node import Node, NodeConfig
from meshgpu.core.trust.meshlog import MeshLog, found
from meshgpu.errors import MeshgpuError
from meshgpu.model.clock import WALL_CLOCK_SLACK_S, Now
from meshgpu.model.ids import Address, KeyId, NodeId, UserName, key_id, node_id
from meshgpu.model.trust import AddNode, Body, Genesis, LinkUser, Role, SetPolicy, SetRole, Signed
from meshgpu.wire.notary import WireNotary

LEASE_S = 3600.0
ADA = UserName("ada")


@dataclass
class HandClock:
    """As this computer's, but for what a test adds to the wall clock."""

    added_s: float = 0.0

    def now(self) -> Now:
        return Now(time.monotonic(), time.time() + self.added_s, "boot")


@dataclass
class Silent:
    """Store, executor, trees: what this test has no use for."""

    written: list[object] = field(default_factory=list)

    def write(self, records: list[object]) -> None:
        self.written.extend(records)

    async def announce(self) -> None:
        return

    def discard(self, *_: object) -> None:
        return


class Machine:
    """A node, its transport and the runtime between them; it serves whoever asks, without end."""

    def __init__(self, directory: Path, clock: HandClock, *, is_cloud: bool = False) -> None:
        self.name = directory.name
        self.keys = KeyFiles(directory)
        self.id = node_id(self.keys.node_key())
        self.user = key_id(self.keys.user_key(1000))
        self.clock = clock
        self.notary = WireNotary(self.keys.sign, self.keys.verify)
        self.transport = GrpcLink(self.keys, clock, ["127.0.0.1"], 0, dials=not is_cloud)
        self.served: list[NodeId] = []

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        config = NodeConfig("1", may_steward=False)
        self.node = Node(self.id, self.clock.now(), self.notary, random.Random(self.name), config, ())
        silent: Any = Silent()
        outside = Outside(self.clock, self.transport, silent, silent, silent.announce, silent.discard)
        self.runtime = Runtime(self.node, outside, silent, tasks)
        self.address = Address(f"127.0.0.1:{await self.transport.start(self.runtime.link_event, self._serve)}")
        tasks.create_task(self.runtime.run())

    async def _serve(self, peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
        self.served.append(peer)
        try:
            while True:
                yield b"a line\n"
                await asyncio.sleep(0.01)
        finally:
            self.served.remove(peer)

    def added(self, role: Role, expires_wall_s: float | None = None) -> AddNode:
        public = self.keys.node_key()
        return AddNode(self.id, public, self.keys.device_ca(), self.name, role, ADA, expires_wall_s)

    def is_linked(self, other: "Machine") -> bool:
        return other.id in self.node._links.open and other.id in self.transport._links


@dataclass
class Scene:
    clock: HandClock
    rig: Machine
    colleague: Machine
    cloud: Machine
    entries: tuple[Signed, ...]

    @property
    def office(self) -> tuple[Machine, Machine]:
        return self.rig, self.colleague


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # nothing to wait for
            await asyncio.sleep(0.01)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    clock = HandClock()
    rig, colleague = Machine(tmp_path / "rig", clock), Machine(tmp_path / "colleague", clock)
    cloud = Machine(tmp_path / "cloud", HandClock(), is_cloud=True)  # for it the lease never ends
    everybody = (rig, colleague, cloud)
    with contextlib.suppress(asyncio.CancelledError):
        async with asyncio.TaskGroup() as tasks:
            for machine in everybody:
                await machine.start(tasks)
            mesh, entries = log_of(rig, colleague, cloud)
            for machine in everybody:
                await machine.runtime.settle(ev.MeshEntered(mesh, entries))
            for machine in (rig, colleague):
                machine.transport.dial(cloud.id, cloud.address)
                await eventually(lambda machine=machine: machine.is_linked(cloud) and cloud.is_linked(machine))  # type: ignore[misc]
            yield Scene(clock, rig, colleague, cloud, entries)
            await asyncio.gather(*(machine.transport.stop() for machine in everybody))
            for task in list(tasks._tasks):
                task.cancel()


def log_of(rig: Machine, colleague: Machine, cloud: Machine) -> tuple[Any, tuple[Signed, ...]]:
    """rig's user founds; rig may rent, and has let cloud in for LEASE_S."""
    genesis = Genesis("lab", rig.keys.user_key(1000), b"r" * 32, b"nonce")
    mesh, first = found(rig.notary, rig.user, genesis)
    log = MeshLog(rig.notary)
    log.enter(mesh, (first,))
    bodies: list[Body] = [
        rig.added(Role.RIG),
        LinkUser(ADA, rig.keys.user_key(1000), rig.id, 1000),
        colleague.added(Role.RIG),
        SetRole(rig.id, Role.BURST),
        SetPolicy(may_leave=True),
    ]
    log.add(log.write(rig.user, bodies))
    log.add(log.write(KeyId(rig.id), [cloud.added(Role.CLOUD, time.time() + LEASE_S)]))
    assert cloud.id in log.members
    return mesh, log.all_entries()


async def read_to_its_end(stream: AsyncIterator[bytes]) -> MeshgpuError:
    with pytest.raises(MeshgpuError) as raised:
        async for _ in stream:
            pass
    return raised.value


async def test_links_and_streams_of_a_rented_machine_end_with_its_lease_and_nobody_says_so(scene: Scene) -> None:
    cloud = scene.cloud
    streams = [machine.transport.fetch(cloud.id, [cloud.address], b"log") for machine in scene.office]
    streams += [cloud.transport.fetch(machine.id, [], b"tree") for machine in scene.office]
    for stream in streams:
        assert await anext(stream) == b"a line\n"
    readers = [asyncio.ensure_future(read_to_its_end(stream)) for stream in streams]

    scene.clock.added_s = LEASE_S + WALL_CLOCK_SLACK_S - 10.0  # clocks may differ by as much
    for machine in scene.office:
        await machine.runtime.settle(ev.Ticked())
        assert machine.is_linked(cloud)
    assert not any(reader.done() for reader in readers)

    scene.clock.added_s += 20.0
    async with asyncio.timeout(10):
        ends = await asyncio.gather(*readers)
    assert {error.code for error in ends} <= {"no-answer", "not-allowed"}
    await eventually(lambda: not any(cloud.served or machine.served for machine in scene.office))
    for machine in scene.office:
        assert not machine.is_linked(cloud)
        assert cloud.id not in machine.node.log.members
        assert machine.node.log.all_entries() == scene.entries, "nobody wrote an entry"
        with pytest.raises(MeshgpuError):
            await anext(machine.transport.fetch(cloud.id, [cloud.address], b"log"))
        machine.transport.dial(cloud.id, cloud.address)
    await asyncio.gather(*(machine.runtime.settle(ev.Ticked()) for machine in scene.office))
    assert not any(machine.is_linked(cloud) for machine in scene.office)
