import ctypes
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from meshgpu.adapters import fences
from meshgpu.adapters.fences import Enclosure, Fence

LIMIT_S = 30.0
SECRET = "the agent's key"


@pytest.fixture(params=["bubblewrap", "landlock"])
def fence(request: pytest.FixtureRequest) -> Fence:
    fence = Fence(request.param)
    if fence.name == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")
    if reason := fences._try_fence(fence):
        pytest.skip(reason)
    return fence


@pytest.fixture
def enclosure(tmp_path: Path) -> Enclosure:
    top = tmp_path / "attempt"
    enclosure = Enclosure(
        top / "work",
        top / "home",
        top / "tmp",
        top / "environment",
        fences.interpreter_paths(Path(sys.executable).parent),
    )
    for path in (enclosure.work, enclosure.home, enclosure.tmp):
        path.mkdir(parents=True)
    (enclosure.work / "train.py").write_text("print('trained')")
    (tmp_path / "secret").write_text(SECRET)
    return enclosure


def run(
    fence: Fence, enclosure: Enclosure, *command: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": f"{Path(sys.executable).parent}:{fences.CLEAN_ENVIRONMENT['PATH']}", **(env or {})}
    fences.hand_over(fence, enclosure, variables)
    return subprocess.run(
        [*fences.fence_prefix(fence, enclosure), *command],
        env=fences.CLEAN_ENVIRONMENT,
        cwd=enclosure.work,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def shell(fence: Fence, enclosure: Enclosure, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run(fence, enclosure, "sh", "-c", script, "sh", *(str(argument) for argument in arguments))


# -- what holds ------------------------------------------------------------------------------------------------------


def test_secret_outside_cannot_be_read(fence: Fence, enclosure: Enclosure, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    done = shell(fence, enclosure, 'cat "$1" && ls "$2"', secret, tmp_path)
    assert done.returncode != 0
    assert SECRET not in done.stdout
    assert run(fence, enclosure, "ls", str(tmp_path / "attempt" / "..")).stdout in ("", "attempt\n")


def test_link_out_of_the_work_directory_leads_nowhere(fence: Fence, enclosure: Enclosure, tmp_path: Path) -> None:
    (enclosure.work / "link").symlink_to(tmp_path / "secret")
    assert SECRET not in shell(fence, enclosure, "cat link").stdout


def test_nothing_outside_can_be_changed(fence: Fence, enclosure: Enclosure, tmp_path: Path) -> None:
    secret, beside = tmp_path / "secret", tmp_path / "attempt" / "log"
    script = "import os,sys\nfor path in sys.argv[1:]:\n"
    script += (
        " for change in (lambda: os.truncate(path, 0), lambda: os.unlink(path), lambda: open(path, 'w').close()):\n"
    )
    script += "  try: change()\n  except OSError as error: print(error.errno)\n"
    beside.write_text("ledger")
    run(fence, enclosure, "python", "-c", script, str(secret), str(beside), sys.executable)
    assert secret.read_text() == SECRET
    assert beside.read_text() == "ledger"
    assert Path(sys.executable).stat().st_size > 0


def test_homes_and_sockets_are_out_of_reach(fence: Fence, enclosure: Enclosure) -> None:
    done = shell(fence, enclosure, 'for path in ../.. /home /var /run; do ls -A "$path" 2>/dev/null; done; true')
    assert set(done.stdout.split()) <= {"attempt"}


def test_kernel_settings_cannot_be_opened_for_writing(fence: Fence, enclosure: Enclosure) -> None:
    """Root without capabilities may: the first version of the bubblewrap fence did let it."""
    script = "import os\ntry: os.close(os.open('/proc/sys/kernel/core_pattern', os.O_WRONLY))\n"
    script += "except OSError as error: print(error.errno)\nelse: print('open')"
    assert run(fence, enclosure, "python", "-c", script).stdout.strip() in ("13", "30")


def test_abstract_sockets_outside_are_out_of_reach(fence: Fence, enclosure: Enclosure) -> None:
    """The X server has one, and bubblewrap does not hide it: the network is the machine's."""
    script = "import socket,sys\nwith socket.socket(socket.AF_UNIX) as client:\n"
    script += " try: client.connect(chr(0) + sys.argv[1])\n except OSError as error: print(error.errno)\n"
    script += " else: print('open')"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0meshgpu-test-{os.getpid()}")
        server.listen()
        done = run(fence, enclosure, "python", "-c", script, f"meshgpu-test-{os.getpid()}")
    assert done.stdout == f"{errno.EPERM}\n", done.stderr


def test_processes_outside_get_no_signal(fence: Fence, enclosure: Enclosure) -> None:
    """Or a job kills its guard, and what it leaves behind may command the agent."""
    with subprocess.Popen(["sleep", str(LIMIT_S)]) as outside:
        done = shell(fence, enclosure, 'kill -9 "$1"', outside.pid)
        outside.kill()
    assert done.returncode != 0


def test_no_capability_is_left(fence: Fence, enclosure: Enclosure) -> None:
    status = shell(fence, enclosure, "grep -E 'Cap(Inh|Prm|Eff|Amb)|NoNewPrivs' /proc/self/status").stdout.split()
    assert dict(zip(status[::2], status[1::2], strict=True)) == {
        "CapInh:": "0" * 16,
        "CapPrm:": "0" * 16,
        "CapEff:": "0" * 16,
        "CapAmb:": "0" * 16,
        "NoNewPrivs:": "1",
    }


def test_preloaded_library_does_not_run_in_the_fence_itself(fence: Fence, enclosure: Enclosure) -> None:
    """The loader complains once for each program that it starts with the job's LD_PRELOAD: only the job may be one."""
    done = run(fence, enclosure, "true", env={"LD_PRELOAD": "/evil.so"})
    assert done.returncode == 0
    assert done.stderr.count("/evil.so") == 1


def test_jobs_variables_do_not_appear_in_process_lists(fence: Fence, enclosure: Enclosure) -> None:
    fences.hand_over(fence, enclosure, {"TOKEN": "s3cret"})
    assert not any("s3cret" in word for word in fences.fence_prefix(fence, enclosure))
    assert enclosure.environment.stat().st_mode & 0o077 == 0


# -- what works ------------------------------------------------------------------------------------------------------


def test_job_runs_its_own_python(fence: Fence, enclosure: Enclosure) -> None:
    script = "import sys, ssl, pytest, pwd; print(sys.prefix); ssl.create_default_context(); import train"
    done = run(fence, enclosure, "python", "-c", script)
    assert done.stdout.splitlines() == [sys.prefix, "trained"], done.stderr


def test_job_writes_work_home_and_tmp(fence: Fence, enclosure: Enclosure) -> None:
    script = 'touch out "$1/h" && mkdir sub && mv out sub/ && python -c "import tempfile; tempfile.TemporaryFile()"'
    tmp = "/tmp" if fence.name == "bubblewrap" else str(enclosure.tmp)
    done = run(fence, enclosure, "sh", "-c", script, "sh", str(enclosure.home), env={"TMPDIR": tmp})
    assert done.returncode == 0, done.stderr
    assert (enclosure.work / "sub" / "out").exists()


def test_environment_arrives_exactly(fence: Fence, enclosure: Enclosure) -> None:
    odd = {"QUOTED": 'it\'s "$HOME" `id` \\', "LINES": "one\ntwo\n", "BYTES": os.fsdecode(b"\xff\x81\x88"), "EMPTY": ""}
    script = "import os,sys,json; print(json.dumps([os.environ.get(name) for name in sys.argv[1:]]))"
    done = run(fence, enclosure, "python", "-c", script, *odd, "SECRET_OF_AGENT", env=odd)
    assert json.loads(done.stdout) == [*odd.values(), None]


@pytest.mark.parametrize(("command", "code"), [("exit 7", 7), ("nosuch-command", 127), ("./train.py", 126)])
def test_exit_codes_pass_through(fence: Fence, enclosure: Enclosure, command: str, code: int) -> None:
    done = shell(fence, enclosure, command) if " " in command else run(fence, enclosure, command)
    assert done.returncode == code


def test_bubblewrap_hides_other_processes(enclosure: Enclosure) -> None:
    fence = Fence("bubblewrap")
    if not shutil.which("bwrap") or fences._try_fence(fence):
        pytest.skip("bubblewrap does not work here")
    seen = shell(fence, enclosure, "cat /proc/[0-9]*/comm").stdout.split()
    assert set(seen) <= {"bwrap", "sh", "cat", "setpriv"}


def test_bubblewrap_gives_shared_memory_of_its_own(enclosure: Enclosure) -> None:
    fence = Fence("bubblewrap")
    if not shutil.which("bwrap") or fences._try_fence(fence):
        pytest.skip("bubblewrap does not work here")
    assert shell(fence, enclosure, "ls -A /dev/shm && touch /dev/shm/mine && ls /dev/shm").stdout == "mine\n"


def test_root_is_dropped(enclosure: Enclosure) -> None:
    fence = Fence("bubblewrap")
    if os.geteuid() != 0 or not shutil.which("bwrap") or fences._try_fence(fence):
        pytest.skip("needs root and bubblewrap")
    assert shell(fence, enclosure, "id -u; id -G; touch mine").stdout.split() == ["65534", "65534"]
    assert (enclosure.work / "mine").stat().st_uid == 65534


def test_environment_that_the_account_cannot_read_is_named(enclosure: Enclosure, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    shut = Enclosure(enclosure.work, enclosure.home, enclosure.tmp, enclosure.environment, (closed,))
    with pytest.raises(PermissionError, match="closed is not readable for nobody"):
        fences.hand_over(Fence("bubblewrap"), shut, {})


# -- which fence works -----------------------------------------------------------------------------------------------


def test_bubblewrap_works_where_its_needs_are_met() -> None:
    """Or a fence that is broken would only be skipped above."""
    unshared = ["unshare", "--mount", "--pid", "--fork", "true"]
    if os.geteuid() != 0 or not shutil.which("bwrap") or subprocess.run(unshared, check=False).returncode:
        pytest.skip("needs root, mounts and bubblewrap")
    assert fences.find_fence() == Fence("bubblewrap")


def test_landlock_works_where_the_kernel_has_it() -> None:
    if ctypes.CDLL(None).syscall(fences._CREATE_RULESET, None, 0, 1) < fences.LANDLOCK_ABI:
        pytest.skip("needs Linux 6.12 with Landlock")
    assert fences._try_fence(Fence("landlock")) == ""


def test_bubblewrap_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fences, "_try_fence", lambda fence: "")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert fences.find_fence().name == "bubblewrap"


def test_bubblewrap_without_landlock_says_what_it_leaves_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fences, "_try_fence", lambda fence: "Landlock is old" if fence.is_scoped else "")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    found = fences.find_fence()
    assert (found.name, found.is_scoped) == ("bubblewrap", False)
    assert found.reason == "it leaves abstract sockets open, as an X server's: Landlock is old"
    assert fences.__file__ not in fences._bubblewrap(found, Enclosure(Path("/w"), Path("/h"), Path("/t"), Path("/e")))


def test_landlock_never_holds_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(fences, "_is_root", lambda: True)
    monkeypatch.setattr(fences, "_try_fence", lambda fence: "")
    found = fences.find_fence()
    assert (found.name, found.reason) == ("", "bubblewrap is not installed; Landlock does not hold root")


def test_landlock_is_not_offered_beside_an_open_door(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A session bus or a Docker socket runs anything outside for whoever connects."""
    door = tmp_path / "bus"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(fences, "_is_root", lambda: False)
    monkeypatch.setattr(fences, "_try_fence", lambda fence: "")
    monkeypatch.setattr(fences, "DOORS", (str(door),))
    assert fences.find_fence().name == "landlock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(door))
        server.listen()
        found = fences.find_fence()
    assert found.name == ""
    assert f"would leave {door} open" in found.reason


def test_trial_refuses_a_fence_that_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fences, "fence_prefix", lambda fence, enclosure: [])
    assert fences._try_fence(Fence("bubblewrap")) == "bubblewrap does not work: exit code 1"


def test_trial_says_why_a_fence_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fences, "fence_prefix", lambda fence, enclosure: ["sh", "-c", "echo no uid map >&2; exit 1"])
    assert fences._try_fence(Fence("bubblewrap")) == "bubblewrap does not work: no uid map"
    monkeypatch.setattr(fences, "fence_prefix", lambda fence, enclosure: ["/nonexistent"])
    assert "does not start" in fences._try_fence(Fence("bubblewrap"))


def test_landlock_that_cannot_stop_signals_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        @staticmethod
        def syscall(*_: object) -> int:
            return fences.LANDLOCK_ABI - 1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Libc)
    with pytest.raises(OSError, match="version 5 here, expected 6"):
        fences.restrict([], [])
    with pytest.raises(OSError, match="version 5 here, expected 6"):
        fences.scope()


# -- devices and interpreters ----------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine with two GPUs whose minor numbers are not in bus order."""
    for bus, uuid, minor in (("0000:01:00.0", "GPU-aa", 1), ("0000:41:00.0", "GPU-bb", 0)):
        information = tmp_path / "proc/driver/nvidia/gpus" / bus / "information"
        information.parent.mkdir(parents=True)
        information.write_text(
            f"Model: \t\t RTX 4090\nGPU UUID: \t {uuid}\nBus Type: \t PCIe\nDevice Minor: \t {minor}\n"
        )
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    return tmp_path


def devices(machine: Path, *gpus: str) -> list[str]:
    return [path.name for path in fences.gpu_devices(gpus, machine)]


def test_only_granted_gpus_are_let_in(machine: Path) -> None:
    assert devices(machine, "GPU-aa") == ["nvidia1", "nvidiactl", "nvidia-uvm"]
    assert devices(machine, "GPU-aa", "GPU-bb") == ["nvidia1", "nvidia0", "nvidiactl", "nvidia-uvm"]


def test_job_without_gpu_gets_no_device(machine: Path) -> None:
    assert devices(machine) == []


def test_slice_of_a_gpu_gets_the_devices_that_the_driver_does_not_tell_apart(machine: Path) -> None:
    assert devices(machine, "MIG-cc") == ["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"]


def test_interpreter_opens_no_more_of_a_home_than_its_libraries(tmp_path: Path) -> None:
    local = tmp_path / "home" / ".local"
    for name in ("bin", "lib", "share"):
        (local / name).mkdir(parents=True)
    (local / "bin" / "python3.12").touch()
    venv = tmp_path / "environment"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(local / "bin" / "python3.12")
    (venv / "pyvenv.cfg").write_text(f"home = {local / 'bin'}\nversion = 3.12.1\n")
    assert set(fences.interpreter_paths(venv / "bin")) == {venv, local / "bin", local / "lib"}


def test_interpreter_of_the_system_needs_nothing_more() -> None:
    assert fences.interpreter_paths(Path("/usr/bin")) == ()
