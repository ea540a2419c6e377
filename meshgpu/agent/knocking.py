"""What is behind a door: knocks at addresses and reads whose certificate answers; for this machine and for peers."""

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Final

from meshgpu.core.events import KnockedBack
from meshgpu.errors import MeshgpuError
from meshgpu.model.gossip import KnockOutcome
from meshgpu.model.ids import Address, NodeId
from meshgpu.model.messages import KnockResult
from meshgpu.ports import Discovery, Transport

LISTEN_S: Final = 1.0
"""For an announcement that was sent just now: access points hold multicast back for up to 0.3 s."""

HEARD_S: Final = 5.0
"""An announcement that came this long ago still shows that they come."""


async def knock_at(transport: Transport, address: Address) -> KnockResult:
    """One door; within 4 s."""
    outcome = await transport.knock(address)
    node: NodeId | None = None
    if outcome is KnockOutcome.ANSWERED:
        with contextlib.suppress(MeshgpuError):  # something else than an agent listens there
            node = await transport.identify(address)
    return KnockResult(address, outcome, node)


async def knock_at_all(transport: Transport, addresses: Iterable[Address]) -> tuple[KnockResult, ...]:
    """All doors at the same time."""
    return tuple(await asyncio.gather(*(knock_at(transport, address) for address in addresses)))


async def knock_back(
    transport: Transport, discovery: Discovery | None, peer: NodeId, addresses: Iterable[Address]
) -> KnockedBack:
    """What a peer asked for, which let its announcement be sent before: each side listens for the other's."""
    announces = discovery is not None and discovery.remind()
    knocks, _ = await asyncio.gather(knock_at_all(transport, addresses), asyncio.sleep(LISTEN_S))
    hears = discovery is not None and discovery.heard(peer, HEARD_S)
    return KnockedBack(peer, knocks, hears, announces)
