"""How jobs, sizes and spans are told, and which exit code a job gives."""

import io
from collections.abc import Callable

import pytest

from meshgpu.cli.render import RED, ago, clock, colour, plain, size, table
from meshgpu.cli.run_command import is_shell, job_name, parse_env, parse_memory
from meshgpu.cli.words import ending, exit_code, goes_on, gpus, headline, run_time, status, waiting, where
from meshgpu.client.views import JobView
from meshgpu.errors import MeshgpuError

MakeJob = Callable[..., JobView]


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [
        ("succeeded", 0, 0),
        ("failed", 3, 3),
        ("failed", 137, 137),
        ("cancelled", 143, 143),
        ("cancelled", 0, 0),
        ("succeeded", None, 125),
        ("failed", None, 125),
        ("failed", 0, 125),
        ("failed", 256, 125),
        ("failed", -9, 125),
        ("cancelled", None, 125),
        ("lost", None, 125),
        ("lost", 0, 125),
        ("expired", None, 125),
        ("expired", 0, 125),
        ("active", 0, 125),
        ("queued", None, 125),
    ],
)
def test_exit_code_is_the_jobs_own_and_never_zero_without_a_recorded_end(
    make_job: MakeJob, state: str, code: int | None, expected: int
) -> None:
    assert exit_code(make_job(state=state, exit_code=code)) == expected


def test_job_that_ran_too_long_gives_124_unless_its_user_stopped_it(make_job: MakeJob) -> None:
    assert exit_code(make_job(state="failed", exit_code=0, timed_out=True)) == 124
    assert exit_code(make_job(state="cancelled", exit_code=143, timed_out=True)) == 143
    assert status(make_job(state="failed", phase=None, exit_code=143, timed_out=True)) == "timed out"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "running"),
        ({"phase": "staging"}, "staging"),
        ({"state": "queued", "phase": None}, "queued"),
        ({"state": "unknown", "phase": "running", "out_of_touch_s": 40.2}, "out of touch 40 s"),
        ({"state": "unknown", "phase": None, "out_of_touch_s": None}, "out of touch"),
        ({"state": "failed", "phase": None, "exit_code": 1}, "failed (1)"),
        ({"state": "succeeded", "phase": None, "exit_code": 0}, "succeeded"),
    ],
)
def test_status_is_the_phase_where_there_is_one(make_job: MakeJob, changes: dict[str, object], expected: str) -> None:
    assert status(make_job(**changes)) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "rig-b"),
        ({"machine": None, "state": "queued", "reason": "rig-b is busy"}, "(rig-b is busy)"),
        ({"machine": None, "state": "queued", "requested_machine": "rig-b"}, "(waits for rig-b)"),
        ({"machine": None, "state": "queued"}, "-"),
        ({"machine": "rig-a", "state": "queued", "reason": "gave way to big-k7q (bob)"}, "(gave way to big-k7q (bob))"),
        ({"state": "failed", "reason": "killed for memory"}, "rig-b (killed for memory)"),
    ],
)
def test_where_merges_place_and_cause(make_job: MakeJob, changes: dict[str, object], expected: str) -> None:
    assert where(make_job(**changes)) == expected


def test_headline_names_machine_gpu_code_and_environment(make_job: MakeJob) -> None:
    assert headline(make_job()) == ("train-k7q → rig-b · RTX 4090 24 GB · 12 files 41 kB · environment 3f2a (cached)")


def test_headline_says_that_no_gpu_was_chosen_and_who_alone_holds_the_job(make_job: MakeJob) -> None:
    line = headline(make_job(gpus=[], gpu_request="0", detail="", held_by=["rig7"], tree_files=1))
    assert line == "train-k7q → rig-b · no GPU · 1 file 41 kB · held by rig7 only"


def test_headline_leaves_progress_out(make_job: MakeJob) -> None:
    assert "resolving" not in headline(make_job(detail="environment: resolving --pip"))


@pytest.mark.parametrize(
    ("state", "expected"), [("queued", "waits on"), ("placing", "waits on"), ("active", "goes on")]
)
def test_only_what_has_begun_goes_on(make_job: MakeJob, state: str, expected: str) -> None:
    assert goes_on(make_job(state=state)) == expected


