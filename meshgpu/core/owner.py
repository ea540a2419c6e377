"""What the owner of a machine allows: who may run here, how shut in, and what he takes back now.

A program that is no job and uses a GPU keeps new jobs away as soon as one sample shows it; when two in a row do, jobs
must leave.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from meshgpu.core.effects import Effect, Persist
from meshgpu.model.clock import Now
from meshgpu.model.ids import GpuId, UserName
from meshgpu.model.inventory import GpuProcess, GpuReading, ProcessKind
from meshgpu.model.lending import Lending, Pause
from meshgpu.model.records import PauseRecord
from meshgpu.model.trust import Member, Role

GRACE_S: Final = 24.0
"""Between SIGTERM and SIGKILL for a job that must leave: with two samples of 2 s the owner waits 30 s at most."""

DESKTOP: Final = frozenset(
    {"Xorg", "Xwayland", "gnome-shell", "kwin_x11", "kwin_wayland", "plasmashell", "ksmserver", "mutter", "muffin"}
    | {"cinnamon", "xfwm4", "xfdesktop", "marco", "budgie-wm", "cosmic-comp", "Hyprland", "sway", "weston", "labwc"}
    | {"wayfire", "gdm", "sddm", "sddm-greeter", "lightdm"}
)
"""Programs that draw the desktop itself, as the kernel names them (15 characters at most): always there, never work."""

IN_USE: Final = "its owner is using it"
NEEDS_IMAGE: Final = "takes jobs in containers only (remedy: run --image IMAGE)"
PAUSED: Final = "is paused by its owner"


@dataclass(frozen=True, slots=True)
class OwnerPolicy:
    """lends: False keeps every job away. trusted: users whose jobs run here even where no fence works.

    containers_only: jobs run in containers; those that name no image run in default_image, where there is one.
    """

    lends: bool = True
    trusted: tuple[UserName, ...] = ()
    lending: Lending = Lending.POLITE
    containers_only: bool = False
    default_image: str = ""

    @property
    def needs_image(self) -> bool:
        """Whether a job that names no image is refused."""
        return self.containers_only and not self.default_image

    def image(self, asked: str) -> str:
        """The image that a job runs in; empty for none."""
        return asked or (self.default_image if self.containers_only else "")


def at_home(member: Member) -> UserName:
    """The user whose jobs need no fence on this machine: its owner; on a rented one nobody.

    Its keys, its other users' jobs and the switches that end it are within reach of what runs unfenced there.
    """
    return UserName("") if member.role is Role.CLOUD else member.owner


@dataclass(frozen=True, slots=True)
class Permission:
    """refusal: empty if the job may run. needs_fence: whether it must be shut in."""

    refusal: str = ""
    needs_fence: bool = False


def permission(policy: OwnerPolicy, user: UserName, owner: UserName, fence: str) -> Permission:
    """An owner's own job needs no fence; another user's runs fenced, or not at all, unless the owner trusts him."""
    if not policy.lends:
        return Permission(refusal="lends nothing at the moment")
    if user == owner:
        return Permission()
    if fence:
        return Permission(needs_fence=True)
    if user in policy.trusted:
        return Permission()
    return Permission(
        refusal=(f"lends to its owner {owner} only" if owner else "lends nothing")
        + ": nothing there can shut in another user's job (remedy, on that machine: apt install bubblewrap)"
    )


class Owner:
    """Watches for the owner of this machine, and keeps his pause."""

    def __init__(self, policy: OwnerPolicy) -> None:
        self.policy = policy
        self.pause: Pause | None = None
        self._resume_at: float | None = None
        self._used: frozenset[GpuId] = frozenset()
        self._wanted: frozenset[GpuId] = frozenset()

    def restore(self, now: Now, record: PauseRecord) -> None:
        """Take up the pause of an earlier agent."""
        self._begin(now, record.pause)

    def read(self, readings: Iterable[GpuReading]) -> tuple[GpuReading, ...]:
        """Take in a sample, of processes that are no jobs; returns it with the GPUs marked that are not to be had."""
        readings = tuple(readings)
        is_polite = self.policy.lending is Lending.POLITE
        used = frozenset(r.uuid for r in readings if is_polite and any(map(_is_work, r.processes)))
        self._wanted, self._used = used & self._used, used
        return tuple(replace(reading, withheld=IN_USE if reading.uuid in used else "") for reading in readings)

    def refusal(self) -> str:
        """Why no job may begin here at all; empty if it may."""
        return PAUSED if self.pause is not None else ""

    def takes_back(self, gpus: Iterable[GpuId]) -> str:
        """Why a job on these GPUs must leave; empty if it need not."""
        if self.pause is not None and not self.pause.lets_run:
            return f"its machine {PAUSED}"
        return "its owner is using the GPU" if any(gpu in self._wanted for gpu in gpus) else ""

    def paused(self, now: Now, pause: Pause) -> list[Effect]:
        """Lend nothing for a while; replaces the pause before."""
        self._begin(now, pause)
        return [Persist("pause", "pause", PauseRecord(pause))]

    def resumed(self) -> list[Effect]:
        if self.pause is None:
            return []
        self.pause = self._resume_at = None
        return [Persist("pause", "pause", None)]

    def step(self, now: Now) -> list[Effect]:
        if self.pause is None or self._resume_at is None or now.boot_s < self._resume_at:
            return []
        self._begin(now, self.pause)  # the clock may have been set meanwhile
        return self.resumed() if self._resume_at <= now.boot_s else []

    def deadline(self) -> float | None:
        return self._resume_at

    def _begin(self, now: Now, pause: Pause) -> None:
        self.pause = pause
        until = pause.until_wall_s
        self._resume_at = None if until is None else now.boot_s + max(until - now.wall_s, 0.0)


def _is_work(process: GpuProcess) -> bool:
    return process.kind is ProcessKind.COMPUTE or process.name not in DESKTOP
