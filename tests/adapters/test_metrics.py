"""What a job reports of its objective, as its node reads it."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meshgpu.adapters.inside import LIBRARY
from meshgpu.adapters.metrics import FILE, LINE_LIMIT_BYTES, MetricReader, compile_pattern
from meshgpu.errors import MeshgpuError
from meshgpu.guard import LEDGER_HEADER
from meshgpu.model.sweep import Goal, Metric, Objective

LOSS = Objective("loss", Goal.MIN, "")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path


def report(directory: Path, *lines: object) -> None:
    with (directory / "work" / FILE).open("a") as file:
        file.writelines(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)


def printed(directory: Path, *pieces: tuple[int, bytes]) -> None:
    """Records of the ledger: (1 for stdout or 2 for stderr, bytes)."""
    with (directory / "log").open("ab") as file:
        for stream, data in pieces:
            file.write(LEDGER_HEADER.pack(stream, 0.0, len(data)) + data)


def test_last_and_best_are_told_as_they_come(directory: Path) -> None:
    reader = MetricReader(directory, LOSS)
    assert reader.read() is None
    report(directory, {"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.3}, {"step": 3, "loss": 0.4})
    assert reader.read() == Metric(0.4, 0.3, 3)
    assert reader.read() == Metric(0.4, 0.3, 3)
    report(directory, {"loss": 0.2})
    assert reader.read() == Metric(0.2, 0.2, None)


def test_more_is_better_where_the_goal_says_so(directory: Path) -> None:
    report(directory, {"loss": 1}, {"loss": 3}, {"loss": 2})
    assert MetricReader(directory, Objective("loss", Goal.MAX, "")).read() == Metric(2, 3)


def test_half_a_line_waits_for_its_rest(directory: Path) -> None:
    reader = MetricReader(directory, LOSS)
    report(directory, '{"loss": 0.')
    assert reader.read() is None
    report(directory, "25}\n")
    assert reader.read() == Metric(0.25, 0.25)


NONSENSE = (
    "junk",
    "[1]",
    '{"loss": "0.1"}',
    '{"loss": NaN}',
    '{"loss": 1e999}',
    '{"loss": true}',
    '{"loss": null}',
    '{"other": 1}',
    "[" * 5000,
    '{"loss": 1' + "0" * 400 + "}",
    "\0\xff",
    "x" * LINE_LIMIT_BYTES * 3,
)


@pytest.mark.parametrize("line", NONSENSE)
def test_nonsense_is_passed_over(directory: Path, line: str) -> None:
    report(directory, line + "\n", {"loss": 0.5, "step": -3})
    assert MetricReader(directory, LOSS).read() == Metric(0.5, 0.5, None)


def test_what_is_no_file_is_not_read(directory: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"loss": 1}\n')
    path = directory / "work" / FILE
    path.symlink_to(secret)
    assert MetricReader(directory, LOSS).read() is None
    path.unlink()
    os.mkfifo(path)
    assert MetricReader(directory, LOSS).read() is None


def test_pattern_finds_numbers_in_whole_lines_of_either_stream(directory: Path) -> None:
    reader = MetricReader(directory, Objective("loss", Goal.MIN, r"loss[= ]([-+0-9.eE]+)"))
    printed(
        directory, (1, b"epoch 1 loss=0."), (2, b"loss 9\n"), (1, b"75 ok\nnothing here\nloss=oops\nloss=0.5\nloss=0")
    )
    assert reader.read() == Metric(0.5, 0.5)
    printed(directory, (1, b".125\n"))
    assert reader.read() == Metric(0.125, 0.125)


def test_pattern_without_a_group_takes_all_that_it_matches(directory: Path) -> None:
    printed(directory, (1, b"acc: 0.5\n"))
    assert MetricReader(directory, Objective("acc", Goal.MAX, r"[0-9.]+")).read() == Metric(0.5, 0.5)


def test_hostile_pattern_cannot_hang_the_agent(directory: Path) -> None:
    printed(directory, (1, b"a" * 30_000 + b"\n"))
    began_s = time.monotonic()
    MetricReader(directory, Objective("x", Goal.MIN, r"(a+)+$b")).read()
    assert time.monotonic() - began_s < 5


@pytest.mark.parametrize("pattern", ["(", "[", "(?=x)", "*"])
def test_pattern_that_is_none_is_refused(pattern: str) -> None:
    with pytest.raises(MeshgpuError, match="cannot use the pattern") as raised:
        compile_pattern(pattern)
    assert raised.value.hint


def test_broken_ledger_ends_nothing(directory: Path) -> None:
    (directory / "log").write_bytes(struct.pack("<Q", 2**60) * 9)
    assert MetricReader(directory, Objective("x", Goal.MIN, "x")).read() is None


# -- the module in the job ---------------------------------------------------------------------------------------------


def in_job(directory: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(LIBRARY), "MESHGPU_METRICS": str(directory / "work" / FILE)},
        capture_output=True,
        text=True,
        check=True,
        cwd=directory,
    )


def test_job_reports_numbers_of_any_kind_and_never_fails_for_it(directory: Path) -> None:
    in_job(
        directory,
        "import meshgpu, decimal\n"
        "class Tensor:\n"
        "    def __float__(self): return 0.25\n"
        "class Bad:\n"
        "    def __float__(self): raise RuntimeError('has a gradient')\n"
        "meshgpu.log(step=1, loss=0.5)\n"
        "meshgpu.log(step='x', loss=9)\n"
        "meshgpu.log(loss=Bad()); meshgpu.log(loss=None); meshgpu.log(loss=float('nan')); meshgpu.log()\n"
        "meshgpu.log(step=2, loss=Tensor(), accuracy=decimal.Decimal(1))\n",
    )
    lines = (directory / "work" / FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"loss": 0.5, "step": 1},
        {"loss": 0.25, "accuracy": 1.0, "step": 2},
    ]
    assert MetricReader(directory, LOSS).read() == Metric(0.25, 0.25, 2)


def test_module_does_nothing_outside_a_job_and_hides_no_installed_one(tmp_path: Path) -> None:
    code = "import meshgpu; meshgpu.log(loss=1); import meshgpu.errors; print(meshgpu.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(LIBRARY)},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == str(LIBRARY / "meshgpu.py")
