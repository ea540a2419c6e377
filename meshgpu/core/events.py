"""Facts: everything that can happen to a node. Past tense; the only way into the core."""

from dataclasses import dataclass

from meshgpu.model.cloud import BurstSettings, Instance, LaunchId, Rung
from meshgpu.model.gossip import KnockOutcome, Sighting
from meshgpu.model.ids import Address, JobId, KeyId, MeshId, NodeId
from meshgpu.model.inventory import GpuReading, Inventory
from meshgpu.model.job import Action, Draft, Phase, Result
from meshgpu.model.lending import Pause
from meshgpu.model.logs import LogChunk
from meshgpu.model.messages import KnockResult, Message
from meshgpu.model.receipt import NO_EVIDENCE, Evidence
from meshgpu.model.sweep import Metric
from meshgpu.model.trust import Rekey, Signed


@dataclass(frozen=True, slots=True)
class Ticked:
    """The deadline has come, or the driver just wants to know."""


@dataclass(frozen=True, slots=True)
class LinkOpened:
    """instance: random for each start of the peer's agent."""

    peer: NodeId
    instance: str = ""


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
class Knocked:
    """What a Knock came to. Who answered there is not known."""

    peer: NodeId
    outcome: KnockOutcome


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
class KnocksAsked:
    """Somebody local wants peers to knock at this machine. `query` names the Answered effect."""

    query: str


@dataclass(frozen=True, slots=True)
class KnockedBack:
    """What a KnockBack came to. hears, announces: as in KnockAnswer."""

    peer: NodeId
    knocks: tuple[KnockResult, ...]
    hears: bool = False
    announces: bool = False


@dataclass(frozen=True, slots=True)
class MachineRead:
    """What this machine has, how its GPUs stand now, and how many processors are busy."""

    inventory: Inventory
    readings: tuple[GpuReading, ...]
    load: int = 0


@dataclass(frozen=True, slots=True)
class LendingPaused:
    """The owner wants this machine to lend nothing."""

    pause: Pause


@dataclass(frozen=True, slots=True)
class LendingResumed:
    """The owner lends again."""


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
class RekeyAsked:
    """This machine's owner wants it to go on under new keys, which lie ready. `query` names the Answered effect."""

    query: str
    rekey: Rekey


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
    """A local account wants `action` (stop, kill, receipt) done to a job that `stewards` hold."""

    query: str
    key: KeyId
    action: Action
    job: JobId
    stewards: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class WatchStarted:
    """Somebody local follows a job: every change is wanted until WatchStopped."""

    key: KeyId
    job: JobId
    stewards: tuple[NodeId, ...]


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
class AttemptMeasured:
    """The job has reported its objective."""

    job: JobId
    epoch: int
    metric: Metric


@dataclass(frozen=True, slots=True)
class AttemptPrinted:
    """What the attempt has printed; of much, only the newest part."""

    job: JobId
    epoch: int
    chunk: LogChunk


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
    evidence: Evidence = NO_EVIDENCE


@dataclass(frozen=True, slots=True)
class BurstConfigured:
    """`burst setup` wrote how this node rents. None: it shall not rent, and gives back what it has."""

    settings: BurstSettings | None


@dataclass(frozen=True, slots=True)
class CloudSurveyed:
    """What can be rented, and every instance of this mesh that has not vanished. With a `code` neither is known.

    With a reason alone it is not known what can be rented.

    Of this event and the next ones: `code` is empty if all went well, else a code of ports.Cloud or another.
    """

    rungs: tuple[Rung, ...] = ()
    instances: tuple[Instance, ...] = ()
    code: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class LaunchPrepared:
    """bootstrap: DER of the certificate that the user data holds."""

    launch: LaunchId
    user_data: bytes = b""
    bootstrap: bytes = b""
    code: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class LaunchEnded:
    """The call came back. `token-taken`: another burst peer used the token for a request of its own."""

    launch: LaunchId
    instance: Instance | None = None
    code: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TerminateEnded:
    instance: str
    code: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Enrolled:
    """The instance proved that it booted our user data, and made these keys: node key (32 bytes), device CA (DER)."""

    launch: LaunchId
    public_key: bytes = b""
    device_ca: bytes = b""
    code: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class WelcomeEnded:
    """The instance has the mesh log and listens as a member."""

    launch: LaunchId
    code: str = ""
    reason: str = ""


BurstEvent = BurstConfigured | CloudSurveyed | LaunchPrepared | LaunchEnded | TerminateEnded | Enrolled | WelcomeEnded
"""Of the burst planner alone."""


@dataclass(frozen=True, slots=True)
class InterruptionNoticed:
    """The provider takes this rented machine back: at `ends_wall_s` (Unix time), or, None, perhaps soon."""

    ends_wall_s: float | None


Event = (
    Ticked
    | LinkOpened
    | LinkClosed
    | DialFailed
    | Knocked
    | MessageArrived
    | MachineSighted
    | AddressIdentified
    | IdentifyFailed
    | KnocksAsked
    | KnockedBack
    | MachineRead
    | LendingPaused
    | LendingResumed
    | AddressesChanged
    | MeshEntered
    | LogWritten
    | RekeyAsked
    | RunAsked
    | JobsAsked
    | ActionAsked
    | WatchStarted
    | WatchStopped
    | TreeArrived
    | TreeProgressed
    | TreeFailed
    | AttemptProgressed
    | AttemptMeasured
    | AttemptPrinted
    | AttemptBegan
    | AttemptFinished
    | BurstConfigured
    | CloudSurveyed
    | LaunchPrepared
    | LaunchEnded
    | TerminateEnded
    | Enrolled
    | WelcomeEnded
    | InterruptionNoticed
)
