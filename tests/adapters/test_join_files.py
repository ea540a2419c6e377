import os
from pathlib import Path

import pytest

from meshgpu.adapters.join_files import JoinFile, JoinFiles


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path, Path]:
    """(the system's, the home's, the memory of those that were used)."""
    return tmp_path / "system", tmp_path / "home", tmp_path / "used"


def write(path: Path, text: str, mode: int = 0o600) -> None:
    path.write_text(text)
    path.chmod(mode)


def test_files_are_found_in_order_with_what_the_kernel_says_of_them(places: tuple[Path, Path, Path]) -> None:
    system, home, used = places
    files = JoinFiles([system, home], used)
    assert files.present() == []
    write(home, "two\n")
    write(system, " one \n", 0o644)
    own = os.geteuid()
    assert files.present() == [JoinFile(system, own, 0o644, "one"), JoinFile(home, own, 0o600, "two")]


def test_file_is_removed_when_it_was_used(places: tuple[Path, Path, Path]) -> None:
    system, home, used = places
    write(system, "one")
    files = JoinFiles([system, home], used)
    files.discard(files.present()[0])
    assert (system.exists(), used.exists(), files.present()) == (False, False, [])


def test_file_that_cannot_be_removed_is_not_found_again_but_another_there_is(
    places: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    system, home, used = places
    write(system, "a secret")
    files = JoinFiles([system, home], used)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    files.discard(files.present()[0])
    assert files.present() == []
    assert "secret" not in used.read_text()
    assert JoinFiles([system, home], used).present() == []
    write(system, "another")
    assert [file.text for file in files.present()] == ["another"]


def test_link_directory_and_pipe_are_named_and_never_read(places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    system, home, used = places
    write(tmp_path / "secret", "elsewhere")
    system.symlink_to(tmp_path / "secret")
    os.mkfifo(home, 0o600)
    (tmp_path / "directory").mkdir()
    found = JoinFiles([system, home, tmp_path / "directory", tmp_path / "secret" / "below"], used).present()
    assert [(file.text, file.fault) for file in found] == [
        ("", "it is a link"),
        ("", "it is no file"),
        ("", "it is no file"),
    ]


def test_long_file_is_read_no_further_than_an_invite_goes(places: tuple[Path, Path, Path]) -> None:
    system, _, used = places
    write(system, "x" * 10_000)
    assert len(JoinFiles([system], used).present()[0].text) == 4096
