"""Enrolment over real TLS on loopback, by the seams that agents use: Enroller and InstanceDoor."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from meshgpu.adapters.grpc_enrolment import GrpcBootstrap, GrpcEnrolDialog
from meshgpu.adapters.key_files import KeyFiles
from meshgpu.agent.enrolment import Enroller, InstanceDialog, InstanceDoor
from meshgpu.core.trust.enrolling import BOOTSTRAP_LIFE_S, Enrolment
from meshgpu.core.trust.meshlog import MeshLog, found
from meshgpu.errors import BrokenInvariant, MeshgpuError
from meshgpu.model.clock import Now
from meshgpu.model.cloud import LaunchId
from meshgpu.model.enrolment import BootTerms, InstanceTerms
from meshgpu.model.ids import Address, MeshId, UserName, digest, key_id, node_id
from meshgpu.model.trust import AddNode, Genesis, Role, SetRole, Signed
from meshgpu.wire.certificates import der, make_bootstrap, pem
from meshgpu.wire.endpoints import certificate_at
from meshgpu.wire.notary import WireNotary

LAUNCH = LaunchId("l" * 26)
LIFE = timedelta(seconds=BOOTSTRAP_LIFE_S)


@dataclass
class Clock:
    wall_s: float = field(default_factory=time.time)

    def now(self) -> Now:
        return Now(0.0, self.wall_s, "boot")


class Rig:
    """A burst peer with a mesh of its own."""

    def __init__(self, directory: Path) -> None:
        self.keys = KeyFiles(directory)
        self.notary = WireNotary(self.keys.sign, self.keys.verify)
        self.clock = Clock()
        admin = self.keys.user_key(1000)
        self.admin = key_id(admin)
        self.mesh, genesis = found(self.notary, self.admin, Genesis("lab", admin, b"r" * 32, b"n"))
        self.log = MeshLog(self.notary)
        self.log.enter(self.mesh, (genesis,))
        me = self.keys.node_key()
        added = AddNode(node_id(me), me, self.keys.device_ca(), "rig", Role.RIG, UserName("ada"))
        self.log.add(self.log.write(self.admin, (added, SetRole(node_id(me), Role.BURST))))
        self.enroller = Enroller(self.keys, self.notary, self.clock, random.Random(1), lambda: self.mesh)

    def add(self, public_key: bytes, device_ca: bytes) -> tuple[Signed, ...]:
        """The log once the rig has let these keys in, by its own chain."""
        node, ends = node_id(public_key), time.time() + 3600
        added = AddNode(node, public_key, device_ca, "cloud-1", Role.CLOUD, UserName("ada"), ends)
        self.log.add(self.log.write(key_id(self.keys.node_key()), (added,)))
        return self.log.all_entries()


class Instance:
    """A server with the user data of a launch."""

    def __init__(self, directory: Path, rig: Rig, leaf: tuple[bytes, x509.Certificate], mesh: MeshId) -> None:
        self.keys = KeyFiles(directory)
        self.clock = Clock()
        self.kept: list[MeshLog] = []
        private, certificate = leaf
        terms = InstanceTerms(time.time() + 3600, 600, 900)
        boot = BootTerms(mesh, LAUNCH, rig.keys.node_key(), 0, terms)
        ends = certificate.not_valid_after_utc.timestamp()
        notary = WireNotary(self.keys.sign, self.keys.verify)
        made = (self.keys.node_key(), self.keys.device_ca())
        enrolment = Enrolment(notary, boot, digest(der(certificate)), ends, made)
        self.door = InstanceDoor(enrolment, self.clock, random.Random(2), self._keep)
        self.listener = GrpcBootstrap(["127.0.0.1"], 0, private, pem(certificate))

    async def _keep(self, log: MeshLog) -> None:
        self.kept.append(log)

    async def open(self) -> Address:
        return Address(f"127.0.0.1:{await self.listener.open(self.door.answer)}")


@dataclass
class Launch:
    """A launch of one rig, and every server that came up with its user data."""

    directory: Path
    rig: Rig
    leaf: tuple[bytes, x509.Certificate]
    instances: list[Instance] = field(default_factory=list)
    dialogs: list[InstanceDialog] = field(default_factory=list)

    @property
    def bootstrap(self) -> bytes:
        return der(self.leaf[1])

    async def boot(self, mesh: MeshId | None = None, leaf: tuple[bytes, x509.Certificate] | None = None) -> Address:
        directory = self.directory / f"instance{len(self.instances)}"
        self.instances.append(Instance(directory, self.rig, leaf or self.leaf, mesh or self.rig.mesh))
        return await self.instances[-1].open()

    async def dial(self, address: Address, rig: Rig | None = None) -> InstanceDialog:
        dialog = await (rig or self.rig).enroller.dial(address, self.bootstrap)
        self.dialogs.append(dialog)
        return dialog


@pytest.fixture
async def launch(tmp_path: Path) -> AsyncIterator[Launch]:
    leaf = make_bootstrap(LAUNCH, datetime.now(UTC), LIFE)
    launch = Launch(tmp_path, Rig(tmp_path / "rig"), leaf)
    yield launch
    for dialog in launch.dialogs:
        await dialog.close()
    for instance in launch.instances:
        await instance.listener.close()
    async with asyncio.timeout(3):
        while len(asyncio.all_tasks()) > 1:  # noqa: ASYNC110  # gRPC's own end in their own time
            await asyncio.sleep(0.005)


async def test_instance_is_enrolled_once(launch: Launch) -> None:
    address = await launch.boot()
    instance = launch.instances[0]
    dialog = await launch.dial(address)
    assert (dialog.public_key, dialog.device_ca) == (instance.keys.node_key(), instance.keys.device_ca())
    assert not instance.door.enrolled.is_set()
    await dialog.welcome(launch.rig.add(dialog.public_key, dialog.device_ca))
    assert instance.door.enrolled.is_set()
    assert [log.mesh for log in instance.kept] == [launch.rig.mesh]
    with pytest.raises(MeshgpuError) as raised:
        await launch.dial(address)
    assert raised.value.code == "already-enrolled"
    with pytest.raises(MeshgpuError) as raised:
        await dialog.welcome(launch.rig.log.all_entries())
    assert raised.value.code == "already-enrolled"
    assert len(instance.kept) == 1


async def test_a_lost_welcome_is_said_again_to_the_same_key(launch: Launch) -> None:
    address = await launch.boot()
    first = await launch.dial(address)
    again = await launch.dial(address)
    assert first.public_key == again.public_key
    await again.welcome(launch.rig.add(again.public_key, again.device_ca))


async def test_another_certificate_is_not_talked_to(launch: Launch) -> None:
    """Even one for the same launch, by somebody who has taken over the address."""
    address = await launch.boot(leaf=make_bootstrap(LAUNCH, datetime.now(UTC), LIFE))
    with pytest.raises(MeshgpuError) as raised:
        await launch.dial(address)
    assert raised.value.code == "no-answer"
    assert launch.instances[0].kept == []


async def test_server_with_copied_user_data_gets_no_log(launch: Launch) -> None:
    first = await launch.dial(await launch.boot())
    log = launch.rig.add(first.public_key, first.device_ca)
    await first.welcome(log)
    thief = await launch.dial(await launch.boot())
    assert thief.public_key != first.public_key
    with pytest.raises(MeshgpuError) as raised:
        await thief.welcome(log)
    assert raised.value.code == "not-a-member"
    assert launch.instances[1].kept == []


async def test_another_rig_is_refused(launch: Launch) -> None:
    address = await launch.boot()
    other = Rig(launch.directory / "other")
    other.mesh = launch.rig.mesh
    with pytest.raises(MeshgpuError) as raised:
        await launch.dial(address, other)
    assert raised.value.code == "wrong-key"


async def test_log_of_another_mesh_is_refused_at_both_ends(launch: Launch) -> None:
    dialog = await launch.dial(await launch.boot())
    other = Rig(launch.directory / "other")
    with pytest.raises(MeshgpuError) as raised:
        await dialog.welcome(other.add(dialog.public_key, dialog.device_ca))
    assert raised.value.code == "wrong-mesh"
    address = await launch.boot(mesh=other.mesh)
    with pytest.raises(MeshgpuError) as raised:
        await launch.dial(address)
    assert raised.value.code == "not-allowed"
    assert [instance.kept for instance in launch.instances] == [[], []]


async def test_after_fifteen_minutes_neither_end_goes_on(launch: Launch) -> None:
    address = await launch.boot()
    launch.rig.clock.wall_s += BOOTSTRAP_LIFE_S + 1
    with pytest.raises(MeshgpuError) as raised:
        await launch.dial(address)
    assert raised.value.code == "expired"
    launch.rig.clock.wall_s -= BOOTSTRAP_LIFE_S + 1
    launch.instances[0].clock.wall_s += BOOTSTRAP_LIFE_S + 1
    with pytest.raises(MeshgpuError) as raised:
        await launch.dial(address)
    assert raised.value.code == "expired"


async def test_expired_certificate_fails_the_handshake(launch: Launch) -> None:
    launch.leaf = make_bootstrap(LAUNCH, datetime.now(UTC) - 2 * LIFE, LIFE)
    address = await launch.boot()
    dialog = GrpcEnrolDialog(address, launch.bootstrap)
    with pytest.raises(MeshgpuError) as raised:
        await dialog.call("greet", b"")
    assert raised.value.code == "no-answer"
    await dialog.close()


async def test_certificate_of_no_launch_is_refused(launch: Launch) -> None:
    address = await launch.boot()
    for bootstrap, code in ((b"junk", "bad-request"), (launch.rig.keys.device_ca(), "not-allowed")):
        with pytest.raises(MeshgpuError) as raised:
            await launch.rig.enroller.dial(address, bootstrap)
        assert raised.value.code in (code, "expired")


async def test_listener_takes_its_port_or_none(launch: Launch) -> None:
    address = await launch.boot()
    port = int(address.rpartition(":")[2])
    private, certificate = launch.leaf
    second = GrpcBootstrap(["127.0.0.1"], port, private, pem(certificate))
    with pytest.raises(MeshgpuError) as raised:
        await second.open(launch.instances[0].door.answer)
    assert raised.value.code == "no-port"
    with pytest.raises(BrokenInvariant):
        await launch.instances[0].open()
    assert await certificate_at(address, 3) == launch.bootstrap
    await launch.instances[0].listener.close()
    with pytest.raises(MeshgpuError):
        await certificate_at(address, 1)
    assert await second.open(launch.instances[0].door.answer) == port
    await second.close()


def test_certificate_is_a_servers_for_fifteen_minutes() -> None:
    _, certificate = make_bootstrap(LAUNCH, datetime.now(UTC), LIFE)
    left_s = certificate.not_valid_after_utc.timestamp() - time.time()
    assert BOOTSTRAP_LIFE_S - 60 < left_s <= BOOTSTRAP_LIFE_S
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    assert (list(usage.value), usage.critical) == ([ExtendedKeyUsageOID.SERVER_AUTH], True)
