"""Connections that this side opens to other members, and bulk streams over them."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import grpc

from meshgpu.adapters.grpc_link.gate import Gate
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import Address, NodeId
from meshgpu.wire.certificates import server_name
from meshgpu.wire.endpoints import grpc_target
from meshgpu.wire.grpc_calls import error_from, reason_from

SERVICE: Final = "meshgpu.wire.v1.Mesh"
FRAME_LIMIT_BYTES: Final = 2**20
"""Of a frame and of a bulk message; more belongs into several messages."""

OPTIONS: Final = (
    ("grpc.max_receive_message_length", FRAME_LIMIT_BYTES + 1024),
    ("grpc.max_send_message_length", FRAME_LIMIT_BYTES + 1024),
    # A peer that vanished without a word is noticed after 25 s at most.
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
"""Both sides have these: gRPC by itself pings every two hours, and cuts off who pings more."""

ACCEPTED: Final = ("meshgpu-accepted", "1")
"""Initial metadata by which a listener says that it serves a bulk stream."""

CONNECT_TIMEOUT_S: Final = 1.5
"""For each address of a bulk stream: a machine of the same office answers in milliseconds or not at all."""

ACCEPT_TIMEOUT_S: Final = 5.0
"""Between an open connection and the first sign of the other side's program, which may be busy."""

IDLE_S: Final = 60.0
"""A handshake costs 6 ms; a tree's chunks are asked for within seconds of one another."""

_CLIENT_OPTIONS: Final = (
    *OPTIONS,
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # or a new connection inherits the back-off of an old one
)

T = TypeVar("T")
_BulkCall = grpc.aio.UnaryStreamCall[bytes, bytes]


@dataclass(eq=False, slots=True)
class Route:
    """A connection to one peer. It closes with its last call, or, if it is `cached`, after IDLE_S without one."""

    peer: NodeId
    channel: grpc.aio.Channel
    cached: tuple[NodeId, Address] | None = None
    calls: set[grpc.aio.Call] = field(default_factory=set)
    idle: asyncio.TimerHandle | None = None


class Routes:
    """Owns every outgoing connection until `close`."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._open: set[Route] = set()
        self._cache: dict[tuple[NodeId, Address], Route] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def open(self, peer: NodeId, address: Address) -> Route:
        """A new connection, made when it gets its first call; raises MeshgpuError if peer or address are no good."""
        options = (*_CLIENT_OPTIONS, ("grpc.ssl_target_name_override", server_name(peer)))
        credentials = self._gate.channel_credentials(peer)
        route = Route(peer, grpc.aio.secure_channel(grpc_target(address), credentials, options))
        self._open.add(route)
        return route

    def enter(self, route: Route, call: grpc.aio.Call) -> None:
        """Count a call, which keeps its route open."""
        route.calls.add(call)
        if route.idle is not None:
            route.idle.cancel()
            route.idle = None

    def leave(self, route: Route, call: grpc.aio.Call) -> None:
        """End a call, and with it a route that nobody needs."""
        call.cancel()
        route.calls.discard(call)
        if route.calls or route not in self._open:
            return
        if route.cached is None:
            self._shut(route)
        else:
            route.idle = asyncio.get_running_loop().call_later(IDLE_S, self._shut, route)

    def evict(self, peer: NodeId, spared: grpc.aio.Call | None = None) -> None:
        """Break every connection to `peer`; one that carries the call `spared` loses all others, and closes with it."""
        for route in [route for route in self._open if route.peer == peer]:
            if spared is None or spared not in route.calls:
                self._shut(route)
                continue
            self._forget(route)
            for call in route.calls - {spared}:
                call.cancel()

    async def close(self) -> None:
        for route in list(self._open):
            self._shut(route)
        if self._closing:
            await asyncio.wait(self._closing)

    async def fetch(
        self, peer: NodeId, addresses: Sequence[Address], request: bytes, linked: Route | None
    ) -> AsyncGenerator[bytes, None]:
        """Messages of a bulk stream, over the connection of an open Link if there is one that we dialled."""
        attempt = f"cannot fetch from {peer}"
        route, call = await self._begin(peer, addresses, request, linked)
        try:
            while (message := await beneath(call.read())) is not grpc.aio.EOF:
                yield message
        except grpc.aio.AioRpcError as error:
            raise error_from(error, attempt) from error
        except ConnectionAbortedError as error:
            raise MeshgpuError("no-answer", f"{attempt}: {error}") from error
        finally:
            self.leave(route, call)

    async def _begin(
        self, peer: NodeId, addresses: Sequence[Address], request: bytes, linked: Route | None
    ) -> tuple[Route, _BulkCall]:
        """A call that the peer serves, by the first way that works."""
        reason = "no address of it is known"
        for address in ([None] if linked else []) + list(addresses):
            try:
                route = linked if linked and address is None else self._cached(peer, Address(address or ""))
            except MeshgpuError as error:
                reason = error.message
                continue
            method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = route.channel.unary_stream(f"/{SERVICE}/Bulk")
            call = method(request)
            self.enter(route, call)
            is_accepted = False
            try:
                await _accepted(call)
                is_accepted = True
                return route, call
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise error_from(error, f"cannot fetch from {peer}") from error
                reason = reason_from(error)
            except (TimeoutError, ConnectionAbortedError) as error:
                reason = str(error) or "timed out"
            finally:
                if not is_accepted:
                    self._forget(route)
                    self.leave(route, call)
        raise MeshgpuError("no-answer", f"cannot fetch from {peer}: {reason}")

    def _cached(self, peer: NodeId, address: Address) -> Route:
        if known := self._cache.get((peer, address)):
            return known
        route = self.open(peer, address)
        route.cached = (peer, address)
        self._cache[route.cached] = route
        return route

    def _forget(self, route: Route) -> None:
        """Let no further call use a cached route."""
        if route.cached is not None and self._cache.get(route.cached) is route:
            del self._cache[route.cached]
        route.cached = None

    def _shut(self, route: Route) -> None:
        """Close a connection and break the calls on it."""
        self._forget(route)
        self._open.discard(route)
        if route.idle is not None:
            route.idle.cancel()
        for call in route.calls:
            call.cancel()
        self._spawn(route.channel.close())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


async def beneath(reply: Awaitable[T]) -> T:
    """Await gRPC, which cancels whoever waits for a call that was cancelled; raises ConnectionAbortedError then."""
    try:
        return await reply
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ConnectionAbortedError("the connection was closed") from None


async def _accepted(call: _BulkCall) -> None:
    """Wait until the other side serves the call; raises what became of it otherwise."""
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        await beneath(call.wait_for_connection())
    async with asyncio.timeout(ACCEPT_TIMEOUT_S):
        if ACCEPTED not in tuple(await beneath(call.initial_metadata())):
            await beneath(call.read())
            raise ConnectionAbortedError("it answers no bulk streams")
