"""New keys for a machine that stays: the same machine to all, its old keys void, and a removal wins in any order."""

import itertools
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshgpu.core.trust import rekeying
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.rekeying import ACCOUNTS_LIMIT, make_rekey
from meshgpu.errors import TrustError
from meshgpu.model.ids import Digest, KeyId, MeshId, NodeId, UserName, key_id, node_id
from meshgpu.model.trust import (
    AddAdmin,
    AddNode,
    Head,
    LogEntry,
    NewKey,
    NewKeys,
    Rekey,
    RemoveNode,
    Revoke,
    Role,
    SetRole,
    Signed,
)
from meshgpu.sim.fakes import ToyNotary
from tests.core.trust.test_several_admins import RING, Seat, founded, meet


def rekey_to(seat: Seat, heir: Seat) -> Rekey:
    users = (NewKey(seat.user_key, heir.user_key),)
    return make_rekey(seat.mesh, seat.node, (heir.public_key, b"ca2"), users, (seat.notary, heir.notary))


def renew(seat: Seat, name: str) -> Seat:
    """Give the machine new keys, as its agent does; it holds what it knew before."""
    heir = Seat(name)
    rekey = rekey_to(seat, heir)
    for author, bodies in seat.log.hand_over(rekey):
        seat.write(*bodies, key=author)
    seat.write(rekey, key=KeyId(seat.node))
    heir.hears(seat)
    return heir


def entry_of(seat: Seat, body: Rekey | RemoveNode, heads: tuple[Head, ...] | None = None, seq: int = 0) -> Signed:
    """What the machine's key would sign, taken in by nobody yet. heads: what admins wrote, without them."""
    admins = (head for head in seat.log.heads() if seat.log.known(NodeId(head.author)) is None)
    cited = tuple(admins) if heads is None else heads
    return seat.notary.sign(KeyId(seat.node), LogEntry(seat.mesh, KeyId(seat.node), seq, Digest(""), cited, body))


def test_machine_is_the_same_under_new_keys() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    ada.write(SetRole(eve.node, Role.SUBMITTER))
    eve.hears(ada)
    heir = renew(eve, "eve2")
    meet((ada, bob, heir))
    member = ada.log.members[heir.node]
    assert (member.name, member.role, member.owner, member.device_ca) == ("eve", Role.SUBMITTER, "eve", b"ca2")
    user = ada.log.users[heir.key]
    assert (user.user, user.node, user.uid, user.is_admin) == ("eve", heir.node, 1000, False)
    assert [m.name for m in ada.log.members.values()] == ["ada", "bob", "eve"]


def test_old_id_and_old_keys_are_of_before() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    heir = renew(eve, "eve2")
    meet((ada, bob, heir))
    assert eve.node not in ada.log.members
    assert ada.log.former[eve.node].name == "eve"
    assert eve.key not in ada.log.users
    assert ada.log.former_users[eve.key].user == "eve"
    assert ada.log.heirs == {eve.node: heir.node}
    assert ada.log.stopped == frozenset(), "what it submitted before goes on"
    with pytest.raises(TrustError):
        heir.log.write(KeyId(eve.node), (RemoveNode(eve.node),), eve.notary)


def test_admin_hands_his_right_to_his_new_key_alone() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    bob.admit(Seat("before"))
    heir = renew(bob, "bob2")
    heir.admit(Seat("after"))
    meet((ada, heir, eve))
    assert eve.names == {"ada", "bob", "eve", "before", "after"}
    assert {user.key for user in eve.log.admins()} == {ada.key, heir.key}
    with pytest.raises(TrustError):
        heir.log.write(bob.key, Seat("false").added(), bob.notary)


def test_founder_hands_on_what_he_founded() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    heir = renew(ada, "ada2")
    heir.write(heir.dismissal(bob))
    meet((heir, bob, eve))
    assert eve.admins == {"ada"}
    assert eve.log.users[heir.key].is_admin
    assert eve.names == {"ada", "bob", "eve"}


def test_machine_changes_keys_again_and_again() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    seat = bob
    for number in range(5):
        seat = renew(seat, f"bob{number}")
    meet((ada, seat, eve))
    assert eve.log.members[seat.node].name == "bob"
    assert {user.key for user in eve.log.admins()} == {ada.key, seat.key}
    assert len(eve.log.former) == 5
    assert len(eve.log.members) == 3


