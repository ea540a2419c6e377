import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from meshgpu.adapters import grpc_pairing
from meshgpu.adapters.grpc_pairing import GrpcPairing, GrpcPairingDialog, dial_pairing, host_of_peer
from meshgpu.errors import BrokenInvariant, MeshgpuError
from meshgpu.model.ids import Address, digest
from meshgpu.wire.certificates import make_leaf, pem
from meshgpu.wire.endpoints import certificate_at

Answer = Callable[[str, bytes], Awaitable[bytes]]
Open = Callable[["Answer | Door"], Awaitable[tuple[GrpcPairing, GrpcPairingDialog, Address]]]


class Door:
    """Hears everybody, and keeps what it is told. muted: hears nobody."""

    def __init__(self, answer: Answer) -> None:
        self.respond = answer
        self.hosts: list[str] = []
        self.broken: list[str] = []
        self.muted = False

    def check(self, host: str) -> None:
        if self.muted:
            raise MeshgpuError("busy", f"cannot pair: too many tries from {host}")

    async def answer(self, host: str, step: str, request: bytes) -> bytes:
        self.hosts.append(host)
        return await self.respond(step, request)

    def broke_off(self, host: str) -> None:
        self.broken.append(host)


async def echo(step: str, request: bytes) -> bytes:
    return step.encode() + b":" + request


@pytest.fixture
async def pair() -> AsyncIterator[Open]:
    """Opens a listener and a dialog with it; both are closed at the end, and nothing is left."""
    opened: list[tuple[GrpcPairing, GrpcPairingDialog]] = []

    def door(answer: Answer | Door) -> Door:
        return answer if isinstance(answer, Door) else Door(answer)

    async def make(answer: Answer | Door) -> tuple[GrpcPairing, GrpcPairingDialog, Address]:
        listener = GrpcPairing(["127.0.0.1"], 0)
        address = Address(f"127.0.0.1:{await listener.open(door(answer))}")
        dialog = await dial_pairing(address)
        opened.append((listener, dialog))
        return listener, dialog, address

    yield make
    started_s = time.monotonic()
    for listener, dialog in opened:
        await dialog.close()
        await listener.close()
    assert time.monotonic() - started_s < 1
    async with asyncio.timeout(1):
        while len(asyncio.all_tasks()) > 1:  # noqa: ASYNC110  # gRPC's own end in their own time
            await asyncio.sleep(0.005)


async def test_both_sides_know_the_same_fingerprint(pair: Open) -> None:
    listener, dialog, address = await pair(echo)
    assert dialog.fingerprint == listener.fingerprint() == digest(await certificate_at(address, 3))
    assert await dialog.call("hello", b"there") == b"hello:there"
    assert await dialog.call("proof", bytes(64 * 1024)) == b"proof:" + bytes(64 * 1024)
    assert await dialog.call("empty", b"") == b"empty:"


async def test_each_opening_has_a_certificate_of_its_own(pair: Open) -> None:
    listener, _, _ = await pair(echo)
    first = listener.fingerprint()
    await listener.close()
    with pytest.raises(BrokenInvariant):
        listener.fingerprint()
    address = Address(f"127.0.0.1:{await listener.open(Door(echo))}")
    assert listener.fingerprint() != first
    with pytest.raises(BrokenInvariant):
        await listener.open(Door(echo))
    again = await dial_pairing(address)
    assert again.fingerprint == listener.fingerprint()
    await again.close()


