"""What `doctor` gathers, from real nodes, a real agent's parts and this very machine."""

import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from meshgpu.agent import doctor as room
from meshgpu.agent.doctor import Doctor, clashes, document, examine_alone, membership
from meshgpu.agent.home import Home
from meshgpu.agent.knocking import HEARD_S
from meshgpu.agent.status import JoinNote, Status
from meshgpu.config import Config
from meshgpu.core.effects import Answered
from meshgpu.core.events import LinkOpened, LogWritten, MachineRead, MeshEntered, Ticked
from meshgpu.core.node import Node, NodeConfig
from meshgpu.core.trust.rekeying import make_rekey
from meshgpu.model.clock import Now
from meshgpu.model.doctor import EngineFacts, Finding, Membership, State
from meshgpu.model.gossip import KnockOutcome
from meshgpu.model.ids import Address, Digest, GpuId, KeyId, NodeId, node_id
from meshgpu.model.inventory import Gpu, GpuReading, Inventory
from meshgpu.model.messages import KnockAnswer, KnockResult
from meshgpu.model.trust import AddNode, LogEntry, Role
from meshgpu.sim.fakes import ToyNotary
from meshgpu.sim.office import Office, furnish

NOW = Now(1.0, 1_800_000_001.0, "boot")
DOOR = Address("10.0.0.1:7443")


class StillClock:
    def now(self) -> Now:
        return NOW


class Doors:
    """A transport that finds `outcome` at each address, and keeps where it knocked."""

    def __init__(self, outcome: KnockOutcome = KnockOutcome.SILENT) -> None:
        self.outcome = outcome
        self.knocked: list[Address] = []

    async def knock(self, address: Address) -> KnockOutcome:
        self.knocked.append(address)
        return self.outcome


class Peers:
    """A runtime whose peers have knocked."""

    def __init__(self, *knocks: tuple[NodeId, KnockAnswer, float]) -> None:
        self.knocks = knocks

    async def ask(self, event: Any) -> Answered:
        return Answered(event("q").query, knocks=self.knocks)


@pytest.fixture
def office() -> Office:
    return furnish(random.Random(1), 3, is_plain=True)


@pytest.fixture
def node(office: Office) -> Node:
    node = Node(office.setups[0].node, NOW, office.notaries[0], random.Random(1), NodeConfig("1"), ())
    node.step(NOW, MeshEntered(office.mesh, office.log))
    return node


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container engine is looked at in tests of its own."""
    monkeypatch.setattr(room, "examine_engine", EngineFacts)


def doctor(node: Node, home: Path, peers: Peers | None = None, doors: Doors | None = None, **status: Any) -> Doctor:
    seen = Status(node, Home(home), StillClock(), "a", 40001, "", lambda: [DOOR], "python", **status)
    runtime: Any = peers or Peers()
    transport: Any = doors or Doors()
    return Doctor(seen, Config(), runtime, transport, lambda: None)


async def finding(examined: Doctor, name: str) -> Any:
    (found,) = [check for check in await examined.findings() if check["name"] == name]
    return found


@pytest.mark.parametrize(("wanted", "ok"), [(40001, True), (0, True), (7443, None)])
async def test_doctor_doubts_the_link_port_where_its_port_was_taken(
    node: Node, office: Office, tmp_path: Path, wanted: int, ok: bool | None
) -> None:
    peer = office.setups[1].node
    knock = KnockResult(DOOR, KnockOutcome.ANSWERED, node.node)
    answer = KnockAnswer("q", (knock,), hears=True, announces=True, wall_s=NOW.wall_s)
    links = await finding(doctor(node, tmp_path, Peers((peer, answer, 0.0)), wanted_port=wanted), "link port")
    assert (links["ok"], "port 7443 was taken" in links["found"]) == (ok, ok is None)


async def test_doctor_does_not_ask_for_ever_to_remove_who_is_out_already(
    node: Node, office: Office, tmp_path: Path
) -> None:
    """A machine whose old keys somebody used at the same time is out, and its broken chain is nobody's trouble."""
    second = office.setups[1].node
    for name in ("next", "thief's"):
        public_key = office.ring.make(name)
        signers = (office.notaries[1], ToyNotary(office.ring, (public_key,)))
        rekey = make_rekey(office.mesh, second, (public_key, b"ca"), (), signers)
        heads = tuple(head for head in node.log.heads() if head.author != KeyId(second))
        entry = LogEntry(office.mesh, KeyId(second), 0, Digest(""), heads, rekey)
        node.step(NOW, LogWritten((office.notaries[1].sign(KeyId(second), entry),)))
    assert node.log.frozen == (KeyId(second),)
    assert node.log.person(KeyId(second)) == "rig1"
    mesh = await finding(doctor(node, tmp_path), "mesh")
    assert (mesh["ok"], mesh["found"].endswith("2 machines")) == (True, True)


