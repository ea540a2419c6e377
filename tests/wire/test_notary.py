from dataclasses import dataclass, replace
from hashlib import sha256

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.ids import Digest, KeyId, NodeId, UserName, key_id
from meshgpu.model.trust import Head, LinkUser, Notary, Signed
from meshgpu.wire import notary as notary_module
from meshgpu.wire.codec import decode, encode
from meshgpu.wire.dsse import pae
from meshgpu.wire.notary import WireNotary

HEAD = Head(KeyId("author"), 3, Digest("0" * 64))
ADA = Ed25519PrivateKey.from_private_bytes(b"a" * 32)
BOB = Ed25519PrivateKey.from_private_bytes(b"b" * 32)
ADA_PUBLIC = ADA.public_key().public_bytes_raw()
BOB_PUBLIC = BOB.public_key().public_bytes_raw()
KEYS = {key_id(ADA_PUBLIC): ADA, key_id(BOB_PUBLIC): BOB}


def verify(public_key: bytes, message: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except InvalidSignature:
        return False
    return True


@pytest.fixture
def notary() -> Notary:
    return WireNotary(lambda key, message: KEYS[key].sign(message), verify)


@pytest.fixture
def signed(notary: Notary) -> Signed:
    return notary.sign(key_id(ADA_PUBLIC), HEAD)


@dataclass
class Decoder:
    """The codec's `decode`, counted."""

    calls: int = 0

    def __call__(self, kind: type, data: bytes) -> object:
        self.calls += 1
        return decode(kind, data)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    spy = Decoder()
    monkeypatch.setattr(notary_module, "decode", spy)
    return spy


def refused(notary: Notary, signed: Signed, public_key: bytes = ADA_PUBLIC, kind: type = Head) -> str:
    """Error code of a read that fails."""
    with pytest.raises(TrustError) as caught:
        notary.read(signed, public_key, kind)
    return caught.value.code


def flipped(data: bytes) -> list[bytes]:
    """`data` with each of its bits wrong, one at a time."""
    number = int.from_bytes(data, "big")
    return [(number ^ (1 << bit)).to_bytes(len(data), "big") for bit in range(8 * len(data))]


def flipped_text(text: str) -> list[str]:
    """ASCII text with each of its lower seven bits wrong, one at a time."""
    return [text[:at] + chr(ord(text[at]) ^ (1 << bit)) + text[at + 1 :] for at in range(len(text)) for bit in range(7)]


def test_a_signed_value_is_read_again(notary: Notary, signed: Signed, decoder: Decoder) -> None:
    assert notary.read(signed, ADA_PUBLIC, Head) == HEAD
    assert decoder.calls == 1


def test_the_signature_is_over_dsse(signed: Signed) -> None:
    payload = encode(HEAD)
    assert signed == Signed("Head", payload, key_id(ADA_PUBLIC), signed.signature)
    assert verify(ADA_PUBLIC, b"DSSEv1 4 Head %d %b" % (len(payload), payload), signed.signature)


def test_any_wrong_bit_of_the_payload_is_refused(notary: Notary, signed: Signed, decoder: Decoder) -> None:
    for payload in flipped(signed.payload):
        assert refused(notary, replace(signed, payload=payload)) == "bad-signature"
    assert decoder.calls == 0


def test_any_wrong_bit_of_the_signature_is_refused(notary: Notary, signed: Signed, decoder: Decoder) -> None:
    for signature in flipped(signed.signature):
        assert refused(notary, replace(signed, signature=signature)) == "bad-signature"
    assert decoder.calls == 0


def test_any_wrong_bit_of_the_kind_is_refused(notary: Notary, signed: Signed, decoder: Decoder) -> None:
    for kind in flipped_text(signed.kind):
        assert refused(notary, replace(signed, kind=kind)) == "wrong-kind"
    assert decoder.calls == 0


def test_any_wrong_bit_of_the_key_is_refused(notary: Notary, signed: Signed, decoder: Decoder) -> None:
    for key in flipped_text(signed.key):
        assert refused(notary, replace(signed, key=KeyId(key))) == "wrong-key"
    assert decoder.calls == 0


def test_any_wrong_bit_of_the_public_key_is_refused(notary: Notary, signed: Signed, decoder: Decoder) -> None:
    for public_key in flipped(ADA_PUBLIC):
        assert refused(notary, signed, public_key) == "wrong-key"
    assert decoder.calls == 0


def test_another_key_that_is_trusted_is_refused(notary: Notary, signed: Signed, decoder: Decoder) -> None:
    assert refused(notary, signed, BOB_PUBLIC) == "wrong-key"
    assert refused(notary, replace(signed, key=key_id(BOB_PUBLIC)), BOB_PUBLIC) == "bad-signature"
    assert decoder.calls == 0


def test_a_signature_of_one_kind_does_not_serve_for_another(notary: Notary, decoder: Decoder) -> None:
    link = notary.sign(key_id(ADA_PUBLIC), LinkUser(UserName("ada"), ADA_PUBLIC, NodeId("n"), 1000))
    assert refused(notary, link) == "wrong-kind"
    assert refused(notary, replace(link, kind="Head")) == "bad-signature"
    assert decoder.calls == 0


def test_what_is_signed_but_cannot_be_read_is_refused(notary: Notary) -> None:
    payload = b"\xff"
    wrong = Signed("Head", payload, key_id(ADA_PUBLIC), ADA.sign(pae("Head", payload)))
    assert refused(notary, wrong) == "bad-message"


def test_the_error_of_the_signer_is_passed_on() -> None:
    def no_such_key(key: KeyId, message: bytes) -> bytes:
        raise TrustError("no-such-key", f"cannot sign: {key} is not ours")

    with pytest.raises(TrustError, match="is not ours"):
        WireNotary(no_such_key, verify).sign(KeyId("k"), HEAD)


def test_what_has_no_wire_form_is_not_signed(notary: Notary) -> None:
    with pytest.raises(MeshgpuError, match="cannot write"):
        notary.sign(key_id(ADA_PUBLIC), replace(HEAD, seq=-1))


def test_the_digest_names_kind_payload_and_key(notary: Notary, signed: Signed) -> None:
    parts = (b"Head", encode(HEAD), key_id(ADA_PUBLIC).encode())
    expected = sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).hexdigest()
    assert notary.digest(signed) == expected
    assert notary.digest(replace(signed, signature=bytes(64))) == expected


def test_digests_differ_where_parts_are_cut_elsewhere(notary: Notary) -> None:
    cuts = [Signed("He", b"adk", KeyId("ey"), b""), Signed("Head", b"k", KeyId("ey"), b"")]
    cuts += [Signed("Head", b"", KeyId("key"), b""), Signed("Head", b"ke", KeyId("y"), b"")]
    assert len({notary.digest(signed) for signed in cuts}) == len(cuts)


def test_a_pinned_value_is_read_by_its_digest_alone(notary: Notary, signed: Signed) -> None:
    unsigned = replace(signed, signature=b"")
    assert notary.read_pinned(unsigned, notary.digest(signed), Head) == HEAD


def test_a_pinned_value_with_another_digest_or_kind_is_refused(
    notary: Notary, signed: Signed, decoder: Decoder
) -> None:
    pinned = notary.digest(signed)
    for payload in flipped(signed.payload):
        with pytest.raises(TrustError, match="digest") as caught:
            notary.read_pinned(replace(signed, payload=payload), pinned, Head)
        assert caught.value.code == "wrong-digest"
    with pytest.raises(TrustError) as caught:
        notary.read_pinned(signed, pinned, LinkUser)
    assert caught.value.code == "wrong-kind"
    assert decoder.calls == 0