async def test_dialog_is_bound_to_the_certificate_it_began_with(pair: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _, address = await pair(echo)
    shown = x509.load_der_x509_certificate(await certificate_at(address, 3))
    await first.close()
    port = int(address.rpartition(":")[2])
    impostor = GrpcPairing(["127.0.0.1"], port)
    assert await impostor.open(Door(echo)) == port
    dialog = GrpcPairingDialog(address, shown)
    with pytest.raises(MeshgpuError) as raised:
        await dialog.call("hello", b"secret")
    assert raised.value.code == "no-answer"
    await dialog.close()
    await impostor.close()


async def test_listeners_certificate_cannot_issue_others(pair: Open) -> None:
    """Who pins it as a root must not thereby accept what its key has signed."""
    now = datetime.now(UTC)
    window = (now - timedelta(days=1), now + timedelta(days=1))
    root_key, leaf_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = make_leaf(root_key, "pairing.meshgpu.internal", window)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "forged")])
    forged = (
        x509.CertificateBuilder(root.subject, name, leaf_key.public_key(), 7, *window)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("pairing.meshgpu.internal")]), critical=False)
        .sign(root_key, SHA256())
    )
    private = leaf_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    server = grpc.aio.server()
    credentials = grpc.ssl_server_credentials([(private, pem(forged) + pem(root))])  # type: ignore[no-untyped-call]  # no types
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    dialog = GrpcPairingDialog(Address(f"127.0.0.1:{port}"), root)
    with pytest.raises(MeshgpuError, match=r"another machine|handshake"):
        await dialog.call("hello", b"")
    await dialog.close()
    await server.stop(None)


async def test_errors_travel(pair: Open) -> None:
    async def refuse(step: str, request: bytes) -> bytes:
        raise MeshgpuError("bad-invite", f"cannot redeem the invite at {step}: it was used", "meshgpu invite")

    _, dialog, _ = await pair(refuse)
    with pytest.raises(MeshgpuError) as raised:
        await dialog.call("proof", b"")
    error = raised.value
    assert (error.code, error.hint) == ("bad-invite", "meshgpu invite")
    assert error.message == "cannot redeem the invite at proof: it was used"


async def raw_step(address: Address, request: bytes, step: str | None = "x") -> bytes:
    """A step as a stranger may send it, past the checks of a dialog."""
    certificate = x509.load_der_x509_certificate(await certificate_at(address, 3))
    credentials = grpc.ssl_channel_credentials(pem(certificate))  # type: ignore[no-untyped-call]  # no types
    options = [("grpc.ssl_target_name_override", "pairing.meshgpu.internal")]
    async with grpc.aio.secure_channel(address, credentials, options) as channel:
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/meshgpu.wire.v1.Pairing/Step")
        return await method(request, timeout=4, metadata=(("step", step),) if step else ())


async def test_oversize_is_refused_on_both_sides(pair: Open) -> None:
    asked: list[bytes] = []

    async def note(step: str, request: bytes) -> bytes:
        asked.append(request)
        return b""

    _, dialog, address = await pair(note)
    with pytest.raises(MeshgpuError) as raised:
        await dialog.call("proof", bytes(64 * 1024 + 1))
    assert raised.value.code == "too-large"
    with pytest.raises(grpc.aio.AioRpcError):
        await raw_step(address, bytes(64 * 1024 + 1))
    with pytest.raises(grpc.aio.AioRpcError):
        await raw_step(address, b"", step=None)
    assert asked == []


async def test_more_than_eight_steps_at_once_are_refused(pair: Open) -> None:
    running = 0
    full, release = asyncio.Event(), asyncio.Event()

    async def hold(step: str, request: bytes) -> bytes:
        nonlocal running
        running += 1
        if running == 8:
            full.set()
        await release.wait()
        return b"done"

    _, _, address = await pair(hold)
    async with asyncio.TaskGroup() as group:
        held = [group.create_task(raw_step(address, b"")) for _ in range(8)]
        await asyncio.wait_for(full.wait(), 5)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await raw_step(address, b"")
        release.set()
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert running == 8
    assert [task.result() for task in held] == [b"done"] * 8


async def test_stranger_who_sends_nothing_gives_its_place_back(pair: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_pairing, "CALL_TIMEOUT_S", 0.3)
    _, _, address = await pair(echo)
    certificate = x509.load_der_x509_certificate(await certificate_at(address, 3))
    credentials = grpc.ssl_channel_credentials(pem(certificate))  # type: ignore[no-untyped-call]  # no types
    options = [("grpc.ssl_target_name_override", "pairing.meshgpu.internal")]
    async with grpc.aio.secure_channel(address, credentials, options) as channel:
        calls: list[grpc.aio.StreamStreamCall[bytes, bytes]] = [
            channel.stream_stream("/meshgpu.wire.v1.Pairing/Step")(metadata=(("step", "x"),)) for _ in range(8)
        ]
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError):
                await asyncio.wait_for(call.read(), 3)
    assert await raw_step(address, b"hello") == b"x:hello"


