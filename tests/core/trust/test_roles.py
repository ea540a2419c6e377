"""What a cloud node may say."""

import random
from dataclasses import replace
from typing import get_args

import pytest

from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.requests import RequestRules
from meshgpu.core.trust.roles import may_say
from meshgpu.errors import TrustError
from meshgpu.model.ids import NodeId, UserName, digest, job_id
from meshgpu.model.job import EnvironmentRequest, JobSpec
from meshgpu.model.messages import Message
from meshgpu.model.resources import NO_GPU, Resources
from meshgpu.model.trust import Member, Role
from meshgpu.sim.office import furnish

MAY = {"GossipDigest", "GossipDelta", "LogDelta", "OfferAnswer", "CommitAnswer", "AttemptReport"}


@pytest.mark.parametrize("kind", get_args(Message))
def test_cloud_node_tells_of_itself_and_of_its_attempts_only(kind: type) -> None:
    member = Member(NodeId("n"), "cloud0", b"", b"", Role.CLOUD, UserName("ada"))
    message: Message = object.__new__(kind)
    assert may_say(member, message) == (kind.__name__ in MAY)
    assert may_say(replace(member, role=Role.RIG), message)


def test_cloud_node_holds_no_job() -> None:
    office = furnish(random.Random(1), 3, is_plain=True, instances=1)
    log = MeshLog(office.notaries[0])
    log.enter(office.mesh, office.log)
    rules = RequestRules(office.notaries[0], log, office.setups[0].node)
    rig, cloud = office.setups[1], office.setups[3]
    key = rig.accounts[UserName("ada")]
    spec = JobSpec(
        office.mesh, job_id(key, b"n"), b"n", "train", UserName("ada"), rig.node, ("true",), False, (),
        EnvironmentRequest(), digest(b"tree"), 0, 0, Resources(NO_GPU), None, (rig.node,), 0.0,
    )  # fmt: skip
    rules.verify_spec(office.notaries[1].sign(key, spec))
    with pytest.raises(TrustError, match="a rented machine is to hold it"):
        rules.verify_spec(office.notaries[1].sign(key, replace(spec, stewards=(cloud.node,))))
