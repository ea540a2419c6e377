"""Where a TLS listener is: addresses, a free port to listen on, and the certificate that answers at an address."""

import asyncio
import errno
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from typing import Final

from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import Address

_SHORT_REASONS: Final = {
    errno.ECONNREFUSED: "connection refused",
    errno.EHOSTUNREACH: "no route to it",
    errno.ENETUNREACH: "no route to it",
    errno.ETIMEDOUT: "timed out",
}


def split_address(address: Address) -> tuple[str, int]:
    """(host without brackets, port); raises MeshgpuError `bad-request` for anything but `host:port`."""
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    valid_host = bool(host) and bracketed == (":" in host) and not any(c.isspace() or c in "/@[]" for c in host)
    if not (colon and valid_host and port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise MeshgpuError(
            "bad-request", f"cannot read the address {address!r}: expected HOST:PORT, as 192.168.1.20:7443"
        )
    return host, int(port)


def join_address(host: str, port: int) -> Address:
    return Address(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def grpc_target(address: Address) -> str:
    """The same place as gRPC spells it; raises MeshgpuError `bad-request`."""
    host, port = split_address(address)
    try:
        family = f"ipv{ipaddress.ip_address(host.partition('%')[0]).version}"
    except ValueError:
        family = "dns"
    return f"{family}:{join_address(host, port)}"


def free_port(hosts: Sequence[str], port: int) -> int:
    """`port` if it is free on every host, else one that is; `port` 0 asks for any.

    Raises MeshgpuError `no-port` where a host is not this machine's.
    """
    try:
        for wanted in (port, 0):
            if chosen := _bindable(hosts, wanted):
                return chosen
    except OSError as error:
        reason = error.strerror or str(error)
        raise MeshgpuError("no-port", f"cannot listen on {', '.join(hosts)}: {reason}", "meshgpu doctor") from error
    raise MeshgpuError("no-port", f"cannot listen on {', '.join(hosts)}: no port is free on all", "meshgpu doctor")


def _bindable(hosts: Sequence[str], port: int) -> int:
    """The port that could be bound on all hosts, 0 where it is taken on one."""
    for host in hosts:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As gRPC does it: connections that linger after a restart do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                probe.listen(1)
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    return 0
                raise
            port = int(probe.getsockname()[1])
    return port


async def certificate_at(address: Address, timeout_s: float) -> bytes:
    """DER of the certificate that a TLS 1.3 listener shows; nothing about it is verified.

    Raises MeshgpuError: `no-answer`, or `bad-request` for what is no address.
    """
    host, port = split_address(address)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # In TLS 1.3 the listener shows its certificate before it asks for ours; gRPC wants to hear of HTTP/2.
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname="")
    except UnicodeError as error:  # `a..b`: what IDNA cannot spell has no address
        raise MeshgpuError("no-answer", f"cannot reach {address}: name not found") from error
    except (OSError, TimeoutError) as error:
        raise MeshgpuError("no-answer", f"cannot reach {address}: {_reason(error)}") from error
    try:
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.transport.abort()
    if not certificate:
        raise MeshgpuError("no-answer", f"cannot reach {address}: it shows no certificate")
    return bytes(certificate)


def _reason(error: OSError | TimeoutError) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, socket.gaierror):
        return "name not found"
    if isinstance(error, ssl.SSLError):
        return "no TLS 1.3 there"
    return _SHORT_REASONS.get(error.errno or 0) or error.strerror or str(error)
