"""Links between members: opening, choosing between two, carrying frames; and the listener for Links and bulk streams.

Of two Links between one pair both sides keep the same one: the one that the lower node id dialled; of two dialled by
the same side, the later one. Every call is authorised on its own, because an open connection outlives a revocation.
"""

import asyncio
import json
import logging
import secrets
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

import grpc
from cryptography import x509

from meshgpu.adapters.grpc_link.gate import Gate
from meshgpu.adapters.grpc_link.reverse import STANDING_CALLS, Offers, Standings
from meshgpu.adapters.grpc_link.routes import ACCEPTED, FRAME_LIMIT_BYTES, OPTIONS, SERVICE, Route, Routes, beneath
from meshgpu.errors import BrokenInvariant, MeshgpuError, TrustError
from meshgpu.model.gossip import KnockOutcome
from meshgpu.model.ids import Address, NodeId
from meshgpu.ports import (
    Anchor,
    BulkHandler,
    Clock,
    DialFailed,
    FrameReceived,
    Identity,
    LinkClosed,
    LinkEvent,
    LinkOpened,
)
from meshgpu.wire.certificates import node_of_leaf
from meshgpu.wire.codec import OLDEST_PROTOCOL, PROTOCOL, common_protocol
from meshgpu.wire.endpoints import certificate_at, free_port, join_address, split_address
from meshgpu.wire.grpc_calls import Context, Stream, abort, reason_from, service

QUEUE_LIMIT_FRAMES: Final = 1024
"""Frames that wait for a slow peer; one more and it is as good as gone."""

DIAL_TIMEOUT_S: Final = 5.0
FIRST_MESSAGE_TIMEOUT_S: Final = 5.0
HELLO_LIMIT_BYTES: Final = 1024
IDENTIFY_TIMEOUT_S: Final = 3.0
KNOCK_TIMEOUT_S: Final = 1.0
"""An office answers a SYN in milliseconds; one lost SYN is sent again after 1 s."""

ABORT_TIMEOUT_S: Final = 0.3
"""A status waits behind what was written before it; who does not read gets it when he does."""

BULK_STREAMS_PER_PEER: Final = STANDING_CALLS
"""Served at once: gRPC takes some MiB of each from us although nobody reads them."""

BULK_WAIT_S: Final = 3.0
"""For one of these to end; below the ACCEPT_TIMEOUT_S after which the peer gives up."""

DIALS_NOBODY: Final = "this machine dials nobody"

PARTING_S: Final = 0.2
"""For the last frames of a Link that this side ends."""

STOP_GRACE_S: Final = 0.3
"""For calls to strangers who are just being refused; ours are over."""

_SERVER_OPTIONS: Final = (
    *OPTIONS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),  # below the 15 s at which peers ping
    ("grpc.server_handshake_timeout_ms", 5_000),  # silent strangers give their descriptor back
    ("grpc.max_concurrent_streams", 256),  # at a few thousand gRPC loses calls
    ("grpc.so_reuseport", 0),  # a taken port must be an error
)

_LinkCall = grpc.aio.StreamStreamCall[bytes, bytes]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Hello:
    """First frame of each side. instance: random for each start of an agent. dial: counts the dialler's dials.

    protocol: the newest that both sides speak.
    """

    instance: str
    dial: int
    protocol: int = PROTOCOL


@dataclass(eq=False, slots=True)
class _Link:
    """One Link that is up; `ended` gets the reason for which this side closes it. route, call: only if we dialled.

    task: what carries it.
    """

    peer: NodeId
    hello: _Hello
    route: Route | None
    call: _LinkCall | None = None
    task: asyncio.Task[Any] | None = None
    ended: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    queue: asyncio.Queue[bytes] = field(default_factory=lambda: asyncio.Queue(QUEUE_LIMIT_FRAMES))

    @property
    def is_dialled(self) -> bool:
        return self.route is not None


