"""Commands about jobs that exist: ps, logs, stop, kill, info, wait."""

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from typer.testing import Result

from meshgpu.client.views import JobView

if TYPE_CHECKING:
    from tests.cli.conftest import StubAgent

Cli = Callable[..., Result]
MakeJob = Callable[..., JobView]
JOB = "k7qaaaaaaaaaaaaaaaaaaaaaaa"
JOB_CALL = f"GET /v1/jobs/{JOB}"


@pytest.fixture(autouse=True)
def still_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_700_000_045.0)


def test_ps_shows_mine_as_a_table_without_borders(cli: Cli, stub: "StubAgent", make_job: MakeJob) -> None:
    waits = make_job(
        display="sweep-2xa", state="queued", phase=None, machine=None, gpus=[], started_at=None,
        reason="rig-b is busy", command="python sweep.py\n--lr 1",
    )  # fmt: skip
    lost = make_job(display="eval-9bc", state="unknown", out_of_touch_s=40.0, command="echo \x1b[2J")
    stub.on("GET /v1/jobs", {"jobs": [make_job(), waits, lost], "silent": ["rig-d", "rig-e"]})
    result = cli("ps")
    assert result.stdout.splitlines() == [
        "ID         USER  GPU             ST                 TIME  WHERE(REASON)    CMD",
        "train-k7q  ada   RTX 4090 24 GB  running            0:40  rig-b            python train.py",
        "sweep-2xa  ada   -               queued             0:45  (rig-b is busy)  python sweep.py --lr 1",
        "eval-9bc   ada   RTX 4090 24 GB  out of touch 40 s  0:40  rig-b            echo \\x1b[2J",
    ]
    assert (result.stderr, result.exit_code) == ("did not answer in time: rig-d, rig-e\n", 0)
    assert stub.targets() == ["GET /v1/jobs?all=0"]


def test_ps_json_is_the_agents_answer_on_one_line(cli: Cli, stub: "StubAgent", make_job: MakeJob) -> None:
    view = {"jobs": [make_job()], "silent": ["rig-d"]}
    stub.on("GET /v1/jobs", view)
    result = cli("ps", "-a", "--json")
    assert json.loads(result.stdout) == view
    assert (result.stdout.count("\n"), result.stderr) == (1, "")
    assert stub.targets() == ["GET /v1/jobs?all=1"]


def test_ps_shows_the_newest_of_what_ended_and_says_how_many_more_there_are(
    cli: Cli, stub: "StubAgent", make_job: MakeJob
) -> None:
    def old(number: int) -> JobView:
        return make_job(id=f"{number}", display=f"old-{number}", state="succeeded", ended_at=1000.0 + number)

    stub.on("GET /v1/jobs", {"jobs": [make_job(), *map(old, range(60))], "silent": []})
    result = cli("ps", "-a")
    assert "train-k7q" in result.stdout
    assert [f"old-{number} " in result.stdout for number in (9, 10, 59)] == [False, True, True]
    assert result.stderr == "10 finished jobs more: meshgpu ps -a --limit 60\n"
    assert cli("ps", "-a", "--limit", "60").stderr == ""
    assert len(json.loads(cli("ps", "-a", "--json").stdout)["jobs"]) == 61
    assert len(json.loads(cli("ps", "-a", "--json", "--limit", "2").stdout)["jobs"]) == 3


def test_ps_since_shows_what_ended_since_then(cli: Cli, stub: "StubAgent", make_job: MakeJob) -> None:
    now = time.time()
    ended = [
        make_job(id=name, display=name, state="failed", ended_at=now - s) for name, s in (("new", 60), ("old", 900))
    ]
    stub.on("GET /v1/jobs", {"jobs": [make_job(), *ended], "silent": []})
    shown = cli("ps", "--since", "10m").stdout
    assert ("train-k7q" in shown, "new" in shown, "old" in shown) == (True, True, False)
    assert stub.targets() == ["GET /v1/jobs?all=1"]
    assert cli("ps", "--since", "yesterday").exit_code == 2


def test_ps_without_jobs_keeps_stdout_empty(cli: Cli, stub: "StubAgent") -> None:
    stub.on("GET /v1/jobs", {"jobs": [], "silent": []})
    result = cli("ps")
    assert (result.stdout, result.stderr) == ("", "no unfinished jobs (meshgpu ps -a shows all)\n")


def test_ps_without_jobs_names_those_who_did_not_answer(cli: Cli, stub: "StubAgent") -> None:
    stub.on("GET /v1/jobs", {"jobs": [], "silent": ["rig-b"]})
    assert cli("ps").stderr == "no unfinished jobs found; rig-b did not answer\n"


def test_ps_cuts_long_reasons_and_info_does_not(cli: Cli, stub: "StubAgent", make_job: MakeJob) -> None:
    job = make_job(state="queued", phase=None, machine=None, reason="x" * 100)
    stub.on("GET /v1/jobs", {"jobs": [job], "silent": []})
    stub.on("GET /v1/jobs/k7q", {"job": job})
    assert f"  ({'x' * 58}…  python" in cli("ps").stdout
    assert "x" * 100 in cli("info", "k7q").stdout


def test_jobs_may_be_named_as_places(cli: Cli, stub: "StubAgent", make_job: MakeJob) -> None:
    stub.on("GET /v1/jobs/train-k7q", {"job": make_job()})
    assert cli("info", "runs/train-k7q").exit_code == cli("info", "runs/train-k7q/").exit_code == 0


