"""What can be rented, what is rented, and the limits within which a burst peer may rent."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NewType

from meshgpu.model.ids import JobId, MeshId, NodeId

LaunchId = NewType("LaunchId", str)
"""26 lower-case base32 characters: 128 random bits of the burst peer that launches."""

CLIENT_TOKEN_CHARACTERS: Final = 64
"""Of EC2's ClientToken at most (API reference, RunInstances)."""

INSTANCE_PORT: Final = 443
"""Where an instance listens, with its bootstrap certificate and later with its own."""


class Market(StrEnum):
    SPOT = "spot"
    ON_DEMAND = "on-demand"


@dataclass(frozen=True, slots=True)
class Rung:
    """One thing that can be asked for: a type of instance, in a zone, in a market.

    usd_per_hour: the most that an hour can cost (on-demand price, or the bid for a spot instance), storage included.
    gpu_memory_bytes: of one GPU.
    """

    instance_type: str
    zone: str
    market: Market
    gpu_name: str
    gpus: int
    gpu_memory_bytes: int
    cpus: int
    memory_bytes: int
    usd_per_hour: float


@dataclass(frozen=True, slots=True)
class Caps:
    """What a burst peer may spend, counted at the worst case before a launch. 0 forbids everything.

    instances: at a time. lease_s: how long one instance lives at most.
    """

    usd_per_hour: float
    usd_per_day: float
    usd_per_month: float
    usd_per_job: float
    instances: int
    on_demand: bool
    lease_s: float


@dataclass(frozen=True, slots=True)
class BurstSettings:
    """How this node rents, as `burst setup` wrote it. burst_after_s: how long a job waits for the office first.

    image: an AMI, or empty for the provider's GPU image. security_group: empty for the one that admits this office
    alone. install: the shell command that brings meshgpu onto an instance.
    """

    region: str
    caps: Caps
    instance_types: tuple[str, ...]
    burst_after_s: float
    idle_s: float
    no_contact_s: float
    image: str
    security_group: str
    install: str


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """Exactly one RunInstances call for one instance; journalled before it is made, and the same when made again.

    need: the job for which the instance is rented. token: EC2's ClientToken. user_data: the script of its first boot.
    lease_ends_wall_s: Unix time after which no net lets it live.
    """

    launch: LaunchId
    mesh: MeshId
    owner: NodeId
    need: JobId
    token: str
    rung: Rung
    lease_ends_wall_s: float
    image: str
    security_group: str
    user_data: bytes


class InstanceState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    ENDING = "ending"
    TERMINATED = "terminated"


LIVE_STATES: Final = (InstanceState.PENDING, InstanceState.RUNNING)
"""Of what costs money until somebody ends it."""


@dataclass(frozen=True, slots=True)
class Instance:
    """A rented instance of the mesh, as its tags say. address: public IPv4 address, empty until it has one."""

    instance: str
    launch: LaunchId
    mesh: MeshId
    owner: NodeId
    need: JobId
    state: InstanceState
    address: str
    launched_wall_s: float
    lease_ends_wall_s: float
    instance_type: str
    market: Market
    usd_per_hour: float
