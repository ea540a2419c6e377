"""A scripted agent on a real Unix socket, and the command line before it, in this process or as one of its own."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from meshgpu.cli.main import app
from meshgpu.client.views import JobView

DEADLINE_S = 20.0


@dataclass
class Failure:
    """The agent refuses."""

    status: int
    code: str
    message: str = "no"
    hint: str | None = None


@dataclass
class Stream:
    """NDJSON events. broken: ends in the middle of the next line; held: stays open until `release`."""

    events: list[dict[str, Any]]
    broken: bool = False
    held: bool = False


Reply = dict[str, Any] | bytes | Failure | Stream


@dataclass
class StubAgent:
    """Answers `METHOD PATH` (without the query) as told: replies one after the other, the last one for ever."""

    home: Path
    replies: dict[str, list[Reply]] = field(default_factory=dict)
    seen: list[tuple[str, str, bytes]] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)

    def on(self, call: str, reply: dict[str, Any] | bytes) -> None:
        self.replies.setdefault(call, []).append(reply)

    def on_stream(self, call: str, *events: Any, broken: bool = False, held: bool = False) -> None:
        self.replies.setdefault(call, []).append(Stream(list(events), broken, held))

    def on_failure(self, call: str, status: int, code: str, message: str = "no", hint: str | None = None) -> None:
        self.replies.setdefault(call, []).append(Failure(status, code, message, hint))

    def reply(self, method: str, target: str, body: bytes) -> Reply:
        self.seen.append((method, target, body))
        found = self.replies.get(f"{method} {target.partition('?')[0]}")
        if found is None:
            return Failure(404, "unknown-call", f"the stub knows no {method} {target}")
        return found.pop(0) if len(found) > 1 else found[0]

    def targets(self) -> list[str]:
        return [f"{method} {target}" for method, target, _ in self.seen]

    def body(self, call: str) -> Any:
        """The JSON body of the last call `METHOD PATH`."""
        return json.loads([body for method, target, body in self.seen if f"{method} {target}" == call][-1])


class _Server(ThreadingMixIn, UnixStreamServer):
    request_queue_size = 16
    stub: StubAgent


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        return

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_GET  # noqa: N815 - the base class's names

    def _answer(self) -> None:
        self.close_connection = True
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        reply = self.server.stub.reply(self.command, self.path, body)
        try:
            if isinstance(reply, Stream):
                self._stream(reply)
            elif isinstance(reply, Failure):
                error = {"code": reply.code, "message": reply.message, "hint": reply.hint}
                self._whole(reply.status, json.dumps({"error": error}).encode())
            else:
                self._whole(200, reply if isinstance(reply, bytes) else json.dumps(reply).encode())
        except (BrokenPipeError, ConnectionResetError):
            pass  # the program was interrupted, as tests do

    def _whole(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, stream: Stream) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in stream.events:
            self._chunk(json.dumps(event).encode() + b"\n")
        if stream.held:
            self.server.stub.release.wait(DEADLINE_S)
        if stream.broken:
            self._chunk(b'{"type": "log", "str')
        else:
            self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[StubAgent]:
    agent = StubAgent(tmp_path / "home")
    agent.home.mkdir()
    with _Server(str(agent.home / "agent.sock"), _Handler) as server:
        server.stub = agent
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield agent
        agent.release.set()
        server.shutdown()
        thread.join(DEADLINE_S)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of whoever runs the tests reaches the command line."""
    for name in ("NO_COLOR", "XDG_DATA_HOME", "SHELL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MESHGPU_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TZ", "UTC")


@pytest.fixture
def cli(environment: None) -> Callable[..., Result]:
    """Run the command line in this process."""

    def invoke(*args: str, input: str | None = None) -> Result:  # noqa: A002 - as the runner calls it
        result = CliRunner().invoke(app, list(args), input=input, prog_name="meshgpu")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def start(environment: None) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start the command line as a process of its own."""
    processes: list[subprocess.Popen[bytes]] = []

    def spawn(*args: str, cwd: Path | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-W", "error", "-m", "meshgpu", *args]
        pipe = subprocess.PIPE
        environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, cwd=cwd, env=environ)
        processes.append(process)
        return process

    yield spawn
    for process in processes:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


@pytest.fixture
def make_job() -> Callable[..., JobView]:
    """A job that runs on rig-b, but for what is said."""

    def make(**changes: Any) -> JobView:
        job: dict[str, Any] = {
            "id": "k7qaaaaaaaaaaaaaaaaaaaaaaa",
            "display": "train-k7q",
            "name": "train",
            "user": "ada",
            "state": "active",
            "phase": "running",
            "detail": "environment 3f2a (cached)",
            "machine": "rig-b",
            "epoch": 1,
            "exit_code": None,
            "reason": "",
            "submitted_at": 1_700_000_000.0,
            "started_at": 1_700_000_005.0,
            "ended_at": None,
            "command": "python train.py",
            "gpus": [{"uuid": "GPU-1", "name": "NVIDIA GeForce RTX 4090", "memory_bytes": 25_757_220_864}],
            "gpu_request": "1",
            "out_of_touch_s": None,
            "held_by": ["rig-a", "rig-b", "rig-c"],
            "output_files": 0,
            "output_bytes": 0,
            "tree_files": 12,
            "tree_bytes": 41_000,
            "requested_machine": None,
            "on": "",
            "priority": "normal",
            "preemptible": False,
            "cloud": "never",
            "retries": 0,
            "died": 0,
            "metric": None,
            "sweep": None,
            "trial": None,
            "space": None,
            "secrets": [],
            "shared": False,
            "timeout_s": None,
            "timed_out": False,
            "start_by": None,
        }
        assert not changes.keys() - job.keys()
        return job | changes  # type: ignore[return-value]  # a dict of exactly the keys of JobView

    return make


@pytest.fixture
def ended(make_job: Callable[..., JobView]) -> Callable[..., JobView]:
    """A job that ran 65 s and ended with `exit_code`, but for what is said."""

    def make(exit_code: int | None = 0, **changes: Any) -> JobView:
        facts = {"state": "failed" if exit_code else "succeeded", "phase": None, "ended_at": 1_700_000_070.0}
        return make_job(**(facts | {"exit_code": exit_code} | changes))

    return make
