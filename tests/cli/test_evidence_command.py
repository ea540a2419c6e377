"""The commands `audit`, `info --receipt` and `info --verify`."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import Result

if TYPE_CHECKING:
    from tests.cli.conftest import StubAgent

Cli = Callable[..., Result]
RECEIPT = "GET /v1/jobs/train/receipt"
CHECK = "POST /v1/receipts/check"


@pytest.fixture(autouse=True)
def in_utc() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


def entry(seq: int, event: str, **changes: Any) -> dict[str, Any]:
    return {
        "seq": seq,
        "at": 1_800_000_000.0,
        "event": event,
        "job": "k7qd" + "a" * 22,
        "name": "train",
        "epoch": 1,
        "user": "ada",
        "key": "u" * 52,
        "spec": "f" * 64,
        "fenced": True,
        "gpus": ["GPU-1a2b3c4d-5e6f"],
        "outcome": None,
        "exit_code": None,
        "receipt": None,
        "fault": None,
    } | changes


def receipt(**changes: Any) -> dict[str, Any]:
    facts = {
        "mesh": "e" * 64,
        "job": "k7qd" + "a" * 22,
        "name": "train",
        "user": "ada",
        "user_key": "u" * 52,
        "command": "python train.py",
        "image_asked": "",
        "attempt": 2,
        "node": "n" * 52,
        "fenced": True,
        "gpus": ["GPU-1"],
        "driver": "580.1",
        "request": "f" * 64,
        "code": "c" * 64,
        "environment": "e" * 32,
        "image": "",
        "outcome": "exited",
        "exit_code": 0,
        "started_at": 1_800_000_000.0,
        "ended_at": 1_800_000_060.0,
        "log": "1" * 64,
    }
    checks = [
        {"about": "request", "holds": True, "found": "signed by ada on nas"},
        {"about": "log", "holds": None, "found": "not compared: rig2 is away"},
    ]
    return {"facts": facts, "proof": "AAAA", "checks": checks, "holds": True} | changes


def test_audit_shows_who_ran_what(cli: Cli, stub: "StubAgent") -> None:
    done = entry(1, "ended", outcome="exited", exit_code=3, epoch=2, gpus=[], fenced=False)
    stub.on("GET /v1/audit", {"entries": [entry(0, "accepted"), done, {"fault": "entry 2 cannot be read"}]})
    shown = cli("audit", "-n", "3")
    assert shown.stdout.splitlines() == [
        "NO  WHEN                 USER  JOB            WHAT                    GPU           SHUT IN",
        " 0  2027-01-15 08:00:00  ada   train-k7q      accepted                GPU-1a2b3c4d  yes",
        " 1  2027-01-15 08:00:00  ada   train-k7q (2)  exited, code 3          –             no",
        "!!                                            entry 2 cannot be read",
    ]
    assert stub.targets()[-1] == "GET /v1/audit?count=3"


def test_whole_audit_is_said_to_be_so(cli: Cli, stub: "StubAgent") -> None:
    stub.on("GET /v1/audit/verdict", {"count": 1234, "head": "ab" * 32, "fault": None})
    assert cli("audit", "--verify").stdout == f"1,234 entries, whole: sha256 {'ab' * 32}\n"


def test_broken_audit_is_an_error_with_exit_code_1(cli: Cli, stub: "StubAgent") -> None:
    stub.on(
        "GET /v1/audit/verdict", {"count": 2, "head": None, "fault": "cannot trust the audit: entry 2 is not there"}
    )
    result = cli("audit", "--verify")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: cannot trust the audit: entry 2 is not there\n")


def test_receipt_is_printed_and_each_check_has_a_line(cli: Cli, stub: "StubAgent") -> None:
    stub.on(RECEIPT, receipt())
    shown = cli("info", "train", "--receipt").stdout
    assert "came to      exited, code 0\n" in shown
    assert "attempt      2\n" in shown
    assert shown.endswith("ok  request   signed by ada on nas\n--  log       not compared: rig2 is away\n")


def test_receipt_that_does_not_hold_is_an_error(cli: Cli, stub: "StubAgent") -> None:
    wrong = [{"about": "run", "holds": False, "found": "the signature does not hold"}]
    stub.on(RECEIPT, receipt(facts=None, checks=wrong, holds=False))
    result = cli("info", "train", "--receipt")
    assert (result.exit_code, result.stdout) == (1, "!!  run       the signature does not hold\n")
    assert result.stderr == "error: this receipt does not hold\n"


def test_kept_receipt_is_sent_to_be_checked_as_it_is(cli: Cli, stub: "StubAgent", tmp_path: Path) -> None:
    stub.on(RECEIPT, receipt())
    stub.on(CHECK, receipt())
    file = tmp_path / "receipt.json"
    file.write_text(cli("info", "train", "--receipt", "--json").stdout)
    assert cli("info", "--verify", str(file)).exit_code == 0
    assert stub.body(CHECK) == json.loads(file.read_text())


@pytest.mark.parametrize(
    ("text", "fault"), [("{}", "it is no receipt"), ("[1]", "it is no receipt"), ("no", "it is no JSON")]
)
def test_file_that_is_no_receipt_is_refused(cli: Cli, stub: "StubAgent", tmp_path: Path, text: str, fault: str) -> None:
    file = tmp_path / "receipt.json"
    file.write_text(text)
    result = cli("info", "--verify", str(file))
    assert result.exit_code == 2
    assert fault in result.stderr
    assert stub.targets() == []


def test_missing_and_huge_files_are_refused(cli: Cli, stub: "StubAgent", tmp_path: Path) -> None:
    assert "No such file" in cli("info", "--verify", str(tmp_path / "none")).stderr
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(3 * 2**20)
    assert "too large for a receipt" in cli("info", "--verify", str(tmp_path / "huge")).stderr
    assert stub.targets() == []


def test_info_needs_a_job_or_a_file_and_not_both(cli: Cli, stub: "StubAgent", tmp_path: Path) -> None:
    for arguments in ((), ("train", "--verify", str(tmp_path))):
        result = cli("info", *arguments)
        assert result.exit_code == 2
        assert "name one, or a FILE to --verify" in result.stderr
    assert stub.targets() == []
