"""Agents of one process that pair through a listener of the test's own: no network, no disk, no time."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from meshgpu import ports
from meshgpu.adapters.key_files import KeyFiles, RecoveryKey
from meshgpu.agent.comparing import Comparing
from meshgpu.agent.pairing import Joined, Pairing
from meshgpu.core import events as ev
from meshgpu.core.node import Node, NodeConfig
from meshgpu.errors import MeshgpuError
from meshgpu.model.clock import Now
from meshgpu.model.ids import Address, Digest, digest, node_id
from meshgpu.model.pairing import Newcomer
from meshgpu.model.trust import Role
from meshgpu.wire.notary import WireNotary

UID = 1000
DEADLINE_S = 20.0


@dataclass
class Clock:
    passed_s: float = 0.0

    def now(self) -> Now:
        return Now(self.passed_s, 1_800_000_000.0 + self.passed_s, "boot")


@dataclass
class Listener:
    """A ports.PairingTransport without a network."""

    door: ports.PairingDoor | None = None

    async def open(self, door: ports.PairingDoor) -> int:
        assert self.door is None
        self.door = door
        return 7444

    async def close(self) -> None:
        self.door = None

    def is_open(self) -> bool:
        return self.door is not None

    def fingerprint(self) -> Digest:
        assert self.door is not None
        return digest(b"certificate")


@dataclass
class Dialog:
    """A ports.PairingDialog with it, from the address `host`."""

    listener: Listener
    host: str = "10.0.0.7"

    @property
    def fingerprint(self) -> Digest:
        return self.listener.fingerprint()

    async def call(self, step: str, request: bytes) -> bytes:
        door = self.listener.door
        if door is None:
            raise MeshgpuError("no-answer", "the listener is closed")
        door.check(self.host)
        return await door.answer(self.host, step, request)

    async def close(self) -> None:
        return


@dataclass
class Machine:
    """The part of an agent that pairs."""

    name: str
    directory: Path
    clock: Clock
    tasks: asyncio.TaskGroup
    listener: Listener = field(default_factory=Listener)
    announced: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.keys = KeyFiles(self.directory / self.name)
        self.notary = WireNotary(self.keys.sign, self.keys.verify)
        rng = random.Random(self.name)
        me = node_id(self.keys.node_key())
        self.node = Node(me, self.clock.now(), self.notary, rng, NodeConfig("1"), ())
        self.pairing = Pairing(
            self.node, self.keys, self.notary, self.clock, rng, self.listener, self.settle,
            lambda: [Address("10.0.0.1:7443")], self.announced.append, self.tasks, RecoveryKey, asyncio.Lock(),
        )  # fmt: skip
        self.comparing = Comparing(self.pairing)

    async def settle(self, event: ev.Event) -> None:
        await asyncio.sleep(0)  # as a disk does, it lets others run
        self.node.step(self.clock.now(), event)

    def newcomer(self, name: str | None = None) -> Newcomer:
        return Newcomer(self.keys.node_key(), self.keys.device_ca(), self.keys.user_key(UID), UID, name or self.name)

    async def join(self, invite: str, at: Listener, name: str | None = None, host: str = "10.0.0.7") -> Joined:
        async def dial(_: Address) -> Dialog:
            return Dialog(at, host)

        return await self.pairing.join(UID, invite, name or self.name, (), dial)

    def names(self) -> set[str]:
        return {member.name for member in self.node.log.members.values()}


class _Over(Exception):  # no error: it ends the TaskGroup
    pass


@dataclass
class Lab:
    """ada's machine, which is the mesh, and others that want in."""

    ada: Machine
    make: Callable[[str], Machine]

    async def invite(self, uses: int = 1, role: Role = Role.RIG, user: str | None = None) -> str:
        text, _ = await self.ada.pairing.invite(UID, user, role, uses, 600.0)
        return text


@asynccontextmanager
async def lab(directory: Path) -> AsyncIterator[Lab]:
    clock = Clock()
    try:
        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
            ada = Machine("ada", directory, clock, tasks)
            await ada.pairing.found(UID, "lab", "ada", "ada")
            yield Lab(ada, lambda name: Machine(name, directory, clock, tasks))
            raise _Over
    except* _Over:
        pass


async def idle() -> None:
    """Let everything run that can, without waiting for time."""
    for _ in range(50):
        await asyncio.sleep(0)
