"""Who is let in: every kind of forged or foreign leaf, against the listener over TLS and the check behind it."""

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from meshgpu.adapters.grpc_link import GrpcLink
from meshgpu.adapters.grpc_link.gate import Gate
from meshgpu.adapters.key_files import KeyFiles
from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.clock import Now
from meshgpu.model.ids import NodeId, node_id
from meshgpu.ports import Anchor, LinkEvent
from meshgpu.wire.certificates import make_device_ca, pem, server_name
from meshgpu.wire.grpc_calls import Context

HELLO = b'{"version": 1, "instance": "x", "dial": 1}'


class WallClock:
    def now(self) -> Now:
        return Now(0.0, time.time(), "boot")


class Member:
    def __init__(self, directory: Path) -> None:
        self.keys = KeyFiles(directory)
        self.id = node_id(self.keys.node_key())
        self.anchor = Anchor(self.id, self.keys.device_ca())
        self.ca = x509.load_der_x509_certificate(self.keys.device_ca())
        signer = load_pem_private_key((directory / "node.pem").read_bytes(), None)
        assert isinstance(signer, ed25519.Ed25519PrivateKey)
        self.signer = signer
        self.own_name = x509.DNSName(server_name(self.id))


@dataclass
class Leaf:
    private: bytes
    certificate: bytes


def leaf(
    names: Sequence[x509.GeneralName] | None,
    issuer: tuple[x509.Certificate, ed25519.Ed25519PrivateKey] | None,
    common_name: str = "x",
) -> Leaf:
    """A leaf that is right in all but its names and its issuer (None: itself)."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder(issuer[0].subject if issuer else subject, subject, key.public_key(), 7)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
    )
    if names is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    certificate = builder.sign(issuer[1], None) if issuer else builder.sign(key, SHA256())
    return Leaf(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), pem(certificate))


@pytest.fixture
def members(tmp_path: Path) -> tuple[Member, Member, Member]:
    """The listener, a member that cheats, and the member that it would like to be."""
    return Member(tmp_path / "listener"), Member(tmp_path / "cheat"), Member(tmp_path / "victim")


FORGERIES = (
    "self-signed",
    "stranger",
    "stranger as victim",
    "cheat as victim",
    "no DNS name",
    "no names",
    "two DNS names",
    "same name twice",
    "own name and URI",
    "name beneath its own",
    "upper case",
    "the listener itself",
)


def forge(kind: str, listener: Member, cheat: Member, victim: Member) -> Leaf:
    stranger_key = ed25519.Ed25519PrivateKey.generate()
    stranger = make_device_ca(stranger_key), stranger_key
    by_cheat = cheat.ca, cheat.signer
    uri = x509.UniformResourceIdentifier(f"spiffe://{victim.own_name.value}")
    stranger_name = x509.DNSName(server_name(node_id(stranger_key.public_key().public_bytes_raw())))
    match kind:
        case "self-signed":
            return leaf([victim.own_name], None)
        case "stranger":
            return leaf([stranger_name], stranger)
        case "stranger as victim":
            return leaf([victim.own_name], stranger)
        case "cheat as victim":
            return leaf([victim.own_name], by_cheat)
        case "no DNS name":
            return leaf([uri], by_cheat, common_name=victim.id)
        case "no names":
            return leaf(None, by_cheat, common_name=victim.id)
        case "two DNS names":
            return leaf([cheat.own_name, x509.DNSName(f"b.{cheat.own_name.value}")], by_cheat)
        case "same name twice":
            return leaf([cheat.own_name, cheat.own_name], by_cheat)
        case "own name and URI":
            return leaf([cheat.own_name, uri], by_cheat)
        case "name beneath its own":
            return leaf([x509.DNSName(f"{victim.id}.{cheat.own_name.value}")], by_cheat)
        case "upper case":
            return leaf([x509.DNSName(cheat.own_name.value.upper())], by_cheat)
        case _:
            return leaf([listener.own_name], (listener.ca, listener.signer))


async def link_as(who: Leaf | None, listener: Member, port: int) -> bytes:
    """Open a Link; returns the listener's hello."""
    private, certificate = (who.private, who.certificate) if who else (None, None)
    credentials = grpc.ssl_channel_credentials(pem(listener.ca), private, certificate)  # type: ignore[no-untyped-call]  # no types
    options = [("grpc.ssl_target_name_override", listener.own_name.value)]
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream("/meshgpu.wire.v1.Mesh/Link")(timeout=5)
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(HELLO)
        return cast(bytes, await call.read())


