"""What is said over a pairing connection, before the newcomer is a member."""

from dataclasses import dataclass

from meshgpu.model.ids import Address, Digest, MeshId, NodeId, UserName
from meshgpu.model.trust import Role, Signed


@dataclass(frozen=True, slots=True)
class InviteString:
    """The parts of `mgpu1-…`: enough to find the inviter, to know its mesh, and to prove the right to join.

    genesis: the mesh. inviter: the only node that redeems it. secret: 20 base32 characters (100 bits).
    addresses: where the inviter's pairing listener is.
    """

    genesis: MeshId
    inviter: NodeId
    secret: str
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class Greeting:
    """Newcomer, step 1. nonce: 32 random bytes.

    proof: HMAC-SHA256 with the invite's secret over certificate and nonce: who has no invite learns nothing.
    """

    protocol: int
    nonce: bytes
    proof: bytes


@dataclass(frozen=True, slots=True)
class Introduction:
    """Inviter, step 1: the mesh log, so that the newcomer can check whom it talks to before it proves anything.

    nonce: 32 random bytes. binding: the inviter's node key over a PairingBinding.
    """

    log: tuple[Signed, ...]
    node: NodeId
    nonce: bytes
    binding: Signed


@dataclass(frozen=True, slots=True)
class PairingBinding:
    """What the inviter signs: this TLS certificate and the newcomer's nonce belong to this conversation with me."""

    certificate: Digest
    newcomer_nonce: bytes
    inviter_nonce: bytes


@dataclass(frozen=True, slots=True)
class Newcomer:
    """Who wants to join. public_key, user_key: 32 raw bytes; device_ca: DER.

    uid: the OS account that will be the user's on the new machine. name: what the machine wants to be called.
    """

    public_key: bytes
    device_ca: bytes
    user_key: bytes
    uid: int
    name: str


@dataclass(frozen=True, slots=True)
class Application:
    """Newcomer, step 2: who it is, and the proof that it holds the invite's secret.

    proof: HMAC-SHA256 with the secret over the transcript (`core.trust.joining.transcript`).
    by_node, by_user: a Possession of that transcript, signed by the newcomer's two keys.
    """

    newcomer: Newcomer
    proof: bytes
    by_node: Signed
    by_user: Signed


@dataclass(frozen=True, slots=True)
class Possession:
    """Signed by a newcomer's keys: they are its own, no copies of a member's public ones. about: the transcript."""

    about: Digest


@dataclass(frozen=True, slots=True)
class Welcome:
    """Inviter, step 2: the mesh log with the newcomer in it, and where the inviter's Links are."""

    log: tuple[Signed, ...]
    user: UserName
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class CompareKnock:
    """Joiner, step 1 of comparing digits: who it is, the user it wants, and what fixes its nonce without showing it."""

    protocol: int
    newcomer: Newcomer
    as_user: UserName
    commitment: Digest


@dataclass(frozen=True, slots=True)
class CompareTerms:
    """Admitter, step 1: into which mesh, by whom, as what. public_key: 32 raw bytes; device_ca: DER.

    nonce: 32 random bytes, made for this conversation. binding: the admitter's node key over a CompareBinding.
    """

    mesh: MeshId
    mesh_name: str
    node: NodeId
    public_key: bytes
    device_ca: bytes
    role: Role
    user: UserName
    nonce: bytes
    binding: Signed


@dataclass(frozen=True, slots=True)
class CompareBinding:
    """What the admitter signs: this TLS certificate and this commitment belong to this conversation with me."""

    certificate: Digest
    commitment: Digest
    nonce: bytes
    mesh: MeshId


@dataclass(frozen=True, slots=True)
class CompareReveal:
    """Joiner, step 2: its nonce, and a Possession of the transcript by each of its keys."""

    commitment: Digest
    nonce: bytes
    by_node: Signed
    by_user: Signed


@dataclass(frozen=True, slots=True)
class ComparePress:
    """Joiner, step 3: what its person said of the digits; said again until there is a welcome."""

    commitment: Digest
    same: bool


@dataclass(frozen=True, slots=True)
class CompareOutcome:
    """Admitter, steps 2 and 3: the welcome, once both people agreed."""

    welcome: Welcome | None = None
