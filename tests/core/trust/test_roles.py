"""What each role may say: the whole table, written down a second time by hand."""

import random
from dataclasses import replace
from typing import get_args

import pytest

from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.requests import RequestRules
from meshgpu.core.trust.roles import MAY, may_say
from meshgpu.errors import TrustError
from meshgpu.model.bulk import BulkRequest
from meshgpu.model.ids import NodeId, UserName, digest, job_id
from meshgpu.model.job import EnvironmentRequest, JobSpec
from meshgpu.model.messages import Message
from meshgpu.model.resources import NO_GPU, Resources
from meshgpu.model.trust import Member, Role
from meshgpu.sim.office import furnish

KINDS = (*get_args(Message), *get_args(BulkRequest))
LOOKS = {
    *("GossipDigest", "GossipDelta", "LogDelta", "ProbeFor", "ProbeAnswer", "KnockWanted", "KnockAnswer"),
    *("Ask", "LogsWanted", "AttemptsWanted", "TailWanted", "FilesWanted", "FileWanted"),
}
RUNS = {"OfferAnswer", "CommitAnswer", "AttemptReport", "AttemptOutput", "ChunksWanted"}
HOLDS = {
    *("Offer", "Release", "Commit", "Activate", "Fence", "Cancel", "ReportAck"),
    *("Prepare", "Promise", "Accept", "Accepted"),
    *("SubmitAnswer", "Answer", "JobUpdate"),
}
SAYS = {
    Role.VIEWER: LOOKS,
    Role.SUBMITTER: LOOKS | {"Submit"},
    Role.RIG: LOOKS | {"Submit"} | RUNS | HOLDS,
    Role.BURST: LOOKS | {"Submit"} | RUNS | HOLDS,
    Role.CLOUD: {"GossipDigest", "GossipDelta", "LogDelta"} | RUNS,
}


def test_everything_that_can_be_said_stands_in_the_table() -> None:
    assert set(MAY) == set(KINDS)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("kind", KINDS)
def test_role_says_what_is_its_to_say(kind: type, role: Role) -> None:
    member = Member(NodeId("n"), "machine", b"", b"", role, UserName("ada"))
    what: Message = object.__new__(kind)
    assert may_say(member, what) == (kind.__name__ in SAYS[role])


@pytest.mark.parametrize("role", [Role.CLOUD, Role.SUBMITTER, Role.VIEWER])
def test_machine_without_the_role_holds_no_job(role: Role) -> None:
    office = furnish(random.Random(1), 3, is_plain=True)
    log = MeshLog(office.notaries[0])
    log.enter(office.mesh, office.log)
    rules = RequestRules(office.notaries[0], log, office.setups[0].node)
    rig, holder = office.setups[1], office.setups[2]
    key = rig.accounts[UserName("ada")]
    spec = JobSpec(
        office.mesh, job_id(key, b"n"), b"n", "train", UserName("ada"), rig.node, ("true",), False, (),
        EnvironmentRequest(), digest(b"tree"), 0, 0, Resources(NO_GPU), None, (holder.node,), 0.0,
    )  # fmt: skip
    signed = office.notaries[1].sign(key, spec)
    rules.verify_new_spec(signed)
    log.members[holder.node] = replace(log.members[holder.node], role=role)
    with pytest.raises(TrustError, match=f"is to hold it, which is a {role}"):
        rules.verify_new_spec(signed)
