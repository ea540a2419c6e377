"""Members and former admins who tell each another story: nodes agree in the end, and nobody revoked stays."""

import itertools
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence

import pytest

from meshgpu.core.membership.gossip import fitting
from meshgpu.core.trust.rekeying import make_rekey
from meshgpu.model.ids import NO_DIGEST, Digest, KeyId, NodeId
from meshgpu.model.trust import AddAdmin, Body, Head, LogEntry, NewKey, Rekey, RemoveNode, Role, SetRole, Signed
from tests.core.trust.test_rekeying import renew, rented
from tests.core.trust.test_several_admins import RING, Seat, founded, meet


def citing(seat: Seat) -> tuple[Head, ...]:
    """What admins wrote, as an entry of today cites it."""
    return tuple(head for head in seat.log.heads() if seat.log.known(NodeId(head.author)) is None)


def said(
    seat: Seat, author: str, body: Body, heads: tuple[Head, ...] = (), seq: int = 0, after: Signed | None = None
) -> Signed:
    """What the key `author` signs, taken in by nobody yet."""
    key = KeyId(author)
    previous = Digest(seat.notary.digest(after)) if after else NO_DIGEST
    cited = tuple(head for head in heads if head.author != key)
    return RING.sign(key, LogEntry(seat.mesh, key, seq, previous, cited, body))


def to(mesh_of: Seat, seat: Seat, heir: Seat) -> Rekey:
    users = (NewKey(seat.user_key, heir.user_key),)
    return make_rekey(mesh_of.mesh, seat.node, (heir.public_key, b"ca2"), users, (seat.notary, heir.notary))


def goes_on(mesh_of: Seat, seat: Seat, heir: Seat) -> Signed:
    return said(mesh_of, seat.node, to(mesh_of, seat, heir), citing(mesh_of))


def leaves(mesh_of: Seat, seat: Seat, *, is_knowing: bool = True) -> Signed:
    return said(mesh_of, seat.node, RemoveNode(seat.node), citing(mesh_of) if is_knowing else ())


def revoke(admin: Seat, name: str) -> None:
    member = admin.log.member_named(name)
    assert member is not None
    admin.write(admin.log.revocation(member.node, stops_jobs=True))


# -- members -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["two leaves", "two more keys"])
def test_member_who_tells_one_half_three_stories_is_out_after_a_removal(other: str) -> None:
    ada, bob, carl, eve = founded("ada", "bob", "carl", "eve")
    first = goes_on(ada, eve, Seat("e2"))
    two = (
        (leaves(ada, eve), leaves(ada, eve, is_knowing=False))
        if other == "two leaves"
        else (goes_on(ada, eve, Seat("e3")), goes_on(ada, eve, Seat("e4")))
    )
    ada.log.add((first,))
    carl.log.add((first,))
    bob.log.add(two)
    revoke(ada, "eve")
    meet((ada, bob, carl))
    assert bob.names == {"ada", "bob", "carl"}


def test_who_left_does_not_come_back_by_leaving_twice() -> None:
    ada, bob, eve = founded("ada", "bob", "eve")
    for is_knowing in (True, False):
        ada.log.add((leaves(bob, eve, is_knowing=is_knowing),))
        meet((ada, bob))
        assert ada.names == {"ada", "bob"}


def test_member_below_another_ones_fork_can_be_revoked() -> None:
    ada, bob, carl, eve, xav = founded("ada", "bob", "carl", "eve", "xav")
    below = goes_on(ada, xav, Seat("y"))
    fork = goes_on(ada, eve, xav), goes_on(ada, eve, Seat("e2"))
    ada.log.add((below, *fork))
    bob.log.add(fork)
    revoke(ada, "xav")
    meet((ada, bob, carl))
    assert bob.names == {"ada", "bob", "carl"}


