"""The union of admins' chains: what counts, whatever the order in which it came."""

import dataclasses
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.errors import TrustError
from meshgpu.model.clock import Now
from meshgpu.model.ids import Digest, KeyId, NodeId, UserName, digest, key_id, node_id
from meshgpu.model.trust import (
    AddNode,
    Body,
    Head,
    LinkUser,
    LogEntry,
    RemoveNode,
    Role,
    SetPolicy,
    SetRole,
    Signed,
)
from meshgpu.sim.office import Office, furnish

OFFICE = furnish(random.Random(1), 4, is_plain=True)


def entered(office: Office, count: int | None = None) -> MeshLog:
    log = MeshLog(office.notaries[0])
    log.enter(office.mesh, office.log[:count])
    return log


def admit(office: Office, name: str, key: str) -> AddNode:
    public = office.ring.make(key)
    return AddNode(node_id(public), public, b"ca", name, Role.RIG, UserName("ada"))


@given(st.permutations(OFFICE.log[1:]))
@settings(deadline=None, max_examples=60)
def test_order_does_not_matter(entries: list[object]) -> None:
    log = entered(OFFICE, 1)
    for entry in entries:
        log.add((entry,))  # type: ignore[arg-type]  # entries of the office's log
    whole = entered(OFFICE)
    assert log.members == whole.members
    assert log.users == whole.users
    assert log.heads() == whole.heads()
    assert log.beyond(whole.heads()) == ()


def test_founding_makes_members_users_and_one_admin(log: MeshLog, office: Office) -> None:
    assert {member.name for member in log.members.values()} == {"rig0", "rig1", "rig2", "rig3"}
    assert len(log.users) == 4
    assert [user.node for user in log.users.values() if user.is_admin] == [office.setups[0].node]
    assert log.mesh_name == "office"


def test_genesis_of_another_mesh_is_refused(office: Office) -> None:
    with pytest.raises(TrustError) as caught:
        MeshLog(office.notaries[0]).enter(office.mesh, office.log[1:])
    assert caught.value.code == "wrong-mesh"


def test_first_entry_that_is_no_genesis_cannot_found(office: Office) -> None:
    entry = office.log[1]
    mesh = office.notaries[0].digest(entry)
    with pytest.raises(TrustError):
        MeshLog(office.notaries[0]).enter(mesh, (entry,))  # type: ignore[arg-type]  # a digest where a mesh id belongs


def test_gap_counts_only_when_it_is_filled(office: Office) -> None:
    log = entered(office, 1)
    log.add(office.log[2:])
    assert log.members == {}
    log.add((office.log[1],))
    assert log.members == entered(office).members


def test_entry_is_news_once(log: MeshLog, office: Office) -> None:
    assert log.add(office.log) == ()


def test_somebody_without_right_adds_nothing(log: MeshLog, office: Office) -> None:
    other = office.setups[1].accounts[UserName("ada")]
    body = admit(office, "evil", "evil")
    entries = [
        office.notaries[1].sign(other, LogEntry(office.mesh, other, 0, digest(b""), (), body)),
        office.ring.forge(
            log.heads()[0].author, LogEntry(office.mesh, log.heads()[0].author, 9, digest(b""), (), body)
        ),
    ]
    assert log.add(entries) == ()


def test_only_an_admin_writes(log: MeshLog, office: Office) -> None:
    with pytest.raises(TrustError) as caught:
        log.write(office.setups[1].accounts[UserName("ada")], [admit(office, "new", "new")])
    assert caught.value.code == "not-an-admin"


def test_written_entries_count_once_they_are_added(log: MeshLog, office: Office) -> None:
    admin = office.setups[0].accounts[UserName("ada")]
    written = log.write(admin, [admit(office, "new", "new")])
    assert log.member_named("new") is None
    assert log.add(written) == written
    assert log.member_named("new") is not None


def test_fork_freezes_its_author_on_every_node(office: Office) -> None:
    admin = office.setups[0].accounts[UserName("ada")]
    one, other = entered(office), entered(office)
    first = one.write(admin, [admit(office, "one", "one")])
    second = other.write(admin, [admit(office, "other", "other")])
    for log in (one, other):
        log.add((*first, *second))
        assert log.frozen == (admin,)
        assert log.member_named("one") is None
        assert log.member_named("other") is None
    one.add(one.beyond(()))
    assert one.members == other.members == entered(office).members