async def test_machines_are_looked_for_where_they_are_known_to_be(node: Node, office: Office, tmp_path: Path) -> None:
    there = Address("10.0.0.9:7443")
    node.step(NOW, MeshEntered(office.mesh, office.log, ((office.setups[1].node, (there,)),)))
    doors = Doors(KnockOutcome.REFUSED)
    links = await finding(doctor(node, tmp_path, doors=doors), "links")
    assert doors.knocked == [there]
    assert (links["ok"], "rig1 is on, but no agent runs there" in links["found"]) == (False, True)
    assert "no address of rig2 is known" in links["found"]


async def test_clock_of_this_machine_is_compared_with_those_of_peers(
    node: Node, office: Office, tmp_path: Path
) -> None:
    answer = KnockAnswer("q", (), hears=False, announces=False, wall_s=NOW.wall_s)
    peers = Peers(*((setup.node, answer, 300.0) for setup in office.setups[1:]))
    clock = await finding(doctor(node, tmp_path, peers), "clock")
    assert (clock["ok"], clock["found"]) == (False, "5 min behind that of rig1 and rig2")


async def test_announcement_is_not_missed_because_another_peer_took_long(
    node: Node, office: Office, tmp_path: Path
) -> None:
    """What came while the last peer was waited for counts, however long that was."""
    slow = Now(NOW.boot_s + 6.0, NOW.wall_s + 6.0, NOW.boot_id)
    moments = [NOW]

    class Clock:
        def now(self) -> Now:
            return moments[-1]

    class Late(Peers):
        async def ask(self, event: Any) -> Answered:
            moments.append(slow)
            return await super().ask(event)

    class Air:
        windows: ClassVar[list[float]] = []

        def remind(self) -> bool:
            return True

        def heard(self, _: NodeId, within_s: float) -> bool:
            self.windows.append(within_s)
            return True

    answer = KnockAnswer("q", (), hears=True, announces=True, wall_s=NOW.wall_s)
    late = doctor(node, tmp_path, Late((office.setups[1].node, answer, 0.0)))
    late.status.clock, air = Clock(), Air()
    told: Any = air
    late.discovery = lambda: told
    await late.findings()
    assert air.windows == [HEARD_S + 6.0]


async def test_what_other_parts_noticed_is_told(node: Node, tmp_path: Path) -> None:
    told = doctor(node, tmp_path, join_note=JoinNote(ok=False, found="open to others", hint="chmod 600 /etc/join"))
    note = await finding(told, "join file")
    assert note == document(Finding("join file", State.FAIL, "open to others", "chmod 600 /etc/join"))
    assert (await finding(told, "audit"))["found"] == "0 entries here, ends of 0 machines watched"


async def test_gpu_that_was_lost_is_told(node: Node, tmp_path: Path) -> None:
    gpu = Gpu(GpuId("GPU-1"), 0, "NVIDIA GeForce RTX 4090", 24 * 2**30)
    inventory = Inventory(8, 2**30, (gpu,))
    later = Now(NOW.boot_s + 10, NOW.wall_s + 10, NOW.boot_id)  # readings are told some seconds apart
    node.step(later, MachineRead(inventory, (GpuReading(gpu.uuid, fault="lost: reset the machine"),)))
    lost = doctor(node, tmp_path)
    lost.status.inventory = inventory
    assert "lost: reset the machine" in (await finding(lost, "gpus"))["found"]


def add_machine(node: Node, office: Office, name: str) -> NodeId:
    """An admin who did not know that the name is taken."""
    public_key = office.ring.make(f"another {name}")

    body = AddNode(node_id(public_key), public_key, b"ca", name, Role.RIG, office.setups[0].owner)
    author = KeyId(next(iter(office.setups[0].accounts.values())))
    node.step(NOW, LogWritten(node.log.write(author, (body,))))
    return body.node


