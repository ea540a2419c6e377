"""Runs one container for a guard: starts it, prints what it prints, ends with its exit code; removes it in the end.

What it finds at its stdin becomes the container's.

Run as a file: `python -I -S -X utf8 container.py SOCKET run NAME NOTE`, then `… SOCKET remove NAME`. SIGTERM is passed
on. The file NOTE gets what an exit code cannot say. Attached before it starts, so that no line is missed.
"""
# Each job in a container has one of these: what pathlib, http.client and tempfile import would only make it larger.
# ruff: noqa: PTH105, PTH123

import contextlib
import json
import os
import signal
import socket
import struct
import sys
import time
from typing import BinaryIO, Final, TypedDict

FRAME: Final = struct.Struct(">B3xI")
"""Of an attached stream: 1 stdout or 2 stderr, payload length in bytes."""
PIECE_BYTES: Final = 64 * 1024
"""Payload read at a time: what a pipe holds by default."""
CALL_LIMIT_S: Final = 60.0
"""For one answer of the engine: it makes and starts containers in less than a second unless the disk is slow."""
REMOVE_LIMIT_S: Final = 60.0
REMOVE_PAUSE_S: Final = 0.2
ENGINE_FAILED: Final = 125
"""As `docker run` has it."""
_OK, _REDIRECTS = 200, 300
_NO_SUCH_CONTAINER: Final = 404


class Note(TypedDict):
    """container: its id, empty before it started. pid: of its init process, as the machine counts, 0 before.

    reason: one line, empty for a plain exit. is_crash: the job did not end by itself; its exit code means nothing.
    """

    container: str
    pid: int
    reason: str
    is_crash: bool


class Engine:
    """A container engine's HTTP API at a Unix socket, version 1.0 of HTTP: an answer ends with its connection."""

    def __init__(self, path: str) -> None:
        self._path = path

    def call(self, method: str, target: str) -> tuple[int, bytes]:
        """(status, body). Raises OSError."""
        status, stream = self.open(method, target, CALL_LIMIT_S)
        with stream:
            return status, stream.read()

    def open(self, method: str, target: str, limit_s: float | None) -> tuple[int, BinaryIO]:
        """(status, what follows the header). limit_s: for each read. Raises OSError."""
        with socket.socket(socket.AF_UNIX) as client:
            return self.ask(client, method, target, limit_s)

    def ask(self, client: socket.socket, method: str, target: str, limit_s: float | None) -> tuple[int, BinaryIO]:
        """The same over a socket of the caller's, who may write to it afterwards."""
        client.settimeout(limit_s)
        client.connect(self._path)
        client.sendall(f"{method} {target} HTTP/1.0\r\nHost: engine\r\nContent-Length: 0\r\n\r\n".encode())
        stream = client.makefile("rb")
        words = stream.readline().split()
        while stream.readline() not in (b"\r\n", b""):
            pass
        if len(words) < 2:
            raise ConnectionError(f"{self._path} closed the connection")
        return int(words[1]), stream

    def remove(self, name: str, limit_s: float = REMOVE_LIMIT_S) -> bool:
        """Kill and remove; False where it may still be there after `limit_s`. One that is not there is removed."""
        deadline = time.monotonic() + limit_s
        while True:
            with contextlib.suppress(OSError):
                status, _ = self.call("DELETE", f"/containers/{name}?force=1&v=1")
                if _OK <= status < _REDIRECTS or status == _NO_SUCH_CONTAINER:
                    return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(REMOVE_PAUSE_S)


class Run:
    """One container's life as its guard sees it: a process with two streams and an exit code."""

    def __init__(self, engine: Engine, name: str, note: str) -> None:
        self._engine = engine
        self._target = f"/containers/{name}"
        self._note_path = note
        self._note = Note(container="", pid=0, reason="", is_crash=False)
        self._is_running = False
        self._is_stopping = False

    def live(self) -> int:
        signal.signal(signal.SIGTERM, lambda *_: self._stop())
        try:
            given = _read_all(0)
            target = f"{self._target}/attach?stream=1&stdout=1&stderr=1{'&stdin=1' if given else ''}"
            with contextlib.ExitStack() as open_ones:
                client = open_ones.enter_context(socket.socket(socket.AF_UNIX))
                status, output = self._engine.ask(client, "POST", target, None)
                open_ones.enter_context(output)
                if status >= _REDIRECTS:
                    return self._fail(f"cannot attach to the container: {_message(output.read())}")
                status, body = self._engine.call("POST", f"{self._target}/start")
                if status >= _REDIRECTS:
                    return self._fail(f"cannot start the container: {_message(body)}")
                self._has_started()
                if given:
                    _give(client, given)
                _copy(output)
            return self._outcome()
        except OSError as error:
            return self._fail(f"the container engine went away: {error}")

    def _has_started(self) -> None:
        status, body = self._engine.call("GET", f"{self._target}/json")
        if status == _OK:
            facts = json.loads(body)
            self._note |= {"container": facts["Id"], "pid": facts["State"]["Pid"]}
            self._write_note()
        self._is_running = True
        if self._is_stopping:
            self._stop()

    def _stop(self) -> None:
        """SIGTERM to the container; to one that is not running yet as soon as it is."""
        self._is_stopping = True
        if self._is_running:
            with contextlib.suppress(OSError):
                self._engine.call("POST", f"{self._target}/kill?signal=SIGTERM")

    def _outcome(self) -> int:
        """Wait for the end, which the end of both streams foretells; returns the exit code."""
        status, stream = self._engine.open("POST", f"{self._target}/wait", None)
        with stream:
            body = stream.read()
        if status != _OK or not body.strip():
            return self._fail(f"the container engine lost the container: {_message(body)}")
        code: int = json.loads(body)["StatusCode"]
        status, body = self._engine.call("GET", f"{self._target}/json")
        if status == _OK and json.loads(body)["State"]["OOMKilled"]:
            self._note["reason"] = "out of memory: the container used more than its limit"
            self._write_note()
        return code

    def _fail(self, reason: str) -> int:
        self._note |= {"reason": reason, "is_crash": True}
        self._write_note()
        return ENGINE_FAILED

    def _write_note(self) -> None:
        temporary = f"{self._note_path}.new"
        with open(temporary, "w") as file:
            json.dump(self._note, file)
        os.replace(temporary, self._note_path)


def _copy(output: BinaryIO) -> None:
    """Write each frame's payload to the stream that it came from, until the end."""
    while len(head := output.read(FRAME.size)) == FRAME.size:
        stream, left = FRAME.unpack(head)
        while left and (piece := output.read(min(left, PIECE_BYTES))):
            left -= len(piece)
            while piece:
                piece = piece[os.write(2 if stream == 2 else 1, piece) :]


def _give(client: socket.socket, data: bytes) -> None:
    """Write to a container's stdin and close it. One that ended before it read has ended by itself."""
    with contextlib.suppress(OSError):
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)


def _read_all(descriptor: int) -> bytes:
    """What a descriptor holds: nothing where it is /dev/null."""
    parts = []
    while part := os.read(descriptor, PIECE_BYTES):
        parts.append(part)
    return b"".join(parts)


def _message(body: bytes) -> str:
    """What the engine says of a failure, in one line."""
    try:
        said = str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        said = body.decode(errors="replace") or "it gave no reason"
    return " ".join(said.split())


def main(arguments: list[str]) -> int:
    path, verb, name, *rest = arguments
    if verb == "remove":
        return 0 if Engine(path).remove(name) else 1
    return Run(Engine(path), name, rest[0]).live()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
