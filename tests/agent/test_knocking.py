"""Knocking for a peer: what was found at its doors, and whether each side heard the other's announcement."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from meshgpu.agent import knocking
from meshgpu.agent.knocking import HEARD_S, knock_back
from meshgpu.agent.runtime import Outside, Runtime
from meshgpu.core import effects as fx
from meshgpu.core import events as ev
from meshgpu.errors import MeshgpuError
from meshgpu.model.clock import Now
from meshgpu.model.gossip import KnockOutcome
from meshgpu.model.ids import Address, MeshId, NodeId
from meshgpu.model.messages import KnockResult

BOB = NodeId("bob")
DOOR = Address("10.0.0.2:7443")


class Doors:
    """A transport at whose addresses `node` answers; nobody that shows a certificate where it is None."""

    def __init__(self, node: NodeId | None) -> None:
        self.node = node

    async def knock(self, address: Address) -> KnockOutcome:
        del address
        return KnockOutcome.ANSWERED

    async def identify(self, address: Address) -> NodeId:
        if self.node is None:
            raise MeshgpuError("no-answer", f"cannot reach {address}")
        return self.node


class Air:
    """Discovery that hears those of `voices`, but only after it has spoken itself."""

    def __init__(self, *voices: NodeId) -> None:
        self.voices = voices
        self.has_spoken = False

    def remind(self) -> bool:
        self.has_spoken = True
        return True

    def heard(self, node: NodeId, within_s: float) -> bool:
        return self.has_spoken and within_s >= HEARD_S and node in self.voices


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knocking, "LISTEN_S", 0.0)


@pytest.mark.parametrize("node", [BOB, NodeId("cyd"), None])
async def test_peer_hears_who_answers_at_its_door(node: NodeId | None) -> None:
    transport: Any = Doors(node)
    found = await knock_back(transport, None, BOB, (DOOR,))
    assert found == ev.KnockedBack(BOB, (KnockResult(DOOR, KnockOutcome.ANSWERED, node),))


@pytest.mark.parametrize(("voices", "hears"), [((BOB,), True), ((NodeId("cyd"),), False)])
async def test_peers_announcement_is_listened_for_and_ones_own_is_said(voices: tuple[NodeId, ...], hears: bool) -> None:
    transport: Any = Doors(BOB)
    air: Any = Air(*voices)
    found = await knock_back(transport, air, BOB, ())
    assert (found.hears, found.announces, air.has_spoken) == (hears, True, True)


async def run(knock: Callable[..., Awaitable[ev.KnockedBack]] | None) -> ev.KnockedBack:
    """What the node of a runtime is told after its KnockBack."""
    told: asyncio.Queue[ev.KnockedBack] = asyncio.Queue()

    class Script:
        log = type("Log", (), {"mesh": MeshId("m" * 64)})()

        def start(self, _: Now) -> list[fx.Effect]:
            return [fx.KnockBack(BOB, (DOOR,))]

        def step(self, _: Now, event: ev.Event) -> list[fx.Effect]:
            if isinstance(event, ev.KnockedBack):
                told.put_nowait(event)
            return []

        def deadline(self) -> None:
            return None

    class Clock:
        def now(self) -> Now:
            return Now(0.0, 0.0, "boot")

    unused: Any = None
    script: Any = Script()
    outside = Outside(Clock(), unused, unused, unused, unused, unused, knock_back=knock)
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        driver = tasks.create_task(Runtime(script, outside, unused, tasks).run())
        found = await told.get()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            if task is driver or task.get_name() == "effects":
                task.cancel()
    return found


async def test_whatever_happens_the_node_is_told_so_that_it_serves_that_peer_again() -> None:
    async def break_down(peer: NodeId, addresses: tuple[Address, ...]) -> ev.KnockedBack:
        raise OSError(f"no sockets for {peer} at {addresses}")

    assert await run(break_down) == ev.KnockedBack(BOB, ())
    assert await run(None) == ev.KnockedBack(BOB, ())
