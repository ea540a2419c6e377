"""Keys port over PEM files: this machine's node key, its users' keys, its device CA, and the leaves made from them."""

import contextlib
import hashlib
import os
import stat
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.ids import KeyId, NodeId, key_id, node_id
from meshgpu.wire.certificates import der, make_device_ca, make_leaf, node_of_ca, pem, server_name

__all__ = ["KeyFiles", "RecoveryKey", "node_of_ca"]

LEAF_BACKDATED: Final = timedelta(hours=24)
"""A peer whose clock is a day behind ours must still accept a fresh leaf; TLS knows no slack."""

LEAF_LIFETIME: Final = timedelta(days=7)
"""Long enough for a clock that is days ahead, short enough that a stolen leaf dies by itself."""

LEAF_RENEWAL_S: Final = 86_400.0
"""Seconds from the making of a leaf, in either direction of the clock, after which another is made."""

NODE_FILE: Final = "node.pem"
"""What makes this machine the node that it is."""

_CA_FILE: Final = "device-ca.pem"
_SEALING_FILE: Final = "sealing.pem"


class KeyFiles:
    """PEM files of mode 0600 in `directory` (0700, made when needed). A file that exists is never written again.

    Every method may be called from any thread, and raises MeshgpuError `bad-key` where a file cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.RLock()
        self._keys: dict[str, ed25519.Ed25519PrivateKey] = {}
        self._ca: x509.Certificate | None = None
        self._leaf: tuple[float, bytes, bytes] | None = None

    def check(self) -> None:
        """Refuse keys that other accounts can read, before the first of them is used."""
        for path in sorted(self._directory.glob("*.pem")):
            _check_private(path)

    def node_key(self) -> bytes:
        """Public device key, 32 raw bytes; made on the first call."""
        return self._key(NODE_FILE).public_key().public_bytes_raw()

    def device_ca(self) -> bytes:
        """This node's device CA, DER; made on the first call."""
        return der(self._device_ca())

    def user_key(self, uid: int) -> bytes:
        """Public key of the OS account `uid`, 32 raw bytes; made on the first call."""
        return self._key(f"user-{uid}.pem").public_key().public_bytes_raw()

    def sealing_key(self) -> bytes:
        """Public X25519 key that secrets are sealed to, 32 raw bytes; made on the first call."""
        return self._sealing().public_key().public_bytes_raw()

    def exchange(self, public_key: bytes) -> bytes:
        """32 bytes that only this machine's sealing key and the other key's owner know; ValueError for no key."""
        return self._sealing().exchange(x25519.X25519PublicKey.from_public_bytes(public_key))

    def sign(self, key: KeyId, message: bytes) -> bytes:
        """64 bytes of Ed25519; raises TrustError `no-such-key` for a key that is not this machine's."""
        private = self._find(key) or self._find(key, read_all=True)
        if private is None:
            raise TrustError("no-such-key", f"cannot sign with the key {key}: it is not in {self._directory}")
        return private.sign(message)

    def verify(self, public_key: bytes, message: bytes, signature: bytes) -> bool:
        """Whether `signature` is that of the Ed25519 key (32 raw bytes) over `message`; junk is simply not one."""
        try:
            ed25519.Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True

    def leaf(self, now_wall_s: float) -> tuple[bytes, bytes]:
        """(private key PEM, certificate PEM) of a P-256 leaf that is valid at `now_wall_s`; renewed daily."""
        with self._lock:
            if self._leaf is None or abs(now_wall_s - self._leaf[0]) >= LEAF_RENEWAL_S:
                self._leaf = (now_wall_s, *self.new_leaf(now_wall_s, LEAF_LIFETIME))
            return self._leaf[1:]

    def new_leaf(self, now_wall_s: float, lifetime: timedelta) -> tuple[bytes, bytes]:
        """(private key PEM, certificate PEM) of a leaf that nobody has seen, backdated like all."""
        now = datetime.fromtimestamp(now_wall_s, UTC)
        signer = self._key(NODE_FILE)
        name = server_name(node_id(signer.public_key().public_bytes_raw()))
        private = ec.generate_private_key(ec.SECP256R1())
        validity = (now - LEAF_BACKDATED, now - LEAF_BACKDATED + lifetime)
        certificate = make_leaf(private, name, validity, (self._device_ca(), signer))
        return _private_pem(private), pem(certificate)

    def _key(self, name: str) -> ed25519.Ed25519PrivateKey:
        with self._lock:
            if name not in self._keys:
                data = self._read_or_make(name, lambda: _private_pem(ed25519.Ed25519PrivateKey.generate()))
                self._keys[name] = _parse_key(self._directory / name, data)
            return self._keys[name]

    def _sealing(self) -> x25519.X25519PrivateKey:
        with self._lock:
            data = self._read_or_make(_SEALING_FILE, lambda: _private_pem(x25519.X25519PrivateKey.generate()))
            path = self._directory / _SEALING_FILE
            try:
                private = load_pem_private_key(data, password=None)
            except (ValueError, TypeError, UnsupportedAlgorithm) as error:
                raise _corrupt(path, "it is not an unencrypted PEM key") from error
            if not isinstance(private, x25519.X25519PrivateKey):
                raise _corrupt(path, "its key is not an X25519 key")
            return private

    def _find(self, key: KeyId, *, read_all: bool = False) -> ed25519.Ed25519PrivateKey | None:
        with self._lock:
            if read_all:
                for path in sorted(self._directory.glob("*.pem")):
                    if path.name == NODE_FILE or path.name.startswith("user-"):
                        self._key(path.name)
            matches = (private for private in self._keys.values() if _id_of(private) == key)
            return next(matches, None)

    def _device_ca(self) -> x509.Certificate:
        with self._lock:
            if self._ca is None:
                private = self._key(NODE_FILE)
                data = self._read_or_make(_CA_FILE, lambda: pem(make_device_ca(private)))
                self._ca = _parse_ca(self._directory / _CA_FILE, data, NodeId(_id_of(private)))
            return self._ca

    def _read_or_make(self, name: str, make: Callable[[], bytes]) -> bytes:
        """Contents of a file; where there is none, one appears whole or not at all, and the first to make it wins."""
        path = self._directory / name
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._directory.chmod(0o700)
            if not path.exists():
                create(path, make())
            _check_private(path)
            return path.read_bytes()
        except OSError as error:
            reason = error.strerror or str(error)
            raise MeshgpuError("bad-key", f"cannot keep {path}: {reason}", f"ls -ld {self._directory}") from error


