"""The agent: makes every room, connects them, and ends them in order."""

import asyncio
import contextlib
import functools
import logging
import os
import random
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path

from aiohttp import web

from meshgpu import __version__, ports
from meshgpu.adapters.boot_clock import BootClock
from meshgpu.adapters.chunk_files import ChunkFiles
from meshgpu.adapters.docker_executor import DockerExecutor
from meshgpu.adapters.ec2_cloud import open_ec2
from meshgpu.adapters.fences import Fence
from meshgpu.adapters.gpu_locks import GpuLocks
from meshgpu.adapters.grpc_link import GrpcLink
from meshgpu.adapters.grpc_pairing import GrpcPairing, dial_pairing
from meshgpu.adapters.interfaces import chosen_addresses
from meshgpu.adapters.job_trees import remove_tree
from meshgpu.adapters.join_files import JoinFiles
from meshgpu.adapters.key_files import KeyFiles, RecoveryKey
from meshgpu.adapters.mdns import Mdns
from meshgpu.adapters.next_keys import NextKeys
from meshgpu.adapters.nvml_gpus import NvmlGpus
from meshgpu.adapters.process_executor import ProcessExecutor
from meshgpu.adapters.sqlite_store import SqliteStore
from meshgpu.adapters.uv_environments import UvEnvironments
from meshgpu.agent.admins import Admins
from meshgpu.agent.audit import AuditTrail, kept_audit
from meshgpu.agent.burst import Burst
from meshgpu.agent.control import Control, serve
from meshgpu.agent.courier import Courier
from meshgpu.agent.doctor import Doctor
from meshgpu.agent.enrolment import Enroller
from meshgpu.agent.executors import Executors
from meshgpu.agent.gpu_users import without_jobs
from meshgpu.agent.home import Home
from meshgpu.agent.jobs import Jobs
from meshgpu.agent.join_file import FileJoiner
from meshgpu.agent.knocking import knock_back
from meshgpu.agent.pairing import Pairing
from meshgpu.agent.rekeying import Rekeying
from meshgpu.agent.runtime import Outside, Runtime
from meshgpu.agent.secrets import Opener, Vault
from meshgpu.agent.status import JoinNote, Status
from meshgpu.agent.streams import Streams
from meshgpu.agent.trees import Trees
from meshgpu.agent.user_data import make_user_data
from meshgpu.config import Config, load_config
from meshgpu.core import effects as fx
from meshgpu.core import events as ev
from meshgpu.core.audit import AUDIT, AUDIT_START
from meshgpu.core.membership.pace import Paces
from meshgpu.core.node import Node, NodeConfig, take_up
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.errors import MeshgpuError
from meshgpu.guard import LedgerBounds
from meshgpu.model.cloud import INSTANCE_PORT
from meshgpu.model.enrolment import BootTerms, InstanceTerms
from meshgpu.model.gossip import Sighting
from meshgpu.model.ids import Address, JobId, MeshId, NodeId, as_name, node_id
from meshgpu.model.inventory import GpuReading, Inventory
from meshgpu.model.records import MeshLogRecord, Record
from meshgpu.wire.codec import decode, kind_of
from meshgpu.wire.notary import WireNotary

logger = logging.getLogger(__name__)

ADDRESS_POLL_S = 10.0
"""How often the machine's own addresses are looked up: DHCP and cables change them."""


def main(home: Path) -> int:
    """Run until SIGTERM, SIGINT or `meshgpu down`. Returns the process's exit code."""
    return live(run(Home(home.absolute()), Agent))


