"""What every machine and every GPU says to a job, and what would change it."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshgpu.core.events import MachineRead, MeshEntered
from meshgpu.core.jobs.placement import Candidate, MachineVerdict, Rule, explain_each, find_room, rank
from meshgpu.core.node import Node, NodeConfig
from meshgpu.model.clock import Now
from meshgpu.model.gossip import Allocation, Capacity, NodeRecord
from meshgpu.model.ids import GpuId, JobId, NodeId, UserName
from meshgpu.model.inventory import Gpu, GpuReading, Inventory
from meshgpu.model.job import JobSpec
from meshgpu.model.resources import GB, NO_GPU, GpuShare, Resources, parse_gpus
from meshgpu.model.trust import Signed
from meshgpu.sim.office import Office

SMALL = Gpu(GpuId("GPU-small"), 0, "NVIDIA GeForce RTX 3060", 12 * 2**30)
LARGE = Gpu(GpuId("GPU-large"), 1, "NVIDIA GeForce RTX 4090", 24 * 2**30)
JOB = JobId("mine")
OTHER = JobId("other")


def holds(*shares: GpuShare, job: JobId = OTHER, cpus: int = 0) -> Allocation:
    return Allocation(job, 1, "train", UserName("bob"), shares, cpus)


def machine(name: str, *gpus: Gpu, held: tuple[Allocation, ...] = (), faults: tuple[GpuReading, ...] = ()) -> Candidate:
    return Candidate(NodeId(name), name, NodeRecord("1", (), Inventory(8, 64 * GB, gpus)), Capacity(faults, held))


def ask(text: str, *candidates: Candidate, named: str | None = None) -> list[MachineVerdict]:
    resources = Resources(parse_gpus(text))
    return list(explain_each(resources, candidates, NodeId(named) if named else None, JOB))


def test_machine_with_room_says_which_gpu_it_would_give() -> None:
    (verdict,) = ask("1", machine("rig", SMALL, LARGE))
    assert (verdict.rule, verdict.refusal, verdict.remedy) == (None, "", "")
    assert verdict.gpus == (GpuShare(SMALL.uuid),)
    assert [gpu.rule for gpu in verdict.verdicts] == [None, None]


def test_each_gpu_names_its_own_rule() -> None:
    faults = (GpuReading(LARGE.uuid, fault="lost: reset the machine"),)
    third = replace(LARGE, uuid=GpuId("GPU-third"), index=2)
    (verdict,) = ask("2x20GB", machine("rig", SMALL, LARGE, third, held=(holds(GpuShare(third.uuid)),), faults=faults))
    assert [gpu.rule for gpu in verdict.verdicts] == [Rule.LACKS, Rule.FAULTY, Rule.BUSY]
    assert [gpu.refusal for gpu in verdict.verdicts] == [
        "is RTX 3060 12 GB, the job asks for 2x20GB",
        "lost: reset the machine",
        "taken by train-oth (bob)",
    ]
    assert [gpu.remedy for gpu in verdict.verdicts] == [
        "ask for less: -g, --cpus, --memory, --on",
        "the fault is mended (there: meshgpu doctor)",
        "end of train-oth (bob)",
    ]
    assert verdict.rule is Rule.BUSY


def test_shared_gpu_says_how_much_is_left() -> None:
    (verdict,) = ask("10GB", machine("rig", SMALL, held=(holds(GpuShare(SMALL.uuid, 8 * GB)),)))
    assert verdict.verdicts[0].refusal == "4.9 GB free, taken by train-oth (bob)"
    (verdict,) = ask("10GB", machine("rig", SMALL, held=(holds(GpuShare(SMALL.uuid)),)))
    assert verdict.verdicts[0].refusal == "taken by train-oth (bob)"


def test_machine_whose_gpus_are_only_faulty_waits_for_no_job() -> None:
    faults = (GpuReading(SMALL.uuid, fault="lost"),)
    (verdict,) = ask("1", machine("rig", SMALL, faults=faults))
    assert verdict.rule is Rule.FAULTY
    assert "doctor" in verdict.remedy


@pytest.mark.parametrize(
    ("candidate", "rule"),
    [
        (Candidate(NodeId("rig"), "rig", None, None), Rule.UNKNOWN),
        (replace(machine("rig", SMALL), refusal="does not answer", rule=Rule.DOWN), Rule.DOWN),
        (replace(machine("rig", SMALL), refusal="lends nothing", rule=Rule.CLOSED), Rule.CLOSED),
        (machine("rig"), Rule.LACKS),
        (machine("rig", SMALL, held=(holds(GpuShare(SMALL.uuid)),)), Rule.BUSY),
    ],
)
def test_machine_that_refuses_names_rule_and_remedy(candidate: Candidate, rule: Rule) -> None:
    (verdict,) = ask("1", candidate)
    assert verdict.rule is rule
    assert verdict.refusal
    assert verdict.remedy
    assert verdict.gpus == ()


def test_job_that_names_a_machine_is_refused_by_all_others() -> None:
    here, there = ask("1", machine("rig-b", SMALL), machine("rig-a", SMALL), named="rig-b")
    assert (here.name, here.rule, here.gpus) == ("rig-a", Rule.ELSEWHERE, ())
    assert "-m" in here.remedy
    assert (there.name, there.rule) == ("rig-b", None)


def test_what_the_job_itself_holds_counts_as_free() -> None:
    own = holds(GpuShare(SMALL.uuid), job=JOB)
    (verdict,) = ask("1", machine("rig", SMALL, held=(own,)))
    assert verdict.rule is None


def test_job_without_gpus_hears_nothing_of_them() -> None:
    busy = machine("rig", SMALL, held=(holds(cpus=8),))
    (verdict,) = explain_each(Resources(NO_GPU), [busy], None, JOB)
    assert verdict.rule is Rule.BUSY
    assert verdict.refusal == "is busy: 0 of 8 processors free, the job asks for 1"
    assert verdict.verdicts == ()


requests = st.sampled_from(["1", "2", "8GB", "12GB", "24GB", "2x10GB", "4090", "rtx:2", "0"])
taken = st.lists(
    st.builds(
        lambda uuid, memory: holds(GpuShare(uuid, memory), cpus=1),
        st.sampled_from([SMALL.uuid, LARGE.uuid]),
        st.sampled_from([0, 4 * GB, 11 * GB]),
    ),
    max_size=3,
)


@given(requests, taken, st.booleans())
def test_explanation_never_says_otherwise_than_placement(text: str, held: list[Allocation], is_lost: bool) -> None:
    """A machine is ranked exactly where its verdict takes the job, and gives the GPUs that find_room gives."""
    faults = (GpuReading(LARGE.uuid, fault="lost"),) if is_lost else ()
    candidate = machine("rig", SMALL, LARGE, held=tuple(held), faults=faults)
    resources = Resources(parse_gpus(text))
    assert candidate.host is not None
    room = find_room(resources, candidate.host, faults, held)
    (verdict,) = ask(text, candidate)
    assert (verdict.rule, verdict.refusal, verdict.gpus) == (room.rule, room.refusal, room.gpus)
    assert (verdict.rule is None) == (rank(resources, [candidate], random.Random(1)) == [NodeId("rig")])
    serving = {gpu.gpu.uuid for gpu in verdict.verdicts if gpu.rule is None}
    assert {share.uuid for share in verdict.gpus} <= serving
    if resources.gpus.count and verdict.rule is not None:
        assert len(serving) < resources.gpus.count


def test_node_explains_the_whole_mesh_and_only_looks(
    office: Office, at: Callable[[float], Now], signed: Callable[..., tuple[JobSpec, Signed]]
) -> None:
    me = office.setups[0]
    node = Node(me.node, at(0), office.notaries[0], random.Random(1), NodeConfig("1", fence="bubblewrap"), ())
    node.start(at(0))
    node.step(at(0), MeshEntered(office.mesh, office.log, ()))
    node.step(at(1), MachineRead(me.inventory, ()))
    spec, _ = signed()
    before = node.machines(at(1)), node.deadline()
    verdicts = node.why(spec)
    assert [verdict.name for verdict in verdicts] == [setup.name for setup in office.setups]
    assert [verdict.rule for verdict in verdicts] == [None, Rule.DOWN, Rule.DOWN, Rule.DOWN]
    assert node.why(replace(spec, machine=office.setups[1].node))[0].rule is Rule.ELSEWHERE
    assert (node.machines(at(1)), node.deadline()) == before
