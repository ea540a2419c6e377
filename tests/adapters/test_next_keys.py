"""New keys beside the old ones: whatever happens in between, this machine is one or the other."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from meshgpu.adapters.key_files import KeyFiles
from meshgpu.adapters.next_keys import LAST_LEAF_LIFETIME, NextKeys
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import NodeId, key_id, node_id
from meshgpu.wire.certificates import leaf_belongs_to, node_of_ca, node_of_leaf

NOW = 1_790_000_000.0
STEPS = ("replace", "link", "unlink", "rmdir", "fsync", "mkdir")
"""Of what changes a disk, all that is called here."""


class Killed(BaseException):
    """The process is no more."""


@contextmanager
def killed_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let the process die when it would change the disk once more; yields what it did."""
    done: list[str] = []

    def limited(name: str, does: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            if len(done) >= steps:
                raise Killed
            done.append(name)
            return does(*arguments, **named)

        return step

    with monkeypatch.context() as patched:
        for name in STEPS:
            patched.setattr(os, name, limited(name, getattr(os, name)))
        yield done


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def identity(directory: Path) -> tuple[bytes, ...]:
    """All that a machine with one account is known by. Nothing of it is made only now."""
    names = {path.name for path in directory.glob("*.pem")}
    assert {"node.pem", "device-ca.pem", "sealing.pem", "user-1000.pem"} <= names
    keys = KeyFiles(directory)
    return keys.node_key(), keys.device_ca(), keys.sealing_key(), keys.user_key(1000)


def prepared(directory: Path) -> tuple[NodeId, tuple[bytes, ...], NodeId, tuple[bytes, ...]]:
    """An old identity in use and a new one that waits: (id, all of it) of each."""
    old = KeyFiles(directory)
    before = (old.node_key(), old.device_ca(), old.sealing_key(), old.user_key(1000))
    new = NextKeys(directory).make()
    after = (new.node_key(), new.device_ca(), new.sealing_key(), new.user_key(1000))
    return node_id(before[0]), before, node_id(after[0]), after


def test_new_keys_take_the_place_of_all_old_ones(directory: Path) -> None:
    _, before, node, after = prepared(directory)
    assert identity(directory) == before
    NextKeys(directory).take(node, NOW)
    assert identity(directory) == after
    assert not NextKeys(directory).is_waiting
    assert not set(before) & set(after)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in directory.glob("*.pem")}
    assert modes == {0o600}


def test_keys_that_the_mesh_was_never_told_of_go(directory: Path) -> None:
    old, before, _, _ = prepared(directory)
    NextKeys(directory).take(old, NOW)
    assert identity(directory) == before
    assert not NextKeys(directory).is_waiting


def test_keys_that_are_not_the_ones_that_the_mesh_was_told_of_are_not_taken(directory: Path) -> None:
    _, before, _, _ = prepared(directory)
    NextKeys(directory).take(NodeId("somebody"), NOW)
    assert identity(directory) == before


def test_keys_of_before_cannot_sign_any_more(directory: Path) -> None:
    _, before, node, after = prepared(directory)
    NextKeys(directory).take(node, NOW)
    assert KeyFiles(directory).sign(key_id(after[3]), b"x")
    for old in (before[0], before[3]):
        with pytest.raises(MeshgpuError):
            KeyFiles(directory).sign(key_id(old), b"x")


def test_killed_at_any_step_it_is_wholly_one_or_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the mesh was told, every start ends as the new one, however often it was interrupted before."""
    steps = 0
    while True:
        directory = tmp_path / f"keys-{steps}"
        old, before, node, after = prepared(directory)
        is_killed = False
        with killed_after(steps, monkeypatch) as done:
            try:
                NextKeys(directory).take(node, NOW)
            except Killed:
                is_killed = True
        current = node_id(KeyFiles(directory).node_key())
        assert current in (old, node)
        if current == node:
            assert identity(directory) == after
        # The next agent asks the log, which names `node` as the one that comes after `old`, and after itself.
        NextKeys(directory).take(node, NOW)
        assert identity(directory) == after, f"killed after {done}"
        assert not NextKeys(directory).is_waiting
        (leaf,) = NextKeys(directory).last_leaves(NOW)
        assert leaf.node_key() == before[0]
        if not is_killed:
            assert steps > 8
            return
        steps += 1


def test_killed_at_any_step_while_they_are_made_it_stays_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    while True:
        directory = tmp_path / f"keys-{steps}"
        old, before, _, _ = prepared(directory)  # a set that was never used is in the way, too
        is_killed = False
        with killed_after(steps, monkeypatch) as done:
            try:
                NextKeys(directory).make().user_key(1000)
            except Killed:
                is_killed = True
        NextKeys(directory).take(old, NOW)
        assert identity(directory) == before, f"killed after {done}"
        assert not NextKeys(directory).is_waiting
        if not is_killed:
            assert steps > 8
            return
        steps += 1


def test_set_is_on_disk_before_anybody_is_told(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its directory's name, too: a set that a power failure takes away would lock this machine out."""
    KeyFiles(directory).device_ca()
    synced: list[str] = []
    fsync = os.fsync

    def told(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", told)
    NextKeys(directory).make()
    assert synced[-1] == str(directory)
    assert str(directory / "next") in synced


def test_last_leaf_opens_links_as_the_old_node_for_a_while(directory: Path) -> None:
    old, before, node, _ = prepared(directory)
    NextKeys(directory).take(node, NOW)
    (leaf,) = NextKeys(directory).last_leaves(NOW)
    assert (leaf.node_key(), leaf.device_ca()) == (before[0], before[1])
    certificate = x509.load_pem_x509_certificate(leaf.leaf(NOW)[1])
    assert node_of_leaf(certificate) == node_of_ca(leaf.device_ca()) == old
    assert leaf_belongs_to(certificate, x509.load_der_x509_certificate(before[1]))
    late = NOW + LAST_LEAF_LIFETIME.total_seconds()
    assert leaf.ends_wall_s == late
    assert NextKeys(directory).last_leaves(late) == []
    assert list(directory.glob("last-leaf-*")) == []


def test_leaves_of_two_changes_are_kept_until_each_is_forgotten(directory: Path) -> None:
    _, first, node, second = prepared(directory)
    NextKeys(directory).take(node, NOW)
    _, _, third, _ = prepared(directory)
    NextKeys(directory).take(third, NOW)
    leaves = NextKeys(directory).last_leaves(NOW)
    assert {leaf.node_key() for leaf in leaves} == {first[0], second[0]}
    NextKeys(directory).forget(next(leaf for leaf in leaves if leaf.node_key() == first[0]))
    assert [leaf.node_key() for leaf in NextKeys(directory).last_leaves(NOW)] == [second[0]]


def test_leaf_that_cannot_be_read_is_none(directory: Path) -> None:
    _, _, node, _ = prepared(directory)
    NextKeys(directory).take(node, NOW)
    next(directory.glob("last-leaf-*")).write_bytes(b"rubbish")
    assert NextKeys(directory).last_leaves(NOW) == []


def test_failing_disk_is_told(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, before, node, _ = prepared(directory)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(MeshgpuError, match="No space left") as caught:
            NextKeys(directory).take(node, NOW)
    assert caught.value.code == "bad-key"
    assert identity(directory) == before
