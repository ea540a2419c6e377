"""`ls` and `cp`: what a job left, brought here, never outside the destination."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import Result

from meshgpu.cli.files import inside
from meshgpu.errors import MeshgpuError

if TYPE_CHECKING:
    from tests.cli.conftest import StubAgent

Cli = Callable[..., Result]
FILES = "GET /v1/jobs/k7q/files"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "here"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def left(stub: "StubAgent") -> "StubAgent":
    """A job that left three files."""
    leave(stub, {"model.pt": b"weights", "out/a.txt": b"a", "out/deep/b.txt": b"b", "outer.txt": b"o"})
    return stub


def leave(stub: "StubAgent", files: dict[str, bytes]) -> None:
    stub.on(FILES, {"files": [{"path": path, "size_bytes": len(data)} for path, data in files.items()]})
    for path, data in files.items():
        stub.on(f"{FILES}/{path}", data)


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_ls_shows_sizes_and_paths(cli: Cli, left: "StubAgent") -> None:
    assert cli("ls", "runs/k7q").stdout.splitlines() == [
        "SIZE  PATH",
        " 7 B  model.pt",
        " 1 B  out/a.txt",
        " 1 B  out/deep/b.txt",
        " 1 B  outer.txt",
    ]
    assert json.loads(cli("ls", "runs/k7q/out/", "--json").stdout) == {
        "files": [{"path": "out/a.txt", "size_bytes": 1}, {"path": "out/deep/b.txt", "size_bytes": 1}]
    }


def test_ls_takes_the_bare_id_too(cli: Cli, left: "StubAgent") -> None:
    assert cli("ls", "k7q/out").stdout == cli("ls", "runs/k7q/out").stdout
    assert cli("ls", "k7q").exit_code == 0


@pytest.mark.parametrize("arguments", [["k7q/model.pt", "."], ["runs/k7q/model.pt", "-"]])
def test_cp_takes_from_runs_only_and_to_files_only(
    cli: Cli, left: "StubAgent", here: Path, arguments: list[str]
) -> None:
    assert cli("cp", *arguments).exit_code == 2
    assert tree(here) == {}


def test_cp_goes_on_past_a_file_it_cannot_have(cli: Cli, left: "StubAgent", here: Path) -> None:
    left.replies[f"{FILES}/out/a.txt"].clear()
    left.on_failure(f"{FILES}/out/a.txt", 404, "unknown-file", "cannot fetch out/a.txt")
    result = cli("cp", "-r", "runs/k7q/out", ".")
    assert (result.exit_code, result.stderr) == (125, "cannot fetch out/a.txt\n1 file copied to .\n")
    assert tree(here) == {"out/deep/b.txt": b"b"}


def test_cp_of_two_files_of_one_name_copies_neither(cli: Cli, left: "StubAgent", here: Path) -> None:
    left.on("GET /v1/jobs/abc/files", {"files": [{"path": "a.txt", "size_bytes": 1}]})
    left.on("GET /v1/jobs/abc/files/a.txt", b"A")
    result = cli("cp", "runs/k7q/out/a.txt", "runs/abc/a.txt", "o")
    assert result.exit_code == 2
    assert "two sources are called a.txt\nhint: copy them one by one" in result.stderr
    assert tree(here) == {}


def test_ls_of_what_is_not_there_is_an_error(cli: Cli, left: "StubAgent") -> None:
    result = cli("ls", "runs/k7q/nothing")
    assert (result.exit_code, result.stderr) == (125, "error: job k7q left no nothing\nhint: meshgpu ls runs/k7q\n")


@pytest.mark.parametrize("place", ["runs/", "/etc/passwd", "/"])
def test_places_that_are_none_are_usage_errors(cli: Cli, left: "StubAgent", place: str) -> None:
    assert cli("ls", place).exit_code == 2
    assert left.seen == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["runs/k7q/model.pt", "."], {"model.pt": b"weights"}),
        (["runs/k7q/model.pt", "copy.pt"], {"copy.pt": b"weights"}),
        (["runs/k7q/out/a.txt", "new/"], {"new/a.txt": b"a"}),
        (["runs/k7q/model.pt", "runs/k7q/out/a.txt", "."], {"model.pt": b"weights", "a.txt": b"a"}),
        (["-r", "runs/k7q/out", "."], {"out/a.txt": b"a", "out/deep/b.txt": b"b"}),
        (["-r", "runs/k7q/out/", "new"], {"new/a.txt": b"a", "new/deep/b.txt": b"b"}),
        (["-r", "runs/k7q/out/deep", "."], {"deep/b.txt": b"b"}),
        (
            ["-r", "runs/k7q/", "all"],
            {"all/model.pt": b"weights", "all/out/a.txt": b"a", "all/out/deep/b.txt": b"b", "all/outer.txt": b"o"},
        ),
    ],
)
def test_cp_puts_files_where_cp_would(
    cli: Cli, left: "StubAgent", here: Path, arguments: list[str], expected: dict[str, bytes]
) -> None:
    result = cli("cp", *arguments)
    assert (result.exit_code, result.stdout) == (0, "")
    assert tree(here) == expected


def test_cp_replaces_what_lies_there_only_when_the_new_file_is_whole(cli: Cli, stub: "StubAgent", here: Path) -> None:
    (here / "a").write_bytes(b"old")
    leave(stub, {"a": b"new"})
    assert cli("cp", "runs/k7q/a", ".").exit_code == 0
    assert tree(here) == {"a": b"new"}
    stub.replies[f"{FILES}/a"].clear()
    stub.on_failure(f"{FILES}/a", 504, "no-answer", "rig-b went away")
    assert cli("cp", "runs/k7q/a", ".").exit_code == 125
    assert tree(here) == {"a": b"new"}


def test_cp_of_a_directory_wants_the_flag(cli: Cli, left: "StubAgent", here: Path) -> None:
    result = cli("cp", "runs/k7q/out", ".")
    assert result.exit_code == 2
    assert "hint: meshgpu cp -r runs/k7q/out …" in result.stderr
    assert tree(here) == {}


def test_cp_wants_a_destination(cli: Cli, left: "StubAgent") -> None:
    assert cli("cp", "runs/k7q/model.pt").exit_code == 2
    assert cli("cp").exit_code == 2


@pytest.mark.parametrize("path", ["../evil", "out/../../evil", "/abs/evil", "out//evil", "./evil", "out/..", "a\0b"])
def test_cp_refuses_paths_that_leave_the_destination(
    cli: Cli, stub: "StubAgent", here: Path, tmp_path: Path, path: str
) -> None:
    before = tree(tmp_path)
    leave(stub, {path: b"evil"})
    result = cli("cp", "-r", "runs/k7q/", ".")
    assert result.exit_code == 125
    assert "refused to write" in result.stderr
    assert tree(tmp_path) == before


def test_cp_refuses_to_follow_a_symlink_out_of_the_destination(
    cli: Cli, stub: "StubAgent", here: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (here / "out").symlink_to(outside)
    leave(stub, {"out/evil": b"evil"})
    assert cli("cp", "-r", "runs/k7q/", ".").exit_code == 125
    assert tree(outside) == {}


def test_file_that_is_a_symlink_is_replaced_not_followed(cli: Cli, stub: "StubAgent", here: Path) -> None:
    (here / "target").write_bytes(b"mine")
    (here / "a").symlink_to("target")
    leave(stub, {"a": b"job's"})
    assert cli("cp", "-r", "runs/k7q/", ".").exit_code == 0
    assert (here / "target").read_bytes() == b"mine"
    assert (here / "a").read_bytes() == b"job's"


def test_disk_that_refuses_is_an_error_with_the_reason(cli: Cli, left: "StubAgent", here: Path) -> None:
    (here / "out").write_bytes(b"a file in the way")
    result = cli("cp", "-r", "runs/k7q/out", ".")
    assert result.exit_code == 125
    assert result.stderr.startswith("error: cannot write out/a.txt: ")


def test_inside_allows_plain_paths_and_links_that_stay(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert inside(tmp_path, "real/x") == tmp_path / "real/x"
    assert inside(tmp_path, "link/x") == tmp_path / "link/x"
    with pytest.raises(MeshgpuError, match="refused"):
        inside(tmp_path, "real/../../x")
