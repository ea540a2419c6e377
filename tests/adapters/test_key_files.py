import os
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from meshgpu.adapters.key_files import KeyFiles, node_of_ca
from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.ids import KeyId, key_id, node_id
from meshgpu.wire.certificates import der, leaf_belongs_to, make_device_ca, node_of_leaf, server_name

NOW = 1_790_000_000.0
DAY_S = 86_400.0


@pytest.fixture
def keys(tmp_path: Path) -> KeyFiles:
    return KeyFiles(tmp_path / "keys")


def test_keys_survive_a_restart_and_are_nobody_elses(tmp_path: Path, keys: KeyFiles) -> None:
    again = KeyFiles(tmp_path / "keys")
    assert keys.node_key() == again.node_key() != keys.user_key(1000)
    assert keys.user_key(1000) == again.user_key(1000) != keys.user_key(1001)
    assert keys.device_ca() == again.device_ca()


def test_files_are_private(tmp_path: Path, keys: KeyFiles) -> None:
    mask = os.umask(0)
    try:
        keys.device_ca()
        keys.user_key(0)
    finally:
        os.umask(mask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "keys").iterdir()}
    assert modes == {"node.pem": 0o600, "device-ca.pem": 0o600, "user-0.pem": 0o600}
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700


def test_signs_with_each_key_and_after_a_restart(tmp_path: Path, keys: KeyFiles) -> None:
    for public in (keys.node_key(), keys.user_key(7)):
        signature = KeyFiles(tmp_path / "keys").sign(key_id(public), b"message")
        assert len(signature) == 64
        assert keys.verify(public, b"message", signature)
        assert not keys.verify(public, b"massage", signature)
        assert not keys.verify(public, b"message", signature[:-1])
    assert not keys.verify(keys.node_key(), b"message", KeyFiles(tmp_path / "keys").sign(key_id(keys.user_key(7)), b""))
    assert not keys.verify(b"short", b"message", bytes(64))


def test_foreign_key_cannot_sign(keys: KeyFiles) -> None:
    keys.node_key()
    with pytest.raises(TrustError) as raised:
        keys.sign(KeyId("a" * 52), b"message")
    assert raised.value.code == "no-such-key"


@pytest.mark.parametrize(
    "content", [b"", b"-----BEGIN PRIVATE KEY-----\nMA==\n-----END PRIVATE KEY-----\n", b"\0" * 99]
)
@pytest.mark.parametrize("name", ["node.pem", "user-5.pem", "device-ca.pem"])
def test_corrupt_file_is_named_and_left_alone(tmp_path: Path, keys: KeyFiles, name: str, content: bytes) -> None:
    path = tmp_path / "keys" / name
    keys.device_ca()
    path.write_bytes(content)
    path.chmod(0o600)
    fresh = KeyFiles(tmp_path / "keys")
    with pytest.raises(MeshgpuError, match=str(path)) as raised:
        fresh.device_ca(), fresh.user_key(5)
    assert raised.value.code == "bad-key"
    assert raised.value.hint
    assert path.read_bytes() == content


def test_key_of_another_kind_is_refused(tmp_path: Path, keys: KeyFiles) -> None:
    keys.node_key()
    other = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "keys" / "node.pem").write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(MeshgpuError, match="not an Ed25519"):
        KeyFiles(tmp_path / "keys").node_key()


def test_key_that_others_can_read_is_refused(tmp_path: Path, keys: KeyFiles) -> None:
    keys.node_key()
    (tmp_path / "keys" / "node.pem").chmod(0o640)
    with pytest.raises(MeshgpuError, match="0640"):
        KeyFiles(tmp_path / "keys").node_key()


def test_every_key_is_looked_at_before_one_is_used(tmp_path: Path, keys: KeyFiles) -> None:
    keys.user_key(1000)
    keys.check()
    (tmp_path / "keys" / "user-1000.pem").chmod(0o640)
    fresh = KeyFiles(tmp_path / "keys")
    with pytest.raises(MeshgpuError, match=r"user-1000\.pem: its mode is 0640, expected 0600"):
        fresh.check()


def test_device_ca_of_another_key_is_refused(tmp_path: Path, keys: KeyFiles) -> None:
    keys.device_ca()
    (tmp_path / "keys" / "node.pem").unlink()
    with pytest.raises(MeshgpuError, match="belongs to the node"):
        KeyFiles(tmp_path / "keys").device_ca()


def test_unusable_directory_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MeshgpuError) as raised:
        KeyFiles(tmp_path / "file" / "keys").node_key()
    assert raised.value.code == "bad-key"


