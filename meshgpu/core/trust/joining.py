"""How a machine joins with an invite: the string, the transcript, the proof, and what is written to the log.

The inviter shows the mesh log first; the newcomer checks that it begins with the genesis of its invite, that the
inviter is a member, and that the inviter signed this very TLS certificate, before it proves the secret.
"""

import base64
import binascii
import hashlib
import hmac
import re
from dataclasses import dataclass, replace
from typing import Final

from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.errors import BadProof, MeshgpuError, TrustError
from meshgpu.model.clock import Now
from meshgpu.model.ids import Address, Digest, KeyId, MeshId, NodeId, UserName, base32, digest, key_id, node_id
from meshgpu.model.pairing import (
    Application,
    Greeting,
    Introduction,
    InviteString,
    Newcomer,
    PairingBinding,
    Possession,
)
from meshgpu.model.trust import AddNode, Invite, LinkUser, Member, Notary, Role, Signed

INVITE_LIFE_S: Final = 600.0
INVITE_LIFE_MIN_S: Final = 60.0
"""Shorter than it takes to carry a string to another machine."""
INVITE_LIFE_MAX_S: Final = 7 * 86_400.0
"""A string that lies about for longer is forgotten by its maker and found by others."""
USES_LIMIT: Final = 100
"""More than any office images at once."""
CONVERSATIONS_LIMIT: Final = 256
"""Each is over within a second. One that is forgotten looks like a bad proof, so all rigs of an image have room."""
CONVERSATIONS_OF_ONE: Final = 64
"""Of one address: many machines may stand behind one."""
GIVEN_ROLES: Final = (Role.RIG, Role.SUBMITTER, Role.VIEWER)
"""What admins give, to newcomers and by `meshgpu role`; `burst` comes with `meshgpu burst setup`, which asks what may
be spent."""
SECRET_BYTES: Final = 13
"""104 random bits, of which 20 base32 characters carry 100: beyond guessing, so failures need no lock-out."""
SECRET_CHARACTERS: Final = 20
_PREFIX: Final = "mgpu1-"
_STRING: Final = re.compile(r"mgpu1-([0-9a-f]{64})-([a-z2-7]{52})-([a-z2-7]{20})-([a-z2-7]+)-([a-z2-7]{4})")
_MISTYPED: Final = "copy the whole line that `meshgpu invite` printed"


def new_secret(random_bytes: bytes) -> str:
    return base32(random_bytes)[:SECRET_CHARACTERS]


def write_invite(invite: InviteString) -> str:
    """One word: hash of the genesis, inviter, secret, addresses, and four characters that catch a slip."""
    where = base32(" ".join(invite.addresses).encode())
    body = f"{_PREFIX}{invite.genesis}-{invite.inviter}-{invite.secret}-{where}"
    return f"{body}-{_check(body)}"


def read_invite(text: str) -> InviteString:
    """Raises TrustError `bad-invite` that says what is wrong with the string."""
    text = text.strip().lower()
    match = _STRING.fullmatch(text)
    if match is None:
        raise TrustError("bad-invite", "cannot read the invite: it does not have the form mgpu1-…", _MISTYPED)
    if _check(text.rpartition("-")[0]) != match[5]:
        raise TrustError("bad-invite", "cannot read the invite: a character of it is wrong or missing", _MISTYPED)
    where = _unbase32(match[4])
    return InviteString(MeshId(match[1]), NodeId(match[2]), match[3], tuple(Address(a) for a in where.split()))


def transcript(introduction: Introduction, greeting: Greeting, certificate: Digest, newcomer: Newcomer) -> bytes:
    """Everything both sides have seen, in order and unambiguous; the proof is computed over it."""
    parts = [
        b"meshgpu pairing 1",
        greeting.nonce,
        introduction.nonce,
        introduction.node.encode(),
        certificate.encode(),
        newcomer.public_key,
        newcomer.device_ca,
        newcomer.user_key,
        str(newcomer.uid).encode(),
        newcomer.name.encode(),
    ]
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def greet(invite: InviteString, protocol: int, nonce: bytes, certificate: Digest) -> Greeting:
    """The newcomer's first step, to whoever shows `certificate`."""
    return Greeting(protocol, nonce, prove(invite.secret, _greeting_text(nonce, certificate)))


