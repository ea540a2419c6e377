"""The agent's part of a rekey: keys ready before anybody is told, none lost after, and who was away is told later."""

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from meshgpu import ports
from meshgpu.adapters.key_files import KeyFiles
from meshgpu.adapters.next_keys import NextKeys
from meshgpu.agent import courier as courier_module
from meshgpu.agent.courier import Courier
from meshgpu.agent.rekeying import Rekeying
from meshgpu.core.effects import Answered, Effect, Persist
from meshgpu.core.events import Event, LinkOpened, LogWritten, MeshEntered, RekeyAsked
from meshgpu.core.jobs.submission import Submissions
from meshgpu.core.node import Node, NodeConfig, take_up
from meshgpu.core.trust.meshlog import MeshLog, found
from meshgpu.errors import MeshgpuError
from meshgpu.model.clock import Now
from meshgpu.model.ids import Address, KeyId, NodeId, UserName, key_id, node_id
from meshgpu.model.messages import GossipDigest, LogDelta
from meshgpu.model.records import MeshLogRecord, Record
from meshgpu.model.trust import AddNode, Genesis, LinkUser, RemoveNode, Role
from meshgpu.wire.codec import PROTOCOL, decode_frame, encode_frame
from meshgpu.wire.notary import WireNotary

NOW = Now(1.0, 1_800_000_001.0, "boot")
DEADLINE_S = 20.0
ADA = UserName("ada")


class StillClock:
    def now(self) -> Now:
        return NOW


def notary_of(keys: ports.Keys) -> WireNotary:
    return WireNotary(keys.sign, keys.verify)


