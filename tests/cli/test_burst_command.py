"""burst setup, status and plan before a real agent; ls, reap and iam before a seller that is a fake."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import Result

from meshgpu import __version__
from meshgpu.adapters import ec2_cloud
from meshgpu.cli import burst_command
from meshgpu.cli.burst_command import FIRST_SETTINGS
from meshgpu.cli.launch import stop_agent
from meshgpu.client.views import BurstView, RentedView
from meshgpu.errors import MeshgpuError
from meshgpu.model.cloud import Instance, InstanceState, LaunchId, Market
from meshgpu.model.ids import JobId, MeshId, NodeId

if TYPE_CHECKING:
    from tests.cli.conftest import StubAgent

Cli = Callable[..., Result]

REGION = "eu-central-1"
GROUP = "sg-0123abcd"


@pytest.fixture
def homes(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Go to the machine of that name; every agent that was started there is stopped."""
    for variable in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(variable, raising=False)
    for setting, value in (
        ("LOOPBACK", "true"), ("ADVERTISE", "off"), ("LINK_PORT", "0"), ("PAIRING_PORT", "0"), ("KEEP_FREE_GB", "0")
    ):  # fmt: skip
        monkeypatch.setenv(f"MESHGPU_{setting}", value)
    names: list[str] = []

    def go_to(name: str) -> None:
        names.append(name)
        monkeypatch.setenv("MESHGPU_HOME", str(tmp_path / name))

    yield go_to
    for name in dict.fromkeys(names):
        stop_agent(tmp_path / name)


