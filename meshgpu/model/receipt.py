"""What a machine vouches for when an attempt has ended, and what is needed to check it years later."""

from dataclasses import dataclass
from typing import Final

from meshgpu.model.ids import NO_DIGEST, Digest, GpuId, JobId, MeshId, NodeId
from meshgpu.model.job import AttemptState
from meshgpu.model.sweep import Trial
from meshgpu.model.trust import Signed


@dataclass(frozen=True, slots=True)
class Evidence:
    """What an executor saw of a run; each empty where there was none.

    environment: key of the Python environment, 32 hexadecimal characters, a digest of its lock, its interpreter and
    its options. image: id of the container image. log: SHA-256 of the ledger, whole.
    """

    environment: str = ""
    image: str = ""
    log: Digest = NO_DIGEST


NO_EVIDENCE: Final = Evidence()


@dataclass(frozen=True, slots=True)
class Receipt:
    """An accepted attempt that has ended, as the node that had it signs it.

    spec: digest of the user's signed JobSpec, of a trial its sweep's; tree: what it says of the working directory.
    fenced: whether it was shut in. driver: version of the NVIDIA driver, empty without one. started_wall_s: None where
    no process ever was. outcome, exit_code: as in Result. The rest: as in Evidence.
    """

    mesh: MeshId
    job: JobId
    epoch: int
    node: NodeId
    spec: Digest
    tree: Digest
    fenced: bool
    gpus: tuple[GpuId, ...]
    driver: str
    environment: str
    image: str
    log: Digest
    outcome: AttemptState
    exit_code: int | None
    started_wall_s: float | None
    ended_wall_s: float


@dataclass(frozen=True, slots=True)
class Proof:
    """Everything that shows who asked for a run and what came of it. trial: which of a sweep, None for none."""

    spec: Signed
    receipt: Signed
    trial: Trial | None = None
