"""Reverse bulk: a node that dials nobody asks through calls that its peers keep open to it.

Who dialled a Link to such a node holds some standing calls (`Mesh/Serve`) beside it. The node writes one request into
one of them and reads the answer: an empty message (it is being served), then MESSAGE and up to 1 MiB each, then END
with the error of the other side, or with nothing if that was all. A call serves one request.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

import grpc

from meshgpu.adapters.grpc_link.routes import ACCEPT_TIMEOUT_S, SERVICE, Route, Routes, beneath
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import NodeId
from meshgpu.wire.grpc_calls import Context, read_error, write_error

SPARE_CALLS: Final = 2
"""Standing calls that wait while others serve: a tree and a log may be asked for at one moment."""

STANDING_CALLS: Final = 16
"""To one peer, used or not: as many as bulk streams are served for it."""

REOPEN_PAUSE_S: Final = 1.0
"""After a standing call that ended without a request; the Link will end, too, or the peer wants none."""

WAIT_S: Final = 3.0
"""For a peer's standing call: one is opened again within a round trip."""

MESSAGE: Final = b"\x00"
END: Final = b"\x01"

_CALL_IS_OVER: Final = (grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError)
"""What reading from a call and writing to it raise once it has ended."""

_ServeCall = grpc.aio.StreamStreamCall[bytes, bytes]
_log = logging.getLogger(__name__)


# -- the side that dials ---------------------------------------------------------------------------------------------


class Offers:
    """Holds standing calls open and serves what comes through them.

    messages: (peer, request) -> the messages that answer it; a MeshgpuError that it raises travels.
    """

    def __init__(self, routes: Routes, messages: Callable[[NodeId, bytes], AsyncGenerator[bytes, None]]) -> None:
        self._routes = routes
        self._messages = messages

    async def keep(self, route: Route) -> None:
        """Offer calls on the connection of a Link until cancelled; then everything they serve ends, too."""
        spare, all_calls = asyncio.Semaphore(SPARE_CALLS), asyncio.Semaphore(STANDING_CALLS)
        async with asyncio.TaskGroup() as calls:
            while True:
                await spare.acquire()
                await all_calls.acquire()
                task = calls.create_task(self._stand(route, spare.release))
                task.add_done_callback(lambda _: all_calls.release())

    async def _stand(self, route: Route, used: Callable[[], None]) -> None:
        call: _ServeCall = route.channel.stream_stream(f"/{SERVICE}/Serve")()
        self._routes.enter(route, call)
        try:
            request = await _read(call)
            if request is None:
                await asyncio.sleep(REOPEN_PAUSE_S)
                used()
            else:
                used()
                await self._serve(route.peer, request, call)
        finally:
            self._routes.leave(route, call)

    async def _serve(self, peer: NodeId, request: bytes, call: _ServeCall) -> None:
        """Answer until all is written and the peer has ended the call, or until the peer has had enough."""
        loop = asyncio.get_running_loop()
        writer = loop.create_task(self._answer(peer, request, call))
        ended = loop.create_task(_read(call))
        try:
            await ended  # what is still on its way would be lost if this side ended the call
        finally:
            writer.cancel()
            ended.cancel()
            await asyncio.wait({writer, ended})

    async def _answer(self, peer: NodeId, request: bytes, call: _ServeCall) -> None:
        try:
            await call.write(b"")
            error = await self._relay(peer, request, call)
            await call.write(END + (write_error(error) if error else b""))
        except _CALL_IS_OVER:
            return  # whoever reads from it knows why

    async def _relay(self, peer: NodeId, request: bytes, call: _ServeCall) -> MeshgpuError | None:
        """Write what answers the request; returns the error that ended it. Raises one of _CALL_IS_OVER.

        Our own faults are told as an error, too: a call that is cancelled loses what was written before.
        """
        try:
            async with aclosing(self._messages(peer, request)) as messages:
                async for message in messages:
                    await call.write(MESSAGE + message)
        except _CALL_IS_OVER:
            raise
        except MeshgpuError as error:
            return error
        except Exception:
            _log.exception("a bulk request was not served")
            return MeshgpuError("no-answer", "cannot serve a bulk request: the machine that was asked failed at it")
        return None


async def _read(call: _ServeCall) -> bytes | None:
    """One message; None once the call is over, whatever ended it."""
    try:
        message = await beneath(call.read())
    except (*_CALL_IS_OVER, ConnectionAbortedError):
        return None
    return message if isinstance(message, bytes) else None


# -- the side that dials nobody --------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class _Standing:
    """A peer's call that waits for a request, or answers one. `messages` ends with END, or with None if it broke.

    It holds one message, so that a slow reader is felt at the other side. end: makes the call be over.
    """

    end: Callable[[], None]
    request: asyncio.Future[bytes] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    messages: asyncio.Queue[bytes | None] = field(default_factory=lambda: asyncio.Queue(1))
    is_complete: bool = False

    def break_off(self) -> None:
        """Tell the reader, if there is one, that nothing more comes."""
        if not self.is_complete:
            while self.messages.full():
                self.messages.get_nowait()
            self.messages.put_nowait(None)


class Standings:
    """The standing calls of all peers, and the bulk requests that leave through them."""

    def __init__(self) -> None:
        self._waiting: defaultdict[NodeId, list[_Standing]] = defaultdict(list)
        self._arrived = asyncio.Event()

    async def hold(self, peer: NodeId, context: Context, end: Callable[[], None]) -> None:
        """Let a peer's call wait and then be read to its end. `end` ends it. Raises MeshgpuError `busy`."""
        waiting = self._waiting[peer]
        if len(waiting) >= STANDING_CALLS:
            raise MeshgpuError("busy", f"cannot hold a standing call: {STANDING_CALLS} of this machine wait")
        standing = _Standing(end)
        waiting.append(standing)  # before anything is awaited: calls that come at one moment count one another
        try:
            await context.send_initial_metadata(())  # else the first write does: one that is cancelled spoils a status
            self._arrived.set()
            await context.write(await standing.request)
            while isinstance(message := await context.read(), bytes):
                await standing.messages.put(message)
                standing.is_complete = message[:1] == END
                if standing.is_complete:
                    return
        finally:
            if standing in waiting:
                waiting.remove(standing)
            standing.break_off()

    async def fetch(self, peer: NodeId, request: bytes) -> AsyncGenerator[bytes, None]:
        """Messages of a bulk stream of `peer`; raises MeshgpuError with the peer's code, or `no-answer`."""
        attempt = f"cannot fetch from {peer}"
        standing = await self._take(peer, attempt)
        try:
            standing.request.set_result(request)
            async with asyncio.timeout(ACCEPT_TIMEOUT_S):
                message = await standing.messages.get()
            while message is not None:
                if message[:1] == END:
                    if len(message) > 1:
                        raise read_error(message[1:]) or MeshgpuError("no-answer", f"{attempt}: it says something else")
                    return
                if message:
                    yield message[1:]
                message = await standing.messages.get()
            raise MeshgpuError("no-answer", f"{attempt}: the connection was closed")
        except TimeoutError as error:
            raise MeshgpuError("no-answer", f"{attempt}: timed out") from error
        finally:
            if not standing.is_complete:
                standing.end()

    async def _take(self, peer: NodeId, attempt: str) -> _Standing:
        """A call that nobody else uses; one whose request is cancelled is just ending."""
        waiting = self._waiting[peer]
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    while waiting:
                        if not (standing := waiting.pop(0)).request.done():
                            return standing
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError as error:
            raise MeshgpuError("no-answer", f"{attempt}: it keeps no call open to this machine") from error
