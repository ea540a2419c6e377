"""Signed things, the entries of the mesh log, and the view that the log adds up to."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeVar

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
    CLOUD = "cloud"
    """A rented instance: runs only jobs that allow it; dials nobody, never submits, stewards or invites."""
    BURST = "burst"
    """A rig that may also rent: its own chain adds and removes cloud nodes, and nothing else."""


@dataclass(frozen=True, slots=True)
class Genesis:
    """First entry of the founder's chain: it makes the mesh and its first admin.

    admin_key: 32 raw bytes, the founder's user key. recovery_hash: SHA-256 of the recovery key printed by `init`.
    """

    mesh_name: str
    admin_key: bytes
    recovery_hash: Digest
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
    """Ends a cloud node's membership, because its instance is gone: nothing that it ran lives on. Never undone."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class SetRole:
    """Gives a node another role. Written by admins; `rig` and `burst` only."""

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


LogBody = Genesis | AddNode | LinkUser | RemoveNode | SetRole | SetPolicy


@dataclass(frozen=True, slots=True)
class Head:
    """The newest entry of one author's chain that somebody knows. `seq` counts from 0."""

    author: KeyId
    seq: int
    entry: Digest


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One link of the chain of one admin or burst node (whose key id is its node id, and whose seq 0 names the mesh).

    seq counts from 0 without gaps; previous is the digest of the author's entry before, empty at seq 0;
    heads are the newest entries of other chains that the author had seen.
    """

    mesh: MeshId
    author: KeyId
    seq: int
    previous: Digest
    heads: tuple[Head, ...]
    body: LogBody


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

    secret: 100 random bits, 20 base32 characters. user: whom the new machine belongs to.
    """

    secret: str
    user: UserName
    role: Role
    inviter: KeyId
    expires_wall_s: float
