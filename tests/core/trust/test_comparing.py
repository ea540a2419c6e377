"""Six digits: equal where nobody stands between, different in every way that somebody could."""

import hashlib
import re
from dataclasses import fields, replace
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshgpu.core.trust.comparing import Knock, Terms, check_commitment, commit, digits, transcript
from meshgpu.errors import TrustError
from meshgpu.model.ids import MeshId, NodeId, UserName, digest
from meshgpu.model.pairing import Newcomer
from meshgpu.model.trust import Role

KNOCK = Knock(Newcomer(b"k" * 32, b"ca", b"u" * 32, 1000, "new"), UserName("bob"), digest(b"certificate"))
TERMS = Terms(MeshId("ab" * 32), "office", NodeId("a" * 52), b"p" * 32, b"admitter's ca", Role.RIG, UserName("bob"))
FALSE_KNOCK = replace(KNOCK, newcomer=replace(KNOCK.newcomer, public_key=b"m" * 32))
"""What a man in the middle says to the admitter."""
FALSE_CERTIFICATE = replace(KNOCK, certificate=digest(b"of the man in the middle"))
"""What the joiner says where it sees his certificate."""
JOINER, ADMITTER = b"j" * 32, b"a" * 32


def test_digits_are_read_in_two_groups_of_three() -> None:
    shown = digits(transcript(KNOCK, TERMS, JOINER, ADMITTER))
    assert re.fullmatch(r"[0-9]{3} [0-9]{3}", shown)


def test_nonce_that_was_committed_to_is_taken() -> None:
    check_commitment(commit(KNOCK, JOINER), KNOCK, JOINER)


@pytest.mark.parametrize(("knock", "nonce"), [(KNOCK, ADMITTER), (FALSE_KNOCK, JOINER), (FALSE_CERTIFICATE, JOINER)])
def test_wrong_commitment_is_refused(knock: Knock, nonce: bytes) -> None:
    with pytest.raises(TrustError, match="another nonce"):
        check_commitment(commit(KNOCK, JOINER), knock, nonce)


def test_short_nonce_that_could_be_guessed_is_refused() -> None:
    with pytest.raises(TrustError, match="another nonce"):
        check_commitment(commit(KNOCK, b"j"), KNOCK, b"j")


@given(st.integers(0, 255).map(lambda n: bytes([n]) * 32))
def test_every_field_changes_the_transcript(nonce: bytes) -> None:
    said = {transcript(KNOCK, TERMS, nonce, ADMITTER), transcript(KNOCK, TERMS, nonce, b"b" * 32)}
    said.add(transcript(KNOCK, TERMS, nonce[1:] + b"other", ADMITTER))
    new = {"uid": 1001}
    for field in fields(Newcomer):
        value = getattr(KNOCK.newcomer, field.name)
        change: dict[str, Any] = {field.name: new.get(field.name) or value + value[:1]}
        changed = replace(KNOCK.newcomer, **change)
        said.add(transcript(replace(KNOCK, newcomer=changed), TERMS, nonce, ADMITTER))
    said.add(transcript(replace(KNOCK, as_user=UserName("ann")), TERMS, nonce, ADMITTER))
    said.add(transcript(FALSE_CERTIFICATE, TERMS, nonce, ADMITTER))
    for field in fields(Terms):
        value = getattr(TERMS, field.name)
        other = Role.BURST if field.name == "role" else value + value[:1]
        change = {field.name: other}
        said.add(transcript(KNOCK, replace(TERMS, **change), nonce, ADMITTER))
    assert len(said) == 3 + len(fields(Newcomer)) + 2 + len(fields(Terms))


def test_man_in_the_middle_shows_different_digits() -> None:
    """He commits to the admitter and answers the joiner before either nonce that he lacks is shown to him."""
    for seed in range(1000):
        random = Random(seed)
        joiner, admitter, his_to_admitter, his_to_joiner = (random.randbytes(32) for _ in range(4))
        at_joiner = digits(transcript(FALSE_CERTIFICATE, TERMS, joiner, his_to_joiner))
        at_admitter = digits(transcript(FALSE_KNOCK, TERMS, his_to_admitter, admitter))
        assert at_joiner != at_admitter, seed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_nonce_shown_instead_of_a_commitment_lets_him_grind_equal_digits(seed: int) -> None:
    random = Random(seed)
    joiner, admitter, his_to_admitter = (random.randbytes(32) for _ in range(3))
    wanted = digits(transcript(FALSE_KNOCK, TERMS, his_to_admitter, admitter))
    number = int(wanted.replace(" ", ""))
    begun = hashlib.sha256(transcript(FALSE_CERTIFICATE, TERMS, joiner, b"\0" * 32)[:-32])
    for tried in range(20_000_000):
        attempt = begun.copy()
        attempt.update(tried.to_bytes(32, "big"))
        if int.from_bytes(attempt.digest(), "big") % 1_000_000 == number:
            break
    assert digits(transcript(FALSE_CERTIFICATE, TERMS, joiner, tried.to_bytes(32, "big"))) == wanted
