"""Whom the listener lets in and what we show: the trust bundle, our leaf, and the check of every single call."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from cryptography import x509

from meshgpu.errors import TrustError
from meshgpu.model.ids import NodeId, node_id
from meshgpu.ports import Anchor, Clock, Identity
from meshgpu.wire.certificates import leaf_belongs_to, node_of_ca, node_of_leaf, pem
from meshgpu.wire.grpc_calls import Context

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Identity:
    """What the listener shows (private key PEM, certificate PEM) and whose leaves it accepts (PEM)."""

    leaf: tuple[bytes, bytes]
    roots: bytes


class Gate:
    """Trusts nobody before `trust` is called, and never this node itself."""

    def __init__(self, keys: Identity, clock: Clock) -> None:
        self._keys = keys
        self._clock = clock
        self.me = node_id(keys.node_key())
        self._own_ca = pem(x509.load_der_x509_certificate(keys.device_ca()))
        self._anchors: dict[NodeId, x509.Certificate] = {}
        self._roots = b""
        self._shown = self._identity()
        self._shown_lock = threading.Lock()

    def trust(self, anchors: Sequence[Anchor]) -> list[NodeId]:
        """Replace the trust bundle; returns the nodes that left it or are known by another CA now."""
        kept: dict[NodeId, x509.Certificate] = {}
        for anchor in anchors:
            try:
                if node_of_ca(anchor.device_ca) != anchor.node:
                    raise TrustError("bad-device-ca", "cannot accept a device CA: it belongs to another node")
            except TrustError as error:
                _log.warning("member left out: %s", error.message, extra={"node": anchor.node})
                continue
            if anchor.node != self.me:
                kept[anchor.node] = x509.load_der_x509_certificate(anchor.device_ca)
        gone = [node for node, ca in self._anchors.items() if kept.get(node) != ca]
        self._anchors = kept
        self._roots = b"".join(pem(ca) for ca in kept.values())
        return gone

    def authorise(self, context: Context) -> NodeId:
        """Who calls; raises TrustError `not-allowed`."""
        shown = context.auth_context().get("x509_pem_cert", [])
        if len(shown) != 1:
            raise TrustError("not-allowed", "cannot accept a call without a certificate")
        try:
            leaf = x509.load_pem_x509_certificate(shown[0])
        except ValueError as error:
            raise TrustError("not-allowed", f"cannot read a caller's certificate: {error}") from error
        peer = node_of_leaf(leaf)
        ca = self._anchors.get(peer)
        if ca is None or not leaf_belongs_to(leaf, ca):
            raise TrustError("not-allowed", f"cannot accept a call from {peer}: it is not a member of this mesh")
        return peer

    def server_credentials(self) -> grpc.ServerCredentials:
        """Follow `trust` and the renewal of our leaf from one handshake to the next."""
        shown = _configuration(self._shown)
        return grpc.dynamic_ssl_server_credentials(shown, self._refresh, True)  # type: ignore[no-untyped-call,no-any-return]  # grpc has no types

    def channel_credentials(self, peer: NodeId) -> grpc.ChannelCredentials:
        """Trust nobody but `peer`; raises TrustError `not-allowed` if it is not a member."""
        ca = self._anchors.get(peer)
        if ca is None:
            raise TrustError("not-allowed", "it is not a member of this mesh")
        private_key, certificate = self._leaf()
        return grpc.ssl_channel_credentials(pem(ca), private_key, certificate)  # type: ignore[no-untyped-call,no-any-return]  # grpc has no types

    def _leaf(self) -> tuple[bytes, bytes]:
        return self._keys.leaf(self._clock.now().wall_s)

    def _identity(self) -> _Identity:
        # Never an empty bundle, whose meaning is up to gRPC. Leaves of our own CA are refused when they call.
        return _Identity(self._leaf(), self._roots or self._own_ca)

    def _refresh(self) -> grpc.ServerCertificateConfiguration | None:
        """What the next handshakes use, None if nothing changed. Called in gRPC's threads."""
        with self._shown_lock:
            try:
                identity = self._identity()
            except Exception:
                # Were anything raised, gRPC would go on with the old bundle, revoked members included.
                _log.exception("leaf not renewed")
                identity = _Identity(self._shown.leaf, self._roots or self._own_ca)
            if identity == self._shown:
                return None
            self._shown = identity
            return _configuration(identity)


def _configuration(identity: _Identity) -> grpc.ServerCertificateConfiguration:
    leaf, roots = [identity.leaf], identity.roots
    return grpc.ssl_server_certificate_configuration(leaf, roots)  # type: ignore[no-untyped-call,no-any-return]  # grpc has no types
