"""Real gRPC on loopback; at the end of each test LinkOpened and LinkClosed must have alternated at every node."""

import asyncio
import hashlib
import itertools
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from meshgpu.adapters.grpc_link import GrpcLink, routes, transport
from meshgpu.adapters.grpc_link.routes import Route
from meshgpu.adapters.key_files import KeyFiles
from meshgpu.core.membership.clones import Clones
from meshgpu.errors import BrokenInvariant, MeshgpuError
from meshgpu.model.clock import Now
from meshgpu.model.ids import Address, NodeId, node_id
from meshgpu.ports import Anchor, DialFailed, FrameReceived, LinkClosed, LinkEvent, LinkOpened
from meshgpu.wire import codec
from meshgpu.wire.certificates import make_leaf, pem, server_name
from meshgpu.wire.codec import PROTOCOL
from meshgpu.wire.endpoints import certificate_at
from meshgpu.wire.grpc_calls import Context, service

MIB = 2**20
HALF_A_DAY_S = 43_200.0
LINK = "/meshgpu.wire.v1.Mesh/Link"
INFINITE_DIAL = b'{"version": 1, "instance": "x", "dial": 1e999}'
LinkCall = grpc.aio.StreamStreamCall[bytes, bytes]


@dataclass
class FakeClock:
    wall_s: float = field(default_factory=lambda: time.time() - HALF_A_DAY_S)

    def now(self) -> Now:
        return Now(0.0, self.wall_s, "boot")


class Node:
    """A transport with keys of its own, and everything that it emitted."""

    def __init__(self, directory: Path, port: int = 0) -> None:
        self.directory = directory
        self.keys = KeyFiles(directory)
        self.id = node_id(self.keys.node_key())
        self.anchor = Anchor(self.id, self.keys.device_ca())
        self.clock = FakeClock()
        self.events: list[LinkEvent] = []
        self.pace: Callable[[NodeId, int], float] = lambda _peer, _size: 0.0
        self.bulk: Callable[[NodeId, bytes], AsyncIterator[bytes]] = no_bulk
        self._changed = asyncio.Event()
        self.renew(port)

    def renew(self, port: int) -> None:
        self.link = GrpcLink(self.keys, self.clock, ["127.0.0.1"], port, pace=lambda peer, size: self.pace(peer, size))

    async def start(self) -> "Node":
        self.port = await self.link.start(self._emit, lambda peer, request: self.bulk(peer, request))
        self.address = Address(f"127.0.0.1:{self.port}")
        return self

    def _emit(self, event: LinkEvent) -> None:
        self.events.append(event)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until an event makes `condition` true."""
        async with asyncio.timeout(6):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def has_open(self, peer: "Node") -> bool:
        about = [event for event in self.events if isinstance(event, LinkOpened | LinkClosed) and event.peer == peer.id]
        return bool(about) and isinstance(about[-1], LinkOpened)

    def last(self, kind: type[LinkEvent]) -> Any:
        return next((event for event in reversed(self.events) if isinstance(event, kind)), None)

    def frames(self) -> list[bytes]:
        return [event.frame for event in self.events if isinstance(event, FrameReceived)]

    def check(self) -> None:
        """Openings and closings alternate for each peer, and frames come only between them."""
        opened: set[NodeId] = set()
        for event in self.events:
            match event:
                case LinkOpened(peer):
                    assert peer not in opened
                    opened.add(peer)
                case LinkClosed(peer):
                    assert peer in opened
                    opened.remove(peer)
                case FrameReceived(peer):
                    assert peer in opened


async def no_bulk(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
    raise MeshgpuError("unknown-file", f"cannot serve {request.decode()}: no such thing", "meshgpu ls")
    yield b""


Mesh = Callable[[int], Any]


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    """Starts nodes that trust one another; stops them, checks what they saw, and that nothing is left."""
    nodes: list[Node] = []

    async def make(count: int) -> list[Node]:
        made = [await Node(tmp_path / f"node{len(nodes) + i}").start() for i in range(count)]
        nodes.extend(made)
        for node in made:
            node.link.trust([other.anchor for other in made])
        return sorted(made, key=lambda node: node.id)

    yield make
    started_s = time.monotonic()
    await asyncio.gather(*(node.link.stop() for node in nodes))
    assert time.monotonic() - started_s < 1
    for node in nodes:
        node.check()
    await eventually(lambda: len(asyncio.all_tasks()) == 1)


async def linked(dialler: Node, answerer: Node) -> None:
    dialler.link.dial(answerer.id, answerer.address)
    await dialler.until(lambda: dialler.has_open(answerer))
    await answerer.until(lambda: answerer.has_open(dialler))


async def collect(stream: AsyncIterator[bytes], messages: list[bytes] | None = None) -> list[bytes]:
    """All messages of a stream; those before an error are in `messages`."""
    messages = [] if messages is None else messages
    async with asyncio.timeout(20):
        async for message in stream:
            messages.append(message)
    return messages


async def eventually(condition: Callable[[], bool]) -> None:
    """For what no event announces."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # nothing to wait for
            await asyncio.sleep(0.005)


