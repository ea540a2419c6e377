"""ChunkFiles: every read is verified, and trees are laid out inside their directory or not at all."""

import errno
import os
import stat
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from meshgpu.adapters import chunk_files
from meshgpu.adapters.chunk_files import ChunkFiles
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import Digest, digest
from meshgpu.model.tree import CHUNK_BYTES, FileKind, Manifest, TreeFile


@pytest.fixture
def chunks(tmp_path: Path) -> ChunkFiles:
    return ChunkFiles(tmp_path / "chunks", keep_free_bytes=0)


def path_of(tmp_path: Path, chunk: Digest) -> Path:
    return tmp_path / "chunks" / chunk[:2] / chunk[2:]


def keep(chunks: ChunkFiles, path: str, data: bytes, *, executable: bool = False) -> TreeFile:
    """Put a file's content; returns its row of a manifest."""
    pieces = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
    return TreeFile(path, FileKind.FILE, executable, len(data), tuple(chunks.put(piece) for piece in pieces))


def tree_of(chunks: ChunkFiles, *files: TreeFile) -> Digest:
    return chunks.put(Manifest(tuple(sorted(files, key=lambda file: file.path))).encode())


def refusal(chunks: ChunkFiles, tree: Digest, directory: Path) -> MeshgpuError:
    """Why laying out `tree` fails; checks that nothing of it is left."""
    before = sorted(directory.parent.rglob("*"))
    with pytest.raises(MeshgpuError) as refused:
        chunks.materialise(tree, directory)
    assert sorted(directory.parent.rglob("*")) == before
    return refused.value


# -- chunks ----------------------------------------------------------------------------------------------------------


def test_what_is_put_is_got_again_also_by_the_next_agent(chunks: ChunkFiles, tmp_path: Path) -> None:
    data = os.urandom(CHUNK_BYTES)
    chunk = chunks.put(data)
    assert chunk == digest(data)
    chunks.sync()
    assert ChunkFiles(tmp_path / "chunks", 0).get(chunk) == data


def test_missing_names_each_absent_chunk_once_in_order(chunks: ChunkFiles) -> None:
    here = chunks.put(b"here")
    first, second = digest(b"1"), digest(b"2")
    assert chunks.missing([second, here, first, second]) == [second, first]


def test_a_damaged_chunk_is_dropped_and_can_be_put_again(chunks: ChunkFiles, tmp_path: Path) -> None:
    chunk = chunks.put(b"good")
    path_of(tmp_path, chunk).write_bytes(b"evil")
    with pytest.raises(MeshgpuError, match="damaged") as refused:
        chunks.get(chunk)
    assert refused.value.code == "missing-chunks"
    assert chunks.missing([chunk]) == [chunk]
    chunks.put(b"good")
    assert chunks.get(chunk) == b"good"


@pytest.mark.parametrize("torn", [b"", b"goo"])
def test_a_chunk_that_a_crash_tore_is_written_again(chunks: ChunkFiles, tmp_path: Path, torn: bytes) -> None:
    chunk = chunks.put(b"good")
    path_of(tmp_path, chunk).write_bytes(torn)
    assert chunks.missing([chunk]) == ([] if torn else [chunk])
    chunks.put(b"good")
    assert chunks.get(chunk) == b"good"


def test_a_chunk_that_is_here_is_not_written_again(chunks: ChunkFiles, tmp_path: Path) -> None:
    chunk = chunks.put(b"data")
    inode = path_of(tmp_path, chunk).stat().st_ino
    chunks.put(b"data")
    assert path_of(tmp_path, chunk).stat().st_ino == inode


