"""Signed things, the entries of the mesh log, and the view that the log adds up to."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol, TypeVar

from meshgpu.model.ids import Digest, KeyId, MeshId, NodeId, UserName


@dataclass(frozen=True, slots=True)
class Signed:
    """DSSE: bytes as they were signed, what they are, and one Ed25519 signature (64 bytes) over both.

    `key` is a hint which key to try; only `Notary.read` with a key that the reader trusts turns this into a value.
    """

    kind: str
    payload: bytes
    key: KeyId
    signature: bytes


T = TypeVar("T")


class Notary(Protocol):
    """Signs values and reads signed ones. The core is handed one; it never sees bytes or keys."""

    def sign(self, key: KeyId, value: object) -> Signed:
        """Sign with one of this node's own keys; raises TrustError `no-such-key`."""
        ...

    def read(self, signed: Signed, public_key: bytes, kind: type[T]) -> T:
        """Verify, then decode; raises TrustError, and parses nothing unless the signature holds."""
        ...

    def read_pinned(self, signed: Signed, digest: Digest, kind: type[T]) -> T:
        """Decode what is trusted because its digest is known; raises TrustError where it has another."""
        ...

    def digest(self, signed: Signed) -> Digest:
        """SHA-256 over kind, payload and key: the name of this signed thing."""
        ...


class Role(StrEnum):
    """What a node may do; `admin` is a right of a user's key, not a role of a node."""

    RIG = "rig"
    SUBMITTER = "submitter"
    """A machine that people work at: it lends nothing and holds no jobs, and its users run what they like elsewhere."""
    VIEWER = "viewer"
    """A submitter that only looks on: it sees the machines, and its users' jobs; nothing runs or ends from there."""
    CLOUD = "cloud"
    """A rented instance: runs only jobs that allow it; dials nobody, never submits, stewards or invites."""
    BURST = "burst"
    """A rig that may also rent: its own chain adds and removes cloud nodes, and nothing else."""


OFFICE_ROLES: Final = frozenset({Role.RIG, Role.SUBMITTER, Role.VIEWER, Role.BURST})
"""Of machines that people own; only admins give them."""

LENDING_ROLES: Final = frozenset({Role.RIG, Role.BURST, Role.CLOUD})
"""Of machines that run jobs."""

STEWARD_ROLES: Final = frozenset({Role.RIG, Role.BURST})
"""Of machines that may hold the registers of jobs."""


@dataclass(frozen=True, slots=True)
class Head:
    """The newest entry of one author's chain that somebody knows. `seq` counts from 0."""

    author: KeyId
    seq: int
    entry: Digest


@dataclass(frozen=True, slots=True)
class Genesis:
    """First entry of the founder's chain: it makes the mesh and its first admin.

    admin_key: 32 raw bytes, the founder's user key. recovery_key: 32 raw bytes, the public half of the key that `init`
    prints once; it is an admin that nobody removes, kept where no thief of a machine finds it.
    """

    mesh_name: str
    admin_key: bytes
    recovery_key: bytes
    nonce: bytes


@dataclass(frozen=True, slots=True)
class AddNode:
    """Admits a node: its device key (32 raw bytes), its device CA (DER), its name and whose machine it is.

    expires_wall_s: Unix time at which membership ends by itself; only cloud nodes have one, and must.
    """

    node: NodeId
    public_key: bytes
    device_ca: bytes
    name: str
    role: Role
    owner: UserName
    expires_wall_s: float | None = None


