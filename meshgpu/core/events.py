"""Facts: everything that can happen to a node. Past tense; the only way into the core."""

from dataclasses import dataclass

from meshgpu.model.gossip import Sighting
from meshgpu.model.ids import Address, JobId, KeyId, MeshId, NodeId
from meshgpu.model.inventory import GpuReading, Inventory
from meshgpu.model.job import Action, Draft, Phase, Result
from meshgpu.model.messages import Message
from meshgpu.model.trust import Signed


@dataclass(frozen=True, slots=True)
class Ticked:
    """The deadline has come, or the driver just wants to know."""


@dataclass(frozen=True, slots=True)
class LinkOpened:
    peer: NodeId


@dataclass(frozen=True, slots=True)
class LinkClosed:
    peer: NodeId
    reason: str


@dataclass(frozen=True, slots=True)
class DialFailed:
    peer: NodeId
    address: Address
    reason: str


@dataclass(frozen=True, slots=True)
class MessageArrived:
    """A message of this mesh on the authenticated Link of `peer`."""

    peer: NodeId
    message: Message


@dataclass(frozen=True, slots=True)
class MachineSighted:
    """An announcement by mDNS: unverified."""

    sighting: Sighting


@dataclass(frozen=True, slots=True)
class AddressIdentified:
    """A seed answered with this node's certificate: unverified."""

    address: Address
    node: NodeId


@dataclass(frozen=True, slots=True)
class IdentifyFailed:
    address: Address
    reason: str


@dataclass(frozen=True, slots=True)
class MachineRead:
    """What this machine has, and how its GPUs stand now."""

    inventory: Inventory
    readings: tuple[GpuReading, ...]


@dataclass(frozen=True, slots=True)
class AddressesChanged:
    """Where this node's Links can be dialled."""

    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class MeshEntered:
    """This node founded a mesh or was admitted to one. `met`: where the inviter is."""

    mesh: MeshId
    log: tuple[Signed, ...]
    met: tuple[tuple[NodeId, tuple[Address, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class LogWritten:
    """This node wrote entries of its own to the mesh log."""

    log: tuple[Signed, ...]


@dataclass(frozen=True, slots=True)
class RunAsked:
    """A local account wants to run something. `query` names the Answered effect; `key` is the account's."""

    query: str
    key: KeyId
    draft: Draft


@dataclass(frozen=True, slots=True)
class JobsAsked:
    """A local account wants to see its jobs, wherever they are held."""

    query: str
    key: KeyId


@dataclass(frozen=True, slots=True)
class ActionAsked:
    """A local account wants `action` (stop or kill) done to a job that `steward` holds."""

    query: str
    key: KeyId
    action: Action
    job: JobId
    steward: NodeId


@dataclass(frozen=True, slots=True)
class WatchStarted:
    """Somebody local follows a job: every change is wanted until WatchStopped."""

    key: KeyId
    job: JobId
    steward: NodeId


@dataclass(frozen=True, slots=True)
class WatchStopped:
    job: JobId


@dataclass(frozen=True, slots=True)
class TreeArrived:
    """The tree of a job is here, every chunk of it."""

    job: JobId


@dataclass(frozen=True, slots=True)
class TreeProgressed:
    job: JobId
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class TreeFailed:
    job: JobId
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class AttemptProgressed:
    job: JobId
    epoch: int
    phase: Phase
    detail: str


@dataclass(frozen=True, slots=True)
class AttemptBegan:
    """The job's process runs."""

    job: JobId
    epoch: int
    started_wall_s: float


@dataclass(frozen=True, slots=True)
class AttemptFinished:
    """No process of the attempt lives."""

    job: JobId
    epoch: int
    ended_wall_s: float
    result: Result


@dataclass(frozen=True, slots=True)
class InterruptionNoticed:
    """The provider takes this rented machine back: at `ends_wall_s` (Unix time), or, None, perhaps soon."""

    ends_wall_s: float | None


Event = (
    Ticked
    | LinkOpened
    | LinkClosed
    | DialFailed
    | MessageArrived
    | MachineSighted
    | AddressIdentified
    | IdentifyFailed
    | MachineRead
    | AddressesChanged
    | MeshEntered
    | LogWritten
    | RunAsked
    | JobsAsked
    | ActionAsked
    | WatchStarted
    | WatchStopped
    | TreeArrived
    | TreeProgressed
    | TreeFailed
    | AttemptProgressed
    | AttemptBegan
    | AttemptFinished
    | InterruptionNoticed
)