def test_role_that_was_given_meanwhile_is_the_machines() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    heir = renew(eve, "eve2")
    ada.write(SetRole(eve.node, Role.VIEWER))  # she has not heard of it
    meet((ada, bob, heir))
    assert bob.log.members[heir.node].role is Role.VIEWER


def test_role_that_it_gets_later_is_its_own() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    heir = renew(eve, "eve2")
    ada.hears(heir)
    ada.write(SetRole(heir.node, Role.VIEWER))
    meet((ada, bob, heir))
    assert bob.log.members[heir.node].role is Role.VIEWER


# -- a removal wins --------------------------------------------------------------------------------------------------


def everywhere(entries: Iterable[Signed], mesh_of: Seat) -> list[MeshLog]:
    """Logs that took in the same entries, each in another order."""
    entries = list(entries)
    first = next(entry for entry in entries if mesh_of.notary.digest(entry) == str(mesh_of.mesh))
    logs = []
    for number in range(8):
        shuffled = sorted(entries, key=lambda entry: (entry.key, entry.payload))
        random.Random(number).shuffle(shuffled)
        log = MeshLog(mesh_of.notary)
        log.enter(mesh_of.mesh, (first,))
        for _ in range(8):  # a digest a second sends again what could not be taken in yet
            for entry in shuffled:
                log.add((entry,))
        logs.append(log)
    assert all(log.members == logs[0].members and log.users == logs[0].users for log in logs)
    return logs


def test_revoked_at_the_same_time_it_is_out_in_every_order() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    before = {*ada.log.all_entries()}
    heir = renew(bob, "bob2")
    heir.admit(Seat("friend"))
    renewed = tuple(entry for entry in heir.log.all_entries() if entry not in before)
    (revoked,) = ada.write(ada.log.revocation(bob.node, stops_jobs=True))
    for order in itertools.permutations((*renewed, revoked)):
        log = MeshLog(eve.notary)
        log.enter(eve.mesh, eve.log.all_entries())
        for _ in range(len(order)):
            for entry in order:
                log.add((entry,))
        assert {m.name for m in log.members.values()} == {"ada", "eve"}
        assert {user.user for user in log.admins()} == {"ada"}
        assert log.stopped == {bob.key, heir.key}
        assert not log.users.keys() & {bob.key, heir.key}


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_whoever_revokes_any_of_its_ids_revokes_the_machine(which: int) -> None:
    """Though he had seen all of it, and named one that nobody uses any more."""
    ada, bob, eve = founded("ada", "bob", "eve")
    seats = [bob]
    for number in range(3):
        seats.append(renew(seats[-1], f"bob{number}"))
    meet((ada, seats[-1], eve))
    ada.write(Revoke(seats[which].node, (), stops_jobs=False))
    seats[-1].admit(Seat("friend"))  # he does not know yet
    meet((ada, seats[-1], eve))
    assert eve.names == {"ada", "eve"}
    assert eve.admins == {"ada"}
    assert seats[-1].key not in eve.log.users


def test_rekey_that_was_kept_back_brings_nobody_back() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    kept = entry_of(eve, rekey_to(eve, Seat("eve2")))
    ada.write(ada.log.revocation(eve.node, stops_jobs=False))
    meet((ada, bob, eve))
    eve.log.add((kept,))
    knowing = entry_of(eve, rekey_to(eve, Seat("eve3")))
    for later in (kept, knowing):
        bob.log.add((later,))
        assert bob.names == {"ada", "bob"}
    ada.log.add((kept,))
    ada.admit(Seat("eve2"))
    assert ada.names == {"ada", "bob"}, "nor does an admin who does not see whose keys they are"


def test_machine_that_left_goes_on_as_nobody() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    eve.write(RemoveNode(eve.node), key=KeyId(eve.node))
    eve.log.add((entry_of(eve, rekey_to(eve, Seat("eve2"))),))
    meet((ada, bob, eve))
    assert ada.names == {"ada", "bob"}