def _greeting_text(nonce: bytes, certificate: Digest) -> bytes:
    return b"meshgpu greeting 1" + nonce + certificate.encode()


def prove(secret: str, about: bytes) -> bytes:
    return hmac.new(secret.encode(), about, hashlib.sha256).digest()


def check_introduction(
    notary: Notary, invite: InviteString, introduction: Introduction, greeting: Greeting, certificate: Digest
) -> MeshLog:
    """The newcomer's check, before it proves anything. Returns the mesh's log; raises TrustError."""
    log = MeshLog(notary)
    log.enter(invite.genesis, introduction.log)
    inviter = log.members.get(invite.inviter)
    if inviter is None or introduction.node != invite.inviter:
        raise TrustError("wrong-mesh", "cannot join: the machine that answered is not the one that made the invite")
    binding = notary.read(introduction.binding, inviter.public_key, PairingBinding)
    if binding != PairingBinding(certificate, greeting.nonce, introduction.nonce):
        raise TrustError("wrong-mesh", "cannot join: somebody stands between this machine and the one that invited it")
    return log


@dataclass(frozen=True, slots=True)
class Grant:
    """What an invite is good for, as its maker says; the newcomer has no say in it. life_s: seconds from now."""

    user: UserName
    role: Role = Role.RIG
    uses: int = 1
    life_s: float = INVITE_LIFE_S


def check_grant(role: Role, uses: int, life_s: float) -> None:
    """Raises MeshgpuError `bad-request` for an invite that nobody should make."""
    if role not in GIVEN_ROLES:
        raise MeshgpuError("bad-request", f"cannot invite a {role}: expected rig, submitter or viewer")
    if not 1 <= uses <= USES_LIMIT:
        raise MeshgpuError(
            "bad-request",
            f"cannot invite {uses} machines at once: expected 1 to {USES_LIMIT}",
            "meshgpu invite --uses 20",
        )
    if not INVITE_LIFE_MIN_S <= life_s <= INVITE_LIFE_MAX_S:
        raise MeshgpuError(
            "bad-request",
            f"cannot make an invite that lives for {life_s:g} s: expected one minute to seven days",
            "meshgpu invite --for 8h",
        )


class Conversations:
    """Those that were greeted and have not applied yet.

    Whoever has an invite can open many, so each address loses its own oldest first. certificate: what they all see.
    """

    def __init__(self) -> None:
        self._open: dict[bytes, tuple[str, Greeting, Introduction]] = {}  # by our nonce, oldest first

    def begin(self, host: str, greeting: Greeting, introduction: Introduction) -> None:
        """Remember one of `host`, an IP address."""
        its_own = [nonce for nonce, (other, _, _) in self._open.items() if other == host]
        if len(its_own) >= CONVERSATIONS_OF_ONE:
            del self._open[its_own[0]]
        elif len(self._open) >= CONVERSATIONS_LIMIT:
            del self._open[next(iter(self._open))]
        self._open[introduction.nonce] = (host, greeting, introduction)

    def transcripts(self, certificate: Digest, newcomer: Newcomer) -> dict[bytes, bytes]:
        """What each would have led to, had `newcomer` begun it; {our nonce: transcript}."""
        return {
            nonce: transcript(introduction, greeting, certificate, newcomer)
            for nonce, (_, greeting, introduction) in self._open.items()
        }

    def end(self, nonce: bytes) -> None:
        del self._open[nonce]