def test_a_name_that_is_no_digest_reaches_no_file(chunks: ChunkFiles, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("../victim", "..victim", str(victim), f"..{'/' * 62}", "", "x" * 64):
        with pytest.raises(MeshgpuError) as refused:
            chunks.get(Digest(name))
        assert refused.value.code == "missing-chunks"
        assert chunks.missing([Digest(name)]) == [name]
    assert victim.read_text() == "precious"


def test_a_symlink_in_the_store_is_not_followed(chunks: ChunkFiles, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"data")
    chunk = chunks.put(b"data")
    path_of(tmp_path, chunk).unlink()
    path_of(tmp_path, chunk).symlink_to(tmp_path / "outside")
    with pytest.raises(MeshgpuError):
        chunks.get(chunk)


def test_leftovers_of_a_crash_are_cleared(tmp_path: Path) -> None:
    left = tmp_path / "chunks/incoming/half"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"ha")
    ChunkFiles(tmp_path / "chunks", 0)
    assert not left.exists()


def test_threads_may_put_the_same_chunks_at_once(chunks: ChunkFiles) -> None:
    data = [bytes([number]) * 1000 for number in range(100)]
    failures: list[BaseException] = []

    def put_all() -> None:
        try:
            for piece in data:
                chunks.put(piece)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=put_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert failures == []
    assert [chunks.get(digest(piece)) for piece in data] == data


def test_a_manifest_comes_back_as_it_was(chunks: ChunkFiles) -> None:
    file = keep(chunks, "a", b"content")
    tree = tree_of(chunks, file)
    assert chunks.manifest(tree) == Manifest((file,))
    assert tree == Manifest((file,)).digest


# -- trees -----------------------------------------------------------------------------------------------------------


def test_a_tree_is_laid_out_as_it_was(chunks: ChunkFiles, tmp_path: Path) -> None:
    large = os.urandom(CHUNK_BYTES * 2 + 5)
    bad_name = os.fsdecode(b"dir/bad\xff")
    tree = tree_of(
        chunks,
        keep(chunks, "large", large),
        keep(chunks, "dir/run.sh", b"#!", executable=True),
        keep(chunks, bad_name, b""),
        TreeFile("void/inner", FileKind.DIRECTORY),
        TreeFile("dir/link", FileKind.SYMLINK, target="./../large"),
        TreeFile("dangling", FileKind.SYMLINK, target="/nonexistent"),
    )
    work = tmp_path / "attempt/work"
    chunks.materialise(tree, work)
    assert (work / "large").read_bytes() == large
    assert stat.S_IMODE((work / "large").stat().st_mode) & 0o111 == 0
    assert (work / "dir/run.sh").stat().st_mode & stat.S_IXUSR
    assert (work / bad_name).read_bytes() == b""
    assert list((work / "void/inner").iterdir()) == []
    assert os.readlink(work / "dir/link") == "./../large"  # noqa: PTH115 - as it is written
    assert os.readlink(work / "dangling") == "/nonexistent"  # noqa: PTH115
    assert list(work.parent.iterdir()) == [work]


