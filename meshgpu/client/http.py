"""HTTP/1.1 over the agent's Unix socket: one request a connection, answers with a length or in chunks.

`http.client` costs 15 ms to import, a fifth of what a command may take; the agent speaks a small part of HTTP.
"""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from meshgpu.errors import AgentUnreachable, MeshgpuError

BLOCK_BYTES: Final = 256 * 1024
"""How much of an answer is read at once: large enough for line rate."""

LINE_LIMIT_BYTES: Final = 64 * 1024
"""A header or chunk-size line above this is no answer of an agent."""


class Answer:
    """One answer, read once, front to back. It owns the connection: use it in a `with`."""

    def __init__(self, path: Path, connection: socket.socket) -> None:
        """Read the status and the headers; raises AgentUnreachable where nothing sensible arrives."""
        self._path = path
        self._connection = connection
        self._reader = connection.makefile("rb")
        try:
            self.status = self._read_status()
            headers = self._read_headers()
            self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
            self.clock = headers.get("meshgpu-clock", "")
            """Whose clock differs from this machine's, in JSON; empty while nobody's does."""
            self.length = None if self._chunked else int(headers.get("content-length", "0"))
        except ValueError as error:
            self.close()
            raise AgentUnreachable("agent-gone", f"the agent at {path} answered nonsense: {error}") from error
        except BaseException:
            self.close()
            raise

    def blocks(self) -> Iterator[bytes]:
        """The body in pieces, as they arrive. Raises AgentUnreachable `agent-gone` where it ends too early."""
        try:
            yield from self._chunks() if self.length is None else self._exactly(self.length)
        except (OSError, ValueError) as error:
            raise self._gone(str(error)) from error

    def read(self) -> bytes:
        return b"".join(self.blocks())

    def lines(self) -> Iterator[bytes]:
        """Whole lines of the body, without their ends; a last line that was cut off is left out."""
        rest = b""
        for block in self.blocks():
            *lines, rest = (rest + block).split(b"\n")
            yield from lines

    def close(self) -> None:
        self._reader.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _line(self) -> bytes:
        try:
            line = self._reader.readline(LINE_LIMIT_BYTES)
        except OSError as error:
            raise self._gone(str(error)) from error
        if not line.endswith(b"\n"):
            raise self._gone("the connection was closed")
        return line.rstrip(b"\r\n")

    def _read_status(self) -> int:
        version, status, *_ = self._line().split(b" ", 2)
        if version not in (b"HTTP/1.1", b"HTTP/1.0"):
            raise ValueError(f"expected HTTP/1.1, found {version[:20]!r}")
        return int(status)

    def _read_headers(self) -> dict[str, str]:
        headers: dict[str, str] = {}
        while line := self._line():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        return headers

    def _exactly(self, size: int) -> Iterator[bytes]:
        while size > 0:
            block = self._reader.read1(min(size, BLOCK_BYTES))
            if not block:
                raise self._gone("the connection was closed")
            size -= len(block)
            yield block

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self._line().split(b";")[0], 16):
            yield from self._exactly(size)
            self._line()

    def _gone(self, found: str) -> AgentUnreachable:
        return AgentUnreachable("agent-gone", f"the agent at {self._path} broke off its answer: {found}", "meshgpu up")


def request(path: Path, method: str, target: str, body: bytes | None = None, *, timeout_s: float) -> Answer:
    """Ask the agent whose socket is `path`; each read waits `timeout_s` at most.

    Raises AgentUnreachable where none answers, and the MeshgpuError that the agent answers with.
    """
    connection = _connect(path, timeout_s)
    try:
        _send(connection, method, target, body)
        answer = Answer(path, connection)
    except BaseException:
        connection.close()
        raise
    if answer.status // 100 == 2:
        return answer
    with answer:
        raise error_in(answer.read(), f"the agent answered {method} {target} with HTTP status {answer.status}")


def error_in(document: bytes, otherwise: str) -> MeshgpuError:
    """The error that a JSON document {"error": …} tells of; with the message `otherwise` where it tells of none."""
    try:
        told: Any = json.loads(document)["error"]
        hint = told.get("hint")
        return MeshgpuError(str(told["code"]), str(told["message"]), None if hint is None else str(hint))
    except (ValueError, KeyError, TypeError, AttributeError):
        return MeshgpuError("bad-answer", otherwise, "meshgpu doctor")


def _connect(path: Path, timeout_s: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    try:
        connection.connect(str(path))
    except PermissionError as error:
        connection.close()
        raise AgentUnreachable(
            "no-agent", f"the agent at {path} belongs to another account: {error.strerror}", "sudo meshgpu …"
        ) from error
    except OSError as error:
        connection.close()
        raise AgentUnreachable("no-agent", f"no agent answers at {path}", "meshgpu up") from error
    except BaseException:
        connection.close()
        raise
    return connection


def _send(connection: socket.socket, method: str, target: str, body: bytes | None) -> None:
    length = "" if body is None else f"Content-Length: {len(body)}\r\n"
    head = f"{method} {target} HTTP/1.1\r\nHost: agent\r\n{length}Connection: close\r\n\r\n"
    try:
        connection.sendall(head.encode("ascii") + (body or b""))
    except (BrokenPipeError, ConnectionResetError):
        pass  # the agent may refuse a body before it has read it: its answer says why
    except OSError as error:
        raise AgentUnreachable("agent-gone", f"the agent takes nothing in: {error}", "meshgpu up") from error
