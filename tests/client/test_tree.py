"""Capture: the working directory as it is travels, and nothing else."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meshgpu.client import listing, stat_cache, tree
from meshgpu.client.tree import Capture, capture
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import Digest, digest
from meshgpu.model.tree import CHUNK_BYTES, FileKind, decode_manifest

OLD_S = 1_600_000_000
"""A time stamp that is long past, so that the stat cache trusts it."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    directory = tmp_path / "project"
    directory.mkdir()
    return directory


def git(directory: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "protocol.file.allow=always"]
    command = ["git", "-C", str(directory), *identity, *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=20)


def write(directory: Path, *paths: str) -> None:
    for path in paths:
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(os.fsencode(f"content of {path}"))


def paths_of(directory: Path) -> list[str]:
    return [file.path for file in captured(directory).manifest.files]


def captured(directory: Path) -> Capture:
    found = capture(directory, None)
    assert decode_manifest(found.manifest.encode()) == found.manifest
    return found


def refusal(directory: Path) -> MeshgpuError:
    with pytest.raises(MeshgpuError) as refused:
        capture(directory, None)
    return refused.value


# -- what travels ----------------------------------------------------------------------------------------------------


def test_git_decides_tracked_and_untracked_but_not_ignored_files(project: Path) -> None:
    git(project, "init")
    write(project, "tracked", "deleted", "src/new.py", "secret.env", "build/x", "forced.env")
    (project / ".gitignore").write_text("*.env\nbuild/\n")
    git(project, "add", "tracked", "deleted")
    git(project, "add", "--force", "forced.env")
    (project / "deleted").unlink()
    (project / "tracked").write_text("changed but not committed")
    assert paths_of(project) == [".gitignore", "forced.env", "src/new.py", "tracked"]
    found = captured(project)
    (chunk,) = found.manifest.files[-1].chunks
    assert found.read(chunk) == b"changed but not committed"


def test_a_subdirectory_of_a_repository_travels_alone(project: Path) -> None:
    git(project, "init")
    (project / ".gitignore").write_text("*.log\n")
    write(project, "outside", "inner/a.py", "inner/b.log")
    assert paths_of(project / "inner") == ["a.py"]


def test_a_directory_that_git_ignores_travels_as_without_git(project: Path) -> None:
    git(project, "init")
    (project / ".gitignore").write_text("scratch/\n")
    write(project, "scratch/run.py", "scratch/__pycache__/run.pyc")
    assert paths_of(project / "scratch") == ["run.py"]


