"""Names of things: distinct types, so that mypy tells a node from a job."""

import base64
import functools
import hashlib
import re
from typing import Final, NewType

NodeId = NewType("NodeId", str)
"""52 lower-case base32 characters: SHA-256 of the node's Ed25519 public key."""

KeyId = NewType("KeyId", str)
"""The same, of any Ed25519 public key."""

MeshId = NewType("MeshId", str)
"""64 hexadecimal characters: SHA-256 of the signed GENESIS entry."""

Digest = NewType("Digest", str)
"""64 hexadecimal characters: SHA-256 of some bytes."""

NO_DIGEST: Final = Digest("")
"""Of nothing: there is nothing before the first entry of a chain."""

JobId = NewType("JobId", str)
"""26 lower-case base32 characters: 128 bits that only one user's key can have chosen (`job_id`)."""

HoldId = NewType("HoldId", str)
"""26 lower-case base32 characters: 128 random bits of the node that holds."""

UserName = NewType("UserName", str)
"""A user of the mesh, as LINK_USER names it."""

GpuId = NewType("GpuId", str)
"""A GPU's UUID as NVML spells it: `GPU-…` or `MIG-…`."""

Address = NewType("Address", str)
"""`host:port`; the host may be a DNS name, an IPv4 address or a bracketed IPv6 address."""

RANDOM_ID_BYTES: Final = 16
SUFFIX_CHARACTERS: Final = 3
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")


def digest(data: bytes) -> Digest:
    """SHA-256 of `data` in hexadecimal."""
    return Digest(hashlib.sha256(data).hexdigest())


def base32(data: bytes) -> str:
    """RFC 4648 base32, lower case, without padding."""
    return base64.b32encode(data).decode().rstrip("=").lower()


@functools.lru_cache(maxsize=4096)  # each entry of a mesh log names keys, most of them the same
def key_id(public_key: bytes) -> KeyId:
    """Id of an Ed25519 public key of 32 raw bytes."""
    return KeyId(base32(hashlib.sha256(public_key).digest()))


def node_id(public_key: bytes) -> NodeId:
    """Id of the node whose device key is `public_key` (32 raw bytes)."""
    return NodeId(key_id(public_key))


def random_id(random_bytes: bytes) -> str:
    """Turn 16 random bytes into the form of a hold id."""
    assert len(random_bytes) == RANDOM_ID_BYTES
    return base32(random_bytes)


def job_id(key: KeyId, nonce: bytes) -> JobId:
    """The id of a job signed by `key`: nobody else can sign a job of that id, so no two users' jobs ever share one."""
    return JobId(base32(hashlib.sha256(b"meshgpu job" + key.encode() + nonce).digest()[:RANDOM_ID_BYTES]))


def trial_id(sweep: JobId, number: int) -> JobId:
    """The id of a trial of a sweep: as nobody else's as the sweep's own."""
    return JobId(base32(hashlib.sha256(b"meshgpu trial" + sweep.encode() + b"%d" % number).digest()[:RANDOM_ID_BYTES]))


def display_name(name: str, job: JobId, characters: int = SUFFIX_CHARACTERS) -> str:
    """How people see a job: `train-k7q`."""
    return f"{name}-{job[:characters]}"


def is_name(text: str) -> bool:
    """Whether `text` can name a machine, a mesh, a user or a job: 1 to 40 of a-z, 0-9 and inner hyphens."""
    return _NAME.fullmatch(text) is not None


def as_name(text: str, default: str) -> str:
    """The nearest valid name to `text`: `Ada's PC.local` becomes `ada-s-pc-local`."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")
    return name or default
