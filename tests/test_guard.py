import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meshgpu import guard
from meshgpu.guard import FRAME, LEDGER_HEADER, ExitRecord, GuardRecord, Ledger, LedgerBounds, Notice, Request

LIMIT_S = 30.0
KEEP_ALL = LedgerBounds(keep_bytes=10**9, keep_free_bytes=0)


DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execlp("sh", "sh", "-c", "echo $$ > daemon.new; mv daemon.new daemon; exec sleep 600")
    os._exit(0)
time.sleep(600)
"""


def changed_guard(directory: Path, change: str) -> str:
    """A copy of guard.py that runs `change` before it serves."""
    source = Path(guard.__file__).read_text().replace('if __name__ == "__main__":\n    serve()\n', "")
    path = directory / "changed_guard.py"
    path.write_text(f"{source}\n{change}\nserve()\n")
    return str(path)


class Server:
    """A fork server and our end of its channel."""

    def __init__(self, file: str = guard.__file__) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", file], stdin=theirs.fileno(), env={}, cwd="/"
            )
        ours.settimeout(LIMIT_S)
        self.channel = ours

    def send(self, request: Request) -> None:
        body = json.dumps(request).encode()
        self.channel.sendall(FRAME.pack(len(body)) + body)

    def hear(self) -> Notice:
        (length,) = FRAME.unpack(self.channel.recv(FRAME.size, socket.MSG_WAITALL))
        notice: Notice = json.loads(self.channel.recv(length, socket.MSG_WAITALL))
        return notice

    def close(self) -> None:
        self.channel.close()
        self.process.wait(LIMIT_S)


def processes_below(top: Path) -> set[int]:
    """Pids of all processes that stand in, or hold a file open below `top`."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            held = [link.readlink() for link in (process / "cwd", *(process / "fd").iterdir())]
            if any(path.is_relative_to(top) for path in held):
                found.add(int(process.name))
    return found


