"""Who ran what, shown afterwards: audits and receipts on real machines, and what somebody did to them."""

import contextlib
import json
import os
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.hosts]

DATABASE = "state.db"


@pytest.fixture(scope="module")
def lab(office: Any) -> Any:
    """ada founded it on nas and has a rig; bob is a colleague."""
    ada, rig, bob = office.host("nas"), office.host("rig"), office.host("bob")
    office.form_mesh(ada, rig)
    office.join(ada, bob, "--user", "bob")
    return ada, rig, bob


def run(host: Any, directory: Path, *command: str) -> str:
    done = host.meshgpu("run", "--json", "-m", "rig", "--", *command, directory=directory, code=None)
    return str(json.loads(done.stdout.splitlines()[-1])["job"]["id"])


def submit(host: Any, directory: Path, *arguments: str) -> str:
    done = host.meshgpu("run", "-d", "--json", "-m", "rig", *arguments, directory=directory)
    return str(json.loads(done.stdout)["id"])


def tamper(host: Any, change: Callable[[sqlite3.Connection], None]) -> None:
    """Do something to the database of a machine while its agent is down, which locks it."""
    host.meshgpu("down")
    with contextlib.closing(sqlite3.connect(host.home / DATABASE)) as connection, connection:
        change(connection)
    host.meshgpu("up")


def alter(seq: int, connection: sqlite3.Connection) -> None:
    """Change one bit in the middle of an entry."""
    where = "kind = 'audit' AND key = ?"
    (value,) = connection.execute(f"SELECT value FROM records WHERE {where}", (f"{seq:012d}",)).fetchone()
    altered = bytearray(value)
    altered[len(altered) // 2] ^= 1
    connection.execute(f"UPDATE records SET value = ? WHERE {where}", (bytes(altered), f"{seq:012d}"))


def forget(connection: sqlite3.Connection) -> None:
    """Take the three newest entries away, which is what one short job leaves."""
    newest = "SELECT key FROM records WHERE kind = 'audit' ORDER BY key DESC LIMIT 3"
    connection.execute(f"DELETE FROM records WHERE kind = 'audit' AND key IN ({newest})")


def test_machine_shows_who_ran_what_on_it(lab: Any, tmp_path: Path) -> None:
    ada, rig, _ = lab
    job = run(ada, tmp_path, "sh", "-c", "echo hello; exit 3")
    entries = rig.json("audit")["entries"]
    assert [(e["seq"], e["event"], e["job"], e["user"], e["exit_code"]) for e in entries] == [
        (0, "accepted", job, "root", None),
        (1, "started", job, "root", None),
        (2, "ended", job, "root", 3),
    ]
    shown = rig.meshgpu("audit", "-n", "1").stdout
    assert "exited, code 3" in shown
    assert rig.meshgpu("audit", "--verify").stdout.startswith("3 entries, whole: sha256 ")
    assert "nothing has run" in ada.meshgpu("audit").stderr
    assert ada.meshgpu("audit", "--verify").stdout == "0 entries, whole\n"


def test_receipt_goes_round_and_holds_everywhere(lab: Any, tmp_path: Path) -> None:
    ada, _, bob = lab
    job = run(ada, tmp_path, "echo", "kept")
    shown = ada.meshgpu("info", job, "--receipt").stdout
    assert "ok  log       it is the log that the machine signed for" in shown
    assert "signed by root on nas" in shown
    assert "signed by rig" in shown
    file = tmp_path / "receipt.json"
    file.write_text(ada.meshgpu("info", job, "--receipt", "--json").stdout)
    assert "it says what was signed" in bob.meshgpu("info", "--verify", str(file)).stdout
    document = json.loads(file.read_text())
    document["facts"]["exit_code"] = 1
    file.write_text(json.dumps(document))
    assert "does not say what was signed: exit_code" in bob.meshgpu("info", "--verify", str(file), code=1).stdout
    assert "cannot find a job" in bob.meshgpu("info", job, "--receipt", code=125).stderr
    file.write_text("{}")
    assert "it is no receipt" in bob.meshgpu("info", "--verify", str(file), code=2).stderr


def test_log_that_was_changed_is_named(lab: Any, tmp_path: Path) -> None:
    ada, rig, _ = lab
    job = run(ada, tmp_path, "echo", "the loss was 0.9")
    ledger = rig.home / "jobs" / job / "1" / "log"
    ledger.write_bytes(ledger.read_bytes().replace(b"0.9", b"0.1"))
    shown = ada.meshgpu("info", job, "--receipt", code=1).stdout
    assert "!!  log       it is not the log that the machine signed for" in shown


def test_job_that_never_ran_has_no_receipt(lab: Any, tmp_path: Path) -> None:
    ada, _, _ = lab
    cpus = str(os.cpu_count() or 1)
    holder = submit(ada, tmp_path, "--cpus", cpus, "--", "sleep", "100")
    job = submit(ada, tmp_path, "--cpus", cpus, "--", "true")
    assert "no attempt of it has ended" in ada.meshgpu("info", job, "--receipt", code=125).stderr
    ada.meshgpu("stop", job)
    ada.meshgpu("kill", holder)
    assert "it never ran" in ada.meshgpu("info", job, "--receipt", code=125).stderr


def test_altered_entry_is_named_by_the_machine_itself(lab: Any) -> None:
    _, rig, _ = lab
    tamper(rig, partial(alter, 1))
    refused = rig.meshgpu("audit", "--verify", code=1)
    assert "cannot trust the audit: entry 1 " in refused.stderr
    tamper(rig, partial(alter, 1))
    assert "whole" in rig.meshgpu("audit", "--verify").stdout


def test_machine_that_forgets_what_ran_on_it_is_named_by_the_others(
    lab: Any, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    ada, rig, _ = lab
    run(ada, tmp_path, "true")
    wait_until(lambda: audit_check(ada)["ok"])
    tamper(rig, forget)
    wait_until(lambda: audit_check(ada)["ok"] is False)
    assert "rig: its audit went back from entry" in audit_check(ada)["found"]
    assert "whole" in rig.meshgpu("audit", "--verify").stdout  # alone it shows nothing


def test_audit_and_receipts_hold_under_new_keys(lab: Any, tmp_path: Path, wait_until: Callable[..., None]) -> None:
    ada, rig, _ = lab
    before = run(ada, tmp_path, "echo", "before")
    count = len(rig.json("audit", "-n", "1000")["entries"])
    rig.meshgpu("rekey", "--yes")
    wait_until(lambda: any(m["name"] == "rig" and m["state"] == "alive" for m in ada.json("machines")["machines"]))
    after = run(ada, tmp_path, "echo", "after")
    assert f"{count + 3:,} entries, whole" in rig.meshgpu("audit", "--verify").stdout
    for job in (before, after):
        assert "ok  log" in ada.meshgpu("info", job, "--receipt").stdout


def audit_check(host: Any) -> Any:
    checks = json.loads(host.meshgpu("doctor", "--json", code=None).stdout)["checks"]
    return next(check for check in checks if check["name"] == "audit")