def test_limit_does_not_hang_on_the_order() -> None:
    ada, bob, eve, xav = founded("ada", "bob", "eve", "xav")
    seats = [eve, *(Seat(f"eve{number}") for number in range(63)), xav]
    line = [goes_on(ada, *pair) for pair in itertools.pairwise(seats)]
    after = goes_on(ada, xav, Seat("y"))
    ada.log.add((after,))
    ada.log.add(line)
    bob.log.add(line)
    bob.log.add((after,))
    meet((ada, bob))


def test_heir_of_a_fork_is_disputed_nowhere() -> None:
    ada, bob, eve, mal = founded("ada", "bob", "eve", "mal")
    e2, heir = Seat("e2"), Seat("X")
    sides = goes_on(ada, eve, e2), goes_on(ada, eve, Seat("e3"))
    ada.log.add((sides[0], goes_on(ada, e2, heir)))
    for seat in (ada, bob):
        seat.log.add(sides)
    bob.log.add((goes_on(ada, mal, heir),))
    meet((ada, bob))
    assert heir.node in ada.log.members


def test_rekey_whose_chain_is_withheld_is_not_taken_in() -> None:
    ada, bob, eve, mal = founded("ada", "bob", "eve", "mal")
    ada.write(SetRole(eve.node, Role.BURST))
    meet((ada, bob))
    heir, cloud = Seat("X"), said(ada, eve.node, rented("c0"), citing(ada))
    assert not ada.log.add((said(ada, eve.node, to(ada, eve, heir), citing(ada), 1, cloud),))
    bob.log.add((goes_on(ada, mal, heir),))
    meet((ada, bob))


def test_nothing_follows_a_rekey_in_the_same_chain() -> None:
    ada, _, eve = founded("ada", "bob", "eve")
    ada.write(SetRole(eve.node, Role.BURST))
    first = goes_on(ada, eve, Seat("h0"))
    second = said(ada, eve.node, to(ada, eve, Seat("h1")), citing(ada), 1, first)
    assert ada.log.add((first, second)) == (first,)


def test_stopped_jobs_stay_stopped_when_their_machine_forks_later() -> None:
    ada, _, eve = founded("ada", "bob", "eve")
    e2 = Seat("e2")
    ada.log.add((goes_on(ada, eve, e2),))
    ada.write(ada.log.revocation(e2.node, stops_jobs=True))
    assert ada.log.stopped == {eve.key, e2.key}
    ada.log.add((goes_on(ada, eve, Seat("e3")),))
    assert ada.log.stopped >= {eve.key, e2.key}


# -- former admins -----------------------------------------------------------------------------------------------------


def dismissed(*names: str) -> list[Seat]:
    """The last of `names` was an admin."""
    seats = founded(*names)
    mal = seats[-1]
    seats[0].write(mal.promoted())
    meet(seats)
    seats[0].write(seats[0].dismissal(mal))
    meet(seats)
    return seats


def three_sides(ada: Seat, mal: Seat, friend: Seat, other: NodeId) -> tuple[Signed, Signed, Signed]:
    """What a former admin's chain says first: that `friend` is one; and two that prove it a liar without that."""
    sides = AddAdmin(friend.user_key, mal.node), SetRole(other, Role.RIG)
    known, half = citing(ada), citing(ada)[:1]
    first, second = (said(ada, mal.key, body, known) for body in sides)
    return first, second, said(ada, mal.key, sides[1], half)


@pytest.mark.parametrize("sides_at_ada", [1, 2])
def test_former_admin_holds_up_no_admins_entries(sides_at_ada: int) -> None:
    ada, bob, carl, mal = dismissed("ada", "bob", "carl", "mal")
    friend = Seat("P")
    sides = three_sides(ada, mal, friend, carl.node)
    ada.log.add((*sides[:sides_at_ada], said(ada, friend.key, SetRole(carl.node, Role.RIG), citing(ada))))
    bob.log.add(sides[1:])
    ada.admit(Seat("dan"))
    revoke(ada, "carl")
    meet_in_membership((ada, bob))
    assert bob.names == {"ada", "bob", "mal", "dan"}