def test_makers_that_race_agree_on_one_key(tmp_path: Path) -> None:
    for attempt in range(20):
        directory = tmp_path / str(attempt)
        found: list[bytes] = []
        start = threading.Barrier(4)

        def make(directory: Path = directory, start: threading.Barrier = start, found: list[bytes] = found) -> None:
            start.wait(5)
            found.append(KeyFiles(directory).node_key())

        threads = [threading.Thread(target=make) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
        assert len(found) == 4
        assert len(set(found)) == 1
        assert [path.name for path in directory.iterdir()] == ["node.pem"]


def test_leaf_has_the_shape_that_peers_expect(keys: KeyFiles) -> None:
    leaf = x509.load_pem_x509_certificate(keys.leaf(NOW)[1])
    node = node_id(keys.node_key())
    assert node_of_leaf(leaf) == node
    assert leaf_belongs_to(leaf, x509.load_der_x509_certificate(keys.device_ca()))
    assert isinstance(leaf.public_key(), ec.EllipticCurvePublicKey)
    made = datetime.fromtimestamp(NOW, UTC)
    assert leaf.not_valid_before_utc == made - timedelta(hours=24)
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == timedelta(days=7)
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_leaf_is_renewed_daily_and_when_the_clock_was_set_back(keys: KeyFiles) -> None:
    first = keys.leaf(NOW)
    assert keys.leaf(NOW + DAY_S - 1) == first
    second = keys.leaf(NOW + DAY_S)
    assert second != first
    assert keys.leaf(NOW - DAY_S) != second


# -- device CAs ------------------------------------------------------------------------------------------------------


def ca_of(
    key: ed25519.Ed25519PrivateKey,
    *,
    signer: ed25519.Ed25519PrivateKey | None = None,
    leave_out: type[x509.ExtensionType] | None = None,
    instead: x509.ExtensionType | None = None,
    critical: bool = True,
) -> bytes:
    """A device CA of `key` with one thing wrong."""
    right = make_device_ca(key)
    builder = x509.CertificateBuilder(right.issuer, right.subject, key.public_key(), right.serial_number)
    builder = builder.not_valid_before(right.not_valid_before_utc).not_valid_after(right.not_valid_after_utc)
    for extension in right.extensions:
        if leave_out is None or not isinstance(extension.value, leave_out):
            builder = builder.add_extension(extension.value, extension.critical)
    if instead is not None:
        builder = builder.add_extension(instead, critical)
    return der(builder.sign(signer or key, None))


def usage(*names: str) -> x509.KeyUsage:
    every = "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign"
    every += " crl_sign encipher_only decipher_only"
    return x509.KeyUsage(**{name: name in names for name in every.split()})


def test_own_device_ca_is_well_formed(keys: KeyFiles) -> None:
    assert node_of_ca(keys.device_ca()) == node_id(keys.node_key())
    key = ed25519.Ed25519PrivateKey.generate()
    assert node_of_ca(ca_of(key)) == node_id(key.public_key().public_bytes_raw())


def test_malformed_device_cas_are_refused() -> None:
    key, other = ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate()
    node = node_id(key.public_key().public_bytes_raw())
    own = x509.DNSName(server_name(node))
    foreign = x509.DNSName(server_name(node_id(other.public_key().public_bytes_raw())))
    constraints, basic, use = x509.NameConstraints, x509.BasicConstraints, x509.KeyUsage
    cases = {
        "junk": b"junk",
        "trailing bytes": ca_of(key) + b"\0",
        "signed by another key": ca_of(key, signer=other),
        "no name constraint": ca_of(key, leave_out=constraints),
        "another name": ca_of(key, leave_out=constraints, instead=constraints([foreign], None)),
        "one name more": ca_of(key, leave_out=constraints, instead=constraints([own, foreign], None)),
        "names excluded only": ca_of(key, leave_out=constraints, instead=constraints(None, [foreign])),
        "uncritical constraint": ca_of(
            key, leave_out=constraints, instead=constraints([own], None), critical=False
        ),
        "no CA": ca_of(key, leave_out=basic, instead=basic(ca=False, path_length=None)),
        "any path length": ca_of(key, leave_out=basic, instead=basic(ca=True, path_length=None)),
        "path length 1": ca_of(key, leave_out=basic, instead=basic(ca=True, path_length=1)),
        "no key usage": ca_of(key, leave_out=use),
        "more key usage": ca_of(key, leave_out=use, instead=usage("key_cert_sign", "digital_signature")),
        "large": ca_of(key, instead=x509.SubjectAlternativeName([x509.DNSName("a" * 60)] * 50), critical=False),
    }  # fmt: skip
    for name, certificate in cases.items():
        with pytest.raises(TrustError) as raised:
            pytest.fail(f"{name}: accepted as {node_of_ca(certificate)}")
        assert raised.value.code == "bad-device-ca"


def test_device_ca_with_a_key_of_another_kind_is_refused() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    start = datetime(2024, 1, 1, tzinfo=UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, start, start + timedelta(days=9999))
    with pytest.raises(TrustError, match="Ed25519"):
        node_of_ca(der(builder.sign(key, SHA256())))
