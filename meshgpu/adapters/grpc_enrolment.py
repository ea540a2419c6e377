"""Enrolment over grpc.aio: the first listener of an instance, and the burst peer's connection to it.

TLS shows the bootstrap certificate of the user data, and the burst peer speaks to its holder alone; who the burst peer
is, is proven in the conversation itself.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import grpc
from cryptography import x509

from meshgpu.errors import BrokenInvariant, MeshgpuError
from meshgpu.model.ids import Address
from meshgpu.wire.certificates import bootstrap_server_name, launch_of_bootstrap, pem
from meshgpu.wire.endpoints import free_port, grpc_target, join_address
from meshgpu.wire.grpc_calls import Context, answer_step, error_from, service

STEP_LIMIT_BYTES: Final = 4 * 2**20
"""A mesh log of 64 nodes has about 100 KiB; a long-lived one some hundred more for rented machines that went."""

CONCURRENT_STEPS: Final = 8
STEP_TIMEOUT_S: Final = 8.0
"""Over the Internet, with a log, and its way to the disk."""

STOP_GRACE_S: Final = 1.0
"""For the last reply."""

_SERVICE: Final = "meshgpu.wire.v1.Enrolment"
_SERVER_OPTIONS: Final = (
    ("grpc.max_receive_message_length", STEP_LIMIT_BYTES),
    ("grpc.max_concurrent_streams", CONCURRENT_STEPS),
    # Strangers who say nothing give their descriptor back.
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.max_connection_idle_ms", 30_000),
    ("grpc.so_reuseport", 0),  # a taken port must be an error
)


class GrpcBootstrap:
    """The listener on `hosts`: server-auth only, with the key and the certificate that user data brought (PEM)."""

    def __init__(self, hosts: Sequence[str], port: int, private_key: bytes, certificate: bytes) -> None:
        self._hosts = tuple(hosts)
        self._port = port
        self._leaf = (private_key, certificate)
        self._server: grpc.aio.Server | None = None

    async def open(self, answer: Callable[[str, bytes], Awaitable[bytes]]) -> int:
        """Listen on exactly this port (0: any), and return it; raises MeshgpuError `no-port`.

        `answer(step, request)` returns the reply; a MeshgpuError that it raises travels to the caller.
        """
        if self._server is not None:
            raise BrokenInvariant("the bootstrap listener is open already")
        port = free_port(self._hosts, self._port)
        if self._port not in (0, port):
            raise MeshgpuError("no-port", f"cannot listen on port {self._port}: it is taken", "ss -ltnp")

        async def step(context: Context) -> None:
            await answer_step(context, answer, "cannot enrol", STEP_TIMEOUT_S)

        server = grpc.aio.server(options=_SERVER_OPTIONS, maximum_concurrent_rpcs=CONCURRENT_STEPS)
        server.add_generic_rpc_handlers((service(_SERVICE, {"Step": step}),))
        try:
            credentials = grpc.ssl_server_credentials([self._leaf])  # type: ignore[no-untyped-call]  # grpc has no types
            for host in self._hosts:
                server.add_secure_port(join_address(host, port), credentials)
        except RuntimeError as error:
            raise MeshgpuError("no-port", f"cannot listen on port {port}: {error}", "ss -ltnp") from error
        self._server = server
        await server.start()
        return port

    async def close(self) -> None:
        """Listen no more; a reply that is on its way still leaves."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(STOP_GRACE_S)


class GrpcEnrolDialog:
    """The burst peer's connection to whoever has the key of exactly this certificate (DER)."""

    def __init__(self, address: Address, certificate: bytes) -> None:
        """Connects with the first call. Raises MeshgpuError for what is no address or no bootstrap certificate."""
        try:
            pinned = x509.load_der_x509_certificate(certificate)
        except ValueError as error:
            raise MeshgpuError("bad-request", f"cannot enrol {address}: its bootstrap certificate is none") from error
        self._address = address
        options = (
            ("grpc.ssl_target_name_override", bootstrap_server_name(launch_of_bootstrap(pinned))),
            ("grpc.max_send_message_length", STEP_LIMIT_BYTES),
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
        )
        credentials = grpc.ssl_channel_credentials(pem(pinned))  # type: ignore[no-untyped-call]  # grpc has no types
        self._channel = grpc.aio.secure_channel(grpc_target(address), credentials, options)

    async def call(self, step: str, request: bytes) -> bytes:
        """One exchange, 8 s at most; raises MeshgpuError with the other side's code, or `no-answer`."""
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(f"/{_SERVICE}/Step")
        try:
            return await method(request, timeout=STEP_TIMEOUT_S, metadata=(("step", step),))
        except grpc.aio.AioRpcError as error:
            raise error_from(error, f"cannot enrol {self._address}") from error

    async def close(self) -> None:
        await self._channel.close()
