"""Jobs and attempts: what is asked for, the register that stewards hold, and what happens on a node."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from meshgpu.model.constraints import ANYWHERE, Where
from meshgpu.model.ids import Digest, HoldId, JobId, KeyId, MeshId, NodeId, UserName
from meshgpu.model.resources import GpuShare, Resources
from meshgpu.model.sweep import Metric, Objective, Space, Trial
from meshgpu.model.trust import Signed


@dataclass(frozen=True, slots=True)
class EnvironmentRequest:
    """Which Python environment a job runs in.

    pip: requirement specifiers from `--pip`. requirements: text of the `--pip-req` file, empty without one.
    from_project: whether a lock or requirements file in the tree is used where the two others are empty.
    """

    pip: tuple[str, ...] = ()
    requirements: str = ""
    from_project: bool = True


class CloudUse(StrEnum):
    """Whether a job may run on a rented instance, outside the office."""

    NEVER = "never"
    OK = "ok"
    ONLY = "only"


class Priority(StrEnum):
    """How much a job matters beside others that wait."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"

    @property
    def rank(self) -> int:
        """The higher goes first."""
        return list(Priority).index(self)


@dataclass(frozen=True, slots=True)
class SecretWrap:
    """A box's content key for one machine. ephemeral: an X25519 public key, 32 bytes. wrapped: 48 bytes."""

    node: NodeId
    ephemeral: bytes
    wrapped: bytes


@dataclass(frozen=True, slots=True)
class SecretBox:
    """Values of environment variables that only the machines among `wraps` can read, in this very job.

    names: of the variables, in order; whoever gets the spec reads them. ciphertext: all values, encrypted once.
    """

    names: tuple[str, ...]
    ciphertext: bytes
    wraps: tuple[SecretWrap, ...]

    def opens_for(self, node: NodeId) -> bool:
        """Whether there is a wrap for the machine; whether it holds is seen when it is opened."""
        return any(wrap.node == node for wrap in self.wraps)


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a user submits, signed by the user's key. Its digest names it; it never changes.

    job: follows from the signing key and nonce (16 random bytes). tree: digest of the working directory's manifest.
    command: argv, never empty; with `shell`, one string that `sh -c` runs.
    machine: the node named by `-m`, else None. stewards: one rig, or three, that hold the register.
    issued_wall_s: Unix time; a steward accepts a spec 120 s old at most, or one of any age that comes with `fresh`.
    image: the container image that the command runs in; empty for a process in a Python environment.
    cloud: whether it may leave the office. retries: how often it is started again after an attempt that died.
    sweep: the space of which each trial is a job; None for a job of its own. objective: what it reports; None: nothing.
    secrets: variables that most who get the spec cannot read; None without any. shared: whether every user may see it.
    preemptible: whether it may be stopped, to be placed again, for a job of higher priority.
    timeout_s: how long the command of one attempt may run; None: for ever. Time in which its machine sleeps counts.
    start_within_s: how long after it was submitted it may start first, by its stewards' clocks; None: whenever.
    """

    mesh: MeshId
    job: JobId
    nonce: bytes
    name: str
    user: UserName
    submitter: NodeId
    command: tuple[str, ...]
    shell: bool
    env: tuple[tuple[str, str], ...]
    environment: EnvironmentRequest
    tree: Digest
    tree_bytes: int
    tree_files: int
    resources: Resources
    machine: NodeId | None
    stewards: tuple[NodeId, ...]
    issued_wall_s: float
    image: str = ""
    cloud: CloudUse = CloudUse.NEVER
    retries: int = 0
    sweep: Space | None = None
    objective: Objective | None = None
    secrets: SecretBox | None = None
    shared: bool = False
    priority: Priority = Priority.NORMAL
    preemptible: bool = False
    timeout_s: float | None = None
    start_within_s: float | None = None


class JobState(StrEnum):
    DRAFT = "draft"
    QUEUED = "queued"
    PLACING = "placing"
    ACTIVE = "active"
    UNKNOWN = "unknown"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    LOST = "lost"

    @property
    def is_final(self) -> bool:
        return self in FINAL_JOB_STATES


FINAL_JOB_STATES: Final = frozenset(
    {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED, JobState.LOST}
)


class Phase(StrEnum):
    """What an active job is doing; what people see in the column ST."""

    STAGING = "staging"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    SAVING = "saving"


class StopMode(StrEnum):
    STOP = "stop"
    """SIGTERM, 30 s, SIGKILL; outputs are saved."""
    KILL = "kill"
    """SIGKILL at once."""


@dataclass(frozen=True, slots=True)
class Result:
    """How an attempt ended. exit_code: the job's own, 128+n for signal n, None where no process ever ended.

    outcome: what the attempt came to, in a state of DESIGN §5. reason: one line, empty for a plain exit.
    output_files, output_bytes: what it left under its working directory. metric: what it reported of its objective.
    """

    outcome: "AttemptState"
    exit_code: int | None
    reason: str = ""
    output_files: int = 0
    output_bytes: int = 0
    metric: Metric | None = None


class AttemptState(StrEnum):
    """Where an attempt stands on its node; states only move forward, in this order. The last: its steward knows how."""

    HELD = "held"
    ACCEPTED = "accepted"
    STAGING = "staging"
    RUNNING = "running"
    STOPPING = "stopping"
    EXITED = "exited"
    TIMED_OUT = "timed-out"
    """Ended by its guard, because it ran for longer than its user allows."""
    REJECTED = "rejected"
    FENCED = "fenced"
    PREEMPTED = "preempted"
    """Ended because the machine's owner wants it back: it is placed again."""
    CRASHED = "crashed"
    ABANDONED = "abandoned"
    DELIVERED = "delivered"


