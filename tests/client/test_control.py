"""The control API's client: the HTTP it speaks, the errors it tells, where it finds the agent."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meshgpu.client.agent import AgentClient
from meshgpu.client.home import SOCKET_NAME, find_home, socket_path
from meshgpu.client.http import request
from meshgpu.errors import AgentUnreachable, MeshgpuError

DEADLINE_S = 10.0
Serve = Callable[..., list[bytes]]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def serve(home: Path) -> Iterator[Serve]:
    """Answer one connection after another with the given raw bytes, and collect what was asked."""
    threads: list[threading.Thread] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.settimeout(DEADLINE_S)
    listener.bind(str(home / SOCKET_NAME))
    listener.listen()

    def begin(*answers: bytes, pieces: int = 0) -> list[bytes]:
        asked: list[bytes] = []

        def run() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection, connection.makefile("rb") as reader:
                    connection.settimeout(DEADLINE_S)
                    head = b""
                    while not head.endswith(b"\r\n\r\n"):
                        head += reader.readline()
                    length = next((int(x.split()[1]) for x in head.split(b"\r\n") if x.startswith(b"Content-Len")), 0)
                    asked.append(head + reader.read(length))
                    with contextlib.suppress(BrokenPipeError):  # who has what he wants need not read the rest
                        for at in range(0, len(answer), pieces or max(len(answer), 1)):
                            connection.sendall(answer[at : at + (pieces or len(answer))])

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return asked

    yield begin
    for thread in threads:
        thread.join(DEADLINE_S)
    listener.close()


def whole(document: object, status: str = "200 OK") -> bytes:
    body = json.dumps(document).encode()
    return f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def chunked(*parts: bytes, last: bytes = b"0\r\n\r\n") -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(f"{len(part):X};ext=1\r\n".encode() + part + b"\r\n" for part in parts) + last


@pytest.mark.parametrize("pieces", [0, 1, 7])
def test_answers_are_read_however_they_are_cut(serve: Serve, home: Path, pieces: int) -> None:
    events = [{"type": "log", "stream": "stdout", "data": "é\n", "position": n} for n in range(3)]
    text = b"".join(json.dumps(event).encode() + b"\n" for event in events)
    final = {"type": "end", "job": {}}
    serve(chunked(text[:5], text[5:90], text[90:], json.dumps(final).encode() + b"\n"), pieces=pieces)
    assert list(AgentClient(home).follow("k7q")) == [*events, final]


def test_request_is_plain_http_with_a_length_and_one_connection(serve: Serve, home: Path) -> None:
    asked = serve(whole({"user": "bob", "machine": "rig-b", "key": "k"}))
    AgentClient(home).add_admin("bob")
    assert asked == [
        b'POST /v1/admins/add HTTP/1.1\r\nHost: agent\r\nContent-Length: 15\r\nConnection: close\r\n\r\n{"user": "bob"}'
    ]


def test_paths_and_ids_are_quoted(serve: Serve, home: Path) -> None:
    asked = serve(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", whole({"job": {"id": "a"}}))
    client = AgentClient(home)
    assert b"".join(client.file("a/b", "out dir/\udcff?#\r\nx")) == b"hi"
    client.job("a b?c#/..")
    assert asked[0].startswith(b"GET /v1/jobs/a%2Fb/files/out%20dir/%FF%3F%23%0D%0Ax HTTP/1.1\r\n")
    assert asked[1].startswith(b"GET /v1/jobs/a%20b%3Fc%23%2F.. HTTP/1.1\r\n")


def test_large_file_arrives_whole_in_pieces(serve: Serve, home: Path) -> None:
    data = bytes(range(256)) * 10_000
    serve(f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    blocks = list(AgentClient(home).file("k", "model.pt"))
    assert b"".join(blocks) == data
    assert len(blocks) > 1


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Len",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: ten\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        chunked(b"{}", last=b""),
        chunked(b"{}", last=b"5\r\nab"),
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\r\n",
    ],
)
def test_answer_that_is_cut_off_or_nonsense_is_an_unreachable_agent(serve: Serve, home: Path, answer: bytes) -> None:
    serve(answer)
    with pytest.raises(AgentUnreachable) as caught:
        AgentClient(home).agent()
    assert caught.value.code == "agent-gone"


def test_stream_that_breaks_gives_whole_events_first(serve: Serve, home: Path) -> None:
    serve(chunked(b'{"type": "shipping"}\n{"type": "sh', last=b""))
    events = AgentClient(home)._events("GET", "/x", None, 1.0)
    found = [next(events)]
    with pytest.raises(AgentUnreachable):
        next(events)
    assert found == [{"type": "shipping"}]


def test_half_a_line_at_the_end_is_left_out(serve: Serve, home: Path) -> None:
    serve(chunked(b'{"type": "shipping"}\n{"type": "sh'))
    assert list(AgentClient(home)._events("GET", "/x", None, 1.0)) == [{"type": "shipping"}]


def test_agents_errors_keep_code_message_and_hint(serve: Serve, home: Path) -> None:
    error = {"code": "not-in-mesh", "message": "this machine is in no mesh", "hint": "meshgpu init"}
    stream = json.dumps({"type": "error", "error": error}).encode() + b"\n"
    serve(whole({"error": error}, "409 Conflict"), chunked(stream))
    client = AgentClient(home)
    for call in (client.machines, lambda: list(client.follow("k"))):
        with pytest.raises(MeshgpuError) as caught:
            call()
        assert (caught.value.code, caught.value.message, caught.value.hint) == tuple(error.values())


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"error": 7}', b'{"error": {"code": "x"}}', b""])
def test_error_without_a_story_names_the_status(serve: Serve, home: Path, body: bytes) -> None:
    serve(f"HTTP/1.1 500 Internal Server Error\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    with pytest.raises(MeshgpuError, match="GET /v1/agent with HTTP status 500") as caught:
        AgentClient(home).agent()
    assert caught.value.code == "bad-answer"


@pytest.mark.parametrize("body", [b"[]", b"nonsense"])
def test_answer_that_is_no_object_is_refused(serve: Serve, home: Path, body: bytes) -> None:
    serve(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    with pytest.raises(MeshgpuError, match="something else than a JSON object"):
        AgentClient(home).agent()


def test_refusal_of_a_body_that_was_not_read_is_still_heard(home: Path) -> None:
    error = {"code": "too-large", "message": "too large", "hint": None}
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(home / SOCKET_NAME))
    listener.listen()
    listener.settimeout(DEADLINE_S)

    def refuse() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(10)
            connection.sendall(whole({"error": error}, "413 Too Large"))
            connection.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=refuse)
    thread.start()
    with pytest.raises(MeshgpuError) as caught:
        AgentClient(home).put_chunk(b"x" * 4 * 2**20)
    thread.join(DEADLINE_S)
    listener.close()
    assert caught.value.code == "too-large"


def test_silent_agent_is_given_up_in_time(home: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home / SOCKET_NAME))
        listener.listen()
        with pytest.raises(AgentUnreachable, match="timed out") as caught:
            AgentClient(home, timeout_s=0.05).agent()
    assert caught.value.code == "agent-gone"


def test_no_agent_names_the_socket_and_the_command(home: Path) -> None:
    with pytest.raises(AgentUnreachable) as caught:
        AgentClient(home).agent()
    assert (caught.value.code, caught.value.hint) == ("no-agent", "meshgpu up")
    assert caught.value.message == f"no agent answers at {home / SOCKET_NAME}"


def test_stale_socket_is_no_agent(home: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home / SOCKET_NAME))
    with pytest.raises(AgentUnreachable, match="no agent answers"):
        request(home / SOCKET_NAME, "GET", "/", timeout_s=1.0)


def test_socket_paths_fit_the_kernel_or_are_refused(tmp_path: Path) -> None:
    room = 107 - len(f"/{SOCKET_NAME}")
    fits = Path("/" + "x" * (room - 1))
    assert len(str(socket_path(fits))) == 107
    with pytest.raises(MeshgpuError, match="108 bytes, 107 at most"):
        socket_path(Path(f"{fits}x"))


def test_home_is_the_named_one_else_where_an_agent_is_else_the_users(tmp_path: Path) -> None:
    machine_id = tmp_path / "machine-id"
    machine_id.write_text("0123456789abcdef0123456789abcdef\n")
    data, system = tmp_path / "data", tmp_path / "system"
    own = data / "meshgpu/0123456789ab"
    environ = {"XDG_DATA_HOME": str(data)}
    assert find_home(environ, system, machine_id) == own
    system.mkdir()
    (system / SOCKET_NAME).touch()
    assert find_home(environ, system, machine_id) == system
    own.mkdir(parents=True)
    (own / SOCKET_NAME).touch()
    assert find_home(environ, system, machine_id) == own
    assert find_home(environ | {"MESHGPU_HOME": "/x/y"}, system, machine_id) == Path("/x/y")
    assert find_home({"XDG_DATA_HOME": "relative"}, tmp_path, tmp_path / "absent") == (
        Path.home() / ".local/share/meshgpu/this-machine"
    )
