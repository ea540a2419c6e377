"""What this node rents, and when it gives it back: the burst planner.

Every call is journalled before it is made and repeated as it was, so that a crash costs nothing but time. One call is
open at a time: what it may cost is in the journal before the next one is thought of. The provider's tags say what
lives; the planner asks for them before each call, every minute while something lives, and every half hour otherwise.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from meshgpu.core import events as ev
from meshgpu.core.burst.budget import Spending, day, month, spent_usd, worst_case
from meshgpu.core.burst.demand import Place, Waiting, assign
from meshgpu.core.burst.ladder import Rests, inventory_of
from meshgpu.core.burst.plan import Outlook, Plan, plans
from meshgpu.core.burst.reaper import Reaper
from meshgpu.core.burst.rental import ENROL_PAUSE_S, PAUSE_LIMIT_S, Rental, member_name
from meshgpu.core.burst.survey import Survey
from meshgpu.core.effects import Effect, Launch, Persist, PrepareLaunch, SurveyCloud, Terminate, Welcome
from meshgpu.core.statemachine import earliest
from meshgpu.errors import TrustError
from meshgpu.model.clock import Now
from meshgpu.model.cloud import (
    CLIENT_TOKEN_CHARACTERS,
    LIVE_STATES,
    BurstSettings,
    Instance,
    InstanceState,
    LaunchId,
    LaunchRequest,
    Rung,
)
from meshgpu.model.gossip import Capacity, Demand, Need, NodeRecord
from meshgpu.model.ids import RANDOM_ID_BYTES, Address, JobId, MeshId, NodeId, node_id, random_id
from meshgpu.model.inventory import Inventory
from meshgpu.model.records import BurstRecord, LaunchRecord, LaunchState, Record, SpendRecord
from meshgpu.model.trust import AddNode, Member, RemoveNode, Role, Signed

COURTESY_S: Final = 60.0
"""How long the other burst peers leave a need to the one with the lowest id."""

FORBIDDEN_PAUSE_S: Final = 60.0
FORBIDDEN_LIMIT_S: Final = 1800.0
"""Between launches that the account's rights forbid: a person has to act; doubled each time."""

TAKEN_PAUSE_S: Final = 60.0
"""After another burst peer asked for the same need: its instance shows by then."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What is known here of the mesh. is_alive: of a member, this node included."""

    mesh: Callable[[], MeshId | None]
    members: Callable[[], Mapping[NodeId, Member]]
    is_alive: Callable[[NodeId], bool]
    demand: Callable[[NodeId], Demand | None]
    heard: Callable[[NodeId], tuple[NodeRecord | None, Capacity | None]]


@dataclass(frozen=True, slots=True)
class Scribe:
    """How the planner changes the mesh. write: entries of this node's own chain; raises TrustError.

    log: the whole mesh log. meet: where a member listens.
    """

    write: Callable[[Now, tuple[AddNode | RemoveNode, ...]], list[Effect]]
    log: Callable[[], tuple[Signed, ...]]
    meet: Callable[[Now, NodeId, Address], list[Effect]]


@dataclass(frozen=True, slots=True)
class BurstStatus:
    """Everything about renting, as people ask for it. instances: of the last survey, `surveyed_s` ago (None: never).

    fault: why the provider could not be asked, or would not rent, at last.
    """

    settings: BurstSettings
    rents: bool
    launches: tuple[LaunchRecord, ...]
    instances: tuple[Instance, ...]
    surveyed_s: float | None
    usd_per_hour: float
    usd_today: float
    usd_this_month: float
    fault: str


@dataclass(frozen=True, slots=True)
class _Preparing:
    """A launch that waits for its user data: nothing is promised or spent yet."""

    launch: LaunchId
    need: JobId
    rung: Rung
    lease_ends_wall_s: float


