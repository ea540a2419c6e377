import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshgpu.adapters.sqlite_store import SCHEMA_VERSION, SqliteStore, refuse_network_filesystem
from meshgpu.errors import MeshgpuError

CHILD_TIMEOUT_S = 30.0

WRITER = """
import sys
from pathlib import Path
from meshgpu.adapters.sqlite_store import SqliteStore
store = SqliteStore(Path(sys.argv[1]))
for number in range(1_000_000):
    store.write([("record", str(number), b"x" * 500), ("head", "", str(number).encode())])
    print(number, flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "agent.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    with contextlib.closing(SqliteStore(path)) as opened:
        yield opened


def reopened(path: Path) -> dict[tuple[str, str], bytes]:
    with contextlib.closing(SqliteStore(path)) as store:
        return store.load()


def test_a_new_store_is_empty_and_only_its_owner_can_read_it(store: SqliteStore, path: Path) -> None:
    assert store.load() == {}
    store.write([("job", "a", b"1")])
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}


def test_one_kind_is_left_out_or_read_in_parts(store: SqliteStore) -> None:
    store.write([("audit", f"{number:03d}", b"%d" % number) for number in (2, 0, 1, 10)])
    store.write([("job", "a", b"x"), ("zoo", "005", b"y")])
    assert store.load(but="audit") == {("job", "a"): b"x", ("zoo", "005"): b"y"}
    assert store.read("audit", "", 2) == [("000", b"0"), ("001", b"1")]
    assert store.read("audit", "001\0", 9) == [("002", b"2"), ("010", b"10")]
    assert store.last("audit", 2) == [("002", b"2"), ("010", b"10")]
    assert store.last("none", 2) == store.read("none", "", 2) == []


def test_what_was_written_is_there_after_a_restart(store: SqliteStore, path: Path) -> None:
    store.write([("job", "a", b"1"), ("job", "b", b"\x00\xff"), ("mesh", "a", b"")])
    store.write([("job", "a", b"2"), ("job", "b", None), ("job", "never-there", None)])
    expected = {("job", "a"): b"2", ("mesh", "a"): b""}
    assert store.load() == expected
    store.close()
    assert reopened(path) == expected


def test_a_transaction_that_fails_leaves_nothing(store: SqliteStore) -> None:
    store.write([("job", "a", b"1")])
    bad: list[tuple[str, str, bytes | None]] = [("job", "a", None), (object(), "b", b"2")]  # type: ignore[list-item]  # on purpose
    with pytest.raises(MeshgpuError):
        store.write(bad)
    assert store.load() == {("job", "a"): b"1"}
    store.write([("job", "b", b"2")])


def test_any_thread_may_write(store: SqliteStore) -> None:
    thread = threading.Thread(target=store.write, args=([("job", "a", b"1")],))
    thread.start()
    thread.join(CHILD_TIMEOUT_S)
    assert store.load() == {("job", "a"): b"1"}


def test_a_write_is_synced_before_it_returns(store: SqliteStore) -> None:
    full = 2
    assert store._connection.execute("PRAGMA synchronous").fetchone() == (full,)
    assert store._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_closing_twice_is_harmless(store: SqliteStore) -> None:
    store.close()
    store.close()


@pytest.mark.parametrize("acknowledged_before_kill", [1, 40, 150])
def test_every_acknowledged_write_survives_a_kill(path: Path, acknowledged_before_kill: int) -> None:
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        for _ in range(acknowledged_before_kill):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        acknowledged = acknowledged_before_kill - 1
        for line in child.stdout:
            acknowledged = int(line) if line.endswith("\n") else acknowledged
        child.wait(CHILD_TIMEOUT_S)
    records = reopened(path)
    assert acknowledged + 1 <= len(records) - 1
    assert all(records["record", str(number)] == b"x" * 500 for number in range(acknowledged + 1))
    assert int(records["head", ""]) == len(records) - 2, "a transaction is whole or absent"


def test_a_second_agent_is_told_who_uses_the_store(store: SqliteStore, path: Path) -> None:
    second = subprocess.run(
        [sys.executable, "-c", WRITER, str(path)], capture_output=True, text=True, timeout=CHILD_TIMEOUT_S
    )
    assert second.returncode == 1
    assert f"another agent uses it (process {os.getpid()})" in second.stderr
    with pytest.raises(MeshgpuError) as error:
        SqliteStore(path)
    assert error.value.code == "in-use"
    store.write([("job", "a", b"1")])


def test_the_store_is_free_again_when_its_agent_is_gone(store: SqliteStore, path: Path) -> None:
    store.close()
    assert reopened(path) == {}


def test_a_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as newer:
        newer.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
        newer.commit()
    before = path.read_bytes()
    with pytest.raises(MeshgpuError, match="a newer meshgpu wrote it") as error:
        SqliteStore(path)
    assert error.value.code == "newer-state"
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_named(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"these are not the records you look for" * 100)
    with pytest.raises(MeshgpuError, match="the file is damaged") as error:
        SqliteStore(path)
    assert error.value.code == "damaged-state"
    assert str(path) in error.value.message
    assert "mv " in (error.value.hint or "")


def test_a_torn_database_is_named(store: SqliteStore, path: Path) -> None:
    store.write([("job", str(number), b"x" * 1000) for number in range(100)])
    store.close()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(MeshgpuError) as error:
        reopened(path)
    assert error.value.code == "damaged-state"


def test_a_failed_open_leaves_the_store_free(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(MeshgpuError):
        SqliteStore(path)
    path.unlink()
    assert reopened(path) == {}


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MeshgpuError, match="cannot open") as error:
        SqliteStore(tmp_path / "file" / "agent.db")
    assert error.value.code == "state-unusable"


def test_a_full_database_says_so_and_goes_on_when_there_is_room(store: SqliteStore) -> None:
    store.write([("job", "a", b"1")])
    store._connection.execute("PRAGMA max_page_count = 10")
    with pytest.raises(MeshgpuError, match="the disk is full") as error:
        store.write([("job", "a", b"2"), ("job", "b", b"x" * 1_000_000)])
    assert error.value.code == "disk-full"
    assert store.load() == {("job", "a"): b"1"}
    store._connection.execute("PRAGMA max_page_count = 100000")
    store.write([("job", "b", b"x" * 1_000_000)])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root and mount to make a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.hosts
def test_a_full_disk_says_so_and_loses_nothing(small_disk: Path) -> None:
    path = small_disk / "agent.db"
    ballast = small_disk / "ballast"
    with contextlib.closing(SqliteStore(path)) as store:
        store.write([("job", "a", b"1")])
        with contextlib.suppress(OSError):
            ballast.write_bytes(b"x" * 1_000_000)
        with pytest.raises(MeshgpuError) as error:
            store.write([("job", "b", b"x" * 100_000)])
        assert error.value.code == "disk-full"
        assert store.load() == {("job", "a"): b"1"}
        ballast.unlink()
        store.write([("job", "b", b"2")])
    assert reopened(path) == {("job", "a"): b"1", ("job", "b"): b"2"}


MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb1 /home/local\\040disk xfs rw 0 0
//nas/share /mnt/nas cifs rw 0 0
me@rig: /home/local\\040disk/far fuse.sshfs rw 0 0
tmpfs /run tmpfs rw 0 0
server:/x /cover/deep nfs rw 0 0
/dev/sdc1 /cover ext4 rw 0 0
short line
"""


@pytest.mark.parametrize("path", ["/home/ada/state.db", "/mnt/nas/state.db", "/home/local disk/far/state.db"])
def test_network_file_systems_are_refused(path: str) -> None:
    with pytest.raises(MeshgpuError, match="network file system") as error:
        refuse_network_filesystem(Path(path), MOUNTS)
    assert error.value.code == "network-file-system"
    assert "MESHGPU_HOME" in (error.value.hint or "")


@pytest.mark.parametrize(
    "path",
    ["/var/lib/state.db", "/home/local disk/state.db", "/homeless/state.db", "/run/state.db", "/cover/deep/state.db"],
)
def test_local_file_systems_are_accepted(path: str) -> None:
    refuse_network_filesystem(Path(path), MOUNTS)


def test_an_empty_mount_table_refuses_nothing() -> None:
    refuse_network_filesystem(Path("/home/ada/state.db"), "")
