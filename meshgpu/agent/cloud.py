"""The agent of a rented machine: enrolled through its first listener, then an agent that dials nobody.

It has no discovery, no seeds and no invites, holds no jobs, learns from the provider where the Internet reaches it and
when it will be taken back, and powers the machine off when its time is over.
"""

import asyncio
import logging
import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from meshgpu import __version__, ports
from meshgpu.adapters.boot_clock import BootClock
from meshgpu.adapters.grpc_enrolment import GrpcBootstrap
from meshgpu.adapters.grpc_link import GrpcLink
from meshgpu.adapters.imds import ENDPOINT, ENDPOINT_VARIABLE, Imds
from meshgpu.adapters.key_files import KeyFiles
from meshgpu.adapters.power import power_off
from meshgpu.adapters.sqlite_store import SqliteStore
from meshgpu.agent.enrolment import InstanceDoor
from meshgpu.agent.home import Home
from meshgpu.agent.main import Agent, Room, hosts_of, live, run
from meshgpu.agent.user_data import Boot, read_boot
from meshgpu.config import Config, load_config
from meshgpu.core import events as ev
from meshgpu.core.audit import AUDIT
from meshgpu.core.effects import Persist
from meshgpu.core.node import Node, NodeConfig
from meshgpu.core.trust.enrolling import BOOTSTRAP_LIFE_S, Enrolment
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import NodeId, digest, node_id
from meshgpu.model.trust import Notary
from meshgpu.wire.certificates import der
from meshgpu.wire.codec import encode
from meshgpu.wire.notary import WireNotary

logger = logging.getLogger(__name__)

INTERRUPTION_POLL_S: Final = 5.0
"""As the provider advises; a spot notice comes two minutes ahead."""

WAIT_S: Final = 5.0
"""How often the end of the 15 minutes is looked for: the wall clock may be set meanwhile."""


def main(home: Path, boot: Path) -> int:
    """Run as `meshgpu agent --cloud`. Returns the process's exit code; the service starts it again."""
    return live(_live_in_cloud(Home(home.absolute()), boot.absolute()))


async def _live_in_cloud(home: Home, directory: Path) -> bool:
    boot = read_boot(directory)
    home.prepare()
    await _enter_mesh(home, boot, hosts_of(load_config(home.config)))
    return await run(home, lambda home, config, room: CloudAgent(home, config, room, boot))


# -- before it is a member -------------------------------------------------------------------------------------------


async def _enter_mesh(home: Home, boot: Boot, hosts: list[str]) -> None:
    """Be enrolled, once for all; a machine that is in a mesh never listens for that again.

    After 15 minutes it powers off and raises MeshgpuError `not-enrolled`.
    """
    store = SqliteStore(home.database)
    try:
        if ("mesh", "mesh") not in store.load(but=AUDIT):
            await _be_enrolled(store, KeyFiles(home.keys), boot, hosts)
    finally:
        store.close()


async def _be_enrolled(store: ports.Store, keys: ports.Keys, boot: Boot, hosts: list[str]) -> None:
    clock = BootClock()
    notary = WireNotary(keys.sign, keys.verify)
    made = (keys.node_key(), keys.device_ca())
    enrolment = Enrolment(notary, boot.terms, digest(der(boot.parsed)), boot.expires_wall_s, made)

    async def keep(log: MeshLog) -> None:
        await asyncio.to_thread(store.write, first_records(node_id(made[0]), clock, notary, log))

    door = InstanceDoor(enrolment, clock, random.SystemRandom(), keep)
    listener = GrpcBootstrap(hosts, boot.terms.port, boot.private_key, boot.certificate)
    over_at = clock.now().boot_s + BOOTSTRAP_LIFE_S
    try:
        port = await listener.open(door.answer)
        logger.info("node %s waits on port %d to be enrolled", node_id(made[0])[:12], port)
        while not door.enrolled.is_set():
            now = clock.now()
            left_s = min(over_at - now.boot_s, boot.expires_wall_s - now.wall_s)
            if left_s <= 0:
                await power_off()
                raise MeshgpuError("not-enrolled", "cannot be a member: nobody enrolled this machine in 15 minutes")
            try:
                async with asyncio.timeout(min(left_s, WAIT_S)):
                    await door.enrolled.wait()
            except TimeoutError:
                continue
    finally:
        await listener.close()
    logger.info("enrolled")


def first_records(
    node: NodeId, clock: ports.Clock, notary: Notary, log: MeshLog
) -> list[tuple[str, str, bytes | None]]:
    """What a node keeps when it enters the mesh of this log: what its next start takes up."""
    assert log.mesh is not None
    now = clock.now()
    newcomer = Node(node, now, notary, random.SystemRandom(), NodeConfig(__version__, may_steward=False), ())
    effects = newcomer.step(now, ev.MeshEntered(log.mesh, log.all_entries()))
    kept = [effect for effect in effects if isinstance(effect, Persist)]
    return [(effect.kind, effect.key, encode(effect.record) if effect.record else None) for effect in kept]


# -- as a member -----------------------------------------------------------------------------------------------------


class CloudAgent(Agent):
    """An agent that can be reached and reaches nobody."""

    def __init__(self, home: Home, config: Config, room: Room, boot: Boot) -> None:
        config = replace(config, seeds=(), advertise="off", link_port=boot.terms.port, join_file="")
        super().__init__(home, config, room)
        self._boot = boot
        self._metadata: ports.InstanceMetadata = Imds(os.environ.get(ENDPOINT_VARIABLE, ENDPOINT))
        self._closing.push_async_callback(self._metadata.close)

    async def start(self) -> None:
        """Connect everything, on exactly the port that the office knows. Raises MeshgpuError `no-port`."""
        await super().start()
        if self._boot.terms.port not in (0, self._port):
            raise MeshgpuError("no-port", f"cannot listen on port {self._boot.terms.port}: it is taken", "ss -ltnp")
        self._tasks.create_task(self._follow_interruptions(), name="interruptions")

    def _make_transport(self) -> ports.Transport:
        return GrpcLink(self._keys, self._clock, self._hosts(), self._config.link_port, dials=False, pace=self._pace)

    def _power_off(self) -> Callable[[], Awaitable[None]]:
        return power_off

    def _make_burst(self) -> None:
        return None

    def _node_config(self) -> NodeConfig:
        return replace(super()._node_config(), may_steward=False, seeds=(), instance=self._boot.terms.terms)

    async def _start_discovery(self) -> None:
        self._status.discovery_fault = "rented machines announce nothing"

    async def _own_hosts(self) -> list[str]:
        """Where the Internet reaches it; nowhere while the provider does not say."""
        try:
            address = await self._metadata.public_address()
        except MeshgpuError as error:
            logger.warning("%s", error.message)
            return [address.rpartition(":")[0] for address in self._addresses]
        return [address] if address else []

    async def _follow_interruptions(self) -> None:
        told: ports.Interruption | None = None
        while True:
            try:
                interruption = await self._metadata.interruption()
            except MeshgpuError as error:
                logger.debug("%s", error.message)
            else:
                if interruption is not None and interruption != told:
                    told = interruption
                    logger.warning("the provider takes this machine back: %s", interruption.ends_wall_s or "maybe soon")
                    self._runtime.post(ev.InterruptionNoticed(interruption.ends_wall_s))
            await asyncio.sleep(INTERRUPTION_POLL_S)