def test_an_empty_tree_makes_an_empty_directory(chunks: ChunkFiles, tmp_path: Path) -> None:
    chunks.materialise(tree_of(chunks), tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


def test_a_job_cannot_write_through_to_the_store(chunks: ChunkFiles, tmp_path: Path) -> None:
    data = os.urandom(100_000)
    file = keep(chunks, "a", data)
    tree = tree_of(chunks, file)
    chunks.materialise(tree, tmp_path / "work")
    assert (tmp_path / "work/a").stat().st_nlink == 1
    with (tmp_path / "work/a").open("r+b") as target:
        target.write(b"changed by the job")
    assert chunks.get(file.chunks[0]) == data
    chunks.materialise(tree, tmp_path / "again")
    assert (tmp_path / "again/a").read_bytes() == data


@pytest.mark.parametrize("failure", [errno.EXDEV, errno.EOPNOTSUPP, None])
def test_a_disk_that_cannot_share_blocks_is_written_to(
    chunks: ChunkFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: int | None
) -> None:
    calls: list[int] = []
    real = os.copy_file_range

    def half_way(source: int, target: int, count: int, offset_src: int) -> int:
        calls.append(count)
        if len(calls) > 1:
            if failure is None:
                return 0
            raise OSError(failure, "cannot")
        return real(source, target, count // 2, offset_src=offset_src)

    monkeypatch.setattr(os, "copy_file_range", half_way)
    data = os.urandom(300_001)
    chunks.materialise(tree_of(chunks, keep(chunks, "a", data)), tmp_path / "work")
    assert len(calls) == 2
    assert (tmp_path / "work/a").read_bytes() == data


def test_a_tree_with_a_missing_chunk_leaves_nothing(chunks: ChunkFiles, tmp_path: Path) -> None:
    gone = keep(chunks, "b", b"gone")
    tree = tree_of(chunks, keep(chunks, "a", b"here"), gone)
    path_of(tmp_path, gone.chunks[0]).unlink()
    assert refusal(chunks, tree, tmp_path / "attempt/work").code == "missing-chunks"


def test_a_tree_with_a_damaged_chunk_leaves_nothing(chunks: ChunkFiles, tmp_path: Path) -> None:
    file = keep(chunks, "b", b"good")
    tree = tree_of(chunks, file)
    path_of(tmp_path, file.chunks[0]).write_bytes(b"evil")
    (tmp_path / "attempt").mkdir()
    assert refusal(chunks, tree, tmp_path / "attempt/work").code == "missing-chunks"
    assert chunks.missing(file.chunks) == list(file.chunks)


def test_a_chunk_longer_than_its_manifest_says_is_refused(chunks: ChunkFiles, tmp_path: Path) -> None:
    chunk = chunks.put(bytes(10_000))
    tree = tree_of(chunks, TreeFile("a", FileKind.FILE, size_bytes=1, chunks=(chunk,)))
    (tmp_path / "attempt").mkdir()
    assert refusal(chunks, tree, tmp_path / "attempt/work").code == "bad-manifest"


@pytest.mark.parametrize(
    "rows",
    [
        '["../escaped","file",0,0,[],""]',
        '["/tmp/escaped","file",0,0,[],""]',
        '["out","symlink",0,0,[],".."],["out/escaped","file",0,0,[],""]',
        '["a/../../escaped","directory",0,0,[],""]',
    ],
)
def test_a_hostile_tree_writes_nothing(chunks: ChunkFiles, tmp_path: Path, rows: str) -> None:
    tree = chunks.put(f'{{"version":1,"files":[{rows}]}}'.encode())
    (tmp_path / "attempt").mkdir()
    assert refusal(chunks, tree, tmp_path / "attempt/work").code == "bad-manifest"


def test_symlinks_are_made_after_everything_else(
    chunks: ChunkFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a manifest that slipped through the checks writes no file through a symlink."""
    outside = tmp_path / "outside"
    outside.mkdir()
    link = TreeFile("a", FileKind.SYMLINK, target=str(outside))
    hostile = Manifest((link, keep(chunks, "a/escaped", b"x"), TreeFile("a/made", FileKind.DIRECTORY)))
    monkeypatch.setattr(chunk_files, "decode_manifest", lambda _: hostile)
    (tmp_path / "attempt").mkdir()
    assert refusal(chunks, chunks.put(b"any"), tmp_path / "attempt/work").code == "cannot-write"
    assert list(outside.iterdir()) == []


def test_a_directory_in_use_is_not_touched(chunks: ChunkFiles, tmp_path: Path) -> None:
    tree = tree_of(chunks, keep(chunks, "a", b"x"))
    work = tmp_path / "attempt/work"
    work.mkdir(parents=True)
    chunks.materialise(tree, work)
    (work / "result").write_text("of the job")
    assert refusal(chunks, tree, work).code == "not-empty"
    assert (work / "result").read_text() == "of the job"


def test_what_a_crash_left_half_done_is_replaced(chunks: ChunkFiles, tmp_path: Path) -> None:
    (tmp_path / "work.partial/old").mkdir(parents=True)
    chunks.materialise(tree_of(chunks, keep(chunks, "a", b"x")), tmp_path / "work")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["a"]
    assert not (tmp_path / "work.partial").exists()


def test_a_tree_deeper_than_recursion_is_laid_out(
    chunks: ChunkFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = Manifest((TreeFile("a/" * 1500 + "a", FileKind.FILE), TreeFile("a/b", FileKind.DIRECTORY)))
    monkeypatch.setattr(chunks, "manifest", lambda tree: deep)
    try:
        chunks.materialise(digest(b""), tmp_path / "work")
        assert (tmp_path / "work" / deep.files[0].path).is_file()
        assert (tmp_path / "work" / "a" / "b").is_dir()
    finally:
        subprocess.run(["rm", "-rf", *map(str, tmp_path.glob("work*"))], check=True)


def test_chunks_are_closed_to_other_accounts(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir(mode=0o755)
    for name in ("old", "new"):
        ChunkFiles(tmp_path / name, 0)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o700


# -- the disk --------------------------------------------------------------------------------------------------------


def disk_of(monkeypatch: pytest.MonkeyPatch, total_bytes: int, free_bytes: int) -> None:
    disk = SimpleNamespace(f_blocks=total_bytes // 1000, f_bavail=free_bytes // 1000, f_frsize=1000)
    monkeypatch.setattr(os, "statvfs", lambda _: disk)


@pytest.mark.parametrize(
    ("total_bytes", "free_bytes", "is_taken"),
    [
        (100 * 10**9, 10 * 10**9 + 5000, True),
        (100 * 10**9, 10 * 10**9 - 5000, False),
        (1000 * 10**9, 50 * 10**9 + 5000, True),
        (1000 * 10**9, 49 * 10**9, False),
    ],
)
def test_ten_gigabytes_or_a_twentieth_stay_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total_bytes: int, free_bytes: int, is_taken: bool
) -> None:
    chunks = ChunkFiles(tmp_path / "chunks")
    disk_of(monkeypatch, total_bytes, free_bytes)
    if is_taken:
        chunks.put(b"data")
        return
    with pytest.raises(MeshgpuError, match="stay free") as refused:
        chunks.put(b"data")
    assert refused.value.code == "disk-full"


def test_a_tree_that_does_not_fit_is_refused_before_a_byte_is_written(
    chunks: ChunkFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tree_of(chunks, keep(chunks, "a", bytes(CHUNK_BYTES)))
    disk_of(monkeypatch, 10**12, CHUNK_BYTES)
    (tmp_path / "attempt").mkdir()
    monkeypatch.setattr(ChunkFiles, "_fill", None)
    error = refusal(chunks, tree, tmp_path / "attempt/work")
    assert error.code == "disk-full"
    assert "0.004 GB needed, 0.004 GB free" in error.message


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    chunks: ChunkFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tree_of(chunks, keep(chunks, "a", b"1"), keep(chunks, "b", b"2"))
    (tmp_path / "attempt").mkdir()
    real = os.write
    written: list[int] = []

    def full(descriptor: int, data: bytes) -> int:
        written.append(descriptor)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    assert refusal(chunks, tree, tmp_path / "attempt/work").code == "disk-full"
    assert len(written) == 2
    with pytest.raises(MeshgpuError) as refused:
        chunks.put(b"more")
    assert refused.value.code == "disk-full"
    assert list((tmp_path / "chunks/incoming").iterdir()) == []


def test_no_descriptor_stays_open(chunks: ChunkFiles, tmp_path: Path) -> None:
    def open_now() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_now()
    file = keep(chunks, "a", bytes(100_000))
    chunks.materialise(tree_of(chunks, file), tmp_path / "work")
    path_of(tmp_path, file.chunks[0]).write_bytes(b"evil")
    with pytest.raises(MeshgpuError):
        chunks.get(file.chunks[0])
    chunks.sync()
    assert open_now() == before