def test_former_admin_holds_up_no_machine_that_takes_new_keys() -> None:
    ada, bob, carl, mal = dismissed("ada", "bob", "carl", "mal")
    friend = Seat("P")
    sides = three_sides(ada, mal, friend, carl.node)
    ada.log.add((sides[0], said(ada, friend.key, SetRole(carl.node, Role.RIG), citing(ada))))
    bob.log.add(sides[1:])
    carl.hears(ada)
    heir = renew(carl, "carl2")
    meet_in_membership((ada, bob, heir))
    assert heir.node in bob.log.members


def meet_in_membership(seats: Sequence[Seat]) -> None:
    for _ in range(8):
        for seat in seats:
            seat.hears(*(other for other in seats if other is not seat))
    assert all((seat.log.members, seat.log.users) == (seats[0].log.members, seats[0].log.users) for seat in seats)


# -- all of it, at random ----------------------------------------------------------------------------------------------


class Liars:
    """Two members sign whatever they like and tell each what they like, while admins act and machines change keys."""

    def __init__(self, seed: int, *, is_renting: bool) -> None:
        self.rng = random.Random(seed)
        self.is_renting = is_renting
        ada, bob, carl, *liars = founded("ada", "bob", "carl", "eve", "mal")
        if is_renting:
            ada.write(SetRole(liars[0].node, Role.BURST))
            meet((ada, bob, carl))
        self.honest, self.liars = [ada, bob, carl], liars
        self.names = [seat.name for seat in self.honest]
        self.lies: list[Signed] = []
        self.own: dict[NodeId, list[tuple[Signed, int]]] = defaultdict(list)
        self.first = citing(ada)
        self.admitted: set[str] = set()
        self.revoked: set[str] = set()
        self.count = 0

    def play(self, steps: int) -> None:
        for _ in range(steps):
            for _ in range(self.rng.randrange(3)):
                self.lie()
            told = self.rng.sample(self.lies, min(len(self.lies), self.rng.randrange(1, 4)))
            self.rng.choice(self.honest).log.add(told)
            self.act(self.rng.random(), self.rng.randrange(3))

    def lie(self) -> None:
        ada, liar = self.honest[0], self.rng.choice(self.liars)
        seq, after = 0, None
        if self.is_renting and self.own[liar.node] and self.rng.random() < 0.4:
            after, seq = self.rng.choice(self.own[liar.node])
            seq += 1
        choice = self.rng.random()
        body: Body = RemoveNode(liar.node)
        if choice < 0.6:
            is_new = self.rng.random() < 0.7
            heir = Seat(f"n{self.rng.randrange(14)}") if is_new else self.rng.choice(self.liars)
            if heir.node == liar.node:
                return
            body = to(ada, liar, heir)
            if all(other.node != heir.node for other in self.liars):
                self.liars.append(heir)
        elif choice > 0.85 and self.is_renting:
            body = rented(f"c{self.rng.randrange(5)}")
        entry = said(ada, liar.node, body, self.rng.choice((self.first, (), citing(ada))), seq, after)
        self.own[liar.node].append((entry, seq))
        self.lies.append(entry)

    def act(self, choice: float, place: int) -> None:
        seat = self.honest[place]
        if choice < 0.12:
            self.count += 1
            self.honest[place] = renew(seat, f"{self.names[place]}/{self.count}")
        elif choice < 0.3 and place < 2:
            self.count += 1
            newcomer = Seat(f"d{self.count}")
            seat.admit(newcomer)
            self.admitted.add(newcomer.name)
        elif choice < 0.42 and place < 2 and (seen := sorted(seat.names & {"eve", "mal"})):
            name = self.rng.choice(seen)
            revoke(seat, name)
            self.revoked.add(name)
        elif choice < 0.6:
            one, other = self.rng.sample(self.honest, 2)
            one.hears(other)


