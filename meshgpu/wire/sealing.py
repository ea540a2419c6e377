"""Seals the values of a job's secrets to machines, and opens them there.

One random content key encrypts all values once (ChaCha20-Poly1305); for each machine it is encrypted with a key from
an X25519 exchange between a key of this wrap alone and the machine's (HKDF-SHA256). What the box is bound to goes into
each derivation and each tag. All keys are used once, so that every nonce may be zero.
"""

import json
from collections.abc import Callable, Mapping
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.ids import NodeId
from meshgpu.model.job import SecretBox, SecretWrap

KEY_BYTES: Final = 32
_NONCE: Final = bytes(12)


def seal(values: Mapping[str, str], binding: bytes, keys: Mapping[NodeId, bytes]) -> SecretBox:
    """Seal `values` ({name: value}) to the machines of `keys` ({node: X25519 public key}).

    Raises MeshgpuError `no-sealing-key` for a key that is none.
    """
    content_key = ChaCha20Poly1305.generate_key()
    ciphertext = ChaCha20Poly1305(content_key).encrypt(_NONCE, json.dumps([*values.values()]).encode(), binding)
    wraps = tuple(_wrap(content_key, binding, node, key) for node, key in sorted(keys.items()))
    return SecretBox(tuple(values), ciphertext, wraps)


def unseal(box: SecretBox, binding: bytes, node: NodeId, exchange: Callable[[bytes], bytes]) -> dict[str, str]:
    """{name: value}, on the machine `node`. exchange: its sealing key's X25519 exchange with a public key.

    Raises TrustError `sealed`, which says nothing of what is inside.
    """
    wrap = next((wrap for wrap in box.wraps if wrap.node == node), None)
    if wrap is None:
        raise TrustError("sealed", "cannot open the job's secrets: they were not sealed to this machine")
    try:
        key = _derive(exchange(wrap.ephemeral), wrap.ephemeral, binding, node)
        content_key = ChaCha20Poly1305(key).decrypt(_NONCE, wrap.wrapped, binding)
        values = json.loads(ChaCha20Poly1305(content_key).decrypt(_NONCE, box.ciphertext, binding))
    except (InvalidTag, ValueError):  # `from None`: what was being read must not stand in a traceback
        raise TrustError("sealed", "cannot open the job's secrets: they were sealed to another job or key") from None
    if not isinstance(values, list) or len(values) != len(box.names) or not all(isinstance(v, str) for v in values):
        raise TrustError("sealed", "cannot open the job's secrets: names and values do not go together")
    return dict(zip(box.names, values, strict=True))


def _wrap(content_key: bytes, binding: bytes, node: NodeId, key: bytes) -> SecretWrap:
    private = X25519PrivateKey.generate()
    ephemeral = private.public_key().public_bytes_raw()
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(key))
    except ValueError as error:
        raise MeshgpuError("no-sealing-key", f"cannot seal secrets to {node}: its key is no X25519 key") from error
    wrapped = ChaCha20Poly1305(_derive(shared, ephemeral, binding, node)).encrypt(_NONCE, content_key, binding)
    return SecretWrap(node, ephemeral, wrapped)


def _derive(shared: bytes, ephemeral: bytes, binding: bytes, node: NodeId) -> bytes:
    info = b"meshgpu wrap 1" + node.encode() + binding
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=ephemeral, info=info).derive(shared)
