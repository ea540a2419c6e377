"""The command `why`."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import Result

from meshgpu.client.views import JobView

if TYPE_CHECKING:
    from tests.cli.conftest import StubAgent

Cli = Callable[..., Result]
MakeJob = Callable[..., JobView]
CALL = "GET /v1/jobs/train/why"


def gpu(index: int, refusal: str = "", rule: str | None = None, remedy: str = "") -> dict[str, Any]:
    return {
        "index": index,
        "uuid": f"GPU-{index}",
        "name": "NVIDIA GeForce RTX 4090",
        "memory_total_bytes": 24_564 * 2**20,
        "takes": not refusal,
        "rule": rule or ("busy" if refusal else None),
        "refusal": refusal,
        "remedy": remedy,
    }


def machine(
    name: str, *gpus: dict[str, Any], refusal: str = "", rule: str | None = None, remedy: str = "", gives: Any = ()
) -> dict[str, Any]:
    facts = {"name": name, "takes": not refusal, "rule": rule, "refusal": refusal, "remedy": remedy}
    return facts | {"gives": list(gives), "gpus": list(gpus)}


def queued(make_job: MakeJob, **changes: Any) -> JobView:
    waits: dict[str, Any] = {
        "state": "queued",
        "phase": None,
        "machine": None,
        "started_at": None,
        "gpus": [],
        "epoch": 0,
    }
    return make_job(**(waits | {"reason": "rig-b is busy", "gpu_request": "1"} | changes))


def test_waiting_job_shows_every_machine_and_gpu_with_rule_and_remedy(
    cli: Cli, stub: "StubAgent", make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshgpu.cli.why_command.time.time", lambda: 1_700_000_180.0)
    machines = [
        machine("rig-a", gpu(0), refusal="lends nothing at the moment", rule="closed", remedy="its owner lets you in"),
        machine(
            "rig-b",
            gpu(0, "taken by x-abc (bob)", remedy="end of x-abc (bob)"),
            refusal="is busy: 0 of 1 GPUs free, taken by x-abc (bob)",
            rule="busy",
            remedy="end of x-abc (bob)",
        ),
        machine("rig-c", gpu(1), gpu(0, "lost", "faulty", "the fault is mended"), gpu(2), gives=["GPU-1"]),
        machine("rig-d", refusal="has not said yet what it has", rule="unknown", remedy="within seconds"),
    ]
    stub.on(
        CALL,
        {
            "job": queued(make_job, held_by=["rig-b"], on="cpus>=8", priority="low"),
            "machines": machines,
            "before": {"bob": 2, "ada": 1},
        },
    )
    done = cli("why", "train")
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "train-k7q is queued · waits, submitted 3 m ago · held by rig-b",
        "asked for: any machine · -g 1 · --on 'cpus>=8' · --priority low",
        "rig-b says: rig-b is busy",
        "queue: at most 3 jobs first (bob 2, yours 1)",
        "",
        "MACHINE  GPU             NOW                           WHAT WOULD CHANGE IT",
        "rig-a    RTX 4090 24 GB  lends nothing at the moment   its owner lets you in",
        "rig-b    RTX 4090 24 GB  taken by x-abc (bob)          end of x-abc (bob)",
        "rig-c    3 GPUs          takes it",
        "  [0]    RTX 4090 24 GB  lost                          the fault is mended",
        "  [1]    RTX 4090 24 GB  would be given",
        "  [2]    RTX 4090 24 GB  free and fits",
        "rig-d    -               has not said yet what it has  within seconds",
    ]


def test_job_that_was_placed_before_says_so(cli: Cli, stub: "StubAgent", make_job: MakeJob) -> None:
    stub.on(CALL, {"job": queued(make_job, epoch=2, requested_machine="rig-b"), "machines": [], "before": {}})
    shown = cli("why", "train").stdout
    assert "was placed 2 times before" in shown
    assert "asked for: rig-b · -g 1" in shown
    assert "queue: no other job goes first" in shown


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"requested_machine": "rig-b"}, "why there: -m named it"),
        ({}, "why there: of the machines that had room, one with the smallest GPUs that fit, at random"),
        ({"gpus": [], "gpu_request": "0"}, "why there: one of the machines that had room, at random"),
    ],
)
def test_running_job_says_where_and_why_there(
    cli: Cli, stub: "StubAgent", make_job: MakeJob, changes: dict[str, Any], expected: str
) -> None:
    stub.on(CALL, {"job": make_job(**changes), "machines": [machine("rig-a", gpu(0))], "before": {}})
    shown = cli("why", "train").stdout
    assert "train-k7q is running · runs, started" in shown
    assert "where: rig-b" in shown
    assert expected in shown
    assert "MACHINE" not in shown


def test_ended_job_says_how_it_ended_and_where(
    cli: Cli, stub: "StubAgent", ended: Callable[..., JobView], make_job: MakeJob
) -> None:
    stub.on(CALL, {"job": ended(3, reason="out of memory"), "machines": [], "before": {}})
    shown = cli("why", "train").stdout
    assert "train-k7q is failed (3) · ended" in shown
    assert "failed with exit code 3: out of memory" in shown
    assert "where: rig-b" in shown


def test_job_that_was_stopped_while_waiting_ran_nowhere(cli: Cli, stub: "StubAgent", make_job: MakeJob) -> None:
    stopped = queued(make_job, state="cancelled", ended_at=1_700_000_009.0, reason="stopped before it started")
    stub.on(CALL, {"job": stopped, "machines": [], "before": {}})
    assert "where: nowhere, it never began" in cli("why", "train").stdout


def test_json_is_the_agents_whole_answer(cli: Cli, stub: "StubAgent", make_job: MakeJob) -> None:
    answer = {"job": make_job(), "machines": [machine("rig-a", gpu(0))], "before": {}}
    stub.on(CALL, answer)
    assert json.loads(cli("why", "train", "--json").stdout) == answer


def test_what_others_typed_does_not_drive_the_terminal(cli: Cli, stub: "StubAgent", make_job: MakeJob) -> None:
    job = queued(make_job, reason="\x1b[2Jgone", display="a\x07")
    stub.on(CALL, {"job": job, "machines": [machine("rig\x1b[1m", refusal="x\ny", rule="busy")], "before": {}})
    shown = cli("why", "train").stdout
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "x\\ny" in shown