ATTEMPT_ORDER: Final = {state: rank for rank, state in enumerate(AttemptState)}
ENDED_ATTEMPT_STATES: Final = frozenset(
    {
        AttemptState.EXITED,
        AttemptState.TIMED_OUT,
        AttemptState.DELIVERED,
        AttemptState.REJECTED,
        AttemptState.FENCED,
        AttemptState.PREEMPTED,
        AttemptState.CRASHED,
        AttemptState.ABANDONED,
    }
)
"""No process of the attempt lives in these states."""


def quorum(stewards: tuple[NodeId, ...]) -> int:
    """How many of a job's stewards decide: any two such parts of them share one."""
    return len(stewards) // 2 + 1


@dataclass(frozen=True, slots=True, order=True)
class Ballot:
    """A steward's turn to change a register. Of two the higher one wins; no two stewards share one."""

    round: int
    steward: NodeId


NO_BALLOT: Final = Ballot(0, NodeId(""))
"""Below all others."""


@dataclass(frozen=True, slots=True, order=True)
class Stamp:
    """Which change of a register it is: the `step`-th, from 1, of whose turn `ballot` is. Later ones are higher."""

    ballot: Ballot
    step: int


NO_STAMP: Final = Stamp(NO_BALLOT, 0)
"""Of a register that was never accepted."""


@dataclass(frozen=True, slots=True)
class Register:
    """A job as its stewards hold it; changed only by a quorum of them, in the order of `stamp`.

    epoch counts attempts from 1; 0 before the first. node, hold, gpus belong to it. phase is None unless active.
    detail: what staging is doing, as people read it. reason: why the job waits, or why it ended as it did.
    heard_wall_s: when the node of this epoch last reported. Times are Unix seconds, None where not yet.
    metric: what the newest attempt has reported of the job's objective. died: attempts that died after they started.
    ran_on: where the last attempt before this epoch ran whose command had started; None where none had.
    """

    job: JobId
    state: JobState
    epoch: int = 0
    node: NodeId | None = None
    hold: HoldId | None = None
    gpus: tuple[GpuShare, ...] = ()
    phase: Phase | None = None
    detail: str = ""
    stop: StopMode | None = None
    result: Result | None = None
    reason: str = ""
    submitted_wall_s: float = 0.0
    started_wall_s: float | None = None
    ended_wall_s: float | None = None
    heard_wall_s: float | None = None
    metric: Metric | None = None
    died: int = 0
    ran_on: NodeId | None = None
    stamp: Stamp = NO_STAMP


