"""`meshgpu logs` between real machines: which part it shows; no line is lost or doubled when either end restarts."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from tests.hosts.office import Host, Office, until

pytestmark = [pytest.mark.hosts]

PRINT = """
import sys, time
for number in range(int(sys.argv[1])):
    print("line", number, flush=True)
    if number % 10 == 0:
        print("err", number, file=sys.stderr, flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def lab(office: Office) -> list[Host]:
    """ada follows what bob runs; a gigabyte of a log would take too long here, so bob keeps 20 MB."""
    hosts = [office.host("ada"), office.host("bob", MESHGPU_KEEP_LOG_GB="0.02")]
    office.form_mesh(*hosts)
    return hosts


@pytest.fixture
def submit(lab: list[Host], tmp_path: Path) -> Callable[..., str]:
    (tmp_path / "print.py").write_text(PRINT)

    def run(*command: str, flags: tuple[str, ...] = ()) -> str:
        done = lab[0].meshgpu("run", "-d", "--json", "-m", "bob", *flags, "--", *command, directory=tmp_path)
        return str(json.loads(done.stdout)["id"])

    return run


def numbers(text: str, word: str = "line") -> list[int]:
    return [int(number) for number in re.findall(rf"^{word} (\d+)$", text, re.MULTILINE)]


def test_parts_of_a_log(lab: list[Host], submit: Callable[..., str]) -> None:
    ada, bob = lab
    job = submit("python", "print.py", "100", "0.02")
    ada.meshgpu("wait", job)
    for host in (ada, bob):
        whole = host.meshgpu("logs", job)
        assert (numbers(whole.stdout), numbers(whole.stderr, "err")) == (list(range(100)), list(range(0, 100, 10)))
    assert numbers(ada.meshgpu("logs", "-n", "3", "--stdout", job).stdout) == [97, 98, 99]
    some = ada.meshgpu("logs", "-n", "2", "--stderr", "-t", job)
    assert some.stdout == ""
    stamped = [line.split(" ", 1) for line in some.stderr.splitlines()]
    assert [text for _, text in stamped] == ["err 80", "err 90"]
    moment = datetime.fromisoformat(stamped[1][0]).timestamp()
    assert abs(moment - time.time()) < 60
    since = ada.meshgpu("logs", "--since", stamped[1][0], "--stdout", job).stdout
    assert numbers(since) in (list(range(90, 100)), list(range(91, 100)))
    assert numbers(ada.meshgpu("logs", "-f", "-n", "1", "--stdout", job).stdout) == [99]


def test_no_line_is_lost_or_doubled_when_either_agent_is_killed(lab: list[Host], submit: Callable[..., str]) -> None:
    ada, bob = lab
    job = submit("python", "print.py", "300", "0.05")
    until(lambda: "line 5\n" in ada.meshgpu("logs", job).stdout)
    follower, late = ada.start("logs", "-f", job), ada.start("logs", "-f", "-n", "0", "--stdout", job)
    for host in (bob, ada, bob):
        time.sleep(1.5)
        host.kill_agent()
        time.sleep(0.5)
        host.meshgpu("up")
    out, err = follower.communicate(timeout=60)
    assert follower.returncode == 0, err
    assert numbers(out) == list(range(300))
    assert numbers(err, "err") == list(range(0, 300, 10))
    out, err = late.communicate(timeout=60)
    assert late.returncode == 0, err
    first = numbers(out)[0]
    assert first > 5
    assert numbers(out) == list(range(first, 300))


def test_earlier_attempt_is_read_and_a_missing_one_is_named(lab: list[Host], submit: Callable[..., str]) -> None:
    ada, bob = lab
    script = "test -e ../../again || { touch ../../again; echo first; sleep 600; }; echo second"
    job = submit("sh", "-c", script, flags=("--retries", "1"))
    until(lambda: ada.meshgpu("logs", job).stdout == "first\n")
    guard = json.loads((bob.home / "jobs" / job / "1" / "guard.json").read_text())
    os.kill(guard["pid"], signal.SIGKILL)
    ada.meshgpu("wait", job)
    newest = ada.json("info", job)["job"]["epoch"]
    assert newest > 1
    assert ada.meshgpu("logs", job).stdout == "second\n"
    assert ada.meshgpu("logs", "--attempt", "1", job).stdout == "first\n"
    assert ada.meshgpu("logs", "-f", "--attempt", str(newest), job).stdout == "second\n"
    missing = ada.meshgpu("logs", "--attempt", "9", job, code=None)
    assert missing.returncode == 125
    assert f"there are 1 (bob), {newest} (bob)" in missing.stderr


def test_endless_log_keeps_its_newest_part_and_says_so(lab: list[Host], submit: Callable[..., str]) -> None:
    ada, bob = lab
    job = submit("sh", "-c", "seq 1 5000000")
    ada.meshgpu("wait", job)
    kept = sum(path.stat().st_size for path in bob.home.glob(f"jobs/{job}/1/log*"))
    assert kept < 20_000_000
    told = ada.meshgpu("logs", job)
    assert re.search(r"… \d+ MB of earlier output were dropped\n", told.stderr)
    lines = told.stdout.splitlines()
    assert [int(line) for line in lines[1:]] == list(range(int(lines[1]), 5_000_001))
    assert ada.meshgpu("logs", "-n", "2", job).stdout == "4999999\n5000000\n"
    receipt = ada.json("info", job, "--receipt")
    assert {"about": "log", "holds": True} in [
        {name: check[name] for name in ("about", "holds")} for check in receipt["checks"]
    ]


# -- while the machine that runs it is away --------------------------------------------------------------------------


def test_end_of_a_log_is_read_while_its_machine_is_away(office: Office, tmp_path: Path) -> None:
    """From every other machine, also the one that does not hold the job; all of it is there again afterwards."""
    dee, *rigs = [office.host(name) for name in ("dee", "eve", "fay", "gil")]
    office.form_mesh(dee, *rigs)
    (tmp_path / "print.py").write_text(PRINT)
    done = dee.meshgpu(
        "run", "-d", "--json", "-m", "fay", "--", "python", "print.py", "4000", "0.01", directory=tmp_path
    )
    job = json.loads(done.stdout)["id"]
    assert "fay" in dee.json("info", job)["job"]["machine"]
    until(lambda: "line 200\n" in dee.meshgpu("logs", job).stdout)
    time.sleep(2.0)  # in which it reaches those who hold the job, on a busy machine as well
    rigs[1].cut()
    until(lambda: rigs[0].json("machines")["machines"][2]["state"] == "down", seconds=60.0)
    for host in (dee, rigs[0], rigs[2]):
        told = host.meshgpu("logs", job)
        assert re.search(r"fay has been out of touch for \d+ s; these are the last [\d.]+ kB that it sent", told.stderr)
        lines = numbers(told.stdout)
        assert lines == list(range(lines[0], lines[-1] + 1))
        assert lines[-1] >= 199
        assert numbers(host.meshgpu("logs", "-n", "2", "--stdout", job).stdout) == lines[-2:]
        stamped = host.meshgpu("logs", "--stderr", "-t", job)
        assert stamped.stdout == ""
        assert " err " in stamped.stderr
    rigs[1].heal()
    until(lambda: numbers(dee.meshgpu("logs", job, code=None).stdout)[:1] == [0], seconds=60.0)
    dee.meshgpu("kill", job)
