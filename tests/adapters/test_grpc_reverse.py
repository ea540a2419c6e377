"""Reverse bulk over real gRPC on loopback: the rig dials, the instance asks; nothing is left over afterwards."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from meshgpu.adapters.grpc_link import GrpcLink, reverse
from meshgpu.adapters.key_files import KeyFiles
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import Address, NodeId, node_id
from meshgpu.ports import Anchor, DialFailed, LinkClosed, LinkEvent, LinkOpened
from meshgpu.wire.certificates import pem, server_name
from tests.adapters.test_grpc_link import MIB, FakeClock, LinkCall, collect, eventually, no_bulk, pattern

Serve = Callable[[NodeId, bytes], AsyncIterator[bytes]]


class Side:
    """A transport with keys of its own, its events, and what it serves."""

    def __init__(self, directory: Path, *, is_cloud: bool) -> None:
        self.keys = KeyFiles(directory)
        self.id = node_id(self.keys.node_key())
        self.anchor = Anchor(self.id, self.keys.device_ca(), is_cloud)
        self.link = GrpcLink(self.keys, FakeClock(time.time()), ["127.0.0.1"], 0, dials=not is_cloud)
        self.events: list[LinkEvent] = []
        self.bulk: Serve = no_bulk

    async def start(self) -> None:
        port = await self.link.start(self.events.append, lambda peer, request: self.bulk(peer, request))
        self.address = Address(f"127.0.0.1:{port}")

    def is_open(self, peer: "Side") -> bool:
        about = [event for event in self.events if isinstance(event, LinkOpened | LinkClosed) and event.peer == peer.id]
        return bool(about) and isinstance(about[-1], LinkOpened)


@dataclass
class Pair:
    rig: Side
    instance: Side

    async def link(self) -> None:
        self.rig.link.dial(self.instance.id, self.instance.address)
        await eventually(lambda: self.rig.is_open(self.instance) and self.instance.is_open(self.rig))

    def fetch(self, request: bytes = b"it") -> AsyncIterator[bytes]:
        return self.instance.link.fetch(self.rig.id, (), request)

    def waiting(self) -> int:
        """Standing calls of the rig that the instance could use now."""
        return len(self.instance.link._standings._waiting[self.rig.id])

    def calls(self) -> int:
        """Calls to the instance that the rig holds open, its Link included."""
        return sum(len(route.calls) for route in self.rig.link._routes._open)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    pair = Pair(Side(tmp_path / "rig", is_cloud=False), Side(tmp_path / "instance", is_cloud=True))
    for side in (pair.rig, pair.instance):
        await side.start()
        side.link.trust([pair.rig.anchor, pair.instance.anchor])
    yield pair
    await asyncio.gather(pair.rig.link.stop(), pair.instance.link.stop())
    await eventually(lambda: len(asyncio.all_tasks()) == 1)
    assert pair.waiting() == pair.calls() == 0


async def endless(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
    while True:
        yield bytes(MIB)


# -- what arrives ------------------------------------------------------------------------------------------------------


async def test_every_byte_of_a_large_tree_arrives(pair: Pair) -> None:
    asked: list[tuple[NodeId, bytes]] = []

    async def serve(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
        asked.append((peer, request))
        for number in range(100):
            yield pattern(number)

    pair.rig.bulk = serve
    await pair.link()
    assert await collect(pair.fetch(b"what" * 1000)) == [pattern(number) for number in range(100)]
    assert asked == [(pair.instance.id, b"what" * 1000)]


async def test_short_streams_never_lose_their_last_message(pair: Pair) -> None:
    async def serve(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
        for number in range(int(request)):
            yield b"%d" % number if number % 3 else b""

    pair.rig.bulk = serve
    await pair.link()
    for count in list(range(6)) * 20:
        expected = [b"%d" % number if number % 3 else b"" for number in range(count)]
        assert await collect(pair.fetch(b"%d" % count)) == expected
    many = await asyncio.gather(*(collect(pair.fetch(b"3")) for _ in range(60)))
    assert many == [[b"", b"1", b"2"]] * 60
    await eventually(lambda: pair.waiting() == reverse.SPARE_CALLS and pair.calls() == 1 + reverse.SPARE_CALLS)


async def test_errors_travel_with_code_message_and_hint(pair: Pair) -> None:
    async def breaks(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
        yield b"one"
        raise MeshgpuError("disk-full", "cannot read größe\n2: voll" + "x" * 9999, None)

    async def is_a_bug(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
        yield b"one"
        raise ZeroDivisionError

    await pair.link()
    wanted = (
        (no_bulk, "unknown-file", "meshgpu ls", 0),
        (breaks, "disk-full", None, 1),
        (is_a_bug, "no-answer", None, 1),
    )
    for bulk, code, hint, count in wanted:
        pair.rig.bulk = bulk
        messages: list[bytes] = []
        with pytest.raises(MeshgpuError) as raised:
            await collect(pair.fetch(), messages)
        assert (raised.value.code, raised.value.hint, len(messages)) == (code, hint, count)
    await eventually(lambda: pair.waiting() == reverse.SPARE_CALLS)


# -- what is held back -------------------------------------------------------------------------------------------------


async def test_slow_reader_holds_the_rig_back(pair: Pair) -> None:
    produced = 0

    async def serve(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
        nonlocal produced
        for _ in range(500):
            yield bytes(MIB)
            produced += 1

    pair.rig.bulk = serve
    await pair.link()
    stream = pair.fetch()
    await anext(stream)
    before = -1
    while produced != before:
        before = produced
        await asyncio.sleep(0.3)
    assert produced < 40
    await stream.aclose()  # type: ignore[attr-defined]  # a generator


async def test_instance_that_reads_nothing_holds_few_streams(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reverse, "WAIT_S", 0.3)
    begun = 0

    async def serve(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
        nonlocal begun
        begun += 1
        while True:
            yield bytes(1024)

    pair.rig.bulk = serve
    await pair.link()
    streams = [pair.fetch() for _ in range(reverse.STANDING_CALLS + 1)]
    for stream in streams[:-1]:
        await anext(stream)
    with pytest.raises(MeshgpuError, match="keeps no call open") as refused:
        await anext(streams[-1])
    assert (refused.value.code, begun) == ("no-answer", reverse.STANDING_CALLS)
    for stream in streams[:-1]:
        await stream.aclose()  # type: ignore[attr-defined]  # a generator
    await eventually(lambda: pair.waiting() == reverse.SPARE_CALLS)


async def test_rig_that_offers_without_end_is_refused(pair: Pair) -> None:
    async with raw_channel(pair.rig, pair.instance) as channel:
        serve: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream("/meshgpu.wire.v1.Mesh/Serve")
        calls = [serve() for _ in range(reverse.STANDING_CALLS + 5)]
        await eventually(lambda: pair.waiting() == reverse.STANDING_CALLS)
        async with asyncio.timeout(5):
            while sum(call.done() for call in calls) < 5:  # noqa: ASYNC110  # nothing to wait for
                await asyncio.sleep(0.01)
        assert pair.waiting() == reverse.STANDING_CALLS


async def test_abandoned_fetch_ends_the_stream_at_its_source(pair: Pair) -> None:
    ended = asyncio.Event()

    async def silent(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
        try:
            yield b"first"
            await asyncio.Event().wait()
        finally:
            ended.set()

    pair.rig.bulk = silent
    await pair.link()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await collect(pair.fetch())
    await asyncio.wait_for(ended.wait(), 2)
    await eventually(lambda: pair.waiting() == reverse.SPARE_CALLS and pair.calls() == 1 + reverse.SPARE_CALLS)


# -- who may, and until when -------------------------------------------------------------------------------------------


async def test_without_a_link_nobody_answers(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reverse, "WAIT_S", 0.2)
    with pytest.raises(MeshgpuError, match="keeps no call open") as raised:
        await collect(pair.instance.link.fetch(pair.rig.id, [pair.rig.address], b""))
    assert raised.value.code == "no-answer"


async def test_a_fetch_waits_for_the_link(pair: Pair) -> None:
    async def serve(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
        yield b"here"

    pair.rig.bulk = serve
    early = asyncio.ensure_future(collect(pair.fetch()))
    await asyncio.sleep(0.05)
    await pair.link()
    assert await early == [b"here"]


@pytest.mark.parametrize("who", ["rig", "instance"])
async def test_revocation_ends_what_is_served(pair: Pair, who: str) -> None:
    closed = asyncio.Event()

    async def serve(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(MIB)
        finally:
            closed.set()

    pair.rig.bulk = serve
    await pair.link()
    stream = pair.fetch()
    await anext(stream)
    (pair.rig if who == "rig" else pair.instance).link.trust([])
    async with asyncio.timeout(2):
        with pytest.raises(MeshgpuError) as raised:
            await collect(stream)
        assert raised.value.code == "no-answer"
        await closed.wait()
        await eventually(lambda: pair.waiting() == pair.calls() == 0)


async def test_revoked_rig_cannot_offer_on_a_connection_that_is_still_open(pair: Pair) -> None:
    async with raw_channel(pair.rig, pair.instance) as channel:
        await channel.channel_ready()
        pair.instance.link.trust([])
        call: LinkCall = channel.stream_stream("/meshgpu.wire.v1.Mesh/Serve")()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await asyncio.wait_for(call.read(), 5)
        assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert pair.waiting() == 0


@pytest.mark.parametrize("who", ["rig", "instance"])
async def test_the_end_of_a_link_ends_its_calls(pair: Pair, who: str) -> None:
    pair.rig.bulk = endless
    await pair.link()
    stream = pair.fetch()
    await anext(stream)
    if who == "rig":
        pair.rig.link.close(pair.instance.id, "drained")
    else:
        pair.instance.link.close(pair.rig.id, "drained")
    async with asyncio.timeout(2):
        with pytest.raises(MeshgpuError) as raised:
            await collect(stream)
        assert raised.value.code == "no-answer"
        await eventually(lambda: pair.waiting() == pair.calls() == 0)
    await pair.link()
    again = pair.fetch()
    assert len(await anext(again)) == MIB
    await again.aclose()  # type: ignore[attr-defined]  # a generator


async def test_a_rig_offers_nothing_to_another_rig(tmp_path: Path) -> None:
    one, other = (Side(tmp_path / name, is_cloud=False) for name in ("one", "other"))
    for side in (one, other):
        await side.start()
        side.link.trust([one.anchor, other.anchor])
    one.link.dial(other.id, other.address)
    await eventually(lambda: one.is_open(other))
    assert sum(len(route.calls) for route in one.link._routes._open) == 1
    async with raw_channel(one, other) as channel:
        call: LinkCall = channel.stream_stream("/meshgpu.wire.v1.Mesh/Serve")()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await asyncio.wait_for(call.read(), 5)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await asyncio.gather(one.link.stop(), other.link.stop())


async def test_instance_never_dials(pair: Pair) -> None:
    pair.rig.bulk = endless
    pair.instance.link.dial(pair.rig.id, pair.rig.address)
    assert pair.instance.events == [DialFailed(pair.rig.id, pair.rig.address, "this machine dials nobody")]
    with pytest.raises(MeshgpuError, match="dials nobody") as raised:
        await pair.instance.link.identify(pair.rig.address)
    assert raised.value.code == "no-answer"
    assert pair.instance.link._routes._open == set()
    assert pair.rig.events == []


@pytest.mark.parametrize("method", ["Link", "Bulk", "Serve"])
async def test_call_from_an_instance_is_refused(pair: Pair, method: str) -> None:
    """A thief of its key who gets into the office's network gains no way in."""
    pair.rig.bulk = endless
    async with raw_channel(pair.instance, pair.rig) as channel:
        call: LinkCall = channel.stream_stream(f"/meshgpu.wire.v1.Mesh/{method}")()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await asyncio.wait_for(call.read(), 5)
        assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert pair.rig.events == []


def raw_channel(member: Side, to: Side) -> grpc.aio.Channel:
    """A connection as that member would open it, to speak what GrpcLink would not."""
    private, certificate = member.keys.leaf(time.time())
    root = pem(x509.load_der_x509_certificate(to.anchor.device_ca))
    credentials = grpc.ssl_channel_credentials(root, private, certificate)  # type: ignore[no-untyped-call]  # no types
    return grpc.aio.secure_channel(to.address, credentials, [("grpc.ssl_target_name_override", server_name(to.id))])
