"""An agent's directory is its account's alone, whatever it was before."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshgpu.agent.home import Home
from meshgpu.errors import MeshgpuError


def mode(path: Path) -> int:
    return path.lstat().st_mode & 0o777


def test_new_directory_is_private(tmp_path: Path) -> None:
    home = Home(tmp_path / "a" / "home")
    mask = os.umask(0)
    try:
        home.prepare()
    finally:
        os.umask(mask)
    assert mode(home.directory) == mode(home.jobs) == mode(home.environments) == 0o700


def test_what_others_could_read_is_closed_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home = Home(tmp_path / "home")
    home.jobs.mkdir(parents=True)
    outside = tmp_path / "outside"
    files = [home.database, home.config, home.directory / "state.db-wal", home.directory / "agent.log", outside]
    for path in files:
        path.write_text("x")
        path.chmod(0o664)
    (home.directory / "link").symlink_to(outside)
    program = home.directory / "program"
    program.write_text("x")
    program.chmod(0o755)
    home.directory.chmod(0o755)
    home.jobs.chmod(0o755)
    caplog.set_level(logging.WARNING)
    home.prepare()
    assert [mode(path) for path in files] == [0o600] * 4 + [0o664]
    assert [mode(path) for path in (program, home.directory, home.jobs)] == [0o700] * 3
    named = {str(record.args[0]) for record in caplog.records if isinstance(record.args, tuple)}
    assert named == {str(path) for path in (*files[:-1], program, home.directory, home.jobs)}
    caplog.clear()
    home.prepare()
    assert caplog.records == []


def test_directory_of_another_account_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to give a directory away")
    home = Home(tmp_path / "home")
    home.directory.mkdir()
    os.chown(home.directory, 65534, 65534)
    with pytest.raises(MeshgpuError, match="belongs to the account 65534") as raised:
        home.prepare()
    assert raised.value.code == "bad-home"
    assert not home.jobs.exists()


def test_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MeshgpuError, match=r"cannot keep an agent in .*: Not a directory"):
        Home(tmp_path / "file" / "home").prepare()


def test_what_another_account_put_there_is_named_and_keeps_no_agent_from_starting(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to be two accounts")
    home = Home(tmp_path / "home")
    home.prepare()
    home.config.write_text("")
    home.config.chmod(0o644)
    os.chown(home.directory, 65534, 65534)
    for path in (home.jobs, home.environments):
        os.chown(path, 65534, 65534)
    program = "import os; from meshgpu.agent.home import *; os.setgid(65534); os.setuid(65534); Home(Path()).prepare()"
    done = subprocess.run(
        (sys.executable, "-c", program), cwd=home.directory, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "config.toml is open to other accounts (mode 0644) and belongs to the account 0" in done.stderr
    assert mode(home.config) == 0o644


def test_join_file_that_others_could_write_is_left_to_be_refused(tmp_path: Path) -> None:
    """Closed here, it would be taken for one that only this account ever wrote."""
    home = Home(tmp_path / "home")
    home.prepare()
    home.join_file.write_text("mgpu1-")
    home.join_file.chmod(0o666)
    home.prepare()
    assert home.join_file.stat().st_mode & 0o777 == 0o666