def test_gpus_are_counted_and_shares_told_as_asked_for(make_job: MakeJob) -> None:
    card = {"uuid": "u", "name": "NVIDIA GeForce RTX 4090", "memory_bytes": 25_757_220_864}
    assert gpus(make_job(gpus=[card, card], gpu_request="2")) == "2 × RTX 4090 24 GB"
    assert gpus(make_job(gpus=[card], state="queued")) == "", "those of an attempt before"
    assert gpus(make_job(gpus=[card | {"memory_bytes": 8 * 10**9}], gpu_request="8GB")) == "8 GB of RTX 4090"
    assert gpus(make_job(gpus=[card | {"memory_bytes": 0}], gpu_request="1")) == "RTX 4090"


def test_time_counts_from_the_start_else_from_the_submission(make_job: MakeJob) -> None:
    assert run_time(make_job(), 1_700_000_045.0) == "0:40"
    assert run_time(make_job(started_at=None), 1_700_000_045.0) == "0:45"
    assert run_time(make_job(ended_at=1_700_000_005.0 + 3725), 1_800_000_000.0) == "1:02:05"


def test_plain_screens_never_speak_of_stewards_epochs_or_attempts(make_job: MakeJob) -> None:
    for state in ("draft", "queued", "placing", "active", "unknown", "cancelling", "failed", "lost", "expired"):
        job = make_job(state=state, phase=None, machine=None, started_at=None)
        text = " ".join((status(job), where(job), headline(job), waiting(job), ending(job)))
        assert not any(word in text for word in ("steward", "epoch", "attempt", "hold", "unknown"))


def test_sizes_and_spans_read_naturally() -> None:
    sizes = [0, 999, 1000, 41_000, 999_999, 1_234_567, 300_000_000, 25_800_000_000]
    assert [size(n) for n in sizes] == ["0 B", "999 B", "1.0 kB", "41 kB", "1.0 MB", "1.2 MB", "300 MB", "26 GB"]
    spans = [0, 40, 99, 180, 5 * 3600 + 600, 76 * 3600]
    assert [ago(n) for n in spans] == ["0 s", "40 s", "99 s", "3 m", "5 h 10 m", "3 d 4 h"]
    assert [clock(n) for n in (0, 725, 3725, 183_845)] == ["0:00", "12:05", "1:02:05", "2-03:04:05"]


def test_table_aligns_and_disarms_control_characters() -> None:
    lines = table(("A", "N", "TEXT"), [("x", "1", "plain"), ("long", "22", "red \x1b[31m\nline")], frozenset({"N"}))
    assert lines == ["A      N  TEXT", "x      1  plain", "long  22  red \\x1b[31m\\nline"]
    assert plain("café →") == "café →"


def test_colour_only_on_a_terminal_and_not_under_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert colour("x", RED, Terminal()) == "\x1b[1;31mx\x1b[0m"
    assert colour("x", RED, io.StringIO()) == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert colour("x", RED, Terminal()) == "x"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["python", "train.py", "--lr", "1"], "train"),
        (["python3", "-u", "src/fit_net.py"], "fit_net"),
        (["python", "-m", "pkg.tool.train", "x"], "train"),
        (["nvidia-smi", "-L"], "nvidia-smi"),
        (["./run.sh"], "run"),
        (["/usr/bin/make", "all"], "make"),
        (["cd src && python eval.py | tee log"], "eval"),
        (["echo 'unclosed"], "echo"),
        (["git", "commit", "-m", "more"], "git"),
        (["git commit -m 'much more'"], "git"),
        (["true;/bin/ls -l"], "true"),
        (["(cd x && ls)"], "cd"),
        (["/opt/env/bin/python3.12 -u -m pkg.train x"], "train"),
    ],
)
def test_job_is_named_after_its_script_else_its_program(command: list[str], expected: str) -> None:
    assert job_name(command) == expected


def test_single_argument_with_white_space_is_for_a_shell() -> None:
    assert is_shell(["echo $HOME | wc"])
    assert not is_shell(["nvidia-smi"])
    assert not is_shell(["echo", "a b"])


def test_env_takes_values_as_given_or_as_they_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "1")
    monkeypatch.delenv("NOT_HERE", raising=False)
    assert parse_env(["A=b=c", "E=", "HERE"]) == {"A": "b=c", "E": "", "HERE": "1"}
    for bad in ("NOT_HERE", "1A=2", "=x"):
        with pytest.raises(MeshgpuError, match="cannot") as caught:
            parse_env([bad])
        assert caught.value.code == "bad-request"


def test_memory_is_decimal_and_wants_a_unit() -> None:
    assert [parse_memory(text) for text in ("8GB", "500MB", "1.5 gb")] == [8 * 10**9, 500 * 10**6, 1_500_000_000]
    for bad in ("8", "lots", "-1GB"):
        with pytest.raises(MeshgpuError, match="expected 8GB"):
            parse_memory(bad)