async def no_bulk(peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
    yield b""


@pytest.fixture
async def listening(members: tuple[Member, Member, Member]) -> AsyncIterator[tuple[GrpcLink, int, list[LinkEvent]]]:
    listener, cheat, victim = members
    link = GrpcLink(listener.keys, WallClock(), ["127.0.0.1"], 0)
    events: list[LinkEvent] = []
    port = await link.start(events.append, no_bulk)
    link.trust([listener.anchor, cheat.anchor, victim.anchor])
    yield link, port, events
    await link.stop()


async def test_member_with_a_leaf_of_its_own_is_let_in(
    members: tuple[Member, Member, Member], listening: tuple[GrpcLink, int, list[LinkEvent]]
) -> None:
    listener, cheat, _ = members
    _, port, events = listening
    assert b"version" in await link_as(leaf([cheat.own_name], (cheat.ca, cheat.signer)), listener, port)
    assert len(events) >= 1


@pytest.mark.parametrize("kind", [*FORGERIES, "no certificate"])
async def test_forged_leaf_opens_no_link(
    members: tuple[Member, Member, Member], listening: tuple[GrpcLink, int, list[LinkEvent]], kind: str
) -> None:
    _, port, events = listening
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await link_as(None if kind == "no certificate" else forge(kind, *members), members[0], port)
    assert raised.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.PERMISSION_DENIED), kind
    assert events == []


@pytest.mark.parametrize("kind", ["own", *FORGERIES])
async def test_without_anchors_nobody_is_let_in(
    members: tuple[Member, Member, Member], listening: tuple[GrpcLink, int, list[LinkEvent]], kind: str
) -> None:
    link, port, events = listening
    link.trust([])
    _, cheat, _ = members
    who = leaf([cheat.own_name], (cheat.ca, cheat.signer)) if kind == "own" else forge(kind, *members)
    with pytest.raises(grpc.aio.AioRpcError):
        await link_as(who, members[0], port)
    assert events == []


# -- the check behind TLS --------------------------------------------------------------------------------------------


class Shown:
    """A call whose TLS let this certificate through."""

    def __init__(self, *certificates: bytes) -> None:
        self._certificates = certificates

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": list(self._certificates)} if self._certificates else {}


def authorise(gate: Gate, *certificates: bytes) -> NodeId:
    return gate.authorise(cast(Context, Shown(*certificates)))


@pytest.fixture
def gate(members: tuple[Member, Member, Member]) -> Gate:
    gate = Gate(members[0].keys, WallClock())
    gate.trust([member.anchor for member in members])
    return gate


def test_check_names_the_member(members: tuple[Member, Member, Member], gate: Gate) -> None:
    _, cheat, _ = members
    assert authorise(gate, leaf([cheat.own_name], (cheat.ca, cheat.signer)).certificate) == cheat.id
    gate.trust([])
    with pytest.raises(TrustError):
        authorise(gate, leaf([cheat.own_name], (cheat.ca, cheat.signer)).certificate)


@pytest.mark.parametrize("kind", FORGERIES)
def test_check_refuses_what_tls_might_let_through(
    members: tuple[Member, Member, Member], gate: Gate, kind: str
) -> None:
    with pytest.raises(TrustError):
        authorise(gate, forge(kind, *members).certificate)


def test_check_wants_exactly_one_certificate(members: tuple[Member, Member, Member], gate: Gate) -> None:
    _, cheat, _ = members
    good = leaf([cheat.own_name], (cheat.ca, cheat.signer)).certificate
    for shown in ((), (good, good), (b"",), (b"junk",)):
        with pytest.raises(TrustError):
            authorise(gate, *shown)


# -- the trust bundle ------------------------------------------------------------------------------------------------


