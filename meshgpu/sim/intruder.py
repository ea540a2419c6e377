"""A member that lies: forged, mutated and replayed messages from a machine of the mesh, and from a stranger.

Nothing of it may have an effect; the invariants say whether something had. The machine of the intruder lends nothing
and holds no jobs of others, so that it has no rights of its own to abuse.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from meshgpu.core.events import MessageArrived
from meshgpu.core.trust.freshness import CHALLENGE_BYTES
from meshgpu.model.gossip import GossipEntry, Incarnation, NodeRecord
from meshgpu.model.ids import RANDOM_ID_BYTES, Address, HoldId, JobId, KeyId, NodeId, job_id
from meshgpu.model.inventory import Inventory
from meshgpu.model.job import Action, AttemptState, JobRequest, JobSpec, JobView, PlacingVote, Result
from meshgpu.model.messages import (
    Activate,
    Answer,
    Ask,
    AttemptReport,
    Cancel,
    Challenge,
    Commit,
    CommitAnswer,
    Fence,
    GossipDelta,
    LogDelta,
    Message,
    Offer,
    OfferAnswer,
    Release,
    ReportAck,
    Submit,
    SubmitAnswer,
)
from meshgpu.model.trust import AddNode, LinkUser, LogEntry, Role, Signed
from meshgpu.sim.fakes import KeyRing
from meshgpu.sim.invariants import Ledger
from meshgpu.sim.machine import Machine
from meshgpu.sim.network import Network
from meshgpu.sim.timeline import Timeline

STRANGER: Final = NodeId("x" * 52)
STALE_S: Final = 600.0
"""Age of the old signatures that are tried: far beyond what clocks may differ."""
Aimed = tuple[NodeId, Message]
"""A message for one machine only."""


@dataclass(slots=True)
class Intruder:
    """Lies from `machine`, whose own keys it has. sent: how many messages it sent."""

    machine: Machine
    ledger: Ledger
    network: Network
    timeline: Timeline
    ring: KeyRing
    sent: int = 0
    _victim: Machine = field(init=False)

    def lie(self) -> None:
        """One message to one machine."""
        rng = self.timeline.rng
        victim = self._victim = rng.choice(self._others())
        told = rng.choice(self._lies())()
        if told is None:
            return
        message = told if not isinstance(told, tuple) else told[1]
        if isinstance(told, tuple):
            victim = self.ledger.ids[told[0]]
        self.sent += 1
        if rng.random() < 0.2:
            victim.post(MessageArrived(STRANGER, message))
        else:
            self.network.send(self.machine.node, victim.node, message)

    def _lies(self) -> list[Callable[[], Message | Aimed | None]]:
        return [
            self._replay,
            self._replay,
            self._mutate,
            self._foreign_spec,
            self._stale_spec,
            self._challenged_spec,
            self._challenge,
            self._again,
            self._again,
            self._stop,
            self._cancel,
            self._cancel_by_own_spec,
            self._entry_of_another,
            self._new_member,
            self._foreign_offer,
            self._commit,
            self._as_steward,
            self._as_steward,
            self._as_node,
            self._confirm,
            *([self._record_under_old_keys, self._stop_under_old_keys] * 3 if self._given_up() else []),
        ]

    # -- what was heard on the network ---------------------------------------------------------------------------------

    def _replay(self) -> Message | None:
        """Something that another machine said, once more and from here."""
        message = self._overheard()
        return None if message is None or self._is_ours(message) else message

    def _mutate(self) -> Message | None:
        """The same with another payload under the old signature."""
        message = self._overheard()
        match message:
            case Submit() | Offer():
                return replace(message, spec=self._garble(message.spec))
            case (Answer() | SubmitAnswer()) as answer if answer.challenge is not None:
                return replace(answer, challenge=replace(answer.challenge, nonce=b"e" * CHALLENGE_BYTES))
            case Ask():
                return replace(message, request=self._garble(message.request))
            case GossipDelta(entries=(first, *rest)) | LogDelta(entries=(first, *rest)):
                return replace(message, entries=(self._garble(first), *rest))
            case _:
                return None

    def _garble(self, signed: Signed) -> Signed:
        value = self.ring.decode(signed.payload)
        match value:
            case JobSpec():
                value = replace(value, command=("evil",))
            case JobRequest():
                value = replace(value, action=Action.KILL)
            case GossipEntry():
                value = replace(value, incarnation=Incarnation(1000, 0))
            case _:
                pass
        return replace(signed, payload=self.ring.encode(value))

    def _overheard(self) -> Message | None:
        return self.timeline.rng.choice(self.network.tap) if self.network.tap else None

    # -- submitting and stopping in another's name ---------------------------------------------------------------------

    def _foreign_spec(self) -> Message | None:
        """A job of another user, signed with a key that is not his."""
        view = self._view()
        if view is None:
            return None
        job, nonce = self._own_job()
        spec = replace(
            view.spec,
            job=job,
            nonce=nonce,
            stewards=(self._victim.node,),
            submitter=self.machine.node,
            issued_wall_s=self.machine.now().wall_s,
        )
        if spec.user in self.machine.setup.accounts:
            return None
        signed = self.timeline.rng.choice([self.ring.sign(self._account(), spec), self._forged(view, spec)])
        return Submit(spec.job, signed)

    def _stale_spec(self) -> Message | None:
        """A job of the intruder's own user, signed long ago."""
        return self._old_spec(b"")

    def _challenged_spec(self) -> Message | None:
        """The same with a challenge that was made up, or given to somebody else, or used."""
        return self._old_spec(self.timeline.rng.choice([b"e" * CHALLENGE_BYTES, *self._overheard_challenges()]))

    def _overheard_challenges(self) -> list[bytes]:
        """What stewards asked others to sign. What they ask this machine is its right to use."""
        return [
            message.challenge.nonce
            for message, target in zip(self.network.tap, self.network.addressees, strict=True)
            if isinstance(message, SubmitAnswer | Answer) and message.challenge and target != self.machine.node
        ]

    def _challenge(self) -> Message | Aimed | None:
        """Asks others to sign something that no steward wants of them; where a job is on its way, about that job."""
        nonce = self.timeline.rng.choice([b"e" * CHALLENGE_BYTES, *self._overheard_challenges()])
        challenge = Challenge(nonce, self.machine.now().wall_s)
        jobs = sorted(self.ledger.submitted.keys() - self.ledger.confirmed.keys())
        if not jobs:
            return Answer(f"list{self.timeline.rng.randrange(9)}", (), "stale", "evil", challenge)
        spec = self.ledger.submitted[self.timeline.rng.choice(jobs)]
        if self.machine.node in (*spec.stewards, spec.submitter):
            return None
        return spec.submitter, SubmitAnswer(spec.job, False, code="stale", reason="evil", challenge=challenge)

    def _again(self) -> Aimed | None:
        """A request of the intruder's own user to stop a job that it did want to end: once more, also long after."""
        mine = [
            confirmed.view
            for job, confirmed in sorted(self.ledger.confirmed.items())
            if confirmed.view.spec.user == self.machine.setup.owner and job in self.ledger.stops_asked
        ]
        if not mine:
            return None
        spec = self.timeline.rng.choice(mine).spec
        steward = self.ledger.ids[spec.stewards[0]]
        wall_s, nonce = steward.now().wall_s, f"again {spec.job}"
        request = JobRequest(spec.mesh, spec.user, Action.STOP, steward.node, wall_s, nonce, spec.job)
        return steward.node, Ask("evil", self.ring.sign(self._account(), request))

    def _old_spec(self, challenge: bytes) -> Message | None:
        view = self._view()
        if view is None:
            return None
        job, nonce = self._own_job()
        spec = replace(
            view.spec,
            job=job,
            nonce=nonce,
            user=self.machine.setup.owner,
            stewards=(self._victim.node,),
            submitter=self.machine.node,
            issued_wall_s=self._victim.now().wall_s - STALE_S,
        )
        signed = self.ring.sign(self._account(), spec)
        if not challenge:
            return Submit(spec.job, signed)
        victim = self._victim.node
        request = JobRequest(spec.mesh, spec.user, Action.SUBMIT, victim, spec.issued_wall_s, "nonce", job, challenge)
        return Submit(spec.job, signed, self.ring.sign(self._account(), request))

    def _stop(self) -> Message | None:
        request = self._request()
        return Ask("evil", request) if request else None

    def _cancel(self) -> Message | None:
        view, request = self._view(), self._request()
        if view is None or request is None:
            return None
        epoch = self.timeline.rng.choice((1, 2))
        return Cancel(view.spec.job, epoch, self._forged(view, view.spec), request)

    def _cancel_by_own_spec(self) -> Aimed | None:
        """To end another user's attempt with a spec and a request of one's own, for the same id: all well signed."""
        view = self._view()
        if view is None or view.spec.user in self.machine.setup.accounts or view.register.node is None:
            return None
        user, here, wall_s = self.machine.setup.owner, self.machine.node, self.machine.now().wall_s
        spec = replace(view.spec, user=user, submitter=here, stewards=(here,), machine=None)
        request = JobRequest(spec.mesh, user, Action.KILL, here, wall_s, "nonce", spec.job)
        signed = (self.ring.sign(self._account(), spec), self.ring.sign(self._account(), request))
        return view.register.node, Cancel(spec.job, max(view.register.epoch, 1), *signed)

    def _request(self) -> Signed | None:
        """To end another user's job: in one's own name, or in his with a wrong key."""
        view = self._view()
        if view is None or view.spec.user in self.machine.setup.accounts:
            return None
        user = self.timeline.rng.choice((self.machine.setup.owner, view.spec.user))
        wall_s, steward = self.machine.now().wall_s, view.spec.stewards[0]
        request = JobRequest(view.spec.mesh, user, Action.KILL, steward, wall_s, "nonce", view.spec.job)
        if self.timeline.rng.random() < 0.5:
            return self.ring.sign(self._account(), request)
        return self._forged(view, request)

    # -- with keys that were given up, from a backup that was stolen ---------------------------------------------------

    def _given_up(self) -> list[tuple[NodeId, Machine]]:
        """Ids whose keys it has, of machines that all who run know under other ones."""
        agents = [machine.agent for machine in self.ledger.machines.values() if machine.agent is not None]
        return [
            (before, machine)
            for machine in self._others()
            for before in machine.before
            if all(before not in agent.log.members for agent in agents)
        ]

    def _record_under_old_keys(self) -> Message | None:
        """What a machine lends, by the id that it gave up or by the one it has now."""
        before, machine = self.timeline.rng.choice(self._given_up())
        view = self._view()
        if view is None:
            return None
        record = NodeRecord("evil", (Address("evil:1"),), Inventory(1, 1))
        owner = self.timeline.rng.choice((before, machine.node))
        entry = GossipEntry(view.spec.mesh, owner, Incarnation(1000, 0), 1, record)
        return GossipDelta((self.ring.sign(KeyId(before), entry),))

    def _stop_under_old_keys(self) -> Aimed | None:
        """To end a job with an account's key of before: of the very user who submitted it."""
        old = dict(self._given_up())
        specs = [confirmed.view.spec for confirmed in self.ledger.confirmed.values()]
        specs = [spec for spec in specs if spec.submitter in old]
        if not specs:
            return None
        spec = self.timeline.rng.choice(specs)
        submitter, steward = old[spec.submitter], self.ledger.ids[spec.stewards[0]]
        wall_s = steward.now().wall_s
        request = JobRequest(spec.mesh, spec.user, Action.KILL, steward.node, wall_s, "old", spec.job)
        signed = self.ring.sign(submitter.before[spec.submitter][spec.user], request)
        peer = self.timeline.rng.choice((spec.submitter, submitter.node, self.machine.node))
        steward.post(MessageArrived(peer, Ask("evil", signed)))
        self.sent += 1
        return None

    # -- speaking for others -------------------------------------------------------------------------------------------

    def _entry_of_another(self) -> Message | None:
        """What another machine lends, said by this one."""
        record = NodeRecord("evil", (Address("evil:1"),), Inventory(1, 1))
        view, owner = self._view(), self.timeline.rng.choice(self._others()).node
        if view is None:
            return None
        entry = GossipEntry(view.spec.mesh, owner, Incarnation(1000, 0), 1, record)
        as_self = self.ring.sign(KeyId(self.machine.node), entry)
        return GossipDelta((self.timeline.rng.choice([as_self, self.ring.forge(KeyId(owner), entry)]),))

    def _new_member(self) -> Message | None:
        """An entry of the mesh log by somebody who is no admin, or in the name of one."""
        view = self._view()
        if view is None or self._victim.agent is None:
            return None
        admin = self._victim.agent.log.heads()
        if not admin:
            return None
        head = admin[0]
        evil = self.ring.make("evil")
        bodies: list[AddNode | LinkUser] = [
            AddNode(NodeId(KeyId(STRANGER)), evil, b"ca", "evil", Role.RIG, view.spec.user),
            LinkUser(view.spec.user, evil, self.machine.node, 666),
        ]
        body = self.timeline.rng.choice(bodies)
        entry = LogEntry(view.spec.mesh, head.author, head.seq + 1, head.entry, (), body)
        mine = self._account()
        own_chain = replace(entry, author=mine, seq=0)
        lies = [self.ring.forge(head.author, entry), self.ring.sign(mine, entry), self.ring.sign(mine, own_chain)]
        return LogDelta((self.timeline.rng.choice(lies),)) if mine != head.author else None

    def _foreign_offer(self) -> Message | None:
        """An offer by a machine that does not hold the job."""
        view = self._view()
        if view is None:
            return None
        own = replace(view.spec, stewards=(self.machine.node,))
        return Offer(view.spec.job, self.timeline.rng.choice((1, 2, 9)), self._forged(view, own))

    def _commit(self) -> Message | None:
        """A ticket with the vote of somebody who is no steward."""
        view = self._view()
        if view is None:
            return None
        rng, spec = self.timeline.rng, view.spec
        holds = [(key, hold) for key, (_, hold) in self.ledger.accepted.items() if key[0] == spec.job]
        (_, epoch), hold = rng.choice(holds) if holds else ((spec.job, 1), HoldId("h" * 26))
        signed = self._forged(view, spec)
        digest = self.ring.digest(signed)
        vote = PlacingVote(spec.mesh, spec.job, digest, epoch, self._victim.node, hold, self.machine.node)
        return Commit(spec.job, epoch, hold, (self.ring.sign(KeyId(self.machine.node), vote),))

    def _as_steward(self) -> Aimed | None:
        """Orders that only a job's steward may give, to the machine where the job lives."""
        view = self._view()
        if view is None:
            return None
        rng, job = self.timeline.rng, view.spec.job
        node, epoch = self.ledger.living.get(job, (self._victim.node, rng.choice((1, 2))))
        orders: list[Message] = [
            Activate(job, epoch),
            Fence(job, epoch),
            ReportAck(job, epoch),
            Release(job, HoldId("h" * 26)),
        ]
        return node, rng.choice(orders)

    def _confirm(self) -> Aimed | None:
        """Says that a job is held, to somebody who waits to hear it."""
        jobs = sorted(self.ledger.submitted.keys() - self.ledger.confirmed.keys())
        if not jobs:
            return None
        spec = self.ledger.submitted[self.timeline.rng.choice(jobs)]
        if self.machine.node in (*spec.stewards, spec.submitter):
            return None
        return spec.submitter, SubmitAnswer(spec.job, held=True)

    def _as_node(self) -> Aimed | None:
        """Reports that only the node of an attempt may make, to the job's steward."""
        view = self._view()
        if view is None:
            return None
        rng, job, wall_s = self.timeline.rng, view.spec.job, self.machine.now().wall_s
        _, epoch = self.ledger.living.get(job, (self._victim.node, rng.choice((1, 2))))
        result = Result(AttemptState.EXITED, 0, "evil")
        reports: list[Message] = [
            AttemptReport(job, epoch, None, "evil", wall_s, wall_s, result),
            AttemptReport(job, epoch, None, "evil", wall_s, None),
            CommitAnswer(job, epoch, accepted=True),
            CommitAnswer(job, epoch, accepted=False, reason="evil"),
            OfferAnswer(job, epoch, HoldId("h" * 26)),
        ]
        return view.spec.stewards[0], rng.choice(reports)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _others(self) -> list[Machine]:
        return [machine for machine in self.ledger.machines.values() if machine is not self.machine]

    def _view(self) -> JobView | None:
        """A job that is held elsewhere; rather one that lives now."""
        views = [c.view for c in self.ledger.confirmed.values() if self.machine.node not in c.view.spec.stewards]
        living = [view for view in views if view.spec.job in self.ledger.living]
        return self.timeline.rng.choice(living or views) if views else None

    def _is_ours(self, message: Message) -> bool:
        """Whether saying it from here is this machine's right."""
        job = getattr(message, "job", None)
        confirmed = self.ledger.confirmed.get(job) if job else None
        is_held_here = confirmed is None or self.machine.node in confirmed.view.spec.stewards
        return job is not None and is_held_here and not isinstance(message, Submit)

    def _account(self) -> KeyId:
        return self.machine.setup.accounts[self.machine.setup.owner]

    def _forged(self, view: JobView, value: object) -> Signed:
        """Under the name of the job's user, with a wrong signature."""
        submitter = self.ledger.ids[view.spec.submitter]
        return self.ring.forge(submitter.setup.accounts[view.spec.user], value)

    def _own_job(self) -> tuple[JobId, bytes]:
        """An id that this machine's account may choose, and its nonce."""
        nonce = self.timeline.rng.randbytes(RANDOM_ID_BYTES)
        return job_id(self._account(), nonce), nonce
