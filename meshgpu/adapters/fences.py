"""What shuts another user's job in: bubblewrap, else Landlock, else nothing. Found by trial when the agent starts.

A fence is the beginning of a command line. Inside it a job reads the system's directories, its environment and its
granted GPUs, and writes its own work, home and tmp directories; users' files, sockets and the agent's are out of reach.

Run as a file (`python -I -S fences.py RULES -- COMMAND…`) this is the Landlock fence itself, so it needs only the
standard library.
"""

# ruff: noqa: S108  # the fences deal with /tmp and /dev/shm themselves

import ctypes
import json
import os
import pwd
import re
import shlex
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

UNPRIVILEGED_ID: Final = 65534
"""`nobody` runs other users' jobs where the agent is root: even without capabilities root may write /proc/sys."""
LANDLOCK_ABI: Final = 6
"""The first that holds back signals and abstract sockets (Linux 6.12). With an older one a job kills its guard, and
what it left behind then commands the agent as any process of the account may."""
TRIAL_LIMIT_S: Final = 5.0
DOOR_LIMIT_S: Final = 0.5
CLEAN_ENVIRONMENT: Final = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
"""What a fence is started with: the job's LD_PRELOAD must not run in the program that is to shut it in."""

SYSTEM_PATHS: Final = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
ETC_PATHS: Final = tuple(
    f"/etc/{name}"
    for name in (
        "OpenCL", "alternatives", "fonts", "gai.conf", "group", "host.conf", "hosts", "ld.so.cache", "ld.so.conf",
        "ld.so.conf.d", "localtime", "magic", "mime.types", "nsswitch.conf", "os-release", "passwd", "pki/ca-trust",
        "pki/tls/certs", "protocols", "resolv.conf", "services", "ssl/certs", "ssl/openssl.cnf", "terminfo",
        "timezone", "vulkan",
    )
)  # fmt: skip
"""Names, time, TLS roots and the loader's cache; nothing that holds a secret."""
SYS_PATHS: Final = ("/sys/bus/pci", "/sys/class", "/sys/dev/char", "/sys/devices", "/sys/module/nvidia")
"""Where CUDA and NCCL read the machine's topology."""
PLAIN_DEVICES: Final = tuple(f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty"))
NVIDIA_CONTROL_DEVICES: Final = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")
DOORS: Final = (
    "/run/docker.sock", "/run/podman/podman.sock", "/run/containerd/containerd.sock", "/run/libvirt/libvirt-sock",
    "/run/user/{uid}/bus", "/run/user/{uid}/systemd/private", "/run/user/{uid}/docker.sock",
    "/run/user/{uid}/podman/podman.sock", "/run/user/{uid}/wayland-0", "/tmp/.X11-unix/X0", "/tmp/.X11-unix/X1",
    "/var/snap/lxd/common/lxd/unix.socket",
)  # fmt: skip
"""Sockets through which a job could have something run outside: Landlock does not stop connect()."""

_START: Final = ("/bin/sh", "-c", 'eval "$(cat)"; . "$1"; shift; exec "$@" </dev/null', "meshgpu")
"""Takes on the job's environment inside the fence, then becomes the job: 127 and 126 as shells have it.

What must not be on the disk comes at stdin, and must not override what does: it comes first.
"""
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Fence:
    """name: `bubblewrap`, `landlock` or empty. reason: why it is nothing stronger. options: for bubblewrap.

    is_scoped: whether Landlock closes abstract sockets to a job in bubblewrap, which shares the machine's network.
    """

    name: str
    reason: str = ""
    options: tuple[str, ...] = ()
    is_scoped: bool = True


@dataclass(frozen=True, slots=True)
class Enclosure:
    """All that one job may touch besides the system's directories: `work`, `home` and `tmp` to write, the rest to read.

    environment: a file for `environment_script`. devices: GPUs' device files.
    """

    work: Path
    home: Path
    tmp: Path
    environment: Path
    readable: tuple[Path, ...] = ()
    devices: tuple[Path, ...] = ()


# -- which fence works here ------------------------------------------------------------------------------------------


def find_fence() -> Fence:
    """Try the fences, strongest first. Blocks for some 50 ms, at worst 5 s for each."""
    reason = "bubblewrap is not installed"
    if shutil.which("bwrap"):
        unscoped = ""
        for is_scoped in (True, False):
            for options in ((),) if _is_root() else (("--disable-userns",), ()):
                fence = Fence("bubblewrap", unscoped, options, is_scoped)
                if not (reason := _try_fence(fence)):
                    return fence
            unscoped = f"it leaves abstract sockets open, as an X server's: {reason}"
    if _is_root():
        return Fence("", f"{reason}; Landlock does not hold root")
    if door := _open_door():
        return Fence("", f"{reason}; Landlock would leave {door} open")
    fence = Fence("landlock", reason)
    if landlock_reason := _try_fence(fence):
        return Fence("", f"{reason}; {landlock_reason}")
    return fence


def _is_root() -> bool:
    return os.geteuid() == 0


def _try_fence(fence: Fence) -> str:
    """Empty where a command inside writes its work directory and cannot read a file beside it; else what happened."""
    with tempfile.TemporaryDirectory(prefix="meshgpu-fence-") as name:
        top = Path(name)
        enclosure = Enclosure(top / "work", top / "home", top / "tmp", top / "environment")
        for path in (enclosure.work, enclosure.home, enclosure.tmp):
            path.mkdir()
        (top / "secret").touch()
        hand_over(fence, enclosure, {})
        command = ["/bin/sh", "-c", '! cat "$1" 2>/dev/null && : >inside', "try", str(top / "secret")]
        try:
            trial = subprocess.run(
                [*fence_prefix(fence, enclosure), *command],
                env=CLEAN_ENVIRONMENT,
                cwd=enclosure.work,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=TRIAL_LIMIT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{fence.name} does not start: {error}"
        if trial.returncode or not (enclosure.work / "inside").exists():
            said = trial.stderr.decode(errors="replace").strip().splitlines()
            return f"{fence.name} does not work: {said[-1] if said else f'exit code {trial.returncode}'}"
    return ""


def _open_door() -> str:
    """The first socket of DOORS that answers this account, empty for none."""
    for door in (door.format(uid=os.geteuid()) for door in DOORS):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DOOR_LIMIT_S)
            try:
                client.connect(door)
            except OSError:
                continue
            return door
    return ""


# -- what a job gets -------------------------------------------------------------------------------------------------


def fence_prefix(fence: Fence, enclosure: Enclosure) -> list[str]:
    """The beginning of a command line, to be run with CLEAN_ENVIRONMENT; the job's argv follows."""
    make = {"bubblewrap": _bubblewrap, "landlock": _landlock}[fence.name]
    return [*make(fence, enclosure), *_START, str(enclosure.environment)]


def exports(env: Mapping[str, str]) -> str:
    """Lines by which a shell takes on the variables of `env` that have proper names."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items() if _VARIABLE.fullmatch(name))


def hand_over(fence: Fence, enclosure: Enclosure, env: Mapping[str, str]) -> None:
    """Write the environment and give the job's directories to the account that runs it. Blocks.

    Raises PermissionError where that account cannot read what it needs; nothing of `env` but proper names is passed.
    """
    enclosure.environment.write_bytes(os.fsencode(exports(env)))
    enclosure.environment.chmod(0o600)
    if not _drops_root(fence):
        return
    for path in enclosure.readable:
        if path.exists() and path.stat().st_mode & 0o005 != 0o005:
            raise PermissionError(f"{path} is not readable for {account(fence)}, who runs other users' jobs here")
    give_away(enclosure.environment, enclosure.work, enclosure.home, enclosure.tmp)


def give_away(*tops: Path) -> None:
    """Give these files, and all that lies below these directories, to `nobody`. Needs root. Blocks."""
    paths = [str(top) for top in tops]
    for top in tops:
        for directory, directories, files in os.walk(top):
            paths += (f"{directory}/{entry}" for entry in (*directories, *files))
    for name in paths:
        os.chown(name, UNPRIVILEGED_ID, UNPRIVILEGED_ID, follow_symlinks=False)


def account(fence: Fence) -> str:
    """Name of the account that a job inside `fence` has."""
    uid = UNPRIVILEGED_ID if _drops_root(fence) else os.geteuid()
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def interpreter_paths(bin_path: Path, interpreter: Path | None = None) -> tuple[Path, ...]:
    """What the Python in `bin_path` reads: its environment, and the libraries of the interpreter that it came from.

    Of the latter only bin, lib and include: an interpreter below ~/.local must not open the rest of it. Without
    `interpreter` it is what `python` leads to. What pyvenv.cfg says counts for nothing: a package may write it.
    """
    root = bin_path.parent
    python = interpreter or bin_path / "python"
    bins = [Path(os.path.realpath(python)).parent]
    if interpreter is not None:
        bins += [interpreter.parent, Path(os.path.realpath(interpreter.parent))]
    paths: list[Path] = []
    if interpreter is not None or (root / "pyvenv.cfg").is_file():
        paths.append(root)
    else:
        bins.append(bin_path)
    for directory in bins:
        paths += [directory, directory.parent / "lib", directory.parent / "include"]
    return tuple(path for path in dict.fromkeys(paths) if not _is_of_system(path) and path.is_dir())


def _is_of_system(path: Path) -> bool:
    return any(path.is_relative_to(system) for system in SYSTEM_PATHS)


def gpu_devices(gpus: Sequence[str], machine: Path = Path("/")) -> tuple[Path, ...]:
    """Device files of these GPUs (by UUID) and the control files they need, below `machine`; none without GPUs.

    A GPU that the driver does not list (a slice of one, MIG) gets them all: CUDA_VISIBLE_DEVICES picks the slice.
    """
    if not gpus:
        return ()
    minors: dict[str, str] = {}
    for file in sorted(machine.glob("proc/driver/nvidia/gpus/*/information")):
        facts = dict(re.findall(r"^(GPU UUID|Device Minor):\s*(\S+)", file.read_text(errors="replace"), re.MULTILINE))
        if len(facts) == 2:
            minors[facts["GPU UUID"]] = facts["Device Minor"]
    dev = machine / "dev"
    if all(gpu in minors for gpu in gpus):
        found = [dev / f"nvidia{minors[gpu]}" for gpu in gpus]
    else:
        found = [*sorted(dev.glob("nvidia[0-9]*")), dev / "nvidia-caps"]
    return tuple(path for path in (*found, *(dev / name for name in NVIDIA_CONTROL_DEVICES)) if path.exists())


# -- bubblewrap ------------------------------------------------------------------------------------------------------


def _drops_root(fence: Fence) -> bool:
    return fence.name == "bubblewrap" and _is_root()


def _bubblewrap(fence: Fence, enclosure: Enclosure) -> list[str]:
    argv = _confined_by({}) if fence.is_scoped else []
    argv += [shutil.which("bwrap") or "bwrap", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--die-with-parent"]
    argv += ["--new-session", "--cap-drop", "ALL"]
    if _drops_root(fence):
        argv += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP"]
    else:
        argv += ["--unshare-user", *fence.options]
    argv += ["--bind", str(enclosure.tmp), "/tmp", "--proc", "/proc", "--dev", "/dev"]
    argv += ["--perms", "1777", "--tmpfs", "/dev/shm"]
    binds = [("--ro-bind-try", Path(path)) for path in (*SYSTEM_PATHS, *ETC_PATHS, *SYS_PATHS)]
    binds += [("--ro-bind", path) for path in (*enclosure.readable, enclosure.environment)]
    binds += [("--dev-bind", path) for path in enclosure.devices]
    binds += [("--bind", path) for path in (enclosure.home, enclosure.work)]
    for directory in sorted({parent for _, path in binds for parent in path.parents} - {Path("/")}):
        argv += ["--perms", "0755", "--dir", str(directory)]  # bubblewrap would make them for root alone
    for option, path in binds:
        argv += [option, str(path), str(path)]
    argv += ["--chdir", str(enclosure.work), "--"]
    if _drops_root(fence):
        argv += ["setpriv", f"--reuid={UNPRIVILEGED_ID}", f"--regid={UNPRIVILEGED_ID}", "--clear-groups"]
        argv += ["--inh-caps=-all", "--bounding-set=-all", "--"]
    return argv


# -- Landlock (linux/landlock.h) -------------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH: Final = 1
_READ: Final = 1 << 0 | 1 << 2 | 1 << 3
"""EXECUTE, READ_FILE, READ_DIR."""
_ALL: Final = (1 << 15) - 1
"""Every right of ABI 3."""
_OF_FILES: Final = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14
"""EXECUTE, WRITE_FILE, READ_FILE, TRUNCATE: the only ones allowed in a rule for something that is no directory."""
_SCOPES: Final = 1 << 0 | 1 << 1
"""No abstract sockets and no signals out of the fence."""
_PR_SET_NO_NEW_PRIVS: Final = 38
_CAPABILITY_VERSION_3: Final = 0x20080522


def _landlock(_: Fence, enclosure: Enclosure) -> list[str]:
    read = (*SYSTEM_PATHS, *ETC_PATHS, *SYS_PATHS, "/proc", *enclosure.readable, enclosure.environment)
    write = (enclosure.work, enclosure.home, enclosure.tmp, *PLAIN_DEVICES, *enclosure.devices)
    rules = {"read": [str(path) for path in read], "write": [str(path) for path in write], "shm": _device("/dev/shm")}
    return _confined_by(rules)


def _confined_by(rules: Mapping[str, object]) -> list[str]:
    """Runs a command under `rules`; without any it loses only signals to, and abstract sockets of, what is outside."""
    return [sys.executable, "-I", "-S", "-X", "utf8", __file__, json.dumps(rules), "--"]


def _device(path: str) -> int:
    try:
        return os.stat(path).st_dev  # noqa: PTH116 - one number of a path that may be missing
    except FileNotFoundError:
        return 0


def restrict(read: Iterable[str], write: Iterable[str]) -> None:
    """Confine this process and its children for good, and drop its capabilities. Raises OSError where that fails."""
    rules = _new_rules(_ALL)
    for access, paths in ((_READ, read), (_ALL, write)):
        for path in paths:
            try:
                handle = os.open(path, os.O_PATH)
            except FileNotFoundError:
                continue
            allowed = access if stat.S_ISDIR(os.fstat(handle).st_mode) else access & _OF_FILES
            _call("syscall", _ADD_RULE, rules, _RULE_PATH_BENEATH, struct.pack("=Qi", allowed, handle), 0)
            os.close(handle)
    _call("capset", struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24))
    _enforce(rules)


def scope() -> None:
    """Keep this process and its children from outside signals and abstract sockets. Raises OSError where that fails.

    Rules for files would keep bubblewrap from mounting; these do not.
    """
    _enforce(_new_rules(0))


def _new_rules(handled: int) -> int:
    """A ruleset, as a descriptor, that denies these rights to files and what _SCOPES says."""
    abi = _call("syscall", _CREATE_RULESET, None, 0, 1)
    if abi < LANDLOCK_ABI:
        raise OSError(f"Landlock has version {abi} here, expected {LANDLOCK_ABI} (Linux 6.12)")
    attributes = struct.pack("=QQQ", handled, 0, _SCOPES)
    return _call("syscall", _CREATE_RULESET, attributes, len(attributes), 0)


def _enforce(rules: int) -> None:
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("syscall", _RESTRICT_SELF, rules, 0)
    os.close(rules)


def _call(name: str, *arguments: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    converted = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    result: int = getattr(libc, name)(*converted)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"Landlock: {name}: {os.strerror(ctypes.get_errno())}")
    return result


def main(arguments: list[str]) -> None:
    """Confine this process by RULES, then become COMMAND."""
    rules, _, *command = arguments
    if allowed := json.loads(rules):
        write = list(allowed["write"])
        if _device("/dev/shm") != allowed["shm"]:  # it is the job's own
            write.append("/dev/shm")
        restrict(allowed["read"], write)
    else:
        scope()
    os.execv(command[0], command)  # noqa: S606 - becoming the job is the purpose


if __name__ == "__main__":
    main(sys.argv[1:])