class Planner:
    """Dormant without settings: then it orders nothing and has no deadline."""

    def __init__(self, node: NodeId, rng: random.Random, sight: Sight, scribe: Scribe) -> None:
        self._node = node
        self._rng = rng
        self._sight = sight
        self._scribe = scribe
        self._settings: BurstSettings | None = None
        self._rents = False
        self._waiting = Waiting()
        self._rests = Rests()
        self._reaper = Reaper(node)
        self._survey = Survey()
        self._rentals: dict[LaunchId, Rental] = {}
        self._spending = Spending()
        self._preparing: _Preparing | None = None
        self._taken_until: dict[JobId, float] = {}
        self._blocked_until = -math.inf
        self._forbidden_s = FORBIDDEN_PAUSE_S
        self._fault = ""
        self._price_fault = ""
        self._own_demand: Demand | None = None
        self._look_at: float | None = None

    def restore(self, now: Now, records: Iterable[Record]) -> None:
        """Take up what an earlier agent kept. Nothing is called before the provider has said what lives."""
        for record in records:
            match record:
                case BurstRecord(settings=settings, rents=rents):
                    self._settings, self._rents = settings, rents
                case LaunchRecord():
                    rental = Rental(record, 0.0, now.boot_s, now.boot_s)
                    rental.has_worked = record.state is LaunchState.JOINED  # for all that is remembered
                    self._rentals[record.request.launch] = rental
                case SpendRecord():
                    self._spending.restore(record)
                case _:
                    pass
        self._look_at = now.boot_s if self._settings is not None else None

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def is_renting(self) -> bool:
        """Whether a launch is open: from before its call until its instance is gone."""
        return bool(self._rentals) or self._preparing is not None

    def plan(self, now: Now) -> tuple[Plan, ...]:
        """What would be rented now for each need that is known here, the oldest first, and why or why not."""
        if self._settings is None:
            return ()
        return tuple(plans(self._outlook(now, self._settings)))

    def status(self, now: Now) -> BurstStatus | None:
        """How renting stands; None where this node does not rent."""
        if self._settings is None:
            return None
        survey, spends = self._survey, self._spending.spends
        return BurstStatus(
            self._settings,
            self._rents,
            tuple(rental.record for rental in self._rentals.values()),
            survey.instances,
            now.boot_s - survey.at if survey.at is not None else None,
            sum(self._live_usd_per_hour()),
            spent_usd(spends, *day(now.wall_s)),
            spent_usd(spends, *month(now.wall_s)),
            self._fault or self._price_fault,
        )

    # -- events -------------------------------------------------------------------------------------------------------

    def mesh_changed(self, now: Now) -> None:
        """Members, Links or gossip are not what they were."""
        if self._settings is not None:
            self._look_at = now.boot_s

    def heard(self, now: Now, event: ev.BurstEvent) -> list[Effect]:
        """Take in a fact; what is due because of it comes with the next `step`."""
        if self._settings is None and not isinstance(event, ev.BurstConfigured):
            return []  # the end of something that nobody waits for
        self._look_at = now.boot_s
        match event:
            case ev.BurstConfigured(settings=settings):
                return self._configured(settings)
            case ev.CloudSurveyed():
                return self._surveyed(now, event)
            case ev.LaunchPrepared():
                return self._prepared(now, event)
            case ev.LaunchEnded():
                return self._launch_ended(now, event)
            case ev.TerminateEnded():
                self._terminate_ended(now, event)
                return []
            case ev.Enrolled():
                return self._enrolled(now, event)
            case ev.WelcomeEnded():
                return self._welcome_ended(now, event)

    def _configured(self, settings: BurstSettings | None) -> list[Effect]:
        self._preparing = None
        self._survey.is_current = False
        self._survey.not_before = self._blocked_until = -math.inf
        if settings is not None:
            self._settings, self._rents = settings, True
            return [Persist("burst", "burst", BurstRecord(settings, True))]
        if self._settings is None:
            return []
        self._rents = False
        effects: list[Effect] = [Persist("burst", "burst", BurstRecord(self._settings, False))]
        for rental in self._rentals.values():
            if rental.state is not LaunchState.ASKED:
                effects += rental.end("this node shall not rent any more")
        return effects

    def _surveyed(self, now: Now, event: ev.CloudSurveyed) -> list[Effect]:
        survey = self._survey
        if event.code:
            self._fault = f"cannot ask what lives: {event.reason}"
            survey.fail(now)
            return []
        if survey.not_before > 0.0:  # the last one failed
            self._fault = ""
        self._price_fault = event.reason
        mesh = self._sight.mesh()
        survey.succeed(now, event.rungs, tuple(instance for instance in event.instances if instance.mesh == mesh))
        effects = self._take_in(now)
        effects += self._spending.account(now, survey.instances, self._rentals.keys())
        effects += self._reap(now)
        effects += self._bury(now)
        return effects

    def _take_in(self, now: Now) -> list[Effect]:
        """What the survey says of this node's own launches."""
        effects: list[Effect] = []
        by_launch = {instance.launch: instance for instance in self._survey.instances}
        for rental in list(self._rentals.values()):
            seen = by_launch.get(rental.launch)
            if rental.is_gone(now, seen, self._survey.begun_at, is_wanted=self._is_wanted(rental)):
                effects += self._gone(now, rental, was_rented=seen is not None or bool(rental.record.instance))
            elif seen is not None and rental.state is LaunchState.ASKED and not rental.is_busy:
                effects.append(self._rented(rental, seen))
        return effects

    def _rented(self, rental: Rental, instance: Instance) -> Persist:
        rental.address = instance.address
        if self._rents:
            return rental.become(LaunchState.RENTED, instance=instance.instance)
        return rental.become(LaunchState.ENDING, instance=instance.instance, reason="this node shall not rent any more")

    def _prepared(self, now: Now, event: ev.LaunchPrepared) -> list[Effect]:
        """Journal the request, then make it, if it is still wanted and the caps still allow it."""
        preparing, settings, mesh = self._preparing, self._settings, self._sight.mesh()
        if preparing is None or preparing.launch != event.launch or settings is None or mesh is None:
            return []
        self._preparing = None
        if event.code:
            self._fault = f"cannot prepare a launch: {event.reason}"
            self._blocked_until = now.boot_s + FORBIDDEN_PAUSE_S
            return []
        outlook = self._outlook(now, settings)
        is_wanted = any(plan.rung is not None and plan.need.job == preparing.need for plan in plans(outlook))
        number = self._spending.next_number(preparing.need)
        ends = preparing.lease_ends_wall_s
        spend = worst_case(preparing.launch, self._node, preparing.need, number, preparing.rung, now, ends)
        if not is_wanted or outlook.forbids(spend):
            return []
        request = LaunchRequest(
            preparing.launch,
            mesh,
            self._node,
            preparing.need,
            token(mesh, preparing.need, number),
            preparing.rung,
            ends,
            settings.image,
            settings.security_group,
            event.user_data,
        )
        record = LaunchRecord(request, LaunchState.ASKED, event.bootstrap, now.wall_s)
        self._rentals[request.launch] = Rental(record, 0.0, now.boot_s, now.boot_s, is_busy=True)
        return [Persist("launch", request.launch, record), *self._spending.commit(spend), Launch(request)]

    def _launch_ended(self, now: Now, event: ev.LaunchEnded) -> list[Effect]:
        rental = self._rentals.get(event.launch)
        self._survey.call_ended(now)
        if rental is None or rental.state is not LaunchState.ASKED:
            return []
        rental.is_busy, rental.called_at = False, now.boot_s
        rung, need = rental.record.request.rung, rental.record.request.need
        instance, code = event.instance, event.code
        if instance is not None and instance.launch != event.launch:
            instance, code = None, "token-taken"
        if instance is not None:
            if instance.state is InstanceState.TERMINATED:
                return self._gone(now, rental, was_rented=True)
            self._fault = ""
            return [self._rented(rental, instance)]
        match code:
            case "no-capacity":
                self._rests.failed(now, rung, is_refused=False)
            case "bad-request":
                self._rests.failed(now, rung, is_refused=True)
                self._fault = f"{rung.instance_type} in {rung.zone} was refused: {event.reason}"
            case "token-taken":
                self._taken_until[need] = now.boot_s + TAKEN_PAUSE_S
            case "not-allowed":
                self._fault = f"the account does not allow it: {event.reason}"
                self._wait(now)
            case _:  # it may have happened: the same again, or a survey shows it
                rental.retry(now, self._rng)
                return []
        return self._gone(now, rental, was_rented=False)

    def _terminate_ended(self, now: Now, event: ev.TerminateEnded) -> None:
        for rental in self._rentals.values():
            if rental.record.instance == event.instance and rental.state is LaunchState.ENDING and rental.is_busy:
                rental.retry(now, self._rng, None if event.code else PAUSE_LIMIT_S)
        if event.code:
            self._fault = f"cannot end {event.instance}: {event.reason}"

    def _enrolled(self, now: Now, event: ev.Enrolled) -> list[Effect]:
        rental = self._rentals.get(event.launch)
        if rental is None or rental.state not in (LaunchState.RENTED, LaunchState.ENROLLED):
            return self._idle(rental)
        if event.code:
            rental.retry(now, self._rng, ENROL_PAUSE_S)
            rental.trouble = event.reason
            return []
        node = node_id(event.public_key)
        if rental.record.node not in (None, node):
            rental.is_busy = False
            return rental.end("it shows another key than before")
        effects: list[Effect] = []
        if rental.state is LaunchState.RENTED:
            expires = rental.record.request.lease_ends_wall_s
            owner = self._sight.members()[self._node].owner
            name = member_name(rental.launch)
            body = AddNode(node, event.public_key, event.device_ca, name, Role.CLOUD, owner, expires)
            try:
                effects += self._scribe.write(now, (body,))
            except TrustError as error:
                rental.is_busy = False
                return rental.end(error.message)
            effects.append(rental.become(LaunchState.ENROLLED, node=node))
            effects += self._scribe.meet(now, node, rental.reach)
        return [*effects, Welcome(rental.launch, self._scribe.log())]

    def _welcome_ended(self, now: Now, event: ev.WelcomeEnded) -> list[Effect]:
        rental = self._rentals.get(event.launch)
        if rental is None or rental.state is not LaunchState.ENROLLED:
            return self._idle(rental)
        if event.code:
            rental.retry(now, self._rng, ENROL_PAUSE_S)
            return []
        rental.is_busy = False
        return [self._joined(now, rental)]

    def _joined(self, now: Now, rental: Rental) -> Persist:
        rental.useful_at = now.boot_s
        return rental.become(LaunchState.JOINED)

    def _idle(self, rental: Rental | None) -> list[Effect]:
        """An effect of the rental came back too late to matter."""
        if rental is not None:
            rental.is_busy = False
        return []

    # -- what a survey shows ------------------------------------------------------------------------------------------

    def _gone(self, now: Now, rental: Rental, *, was_rented: bool) -> list[Effect]:
        """Nothing of the launch lives, or ever did: forget it, and write down what it came to."""
        del self._rentals[rental.launch]
        effects: list[Effect] = [Persist("launch", rental.launch, None)]
        effects += self._spending.close(now, rental.launch) if was_rented else self._spending.void(rental.launch)
        if rental.record.node is not None:
            effects += self._remove(now, (rental.record.node,))
        is_missed = any(need.job == rental.record.request.need for need in self._waiting.needs)
        if was_rented and is_missed and not rental.has_worked:
            self._hold_back(now, rental)
        return effects

    def _hold_back(self, now: Now, rental: Rental) -> None:
        """An instance was paid for nothing: the next one waits, longer each time."""
        record = rental.record
        what = "joined and ran nothing" if record.node is not None else "ended before it joined"
        trouble = rental.trouble or "its console output may say why"
        self._fault = f"{record.instance or 'an instance'} {what}" + ("" if record.node else f": {trouble}")
        self._rests.failed(now, record.request.rung, is_refused=False)
        self._wait(now)

    def _wait(self, now: Now) -> None:
        """Rent nothing for a while, longer each time until an instance works."""
        self._blocked_until = now.boot_s + self._forbidden_s
        self._forbidden_s = min(self._forbidden_s * 2, FORBIDDEN_LIMIT_S)

    def _reap(self, now: Now) -> list[Effect]:
        effects: list[Effect] = []
        doomed = self._reaper.doomed(
            now, self._survey.instances, self._rentals.keys(), self._is_burst_peer, self._is_busy
        )
        for instance, reason in doomed:
            rental = self._rentals.get(instance.launch)
            if rental is None:
                effects.append(Terminate(instance.instance))
            elif rental.state is not LaunchState.ASKED:
                effects += rental.end(reason)
        return effects

    def _bury(self, now: Now) -> list[Effect]:
        """Take other burst peers' instances that were ended out of the mesh: their own peer may be away."""
        ended = [i for i in self._survey.instances if i.state is InstanceState.TERMINATED]
        members = (self._cloud_member(instance.launch) for instance in ended)
        return self._remove(now, tuple(member.node for member in members if member is not None))

    def _remove(self, now: Now, nodes: tuple[NodeId, ...]) -> list[Effect]:
        known = self._sight.members()
        bodies = tuple(RemoveNode(node) for node in nodes if node in known)
        try:
            return self._scribe.write(now, bodies) if bodies else []
        except TrustError:
            return []  # this node is no burst peer any more; membership ends with the lease

    # -- what is due --------------------------------------------------------------------------------------------------

    def step(self, now: Now) -> list[Effect]:
        own_demand = self._sight.demand(self._node)
        if own_demand != self._own_demand:
            self._own_demand = own_demand
            self.mesh_changed(now)
        if self._look_at is None or now.boot_s < self._look_at or self._settings is None:
            return []
        settings = self._settings
        self._waiting.refresh(now, self._demands())
        self._taken_until = {job: until for job, until in self._taken_until.items() if until > now.boot_s}
        effects: list[Effect] = []
        for rental in self._rentals.values():
            if rental.state is LaunchState.ENROLLED and self._is_linked(rental):
                effects.append(self._joined(now, rental))  # it was welcomed by an agent that did not live to hear it
        self._note_use(now)
        for rental in self._rentals.values():
            effects += rental.step(now, settings.idle_s, is_wanted=self._is_wanted(rental))
        found = plans(self._outlook(now, settings))
        choice = next((plan for plan in found if plan.rung is not None), None)
        wants_survey = False
        if choice is not None and choice.rung is not None and self._may_ask(now):
            wants_survey = not self._survey.is_fresh(now)
            if not wants_survey:
                effects.append(self._prepare(now, settings, choice.need, choice.rung))
        if not self._survey.is_under_way and now.boot_s >= self._survey_due(now, is_wanted=wants_survey):
            self._survey.begin(now)
            effects.append(SurveyCloud(settings))
        effects += self._dissolve()
        self._look_at = self._next_look(now, settings, found, is_wanted=wants_survey)
        return effects

    def deadline(self) -> float | None:
        return self._look_at

    def _next_look(self, now: Now, settings: BurstSettings, found: list[Plan], *, is_wanted: bool) -> float | None:
        if self._settings is None:
            return None
        survey = None if self._survey.is_under_way else self._survey_due(now, is_wanted=is_wanted)
        blocked = self._blocked_until if self._blocked_until > now.boot_s else None
        return earliest(
            survey,
            blocked,
            *(plan.again_at for plan in found),
            *(
                rental.deadline(now, settings.idle_s, is_wanted=self._is_wanted(rental))
                for rental in self._rentals.values()
            ),
        )

    def _dissolve(self) -> list[Effect]:
        """Once nothing lives that was rented, a node that shall not rent forgets that it ever did."""
        if self._rents or self._rentals:
            return []
        self._settings = None
        self._survey = Survey()
        return [Persist("burst", "burst", None)]

    def _survey_due(self, now: Now, *, is_wanted: bool) -> float:
        ages = [rental.survey_s(now, is_wanted=self._is_wanted(rental)) for rental in self._rentals.values()]
        return self._survey.due(ages, is_wanted=is_wanted)

    def _may_ask(self, now: Now) -> bool:
        """Whether a new launch may be begun: one at a time."""
        is_asking = any(rental.state is LaunchState.ASKED for rental in self._rentals.values())
        return self._preparing is None and not is_asking and now.boot_s >= self._blocked_until

    def _prepare(self, now: Now, settings: BurstSettings, need: Need, rung: Rung) -> PrepareLaunch:
        launch = LaunchId(random_id(self._rng.randbytes(RANDOM_ID_BYTES)))
        ends = now.wall_s + settings.caps.lease_s
        self._preparing = _Preparing(launch, need.job, rung, ends)
        return PrepareLaunch(launch, member_name(launch), rung, need.job, ends, settings)

    # -- what a plan follows from -------------------------------------------------------------------------------------

    def _outlook(self, now: Now, settings: BurstSettings) -> Outlook:
        return Outlook(
            now,
            self._node,
            settings,
            self._waiting,
            tuple(self._places()),
            self._courtesy_s() if self._rents else None,
            self._survey.rungs if self._survey.at is not None else None,
            self._rests,
            self._taken_until,
            self._spending.spends,
            tuple(self._live_usd_per_hour()),
        )

    def _live_usd_per_hour(self) -> list[float]:
        """Of each instance of the mesh that lives, or may; tags can be changed, so the journal knows better."""
        living = (i for i in self._survey.instances if i.state is not InstanceState.TERMINATED)
        prices = {instance.launch: instance.usd_per_hour for instance in living}
        prices |= {r.launch: r.record.request.rung.usd_per_hour for r in self._rentals.values()}
        return list(prices.values())

    # -- the mesh and what is rented ----------------------------------------------------------------------------------

    def _demands(self) -> list[Demand]:
        """Of stewards that can act on what is rented for them. A rented machine must not order another."""
        members = self._sight.members()
        stewards = (node for node in sorted(members) if members[node].role is not Role.CLOUD)
        found = (self._sight.demand(node) for node in stewards if self._sight.is_alive(node))
        return [demand for demand in found if demand is not None]

    def _courtesy_s(self) -> float | None:
        """How long this node leaves needs to others; None where the mesh does not let it rent."""
        peers = [node for node in sorted(self._sight.members()) if self._is_burst_peer(node)]
        if self._node not in peers:
            return None
        return 0.0 if peers[0] == self._node else COURTESY_S

    def _is_burst_peer(self, node: NodeId) -> bool:
        member = self._sight.members().get(node)
        return member is not None and member.role is Role.BURST and self._sight.is_alive(node)

    def _is_wanted(self, rental: Rental) -> bool:
        """Whether its call may be repeated: the need is there, and no other instance is. Asks for a survey first."""
        need = rental.record.request.need
        if self._survey.at is None or not self._rents or all(n.job != need for n in self._waiting.needs):
            return False
        return not any(
            instance.need == need and instance.launch != rental.launch and instance.state in LIVE_STATES
            for instance in self._survey.instances
        )

    def _is_linked(self, rental: Rental) -> bool:
        return rental.record.node is not None and self._sight.is_alive(rental.record.node)

    def _cloud_member(self, launch: LaunchId) -> Member | None:
        rental = self._rentals.get(launch)
        members = self._sight.members()
        if rental is not None and rental.record.node is not None:
            return members.get(rental.record.node)
        name = member_name(launch)
        return next((m for m in members.values() if m.role is Role.CLOUD and m.name == name), None)

    def _is_busy(self, instance: Instance) -> bool:
        member = self._cloud_member(instance.launch)
        if member is None or not self._sight.is_alive(member.node):
            return False
        _, capacity = self._sight.heard(member.node)
        return capacity is not None and bool(capacity.allocations)

    def _places(self) -> list[Place]:
        """Everything rented or asked for, by whomever, with what is left of it."""
        places: dict[LaunchId, Place] = {}
        for rental in self._rentals.values():
            request = rental.record.request
            place = self._place(request.launch, request.need, request.rung)
            place.name = rental.record.instance or f"the launch of a {request.rung.instance_type}"
            place.is_closed = rental.state is LaunchState.ENDING
            places[request.launch] = place
        types = {rung.instance_type: rung for rung in self._survey.rungs}
        for instance in self._survey.instances:
            if instance.launch not in places and instance.state in LIVE_STATES:
                rung = types.get(instance.instance_type)
                place = self._place(instance.launch, instance.need, rung)
                place.name = f"{instance.instance} of another burst peer"
                places[instance.launch] = place
        return list(places.values())

    def _place(self, launch: LaunchId, need: JobId, rung: Rung | None) -> Place:
        member = self._cloud_member(launch)
        record, capacity = self._sight.heard(member.node) if member is not None else (None, None)
        if record is not None and capacity is not None:
            return Place("", need, record.inventory, list(capacity.allocations))
        if rung is not None:
            return Place("", need, inventory_of(rung))
        return Place("", need, Inventory(0, 0), is_closed=True)

    def _note_use(self, now: Now) -> None:
        """What runs on each instance, or is meant for it: that keeps it."""
        places = self._places()
        assign(self._waiting.needs, places)
        for rental, place in zip(self._rentals.values(), places, strict=False):
            if rental.state is not LaunchState.JOINED:
                if place.serves:
                    rental.useful_at = now.boot_s
                continue
            assert rental.record.node is not None
            _, capacity = self._sight.heard(rental.record.node)
            works = capacity is not None and bool(capacity.allocations)
            if works and not rental.has_worked:
                rental.has_worked = True
                self._rests.worked(rental.record.request.rung)
                self._forbidden_s, self._fault = FORBIDDEN_PAUSE_S, ""
            if works or not self._is_linked(rental):
                rental.useful_at = now.boot_s  # out of touch is not idle: its own timers watch it
            for job in place.serves:
                rental.useful_at = max(rental.useful_at, self._waiting.seen_at(job))


def token(mesh: MeshId, need: JobId, number: int) -> str:
    """EC2's ClientToken: equal for two burst peers that rent for one need, so that the provider settles it."""
    text = f"meshgpu launch {mesh} {need} {number}"
    return hashlib.sha256(text.encode()).hexdigest()[:CLIENT_TOKEN_CHARACTERS]
