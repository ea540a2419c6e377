"""Files that a job left are opened name by name: nothing leads out of the job's directory."""

import os
from pathlib import Path

import pytest

from meshgpu.agent.files import open_beneath
from meshgpu.errors import MeshgpuError


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_text("secret")
    work = tmp_path / "work"
    (work / "out").mkdir(parents=True)
    (work / "out" / "model.pt").write_text("model")
    return work


def test_regular_file_below_is_opened(work: Path) -> None:
    with open_beneath(work, "out/model.pt") as file:
        assert file.read() == b"model"


@pytest.mark.parametrize(
    "path", ["../secret.txt", "out/../../secret.txt", "/etc/passwd", "", ".", "out", "out//model.pt"]
)
def test_path_that_is_no_file_below_is_refused(work: Path, path: str) -> None:
    with pytest.raises(MeshgpuError, match="left no such file"):
        open_beneath(work, path)


def test_symlink_is_not_followed_whatever_it_points_to(work: Path) -> None:
    (work / "link").symlink_to("../secret.txt")
    (work / "inner").symlink_to("out/model.pt")
    (work / "door").symlink_to("..")
    for path in ("link", "inner", "door/secret.txt"):
        with pytest.raises(MeshgpuError, match="left no such file"):
            open_beneath(work, path)


def test_fifo_neither_blocks_nor_opens(work: Path) -> None:
    os.mkfifo(work / "pipe")
    with pytest.raises(MeshgpuError, match="left no such file"):
        open_beneath(work, "pipe")


def test_refusals_leave_no_descriptor_open(work: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path in ("out", "out/nothing", "nowhere/file", "../secret.txt"):
        with pytest.raises(MeshgpuError):
            open_beneath(work, path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
