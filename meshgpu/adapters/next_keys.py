"""New keys beside the old ones, from the moment they are made until everybody was told by the old ones.

Beside the keys lies `next/` while new ones wait to be used. Which set this machine is, its mesh log says, not these
files: so after a crash at any step it is either still the old member or wholly the new one. Of the old keys nothing is
left but a leaf, which opens a Link where the change has not been heard of, and can sign nothing.
"""

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519

from meshgpu.adapters.key_files import LEAF_BACKDATED, NODE_FILE, KeyFiles, create, sync
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import NodeId, node_id
from meshgpu.wire.certificates import der, pem

LAST_LEAF_LIFETIME: Final = timedelta(days=90)
"""For a colleague's machine that is off all summer. It is worth nothing to a thief where the change was heard of."""

_NEXT: Final = "next"
_LAST_LEAF: Final = "last-leaf-"


@dataclass(frozen=True, slots=True)
class LastLeaf:
    """All that is left of an identity that this machine gave up: enough to open a Link, for a while."""

    public_key: bytes
    ca: bytes
    key: bytes
    certificate: bytes
    ends_wall_s: float

    def node_key(self) -> bytes:
        return self.public_key

    def device_ca(self) -> bytes:
        return self.ca

    def leaf(self, now_wall_s: float) -> tuple[bytes, bytes]:
        _ = now_wall_s
        return self.key, self.certificate


class NextKeys:
    """The next keys of those in `directory`. What a method did is on disk when it returns.

    Every method blocks, and raises MeshgpuError `bad-key` where files cannot be read or written.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._next = directory / _NEXT

    @property
    def is_waiting(self) -> bool:
        return self._next.exists()

    def make(self) -> KeyFiles:
        """Begin a new set, in place of one that was never used. Keys that are asked of it later belong to it."""
        self.drop()
        keys = KeyFiles(self._next)
        keys.device_ca()
        keys.sealing_key()
        with _told(self._directory):
            sync(self._directory)  # else the set could be lost after the mesh has been told of it
        return keys

    def drop(self) -> None:
        """Forget a set that is not to be used."""
        with _told(self._directory):
            if self.is_waiting:
                shutil.rmtree(self._next)

    def take(self, node: NodeId, now_wall_s: float) -> None:
        """Be `node` from now on, by the set that waits if that is its; drop it otherwise.

        To be called before anything else uses the keys. Nothing has changed for the mesh until it returns.
        """
        old = KeyFiles(self._directory)
        before = node_id(old.node_key())
        if before != node and (self._next / NODE_FILE).exists() and node_id(KeyFiles(self._next).node_key()) == node:
            self._keep_last_leaf(old, before, now_wall_s)
            with _told(self._directory):
                names = sorted((path.name for path in self._next.glob("*.pem")), key=lambda name: name == NODE_FILE)
                for name in names:  # the node key last: with it this machine becomes the other
                    if name == NODE_FILE:
                        sync(self._directory)
                    (self._next / name).replace(self._directory / name)
                sync(self._directory)
        self.drop()

    def _keep_last_leaf(self, old: KeyFiles, before: NodeId, now_wall_s: float) -> None:
        path = self._directory / f"{_LAST_LEAF}{before}.pem"
        if path.exists():
            return  # a crash came after it; what it was made with may be half replaced by now
        key, certificate = old.new_leaf(now_wall_s, LEAF_BACKDATED + LAST_LEAF_LIFETIME)
        with _told(self._directory):
            create(path, key + certificate + pem(x509.load_der_x509_certificate(old.device_ca())))

    # -- what is left of the old ones ---------------------------------------------------------------------------------

    def last_leaves(self, now_wall_s: float) -> list[LastLeaf]:
        """Those that still open a Link; others are removed."""
        found: list[LastLeaf] = []
        with _told(self._directory):
            for path in sorted(self._directory.glob(f"{_LAST_LEAF}*.pem")):
                leaf = _read(path)
                if leaf is not None and now_wall_s < leaf.ends_wall_s:
                    found.append(leaf)
                else:
                    path.unlink()
        return found

    def forget(self, leaf: LastLeaf) -> None:
        """Everybody has been told."""
        with _told(self._directory):
            (self._directory / f"{_LAST_LEAF}{node_id(leaf.public_key)}.pem").unlink(missing_ok=True)


def _read(path: Path) -> LastLeaf | None:
    """None for a file that is none."""
    with contextlib.suppress(ValueError):
        data = path.read_bytes()
        certificate, ca = x509.load_pem_x509_certificates(data)
        public = ca.public_key()
        if isinstance(public, ed25519.Ed25519PublicKey):
            key = data[: data.index(b"-----BEGIN CERTIFICATE")]
            ends_wall_s = certificate.not_valid_after_utc.timestamp()
            return LastLeaf(public.public_bytes_raw(), der(ca), key, pem(certificate), ends_wall_s)
    return None


@contextmanager
def _told(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise MeshgpuError(
            "bad-key", f"cannot change the keys in {directory}: {reason}", f"ls -l {directory}"
        ) from error
