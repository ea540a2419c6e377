"""Pairing over grpc.aio: the listener through which strangers join, and the joiner's side of the conversation.

Neither side knows the other yet: TLS only makes the conversation private and gives it a name, the fingerprint of the
listener's certificate, to which what is said binds it.
"""

from collections.abc import Sequence
from typing import Final
from urllib.parse import unquote

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from meshgpu import ports
from meshgpu.errors import BrokenInvariant, MeshgpuError
from meshgpu.model.ids import Address, Digest, digest
from meshgpu.wire.certificates import ALWAYS_VALID_FROM, ALWAYS_VALID_UNTIL, der, make_leaf, pem
from meshgpu.wire.endpoints import certificate_at, free_port, grpc_target, join_address
from meshgpu.wire.grpc_calls import Context, abort, answer_step, error_from, service

REQUEST_LIMIT_BYTES: Final = 64 * 1024
"""A device CA, a few keys and proofs: about 2 KiB."""

REPLY_LIMIT_BYTES: Final = 2**20
"""The mesh log of a mesh of 64 nodes has about 100 KiB."""

CONCURRENT_STEPS: Final = 8
CALL_TIMEOUT_S: Final = 5.0
LOOK_TIMEOUT_S: Final = 3.0

_SERVICE: Final = "meshgpu.wire.v1.Pairing"
_SERVER_NAME: Final = "pairing.meshgpu.internal"
_SERVER_OPTIONS: Final = (
    ("grpc.max_receive_message_length", REQUEST_LIMIT_BYTES),
    ("grpc.max_send_message_length", REPLY_LIMIT_BYTES),
    ("grpc.max_concurrent_streams", CONCURRENT_STEPS),
    # Strangers who say nothing give their descriptor back.
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.max_connection_idle_ms", 30_000),
    ("grpc.so_reuseport", 0),  # a taken port must be an error
)


class GrpcPairing:
    """The listener on `hosts`: server-auth only, with a key and certificate of its own for each time it is open."""

    def __init__(self, hosts: Sequence[str], port: int = 7444) -> None:
        self._hosts = tuple(hosts)
        self._port = port
        self._server: grpc.aio.Server | None = None
        self._fingerprint: Digest | None = None

    async def open(self, door: ports.PairingDoor) -> int:
        """Listen; returns the port: the wanted one, or a free one if it is taken. Raises MeshgpuError `no-port`."""
        if self._server is not None:
            raise BrokenInvariant("the pairing listener is open already")
        private, certificate = _new_leaf()
        credentials = grpc.ssl_server_credentials([(private, pem(certificate))])  # type: ignore[no-untyped-call]  # grpc has no types

        async def step(context: Context) -> None:
            await _answer(door, context)

        server = grpc.aio.server(options=_SERVER_OPTIONS, maximum_concurrent_rpcs=CONCURRENT_STEPS)
        server.add_generic_rpc_handlers((service(_SERVICE, {"Step": step}),))
        port = free_port(self._hosts, self._port)
        try:
            for host in self._hosts:
                server.add_secure_port(join_address(host, port), credentials)
        except RuntimeError as error:
            raise MeshgpuError("no-port", f"cannot listen on port {port}: {error}", "meshgpu doctor") from error
        self._server, self._fingerprint = server, digest(der(certificate))
        await server.start()
        return port

    async def close(self) -> None:
        """Break every conversation and listen no more; does nothing if it is closed."""
        server, self._server, self._fingerprint = self._server, None, None
        if server is not None:
            await server.stop(None)

    def fingerprint(self) -> Digest:
        """SHA-256 of the listener's certificate (DER). Only an open listener has one."""
        if self._fingerprint is None:
            raise BrokenInvariant("the pairing listener is closed")
        return self._fingerprint


class GrpcPairingDialog:
    """The joiner's side; `dial_pairing` makes it. It speaks only to the holder of the certificate it was made with."""

    def __init__(self, address: Address, certificate: x509.Certificate) -> None:
        self._address = address
        self._fingerprint = digest(der(certificate))
        self._channel = grpc.aio.secure_channel(
            grpc_target(address),
            grpc.ssl_channel_credentials(pem(certificate)),  # type: ignore[no-untyped-call]  # grpc has no types
            (
                ("grpc.ssl_target_name_override", _SERVER_NAME),
                ("grpc.max_receive_message_length", REPLY_LIMIT_BYTES),
                ("grpc.enable_http_proxy", 0),
                ("grpc.use_local_subchannel_pool", 1),
            ),
        )

    @property
    def fingerprint(self) -> Digest:
        return self._fingerprint

    async def call(self, step: str, request: bytes) -> bytes:
        """One exchange, 5 s at most; raises MeshgpuError with the other side's code, `too-large` or `no-answer`."""
        if len(request) > REQUEST_LIMIT_BYTES:
            raise MeshgpuError(
                "too-large", f"cannot pair: a request has {len(request)} bytes, at most {REQUEST_LIMIT_BYTES} fit"
            )
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(f"/{_SERVICE}/Step")
        try:
            return await method(request, timeout=CALL_TIMEOUT_S, metadata=(("step", step),))
        except grpc.aio.AioRpcError as error:
            raise error_from(error, f"cannot pair with {self._address}") from error

    async def close(self) -> None:
        await self._channel.close()


async def dial_pairing(address: Address) -> GrpcPairingDialog:
    """A conversation with whoever listens at `address`; raises MeshgpuError `no-answer` or `bad-request`."""
    shown = await certificate_at(address, LOOK_TIMEOUT_S)
    try:
        certificate = x509.load_der_x509_certificate(shown)
    except ValueError as error:
        raise MeshgpuError("no-answer", f"cannot pair with {address}: its certificate cannot be read") from error
    return GrpcPairingDialog(address, certificate)


async def _answer(door: ports.PairingDoor, context: Context) -> None:
    """One step, if its caller is heard: its place among the few at once is free again before it has said anything."""
    host = host_of_peer(context.peer())
    try:
        door.check(host)
    except MeshgpuError as error:
        await abort(context, error)
    was_asked = False

    async def answer(step: str, request: bytes) -> bytes:
        nonlocal was_asked
        was_asked = True
        return await door.answer(host, step, request)

    try:
        await answer_step(context, answer, "cannot pair", CALL_TIMEOUT_S)
    finally:
        if not was_asked:
            door.broke_off(host)


def host_of_peer(peer: str) -> str:
    """The IP address in what gRPC calls a peer: `ipv4:10.0.0.7:40001`, `ipv6:%5Bfe80::1%5D:40001`."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")


def _new_leaf() -> tuple[bytes, x509.Certificate]:
    """(private key PEM, self-signed certificate)."""
    private = ec.generate_private_key(ec.SECP256R1())
    # Always valid: the two machines' clocks may differ, and the conversation ends long before either could matter.
    certificate = make_leaf(private, _SERVER_NAME, (ALWAYS_VALID_FROM, ALWAYS_VALID_UNTIL))
    return private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), certificate