@pytest.fixture(autouse=True)
def no_leaks(tmp_path: Path) -> Iterator[None]:
    yield
    deadline = time.monotonic() + LIMIT_S
    while (left := processes_below(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def make_request(attempt: Path, *argv: str, grace_s: float = LIMIT_S, timeout_s: float | None = None) -> Request:
    (attempt / "work").mkdir(parents=True, exist_ok=True)
    return Request(
        directory=str(attempt),
        work=str(attempt / "work"),
        argv=list(argv),
        env={"PATH": os.environ["PATH"]},
        grace_s=grace_s,
        own_shm=False,
        enclosed=False,
        after=[],
        given="",
        timeout_s=timeout_s,
        ledger=KEEP_ALL,
    )


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ended(attempt: Path) -> ExitRecord:
    wait_for((attempt / "exit.json").exists)
    record: ExitRecord = json.loads((attempt / "exit.json").read_bytes())
    return record


def read_log(attempt: Path) -> list[tuple[int, bytes]]:
    data, records = (attempt / "log").read_bytes(), []
    while data:
        stream, wall_s, length = LEDGER_HEADER.unpack_from(data)
        assert abs(wall_s - time.time()) < LIMIT_S
        records.append((stream, data[LEDGER_HEADER.size : LEDGER_HEADER.size + length]))
        data = data[LEDGER_HEADER.size + length :]
    return records


def test_guard_tells_of_its_claim_and_of_the_start(server: Server, tmp_path: Path) -> None:
    server.send(make_request(tmp_path, "sh", "-c", "echo hello"))
    claimed, started = server.hear()["guard"], server.hear()["guard"]
    assert claimed["job_pid"] is None
    assert started["job_pid"] is not None
    assert started["pid"] == claimed["pid"] != server.process.pid
    assert started == json.loads((tmp_path / "guard.json").read_bytes())
    record = ended(tmp_path)
    assert (record["exit_code"], record["stopped_by"], record["reason"]) == (0, None, "")
    assert record["started_wall_s"] == started["started_wall_s"] <= record["ended_wall_s"]
    assert read_log(tmp_path) == [(1, b"hello\n")]


def test_guard_is_no_child_of_the_server_and_outlives_it(server: Server, tmp_path: Path) -> None:
    server.send(make_request(tmp_path, "sh", "-c", "read line < go; exit 3"))
    os.mkfifo(tmp_path / "work" / "go")
    server.hear()
    pid = server.hear()["guard"]["pid"]
    assert int(guard._stat(pid)[1]) != server.process.pid
    server.close()
    assert guard.start_ticks(pid) is not None
    (tmp_path / "work" / "go").write_text("now\n")
    assert ended(tmp_path)["exit_code"] == 3


def test_server_ends_with_its_channel(server: Server) -> None:
    server.channel.close()
    assert server.process.wait(LIMIT_S) == 0


def test_only_one_guard_can_claim_an_attempt(server: Server, tmp_path: Path) -> None:
    for _ in range(5):
        server.send(make_request(tmp_path, "sh", "-c", "echo x >> ran"))
    server.send(make_request(tmp_path / "last", "true"))
    notices = [server.hear() for _ in range(4)]
    ended(tmp_path / "last")
    ended(tmp_path)
    assert [notice["directory"] for notice in notices].count(str(tmp_path)) == 2
    assert (tmp_path / "work" / "ran").read_text() == "x\n"


def test_claim_by_another_keeps_the_guard_from_starting(server: Server, tmp_path: Path) -> None:
    request = make_request(tmp_path, "touch", "ran")
    assert guard.claim(str(tmp_path / "guard.json"), guard.new_record(0, ""))
    server.send(request)
    server.send(make_request(tmp_path / "last", "true"))
    assert server.hear()["directory"] == str(tmp_path / "last")
    ended(tmp_path / "last")
    assert not (tmp_path / "work" / "ran").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["guard.err", "guard.json", "last", "work"]


def test_missing_work_directory_is_reported(server: Server, tmp_path: Path) -> None:
    request = make_request(tmp_path, "true")
    (tmp_path / "work").rmdir()
    server.send(request)
    assert ended(tmp_path)["exit_code"] == guard.COMMAND_NOT_FOUND


def test_environment_with_nul_is_reported(server: Server, tmp_path: Path) -> None:
    request = make_request(tmp_path, "true")
    request["env"] = {"A": "b\0c"}
    server.send(request)
    assert ended(tmp_path)["exit_code"] == guard.COMMAND_NOT_EXECUTABLE
    assert read_log(tmp_path) == [(2, b"meshgpu: true: embedded null byte\n")]


def test_init_that_cannot_be_set_up_is_no_exit_of_the_job(tmp_path: Path) -> None:
    change = "def fail(self): raise OSError(1, 'mount: not here')\nInit._settle = fail"
    server = Server(changed_guard(tmp_path, change))
    server.send(make_request(tmp_path / "attempt", "touch", "ran"))
    record = ended(tmp_path / "attempt")
    server.close()
    assert record["exit_code"] is None
    assert record["reason"] == "cannot start the job: guard.err in the attempt's directory says why"
    assert "mount: not here" in (tmp_path / "attempt" / "guard.err").read_text()
    assert not (tmp_path / "attempt" / "work" / "ran").exists()


@pytest.mark.parametrize(
    ("slow", "notices"),
    [
        pytest.param("Guard._run", 1, id="before the guard's handlers are set"),
        pytest.param("Init._become_job", 2, id="before the job leads its own group"),
    ],
)
def test_stop_during_the_start_is_not_lost(tmp_path: Path, slow: str, notices: int) -> None:
    change = f"whole = {slow}\n{slow} = lambda self, *arguments: (time.sleep(0.3), whole(self, *arguments))[1]"
    server = Server(changed_guard(tmp_path, change))
    server.send(make_request(tmp_path / "attempt", "sleep", "600", grace_s=3.0))
    pid = [server.hear() for _ in range(notices)].pop()["guard"]["pid"]
    os.kill(pid, signal.SIGTERM)
    record = ended(tmp_path / "attempt")
    assert (record["exit_code"], record["stopped_by"], record["reason"]) == (143, "stop", "")
    server.close()


@pytest.mark.parametrize("isolation", ["pid", "user", "subreaper"])
def test_killed_guard_takes_the_whole_tree_along(tmp_path: Path, isolation: str) -> None:
    """With nobody there to help: the agent may be gone too."""
    if isolation != "subreaper" and os.waitpid(guard._fork(guard._try_isolation, isolation), 0)[1]:
        pytest.skip(f"no {isolation} namespaces here")
    server = Server(changed_guard(tmp_path, f"def find_isolation(): return {isolation!r}"))
    attempt = tmp_path / "attempt"
    server.send(make_request(attempt, sys.executable, "-c", DAEMON))
    server.hear()
    record = server.hear()["guard"]
    wait_for((attempt / "work" / "daemon").exists)
    wait_for(lambda: len(processes_below(attempt / "work")) == 2)  # the one between them may still be leaving
    tree = processes_below(attempt / "work")
    os.kill(record["pid"], signal.SIGKILL)
    wait_for(lambda: all(guard.start_ticks(pid) is None for pid in tree))
    server.close()


def sweeping(attempt: Path, *argv: str) -> Request:
    """A request whose sweeper leaves `swept`, and in `early` whether exit.json was there before it."""
    tell = f"ls {attempt}/exit.json >{attempt}/early 2>/dev/null; echo >{attempt}/swept"
    return make_request(attempt, *argv) | {"after": ["/bin/sh", "-c", tell]}


def test_what_comes_after_the_job_has_ended_before_its_exit_is_told(server: Server, tmp_path: Path) -> None:
    server.send(sweeping(tmp_path, "sh", "-c", "exit 3"))
    assert ended(tmp_path)["exit_code"] == 3
    assert (tmp_path / "swept").exists()
    assert (tmp_path / "early").read_text() == ""


@pytest.mark.parametrize("isolation", ["pid", "user", "subreaper"])
def test_what_comes_after_the_job_is_done_although_its_guard_was_killed(tmp_path: Path, isolation: str) -> None:
    if isolation != "subreaper" and os.waitpid(guard._fork(guard._try_isolation, isolation), 0)[1]:
        pytest.skip(f"no {isolation} namespaces here")
    server = Server(changed_guard(tmp_path, f"def find_isolation():\n    return {isolation!r}"))
    attempt = tmp_path / "attempt"
    server.send(sweeping(attempt, "sleep", "600"))
    server.hear()
    started = server.hear()["guard"]
    assert not (attempt / "swept").exists()
    os.kill(started["pid"], signal.SIGKILL)
    wait_for((attempt / "swept").exists)
    server.close()


def test_stopped_guard_of_a_stubborn_job_names_the_grace(server: Server, tmp_path: Path) -> None:
    server.send(make_request(tmp_path, "sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done", grace_s=0.1))
    server.hear()
    pid = server.hear()["guard"]["pid"]
    wait_for(lambda: (tmp_path / "log").stat().st_size)
    os.kill(pid, signal.SIGTERM)
    record = ended(tmp_path)
    assert (record["exit_code"], record["stopped_by"]) == (137, "stop")
    assert record["reason"] == "killed: it still ran 0.1 s after it was told to stop"


STUBBORN = "trap 'echo told' TERM; echo ready; while :; do sleep 0.05; done"


def test_job_that_runs_too_long_is_told_to_end_though_nobody_is_there_to_say_so(tmp_path: Path) -> None:
    server = Server()
    server.send(make_request(tmp_path, "sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.05; done", timeout_s=0.5))
    server.hear()
    started = server.hear()["guard"]
    server.close()
    record = ended(tmp_path)
    assert (record["exit_code"], record["stopped_by"], record["reason"]) == (0, "timeout", "")
    assert 0.4 < record["ended_wall_s"] - started["started_wall_s"] < LIMIT_S / 2


def test_job_that_runs_too_long_and_does_not_end_is_killed(server: Server, tmp_path: Path) -> None:
    server.send(make_request(tmp_path, "sh", "-c", STUBBORN, grace_s=0.3, timeout_s=0.3))
    record = ended(tmp_path)
    assert (record["exit_code"], record["stopped_by"]) == (137, "timeout")
    assert record["reason"] == "killed: it still ran 0.3 s after it was told to stop"
    assert [data for stream, data in read_log(tmp_path) if stream == 1] == [b"ready\n", b"told\n"]


def test_job_that_ends_in_time_is_not_said_to_have_run_too_long(server: Server, tmp_path: Path) -> None:
    server.send(make_request(tmp_path, "sh", "-c", "exit 7", timeout_s=1e12))
    record = ended(tmp_path)
    assert (record["exit_code"], record["stopped_by"]) == (7, None)


@pytest.mark.parametrize(
    ("first", "then", "by"), [("stop", "timeout", "stop"), ("timeout", "kill", "timeout"), ("kill", "timeout", "kill")]
)
def test_job_is_ended_for_the_first_reason(server: Server, tmp_path: Path, first: str, then: str, by: str) -> None:
    orders = {"stop": signal.SIGTERM, "kill": signal.SIGUSR1}
    limit_s = 0.6 if then == "timeout" else 0.2
    server.send(make_request(tmp_path, "sh", "-c", STUBBORN, grace_s=1.0, timeout_s=limit_s))
    server.hear()
    pid = server.hear()["guard"]["pid"]
    wait_for(lambda: b"ready" in (tmp_path / "log").read_bytes())
    if first == "timeout":
        wait_for(lambda: b"told" in (tmp_path / "log").read_bytes())
    os.kill(pid, orders[first if first in orders else then])
    assert ended(tmp_path)["stopped_by"] == by


def test_full_disk_makes_the_job_wait_and_loses_no_line(server: Server, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small disk")
    attempt = tmp_path / "attempt"
    attempt.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(attempt)], check=True)
    try:
        server.send(make_request(attempt, "seq", "100000"))
        server.hear()
        server.hear()
        wait_for(lambda: os.statvfs(attempt).f_bavail < 32)
        assert not (attempt / "exit.json").exists()
        subprocess.run(["mount", "-o", "remount,size=4m", str(attempt)], check=True)
        assert ended(attempt)["exit_code"] == 0
        printed = b"".join(data for _, data in read_log(attempt))
        assert printed.split() == [str(number).encode() for number in range(1, 100001)]
    finally:
        wait_for(lambda: subprocess.run(["umount", str(attempt)], check=False).returncode == 0)


def test_full_disk_does_not_make_a_job_unstoppable(server: Server, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small disk")
    attempt = tmp_path / "attempt"
    attempt.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(attempt)], check=True)
    try:
        server.send(make_request(attempt, "seq", "10000000"))
        server.hear()
        started = server.hear()["guard"]
        wait_for(lambda: os.statvfs(attempt).f_bavail < 32)
        os.kill(started["pid"], signal.SIGUSR1)
        job = started["job_pid"]
        assert job is not None
        wait_for(lambda: guard.start_ticks(job) is None)
        subprocess.run(["mount", "-o", "remount,size=4m", str(attempt)], check=True)
        assert ended(attempt)["exit_code"] == 137
        read_log(attempt)
    finally:
        wait_for(lambda: subprocess.run(["umount", str(attempt)], check=False).returncode == 0)