class Desk:
    """A machine with real keys in a mesh of two; the other one, `peer`, is known and away."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "mine"
        self.keys = KeyFiles(self.directory)
        self.keys.sealing_key()
        peer = KeyFiles(directory / "peer")
        self.peer, self.peer_notary = node_id(peer.node_key()), notary_of(peer)
        notary = notary_of(self.keys)
        admin = self.keys.user_key(1000)
        mesh, genesis = found(notary, key_id(admin), Genesis("lab", admin, b"r" * 32, b"nonce"))
        log = MeshLog(notary)
        log.enter(mesh, (genesis,))
        bodies: list[AddNode | LinkUser] = [
            AddNode(node_id(keys.node_key()), keys.node_key(), keys.device_ca(), name, Role.RIG, ADA)
            for keys, name in ((self.keys, "mine"), (peer, "peer"))
        ]
        bodies.append(LinkUser(ADA, admin, node_id(self.keys.node_key()), 1000))
        self.log = (genesis, *log.write(key_id(admin), bodies))
        self.mesh = mesh
        self.disk: dict[tuple[str, str], Record] = {}
        self.node = Node(node_id(self.keys.node_key()), NOW, notary, random.Random(1), NodeConfig("1"), ())
        where = ((self.peer, (Address("peer:7443"),)),)
        self.step(MeshEntered(mesh, self.log, where))
        self.rekeying = Rekeying(
            self.node,
            StillClock(),
            asyncio.Lock(),
            self.keys,
            NextKeys(self.directory),
            notary_of,
            self.ask,
            lambda: None,
        )

    def step(self, event: Event) -> list[Effect]:
        effects = self.node.step(NOW, event)
        for effect in effects:
            if isinstance(effect, Persist) and effect.record is not None:
                self.disk[effect.kind, effect.key] = effect.record
        return effects

    async def ask(self, event: Callable[[str], Event]) -> Answered:
        asked = event("q")
        if isinstance(asked, RekeyAsked):
            self.check_ready(asked)
        (answer,) = [effect for effect in self.step(asked) if isinstance(effect, Answered)]
        if answer.code:
            raise MeshgpuError(answer.code, answer.reason, answer.hint)
        return answer

    def check_ready(self, asked: RekeyAsked) -> None:
        """All that the mesh is about to be told of lies on disk."""
        waiting = self.directory / "next"
        names = {path.name for path in waiting.iterdir()}
        assert names == {"node.pem", "device-ca.pem", "sealing.pem", "user-1000.pem"}
        keys = KeyFiles(waiting)
        assert (keys.node_key(), keys.device_ca()) == (asked.rekey.public_key, asked.rekey.device_ca)
        assert [user.after for user in asked.rekey.users] == [keys.user_key(1000)]

    def heir(self) -> Node:
        """The node as its next agent makes it."""
        old = notary_of(self.keys)
        log = MeshLog(old)
        take_up(log, self.disk.values())
        NextKeys(self.directory).take(log.current(self.node.node), NOW.wall_s)
        keys = KeyFiles(self.directory)
        node = Node(
            node_id(keys.node_key()), NOW, notary_of(keys), random.Random(1), NodeConfig("1"), self.disk.values()
        )
        node.start(NOW)
        return node


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr("meshgpu.agent.rekeying.PARTING_S", 0.0)
    return Desk(tmp_path)


async def test_keys_are_ready_before_the_mesh_is_told_and_in_use_after_the_next_start(desk: Desk) -> None:
    before = desk.node.node
    renewed = await desk.rekeying.rekey()
    assert (renewed.name, renewed.before, renewed.away) == ("mine", before, ("peer",))
    assert node_id(KeyFiles(desk.directory).node_key()) == before, "not yet"
    heir = desk.heir()
    assert heir.node == renewed.node
    account = heir.log.account(heir.node, 1000)
    assert account is not None
    assert account.is_admin
    assert account.public_key == KeyFiles(desk.directory).user_key(1000)


async def test_refusal_leaves_nothing_behind(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Submissions, "is_open", True)
    with pytest.raises(MeshgpuError, match="being submitted"):
        await desk.rekeying.rekey()
    assert not NextKeys(desk.directory).is_waiting
    assert desk.heir().node == desk.node.node


async def test_keys_that_the_mesh_was_told_of_survive_whatever_is_asked_next(desk: Desk) -> None:
    renewed = await desk.rekeying.rekey()
    with pytest.raises(MeshgpuError, match="no member"):
        await desk.rekeying.rekey()
    assert desk.heir().node == renewed.node


async def test_answer_that_gets_lost_loses_no_keys(desk: Desk) -> None:
    async def lose(event: Callable[[str], Event]) -> Answered:
        await desk.ask(event)
        raise MeshgpuError("no-answer", "cannot go on")

    desk.rekeying.ask = lose
    with pytest.raises(MeshgpuError, match="cannot go on"):
        await desk.rekeying.rekey()
    heir = desk.heir()
    assert heir.node != desk.node.node
    assert heir.node in heir.log.members


# -- the courier -----------------------------------------------------------------------------------------------------


class Line:
    """A transport to `peer`, which answers as the test says. Everything else about it is unused."""

    def __init__(self, answer: Callable[["Line"], None]) -> None:
        self.answer = answer
        self.emit: Callable[[ports.LinkEvent], None]
        self.dialled: list[tuple[NodeId, Address]] = []
        self.sent: list[bytes] = []
        self.anchors: Sequence[ports.Anchor] = ()
        self.is_stopped = False

    async def start(self, emit: Callable[[ports.LinkEvent], None], _serve: ports.BulkHandler) -> int:
        self.emit = emit
        return 0

    def trust(self, anchors: Sequence[ports.Anchor]) -> None:
        self.anchors = anchors

    def dial(self, peer: NodeId, address: Address) -> None:
        self.dialled.append((peer, address))
        asyncio.get_running_loop().call_soon(self.answer, self)

    def send(self, _peer: NodeId, frame: bytes) -> None:
        self.sent.append(frame)

    def close(self, _peer: NodeId, _reason: str) -> None:
        pass

    async def stop(self) -> None:
        self.is_stopped = True


async def carried(
    desk: Desk,
    node: Node,
    monkeypatch: pytest.MonkeyPatch,
    answers: list[Callable[[Line], None]],
    ends_wall_s: float = math.inf,
) -> tuple[list[Line], int]:
    """The lines that a courier used, one for each of `answers`, and how often it said that it is done."""
    monkeypatch.setattr(courier_module, "FIRST_S", 0.0)
    monkeypatch.setattr(courier_module, "ROUND_S", 0.0)
    lines: list[Line] = []
    done: list[None] = []
    kept = frozenset(record.entry for record in desk.disk.values() if isinstance(record, MeshLogRecord))

    def open_as() -> ports.Transport:
        lines.append(Line(answers[len(lines)]))
        return lines[-1]  # type: ignore[return-value]  # what a courier uses of it

    async with asyncio.timeout(DEADLINE_S):
        await Courier(node, StillClock(), kept, ends_wall_s, open_as, lambda: done.append(None)).run()
    return lines, len(done)


def hear(desk: Desk, line: Line, theirs: MeshLog) -> None:
    """The peer says what it has of the log, takes in what it is told, and lets the old node's Link go."""
    digest = GossipDigest((), theirs.heads(), wants_answer=True)
    line.emit(ports.FrameReceived(desk.peer, encode_frame(desk.mesh, digest)))
    for frame in line.sent:
        _, message = decode_frame(frame)
        assert isinstance(message, LogDelta)
        theirs.add(message.entries)
    line.emit(ports.LinkClosed(desk.peer, "no longer trusted"))


