"""A node that rents: its planner sees its gossip, writes its own chain, and is taken up again after a restart."""

import random
from dataclasses import replace

import pytest

from meshgpu.core import effects as fx
from meshgpu.core import events as ev
from meshgpu.core.node import Node, NodeConfig
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.model.clock import Now
from meshgpu.model.cloud import BurstSettings, Caps, Instance, InstanceState, Market, Rung
from meshgpu.model.gossip import Demand, Need
from meshgpu.model.ids import JobId, KeyId
from meshgpu.model.records import BurstRecord, LaunchRecord, LaunchState, Record
from meshgpu.model.resources import GB, GpuRequest, Resources
from meshgpu.model.trust import AddNode, LogEntry, Role, SetRole
from meshgpu.sim.office import Office, furnish

WALL_S = 1_800_000_000.0
RUNG = Rung("g6.xlarge", "a", Market.SPOT, "L4", 1, 22 * 2**30, 4, 16 * GB, 0.40)
SETTINGS = BurstSettings(
    "eu-central-1", Caps(5.0, 20.0, 50.0, 10.0, 3, False, 3600.0), ("g6.xlarge",), 60.0, 300.0, 900.0, "", "", "true"
)


class Renter:
    """The first machine of a plain office, with the role to rent, its disk, and one job that waits."""

    def __init__(self, office: Office) -> None:
        self.office = office
        self.disk: dict[tuple[str, str], Record] = {}
        self.at = 0.0
        self.node = self._start()
        me = office.setups[0]
        log = MeshLog(office.notaries[0])
        log.enter(office.mesh, office.log)
        role = log.write(me.accounts[me.owner], (SetRole(me.node, Role.BURST),))
        self.tell(ev.MeshEntered(office.mesh, (*office.log, *role)))

    def now(self) -> Now:
        return Now(self.at, WALL_S + self.at, "boot")

    def _start(self) -> Node:
        return Node(
            self.office.setups[0].node,
            self.now(),
            self.office.notaries[0],
            random.Random(1),
            NodeConfig("1"),
            self.disk.values(),
        )

    def restart(self) -> list[fx.Effect]:
        self.node = self._start()
        return self._keep(self.node.start(self.now())) + self.tell(ev.Ticked())

    def tell(self, event: ev.Event) -> list[fx.Effect]:
        return self._keep(self.node.step(self.now(), event))

    def _keep(self, effects: list[fx.Effect]) -> list[fx.Effect]:
        """Write down what is to be kept; returns the orders to the cloud, which must come after that."""
        persists = [isinstance(effect, fx.Persist) for effect in effects]
        assert persists == sorted(persists, reverse=True)
        for effect in effects:
            if isinstance(effect, fx.Persist) and effect.record is not None:
                self.disk[effect.kind, effect.key] = effect.record
        return [effect for effect in effects if isinstance(effect, fx.BurstEffect)]

    def demand(self) -> None:
        need = Need(JobId("a" * 26), Resources(GpuRequest(1)), WALL_S - 300.0)
        self.node._gossip.say(self.now(), Demand((need,)))

    def asking(self) -> fx.Launch:
        (survey,) = self.tell(ev.BurstConfigured(SETTINGS))
        assert survey == fx.SurveyCloud(SETTINGS)
        self.demand()
        (prepare,) = self.tell(ev.CloudSurveyed((RUNG,)))
        assert isinstance(prepare, fx.PrepareLaunch)
        (launch,) = self.tell(ev.LaunchPrepared(prepare.launch, b"user data", b"bootstrap"))
        assert isinstance(launch, fx.Launch)
        return launch


@pytest.fixture
def renter() -> Renter:
    return Renter(furnish(random.Random(1), 2, is_plain=True))


def instance(order: fx.Launch) -> Instance:
    request = order.request
    return Instance(
        "i-1",
        request.launch,
        request.mesh,
        request.owner,
        request.need,
        InstanceState.RUNNING,
        "198.51.100.7",
        WALL_S,
        request.lease_ends_wall_s,
        request.rung.instance_type,
        request.rung.market,
        request.rung.usd_per_hour,
    )


def test_demand_of_this_very_node_is_served(renter: Renter) -> None:
    launch = renter.asking()
    assert launch.request.owner == renter.node.node
    assert launch.request.mesh == renter.office.mesh
    assert renter.disk["burst", "burst"] == BurstRecord(SETTINGS, True)


def test_instance_is_welcomed_with_a_log_that_names_it(renter: Renter) -> None:
    launch = renter.asking()
    (enrol,) = renter.tell(ev.LaunchEnded(launch.request.launch, instance(launch)))
    assert isinstance(enrol, fx.Enrol)
    (welcome,) = renter.tell(ev.Enrolled(launch.request.launch, b"k" * 32, b"ca"))
    assert isinstance(welcome, fx.Welcome)
    notary, me = renter.office.notaries[0], renter.node.log.members[renter.node.node]
    own = [notary.read(s, me.public_key, LogEntry).body for s in welcome.log if s.key == KeyId(renter.node.node)]
    (body,) = own
    assert isinstance(body, AddNode)
    assert (body.role, body.expires_wall_s, body.owner) == (Role.CLOUD, launch.request.lease_ends_wall_s, me.owner)
    renter.tell(ev.WelcomeEnded(launch.request.launch))
    assert renter.node.addresses(body.node) == ("198.51.100.7:443",)


def test_node_that_lost_the_role_gives_the_instance_back(renter: Renter) -> None:
    launch = renter.asking()
    renter.tell(ev.LaunchEnded(launch.request.launch, instance(launch)))
    me = renter.office.setups[0]
    renter.tell(ev.LogWritten(renter.node.log.write(me.accounts[me.owner], (SetRole(me.node, Role.RIG),))))
    assert renter.tell(ev.Enrolled(launch.request.launch, b"k" * 32, b"ca")) == [fx.Terminate("i-1")]


def test_restart_takes_settings_and_launches_up_again(renter: Renter) -> None:
    launch = renter.asking()
    assert renter.restart() == [fx.SurveyCloud(SETTINGS)]
    renter.demand()
    assert renter.tell(ev.CloudSurveyed((RUNG,))) == [launch]
    (enrol,) = renter.tell(ev.LaunchEnded(launch.request.launch, instance(launch)))
    assert isinstance(enrol, fx.Enrol)
    record = renter.disk["launch", launch.request.launch]
    assert isinstance(record, LaunchRecord)
    assert record.state is LaunchState.RENTED


def test_node_without_settings_leaves_the_cloud_alone(renter: Renter) -> None:
    renter.demand()
    assert renter.tell(ev.Ticked()) == []
    assert renter.tell(ev.CloudSurveyed((replace(RUNG, zone="b"),))) == []
    assert renter.node.burst.plan(renter.now()) == ()