def live(life: Coroutine[None, None, bool]) -> int:
    """The process around an agent: its log, its limits, its last word. Returns the exit code.

    life: whether to begin anew. That is a new program in this very process, which whoever watches it keeps watching.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("grpc").setLevel(logging.CRITICAL)
    _raise_file_limit()
    try:
        if asyncio.run(life):
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  # itself, as it was called
    except MeshgpuError as error:
        print(f"error: {error.message}", file=sys.stderr)  # noqa: T201  # the agent's last word, for `meshgpu up`
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)  # noqa: T201
        return 125
    return 0


async def run(home: Home, make: "Callable[[Home, Config, Room], Agent]") -> bool:
    """The whole life of the agent that `make` makes, and whether to begin anew after it.

    Raises MeshgpuError where it cannot start.
    """
    stopping, renewing = asyncio.Event(), asyncio.Event()

    def begin_anew() -> None:
        renewing.set()
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    try:
        async with asyncio.TaskGroup() as tasks:
            async with contextlib.AsyncExitStack() as closing:
                config = load_config(home.config)
                logging.getLogger("meshgpu").setLevel(config.log.upper())
                await make(home, config, Room(tasks, closing, stopping.set, begin_anew)).start()
                await stopping.wait()
                logger.info("agent stops; jobs run on")
            raise _Stopped
    except* _Stopped:
        pass
    except* MeshgpuError as group:
        raise group.exceptions[0] from None
    return renewing.is_set()


class _Stopped(Exception):  # no error: it ends the TaskGroup
    """Ends every task of the agent."""


@dataclass(frozen=True, slots=True)
class Room:
    """Where an agent lives: its tasks, what ends it in reverse order, and how to ask for that end.

    begin_anew: the same, and then another agent with what is on disk.
    """

    tasks: asyncio.TaskGroup
    closing: contextlib.AsyncExitStack
    stop: Callable[[], None]
    begin_anew: Callable[[], None]


class Agent:
    """All parts of one agent, connected."""

    def __init__(self, home: Home, config: Config, room: Room) -> None:
        self._home = home
        self._config = config
        self._tasks = room.tasks
        self._closing = room.closing
        self._stop = room.stop
        self._begin_anew = room.begin_anew
        self._rng = random.SystemRandom()
        self._clock = BootClock()
        self._vault = Vault()
        self._paces = Paces()
        self._port = 0
        self._addresses: list[Address] = []
        self._discovery: ports.Discovery | None = None

    async def start(self) -> None:
        """Connect everything; when this returns, the control socket answers."""
        self._home.prepare()
        self._home.start_anew()
        store = SqliteStore(self._home.database)
        self._closing.callback(store.close)
        records: list[Record] = [
            decode(kind_of(_KINDS[kind]), data)
            for (kind, _), data in sorted(store.load(but=AUDIT).items())
            if kind != AUDIT_START
        ]
        records += kept_audit(store)
        self._next_keys = NextKeys(self._home.keys)
        self._become_current(records)
        self._keys = KeyFiles(self._home.keys)
        self._keys.check()
        self._notary = WireNotary(self._keys.sign, self._keys.verify)
        chunks = ChunkFiles(self._home.chunks, keep_free_bytes=self._keep_free_bytes())
        fence = Fence("", "config.toml says so") if self._config.fence == "none" else None
        opener = Opener(node_id(self._keys.node_key()), self._keys)
        jobs = self._home.jobs
        ledger = LedgerBounds(
            keep_bytes=int(self._config.keep_log_gb * 1e9), keep_free_bytes=chunks.keep_free_bytes(jobs)
        )
        environments = UvEnvironments(self._home.environments)
        self._executor = Executors(
            ProcessExecutor(jobs, environments, fence=fence, unseal=opener.open, ledger=ledger),
            DockerExecutor(jobs, node_id(self._keys.node_key()), unseal=opener.open, ledger=ledger),
        )
        await self._executor.start(lambda event: self._runtime.executor_event(event))
        self._closing.push_async_callback(self._executor.close)
        self._node = Node(
            node_id(self._keys.node_key()), self._clock.now(), self._notary, self._rng, self._node_config(), records
        )
        transport = self._transport = self._make_transport()
        trees = Trees(self._home, chunks, transport, self._node.addresses)
        outside = Outside(
            self._clock,
            transport,
            store,
            self._executor,
            self._announce,
            self._discard,
            power_off=self._power_off(),
            burst=self._make_burst(),
            knock_back=lambda peer, addresses: knock_back(transport, self._discovery, peer, addresses),
        )
        self._runtime = Runtime(self._node, outside, trees, self._tasks)
        streams = Streams(self._node, self._home, chunks, self._clock)
        self._port = await transport.start(self._runtime.link_event, streams.serve)
        self._closing.push_async_callback(transport.stop)
        self._status = self._make_status()
        await self._start_probe()
        self._tasks.create_task(self._runtime.run(), name="node")
        self._tasks.create_task(self._follow_addresses(), name="addresses")
        self._send_couriers(records)
        await self._start_discovery()
        await self._open_door(Jobs(self._runtime, streams, transport, self._vault), chunks)
        logger.info("agent %s answers, home %s, port %d", self._node.node[:12], self._home.directory, self._port)

    def _become_current(self, records: list[Record]) -> None:
        """Where new keys wait: take them, if the mesh log says that this machine goes on under them."""
        if self._next_keys.is_waiting:
            keys = KeyFiles(self._home.keys)
            log = MeshLog(WireNotary(keys.sign, keys.verify))
            take_up(log, records)
            self._next_keys.take(log.current(node_id(keys.node_key())), self._clock.now().wall_s)

    def _send_couriers(self, records: list[Record]) -> None:
        """Of old keys that somebody may still know this machine by. records: what is on disk."""
        kept = frozenset(record.entry for record in records if isinstance(record, MeshLogRecord))
        for leaf in self._next_keys.last_leaves(self._clock.now().wall_s):
            courier = Courier(
                self._node,
                self._clock,
                kept,
                leaf.ends_wall_s,
                functools.partial(GrpcLink, leaf, self._clock, ()),
                functools.partial(self._next_keys.forget, leaf),
            )
            self._tasks.create_task(courier.run(), name="courier")

    def _make_transport(self) -> ports.Transport:
        return GrpcLink(self._keys, self._clock, self._hosts(), self._config.link_port, pace=self._pace)

    def _pace(self, peer: NodeId, size: int) -> float:
        return self._paces.heard(self._clock.now(), peer, size)

    def _power_off(self) -> Callable[[], Awaitable[None]] | None:
        """How this machine ends; None for all that are not rented."""
        return None

    def _make_burst(self) -> Burst | None:
        """What rents machines where a person has set that up; None for machines that are rented themselves."""
        enroller = Enroller(self._keys, self._notary, self._clock, self._rng, lambda: self._node.log.mesh)
        burst = Burst(lambda settings: open_ec2(settings.region, self._mesh()), self._prepare_launch, enroller.dial)
        self._closing.push_async_callback(burst.close)
        return burst

    def _mesh(self) -> MeshId:
        mesh = self._node.log.mesh
        if mesh is None:
            raise MeshgpuError("not-in-mesh", "cannot rent: this machine is in no mesh", "meshgpu init")
        return mesh

    async def _prepare_launch(self, order: fx.PrepareLaunch) -> tuple[bytes, bytes]:
        """The user data of an instance to be, and the certificate (DER) by which it will be known."""
        settings = order.settings
        ends = InstanceTerms(order.lease_ends_wall_s, settings.idle_s, settings.no_contact_s)
        terms = BootTerms(self._mesh(), order.launch, self._keys.node_key(), INSTANCE_PORT, ends)
        return make_user_data(terms, settings.install, self._clock.now().wall_s)

    def _make_status(self) -> Status:
        return Status(
            self._node,
            self._home,
            self._clock,
            as_name(socket.gethostname().partition(".")[0], "machine"),
            self._port,
            self._executor.fence(),
            lambda: list(self._addresses),
            getattr(sys, "_base_executable", sys.executable),
            wanted_port=self._config.link_port,
            fence_reason=self._executor.fence_reason(),
        )

    def _hosts(self) -> list[str]:
        return hosts_of(self._config)

    def _keep_free_bytes(self) -> int | None:
        gigabytes = self._config.keep_free_gb
        return None if gigabytes is None else int(gigabytes * 1e9)

    def _node_config(self) -> NodeConfig:
        return NodeConfig(
            __version__,
            fence=self._executor.fence(),
            may_steward=not has_battery(),
            seeds=self._config.seed_addresses,
            policy=self._config.owner_policy,
            sealing_key=self._keys.sealing_key(),
            seal=self._vault.seal,
        )

    # -- the machine --------------------------------------------------------------------------------------------------

    async def _start_probe(self) -> None:
        locks = GpuLocks()
        self._closing.callback(locks.close)

        def sampled(inventory: Inventory, readings: tuple[GpuReading, ...]) -> None:
            self._status.inventory = inventory
            strangers = without_jobs(locks.claim(inventory, readings), self._executor)
            self._runtime.post(ev.MachineRead(inventory, strangers, round(os.getloadavg()[0])))

        probe = NvmlGpus()
        await probe.start(sampled)
        self._closing.push_async_callback(probe.stop)

    async def _follow_addresses(self) -> None:
        """Tell the node where it can be reached, whenever that changes."""
        while True:
            hosts = ["127.0.0.1"] if self._config.loopback else await self._own_hosts()
            addresses = [Address(f"{host}:{self._port}") for host in hosts]
            if addresses != self._addresses:
                self._addresses = addresses
                self._runtime.post(ev.AddressesChanged(tuple(addresses)))
                await self._runtime.announce()
            await asyncio.sleep(ADDRESS_POLL_S)

    async def _own_hosts(self) -> list[str]:
        return await asyncio.to_thread(chosen_addresses, self._config.interfaces or None)

    # -- discovery ----------------------------------------------------------------------------------------------------

    async def _start_discovery(self) -> None:
        def sighted(sighting: Sighting) -> None:
            self._status.sighted(sighting)
            self._runtime.post(ev.MachineSighted(sighting))

        discovery = Mdns(["127.0.0.1"] if self._config.loopback else self._config.interfaces or None)
        try:
            await discovery.start(sighted)
        except MeshgpuError as error:
            logger.warning("no discovery by mDNS: %s", error.message)
            self._status.discovery_fault = error.message
            return
        self._closing.push_async_callback(discovery.stop)
        self._discovery = discovery
        await self._runtime.announce()

    async def _announce(self) -> None:
        if self._discovery is None or self._config.advertise == "off" or not self._addresses:
            return
        sighting = self._status.own_sighting()
        await self._discovery.announce(sighting if self._config.advertise == "gpus" else replace(sighting, gpus=""))

    # -- people -------------------------------------------------------------------------------------------------------

    async def _open_door(self, jobs: Jobs, chunks: ports.ChunkStore) -> None:
        writing = asyncio.Lock()
        listener = GrpcPairing(self._hosts(), self._config.pairing_port)
        self._closing.push_async_callback(listener.close)
        pairing = Pairing(
            self._node,
            self._keys,
            self._notary,
            self._clock,
            self._rng,
            listener,
            self._runtime.settle,
            lambda: self._addresses,
            self._pairing_opened,
            self._tasks,
            RecoveryKey,
            writing,
        )
        admins = Admins(
            self._node,
            writing,
            self._runtime.settle,
            RecoveryKey,
            lambda signer: WireNotary(signer.sign, self._keys.verify),
            self._home.left.touch,
        )
        rekeying = Rekeying(
            self._node,
            self._clock,
            writing,
            self._keys,
            self._next_keys,
            lambda keys: WireNotary(keys.sign, keys.verify),
            self._runtime.ask,
            self._begin_anew,
        )
        control = Control(
            self._status,
            jobs,
            pairing,
            admins,
            rekeying,
            chunks,
            dial_pairing,
            self._executor.guards,
            self._runtime.settle,
            self._stop,
            self._tasks,
            AuditTrail(self._runtime, self._notary, self._keys.node_key),
            Doctor(self._status, self._config, self._runtime, self._transport, lambda: self._discovery),
        )
        runner: web.AppRunner = await serve(control.application(), self._home.socket)
        self._closing.push_async_callback(runner.cleanup)
        self._tasks.create_task(self._file_joiner(pairing).run(), name="join file")

    def _file_joiner(self, pairing: Pairing) -> FileJoiner:
        system = [Path(self._config.join_file)] if self._config.join_file else []
        return FileJoiner(
            JoinFiles([*system, self._home.join_file], self._home.used_join_files),
            pairing,
            dial_pairing,
            os.geteuid(),
            self._status.host_name,
            self._rng,
            self._join_noted,
        )

    def _join_noted(self, note: JoinNote | None) -> None:
        self._status.join_note = note

    def _pairing_opened(self, port: int) -> None:
        """A window of comparisons is open at `port`, or none any more (0): mDNS says so."""
        self._status.pairing_port = port
        self._tasks.create_task(self._runtime.announce())

    def _discard(self, job: JobId, epoch: int) -> None:
        remove_tree(self._home.attempt(job, epoch))


_KINDS = {
    "mesh": "MeshRecord",
    "log": "MeshLogRecord",
    "peer": "PeerRecord",
    "job": "JobRecord",
    "obeyed": "ObeyedRecord",
    "attempt": "AttemptRecord",
    "pause": "PauseRecord",
    "usage": "UsageRecord",
    "launch": "LaunchRecord",
    "spend": "SpendRecord",
    "burst": "BurstRecord",
}
"""The type of a stored record, by the kind under which it is kept."""


def hosts_of(config: Config) -> list[str]:
    """Where an agent listens."""
    return ["127.0.0.1"] if config.loopback else ["0.0.0.0"]  # noqa: S104  # peers must prove who they are


def has_battery(supplies: Path = Path("/sys/class/power_supply")) -> bool:
    """Whether this machine runs on one: a laptop, which is not meant to stay on. A mouse's battery does not count."""
    for supply in supplies.glob("*"):
        try:
            is_battery = (supply / "type").read_text().strip() == "Battery"
            scope = (supply / "scope").read_text().strip() if (supply / "scope").exists() else "System"
        except OSError:
            continue
        if is_battery and scope == "System":
            return True
    return False


def _raise_file_limit() -> None:
    """A LAN host that opens silent connections must not exhaust our descriptors soon."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
