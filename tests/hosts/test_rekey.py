"""A machine takes new keys: the same to all within seconds, its old keys good for nothing, and never locked out."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.hosts]


@pytest.fixture(scope="module")
def lab(office: Any) -> Any:
    """ada founded it on nas and has a rig; bob is a colleague with a machine of his own."""
    ada, rig, bob = office.host("nas"), office.host("rig"), office.host("bob")
    office.form_mesh(ada, rig)
    office.join(ada, bob, "--user", "bob")
    return ada, rig, bob


def machine(host: Any, name: str) -> Any:
    """How a machine looks from `host`; None where it is no member there."""
    return next((row for row in host.json("machines")["machines"] if row["name"] == name), None)


def is_here(host: Any, name: str, node: str) -> bool:
    found = machine(host, name)
    return found is not None and found["id"] == node and found["state"] == "alive"


OPENS = """
import asyncio, sys
from pathlib import Path
from meshgpu.adapters.boot_clock import BootClock
from meshgpu.adapters.grpc_link import GrpcLink
from meshgpu.adapters.key_files import KeyFiles
from meshgpu.adapters.sqlite_store import SqliteStore
from meshgpu.core.node import take_up
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.ports import Anchor
from meshgpu.wire.codec import decode, kind_of
from meshgpu.wire.notary import WireNotary

async def main(home, address, name):
    keys = KeyFiles(home / "keys")
    log = MeshLog(WireNotary(keys.sign, keys.verify))
    kinds = {"mesh": "MeshRecord", "log": "MeshLogRecord"}
    rows = SqliteStore(home / "state.db").load().items()
    take_up(log, [decode(kind_of(kinds[kind]), data) for (kind, _), data in rows if kind in kinds])
    member = log.member_named(name)
    heard = asyncio.Queue()
    link = GrpcLink(keys, BootClock(), ())
    await link.start(heard.put_nowait, None)
    link.trust([Anchor(member.node, member.device_ca, False)])
    link.dial(member.node, address)
    print(type(await asyncio.wait_for(heard.get(), 10)).__name__)
    await link.stop()

asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
"""


def opens(host: Any, other: Any, name: str) -> str:
    """How a dial of `other` ends with the keys that lie on `host`."""
    home = host.home.parent / "look"  # its agent may run, and keeps its files to itself
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(host.home, home, ignore=shutil.ignore_patterns("*.sock", "*.lock"))
    command = host.argv(sys.executable, "-c", OPENS, str(home), f"{other.address}:7443", name)
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def last_leaves(host: Any) -> list[str]:
    return [path.name for path in (host.home / "keys").glob("last-leaf-*")]


def test_machine_is_the_same_to_all_under_new_keys(
    lab: Any, office: Any, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    ada, rig, bob = lab
    job = json.loads(ada.meshgpu("run", "-d", "--json", "-m", "rig", "--", "echo", "hello", directory=tmp_path).stdout)
    ada.meshgpu("wait", job["id"])
    rig.meshgpu("down")
    ghost = office.host("ghost")  # a thief's, with a copy of the keys
    shutil.copytree(rig.home, ghost.home, ignore=shutil.ignore_patterns("*.sock", "*.lock"))
    assert opens(ghost, ada, "nas") == "LinkOpened"
    rig.meshgpu("up")
    before, pid = machine(rig, "rig"), rig.agent_pid()
    wait_until(lambda: is_here(ada, "rig", before["id"]) and is_here(bob, "rig", before["id"]))

    renewed = json.loads(rig.meshgpu("rekey", "--yes", "--json").stdout)
    assert (renewed["name"], renewed["before"], renewed["away"]) == ("rig", before["id"], [])
    began = time.monotonic()
    for host in (ada, bob, rig):
        wait_until(lambda host=host: is_here(host, "rig", renewed["node"]), f"{host.name} does not see it")
    assert time.monotonic() - began < 15.0
    assert len(ada.json("machines")["machines"]) == 3
    after = machine(ada, "rig")
    assert (after["owner"], after["roles"]) == (before["owner"], before["roles"])
    assert (
        f"rig goes on under new keys: {renewed['node']}, before that {before['id']}"
        in ada.home.joinpath("agent.log").read_text()
    )

    assert rig.agent_pid() == pid, "whoever watches the process still does"
    assert rig.meshgpu("run", "-m", "bob", "--", "echo", "from rig", directory=tmp_path).stdout == "from rig\n"
    assert bob.meshgpu("run", "-m", "rig", "--", "echo", "on rig", directory=tmp_path).stdout == "on rig\n"
    assert "hello" in ada.meshgpu("logs", job["id"]).stdout, "what ran there before is still found"
    assert job["display"] in rig.meshgpu("ps", "-a").stdout
    assert [opens(ghost, ada, "nas"), opens(ghost, bob, "bob")] == ["DialFailed", "DialFailed"]
    assert opens(rig, ada, "nas") == "LinkOpened", "so it was for the keys"


def test_admin_stays_one(lab: Any, office: Any, wait_until: Callable[..., None]) -> None:
    ada, rig, bob = lab
    (before,) = bob.json("admin", "ls")["admins"]
    assert "is " in ada.meshgpu("rekey", "--yes").stdout
    wait_until(lambda: bob.json("admin", "ls")["admins"][0]["key"] != before["key"])
    (after,) = bob.json("admin", "ls")["admins"]
    assert (after["user"], after["machine"]) == (before["user"], before["machine"])
    cyd = office.host("cyd")
    office.join(ada, cyd, "--user", "cyd")
    wait_until(lambda: machine(rig, "cyd") is not None and machine(bob, "cyd") is not None)
    cyd.meshgpu("leave", "--yes")


def test_machine_that_runs_or_holds_something_is_told_to_wait(
    lab: Any, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    _, rig, bob = lab
    job = json.loads(bob.meshgpu("run", "-d", "--json", "-m", "rig", "--", "sleep", "600", directory=tmp_path).stdout)
    before = machine(rig, "rig")["id"]
    running = "cannot take new keys: jobs run here (sleep)\nhint: meshgpu pause"
    wait_until(lambda: running in rig.meshgpu("rekey", "--yes", code=125).stderr)
    assert machine(rig, "rig")["id"] == before
    assert not (rig.home / "keys" / "next").exists()
    bob.meshgpu("kill", job["id"])
    bob.meshgpu("wait", job["id"], code=None)
    wait_until(lambda: rig.meshgpu("rekey", "--yes", code=None).returncode == 0, "it never could")
    wait_until(lambda: machine(bob, "rig")["id"] not in (before, None) and machine(bob, "rig")["state"] == "alive")


def test_nobody_at_the_terminal_is_no_yes(lab: Any) -> None:
    _, rig, _ = lab
    before = machine(rig, "rig")["id"]
    assert "cannot ask" in rig.meshgpu("rekey", code=2).stderr
    assert machine(rig, "rig")["id"] == before


def test_machine_alone_is_let_in_by_all_when_they_are_back(lab: Any, wait_until: Callable[..., None]) -> None:
    """Twice, so that the others know neither the new keys nor those between."""
    ada, rig, bob = lab
    wait_until(lambda: not last_leaves(rig), "everybody knows of the last time", 60.0)
    for host in (ada, bob):
        host.meshgpu("down")
    first = rig.meshgpu("rekey", "--yes")
    assert "told when they answer: bob, nas" in first.stderr
    second = json.loads(rig.meshgpu("rekey", "--yes", "--json").stdout)
    assert len(last_leaves(rig)) == 2
    bob.meshgpu("up")
    wait_until(lambda: is_here(bob, "rig", second["node"]), "bob does not let it in", 60.0)
    ada.meshgpu("up")
    wait_until(lambda: is_here(ada, "rig", second["node"]), "nas does not let it in", 60.0)
    wait_until(lambda: not last_leaves(rig), "everybody knows, but something of the old keys is kept", 60.0)


@pytest.mark.parametrize("after_s", [0.0, 0.2, 0.6, 1.0])
def test_agent_that_is_killed_meanwhile_is_the_old_member_or_the_new_one(
    lab: Any, wait_until: Callable[..., None], after_s: float
) -> None:
    ada, rig, bob = lab
    before = machine(rig, "rig")["id"]
    with rig.start("rekey", "--yes") as command:
        time.sleep(after_s)
        rig.kill_agent()
        command.kill()
        command.communicate()
    rig.meshgpu("up")
    node = machine(rig, "rig")["id"]
    wait_until(lambda: is_here(ada, "rig", node) and is_here(bob, "rig", node), "it is locked out", 60.0)
    assert not (rig.home / "keys" / "next").exists()
    assert (node == before) == ("goes on under new keys" not in _since(rig, before))


def _since(host: Any, before: str) -> str:
    """What its agent noted about the keys that it had until now."""
    lines = (host.home / "agent.log").read_text().splitlines()
    return "\n".join(line for line in lines if line.endswith(f"before that {before}"))


def test_revoked_by_somebody_who_had_not_heard_of_its_new_keys_it_is_out(
    lab: Any, wait_until: Callable[..., None]
) -> None:
    ada, rig, bob = lab
    wait_until(lambda: not last_leaves(rig), "everybody knows of the last time", 60.0)
    ada.cut()
    wait_until(lambda: machine(rig, "nas")["state"] == "down", "the cable is out", 60.0)
    renewed = json.loads(rig.meshgpu("rekey", "--yes", "--json").stdout)
    wait_until(lambda: is_here(bob, "rig", renewed["node"]))
    ada.meshgpu("revoke", "rig", "--yes")
    ada.heal()
    for host in (ada, bob):
        wait_until(lambda host=host: machine(host, "rig") is None, f"it is still there for {host.name}", 60.0)
    wait_until(lambda: "no member of lab any more" in rig.meshgpu("doctor", code=None).stdout, "it was not told", 60.0)
    wait_until(lambda: machine(ada, "bob")["state"] == "alive", "they have not met", 60.0)
    assert [machine(host, "rig") for host in (ada, bob)] == [None, None]
    assert [opens(rig, host, host.name) for host in (ada, bob)] == ["DialFailed", "DialFailed"]
