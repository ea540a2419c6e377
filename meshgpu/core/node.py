"""One node: composes the state machines and routes what happens between them. The only module that knows them all."""

import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import assert_never

from meshgpu.core import events as ev
from meshgpu.core.audit import AuditWatch
from meshgpu.core.burst.instance import InstanceLife
from meshgpu.core.burst.planner import Planner, Scribe, Sight
from meshgpu.core.effects import (
    Announce,
    Answered,
    Effect,
    Knock,
    NoteNewKeys,
    NoteState,
    Persist,
    Reject,
    Send,
    TrustMembers,
    Warn,
)
from meshgpu.core.jobs.asking import Asking, AskTiming
from meshgpu.core.jobs.attempts import Attempts, AttemptTiming
from meshgpu.core.jobs.placement import Candidate, Guest, MachineVerdict, Rule, explain_each, out_of_bounds
from meshgpu.core.jobs.queue import Crowd, loads
from meshgpu.core.jobs.steward import Stewardship, StewardTiming
from meshgpu.core.jobs.submission import Submissions, SubmissionTiming
from meshgpu.core.jobs.usage import Usage
from meshgpu.core.membership.clones import Clones
from meshgpu.core.membership.gossip import Gossip, GossipTiming
from meshgpu.core.membership.knocking import Knocking, KnockTiming
from meshgpu.core.membership.links import Links, LinkTiming
from meshgpu.core.membership.liveness import Liveness, LivenessTiming
from meshgpu.core.owner import NEEDS_IMAGE, PAUSED, Owner, OwnerPolicy, at_home, permission
from meshgpu.core.statemachine import earliest
from meshgpu.core.trust.freshness import Challenges
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.receipts import Examined, examine
from meshgpu.core.trust.requests import RequestRules
from meshgpu.core.trust.roles import may_say
from meshgpu.core.trust.sealing import NO_WRAP, Seal, no_seal
from meshgpu.errors import BrokenInvariant, MeshgpuError, TrustError
from meshgpu.model import messages as msg
from meshgpu.model.clock import Now
from meshgpu.model.enrolment import InstanceTerms
from meshgpu.model.gossip import Capacity, Demand, Doubt, MemberState, NodeRecord
from meshgpu.model.ids import Address, Digest, JobId, KeyId, MeshId, NodeId, UserName
from meshgpu.model.inventory import GpuReading, Inventory
from meshgpu.model.job import JobSpec, JobState, JobView
from meshgpu.model.receipt import Proof
from meshgpu.model.records import (
    AttemptRecord,
    JobRecord,
    MeshLogRecord,
    MeshRecord,
    ObeyedRecord,
    PauseRecord,
    PeerRecord,
    Record,
    UsageRecord,
)
from meshgpu.model.trust import LENDING_ROLES, OFFICE_ROLES, AddNode, Member, Notary, Rekey, RemoveNode, Role, Signed

LOOPS_LIMIT = 100_000
"""Messages a node sends to itself in one step: some for each of its jobs; more means that two rules feed each other."""


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """What a node is told at start. capacity_s: readings alone are gossiped this often at most; allocations at once.

    instance: when this machine ends itself, because it is rented; None for all others, which never do.
    sealing_key: X25519 public key, 32 bytes, for secrets. seal: see trust.sealing.
    """

    agent_version: str
    fence: str = ""
    may_steward: bool = True
    seeds: tuple[Address, ...] = ()
    policy: OwnerPolicy = field(default_factory=OwnerPolicy)
    capacity_s: float = 5.0
    gossip: GossipTiming = field(default_factory=GossipTiming)
    links: LinkTiming = field(default_factory=LinkTiming)
    knocks: KnockTiming = field(default_factory=KnockTiming)
    liveness: LivenessTiming = field(default_factory=LivenessTiming)
    attempts: AttemptTiming = field(default_factory=AttemptTiming)
    steward: StewardTiming = field(default_factory=StewardTiming)
    submission: SubmissionTiming = field(default_factory=SubmissionTiming)
    asking: AskTiming = field(default_factory=AskTiming)
    instance: InstanceTerms | None = None
    sealing_key: bytes = b""
    seal: Seal = no_seal


@dataclass(frozen=True, slots=True)
class MachineView:
    """A member as people see it. down_s: for how long it has not answered; None if it answers or never did.

    heard_s: how long ago it last said something itself; capacity_s: how long ago its capacity was heard, from anybody.
    None where that never was. doubted_by: who else says that it does not answer. is_cloned: whether two agents run with
    its key.
    """

    member: Member
    state: MemberState
    is_self: bool
    down_s: float | None
    record: NodeRecord | None
    capacity: Capacity | None
    heard_s: float | None
    capacity_s: float | None
    doubted_by: tuple[str, ...]
    is_cloned: bool


