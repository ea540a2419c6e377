"""Names of things."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshgpu.model.ids import JobId, as_name, base32, digest, display_name, is_name, key_id, node_id, random_id


@given(st.binary(min_size=16, max_size=16))
def test_random_ids_have_one_form(random_bytes: bytes) -> None:
    text = random_id(random_bytes)
    assert len(text) == 26
    assert text == text.lower()
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyz234567")


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16))
def test_different_bytes_are_different_ids(one: bytes, other: bytes) -> None:
    assert (random_id(one) == random_id(other)) == (one == other)


def test_ids_of_keys_are_their_hashes() -> None:
    assert str(node_id(b"k" * 32)) == str(key_id(b"k" * 32))
    assert key_id(b"k" * 32) != key_id(b"l" * 32)
    assert len(node_id(b"k" * 32)) == 52
    assert len(digest(b"")) == 64


def test_base32_has_no_padding() -> None:
    assert base32(b"f") == "my"


@pytest.mark.parametrize("text", ["a", "rig7", "a-b", "x" * 40, "0"])
def test_names_are_accepted(text: str) -> None:
    assert is_name(text)


@pytest.mark.parametrize("text", ["", "-a", "a-", "A", "a b", "a.b", "x" * 41, "ä", "a\n"])
def test_other_texts_are_no_names(text: str) -> None:
    assert not is_name(text)


@given(st.text(max_size=80))
def test_every_text_has_a_nearest_name(text: str) -> None:
    assert is_name(as_name(text, "machine"))


def test_nearest_name_keeps_what_people_recognise() -> None:
    assert as_name("Ada's PC.local", "machine") == "ada-s-pc-local"
    assert as_name("…", "machine") == "machine"


def test_people_see_a_job_by_name_and_a_few_characters() -> None:
    job = JobId("k7qabc")
    assert display_name("train", job) == "train-k7q"
    assert display_name("train", job, 5) == "train-k7qab"
