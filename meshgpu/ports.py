"""What the agent needs from the outside world, one Protocol each. An adapter implements one of them."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from meshgpu.model.clock import Now
from meshgpu.model.cloud import BurstSettings, Instance, LaunchRequest, Rung
from meshgpu.model.gossip import KnockOutcome, Sighting
from meshgpu.model.ids import Address, Digest, JobId, KeyId, NodeId
from meshgpu.model.inventory import GpuReading, Inventory
from meshgpu.model.job import AttemptPlan, Phase, Result, StopMode
from meshgpu.model.logs import LogChunk
from meshgpu.model.receipt import NO_EVIDENCE, Evidence
from meshgpu.model.sweep import Metric
from meshgpu.model.tree import Manifest


class Clock(Protocol):
    def now(self) -> Now: ...


# -- keys ------------------------------------------------------------------------------------------------------------


class Identity(Protocol):
    """As whom a machine opens and answers Links."""

    def node_key(self) -> bytes:
        """Public device key, 32 raw bytes; made on the first call."""
        ...

    def device_ca(self) -> bytes:
        """This node's device CA, DER; made on the first call."""
        ...

    def leaf(self, now_wall_s: float) -> tuple[bytes, bytes]:
        """(private key PEM, certificate PEM) of a P-256 leaf that is valid at `now_wall_s`; renewed daily."""
        ...


class Keys(Identity, Protocol):
    """This machine's secrets. Nothing here leaves it but public keys, certificates and signatures."""

    def user_key(self, uid: int) -> bytes:
        """Public key of the OS account `uid`, 32 raw bytes; made on the first call."""
        ...

    def sign(self, key: KeyId, message: bytes) -> bytes:
        """64 bytes of Ed25519; raises TrustError `no-such-key` for a key that is not this machine's."""
        ...

    def verify(self, public_key: bytes, message: bytes, signature: bytes) -> bool: ...


class NextKeys(Protocol):
    """Where a new set of keys lies ready. Both methods block."""

    def make(self) -> Keys:
        """Begin a new set, in place of one that was never used; on disk when it returns."""
        ...

    def drop(self) -> None:
        """Forget a set that is not to be used."""
        ...


class Signer(Protocol):
    """One key that signs. public_key: 32 raw bytes."""

    @property
    def public_key(self) -> bytes: ...

    def sign(self, key: KeyId, message: bytes) -> bytes:
        """64 bytes of Ed25519; raises TrustError `no-such-key` for another key."""
        ...


# -- links -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LinkOpened:
    """An authenticated Link with `peer` is up. dialled: this side opened it. protocol: the newest that both speak.

    instance: random for each start of the peer's agent.
    """

    peer: NodeId
    dialled: bool
    protocol: int
    instance: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class LinkClosed:
    peer: NodeId
    reason: str


@dataclass(frozen=True, slots=True)
class DialFailed:
    peer: NodeId
    address: Address
    reason: str


@dataclass(frozen=True, slots=True)
class FrameReceived:
    """One frame of an open Link, at most 1 MiB."""

    peer: NodeId
    frame: bytes


LinkEvent = LinkOpened | LinkClosed | DialFailed | FrameReceived

BulkHandler = Callable[[NodeId, bytes], AsyncIterator[bytes]]
"""Serves one bulk stream: (authenticated peer, request) -> messages of at most 1 MiB; may raise MeshgpuError."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """Whom this node trusts for TLS: a member and its device CA (DER). is_cloud: it dials nobody, ever."""

    node: NodeId
    device_ca: bytes
    is_cloud: bool = False


class Transport(Protocol):
    """Links and bulk streams between members, mutually authenticated."""

    async def start(self, emit: Callable[[LinkEvent], None], serve_bulk: BulkHandler) -> int:
        """Listen; `emit` is called on the event loop. Returns the port, 7443 or a free one where that is taken."""
        ...

    def trust(self, anchors: Sequence[Anchor]) -> None:
        """Replace the trust bundle; Links of nodes that are no longer in it are closed."""
        ...

    def dial(self, peer: NodeId, address: Address) -> None:
        """Open a Link; the outcome is LinkOpened or DialFailed, within 5 s."""
        ...

    def send(self, peer: NodeId, frame: bytes) -> None:
        """Queue a frame; dropped where no Link is open or its queue of 1,024 is full (the Link is then closed)."""
        ...

    def close(self, peer: NodeId, reason: str) -> None: ...

    def fetch(self, peer: NodeId, addresses: Sequence[Address], request: bytes) -> AsyncIterator[bytes]:
        """A bulk stream of `peer`, over a call of the peer's own where this node dials nobody.

        Raises MeshgpuError with the peer's code, or `no-answer`.
        """
        ...

    async def knock(self, address: Address) -> KnockOutcome:
        """What a bare TCP connection to `address` comes to, within 1 s; nothing is sent over it."""
        ...

    async def identify(self, address: Address) -> NodeId:
        """Whose certificate answers at `address`, unverified: a hint to dial. Raises MeshgpuError `no-answer`."""
        ...

    async def stop(self) -> None: ...


class PairingDoor(Protocol):
    """Who stands behind the pairing listener. host: the caller's IP address, without port."""

    def check(self, host: str) -> None:
        """Raises MeshgpuError where `host` is not heard now; asked before anything of its step is read."""
        ...

    async def answer(self, host: str, step: str, request: bytes) -> bytes:
        """The reply to one step. A MeshgpuError that it raises travels to the caller."""
        ...

    def broke_off(self, host: str) -> None:
        """A step from there had no name, or its request did not come in time."""
        ...


