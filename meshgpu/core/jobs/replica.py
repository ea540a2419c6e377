"""One steward's replica of one register: CASPaxos, whose changes are proposed by whoever has the turn.

A turn is a ballot that a quorum has promised to. Who has it knows the newest value that can have been chosen, and
proposes the next one; a value is chosen once a quorum has accepted it. One turn covers many changes, each with the next
step, so that a change costs one exchange, as in Multi-Paxos. Whatever is lost, repeated or reordered, two different
values are never chosen for one stamp, and each chosen value follows from the one chosen before it.

Source: D. Rystsov, "CASPaxos: Replicated State Machines without logs", arXiv 1802.07000.
"""

from typing import Generic, TypeVar

from meshgpu.model.ids import NodeId
from meshgpu.model.job import NO_STAMP, Ballot, Stamp, quorum

V = TypeVar("V")


class Replica(Generic[V]):
    """What `me` promised (`promised`) and accepted (`stamp`, `value`), both of which its owner keeps on disk before
    anybody hears of them, and how far its own turn has come, which a restart forgets.
    """

    def __init__(
        self,
        me: NodeId,
        stewards: tuple[NodeId, ...],
        promised: Ballot | None = None,
        stamp: Stamp = NO_STAMP,
        value: V | None = None,
    ) -> None:
        """Without `promised` nothing of the register is on this disk: round 0 belongs to the first steward unasked."""
        self.me = me
        self.stewards = stewards
        self.first = Ballot(0, stewards[0])
        """What everybody is bound to from the start."""
        self.promised = self.first if promised is None else promised
        self.stamp = stamp
        self.value = value
        self.turn: Ballot | None = self.promised if promised is None and me == stewards[0] else None
        """The ballot under which this steward may propose; None while it may not."""
        self.asked: Ballot | None = None
        """The ballot that it asks for."""
        self._promises: dict[NodeId, tuple[Stamp, V | None]] = {}
        self._accepted: dict[NodeId, Stamp] = {}
        self._highest_round = self.promised.round

    @property
    def quorum(self) -> int:
        return quorum(self.stewards)

    @property
    def others(self) -> tuple[NodeId, ...]:
        return tuple(steward for steward in self.stewards if steward != self.me)

    # -- in its own turn ----------------------------------------------------------------------------------------------

    def ask(self) -> None:
        """Ask for the turn with a ballot above all that were seen. `promised` is to be kept before others are asked."""
        self.turn = None
        self._highest_round += 1
        self.promised = self.asked = Ballot(self._highest_round, self.me)
        self._promises = {}
        self.answered(self.me, self.asked, self.promised, self.stamp, self.value)

    def waiting_for(self) -> list[NodeId]:
        """Those who have not said yet whether they grant the turn that is asked for."""
        return [steward for steward in self.others if steward not in self._promises]

    def answered(self, steward: NodeId, ballot: Ballot, promised: Ballot, stamp: Stamp, value: V | None) -> bool:
        """Somebody answered `ask`; returns whether the turn is won now: then `value` is the newest, None for none."""
        if self._is_outbid(promised) or ballot != self.asked or promised != ballot:
            return False
        self._promises[steward] = (stamp, value)
        if len(self._promises) < self.quorum:
            return False
        self.turn, self.asked = self.asked, None
        self.stamp, self.value = max(self._promises.values(), key=lambda held: held[0])
        self._accepted = {self.me: self.stamp} if self.quorum == 1 else {}
        return True

    def propose(self, value: V, *, stamp: Stamp) -> None:
        """Accept a change of its own, stamped with `next_stamp`; to be kept before others hear of it."""
        if self.turn is None or stamp != self.next_stamp():
            raise ValueError(f"{self.me} proposes {stamp} out of turn")
        self.stamp, self.value = stamp, value
        self._accepted[self.me] = stamp

    def next_stamp(self) -> Stamp:
        """Of the change after the last one of this turn."""
        if self.turn is None:
            raise ValueError(f"it is not the turn of {self.me}")
        return Stamp(self.turn, self.stamp.step + 1 if self.stamp.ballot == self.turn else 1)

    def confirmed(self, steward: NodeId, stamp: Stamp, promised: Ballot) -> bool:
        """Somebody told what it has accepted; returns whether more is chosen now than before."""
        if self._is_outbid(promised) or self.turn is None or stamp.ballot != self.turn:
            return False
        before = self.chosen
        self._accepted[steward] = max(stamp, self._accepted.get(steward, stamp))
        return self.chosen > before

    @property
    def chosen(self) -> Stamp:
        """The newest stamp of this turn that a quorum has accepted; the lowest of all where there is none."""
        ranked = sorted(self._accepted.values(), reverse=True)
        return ranked[self.quorum - 1] if len(ranked) >= self.quorum else NO_STAMP

    @property
    def is_settled(self) -> bool:
        """Whether it is this steward's turn, and all that it proposed is chosen."""
        return self.turn is not None and self.chosen == self.stamp

    def behind(self) -> list[NodeId]:
        """Those who have not accepted the newest change of this turn."""
        return [steward for steward in self.others if self._accepted.get(steward, NO_STAMP) < self.stamp]

    def _is_outbid(self, promised: Ballot) -> bool:
        """Whether somebody is bound to a higher ballot than this steward's own, whose turn is then over."""
        self._highest_round = max(self._highest_round, promised.round)
        own = self.turn or self.asked
        if own is not None and promised > own:
            self.turn = self.asked = None
            return True
        return False

    # -- in another's turn --------------------------------------------------------------------------------------------

    def prepare(self, ballot: Ballot) -> bool:
        """Another asks for the turn; returns whether it is granted, and `promised` therefore to be kept."""
        if ballot < self.promised:
            return False
        self._is_outbid(ballot)
        self.promised = ballot
        return True

    def accept(self, stamp: Stamp, value: V) -> bool:
        """Another's change; returns whether it is accepted, or was: it is to be kept before the other hears so."""
        if stamp.ballot < self.promised:
            return False
        self._is_outbid(stamp.ballot)
        self.promised = stamp.ballot
        if stamp > self.stamp:
            self.stamp, self.value = stamp, value
        return True
