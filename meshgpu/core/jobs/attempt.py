"""One attempt as its node sees it, and the forms it takes for the disk, the steward and the mesh."""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from meshgpu.core.effects import Persist
from meshgpu.core.jobs.placement import wanted_cpus
from meshgpu.core.jobs.tail import Tail
from meshgpu.errors import BrokenInvariant
from meshgpu.model.gossip import Allocation
from meshgpu.model.ids import Digest, HoldId, NodeId
from meshgpu.model.inventory import Inventory
from meshgpu.model.job import (
    ATTEMPT_ORDER,
    ENDED_ATTEMPT_STATES,
    AttemptState,
    JobSpec,
    Phase,
    Result,
    StopMode,
)
from meshgpu.model.messages import AttemptReport
from meshgpu.model.receipt import Evidence, Receipt
from meshgpu.model.records import AttemptRecord
from meshgpu.model.resources import GpuShare
from meshgpu.model.sweep import Metric, Trial
from meshgpu.model.trust import Signed

STORY_LENGTH: Final = 16


@dataclass(slots=True)
class Attempt:
    """Mutable, owned by `Attempts`. due: `boot_s` of the next thing to do; what that is follows from the state.

    trial: which of a sweep, None for a job of its own. metric: what the job has reported of its objective.
    preempted: why the machine's owner wants it gone, empty where he does not. kill_at: `boot_s` at which it must be.
    fenced: whether it is shut in. receipt: what this node signed when it ended. steward: the one that spoke for the job
    last; it may have other keys by now, and with them another id. forgotten_by: stewards that know no such job.
    tail: of what it printed.
    """

    spec: JobSpec
    signed: Signed
    epoch: int
    state: AttemptState
    gpus: tuple[GpuShare, ...]
    hold: HoldId
    steward: NodeId
    due: float
    accepted_at: float = 0.0
    phase: Phase | None = None
    detail: str = ""
    stop: StopMode | None = None
    preempted: str = ""
    kill_at: float | None = None
    trial: Trial | None = None
    metric: Metric | None = None
    result: Result | None = None
    started_wall_s: float | None = None
    ended_wall_s: float | None = None
    fenced: bool = False
    receipt: Signed | None = None
    forgotten_by: set[NodeId] = field(default_factory=set)
    tail: Tail = field(default_factory=Tail)
    story: deque[str] = field(default_factory=lambda: deque(maxlen=STORY_LENGTH))

    @property
    def occupies(self) -> bool:
        """Whether its GPUs are taken: from the hold until no process of it lives."""
        return self.state not in ENDED_ATTEMPT_STATES

    @property
    def needs_telling(self) -> bool:
        return self.state not in (AttemptState.HELD, AttemptState.DELIVERED)

    def advance(self, state: AttemptState) -> None:
        """Move forward, never back."""
        self.story.append(f"{self.state} → {state}")
        if ATTEMPT_ORDER[state] < ATTEMPT_ORDER[self.state]:
            raise BrokenInvariant(f"attempt {self.epoch} of {self.spec.job} goes back", tuple(self.story))
        self.state = state

    def allocation(self) -> Allocation:
        return allocation_of(self.spec, self.epoch, self.gpus)

    def persist(self) -> Persist:
        record = AttemptRecord(
            self.spec.job,
            self.epoch,
            self.state,
            self.signed,
            self.hold,
            self.gpus,
            self.stop,
            self.result,
            self.started_wall_s,
            self.ended_wall_s,
            self.preempted,
            self.trial,
            self.fenced,
            self.receipt,
        )
        return Persist("attempt", f"{self.spec.job}/{self.epoch}", record)

    def account(self, node: NodeId, spec: Digest, inventory: Inventory, evidence: Evidence) -> Receipt:
        """What `node` vouches for, once it has ended. spec: digest of what the user signed."""
        assert self.result is not None
        assert self.ended_wall_s is not None
        return Receipt(
            self.spec.mesh,
            self.spec.job,
            self.epoch,
            node,
            spec,
            self.spec.tree,
            self.fenced,
            tuple(share.uuid for share in self.gpus),
            inventory.driver_version if self.gpus else "",
            evidence.environment,
            evidence.image,
            evidence.log,
            self.result.outcome,
            self.result.exit_code,
            self.started_wall_s,
            self.ended_wall_s,
        )

    def report(self) -> AttemptReport:
        return AttemptReport(
            self.spec.job,
            self.epoch,
            self.phase,
            self.detail,
            self.started_wall_s,
            self.ended_wall_s,
            self.result,
            self.metric,
            self.receipt,
        )


def allocation_of(spec: JobSpec, epoch: int, gpus: tuple[GpuShare, ...], *, is_kept: bool = False) -> Allocation:
    """What a job takes of its machine, as others see it; or what is only kept free for it."""
    return Allocation(
        spec.job,
        epoch,
        spec.name,
        spec.user,
        gpus,
        wanted_cpus(spec.resources),
        spec.resources.memory_bytes,
        spec.priority,
        spec.preemptible,
        is_kept,
    )
