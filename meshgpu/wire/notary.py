"""Signs values and reads signed ones: the one place where signatures and bytes meet."""

from collections.abc import Callable
from typing import TypeVar

from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.ids import Digest, KeyId, digest, key_id
from meshgpu.model.trust import Signed
from meshgpu.wire.codec import decode, encode
from meshgpu.wire.dsse import pae

T = TypeVar("T")


class WireNotary:
    """`model.trust.Notary` over protobuf and DSSE. It keeps nothing, so it may be shared between threads.

    sign: (key, bytes) -> 64 bytes; raises TrustError `no-such-key`. verify: (public key, bytes, signature) -> holds.
    """

    def __init__(self, sign: Callable[[KeyId, bytes], bytes], verify: Callable[[bytes, bytes, bytes], bool]) -> None:
        self._sign = sign
        self._verify = verify

    def sign(self, key: KeyId, value: object) -> Signed:
        """Raises TrustError `no-such-key`, and MeshgpuError `bad-message` for what has no wire form."""
        kind = type(value).__name__
        payload = encode(value)
        return Signed(kind, payload, key, self._sign(key, pae(kind, payload)))

    def read(self, signed: Signed, public_key: bytes, kind: type[T]) -> T:
        """Verify, then decode; raises TrustError: `wrong-kind`, `wrong-key`, `bad-signature`, `bad-message`."""
        _check_kind(signed, kind)
        if key_id(public_key) != signed.key:
            raise TrustError(
                "wrong-key", f"cannot trust a {kind.__name__}: key {signed.key!r} signed it, not {key_id(public_key)}"
            )
        if not self._verify(public_key, pae(signed.kind, signed.payload), signed.signature):
            raise TrustError(
                "bad-signature", f"cannot trust a {kind.__name__}: the signature of {signed.key} does not hold"
            )
        return _decode(signed, kind)

    def read_pinned(self, signed: Signed, digest: Digest, kind: type[T]) -> T:
        """Decode what is trusted because its digest is known; raises TrustError: `wrong-digest` or as `read` does."""
        _check_kind(signed, kind)
        if self.digest(signed) != digest:
            raise TrustError("wrong-digest", f"cannot trust a {kind.__name__}: it is not the one with digest {digest}")
        return _decode(signed, kind)

    def digest(self, signed: Signed) -> Digest:
        """SHA-256 over kind, payload and key, each after its length in 8 bytes, big-endian."""
        parts = (signed.kind.encode(), signed.payload, signed.key.encode())
        return digest(b"".join(len(part).to_bytes(8, "big") + part for part in parts))


def _check_kind(signed: Signed, kind: type) -> None:
    if signed.kind != kind.__name__:
        raise TrustError("wrong-kind", f"cannot trust a {kind.__name__}: what is signed is a {signed.kind[:40]!r}")


def _decode(signed: Signed, kind: type[T]) -> T:
    try:
        return decode(kind, signed.payload)
    except MeshgpuError as error:
        raise TrustError(error.code, error.message, error.hint) from error
