"""`meshgpu logs`: which part it asks for, and that what it prints is what the job printed."""

import json
import random
import subprocess
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest
from typer.testing import Result

from meshgpu.cli.spans import parse_since
from meshgpu.client.views import JobView
from meshgpu.errors import MeshgpuError

if TYPE_CHECKING:
    from tests.cli.conftest import StubAgent

Cli = Callable[..., Result]
MakeJob = Callable[..., JobView]
EVENTS = "GET /v1/jobs/k7qaaaaaaaaaaaaaaaaaaaaaaa/events"
NOW = 1_700_000_045.0


@pytest.fixture(autouse=True)
def still_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


def log(data: str, stream: str = "stdout", at: float = NOW, position: int = 1) -> dict[str, Any]:
    return {"type": "log", "stream": stream, "at": at, "data": data, "position": position}


def show(stub: "StubAgent", make_job: MakeJob, *events: dict[str, Any], **changes: Any) -> None:
    job = make_job(**changes)
    stub.on("GET /v1/jobs/k7q", {"job": job})
    stub.on_stream(EVENTS, *events, {"type": "end", "job": job})


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ([], {}),
        (["-n", "20"], {"lines": "20"}),
        (["--tail", "0"], {"lines": "0"}),
        (["--since", "10m"], {"since": str(NOW - 600)}),
        (["--since", "2023-11-14T22:00"], {"since": "1699999200.0"}),
        (["--stderr"], {"stream": "stderr"}),
        (["--stdout", "--stderr"], {}),
        (["--attempt", "2"], {}),
        (["--attempt", "1"], {"attempt": "1"}),
        (["-f", "--attempt", "1"], {"attempt": "1"}),
        (
            ["-n", "5", "--since", "1h", "--stdout", "-t", "--attempt", "1"],
            {"lines": "5", "since": str(NOW - 3600), "stream": "stdout", "attempt": "1"},
        ),
    ],
)
def test_what_is_asked_for_reaches_the_agent(
    cli: Cli, stub: "StubAgent", make_job: MakeJob, flags: list[str], asked: dict[str, str]
) -> None:
    show(stub, make_job, epoch=2)
    assert cli("logs", "k7q", *flags).exit_code == 0
    query = {name: value for name, (value,) in parse_qs(urlsplit(stub.targets()[-1].split()[1]).query).items()}
    assert query == {"position": "0", "logs": "1", "follow": "0"} | asked


def test_timestamps_begin_each_line_once(cli: Cli, stub: "StubAgent", make_job: MakeJob) -> None:
    show(
        stub,
        make_job,
        log("one\ntw", at=1.5),
        log("warn: \r50 %\n", "stderr", at=2.0),
        log("o\n", at=3.25),
        log("three\n", at=4.0),
    )
    result = cli("logs", "-t", "k7q")
    assert result.stdout.splitlines() == [
        "1970-01-01T00:00:01.500+00:00 one",
        "1970-01-01T00:00:01.500+00:00 two",
        "1970-01-01T00:00:04.000+00:00 three",
    ]
    assert result.stderr == "1970-01-01T00:00:02.000+00:00 warn: \r50 %\n"


def test_timestamps_are_local(cli: Cli, stub: "StubAgent", make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "CET-1")
    time.tzset()
    show(stub, make_job, log("one\n", at=0.125))
    assert cli("logs", "-t", "k7q").stdout == "1970-01-01T01:00:00.125+01:00 one\n"


def test_what_was_dropped_is_said_apart_from_the_log(cli: Cli, stub: "StubAgent", make_job: MakeJob) -> None:
    show(
        stub,
        make_job,
        {"type": "dropped", "bytes": 3_200_000_000, "position": 3_200_000_000},
        log("late\n"),
        {"type": "dropped", "bytes": 0, "position": 7},
    )
    result = cli("logs", "k7q")
    assert (result.stdout, result.stderr) == ("late\n", "… 3.2 GB of earlier output were dropped\n")


def test_json_is_valid_whatever_was_printed(cli: Cli, stub: "StubAgent", make_job: MakeJob) -> None:
    """Also where a character came in two pieces, and bytes that are none."""
    rubbish = random.Random(1).randbytes(20_000)
    whole = "é".encode() + rubbish + "ü".encode()
    pieces = [whole[:1], whole[1:9_000], whole[9_000:-1], whole[-1:]]
    show(stub, make_job, *(log(piece.decode("utf-8", "surrogateescape"), at=2.0) for piece in pieces))
    lines = [json.loads(line) for line in cli("logs", "--json", "k7q").stdout.splitlines()]
    assert {(line["at"], line["stream"]) for line in lines} == {(2.0, "stdout")}
    text = "".join(line["text"] for line in lines)
    text.encode()  # no lone surrogates, which some readers refuse
    assert text == whole.decode("utf-8", "replace")


def test_bytes_and_long_lines_reach_a_pipe_unharmed(
    start: Callable[..., "subprocess.Popen[bytes]"], stub: "StubAgent", make_job: MakeJob
) -> None:
    rng = random.Random(2)
    printed = rng.randbytes(300_000) + b"\x1b]0;title\x07\x1b[2J\x00\r\n" + b"x" * 10_000_000 + b"\n"
    pieces = [printed[start : start + 65_536] for start in range(0, len(printed), 65_536)]
    show(stub, make_job, *(log(piece.decode("utf-8", "surrogateescape")) for piece in pieces))
    stdout, stderr = start("logs", "k7q").communicate(timeout=20)
    assert (stdout, stderr) == (printed, b"")


def test_followed_part_is_asked_for_again_where_the_agent_broke_off(
    cli: Cli, stub: "StubAgent", make_job: MakeJob, ended: MakeJob
) -> None:
    stub.on("GET /v1/jobs/k7q", {"job": make_job()})
    stub.on_stream(EVENTS, {"type": "dropped", "bytes": 0, "position": 40}, broken=True)
    stub.on_stream(EVENTS, log("new\n", position=44), {"type": "end", "job": ended()})
    assert cli("logs", "-f", "-n", "0", "k7q").stdout == "new\n"
    assert [target.partition("?")[2] for target in stub.targets()[1:]] == [
        "position=0&logs=1&follow=1&lines=0",
        "position=40&logs=1&follow=1&lines=0",
    ]


@pytest.mark.parametrize("text", ["yesterday", "10x", "2026-13-01", "1.2.3", "-5m"])
def test_time_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(MeshgpuError, match="cannot read the time"):
        parse_since(text, NOW)


def test_moment_with_an_offset_is_taken_at_its_word() -> None:
    assert parse_since("2023-11-14T22:13:20+01:00", NOW) == 1_699_996_400.0
    assert parse_since("90", NOW) == NOW - 90
