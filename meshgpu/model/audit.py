"""The record that a machine keeps of who ran what on it: entries of one hash chain, signed by the node's key."""

from dataclasses import dataclass
from enum import StrEnum

from meshgpu.model.ids import NO_DIGEST, Digest, GpuId, JobId, KeyId, NodeId, UserName
from meshgpu.model.job import AttemptState


class AuditEvent(StrEnum):
    """What happened to an attempt."""

    ACCEPTED = "accepted"
    STARTED = "started"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class AuditHead:
    """The newest entry of a machine's chain."""

    seq: int
    entry: Digest


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One thing that happened on `node`.

    seq counts from 0 without gaps; previous is the digest of the entry before, empty at seq 0. user, key: whose job it
    is and which of the user's keys signed the spec, whose digest is `spec`. fenced: whether the job is shut in.
    outcome and exit_code: None before the end, exit_code also where no exit was seen. receipt: digest of the signed
    Receipt, empty before the end.
    """

    node: NodeId
    seq: int
    previous: Digest
    at_wall_s: float
    event: AuditEvent
    job: JobId
    epoch: int
    name: str
    user: UserName
    key: KeyId
    spec: Digest
    fenced: bool
    gpus: tuple[GpuId, ...]
    outcome: AttemptState | None = None
    exit_code: int | None = None
    receipt: Digest = NO_DIGEST


@dataclass(frozen=True, slots=True)
class AuditStart:
    """Where the kept part of a chain begins, signed by its node: entries before `seq` were let go for their age."""

    node: NodeId
    seq: int
