"""What is signed when a payload is signed: DSSE's pre-authentication encoding, which binds the bytes to their kind."""


def pae(kind: str, payload: bytes) -> bytes:
    """`DSSEv1`, then kind and payload, each after its length in bytes (secure-systems-lab/dsse, protocol.md).

    Two different (kind, payload) pairs never have equal encodings.
    """
    name = kind.encode()
    return b"DSSEv1 %d %b %d %b" % (len(name), name, len(payload), payload)
