"""What the joiner checks before it shows its nonce."""

from dataclasses import replace
from pathlib import Path

import pytest

from meshgpu.adapters.key_files import KeyFiles
from meshgpu.agent.comparing import check_terms
from meshgpu.errors import TrustError
from meshgpu.model.ids import MeshId, NodeId, UserName, digest, key_id, node_id
from meshgpu.model.pairing import CompareBinding, CompareTerms
from meshgpu.model.trust import Role
from meshgpu.wire.notary import WireNotary

BINDING = CompareBinding(digest(b"certificate"), digest(b"commitment"), b"n" * 32, MeshId("5e" * 32))


@pytest.fixture
def notary(tmp_path: Path) -> tuple[WireNotary, CompareTerms, KeyFiles]:
    keys, other = KeyFiles(tmp_path / "keys"), KeyFiles(tmp_path / "other")
    notary, key = WireNotary(keys.sign, keys.verify), keys.node_key()
    signed = notary.sign(key_id(key), BINDING)
    node, ca = node_id(key), keys.device_ca()
    return notary, CompareTerms(BINDING.mesh, "lab", node, key, ca, Role.RIG, UserName("bob"), b"n" * 32, signed), other


def test_terms_that_hold_together_are_accepted(notary: tuple[WireNotary, CompareTerms, KeyFiles]) -> None:
    check_terms(notary[0], notary[1], BINDING)


def test_terms_signed_for_another_conversation_are_refused(notary: tuple[WireNotary, CompareTerms, KeyFiles]) -> None:
    for other in (
        replace(BINDING, certificate=digest(b"middle")),
        replace(BINDING, commitment=digest(b"another")),
        replace(BINDING, nonce=b"m" * 32),
        replace(BINDING, mesh=MeshId("00" * 32)),
    ):
        with pytest.raises(TrustError, match="stands between"):
            check_terms(notary[0], notary[1], other)


def test_terms_with_keys_or_a_role_that_do_not_fit_are_refused(
    notary: tuple[WireNotary, CompareTerms, KeyFiles],
) -> None:
    book, terms, other = notary
    for wrong in (
        replace(terms, device_ca=other.device_ca()),
        replace(terms, node=NodeId("a" * 52)),
        replace(terms, role=Role.BURST),
        replace(terms, nonce=b"n" * 31),
    ):
        with pytest.raises(TrustError, match="do not fit together"):
            check_terms(book, wrong, BINDING)
