"""How an owner lends a machine."""

from dataclasses import dataclass
from enum import StrEnum


class Lending(StrEnum):
    """Who comes first on the GPUs of a machine."""

    POLITE = "polite"
    """The owner: no job while another program uses the GPU, and jobs leave when one begins to."""
    SHARED = "shared"
    """Nobody: jobs run beside the owner's programs."""
    DEDICATED = "dedicated"
    """The mesh: nobody works here, so among equal machines jobs come here first."""


@dataclass(frozen=True, slots=True)
class Pause:
    """The owner lends nothing. until_wall_s: Unix time at which that ends by itself; None: when the owner says so.

    lets_run: what runs may come to its end; else it has left.
    """

    until_wall_s: float | None
    lets_run: bool = False
