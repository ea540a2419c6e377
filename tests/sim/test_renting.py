"""A thousand launches under crashes and failing calls: no instance is left behind, and no cap is passed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from meshgpu.core.burst import rental as rental_module
from meshgpu.core.burst.budget import Spending, refusal
from meshgpu.core.burst.planner import Planner
from meshgpu.core.burst.reaper import Reaper
from meshgpu.core.burst.rental import Rental
from meshgpu.core.effects import Effect, Launch, Persist
from meshgpu.core.events import BurstConfigured, LaunchPrepared, LogWritten, RunAsked
from meshgpu.errors import BrokenInvariant
from meshgpu.model.clock import Now
from meshgpu.model.cloud import BurstSettings, Caps
from meshgpu.model.ids import KeyId, digest, node_id
from meshgpu.model.job import Action, CloudUse
from meshgpu.model.records import LaunchState
from meshgpu.model.resources import GpuRequest, Resources
from meshgpu.model.trust import AddNode, Role, SetPolicy, SetRole
from meshgpu.sim.cloud import NO_FAULTS, CloudFaults, Nets, Rented, SimCloud
from meshgpu.sim.load import draft
from meshgpu.sim.machine import CrashPoint
from meshgpu.sim.renting import SETTINGS, RentingFaults, RentingWorld
from meshgpu.sim.world import World, WorldConfig

FAST_LAUNCHES = 60
ALL_LAUNCHES = 1000

QUIET = RentingFaults(
    crash=0.0, crashes=0.0, reboots=0.0, cuts=0.0, splits=0.0, gone=0.0, for_s=2400.0, jobs=2, cloud=NO_FAULTS
)
"""Two jobs, and nothing goes wrong but what a test does."""

pytestmark = pytest.mark.timeout(1500)  # many worlds in one test, on machines that others use as well


def rent(launches: int, first: int) -> tuple[int, int]:
    """Worlds from seed `first` on until so many instances were launched; returns how many, and how many crashes."""
    launched = crashes = 0
    seed = first
    while launched < launches:
        world = RentingWorld(seed)
        try:
            world.play()
        except (BrokenInvariant, AssertionError):
            print(f"rerun: python -c 'from meshgpu.sim.renting import RentingWorld; RentingWorld({seed}).play()'")
            raise
        launched, crashes, seed = launched + world.launched, crashes + world.crashes, seed + 1
    return launched, crashes


def test_nothing_leaks_through_crashes_and_failing_calls() -> None:
    _, crashes = rent(FAST_LAUNCHES, 0)
    assert crashes > FAST_LAUNCHES  # the worlds are as bad as they claim


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_nothing_leaks_through_a_thousand_launches(part: int) -> None:
    rent(ALL_LAUNCHES // 4, 1000 * (part + 1))


@pytest.mark.slow
def test_nothing_leaks_where_the_provider_fails_more_than_it_works() -> None:
    cloud = CloudFaults(lost_request=0.15, lost_reply=0.3, throttled=0.2, short=0.5, dead=0.2, spot=0.3)
    for seed in range(60):
        RentingWorld(seed, RentingFaults(cloud=cloud, crash=0.05, splits=4.0)).play()


def test_quiet_world_serves_every_job_with_one_instance_each() -> None:
    world = RentingWorld(3, QUIET)
    world.play()
    assert world.launched == 2
    assert all(job.is_over and job.ends_s for job in world.jobs)


def points(seed: int) -> list[int]:
    world = RentingWorld(seed, QUIET)
    world.play()
    return [peer.points for peer in world.peers]


@pytest.mark.slow
@pytest.mark.parametrize("peer", [0, 1])
def test_crash_at_every_single_point_leaks_nothing(peer: int) -> None:
    """Before and after each persist and each call of a story, one at a time."""
    visited = points(3)[peer]
    for number in range(1, visited + 1):
        world = RentingWorld(3, QUIET, crash_at=(peer, number))
        world.play()
        assert world.launched in (2, 3), number  # what was rented is taken up again, or its job was served meanwhile


def test_node_that_crashes_after_each_write_rents_one_instance_and_outlives_it() -> None:
    """The real node, with its real log and disk, in an office; its agent dies again and again while it rents."""
    world = World(7, WorldConfig(size=3, is_plain=True))
    world.start()
    world.run(10.0)
    rig = world.named("rig0")
    launched: list[Rented] = []
    nets = Nets(SETTINGS.idle_s, SETTINGS.no_contact_s)
    cloud = SimCloud(world.timeline, NO_FAULTS, nets, lambda: rig.now().wall_s, launched.append)
    rig.cloud = cloud
    rig.crashed = lambda machine: world.timeline.after(3.0, machine.start_agent)
    assert rig.agent is not None
    admin = rig.setup.accounts[rig.setup.owner]
    rig.post(LogWritten(rig.agent.log.write(admin, (SetRole(rig.node, Role.BURST), SetPolicy(may_leave=True)))))
    rig.post(BurstConfigured(SETTINGS))
    tree = digest(b"tree")
    rig.trees.add(tree)
    wish = draft("train", "", Resources(GpuRequest(1, model="l4")), tree)
    rig.post(RunAsked("run1", admin, replace(wish, cloud=CloudUse.OK)))
    for _ in range(60):
        rig.crash_at = CrashPoint.AFTER_PERSIST if 20.0 < world.timeline.time_s < 250.0 else None
        world.run(5.0)
    (rented,) = launched
    assert rig.instance > 4  # agents before this one died
    assert rig.agent is not None
    chains = rig.agent.log._chains
    assert chains is not None
    own = [written.entry.body for written in chains.run(KeyId(rig.node))]
    assert [body.public_key for body in own if isinstance(body, AddNode)] == [rented.public_key]
    assert node_id(rented.public_key) in rig.agent.log.members
    (confirmed,) = world.ledger.confirmed.values()
    world.people.end(rig, admin, confirmed.view, Action.STOP)
    world.run(1200.0)
    assert {member.role for member in rig.agent.log.members.values()} == {Role.BURST, Role.RIG}
    assert cloud.live() == []
    assert not any(kind == "launch" for kind, _ in rig.disk)


# -- the checks bite ---------------------------------------------------------------------------------------------------

WILD = RentingFaults(crash=0.04, crashes=3.0, splits=3.0)


def find(pattern: str, faults: RentingFaults = WILD, seeds: int = 60, settings: BurstSettings = SETTINGS) -> None:
    """Some world breaks a promise, with a message that fits `pattern`."""
    for seed in range(seeds):
        try:
            RentingWorld(seed, faults, settings).play()
        except BrokenInvariant:
            with pytest.raises(BrokenInvariant, match=pattern):
                raise
            return
    pytest.fail(f"no world of {seeds} noticed the planted bug")


def without(effects: list[Effect], drop: Callable[[Effect], bool]) -> list[Effect]:
    return [effect for effect in effects if not drop(effect)]


@pytest.mark.slow
def test_call_that_is_not_journalled_first_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Planner._prepared

    def hasty(self: Planner, now: Now, event: LaunchPrepared) -> list[Effect]:
        return without(original(self, now, event), lambda e: isinstance(e, Persist) and e.kind == "launch")

    monkeypatch.setattr(Planner, "_prepared", hasty)
    find("has not journalled")


@pytest.mark.slow
def test_launch_that_is_not_counted_first_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Planner._prepared

    def generous(self: Planner, now: Now, event: LaunchPrepared) -> list[Effect]:
        return without(original(self, now, event), lambda e: isinstance(e, Persist) and e.kind == "spend")

    monkeypatch.setattr(Planner, "_prepared", generous)
    find("has not counted")


@pytest.mark.slow
def test_new_token_on_retry_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Rental.step

    def inventive(self: Rental, now: Now, idle_s: float, *, is_wanted: bool) -> list[Effect]:
        effects = original(self, now, idle_s, is_wanted=is_wanted)
        if not any(isinstance(effect, Launch) for effect in effects):
            return effects
        request = replace(self.record.request, token=f"{self.record.request.token[:-8]}{now.boot_s:08.0f}")
        self.record = replace(self.record, request=request)
        return [Persist("launch", self.launch, self.record), Launch(request)]

    monkeypatch.setattr(Rental, "step", inventive)
    find("made two instances")


TIGHT = {"instances": 1, "usd_per_hour": 0.9, "usd_per_day": 2.0, "usd_per_month": 2.0, "usd_per_job": 0.9}


@pytest.mark.slow
@pytest.mark.parametrize("cap", TIGHT)
def test_cap_that_is_not_checked_before_is_caught(monkeypatch: pytest.MonkeyPatch, cap: str) -> None:
    original = refusal

    def lenient(caps: Caps, *rest: Any) -> str:
        return original(replace(caps, **{cap: 1_000_000}), *rest)  # type: ignore[arg-type]  # fields of Caps

    monkeypatch.setattr("meshgpu.core.burst.plan.refusal", lenient)
    tight = replace(SETTINGS, caps=replace(SETTINGS.caps, **{cap: TIGHT[cap]}))  # type: ignore[arg-type]  # fields of Caps
    find("live|more an hour|may cost", WILD, settings=tight)


@pytest.mark.slow
@pytest.mark.parametrize("cap", TIGHT)
def test_tight_cap_is_never_passed(cap: str) -> None:
    tight = replace(SETTINGS, caps=replace(SETTINGS.caps, **{cap: TIGHT[cap]}))  # type: ignore[arg-type]  # of Caps
    for seed in range(6):
        RentingWorld(seed, WILD, tight).play()


@pytest.mark.slow
def test_spending_that_is_forgotten_at_restart_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Spending, "restore", lambda self, spend: None)
    find("may cost|counted", replace(WILD, jobs=14))


@pytest.mark.slow
def test_launch_given_up_before_the_provider_could_show_it_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rental_module, "SEEK_S", -1000.0)
    monkeypatch.setattr(rental_module, "MISSED", 1)
    monkeypatch.setattr(Reaper, "doomed", lambda *_args: [])
    find("leaked|live for one need|forgets|live in the mesh|instances live|more an hour|members whose|counted")


@pytest.mark.slow
def test_instance_that_no_net_ends_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rental_module, "JOIN_WITHIN_S", 1e9)
    monkeypatch.setattr(rental_module, "END_EARLY_S", -1e9)
    monkeypatch.setattr(Reaper, "doomed", lambda *_args: [])
    never_idle = replace(SETTINGS, idle_s=1e9)
    with pytest.raises(BrokenInvariant, match="live for 0 jobs"):
        RentingWorld(3, replace(QUIET, cloud=replace(NO_FAULTS, dead=1.0)), never_idle).play()


@pytest.mark.slow
def test_orphans_that_nobody_reaps_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that is gone for good leaves an instance behind that never booted."""
    monkeypatch.setattr(Reaper, "doomed", lambda *_args: [])
    find("leaked|live for", replace(WILD, gone=1.0, cloud=CloudFaults(dead=0.5)))


@pytest.mark.slow
def test_launches_forgotten_at_restart_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Planner.restore

    def amnesiac(self: Planner, now: Now, records: object) -> None:
        original(self, now, [record for record in records if not hasattr(record, "bootstrap")])  # type: ignore[attr-defined]

    monkeypatch.setattr(Planner, "restore", amnesiac)
    find("still keeps launches|counted|leaked|members whose")


@pytest.mark.slow
def test_instances_that_stay_members_when_gone_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "_remove", lambda self, now, nodes: [])
    find("members whose instances are gone")


@pytest.mark.slow
def test_ending_that_is_not_repeated_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Rental.retry

    def once(self: Rental, now: Now, rng: object, pause_s: float | None = None) -> None:
        original(self, now, rng, pause_s)  # type: ignore[arg-type]
        if self.state is LaunchState.ENDING:
            self.due = 1e12

    monkeypatch.setattr(Rental, "retry", once)
    find("leaked|live for", replace(WILD, cloud=CloudFaults(lost_request=0.3, dead=0.5)))
