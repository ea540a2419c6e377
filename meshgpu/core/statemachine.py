"""The one shape of everything that decides."""

from typing import Protocol, TypeVar

from meshgpu.core.effects import Effect
from meshgpu.model.clock import Now

EventT_contra = TypeVar("EventT_contra", contravariant=True)


class StateMachine(Protocol[EventT_contra]):
    """Facts in, orders out. Synchronous; never raises because of what a peer sent."""

    def step(self, now: Now, event: EventT_contra) -> list[Effect]: ...

    def deadline(self) -> float | None:
        """When it wants to be stepped again at the latest, in `boot_s`; None: only when something happens."""
        ...


def earliest(*deadlines: float | None) -> float | None:
    """The first of some deadlines; None where there is none."""
    return min((deadline for deadline in deadlines if deadline is not None), default=None)