class GrpcLink:
    """Transport on `hosts`; accepts nobody before `trust`. dials: False where it must never open a connection.

    Without hosts it only dials, and its port is 0. pace: told of each frame's sender and bytes, says for how many
    seconds not to read on from that one.

    `emit` may be called from within any method. A dial while a Link is open does nothing: its LinkOpened came before.
    """

    def __init__(
        self,
        keys: Identity,
        clock: Clock,
        hosts: Sequence[str],
        port: int = 7443,
        *,
        dials: bool = True,
        pace: Callable[[NodeId, int], float] = lambda _peer, _size: 0.0,
    ) -> None:
        self._hosts = tuple(hosts)
        self._port = port
        self._gate = Gate(keys, clock)
        self._routes = Routes(self._gate)
        self._dials_others = dials
        self._pace = pace
        self._clouds: frozenset[NodeId] = frozenset()
        self._offers = Offers(self._routes, self._bulk_messages)
        self._standings = Standings()
        self._instance = secrets.token_hex(8)
        self._dials = 0
        self._links: dict[NodeId, _Link] = {}
        self._work: dict[asyncio.Task[Any], NodeId] = {}
        self._evicted: dict[asyncio.Task[Any], str] = {}
        self._dialling: set[asyncio.Task[None]] = set()
        self._slots: defaultdict[NodeId, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(BULK_STREAMS_PER_PEER)
        )
        self._server: grpc.aio.Server | None = None
        self._emit: Callable[[LinkEvent], None] = lambda _event: None
        self._serve_bulk: BulkHandler | None = None
        self._is_stopping = False

    async def start(self, emit: Callable[[LinkEvent], None], serve_bulk: BulkHandler) -> int:
        """Listen; `emit` is called on the event loop. Returns the port: the wanted one, or a free one if it is taken.

        Raises MeshgpuError `no-port`.
        """
        self._emit, self._serve_bulk = emit, serve_bulk
        if not self._hosts:
            return 0
        server = grpc.aio.server(options=_SERVER_OPTIONS)
        methods = {"Link": self._answer_link, "Bulk": self._answer_bulk, "Serve": self._answer_serve}
        server.add_generic_rpc_handlers((service(SERVICE, methods),))
        port = free_port(self._hosts, self._port)
        try:
            for host in self._hosts:
                server.add_secure_port(join_address(host, port), self._gate.server_credentials())
        except RuntimeError as error:
            raise MeshgpuError("no-port", f"cannot listen on port {port}: {error}", "meshgpu doctor") from error
        self._server = server
        await server.start()
        return port

    def trust(self, anchors: Sequence[Anchor]) -> None:
        """Replace the trust bundle; Links, dials and streams of nodes that are no longer in it end at once.

        A device CA that is not its node's own is left out with a warning.
        """
        self._clouds = frozenset(anchor.node for anchor in anchors if anchor.is_cloud)
        for peer in self._gate.trust(anchors):
            parting = self._links.get(peer)  # it ends by itself once it was told why
            self.close(peer, "no longer trusted")
            for task, other in self._work.items():
                if other == peer and not (parting and task is parting.task):
                    self._end_work(task, "no longer trusted")
            self._routes.evict(peer, parting.call if parting else None)

    def dial(self, peer: NodeId, address: Address) -> None:
        """Open a Link; the outcome is LinkOpened or DialFailed, within 5 s."""
        if not self._dials_others:
            self._publish(DialFailed(peer, address, DIALS_NOBODY))
        elif peer not in self._links and not self._is_stopping:
            self._dials += 1
            hello = _Hello(self._instance, self._dials)
            task = asyncio.get_running_loop().create_task(self._dial(peer, address, hello))
            self._dialling.add(task)
            task.add_done_callback(self._dialling.discard)

    def send(self, peer: NodeId, frame: bytes) -> None:
        """Queue a frame; dropped where no Link is open or its queue is full (the Link is then closed)."""
        if len(frame) > FRAME_LIMIT_BYTES:
            raise BrokenInvariant(f"a frame for {peer} has {len(frame)} bytes; at most {FRAME_LIMIT_BYTES} fit")
        if link := self._links.get(peer):
            try:
                link.queue.put_nowait(frame)
            except asyncio.QueueFull:
                self._drop(link, "slow reader")

    def close(self, peer: NodeId, reason: str) -> None:
        if link := self._links.get(peer):
            self._drop(link, reason)

    def fetch(self, peer: NodeId, addresses: Sequence[Address], request: bytes) -> AsyncIterator[bytes]:
        """A bulk stream of `peer`, over one of its standing calls where this side dials nobody.

        Raises MeshgpuError with the peer's code, or `no-answer`. Silence has no limit here (a log may be silent); that
        the peer is gone is noticed by keepalive, in 25 s.
        """
        if not self._dials_others:
            return self._standings.fetch(peer, request)
        link = self._links.get(peer)
        return self._routes.fetch(peer, addresses, request, link.route if link else None)

    async def knock(self, address: Address) -> KnockOutcome:
        """What a bare TCP connection to `address` comes to, within 1 s; nothing is sent over it."""
        host, port = split_address(address)
        try:
            async with asyncio.timeout(KNOCK_TIMEOUT_S):
                _, writer = await asyncio.open_connection(host, port)
        except ConnectionRefusedError:
            return KnockOutcome.REFUSED
        except (OSError, TimeoutError):
            return KnockOutcome.SILENT
        writer.close()
        return KnockOutcome.ANSWERED

    async def identify(self, address: Address) -> NodeId:
        """Whose certificate answers at `address`, unverified: a hint to dial. Raises MeshgpuError `no-answer`."""
        if not self._dials_others:
            raise MeshgpuError("no-answer", f"cannot reach {address}: {DIALS_NOBODY}")
        shown = await certificate_at(address, IDENTIFY_TIMEOUT_S)
        try:
            return node_of_leaf(x509.load_der_x509_certificate(shown))
        except (ValueError, TrustError) as error:
            raise MeshgpuError("no-answer", f"cannot reach {address}: no machine of a mesh answers there") from error

    async def stop(self) -> None:
        """Close everything, without further events."""
        self._is_stopping = True
        pending = {*self._work, *self._dialling}
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending)
        self._links.clear()
        await self._routes.close()
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
            self._server = None

    # -- which Link is the one ---------------------------------------------------------------------------------------

    def _open(self, link: _Link) -> bool:
        """Make `link` the one Link of its pair, unless the one that is open must stay."""
        current = self._links.get(link.peer)
        if current is not None:
            if not self._wins(link, current):
                return False
            self._drop(current, "replaced by a newer Link")
        self._links[link.peer] = link
        self._publish(LinkOpened(link.peer, link.is_dialled, link.hello.protocol, link.hello.instance))
        return True

    def _wins(self, link: _Link, current: _Link) -> bool:
        """Whether `link` replaces `current`; the peer, which saw the same hellos, comes to the same answer."""
        if link.hello.instance != current.hello.instance:
            return True  # the peer's agent was started again: `current` is a remnant
        if link.is_dialled != current.is_dialled:
            return link.is_dialled == (self._gate.me < link.peer)
        return link.hello.dial > current.hello.dial

    def _drop(self, link: _Link, reason: str) -> None:
        """Close a Link, once; its task, which sees `ended`, does the rest."""
        if not link.ended.done():
            link.ended.set_result(reason)
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
            self._publish(LinkClosed(link.peer, reason))

    def _publish(self, event: LinkEvent) -> None:
        if not self._is_stopping:
            self._emit(event)

    # -- the life of a Link ------------------------------------------------------------------------------------------

    async def _dial(self, peer: NodeId, address: Address, hello: _Hello) -> None:
        with self._working(peer) as task:
            try:
                route = self._routes.open(peer, address)
            except MeshgpuError as error:
                self._publish(DialFailed(peer, address, error.message))
                return
            call: _LinkCall = route.channel.stream_stream(f"/{SERVICE}/Link")()
            self._routes.enter(route, call)
            try:
                link = _Link(peer, await self._greet(call, hello), route, call, task)
            except (MeshgpuError, asyncio.CancelledError) as error:
                reason = error.message if isinstance(error, MeshgpuError) else self._evicted.get(task)
                if reason is None:
                    raise
                if peer not in self._links:
                    self._publish(DialFailed(peer, address, reason))
            else:
                if self._open(link):
                    async with self._offering(route):
                        await self._pump(link, call)
            finally:
                self._routes.leave(route, call)

    @asynccontextmanager
    async def _offering(self, route: Route) -> AsyncIterator[None]:
        """Beside a Link to a node that dials nobody: let it ask for bulk, too."""
        if route.peer not in self._clouds:
            yield
            return
        offers = asyncio.get_running_loop().create_task(self._offers.keep(route))
        try:
            yield
        finally:
            offers.cancel()
            await asyncio.wait({offers})

    async def _greet(self, call: _LinkCall, hello: _Hello) -> _Hello:
        """Exchange hellos; returns the peer's instance with our dial. Raises MeshgpuError: a reason in few words."""
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                with suppress(asyncio.InvalidStateError):  # the call has failed; reading tells why
                    await call.write(_encode(hello))
                answer = _decode(await beneath(call.read()), "answerer")
        except TimeoutError as error:
            raise MeshgpuError("no-answer", "timed out") from error
        except ConnectionAbortedError as error:
            raise MeshgpuError("no-answer", str(error)) from error
        except grpc.aio.AioRpcError as error:
            raise MeshgpuError("no-answer", reason_from(error)) from error
        return replace(answer, dial=hello.dial)

    async def _answer_link(self, context: Context) -> None:
        async def serve(peer: NodeId) -> None:
            async with asyncio.timeout(FIRST_MESSAGE_TIMEOUT_S):
                link = _Link(peer, _decode(await context.read(), "dialler"), None, task=asyncio.current_task())
            await context.send_initial_metadata(())  # else the first write does: one that is cancelled spoils a status
            link.queue.put_nowait(_encode(_Hello(self._instance, link.hello.dial)))
            if not self._open(link):
                raise MeshgpuError("link-closed", "another Link is open")
            raise MeshgpuError("link-closed", await self._pump(link, context))

        await self._serve(context, serve)

    async def _pump(self, link: _Link, stream: Stream) -> str:
        """Carry frames until either side ends the Link; returns why it ended."""
        loop = asyncio.get_running_loop()
        reader = loop.create_task(self._receive(link, stream))
        writer = loop.create_task(_transmit(link, stream))
        reason = "connection lost"
        try:
            await asyncio.wait({reader, link.ended}, return_when=asyncio.FIRST_COMPLETED)
            if link.ended.done():
                reason = link.ended.result()
                await _part(link, writer)
                if link.call is not None:  # were it cancelled now, the other side might drop what it has not read
                    await _await_end(link.call, reader)
            elif not reader.cancelled():  # gRPC cancels whoever reads from a call that was cancelled
                reason = reader.result()
        finally:
            self._drop(link, reason)
            reader.cancel()
            writer.cancel()
            await asyncio.wait({reader, writer})
        return reason

    async def _receive(self, link: _Link, stream: Stream) -> str:
        """Publish frames until there are no more; returns why."""
        try:
            while (frame := await stream.read()) is not grpc.aio.EOF:
                if self._links.get(link.peer) is link:
                    self._publish(FrameReceived(link.peer, frame))
                    if wait_s := self._pace(link.peer, len(frame)):
                        await asyncio.sleep(wait_s)  # what it sends meanwhile waits, at its side at the latest
        except grpc.aio.AioRpcError as error:
            return reason_from(error)
        except grpc.aio.BaseError:
            return "connection lost"
        return "closed by the other side"

    # -- calls from others -------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _slot(self, peer: NodeId) -> AsyncIterator[None]:
        """One of the peer's bulk streams. Raises MeshgpuError `busy` where there are too many."""
        slots = self._slots[peer]
        try:
            async with asyncio.timeout(BULK_WAIT_S):
                await slots.acquire()
        except TimeoutError as error:
            reason = (
                f"cannot serve a bulk stream: {BULK_STREAMS_PER_PEER} to this machine are open, the most there may be"
            )
            raise MeshgpuError("busy", reason, "try again when one has ended") from error
        try:
            yield
        finally:
            slots.release()

    async def _answer_bulk(self, context: Context) -> None:
        async def serve(peer: NodeId) -> None:
            async with self._slot(peer):
                await stream(peer)

        async def stream(peer: NodeId) -> None:
            async with asyncio.timeout(FIRST_MESSAGE_TIMEOUT_S):
                request = await context.read()
            if self._serve_bulk is None or request is grpc.aio.EOF:
                raise MeshgpuError("bad-request", "cannot serve a bulk stream: it asks for nothing")
            await context.send_initial_metadata((ACCEPTED,))
            async with aclosing(self._bulk_messages(peer, request)) as messages:
                async for message in messages:
                    await context.write(message)

        await self._serve(context, serve)

    async def _bulk_messages(self, peer: NodeId, request: bytes) -> AsyncGenerator[bytes, None]:
        """What answers a bulk request, by whichever way it came."""
        assert self._serve_bulk is not None
        async with aclosing(self._serve_bulk(peer, request)) as messages:  # type: ignore[type-var]  # a generator
            async for message in messages:
                if len(message) > FRAME_LIMIT_BYTES:
                    raise BrokenInvariant(f"a bulk message has {len(message)} bytes; {FRAME_LIMIT_BYTES} fit")
                yield message

    async def _answer_serve(self, context: Context) -> None:
        async def serve(peer: NodeId) -> None:
            if self._dials_others:
                raise MeshgpuError("bad-request", "cannot use a standing call: this machine dials")
            task = asyncio.current_task()
            assert task is not None
            await self._standings.hold(peer, context, lambda: self._end_work(task, "nobody reads it any more"))

        await self._serve(context, serve)

    async def _serve(self, context: Context, body: Callable[[NodeId], Awaitable[None]]) -> None:
        """Authorise a call and answer it; a MeshgpuError travels to the caller."""
        try:
            peer = self._gate.authorise(context)
            if peer in self._clouds:
                raise TrustError("not-allowed", f"cannot accept a call from {peer}: a rented machine calls nobody")
        except TrustError as error:
            _log.warning("call refused: %s", error.message)
            await abort(context, error)
            return
        with self._working(peer) as task:
            try:
                await body(peer)
            except MeshgpuError as error:
                await _abort_soon(context, error)
            except TimeoutError:
                await _abort_soon(context, MeshgpuError("no-answer", "cannot serve a call: it said nothing in time"))
            except asyncio.CancelledError:
                # gRPC itself cancels calls that are over. Ours would stay open at the other side without a status.
                if reason := self._evicted.get(task):
                    await _abort_soon(context, MeshgpuError("not-allowed", f"cannot go on with a call: {reason}"))
                raise

    def _end_work(self, task: asyncio.Task[Any], reason: str) -> None:
        """End a call that is being answered, or a dial; the other side hears the reason."""
        if task in self._work:
            self._evicted[task] = reason
            task.cancel()

    @contextmanager
    def _working(self, peer: NodeId) -> Iterator[asyncio.Task[Any]]:
        """Let `trust` end the current task when it drops `peer`."""
        task = asyncio.current_task()
        assert task is not None
        self._work[task] = peer
        try:
            yield task
        finally:
            del self._work[task]
            self._evicted.pop(task, None)