def test_two_machines_with_one_name_are_told_apart_and_named(node: Node, office: Office) -> None:
    add_machine(node, office, "rig2-east")
    assert clashes(node) == ()
    second = add_machine(node, office, "rig1")
    assert clashes(node) == (f"rig1-{second[:4]}",)


def test_membership_is_what_the_log_says(office: Office, node: Node) -> None:
    outside = Node(office.setups[0].node, NOW, office.notaries[0], random.Random(1), NodeConfig("1"), ())
    assert membership(outside) is Membership.NONE
    assert membership(node) is Membership.MEMBER


def test_rented_machine_whose_lease_is_over_has_an_expired_membership() -> None:
    office = furnish(random.Random(1), 3, is_plain=True, instances=1)
    rented = next(setup for setup in office.setups if setup.is_rented)
    notary = office.notaries[office.setups.index(rented)]
    node = Node(rented.node, NOW, notary, random.Random(1), NodeConfig("1"), ())
    node.step(NOW, MeshEntered(office.mesh, office.log))
    assert membership(node) is Membership.MEMBER
    ends = node.log.members[rented.node].expires_wall_s
    assert ends is not None
    node.step(Now(2.0, ends + 121.0, "boot"), Ticked())
    assert membership(node) is Membership.ENDED


def test_linked_machine_counts_as_linked(node: Node, office: Office) -> None:
    node.step(NOW, LinkOpened(office.setups[1].node))
    views = {view.member.name: view.state.value for view in node.machines(NOW) if room.is_of_office(view)}
    assert views == {"rig1": "alive", "rig2": "down"}


# -- without an agent ------------------------------------------------------------------------------------------------


@pytest.fixture
def taken_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """UDP port 5353 of another network, so to speak: a free port, held by somebody who does not share it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("", 0))
        monkeypatch.setattr("meshgpu.adapters.surroundings.MDNS_PORT", holder.getsockname()[1])
        yield


def alone(home: Path) -> dict[str, Any]:
    return {check["name"]: check for check in examine_alone(home, "no agent answers", "meshgpu up")}


@pytest.mark.usefixtures("taken_port")
def test_what_needs_no_agent_is_looked_at_without_one(tmp_path: Path) -> None:
    checks = alone(tmp_path / "not" / "made" / "yet")
    assert (checks["agent"]["state"], checks["agent"]["hint"]) == ("fail", "meshgpu up")
    assert checks["discovery"]["state"] == "fail"
    assert checks["links"]["state"] == "skipped"
    assert "free below" in checks["disk"]["found"]
    assert checks["socket"]["state"] == "skipped"


def test_configuration_that_keeps_the_agent_from_starting_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("seed = []\n")
    agent = alone(tmp_path)["agent"]
    assert "it cannot start: " in agent["found"]
    assert "there is no setting 'seed'" in agent["found"]
    assert agent["hint"] == f"nano {tmp_path}/config.toml"


def test_socket_that_others_may_open_is_named(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "agent.sock"))
        (tmp_path / "agent.sock").chmod(0o666)
        assert alone(tmp_path)["socket"]["found"].endswith("is open to other accounts (mode 0666)")
        (tmp_path / "agent.sock").chmod(0o600)
        assert alone(tmp_path)["socket"]["state"] == "ok"


MISMATCH = 18
"""NVML_ERROR_LIB_RM_VERSION_MISMATCH: `Driver/library version mismatch`."""


def test_driver_that_does_not_match_its_library_is_named_by_the_command(tmp_path: Path) -> None:
    """The real pynvml over the fake library, in a process of its own."""
    library = tmp_path / "nvml"
    build = Path(__file__).parent.parent / "fake_nvml" / "build.py"
    subprocess.run([sys.executable, build, library], check=True, timeout=60)
    (tmp_path / "gpus.txt").write_text(f"fail nvmlInit={MISMATCH}\n")
    planted = {
        "LD_LIBRARY_PATH": str(library),
        "FAKE_NVML": str(tmp_path / "gpus.txt"),
        "MESHGPU_HOME": str(tmp_path / "home"),
    }
    command = [str(Path(sys.executable).parent / "meshgpu"), "doctor"]
    done = subprocess.run(command, env=os.environ | planted, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    at = lines.index("BAD gpus the NVIDIA driver and its library do not match")
    assert lines[at + 1] == "fix: sudo reboot"