class Node:
    """`step` is the only way to change it; the methods below `reading` only look."""

    def __init__(
        self, node: NodeId, now: Now, notary: Notary, rng: random.Random, config: NodeConfig, records: Iterable[Record]
    ) -> None:
        """`records` is what this node persisted before, in any order; `start` tells what follows from it."""
        self.node = node
        self._config = config
        self._records = tuple(records)
        self._epoch = 1 + max((r.epoch for r in self._records if isinstance(r, MeshRecord)), default=0)
        self.log = MeshLog(notary)
        self._log_rank = 0
        self.rules = RequestRules(notary, self.log, node, Challenges(rng))
        self._gossip = Gossip(node, self._epoch, self.log, notary, rng, config.gossip)
        self._links = Links(node, self.log, rng, config.seeds, config.links)
        self._knocking = Knocking(rng, config.knocks)
        self._liveness = Liveness(
            rng,
            config.liveness,
            peers=self._watched,
            is_linked=lambda peer: peer in self._links.open,
            incarnation=lambda peer: self._gossip.incarnation(peer),
            doubted_by=self._doubted_by,
            probe=lambda peer, number: self._gossip.probe(peer, number),
            knock=self._knock,
        )
        self._clones = Clones()
        self.owner = Owner(config.policy)
        self.attempts = Attempts(node, self.log, self.rules, notary, rng, self.owner, config.attempts)
        self.attempts.fence = config.fence
        self.stewardship = Stewardship(
            node, self.log, self.rules, notary, rng, self._candidates, self._crowd, self._is_alive, config.steward
        )
        self.submissions = Submissions(node, self.log, notary, rng, self._candidates, config.submission, config.seal)
        self.asking = Asking(node, self.log, self.rules, notary, rng, self._askable, config.asking)
        self.burst = Planner(
            node,
            rng,
            Sight(lambda: self.log.mesh, lambda: self.log.members, self._is_alive, self._gossip.demand, self.heard),
            Scribe(self._write, self.log.all_entries, lambda now, node, address: self._meet(now, node, (address,))),
        )
        self._usage = Usage()
        self._instance = InstanceLife(config.instance, now) if config.instance else None
        self._is_drained = False
        self.audits = AuditWatch()
        self._notary = notary
        self._inventory = Inventory(0, 0)
        self._readings: tuple[GpuReading, ...] = ()
        self._load = 0
        self._addresses: tuple[Address, ...] = ()
        self._kept_addresses: dict[NodeId, tuple[Address, ...]] = {}
        self._told_capacity_at = now.boot_s - config.capacity_s

    # -- reading ------------------------------------------------------------------------------------------------------

    def machines(self, now: Now) -> list[MachineView]:
        """Every member, by name, as it stands here."""
        views = [self._machine(now, member) for member in self.log.members.values()]
        return sorted(views, key=lambda view: view.member.name)

    def _machine(self, now: Now, member: Member) -> MachineView:
        state = self.state(member.node)
        lost_at = self._links.last_seen(member.node)
        heard_at = self._liveness.heard_at(member.node)
        return MachineView(
            member,
            state,
            member.node == self.node,
            now.boot_s - lost_at if state is not MemberState.ALIVE and lost_at is not None else None,
            self._gossip.record(member.node),
            self._gossip.capacity(member.node),
            now.boot_s - heard_at if heard_at is not None else None,
            self._gossip.capacity_age_s(now, member.node),
            tuple(sorted(self.log.members[other].name for other, _ in self._doubted_by(member.node))),
            self._clones.is_cloned(member.node),
        )

    def why(self, spec: JobSpec) -> tuple[MachineVerdict, ...]:
        """What each machine of the mesh would say to the job now, by name, as far as it is known here."""
        machine = self.log.current(spec.machine) if spec.machine is not None else None
        return explain_each(spec.resources, self._candidates(Guest.of(spec), None), machine, spec.job)

    def ahead_of(self, view: JobView) -> dict[UserName, int]:
        """{user: how many of his jobs go before this one, at most}; empty unless it waits."""
        spec, register = view.spec, view.register
        if register.state is not JobState.QUEUED:
            return {}
        return self._everybody().ahead(spec.user, spec.priority, register.submitted_wall_s)

    def heard(self, owner: NodeId) -> tuple[NodeRecord | None, Capacity | None]:
        """What a member last said of itself."""
        return self._gossip.record(owner), self._gossip.capacity(owner)

    def addresses(self, peer: NodeId) -> tuple[Address, ...]:
        """Where `peer` may be dialled, best first."""
        return self._links.addresses(peer)

    def tree_for(self, job: JobId, peer: NodeId) -> Digest | None:
        """The tree that `peer` may fetch here because it runs the job, or is to hold it; None if it may not."""
        return self.stewardship.tree_for(job, peer) or self.submissions.tree_for(job, peer)

    def _candidates(self, guest: Guest, machine: NodeId | None) -> list[Candidate]:
        members = self.log.members
        wanted = [self.log.current(machine)] if machine is not None else sorted(members)
        return [self._candidate(guest, members[node]) for node in wanted if node in members]

    def _crowd(self) -> Crowd:
        crowd = self._everybody()
        return Crowd(crowd.loads, {node: lines for node, lines in crowd.lines.items() if node != self.node})

    def _everybody(self) -> Crowd:
        capacities = (self._gossip.capacity(node) for node in self.log.members)
        there = [node for node in self.log.members if self._is_alive(node)]
        demands = {node: demand for node in there if (demand := self._gossip.demand(node)) is not None}
        return Crowd(loads(filter(None, capacities)), {node: demand.lines for node, demand in demands.items()})

    def _candidate(self, guest: Guest, member: Member) -> Candidate:
        record, capacity = self._gossip.record(member.node), self._gossip.capacity(member.node)
        rule, refusal = self._refusal(guest, member, record)
        return Candidate(
            member.node, member.name, record, capacity, refusal, rule, member.role is Role.CLOUD, member.owner
        )

    def _refusal(self, guest: Guest, member: Member, record: NodeRecord | None) -> tuple[Rule | None, str]:
        """Why an offer would be in vain, as far as it is known here: the machine itself has the last word."""
        if member.role not in LENDING_ROLES:
            return Rule.CLOSED, f"lends nothing: it is a {member.role}"
        if wrong_side := out_of_bounds(guest.cloud, is_rented=member.role is Role.CLOUD):
            return Rule.CLOUD, wrong_side
        if record is not None:
            policy = OwnerPolicy(record.lends, record.trusts)
            if closed := permission(policy, guest.user, at_home(member), record.fence).refusal:
                return Rule.CLOSED, closed
            if record.needs_image and not guest.image:
                return Rule.CLOSED, NEEDS_IMAGE
        if guest.secrets is not None and not guest.secrets.opens_for(member.node):
            return Rule.SEALED, NO_WRAP
        if self._clones.is_cloned(member.node):
            return Rule.CLONED, "two agents run with its keys"
        match self.state(member.node):
            case MemberState.SUSPECT:
                return Rule.DOWN, "does not answer at the moment"
            case MemberState.DOWN:
                return Rule.DOWN, "does not answer"
            case MemberState.ALIVE:
                pass
        if record is not None and record.pause is not None:
            return Rule.OWNER, PAUSED
        return None, ""

    def state(self, node: NodeId) -> MemberState:
        """How a member stands here. Cloud nodes probe nobody and are probed by nobody: there the Link tells."""
        if node == self.node:
            return MemberState.ALIVE
        if self._is_probed(node):
            return self._liveness.state(node)
        return MemberState.ALIVE if node in self._links.open else MemberState.DOWN

    def _is_probed(self, node: NodeId) -> bool:
        one, other = self.log.members.get(self.node), self.log.members.get(node)
        return one is not None and other is not None and Role.CLOUD not in (one.role, other.role)

    def _watched(self) -> list[NodeId]:
        return [node for node in self.log.members if node != self.node and self._is_probed(node)]

    def _is_alive(self, node: NodeId) -> bool:
        return self.state(node) is MemberState.ALIVE

    def _doubted_by(self, node: NodeId) -> Iterator[tuple[NodeId, Doubt]]:
        """Who of the others doubts a member now, and how. Of who does not answer here itself, nothing counts."""
        for other, doubt in self._gossip.doubters(node).items():
            if other != node and self._is_probed(other) and self._is_alive(other):
                yield other, doubt

    def _knock(self, peer: NodeId) -> list[Effect]:
        address = self._links.best_address(peer)
        return [Knock(peer, address)] if address else []

    def _askable(self) -> list[NodeId]:
        return [self.node, *(peer for peer in sorted(self._links.open) if peer in self.log.members)]

    def _helpers(self) -> list[NodeId]:
        """Who can be asked to knock here: machines of the office to which a Link is open."""
        members = self.log.members
        return [peer for peer in sorted(self._links.open) if peer in members and members[peer].role in OFFICE_ROLES]

    # -- stepping -----------------------------------------------------------------------------------------------------

    def start(self, now: Now) -> list[Effect]:
        """Take up what was persisted; to be called once, before any step."""
        self._log_rank = take_up(self.log, self._records)
        if self.log.mesh is None:
            return []
        effects: list[Effect] = [self._mesh_record(), *self._trust_effects()]
        for record in self._records:
            if isinstance(record, PeerRecord):
                self._links.learn(now, record.node, record.addresses, is_signed=True)
        for record in self._records:
            if isinstance(record, PauseRecord):
                self.owner.restore(now, record)
            if isinstance(record, UsageRecord):
                self._usage.restore(now, record)
        effects += self.attempts.audit.restore(self._records)
        effects += self.attempts.restore(now, (r for r in self._records if isinstance(r, AttemptRecord)))
        effects += self.stewardship.restore(now, (r for r in self._records if isinstance(r, JobRecord)))
        self.stewardship.obeyed.restore(r for r in self._records if isinstance(r, ObeyedRecord))
        self.burst.restore(now, self._records)
        self._records = ()
        self._say_record(now)
        self._say_capacity(now, force=True)
        return _persists_first(self._loop_back(now, effects))

    def step(self, now: Now, event: ev.Event) -> list[Effect]:
        self._liveness.woke(now)
        self._clones.step(now)
        effects = self._route(now, event)
        effects += self._expire(now)
        effects += self._links.step(now)
        effects += self._knocking.step(now)
        effects += self._live(now)
        effects += self._owner_step(now)
        effects += self._gossip.step(now)
        effects += self.attempts.step(now)
        effects += self.stewardship.step(now)
        effects += self.submissions.step(now)
        effects += self.asking.step(now)
        effects += self.burst.step(now)
        effects += self._live_on(now)
        effects = self._loop_back(now, effects)
        effects += self._usage.step(now, self.attempts.allocations())
        told = self._gossip.record(self.node)
        if told is not None and told.audit != self.attempts.audit.head:
            self._say_record(now)
        self._say_capacity(now, force=False)
        self._say_demand(now)
        return _persists_first(effects)

    def examine(self, proof: Proof) -> Examined:
        """What a receipt is worth, by the mesh log that this node holds."""
        return examine(proof, self.rules, self.log, self._notary)

    def deadline(self) -> float | None:
        return earliest(
            self._links.deadline(),
            self._knocking.deadline(),
            self._liveness.deadline(),
            self._gossip.deadline(),
            self.owner.deadline(),
            self.attempts.deadline(),
            self.stewardship.deadline(),
            self.submissions.deadline(),
            self.asking.deadline(),
            self.burst.deadline(),
            self._instance.deadline() if self._instance else None,
        )

    def _loop_back(self, now: Now, effects: list[Effect]) -> list[Effect]:
        """What a node says to itself is heard in the same step."""
        done: list[Effect] = []
        pending = deque(effects)
        heard = 0
        while pending:
            effect = pending.popleft()
            if not isinstance(effect, Send) or effect.peer != self.node:
                done.append(effect)
                continue
            heard += 1
            if heard > LOOPS_LIMIT:
                raise BrokenInvariant("a node does not stop talking to itself", (repr(effect),))
            pending.extendleft(reversed(self._heard(now, self.node, effect.message)))
        return done

    def _route(self, now: Now, event: ev.Event) -> list[Effect]:
        match event:
            case ev.Ticked():
                return []
            case ev.MessageArrived(peer=peer, message=message):
                member = self.log.members.get(peer)
                if member is None:
                    return [Reject(peer, "a node outside the mesh sent a message")]
                if not may_say(member, message):
                    return [Reject(peer, f"a {member.role} sent a {type(message).__name__}")]
                if self._is_probed(peer):
                    self._liveness.heard(now, peer)
                return self._heard(now, peer, message)
            case ev.LinkOpened(peer=peer, instance=instance):
                return [*self._look_for_clones(now, peer, instance), *self._link_opened(now, peer)]
            case ev.LinkClosed(peer=peer):
                self._links.link_closed(now, peer)
                self._gossip.link_closed(peer)
                self.burst.mesh_changed(now)
                return self._liveness.link_closed(now, peer) if self._is_probed(peer) else []
            case ev.Knocked(peer=peer, outcome=outcome):
                return self._liveness.knocked(now, peer, outcome)
            case ev.DialFailed(peer=peer):
                self._links.dial_failed(now, peer)
                return []
            case ev.MachineSighted(sighting=sighting):
                self._links.learn(now, sighting.node, sighting.addresses, is_signed=False)
                return []
            case ev.AddressIdentified(address=address, node=node):
                self._links.identified(now, address, node)
                return []
            case ev.IdentifyFailed():
                return []
            case ev.KnocksAsked(query=query):
                return self._knocking.ask(now, query, self._helpers())
            case ev.KnockedBack(peer=peer, knocks=knocks):
                return self._knocking.knocked(now, peer, knocks, hears=event.hears, announces=event.announces)
            case ev.MachineRead(inventory=inventory, readings=readings, load=load):
                self._load = load
                return self._machine_read(now, inventory, readings)
            case ev.AddressesChanged(addresses=addresses):
                self._addresses = addresses
                self._say_record(now)
                return []
            case ev.LendingPaused(pause=pause):
                return self._lending_changed(now, self.owner.paused(now, pause))
            case ev.LendingResumed():
                return self._lending_changed(now, self.owner.resumed())
            case ev.MeshEntered(mesh=mesh, log=log, met=met):
                return self._enter(now, mesh, log, met)
            case ev.LogWritten(log=log):
                self.burst.mesh_changed(now)
                return self._log_learned(now, log, None)
            case ev.RekeyAsked(query=query, rekey=rekey):
                return self._rekey(now, query, rekey)
            case ev.RunAsked(query=query, key=key, draft=draft):
                return self.submissions.asked(now, query, key, draft)
            case ev.JobsAsked(query=query, key=key):
                return self.asking.list_jobs(now, query, key)
            case ev.ActionAsked():
                return self.asking.act(now, event.query, event.key, event.action, event.job, event.stewards)
            case ev.WatchStarted(key=key, job=job, stewards=stewards):
                self.asking.watch(now, key, job, stewards)
                return []
            case ev.WatchStopped(job=job):
                self.asking.unwatch(job)
                return []
            case ev.TreeArrived(job=job):
                return self.stewardship.tree_arrived(now, job)
            case ev.TreeProgressed():
                return self.stewardship.tree_progressed(event.job, event.done_bytes, event.total_bytes)
            case ev.TreeFailed(job=job, code=code, reason=reason):
                return self.stewardship.tree_failed(job, code, reason)
            case ev.AttemptProgressed():
                return self.attempts.progressed(event.job, event.epoch, event.phase, event.detail)
            case ev.AttemptPrinted():
                return self.attempts.printed(event.job, event.epoch, event.chunk)
            case ev.AttemptMeasured():
                return self.attempts.measured(event.job, event.epoch, event.metric)
            case ev.AttemptBegan():
                return self.attempts.began(event.job, event.epoch, event.started_wall_s)
            case ev.AttemptFinished():
                return self.attempts.finished(
                    now, event.job, event.epoch, event.ended_wall_s, event.result, event.evidence
                )
            case (
                ev.BurstConfigured()
                | ev.CloudSurveyed()
                | ev.LaunchPrepared()
                | ev.LaunchEnded()
                | ev.TerminateEnded()
                | ev.Enrolled()
                | ev.WelcomeEnded()
            ):
                return self.burst.heard(now, event)
            case ev.InterruptionNoticed(ends_wall_s=ends_wall_s):
                if self._instance is not None:
                    self._instance.noticed(now, ends_wall_s)
                return []
            case _:
                assert_never(event)

    def _heard(self, now: Now, peer: NodeId, message: msg.Message) -> list[Effect]:
        match message:
            case msg.GossipDigest(number=number):
                answered = self._liveness.acknowledged(peer, number) if number and not message.is_probe else []
                return [*answered, *self._gossip.digest_arrived(peer, message)]
            case msg.ProbeFor():
                return self._liveness.asked_for(now, peer, message)
            case msg.ProbeAnswer():
                self._liveness.helped(peer, message)
                return []
            case msg.GossipDelta():
                return self._gossip_arrived(now, peer, message)
            case msg.LogDelta(entries=entries):
                self.burst.mesh_changed(now)
                return self._log_learned(now, entries, peer)
            case msg.Submit():
                return self.stewardship.submitted(now, peer, message)
            case msg.SubmitAnswer():
                return self.submissions.answered(now, peer, message)
            case msg.Prepare():
                return self.stewardship.prepared(now, peer, message)
            case msg.Promise():
                return self.stewardship.promised(now, peer, message)
            case msg.Accept():
                return self.stewardship.accept(now, peer, message)
            case msg.Accepted():
                return self.stewardship.accepted(now, peer, message)
            case msg.Offer():
                return self.attempts.offered(now, peer, message)
            case msg.OfferAnswer():
                return self.stewardship.offer_answered(now, peer, message)
            case msg.Release():
                return self.attempts.released(peer, message)
            case msg.Commit():
                return self.attempts.committed(now, peer, message)
            case msg.CommitAnswer():
                return self.stewardship.commit_answered(now, peer, message)
            case msg.Activate():
                return self.attempts.activated(now, peer, message)
            case msg.Fence():
                return self.attempts.fenced(now, peer, message)
            case msg.AttemptReport():
                return self.stewardship.reported(now, peer, message)
            case msg.AttemptOutput():
                return self.stewardship.printed(peer, message)
            case msg.ReportAck():
                return self.attempts.acknowledged(peer, message)
            case msg.Cancel():
                return self.attempts.cancelled(now, peer, message)
            case msg.Ask():
                return self.stewardship.asked(now, peer, message)
            case msg.Answer():
                return self.asking.answered(peer, message)
            case msg.JobUpdate():
                return self.asking.updated(peer, message)
            case msg.KnockWanted(query=query):
                record = self._gossip.record(peer)
                return self._knocking.wanted(now, peer, query, record.addresses if record else (), self._addresses)
            case msg.KnockAnswer():
                return self._knocking.answered(now, peer, message)
            case _:
                assert_never(message)

    # -- what concerns several machines -------------------------------------------------------------------------------

    def _enter(
        self, now: Now, mesh: MeshId, log: tuple[Signed, ...], met: tuple[tuple[NodeId, tuple[Address, ...]], ...]
    ) -> list[Effect]:
        added = self.log.enter(mesh, log)
        effects: list[Effect] = [self._mesh_record(), *self._log_records(added), *self._trust_effects()]
        for node, addresses in met:
            self._links.learn(now, node, addresses, is_signed=True)
            effects.append(Persist("peer", node, PeerRecord(node, addresses)))
        effects += self.attempts.restore(now, ())
        effects += self.stewardship.restore(now, ())
        self._say_record(now)
        self._say_capacity(now, force=True)
        return effects

    def _log_learned(self, now: Now, entries: tuple[Signed, ...], source: NodeId | None) -> list[Effect]:
        before = tuple(self.log.members)
        refused = self.log.refused
        added = self.log.add(entries)
        rejects: list[Effect] = []
        if self.log.refused != refused:
            rejects.append(Reject(source or self.node, f"an entry of the mesh log was refused: {self.log.refused[-1]}"))
        if not added:
            return rejects
        gone = [node for node in before if node not in self.log.members]
        parting = [Send(node, msg.LogDelta(added)) for node in gone if node in self._links.open and node != source]
        effects = [*rejects, *self._log_records(added), *parting, *self._trust_effects()]
        effects += self._let_go(now, gone)
        effects += self._go_on_with(now, gone)
        effects += self._gossip.log_grew(added, source)
        return [*effects, *self.attempts.keys_stopped(now), *self.stewardship.keys_stopped(now)]

    def _expire(self, now: Now) -> list[Effect]:
        """Cloud nodes whose lease is over leave the mesh by the clock."""
        gone = self.log.expire(now)
        return [*self._trust_effects(), *self._let_go(now, gone)] if gone else []

    def _let_go(self, now: Now, gone: Iterable[NodeId]) -> list[Effect]:
        """They are members no more. Of instances that have ended nothing lives on; of all others nobody knows."""
        effects: list[Effect] = []
        for node in gone:
            self._gossip.forget(node)
            self._knocking.forget(node)
            self._liveness.forget(node)
            self._clones.forget(node)
            if node in self.log.ended:
                effects += self.stewardship.node_gone(now, node)
        self.attempts.members_left()
        return effects

    def _go_on_with(self, now: Now, gone: Iterable[NodeId]) -> list[Effect]:
        """Some of them are here under another id: where they were, they still are."""
        effects: list[Effect] = []
        for node in gone:
            heir = self.log.members.get(self.log.current(node))
            if heir is None:
                continue
            effects.append(NoteNewKeys(heir.name, node, heir.node))
            if (fault := self.audits.go_on(node, heir.node)) is not None:
                effects.append(Warn(heir.node, fault.reason))
            if addresses := self._links.addresses(node):
                effects += self._meet(now, heir.node, addresses)
        return effects

    def _rekey(self, now: Now, query: str, rekey: Rekey) -> list[Effect]:
        """Hand this machine over to its new keys. From this step on the old ones are good for nothing."""
        try:
            self._check_may_rekey()
            self.log.check_rekey(self.node, rekey)
        except MeshgpuError as error:
            return [Answered(query, code=error.code, reason=error.message, hint=error.hint)]
        effects: list[Effect] = []
        for author, bodies in self.log.hand_over(rekey):
            effects += self._log_learned(now, self.log.write(author, bodies), None)
        effects += self._log_learned(now, self.log.write(KeyId(self.node), (rekey,)), None)
        if self.log.current(self.node) not in self.log.members:
            raise BrokenInvariant("a machine gave up its keys and is no member under its new ones", (repr(rekey),))
        return [*effects, Answered(query)]

    def _check_may_rekey(self) -> None:
        """Raises MeshgpuError while others know something that is under way by this machine's id."""
        me = self.log.members.get(self.node)
        if me is None:
            raise TrustError("not-in-mesh", "cannot take new keys: this machine is no member of a mesh", "meshgpu init")
        if me.role is Role.CLOUD:
            raise TrustError("not-allowed", "cannot take new keys: this machine is rented, and ends with its keys")
        if self.burst.is_renting:
            raise MeshgpuError(
                "busy",
                "cannot take new keys: this machine rents instances, or is about to, under its old ones",
                "meshgpu burst setup --instances 0; and again when none is left: meshgpu burst status",
            )
        if not self.attempts.is_idle:
            names = ", ".join(sorted({allocation.name for allocation in self.attempts.allocations()}))
            running = f"jobs run here ({names})" if names else "how jobs ended here has yet to reach who holds them"
            raise MeshgpuError(
                "busy", f"cannot take new keys: {running}", "meshgpu pause; and again when nothing is left: meshgpu ps"
            )
        if held := self.stewardship.unfinished:
            raise MeshgpuError(
                "busy",
                f"cannot take new keys: this machine holds {held} unfinished jobs of the mesh, which name its old ones",
                "wait until they ended, or stop yours: meshgpu ps",
            )
        if self.submissions.is_open:
            raise MeshgpuError("busy", "cannot take new keys: a job is being submitted here", "meshgpu ps, and again")

    def _write(self, now: Now, bodies: tuple[AddNode | RemoveNode, ...]) -> list[Effect]:
        """Put entries of this node's own chain into the log. Raises TrustError where the mesh does not let it."""
        return self._log_learned(now, self.log.write(KeyId(self.node), bodies), None)

    def _meet(self, now: Now, node: NodeId, addresses: tuple[Address, ...]) -> list[Effect]:
        """Take note where a member listens, which it has not said itself yet."""
        self._links.learn(now, node, addresses, is_signed=False)
        return [Persist("peer", node, PeerRecord(node, addresses))]

    def _link_opened(self, now: Now, peer: NodeId) -> list[Effect]:
        self._links.link_opened(now, peer)
        if self._is_probed(peer):
            self._liveness.link_opened(now, peer)
        tails = self.attempts.steward_linked(now, peer)
        self.submissions.steward_linked(now, peer)
        self.asking.linked_again(now, peer)
        self.stewardship.room_changed(now)
        self.burst.mesh_changed(now)
        return [*self._gossip.link_opened(now, peer), *self.stewardship.linked(now, peer), *tails]

    def _look_for_clones(self, now: Now, peer: NodeId, instance: str) -> list[Effect]:
        is_news = self._clones.link_opened(now, peer, instance)
        return [Warn(peer, "two agents run with its keys: no work is given to it")] if is_news else []

    def _gossip_arrived(self, now: Now, peer: NodeId, delta: msg.GossipDelta) -> list[Effect]:
        changed, effects = self._gossip.delta_arrived(now, peer, delta)
        for owner in changed:
            record = self._gossip.record(owner)
            if record is not None and record.addresses != self._kept_addresses.get(owner, ()):
                self._kept_addresses[owner] = record.addresses
                self._links.learn(now, owner, record.addresses, is_signed=True)
                effects.append(Persist("peer", owner, PeerRecord(owner, record.addresses)))
            self._liveness.refuted(now, owner)
            effects += self._doubts_heard(now, owner)
            fault = self.audits.heard(owner, record.audit) if record is not None else None
            if fault is not None:
                effects.append(Warn(owner, fault.reason))
        if changed:
            self.stewardship.room_changed(now)
            self.burst.mesh_changed(now)
        return effects

    def _live(self, now: Now) -> list[Effect]:
        """Probe and doubt; what is doubted is said at once."""
        effects = self._liveness.step(now)
        doubts = self._liveness.doubts()
        if doubts.doubts != self._gossip.doubts(self.node):
            self._gossip.say(now, doubts)
        return [*effects, *(NoteState(self.log.name_of(peer), peer, state) for peer, state in self._liveness.turned())]

    def _doubts_heard(self, now: Now, owner: NodeId) -> list[Effect]:
        """Somebody's doubts may have changed: about us they are answered, about others they are looked into."""
        effects: list[Effect] = []
        for doubt in self._gossip.doubts(owner):
            if doubt.node == self.node:
                if self._gossip.outbid(now, doubt.incarnation):
                    self._liveness.was_doubted()
            elif self._is_probed(doubt.node):
                effects += self._liveness.doubted(now, doubt.node)
        return effects

    def _machine_read(self, now: Now, inventory: Inventory, readings: tuple[GpuReading, ...]) -> list[Effect]:
        is_new = inventory != self._inventory
        self._inventory, self._readings = inventory, self.owner.read(readings)
        self.attempts.machine_read(inventory, self._readings)
        if is_new:
            self._say_record(now)
        return [Announce()] if is_new else []

    def _owner_step(self, now: Now) -> list[Effect]:
        effects = self.owner.step(now)
        return self._lending_changed(now, effects) if effects else []

    def _lending_changed(self, now: Now, effects: list[Effect]) -> list[Effect]:
        self._say_record(now)
        self.stewardship.room_changed(now)
        return effects

    def _live_on(self, now: Now) -> list[Effect]:
        """A rented machine ends itself, and what runs there before."""
        life = self._instance
        if life is None:
            return []
        effects = life.step(now, is_linked=bool(self._links.open), is_idle=self.attempts.is_idle)
        self.attempts.closed = life.refusal
        if life.is_leaving and not self._is_drained:
            self._is_drained = True
            effects += self.attempts.drain(now, life.refusal)
            effects += life.step(now, is_linked=bool(self._links.open), is_idle=self.attempts.is_idle)
        return effects

    def _say_record(self, now: Now) -> None:
        config = self._config
        self._gossip.say(
            now,
            NodeRecord(
                config.agent_version,
                self._addresses,
                self._inventory,
                self.attempts.fence,
                config.may_steward,
                config.policy.lends,
                config.policy.trusted,
                config.policy.lending,
                config.policy.needs_image,
                self.owner.pause,
                config.sealing_key,
                self.attempts.audit.head,
            ),
        )

    def _say_capacity(self, now: Now, *, force: bool) -> None:
        """Allocations are told at once, readings alone every few seconds."""
        allocations = (*self.attempts.allocations(), *self.attempts.kept())
        told = self._gossip.capacity(self.node)
        is_due = now.boot_s >= self._told_capacity_at + self._config.capacity_s
        if force or told is None or told.allocations != allocations or is_due:
            self._told_capacity_at = now.boot_s
            # Which programs the owner runs is nobody else's business.
            readings = tuple(replace(reading, processes=()) for reading in self._readings)
            capacity = Capacity(readings, allocations, self._load, self._usage.told())
            if capacity != told:
                self._gossip.say(now, capacity)
                self.stewardship.room_changed(now)

    def _say_demand(self, now: Now) -> None:
        """What would fit nowhere: for those who have jobs that wait as well, and for whoever rents."""
        demand = self.stewardship.demand(may_leave=self.log.may_leave)
        if demand != (self._gossip.demand(self.node) or Demand(())):
            self._gossip.say(now, demand)

    def _mesh_record(self) -> Persist:
        assert self.log.mesh is not None
        return Persist("mesh", "mesh", MeshRecord(self.log.mesh, self._epoch))

    def _log_records(self, added: tuple[Signed, ...]) -> list[Effect]:
        first = self._log_rank
        self._log_rank += len(added)
        return [
            Persist("log", f"{rank:08d}", MeshLogRecord(rank, entry)) for rank, entry in enumerate(added, start=first)
        ]

    def _trust_effects(self) -> list[Effect]:
        return [TrustMembers(tuple(self.log.members.values())), Announce()]


def _persists_first(effects: list[Effect]) -> list[Effect]:
    """Nobody is told what a power cut could still undo."""
    return sorted(effects, key=lambda effect: not isinstance(effect, Persist))


def take_up(log: MeshLog, records: Iterable[Record]) -> int:
    """Put into `log` what an agent kept of it, if it was in a mesh. Returns how many entries that were."""
    records = tuple(records)
    mesh = next((record.mesh for record in records if isinstance(record, MeshRecord)), None)
    if mesh is None:
        return 0
    kept = sorted((r for r in records if isinstance(r, MeshLogRecord)), key=lambda record: record.rank)
    log.enter(mesh, (record.entry for record in kept))
    return len(kept)