@dataclass(frozen=True, slots=True)
class Standing:
    """All that stewards agree on about a job. cancel: the user's signed JobRequest to stop or kill it, if there is one.

    receipt: of the newest attempt that has ended.
    """

    register: Register
    cancel: Signed | None = None
    receipt: Signed | None = None


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as its user may see it: what was asked for, and the newest register that a steward has told.

    trial: which point of the space of `sweep` it is; both None for a job of its own. signed: the spec, a trial's
    sweep's, as its user signed it. receipt: where it was asked for, what the node of the newest attempt that has ended
    signed.
    """

    spec: JobSpec
    register: Register
    trial: Trial | None = None
    sweep: JobSpec | None = None
    signed: Signed | None = None
    receipt: Signed | None = None


@dataclass(frozen=True, slots=True)
class PlacingVote:
    """A steward's vote that the register is placing(epoch, node, hold). A quorum, signed, is the attempt ticket."""

    mesh: MeshId
    job: JobId
    spec: Digest
    epoch: int
    node: NodeId
    hold: HoldId
    steward: NodeId


class Action(StrEnum):
    """What a user asks of a job; each is a signed request."""

    SUBMIT = "submit"
    """To hold it, where the spec itself is not fresh."""
    LIST = "list"
    WATCH = "watch"
    STOP = "stop"
    KILL = "kill"
    LOGS = "logs"
    FILES = "files"
    RECEIPT = "receipt"


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A user's request about a job (or, with LIST, all of the user's jobs), signed by the user's key.

    node: whom it is meant for, so that it cannot be replayed elsewhere. issued_wall_s: Unix time, 120 s fresh.
    nonce: what one that stops a job is known by, so that it is obeyed once.
    challenge: 32 bytes that `node` asked for because the two clocks differ; empty where they do not.
    """

    mesh: MeshId
    user: UserName
    action: Action
    node: NodeId
    issued_wall_s: float
    nonce: str
    job: JobId | None = None
    challenge: bytes = b""


@dataclass(frozen=True, slots=True)
class Draft:
    """A job as the command line asks for it, before it is resolved and signed.

    gpus: None where `-g` is absent: one whole GPU if the machine has one, else none.
    machine: a machine's name, empty without `-m`. image: of a container, empty without `--image`.
    cloud: None where `--cloud` is absent: what the mesh's policy says.
    secrets: names of variables whose values the agent keeps under the query, out of the core's sight.
    on: as in Resources, which has it where `-g` is said.
    start_by_wall_s: Unix time, by this machine's clock, at which it must have started; None: whenever.
    """

    name: str
    command: tuple[str, ...]
    shell: bool
    env: tuple[tuple[str, str], ...]
    environment: EnvironmentRequest
    tree: Digest
    tree_bytes: int
    tree_files: int
    machine: str
    resources: Resources | None
    cpus: int = 0
    memory_bytes: int = 0
    image: str = ""
    cloud: CloudUse | None = None
    retries: int = 0
    sweep: Space | None = None
    objective: Objective | None = None
    secrets: tuple[str, ...] = ()
    shared: bool = False
    on: Where = ANYWHERE
    priority: Priority = Priority.NORMAL
    preemptible: bool = False
    timeout_s: float | None = None
    start_by_wall_s: float | None = None


@dataclass(frozen=True, slots=True)
class AttemptPlan:
    """Everything the executor needs to run one attempt.

    gpus: the shares that were held, in PCI order. fenced: whether the job must be shut in (another user's job).
    machine: the machine's name, for MESHGPU_MACHINE. image: of the container it runs in; empty for a process.
    key: the user's key that signed the spec, which secrets are bound to; None only where there are none.
    is_tailed: whether others are to hear what it prints.
    """

    spec: JobSpec
    epoch: int
    gpus: tuple[GpuShare, ...]
    fenced: bool
    machine: str
    image: str = ""
    key: KeyId | None = None
    is_tailed: bool = False
