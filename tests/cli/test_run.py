"""`run`: what is asked for, what is shown, what it exits with."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer
from typer.testing import Result

from meshgpu.cli import attach, launch, progress, run_command
from meshgpu.client.views import JobView
from meshgpu.model.ids import digest

if TYPE_CHECKING:
    from tests.cli.conftest import StubAgent

Cli = Callable[..., Result]
MakeJob = Callable[..., JobView]
JOB_CALL = "GET /v1/jobs/k7qaaaaaaaaaaaaaaaaaaaaaaa"
EVENTS_CALL = f"{JOB_CALL}/events"
HEADLINE = "train-k7q → rig-b · RTX 4090 24 GB · 12 files 41 kB · environment 3f2a (cached)\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "project"
    directory.mkdir()
    (directory / "train.py").write_text("print('hello')\n")
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def mesh(stub: "StubAgent", project: Path, make_job: MakeJob) -> "StubAgent":
    """A mesh that takes any job."""
    stub.on("GET /v1/agent", {"version": "0.1.0"})
    stub.on("POST /v1/trees", {"tree": "t" * 64, "missing": []})
    stub.on_stream("POST /v1/jobs", {"type": "job", "job": make_job(state="queued", phase=None, machine=None)})
    return stub


def log(data: str, position: int, stream: str = "stdout") -> dict[str, Any]:
    return {"type": "log", "stream": stream, "data": data, "position": position}


def told(job: JobView) -> dict[str, Any]:
    return {"type": "job", "job": job}


def end(job: JobView) -> dict[str, Any]:
    return {"type": "end", "job": job}


def test_log_comes_byte_for_byte_after_one_headline(
    cli: Cli, mesh: "StubAgent", make_job: MakeJob, ended: MakeJob
) -> None:
    mesh.on_stream(EVENTS_CALL, told(make_job()), log("one\r\n\udcff\x00", 5), log("two", 9, "stderr"), end(ended()))
    result = cli("run", "-m", "rig-b", "--", "python", "train.py")
    assert result.stdout_bytes == b"one\r\n\xff\x00"
    assert result.stderr == f"{HEADLINE}two"
    assert result.exit_code == 0


def test_constraint_that_cannot_be_read_is_refused_before_anything_is_shipped(cli: Cli, mesh: "StubAgent") -> None:
    result = cli("run", "--on", "vrm>=24GB", "python", "train.py")
    assert result.exit_code == 2
    assert "did you mean vram?" in result.stderr
    assert "POST /v1/trees" not in mesh.targets()


def test_request_says_what_was_typed(cli: Cli, mesh: "StubAgent", project: Path, ended: MakeJob) -> None:
    mesh.on_stream(EVENTS_CALL, end(ended()))
    (project / "more.txt").write_text("einops\n")
    options = "-m rig-b -g 2X24gb -e SEED=1 --pip torch --pip numpy --pip-req more.txt --no-env"
    options += " --cpus 4 --memory 8GB --cloud never --retries 3 --on vram>=24GB --not-on rig7,rig8"
    options += " --priority low --preemptible --timeout 1.5h"
    cli("run", *options.split(), "python", "train.py", "-g", "7", "--", "x")
    assert mesh.body("POST /v1/jobs") == {
        "name": "train",
        "command": ["python", "train.py", "-g", "7", "--", "x"],
        "shell": False,
        "env": {"SEED": "1"},
        "pip": ["torch", "numpy"],
        "requirements": "einops\n",
        "from_project": False,
        "tree": "t" * 64,
        "machine": "rig-b",
        "gpus": "2x24GB",
        "cpus": 4,
        "memory_bytes": 8_000_000_000,
        "on": "vram>=24GB",
        "not_on": "rig7,rig8",
        "image": "",
        "cloud": "never",
        "retries": 3,
        "sweep": None,
        "metric": "",
        "metric_pattern": "",
        "secrets": {},
        "shared": False,
        "priority": "low",
        "preemptible": True,
        "timeout_s": 5400.0,
        "start_by": None,
    }


def test_secrets_come_from_variables_and_files_and_travel_over_the_socket_alone(
    cli: Cli, mesh: "StubAgent", project: Path, ended: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh.on_stream(EVENTS_CALL, end(ended()))
    monkeypatch.setenv("HF_TOKEN", "canary-1")
    (project / "key").write_text("canary-2\nmore\n")
    done = cli("run", "--secret", "HF_TOKEN", "--secret", "API_KEY=@key", "--share", "python", "train.py")
    body = mesh.body("POST /v1/jobs")
    assert body["secrets"] == {"HF_TOKEN": "canary-1", "API_KEY": "canary-2\nmore"}
    assert body["shared"] is True
    assert "canary" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("secret", "said"),
    [
        ("TOKEN=canary", "cannot take the secret TOKEN from the command line"),
        ("TOKEN=", "cannot take the secret TOKEN from the command line"),
        ("UNSET_HERE", "cannot pass the secret UNSET_HERE: it is not set here"),
        ("TOKEN=@missing", "cannot read the secret TOKEN"),
        ("TOKEN=@binary", "it is not UTF-8"),
        ("canary-with-dashes", "expected the name of a variable"),
        ("MESHGPU_JOB_ID", "expected the name of a variable"),
        ("SEED", "it is set twice"),
    ],
)
def test_secret_that_cannot_be_passed_is_refused_and_not_repeated(
    cli: Cli, mesh: "StubAgent", project: Path, secret: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEED", "1")
    (project / "binary").write_bytes(b"canary\xff")
    refused = cli("run", "-e", "SEED=1", "--secret", secret, "python", "train.py")
    assert refused.exit_code == 2
    assert said in refused.stderr
    assert "canary" not in refused.stderr
    assert not any(target.startswith("POST /v1/jobs") for target in mesh.targets())


def test_start_by_is_told_as_a_moment(cli: Cli, mesh: "StubAgent", ended: MakeJob) -> None:
    mesh.on_stream(EVENTS_CALL, end(ended()))
    cli("run", "--start-by", "30m", "true")
    assert mesh.body("POST /v1/jobs")["start_by"] == pytest.approx(time.time() + 1800, abs=30)


def test_image_is_passed_on_and_excludes_packages(cli: Cli, mesh: "StubAgent", ended: MakeJob) -> None:
    mesh.on_stream(EVENTS_CALL, end(ended()))
    assert cli("run", "--image", "pytorch/pytorch:2.4", "python", "train.py").exit_code == 0
    assert mesh.body("POST /v1/jobs")["image"] == "pytorch/pytorch:2.4"
    refused = cli("run", "--image", "pytorch/pytorch:2.4", "--pip", "einops", "python", "train.py")
    assert refused.exit_code == 2
    assert "--image excludes --pip" in refused.stderr


def test_quoted_string_runs_in_a_shell_and_defaults_are_left_to_the_mesh(
    cli: Cli, mesh: "StubAgent", ended: MakeJob
) -> None:
    mesh.on_stream(EVENTS_CALL, end(ended()))
    cli("run", "python train.py | tee log")
    body = mesh.body("POST /v1/jobs")
    assert (body["command"], body["shell"]) == (["python train.py | tee log"], True)
    assert (body["gpus"], body["machine"], body["from_project"], body["name"]) == (None, "", True, "train")


def test_only_missing_chunks_are_shipped(cli: Cli, mesh: "StubAgent", project: Path, ended: MakeJob) -> None:
    (project / "other.py").write_text("other\n")
    missing = digest(b"print('hello')\n")
    mesh.replies["POST /v1/trees"] = [{"tree": "t" * 64, "missing": [missing]}]
    mesh.on("PUT /v1/chunks", {"digest": missing})
    mesh.on_stream(EVENTS_CALL, end(ended()))
    assert cli("run", "python", "train.py").exit_code == 0
    assert [body for method, _, body in mesh.seen if method == "PUT"] == [b"print('hello')\n"]


@pytest.mark.parametrize(
    ("facts", "code", "line"),
    [
        ({"exit_code": 3}, 3, "train-k7q failed with exit code 3\n"),
        (
            {"exit_code": 137, "reason": "killed for memory"},
            137,
            "train-k7q failed with exit code 137: killed for memory\n",
        ),
        ({"exit_code": None, "state": "lost"}, 125, "train-k7q is lost: its end was never recorded\n"),
        (
            {"exit_code": 0, "state": "failed", "timed_out": True, "reason": "ran longer than its limit of 2 h"},
            124,
            "train-k7q was ended: ran longer than its limit of 2 h\n",
        ),
        ({"exit_code": 143, "state": "cancelled", "timed_out": True}, 143, "train-k7q was stopped\n"),
        (
            {"exit_code": None, "state": "expired", "reason": "did not start within 30 min: rig-b is busy"},
            125,
            "train-k7q expired: did not start within 30 min: rig-b is busy\n",
        ),
        ({"exit_code": 143, "state": "cancelled"}, 143, "train-k7q was stopped\n"),
    ],
)
def test_exit_code_and_last_line_tell_how_it_ended(
    cli: Cli, mesh: "StubAgent", ended: MakeJob, facts: dict[str, Any], code: int, line: str
) -> None:
    mesh.on_stream(EVENTS_CALL, end(ended(**facts)))
    result = cli("run", "python", "train.py")
    assert result.exit_code == code
    assert result.stderr == HEADLINE + line


def test_job_cancelled_before_its_start_gives_125_and_no_headline(cli: Cli, mesh: "StubAgent", ended: MakeJob) -> None:
    mesh.on_stream(EVENTS_CALL, end(ended(None, state="cancelled", machine=None, started_at=None)))
    result = cli("run", "python", "train.py")
    assert (result.exit_code, result.stderr) == (125, "train-k7q was cancelled before it started\n")


def test_waiting_job_says_why_once_per_change(cli: Cli, mesh: "StubAgent", make_job: MakeJob, ended: MakeJob) -> None:
    def queued(reason: str) -> dict[str, Any]:
        return told(make_job(state="queued", phase=None, machine=None, started_at=None, reason=reason))

    mesh.on_stream(
        EVENTS_CALL, queued("rig-b is busy"), queued("rig-b is busy"), queued("rig-b is paused"), end(ended())
    )
    lines = cli("run", "python", "train.py").stderr.splitlines()
    assert lines[:2] == ["train-k7q waits: rig-b is busy", "train-k7q waits: rig-b is paused"]
    assert lines[2:] == [HEADLINE.rstrip()]


def test_out_of_touch_is_said_once_with_its_seconds_and_so_is_the_return(
    cli: Cli, mesh: "StubAgent", make_job: MakeJob, ended: MakeJob
) -> None:
    silence = {"type": "out-of-touch", "machine": "rig-b", "seconds": 12.0}
    unknown = told(make_job(state="unknown"))
    events = [told(make_job()), silence, unknown, silence | {"seconds": 17.0}, log("back\n", 5), end(ended())]
    mesh.on_stream(EVENTS_CALL, *events)
    result = cli("run", "python", "train.py")
    assert result.stderr.splitlines()[1:] == [
        "rig-b has been out of touch for 12 s; the job is taken to run on",
        "rig-b is back",
    ]


def test_silence_is_told_when_it_is_worth_it_and_then_ever_more_rarely(
    cli: Cli, mesh: "StubAgent", make_job: MakeJob, ended: MakeJob
) -> None:
    seconds = [0.0, 1.9, 2.1, 5.0, 10.5, 30.0, 61.0, 300.0, 600.5, 900.0, 1200.5]
    silence = [{"type": "out-of-touch", "machine": "rig-b", "seconds": moment} for moment in seconds]
    still = told(make_job())
    mesh.on_stream(EVENTS_CALL, still, *silence[:4], still, *silence[4:], log("back\n", 5), silence[0], end(ended()))
    lines = cli("run", "python", "train.py").stderr.splitlines()[1:]
    assert [line.partition(" for ")[2].partition(";")[0] for line in lines[:-1]] == [
        "2 s",
        "10 s",
        "61 s",
        "10 m",
        "20 m",
    ]
    assert lines[-1] == "rig-b is back"


def test_environment_that_fails_hints_at_the_names(cli: Cli, mesh: "StubAgent", ended: MakeJob) -> None:
    detail = "environment: resolving --pip"
    mesh.on_stream(EVENTS_CALL, end(ended(None, state="failed", detail=detail, reason="no such package toch")))
    lines = cli("run", "--pip", "toch", "python", "train.py").stderr.splitlines()
    assert lines[0] == "train-k7q → rig-b · RTX 4090 24 GB · 12 files 41 kB"
    assert lines[1] == "train-k7q failed without an exit code: no such package toch"
    assert lines[2].startswith("hint: is everything spelt right that --pip, ")


@pytest.mark.parametrize("code", [0, 4])
def test_fetch_goes_on_past_a_file_it_cannot_have_and_keeps_the_jobs_exit_code(
    cli: Cli, mesh: "StubAgent", project: Path, ended: MakeJob, code: int
) -> None:
    mesh.on_stream(EVENTS_CALL, end(ended(code, output_files=3, output_bytes=9)))
    files = ["b\udcff", "gone", "good"]
    mesh.on(f"{JOB_CALL}/files", {"files": [{"path": path, "size_bytes": 3} for path in files]})
    mesh.on_failure(f"{JOB_CALL}/files/gone", 404, "unknown-file", "cannot fetch gone")
    mesh.on(f"{JOB_CALL}/files/good", b"job")
    result = cli("run", "--fetch-to", "results", "python", "train.py")
    assert result.exit_code == code
    assert [path.name for path in (project / "results").iterdir()] == ["good"]
    assert "cannot fetch 'b\\udcff': its name is not UTF-8\ncannot fetch gone\n1 file, 3 B fetched" in result.stderr


def test_fetch_that_cannot_be_done_at_all_is_no_success(
    cli: Cli, mesh: "StubAgent", project: Path, ended: MakeJob
) -> None:
    mesh.on_failure(f"{JOB_CALL}/files", 504, "no-answer", "rig-b did not answer")
    for code, expected in ((0, 125), (4, 4)):
        mesh.replies[EVENTS_CALL] = []
        mesh.on_stream(EVENTS_CALL, end(ended(code, output_files=3, output_bytes=9)))
        result = cli("run", "--fetch", "python", "train.py")
        assert (result.exit_code, "error: rig-b did not answer" in result.stderr) == (expected, True)


def test_broken_stream_goes_on_at_the_last_position(
    cli: Cli, mesh: "StubAgent", make_job: MakeJob, ended: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach, "RECONNECT_PAUSE_S", 0.01)
    mesh.on_stream(EVENTS_CALL, told(make_job()), log("one\n", 4), broken=True)
    mesh.on_failure(EVENTS_CALL, 404, "unknown-job", "not found yet")
    mesh.on_stream(EVENTS_CALL, told(make_job()), log("two\n", 8))
    mesh.on_stream(EVENTS_CALL, end(ended()))
    result = cli("run", "python", "train.py")
    assert (result.stdout, result.exit_code) == ("one\ntwo\n", 0)
    assert result.stderr == HEADLINE
    positions = [target.partition("?")[2] for target in mesh.targets() if "/events" in target]
    assert positions == [f"position={n}&logs=1&follow=1" for n in (0, 4, 4, 8)]


def test_agent_that_stays_away_gives_125_and_says_how_to_go_on(
    cli: Cli, mesh: "StubAgent", make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach, "RECONNECT_PAUSE_S", 0.01)
    monkeypatch.setattr(attach, "RECONNECT_LIMIT_S", 0.1)
    mesh.on_stream(EVENTS_CALL, told(make_job()), log("one\n", 4), broken=True)
    mesh.on_stream(EVENTS_CALL, broken=True)
    result = cli("run", "python", "train.py")
    assert (result.stdout, result.exit_code) == ("one\n", 125)
    assert "error: cannot follow train-k7q any more" in result.stderr
    assert "hint: meshgpu up && meshgpu logs -f train-k7q" in result.stderr


@pytest.mark.parametrize(("module", "package"), [("torch", "torch"), ("cv2.gapi", "opencv-python-headless")])
def test_missing_module_names_the_flag(
    cli: Cli, mesh: "StubAgent", make_job: MakeJob, ended: MakeJob, module: str, package: str
) -> None:
    trace = [
        log("Traceback …\nModuleNotFoundError: No module ", 40, "stderr"),
        log(f"named '{module}'\n", 60, "stderr"),
    ]
    mesh.on_stream(EVENTS_CALL, told(make_job()), *trace, end(ended(1)))
    hint = f"hint: this environment has no {package}: add --pip {package}, or --pip-req requirements.txt"
    assert hint in cli("run", "python", "train.py").stderr


def test_missing_module_is_no_matter_where_the_job_succeeded(
    cli: Cli, mesh: "StubAgent", make_job: MakeJob, ended: MakeJob
) -> None:
    caught = log("ModuleNotFoundError: No module named 'apex'\n", 40, "stderr")
    mesh.on_stream(EVENTS_CALL, told(make_job()), caught, end(ended()))
    assert "hint" not in cli("run", "python", "train.py").stderr


def test_last_line_says_what_was_left_and_how_to_fetch_it(cli: Cli, mesh: "StubAgent", ended: MakeJob) -> None:
    mesh.on_stream(EVENTS_CALL, end(ended(output_files=3, output_bytes=1_200_000)))
    mesh.on_stream(EVENTS_CALL, end(ended(output_files=1, output_bytes=7)))
    mesh.on(f"{JOB_CALL}/files", {"files": [{"path": "out/my model.pt", "size_bytes": 7}]})
    first, second = (cli("run", "python", "train.py").stderr.splitlines()[-1] for _ in range(2))
    assert first == "3 files, 1.2 MB · meshgpu cp -r runs/train-k7q/ ."
    assert second == "1 file, 7 B · meshgpu cp 'runs/train-k7q/out/my model.pt' ."


def test_fetch_brings_files_back_but_never_over_a_different_one(
    cli: Cli, mesh: "StubAgent", project: Path, ended: MakeJob
) -> None:
    mesh.on_stream(EVENTS_CALL, end(ended(output_files=3, output_bytes=9)))
    files = ["out/new.txt", "mine.txt", "same.txt"]
    mesh.on(f"{JOB_CALL}/files", {"files": [{"path": path, "size_bytes": 3} for path in files]})
    for path in files:
        mesh.on(f"{JOB_CALL}/files/{path}", b"job")
    (project / "mine.txt").write_text("me")
    (project / "same.txt").write_text("job")
    result = cli("run", "--fetch", "python", "train.py")
    assert result.exit_code == 0
    found = {str(path.relative_to(project)): path.read_text() for path in project.rglob("*") if path.is_file()}
    del found["train.py"]
    assert found == {"out/new.txt": "job", "mine.txt": "me", "mine.txt.train-k7q": "job", "same.txt": "job"}
    assert "mine.txt is different here and stays; the job's is mine.txt.train-k7q" in result.stderr


@pytest.mark.parametrize("kind", ["directory", "dangling symlink"])
def test_fetch_puts_a_file_beside_what_is_no_file(
    cli: Cli, mesh: "StubAgent", project: Path, ended: MakeJob, kind: str
) -> None:
    mesh.on_stream(EVENTS_CALL, end(ended(output_files=1, output_bytes=3)))
    mesh.on(f"{JOB_CALL}/files", {"files": [{"path": "out", "size_bytes": 3}]})
    mesh.on(f"{JOB_CALL}/files/out", b"job")
    if kind == "directory":
        (project / "out").mkdir()
    else:
        (project / "out").symlink_to("nothing")
    assert cli("run", "--fetch", "python", "train.py").exit_code == 0
    assert (project / "out.train-k7q").read_bytes() == b"job"


def test_fetch_to_makes_its_directory_and_keeps_the_jobs_exit_code(
    cli: Cli, mesh: "StubAgent", project: Path, ended: MakeJob
) -> None:
    mesh.on_stream(EVENTS_CALL, end(ended(4, output_files=1, output_bytes=3)))
    mesh.on(f"{JOB_CALL}/files", {"files": [{"path": "a", "size_bytes": 3}]})
    mesh.on(f"{JOB_CALL}/files/a", b"job")
    assert cli("run", "--fetch-to", "results", "python", "train.py").exit_code == 4
    assert (project / "results/a").read_bytes() == b"job"


def test_detached_json_is_the_ids_and_nothing_else(cli: Cli, mesh: "StubAgent") -> None:
    result = cli("run", "-d", "--json", "python", "train.py")
    assert json.loads(result.stdout) == {"id": "k7qaaaaaaaaaaaaaaaaaaaaaaa", "display": "train-k7q"}
    assert (result.stdout.count("\n"), result.stderr, result.exit_code) == (1, "", 0)


def test_detached_prints_the_id_and_who_alone_holds_the_job(cli: Cli, mesh: "StubAgent", make_job: MakeJob) -> None:
    mesh.replies["POST /v1/jobs"].clear()
    mesh.on_stream("POST /v1/jobs", {"type": "job", "job": make_job(held_by=["rig7"])})
    result = cli("run", "-d", "python", "train.py")
    assert result.stdout == "train-k7q\n"
    assert "train-k7q is held by rig7 only\n" in result.stderr
    assert "meshgpu logs -f train-k7q" in result.stderr


def test_attached_json_is_the_events(cli: Cli, mesh: "StubAgent", ended: MakeJob) -> None:
    mesh.on_stream(EVENTS_CALL, log("one\n", 4), end(ended(3)))
    result = cli("run", "--json", "python", "train.py")
    assert [json.loads(line)["type"] for line in result.stdout.splitlines()] == ["log", "end"]
    assert result.exit_code == 3


def test_submission_that_fails_half_way_is_an_error(cli: Cli, mesh: "StubAgent") -> None:
    shipping = {"type": "shipping", "done_bytes": 1, "total_bytes": 2}
    error = {"code": "unknown-machine", "message": "no machine bbo in lab", "hint": "meshgpu run -m bob …"}
    mesh.replies["POST /v1/jobs"].clear()
    mesh.on_stream("POST /v1/jobs", shipping, {"type": "error", "error": error})
    mesh.on_stream("POST /v1/jobs", shipping)
    result = cli("run", "-m", "bbo", "python", "train.py")
    assert (result.exit_code, result.stderr) == (125, "error: no machine bbo in lab\nhint: meshgpu run -m bob …\n")
    result = cli("run", "python", "train.py")
    assert result.exit_code == 125
    assert "broke off before it took the job" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["-g", "lots?", "true"],
        ["--memory", "8", "true"],
        ["-e", "1=2", "true"],
        ["--pip-req", "absent.txt", "true"],
        ["--cpus", "-1", "true"],
        ["--cpus", "x", "true"],
        ["--timeout", "soon", "true"],
        ["--timeout", "0", "true"],
        ["--start-by", "25:00", "true"],
        ["--start-by", "soon", "true"],
        ["--nonsense", "true"],
        ["-m", "", "true"],
        ["--name", " ", "true"],
        [],
    ],
)
def test_bad_flags_exit_2_before_anything_is_asked(cli: Cli, mesh: "StubAgent", arguments: list[str]) -> None:
    result = cli("run", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr
    assert mesh.seen == []


def test_no_agent_is_said_with_the_command_that_mends_it(cli: Cli, project: Path, tmp_path: Path) -> None:
    result = cli("run", "python", "train.py")
    assert result.exit_code == 125
    assert result.stderr == f"error: no agent answers at {tmp_path}/home/agent.sock\nhint: meshgpu up\n"


def test_yes_starts_an_agent_where_none_answers(
    cli: Cli, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Path] = []
    monkeypatch.setattr(run_command, "start_agent", started.append)
    cli("run", "--yes", "python", "train.py")
    assert started == [tmp_path / "home"]


def test_progress_is_silent_for_half_a_second_and_then_one_plain_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = progress.Progress("shipping", 300_000_000)
    for moment in (0.2, 0.4, 0.6, 0.8, 1.0):
        now[0] = moment
        shown.update(1)
        assert capsys.readouterr().err == ("shipping 300 MB\n" if moment == 0.6 else "")
    shown.close()


def test_progress_is_a_bar_on_a_terminal_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "is_terminal", lambda stream: True)
    shown = progress.Progress("shipping", 300_000_000)
    now[0] = 2.0
    shown.update(150_000_000)
    assert capsys.readouterr().err == "\r\x1b[Kshipping [############............] 150 MB of 300 MB, 75 MB/s"
    shown.close()
    assert capsys.readouterr().err == "\r\x1b[K"


def test_question_is_asked_only_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def confirm(question: str, **_: Any) -> bool:
        asked.append(question)
        return False

    monkeypatch.setattr(typer, "confirm", confirm)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    assert launch.confirmed("Join?", yes=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert launch.confirmed("Join?", yes=True)
    assert asked == []
    assert not launch.confirmed("Join?", yes=False)
