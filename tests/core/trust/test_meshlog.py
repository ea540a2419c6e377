"""The union of admins' chains: what counts, whatever the order in which it came."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.errors import TrustError
from meshgpu.model.ids import NodeId, UserName, digest, key_id, node_id
from meshgpu.model.trust import AddNode, Head, LinkUser, LogEntry, Role
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
