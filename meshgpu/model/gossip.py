"""What every node tells the mesh about itself: signed, versioned entries that only their owner may change."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from meshgpu.model.audit import AuditHead
from meshgpu.model.ids import Address, JobId, MeshId, NodeId, UserName
from meshgpu.model.inventory import GpuReading, Inventory
from meshgpu.model.job import Priority
from meshgpu.model.lending import Lending, Pause
from meshgpu.model.resources import GpuShare, Resources

NEEDS_LIMIT: Final = 64
"""Of the needs that one steward tells: more than any burst rents for at a time."""

MESH_TAG_CHARACTERS: Final = 12
"""60 bits of the mesh id: enough to tell meshes on one network apart."""


@dataclass(frozen=True, slots=True, order=True)
class Incarnation:
    """Orders what a node says of itself: `epoch` is kept on disk and raised at every start, `counter` while it runs."""

    epoch: int
    counter: int


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """What changes rarely: where the node is, what is built in, what it lends.

    fence: how other users' jobs are shut in (`bubblewrap`, `landlock`), empty where nothing works.
    may_steward: False on machines that are not meant to stay on (battery).
    lends: False where the owner keeps every job away. trusts: users whose jobs run here without a fence.
    needs_image: whether a job that names no container image is refused. pause: while the owner lends nothing.
    sealing_key: X25519 public key, 32 bytes, that secrets are sealed to; empty where it can take no jobs with secrets.
    audit: head of the node's audit chain, None before its first entry.
    """

    agent_version: str
    addresses: tuple[Address, ...]
    inventory: Inventory
    fence: str = ""
    may_steward: bool = True
    lends: bool = True
    trusts: tuple[UserName, ...] = ()
    lending: Lending = Lending.POLITE
    needs_image: bool = False
    pause: Pause | None = None
    sealing_key: bytes = b""
    audit: AuditHead | None = None


@dataclass(frozen=True, slots=True)
class Allocation:
    """A job's hold on this machine: whole GPUs or parts of them, processors (0: not counted) and memory.

    is_kept: it is only kept free for the job, which waits.
    """

    job: JobId
    epoch: int
    name: str
    user: UserName
    gpus: tuple[GpuShare, ...]
    cpus: int = 0
    memory_bytes: int = 0
    priority: Priority = Priority.NORMAL
    preemptible: bool = False
    is_kept: bool = False

    def gives_way_to(self, priority: Priority) -> bool:
        """Whether the job agreed to be stopped for one of that priority."""
        return self.preemptible and self.priority.rank < priority.rank


@dataclass(frozen=True, slots=True)
class Used:
    """What a user has had of a machine lately. gpu_s: seconds of whole GPUs; what was a day ago counts half."""

    user: UserName
    gpu_s: float


@dataclass(frozen=True, slots=True)
class Capacity:
    """What changes often: readings and allocations. Placement reads it as a hint; the node itself decides.

    load: processors that were busy or waited for during the last minute, for people; placement counts allocations.
    used: by whom the machine was used lately.
    """

    readings: tuple[GpuReading, ...]
    allocations: tuple[Allocation, ...]
    load: int = 0
    used: tuple[Used, ...] = ()


@dataclass(frozen=True, slots=True)
class Need:
    """A queued job that may leave the office. since_wall_s: since when it waits without a machine."""

    job: JobId
    resources: Resources
    since_wall_s: float


@dataclass(frozen=True, slots=True)
class Line:
    """A user's jobs of one priority that wait at one steward: how many, and when the first and the last came.

    Unix times, in seconds.
    """

    user: UserName
    priority: Priority
    jobs: int
    first_wall_s: float
    last_wall_s: float


@dataclass(frozen=True, slots=True)
class Demand:
    """What a steward holds for which no machine of the mesh has room.

    needs: what may leave the office, the oldest first, NEEDS_LIMIT at most. lines: all that waits.
    """

    needs: tuple[Need, ...]
    lines: tuple[Line, ...] = ()


@dataclass(frozen=True, slots=True)
class Doubt:
    """That a member does not answer this owner. incarnation: the highest that the owner has heard of it.

    is_gone: its port refuses, so its process is gone.
    """

    node: NodeId
    incarnation: Incarnation
    is_gone: bool = False


@dataclass(frozen=True, slots=True)
class Doubts:
    """Whom an owner doubts now, by node."""

    doubts: tuple[Doubt, ...]


GossipValue = NodeRecord | Capacity | Demand | Doubts


@dataclass(frozen=True, slots=True)
class GossipEntry:
    """One entry of one owner. The key is the type of its value: a node has at most one of each."""

    mesh: MeshId
    owner: NodeId
    incarnation: Incarnation
    version: int
    value: GossipValue


class MemberState(StrEnum):
    """A member as this node sees it. No job is ever acted on because of it.

    suspect: it does not answer, and may be down. It is offered no new work meanwhile.
    """

    ALIVE = "alive"
    SUSPECT = "suspect"
    DOWN = "down"


class KnockOutcome(StrEnum):
    """What a bare TCP connection to a member's port came to."""

    ANSWERED = "answered"
    REFUSED = "refused"
    SILENT = "silent"


def mesh_tag(mesh: MeshId | None) -> str:
    """How an announcement names a mesh; empty for none."""
    return (mesh or "")[:MESH_TAG_CHARACTERS]


@dataclass(frozen=True, slots=True)
class Sighting:
    """A machine's announcement by mDNS, unverified: a hint to dial and a line on `discover`.

    mesh_tag: first characters of the mesh id, empty where the machine is in no mesh.
    pairing_port: 0 unless a window of `meshgpu admit` is open there. gpus: `2x RTX 4090 24GB`, empty if hidden.
    """

    node: NodeId
    mesh_tag: str
    mesh_name: str
    protocol: int
    addresses: tuple[Address, ...]
    pairing_port: int = 0
    gpus: str = ""
