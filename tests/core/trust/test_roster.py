"""What burst nodes may write, what of it counts, and when cloud nodes come and go."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshgpu.core.trust.meshlog import NODE_ENTRY_BYTES, MeshLog
from meshgpu.core.trust.roster import CLOUDS_LIMIT, LEASE_LIMIT_S
from meshgpu.errors import TrustError
from meshgpu.model.clock import WALL_CLOCK_SLACK_S
from meshgpu.model.ids import Digest, KeyId, NodeId, UserName, digest, node_id
from meshgpu.model.trust import (
    AddNode,
    Genesis,
    LinkUser,
    LogBody,
    LogEntry,
    RemoveNode,
    Role,
    SetPolicy,
    SetRole,
    Signed,
)
from meshgpu.sim.machine import WALL_START_S as WALL_S
from meshgpu.sim.office import Office, furnish

LEASE_S = 4 * 3600.0
ADA = UserName("ada")


@dataclass
class Mesh:
    """The office of four, whose second machine may rent."""

    office: Office
    log: MeshLog

    @property
    def admin(self) -> KeyId:
        return self.office.setups[0].accounts[ADA]

    @property
    def burst(self) -> NodeId:
        return self.office.setups[1].node

    def writes(self, *bodies: LogBody, by: int = 1) -> tuple[Signed, ...]:
        """Entries of a machine's own chain, or, by 0, of the admin's, as the right of their author allows."""
        author = self.admin if by == 0 else KeyId(self.office.setups[by].node)
        log = MeshLog(self.office.notaries[by])
        assert self.log.mesh is not None
        log.enter(self.log.mesh, self.log.all_entries())
        written = log.write(author, bodies)
        self.log.add(written)
        return written

    def forges(self, *bodies: LogBody, by: int = 1) -> tuple[Signed, ...]:
        """What a machine that keeps to no rule appends to its own chain."""
        log = MeshLog(self.office.notaries[by])
        assert self.log.mesh is not None
        log.enter(self.log.mesh, self.log.all_entries())
        log._may_rent = lambda _author, _bodies: True  # type: ignore[method-assign]  # the intruder's own agent
        written = log.write(KeyId(self.office.setups[by].node), bodies)
        self.log.add(written)
        return written

    def cloud(self, key: str = "cloud", name: str = "cloud-1", expires_s: float | None = LEASE_S) -> AddNode:
        public = self.office.ring.make(key)
        expires = None if expires_s is None else WALL_S + expires_s
        return AddNode(node_id(public), public, b"ca " + public, name, Role.CLOUD, ADA, expires)


@pytest.fixture
def mesh(office: Office, log: MeshLog) -> Mesh:
    mesh = Mesh(office, log)
    log.expire(WALL_S)
    mesh.writes(SetRole(mesh.burst, Role.BURST), by=0)
    return mesh


def test_burst_node_adds_a_cloud_node_until_its_lease_is_over(mesh: Mesh) -> None:
    cloud = mesh.cloud()
    mesh.writes(cloud)
    member = mesh.log.members[cloud.node]
    assert (member.role, member.name, member.expires_wall_s) == (Role.CLOUD, "cloud-1", WALL_S + LEASE_S)
    assert mesh.log.gone == frozenset()


def test_first_entry_of_a_burst_node_names_the_mesh_and_may_be_written_at_once(mesh: Mesh) -> None:
    written = mesh.writes(mesh.cloud(), RemoveNode(mesh.cloud().node))
    assert [head.seq for head in mesh.log.heads() if head.author == mesh.burst] == [1]
    assert len(written) == 2


def test_removal_is_final(mesh: Mesh) -> None:
    cloud = mesh.cloud()
    mesh.writes(cloud, RemoveNode(cloud.node))
    assert cloud.node not in mesh.log.members
    assert cloud.node in mesh.log.gone
    mesh.writes(mesh.cloud(expires_s=2 * LEASE_S))
    assert cloud.node not in mesh.log.members


def test_any_burst_node_removes_what_another_one_added(mesh: Mesh) -> None:
    other = mesh.office.setups[2].node
    mesh.writes(SetRole(other, Role.BURST), by=0)
    cloud = mesh.cloud()
    mesh.writes(cloud)
    mesh.writes(RemoveNode(cloud.node), by=2)
    assert cloud.node not in mesh.log.members


def test_cloud_node_drops_out_by_the_clock_and_counts_as_gone(mesh: Mesh) -> None:
    cloud = mesh.cloud()
    mesh.writes(cloud)
    ends = WALL_S + LEASE_S + WALL_CLOCK_SLACK_S
    assert mesh.log.changes_wall_s == ends
    assert not mesh.log.expire(ends - 1)
    assert cloud.node in mesh.log.members
    assert mesh.log.expire(ends)
    assert cloud.node not in mesh.log.members
    assert cloud.node in mesh.log.gone
    assert not mesh.log.expire(ends + 1e9)


def test_lease_longer_than_the_limit_does_not_count(mesh: Mesh) -> None:
    cloud = mesh.cloud(expires_s=LEASE_LIMIT_S + 3600)
    mesh.writes(cloud)
    assert cloud.node not in mesh.log.members
    assert cloud.node not in mesh.log.gone
    mesh.log.expire(WALL_S + 3600)
    assert cloud.node in mesh.log.members


@pytest.mark.parametrize("by", [2, 3])
def test_who_is_no_burst_node_writes_nothing(mesh: Mesh, by: int) -> None:
    with pytest.raises(TrustError) as caught:
        mesh.writes(mesh.cloud(), by=by)
    assert caught.value.code == "not-an-admin"


FORBIDDEN: dict[str, Callable[[Mesh], LogBody]] = {
    "a rig": lambda m: AddNode(m.cloud().node, m.cloud().public_key, b"ca", "evil", Role.RIG, ADA),
    "another burst node": lambda m: AddNode(m.cloud().node, m.cloud().public_key, b"ca", "evil", Role.BURST, ADA),
    "a cloud node without end": lambda m: m.cloud(expires_s=None),
    "a name for a terminal": lambda m: m.cloud(name="\x1b[31mrig0"),
    "a role": lambda m: SetRole(m.office.setups[3].node, Role.BURST),
    "a policy": lambda _: SetPolicy(may_leave=True),
    "a user": lambda m: LinkUser(ADA, m.cloud().public_key, m.office.setups[1].node, 1000),
    "a removal of a rig": lambda m: RemoveNode(m.office.setups[0].node),
    "a mesh": lambda m: Genesis("evil", m.cloud().public_key, digest(b""), b""),
    "a rig's place": lambda m: AddNode(
        m.office.setups[0].node, m.office.ring.make("rig0"), b"evil", "evil", Role.CLOUD, ADA, WALL_S + LEASE_S
    ),
    "another one's key": lambda m: AddNode(
        m.cloud().node, m.office.ring.make("evil"), b"ca", "evil", Role.CLOUD, ADA, WALL_S + LEASE_S
    ),
}


@pytest.mark.parametrize("what", sorted(FORBIDDEN))
def test_burst_node_may_say_nothing_else(mesh: Mesh, what: str) -> None:
    def seen() -> tuple[object, ...]:
        return mesh.log.members, mesh.log.users, mesh.log.may_leave, mesh.log.mesh_name, mesh.log.gone

    before = seen()
    mesh.forges(FORBIDDEN[what](mesh))
    assert seen() == before
    good = mesh.cloud("good", "good")
    mesh.writes(good)  # and the chain goes on
    assert good.node in mesh.log.members


def test_its_own_agent_does_not_write_what_would_not_count(mesh: Mesh) -> None:
    for body in (SetPolicy(may_leave=True), FORBIDDEN["a rig"](mesh)):
        with pytest.raises(TrustError):
            mesh.writes(body)


def test_cloud_node_writes_nothing(mesh: Mesh) -> None:
    cloud = mesh.cloud("rig3-cloud")
    mesh.writes(cloud, SetRole(cloud.node, Role.BURST), by=0)
    with pytest.raises(TrustError):
        mesh.log.write(KeyId(cloud.node), [mesh.cloud("another")])
    assert mesh.log.role(cloud.node) is Role.CLOUD


def test_nobody_speaks_for_a_user_from_a_cloud_node(mesh: Mesh) -> None:
    cloud = mesh.cloud()
    mesh.writes(cloud)
    before = mesh.log.users
    mesh.writes(LinkUser(ADA, mesh.office.ring.make("ada@cloud"), cloud.node, 0), by=0)
    assert mesh.log.users == before
    mesh.writes(RemoveNode(cloud.node))
    assert mesh.log.users == before


def test_name_of_an_office_machine_stays_its_own(mesh: Mesh) -> None:
    cloud = mesh.cloud(name="rig0")
    mesh.writes(cloud)
    rig = mesh.log.member_named("rig0")
    assert rig is not None
    assert rig.node == mesh.office.setups[0].node
    assert mesh.log.members[cloud.node].name == f"rig0-{cloud.node[:4]}"


def test_suffix_that_is_taken_grows(mesh: Mesh) -> None:
    cloud = mesh.cloud(name="rig0")
    public = mesh.office.ring.make("squatter")
    mesh.writes(AddNode(node_id(public), public, b"ca", f"rig0-{cloud.node[:4]}", Role.RIG, ADA), by=0)
    mesh.writes(cloud)
    assert mesh.log.members[cloud.node].name == f"rig0-{cloud.node[:5]}"


def test_demoted_node_adds_nothing_but_what_it_removed_stays_away(mesh: Mesh) -> None:
    first, second = mesh.cloud("one", "one"), mesh.cloud("two", "two")
    other = mesh.office.setups[2].node
    mesh.writes(SetRole(other, Role.BURST), by=0)
    mesh.writes(first, by=2)
    mesh.writes(RemoveNode(first.node), second)
    mesh.writes(SetRole(mesh.burst, Role.RIG), by=0)
    assert first.node not in mesh.log.members
    assert second.node not in mesh.log.members
    assert second.node not in mesh.log.gone  # nobody said that its instance is gone
    with pytest.raises(TrustError):
        mesh.writes(mesh.cloud("three"))


def test_role_of_a_rig_is_no_right_to_remove(mesh: Mesh) -> None:
    other = mesh.office.setups[2].node
    mesh.writes(SetRole(other, Role.RIG), by=0)
    cloud = mesh.cloud()
    mesh.writes(cloud)
    head = next(head for head in mesh.log.heads() if head.author == mesh.admin)
    body = RemoveNode(cloud.node)
    entry = LogEntry(mesh.office.mesh, KeyId(other), 0, Digest(""), (head,), body)
    assert mesh.log.add((mesh.office.notaries[2].sign(KeyId(other), entry),)) == ()
    assert cloud.node in mesh.log.members


def test_only_so_many_cloud_nodes_of_one_author_count(mesh: Mesh) -> None:
    mesh.writes(*(mesh.cloud(f"c{number}", f"c{number}") for number in range(CLOUDS_LIMIT + 5)))
    assert sum(member.role is Role.CLOUD for member in mesh.log.members.values()) == CLOUDS_LIMIT
    mesh.writes(RemoveNode(mesh.cloud("c0").node))
    assert sum(member.role is Role.CLOUD for member in mesh.log.members.values()) == CLOUDS_LIMIT


def test_oversized_entry_of_a_burst_node_is_not_kept(mesh: Mesh) -> None:
    ring, author = mesh.office.ring, KeyId(mesh.burst)
    for payload, is_kept in ((b" " * (NODE_ENTRY_BYTES + 1), False), (b" " * NODE_ENTRY_BYTES, True)):
        ring._values[payload] = LogEntry(mesh.office.mesh, author, 0, Digest(""), (), mesh.cloud())
        signature = ring.signature(ring._publics[author], "LogEntry", payload)
        assert bool(mesh.log.add((Signed("LogEntry", payload, author, signature),))) is is_kept


def test_policy_is_the_newest_of_the_founder(mesh: Mesh) -> None:
    assert not mesh.log.may_leave
    mesh.writes(SetPolicy(may_leave=True), by=0)
    assert mesh.log.may_leave
    mesh.writes(SetPolicy(may_leave=False), by=0)
    assert not mesh.log.may_leave


def test_burst_node_that_signs_one_number_twice_is_frozen(mesh: Mesh) -> None:
    log = MeshLog(mesh.office.notaries[1])
    log.enter(mesh.office.mesh, mesh.log.all_entries())
    one, two = mesh.cloud("one", "one"), mesh.cloud("two", "two")
    mesh.log.add((*log.write(KeyId(mesh.burst), [one]), *log.write(KeyId(mesh.burst), [two])))
    assert mesh.log.frozen == (KeyId(mesh.burst),)
    assert one.node not in mesh.log.members
    assert two.node not in mesh.log.members
    with pytest.raises(TrustError) as caught:
        mesh.writes(mesh.cloud("three"))
    assert caught.value.code == "frozen"


def _whole() -> Mesh:
    office = furnish(random.Random(1), 4, is_plain=True)
    log = MeshLog(office.notaries[0])
    log.enter(office.mesh, office.log)
    log.expire(WALL_S)
    mesh = Mesh(office, log)
    mesh.writes(SetRole(mesh.burst, Role.BURST), SetRole(office.setups[2].node, Role.BURST), by=0)
    gone = mesh.cloud("gone", "gone")
    mesh.writes(mesh.cloud("one", "rig0"), gone, mesh.cloud("shared", "one"))
    mesh.writes(RemoveNode(gone.node), mesh.cloud("shared", "two"), mesh.cloud("two", "rig0"), by=2)
    return mesh


WHOLE = _whole()


@given(st.permutations(WHOLE.log.all_entries()[1:]))
@settings(deadline=None, max_examples=60)
def test_order_does_not_matter_once_digests_brought_the_rest(entries: list[Signed]) -> None:
    log = MeshLog(WHOLE.office.notaries[0])
    log.enter(WHOLE.office.mesh, WHOLE.log.all_entries()[:1])
    log.expire(WALL_S)
    for entry in entries:
        log.add((entry,))
    log.add(WHOLE.log.beyond(log.heads()))  # what came before its author's role is sent again
    assert log.members == WHOLE.log.members
    assert list(log.members) == list(WHOLE.log.members)
    assert (log.gone, log.heads()) == (WHOLE.log.gone, WHOLE.log.heads())
    assert WHOLE.log.beyond(log.heads()) == ()


def test_log_that_is_read_back_whole_needs_no_digest() -> None:
    log = MeshLog(WHOLE.office.notaries[0])
    log.expire(WALL_S)
    log.enter(WHOLE.office.mesh, reversed(WHOLE.log.all_entries()))
    assert log.members == WHOLE.log.members


def test_who_lacks_both_is_told_the_admins_entries_first() -> None:
    office = furnish(random.Random(1), 40, is_plain=True)
    log = MeshLog(office.notaries[0])
    log.enter(office.mesh, office.log)
    mesh = Mesh(office, log)
    early = next(number for number, setup in enumerate(office.setups) if setup.node < mesh.admin)
    mesh.writes(SetRole(office.setups[early].node, Role.BURST), by=0)
    (cloud,) = mesh.writes(mesh.cloud(), by=early)
    assert log.beyond(())[-1] == cloud
