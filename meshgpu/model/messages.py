"""What nodes say to one another over a Link. Each message is one frame; none needs an answer to be safe."""

from dataclasses import dataclass

from meshgpu.model.gossip import Incarnation, KnockOutcome
from meshgpu.model.ids import Address, HoldId, JobId, NodeId
from meshgpu.model.job import Ballot, Phase, Register, Result, Stamp, Standing
from meshgpu.model.logs import LogChunk
from meshgpu.model.resources import GpuShare
from meshgpu.model.sweep import Metric, Trial
from meshgpu.model.trust import Head, Signed


@dataclass(frozen=True, slots=True)
class Known:
    """Up to which version of an owner's entries somebody is informed. Versions count over both of its entries."""

    owner: NodeId
    incarnation: Incarnation
    version: int


@dataclass(frozen=True, slots=True)
class GossipDigest:
    """What I know. The receiver answers with what I lack, and, with `wants_answer`, with a digest of its own.

    summary: 32 hexadecimal characters of a hash over all of it. A digest that has nothing but its summary is brief: to
    who knows the same it says everything. number: of the probe that it is, or answers; 0 for none.
    """

    known: tuple[Known, ...]
    heads: tuple[Head, ...]
    wants_answer: bool
    summary: str = ""
    number: int = 0

    @property
    def is_brief(self) -> bool:
        return bool(self.summary) and not self.known and not self.heads

    @property
    def is_probe(self) -> bool:
        """Whether it wants to be answered, rather than being an answer."""
        return self.is_brief and self.wants_answer


@dataclass(frozen=True, slots=True)
class ProbeFor:
    """Please probe `target`: it does not answer me. number: of my own probe."""

    target: NodeId
    number: int


@dataclass(frozen=True, slots=True)
class ProbeAnswer:
    """Whether `target` answered in time; also where it did not, so that the asker knows that at least we two talk."""

    target: NodeId
    number: int
    is_alive: bool


@dataclass(frozen=True, slots=True)
class GossipDelta:
    """Entries of any owners, each signed by its owner."""

    entries: tuple[Signed, ...]


@dataclass(frozen=True, slots=True)
class LogDelta:
    """Entries of the mesh log, each signed by its author."""

    entries: tuple[Signed, ...]


@dataclass(frozen=True, slots=True)
class Challenge:
    """Why a request is `stale`, and what makes it fresh: sign it again with `nonce` in it, within 120 s.

    nonce: 32 random bytes of the receiver, good once, from this peer. wall_s: the receiver's Unix time.
    refused: the challenge that the stale request had in it; empty where it had none.
    """

    nonce: bytes
    wall_s: float
    refused: bytes = b""


@dataclass(frozen=True, slots=True)
class Submit:
    """Submitter to steward: hold this job. Sent again until answered; idempotent by job id.

    Steward to steward: this job is about to be held; get its tree. fresh: the user's signed JobRequest to submit it,
    with the steward's challenge in it, where the two clocks differ.
    """

    job: JobId
    spec: Signed
    fresh: Signed | None = None


@dataclass(frozen=True, slots=True)
class SubmitAnswer:
    """Steward to submitter: a quorum holds the job with its tree, or it is being received, or is refused (`code`).

    challenge: with the code `stale` only.
    """

    job: JobId
    held: bool
    done_bytes: int = 0
    total_bytes: int = 0
    code: str = ""
    reason: str = ""
    challenge: Challenge | None = None


@dataclass(frozen=True, slots=True)
class Prepare:
    """Steward to steward: I ask for the turn `ballot` to change the register. spec, trial: for who lacks the job."""

    job: JobId
    ballot: Ballot
    spec: Signed
    trial: Trial | None = None


@dataclass(frozen=True, slots=True)
class Promise:
    """Steward to steward: what I am bound to now; if that is the `ballot` that was asked for, it is granted.

    standing: what I have accepted last; None for nothing.
    """

    job: JobId
    ballot: Ballot
    promised: Ballot
    standing: Standing | None = None


@dataclass(frozen=True, slots=True)
class Accept:
    """Steward to steward, in its turn: the job stands so now. spec, trial: for who lacks the job; spec None if not."""

    job: JobId
    standing: Standing
    spec: Signed | None = None
    trial: Trial | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """Steward to steward: what I have accepted last (`stamp`), and the ballot I am bound to.

    vote: signed PlacingVote, where that register is placing. is_lacking: I do not know the job; send its spec.
    """

    job: JobId
    stamp: Stamp
    promised: Ballot
    vote: Signed | None = None
    is_lacking: bool = False


@dataclass(frozen=True, slots=True)
class Offer:
    """Steward to node: would you run this, as which epoch? trial: which of a sweep, None for a job of its own.

    claims: where there is no room, what it needs is to be kept free for it, and to be cleared of what gives way.
    """

    job: JobId
    epoch: int
    spec: Signed
    trial: Trial | None = None
    claims: bool = False