def test_submodules_and_repositories_inside_travel(project: Path, tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    git(library, "init")
    write(library, "lib.py", "ignored.o")
    (library / ".gitignore").write_text("*.o\n")
    git(library, "add", "lib.py", ".gitignore")
    git(library, "commit", "-m", "first")
    git(project, "init")
    git(project, "submodule", "add", str(library), "deps/library")
    write(project, "deps/library/junk.o", "deps/library/new.py", "plain/x")
    git(project / "plain", "init")
    (project / "deps/library/void").mkdir()
    expected = ["library/.gitignore", "library/lib.py", "library/new.py", "library/void"]
    assert paths_of(project) == [".gitmodules", *(f"deps/{path}" for path in expected), "plain/x"]


def test_a_submodule_that_was_not_checked_out_is_an_empty_directory(project: Path, tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    git(library, "init")
    git(library, "commit", "--allow-empty", "-m", "first")
    git(project, "init")
    git(project, "submodule", "add", str(library), "deps")
    git(project, "submodule", "deinit", "--force", "deps")
    assert paths_of(project) == [".gitmodules", "deps"]


def test_a_tracked_directory_that_became_a_symlink_travels_as_a_symlink(project: Path, tmp_path: Path) -> None:
    git(project, "init")
    write(project, "data/x")
    write(tmp_path, "elsewhere/x")
    git(project, "add", "data")
    (project / "data/x").unlink()
    (project / "data").rmdir()
    (project / "data").symlink_to("../elsewhere")
    assert [(file.path, file.kind) for file in captured(project).manifest.files] == [("data", FileKind.SYMLINK)]


def test_without_git_everything_but_clutter_travels(project: Path) -> None:
    write(project, "a.py", "pkg/b.py", ".venv/bin/python", "pkg/__pycache__/b.pyc", "node_modules/x", ".env")
    assert paths_of(project) == [".env", "a.py", "pkg/b.py"]


def test_a_work_tree_without_the_git_program_travels_with_a_warning(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(project, "init")
    write(project, "a")
    monkeypatch.setenv("PATH", "/nonexistent")
    found = captured(project)
    assert [file.path for file in found.manifest.files] == ["a"]
    assert found.warnings == ("git is not installed here: .gitignore is not applied",)


@pytest.mark.parametrize("with_git", [False, True])
def test_meshgpuignore_applies_with_and_without_git(project: Path, with_git: bool) -> None:
    write(project, "a.py", "data/big", "x.pt", "best.pt", "tracked.pt", "old/venv/y")
    (project / ".meshgpuignore").write_text("data/\n*.pt\n!best.pt\n")
    if with_git:
        git(project, "init")
        git(project, "add", "tracked.pt")
    kept = [".meshgpuignore", "a.py", "best.pt"]
    assert paths_of(project) == ([*kept, "old/venv/y"] if with_git else kept)


@pytest.mark.parametrize("with_git", [False, True])
def test_empty_directories_travel_unless_ignored(project: Path, with_git: bool) -> None:
    for name in ("empty", "some/inner/void", "skipped", "holder/skipped", "data"):
        (project / name).mkdir(parents=True)
    write(project, "some/file", "full/x.o", ".venv/bin/python", ".venv/.gitignore")
    (project / ".venv/lib").mkdir()
    (project / ".meshgpuignore").write_text("/data\n*.o\n")
    if with_git:
        git(project, "init")
        (project / ".gitignore").write_text("skipped/\n*.o\n")
        (project / ".venv/.gitignore").write_text("*")
    kinds = {file.path: file.kind for file in captured(project).manifest.files}
    empty = {path for path, kind in kinds.items() if kind is FileKind.DIRECTORY}
    assert empty == {"empty", "some/inner/void"} | (set() if with_git else {"skipped", "holder/skipped"})
    assert kinds["some/file"] is FileKind.FILE


def test_modes_and_symlinks_travel(project: Path) -> None:
    write(project, "plain", "script.sh")
    (project / "script.sh").chmod(0o755)
    (project / "link").symlink_to("plain")
    files = {file.path: file for file in captured(project).manifest.files}
    assert files["script.sh"].executable
    assert not files["plain"].executable
    assert (files["link"].kind, files["link"].target) == (FileKind.SYMLINK, "plain")


def test_symlinks_that_leave_the_tree_travel_with_a_warning(project: Path) -> None:
    (project / "sub").mkdir()
    for name, target in (("absolute", "/etc"), ("sub/up", "../../x"), ("sub/fine", "../y"), ("sub/back", "a/../../y")):
        (project / name).symlink_to(target)
    found = captured(project)
    assert found.files == 4
    assert found.warnings == (
        "absolute is a symlink to /etc, outside this directory",
        "sub/up is a symlink to ../../x, outside this directory",
    )


@pytest.mark.parametrize("with_git", [False, True])
def test_names_of_any_bytes_travel(project: Path, with_git: bool) -> None:
    names = ["Übung 数.py", os.fsdecode(b"bad\xff\xfe"), "new\nline", ' "quoted" ']
    write(project, *names)
    if with_git:
        git(project, "init")
    assert sorted(paths_of(project)) == sorted(names)


def test_pipes_and_sockets_stay_with_a_warning(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    os.mkfifo("pipe")
    write(project, "a")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        found = captured(project)
    assert [file.path for file in found.manifest.files] == ["a"]
    assert sorted(warning.split()[0] for warning in found.warnings) == ["pipe", "socket"]


def test_a_git_hook_s_environment_does_not_point_elsewhere(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init")
    (other / ".git/info/exclude").write_text("mine\n")
    git(project, "init")
    write(project, "mine", "more")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git/index"))
    assert paths_of(project) == ["mine", "more"]


def test_large_files_are_cut_into_chunks(project: Path) -> None:
    data = os.urandom(CHUNK_BYTES) + b"tail"
    (project / "large").write_bytes(data)
    found = captured(project)
    (file,) = found.manifest.files
    assert file.chunks == (digest(data[:CHUNK_BYTES]), digest(b"tail"))
    assert b"".join(found.read(chunk) for chunk in file.chunks) == data
    assert found.size_bytes == len(data)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_the_home_directory_and_the_root_are_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(project))
    (project.parent / "alias").symlink_to(project)
    for directory in (project, project.parent / "alias", Path("/"), project / "missing"):
        assert refusal(directory).code == "not-a-project"
    assert refusal(project).hint == "cd into the project first"


@pytest.mark.parametrize("with_git", [False, True])
def test_the_agents_own_directory_never_travels(project: Path, with_git: bool) -> None:
    home = project / "a [private] place" / "agent"
    (home / "keys").mkdir(parents=True)
    (home / "jobs" / "left").mkdir(parents=True)
    for path in (home / "keys" / "node.pem", home / "jobs" / "left" / "result", project / "keys" / "node.pem"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    (project / ".meshgpuignore").write_text("!node.pem\n!agent/\n")
    if with_git:
        git(project, "init")
        git(project, "add", "--all")
    files = {file.path for file in capture(project, None, home).manifest.files}
    assert files == {".meshgpuignore", "keys/node.pem"}
    assert "result" in {file.path for file in capture(home / "jobs" / "left", None, home).manifest.files}
    for directory in (home, home / "keys"):
        with pytest.raises(MeshgpuError, match="keeps its keys") as raised:
            capture(directory, None, home)
        assert raised.value.code == "not-a-project"


def test_a_large_tree_is_refused_and_the_largest_things_are_named(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "TREE_LIMIT_BYTES", 10_000)
    for name, size in (("data/a", 6000), ("data/b", 3000), ("model.bin", 4000), ("small", 10), ("tiny", 1)):
        write(project, name)
        (project / name).write_bytes(bytes(size))
    error = refusal(project)
    assert error.code == "tree-too-large"
    assert "13.0 kB" in error.message
    assert "largest: data (9.0 kB, 2 files), model.bin (4.0 kB, 1 files), small (10 B, 1 files)" in error.message
    assert error.hint is not None
    assert ".meshgpuignore" in error.hint
    (project / ".meshgpuignore").write_text("data\n")
    assert captured(project).size_bytes < 10_000


def test_a_tree_of_too_many_files_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "TREE_LIMIT_FILES", 3)
    write(project, "a", "many/1", "many/2", "many/3")
    assert "at most 3 files; largest: many (" in refusal(project).message


def test_a_file_that_changed_after_the_capture_is_refused(project: Path) -> None:
    write(project, "changes", "goes", "stays", "becomes-link")
    found = captured(project)
    chunks = {file.path: file.chunks[0] for file in found.manifest.files}
    (project / "changes").write_text("Content of changes")
    (project / "goes").unlink()
    assert found.read(chunks["stays"]) == b"content of stays"
    for path in ("changes", "goes"):
        with pytest.raises(MeshgpuError, match=path) as refused:
            found.read(chunks[path])
        assert refused.value.code == "tree-changed"
        assert refused.value.hint
    (project / "becomes-link").rename(project.parent / "moved")
    (project / "becomes-link").symlink_to(project.parent / "moved")
    with pytest.raises(MeshgpuError, match="becomes-link"):
        found.read(chunks["becomes-link"])


def test_a_file_that_only_grew_after_the_capture_still_ships(project: Path) -> None:
    write(project, "log")
    found = captured(project)
    with (project / "log").open("a") as file:
        file.write("more")
    assert found.read(found.manifest.files[0].chunks[0]) == b"content of log"


def test_a_file_that_changes_while_it_is_hashed_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(project, "log")

    def appending(
        descriptor: int, length_bytes: int, offset_bytes: int, pread: Callable[..., bytes] = os.pread
    ) -> bytes:
        with (project / "log").open("a") as file:
            file.write("more")
        return pread(descriptor, length_bytes, offset_bytes)

    monkeypatch.setattr(os, "pread", appending)
    assert refusal(project).code == "tree-changed"


@pytest.fixture
def unprivileged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of an account that permissions apply to; the test runs as that account."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        monkeypatch.setenv("HOME", name)
        directory = Path(name, "project")
        directory.mkdir()
        is_root = os.geteuid() == 0
        if is_root:
            os.chown(directory, 65534, 65534)
            os.seteuid(65534)
        try:
            yield directory
        finally:
            if is_root:
                os.seteuid(0)
            for path in directory.rglob("*"):
                path.chmod(0o755)


@pytest.mark.parametrize("with_git", [False, True])
@pytest.mark.parametrize("name", ["file", "directory", ".meshgpuignore"])
def test_what_cannot_be_read_is_named(unprivileged: Path, name: str, with_git: bool) -> None:
    write(unprivileged, "fine", "directory/x", "file", ".meshgpuignore")
    if with_git:
        git(unprivileged, "init")
    (unprivileged / name).chmod(0)
    error = refusal(unprivileged)
    assert (error.code, error.message) == ("unreadable", f"cannot read {name}: Permission denied")


def test_an_ignored_directory_need_not_be_readable(unprivileged: Path) -> None:
    write(unprivileged, "fine", "closed/x")
    git(unprivileged, "init")
    (unprivileged / ".gitignore").write_text("closed/\n")
    (unprivileged / "closed").chmod(0)
    assert paths_of(unprivileged) == [".gitignore", "fine"]


def test_a_repository_that_git_refuses_is_not_shipped_unfiltered(project: Path) -> None:
    git(project, "init")
    write(project, "secret")
    (project / ".git/config").write_text("[broken")
    error = refusal(project)
    assert error.code == "git"
    assert "bad config" in error.message


# -- the stat cache --------------------------------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths that were read and hashed."""
    found: list[str] = []
    real = tree._hash_file

    def counting(root: str, path: str) -> tuple[os.stat_result, tuple[Digest, ...]]:
        found.append(path)
        return real(root, path)

    monkeypatch.setattr(tree, "_hash_file", counting)
    return found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory, while every file counts as old (ctime cannot be set)."""
    monkeypatch.setattr(stat_cache, "RACY_NS", -60 * 10**9)
    return tmp_path / "cache"


def test_an_unchanged_tree_is_not_read_again(project: Path, cache: Path, hashed: list[str]) -> None:
    write(project, "a", "b")
    first = capture(project, cache)
    assert sorted(hashed) == ["a", "b"]
    assert capture(project, cache).manifest == first.manifest
    assert len(hashed) == 2
    (project / "b").write_text("changed")
    assert capture(project, cache).manifest != first.manifest
    assert hashed[2:] == ["b"]


def test_a_change_that_keeps_size_and_mtime_is_seen(project: Path, cache: Path) -> None:
    write(project, "a")
    os.utime(project / "a", (OLD_S, OLD_S))
    first = capture(project, cache)
    (project / "a").write_text("CONTENT of a")
    os.utime(project / "a", (OLD_S, OLD_S))
    assert capture(project, cache).manifest != first.manifest


def test_a_file_that_just_changed_is_not_trusted(project: Path, tmp_path: Path, hashed: list[str]) -> None:
    write(project, "a")
    os.utime(project / "a", (OLD_S, OLD_S))
    for _ in range(2):
        capture(project, tmp_path / "cache")
    assert hashed == ["a", "a"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"version":1,"files":[]}', b'{"version":1,"files":{"a":[1]}}', b"\xff", b"[" * 10**5],
)
def test_a_broken_cache_is_ignored(project: Path, cache: Path, content: bytes) -> None:
    write(project, "a")
    first = capture(project, cache)
    (entry,) = cache.iterdir()
    entry.write_bytes(content)
    assert capture(project, cache).manifest == first.manifest
    assert json.loads(entry.read_bytes())["files"].keys() == {"a"}


def test_a_cache_of_other_shape_makes_no_wrong_manifest(project: Path, cache: Path) -> None:
    write(project, "a")
    first = capture(project, cache)
    (entry,) = cache.iterdir()
    document = json.loads(entry.read_bytes())
    for chunks in ([], ["../x"], [*first.manifest.files[0].chunks * 2]):
        document["files"]["a"][4:] = chunks
        entry.write_text(json.dumps(document))
        assert capture(project, cache).manifest == first.manifest


def test_a_cache_that_lied_is_forgotten(project: Path, cache: Path) -> None:
    write(project, "a")
    first = capture(project, cache)
    (entry,) = cache.iterdir()
    entry.write_text(entry.read_text().replace(first.manifest.files[0].chunks[0], digest(b"a lie")))
    lied = capture(project, cache)
    with pytest.raises(MeshgpuError, match="changed"):
        lied.read(digest(b"a lie"))
    assert capture(project, cache).manifest == first.manifest


def test_an_unwritable_cache_only_costs_time(project: Path, tmp_path: Path) -> None:
    write(project, "a")
    (tmp_path / "file").write_text("not a directory")
    assert capture(project, tmp_path / "file").files == 1


def test_the_import_is_light() -> None:
    script = "import sys, meshgpu.client.tree; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=20)
    heavy = {"subprocess", "asyncio", "sqlite3", "tempfile", "grpc", "aiohttp", "typer", "cryptography"}
    assert heavy.isdisjoint(done.stdout.split())


def test_git_gets_a_deadline(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(project, "init")
    script = tmp_path / "bin/git"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\nexec /bin/sleep 30\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    monkeypatch.setattr(listing, "GIT_DEADLINE_S", 0.2)
    assert refusal(project).code == "git"
