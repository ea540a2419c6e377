"""One job as one of its stewards holds it, and the forms it takes for the disk, the nodes and its watchers."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from meshgpu.core.effects import Effect, Persist, Send
from meshgpu.core.jobs.replica import Replica
from meshgpu.errors import BrokenInvariant
from meshgpu.model.clock import Now
from meshgpu.model.ids import KeyId, NodeId
from meshgpu.model.job import NO_STAMP, JobSpec, JobState, PlacingVote, Register, Stamp, Standing
from meshgpu.model.messages import (
    Accept,
    Accepted,
    Ask,
    Cancel,
    Commit,
    JobUpdate,
    Offer,
    OfferAnswer,
    Prepare,
    Promise,
    SignedView,
)
from meshgpu.model.records import JobRecord
from meshgpu.model.sweep import Trial
from meshgpu.model.trust import Notary, Signed

RESEND_S: Final = 1.0
"""How often a change is told again to a steward that is there and has not accepted it."""


@dataclass(slots=True)
class HeldJob:
    """Mutable, owned by `Stewardship`. register: in its own turn what this steward proposes, else what it accepted.

    replica: who else holds it, and whose turn it is. current: see MeshLog. told: the newest register that people may
    see: in its own turn what is chosen. has_tree: whether every chunk of its tree is here.
    waiting: [(stamp, what follows once that is chosen)]. informed: stewards that know the job. votes: of the others,
    for the placing that the register names. ask_at, resend_at: `boot_s` at which the turn is asked for (again), and
    the newest change sent again. accept: a change that waits for the tree, and who sent it. asks: what users want, and
    who asked, until the turn is won, at most until `boot_s`. answer_to: the submitter that waits to hear that it is
    held.
    due: `boot_s` of the next thing to do in its turn; what that is follows from the state.
    offers, ranked, round, refused: the offers under way, belonging to `Offering`. cancel: the user's signed request to
    end it. unstarted: attempts that died before they started. watchers: {peer: boot_s until which it is told}.
    waits_since: Unix time since when it is known that no machine has room for it.
    trial, sweep: which of which sweep it is; None for a job of its own. receipt: of the newest attempt that has ended.
    """

    spec: JobSpec
    signed: Signed
    register: Register
    replica: Replica[Standing]
    current: Callable[[NodeId], NodeId]
    has_tree: bool = False
    due: float | None = None
    offers: dict[NodeId, OfferAnswer | None] = field(default_factory=dict)
    ranked: list[NodeId] = field(default_factory=list)
    round: int = 0
    refused: dict[NodeId, str] = field(default_factory=dict)
    cancel: Signed | None = None
    unstarted: int = 0
    watchers: dict[NodeId, float] = field(default_factory=dict)
    waits_since: float | None = None
    trial: Trial | None = None
    sweep: JobSpec | None = None
    receipt: Signed | None = None
    told: Register = field(init=False)
    waiting: deque[tuple[Stamp, list[Effect]]] = field(default_factory=deque)
    informed: set[NodeId] = field(default_factory=set)
    votes: dict[NodeId, Signed] = field(default_factory=dict)
    ask_at: float | None = None
    resend_at: float | None = None
    accept: tuple[NodeId, Accept] | None = None
    asks: list[tuple[float, NodeId, Ask]] = field(default_factory=list)
    answer_to: NodeId | None = None

    def __post_init__(self) -> None:
        self.told = self.register

    @property
    def state(self) -> JobState:
        return self.register.state

    @property
    def acts(self) -> bool:
        """Whether it is this steward's turn to change the register."""
        return self.replica.turn is not None

    @property
    def is_unwritten(self) -> bool:
        """Whether nothing of it is on this disk: it is a draft, and no promise was made."""
        return self.state is JobState.DRAFT and self.replica.promised == self.replica.first

    @property
    def is_over(self) -> bool:
        """Whether it is certain that it has ended: it is this steward's turn, and the end is chosen."""
        return self.state.is_final and self.replica.is_settled

    @property
    def rank(self) -> int:
        """Which of its stewards this one is; 0 speaks first."""
        return self.replica.stewards.index(self.replica.me)

    @property
    def fellows(self) -> dict[NodeId, NodeId]:
        """{id that a fellow steward has now: id by which the job names it}."""
        return {self.current(steward): steward for steward in self.replica.others}

    def may_wait_s(self, now: Now) -> float | None:
        """How long it may wait for its first start from now on; None where it does not wait for that, or has no limit.

        A sweep itself never starts; its trials may wait as long each, from when they begin.
        """
        limit_s = self.spec.start_within_s
        is_waiting = self.state is JobState.QUEUED and self.register.ran_on is None and self.spec.sweep is None
        return self.register.submitted_wall_s + limit_s - now.wall_s if limit_s is not None and is_waiting else None

    def view(self) -> SignedView:
        return SignedView(self.signed, self.told, self.trial)

    # -- changing it --------------------------------------------------------------------------------------------------

    def change(self, now: Now, *, durable: bool = True, **changes: object) -> list[Effect]:
        """Propose a change in this steward's turn; watchers are told once it is chosen. A final register never changes.

        Without `durable` it is only shown: it is kept with the next change that is.
        """
        if self.state.is_final:
            raise BrokenInvariant(f"the final register of {self.spec.job} changes", (repr(self.register),))
        self.register = replace(self.register, **changes)  # type: ignore[arg-type]  # names and types are Register's
        if not durable:
            return self._show(now) if self.replica.is_settled else []
        return self.propose(now)

    def propose(self, now: Now) -> list[Effect]:
        """Write the register as it is here now: on this disk first, then on the others'."""
        stamp = self.replica.next_stamp()
        self.register = replace(self.register, stamp=stamp)
        self.replica.propose(self._standing(), stamp=stamp)
        self.votes = {}
        self.resend_at = now.boot_s + RESEND_S if self.replica.others else None
        shown = self._show(now) if self.replica.is_settled else []
        return [self.persist(), *self.accepts(self.replica.others), *shown]

    def after(self, *effects: Effect) -> list[Effect]:
        """Those that may happen now; where what was proposed is not chosen yet, none: they happen then, or never."""
        if self.replica.is_settled:
            return list(effects)
        self.waiting.append((self.replica.stamp, list(effects)))
        return []

    def chosen(self, now: Now) -> list[Effect]:
        """What follows from the changes that a quorum has accepted by now."""
        effects: list[Effect] = []
        while self.waiting and self.waiting[0][0] <= self.replica.chosen:
            effects += self.waiting.popleft()[1]
        return [*effects, *(self._show(now) if self.replica.is_settled else ())]

    def stand_back(self) -> None:
        """It is another's turn: what was to follow from changes of this steward's is forgotten."""
        self.waiting.clear()
        self.asks.clear()
        self.offers, self.votes = {}, {}
        self.due = self.resend_at = self.answer_to = None
        self.take_up()

    def take_up(self) -> None:
        """The register as this disk has it."""
        if self.replica.value is not None:
            standing = self.replica.value
            self.register, self.cancel, self.receipt = standing.register, standing.cancel, standing.receipt
            self.told = self.register

    def persist(self) -> Persist:
        """What this steward has accepted and promised."""
        held = self.replica.value or self._standing()
        record = JobRecord(self.signed, held.register, held.cancel, self.trial, held.receipt, self.replica.promised)
        return Persist("job", self.spec.job, record)

    def _standing(self) -> Standing:
        return Standing(self.register, self.cancel, self.receipt)

    def _show(self, now: Now) -> list[Effect]:
        """People may see the register as it is now."""
        self.told = self.register
        self.watchers = {peer: until for peer, until in self.watchers.items() if until > now.boot_s}
        return [Send(peer, JobUpdate(self.told)) for peer in self.watchers]

    # -- for the other stewards ---------------------------------------------------------------------------------------

    def prepares(self) -> list[Effect]:
        """Ask those for the turn who have not answered."""
        assert self.replica.asked is not None
        prepare = Prepare(self.spec.job, self.replica.asked, self.signed, self.trial)
        return [Send(self.current(steward), prepare) for steward in self.replica.waiting_for()]

    def promise(self, asked: Prepare) -> Promise:
        return Promise(self.spec.job, asked.ballot, self.replica.promised, self.replica.value)

    def accepts(self, stewards: Iterable[NodeId]) -> list[Effect]:
        """The newest change, for some of the others."""
        standing = self.replica.value
        if standing is None:
            return []
        effects: list[Effect] = []
        for steward in stewards:
            spec = None if steward in self.informed else self.signed
            effects.append(Send(self.current(steward), Accept(self.spec.job, standing, spec, self.trial)))
        return effects

    def accepted(self, vote: Signed | None = None) -> Accepted:
        """How far this steward is."""
        return Accepted(self.spec.job, self.replica.stamp, self.replica.promised, vote)

    # -- for nodes ----------------------------------------------------------------------------------------------------

    def offer(self, *, claims: bool = False) -> Offer:
        """For the epoch after the last one that was spent."""
        return Offer(self.spec.job, self.register.epoch + 1, self.signed, self.trial, claims)

    def vote(self, notary: Notary) -> Signed:
        """This steward's vote for the node and hold that the register names."""
        register = self.register
        assert register.node is not None
        assert register.hold is not None
        vote = PlacingVote(
            self.spec.mesh,
            self.spec.job,
            notary.digest(self.signed),
            register.epoch,
            register.node,
            register.hold,
            self.replica.me,
        )
        return notary.sign(KeyId(self.replica.me), vote)

    def commit(self, notary: Notary) -> Commit:
        """The attempt ticket: the votes of a quorum, this steward's own among them."""
        register = self.register
        assert register.hold is not None
        votes = (self.vote(notary), *(vote for _, vote in sorted(self.votes.items())))
        return Commit(self.spec.job, register.epoch, register.hold, votes)

    def cancel_order(self) -> list[Effect]:
        """Tell the attempt's node what the user asked for; to be repeated until it confirms."""
        if self.cancel is None or self.register.node is None:
            return []
        order = Cancel(self.spec.job, self.register.epoch, self.signed, self.cancel, self.trial)
        return [Send(self.current(self.register.node), order)]


def replica_of(record: JobRecord, me: NodeId, stewards: tuple[NodeId, ...]) -> Replica[Standing]:
    """As this disk has it: with a stamp only where something was accepted."""
    register = record.register
    value = Standing(register, record.cancel, record.receipt) if register.stamp != NO_STAMP else None
    return Replica(me, stewards, record.promised, register.stamp, value)