class PairingTransport(Protocol):
    """The separate listener through which strangers join; open only while a window is."""

    async def open(self, door: PairingDoor) -> int:
        """Listen on 7444 or a free port, which is returned."""
        ...

    async def close(self) -> None: ...

    def fingerprint(self) -> Digest:
        """SHA-256 of the listener's self-signed certificate (DER); both sides bind the pairing to it."""
        ...


class PairingDialog(Protocol):
    """The joiner's side of a pairing connection."""

    @property
    def fingerprint(self) -> Digest: ...

    async def call(self, step: str, request: bytes) -> bytes:
        """One exchange, 5 s at most; raises MeshgpuError with the other side's code, or `no-answer`."""
        ...

    async def close(self) -> None: ...


# -- discovery -------------------------------------------------------------------------------------------------------


class Discovery(Protocol):
    async def start(self, emit: Callable[[Sighting], None]) -> None:
        """Browse; `emit` is called on the event loop for every announcement but our own."""
        ...

    async def announce(self, sighting: Sighting) -> None:
        """Register or update our own announcement. Raises MeshgpuError `no-mdns`."""
        ...

    def remind(self) -> bool:
        """Say our announcement again, now; False where there is none."""
        ...

    def heard(self, node: NodeId, within_s: float) -> bool:
        """Whether the announcement of `node` was on the network in the last `within_s` seconds."""
        ...

    async def stop(self) -> None: ...


# -- the machine -----------------------------------------------------------------------------------------------------


class GpuProbe(Protocol):
    """Reads the GPUs in one thread of its own."""

    async def start(self, emit: Callable[[Inventory, tuple[GpuReading, ...]], None]) -> None:
        """Take a first sample before returning, then one every 2 s; `emit` is called on the event loop."""
        ...

    async def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class AttemptStarted:
    job: JobId
    epoch: int
    started_wall_s: float


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """No process of the attempt is left; its files are complete. evidence: of what ran, where anything did."""

    job: JobId
    epoch: int
    ended_wall_s: float
    result: Result
    evidence: Evidence = NO_EVIDENCE


@dataclass(frozen=True, slots=True)
class AttemptProgress:
    """What staging does (`detail`, one line: `environment: 12 packages`), or that outputs are being saved."""

    job: JobId
    epoch: int
    phase: Phase
    detail: str


@dataclass(frozen=True, slots=True)
class AttemptMeasured:
    """What the attempt has reported of its objective so far."""

    job: JobId
    epoch: int
    metric: Metric


@dataclass(frozen=True, slots=True)
class AttemptPrinted:
    """What the attempt has printed since the last one; of much, only the newest part. For plans that are tailed."""

    job: JobId
    epoch: int
    chunk: LogChunk


ExecutorEvent = AttemptStarted | AttemptEnded | AttemptProgress | AttemptMeasured | AttemptPrinted


class Executor(Protocol):
    """Runs attempts. Each attempt ends in exactly one AttemptEnded, whatever happens to the agent between."""

    async def start(self, emit: Callable[[ExecutorEvent], None]) -> None:
        """Make ready and adopt attempts that outlived an earlier agent; nothing is emitted for those before `adopt`."""
        ...

    def run(self, plan: AttemptPlan, tree: Path) -> None:
        """Build the environment, start the guard. `tree` is the attempt's own working directory, already filled."""
        ...

    def adopt(self, plan: AttemptPlan) -> None:
        """Take up an attempt from before a restart: emits AttemptStarted if it lives, AttemptEnded if it is over."""
        ...

    def stop(self, job: JobId, epoch: int, mode: StopMode) -> None:
        """End an attempt in any phase; stronger modes override weaker ones; unknown attempts are ignored."""
        ...

    def fence(self) -> str:
        """What shuts in other users' jobs here (`bubblewrap`, `landlock`), empty where nothing works."""
        ...

    async def close(self) -> None:
        """Let go of running attempts: they run on."""
        ...


