"""Every method × every role × every wrong credential: refused before anything of ours is called.

Which of the many ways to be wrong are tried follows what gRPC's TLS was seen to let through and what attackers hold:
no certificate, somebody else's, an old one, one that names another in each field that has a name, one made by a leaf.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from meshgpu.adapters.grpc_link import GrpcLink
from meshgpu.model.ids import NodeId, node_id
from meshgpu.model.trust import Role
from meshgpu.ports import Anchor, LinkEvent
from meshgpu.wire.certificates import make_device_ca, make_leaf, pem, server_name
from tests.adapters.test_grpc_gate import HELLO, Leaf, Member, WallClock

pytestmark = pytest.mark.slow

METHODS = ("Link", "Bulk", "Serve")
NOW = datetime.now(UTC)
DAY = timedelta(days=1)
VALID = (NOW - DAY, NOW + DAY)
RSA_KEY = rsa.generate_private_key(65537, 2048)
Key = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
Issuer = tuple[x509.Certificate, Key]


@dataclass
class Cast:
    """Who is there: the listener, a member who cheats, the member that it would like to be, and nobody."""

    listener: Member
    cheat: Member
    victim: Member
    nobody: ed25519.Ed25519PrivateKey

    @property
    def nobodys_ca(self) -> x509.Certificate:
        return make_device_ca(self.nobody)

    @property
    def nobodys_name(self) -> str:
        return server_name(node_id(self.nobody.public_key().public_bytes_raw()))


def proper(
    name: str, ca: x509.Certificate, signer: ed25519.Ed25519PrivateKey, validity: tuple[datetime, datetime] = VALID
) -> Leaf:
    """As a member makes its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    return Leaf(_private(key), pem(make_leaf(key, name, validity, (ca, signer))))


def improper(
    names: Sequence[x509.GeneralName],
    issuer: Issuer | None,
    common_name: str,
    chain: bytes = b"",
    key: Key | None = None,
    *,
    is_authority: bool = False,
) -> Leaf:
    """With any names, from any issuer (None: itself); chain: further certificates that are shown with it."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
    builder = (
        x509.CertificateBuilder(issuer[0].subject if issuer else subject, subject, key.public_key(), 7)
        .not_valid_before(VALID[0])
        .not_valid_after(VALID[1])
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if is_authority:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    signer = issuer[1] if issuer else key
    certificate = builder.sign(signer, None if isinstance(signer, ed25519.Ed25519PrivateKey) else SHA256())
    return Leaf(_private(key), pem(certificate) + chain)


def minted(cast: Cast) -> Leaf:
    """By the cheat's leaf, which is no authority, in the victim's name."""
    key = ec.generate_private_key(ec.SECP256R1())
    own = make_leaf(key, str(cast.cheat.own_name.value), VALID, (cast.cheat.ca, cast.cheat.signer))
    return improper([cast.victim.own_name], (own, key), cast.victim.id, pem(own))


def minted_by_authority(cast: Cast) -> Leaf:
    """The same by a leaf that says of itself that it is one, which its CA's path length forbids."""
    key = ec.generate_private_key(ec.SECP256R1())
    own = improper([cast.cheat.own_name], (cast.cheat.ca, cast.cheat.signer), "x", key=key, is_authority=True)
    authority = x509.load_pem_x509_certificate(own.certificate)
    return improper([cast.victim.own_name], (authority, key), cast.victim.id, own.certificate)


def _private(key: Key) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


CREDENTIALS: dict[str, Callable[[Cast], Leaf | None]] = {
    "no certificate": lambda _: None,
    "alien CA": lambda c: proper(c.nobodys_name, c.nobodys_ca, c.nobody),
    "alien CA in the victim's name": lambda c: improper([c.victim.own_name], (c.nobodys_ca, c.nobody), c.victim.id),
    "expired": lambda c: proper(
        str(c.cheat.own_name.value), c.cheat.ca, c.cheat.signer, (NOW - 9 * DAY, NOW - 2 * DAY)
    ),
    "not yet valid": lambda c: proper(
        str(c.cheat.own_name.value), c.cheat.ca, c.cheat.signer, (NOW + DAY, NOW + 3 * DAY)
    ),
    "revoked": lambda c: proper(str(c.cheat.own_name.value), c.cheat.ca, c.cheat.signer),
    "forged CN": lambda c: improper([], (c.cheat.ca, c.cheat.signer), c.victim.id),
    "forged URI": lambda c: improper(
        [x509.UniformResourceIdentifier(f"spiffe://{c.victim.own_name.value}")], (c.cheat.ca, c.cheat.signer), "x"
    ),
    "forged SAN": lambda c: improper([c.victim.own_name], (c.cheat.ca, c.cheat.signer), "x"),
    "two SANs": lambda c: improper([c.cheat.own_name, c.victim.own_name], (c.cheat.ca, c.cheat.signer), "x"),
    "self-signed in the victim's name": lambda c: improper([c.victim.own_name], None, c.victim.id),
    "minted by a member's leaf": minted,
    "minted by a leaf that calls itself a CA": minted_by_authority,
    "a member's device CA instead of a leaf": lambda c: Leaf(_private(c.cheat.signer), pem(c.cheat.ca)),
    "Ed25519 key": lambda c: improper([c.cheat.own_name], (c.cheat.ca, c.cheat.signer), "x", key=c.cheat.signer),
    "RSA key in the victim's name": lambda c: improper(
        [c.victim.own_name], (c.cheat.ca, c.cheat.signer), "x", key=RSA_KEY
    ),
    "CA in the victim's name": lambda c: improper(
        [c.victim.own_name], (c.cheat.ca, c.cheat.signer), "x", is_authority=True
    ),
    "the listener's own": lambda c: proper(str(c.listener.own_name.value), c.listener.ca, c.listener.signer),
}


