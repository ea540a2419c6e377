"""The command line as a process: Ctrl-C, closed pipes, starting an agent, completion, and what it does not load."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import Result

from meshgpu.cli import launch, main
from meshgpu.client.views import JobView

if TYPE_CHECKING:
    from tests.cli.conftest import StubAgent

Cli = Callable[..., Result]
Start = Callable[..., subprocess.Popen[bytes]]
MakeJob = Callable[..., JobView]
JOB_CALL = "GET /v1/jobs/k7qaaaaaaaaaaaaaaaaaaaaaaa"
DEADLINE_S = 20.0

FAKE_AGENT = """
    import os, pathlib, socket, sys, time
    home = pathlib.Path(sys.argv[sys.argv.index("--home") + 1])
    assert sys.argv[1:5] == ["-P", "-m", "meshgpu", "agent"], sys.argv
    print("fake agent speaks", flush=True)
    {trouble}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home / "agent.sock"))
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as reader:
                request = reader.readline()
                while reader.readline().strip():
                    pass
                if b"/v1/down" in request:
                    (home / "agent.sock").unlink()
                body = b'{{"version": "0.1.0", "pid": %d, "machines": []}}' % os.getpid()
                connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
                if b"/v1/down" in request:
                    break
        listener.close()
        {farewell}
"""


@pytest.fixture
def fake_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a program in the interpreter's place that behaves like an agent, after some `trouble`."""

    def make(trouble: str = "", farewell: str = "") -> None:
        program = tmp_path / "python"
        program.write_text(
            f"#!{sys.executable}\n" + textwrap.dedent(FAKE_AGENT.format(trouble=trouble, farewell=farewell))
        )
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return make


def read_until(stream: Any, wanted: bytes) -> bytes:
    """What arrives up to and with `wanted`; the process is killed at the end of the test if that never comes."""
    found = b""
    while wanted not in found:
        piece = os.read(stream.fileno(), 4096)
        assert piece, found
        found += piece
    return found


@pytest.mark.parametrize("command", [["run", "python", "train.py"], ["logs", "-f", "k7q"]])
def test_ctrl_c_detaches_says_what_next_and_exits_130(
    start: Start, stub: "StubAgent", tmp_path: Path, make_job: MakeJob, command: list[str]
) -> None:
    stub.on("GET /v1/agent", {"version": "0.1.0"})
    stub.on("GET /v1/jobs/k7q", {"job": make_job()})
    stub.on("POST /v1/trees", {"tree": "t" * 64, "missing": []})
    stub.on_stream("POST /v1/jobs", {"type": "job", "job": make_job()})
    line = {"type": "log", "stream": "stdout", "data": "epoch 1\n", "position": 8}
    stub.on_stream(f"{JOB_CALL}/events", {"type": "job", "job": make_job()}, line, held=True)
    project = tmp_path / "project"
    project.mkdir()
    process = start(*command, cwd=project)
    read_until(process.stdout, b"epoch 1\n")
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert b"meshgpu logs -f train-k7q" in told
    assert b"meshgpu stop train-k7q" in told
    assert b"Traceback" not in told
    assert not any(target.startswith("POST") and target.endswith("/stop") for target in stub.targets())


def test_run_in_a_directory_that_was_deleted_is_an_error(start: Start, stub: "StubAgent", tmp_path: Path) -> None:
    stub.on("GET /v1/agent", {"version": "0.1.0"})
    gone = tmp_path / "gone"
    gone.mkdir()
    program = f"import os, sys; os.rmdir({str(gone)!r}); sys.argv = ['meshgpu', 'run', 'true']"
    command = [sys.executable, "-P", "-c", f"{program}\nfrom meshgpu.cli.main import main\nmain()"]
    done = subprocess.run(command, cwd=gone, capture_output=True, timeout=DEADLINE_S)
    assert (done.returncode, b"Traceback" in done.stderr) == (125, False)
    assert b"it was deleted" in done.stderr


def test_ctrl_c_while_the_code_ships_says_that_nothing_runs(start: Start, stub: "StubAgent", tmp_path: Path) -> None:
    stub.on("GET /v1/agent", {"version": "0.1.0"})
    stub.on("POST /v1/trees", {"tree": "t" * 64, "missing": []})
    stub.on_stream("POST /v1/jobs", {"type": "shipping", "done_bytes": 0, "total_bytes": 9}, held=True)
    project = tmp_path / "project"
    project.mkdir()
    process = start("run", "true", cwd=project)
    deadline = time.monotonic() + DEADLINE_S
    while "POST /v1/jobs" not in stub.targets():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, b"Traceback" in told) == (130, False)
    assert b"interrupted before the job was taken" in told


@pytest.mark.parametrize("command", [["ps"], ["logs", "k7q"], ["logs", "-f", "k7q"], ["ps", "--json"]])
def test_pipe_that_is_closed_early_gives_no_traceback(
    start: Start, stub: "StubAgent", make_job: MakeJob, command: list[str]
) -> None:
    stub.on("GET /v1/jobs", {"jobs": [make_job(command="x" * 99)] * 2000, "silent": []})
    stub.on("GET /v1/jobs/k7q", {"job": make_job()})
    lines = [{"type": "log", "stream": "stdout", "data": "x" * 9999 + "\n", "position": n} for n in range(100)]
    stub.on_stream(f"{JOB_CALL}/events", *lines, {"type": "end", "job": make_job()})
    process = start(*command)
    assert process.stdout is not None
    assert os.read(process.stdout.fileno(), 10)
    process.stdout.close()
    assert process.stderr is not None
    told = process.stderr.read()
    assert b"Traceback" not in told
    assert b"BrokenPipe" not in told
    assert process.wait(DEADLINE_S) != 0