def test_renting_machine_that_left_goes_on_as_nobody() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    ada.write(SetRole(eve.node, Role.BURST))
    eve.hears(ada)
    (left,) = eve.write(RemoveNode(eve.node), key=KeyId(eve.node))
    rekey = rekey_to(eve, Seat("eve2"))
    heads = tuple(head for head in eve.log.heads() if head.author != KeyId(eve.node))
    later = LogEntry(eve.mesh, KeyId(eve.node), 1, eve.notary.digest(left), heads, rekey)
    assert eve.log.add((eve.notary.sign(KeyId(eve.node), later),))
    meet((ada, bob, eve))
    assert ada.names == {"ada", "bob"}


def test_admin_who_is_removed_meanwhile_hands_nothing_on() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    heir = renew(bob, "bob2")
    heir.admit(Seat("friend"))
    ada.write(ada.dismissal(bob))  # she has not heard of it
    meet((ada, heir, eve))
    assert eve.admins == {"ada"}
    assert eve.names == {"ada", "bob", "eve"}


# -- who may go on as whom -------------------------------------------------------------------------------------------


def test_forked_chain_ends_the_machine_and_puts_nobody_in_its_place() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    mine, thiefs = Seat("eve2"), Seat("thief")
    logs = everywhere((*ada.log.all_entries(), *(entry_of(eve, rekey_to(eve, heir)) for heir in (mine, thiefs))), ada)
    assert {m.name for m in logs[0].members.values()} == {"ada", "bob"}
    assert logs[0].former[eve.node].name == "eve"
    assert logs[0].frozen == (KeyId(eve.node),)
    assert bob.names == {"ada", "bob", "eve"}


def test_thief_who_lets_it_leave_instead_does_not_bring_the_old_keys_back() -> None:
    _, bob, eve = founded("ada", "bob", "eve")
    entries = (entry_of(eve, rekey_to(eve, Seat("eve2"))), entry_of(eve, RemoveNode(eve.node)))
    for order in (entries, entries[::-1]):
        log = MeshLog(bob.notary)
        log.enter(bob.mesh, bob.log.all_entries())
        for entry in order:
            log.add((entry,))
        assert {m.name for m in log.members.values()} == {"ada", "bob"}


def test_keys_that_were_given_up_do_not_come_back_by_being_called_an_admins() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    heir = renew(eve, "eve2")
    bob.write(RemoveNode(bob.node), key=KeyId(bob.node))
    ada.write(AddAdmin(eve.public_key, eve.node), AddAdmin(bob.public_key, bob.node))
    meet((ada, bob, heir))
    assert ada.log.members.keys() == {ada.node, heir.node}


@pytest.mark.parametrize("whom", ["ada", "eve"])
def test_nobody_goes_on_as_another_member(whom: str) -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    other = {"ada": ada, "eve": eve}[whom]
    ada.write(SetRole(bob.node, Role.BURST))
    meet((ada, bob, eve))
    bob.write(rekey_to(bob, other), key=KeyId(bob.node))
    meet((ada, bob, eve))
    assert ada.names == {"ada", "eve"}
    assert ada.log.members[other.node].role is Role.RIG
    assert ada.log.users[other.key].user == whom
    assert bob.node in ada.log.former


def test_two_machines_cannot_go_on_as_one() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    heir = Seat("both")
    for seat in (bob, eve):
        users = (NewKey(seat.user_key, RING.make(f"next of {seat.name}")),)
        notary = ToyNotary(RING, (heir.public_key, users[0].after))
        rekey = make_rekey(seat.mesh, seat.node, (heir.public_key, b"ca"), users, (seat.notary, notary))
        seat.write(rekey, key=KeyId(seat.node))
    meet((ada, bob, eve))
    assert ada.names == {"ada"}


def test_who_did_not_know_that_he_is_a_member_hands_nothing_on() -> None:
    ada, _, eve = founded("ada", "bob", "eve")
    ada.log.add((entry_of(eve, rekey_to(eve, Seat("eve2")), heads=()),))
    assert ada.names == {"ada", "bob"}


def test_user_of_another_machine_is_not_taken_along() -> None:
    """Both keys agree, yet the account is not this machine's to hand on."""
    ada, bob, eve = founded("ada", "bob", "eve")
    heir = Seat("eve2")
    users = (NewKey(bob.user_key, heir.user_key),)
    notary = ToyNotary(RING, (eve.public_key, bob.user_key))
    rekey = make_rekey(eve.mesh, eve.node, (heir.public_key, b"ca"), users, (notary, heir.notary))
    eve.write(rekey, key=KeyId(eve.node))
    meet((ada, bob, eve))
    assert heir.node in ada.log.members
    assert heir.key not in ada.log.users
    assert ada.log.users[bob.key].node == bob.node


