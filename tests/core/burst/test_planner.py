"""The planner, order by order: what is journalled before what, what is asked again, and when it is given back."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest

from meshgpu.core import effects as fx
from meshgpu.core import events as ev
from meshgpu.core.burst.planner import COURTESY_S, BurstStatus, Planner, Scribe, Sight, token
from meshgpu.core.burst.rental import (
    END_EARLY_S,
    JOIN_WITHIN_S,
    MISSED,
    REPEAT_FOR_S,
    SEEK_S,
    SURVEY_S,
    member_name,
)
from meshgpu.core.burst.survey import FRESH_S, QUIET_S
from meshgpu.errors import TrustError
from meshgpu.model.clock import Now
from meshgpu.model.cloud import BurstSettings, Caps, Instance, InstanceState, LaunchId, LaunchRequest, Market, Rung
from meshgpu.model.gossip import Allocation, Capacity, Demand, Need, NodeRecord
from meshgpu.model.ids import Address, JobId, MeshId, NodeId, UserName, node_id
from meshgpu.model.inventory import Inventory
from meshgpu.model.records import LaunchRecord, LaunchState, Record
from meshgpu.model.resources import GB, GpuRequest, Resources
from meshgpu.model.trust import AddNode, Member, RemoveNode, Role, Signed

WALL_S = 1_800_000_000.0
MESH = MeshId("5e" * 32)
ME, PEER, STEWARD = NodeId("m" * 52), NodeId("b" * 52), NodeId("s" * 52)
KEY = b"k" * 32
CLOUD = node_id(KEY)
ONE = Rung("g6.xlarge", "a", Market.SPOT, "L4", 1, 22 * 2**30, 4, 16 * GB, 0.40)
FOUR = Rung("g6.12xlarge", "a", Market.SPOT, "L4", 4, 22 * 2**30, 48, 192 * GB, 2.0)
SETTINGS = BurstSettings(
    "eu-central-1", Caps(5.0, 20.0, 50.0, 10.0, 3, False, 3600.0), ("g6.xlarge",), 60.0, 300.0, 900.0, "", "", "true"
)
LOG = (Signed("LogEntry", b"log", node_id(b""), b""),)  # type: ignore[arg-type]  # any id serves as a key's


def need(name: str, gpus: int = 1) -> Need:
    return Need(JobId(name * 26), Resources(GpuRequest(gpus)), WALL_S)


@dataclass
class Bench:
    """A mesh that a test makes up, a disk, and the planner. `mine`: role of this node. at: `boot_s`."""

    rungs: tuple[Rung, ...] = (ONE,)
    at: float = 0.0
    needs: list[Need] = field(default_factory=list)
    roles: dict[NodeId, Role] = field(default_factory=lambda: {ME: Role.BURST, STEWARD: Role.RIG})
    away: set[NodeId] = field(default_factory=lambda: {CLOUD})
    capacity: Capacity | None = None
    instances: list[Instance] = field(default_factory=list)
    disk: dict[tuple[str, str], Record] = field(default_factory=dict)
    written: list[AddNode | RemoveNode] = field(default_factory=list)
    met: list[tuple[NodeId, Address]] = field(default_factory=list)
    may_write: bool = True
    stewards: set[NodeId] = field(default_factory=lambda: {STEWARD})

    def __post_init__(self) -> None:
        self.planner = self._planner()

    def _planner(self) -> Planner:
        sight = Sight(
            lambda: MESH,
            self._members,
            lambda node: node not in self.away,
            lambda node: Demand(tuple(self.needs)) if node in self.stewards else None,
            self._heard,
        )
        planner = Planner(ME, random.Random(1), sight, Scribe(self._write, lambda: LOG, self._meet))
        planner.restore(self.now(), self.disk.values())
        return planner

    def restart(self) -> None:
        self.planner = self._planner()

    def now(self) -> Now:
        return Now(self.at, WALL_S + self.at, "boot")

    def _members(self) -> dict[NodeId, Member]:
        members = {n: Member(n, n[:4], b"", b"", role, UserName("ada")) for n, role in self.roles.items()}
        for body in self.written:
            if isinstance(body, AddNode):
                members[body.node] = Member(body.node, body.name, KEY, b"", body.role, body.owner)
            else:
                members.pop(body.node, None)
        return members

    def _heard(self, node: NodeId) -> tuple[NodeRecord | None, Capacity | None]:
        return (NodeRecord("1", (), Inventory(4, 16 * GB)), self.capacity) if node == CLOUD else (None, None)

    def _write(self, _now: Now, bodies: tuple[AddNode | RemoveNode, ...]) -> list[fx.Effect]:
        if not self.may_write:
            raise TrustError("not-allowed", "cannot write")
        self.written.extend(bodies)
        return []

    def _meet(self, _now: Now, node: NodeId, address: Address) -> list[fx.Effect]:
        self.met.append((node, address))
        return []

    # -- driving ------------------------------------------------------------------------------------------------------

    def tell(self, event: ev.BurstEvent | None = None) -> list[fx.Effect]:
        """One step; what it persists is on disk, what else it orders is returned."""
        effects = self.planner.heard(self.now(), event) if event is not None else []
        effects += self.planner.step(self.now())
        for effect in effects:
            if isinstance(effect, fx.Persist):
                if effect.record is None:
                    self.disk.pop((effect.kind, effect.key), None)
                else:
                    self.disk[effect.kind, effect.key] = effect.record
        return [effect for effect in effects if not isinstance(effect, fx.Persist)]

    def wait(self, for_s: float) -> list[fx.Effect]:
        """Step at every deadline until something else than a survey is ordered; surveys are answered at once."""
        ends = self.at + for_s
        while (deadline := self.planner.deadline()) is not None and deadline <= ends:
            self.at = max(deadline, self.at)
            if orders := self.answer_surveys(self.tell()):
                return orders
        self.at = ends
        return self.answer_surveys(self.tell())

    def answer_surveys(self, orders: Iterable[fx.Effect]) -> list[fx.Effect]:
        left: list[fx.Effect] = []
        queue = list(orders)
        while queue:
            order = queue.pop(0)
            if isinstance(order, fx.SurveyCloud):
                queue += self.tell(ev.CloudSurveyed(self.rungs, tuple(self.instances)))
            elif isinstance(order, fx.PrepareLaunch):
                queue += self.tell(ev.LaunchPrepared(order.launch, b"user data", b"bootstrap"))
            else:
                left.append(order)
        return left

    def changed(self) -> list[fx.Effect]:
        self.planner.mesh_changed(self.now())
        return self.answer_surveys(self.tell())

    def configured(self, settings: BurstSettings | None = SETTINGS) -> "Bench":
        self.answer_surveys(self.tell(ev.BurstConfigured(settings)))
        return self

    # -- usual beginnings ---------------------------------------------------------------------------------------------

    def asking(self) -> LaunchRequest:
        """One need is ripe, and its call is under way."""
        self.needs.append(need("a"))
        self.configured().changed()
        (order,) = self.wait(61.0)
        assert isinstance(order, fx.Launch)
        return order.request

    def renting(self, address: str = "198.51.100.7") -> LaunchRequest:
        """… and has brought an instance."""
        request = self.asking()
        self.instances = [instance(request, address)]
        (order,) = self.tell(ev.LaunchEnded(request.launch, self.instances[0]))
        assert isinstance(order, fx.Enrol)
        return request

    def joined(self) -> LaunchRequest:
        """… that is a member."""
        request = self.renting()
        (order,) = self.tell(ev.Enrolled(request.launch, KEY, b"ca"))
        assert order == fx.Welcome(request.launch, LOG)
        self.away.discard(CLOUD)
        assert self.tell(ev.WelcomeEnded(request.launch)) == []
        return request

    def record(self, request: LaunchRequest) -> LaunchRecord:
        record = self.disk["launch", request.launch]
        assert isinstance(record, LaunchRecord)
        return record

    def status(self) -> BurstStatus:
        status = self.planner.status(self.now())
        assert status is not None
        return status

    def words(self) -> list[str]:
        return [plan.words for plan in self.planner.plan(self.now())]


def instance(request: LaunchRequest, address: str = "", state: InstanceState = InstanceState.RUNNING) -> Instance:
    return Instance(
        "i-1",
        request.launch,
        MESH,
        request.owner,
        request.need,
        state,
        address,
        WALL_S,
        request.lease_ends_wall_s,
        request.rung.instance_type,
        request.rung.market,
        request.rung.usd_per_hour,
    )


# -- whether to rent ---------------------------------------------------------------------------------------------------


def test_planner_without_settings_orders_nothing_and_has_no_deadline() -> None:
    bench = Bench(needs=[need("a")])
    assert bench.changed() == []
    assert bench.tell(ev.CloudSurveyed()) == []
    assert bench.planner.deadline() is None
    assert bench.planner.status(bench.now()) is None


def test_need_waits_for_the_office_then_is_journalled_and_asked_for() -> None:
    bench = Bench(needs=[need("a")]).configured()
    bench.changed()
    assert bench.words() == ["waits 60 s more for the office"]
    assert bench.wait(59.9) == []
    (order,) = bench.wait(0.1)
    assert isinstance(order, fx.Launch)
    assert bench.record(order.request) == LaunchRecord(order.request, LaunchState.ASKED, b"bootstrap", WALL_S + 60.0)
    assert ("spend", order.request.launch) in bench.disk
    assert order.request.token == token(MESH, order.request.need, 1)
    assert order.request.user_data == b"user data"
    assert order.request.lease_ends_wall_s == WALL_S + 60.0 + 3600.0


def test_nothing_is_rented_on_an_old_survey() -> None:
    bench = Bench(needs=[need("a")]).configured()
    bench.changed()
    bench.at = 60.0
    (order,) = bench.tell()
    assert isinstance(order, fx.SurveyCloud)
    assert bench.tell() == []
    (order,) = bench.tell(ev.CloudSurveyed(bench.rungs))
    assert isinstance(order, fx.PrepareLaunch)
    assert order.name == member_name(order.launch)
    bench.at += FRESH_S + 1
    (order,) = bench.tell(ev.LaunchPrepared(order.launch, b"", b""))
    assert isinstance(order, fx.Launch)


def test_need_that_is_met_while_the_launch_is_prepared_costs_nothing() -> None:
    bench = Bench(needs=[need("a")]).configured()
    bench.changed()
    bench.at = 60.0
    bench.tell()
    (order,) = bench.tell(ev.CloudSurveyed(bench.rungs))
    assert isinstance(order, fx.PrepareLaunch)
    bench.needs.clear()
    bench.planner.mesh_changed(bench.now())
    bench.tell()
    assert bench.tell(ev.LaunchPrepared(order.launch, b"", b"")) == []
    assert set(bench.disk) == {("burst", "burst")}


def test_provider_that_does_not_answer_lends_nothing_and_is_asked_less_and_less() -> None:
    bench = Bench(needs=[need("a")])
    bench.tell(ev.BurstConfigured(SETTINGS))
    bench.at = 60.0
    pauses = []
    for _ in range(9):
        assert bench.tell(ev.CloudSurveyed(code="no-answer", reason="no route")) == []
        deadline = bench.planner.deadline()
        assert deadline is not None
        pauses.append(deadline - bench.at)
        bench.at = deadline
        assert [type(order) for order in bench.tell()] == [fx.SurveyCloud]
    assert pauses[:3] == [5.0, 10.0, 20.0]
    assert pauses[-1] == 300.0
    status = bench.planner.status(bench.now())
    assert status is not None
    assert status.fault == "cannot ask what lives: no route"


def test_quiet_provider_is_asked_every_half_hour() -> None:
    bench = Bench().configured()
    assert bench.planner.deadline() == bench.at + QUIET_S


def test_lowest_burst_peer_acts_and_others_after_a_courtesy() -> None:
    bench = Bench(needs=[need("a")])
    bench.roles[PEER] = Role.BURST
    bench.configured().changed()
    assert bench.wait(60.0 + COURTESY_S - 0.1) == []
    assert [type(order) for order in bench.wait(0.2)] == [fx.Launch]


def test_burst_peer_that_is_away_gets_no_courtesy() -> None:
    bench = Bench(needs=[need("a")], away={PEER})
    bench.roles[PEER] = Role.BURST
    bench.configured().changed()
    assert [type(order) for order in bench.wait(60.0)] == [fx.Launch]


def test_node_that_is_no_burst_peer_rents_nothing() -> None:
    bench = Bench(needs=[need("a")])
    bench.roles[ME] = Role.RIG
    bench.configured().changed()
    assert bench.wait(1000.0) == []
    assert bench.words() == ["this node may not rent"]


def test_demand_of_a_steward_that_is_away_does_not_count() -> None:
    bench = Bench(needs=[need("a")], away={STEWARD})
    bench.configured().changed()
    assert bench.wait(1000.0) == []


def test_needs_share_one_instance_where_that_is_cheaper() -> None:
    bench = Bench((replace(FOUR, usd_per_hour=1.0), ONE), needs=[need("a"), need("b"), need("c")]).configured()
    bench.changed()
    (order,) = bench.wait(60.0)
    assert isinstance(order, fx.Launch)
    assert order.request.rung.instance_type == "g6.12xlarge"
    assert bench.words() == ["waits for the launch of a g6.12xlarge"] * 3


def test_each_need_gets_its_own_instance_one_call_at_a_time() -> None:
    bench = Bench(needs=[need("a"), need("b")])
    bench.configured().changed()
    (first,) = bench.wait(60.0)
    assert isinstance(first, fx.Launch)
    assert bench.wait(5.0) == []
    orders = bench.answer_surveys(bench.tell(ev.LaunchEnded(first.request.launch, instance(first.request))))
    (second,) = [order for order in orders if isinstance(order, fx.Launch)]
    assert {first.request.need[0], second.request.need[0]} == {"a", "b"}


def test_cap_is_named_in_the_plan_and_nothing_is_asked() -> None:
    bench = Bench(needs=[need("a")])
    bench.configured(replace(SETTINGS, caps=replace(SETTINGS.caps, usd_per_hour=0.3))).changed()
    assert bench.wait(100.0) == []
    assert bench.words() == ["the cap of $0.30 an hour: $0.00 and $0.40 more would be $0.40"]


def test_plan_counts_what_it_would_rent_before() -> None:
    bench = Bench(needs=[need("a"), need("b")])
    bench.tell(ev.BurstConfigured(replace(SETTINGS, caps=replace(SETTINGS.caps, instances=1))))
    bench.at = 100.0
    bench.planner.mesh_changed(bench.now())
    bench.tell(ev.CloudSurveyed(bench.rungs))
    bench.at = 160.0
    plans = bench.planner.plan(bench.now())
    assert [plan.rung for plan in plans] == [ONE, None]
    assert plans[0].usd == pytest.approx(0.4 * 3720 / 3600)  # its lease, and what clocks may differ by
    assert plans[1].words == "the cap of 1 instance at a time: 1 instance live"


def test_gpu_that_nobody_sells_is_said_so() -> None:
    bench = Bench(needs=[need("a", gpus=8)]).configured()
    bench.changed()
    assert bench.wait(100.0) == []
    assert bench.words() == ["no instance type that may be rented fits"]


# -- the call ----------------------------------------------------------------------------------------------------------


def test_unknown_outcome_repeats_the_very_same_request() -> None:
    bench = Bench()
    request = bench.asking()
    for code in ("unknown-outcome", "throttled", "failed"):
        assert bench.answer_surveys(bench.tell(ev.LaunchEnded(request.launch, code=code, reason="lost"))) == []
        assert bench.wait(60.0) == [fx.Launch(request)]


def test_request_is_not_repeated_for_ever_and_counts_for_nothing_once_a_survey_shows_nothing() -> None:
    bench = Bench()
    request = bench.asking()
    bench.at += REPEAT_FOR_S
    bench.answer_surveys(bench.tell(ev.LaunchEnded(request.launch, code="unknown-outcome")))
    assert bench.wait(SEEK_S - 1) == []
    assert ("launch", request.launch) in bench.disk
    (order,) = bench.wait(20.0)
    assert ("launch", request.launch) not in bench.disk
    assert isinstance(order, fx.Launch)  # a new launch, with a number of its own
    assert order.request.token == token(MESH, request.need, 2)


def test_request_is_not_repeated_once_nobody_needs_it() -> None:
    bench = Bench()
    request = bench.asking()
    bench.needs.clear()
    bench.answer_surveys(bench.tell(ev.LaunchEnded(request.launch, code="unknown-outcome")))
    assert bench.wait(1000.0) == []
    assert ("launch", request.launch) not in bench.disk


def test_restart_asks_what_lives_before_it_repeats_the_same_request() -> None:
    bench = Bench()
    request = bench.asking()
    bench.restart()
    (order,) = bench.tell()
    assert isinstance(order, fx.SurveyCloud)
    assert bench.tell(ev.CloudSurveyed(bench.rungs)) == [fx.Launch(request)]


def test_restart_takes_up_the_instance_that_the_call_has_made() -> None:
    bench = Bench()
    request = bench.asking()
    bench.restart()
    bench.instances = [instance(request, "198.51.100.7")]
    (order,) = bench.answer_surveys(bench.tell())
    assert order == fx.Enrol(request.launch, Address("198.51.100.7:443"), b"bootstrap")
    assert bench.record(request).instance == "i-1"


def test_rung_without_capacity_is_left_for_the_next_one_after_a_new_survey() -> None:
    other = replace(ONE, zone="b", usd_per_hour=0.5)
    bench = Bench((ONE, other))
    request = bench.asking()
    (order,) = bench.tell(ev.LaunchEnded(request.launch, code="no-capacity"))
    assert isinstance(order, fx.SurveyCloud)
    (launch,) = bench.answer_surveys([order])
    assert isinstance(launch, fx.Launch)
    assert launch.request.rung == other
    assert launch.request.launch != request.launch
    assert bench.answer_surveys(bench.tell(ev.LaunchEnded(launch.request.launch, code="no-capacity"))) == []
    assert bench.words() == ["no capacity: tried again in 180 s"]
    assert [type(order) for order in bench.wait(180.0)] == [fx.Launch]


def test_token_that_another_peer_took_is_left_to_it() -> None:
    bench = Bench()
    request = bench.asking()
    assert bench.answer_surveys(bench.tell(ev.LaunchEnded(request.launch, code="token-taken"))) == []
    assert bench.words() == ["another burst peer rents for it"]
    theirs = replace(instance(request), owner=PEER, launch=LaunchId(request.launch[::-1]))
    bench.instances = [theirs]
    assert bench.wait(300.0) == []
    assert bench.words() == ["waits for i-1 of another burst peer"]


def test_token_of_an_instance_that_died_counts_as_ended() -> None:
    bench = Bench()
    request = bench.asking()
    dead = instance(request, state=InstanceState.TERMINATED)
    bench.tell(ev.LaunchEnded(request.launch, dead))
    assert ("launch", request.launch) not in bench.disk


def test_forbidden_launches_are_tried_again_later_and_later() -> None:
    bench = Bench()
    launch = bench.asking().launch
    pauses = []
    for _ in range(7):
        assert bench.answer_surveys(bench.tell(ev.LaunchEnded(launch, code="not-allowed", reason="no right"))) == []
        before = bench.at
        (order,) = bench.wait(2000.0)
        assert isinstance(order, fx.Launch)
        launch = order.request.launch
        pauses.append(bench.at - before)
    assert pauses[:3] == [60.0, 120.0, 240.0]
    assert pauses[-1] == 1800.0


# -- the instance ------------------------------------------------------------------------------------------------------


def test_instance_is_enrolled_written_down_and_welcomed() -> None:
    bench = Bench()
    request = bench.joined()
    (body,) = bench.written
    name = member_name(request.launch)
    assert body == AddNode(CLOUD, KEY, b"ca", name, Role.CLOUD, UserName("ada"), request.lease_ends_wall_s)
    assert bench.met == [(CLOUD, Address("198.51.100.7:443"))]
    assert bench.record(request).state is LaunchState.JOINED


def test_address_is_asked_for_until_there_is_one() -> None:
    bench = Bench()
    request = bench.asking()
    bench.instances = [instance(request)]
    assert bench.answer_surveys(bench.tell(ev.LaunchEnded(request.launch, bench.instances[0]))) == []
    assert bench.wait(20.0) == []
    bench.instances = [instance(request, "198.51.100.7")]
    assert [type(order) for order in bench.wait(5.0)] == [fx.Enrol]


def test_instance_that_does_not_answer_is_dialled_until_its_certificate_is_over() -> None:
    bench = Bench()
    request = bench.renting()
    dials = 1
    orders: list[fx.Effect] = []
    while not any(isinstance(order, fx.Terminate) for order in orders):
        assert dials < 1000
        orders = bench.answer_surveys(bench.tell(ev.Enrolled(request.launch, code="no-answer")))
        orders = orders or bench.wait(10.0)
        dials += any(isinstance(order, fx.Enrol) for order in orders)
    assert orders == [fx.Terminate("i-1")]
    assert 60.0 + JOIN_WITHIN_S <= bench.at <= 60.0 + JOIN_WITHIN_S + 10.0
    assert dials > 100
    assert bench.record(request).reason == "it did not join in time"


def test_welcome_that_failed_begins_with_another_dial_and_the_same_key() -> None:
    bench = Bench()
    request = bench.renting()
    bench.tell(ev.Enrolled(request.launch, KEY, b"ca"))
    bench.tell(ev.WelcomeEnded(request.launch, "no-answer"))
    bench.restart()
    (order,) = bench.wait(10.0)
    assert isinstance(order, fx.Enrol)
    assert bench.tell(ev.Enrolled(request.launch, KEY, b"ca")) == [fx.Welcome(request.launch, LOG)]
    assert len(bench.written) == 1


def test_instance_that_was_welcomed_before_a_crash_is_a_member_once_its_link_is_open() -> None:
    bench = Bench()
    request = bench.renting()
    bench.tell(ev.Enrolled(request.launch, KEY, b"ca"))
    bench.restart()
    assert [type(order) for order in bench.wait(10.0)] == [fx.Enrol]
    bench.away.clear()
    assert bench.changed() == []
    assert bench.record(request).state is LaunchState.JOINED
    assert bench.answer_surveys(bench.tell(ev.Enrolled(request.launch, code="no-answer"))) == []
    assert bench.wait(SETTINGS.idle_s - 1) == []


def test_instance_that_changes_its_key_ends() -> None:
    bench = Bench()
    request = bench.renting()
    bench.tell(ev.Enrolled(request.launch, KEY, b"ca"))
    bench.tell(ev.WelcomeEnded(request.launch, "no-answer"))
    assert [type(order) for order in bench.wait(10.0)] == [fx.Enrol]
    assert bench.tell(ev.Enrolled(request.launch, b"x" * 32, b"ca")) == [fx.Terminate("i-1")]


def test_instances_that_never_join_are_rented_more_and_more_seldom() -> None:
    bench = Bench()
    launches = [bench.renting()]
    began = bench.at
    while bench.at < began + 4 * 3600.0:
        bench.instances = [replace(bench.instances[0], state=InstanceState.TERMINATED)]
        for order in bench.wait(60.0):  # it powers off within a minute, as where `install` fails
            if isinstance(order, fx.Enrol):
                bench.tell(ev.Enrolled(order.launch, b"", b"", "no-answer", "refused"))
            elif isinstance(order, fx.Launch):
                launches.append(order.request)
                bench.instances = [instance(order.request, "198.51.100.7")]
                (dial,) = bench.tell(ev.LaunchEnded(order.request.launch, bench.instances[0]))
                assert isinstance(dial, fx.Enrol)
                bench.tell(ev.Enrolled(dial.launch, b"", b"", "no-answer", "refused"))
    assert 4 < len(launches) < 16
    assert bench.status().fault == "i-1 ended before it joined: refused"


def test_instance_that_joins_and_runs_nothing_is_not_rented_again_at_once() -> None:
    bench = Bench()
    bench.joined()
    bench.capacity = Capacity((), ())
    bench.changed()
    assert bench.wait(7200.0) == [fx.Terminate("i-1")]
    bench.tell(ev.TerminateEnded("i-1"))
    bench.instances = [replace(bench.instances[0], state=InstanceState.TERMINATED)]
    began = bench.at
    assert [type(order) for order in bench.wait(600.0)] == [fx.Launch]
    assert bench.at - began > 60.0
    assert "ran nothing" in bench.status().fault


def test_rented_machine_orders_no_other() -> None:
    bench = Bench()
    bench.joined()
    bench.stewards = {CLOUD}
    bench.changed()
    assert bench.planner.plan(bench.now()) == ()


def test_tags_do_not_change_what_the_journal_counts() -> None:
    bench = Bench()
    request = bench.joined()
    bench.instances = [replace(bench.instances[0], usd_per_hour=0.0)]
    bench.wait(120.0)
    assert bench.status().usd_per_hour == request.rung.usd_per_hour


def test_instance_that_the_mesh_does_not_let_in_ends() -> None:
    bench = Bench(may_write=False)
    request = bench.renting()
    assert bench.tell(ev.Enrolled(request.launch, KEY, b"ca")) == [fx.Terminate("i-1")]
    assert bench.record(request).reason == "cannot write"


def busy() -> Capacity:
    return Capacity((), (Allocation(JobId("a" * 26), 1, "train", UserName("ada"), ()),))


def test_idle_instance_is_given_back() -> None:
    bench = Bench()
    request = bench.joined()
    bench.needs.clear()
    bench.capacity = busy()
    bench.changed()
    assert bench.wait(600.0) == []
    bench.capacity = Capacity((), ())
    bench.changed()
    began = bench.at
    assert bench.wait(1000.0) == [fx.Terminate("i-1")]
    assert bench.at - began == pytest.approx(SETTINGS.idle_s)
    assert bench.record(request).state is LaunchState.ENDING


def test_instance_that_is_out_of_touch_is_not_idle() -> None:
    bench = Bench()
    bench.joined()
    bench.needs.clear()
    bench.capacity = Capacity((), ())
    bench.away = {CLOUD}
    bench.changed()
    assert bench.wait(2000.0) == []


def test_lease_ends_before_it_is_over_whatever_runs() -> None:
    bench = Bench(capacity=busy())
    request = bench.joined()
    assert bench.wait(5000.0) == [fx.Terminate("i-1")]
    assert bench.at == pytest.approx(request.lease_ends_wall_s - WALL_S - END_EARLY_S, abs=1e-3)


def test_ending_is_repeated_until_the_provider_shows_it() -> None:
    bench = Bench(capacity=busy())
    request = bench.joined()
    bench.needs.clear()
    bench.wait(5000.0)
    for code in ("throttled", "", ""):
        assert bench.answer_surveys(bench.tell(ev.TerminateEnded("i-1", code))) == []
        assert bench.wait(100.0) == [fx.Terminate("i-1")]
    bench.tell(ev.TerminateEnded("i-1"))
    bench.instances = [instance(request, state=InstanceState.TERMINATED)]
    assert bench.wait(20.0) == []
    assert ("launch", request.launch) not in bench.disk
    assert bench.written[-1] == RemoveNode(CLOUD)


def test_instance_that_the_provider_took_leaves_the_mesh_and_its_job_gets_another() -> None:
    bench = Bench()
    request = bench.joined()
    bench.capacity = busy()
    bench.changed()
    bench.instances = [instance(request, state=InstanceState.TERMINATED)]
    (order,) = bench.wait(SURVEY_S)
    assert bench.written[-1] == RemoveNode(CLOUD)
    assert isinstance(order, fx.Launch)
    assert order.request.token == token(MESH, request.need, 2)


def test_instance_must_be_missing_twice_to_count_as_gone() -> None:
    bench = Bench(capacity=busy())
    request = bench.joined()
    bench.needs.clear()
    bench.instances = []
    bench.at += SEEK_S
    assert MISSED == 2
    bench.answer_surveys(bench.tell())
    assert ("launch", request.launch) in bench.disk
    bench.wait(SURVEY_S)
    assert ("launch", request.launch) not in bench.disk


def test_other_meshes_instances_are_none_of_ours() -> None:
    bench = Bench()
    request = bench.asking()
    stranger = LaunchId(request.launch[::-1])
    bench.instances = [replace(instance(request), mesh=MeshId("00" * 32), launch=stranger)]
    bench.tell(ev.LaunchEnded(request.launch, code="no-capacity"))
    assert bench.wait(2 * SURVEY_S) == []
    status = bench.planner.status(bench.now())
    assert status is not None
    assert status.instances == ()
    assert ("spend", stranger) not in bench.disk


def test_orphan_with_our_name_is_ended() -> None:
    bench = Bench()
    request = bench.asking()
    bench.instances = [replace(instance(request), launch=LaunchId(request.launch[::-1]), need=JobId("z" * 26))]
    bench.tell(ev.LaunchEnded(request.launch, code="no-capacity"))
    assert bench.wait(SURVEY_S) == [fx.Terminate("i-1")]


# -- no more -----------------------------------------------------------------------------------------------------------


def test_node_that_shall_not_rent_gives_everything_back_and_forgets_that_it_did() -> None:
    bench = Bench()
    request = bench.joined()
    assert bench.answer_surveys(bench.tell(ev.BurstConfigured(None))) == [fx.Terminate("i-1")]
    assert ("burst", "burst") in bench.disk
    bench.restart()
    assert fx.Terminate("i-1") in bench.answer_surveys(bench.tell())
    bench.tell(ev.TerminateEnded("i-1"))
    bench.instances = [instance(request, state=InstanceState.TERMINATED)]
    assert bench.wait(20.0) == []
    assert {kind for kind, _ in bench.disk} == {"spend"}
    assert bench.planner.deadline() is None
    assert bench.changed() == []


def test_status_tells_what_lives_and_what_it_costs() -> None:
    bench = Bench()
    request = bench.joined()
    status = bench.planner.status(bench.now())
    assert status is not None
    assert [record.request.launch for record in status.launches] == [request.launch]
    assert status.usd_per_hour == 0.4
    assert status.usd_today == pytest.approx(0.4 * 3720 / 3600)
