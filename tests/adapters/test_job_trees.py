"""Trees that a hostile job made: deep beyond recursion and path names, closed to their owner, leading elsewhere."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshgpu.adapters import job_trees
from meshgpu.adapters.job_trees import files_below, remove_tree

NOBODY = 65534
DEEP = 3_000
"""Directories: more than Python recurses, and longer by name than PATH_MAX."""


@pytest.fixture
def top(tmp_path: Path) -> Iterator[Path]:
    top = tmp_path / "top"
    top.mkdir()
    yield top
    subprocess.run(["rm", "-rf", str(top)], check=True)


def dig(top: Path, depth: int) -> None:
    """Make `depth` directories, each in the one before, with a file in every one."""
    directory = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
        os.mkdir("d", dir_fd=directory)
        inner = os.open("d", os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = inner
    os.close(directory)


def test_a_tree_of_any_depth_is_removed(top: Path) -> None:
    dig(top, DEEP)
    (top / "broad").mkdir()
    for number in range(300):
        (top / "broad" / str(number)).mkdir()
    remove_tree(top)
    assert not top.exists()


def test_a_tree_of_any_depth_is_looked_through(top: Path) -> None:
    """Also beyond recursion; what no path can name is no result."""
    dig(top, DEEP)
    found = [path for path, _ in files_below(top)]
    assert found[:3] == ["file", "d/file", "d/d/file"]
    assert 1_900 < len(found) < DEEP


def test_removal_stays_inside(top: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept").chmod(0o755)
    (tmp_path / "kept" / "file").touch()
    (top / "link").symlink_to(tmp_path / "kept")
    (top / "sub").mkdir()
    (top / "sub" / "link").symlink_to(tmp_path / "kept")
    remove_tree(top)
    assert not top.exists()
    (tmp_path / "way").symlink_to(tmp_path / "kept")
    remove_tree(tmp_path / "way")
    assert (tmp_path / "kept" / "file").exists()
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o755


def test_what_is_not_there_is_removed_already(tmp_path: Path) -> None:
    remove_tree(tmp_path / "nothing")


def test_closed_directories_are_removed() -> None:
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        top = Path(name) / "top"
        try:
            if is_root:
                os.seteuid(NOBODY)  # nothing is closed to root
            (top / "closed" / "inner").mkdir(parents=True)
            (top / "closed" / "inner").chmod(0)
            (top / "closed").chmod(0o500)
            top.chmod(0)
            remove_tree(top)
        finally:
            if is_root:
                os.seteuid(0)
        assert not top.exists()


def test_links_and_fifos_are_no_files(top: Path) -> None:
    (top / "b").mkdir()
    (top / "b" / "file").write_bytes(b"12345")
    (top / "a").symlink_to(top / "b")
    os.mkfifo(top / "fifo")
    assert [(path, facts.st_size) for path, facts in files_below(top)] == [("b/file", 5)]


def test_more_entries_than_anybody_reads_are_left_out(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_trees, "ENTRY_LIMIT", 10)
    for number in range(20):
        (top / f"d{number:02}").mkdir()
        (top / f"d{number:02}" / "file").touch()
    assert len([*files_below(top)]) <= 10
    for number in range(20):
        (top / f"file{number}").touch()
    assert len([*files_below(top)]) <= 10