def test_fork_is_told_to_who_has_only_one_side(office: Office) -> None:
    admin = office.setups[0].accounts[UserName("ada")]
    one, other = entered(office), entered(office)
    other.add(one.write(admin, [admit(office, "one", "one")]))
    one.add((*one.write(admin, [admit(office, "two", "two")]), *other.beyond(one.heads())))
    other.add(one.beyond(other.heads()))
    assert one.frozen == other.frozen == (admin,)


def test_of_equal_names_the_lower_id_keeps_it(log: MeshLog, office: Office) -> None:
    admin = office.setups[0].accounts[UserName("ada")]
    log.add(log.write(admin, [admit(office, "rig0", "twin")]))
    twins = sorted(member.node for member in log.members.values() if member.name.startswith("rig0"))
    assert len(twins) == 2
    assert log.members[twins[0]].name == "rig0"
    assert log.members[twins[1]].name == f"rig0-{twins[1][:4]}"
    assert len({member.name for member in log.members.values()}) == 5


def test_node_whose_id_is_not_its_key_is_no_member(log: MeshLog, office: Office) -> None:
    admin = office.setups[0].accounts[UserName("ada")]
    good = admit(office, "new", "new")
    before = log.members
    for node in (office.setups[1].node, NodeId("x" * 52)):
        log.add(log.write(admin, [AddNode(node, good.public_key, b"ca", "evil", Role.RIG, UserName("ada"))]))
    assert log.members == before


def test_entry_that_does_not_follow_the_one_before_does_not_count(log: MeshLog, office: Office) -> None:
    head = log.heads()[0]
    body = admit(office, "new", "new")
    entry = LogEntry(office.mesh, head.author, head.seq + 1, digest(b"another"), (), body)
    log.add((office.notaries[0].sign(head.author, entry),))
    assert log.heads() == (head,)
    assert log.member_named("new") is None


def test_who_knows_an_unknown_head_gets_everything(log: MeshLog, office: Office) -> None:
    head = log.heads()[0]
    assert log.beyond((Head(head.author, head.seq, digest(b"another")),)) == office.log
    assert log.beyond((Head(head.author, 2, office.notaries[0].digest(office.log[2])),)) == office.log[3:]


def test_account_is_found_by_node_and_uid(log: MeshLog, office: Office) -> None:
    setup = office.setups[2]
    user = log.account(setup.node, 1000)
    assert user is not None
    assert user.key == setup.accounts[UserName("ada")]
    assert log.account(setup.node, 1001) is None
    assert log.user_of(user.key) == "ada"
    assert log.user_of(key_id(b"x" * 32)) is None


def test_second_key_of_a_user_is_linked(log: MeshLog, office: Office) -> None:
    admin = office.setups[0].accounts[UserName("ada")]
    key = office.ring.make("bob")
    log.add(log.write(admin, [LinkUser(UserName("bob"), key, office.setups[3].node, 2000)]))
    assert log.user_of(key_id(key)) == "bob"


# -- cloud nodes and who may let them in -------------------------------------------------------------------------------


def burst(office: Office, seat: int = 1) -> tuple[MeshLog, Signed]:
    """The log as it stands once the machine at `seat` may rent, and the entry that says so."""
    log = entered(office)
    admin = office.setups[0].accounts[UserName("ada")]
    (entry,) = log.write(admin, [SetRole(office.setups[seat].node, Role.BURST)])
    log.add([entry])
    return log, entry


def instance(office: Office, name: str = "cloud1", expires_wall_s: float | None = 1e9) -> AddNode:
    public = office.ring.make(name)
    return AddNode(node_id(public), public, b"ca", name, Role.CLOUD, UserName("ada"), expires_wall_s)


def written(office: Office, log: MeshLog, *bodies: Body, seat: int = 1) -> tuple[Signed, ...]:
    """What the machine at `seat` writes into its own chain, as it knows the log."""
    own = MeshLog(office.notaries[seat])
    own.enter(office.mesh, log.all_entries())
    return own.write(KeyId(office.setups[seat].node), bodies)


def test_burst_node_lets_a_cloud_node_in_and_removes_it_for_ever(office: Office) -> None:
    log, _ = burst(office)
    cloud = instance(office)
    log.add(written(office, log, cloud))
    assert (log.members[cloud.node].role, log.members[cloud.node].expires_wall_s) == (Role.CLOUD, 1e9)
    log.add(written(office, log, RemoveNode(cloud.node), cloud))
    assert cloud.node not in log.members