def test_what_is_left_in_a_large_pipe_is_kept(tmp_path: Path) -> None:
    """More than one read is left when the job is gone."""
    change = "copy = Ledger.copy\nLedger.copy = lambda self, *arguments: (time.sleep(0.05), copy(self, *arguments))[1]"
    server = Server(changed_guard(tmp_path, change))
    script = "import fcntl, os; fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 2**20); os.write(1, b'x' * 2**20)"
    server.send(make_request(tmp_path / "attempt", sys.executable, "-I", "-c", script))
    assert ended(tmp_path / "attempt")["exit_code"] == 0
    assert sum(len(data) for _, data in read_log(tmp_path / "attempt")) == 2**20
    server.close()


def test_record_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(str(tmp_path / "log"), KEEP_ALL)
    write = os.write
    ledger.append(b"first")
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    ledger.append(b"second")
    assert ((tmp_path / "log").read_bytes(), ledger.held) == (b"first", b"second")
    monkeypatch.undo()
    ledger.append(ledger.held)
    assert ((tmp_path / "log").read_bytes(), ledger.held) == (b"firstsecond", b"")
    os.close(ledger.descriptor)


def test_pipe_that_a_stranger_holds_open_does_not_delay_the_end(tmp_path: Path) -> None:
    ours, strangers = os.pipe()
    ledger = Ledger(str(tmp_path / "log"), KEEP_ALL)
    os.write(strangers, b"last")
    ledger.drain({ours: 1})
    assert read_log(tmp_path) == [(1, b"last")]
    for descriptor in (ours, strangers, ledger.descriptor):
        os.close(descriptor)


def test_process_is_told_from_a_later_one_with_its_number() -> None:
    assert guard.start_ticks(os.getpid()) == guard.start_ticks(os.getpid())
    with subprocess.Popen(["sleep", "0"]) as process:
        pidfd = os.pidfd_open(process.pid)
        assert select.select([pidfd], [], [], LIMIT_S)[0]
        os.close(pidfd)
        assert guard.start_ticks(process.pid) is None, "a zombie does not run"
    assert guard.start_ticks(2**22 + 1) is None


def test_claim_is_taken_once_and_leaves_nothing_else(tmp_path: Path) -> None:
    first: GuardRecord = guard.new_record(os.getpid(), "pid")
    path = tmp_path / "guard.json"
    assert guard.claim(str(path), first)
    assert not guard.claim(str(path), guard.new_record(0, ""))
    assert json.loads(path.read_bytes()) == first
    assert [found.name for found in tmp_path.iterdir()] == ["guard.json"]
    assert path.stat().st_mode & 0o077 == 0