# -- bytes -----------------------------------------------------------------------------------------------------------


class ChunkStore(Protocol):
    """Chunks by SHA-256 on this machine's disk; every read is verified. All calls block: use a thread."""

    def missing(self, chunks: Sequence[Digest]) -> list[Digest]:
        """Those that are not here, in the order given, each once."""
        ...

    def put(self, data: bytes) -> Digest:
        """Keep a chunk, whole or not at all; durable after the next `sync`. Raises MeshgpuError `disk-full`."""
        ...

    def sync(self) -> None:
        """Return once everything that was put is on the disk."""
        ...

    def get(self, chunk: Digest) -> bytes:
        """Raises MeshgpuError `missing-chunks` where it is not here or no longer what it was."""
        ...

    def manifest(self, tree: Digest) -> Manifest: ...

    def materialise(self, tree: Digest, directory: Path) -> None:
        """Write the tree into `directory` (made, empty) as files the job may change. Raises `disk-full`."""
        ...


# -- memory ----------------------------------------------------------------------------------------------------------


class Store(Protocol):
    """Small durable records by (kind, key). All calls block: use a thread."""

    def load(self, but: str = "") -> dict[tuple[str, str], bytes]:
        """Everything, once, at start; what is of the kind `but` is left out, as there may be very much of it."""
        ...

    def read(self, kind: str, start: str, limit: int) -> list[tuple[str, bytes]]:
        """(key, value) of the first `limit` records of one kind whose keys are not below `start`, by key."""
        ...

    def last(self, kind: str, limit: int) -> list[tuple[str, bytes]]:
        """(key, value) of the `limit` records of one kind with the highest keys, by key."""
        ...

    def write(self, records: Sequence[tuple[str, str, bytes | None]]) -> None:
        """One durable transaction (fsync); None deletes."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Environment:
    """A built Python environment: `python` lies in `bin_path`.

    key: hexadecimal digest of its lock, its interpreter and its options.
    interpreter: what it was made of; None where `python` in `bin_path`, not in a job's reach, leads there.
    """

    bin_path: Path
    key: str
    cached: bool
    source: str
    interpreter: Path | None = None


class Environments(Protocol):
    """Builds Python environments, one for each (user, lock), and keeps them."""

    async def build(self, plan: AttemptPlan, tree: Path, progress: Callable[[str], None]) -> Environment:
        """The environment that the plan's spec asks for; `source` names what it came from (`requirements.txt`).

        Raises MeshgpuError `environment` with the last lines of what failed. Cancelling it leaves nothing behind.
        """
        ...


# -- the cloud -------------------------------------------------------------------------------------------------------


class Cloud(Protocol):
    """A seller of instances. It tells what lives; it decides nothing and never asks twice by itself.

    Raises MeshgpuError: `no-capacity` (try another rung), `throttled` (the same again later), `unknown-outcome` (it
    may have happened: the same again, or look), `not-allowed` (credentials or rights), `bad-request`.
    """

    async def rungs(self, settings: BurstSettings) -> tuple[Rung, ...]:
        """Everything that the settings allow, in any order, with today's prices."""
        ...

    async def launch(self, request: LaunchRequest) -> Instance:
        """Rent one instance; with a token that was used before, the instance of that time."""
        ...

    async def instances(self) -> tuple[Instance, ...]:
        """Every instance of this mesh that has not vanished yet, whoever rented it."""
        ...

    async def terminate(self, instance: str) -> None:
        """End an instance; no error if it is gone."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Interruption:
    """The provider takes this rented machine back: at `ends_wall_s` (Unix time), or, None, perhaps soon."""

    ends_wall_s: float | None


class InstanceMetadata(Protocol):
    """What a provider tells a rented machine of itself. Raises MeshgpuError `no-metadata`."""

    async def public_address(self) -> str:
        """The IPv4 address at which the Internet reaches this machine; empty if it has none."""
        ...

    async def interruption(self) -> Interruption | None:
        """Whether the provider is about to take this machine back."""
        ...

    async def close(self) -> None: ...