def test_key_that_speaks_for_somebody_goes_on_speaking_for_him() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    heir = Seat("eve2")
    users = (NewKey(eve.user_key, bob.user_key),)
    notary = ToyNotary(RING, (heir.public_key, bob.user_key))
    rekey = make_rekey(eve.mesh, eve.node, (heir.public_key, b"ca"), users, (eve.notary, notary))
    eve.write(rekey, key=KeyId(eve.node))
    meet((ada, bob, eve))
    assert ada.log.users[bob.key].user == "bob"


def forged(eve: Seat, heir: Seat, which: str) -> Rekey:
    right = rekey_to(eve, heir)
    users: tuple[NewKey, ...]
    match which:
        case "the next device key did not agree":
            return replace(right, proofs=(RING.forge(heir.key, "x"), *right.proofs[1:]))
        case "the old user key did not agree":
            return replace(right, proofs=(right.proofs[0], right.proofs[0], right.proofs[2]))
        case "the next user key did not agree":
            return replace(right, proofs=(*right.proofs[:2], right.proofs[1]))
        case "it was agreed for another machine":
            claim = NewKeys(eve.mesh, NodeId("other"), heir.public_key, right.users)
        case "it was agreed for another mesh":
            claim = NewKeys(MeshId("den"), eve.node, heir.public_key, right.users)
        case "other accounts were agreed":
            claim = NewKeys(eve.mesh, eve.node, heir.public_key, ())
        case "a proof is missing":
            return replace(right, proofs=right.proofs[:-1])
        case "its own key again":
            return make_rekey(eve.mesh, eve.node, (eve.public_key, b"ca"), (), (eve.notary, eve.notary))
        case "one key twice":
            users = (NewKey(eve.user_key, heir.public_key),)
            return make_rekey(eve.mesh, eve.node, (heir.public_key, b"ca"), users, (eve.notary, heir.notary))
        case "more accounts than a machine has":
            users = tuple(NewKey(RING.make(f"b{n}"), RING.make(f"a{n}")) for n in range(ACCOUNTS_LIMIT + 1))
            every = ToyNotary(RING, (heir.public_key, *(key for u in users for key in (u.before, u.after))))
            return make_rekey(eve.mesh, eve.node, (heir.public_key, b"ca"), users, (every, every))
        case _:
            raise AssertionError(which)
    proofs = [RING.sign(key_id(key), claim) for key in (heir.public_key, eve.user_key, heir.user_key)]
    return replace(right, proofs=tuple(proofs))


@pytest.mark.parametrize(
    "which",
    [
        "the next device key did not agree",
        "the old user key did not agree",
        "the next user key did not agree",
        "it was agreed for another machine",
        "it was agreed for another mesh",
        "other accounts were agreed",
        "a proof is missing",
        "its own key again",
        "one key twice",
        "more accounts than a machine has",
    ],
)
def test_rekey_without_the_word_of_every_key_is_refused(which: str) -> None:
    ada, _, eve = founded("ada", "bob", "eve")
    assert ada.log.add((entry_of(eve, forged(eve, Seat("eve2"), which)),)) == ()
    assert ada.log.refused
    assert ada.names == {"ada", "bob", "eve"}


def test_no_machine_fills_memories_with_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rekeying, "REKEYS_LIMIT", 5)
    ada, _, eve = founded("ada", "bob", "eve")
    seat = eve
    for number in range(5):
        seat = renew(seat, f"eve{number}")
    ada.hears(seat)
    over = entry_of(seat, rekey_to(seat, Seat("once too often")))
    assert ada.log.add((over,)) == ()
    assert "too many" in ada.log.refused[-1]
    assert ada.names == {"ada", "bob", "eve"}


def test_machine_that_tells_each_another_story_is_out_everywhere_also_at_its_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rekeying, "REKEYS_LIMIT", 5)
    ada, bob, eve = founded("ada", "bob", "eve")
    seat = eve
    for number in range(4):
        seat = renew(seat, f"eve{number}")
    meet((ada, bob, seat))
    for admin, heir in ((ada, Seat("for ada")), (bob, Seat("for bob"))):
        assert admin.log.add((entry_of(seat, rekey_to(seat, heir)),))
        assert heir.node in admin.log.members
    meet((ada, bob))
    assert ada.names == bob.names == {"ada", "bob"}
    assert ada.log.heads() == bob.log.heads()


