"""What a node keeps on disk, so that it is the same node after a crash."""

from dataclasses import dataclass
from enum import StrEnum

from meshgpu.model.cloud import BurstSettings, LaunchId, LaunchRequest
from meshgpu.model.gossip import Used
from meshgpu.model.ids import Address, HoldId, JobId, KeyId, MeshId, NodeId
from meshgpu.model.job import NO_BALLOT, AttemptState, Ballot, Register, Result, StopMode
from meshgpu.model.lending import Pause
from meshgpu.model.resources import GpuShare
from meshgpu.model.sweep import Trial
from meshgpu.model.trust import Signed


@dataclass(frozen=True, slots=True)
class MeshRecord:
    """Which mesh this node is in, and the boot epoch of its last start."""

    mesh: MeshId
    epoch: int


@dataclass(frozen=True, slots=True)
class MeshLogRecord:
    """One entry of the mesh log, in the order in which it arrived (`rank`)."""

    rank: int
    entry: Signed


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """Where a member was reached last: tried first after a restart."""

    node: NodeId
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job whose register this node holds as a steward; spec as the user signed it.

    cancel: the user's signed JobRequest to stop or kill it, None without one. trial: which of a sweep, None for none.
    receipt: of the newest attempt that has ended. promised: below which ballot this node takes in no change any more.
    """

    spec: Signed
    register: Register
    cancel: Signed | None
    trial: Trial | None = None
    receipt: Signed | None = None
    promised: Ballot = NO_BALLOT


@dataclass(frozen=True, slots=True)
class ObeyedRecord:
    """A request to stop a job that this node has obeyed: once more it changes nothing. Kept until `until_wall_s`."""

    key: KeyId
    nonce: str
    until_wall_s: float


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """An attempt of this node, from the moment it is accepted; that its record exists means that its epoch is spent.

    preempted: why its owner wants the machine back; empty where he does not. fenced: whether it is shut in.
    receipt: what this node signed when it ended.
    """

    job: JobId
    epoch: int
    state: AttemptState
    spec: Signed
    hold: HoldId
    gpus: tuple[GpuShare, ...]
    stop: StopMode | None = None
    result: Result | None = None
    started_wall_s: float | None = None
    ended_wall_s: float | None = None
    preempted: str = ""
    trial: Trial | None = None
    fenced: bool = False
    receipt: Signed | None = None


@dataclass(frozen=True, slots=True)
class PauseRecord:
    """That the owner lends nothing."""

    pause: Pause


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """Who used this machine lately, as it was at `wall_s` (Unix time in seconds)."""

    wall_s: float
    used: tuple[Used, ...]


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """Entry `seq` of this node's audit chain, as the node signed it."""

    seq: int
    entry: Signed


@dataclass(frozen=True, slots=True)
class AuditStartRecord:
    """Where the kept part of the audit chain begins: a signed AuditStart. Without this record it begins at 0."""

    start: Signed


class LaunchState(StrEnum):
    """Where a launch stands; states only move forward. It is forgotten once its instance is gone or never was."""

    ASKED = "asked"
    """Its call may have been made: whether an instance lives is not known."""
    RENTED = "rented"
    ENROLLED = "enrolled"
    """It is in the mesh log, and has yet to hear so."""
    JOINED = "joined"
    ENDING = "ending"


@dataclass(frozen=True, slots=True)
class LaunchRecord:
    """One instance that this node rents, from before the call until the instance is gone.

    request: exactly what was asked for, and is asked for again. bootstrap: DER of the certificate in its user data.
    asked_wall_s: when the request was made up. instance, node: empty until they are known. reason: why it ends.
    """

    request: LaunchRequest
    state: LaunchState
    bootstrap: bytes
    asked_wall_s: float
    instance: str = ""
    node: NodeId | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SpendRecord:
    """What a launch costs at most: `usd_per_hour` from `from_wall_s`, put early as clocks differ, to `until_wall_s`.

    until_wall_s: the end of its lease, until it is known to be over earlier; `from_wall_s` where nothing was rented.
    owner: the burst peer that pays. number: of the need's requests by this node, from 1; 0 for another's.
    """

    launch: LaunchId
    owner: NodeId
    need: JobId
    number: int
    usd_per_hour: float
    from_wall_s: float
    until_wall_s: float
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class BurstRecord:
    """How this node rents. rents: False once it shall not, for as long as something that it rented lives."""

    settings: BurstSettings
    rents: bool


Record = (
    MeshRecord
    | MeshLogRecord
    | PeerRecord
    | JobRecord
    | ObeyedRecord
    | AttemptRecord
    | PauseRecord
    | UsageRecord
    | AuditRecord
    | AuditStartRecord
    | LaunchRecord
    | SpendRecord
    | BurstRecord
)
