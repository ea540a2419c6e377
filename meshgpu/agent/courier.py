"""Tells members that have not heard of it that this machine goes on under new keys.

They know the old ones only, so a Link is opened as the old node, with the leaf that is left of it; the entries of the
mesh log that the member lacks go over it, and with them the member lets that Link go and lets the new node in.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final

from meshgpu import ports
from meshgpu.agent.runtime import anchors
from meshgpu.core.membership.gossip import fitting
from meshgpu.core.node import Node
from meshgpu.errors import MeshgpuError
from meshgpu.model.gossip import MemberState
from meshgpu.model.ids import Address, NodeId
from meshgpu.model.messages import GossipDigest, LogDelta
from meshgpu.model.trust import OFFICE_ROLES, Signed
from meshgpu.wire.codec import PROTOCOL, decode_frame, encode_frame

logger = logging.getLogger(__name__)

FIRST_S: Final = 2.0
"""Who heard of it in time has opened a Link by then, and need not be told again."""

ROUND_S: Final = 10.0
"""Between two rounds: machines that were off are told soon after they are back."""

ERRAND_S: Final = 8.0
"""For one dial, which ends within 5 s, and what is said over it."""


@dataclass(slots=True)
class Courier:
    """One for each identity that this machine gave up and that somebody may still know it by.

    kept: what it brings, the entries that were on disk when the agent began. One that is not there yet may never be:
    were it told, its number would be taken twice, or keys be gone that others wait for.
    ends_wall_s: Unix time from which on the old leaf opens no Link. open_as: a transport that is the old node's and
    listens nowhere. forget: everybody has been told, or cannot be any more.
    """

    node: Node
    clock: ports.Clock
    kept: frozenset[Signed]
    ends_wall_s: float
    open_as: Callable[[], ports.Transport]
    forget: Callable[[], None]
    _met: set[NodeId] = field(default_factory=set)

    async def run(self) -> None:
        """Until every machine of the office has opened a Link to the new node, or the leaf ends."""
        await asyncio.sleep(FIRST_S)
        while (waiting := self._waiting()) and self._is_useful():
            transport = self.open_as()
            errands = _Errands(self.node, transport, self.kept)
            await transport.start(errands.heard, _serve_nothing)
            try:
                transport.trust(anchors(self.node.log.members.values()))
                for peer in waiting:
                    for address in self.node.addresses(peer):
                        await errands.run(peer, address)
            finally:
                await transport.stop()
            await asyncio.sleep(ROUND_S)
        self.forget()

    def _waiting(self) -> list[NodeId]:
        """Machines of the office that have not been met since this agent began."""
        for view in self.node.machines(self.clock.now()):
            if view.is_self or view.state is MemberState.ALIVE:
                self._met.add(view.member.node)
        members = self.node.log.members.values()
        return sorted(m.node for m in members if m.role in OFFICE_ROLES and m.node not in self._met)

    def _is_useful(self) -> bool:
        return self.node.node in self.node.log.members and self.clock.now().wall_s < self.ends_wall_s


class _Errands:
    """Over one transport, one errand at a time."""

    def __init__(self, node: Node, transport: ports.Transport, kept: frozenset[Signed]) -> None:
        self._node = node
        self._transport = transport
        self._kept = kept
        self._over = asyncio.Event()
        self._protocol = PROTOCOL

    async def run(self, peer: NodeId, address: Address) -> None:
        self._over.clear()
        self._transport.dial(peer, address)
        try:
            async with asyncio.timeout(ERRAND_S):
                await self._over.wait()
        except TimeoutError:
            self._transport.close(peer, "it says nothing")

    def heard(self, event: ports.LinkEvent) -> None:
        match event:
            case ports.LinkOpened(peer=peer, protocol=protocol):
                self._protocol = protocol
                logger.info("telling %s of the new keys", peer[:12])
            case ports.FrameReceived(peer=peer, frame=frame):
                self._tell(peer, frame)
            case ports.DialFailed() | ports.LinkClosed():
                self._over.set()

    def _tell(self, peer: NodeId, frame: bytes) -> None:
        """A digest is the first thing that a member says: it shows what it lacks."""
        mesh = self._node.log.mesh
        try:
            found, message = decode_frame(frame)
        except MeshgpuError:
            return
        if mesh is None or found != mesh or not isinstance(message, GossipDigest):
            return
        lacking = tuple(entry for entry in self._node.log.beyond(message.heads) if entry in self._kept)
        while lacking:
            part = fitting(lacking)
            self._transport.send(peer, encode_frame(mesh, LogDelta(part), self._protocol))
            lacking = lacking[len(part) :]


async def _serve_nothing(_peer: NodeId, _request: bytes) -> AsyncIterator[bytes]:
    """Nobody asks the old node for anything: it listens nowhere."""
    return
    yield b""
