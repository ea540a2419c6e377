"""The X.509 certificates of the mesh: a node's device CA, the leaves it issues, and what a valid one looks like."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshgpu.errors import TrustError
from meshgpu.model.cloud import LaunchId
from meshgpu.model.ids import NodeId, node_id

ALWAYS_VALID_FROM: Final = datetime(2020, 1, 1, tzinfo=UTC)
"""Before any clock that may look at such a certificate, so that making one needs no clock."""

ALWAYS_VALID_UNTIL: Final = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
"""RFC 5280 4.1.2.5: no well-defined expiration date."""

CA_LIMIT_BYTES: Final = 2048
"""A device CA has about 500 bytes; every member's is sent and checked in each handshake."""

BOOTSTRAP_BACKDATED: Final = timedelta(minutes=2)
"""Only its maker checks it, whose clock may be set meanwhile."""

_DOMAIN: Final = ".meshgpu.internal"
_BOOTSTRAP_DOMAIN: Final = ".boot.meshgpu.internal"
_BOOTSTRAP_NAME: Final = re.compile(r"([a-z2-7]{26})\.boot\.meshgpu\.internal")
_SERVER_NAME: Final = re.compile(r"([a-z2-7]{52})\.meshgpu\.internal")


def server_name(node: NodeId) -> str:
    """The one DNS name in the leaves of `node`."""
    return f"{node}{_DOMAIN}"


def make_device_ca(key: ed25519.Ed25519PrivateKey) -> x509.Certificate:
    """Self-signed: it can issue leaves for the name of this key's node, and nothing else."""
    public = key.public_key()
    node = node_id(public.public_bytes_raw())
    name = _common_name(node)
    return (
        x509.CertificateBuilder(name, name, public, x509.random_serial_number())
        .not_valid_before(ALWAYS_VALID_FROM)
        .not_valid_after(ALWAYS_VALID_UNTIL)
        .add_extension(_CA_CONSTRAINTS, critical=True)
        .add_extension(_key_usage(key_cert_sign=True), critical=True)
        .add_extension(_own_name_only(node), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, None)
    )


def node_of_ca(der: bytes) -> NodeId:
    """Whose device CA this is; raises TrustError `bad-device-ca` unless it is bound to its own key and name only."""
    if len(der) > CA_LIMIT_BYTES:
        raise _bad_ca(f"it has {len(der)} bytes, expected at most {CA_LIMIT_BYTES}")
    try:
        certificate = x509.load_der_x509_certificate(der)
        public = certificate.public_key()
        if not isinstance(public, ed25519.Ed25519PublicKey):
            raise _bad_ca("its key is not an Ed25519 key")
        node = node_id(public.public_bytes_raw())
        certificate.verify_directly_issued_by(certificate)
        expected = (
            (x509.BasicConstraints, _CA_CONSTRAINTS),
            (x509.KeyUsage, _key_usage(key_cert_sign=True)),
            (x509.NameConstraints, _own_name_only(node)),
        )
        for kind, value in expected:
            extension = certificate.extensions.get_extension_for_class(kind)
            if not extension.critical or extension.value != value:
                raise _bad_ca(f"its {kind.__name__} is not what a device CA of {node} has")
    except InvalidSignature as error:
        raise _bad_ca("its signature is not its own key's") from error
    except (ValueError, TypeError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise _bad_ca(str(error)) from error
    return node


def make_leaf(
    key: ec.EllipticCurvePrivateKey,
    dns_name: str,
    validity: tuple[datetime, datetime],
    issuer: tuple[x509.Certificate, ed25519.Ed25519PrivateKey] | None = None,
    *,
    server_only: bool = False,
) -> x509.Certificate:
    """A certificate with exactly one DNS name, good for handshakes only; self-signed without an `issuer`."""
    subject = _common_name(dns_name.removesuffix(_DOMAIN))
    builder = (
        x509.CertificateBuilder(issuer[0].subject if issuer else subject, subject, key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(validity[0])
        .not_valid_after(validity[1])
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        # Without it even a certificate that is no CA is taken as one when it is pinned as a root.
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(dns_name)]), critical=False)
    )
    if server_only:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=True)
    if issuer is None:
        return builder.sign(key, hashes.SHA256())
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer[1].public_key())
    return builder.add_extension(authority, critical=False).sign(issuer[1], None)


def node_of_leaf(certificate: x509.Certificate) -> NodeId:
    """The node that a leaf names; raises TrustError `not-allowed` unless a DNS name of a node is its only name.

    Says nothing about who issued it. A leaf without a DNS name would pass its CA's name constraint under any other.
    """
    return NodeId(_only_name(certificate, _SERVER_NAME, "node"))


def leaf_belongs_to(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether exactly this CA's key issued the leaf."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def make_bootstrap(launch: LaunchId, made: datetime, life: timedelta) -> tuple[bytes, x509.Certificate]:
    """(private key PEM, certificate) of an instance's first listener: a server's only, and not for long."""
    private = ec.generate_private_key(ec.SECP256R1())
    validity = (made - BOOTSTRAP_BACKDATED, made + life)
    certificate = make_leaf(private, bootstrap_server_name(launch), validity, server_only=True)
    return private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), certificate


def launch_of_bootstrap(certificate: x509.Certificate) -> LaunchId:
    """The launch that a bootstrap certificate is for; raises TrustError `not-allowed` for any other certificate."""
    return LaunchId(_only_name(certificate, _BOOTSTRAP_NAME, "launch"))


def bootstrap_server_name(launch: LaunchId) -> str:
    """The one DNS name in the bootstrap certificate of `launch`."""
    return f"{launch}{_BOOTSTRAP_DOMAIN}"


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def _only_name(certificate: x509.Certificate, form: re.Pattern[str], of: str) -> str:
    """What `form` captures of a certificate's only name; raises TrustError `not-allowed` for others."""
    try:
        names = list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise TrustError("not-allowed", f"cannot read the names in a certificate: {error}") from error
    match = form.fullmatch(names[0].value) if len(names) == 1 and isinstance(names[0], x509.DNSName) else None
    if match is None:
        raise TrustError("not-allowed", f"cannot accept a certificate with the names {names}: expected one of a {of}")
    return match[1]


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _own_name_only(node: NodeId) -> x509.NameConstraints:
    return x509.NameConstraints([x509.DNSName(server_name(node))], None)


def _key_usage(*, digital_signature: bool = False, key_cert_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


_CA_CONSTRAINTS: Final = x509.BasicConstraints(ca=True, path_length=0)


def _bad_ca(found: str) -> TrustError:
    return TrustError("bad-device-ca", f"cannot accept a device CA: {found}")