def run_liars(seeds: Iterable[int], *, is_renting: bool) -> None:
    for seed in seeds:
        world = Liars(seed, is_renting=is_renting)
        world.play(14)
        for _ in range(8):
            for seat in world.honest:
                seat.hears(*(other for other in world.honest if other is not seat))
        ada = world.honest[0]
        for seat in world.honest:
            assert seat.log.members == ada.log.members, f"seed {seed}: members differ"
            assert seat.log.users == ada.log.users, f"seed {seed}: users differ"
            assert seat.log.heads() == ada.log.heads(), f"seed {seed}: heads differ"
            assert seat.node in ada.log.members, f"seed {seed}: {seat.name} is lost"
        assert world.admitted <= ada.names, f"seed {seed}: who was admitted is lost"
        assert not world.revoked & ada.names, f"seed {seed}: who was revoked is a member"


@pytest.mark.parametrize("is_renting", [False, True])
def test_liars_keep_nobody_in_and_nobody_out(is_renting: bool) -> None:
    run_liars(range(60), is_renting=is_renting)


@pytest.mark.slow
@pytest.mark.parametrize("is_renting", [False, True])
def test_many_liars_keep_nobody_in_and_nobody_out(is_renting: bool) -> None:
    run_liars(range(60, 600), is_renting=is_renting)


def test_member_that_could_rent_for_a_while_is_the_same_everywhere() -> None:
    run_liars((423,), is_renting=True)


# -- half-told stories -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_admitting", [False, True])
def test_half_told_role_of_a_former_admin_keeps_nobody_revoked_in(is_admitting: bool) -> None:
    ada, bob, carl, eve, mal = dismissed("ada", "bob", "carl", "eve", "mal")
    heir = Seat("e2")
    lets_rent = said(ada, mal.key, SetRole(eve.node, Role.BURST), citing(ada))
    proofs = tuple(said(ada, mal.key, SetRole(carl.node, Role.RIG), heads) for heads in (citing(ada), citing(ada)[:1]))
    cloud = said(ada, eve.node, rented("c0"), citing(ada))
    ada.log.add((lets_rent, cloud, said(ada, eve.node, to(ada, eve, heir), citing(ada), 1, cloud)))
    bob.log.add(proofs)
    carl.hears(bob)
    if is_admitting:
        ada.hears(bob)
        ada.admit(Seat("dan"))
    revoke(ada, "eve")
    meet((ada, bob, carl))
    assert "eve" not in bob.names


def test_what_a_machine_wrote_that_rents_for_some_only_proves_no_lie_of_it() -> None:
    ada, bob, carl, eve, mal = dismissed("ada", "bob", "carl", "eve", "mal")
    heir = Seat("e2")
    lets_rent = said(ada, mal.key, SetRole(eve.node, Role.BURST), citing(ada))
    proofs = tuple(said(ada, mal.key, SetRole(carl.node, Role.RIG), heads) for heads in (citing(ada), citing(ada)[:1]))
    leaves_not = goes_on(ada, eve, heir)
    ada.log.add((lets_rent, said(ada, eve.node, rented("c0"), citing(ada)), leaves_not))
    bob.log.add((*proofs, leaves_not))
    meet((ada, bob, carl))
    assert heir.node in ada.log.members


def test_two_lies_of_a_machine_that_rents_for_some_only_hide_no_keys_of_it() -> None:
    ada, bob, carl, eve, mal = dismissed("ada", "bob", "carl", "eve", "mal")
    heir = Seat("e2")
    lets_rent = said(ada, mal.key, SetRole(eve.node, Role.BURST), citing(ada))
    proofs = tuple(said(ada, mal.key, SetRole(carl.node, Role.RIG), heads) for heads in (citing(ada), citing(ada)[:1]))
    ada.log.add((lets_rent, *(said(ada, eve.node, rented(name), citing(ada)) for name in ("c0", "c1"))))
    bob.log.add((*proofs, goes_on(bob, eve, heir)))
    meet((ada, bob, carl))
    assert heir.node in ada.log.members


