"""What the agent says has exactly the keys that its client's types promise."""

import random
from typing import Any

import pytest

from meshgpu.agent.views import JobDocuments, machine_document
from meshgpu.client.views import GpuView, JobView, MachineView
from meshgpu.core.events import MachineRead, MeshEntered
from meshgpu.core.node import Node, NodeConfig
from meshgpu.model import job as model
from meshgpu.model.clock import Now
from meshgpu.model.ids import UserName, digest, job_id
from meshgpu.model.resources import GpuRequest, Resources
from meshgpu.sim.office import Office, furnish

NOW = Now(10.0, 1_800_000_000.0, "boot")
EXTRA = {"version", "compute_capability"}
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
