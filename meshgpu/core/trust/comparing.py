"""How two people who compare six digits know that nobody stands between their machines.

The joiner commits to its nonce before it sees the admitter's, and shows it only afterwards: who stands between the two
has fixed both of its own nonces before it can know either side's digits, so a guess is right once in a million
(Bluetooth Core 5.4, vol 3 part H, 2.3.5.6.2, numeric comparison).
"""

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.errors import TrustError
from meshgpu.model.ids import Digest, MeshId, NodeId, UserName, digest, node_id
from meshgpu.model.pairing import Newcomer
from meshgpu.model.trust import Notary, Role, Signed

NONCE_BYTES: Final = 32
"""Too many to guess: a commitment must not give its nonce away."""


@dataclass(frozen=True, slots=True)
class Knock:
    """What the joiner says first. as_user: the name it wants; certificate: of the listener that it sees."""

    newcomer: Newcomer
    as_user: UserName
    certificate: Digest


@dataclass(frozen=True, slots=True)
class Terms:
    """What the admitter answers: into which mesh, by whom, as what. public_key: 32 raw bytes, of its node."""

    mesh: MeshId
    mesh_name: str
    node: NodeId
    public_key: bytes
    device_ca: bytes
    role: Role
    user: UserName


def commit(knock: Knock, joiner_nonce: bytes) -> Digest:
    """Bind the joiner to its nonce and to all that it says of itself, without showing the nonce."""
    return digest(_unambiguous([b"meshgpu commitment 1", joiner_nonce, *_knock_parts(knock)]))


def check_commitment(commitment: Digest, knock: Knock, joiner_nonce: bytes) -> None:
    """The admitter's check of the nonce that was shown. Raises TrustError `bad-invite`."""
    is_nonce = len(joiner_nonce) == NONCE_BYTES
    if not (is_nonce and hmac.compare_digest(commit(knock, joiner_nonce), commitment)):
        raise TrustError(
            "bad-invite",
            "cannot compare digits with the joining machine: it showed another nonce than it had committed to",
            "meshgpu admit",
        )


def transcript(knock: Knock, terms: Terms, joiner_nonce: bytes, admitter_nonce: bytes) -> bytes:
    """Everything both sides have said, in order and unambiguous."""
    said = [
        terms.mesh.encode(),
        terms.mesh_name.encode(),
        terms.node.encode(),
        terms.public_key,
        terms.device_ca,
        terms.role.encode(),
        terms.user.encode(),
    ]
    return _unambiguous([b"meshgpu comparison 1", *_knock_parts(knock), *said, joiner_nonce, admitter_nonce])


def digits(about: bytes) -> str:
    """Six digits of a transcript as people read them, `123 456`."""
    number = int.from_bytes(hashlib.sha256(about).digest(), "big") % 1_000_000
    return f"{number // 1000:03} {number % 1000:03}"


def check_welcome(notary: Notary, knock: Knock, terms: Terms, entries: Iterable[Signed]) -> MeshLog:
    """The joiner's check that it got what the digits stood for. Returns the mesh's log; raises TrustError."""
    log = MeshLog(notary)
    log.enter(terms.mesh, entries)
    admitter, me = log.members.get(terms.node), log.members.get(node_id(knock.newcomer.public_key))
    if admitter is None or (admitter.public_key, admitter.device_ca) != (terms.public_key, terms.device_ca):
        raise TrustError("wrong-mesh", "cannot join: the machine whose digits were compared is no member of the mesh")
    if me is None:
        raise TrustError("wrong-mesh", "cannot join: the admin's machine did not add this one to the mesh")
    account = log.account(me.node, knock.newcomer.uid)
    given = (me.device_ca, me.name, me.role, me.owner, account and (account.user, account.public_key))
    newcomer = knock.newcomer
    said = (newcomer.device_ca, newcomer.name, terms.role, terms.user, (terms.user, newcomer.user_key))
    if given != said or log.mesh_name != terms.mesh_name:
        raise TrustError("wrong-mesh", "cannot join: this machine was let in as something else than was compared")
    return log


def choose_user(log: MeshLog, admin: UserName, proposed: UserName, said: UserName | None) -> UserName:
    """Whose the new machine will be: whom the admin `said`, else whom it `proposed` itself.

    Raises TrustError `name-taken` where it proposes a user of the mesh other than `admin`: nobody becomes a known
    colleague by typing her name.
    """
    if said is not None:
        return said
    if proposed != admin and any(account.user == proposed for account in log.users.values()):
        taken = (
            f"cannot join as {proposed}: the mesh {log.mesh_name} has a user of that name, and the admin did not say"
        )
        raise TrustError("name-taken", taken, f"the admin, if it is the same person: meshgpu admit --user {proposed}")
    return proposed


def _knock_parts(knock: Knock) -> list[bytes]:
    newcomer = knock.newcomer
    return [
        newcomer.public_key,
        newcomer.device_ca,
        newcomer.user_key,
        str(newcomer.uid).encode(),
        newcomer.name.encode(),
        knock.as_user.encode(),
        knock.certificate.encode(),
    ]


def _unambiguous(parts: list[bytes]) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)