class Invites:
    """The invites that this node made. Each use is redeemed here, one machine at a time, before it expires."""

    def __init__(self) -> None:
        self._open: dict[str, Invite] = {}

    def create(self, now: Now, secret: str, grant: Grant, inviter: KeyId) -> Invite:
        invite = Invite(secret, grant.user, grant.role, inviter, now.wall_s + grant.life_s, grant.uses)
        self._open[secret] = invite
        return invite

    def drop_expired(self, now: Now) -> tuple[Invite, ...]:
        """Forget invites whose time is over, and say which."""
        expired = tuple(invite for invite in self._open.values() if now.wall_s >= invite.expires_wall_s)
        for invite in expired:
            del self._open[invite.secret]
        return expired

    @property
    def is_empty(self) -> bool:
        return not self._open

    def check_greeting(self, now: Now, greeting: Greeting, certificate: Digest) -> None:
        """Raises BadProof unless an open invite's secret made it for this certificate. Uses nothing up."""
        about = _greeting_text(greeting.nonce, certificate)
        self.drop_expired(now)
        if not any(hmac.compare_digest(prove(secret, about), greeting.proof) for secret in self._open):
            raise _not_invited()

    def redeem(self, now: Now, proof: bytes, transcripts: dict[bytes, bytes]) -> tuple[bytes, Invite]:
        """Take one use of the invite whose secret made `proof` over one of `transcripts`; {our nonce: transcript}.

        Returns that nonce and the invite with the uses that are left. Raises BadProof, and then nothing was used.
        """
        self.drop_expired(now)
        for nonce, about in transcripts.items():
            for invite in self._open.values():
                if hmac.compare_digest(prove(invite.secret, about), proof):
                    return nonce, self._change(invite, -1)
        raise _not_invited()

    def give_back(self, invite: Invite) -> None:
        """Undo one `redeem`: nobody was let in by it. An invite that was used up is open again, until its end."""
        self._change(self._open.get(invite.secret, replace(invite, uses=0)), +1)

    def _change(self, invite: Invite, by: int) -> Invite:
        changed = replace(invite, uses=invite.uses + by)
        if changed.uses:
            self._open[invite.secret] = changed
        else:
            del self._open[invite.secret]
        return changed


def _not_invited() -> BadProof:
    reason = "cannot join: the invite was used before, has expired, or is not from here"
    return BadProof("bad-invite", reason, "meshgpu invite")


def apply(
    notary: Notary, invite: InviteString, introduction: Introduction, greeting: Greeting, certificate: Digest,
    newcomer: Newcomer,
) -> Application:  # fmt: skip
    """The newcomer's second step; `notary` holds its keys."""
    about = transcript(introduction, greeting, certificate, newcomer)
    possession = Possession(digest(about))
    by_node = notary.sign(key_id(newcomer.public_key), possession)
    by_user = notary.sign(key_id(newcomer.user_key), possession)
    return Application(newcomer, prove(invite.secret, about), by_node, by_user)


def check_possession(notary: Notary, log: MeshLog, application: Application, about: bytes) -> None:
    """The newcomer's keys are its own and new to the mesh. Raises TrustError; BadProof where they are not its own."""
    newcomer = application.newcomer
    for signed, key in ((application.by_node, newcomer.public_key), (application.by_user, newcomer.user_key)):
        if notary.read(signed, key, Possession) != Possession(digest(about)):
            raise BadProof("bad-invite", "cannot admit a machine: its keys were not there when it asked")
    if node_id(newcomer.public_key) in log.members or key_id(newcomer.user_key) in log.users:
        raise TrustError("bad-invite", "cannot admit a machine: one of its keys is a member's already")


def membership(log: MeshLog, newcomer: Newcomer) -> Member | None:
    """What the newcomer is in this log, with these very keys; None where it is no member, or its account no user."""
    member = log.members.get(node_id(newcomer.public_key))
    if member is None or member.device_ca != newcomer.device_ca:
        return None
    account = log.account(member.node, newcomer.uid)
    return member if account is not None and account.public_key == newcomer.user_key else None


def check_name(log: MeshLog, name: str) -> None:
    """No newcomer takes the name under which people know a machine. Raises TrustError `name-taken`."""
    if log.member_named(name) is not None:
        taken = f"cannot join as {name}: the mesh {log.mesh_name} has a machine of that name"
        raise TrustError("name-taken", taken, "meshgpu join --name ANOTHER …")


def admit(log: MeshLog, invite: Invite, newcomer: Newcomer) -> tuple[Signed, ...]:
    """The log entries that make the newcomer a member and its account the invited user's. Raises TrustError."""
    node = node_id(newcomer.public_key)
    added = AddNode(node, newcomer.public_key, newcomer.device_ca, newcomer.name, invite.role, invite.user)
    linked = LinkUser(invite.user, newcomer.user_key, node, newcomer.uid)
    return log.write(invite.inviter, (added, linked))


def _check(text: str) -> str:
    return base32(hashlib.sha256(text.encode()).digest())[:4]


def _unbase32(text: str) -> str:
    try:
        return base64.b32decode(text.upper() + "=" * (-len(text) % 8)).decode()
    except (binascii.Error, UnicodeDecodeError) as error:
        raise TrustError("bad-invite", "cannot read the invite: its addresses are garbled", _MISTYPED) from error
