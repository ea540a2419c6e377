"""Machines that join by a file which was copied onto them, as an image does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.hosts]


@pytest.fixture(scope="module")
def ada(office: Any) -> Any:
    host = office.host("ada")
    host.meshgpu("init", "--mesh", "lab", "--name", "ada", "--user", "ada", "--yes")
    return host


@pytest.fixture(scope="module")
def string(ada: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("out") / "join"
    shown = ada.meshgpu("invite", "--uses", "3", "--for", "1h", "--user", "bob", "--out", str(out))
    assert (shown.stdout, "Good for 3 machines of bob" in shown.stderr) == ("", True)
    text = out.read_text()
    assert text.strip() not in shown.stderr
    return text


def lay(path: Path, text: str, mode: int = 0o600) -> Path:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def names(host: Any) -> dict[str, str]:
    return {machine["name"]: machine["owner"] for machine in host.json("machines")["machines"]}


def test_rigs_join_by_copies_of_one_file_when_they_start(
    office: Any, ada: Any, string: str, wait_until: Callable[..., None], tmp_path: Path
) -> None:
    """All are called alike, as namespaces share the computer's host name: the second gets another one."""
    system = lay(tmp_path / "etc" / "join", string)
    one = office.host("one", MESHGPU_JOIN_FILE=str(system))
    two = office.host("two")
    own = lay(two.home / "join", string)
    one.meshgpu("up")
    two.meshgpu("up")
    wait_until(lambda: len(names(ada)) == 3)
    wait_until(lambda: office.sees_all(ada, 3))
    assert sorted(names(ada).values()) == ["ada", "bob", "bob"]
    wait_until(lambda: not system.exists() and not own.exists())
    for rig in (one, two):
        assert string.strip() not in (rig.home / "agent.log").read_text()
        assert "joined the mesh lab by" in (rig.home / "agent.log").read_text()


def test_file_that_others_may_read_is_refused_and_doctor_names_it(
    office: Any, ada: Any, string: str, wait_until: Callable[..., None]
) -> None:
    open_one = office.host("open")
    path = lay(open_one.home / "join", string, 0o644)
    open_one.meshgpu("up")

    def check() -> Any:
        checks = json.loads(open_one.meshgpu("doctor", "--json", code=None).stdout)["checks"]
        return next((check for check in checks if check["name"] == "join file"), None)

    wait_until(lambda: check() is not None)
    assert (check()["ok"], "its mode is 0644" in check()["found"], path.exists()) == (False, True, True)
    assert f"cannot join by {path}: its mode is 0644" in (open_one.home / "agent.log").read_text()


def test_rig_that_was_started_before_its_inviter_could_be_reached_joins_later(
    office: Any, ada: Any, string: str, wait_until: Callable[..., None]
) -> None:
    late = office.host("late")
    path = lay(late.home / "join", string)
    late.cut()
    late.meshgpu("up")
    wait_until(lambda: "again in" in (late.home / "agent.log").read_text())
    assert path.exists()
    late.heal()
    wait_until(lambda: not path.exists(), "it did not join", 60.0)
    wait_until(lambda: len(names(late)) == len(names(ada)))
