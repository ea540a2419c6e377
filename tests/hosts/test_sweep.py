"""Sweeps over real agents: trials on two machines, numbers by both ways, the table, the export."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.hosts]

TRAIN = """
import sys, time, meshgpu
lr = float(sys.argv[1])
for step in range(3):
    loss = abs(lr - 0.01) + 1 / (step + 1)
    meshgpu.log(step=step, loss=loss)
    print(f"loss={loss}", flush=True)
sys.exit(3 if sys.argv[2] == "fail" else 0)
"""


@pytest.fixture(scope="module")
def lab(office: Any) -> list[Any]:
    hosts = [office.host(name) for name in ("ada", "bob")]
    office.form_mesh(*hosts)
    return hosts


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path


def test_grid_runs_every_trial_and_names_the_best(lab: list[Any], project: Path) -> None:
    ada, bob = lab
    done = ada.meshgpu(
        "sweep", "grid", "--param", "lr=0.1,0.01,0.001", "--param", "tag=a,b c", "--parallel", "3",
        "--metric", "loss:min",
        "--", "python", "train.py", "{lr}", ":tag:", directory=project,
    )  # fmt: skip
    assert "6 trials: 6 succeeded" in done.stderr
    assert "best: #3  lr=0.01 tag=a  loss 0.33333" in done.stderr
    (sweep,) = bob.json("sweep", "ls")["sweeps"]
    assert sweep["state"] == "succeeded"
    view = bob.json("sweep", "status", sweep["display"])
    assert len({trial["id"] for trial in view["trials"]}) == 6
    assert all(trial["epoch"] == 1 for trial in view["trials"])
    exported = bob.meshgpu("sweep", "export", sweep["id"]).stdout
    rows = list(csv.DictReader(io.StringIO(exported)))
    assert [(row["param.lr"], row["param.tag"]) for row in rows][:2] == [("0.1", "a"), ("0.1", "b c")]
    assert float(rows[0]["last"]) == pytest.approx(0.09 + 1 / 3)
    assert "← best" in bob.meshgpu("sweep", "status", sweep["id"]).stdout


def test_numbers_come_from_the_log_and_a_failed_trial_fails_the_sweep(lab: list[Any], project: Path) -> None:
    ada, _ = lab
    done = ada.meshgpu(
        "sweep", "random", "--param", "lr=0.001:0.1:log", "--param", "tag=ok,fail", "--trials", "5", "--seed", "3",
        "--metric", "loss:min", "--metric-regex", "loss=([0-9.e-]+)",
        "--", "python", "train.py", "{lr}", "{tag}", directory=project, code=1,
    )  # fmt: skip
    assert "failed (3)" in done.stdout
    assert "loss 0.3" in done.stderr


def test_sweep_is_stopped_with_all_its_trials(lab: list[Any], tmp_path: Path, wait_until: Callable[..., None]) -> None:
    ada, bob = lab
    (tmp_path / "sleep.py").write_text("import time\ntime.sleep(600)\n")
    done = ada.meshgpu(
        "sweep", "grid", "--param", "n=1,2,3,4,5,6", "--parallel", "2", "-d", "--json",
        "--", "python", "sleep.py", "{n}", directory=tmp_path,
    )  # fmt: skip
    name = json.loads(done.stdout)["id"]
    wait_until(lambda: sum(t["phase"] == "running" for t in ada.json("sweep", "status", name)["trials"]) == 2)
    bob.meshgpu("sweep", "stop", name)
    wait_until(lambda: ada.json("sweep", "status", name)["sweep"]["state"] == "cancelled")
    assert [t["state"] for t in ada.json("sweep", "status", name)["trials"]] == ["cancelled"] * 2


def test_steward_that_is_killed_goes_on_with_the_sweep(
    lab: list[Any], project: Path, wait_until: Callable[..., None]
) -> None:
    ada, bob = lab
    (project / "slow.py").write_text("import time\ntime.sleep(1.5)\n")
    done = ada.meshgpu(
        "sweep", "grid", "--param", "n=1,2,3,4,5,6", "--parallel", "2", "-d", "--json",
        "--", "python", "slow.py", "{n}", directory=project,
    )  # fmt: skip
    name = json.loads(done.stdout)["id"]
    holder = ada if ada.json("info", name)["job"]["held_by"] == ["ada"] else bob
    wait_until(lambda: any(t["state"] == "succeeded" for t in ada.json("sweep", "status", name)["trials"]))
    holder.kill_agent()
    holder.meshgpu("up")
    wait_until(lambda: _state(ada, name) == "succeeded", "the sweep did not go on", seconds=60)
    trials = ada.json("sweep", "status", name)["trials"]
    assert [trial["state"] for trial in trials] == ["succeeded"] * 6


def _state(host: Any, name: str) -> str:
    done = host.meshgpu("sweep", "status", name, "--json", code=None)
    return str(json.loads(done.stdout)["sweep"]["state"]) if done.returncode == 0 else ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("grid", "--param", "lr=1:2", "--", "true", "{lr}"), "name its values"),
        (("grid", "--param", "lr=1,2", "--", "true"), "has no place for lr"),
        (("grid", "--param", "lr", "--", "true", "{lr}"), "expected NAME="),
        (("random", "--param", "lr=2:1", "--trials", "3", "--", "true", "{lr}"), "expected a smaller"),
        (("grid", "--param", "lr=1,2", "--metric", "loss", "--", "true", "{lr}"), "expected NAME:min"),
        (("grid", "--param", "lr=1,2", "--metric-regex", "x", "--", "true", "{lr}"), "without --metric"),
        (
            ("grid", "--param", "lr=1,2", "--metric", "l:min", "--metric-regex", "(", "--", "true", "{lr}"),
            "the pattern",
        ),
        (("status", "nothing-like-it"), "cannot find"),
    ],
)
def test_what_makes_no_sense_is_refused_with_words(lab: list[Any], project: Path, arguments: Any, says: str) -> None:
    done = lab[0].meshgpu("sweep", *arguments, directory=project, code=None)
    assert done.returncode in (2, 125)
    assert says in done.stderr
    assert "hint:" in done.stderr