async def _part(link: _Link, writer: asyncio.Task[None]) -> None:
    """Let what was queued before a Link's end leave: whoever is sent away hears why."""
    written = asyncio.get_running_loop().create_task(link.queue.join())
    await asyncio.wait({written, writer}, timeout=PARTING_S, return_when=asyncio.FIRST_COMPLETED)
    written.cancel()


async def _await_end(call: _LinkCall, reader: asyncio.Task[str]) -> None:
    """Say that nothing more comes, and let the other side end the call when it has read all."""
    with suppress(grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError, TimeoutError):
        async with asyncio.timeout(PARTING_S):
            await call.done_writing()
    await asyncio.wait({reader}, timeout=PARTING_S)


async def _transmit(link: _Link, stream: Stream) -> None:
    """Write what is queued until the stream breaks, which the reader sees as well."""
    with suppress(grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError):
        while True:
            await stream.write(await link.queue.get())
            link.queue.task_done()


async def _abort_soon(context: Context, error: MeshgpuError) -> None:
    """End a call with a status. It never returns; one that waits behind a slow reader is left to gRPC."""
    try:
        async with asyncio.timeout(ABORT_TIMEOUT_S):
            await abort(context, error)
    except TimeoutError:
        raise asyncio.CancelledError from None  # the one end of a handler that gRPC does not report as a bug