class RecoveryKey:
    """The key that follows from the words which `init` printed once. Kept in memory, for as long as this lives."""

    def __init__(self, words: str) -> None:
        seed = hashlib.sha256(b"meshgpu recovery 1" + "".join(words.lower().split()).encode()).digest()
        self._private = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key = self._private.public_key().public_bytes_raw()

    def sign(self, key: KeyId, message: bytes) -> bytes:
        """64 bytes of Ed25519; raises TrustError `no-such-key` for any key but this."""
        if key != key_id(self.public_key):
            raise TrustError("no-such-key", f"cannot sign with the key {key}: this is the recovery key")
        return self._private.sign(message)


def create(path: Path, data: bytes) -> None:
    """Make `path` durable with mode 0600, or leave the one that somebody else made meanwhile."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # A link, not a rename: a rename would replace a key that appeared since we looked.
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()
    sync(path.parent)


def sync(directory: Path) -> None:
    """Make durable which names a directory has."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_private(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise MeshgpuError("bad-key", f"cannot use {path}: its mode is {mode:04o}, expected 0600", f"chmod 600 {path}")


def _parse_key(path: Path, data: bytes) -> ed25519.Ed25519PrivateKey:
    try:
        private = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _corrupt(path, "it is not an unencrypted PEM key") from error
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise _corrupt(path, "its key is not an Ed25519 key")
    return private


def _parse_ca(path: Path, data: bytes, owner: NodeId) -> x509.Certificate:
    try:
        certificate = x509.load_pem_x509_certificate(data)
        node = node_of_ca(der(certificate))
    except (ValueError, TrustError) as error:
        raise _corrupt(path, f"it is not a device CA: {error}") from error
    if node != owner:
        raise _corrupt(path, f"it belongs to the node {node}, expected {owner} ({NODE_FILE} beside it)")
    return certificate


def _corrupt(path: Path, found: str) -> MeshgpuError:
    return MeshgpuError(
        "bad-key", f"cannot use {path}: {found}", f"restore it from a backup, or start anew: mv {path} {path}.bad"
    )


def _id_of(private: ed25519.Ed25519PrivateKey) -> KeyId:
    return key_id(private.public_key().public_bytes_raw())


def _private_pem(
    private: ed25519.Ed25519PrivateKey | x25519.X25519PrivateKey | ec.EllipticCurvePrivateKey,
) -> bytes:
    return private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