def test_machine_whom_only_one_side_of_a_fork_lets_in_is_not_told_of() -> None:
    ada, bob, carl, mal = dismissed("ada", "bob", "carl", "mal")
    ghost = Seat("ghost")
    lets_in = said(ada, mal.key, ghost.added()[0], citing(ada))
    proofs = tuple(said(ada, mal.key, SetRole(carl.node, Role.RIG), heads) for heads in (citing(ada), citing(ada)[:1]))
    assert len(ada.log.add((lets_in, leaves(ada, ghost)))) == 2
    bob.log.add(proofs)
    meet((ada, bob, carl))
    assert KeyId(ghost.node) not in {head.author for head in ada.log.heads()}


def test_liars_keys_starve_nobody() -> None:
    ada, bob, mal = dismissed("ada", "bob", "mal")
    keys = [Seat(f"P{number}") for number in range(300)]
    chain: list[Signed] = []
    for seq, friend in enumerate(keys):
        after = chain[-1] if chain else None
        chain.append(said(ada, mal.key, AddAdmin(friend.user_key, mal.node), citing(ada), seq, after))
    ada.log.add(chain)
    for friend in keys:
        ada.log.add(said(ada, friend.key, SetRole(bob.node, role), citing(ada)) for role in (Role.RIG, Role.SUBMITTER))
    ada.admit(Seat("dan"))
    heir = renew(ada, "ada2")
    for _ in range(8):
        bob.log.add(fitting(heir.log.beyond(bob.log.heads())))
    assert heir.node in bob.log.members
    assert "dan" in bob.names
    assert len(bob.log.frozen) == len(keys)


def test_long_chain_that_only_one_member_takes_in_starves_nobody() -> None:
    ada, bob, carl, mal = dismissed("ada", "bob", "carl", "mal")
    friend = Seat("P")
    lets_in, *proofs = three_sides(ada, mal, friend, carl.node)
    chain: list[Signed] = []
    for seq in range(600):
        body = SetRole(carl.node, Role.RIG)
        chain.append(said(ada, friend.key, body, citing(ada), seq, chain[-1] if chain else None))
    ada.log.add((lets_in, *chain))
    bob.log.add(proofs)
    ada.admit(*(Seat(f"d{number}") for number in range(20)))
    for _ in range(8):
        ada.log.add(fitting(bob.log.beyond(ada.log.heads())))
        bob.log.add(fitting(ada.log.beyond(bob.log.heads())))
    assert "d19" in bob.names
    assert bob.log.members == ada.log.members


# -- rules of taking in and citing -------------------------------------------------------------------------------------


def test_nothing_above_a_machines_fork_is_taken_in() -> None:
    ada, _, eve = founded("ada", "bob", "eve")
    ada.write(SetRole(eve.node, Role.BURST))
    first, second = (said(ada, eve.node, rented(name), citing(ada)) for name in ("c0", "c1"))
    above = said(ada, eve.node, rented("c2"), citing(ada), 1, first)
    ada.log.add((first, second))
    assert not ada.log.add((above,))


def test_entry_cites_nobody_whom_no_admin_that_counted_admitted() -> None:
    ada, bob, mal = dismissed("ada", "bob", "mal")
    friend = Seat("P")
    ada.log.add((said(ada, mal.key, AddAdmin(friend.user_key, mal.node), citing(ada)),))
    ada.log.add((said(ada, friend.key, SetRole(bob.node, Role.RIG), citing(ada)),))
    assert friend.key in {head.author for head in ada.log.heads()}
    (entry,) = ada.write(SetRole(bob.node, Role.SUBMITTER))
    assert friend.key not in {head.author for head in ada.notary.read(entry, ada.user_key, LogEntry).heads}
