"""What a node keeps on disk, so that it is the same node after a crash."""

from dataclasses import dataclass

from meshgpu.model.ids import Address, HoldId, JobId, MeshId, NodeId
from meshgpu.model.job import AttemptState, Register, Result, StopMode
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
    """

    spec: Signed
    register: Register
    cancel: Signed | None
    trial: Trial | None = None


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """An attempt of this node, from the moment it is accepted; that its record exists means that its epoch is spent.

    preempted: why its owner wants the machine back; empty where he does not.
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


@dataclass(frozen=True, slots=True)
class PauseRecord:
    """That the owner lends nothing."""

    pause: Pause


Record = MeshRecord | MeshLogRecord | PeerRecord | JobRecord | AttemptRecord | PauseRecord