async def test_courier_tells_who_was_away_what_it_lacks_and_ends_when_it_was_met(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await desk.rekeying.rekey()
    node = desk.heir()
    theirs = MeshLog(desk.peer_notary)
    theirs.enter(desk.mesh, desk.log)

    def away(line: Line) -> None:
        line.emit(ports.DialFailed(desk.peer, Address("peer:7443"), "timed out"))

    def back(line: Line) -> None:
        line.emit(ports.LinkOpened(desk.peer, dialled=True, protocol=PROTOCOL))
        line.emit(ports.FrameReceived(desk.peer, b"rubbish"))
        hear(desk, line, theirs)
        node.step(NOW, LinkOpened(desk.peer))

    lines, done = await carried(desk, node, monkeypatch, [away, back])
    assert [line.dialled for line in lines] == [[(desk.peer, "peer:7443")]] * 2
    assert all(line.is_stopped for line in lines)
    assert desk.peer in {anchor.node for anchor in lines[0].anchors}
    assert node.node in theirs.members
    assert desk.node.node not in theirs.members
    assert done == 1


async def test_courier_brings_nothing_that_was_written_since_its_agent_began(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may not be on disk yet, and be lost."""
    await desk.rekeying.rekey()
    node = desk.heir()
    theirs = MeshLog(desk.peer_notary)
    theirs.enter(desk.mesh, desk.log)

    def back(line: Line) -> None:
        node.step(NOW, LogWritten(node.log.write(KeyId(node.node), (RemoveNode(node.node),))))
        hear(desk, line, theirs)

    await carried(desk, node, monkeypatch, [back])
    assert node.node not in node.log.members
    assert node.node in theirs.members


async def test_courier_of_a_machine_that_is_out_has_nothing_to_tell(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await desk.rekeying.rekey()
    node = desk.heir()
    node.step(NOW, LogWritten(node.log.write(KeyId(node.node), (RemoveNode(node.node),))))
    assert await carried(desk, node, monkeypatch, []) == ([], 1)


async def test_courier_ends_with_its_leaf(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    await desk.rekeying.rekey()
    assert await carried(desk, desk.heir(), monkeypatch, [], ends_wall_s=NOW.wall_s) == ([], 1)


async def test_who_was_met_once_is_not_told_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    await desk.rekeying.rekey()
    node = desk.heir()
    node.step(NOW, LinkOpened(desk.peer))
    assert await carried(desk, node, monkeypatch, []) == ([], 1)
