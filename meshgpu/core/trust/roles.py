"""The one table of what a peer may say to us, by the role of its machine. Everything that arrives passes it.

It says who may speak at all; whether what is said is signed, fresh and somebody's own is checked afterwards, by the
state machine that it is for. `admin` is a right of a user's key and stands in the mesh log, not here.
"""

from collections.abc import Mapping
from typing import Final

from meshgpu.model.bulk import (
    AttemptsWanted,
    BulkRequest,
    ChunksWanted,
    FilesWanted,
    FileWanted,
    LogsWanted,
    TailWanted,
)
from meshgpu.model.messages import (
    Accept,
    Accepted,
    Activate,
    Answer,
    Ask,
    AttemptOutput,
    AttemptReport,
    Cancel,
    Commit,
    CommitAnswer,
    Fence,
    GossipDelta,
    GossipDigest,
    JobUpdate,
    KnockAnswer,
    KnockWanted,
    LogDelta,
    Message,
    Offer,
    OfferAnswer,
    Prepare,
    ProbeAnswer,
    ProbeFor,
    Promise,
    Release,
    ReportAck,
    Submit,
    SubmitAnswer,
)
from meshgpu.model.trust import LENDING_ROLES, OFFICE_ROLES, STEWARD_ROLES, Member, Role

_EVERYBODY: Final = frozenset(Role)
_RUNS: Final = LENDING_ROLES
_HOLDS: Final = STEWARD_ROLES
_SUBMITS: Final = OFFICE_ROLES - {Role.VIEWER}

MAY: Final[Mapping[type[Message | BulkRequest], frozenset[Role]]] = {
    GossipDigest: _EVERYBODY,
    ProbeFor: OFFICE_ROLES,
    ProbeAnswer: OFFICE_ROLES,
    GossipDelta: _EVERYBODY,
    LogDelta: _EVERYBODY,
    Submit: _SUBMITS,
    Prepare: _HOLDS,
    Promise: _HOLDS,
    Accept: _HOLDS,
    Accepted: _HOLDS,
    Ask: OFFICE_ROLES,
    KnockWanted: OFFICE_ROLES,
    KnockAnswer: OFFICE_ROLES,
    Offer: _HOLDS,
    Release: _HOLDS,
    Commit: _HOLDS,
    Activate: _HOLDS,
    Fence: _HOLDS,
    Cancel: _HOLDS,
    ReportAck: _HOLDS,
    SubmitAnswer: _HOLDS,
    Answer: _HOLDS,
    JobUpdate: _HOLDS,
    OfferAnswer: _RUNS,
    CommitAnswer: _RUNS,
    AttemptReport: _RUNS,
    AttemptOutput: _RUNS,
    ChunksWanted: _RUNS,
    LogsWanted: OFFICE_ROLES,
    AttemptsWanted: OFFICE_ROLES,
    TailWanted: OFFICE_ROLES,
    FilesWanted: OFFICE_ROLES,
    FileWanted: OFFICE_ROLES,
}
"""{what is said: the roles that may say it}."""


def may_say(member: Member, what: Message | BulkRequest) -> bool:
    return member.role in MAY[type(what)]