@pytest.fixture
def rig(homes: Callable[[str], None], cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mesh of this machine, whose admin is at the terminal."""
    homes("rig-a")
    assert cli("init", "--name", "rig-a", "--user", "ada", "--yes").exit_code == 0
    monkeypatch.setattr(burst_command, "is_attended", lambda: True)


def status(cli: Cli) -> Any:
    result = cli("burst", "status", "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def set_up(cli: Cli, *arguments: str, input: str = "y\n") -> Result:  # noqa: A002 - as the runner calls it
    return cli("burst", "setup", *arguments, input=input)


# -- setup -----------------------------------------------------------------------------------------------------------


def test_setup_says_what_it_does_asks_once_and_lets_the_machine_rent(rig: None, cli: Cli) -> None:
    before = status(cli)
    assert (before["role"], before["may_leave"], before["settings"]) == ("rig", False, None)
    result = set_up(
        cli, "--region", REGION, "--usd-per-hour", "5", "--lease", "2h", "--instance-type", "g6.xlarge",
        "--instance-type", "g5.xlarge", "--security-group", GROUP,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    for told in (
        "g6.xlarge or g5.xlarge",
        "at most      $5.00 an hour, $20.00 a day, $100.00 a month, $10.00 for a job; 2 instances at a time, spot only",
        "after 10 m without work, after 15 m out of touch, after 2 h 0 m in any case",
        "Jobs of this mesh may then leave the office, with their code and environment variables, unless they say",
        "meshgpu stores none",
        "Let rig-a rent like this? [y/N]",
    ):
        assert told in result.stderr
    view = status(cli)
    assert (view["role"], view["may_leave"], view["rents"]) == ("burst", True, True)
    assert view["settings"] == {
        "region": REGION,
        "caps": {
            "usd_per_hour": 5.0,
            "usd_per_day": 20.0,
            "usd_per_month": 100.0,
            "usd_per_job": 10.0,
            "instances": 2,
            "on_demand": False,
            "lease_s": 7200.0,
        },
        "instance_types": ["g6.xlarge", "g5.xlarge"],
        "burst_after_s": 60.0,
        "idle_s": 600.0,
        "no_contact_s": 900.0,
        "image": "",
        "security_group": GROUP,
        "install": "apt-get update -qq && apt-get install -yqq bubblewrap"
        f" && curl -LsSf https://astral.sh/uv/install.sh | sh && uv tool install meshgpu=={__version__}",
    }
    shown = cli("burst", "status").stdout
    assert "rents       g6.xlarge or g5.xlarge in eu-central-1, for jobs that wait 60 s" in shown
    assert "today       $0.00 of $20.00 are spent or promised (UTC)" in shown


def test_setup_again_changes_what_is_said_and_outlives_the_agent(rig: None, cli: Cli) -> None:
    assert set_up(cli, "--region", REGION, "--security-group", GROUP, "--image", "ami-1").exit_code == 0
    first = status(cli)["settings"]
    assert set_up(cli, "--instances", "0", "--on-demand", "--idle", "5m").exit_code == 0
    wanted = first | {"idle_s": 300.0, "caps": first["caps"] | {"instances": 0, "on_demand": True}}
    assert status(cli)["settings"] == wanted
    assert "rents       nothing more: the cap is 0 instances" in cli("burst", "status").stdout
    assert cli("down").exit_code == 0
    assert cli("up").exit_code == 0
    view = status(cli)
    assert (view["settings"], view["role"], view["may_leave"], view["rents"]) == (wanted, "burst", True, True)


def test_office_is_admitted_after_each_yes_but_to_a_group_of_ones_own(
    rig: None, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def admit_office(region: str) -> str:
        asked.append(region)
        return f"sg-{len(asked)}"

    monkeypatch.setattr(ec2_cloud, "admit_office", admit_office)
    assert set_up(cli, "--region", REGION, input="n\n").exit_code == 1
    assert asked == []
    assert set_up(cli, "--region", REGION).exit_code == 0
    assert set_up(cli, "--usd-per-day", "7").exit_code == 0
    assert (asked, status(cli)["settings"]["security_group"]) == ([REGION, REGION], "")
    assert set_up(cli, "--security-group", GROUP).exit_code == 0
    assert set_up(cli, "--usd-per-day", "8").exit_code == 0
    assert (asked[2:], status(cli)["settings"]["security_group"]) == ([], GROUP)
    assert set_up(cli, "--security-group", "", "--region", "us-east-1").exit_code == 0
    assert (asked[2:], status(cli)["settings"]["security_group"]) == (["us-east-1"], "")


def test_setup_that_the_seller_refuses_changes_nothing(rig: None, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(region: str) -> str:
        raise MeshgpuError("not-allowed", "cannot prepare the security group: no credentials", "aws configure")

    monkeypatch.setattr(ec2_cloud, "admit_office", refuse)
    before = status(cli)
    result = set_up(cli, "--region", REGION)
    assert (result.exit_code, status(cli)) == (125, before)
    assert "hint: aws configure" in result.stderr


def test_refusing_at_the_prompt_changes_nothing(rig: None, cli: Cli) -> None:
    before = status(cli)
    for answer in ("n\n", "\n"):
        result = set_up(cli, "--region", REGION, "--security-group", GROUP, input=answer)
        assert (result.exit_code, status(cli)) == (1, before)
        assert "nothing was changed" in result.stderr


def test_setup_without_a_terminal_needs_yes(rig: None, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(burst_command, "is_attended", lambda: False)
    arguments = ("--region", REGION, "--security-group", GROUP)
    result = set_up(cli, *arguments)
    assert result.exit_code == 2
    assert "hint: --yes" in result.stderr
    assert status(cli)["settings"] is None
    result = set_up(cli, *arguments, "--yes", "--json")
    assert json.loads(result.stdout)["rents"] is True


BAD_VALUES = [
    (("--usd-per-day", "-1"), "--usd-per-day"),
    (("--usd-per-day", "nan"), "usd_per_day is nan, expected a number from 0"),
    (("--usd-per-job", "inf"), "usd_per_job is inf, expected a number from 0"),
    (("--instances", "-1"), "--instances"),
    (("--instances", "1001"), "cannot rent 1001 instances: at most 1000"),
    (("--lease", "soon"), "cannot read the time 'soon': expected 90s, 10m or 2h"),
    (("--idle", "0"), "idle_s is no time at all"),
    (("--instance-type", "big one"), "'big one' is no instance type of EC2"),
    (("--region", "Frankfurt"), "'Frankfurt' is no region of EC2"),
    (("--security-group", "default"), "'default' is no security group of EC2"),
    (("--install", " "), "install has 0 bytes, expected a shell command of 1 to 8192"),
    (("--region", ""), "'' is no region of EC2"),
]


def test_bad_values_are_usage_errors_and_change_nothing(rig: None, cli: Cli) -> None:
    for arguments, told in BAD_VALUES:
        result = set_up(cli, "--region", REGION, "--security-group", GROUP, *arguments)
        assert result.exit_code == 2, arguments
        assert told in result.stderr
    assert status(cli)["settings"] is None


def test_setup_without_a_region_says_how_to_name_one(rig: None, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    result = set_up(cli)
    assert result.exit_code == 2
    assert "hint: --region eu-central-1" in result.stderr
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    assert set_up(cli, "--security-group", GROUP).exit_code == 0
    assert status(cli)["settings"]["region"] == "us-west-2"


def test_setup_by_somebody_who_is_no_admin_is_refused_before_anything_is_asked(
    rig: None, homes: Callable[[str], None], cli: Cli
) -> None:
    invite = cli("invite").stdout.strip()
    homes("rig-b")
    joined = cli("join", invite, "--name", "rig-b", "--yes")
    assert joined.exit_code == 0, joined.stderr
    result = set_up(cli, "--region", REGION, "--security-group", GROUP)
    assert result.exit_code == 125
    assert "cannot let this machine rent: ada on this machine is no admin of the mesh lab" in result.stderr
    assert "hint: an admin runs: meshgpu burst setup; the admins are: " in result.stderr
    assert "[y/N]" not in result.stderr
    assert (status(cli)["role"], status(cli)["settings"]) == ("rig", None)


# -- status and plan -------------------------------------------------------------------------------------------------


def test_machine_that_is_no_burst_peer_says_how_to_become_one(rig: None, cli: Cli) -> None:
    for command in ("status", "plan"):
        result = cli("burst", command)
        assert (result.exit_code, result.stdout) == (0, "")
        assert result.stderr == "rig-a is no burst peer: it rents nothing. To let it: meshgpu burst setup\n"
    assert set_up(cli, "--region", REGION, "--security-group", GROUP).exit_code == 0
    assert json.loads(cli("burst", "plan", "--json").stdout)["plans"] == []
    assert "nothing waits that may leave the office" in cli("burst", "plan").stderr


RENTED: RentedView = {
    "launch": "l" * 26,
    "instance": "i-0a1",
    "instance_type": "g6.xlarge",
    "market": "spot",
    "usd_per_hour": 0.53,
    "job": "k7q" + "a" * 23,
    "owner": "rig-a",
    "machine": "cloud-llllllll",
    "state": "joined",
    "reason": "",
    "address": "198.51.100.7",
    "since": time.time() - 600,
    "lease_ends_at": time.time() + 3600,
    "lease_left_s": 3600.0,
}
VIEW: BurstView = {
    "machine": "rig-a",
    "role": "burst",
    "may_leave": True,
    "rents": True,
    "settings": {**FIRST_SETTINGS, "region": REGION},
    "usd_per_hour": 1.06,
    "usd_today": 4.24,
    "usd_this_month": 12.0,
    "surveyed_s": 30.0,
    "problem": "the account does not allow it: no rights",
    "rented": [
        RENTED,
        {**RENTED, "instance": None, "machine": None, "state": "asked"},
        {**RENTED, "state": "ending", "reason": "idle"},
        {**RENTED, "owner": None, "machine": None, "state": "running"},
    ],
}


def test_status_tells_what_is_rented_spent_and_wrong(cli: Cli, stub: "StubAgent") -> None:
    began = time.time() - 630.0
    stub.on("GET /v1/burst", {**VIEW, "rented": [{**rented, "since": began} for rented in VIEW["rented"]]})
    result = cli("burst", "status")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "now         $1.06 an hour, 4 instances" in lines
    assert "today       $4.24 of $20.00 are spent or promised (UTC)" in lines
    assert "this month  $12.00 of $100.00 are spent or promised (UTC)" in lines
    assert "problem     the account does not allow it: no rights" in lines
    works, asked, ends, others = lines[-4:]
    assert works.split() == [
        "i-0a1", "cloud-llllllll", "g6.xlarge", "spot", "0.53", "k7qaaaaa", "10", "m", "60", "m", "works"
    ]  # fmt: skip
    assert asked.split()[:2] == ["-", "-"]
    assert asked.endswith("asked for")
    assert ends.endswith("ends: idle")
    assert others.endswith("runs (another machine rents it)")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"role": "rig"}, "nothing: the mesh does not let rig-a rent"),
        ({"may_leave": False}, "nothing: this mesh lets no job leave the office"),
        ({"rents": False}, "nothing more; what lives ends"),
    ],
)
def test_status_says_why_nothing_is_rented(cli: Cli, stub: "StubAgent", changes: dict[str, object], told: str) -> None:
    stub.on("GET /v1/burst", {**VIEW, **changes})
    assert f"rents       {told}\n" in cli("burst", "status").stdout


def test_plan_tells_what_would_be_rented_or_why_nothing(cli: Cli, stub: "StubAgent") -> None:
    rung = {"instance_type": "g6.xlarge", "usd_per_hour": 0.53}
    plan = {"job": "k7q" + "a" * 23, "gpu_request": "1", "waits_since": time.time() - 90, "again_s": None}
    rents = plan | {"rung": rung, "usd": 2.14, "words": "g6.xlarge, spot, in eu-central-1a"}
    waits = plan | {"rung": None, "usd": 0.0, "words": "waits 20 s more for the office", "again_s": 20.0}
    stub.on("GET /v1/burst/plan", {**VIEW, "plans": [rents, waits]})
    result = cli("burst", "plan")
    _, first, second = result.stdout.splitlines()
    assert first.split() == ["k7qaaaaa", "1", "90", "s", "0.53", "$2.14", "g6.xlarge,", "spot,", "in", "eu-central-1a"]
    assert second.endswith("(waits 20 s more for the office) (again in 20 s)")
    assert "the last problem: the account does not allow it" in result.stderr


# -- without an agent ------------------------------------------------------------------------------------------------


RUNNING = Instance(
    "i-1", LaunchId("l" * 26), MeshId("5e" * 32), NodeId("m" * 52), JobId("j" * 26), InstanceState.RUNNING,
    "198.51.100.7", 1.9e9, 2e9, "g6.xlarge", Market.SPOT, 0.4,
)  # fmt: skip
OTHER = replace(RUNNING, instance="i-2", mesh=MeshId("6f" * 32), state=InstanceState.PENDING)
ENDING = replace(RUNNING, instance="i-3", state=InstanceState.ENDING)
GONE = replace(RUNNING, instance="i-4", state=InstanceState.TERMINATED)


class Seller:
    """The instances of an account; `stubborn` is one that cannot be ended."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, MeshId | None]] = []
        self.closed = 0
        self.found: tuple[Instance, ...] = (GONE, OTHER, ENDING, RUNNING)
        self.ended: list[str] = []
        self.stubborn = ""

    def open(self, region: str, mesh: MeshId | None) -> "Seller":
        self.opened.append((region, mesh))
        return self

    async def instances(self) -> tuple[Instance, ...]:
        return self.found

    async def terminate(self, instance: str) -> None:
        if instance == self.stubborn:
            raise MeshgpuError("not-allowed", f"cannot end {instance}: the account does not allow it")
        self.ended.append(instance)

    async def close(self) -> None:
        self.closed += 1


@pytest.fixture
def seller(environment: None, monkeypatch: pytest.MonkeyPatch) -> Seller:
    seller = Seller()
    monkeypatch.setattr(ec2_cloud, "open_ec2", seller.open)
    monkeypatch.setattr(burst_command, "is_attended", lambda: True)
    monkeypatch.setenv("AWS_REGION", REGION)
    return seller


def test_ls_shows_what_lives_of_every_mesh_without_an_agent(cli: Cli, seller: Seller) -> None:
    result = cli("burst", "ls")
    assert result.exit_code == 0, result.stderr
    header, *rows = [line.split() for line in result.stdout.splitlines()]
    assert header == ["INSTANCE", "TYPE", "MARKET", "$/H", "SINCE", "LEASE", "STATE", "MESH", "JOB"]
    assert [(row[0], row[-3], row[-2]) for row in rows] == [
        ("i-1", "runs", "5e" * 6), ("i-2", "boots", "6f" * 6), ("i-3", "ends", "5e" * 6)
    ]  # fmt: skip
    assert (seller.opened, seller.closed) == ([(REGION, None)], 1)
    document = json.loads(cli("burst", "ls", "--region", "us-east-1", "--json").stdout)
    assert document["region"] == "us-east-1"
    assert [instance["instance"] for instance in document["instances"]] == ["i-1", "i-2", "i-3"]


def test_reap_lists_asks_and_ends_what_lives(cli: Cli, seller: Seller) -> None:
    result = cli("burst", "reap", input="\n")
    assert (result.exit_code, seller.ended) == (1, [])
    result = cli("burst", "reap", input="y\n")
    assert (result.exit_code, seller.ended) == (0, ["i-1", "i-2"])
    assert "i-2" in result.stdout
    assert "End all 2, and what runs there? [y/N]" in result.stderr
    assert "2 instances told to end" in result.stderr


def test_reap_goes_on_after_one_that_cannot_be_ended(cli: Cli, seller: Seller) -> None:
    seller.stubborn = "i-1"
    result = cli("burst", "reap", "--yes")
    assert (result.exit_code, seller.ended) == (125, ["i-2"])
    assert "cannot end i-1: the account does not allow it" in result.stderr


def test_reap_of_a_region_where_nothing_lives_asks_nothing(cli: Cli, seller: Seller) -> None:
    seller.found = (GONE, ENDING)
    result = cli("burst", "reap")
    assert (result.exit_code, result.stderr) == (0, f"no instance of meshgpu lives in {REGION}\n")


@pytest.mark.parametrize("command", ["ls", "reap"])
def test_command_at_the_seller_needs_a_region(
    cli: Cli, seller: Seller, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    result = cli("burst", command)
    assert result.exit_code == 2
    assert "hint: --region eu-central-1" in result.stderr


def test_iam_is_a_policy_that_ends_only_what_is_tagged(cli: Cli) -> None:
    policy = json.loads(cli("burst", "iam").stdout)
    assert policy["Version"] == "2012-10-17"
    statements = {statement["Sid"]: statement for statement in policy["Statement"]}
    assert len(statements) == len(policy["Statement"])
    tagged = {"StringLike": {"aws:ResourceTag/meshgpu:mesh": "*"}}
    ends = [s for s in policy["Statement"] if "ec2:TerminateInstances" in json.dumps(s["Action"])]
    assert [(s["Resource"], s["Condition"]) for s in ends] == [("arn:aws:ec2:*:*:instance/*", tagged)]
    assert "iam:PassRole" not in json.dumps(policy)