def raw_channel(member: Node, to: Node) -> grpc.aio.Channel:
    """A connection as that member would open it, to speak what GrpcLink would not."""
    private, certificate = member.keys.leaf(member.clock.wall_s)
    credentials = grpc.ssl_channel_credentials(root(to), private, certificate)  # type: ignore[no-untyped-call]  # no types
    options = [("grpc.ssl_target_name_override", server_name(to.id))]
    return grpc.aio.secure_channel(to.address, credentials, options)


def root(node: Node) -> bytes:
    return pem(x509.load_der_x509_certificate(node.anchor.device_ca))


# -- Links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialler", [0, 1])
async def test_link_carries_frames_both_ways_in_order(mesh: Mesh, dialler: int) -> None:
    nodes = await mesh(2)
    one, other = nodes[dialler], nodes[1 - dialler]
    await linked(one, other)
    assert one.events == [LinkOpened(other.id, True, PROTOCOL)]
    assert other.events == [LinkOpened(one.id, False, PROTOCOL)]
    sent = [b"%d" % number for number in range(500)] + [b"", bytes(MIB)]
    for frame in sent:
        one.link.send(other.id, frame)
        other.link.send(one.id, frame)
    await one.until(lambda: len(one.frames()) == len(sent))
    await other.until(lambda: len(other.frames()) == len(sent))
    assert one.frames() == other.frames() == sent


async def test_frames_queued_while_the_opening_is_announced_arrive(mesh: Mesh) -> None:
    low, high = await mesh(2)
    for node, peer in ((low, high), (high, low)):
        emit = node.link._emit

        def greet(event: LinkEvent, node: Node = node, peer: Node = peer, emit: Any = emit) -> None:
            emit(event)
            if isinstance(event, LinkOpened):
                node.link.send(peer.id, b"at once")

        node.link._emit = greet
    await linked(high, low)
    await low.until(lambda: low.frames() == [b"at once"])
    await high.until(lambda: high.frames() == [b"at once"])