def test_watch_repeats_until_interrupted(
    cli: Cli, stub: "StubAgent", make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", pause)
    stub.on("GET /v1/jobs", {"jobs": [make_job()], "silent": []})
    result = cli("ps", "-w")
    assert (result.stdout.count("train-k7q"), result.exit_code, pauses) == (2, 0, [2.0, 2.0])


def test_logs_print_what_there_is_and_leave_with_0(cli: Cli, stub: "StubAgent", make_job: MakeJob) -> None:
    stub.on("GET /v1/jobs/k7q", {"job": make_job()})
    stub.on_stream(
        f"{JOB_CALL}/events",
        {"type": "log", "stream": "stdout", "data": "one\n", "position": 4},
        {"type": "log", "stream": "stderr", "data": "two\n", "position": 8},
        {"type": "end", "job": make_job()},
    )
    result = cli("logs", "k7q")
    assert (result.stdout, result.stderr, result.exit_code) == ("one\n", "two\n", 0)
    assert stub.targets()[-1] == f"{JOB_CALL}/events?position=0&logs=1&follow=0"


def test_logs_followed_end_with_the_jobs_code(cli: Cli, stub: "StubAgent", make_job: MakeJob, ended: MakeJob) -> None:
    stub.on("GET /v1/jobs/train-k7q", {"job": make_job()})
    stub.on_stream(
        f"{JOB_CALL}/events",
        {"type": "log", "stream": "stdout", "data": "one\n", "position": 4},
        {"type": "end", "job": ended(7)},
    )
    result = cli("logs", "-f", "train-k7q")
    assert (result.stdout, result.exit_code) == ("one\n", 7)
    assert "train-k7q → rig-b" in result.stderr


@pytest.mark.parametrize("mode", ["stop", "kill"])
def test_stop_and_kill_ask_for_each_job_and_spare_none(
    cli: Cli, stub: "StubAgent", make_job: MakeJob, mode: str
) -> None:
    stub.on_failure("POST /v1/jobs/a/stop", 404, "unknown-job", "no job a", "meshgpu ps -a")
    stub.on("POST /v1/jobs/b/stop", {"job": make_job(state="cancelling", phase="stopping")})
    result = cli(mode, "a", "b")
    assert result.stderr == "error: no job a\nhint: meshgpu ps -a\ntrain-k7q: is being stopped\n"
    assert result.exit_code == 125
    assert stub.body("POST /v1/jobs/b/stop") == {"mode": mode}


def test_info_tells_facts_and_keeps_inner_terms_for_verbose(
    cli: Cli, stub: "StubAgent", ended: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    stub.on("GET /v1/jobs/k7q", {"job": ended(1, output_files=3, output_bytes=1_200_000, requested_machine="rig-b")})
    result = cli("info", "k7q")
    assert result.stdout.splitlines() == [
        "job          train-k7q",
        "user         ada",
        "state        failed (1)",
        "where        rig-b",
        "asked for    rig-b · -g 1",
        "GPU          RTX 4090 24 GB",
        "command      python train.py",
        "submitted    2023-11-14 22:13:20 (45 s ago)",
        "started      2023-11-14 22:13:25 (40 s ago)",
        "ended        2023-11-14 22:14:30 (0 s ago)",
        "time         1:05",
        "exit code    1",
        "environment  environment 3f2a (cached)",
        "code         12 files, 41 kB",
        "left         3 files, 1.2 MB · meshgpu ls runs/train-k7q",
    ]
    assert "attempt" in cli("info", "-v", "k7q").stdout
    assert json.loads(cli("info", "k7q", "--json").stdout)["job"]["id"] == JOB


def test_wait_gives_the_first_code_that_is_not_0(cli: Cli, stub: "StubAgent", ended: MakeJob) -> None:
    for name, code in (("a", 0), ("b", 5), ("c", 6)):
        job = ended(code, id=name, display=f"train-{name}")
        stub.on(f"GET /v1/jobs/{name}", {"job": job})
        stub.on_stream(f"GET /v1/jobs/{name}/events", {"type": "end", "job": job})
    result = cli("wait", "a", "b", "c")
    assert (result.exit_code, result.stdout) == (5, "")
    assert result.stderr.splitlines() == [
        "train-a succeeded",
        "train-b failed with exit code 5",
        "train-c failed with exit code 6",
    ]
    assert cli("wait", "a").exit_code == 0
    assert [job["exit_code"] for job in json.loads(cli("wait", "--json", "a", "c").stdout)["jobs"]] == [0, 6]
    assert "GET /v1/jobs/a/events?position=0&logs=0&follow=1" in stub.targets()


def test_wait_gives_up_in_time_with_124(cli: Cli, stub: "StubAgent", make_job: MakeJob) -> None:
    stub.on("GET /v1/jobs/a", {"job": make_job(id="a")})
    stub.on_stream("GET /v1/jobs/a/events", {"type": "job", "job": make_job(id="a")}, held=True)
    result = cli("wait", "a", "--timeout", "0.3s")
    assert (result.exit_code, result.stderr) == (124, "train-k7q still goes on (running) after 0.3s\n")


@pytest.mark.parametrize("text", ["soon", "-1s", "1w"])
def test_wait_refuses_times_it_cannot_read(cli: Cli, stub: "StubAgent", text: str) -> None:
    result = cli("wait", "a", f"--timeout={text}")
    assert result.exit_code == 2
    assert "expected 90s, 10m or 2h" in result.stderr


def test_unknown_job_is_the_agents_error_with_its_hint(cli: Cli, stub: "StubAgent") -> None:
    stub.on_failure("GET /v1/jobs/x%2F..%2Fy", 404, "unknown-job", "no job x/../y", "meshgpu ps -a")
    result = cli("info", "x/../y")
    assert (result.exit_code, result.stderr) == (125, "error: no job x/../y\nhint: meshgpu ps -a\n")