def test_bundle_leaves_out_whom_a_device_ca_does_not_fit(members: tuple[Member, Member, Member], gate: Gate) -> None:
    _, cheat, victim = members
    gone = gate.trust([Anchor(victim.id, cheat.anchor.device_ca), Anchor(cheat.id, b"junk")])
    assert sorted(gone) == sorted([cheat.id, victim.id])
    for peer in (cheat, victim):
        with pytest.raises(TrustError):
            gate.channel_credentials(peer.id)


def test_only_whoever_changed_is_gone(members: tuple[Member, Member, Member], gate: Gate) -> None:
    _, cheat, victim = members
    assert gate.trust([cheat.anchor, victim.anchor]) == []
    renewed = Anchor(cheat.id, make_device_ca(cheat.signer).public_bytes(Encoding.DER))
    assert gate.trust([renewed, victim.anchor]) == [cheat.id]
    assert gate.trust([renewed]) == [victim.id]


def test_listener_configuration_changes_only_with_leaf_or_bundle(
    members: tuple[Member, Member, Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    listener, cheat, _ = members
    gate = Gate(listener.keys, WallClock())
    assert gate._shown.roots == pem(listener.ca)
    assert gate._refresh() is None
    gate.trust([cheat.anchor])
    assert gate._refresh() is not None
    assert gate._refresh() is None
    monkeypatch.setattr(listener.keys, "_leaf", None)
    assert gate._refresh() is not None
    assert gate._refresh() is None


@pytest.mark.parametrize("fault", [MeshgpuError("bad-key", "cannot read it"), OSError(5, "I/O"), RuntimeError("a bug")])
def test_broken_keys_do_not_keep_a_revoked_member(
    members: tuple[Member, Member, Member],
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: Exception,
) -> None:
    """Whatever is raised: gRPC would go on with the old bundle, without a word."""

    def broken(now_wall_s: float) -> Any:
        raise fault

    _, cheat, victim = members
    gate._refresh()
    monkeypatch.setattr(members[0].keys, "leaf", broken)
    assert gate._refresh() is None
    assert [(record.levelname, record.message) for record in caplog.records] == [("ERROR", "leaf not renewed")]
    gate.trust([victim.anchor])
    assert gate._refresh() is not None
    assert pem(cheat.ca) not in gate._shown.roots
    gate.trust([])
    assert gate._refresh() is not None
    assert gate._shown.roots == pem(members[0].ca)


# -- sessions that are taken up again --------------------------------------------------------------------------------

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
SETTINGS = 4


class Resumer:
    """A TLS client that shows a member's leaf and takes up its last session where it has one."""

    def __init__(self, directory: Path, who: Leaf, port: int) -> None:
        (directory / "shown.pem").write_bytes(who.private + who.certificate)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.check_hostname = False
        self._context.verify_mode = ssl.CERT_NONE  # whom it talks to is not what is tested
        self._context.load_cert_chain(directory / "shown.pem")
        self._context.set_alpn_protocols(["h2"])
        self._port = port
        self._session: ssl.SSLSession | None = None

    def connect(self) -> tuple[bool, bool]:
        """(whether the session was taken up, whether the listener spoke HTTP/2 to us). Blocks."""
        with (
            socket.create_connection(("127.0.0.1", self._port), 5) as plain,
            self._context.wrap_socket(plain, session=self._session) as connection,
        ):
            try:
                connection.sendall(PREFACE)
                answer = connection.recv(9)
            except (ssl.SSLError, ConnectionError):
                return bool(connection.session_reused), False
            self._session = connection.session
            return bool(connection.session_reused), len(answer) == 9 and answer[3] == SETTINGS


async def test_session_is_not_taken_up_again_after_a_revocation(
    members: tuple[Member, Member, Member], listening: tuple[GrpcLink, int, list[LinkEvent]], tmp_path: Path
) -> None:
    _, cheat, victim = members
    link, port, _ = listening
    client = Resumer(tmp_path, leaf([cheat.own_name], (cheat.ca, cheat.signer)), port)
    assert await asyncio.to_thread(client.connect) == (False, True)
    assert await asyncio.to_thread(client.connect) == (True, True)
    link.trust([victim.anchor])
    assert (await asyncio.to_thread(client.connect))[1] is False
    assert (await asyncio.to_thread(client.connect))[1] is False
    link.trust([victim.anchor, cheat.anchor])
    assert (await asyncio.to_thread(client.connect))[1]