@given(st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_liar_with_many_stories_keeps_admins_from_nothing(rng: random.Random) -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    told: list[Signed] = []
    tellers = [eve]
    while tellers and len(told) < 12:
        teller = tellers.pop(rng.randrange(len(tellers)))
        for number in range(rng.choice((1, 1, 2))):
            heir = Seat(f"{teller.name}.{number}")
            heir.mesh, heir.log = eve.mesh, eve.log
            told.append(entry_of(teller, rekey_to(teller, heir)))
            tellers.append(heir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rekeying, "REKEYS_LIMIT", 3)
        for admin, friend in ((ada, Seat("new at ada")), (bob, Seat("new at bob"))):
            for entry in rng.sample(told, len(told)):
                if rng.random() < 0.7:  # else only the other admin hears it from the liar
                    admin.log.add((entry,))
            admin.admit(friend)
        meet((ada, bob))
    assert ada.names == bob.names
    assert {"ada", "bob", "new at ada", "new at bob"} <= ada.names
    assert ada.log.heads() == bob.log.heads()


def test_liar_who_forks_everywhere_fills_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rekeying, "REKEYS_LIMIT", 5)
    ada, _, eve = founded("ada", "bob", "eve")
    deepest_first: list[Signed] = []
    tellers = [eve]
    for depth in range(5):
        heirs: list[Seat] = []
        for teller in tellers:
            for side in "ab":
                heir = Seat(f"{teller.name}{side}")
                heir.mesh, heir.log = eve.mesh, eve.log
                entry = entry_of(teller, rekey_to(teller, heir))
                deepest_first.insert(0 if side == "b" else depth * 1000, entry)
                heirs.append(heir)
        tellers = heirs
    kept = sum(len(ada.log.add((entry,))) for _ in range(6) for entry in deepest_first)
    assert len(deepest_first) == 62
    assert 2 <= kept <= 10


def test_no_removal_says_who_goes_on_for_a_machine_that_told_two_stories() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    stories = [entry_of(eve, rekey_to(eve, Seat(f"eve{number}"))) for number in range(2)]
    assert len(ada.log.add(stories)) == 2
    ada.write(Revoke(bob.node, (Head(KeyId(eve.node), 0, Digest(eve.notary.digest(stories[0]))),), False))
    assert ada.names == {"ada"}


def test_rekey_that_cites_what_a_node_wrote_waits_for_nothing_of_it() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    heir = renew(eve, "eve2")
    heads = tuple(head for head in heir.log.heads() if head.author == KeyId(eve.node))
    assert heads
    cited = (*(head for head in bob.log.heads() if bob.log.known(NodeId(head.author)) is None), *heads)
    bob2 = Seat("bob2")
    assert ada.log.add((entry_of(bob, rekey_to(bob, bob2), heads=cited),))
    assert bob2.node in ada.log.members, "what only some have holds up nobody"
    assert bob.node not in ada.log.members
    ada.write(AddAdmin(eve.public_key, eve.node))
    assert bob2.node in ada.log.members, "nor when that key becomes an admin's later: keys given up never come back"
    assert bob.node not in ada.log.members


def test_chain_of_a_machine_that_does_not_rent_is_one_entry_long() -> None:
    ada, _, eve = founded("ada", "bob", "eve")
    many = [
        entry_of(eve, body, seq=seq)
        for seq in range(1, 20)
        for body in (RemoveNode(eve.node), rekey_to(eve, Seat(f"eve{seq}")))
    ]
    assert ada.log.add(many) == ()


# -- what a renting machine wrote ------------------------------------------------------------------------------------


def rented(name: str) -> AddNode:
    public_key = RING.make(name)
    return AddNode(node_id(public_key), public_key, b"ca", name, Role.CLOUD, UserName("eve"), expires_wall_s=9e9)


