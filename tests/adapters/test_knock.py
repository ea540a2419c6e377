"""What knocking at a door comes to: whose certificate answers, a refusal, silence, something else."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from meshgpu.adapters.boot_clock import BootClock
from meshgpu.adapters.grpc_link import GrpcLink
from meshgpu.adapters.key_files import KeyFiles
from meshgpu.agent.knocking import knock_at_all
from meshgpu.model.gossip import KnockOutcome
from meshgpu.model.ids import Address, NodeId, node_id
from meshgpu.model.messages import KnockResult
from meshgpu.ports import LinkEvent


async def no_bulk(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
    del peer, request
    return
    yield b""


def ignore(event: LinkEvent) -> None:
    del event


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[tuple[GrpcLink, NodeId, int]]:
    keys = KeyFiles(tmp_path / "keys")
    link = GrpcLink(keys, BootClock(), ["127.0.0.1"], 0)
    port = await link.start(ignore, no_bulk)
    yield link, node_id(keys.node_key()), port
    await link.stop()


async def test_each_door_is_told_as_it_was_found(door: tuple[GrpcLink, NodeId, int]) -> None:
    link, node, port = door

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    something = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    closed = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    here, elsewhere, gone = (
        Address(f"127.0.0.1:{at}")
        for at in (port, something.sockets[0].getsockname()[1], closed.sockets[0].getsockname()[1])
    )
    closed.close()
    await closed.wait_closed()
    async with something:
        assert await knock_at_all(link, (here, elsewhere, gone)) == (
            KnockResult(here, KnockOutcome.ANSWERED, node),
            KnockResult(elsewhere, KnockOutcome.ANSWERED, None),
            KnockResult(gone, KnockOutcome.REFUSED, None),
        )


async def test_door_at_which_nobody_opens_is_silent(door: tuple[GrpcLink, NodeId, int]) -> None:
    """A listener whose queue is full drops what comes, as a firewall does."""
    link, _, _ = door
    with socket.socket() as listener, socket.socket() as first:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        first.connect(listener.getsockname())
        shut = Address(f"127.0.0.1:{listener.getsockname()[1]}")
        assert await knock_at_all(link, (shut,)) == (KnockResult(shut, KnockOutcome.SILENT, None),)