def test_undecodable_bytes_reach_a_real_stdout_unchanged(start: Start, stub: "StubAgent", make_job: MakeJob) -> None:
    stub.on("GET /v1/jobs/k7q", {"job": make_job()})
    line = {"type": "log", "stream": "stdout", "data": "\udcff\udc00é\r", "position": 8}
    stub.on_stream(f"{JOB_CALL}/events", line | {"data": "\udcffé\r"}, {"type": "end", "job": make_job()})
    out, _ = start("logs", "k7q").communicate(timeout=DEADLINE_S)
    assert out == b"\xff\xc3\xa9\r"


def test_ps_loads_neither_rich_nor_pydantic_nor_what_other_commands_need(
    start: Start, stub: "StubAgent", make_job: MakeJob, environment: None
) -> None:
    stub.on("GET /v1/jobs", {"jobs": [make_job()], "silent": []})
    program = """
        import atexit, sys
        from meshgpu.cli.main import main
        heavy = {"rich", "pydantic", "asyncio", "http.client", "email", "hashlib", "grpc", "aiohttp",
                 "meshgpu.cli.attach", "meshgpu.client.tree", "meshgpu.model"}
        atexit.register(lambda: print(sorted(heavy & sys.modules.keys()), file=sys.stderr))
        sys.argv = ["meshgpu", "ps"]
        main()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, timeout=DEADLINE_S, check=True)
    assert done.stderr == b"[]\n"
    assert b"train-k7q" in done.stdout


def test_completion_knows_commands_jobs_and_machines(start: Start, stub: "StubAgent", make_job: MakeJob) -> None:
    stub.on("GET /v1/jobs", {"jobs": [make_job(), make_job(display="eval-2aa")], "silent": []})
    stub.on("GET /v1/machines", {"machines": [{"name": "rig-a"}, {"name": "bob"}]})

    def completed(words: str) -> list[str]:
        os.environ.update(_MESHGPU_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" ")))
        try:
            out, _ = start().communicate(timeout=DEADLINE_S)
        finally:
            for name in ("_MESHGPU_COMPLETE", "COMP_WORDS", "COMP_CWORD"):
                del os.environ[name]
        return out.decode().split()

    assert completed("meshgpu ma") == ["machines"]
    assert completed("meshgpu stop tr") == ["train-k7q"]
    assert completed("meshgpu run -m r") == ["rig-a"]
    assert completed("meshgpu cp runs/e") == ["runs/eval-2aa/"]


def test_up_starts_an_agent_and_down_stops_it(cli: Cli, fake_agent: Callable[..., None], tmp_path: Path) -> None:
    fake_agent()
    home = tmp_path / "home"
    assert launch.running_agent(home) is None
    assert launch.start_agent(home)["version"] == "0.1.0"
    assert (home / "agent.log").read_text() == "fake agent speaks\n"
    assert ((home / "agent.log").stat().st_mode & 0o777, home.stat().st_mode & 0o777) == (0o600, 0o700)
    result = cli("down")
    assert (result.exit_code, result.stderr) == (0, "the agent is stopped; jobs run on (meshgpu up brings it back)\n")
    assert launch.running_agent(home) is None


def test_down_returns_only_when_the_agents_process_is_gone(
    cli: Cli, fake_agent: Callable[..., None], tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    fake_agent(farewell=f"time.sleep(0.4); pathlib.Path({str(gone)!r}).touch()")
    launch.start_agent(tmp_path / "home")
    assert cli("down").exit_code == 0
    assert gone.exists()


def test_down_gives_up_on_an_agent_that_stays(
    cli: Cli, fake_agent: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "STOP_LIMIT_S", 0.3)
    fake_agent(farewell="time.sleep(60)")
    pid = launch.start_agent(tmp_path / "home")["pid"]
    try:
        result = cli("down")
    finally:
        os.kill(pid, signal.SIGKILL)
    assert result.exit_code == 125
    assert "still runs after 0 s" in result.stderr


def test_agent_that_refuses_its_settings_is_told_in_its_own_words(
    cli: Cli, fake_agent: Callable[..., None], tmp_path: Path
) -> None:
    fake_agent("print('error: there is no setting x\\nhint: did you mean y?'); sys.exit(125)")
    result = cli("up")
    home = tmp_path / "home"
    told = f"error: cannot start the agent in {home}: there is no setting x\nhint: did you mean y?\n"
    assert (result.exit_code, result.stderr) == (125, f"starting the agent in {home}\n{told}")


def test_agent_that_ends_at_once_is_told_with_its_last_words(
    cli: Cli, fake_agent: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/agent.log").write_text("words of an earlier agent\n")
    fake_agent("sys.exit('no room on this disk')")
    result = cli("up")
    assert result.exit_code == 125
    assert "ended with exit code 1\n  fake agent speaks\n  no room on this disk\nhint: less" in result.stderr
    assert "earlier" not in result.stderr


def test_agent_that_never_answers_is_given_up_and_ended(
    cli: Cli, fake_agent: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "START_LIMIT_S", 1.0)
    pid_file = tmp_path / "pid"
    fake_agent(f"import os, time; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(60)")
    result = cli("init", "--name", "rig-a")
    assert result.exit_code == 125
    assert "did not answer within 1 s\n  fake agent speaks\n" in result.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_ctrl_c_before_a_command_begins_gives_130_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_run", interrupted)
    with pytest.raises(SystemExit) as left:
        main.main()
    assert left.value.code == 130