def test_renting_machine_goes_on_renting_and_its_old_keys_do_not() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    ada.write(SetRole(eve.node, Role.BURST))
    eve.hears(ada)
    eve.write(rented("cloud1"), key=KeyId(eve.node))
    heir = renew(eve, "eve2")
    heir.write(rented("cloud2"), key=KeyId(heir.node))
    meet((ada, bob, heir))
    assert ada.names == {"ada", "bob", "eve", "cloud1", "cloud2"}
    run = [entry for entry in ada.log.all_entries() if entry.key == KeyId(eve.node)]
    previous = ada.notary.digest(run[-1])
    late = LogEntry(eve.mesh, KeyId(eve.node), len(run), previous, (), rented("cloud3"))
    assert ada.log.add((eve.notary.sign(KeyId(eve.node), late),)) == ()
    assert "cloud3" not in ada.names
    heir.write(RemoveNode(node_id(RING.make("cloud1"))), key=KeyId(heir.node))
    ada.hears(heir)
    assert "cloud1" not in ada.names


# -- the order of arrival --------------------------------------------------------------------------------------------


def test_old_keys_go_only_when_the_new_ones_can_come() -> None:
    """What a Rekey follows from is still on its way: the machine stays as it was, so that it can bring it."""
    ada, bob, eve = founded("ada", "bob", "eve")
    (given,) = ada.write(SetRole(eve.node, Role.VIEWER))
    eve.hears(ada)
    heir = renew(eve, "eve2")
    news = heir.log.beyond(bob.log.heads())
    assert news[-1].key == KeyId(eve.node), "it is sent last"
    bob.log.add(news[-1:])
    assert eve.node in bob.log.members
    bob.log.add((given,))
    assert eve.node not in bob.log.members
    assert heir.node in bob.log.members


@given(st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_order_does_not_matter(rng: random.Random) -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    heir = renew(bob, "bob2")
    heir.admit(Seat("y"))
    ada.write(SetRole(eve.node, Role.VIEWER))
    if rng.random() < 0.5:
        ada.write(ada.log.revocation(bob.node, stops_jobs=False))
    entries = [*ada.log.all_entries(), *heir.log.all_entries(), entry_of(eve, rekey_to(eve, Seat("eve2")))]
    if rng.random() < 0.5:
        entries.append(entry_of(eve, rekey_to(eve, Seat("thief"))))
    rng.shuffle(entries)
    everywhere(dict.fromkeys(entries), ada)


class Partitioned:
    """Machines that are cut off from each other again and again, change keys, and revoke each other."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seats = founded(*(f"{seed}-{number}" for number in range(5)))
        self.gone: set[str] = set()
        self.count = 0

    def play(self, steps: int) -> None:
        for _ in range(steps):
            sides = [self.rng.randrange(2) for _ in self.seats]
            for place in self.rng.sample(range(len(self.seats)), len(self.seats)):
                self.act(place)
                near = [o for o, side in zip(self.seats, sides, strict=True) if side == sides[place]]
                self.seats[place].hears(*self.rng.sample(near, self.rng.randrange(len(near) + 1)))

    def name(self, place: int) -> str:
        return self.seats[place].name.partition("/")[0]

    def act(self, place: int) -> None:
        seat = self.seats[place]
        choice = self.rng.random()
        if choice < 0.25 and seat.node in seat.log.members:
            self.count += 1
            self.seats[place] = renew(seat, f"{self.name(place)}/{self.count}")
        elif choice < 0.35 and seat.key in seat.log.users and seat.log.users[seat.key].is_admin:
            name = self.name(self.rng.randrange(1, len(self.seats)))
            target = seat.log.member_named(name)
            if target is not None and target.node != seat.node:
                seat.write(seat.log.revocation(target.node, stops_jobs=False))
                self.gone.add(name)


@pytest.mark.parametrize("seed", range(60))
def test_through_partitions_keys_change_and_nobody_revoked_comes_back(seed: int) -> None:
    world = Partitioned(seed)
    world.play(12)
    meet(world.seats)
    log = world.seats[0].log
    assert world.count
    for place, seat in enumerate(world.seats):
        name = world.name(place)
        if name in world.gone:
            assert name not in world.seats[0].names, f"{name} was revoked and is back"
            assert seat.key not in log.users
        else:
            assert log.members[seat.node].name == name, f"{name} is lost"
            assert log.users[seat.key].user == name
    assert log.users[world.seats[0].key].is_admin, "nobody takes the first one's right"
