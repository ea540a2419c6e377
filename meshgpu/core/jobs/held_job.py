"""One job as its steward holds it, and the forms it takes for the disk, the nodes and its watchers."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from meshgpu.core.effects import Effect, Persist, Send
from meshgpu.errors import BrokenInvariant
from meshgpu.model.clock import Now
from meshgpu.model.ids import KeyId, NodeId
from meshgpu.model.job import JobSpec, JobState, PlacingVote, Register
from meshgpu.model.messages import Cancel, Commit, JobUpdate, Offer, OfferAnswer, SignedView
from meshgpu.model.records import JobRecord
from meshgpu.model.sweep import Trial
from meshgpu.model.trust import Notary, Signed


@dataclass(slots=True)
class HeldJob:
    """Mutable, owned by `Stewardship`. due: `boot_s` of the next thing to do; what that is follows from the state.

    offers, ranked, round, refused: the offers under way, belonging to `Offering`. cancel: the user's signed request to
    end it. unstarted: attempts that died before they started. watchers: {peer: boot_s until which it is told}.
    waits_since: Unix time since when it is known that no machine has room for it.
    trial, sweep: which of which sweep it is; None for a job of its own. receipt: of the newest attempt that has ended.
    """

    spec: JobSpec
    signed: Signed
    register: Register
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

    @property
    def state(self) -> JobState:
        return self.register.state

    def view(self) -> SignedView:
        return SignedView(self.signed, self.register, self.trial)

    def change(self, now: Now, *, durable: bool = True, **changes: object) -> list[Effect]:
        """Compare-and-set of the register; watchers are told. A final register never changes."""
        if self.state.is_final:
            raise BrokenInvariant(f"the final register of {self.spec.job} changes", (repr(self.register),))
        self.register = replace(self.register, **changes)  # type: ignore[arg-type]  # names and types are Register's
        effects: list[Effect] = []
        if durable:
            effects.append(
                Persist(
                    "job", self.spec.job, JobRecord(self.signed, self.register, self.cancel, self.trial, self.receipt)
                )
            )
        self.watchers = {peer: until for peer, until in self.watchers.items() if until > now.boot_s}
        effects.extend(Send(peer, JobUpdate(self.register)) for peer in self.watchers)
        return effects

    def offer(self) -> Offer:
        """For the epoch after the last one that was spent."""
        return Offer(self.spec.job, self.register.epoch + 1, self.signed, self.trial)

    def commit(self, notary: Notary, steward: NodeId) -> Commit:
        """The attempt ticket for the node and hold that the register names, with this steward's vote."""
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
            steward,
        )
        signed = notary.sign(KeyId(steward), vote)
        return Commit(self.spec.job, register.epoch, register.hold, (signed,))

    def cancel_order(self, current: Callable[[NodeId], NodeId]) -> list[Effect]:
        """Tell the attempt's node what the user asked for; to be repeated until it confirms. current: see MeshLog."""
        if self.cancel is None or self.register.node is None:
            return []
        order = Cancel(self.spec.job, self.register.epoch, self.signed, self.cancel, self.trial)
        return [Send(current(self.register.node), order)]
