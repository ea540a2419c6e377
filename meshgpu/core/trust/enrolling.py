"""How a booted instance becomes a member: who may enrol it, which keys it shows, and which mesh log it believes.

User data can be read by whoever may read the account, so it holds no identity: only a certificate that serves the
instance's first listener for 15 minutes. The burst peer pins it and proves that it is the node named in the user data;
the instance makes its own keys and proves to have them; it believes a log that begins with its mesh's genesis, in
which that peer may rent and it is itself a rented machine.
"""

from typing import Final

from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.errors import TrustError
from meshgpu.model.clock import Now
from meshgpu.model.cloud import LaunchId
from meshgpu.model.enrolment import (
    BootTerms,
    EnrolChallenge,
    EnrolClaim,
    EnrolGreeting,
    EnrolRequest,
    EnrolWelcome,
    InstanceKeys,
    KeysMade,
)
from meshgpu.model.ids import Digest, KeyId, MeshId, NodeId, digest, key_id, node_id
from meshgpu.model.trust import Notary, Role, Signed

BOOTSTRAP_LIFE_S: Final = 900.0
"""From making the user data to the end of the bootstrap certificate: an image boots and installs within 10 minutes."""

CONVERSATIONS_LIMIT: Final = 64
"""That wait for their claim: a stranger can open many, and the oldest are forgotten."""


class Enrolment:
    """The instance's side of the bootstrap listener. It is over with the first welcome that holds.

    certificate: digest of the bootstrap certificate (DER). expires_wall_s: when that ends.
    """

    def __init__(
        self, notary: Notary, boot: BootTerms, certificate: Digest, expires_wall_s: float, keys: tuple[bytes, bytes]
    ) -> None:
        """keys: the instance's own public node key and device CA (DER)."""
        self._notary = notary
        self._boot = boot
        self._certificate = certificate
        self._expires_wall_s = expires_wall_s
        self._public_key, self._device_ca = keys
        self._open: dict[bytes, EnrolGreeting] = {}
        self._proven = b""
        self._is_over = False

    def challenge(self, now: Now, greeting: EnrolGreeting, nonce: bytes) -> EnrolChallenge:
        """Step 1, for anybody. Raises TrustError `expired` or `already-enrolled`, as every step does."""
        self._check_open(now)
        while len(self._open) >= CONVERSATIONS_LIMIT:
            del self._open[next(iter(self._open))]
        self._open[nonce] = greeting
        return EnrolChallenge(nonce)

    def keys(self, now: Now, request: EnrolRequest) -> InstanceKeys:
        """Step 2, for the burst peer alone, once for each challenge. Raises TrustError, and then nothing was shown."""
        self._check_open(now)
        claim = self._notary.read(request.claim, self._boot.burst_key, EnrolClaim)
        greeting = self._open.get(claim.instance_nonce)
        if greeting is None:
            raise TrustError("not-allowed", "cannot enrol: the claim belongs to no conversation that is open")
        boot = self._boot
        wanted = EnrolClaim(boot.mesh, boot.launch, self._certificate, greeting.nonce, claim.instance_nonce)
        if claim != wanted:
            raise TrustError("not-allowed", "cannot enrol: the claim is for another launch, or of another conversation")
        del self._open[claim.instance_nonce]
        self._proven = claim.instance_nonce
        made = KeysMade(self._notary.digest(request.claim), digest(self._device_ca))
        return InstanceKeys(self._public_key, self._device_ca, self._notary.sign(key_id(self._public_key), made))

    def welcome(self, now: Now, welcome: EnrolWelcome) -> MeshLog:
        """Step 3: the mesh log to live by. Raises TrustError, and then the peer may try again."""
        self._check_open(now)
        if not self._proven or welcome.conversation != self._proven:
            raise TrustError("not-allowed", "cannot enrol: nobody proved to be the burst peer in this conversation")
        log = _read_log(self._notary, now, self._boot.mesh, welcome.log)
        peer = log.members.get(node_id(self._boot.burst_key))
        if peer is None or peer.role is not Role.BURST:
            raise TrustError("not-allowed", "cannot enrol: whoever rents this machine may not rent for the mesh")
        check_named(log, self._public_key, self._device_ca)
        self._is_over = True
        return log

    def _check_open(self, now: Now) -> None:
        if self._is_over:
            raise TrustError("already-enrolled", "cannot enrol: this machine is in its mesh")
        check_alive(now, self._expires_wall_s)


def check_alive(now: Now, expires_wall_s: float) -> None:
    """Raises TrustError `expired` once a bootstrap certificate is over: without slack, it is a secret many can read."""
    if now.wall_s >= expires_wall_s:
        raise TrustError("expired", "cannot enrol: the 15 minutes of the bootstrap certificate are over")


def claim(
    notary: Notary, key: KeyId, launch: tuple[MeshId, LaunchId], certificate: Digest, nonces: tuple[bytes, bytes]
) -> EnrolRequest:
    """The burst peer's second step. nonces: of its greeting, of the challenge. `key`: its node key."""
    return EnrolRequest(notary.sign(key, EnrolClaim(*launch, certificate, *nonces)))


def check_keys(notary: Notary, request: EnrolRequest, keys: InstanceKeys) -> NodeId:
    """The node that the instance made itself, in answer to this very request. Raises TrustError."""
    made = notary.read(keys.possession, keys.public_key, KeysMade)
    if made != KeysMade(notary.digest(request.claim), digest(keys.device_ca)):
        raise TrustError("not-allowed", "cannot enrol the instance: its keys were not there when it was asked")
    return node_id(keys.public_key)


def check_named(log: MeshLog, public_key: bytes, device_ca: bytes) -> None:
    """Raises TrustError unless these keys are a rented machine of the mesh: no more rights, and no other machine."""
    member = log.members.get(node_id(public_key))
    if member is None:
        raise TrustError("not-a-member", "cannot enrol: the mesh log does not name the instance that showed these keys")
    if member.role is not Role.CLOUD or member.device_ca != device_ca:
        raise TrustError(
            "not-allowed", f"cannot enrol: the mesh log has the instance as a {member.role}, not as rented"
        )


def check_log(notary: Notary, now: Now, mesh: MeshId, entries: tuple[Signed, ...], keys: InstanceKeys) -> None:
    """The burst peer's check before it hands a log out: only to the instance that it names. Raises TrustError."""
    check_named(_read_log(notary, now, mesh, entries), keys.public_key, keys.device_ca)


def _read_log(notary: Notary, now: Now, mesh: MeshId, entries: tuple[Signed, ...]) -> MeshLog:
    log = MeshLog(notary)
    log.enter(mesh, entries)
    log.expire(now)
    return log
