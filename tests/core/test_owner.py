"""Whose jobs a machine takes, and when they must leave."""

import pytest

from meshgpu.core.effects import Persist
from meshgpu.core.owner import Owner, OwnerPolicy, Permission, at_home, permission
from meshgpu.model.clock import Now
from meshgpu.model.ids import GpuId, NodeId, UserName
from meshgpu.model.inventory import GpuProcess, GpuReading, ProcessKind
from meshgpu.model.lending import Lending, Pause
from meshgpu.model.records import PauseRecord
from meshgpu.model.trust import Member, Role

ADA, BOB = UserName("ada"), UserName("bob")


@pytest.mark.parametrize(
    ("policy", "user", "fence", "may", "fenced"),
    [
        (OwnerPolicy(), ADA, "", True, False),
        (OwnerPolicy(), ADA, "bubblewrap", True, False),
        (OwnerPolicy(), BOB, "bubblewrap", True, True),
        (OwnerPolicy(), BOB, "", False, False),
        (OwnerPolicy(trusted=(BOB,)), BOB, "", True, False),
        (OwnerPolicy(trusted=(BOB,)), BOB, "bubblewrap", True, True),
        (OwnerPolicy(lends=False), ADA, "bubblewrap", False, False),
        (OwnerPolicy(lends=False, trusted=(BOB,)), BOB, "bubblewrap", False, False),
    ],
)
def test_owner_has_the_last_word(policy: OwnerPolicy, user: UserName, fence: str, may: bool, fenced: bool) -> None:
    found = permission(policy, user, ADA, fence)
    assert (not found.refusal, found.needs_fence) == (may, fenced)


def test_refusal_names_owner_and_remedy() -> None:
    found: Permission = permission(OwnerPolicy(), BOB, ADA, "")
    assert "its owner ada only" in found.refusal
    assert "bubblewrap" in found.refusal


def test_on_a_rented_machine_nobody_is_at_home() -> None:
    """Its keys and the switches that end it are within reach of what runs unfenced there."""
    homes = {role: at_home(Member(NodeId("n" * 52), "n", b"", b"", role, ADA)) for role in Role}
    assert homes[Role.RIG] == homes[Role.BURST] == ADA
    assert permission(OwnerPolicy(), ADA, homes[Role.CLOUD], "bubblewrap").needs_fence
    assert permission(OwnerPolicy(), ADA, homes[Role.CLOUD], "").refusal.startswith("lends nothing: ")


# -- the owner returns -------------------------------------------------------------------------------------------------

ONE, OTHER = GpuId("GPU-1"), GpuId("GPU-2")


def at(boot_s: float, wall_s: float | None = None) -> Now:
    return Now(boot_s, 1000.0 + boot_s if wall_s is None else wall_s, "boot")


def sample(name: str = "", kind: ProcessKind = ProcessKind.GRAPHICS) -> tuple[GpuReading, ...]:
    """The first of two GPUs with one process, or with none."""
    processes = (GpuProcess(7, kind, None, name),) if name else ()
    return GpuReading(ONE, processes=processes), GpuReading(OTHER)


def test_one_sample_keeps_new_jobs_away_and_two_make_jobs_leave() -> None:
    owner = Owner(OwnerPolicy())
    assert [reading.withheld for reading in owner.read(sample("game"))] == ["its owner is using it", ""]
    assert not owner.takes_back([ONE])
    owner.read(sample("game"))
    assert owner.takes_back([OTHER, ONE]) == "its owner is using the GPU"
    assert not owner.takes_back([OTHER])
    assert not owner.takes_back([])
    assert [reading.withheld for reading in owner.read(sample())] == ["", ""]
    assert not owner.takes_back([ONE])


def test_a_program_that_was_there_for_one_sample_makes_no_job_leave() -> None:
    owner = Owner(OwnerPolicy())
    for name in ("game", "", "game", ""):
        owner.read(sample(name))
        assert not owner.takes_back([ONE])


@pytest.mark.parametrize(
    ("name", "kind", "counts"),
    [
        ("gnome-shell", ProcessKind.GRAPHICS, False),
        ("gnome-shell", ProcessKind.COMPUTE, True),
        ("Xorg", ProcessKind.GRAPHICS, False),
        ("blender", ProcessKind.GRAPHICS, True),
        ("python", ProcessKind.COMPUTE, True),
    ],
)
def test_what_only_draws_the_desktop_is_no_use(name: str, kind: ProcessKind, counts: bool) -> None:
    assert bool(Owner(OwnerPolicy()).read(sample(name, kind))[0].withheld) == counts


@pytest.mark.parametrize("lending", [Lending.SHARED, Lending.DEDICATED])
def test_only_a_polite_machine_makes_way(lending: Lending) -> None:
    owner = Owner(OwnerPolicy(lending=lending))
    for _ in range(3):
        assert not owner.read(sample("game"))[0].withheld
    assert not owner.takes_back([ONE])


def test_pause_refuses_and_takes_back_everything_until_it_is_over() -> None:
    owner = Owner(OwnerPolicy())
    (kept,) = owner.paused(at(0.0), Pause(1060.0))
    assert kept == Persist("pause", "pause", PauseRecord(Pause(1060.0)))
    assert owner.refusal() == "is paused by its owner"
    assert owner.takes_back([]) == "its machine is paused by its owner"
    assert owner.deadline() == 60.0
    assert owner.step(at(59.0)) == []
    assert owner.step(at(60.0)) == [Persist("pause", "pause", None)]
    assert (owner.refusal(), owner.takes_back([]), owner.deadline()) == ("", "", None)


def test_pause_that_lets_run_only_refuses() -> None:
    owner = Owner(OwnerPolicy())
    owner.paused(at(0.0), Pause(None, lets_run=True))
    assert owner.refusal()
    assert not owner.takes_back([ONE])
    assert owner.deadline() is None
    assert owner.resumed()
    assert owner.resumed() == []


def test_pause_ends_by_the_wall_clock_also_after_a_restart() -> None:
    owner = Owner(OwnerPolicy())
    owner.restore(at(5.0, wall_s=2000.0), PauseRecord(Pause(2010.0)))
    assert owner.deadline() == 15.0
    assert owner.step(at(15.0, wall_s=2000.5)) == []  # the clock was set back
    assert owner.deadline() == 24.5
    assert owner.step(at(24.5, wall_s=2010.0)) != []


def test_owner_who_wants_containers_gets_them() -> None:
    assert OwnerPolicy().image("") == ""
    assert OwnerPolicy(default_image="base").image("") == ""
    wish = OwnerPolicy(containers_only=True, default_image="base")
    assert (wish.image(""), wish.image("torch"), wish.needs_image) == ("base", "torch", False)
    assert OwnerPolicy(containers_only=True).needs_image