async def call(method: str, who: Leaf | None, listener: Member, port: int) -> bytes:
    """What the listener says first."""
    private, certificate = (who.private, who.certificate) if who else (None, None)
    credentials = grpc.ssl_channel_credentials(pem(listener.ca), private, certificate)  # type: ignore[no-untyped-call]  # no types
    options = [("grpc.ssl_target_name_override", listener.own_name.value)]
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        opened: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
        opened = channel.stream_stream(f"/meshgpu.wire.v1.Mesh/{method}")
        stream = opened(timeout=5)
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await stream.write(HELLO)
            await stream.done_writing()
        answer = await stream.read()
        assert isinstance(answer, bytes), await stream.code()
        return answer


@pytest.fixture
def cast(tmp_path: Path) -> Cast:
    listener, cheat, victim = (Member(tmp_path / name) for name in ("listener", "cheat", "victim"))
    return Cast(listener, cheat, victim, ed25519.Ed25519PrivateKey.generate())


@pytest.fixture
async def heard(cast: Cast) -> AsyncIterator[tuple[GrpcLink, int, list[object]]]:
    """A listener, its port, and everything of ours that was called."""
    calls: list[object] = []

    async def bulk(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
        calls.append((peer, request))
        yield b"served"

    def emit(event: LinkEvent) -> None:
        calls.append(event)

    link = GrpcLink(cast.listener.keys, WallClock(), ["127.0.0.1"], 0)
    port = await link.start(emit, bulk)
    yield link, port, calls
    await link.stop()


@pytest.mark.parametrize("method", ["Link", "Bulk"])
async def test_proper_certificate_is_let_in(cast: Cast, heard: tuple[GrpcLink, int, list[object]], method: str) -> None:
    """Else all that follows would prove nothing."""
    link, port, calls = heard
    link.trust([cast.cheat.anchor, cast.victim.anchor])
    assert await call(
        method, proper(str(cast.cheat.own_name.value), cast.cheat.ca, cast.cheat.signer), cast.listener, port
    )
    assert calls


@pytest.mark.parametrize("kind", ["P-384", "RSA", "calls itself a CA"])
async def test_leaf_of_another_kind_is_its_own_member_and_nobody_else(
    cast: Cast, heard: tuple[GrpcLink, int, list[object]], kind: str
) -> None:
    """What a member makes of its own name harms nobody: it is known as itself."""
    link, port, calls = heard
    link.trust([cast.cheat.anchor, cast.victim.anchor])
    keys: dict[str, Key] = {"P-384": ec.generate_private_key(ec.SECP384R1()), "RSA": RSA_KEY}
    issuer = cast.cheat.ca, cast.cheat.signer
    who = improper([cast.cheat.own_name], issuer, cast.victim.id, key=keys.get(kind), is_authority=kind not in keys)
    assert await call("Bulk", who, cast.listener, port) == b"served"
    assert calls == [(cast.cheat.id, HELLO)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("credential", CREDENTIALS)
async def test_wrong_credential_is_refused(
    cast: Cast, heard: tuple[GrpcLink, int, list[object]], credential: str, role: Role, method: str
) -> None:
    link, port, calls = heard
    anchors = [Anchor(m.id, m.anchor.device_ca, role is Role.CLOUD) for m in (cast.cheat, cast.victim)]
    link.trust([cast.listener.anchor, *anchors])
    if credential == "revoked":
        link.trust([cast.listener.anchor, *(anchor for anchor in anchors if anchor.node != cast.cheat.id)])
    with pytest.raises(grpc.aio.AioRpcError):
        await call(method, CREDENTIALS[credential](cast), cast.listener, port)
    assert calls == []
