"""What the agent says has exactly the keys that its client's types promise."""

import random
from typing import Any

import pytest

from meshgpu.agent.views import JobDocuments, burst_document, machine_document, plan_document
from meshgpu.client.views import (
    BurstSettingsView,
    BurstView,
    CapsView,
    GpuView,
    JobView,
    MachineView,
    PlanView,
    RentedView,
    RungView,
)
from meshgpu.core.burst.plan import Plan
from meshgpu.core.burst.planner import BurstStatus
from meshgpu.core.events import MachineRead, MeshEntered
from meshgpu.core.node import Node, NodeConfig
from meshgpu.model import job as model
from meshgpu.model.clock import Now
from meshgpu.model.cloud import (
    BurstSettings,
    Caps,
    Instance,
    InstanceState,
    LaunchId,
    LaunchRequest,
    Market,
    Rung,
)
from meshgpu.model.gossip import Need
from meshgpu.model.ids import JobId, UserName, digest, job_id
from meshgpu.model.records import LaunchRecord, LaunchState
from meshgpu.model.resources import GpuRequest, Resources
from meshgpu.sim.office import Office, furnish

NOW = Now(10.0, 1_800_000_000.0, "boot")
EXTRA = {"compute_capability"}
"""Told to scripts; the command line has no use for them."""


@pytest.fixture
def office() -> Office:
    return furnish(random.Random(1), 2, is_plain=True)


@pytest.fixture
def node(office: Office) -> Node:
    me = office.setups[0]
    node = Node(me.node, NOW, office.notaries[0], random.Random(1), NodeConfig("1"), ())
    node.start(NOW)
    node.step(NOW, MeshEntered(office.mesh, office.log, ()))
    node.step(NOW, MachineRead(me.inventory, ()))
    return node


def keys(view: type) -> set[str]:
    return set(view.__annotations__)


def test_machine_has_the_keys_of_its_type(node: Node) -> None:
    documents = [machine_document(view) for view in node.machines(NOW)]
    assert [set(document) - EXTRA for document in documents] == [keys(MachineView)] * 2
    (gpu, *_) = next(document["gpus"] for document in documents if document["self"])
    assert set(gpu) - EXTRA == keys(GpuView)


def test_machine_that_has_said_nothing_yet_has_the_same_keys(node: Node) -> None:
    other: Any = next(machine_document(view) for view in node.machines(NOW) if not view.is_self)
    assert (other["cpus"], other["gpus"], other["fence"]) == (None, [], "")


def test_job_has_the_keys_of_its_type(node: Node, office: Office) -> None:
    other = office.setups[1]
    spec = model.JobSpec(
        office.mesh,
        job_id(other.accounts[UserName("ada")], b"n" * 16),
        b"n" * 16,
        "train",
        UserName("ada"),
        other.node,
        ("python", "train it.py"),
        False,
        (),
        model.EnvironmentRequest(),
        digest(b"tree"),
        1000,
        1,
        Resources(GpuRequest(1)),
        None,
        (office.setups[0].node,),
        NOW.wall_s,
    )
    register = model.Register(spec.job, model.JobState.UNKNOWN, 1, other.node, heard_wall_s=NOW.wall_s - 40)
    document = JobDocuments(node, NOW).document(model.JobView(spec, register))
    assert set(document) - EXTRA == keys(JobView)
    assert document["command"] == "python 'train it.py'"
    assert document["out_of_touch_s"] == 40
    assert document["display"] == f"train-{spec.job[:3]}"


RUNG = Rung("g6.xlarge", "a", Market.SPOT, "L4", 1, 22 * 2**30, 4, 16 * 10**9, 0.40)
SETTINGS = BurstSettings(
    "eu-central-1", Caps(5.0, 20.0, 50.0, 10.0, 3, False, 3600.0), ("g6.xlarge",), 60.0, 300.0, 900.0, "", "", "true"
)


def test_renting_has_the_keys_of_its_type_before_it_is_set_up_and_after(node: Node, office: Office) -> None:
    before = burst_document(node, NOW)
    assert set(before) == keys(BurstView)
    assert (before["machine"], before["role"], before["settings"], before["rented"]) == ("rig0", "rig", None, [])

    def request(name: str) -> LaunchRequest:
        launch, need = LaunchId(name * 26), JobId(name * 26)
        return LaunchRequest(launch, office.mesh, node.node, need, "token", RUNG, NOW.wall_s + 600, "", "", b"data")

    def instance(name: str, state: InstanceState) -> Instance:
        asked = request(name)
        owner = office.setups[1].node
        return Instance(
            f"i-{name}", asked.launch, office.mesh, owner, asked.need, state, "198.51.100.7", NOW.wall_s - 50,
            asked.lease_ends_wall_s, "g6.xlarge", Market.ON_DEMAND, 0.8,
        )  # fmt: skip

    own = [
        LaunchRecord(request("a"), LaunchState.ENDING, b"", NOW.wall_s - 90, "i-a", None, "it is idle"),
        LaunchRecord(request("b"), LaunchState.ASKED, b"", NOW.wall_s - 5),
    ]
    seen = [
        instance("a", InstanceState.RUNNING),
        instance("c", InstanceState.PENDING),
        instance("d", InstanceState.TERMINATED),
    ]
    stub: Any = type("Planner", (), {})()
    stub.status = lambda now: BurstStatus(SETTINGS, True, tuple(own), tuple(seen), 7.0, 1.6, 3.0, 4.0, "no rights")
    node.burst = stub
    document = burst_document(node, NOW)
    assert set(document) == keys(BurstView)
    assert set(document["settings"]) == keys(BurstSettingsView)
    assert set(document["settings"]["caps"]) == keys(CapsView)
    assert [set(rented) for rented in document["rented"]] == [keys(RentedView)] * 3
    assert [(r["instance"], r["state"], r["owner"], r["since"] - NOW.wall_s) for r in document["rented"]] == [
        ("i-a", "ending", "rig0", -50), ("i-c", "pending", "rig1", -50), (None, "asked", "rig0", -5)
    ]  # fmt: skip
    assert {r["lease_left_s"] for r in document["rented"]} == {600.0}


def test_plan_has_the_keys_of_its_type() -> None:
    need = Need(JobId("a" * 26), Resources(GpuRequest(2)), NOW.wall_s - 70)
    document = plan_document(Plan(need, RUNG, 1.6, "g6.xlarge, spot, in a"), NOW)
    assert set(document) == keys(PlanView)
    assert set(document["rung"]) == keys(RungView)
    assert (document["again_s"], document["gpu_request"]) == (None, "2")
    nothing = plan_document(Plan(need, None, 0.0, "no capacity", NOW.boot_s + 5), NOW)
    assert (nothing["rung"], nothing["again_s"]) == (None, 5.0)
