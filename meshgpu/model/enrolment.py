"""What makes a booted instance a member: what its user data tells it, and what is said over its bootstrap listener."""

from dataclasses import dataclass

from meshgpu.model.cloud import LaunchId
from meshgpu.model.ids import Digest, MeshId
from meshgpu.model.trust import Signed


@dataclass(frozen=True, slots=True)
class InstanceTerms:
    """When an instance ends itself: at `lease_ends_wall_s` (Unix time), and after idle_s without work or no_contact_s
    without a Link."""

    lease_ends_wall_s: float
    idle_s: float
    no_contact_s: float


@dataclass(frozen=True, slots=True)
class BootTerms:
    """What user data tells an instance: its mesh, its launch, who may enrol it, where to listen, and how long it lives.

    burst_key: public node key of the burst peer that rents it, 32 raw bytes.
    """

    mesh: MeshId
    launch: LaunchId
    burst_key: bytes
    port: int
    terms: InstanceTerms


@dataclass(frozen=True, slots=True)
class EnrolGreeting:
    """Burst peer, step 1. nonce: 32 random bytes."""

    protocol: int
    nonce: bytes


@dataclass(frozen=True, slots=True)
class EnrolChallenge:
    """Instance, step 1. nonce: 32 random bytes, which name the conversation."""

    nonce: bytes


@dataclass(frozen=True, slots=True)
class EnrolClaim:
    """Signed by the burst peer's node key: I rent this launch, and hold this conversation over this certificate."""

    mesh: MeshId
    launch: LaunchId
    certificate: Digest
    peer_nonce: bytes
    instance_nonce: bytes


@dataclass(frozen=True, slots=True)
class EnrolRequest:
    """Burst peer, step 2. claim: an EnrolClaim."""

    claim: Signed


@dataclass(frozen=True, slots=True)
class InstanceKeys:
    """Instance, step 2: the keys that it made. public_key: 32 raw bytes; device_ca: DER.

    possession: a KeysMade, signed by that key.
    """

    public_key: bytes
    device_ca: bytes
    possession: Signed


@dataclass(frozen=True, slots=True)
class KeysMade:
    """Signed by the instance's new node key, in answer to one claim. claim: digest of the signed claim."""

    claim: Digest
    device_ca: Digest


@dataclass(frozen=True, slots=True)
class EnrolWelcome:
    """Burst peer, step 3: the mesh log with the instance in it. conversation: the instance's nonce."""

    conversation: bytes
    log: tuple[Signed, ...]
