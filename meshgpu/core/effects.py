"""Orders: everything a node can ask for. Imperative; the only way out of the core.

Within one step the driver performs every Persist, durably, before any other effect.
"""

from dataclasses import dataclass

from meshgpu.model.clock import ClockGap
from meshgpu.model.cloud import BurstSettings, LaunchId, LaunchRequest, Rung
from meshgpu.model.ids import Address, Digest, JobId, NodeId
from meshgpu.model.job import AttemptPlan, JobView, Register, StopMode
from meshgpu.model.messages import Message
from meshgpu.model.records import Record
from meshgpu.model.trust import Member, Signed


@dataclass(frozen=True, slots=True)
class Persist:
    """Keep `record` under (kind, key); None forgets it."""

    kind: str
    key: str
    record: Record | None


@dataclass(frozen=True, slots=True)
class Send:
    """Put a message on the open Link to `peer`; silently lost where none is open."""

    peer: NodeId
    message: Message


@dataclass(frozen=True, slots=True)
class Dial:
    """Ends in LinkOpened or DialFailed."""

    peer: NodeId
    address: Address


@dataclass(frozen=True, slots=True)
class Knock:
    """Try to open a bare TCP connection, and close it; ends in Knocked within 1 s."""

    peer: NodeId
    address: Address


@dataclass(frozen=True, slots=True)
class CloseLink:
    """Give a Link up; ends in LinkClosed."""

    peer: NodeId
    reason: str


@dataclass(frozen=True, slots=True)
class Identify:
    """Ends in AddressIdentified or IdentifyFailed."""

    address: Address


@dataclass(frozen=True, slots=True)
class TrustMembers:
    """Replace the TLS trust bundle by these members' device CAs."""

    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class NoteNewKeys:
    """Let this agent's own log say that a machine goes on under another id, for who looks into it later."""

    name: str
    before: NodeId
    after: NodeId


@dataclass(frozen=True, slots=True)
class Announce:
    """What mDNS says of this machine has changed."""


@dataclass(frozen=True, slots=True)
class FetchTree:
    """Get every chunk of a job's tree from one of `sources`; ends in TreeArrived or TreeFailed."""

    job: JobId
    tree: Digest
    sources: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class StartAttempt:
    """Get the tree from one of `sources`, build the environment, start the guard; ends in AttemptFinished."""

    plan: AttemptPlan
    sources: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class AdoptAttempt:
    """Take up an attempt from before this agent started; ends in AttemptFinished."""

    plan: AttemptPlan


@dataclass(frozen=True, slots=True)
class EndAttempt:
    job: JobId
    epoch: int
    mode: StopMode


@dataclass(frozen=True, slots=True)
class DiscardAttempt:
    """Its record has been kept long enough: its files may go."""

    job: JobId
    epoch: int


@dataclass(frozen=True, slots=True)
class Answered:
    """The end of a local query. With a `code` it failed: `reason`, `hint` say how. silent: who did not answer.

    clock: whose clock differed so much that a request had to be signed again; None if nobody's did.
    """

    query: str
    views: tuple[JobView, ...] = ()
    silent: tuple[NodeId, ...] = ()
    code: str = ""
    reason: str = ""
    hint: str | None = None
    clock: ClockGap | None = None


@dataclass(frozen=True, slots=True)
class QueryProgressed:
    """How far the shipping of a submitted job's tree is."""

    query: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class TellWatchers:
    """A register that somebody local watches, as its steward now has it."""

    register: Register


@dataclass(frozen=True, slots=True)
class Reject:
    """Something that `peer` sent was refused; nothing else happened."""

    peer: NodeId
    reason: str


@dataclass(frozen=True, slots=True)
class Warn:
    """A person should know this of a member: a line in the log."""

    node: NodeId
    reason: str


@dataclass(frozen=True, slots=True)
class SurveyCloud:
    """Ask the provider what can be rented and what of this mesh lives; ends in CloudSurveyed."""

    settings: BurstSettings


@dataclass(frozen=True, slots=True)
class PrepareLaunch:
    """Make the bootstrap certificate and the user data of an instance to be; ends in LaunchPrepared.

    name: what the instance will be called in the mesh.
    """

    launch: LaunchId
    name: str
    rung: Rung
    need: JobId
    lease_ends_wall_s: float
    settings: BurstSettings


@dataclass(frozen=True, slots=True)
class Launch:
    """Rent one instance, by one call; ends in LaunchEnded."""

    request: LaunchRequest


@dataclass(frozen=True, slots=True)
class Terminate:
    """End an instance; ends in TerminateEnded."""

    instance: str


@dataclass(frozen=True, slots=True)
class Enrol:
    """Dial an instance that was booted, pinned to its bootstrap certificate (DER), and ask for its keys.

    Ends in Enrolled; the dialog stays open for Welcome.
    """

    launch: LaunchId
    address: Address
    bootstrap: bytes


@dataclass(frozen=True, slots=True)
class Welcome:
    """Hand the mesh log, which names it, to the instance that was enrolled last; ends in WelcomeEnded."""

    launch: LaunchId
    log: tuple[Signed, ...]


BurstEffect = SurveyCloud | PrepareLaunch | Launch | Terminate | Enrol | Welcome
"""Of the burst planner alone; each ends in exactly one event, within a minute or two."""


@dataclass(frozen=True, slots=True)
class PowerOff:
    """End this machine, which is rented. Nothing follows it."""

    reason: str


Effect = (
    Persist
    | Send
    | Dial
    | Knock
    | CloseLink
    | Identify
    | TrustMembers
    | NoteNewKeys
    | Announce
    | FetchTree
    | StartAttempt
    | AdoptAttempt
    | EndAttempt
    | DiscardAttempt
    | Answered
    | QueryProgressed
    | TellWatchers
    | Reject
    | Warn
    | SurveyCloud
    | PrepareLaunch
    | Launch
    | Terminate
    | Enrol
    | Welcome
    | PowerOff
)