def _encode(hello: _Hello) -> bytes:
    """What this side speaks; whoever reads it knows what both do."""
    said = {"version": PROTOCOL, "oldest": OLDEST_PROTOCOL, "instance": hello.instance, "dial": hello.dial}
    return json.dumps(said).encode()


def _decode(frame: Any, side: str) -> _Hello:
    """Read the hello of `side`; raises MeshgpuError `protocol` whose message is a reason in few words."""
    try:
        fields = json.loads(frame) if isinstance(frame, bytes) and len(frame) <= HELLO_LIMIT_BYTES else {}
        newest = int(fields["version"])
        oldest = int(fields.get("oldest", newest))
        if (spoken := common_protocol(newest, oldest)) is not None:
            return _Hello(str(fields["instance"]), int(fields["dial"]), spoken)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise MeshgpuError("protocol", f"the {side}'s first frame is no hello") from error
    other = "answerer" if side == "dialler" else "dialler"
    raise MeshgpuError(
        "protocol",
        f"protocol versions differ: the {side} speaks {_span(oldest, newest)}, "
        f"the {other} {_span(OLDEST_PROTOCOL, PROTOCOL)}",
    )


def _span(oldest: int, newest: int) -> str:
    return str(newest) if oldest == newest else f"{oldest} to {newest}"
