"""The one shape of everything that decides.

A state machine is synchronous: `step(now, …) -> list[Effect]` takes facts and gives orders, `deadline()` says when it
wants to be stepped again at the latest (`boot_s`; None: only when something happens). It gets time, randomness, ids and
signature checks as arguments, and never raises because of what a peer sent.
"""


def earliest(*deadlines: float | None) -> float | None:
    """The first of some deadlines; None where there is none."""
    return min((deadline for deadline in deadlines if deadline is not None), default=None)
