"""One register of three stewards: rules of one replica, then every course of events within a scope, and long ones.

Each planted flaw must be found by the search: one that finds nothing in a broken protocol proves nothing of ours. The
scope with two changes a turn, Scope((0, 1, 0), (0, 0, 0), 2), has 16,012,997 states and takes two minutes and some GB:
nothing was found in it.
"""

import pytest

from meshgpu.core.jobs.replica import Replica
from meshgpu.errors import BrokenInvariant
from meshgpu.model.ids import NodeId
from meshgpu.model.job import NO_STAMP, Ballot, Stamp
from meshgpu.sim.registers import STEWARDS, Rule, Scope, Search, Steward, Value, walk

A, B, C = STEWARDS

# -- one replica -------------------------------------------------------------------------------------------------------


def fresh(steward: NodeId) -> Replica[Value]:
    return Replica(steward, STEWARDS)


def test_first_steward_may_write_a_new_register_unasked_and_nobody_else() -> None:
    assert fresh(A).turn == Ballot(0, A)
    assert fresh(B).turn is None
    assert fresh(C).turn is None


def test_first_steward_that_starts_again_must_ask() -> None:
    assert Replica(A, STEWARDS, Ballot(0, A), Stamp(Ballot(0, A), 1), ("x",)).turn is None


def test_steward_alone_has_its_turn_for_the_asking() -> None:
    alone: Replica[Value] = Replica(A, (A,), Ballot(3, A), Stamp(Ballot(3, A), 2), ("x", "y"))
    alone.ask()
    assert alone.turn == Ballot(4, A)
    assert alone.value == ("x", "y")
    assert alone.is_settled


def test_turn_is_won_by_a_quorum_with_the_newest_value_in_it() -> None:
    asker: Replica[Value] = Replica(B, STEWARDS, Ballot(1, A), Stamp(Ballot(1, A), 1), ("x",))
    asker.ask()
    assert asker.asked == Ballot(2, B)
    newest = Stamp(Ballot(1, A), 2)
    assert asker.answered(C, Ballot(2, B), Ballot(2, B), newest, ("x", "y"))
    assert (asker.turn, asker.value) == (Ballot(2, B), ("x", "y"))
    assert not asker.is_settled  # nobody knows yet whether that was chosen


def test_change_is_chosen_once_a_quorum_has_it() -> None:
    first = fresh(A)
    first.propose(("x",), stamp=first.next_stamp())
    assert first.chosen == NO_STAMP
    assert first.confirmed(C, Stamp(Ballot(0, A), 1), Ballot(0, A))
    assert first.is_settled
    assert first.behind() == [B]
    assert not first.confirmed(B, Stamp(Ballot(0, A), 1), Ballot(0, A))
    assert first.behind() == []


def test_who_promised_another_accepts_nothing_of_before_and_its_own_turn_is_over() -> None:
    first = fresh(A)
    assert first.prepare(Ballot(1, C))
    assert first.turn is None
    assert not first.accept(Stamp(Ballot(0, A), 1), ("x",))
    assert first.accept(Stamp(Ballot(1, C), 1), ("y",))
    assert not first.prepare(Ballot(0, B))


def test_who_hears_that_another_was_promised_more_has_no_turn_and_asks_above_it() -> None:
    first = fresh(A)
    first.propose(("x",), stamp=first.next_stamp())
    assert not first.confirmed(B, NO_STAMP, Ballot(7, C))
    assert first.turn is None
    first.ask()
    assert first.asked == Ballot(8, A)


def test_nothing_is_proposed_out_of_turn() -> None:
    with pytest.raises(ValueError, match="out of turn"):
        fresh(B).propose(("x",), stamp=Stamp(Ballot(0, B), 1))
    first = fresh(A)
    with pytest.raises(ValueError, match="out of turn"):
        first.propose(("x",), stamp=Stamp(Ballot(0, A), 2))


# -- every course of events --------------------------------------------------------------------------------------------

SMALL = Scope(asks=(0, 1, 0), restarts=(1, 1, 1), steps=1)
"""The second asks for the turn while the first writes, and each may start again: 349,216 states."""


def test_every_small_course_of_events_keeps_the_rules() -> None:
    search = Search(SMALL)
    search.run()
    assert search.states > 300_000


def test_long_courses_of_events_keep_the_rules() -> None:
    chosen = sum(len(walk(seed, 300).chosen) for seed in range(60))
    assert chosen > 300  # else this proves nothing


# -- planted flaws -----------------------------------------------------------------------------------------------------


class ForgetsItsPromise(Steward):
    """Its promise is not on the disk when it starts again."""

    def keep(self) -> None:
        promised = self.disk[0] if self.disk else Ballot(0, A)
        self.disk = (promised, self.replica.stamp, self.replica.value)


class _TakesAnything(Replica[Value]):
    def accept(self, stamp: Stamp, value: Value) -> bool:
        self.promised = min(self.promised, stamp.ballot)
        return super().accept(stamp, value)


class TakesAnything(Steward):
    """Accepts changes below its promise."""

    replica_type = _TakesAnything


class _Stubborn(Replica[Value]):
    def answered(self, steward: NodeId, ballot: Ballot, promised: Ballot, stamp: Stamp, value: Value | None) -> bool:
        return super().answered(steward, ballot, promised, NO_STAMP if steward != self.me else stamp, value)


class Stubborn(Steward):
    """Who wins the turn goes on from its own value, whatever the others have."""

    replica_type = _Stubborn


class _Lonely(Replica[Value]):
    @property
    def quorum(self) -> int:
        return 1


class Lonely(Steward):
    """One steward is enough."""

    replica_type = _Lonely


class Hasty(Steward):
    """Takes what it adopts with its turn for chosen, before it has proposed that again."""

    def win(self) -> None:
        super().win()
        if self.replica.value is not None:
            self.told = self.replica.stamp


class Repeats(Steward):
    """The first steward takes round 0 for its own again when it starts again."""

    def begin(self) -> Replica[Value]:
        replica = super().begin()
        if self.me == A and replica.promised == Ballot(0, A):
            replica.turn = Ballot(0, A)
            replica.stamp = NO_STAMP
        return replica


class Forgets(Steward):
    """Naive replacement: an empty steward takes the place of one that is gone, without sealing the set."""

    def begin(self) -> Replica[Value]:
        self.disk = None
        return super().begin()


@pytest.mark.parametrize(
    ("kind", "scope"),
    [
        (ForgetsItsPromise, Scope(asks=(0, 1, 0), restarts=(0, 0, 1), steps=1)),
        (TakesAnything, Scope(asks=(0, 1, 0), steps=1)),
        (Stubborn, Scope(asks=(0, 1, 0), steps=1)),
        (Hasty, Scope(asks=(0, 1, 0), steps=1)),
        (Lonely, Scope(asks=(0, 1, 0), steps=1)),
        (Repeats, Scope(asks=(0, 1, 0), restarts=(1, 0, 0), steps=1)),
        (Forgets, Scope(asks=(0, 1, 0), restarts=(0, 0, 1), steps=1)),
    ],
    ids=lambda part: part.__name__ if isinstance(part, type) else "",
)
def test_flawed_register_is_caught(kind: type[Steward], scope: Scope) -> None:
    """By what comes of it; that a promise falls is not enough."""
    with pytest.raises(BrokenInvariant, match=r"value|told|knows"):
        Search(scope, kind, frozenset({Rule.PROMISE})).run()