async def test_silence_and_nonsense_are_held_against_the_address(pair: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_pairing, "CALL_TIMEOUT_S", 0.3)
    door = Door(echo)
    _, dialog, address = await pair(door)
    await dialog.call("hello", b"")
    assert (door.hosts, door.broken) == (["127.0.0.1"], [])
    with pytest.raises(grpc.aio.AioRpcError):
        await raw_step(address, b"", step=None)
    certificate = x509.load_der_x509_certificate(await certificate_at(address, 3))
    credentials = grpc.ssl_channel_credentials(pem(certificate))  # type: ignore[no-untyped-call]  # no types
    options = [("grpc.ssl_target_name_override", "pairing.meshgpu.internal")]
    async with grpc.aio.secure_channel(address, credentials, options) as channel:
        silent: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream("/meshgpu.wire.v1.Pairing/Step")(
            metadata=(("step", "x"),)
        )
        with pytest.raises(grpc.aio.AioRpcError):
            await asyncio.wait_for(silent.read(), 3)
    assert door.broken == ["127.0.0.1", "127.0.0.1"]


async def test_address_that_is_not_heard_is_told_so_before_it_says_anything(pair: Open) -> None:
    door = Door(echo)
    door.muted = True
    _, dialog, _ = await pair(door)
    with pytest.raises(MeshgpuError, match=r"too many tries from 127\.0\.0\.1") as raised:
        await dialog.call("hello", b"")
    assert (raised.value.code, door.hosts, door.broken) == ("busy", [], [])


@pytest.mark.parametrize(
    ("peer", "host"),
    [("ipv4:10.0.0.7:40001", "10.0.0.7"), ("ipv6:%5Bfe80::1%5D:40001", "fe80::1"), ("ipv6:[::1]:9", "::1")],
)
def test_address_of_a_caller_is_known_without_its_port(peer: str, host: str) -> None:
    assert host_of_peer(peer) == host


async def test_step_that_takes_too_long_is_no_answer(pair: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_pairing, "CALL_TIMEOUT_S", 0.3)

    async def never(step: str, request: bytes) -> bytes:
        await asyncio.Event().wait()
        return b""

    _, dialog, _ = await pair(never)
    with pytest.raises(MeshgpuError) as raised:
        await asyncio.wait_for(dialog.call("proof", b""), 3)
    assert raised.value.code == "no-answer"


async def test_closed_listener_refuses(pair: Open) -> None:
    listener, dialog, address = await pair(echo)
    await listener.close()
    await listener.close()
    with pytest.raises(MeshgpuError, match=r"refused|lost") as raised:
        await dialog.call("hello", b"")
    assert raised.value.code == "no-answer"
    with pytest.raises(MeshgpuError, match="connection refused") as raised:
        await dial_pairing(address)
    assert raised.value.code == "no-answer"


async def test_closing_breaks_what_goes_on(pair: Open) -> None:
    began = asyncio.Event()

    async def never(step: str, request: bytes) -> bytes:
        began.set()
        await asyncio.Event().wait()
        return b""

    listener, dialog, _ = await pair(never)
    call = asyncio.ensure_future(dialog.call("hello", b""))
    await asyncio.wait_for(began.wait(), 3)
    await listener.close()
    with pytest.raises(MeshgpuError) as raised:
        await asyncio.wait_for(call, 1)
    assert raised.value.code == "no-answer"


async def test_taken_port_gives_another() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listener = GrpcPairing(["127.0.0.1"], taken.getsockname()[1])
        assert await listener.open(Door(echo)) != taken.getsockname()[1]
        await listener.close()
