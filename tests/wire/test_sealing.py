"""What is sealed can be read by those it was sealed to, in the job it was sealed for, and by nobody else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshgpu.adapters.key_files import KeyFiles
from meshgpu.core.trust.sealing import binding
from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.ids import JobId, KeyId, MeshId, NodeId
from meshgpu.model.job import SecretBox
from meshgpu.wire.sealing import seal, unseal

VALUES = {"TOKEN": "canary", "OTHER": "ä\n"}
RIG, OTHER = NodeId("r" * 52), NodeId("o" * 52)
MESH, JOB, KEY = MeshId("ab" * 32), JobId("j" * 26), KeyId("k" * 52)
BOUND = binding(MESH, JOB, KEY, tuple(VALUES))


@pytest.fixture
def rig(tmp_path: Path) -> KeyFiles:
    return KeyFiles(tmp_path / "rig")


@pytest.fixture
def other(tmp_path: Path) -> KeyFiles:
    return KeyFiles(tmp_path / "other")


@pytest.fixture
def box(rig: KeyFiles, other: KeyFiles) -> SecretBox:
    return seal(VALUES, BOUND, {RIG: rig.sealing_key(), OTHER: other.sealing_key()})


def test_each_machine_that_it_was_sealed_to_reads_it(box: SecretBox, rig: KeyFiles, other: KeyFiles) -> None:
    assert box.names == ("TOKEN", "OTHER")
    assert unseal(box, BOUND, RIG, rig.exchange) == VALUES
    assert unseal(box, BOUND, OTHER, other.exchange) == VALUES
    assert b"canary" not in repr(box).encode()


def test_machine_without_a_wrap_reads_nothing(box: SecretBox, tmp_path: Path) -> None:
    stranger = KeyFiles(tmp_path / "stranger")
    with pytest.raises(TrustError):
        unseal(box, BOUND, NodeId("s" * 52), stranger.exchange)
    stolen = tuple(replace(wrap, node=NodeId("s" * 52)) for wrap in box.wraps)
    for wrap in stolen:
        with pytest.raises(TrustError):
            unseal(replace(box, wraps=(wrap,)), BOUND, NodeId("s" * 52), stranger.exchange)


def test_machine_cannot_use_the_wrap_of_another(box: SecretBox, rig: KeyFiles) -> None:
    wrap = next(wrap for wrap in box.wraps if wrap.node == OTHER)
    with pytest.raises(TrustError):
        unseal(replace(box, wraps=(replace(wrap, node=RIG),)), BOUND, RIG, rig.exchange)


@pytest.mark.parametrize(
    "bound",
    [
        binding(MeshId("cd" * 32), JOB, KEY, tuple(VALUES)),
        binding(MESH, JobId("i" * 26), KEY, tuple(VALUES)),
        binding(MESH, JOB, KeyId("l" * 52), tuple(VALUES)),
        binding(MESH, JOB, KEY, ("OTHER", "TOKEN")),
        binding(MESH, JOB, KEY, ("TOKENOTHER",)),
    ],
    ids=["mesh", "job", "user", "order", "names"],
)
def test_box_opens_nowhere_but_where_it_was_sealed_for(box: SecretBox, rig: KeyFiles, bound: bytes) -> None:
    with pytest.raises(TrustError) as caught:
        unseal(box, bound, RIG, rig.exchange)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_values_are_bound_to_their_job_even_for_who_has_the_content_key(rig: KeyFiles) -> None:
    """Two boxes of one job: the wrap of one does not open the ciphertext of the other."""
    boxes = [seal(VALUES, BOUND, {RIG: rig.sealing_key()}) for _ in range(2)]
    with pytest.raises(TrustError):
        unseal(replace(boxes[0], ciphertext=boxes[1].ciphertext), BOUND, RIG, rig.exchange)
    assert boxes[0].ciphertext != boxes[1].ciphertext
    assert boxes[0].wraps[0].ephemeral != boxes[1].wraps[0].ephemeral


@pytest.mark.parametrize("part", ["ciphertext", "wrapped", "ephemeral"])
def test_changed_box_is_refused(box: SecretBox, rig: KeyFiles, part: str) -> None:
    def flipped(data: bytes) -> bytes:
        return bytes([data[0] ^ 1]) + data[1:]

    wrap = next(wrap for wrap in box.wraps if wrap.node == RIG)
    if part == "ciphertext":
        box = replace(box, ciphertext=flipped(box.ciphertext))
    else:
        changes: dict[str, Any] = {part: flipped(getattr(wrap, part))}
        box = replace(box, wraps=(replace(wrap, **changes),))
    with pytest.raises(TrustError):
        unseal(box, BOUND, RIG, rig.exchange)


@pytest.mark.parametrize("key", [b"", b"short", bytes(32)], ids=["empty", "short", "of low order"])
def test_nonsense_of_others_is_an_error_with_words(box: SecretBox, rig: KeyFiles, key: bytes) -> None:
    with pytest.raises(MeshgpuError):
        seal(VALUES, BOUND, {RIG: key})
    wrap = replace(box.wraps[0], node=RIG, ephemeral=key)
    with pytest.raises(TrustError):
        unseal(replace(box, wraps=(wrap,)), BOUND, RIG, rig.exchange)


def test_sealing_key_is_kept_like_the_other_keys(rig: KeyFiles, tmp_path: Path) -> None:
    key = rig.sealing_key()
    assert KeyFiles(tmp_path / "rig").sealing_key() == key
    path = tmp_path / "rig" / "sealing.pem"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(MeshgpuError) as caught:
        KeyFiles(tmp_path / "rig").sealing_key()
    assert caught.value.code == "bad-key"