@pytest.mark.parametrize("attempt", range(20))
async def test_both_dial_at_once_and_keep_the_link_of_the_lower_id(mesh: Mesh, attempt: int) -> None:
    low, high = await mesh(2)
    for step in range(attempt // 4):
        await asyncio.sleep(0.002 * step)
    low.link.dial(high.id, high.address)
    for _ in range(attempt % 7):
        await asyncio.sleep(0.003)
    high.link.dial(low.id, low.address)
    await low.until(lambda: low.last(LinkOpened) == LinkOpened(high.id, True, PROTOCOL))
    await eventually(lambda: len(low.link._work) == len(high.link._work) == 1)
    assert low.has_open(high)
    assert high.has_open(low)
    assert high.last(LinkOpened) == LinkOpened(low.id, False, PROTOCOL)
    assert not [event for node in (low, high) for event in node.events if isinstance(event, DialFailed)]
    low.link.send(high.id, b"ping")
    high.link.send(low.id, b"pong")
    await low.until(lambda: low.frames() == [b"pong"])
    await high.until(lambda: high.frames() == [b"ping"])


@pytest.mark.parametrize("dialler", [0, 1])
async def test_dials_in_parallel_end_in_one_link(mesh: Mesh, dialler: int) -> None:
    nodes = await mesh(2)
    one, other = nodes[dialler], nodes[1 - dialler]
    for _ in range(5):
        one.link.dial(other.id, other.address)
    await one.until(lambda: one.has_open(other))
    await eventually(lambda: len(one.link._work) == len(other.link._work) == 1)
    assert one.has_open(other)
    assert other.has_open(one)
    one.link.send(other.id, b"ping")
    await other.until(lambda: other.frames() == [b"ping"])
    dialling = set(one.link._dialling)
    one.link.dial(other.id, other.address)
    assert one.link._dialling == dialling


async def test_both_sides_keep_the_same_link_whatever_the_order(mesh: Mesh) -> None:
    low, high = await mesh(2)
    kept: dict[tuple[tuple[bool, int], ...], set[tuple[bool, int]]] = {}
    for links in itertools.permutations([(True, 1), (True, 2), (False, 1), (False, 2)], 3):
        for node, peer in ((low, high), (high, low)):
            for is_low_dialling, dial in links:
                is_dialled = is_low_dialling == (node is low)
                route = Route(peer.id, cast(grpc.aio.Channel, None)) if is_dialled else None
                node.link._open(transport._Link(peer.id, transport._Hello("run", dial), route))
            link = node.link._links[peer.id]
            kept.setdefault(tuple(sorted(links)), set()).add((link.is_dialled == (node is low), link.hello.dial))
            node.link.close(peer.id, "next")
    assert kept == {links: {max(links, key=lambda link: (link[0], link[1]))} for links in kept}


@pytest.mark.parametrize("dialler", [0, 1])
async def test_loss_is_noticed_and_the_link_comes_back(mesh: Mesh, dialler: int) -> None:
    nodes = await mesh(2)
    one, other = nodes[dialler], nodes[1 - dialler]
    await linked(one, other)
    await other.link.stop()
    await one.until(lambda: not one.has_open(other))
    one.link.dial(other.id, other.address)
    await one.until(lambda: isinstance(one.events[-1], DialFailed))
    assert one.last(DialFailed).reason == "connection refused"
    other.events.clear()
    other.renew(other.port)
    await other.start()
    other.link.trust([one.anchor])
    await linked(other, one)
    await other.link.stop()
    await one.until(lambda: not one.has_open(other))


async def test_restarted_peer_replaces_a_link_that_looks_alive(mesh: Mesh) -> None:
    low, high = await mesh(2)
    await linked(low, high)
    first = low.link
    twin = GrpcLink(high.keys, high.clock, ["127.0.0.1"], 0)  # the same machine after a power cut
    await twin.start(lambda _event: None, no_bulk)
    twin.trust([low.anchor])
    twin.dial(low.id, low.address)
    await low.until(lambda: low.last(LinkOpened) == LinkOpened(high.id, False, PROTOCOL))
    assert low.link is first
    assert low.has_open(high)
    await twin.stop()


async def test_two_agents_with_one_key_take_each_others_links_away_and_show_who_they_are(mesh: Mesh) -> None:
    low, high = await mesh(2)
    await linked(low, high)
    twin = GrpcLink(high.keys, high.clock, ["127.0.0.1"], 0)  # its disk was copied
    await twin.start(lambda _event: None, no_bulk)
    twin.trust([low.anchor])
    twin.dial(low.id, low.address)
    await low.until(lambda: len(opened(low)) == 2)
    await high.until(lambda: not high.has_open(low))
    for count, side in ((3, high.link), (4, twin), (5, high.link)):
        await eventually(partial(_has_no_link, side, low.id))  # it has heard that its Link was taken
        side.dial(low.id, low.address)
        await low.until(lambda count=count: len(opened(low)) == count)
    first, copy, *_ = opened(low)
    assert opened(low) == [first, copy, first, copy, first]
    seen = Clones()
    shown = [seen.link_opened(low.clock.now(), high.id, instance) for instance in opened(low)]
    assert shown == [False] * 4 + [True]
    await twin.stop()


async def test_restarted_agent_draws_another_instance_and_is_no_clone(mesh: Mesh) -> None:
    low, high = await mesh(2)
    seen = Clones()
    await linked(high, low)
    for count in (2, 3):
        await high.link.stop()
        high.events.clear()
        high.renew(0)
        await high.start()
        high.link.trust([low.anchor])
        high.link.dial(low.id, low.address)
        await low.until(lambda count=count: len(opened(low)) == count)
    assert len(set(opened(low))) == 3
    assert not any(seen.link_opened(low.clock.now(), high.id, instance) for instance in opened(low))


def _has_no_link(side: GrpcLink, peer: NodeId) -> bool:
    return peer not in side._links


def opened(node: Node) -> list[str]:
    """Which instances of others have opened a Link to it."""
    return [event.instance for event in node.events if isinstance(event, LinkOpened)]


async def test_closing_tells_both_sides(mesh: Mesh) -> None:
    low, high = await mesh(2)
    await linked(low, high)
    high.link.close(low.id, "drained")
    assert high.events[-1] == LinkClosed(low.id, "drained")
    await low.until(lambda: not low.has_open(high))
    assert low.events[-1] == LinkClosed(high.id, "drained")
    high.link.close(low.id, "again")
    high.link.send(low.id, b"dropped")
    assert high.events[-1] == LinkClosed(low.id, "drained")


@pytest.mark.parametrize("dialler", [0, 1])
async def test_a_link_closed_while_it_opens_tells_why(mesh: Mesh, dialler: int) -> None:
    nodes = await mesh(2)
    one, other = nodes[dialler], nodes[1 - dialler]
    emit = other.link._emit

    def refuse(event: LinkEvent) -> None:
        emit(event)
        if isinstance(event, LinkOpened):
            asyncio.get_running_loop().call_soon(other.link.close, one.id, "not now")

    other.link._emit = refuse
    for _ in range(50):
        one.events.clear()
        one.link.dial(other.id, other.address)
        await one.until(lambda: isinstance(one.last(LinkEvent), LinkClosed | DialFailed))
        assert one.events[-1].reason == "not now"


async def test_frame_over_the_limit_is_our_bug(mesh: Mesh) -> None:
    low, high = await mesh(2)
    await linked(low, high)
    with pytest.raises(BrokenInvariant, match="1048577 bytes"):
        low.link.send(high.id, bytes(MIB + 1))
    assert low.has_open(high)


async def test_frame_over_the_limit_from_a_peer_closes_the_link(mesh: Mesh) -> None:
    low, high = await mesh(2)
    async with raw_channel(low, high) as channel:
        call: LinkCall = channel.stream_stream(LINK)()
        await call.write(json.dumps({"version": 1, "instance": "x", "dial": 1}).encode())
        await high.until(lambda: high.has_open(low))
        await call.write(bytes(2 * MIB))
        await high.until(lambda: not high.has_open(low))
        assert high.frames() == []


@pytest.mark.parametrize("is_dialled", [True, False])
async def test_slow_reader_is_cut_off(mesh: Mesh, is_dialled: bool) -> None:
    low, high = await mesh(2)
    stuck = asyncio.Event()

    async def hold(context: Context) -> None:
        await context.read()
        await context.write(json.dumps({"version": 1, "instance": "x", "dial": 1}).encode())
        await stuck.wait()

    server, address = await raw_server(high, {"Link": hold})
    async with raw_channel(high, low) as channel:
        if is_dialled:
            low.link.dial(high.id, address)
        else:
            call: LinkCall = channel.stream_stream(LINK)()
            await call.write(json.dumps({"version": 1, "instance": "x", "dial": 1}).encode())
        await low.until(lambda: low.has_open(high))
        for _ in range(1024 + 200):
            low.link.send(high.id, bytes(64 * 1024))
            await asyncio.sleep(0)
        await low.until(lambda: not low.has_open(high))
        assert low.last(LinkClosed).reason == "slow reader"
        await eventually(lambda: not low.link._work)
    stuck.set()
    await server.stop(None)


async def test_member_that_speaks_too_fast_waits_and_others_do_not(mesh: Mesh) -> None:
    low, middle, high = await mesh(3)
    for dialler in (low, middle):
        await linked(dialler, high)
    sizes: list[int] = []

    def pace(peer: NodeId, size: int) -> float:
        if peer == low.id:
            sizes.append(size)
        return 60.0 if peer == low.id and len(sizes) == 2 else 0.0

    high.pace = pace
    for _ in range(5):
        low.link.send(high.id, b"fast")
    await high.until(lambda: len(sizes) == 2)
    middle.link.send(high.id, b"calm")
    await high.until(lambda: b"calm" in high.frames())
    assert high.frames() == [b"fast", b"fast", b"calm"]
    low.link.close(high.id, "enough")
    await high.until(lambda: not high.has_open(low))


async def raw_server(member: Node, methods: dict[str, Callable[[Context], Any]]) -> tuple[grpc.aio.Server, Address]:
    """A listener that shows that member's leaf and accepts every member's."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((service("meshgpu.wire.v1.Mesh", methods),))
    port = server.add_secure_port("127.0.0.1:0", member.link._gate.server_credentials())
    await server.start()
    return server, Address(f"127.0.0.1:{port}")


async def test_dialler_of_another_version_is_told_both(mesh: Mesh) -> None:
    low, high = await mesh(2)
    async with raw_channel(low, high) as channel:
        call: LinkCall = channel.stream_stream(LINK)()
        await call.write(json.dumps({"version": 2, "news": True}).encode())
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await asyncio.wait_for(call.read(), 5)
    told = raised.value.trailing_metadata()
    assert "the dialler speaks 2, the answerer 1" in str(told)
    assert high.events == []


async def test_answerer_of_another_version_is_named_in_the_reason(mesh: Mesh) -> None:
    low, high = await mesh(2)

    async def newer(context: Context) -> None:
        await context.read()
        await context.write(b'{"version": 2}')
        await context.read()

    server, address = await raw_server(high, {"Link": newer})
    low.link.dial(high.id, address)
    await low.until(lambda: bool(low.events))
    assert low.events == [
        DialFailed(high.id, address, "protocol versions differ: the answerer speaks 2, the dialler 1")
    ]
    await server.stop(None)


@pytest.mark.parametrize(
    ("ours", "theirs", "spoken"),
    [((1, 2), (1, 1), 1), ((1, 1), (1, 2), 1), ((1, 2), (2, 3), 2), ((2, 3), (1, 2), 2)],
    ids=str,
)
async def test_neighbouring_versions_speak_the_newest_that_both_know(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, ours: tuple[int, int], theirs: tuple[int, int], spoken: int
) -> None:
    monkeypatch.setattr(codec, "OLDEST_PROTOCOL", ours[0])
    monkeypatch.setattr(codec, "PROTOCOL", ours[1])
    low, high = await mesh(2)
    said = json.dumps({"oldest": theirs[0], "version": theirs[1], "instance": "x", "dial": 1}).encode()
    ended = asyncio.Event()

    async def other(context: Context) -> None:
        await context.read()
        await context.write(said)
        await ended.wait()

    async with raw_channel(high, low) as channel:
        call: LinkCall = channel.stream_stream(LINK)()
        await call.write(said)
        await low.until(lambda: low.last(LinkOpened) == LinkOpened(high.id, False, spoken))
        call.cancel()
        await low.until(lambda: not low.has_open(high))
    server, address = await raw_server(high, {"Link": other})
    low.link.dial(high.id, address)
    await low.until(lambda: low.last(LinkOpened) == LinkOpened(high.id, True, spoken))
    ended.set()
    await server.stop(None)


@pytest.mark.parametrize(
    "hello", [b"", b"{", b"[]", b"7", b"\xff", b'{"version": 1}', b"[" * 9999, b'{"version":1}' * 999, INFINITE_DIAL]
)
async def test_junk_instead_of_a_hello_is_refused(mesh: Mesh, hello: bytes) -> None:
    with pytest.raises(MeshgpuError):
        transport._decode(hello, "dialler")
    low, high = await mesh(2)
    async with raw_channel(low, high) as channel:
        call: LinkCall = channel.stream_stream(LINK)()
        await call.write(hello)
        with pytest.raises(grpc.aio.AioRpcError):
            await asyncio.wait_for(call.read(), 5)
    assert high.events == []


async def test_silent_peer_fails_a_dial_in_time(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = await mesh(2)
    monkeypatch.setattr(transport, "DIAL_TIMEOUT_S", 0.3)
    monkeypatch.setattr(transport, "FIRST_MESSAGE_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = Address(f"127.0.0.1:{silent.getsockname()[1]}")
        low.link.dial(high.id, address)
        await low.until(lambda: bool(low.events))
    assert low.events == [DialFailed(high.id, address, "timed out")]
    async with raw_channel(low, high) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await asyncio.wait_for(channel.stream_stream(LINK)().read(), 5)
    assert high.link._work == {}


async def test_silent_strangers_give_their_places_back_and_keep_nobody_out(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(transport._SERVER_OPTIONS) | {"grpc.server_handshake_timeout_ms": 300}
    monkeypatch.setattr(transport, "_SERVER_OPTIONS", tuple(options.items()))
    low, high = await mesh(2)
    strangers = [await asyncio.open_connection("127.0.0.1", high.port) for _ in range(100)]
    await linked(low, high)
    async with asyncio.timeout(5):
        assert await asyncio.gather(*(reader.read() for reader, _ in strangers)) == [b""] * 100
    for _, writer in strangers:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def test_another_machine_at_the_address_fails_the_dial(mesh: Mesh) -> None:
    one, two, three = await mesh(3)
    one.link.dial(two.id, three.address)
    await one.until(lambda: bool(one.events))
    assert one.events == [DialFailed(two.id, three.address, "another machine answers there")]
    assert three.events == []


@pytest.mark.parametrize("name", ["b.{}", "b.example.org", "pairing.meshgpu.internal"])
async def test_another_name_under_the_right_ca_fails_the_dial(
    mesh: Mesh, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    low, high = await mesh(2)
    signer = load_pem_private_key(high.directory.joinpath("node.pem").read_bytes(), None)
    assert isinstance(signer, ed25519.Ed25519PrivateKey)
    private = ec.generate_private_key(ec.SECP256R1())
    validity = (datetime.now(UTC) - timedelta(days=1), datetime.now(UTC) + timedelta(days=1))
    ca = x509.load_der_x509_certificate(high.anchor.device_ca)
    leaf = make_leaf(private, name.format(server_name(high.id)), validity, (ca, signer))
    shown = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), pem(leaf)
    monkeypatch.setattr(high.keys, "leaf", lambda now_wall_s: shown)
    low.link.dial(high.id, high.address)
    await low.until(lambda: bool(low.events))
    assert low.events == [DialFailed(high.id, high.address, "another machine answers there")]


async def test_unknown_nodes_and_broken_addresses_fail_the_dial(mesh: Mesh) -> None:
    low, high = await mesh(2)
    low.link.dial(NodeId("a" * 52), high.address)
    low.link.dial(high.id, Address("nonsense"))
    low.link.dial(low.id, low.address)
    await low.until(lambda: len(low.events) == 3)
    reasons = [event.reason for event in low.events if isinstance(event, DialFailed)]
    assert reasons[0] == reasons[2] == "it is not a member of this mesh"
    assert "expected HOST:PORT" in reasons[1]


# -- trust -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialler", [0, 1])
async def test_removed_member_is_cut_off_at_once(mesh: Mesh, dialler: int) -> None:
    nodes = await mesh(2)
    await linked(nodes[dialler], nodes[1 - dialler])
    keeper, removed = nodes
    keeper.link.trust([keeper.anchor])
    assert keeper.events[-1] == LinkClosed(removed.id, "no longer trusted")
    async with asyncio.timeout(5):  # two shared cores may be busy; idle it takes some milliseconds
        await removed.until(lambda: not removed.has_open(keeper))
        removed.link.dial(keeper.id, keeper.address)
        await removed.until(lambda: isinstance(removed.events[-1], DialFailed))
    assert not keeper.has_open(removed)
    keeper.link.trust([removed.anchor])
    await linked(removed, keeper)


@pytest.mark.parametrize("dialler", [0, 1])
@pytest.mark.parametrize("keeper", [0, 1])
async def test_removed_member_hears_what_was_said_to_it_last(mesh: Mesh, dialler: int, keeper: int) -> None:
    """That it is out: nobody will talk to it afterwards."""
    nodes = await mesh(2)
    keeping, removed = nodes[keeper], nodes[1 - keeper]
    for number in range(10):
        await linked(nodes[dialler], nodes[1 - dialler])
        keeping.link.send(removed.id, b"you are out")
        keeping.link.trust([keeping.anchor])
        assert not keeping.has_open(removed)
        await removed.until(lambda: not removed.has_open(keeping))
        assert removed.frames() == [b"you are out"] * (number + 1)
        keeping.link.trust([removed.anchor])


async def test_removed_member_is_refused_on_a_connection_that_is_still_open(mesh: Mesh) -> None:
    low, high = await mesh(2)
    async with raw_channel(low, high) as channel:
        await channel.channel_ready()
        high.link.trust([])
        call: LinkCall = channel.stream_stream(LINK)()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await asyncio.wait_for(call.read(), 5)
        assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert high.events == []


async def test_removal_ends_bulk_streams_in_both_directions(mesh: Mesh) -> None:
    low, high = await mesh(2)
    closed: list[NodeId] = []

    async def endless(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(MIB)
        finally:
            closed.append(peer)

    low.bulk = high.bulk = endless
    served, fetched = high.link.fetch(low.id, [low.address], b""), low.link.fetch(high.id, [high.address], b"")
    await anext(served)
    await anext(fetched)
    low.link.trust([])
    async with asyncio.timeout(1):
        with pytest.raises(MeshgpuError) as raised:
            await anext(fetched)
        assert raised.value.code == "no-answer"
        with pytest.raises(MeshgpuError, match="no longer trusted") as raised:
            await collect(served)
        assert raised.value.code == "not-allowed"
        await eventually(lambda: sorted(closed) == sorted([low.id, high.id]))


async def test_removal_ends_a_dial(mesh: Mesh) -> None:
    low, high = await mesh(2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = Address(f"127.0.0.1:{silent.getsockname()[1]}")
        low.link.dial(high.id, address)
        await asyncio.sleep(0)
        low.link.trust([])
        async with asyncio.timeout(1):
            await low.until(lambda: bool(low.events))
    assert low.events == [DialFailed(high.id, address, "no longer trusted")]


async def test_leaves_of_both_sides_are_renewed_while_a_link_and_a_stream_are_open(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    low, high = await mesh(2)
    lines: asyncio.Queue[bytes] = asyncio.Queue()

    async def log(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
        while True:
            yield await lines.get()

    high.bulk = log
    seen: list[bytes] = []
    authorise: Callable[[Context], NodeId] = high.link._gate.authorise

    def note(context: Context) -> NodeId:
        seen.extend(context.auth_context()["x509_pem_cert"])
        return authorise(context)

    monkeypatch.setattr(high.link._gate, "authorise", note)
    await linked(low, high)
    follower = low.link.fetch(high.id, [high.address], b"")
    lines.put_nowait(b"before")
    assert await anext(follower) == b"before"
    shown = [await certificate_at(node.address, 3) for node in (low, high)]
    assert [await certificate_at(node.address, 3) for node in (low, high)] == shown
    for node in (low, high):
        node.clock.wall_s += 2 * HALF_A_DAY_S
    renewed = [await certificate_at(node.address, 3) for node in (low, high)]
    assert not set(renewed) & set(shown)

    low.link.send(high.id, b"still here")
    await high.until(lambda: high.frames() == [b"still here"])
    high.link.send(low.id, b"here, too")
    await low.until(lambda: low.frames() == [b"here, too"])
    lines.put_nowait(b"after")
    assert await anext(follower) == b"after"
    assert len(set(seen)) == 1

    low.link.close(high.id, "to dial with the new leaves")
    await high.until(lambda: not high.has_open(low))
    await linked(low, high)
    assert x509.load_pem_x509_certificate(seen[-1]) == x509.load_der_x509_certificate(renewed[0])
    assert seen[-1] != seen[0]
    lines.put_nowait(b"to whoever followed before")
    assert await anext(follower) == b"to whoever followed before"


@pytest.mark.parametrize("late", [0, 1], ids=["the dialler's", "the listener's"])
async def test_leaf_past_its_end_is_refused_until_it_is_renewed(mesh: Mesh, late: int) -> None:
    """Both sides check: each has a leaf of its own that TLS verifies by this computer's clock."""
    nodes = low, high = await mesh(2)
    nodes[late].clock.wall_s = time.time() - 8 * 2 * HALF_A_DAY_S
    low.link.dial(high.id, high.address)
    await low.until(lambda: bool(low.events))
    assert isinstance(low.events[-1], DialFailed)
    assert high.events == []
    nodes[late].clock.wall_s = time.time()
    await linked(low, high)


# -- bulk ------------------------------------------------------------------------------------------------------------


def pattern(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest() * (MIB // 32)


@pytest.mark.parametrize("is_linked", [True, False])
async def test_fetch_streams_every_byte(mesh: Mesh, is_linked: bool) -> None:
    low, high = await mesh(2)
    asked: list[tuple[NodeId, bytes]] = []

    async def serve(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
        asked.append((peer, request))
        for number in range(50):
            yield pattern(number)

    high.bulk = serve
    if is_linked:
        await linked(low, high)
    messages = await collect(low.link.fetch(high.id, [] if is_linked else [high.address], b"what"))
    assert messages == [pattern(number) for number in range(50)]
    assert asked == [(low.id, b"what")]


async def test_short_streams_never_lose_their_last_message(mesh: Mesh) -> None:
    low, high = await mesh(2)

    async def serve(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
        for number in range(int(request)):
            yield b"%d" % number

    high.bulk = serve
    for count in list(range(8)) * 25:
        messages = await collect(low.link.fetch(high.id, [high.address], b"%d" % count))
        assert messages == [b"%d" % number for number in range(count)]
    many = await asyncio.gather(*(collect(low.link.fetch(high.id, [high.address], b"3")) for _ in range(100)))
    assert many == [[b"0", b"1", b"2"]] * 100
    assert len(low.link._routes._open) == 1


async def test_errors_travel_with_code_message_and_hint(mesh: Mesh) -> None:
    low, high = await mesh(2)

    async def serve(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
        yield b"one"
        raise MeshgpuError("disk-full", "cannot read größe\n2: voll" + "x" * 9999, None)

    for bulk, code, hint, count in ((no_bulk, "unknown-file", "meshgpu ls", 0), (serve, "disk-full", None, 1)):
        high.bulk = bulk
        messages: list[bytes] = []
        with pytest.raises(MeshgpuError) as raised:
            await collect(low.link.fetch(high.id, [high.address], b"it"), messages)
        assert (raised.value.code, raised.value.hint, len(messages)) == (code, hint, count)
    assert raised.value.message.startswith("cannot read größe\n2: voll")


async def test_slow_consumer_holds_the_producer_back(mesh: Mesh) -> None:
    low, high = await mesh(2)
    produced = 0

    async def serve(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
        nonlocal produced
        for _ in range(500):
            yield bytes(MIB)
            produced += 1

    high.bulk = serve
    stream = low.link.fetch(high.id, [high.address], b"")
    await anext(stream)
    before = -1
    while produced != before:
        before = produced
        await asyncio.sleep(0.3)
    assert produced < 40
    await stream.aclose()


async def test_peer_that_reads_nothing_holds_few_streams(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes some MiB here; another peer is served none the less."""
    low, high = await mesh(2)
    monkeypatch.setattr(transport, "BULK_WAIT_S", 0.2)
    begun = 0

    async def serve(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
        nonlocal begun
        begun += 1
        while True:
            yield bytes(1024)

    high.bulk = serve
    streams = [low.link.fetch(high.id, [high.address], b"") for _ in range(transport.BULK_STREAMS_PER_PEER + 1)]
    for stream in streams[:-1]:
        await anext(stream)
    with pytest.raises(MeshgpuError) as refused:
        await anext(streams[-1])
    assert (refused.value.code, begun) == ("busy", transport.BULK_STREAMS_PER_PEER)
    assert high.link._slots[low.id].locked()
    await streams[0].aclose()
    again = low.link.fetch(high.id, [high.address], b"")
    await anext(again)
    for stream in (*streams[1:-1], again):
        await stream.aclose()
    await eventually(lambda: not high.link._slots[low.id].locked())


async def test_abandoned_fetch_ends_the_stream_at_its_source(mesh: Mesh) -> None:
    low, high = await mesh(2)
    ended = asyncio.Event()

    async def serve(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
        try:
            yield b"first"
            await asyncio.Event().wait()
        finally:
            ended.set()

    high.bulk = serve
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await collect(low.link.fetch(high.id, [high.address], b""))
    await asyncio.wait_for(ended.wait(), 2)


async def test_fetch_tries_one_address_after_the_other(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "CONNECT_TIMEOUT_S", 0.3)
    low, high, third = await mesh(3)
    high.bulk = lambda peer, request: one_message(b"here")
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        bad = [Address(f"127.0.0.1:{s.getsockname()[1]}") for s in (silent, closed)]
        addresses = [Address("nonsense"), *bad, third.address, high.address]
        assert await collect(low.link.fetch(high.id, addresses, b"")) == [b"here"]
        for address, reason in zip([*bad, third.address], ("timed out", "refused", "another machine"), strict=True):
            with pytest.raises(MeshgpuError, match=reason) as raised:
                await collect(low.link.fetch(high.id, [address], b""))
            assert raised.value.code == "no-answer"
    for peer, reason in ((high.id, "no address"), (NodeId("b" * 52), "not a member")):
        with pytest.raises(MeshgpuError, match=reason) as raised:
            await collect(low.link.fetch(peer, [high.address] if peer != high.id else [], b""))
        assert raised.value.code == "no-answer"


async def one_message(message: bytes) -> AsyncIterator[bytes]:
    yield message


async def test_fetch_recovers_from_a_restart_of_the_peer(mesh: Mesh) -> None:
    low, high = await mesh(2)
    high.bulk = lambda peer, request: one_message(b"here")
    assert await collect(low.link.fetch(high.id, [high.address], b"")) == [b"here"]
    await high.link.stop()
    with pytest.raises(MeshgpuError):
        await collect(low.link.fetch(high.id, [high.address], b""))
    high.renew(high.port)
    await high.start()
    high.link.trust([low.anchor])
    assert await collect(low.link.fetch(high.id, [high.address], b"")) == [b"here"]


async def test_fetch_uses_the_connection_of_a_dialled_link(mesh: Mesh) -> None:
    low, high = await mesh(2)
    high.bulk = low.bulk = lambda peer, request: one_message(b"here")
    await linked(low, high)
    assert await collect(low.link.fetch(high.id, [high.address], b"")) == [b"here"]
    assert len(low.link._routes._open) == 1
    stream = low.link.fetch(high.id, [], b"")
    low.bulk, high.bulk = high.bulk, low.bulk
    await anext(stream)
    low.link.close(high.id, "only the Link")
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_idle_connection_is_closed(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "IDLE_S", 0.05)
    low, high = await mesh(2)
    high.bulk = lambda peer, request: one_message(b"here")
    await collect(low.link.fetch(high.id, [high.address], b""))
    await eventually(lambda: not low.link._routes._open)
    assert await collect(low.link.fetch(high.id, [high.address], b"")) == [b"here"]


# -- addresses -------------------------------------------------------------------------------------------------------


async def test_identify_names_who_answers(mesh: Mesh) -> None:
    low, high = await mesh(2)
    assert await low.link.identify(high.address) == high.id
    assert await low.link.identify(Address(f"localhost:{high.port}")) == high.id
    assert high.events == []


async def test_identify_says_why_not(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    low, _ = await mesh(2)
    monkeypatch.setattr(transport, "IDENTIFY_TIMEOUT_S", 0.3)

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        await reader.read()
        writer.close()

    talker = await asyncio.start_server(speak, "127.0.0.1", 0)
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        expected: Iterable[tuple[Any, str]] = (
            (silent, "timed out"),
            (closed, "connection refused"),
            (talker.sockets[0], "no TLS"),
        )
        for place, reason in expected:
            with pytest.raises(MeshgpuError, match=reason) as raised:
                await low.link.identify(Address(f"127.0.0.1:{place.getsockname()[1]}"))
            assert raised.value.code == "no-answer"
    talker.close()
    await talker.wait_closed()
    for host in ("a..b", "x" * 70 + ".local"):  # what a seed may be
        with pytest.raises(MeshgpuError, match="name not found") as raised:
            await low.link.identify(Address(f"{host}:7443"))
        assert raised.value.code == "no-answer"


async def test_taken_port_gives_another(tmp_path: Path) -> None:
    first = await Node(tmp_path / "first").start()
    second = await Node(tmp_path / "second", first.port).start()
    assert second.port != first.port
    await second.link.stop()
    port = first.port
    await first.link.stop()
    again = await Node(tmp_path / "second", port).start()
    assert again.port == port
    await again.link.stop()


async def test_foreign_host_is_refused(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.link = GrpcLink(node.keys, node.clock, ["192.0.2.1"], 0)
    with pytest.raises(MeshgpuError, match=r"192\.0\.2\.1") as raised:
        await node.start()
    assert raised.value.code == "no-port"
    await node.link.stop()


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
async def test_links_work_by_every_kind_of_address(tmp_path: Path, host: str) -> None:
    nodes = [Node(tmp_path / name) for name in "ab"]
    for node in nodes:
        node.link = GrpcLink(node.keys, node.clock, ["127.0.0.1", "::1"], 0)
        await node.start()
        node.address = Address(f"{host}:{node.port}")
        node.link.trust([other.anchor for other in nodes])
        node.bulk = lambda peer, request: one_message(b"here")
    one, other = nodes
    assert await collect(one.link.fetch(other.id, [other.address], b"")) == [b"here"]
    await linked(one, other)
    assert await nodes[0].link.identify(nodes[1].address) == nodes[1].id
    for node in nodes:
        await node.link.stop()