@dataclass(frozen=True, slots=True)
class RemoveNode:
    """Ends a membership, for ever. A burst node writes it of a cloud node, because its instance is gone: nothing that
    it ran lives on. A node of the office writes it of itself, because it leaves."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Revoke:
    """An admin takes a node out, for ever, and with it the keys of all accounts there.

    ends: for each of these keys that is an admin's, its last entry that still counts; without one, none does.
    stops_jobs: whether what was submitted there ends elsewhere too; else it goes on.
    """

    node: NodeId
    ends: tuple[Head, ...]
    stops_jobs: bool


@dataclass(frozen=True, slots=True)
class AddAdmin:
    """Makes a user's key an admin's. public_key: 32 raw bytes. node: whose key it is, so that it falls with it."""

    public_key: bytes
    node: NodeId


@dataclass(frozen=True, slots=True)
class RemoveAdmin:
    """Takes the right from an admin's key, for ever; its user stays one.

    end: its last entry that still counts; None where it had written none.
    """

    key: KeyId
    end: Head | None


@dataclass(frozen=True, slots=True)
class SetRole:
    """Gives a node another role, one of OFFICE_ROLES. Written by admins."""

    node: NodeId
    role: Role


@dataclass(frozen=True, slots=True)
class SetPolicy:
    """What the mesh allows, whole; the newest of the first admin counts.

    may_leave: whether jobs may leave the office for rented instances.
    """

    may_leave: bool


@dataclass(frozen=True, slots=True)
class LinkUser:
    """Says that `public_key` (32 raw bytes) speaks for `user` on `node`, where it belongs to the OS account `uid`."""

    user: UserName
    public_key: bytes
    node: NodeId
    uid: int


@dataclass(frozen=True, slots=True)
class NewKey:
    """The key of one OS account, and the one that takes its place; 32 raw bytes each."""

    before: bytes
    after: bytes


@dataclass(frozen=True, slots=True)
class NewKeys:
    """What every key of a Rekey signs, so that none takes or loses a place without its holder's word.

    node: whose keys change. public_key: its next device key, 32 raw bytes.
    """

    mesh: MeshId
    node: NodeId
    public_key: bytes
    users: tuple[NewKey, ...]


@dataclass(frozen=True, slots=True)
class Rekey:
    """A node of the office goes on under new keys: the last thing its own chain says.

    public_key: its next device key (32 raw bytes), which makes its next id. device_ca: DER. users: keys of the accounts
    there that go on. proofs: one NewKeys, signed by the next device key, then by both keys of each account, in order.
    """

    public_key: bytes
    device_ca: bytes
    users: tuple[NewKey, ...]
    proofs: tuple[Signed, ...]


Body = Genesis | AddNode | LinkUser | RemoveNode | Revoke | AddAdmin | RemoveAdmin | SetRole | SetPolicy | Rekey
Removal = Revoke | RemoveAdmin
"""What takes rights away: it holds even where its author lost his own at the same time."""


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One link of one author's chain: an admin's, or a node's own.

    seq counts from 0 without gaps; previous is the digest of the author's entry before, empty at seq 0;
    heads are the newest entries of other admins' chains that the author had seen.
    """

    mesh: MeshId
    author: KeyId
    seq: int
    previous: Digest
    heads: tuple[Head, ...]
    body: Body


@dataclass(frozen=True, slots=True)
class Member:
    """A node as the mesh log knows it; `name` is unique (of two equal ones the higher id got a suffix).

    expires_wall_s: Unix time at which membership ends by itself; None for all but cloud nodes.
    """

    node: NodeId
    name: str
    public_key: bytes
    device_ca: bytes
    role: Role
    owner: UserName
    expires_wall_s: float | None = None


@dataclass(frozen=True, slots=True)
class UserKey:
    """A key that speaks for a user."""

    user: UserName
    key: KeyId
    public_key: bytes
    node: NodeId
    uid: int
    is_admin: bool


@dataclass(frozen=True, slots=True)
class Invite:
    """The right to join, kept in the memory of the node that made it until it is used or `expires_wall_s` has passed.

    secret: 100 random bits, 20 base32 characters. user: whom the new machines belong to. role: what they may do.
    uses: how many machines it still lets in.
    """

    secret: str
    user: UserName
    role: Role
    inviter: KeyId
    expires_wall_s: float
    uses: int = 1
