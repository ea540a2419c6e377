from hypothesis import given
from hypothesis import strategies as st

from meshgpu.wire.dsse import pae


def test_encodes_the_example_of_the_specification() -> None:
    encoded = pae("http://example.com/HelloWorld", b"hello world")
    assert encoded == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_lengths_count_bytes_not_characters() -> None:
    assert pae("ü", "ü ü".encode()) == b"DSSEv1 2 \xc3\xbc 5 \xc3\xbc \xc3\xbc"


def test_bytes_cannot_move_between_kind_and_payload() -> None:
    assert pae("a 1 b", b"c") != pae("a", b"b 1 c")


@given(st.tuples(st.text(), st.binary()), st.tuples(st.text(), st.binary()))
def test_different_things_have_different_encodings(one: tuple[str, bytes], other: tuple[str, bytes]) -> None:
    assert (pae(*one) == pae(*other)) == (one == other)
