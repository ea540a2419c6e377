"""Calls over gRPC as the mesh makes them: raw bytes both ways, and errors that keep their code, message and hint."""

import asyncio
import contextlib
import json
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol

import grpc

from meshgpu.errors import GRPC_STATUS, MeshgpuError, StaleRequest

ERROR_KEY: Final = "meshgpu-error-bin"
"""Trailing metadata: an error as `write_error` writes it."""

TEXT_LIMIT_CHARACTERS: Final = 600
"""Of message and of hint, 4 bytes each at most: gRPC drops calls whose metadata exceeds 8 KiB."""

_SHORT_REASONS: Final = (
    ("Connection refused", "connection refused"),
    ("No route to host", "no route to it"),
    ("Network is unreachable", "no route to it"),
    ("Connection timed out", "timed out"),
    ("Deadline Exceeded", "timed out"),
    ("not in peer certificate", "another machine answers there"),
    ("Custom verification check failed", "another machine answers there"),
    ("CERTIFICATE_VERIFY_FAILED", "another machine answers there"),
    ("andshake", "TLS handshake failed"),
    ("DNS resolution failed", "name not found"),
    ("Domain name not found", "name not found"),
    ("Connection reset", "connection lost"),
    ("Socket closed", "connection lost"),
    ("GOAWAY", "connection lost"),
    ("Broken pipe", "connection lost"),
    ("ping timeout", "keepalive: no answer"),
    ("keepalive", "keepalive: no answer"),
    ("Concurrent RPC limit", "too many requests at once"),
    ("larger than max", "a message is too large"),
)
"""What gRPC says in details, and how people read it; the first that occurs counts."""


class Stream(Protocol):
    """What both ends of a gRPC stream have in common."""

    async def read(self) -> Any: ...  # bytes or grpc.aio.EOF, whose type is private

    async def write(self, message: bytes) -> None: ...


class Context(Stream, Protocol):
    """A call as its server sees it."""

    def auth_context(self) -> Mapping[str, list[bytes]]: ...

    def peer(self) -> str: ...

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]: ...

    async def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None: ...

    async def abort(self, code: object, details: str, trailing_metadata: tuple[tuple[str, bytes], ...]) -> None: ...


def service(name: str, methods: Mapping[str, Callable[[Context], Awaitable[None]]]) -> grpc.GenericRpcHandler:
    """A gRPC service whose methods read and write raw messages; to clients any of them may look unary, too."""

    def handler(method: Callable[[Context], Awaitable[None]]) -> grpc.RpcMethodHandler:
        async def answer(_requests: object, context: Context) -> None:
            await method(context)

        return grpc.stream_stream_rpc_method_handler(answer)  # type: ignore[no-untyped-call,no-any-return]  # no types

    handlers = {method: handler(answer) for method, answer in methods.items()}
    return grpc.method_handlers_generic_handler(name, handlers)  # type: ignore[no-untyped-call,no-any-return]  # no types


async def answer_step(
    context: Context, answer: Callable[[str, bytes], Awaitable[bytes]], attempt: str, limit_s: float
) -> None:
    """One step of a conversation: a call with one request and one reply, its name in the metadata `step`."""
    try:
        async with asyncio.timeout(limit_s):
            request = await context.read()
            step = dict(context.invocation_metadata()).get("step")
            if not isinstance(request, bytes) or not isinstance(step, str):
                raise MeshgpuError("bad-request", f"{attempt}: a step has a name and a request")
            await context.write(await answer(step, request))
    except TimeoutError:
        await abort(context, MeshgpuError("no-answer", f"{attempt}: no step takes longer than {limit_s:g} s"))
    except MeshgpuError as error:
        await abort(context, error)


async def abort(context: Context, error: MeshgpuError) -> None:
    """End an RPC with an error that `error_from` restores; never returns, as gRPC's own abort."""
    status = grpc.StatusCode[GRPC_STATUS.get(error.code, "FAILED_PRECONDITION")]
    await context.abort(status, error.code, ((ERROR_KEY, write_error(error)),))


def write_error(error: MeshgpuError) -> bytes:
    """An error on its way to another machine: {"code", "message", "hint"} in JSON.

    With a challenge, as `challenge` (hexadecimal) and `wall_s`, where a request was stale.
    """
    fields: dict[str, object] = {
        "code": error.code,
        "message": error.message[:TEXT_LIMIT_CHARACTERS],
        "hint": error.hint and error.hint[:TEXT_LIMIT_CHARACTERS],
    }
    if isinstance(error, StaleRequest):
        fields |= {"challenge": error.challenge.hex(), "wall_s": error.wall_s}
    return json.dumps(fields, ensure_ascii=False).encode(errors="replace")


def read_error(value: object) -> MeshgpuError | None:
    """What `write_error` wrote; None for anything else."""
    try:
        fields = json.loads(value) if isinstance(value, bytes) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    code, message, hint = fields.get("code"), fields.get("message"), fields.get("hint")
    if not (isinstance(code, str) and isinstance(message, str) and (hint is None or isinstance(hint, str))):
        return None
    challenge, wall_s = fields.get("challenge"), fields.get("wall_s")
    if code == "stale" and isinstance(challenge, str) and isinstance(wall_s, float) and math.isfinite(wall_s):
        with contextlib.suppress(ValueError):
            return StaleRequest(message, bytes.fromhex(challenge), wall_s)
    return MeshgpuError(code, message, hint)


def error_from(error: grpc.aio.AioRpcError, attempt: str) -> MeshgpuError:
    """The error that the other side raised, else `no-answer`: `{attempt}: {short reason}`."""
    return _travelled(error) or MeshgpuError("no-answer", f"{attempt}: {_short_reason(error)}")


def reason_from(error: grpc.aio.AioRpcError) -> str:
    """Why an RPC broke off, in a few words, or as the other side put it."""
    travelled = _travelled(error)
    return travelled.message if travelled else _short_reason(error)


def _travelled(error: grpc.aio.AioRpcError) -> MeshgpuError | None:
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_KEY:
            return read_error(value)
    return None


def _short_reason(error: grpc.aio.AioRpcError) -> str:
    details = error.details() or ""
    for sign, reason in _SHORT_REASONS:
        if sign in details:
            return reason
    return details.splitlines()[0][:100] if details else str(error.code().name).lower().replace("_", " ")