@dataclass(frozen=True, slots=True)
class OfferAnswer:
    """Node to steward: a hold on named GPUs for 3 s of the node's clock, or why not (`refusal`, hold None)."""

    job: JobId
    epoch: int
    hold: HoldId | None
    gpus: tuple[GpuShare, ...] = ()
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Release:
    """Steward to node: this hold is not needed."""

    job: JobId
    hold: HoldId


@dataclass(frozen=True, slots=True)
class Commit:
    """Steward to node: run it. votes: signed PlacingVote of a quorum of the spec's stewards, the attempt ticket."""

    job: JobId
    epoch: int
    hold: HoldId
    votes: tuple[Signed, ...]


@dataclass(frozen=True, slots=True)
class CommitAnswer:
    """Node to steward: the attempt is accepted durably, or why not."""

    job: JobId
    epoch: int
    accepted: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Activate:
    """Steward to node: active(epoch) is recorded, so the accepted attempt may start. Sent again when asked again."""

    job: JobId
    epoch: int


@dataclass(frozen=True, slots=True)
class Fence:
    """Steward to node: this epoch is spent. An attempt of it must not start, and must end if it did."""

    job: JobId
    epoch: int


@dataclass(frozen=True, slots=True)
class AttemptReport:
    """Node to steward, on every change and every few seconds: how the attempt stands; `result` once it has ended.

    receipt: then, signed by the node; None for an attempt that it never accepted.
    """

    job: JobId
    epoch: int
    phase: Phase | None
    detail: str
    started_wall_s: float | None
    ended_wall_s: float | None
    result: Result | None = None
    metric: Metric | None = None
    receipt: Signed | None = None


@dataclass(frozen=True, slots=True)
class AttemptOutput:
    """Node to stewards: what an attempt has printed since the last one, or the newest of all when a Link opens."""

    job: JobId
    epoch: int
    chunk: LogChunk


@dataclass(frozen=True, slots=True)
class ReportAck:
    """Steward to node: the result of this epoch is recorded. is_forgotten: no, but no such job is known here."""

    job: JobId
    epoch: int
    is_forgotten: bool = False


@dataclass(frozen=True, slots=True)
class Cancel:
    """Steward to node: end this attempt. request: the user's signed JobRequest to the steward (stop or kill)."""

    job: JobId
    epoch: int
    spec: Signed
    request: Signed
    trial: Trial | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """To a steward: a user's signed JobRequest to list, watch, stop or kill. `query` names the answer."""

    query: str
    request: Signed


@dataclass(frozen=True, slots=True)
class TrialView:
    """A trial as its steward holds it."""

    trial: Trial
    register: Register


@dataclass(frozen=True, slots=True)
class SignedView:
    """A job as its steward holds it; spec is signed by its user, so that no steward can invent a job.

    trial: for one trial, with the sweep's spec. trials: for a sweep in a list, all that have begun.
    receipt: of the newest attempt that has ended, only where it was asked for.
    """

    spec: Signed
    register: Register
    trial: Trial | None = None
    trials: tuple[TrialView, ...] = ()
    receipt: Signed | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """Steward to the asking agent: the jobs concerned, or why not. challenge: with the code `stale` only."""

    query: str
    views: tuple[SignedView, ...]
    code: str = ""
    reason: str = ""
    challenge: Challenge | None = None


@dataclass(frozen=True, slots=True)
class JobUpdate:
    """Steward to a watching agent: the register as it stands now."""

    register: Register


@dataclass(frozen=True, slots=True)
class KnockWanted:
    """Please knock at my door: at every address that my own node record names. It can name no other.

    query: random, names the answer.
    """

    query: str


@dataclass(frozen=True, slots=True)
class KnockResult:
    """What knocking at one address came to. node: whose certificate answers there, unverified; None for nobody's."""

    address: Address
    outcome: KnockOutcome
    node: NodeId | None = None


@dataclass(frozen=True, slots=True)
class KnockAnswer:
    """What came of it. hears: whether the asker's announcement by mDNS arrived meanwhile; announces: whether the
    answerer sent its own. wall_s: the answerer's Unix time. is_busy: it did none of it, having been asked too often.
    """

    query: str
    knocks: tuple[KnockResult, ...]
    hears: bool
    announces: bool
    wall_s: float
    is_busy: bool = False


Message = (
    GossipDigest
    | GossipDelta
    | LogDelta
    | Submit
    | SubmitAnswer
    | Prepare
    | Promise
    | Accept
    | Accepted
    | Offer
    | OfferAnswer
    | Release
    | Commit
    | CommitAnswer
    | Activate
    | Fence
    | AttemptReport
    | AttemptOutput
    | ReportAck
    | Cancel
    | Ask
    | Answer
    | JobUpdate
    | KnockWanted
    | KnockAnswer
    | ProbeFor
    | ProbeAnswer
)
