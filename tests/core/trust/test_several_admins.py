"""Several admins: who counts, who is out for ever, and that nodes agree, whatever was said at the same time."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshgpu.core.trust.meshlog import MeshLog, found
from meshgpu.errors import TrustError
from meshgpu.model.ids import Digest, KeyId, MeshId, NodeId, UserName, key_id, node_id
from meshgpu.model.trust import (
    AddAdmin,
    AddNode,
    Body,
    Genesis,
    Head,
    LinkUser,
    LogEntry,
    RemoveAdmin,
    RemoveNode,
    Revoke,
    Role,
    SetRole,
    Signed,
)
from meshgpu.sim.fakes import KeyRing, ToyNotary

RING = KeyRing()


@dataclass
class Seat:
    """A machine with one account, and what it holds of the log. user: whose it is; as the machine is called."""

    name: str
    user: str = ""
    mesh: MeshId = field(init=False)
    log: MeshLog = field(init=False)

    def __post_init__(self) -> None:
        self.public_key = RING.make(f"node {self.name}")
        self.user_key = RING.make(f"user {self.name}")
        self.notary = ToyNotary(RING, (self.public_key, self.user_key))
        self.log = MeshLog(self.notary)

    @property
    def node(self) -> NodeId:
        return node_id(self.public_key)

    @property
    def key(self) -> KeyId:
        return key_id(self.user_key)

    def added(self) -> tuple[Body, ...]:
        user = UserName(self.user or self.name)
        node = AddNode(self.node, self.public_key, b"ca", self.name, Role.RIG, user)
        return node, LinkUser(user, self.user_key, self.node, 1000)

    def promoted(self) -> AddAdmin:
        return AddAdmin(self.user_key, self.node)

    def write(self, *bodies: Body, key: KeyId | None = None) -> tuple[Signed, ...]:
        entries = self.log.write(key or self.key, bodies)
        self.log.add(entries)
        return entries

    def admit(self, *seats: "Seat") -> tuple[Signed, ...]:
        return self.write(*(body for seat in seats for body in seat.added()))

    def hears(self, *others: "Seat") -> None:
        for other in others:
            if self.log.mesh is None:
                self.log.enter(other.mesh, other.log.all_entries())
                self.mesh = other.mesh
            else:
                self.log.add(other.log.beyond(self.log.heads()))

    def dismissal(self, other: "Seat") -> RemoveAdmin:
        return RemoveAdmin(other.key, self.log.last_of(other.key))

    @property
    def names(self) -> set[str]:
        return {member.name for member in self.log.members.values()}

    @property
    def admins(self) -> set[str]:
        return {user.user for user in self.log.admins()}

    @property
    def view(self) -> tuple[object, ...]:
        log = self.log
        return log.members, log.users, log.former, log.heads(), log.frozen, log.may_leave


def founded(*names: str) -> list[Seat]:
    """The first of `names` founds, admits the others and makes the second an admin."""
    seats = [Seat(name) for name in names]
    first = seats[0]
    genesis = Genesis("lab", first.user_key, RING.make("recovery"), b"nonce")
    mesh, entry = found(first.notary, first.key, genesis)
    first.log.enter(mesh, (entry,))
    first.mesh = mesh
    first.admit(*seats)
    first.write(seats[1].promoted())
    for seat in seats[1:]:
        seat.hears(first)
    return seats


def meet(seats: Iterable[Seat]) -> None:
    """Everybody tells everybody, until nobody has news."""
    seats = list(seats)
    for _ in range(4):
        for seat in seats:
            seat.hears(*(other for other in seats if other is not seat))
    assert all(seat.view == seats[0].view for seat in seats)


def test_second_admin_admits() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    dan = Seat("dan")
    bob.admit(dan)
    meet((ada, bob, eve))
    assert eve.names == {"ada", "bob", "eve", "dan"}
    assert eve.admins == {"ada", "bob"}


def test_two_admins_at_once_lose_nobody() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    ada.admit(Seat("x"))
    bob.admit(Seat("y"))
    ada.write(SetRole(eve.node, Role.SUBMITTER))
    bob.write(eve.promoted())
    meet((ada, bob, eve))
    assert eve.names == {"ada", "bob", "eve", "x", "y"}
    assert eve.log.members[eve.node].role is Role.SUBMITTER


def test_what_a_removed_admin_did_before_stays_and_what_he_does_later_counts_for_nothing() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    bob.admit(Seat("before"))
    ada.hears(bob)
    ada.write(ada.dismissal(bob))
    bob.admit(Seat("later"))  # bob does not know yet
    meet((ada, bob, eve))
    assert eve.names == {"ada", "bob", "eve", "before"}
    assert eve.admins == {"ada"}
    with pytest.raises(TrustError) as caught:
        bob.admit(Seat("much-later"))
    assert caught.value.code == "not-an-admin"


def test_admins_who_remove_each_other_are_both_out_and_recovery_begins_anew() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    ada.write(ada.dismissal(bob))
    bob.write(bob.dismissal(ada))
    meet((ada, bob, eve))
    assert eve.admins == set()
    assert eve.names == {"ada", "bob", "eve"}
    recovery = ToyNotary(RING, (RING.make("recovery"),))
    eve.log.add(eve.log.write(key_id(RING.make("recovery")), (eve.promoted(),), recovery))
    meet((ada, bob, eve))
    assert ada.admins == {"eve"}


def test_removed_admin_never_comes_back() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    ada.write(ada.dismissal(bob), bob.promoted())
    meet((ada, bob, eve))
    assert eve.admins == {"ada"}


def test_thief_undoes_nothing_that_was_done_before() -> None:
    """Out already, he writes as if he did not know, and names an early end."""
    ada, bob, eve = founded("ada", "bob", "eve")
    early = Head(ada.key, 0, Digest(str(ada.mesh)))
    ada.write(ada.dismissal(bob))
    bob.write(RemoveAdmin(ada.key, early))
    meet((ada, bob, eve))
    assert eve.names == {"ada", "bob", "eve"}
    assert eve.admins == set()


def test_second_admin_could_be_who_is_on_another_machine_and_was_never_removed() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    own, other = Seat("ada-2", "ada"), Seat("zoe")
    ada.admit(own, other)
    ada.write(ada.dismissal(bob))
    meet((ada, bob, eve))
    assert [user.user for user in eve.log.candidates()] == ["eve", "zoe", "ada"]
    assert eve.log.candidates()[-1].node == own.node
    ada.write(eve.promoted())
    meet((ada, bob, eve))
    assert [user.user for user in eve.log.candidates()] == ["zoe", "ada"]


def test_thief_who_knows_that_he_is_out_writes_in_vain() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    ada.write(ada.dismissal(bob))
    bob.hears(ada)
    heads = bob.log.heads()
    own = next(head for head in heads if head.author == ada.key)
    entry = LogEntry(bob.mesh, bob.key, 0, Digest(""), (own,), RemoveAdmin(ada.key, own))
    bob.log.add((bob.notary.sign(bob.key, entry),))
    meet((ada, bob, eve))
    assert eve.admins == {"ada"}


def test_revoked_machine_is_out_with_its_admin_and_its_users_for_ever() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    ada.write(ada.log.revocation(bob.node, stops_jobs=True))
    bob.admit(Seat("friend"))
    meet((ada, bob, eve))
    assert eve.names == {"ada", "eve"}
    assert eve.admins == {"ada"}
    assert bob.key not in eve.log.users
    assert eve.log.former[bob.node].name == "bob"
    assert eve.log.stopped == {bob.key}
    ada.admit(bob)
    ada.write(bob.promoted())
    meet((ada, bob, eve))
    assert eve.names == {"ada", "eve"}


def test_admin_of_a_revoked_machine_of_whom_nobody_had_heard_is_out_too() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    bob.write(eve.promoted())  # ada does not know
    eve.hears(bob)
    eve.admit(Seat("friend"))
    ada.write(ada.log.revocation(eve.node, stops_jobs=False))
    meet((ada, bob, eve))
    assert ada.admins == {"ada", "bob"}
    assert ada.names == {"ada", "bob"}


def test_node_leaves_by_its_own_word_and_nobody_else_by_it() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    false = LogEntry(eve.mesh, KeyId(eve.node), 0, Digest(""), (), RemoveNode(bob.node))
    bob.log.add((eve.notary.sign(KeyId(eve.node), false),))
    assert bob.names == {"ada", "bob", "eve"}
    with pytest.raises(TrustError):
        eve.write(RemoveNode(bob.node), key=KeyId(eve.node))
    ada, bob, eve = founded("ada", "bob", "eve")
    eve.write(RemoveNode(eve.node), key=KeyId(eve.node))
    meet((ada, bob, eve))
    assert bob.names == {"ada", "bob"}


def test_machine_that_never_rented_fills_nobodys_memory() -> None:
    ada, _, eve = founded("ada", "bob", "eve")
    own = KeyId(eve.node)
    many = [
        eve.notary.sign(own, LogEntry(eve.mesh, own, seq, Digest(""), (), RemoveNode(NodeId(f"cloud{seq}"))))
        for seq in range(50)
    ]
    assert ada.log.add(many) == ()


@pytest.mark.parametrize("body", [Revoke(NodeId("x"), (), stops_jobs=False), SetRole(NodeId("x"), Role.BURST)])
def test_nodes_may_not_say_what_admins_may(body: Body) -> None:
    ada, _, eve = founded("ada", "bob", "eve")
    entry = eve.notary.sign(KeyId(eve.node), LogEntry(eve.mesh, KeyId(eve.node), 0, Digest(""), (), body))
    assert ada.log.add((entry,)) == ()
    assert "no node may say" in ada.log.refused[-1]


def test_forged_entry_is_refused_and_named() -> None:
    ada, _, _ = founded("ada", "bob", "eve")
    entry = LogEntry(ada.mesh, ada.key, 9, Digest(""), (), SetRole(ada.node, Role.BURST))
    assert ada.log.add((RING.forge(ada.key, entry),)) == ()
    assert "signature" in ada.log.refused[-1]


def fork(seat: Seat, at: int, body: Body) -> Signed:
    """A second entry with a number that `seat` has used."""
    run = [entry for entry in seat.log.all_entries() if entry.key == seat.key]
    previous = seat.notary.digest(run[at - 1])
    return seat.notary.sign(seat.key, LogEntry(seat.mesh, seat.key, at, previous, (), body))


def test_fork_freezes_until_a_removal_says_which_side_is_meant() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    forged = fork(ada, 3, Seat("evil").added()[0])
    for seat in (ada, bob, eve):
        seat.log.add((forged,))
    assert bob.log.frozen == (ada.key,)
    assert bob.admins == set()  # who made bob an admin is in doubt
    recovery = ToyNotary(RING, (RING.make("recovery"),))
    key = key_id(RING.make("recovery"))
    bob.log.add(bob.log.write(key, (bob.dismissal(ada),), recovery))
    meet((ada, bob, eve))
    assert eve.names == {"ada", "bob", "eve"}
    assert eve.admins == {"bob"}
    assert eve.log.frozen == ()


def test_true_side_is_taken_in_although_two_false_ones_were_here_first() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    late = Seat("late")
    late.log.enter(ada.mesh, ada.log.all_entries()[:3])
    late.mesh = ada.mesh
    late.log.add((fork(ada, 3, Seat("evil").added()[0]), fork(ada, 3, Seat("worse").added()[0])))
    recovery = ToyNotary(RING, (RING.make("recovery"),))
    bob.log.add(bob.log.write(key_id(RING.make("recovery")), (bob.dismissal(ada),), recovery))
    meet((bob, eve, late))
    assert late.names == {"ada", "bob", "eve"}


def test_only_the_recovery_key_of_the_genesis_recovers() -> None:
    _, _, eve = founded("ada", "bob", "eve")
    other = RING.make("another recovery key")
    with pytest.raises(TrustError):
        eve.log.write(key_id(other), (eve.promoted(),), ToyNotary(RING, (other,)))


def test_recovery_key_cannot_be_removed() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    recovery = RING.make("recovery")
    notary = ToyNotary(RING, (recovery,))
    entries = ada.log.write(key_id(recovery), (eve.promoted(),), notary)
    ada.log.add(entries)
    dan = Seat("dan")
    ada.write(RemoveAdmin(key_id(recovery), Head(key_id(recovery), 0, ada.notary.digest(entries[0]))), *dan.added())
    ada.log.add(ada.log.write(key_id(recovery), (dan.promoted(),), notary))
    meet((ada, bob, eve))
    assert eve.admins == {"ada", "bob", "eve", "dan"}


def test_who_was_made_an_admin_by_an_entry_that_does_not_count_is_none() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    ada.write(ada.dismissal(bob))
    bob.write(eve.promoted())  # both do not know yet
    eve.hears(bob)
    eve.admit(Seat("z"))
    meet((ada, bob, eve))
    assert ada.admins == {"ada"}
    assert ada.names == {"ada", "bob", "eve"}


def test_entry_waits_for_what_it_follows_from() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    (earlier,) = ada.write(SetRole(eve.node, Role.VIEWER))
    bob.hears(ada)
    (later,) = bob.write(SetRole(eve.node, Role.SUBMITTER))
    eve.log.add((later,))
    assert eve.log.members[eve.node].role is Role.RIG
    eve.log.add((earlier,))
    assert eve.log.members[eve.node].role is Role.SUBMITTER


def test_entry_that_follows_from_nothing_stops_nobody() -> None:
    """A member names a head that does not exist: what admins write after they heard it counts all the same."""
    ada, bob, eve = founded("ada", "bob", "eve")
    nothing = Head(ada.key, 77, Digest("f" * 64))
    own = KeyId(eve.node)
    hostile = eve.notary.sign(own, LogEntry(eve.mesh, own, 0, Digest(""), (nothing,), RemoveNode(eve.node)))
    assert ada.log.add((hostile,)), "it is kept: what it follows from may be on its way"
    ada.admit(Seat("dan"))
    ada.write(ada.log.revocation(eve.node, stops_jobs=False))
    meet((ada, bob))
    assert bob.names == {"ada", "bob", "dan"}


@given(st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_order_does_not_matter(rng: random.Random) -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    ada.admit(Seat("x"))
    bob.admit(Seat("y"))
    ada.write(ada.dismissal(bob))
    bob.write(eve.promoted(), bob.dismissal(ada))
    eve.hears(bob)
    eve.admit(Seat("z"))
    forged = fork(ada, 4, Seat("evil").added()[0])
    everything = {*ada.log.all_entries(), *bob.log.all_entries(), *eve.log.all_entries(), forged}
    first = next(entry for entry in everything if ada.notary.digest(entry) == str(ada.mesh))
    logs = [MeshLog(ada.notary) for _ in range(2)]
    for log in logs:
        shuffled = sorted(everything, key=lambda entry: (entry.key, entry.payload))
        rng.shuffle(shuffled)
        log.enter(ada.mesh, (first,))
        for _ in range(6):  # a digest a second sends again what could not be taken in yet
            for entry in shuffled:
                log.add((entry,))
    assert logs[0].members == logs[1].members
    assert logs[0].users == logs[1].users
    assert logs[0].heads() == logs[1].heads()


class Partitioned:
    """Machines that are cut off from each other again and again while admins act; what each did is kept."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seats = founded(*(f"{seed}-{number}" for number in range(5)))
        self.admitted: dict[str, str] = {}
        self.removed: set[str] = set()
        self.dismissed: set[str] = set()
        self.count = 0

    def play(self, steps: int) -> None:
        for _ in range(steps):
            sides = [self.rng.randrange(2) for _ in self.seats]
            for seat in self.rng.sample(self.seats, len(self.seats)):
                if seat.name in seat.admins:
                    self.act(seat)
                near = [o for o, side in zip(self.seats, sides, strict=True) if side == sides[self.seats.index(seat)]]
                seat.hears(*self.rng.sample(near, self.rng.randrange(len(near) + 1)))

    def act(self, admin: Seat) -> None:
        choice = self.rng.random()
        other = self.rng.choice(self.seats)
        if choice < 0.5:
            self.count += 1
            newcomer = Seat(f"{admin.name}-{self.count}")
            admin.admit(newcomer)
            self.admitted[newcomer.name] = admin.name
        elif choice < 0.65 and other.name in admin.names:
            admin.write(other.promoted())
        elif choice < 0.7 and other is not admin and other.name in admin.admins:
            admin.write(admin.dismissal(other))
            self.dismissed.add(other.name)
        elif choice < 0.75 and other is not admin and other.name in admin.names and other is not self.seats[0]:
            admin.write(admin.log.revocation(other.node, stops_jobs=False))
            self.removed.add(other.name)


@pytest.mark.parametrize("seed", range(60))
def test_through_partitions_nobody_admitted_is_lost_and_nobody_removed_comes_back(seed: int) -> None:
    world = Partitioned(seed)
    world.play(12)
    meet(world.seats)
    seat = world.seats[0]
    doubtful = world.removed | world.dismissed
    for name, admin in world.admitted.items():
        if admin not in doubtful:
            assert name in seat.names, f"{name}, admitted by {admin}, is lost"
    for name in world.removed:
        assert name not in seat.names, f"{name} was removed and is back"
        assert name not in seat.admins
    assert not world.dismissed & seat.admins
    assert world.admitted
