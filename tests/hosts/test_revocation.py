"""A lost laptop is out everywhere, at once; several admins; leaving and coming back."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.office import MESHGPU

pytestmark = [pytest.mark.hosts, pytest.mark.xdist_group("revocation")]

REVOKED_WITHIN_S = 2.0


@pytest.fixture(scope="module")
def lab(office: Any) -> Any:
    """ada founded it on nas and has a rig; bob and eve are colleagues with a machine each."""
    ada, rig, bob, eve = office.host("nas"), office.host("rig"), office.host("bob"), office.host("eve")
    office.form_mesh(ada, rig)
    office.join(ada, bob, "--user", "bob")
    office.join(ada, eve, "--user", "eve")
    return ada, rig, bob, eve


def names(host: Any) -> set[str]:
    return {row["name"] for row in host.json("machines")["machines"]}


def prints(host: Any, job: str) -> bool:
    """Whether the job has printed something on `host` within the last second."""
    return any(time.time() - file.stat().st_mtime < 1.0 for file in (host.home / "jobs" / job / "1").glob("log*"))


def test_one_admin_is_advised_to_make_a_second_and_the_second_admits(
    lab: Any, office: Any, wait_until: Callable[..., None]
) -> None:
    ada, _, bob, _ = lab
    assert "only one" in ada.meshgpu("admin", "ls").stderr
    refused = bob.meshgpu("invite", code=125)
    assert "no admin" in refused.stderr
    assert ada.meshgpu("admin", "add", "bob").stdout == "bob on bob is an admin now.\n"
    wait_until(lambda: len(bob.json("admin", "ls")["admins"]) == 2)
    cyd = office.host("cyd")
    office.join(bob, cyd, "--user", "cyd")
    wait_until(lambda: "cyd" in names(ada))


def test_role_says_what_a_machine_may_do(lab: Any, tmp_path: Path, wait_until: Callable[..., None]) -> None:
    ada, _, bob, eve = lab
    ada.meshgpu("role", "eve", "viewer")
    wait_until(lambda: "is a viewer" in eve.meshgpu("run", "--", "true", directory=tmp_path, code=125).stderr)
    assert names(eve) == names(ada)
    done = ada.meshgpu("run", "-m", "eve", "--", "true", directory=tmp_path, code=125)
    assert "lends nothing: it is a viewer" in done.stderr
    bob.meshgpu("role", "eve", "submitter")
    wait_until(lambda: eve.meshgpu("run", "-m", "rig", "--", "true", directory=tmp_path, code=None).returncode == 0)
    refused = eve.meshgpu("role", "eve", "rig", code=125)
    assert "no admin" in refused.stderr


def test_open_log_stream_of_a_revoked_machine_ends_within_two_seconds(
    lab: Any, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    ada, rig, bob, eve = lab
    loop = "while :; do date +%s.%N; sleep 0.1; done"  # all hosts of this office share one clock
    job = json.loads(eve.meshgpu("run", "-d", "--json", "-m", "rig", "--", loop, directory=tmp_path).stdout)["id"]
    with eve.start("logs", "-f", job) as follower:
        for _ in range(5):
            assert float(follower.stdout.readline())
        began = time.time()
        assert bob.meshgpu("revoke", "eve", "--yes").stdout == "eve is out of the mesh.\n"
        wait_until(lambda: "eve" not in names(rig) and "eve" not in names(ada), "eve is still there", REVOKED_WITHIN_S)
        time.sleep(3 * REVOKED_WITHIN_S)
        follower.kill()
        seen = [float(line) for line in follower.communicate()[0].split()]
    assert all(printed < began + REVOKED_WITHIN_S for printed in seen)
    assert prints(rig, job), "its job elsewhere goes on"
    rig.meshgpu("pause")
    wait_until(lambda: not prints(rig, job), "the owner has the last word")
    rig.meshgpu("resume")
    wait_until(lambda: "no member of lab any more" in eve.meshgpu("doctor", code=None).stdout)
    refused = eve.meshgpu("machines", code=125)
    assert "no member of the mesh lab any more" in refused.stderr
    assert eve.meshgpu("ps", code=None).returncode == 125


def test_revoked_machine_does_not_come_back_by_a_restart_and_comes_back_under_new_keys(
    lab: Any, office: Any, wait_until: Callable[..., None]
) -> None:
    ada, _, _, eve = lab
    eve.meshgpu("down")
    eve.meshgpu("up")
    assert "eve" not in names(ada)
    invite = ada.meshgpu("invite", "--user", "eve").stdout.split()[-1]
    assert "is in the mesh lab already" in eve.meshgpu("join", "--name", "eve", "--yes", invite, code=125).stderr
    eve.meshgpu("leave", "--yes")
    eve.meshgpu("join", "--name", "eve", "--yes", invite)
    wait_until(lambda: "eve" in names(ada))


def test_machine_leaves_by_itself(lab: Any, wait_until: Callable[..., None]) -> None:
    ada, _, _, eve = lab
    assert eve.meshgpu("leave", "--yes").stdout == "This machine has left lab; its agent is stopped.\n"
    wait_until(lambda: "eve" not in names(ada))
    eve.meshgpu("up")
    assert "in no mesh" in eve.meshgpu("machines", code=125).stderr


def test_admin_is_removed_and_the_last_one_is_not(lab: Any, wait_until: Callable[..., None]) -> None:
    ada, _, bob, _ = lab
    bob.meshgpu("admin", "remove", "--yes", "bob")
    wait_until(lambda: len(ada.json("admin", "ls")["admins"]) == 1)
    refused = bob.meshgpu("revoke", "rig", "--yes", code=125)
    assert "no admin" in refused.stderr
    refused = ada.meshgpu("admin", "remove", "--yes", ada.json("admin", "ls")["admins"][0]["user"] + "@nas", code=125)
    assert "no admin would be left" in refused.stderr


def test_nobody_at_the_terminal_is_no_yes(lab: Any) -> None:
    ada = lab[0]
    done = ada.meshgpu("revoke", "rig", code=2)
    assert "cannot ask" in done.stderr
    assert "rig" in names(ada)


def test_recovery_key_makes_an_admin_where_the_only_one_is_lost(office: Any, wait_until: Callable[..., None]) -> None:
    first, second = office.host("first"), office.host("second")
    founded = json.loads(first.meshgpu("init", "--mesh", "den", "--name", "first", "--yes", "--json").stdout)
    office.join(first, second)
    first.meshgpu("down")
    assert "not the recovery key" in _recover(second, "wrong words").stderr
    assert "is an admin now" in _recover(second, founded["recovery_key"]).stdout
    second.meshgpu("revoke", "first", "--yes")
    first.meshgpu("up")
    wait_until(
        lambda: "no member of den any more" in first.meshgpu("doctor", code=None).stdout or len(names(second)) == 1
    )


def _recover(host: Any, words: str) -> Any:
    return subprocess.run(
        host.argv(MESHGPU, "recover"),
        env=host.environment(),
        input=f"{words}\n",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