@given(st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_order_does_not_matter_for_cloud_nodes_either(rng: random.Random) -> None:
    log, _ = burst(OFFICE)
    one, other = instance(OFFICE, "one"), instance(OFFICE, "other")
    log.add(written(OFFICE, log, one, other, RemoveNode(one.node)))
    entries = list(log.all_entries())
    rng.shuffle(entries)
    shuffled = entered(OFFICE, 1)
    for _ in range(
        5
    ):  # a digest a second sends again what was not taken in before its author's role, or what it follows
        for entry in entries:
            shuffled.add((entry,))
    assert shuffled.members == log.members
    assert shuffled.heads() == log.heads()


def test_entries_that_come_with_their_authors_role_count_at_once(office: Office) -> None:
    log, _ = burst(office)
    log.add(written(office, log, instance(office)))
    fresh = entered(office, 1)
    assert set(fresh.add(reversed(log.all_entries()))) >= set(log.all_entries()[1:])
    assert fresh.members == log.members


@pytest.mark.parametrize(
    "make",
    [
        lambda office: admit(office, "evil", "evil"),
        lambda office: dataclasses.replace(instance(office), role=Role.BURST),
        lambda office: dataclasses.replace(instance(office), expires_wall_s=None),
        lambda office: dataclasses.replace(instance(office), node=office.setups[2].node),
        lambda office: SetPolicy(may_leave=True),
        lambda office: SetRole(office.setups[2].node, Role.BURST),
        lambda office: RemoveNode(office.setups[2].node),
        lambda office: LinkUser(UserName("ada"), office.ring.make("evil"), office.setups[1].node, 0),
    ],
)
def test_burst_node_may_do_nothing_else(office: Office, make: Callable[[Office], Body]) -> None:
    log, _ = burst(office)
    before = (dict(log.members), dict(log.users), log.may_leave)
    log.add(written(office, log, make(office)))
    assert (log.members, log.users, log.may_leave) == before


def test_whoever_has_not_the_role_lets_nobody_in(office: Office) -> None:
    log, _ = burst(office)
    with pytest.raises(TrustError):
        written(office, log, instance(office), seat=2)
    own = KeyId(office.setups[2].node)
    log.add([office.notaries[2].sign(own, LogEntry(office.mesh, own, 0, Digest(""), (), instance(office, "mine")))])
    assert log.member_named("mine") is None
    cloud = instance(office)
    log.add(written(office, log, cloud))
    assert log.members[cloud.node].role is Role.CLOUD
    admin = office.setups[0].accounts[UserName("ada")]
    log.add(log.write(admin, [SetRole(office.setups[1].node, Role.RIG)]))
    assert cloud.node not in log.members  # with the role goes what came by it


def test_admins_let_in_no_cloud_nodes_and_make_none_of_machines(office: Office) -> None:
    log = entered(office)
    admin = office.setups[0].accounts[UserName("ada")]
    log.add(log.write(admin, [instance(office), SetRole(office.setups[2].node, Role.CLOUD)]))
    assert {member.role for member in log.members.values()} == {Role.RIG}


def test_cloud_node_takes_no_name_that_a_machine_has(office: Office) -> None:
    log, _ = burst(office, seat=0)
    cloud = dataclasses.replace(instance(office), name="rig2")
    log.add(written(office, log, cloud, seat=0))
    assert log.members[office.setups[2].node].name == "rig2"
    assert log.members[cloud.node].name == f"rig2-{cloud.node[:4]}"


def test_cloud_node_leaves_by_the_clock_and_does_not_come_back(office: Office) -> None:
    log, _ = burst(office)
    cloud = instance(office, expires_wall_s=1000.0)
    log.add(written(office, log, cloud))
    assert not log.expire(Now(0.0, 1120.0, "boot"))
    assert log.expire(Now(0.0, 1120.1, "boot"))
    assert cloud.node not in log.members
    assert not log.expire(Now(0.0, 2000.0, "boot"))
    log.add(written(office, log, instance(office, "next")))
    assert cloud.node not in log.members


def test_policy_is_what_the_admin_said_last(office: Office) -> None:
    log = entered(office)
    admin = office.setups[0].accounts[UserName("ada")]
    assert not log.may_leave
    for may_leave in (True, False, True):
        log.add(log.write(admin, [SetPolicy(may_leave)]))
        assert log.may_leave == may_leave
