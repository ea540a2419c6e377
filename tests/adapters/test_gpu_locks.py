"""A GPU is lent by one agent of a computer; what another account left lying about does not keep it from that."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshgpu.adapters.gpu_locks import TAKEN, GpuLocks
from meshgpu.model.ids import GpuId
from meshgpu.model.inventory import Gpu, Inventory

GPU = GpuId("GPU-1")
INVENTORY = Inventory(8, 2**36, (Gpu(GPU, 0, "RTX 4090", 24 * 2**30),))
NOBODY = 65534


@pytest.fixture
def directory() -> Iterator[Path]:
    """As /tmp is: open to all, and each may remove only what is theirs."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o1777)
        yield Path(name)


def faults(locks: GpuLocks) -> list[str]:
    return [reading.fault for reading in locks.claim(INVENTORY, ())]


def test_second_agent_is_told_and_gets_the_gpu_when_the_first_has_ended(directory: Path) -> None:
    first, second = GpuLocks([directory]), GpuLocks([directory])
    assert faults(first) == []
    assert faults(first) == []
    assert faults(second) == [TAKEN]
    first.close()
    assert faults(second) == []
    second.close()


def test_lock_file_of_another_account_is_taken_unless_it_is_held(directory: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be two accounts")
    (directory / "meshgpu-GPU-1.lock").touch(mode=0o644)
    locks, holder = GpuLocks([directory]), GpuLocks([directory])
    os.seteuid(NOBODY)
    try:
        assert faults(locks) == []
        locks.close()
        os.seteuid(0)
        assert faults(holder) == []
        os.seteuid(NOBODY)
        assert faults(locks) == [TAKEN]
    finally:
        os.seteuid(0)
        locks.close()
        holder.close()


@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_what_is_no_lock_file_neither_stops_nor_misleads(directory: Path, kind: str) -> None:
    path, elsewhere = directory / "meshgpu-GPU-1.lock", directory / "elsewhere"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(elsewhere)
    locks = GpuLocks([directory])
    assert faults(locks) == ([] if kind == "fifo" else [TAKEN])
    assert not elsewhere.exists()
    locks.close()
