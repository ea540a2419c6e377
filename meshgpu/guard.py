"""Owns one job: its process tree, the ledger of what it prints, and the record of how it ended.

Run as a file with `python -I -S -X utf8 guard.py`: a fork server that starts one guard for each request.

fork server, guard → init → job. The guard outlives agent and fork server and stays outside the job's PID namespace.
Init is the job's parent: it reaps orphans and passes a stop on. SIGTERM tells a guard to stop its job (SIGTERM,
`grace_s`, SIGKILL), SIGUSR1 to kill it at once. With a time limit it stops the job of itself, whether an agent lives
or not.

In the attempt's directory, `guard.json` claims the attempt (whoever makes it first has it), `log` and `log.*` are the
ledger, and `exit.json` appears last, when nothing of the job is left.
"""
# Each guard is forked from here: pathlib and what it imports would only make them larger.
# ruff: noqa: PTH105, PTH108, PTH115, PTH120, PTH123, PTH208

import contextlib
import ctypes
import errno
import gc
import json
import os
import select
import signal
import struct
import time
import traceback
from collections.abc import Callable
from typing import Final, TypedDict

LEDGER_HEADER: Final = struct.Struct(">BdI")
"""Stream (1 stdout, 2 stderr), Unix time in seconds, payload length in bytes."""
RECORD_LIMIT_BYTES: Final = 64 * 1024
"""Payload of one record: what a pipe holds by default, so that one read empties it."""
LEDGER_FILE_BYTES: Final = 8 * 2**20
"""The ledger goes on in a new file after so many: it is shortened, and searched, file by file."""
FRAME: Final = struct.Struct(">I")
"""Length in bytes of the JSON document that follows, in both directions of the fork server's channel."""
CHANNEL: Final = 0
COMMAND_NOT_EXECUTABLE: Final = 126
COMMAND_NOT_FOUND: Final = 127
KILLED: Final = 128 + signal.SIGKILL
GUARD_BROKE: Final = 70
"""EX_SOFTWARE of sysexits.h: a child of ours raised."""
DISK_RETRY_S: Final = 1.0
"""How often a full disk is tried again; the job waits on its full pipe meanwhile, so that no line is lost."""

_REPORT: Final = struct.Struct(">ci")
"""Init to guard: `s`, 0 when the job is spawned; `e`, exit code when it has ended."""
_ORDERS: Final = (signal.SIGTERM, signal.SIGUSR1)
_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_SLAVE = 2, 4, 8, 0x4000, 0x80000
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_TFD_CLOEXEC: Final = 0o2000000
_ITIMERSPEC: Final = struct.Struct("@4l")
"""Interval and value, in seconds and nanoseconds each."""
_TIMER_LIMIT_S: Final = 2.0**31
"""68 years: more fits no timer on a machine of 32 bits."""
_libc: Final = ctypes.CDLL(None, use_errno=True)


class LedgerBounds(TypedDict):
    """keep_bytes: the newest so many of the ledger are kept. keep_free_bytes: below this much free disk only the newest
    two files of it are.
    """

    keep_bytes: int
    keep_free_bytes: int


class Request(TypedDict):
    """One attempt, as the executor asks for it.

    directory: the attempt's own, for guard.json, the ledger and exit.json. work: where the job starts.
    own_shm: gets an empty /dev/shm where there is a namespace for it. enclosed: argv begins with bubblewrap, which does
    not pass signals on. after: argv of what takes away what the job's tree cannot take along; empty for nothing.
    given: what the command finds at its stdin, in memory alone; empty for nothing. It may be secret: never log it.
    timeout_s: how long the job may run, from its start, on CLOCK_BOOTTIME; None: for ever.
    """

    directory: str
    work: str
    argv: list[str]
    env: dict[str, str]
    grace_s: float
    own_shm: bool
    enclosed: bool
    after: list[str]
    given: str
    timeout_s: float | None
    ledger: LedgerBounds


class GuardRecord(TypedDict):
    """guard.json. pid 0: an executor claimed an attempt that had no guard, so that none can start any more.

    start_ticks: field 22 of /proc/PID/stat, which tells this process from a later one of the same number.
    job_pid: what init started, None until then. isolation: `pid`, `user` or `subreaper`.
    """

    pid: int
    start_ticks: int
    boot_id: str
    started_wall_s: float
    job_pid: int | None
    isolation: str


class ExitRecord(TypedDict):
    """exit.json: no process of the job is left, and the ledger is complete. exit_code: None if nothing was started.

    stopped_by: `stop`, `kill`, or `timeout` where it ran for too long, whatever else was ordered after that.
    """

    exit_code: int | None
    started_wall_s: float
    ended_wall_s: float
    stopped_by: str | None
    reason: str


class Notice(TypedDict):
    """Guard to executor: once when the attempt is claimed, once more when the job is spawned."""

    directory: str
    guard: GuardRecord


# -- records on disk -------------------------------------------------------------------------------------------------


def claim(path: str, record: GuardRecord) -> bool:
    """Make guard.json, durably; False where it is there already. Only then may anything be started."""
    temporary = _write(path, record)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return True


def replace(path: str, record: GuardRecord | ExitRecord) -> None:
    """Write the record, atomically."""
    os.replace(_write(path, record), path)


def _write(path: str, record: GuardRecord | ExitRecord) -> str:
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def new_record(pid: int, isolation: str) -> GuardRecord:
    return GuardRecord(
        pid=pid,
        start_ticks=start_ticks(pid) or 0,
        boot_id=boot_id(),
        started_wall_s=time.time(),
        job_pid=None,
        isolation=isolation,
    )


def boot_id() -> str:
    """Names this run of the kernel."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def start_ticks(pid: int) -> int | None:
    """When process `pid` started, in clock ticks after boot; None where none runs (one that nobody reaped does not)."""
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else None


def _stat(pid: int | str) -> list[str]:
    """/proc/PID/stat from its third field on (the second may hold blanks and parentheses); empty if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


# -- fork server -----------------------------------------------------------------------------------------------------


def serve() -> None:
    """Start a guard for each request on CHANNEL until its other end closes."""
    isolation = find_isolation()
    gc.freeze()  # pages that the collector does not touch stay shared with every guard
    while (head := _read_exactly(FRAME.size)) and (body := _read_exactly(FRAME.unpack(head)[0])):
        request: Request = json.loads(body)
        # A stop that arrives before the guard's handlers are set must wait, not kill it.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ORDERS)
        child = _fork(_detach, request, isolation)
        del request, body  # its secrets are for its own guard, not for those that are forked later
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ORDERS)
        os.waitpid(child, 0)


def _detach(request: Request, isolation: str) -> int:
    os.setsid()
    _fork(Guard(request, isolation).watch)
    return 0


def _read_exactly(count: int) -> bytes:
    """`count` bytes of CHANNEL, or nothing at its end."""
    parts = []
    while count:
        part = os.read(CHANNEL, count)
        if not part:
            return b""
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _fork(body: Callable[..., int], *arguments: object) -> int:
    """Fork a child that exits with what `body` returns, whatever happens; returns the child's pid."""
    if pid := os.fork():
        return pid
    code = GUARD_BROKE
    try:
        code = body(*arguments)
    except BaseException:  # the child must never fall back into its parent's loop
        traceback.print_exc()
    finally:
        os._exit(code)


# -- isolation -------------------------------------------------------------------------------------------------------


def find_isolation() -> str:
    """What holds a job's tree together here, by trial: `pid` (a namespace), `user` (one more for it), `subreaper`."""
    for isolation in ("pid", "user"):
        if os.waitpid(_fork(_try_isolation, isolation), 0)[1] == 0:
            return isolation
    return "subreaper"


def _try_isolation(isolation: str) -> int:
    try:
        enter_isolation(isolation)
    except OSError:
        return 1
    return os.waitstatus_to_exitcode(os.waitpid(_fork(_try_init), 0)[1])


def _try_init() -> int:
    try:
        mount_own_proc()
    except OSError:
        return 1
    return 0 if os.readlink("/proc/self") == "1" else 1


def enter_isolation(isolation: str) -> None:
    """Make the next child the init of a job's tree; orphans that it loses come to this process."""
    _check("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if isolation == "user":
        uid, gid = os.geteuid(), os.getegid()
        _check("unshare", _CLONE_NEWUSER)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    if isolation != "subreaper":
        _check("unshare", _CLONE_NEWPID)


def mount_own_proc() -> None:
    """Give init's namespace its own view of processes; mounts that the machine makes later still arrive."""
    _check("unshare", _CLONE_NEWNS)
    _check("mount", None, b"/", None, _MS_REC | _MS_SLAVE, None)
    _check("mount", b"proc", b"/proc", b"proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, None)


def _check(name: str, *arguments: object) -> int:
    """Call the C library; raises OSError that names the call."""
    converted = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    result: int = getattr(_libc, name)(*converted)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _alarm(after_s: float) -> int:
    """A descriptor that becomes readable after so many seconds, those in which the machine sleeps included."""
    descriptor = _check("timerfd_create", time.CLOCK_BOOTTIME, _TFD_CLOEXEC)
    nanoseconds = max(1, int(min(after_s, _TIMER_LIMIT_S) * 1e9))  # 0 would disarm it
    _check("timerfd_settime", descriptor, 0, _ITIMERSPEC.pack(0, 0, *divmod(nanoseconds, 10**9)), None)
    return descriptor


def _children(pid: int) -> list[int]:
    """Children of `pid`, oldest first."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except FileNotFoundError:  # gone, or a kernel without CONFIG_PROC_CHILDREN
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [child for child in pids if _stat(child)[1:2] == [str(pid)]]


def _kill_children() -> None:
    """Kill and reap until this process has no child; orphans of the killed ones come here and are killed too."""
    while True:
        for child in _children(os.getpid()):
            with contextlib.suppress(PermissionError):  # it became another user; its end is waited for
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _wake_on(*signals: signal.Signals) -> int:
    """A descriptor that gets one byte, its number, for each of these signals."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    for number in signals:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    return ours


# -- guard -----------------------------------------------------------------------------------------------------------


def ledger_file(path: str, start: int) -> str:
    """The file of the ledger at `path` whose first record stands at `start`."""
    return f"{path}.{start}" if start else path


class Ledger:
    """The append-only record of what the job printed; a record that does not fit on the disk is held back.

    It lies in files of about LEDGER_FILE_BYTES, each named by the position at which it starts. Whole records stand in
    each. The oldest files go when there is more than the bounds allow; positions stay as they are.
    """

    def __init__(self, path: str, bounds: LedgerBounds) -> None:
        self._path = path
        self._bounds = bounds
        self._starts = [0]
        self._end = 0
        self.descriptor = self._open(0)
        self.held = b""

    def copy(self, stream: int, source: int) -> bool:
        """Move what one read gives into one record; False at the end of the stream."""
        data = os.read(source, RECORD_LIMIT_BYTES)
        if data:
            self.append(LEDGER_HEADER.pack(stream, time.time(), len(data)) + data)
        return bool(data)

    def append(self, record: bytes) -> None:
        written = 0
        try:
            if self._end - self._starts[-1] >= LEDGER_FILE_BYTES:
                self._go_on()
            written = os.write(self.descriptor, record)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        if written == len(record):
            self._end += written
            self.held = b""
        else:
            os.ftruncate(self.descriptor, self._end - self._starts[-1])
            self.held = record

    def _open(self, start: int) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return os.open(ledger_file(self._path, start), flags, 0o600)

    def _go_on(self) -> None:
        """Begin a new file, and let go of the oldest ones."""
        descriptor = self._open(self._end)
        os.close(self.descriptor)
        self.descriptor = descriptor
        self._starts.append(self._end)
        while len(self._starts) > 2 and self._is_too_much():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(ledger_file(self._path, self._starts.pop(0)))

    def _is_too_much(self) -> bool:
        if self._end - self._starts[0] > self._bounds["keep_bytes"] - LEDGER_FILE_BYTES:
            return True
        disk = os.fstatvfs(self.descriptor)
        return disk.f_bavail * disk.f_frsize < self._bounds["keep_free_bytes"]

    def drain(self, sources: dict[int, int]) -> None:
        """Move what is left in the pipes. Waits neither for the disk nor for a stranger that holds a pipe open."""
        if self.held:
            self.append(self.held)
        for source, stream in sources.items():
            os.set_blocking(source, False)
            with contextlib.suppress(BlockingIOError):
                while self.copy(stream, source):
                    pass


class Sweeper:
    """A process beside the guard that becomes `argv` when told to, or when the guard is killed.

    It is no child of the guard, and made before the guard's children get a PID namespace: that ends with its init.
    """

    def __init__(self, argv: list[str]) -> None:
        begin, self._begin = os.pipe()
        self._ended, ended = os.pipe()
        os.waitpid(_fork(self._detach, argv, begin, ended), 0)
        os.close(begin)
        os.close(ended)

    def sweep(self) -> None:
        """Let it begin, and wait until it has ended."""
        os.close(self._begin)
        os.read(self._ended, 1)

    def _detach(self, argv: list[str], begin: int, ended: int) -> int:
        os.close(self._begin)
        os.setsid()
        _fork(self._become, argv, begin, ended)
        return 0

    @staticmethod
    def _become(argv: list[str], begin: int, ended: int) -> int:
        os.read(begin, 1)
        os.set_inheritable(ended, True)
        os.execve(argv[0], argv, {})  # noqa: S606 - becoming it is the purpose


class Guard:
    """One job's guard; `watch` is its life."""

    def __init__(self, request: Request, isolation: str) -> None:
        self._request = request
        self._directory = request["directory"]
        self._isolation = isolation
        self._init = 0
        self._exit_code: int | None = None
        self._stopped_by: str | None = None
        self._kill_at: float | None = None
        self._alarm: int | None = None
        self._reason = ""
        self._sweeper: Sweeper | None = None

    def watch(self) -> int:
        """Claim the attempt, run the job to its end, write exit.json. Leaves an attempt that is claimed alone."""
        channel = os.dup(CHANNEL)
        errors = os.open(f"{self._directory}/guard.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDWR)
        for target, source in enumerate((null, null, errors)):
            os.dup2(source, target)
        self._record = new_record(os.getpid(), self._isolation)
        if not claim(f"{self._directory}/guard.json", self._record):
            return 0
        self._tell(channel)
        try:
            self._run(channel)
        except OSError as error:
            traceback.print_exc()
            self._reason = f"cannot run the job: {error}"
        self._end_tree()
        if self._sweeper:
            self._sweeper.sweep()
        self._write_exit()
        return 0

    def _run(self, channel: int) -> None:
        ledger = Ledger(f"{self._directory}/log", self._request["ledger"])
        wake = _wake_on(*_ORDERS)
        if self._request["after"]:
            self._sweeper = Sweeper(self._request["after"])
        out, err, report, control = os.pipe(), os.pipe(), os.pipe(), os.pipe()
        enter_isolation(self._isolation)
        init = Init(self._request, self._isolation, out[1], err[1], report[1], control[0])
        self._init = _fork(init.reap, out[0], err[0], report[0], control[1], channel)
        self._request["given"], self._request["env"] = "", {}  # for the job alone, and it has them
        for descriptor in (out[1], err[1], report[1], control[0]):
            os.close(descriptor)
        sources = {out[0]: 1, err[0]: 2}
        while True:
            alarm = () if self._alarm is None else (self._alarm,)
            watched = [wake, report[0], *alarm, *(() if ledger.held else sources)]
            ready, _, _ = select.select(watched, [], [], DISK_RETRY_S if ledger.held else self._patience_s())
            if wake in ready:
                self._obey(os.read(wake, 64), control[1])
            if self._alarm in ready and report[0] not in ready:  # it may have ended at this very moment
                self._time_out(control[1])
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                self._reason = f"killed: it still ran {self._request['grace_s']:g} s after it was told to stop"
                self._kill()
            if ledger.held:
                ledger.append(ledger.held)
            else:
                sources = {source: n for source, n in sources.items() if source not in ready or ledger.copy(n, source)}
            if report[0] in ready and not self._hear(report[0], channel):
                break
        self._end_tree()
        ledger.drain(sources)

    def _patience_s(self) -> float | None:
        return None if self._kill_at is None else max(0.0, self._kill_at - time.monotonic())

    def _obey(self, orders: bytes, control: int) -> None:
        if signal.SIGUSR1 in orders:
            self._stopped_by = self._stopped_by if self._stopped_by == "timeout" else "kill"
            self._kill()
        elif signal.SIGTERM in orders and self._stopped_by is None:
            self._stop("stop", control)

    def _time_out(self, control: int) -> None:
        """The job has run for as long as it may."""
        assert self._alarm is not None
        os.close(self._alarm)
        self._alarm = None
        if self._stopped_by is None and self._exit_code is None:
            self._stop("timeout", control)

    def _stop(self, by: str, control: int) -> None:
        self._stopped_by = by
        self._kill_at = time.monotonic() + self._request["grace_s"]
        with contextlib.suppress(BrokenPipeError):
            os.write(control, b"T")

    def _kill(self) -> None:
        """End the tree at once: a namespace dies with its init; without one, init's orphans come to this process."""
        self._kill_at = None
        os.kill(self._init, signal.SIGKILL)

    def _hear(self, report: int, channel: int) -> bool:
        """Take what init reports; False once init is ending."""
        message = os.read(report, _REPORT.size)
        if not message:
            return False
        kind, code = _REPORT.unpack(message)
        if kind == b"e":
            self._exit_code = code
            return True
        if self._request["timeout_s"] is not None:
            self._alarm = _alarm(self._request["timeout_s"])
        self._record["job_pid"] = next(iter(_children(self._init)), self._init)
        self._record["started_wall_s"] = time.time()
        replace(f"{self._directory}/guard.json", self._record)
        self._tell(channel)
        os.close(channel)
        return True

    def _end_tree(self) -> None:
        """Wait until nothing of the job is left, helping where something is."""
        if not self._init:
            return
        if self._reason:
            self._kill()
        os.waitpid(self._init, 0)
        _kill_children()
        self._init = 0
        if self._exit_code is None and self._stopped_by is None and self._record["job_pid"] is None:
            self._reason = self._reason or "cannot start the job: guard.err in the attempt's directory says why"
        elif self._exit_code is None:
            self._exit_code = KILLED
            if self._stopped_by is None:
                self._reason = self._reason or "something killed the job's init process"

    def _write_exit(self) -> None:
        record = ExitRecord(
            exit_code=self._exit_code,
            started_wall_s=self._record["started_wall_s"],
            ended_wall_s=time.time(),
            stopped_by=self._stopped_by,
            reason=self._reason,
        )
        while True:
            try:
                replace(f"{self._directory}/exit.json", record)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                time.sleep(DISK_RETRY_S)
            else:
                return

    def _tell(self, channel: int) -> None:
        """Tell the executor, if it is still there. One write, so that guards do not tear each other's notices."""
        body = json.dumps(Notice(directory=self._directory, guard=self._record)).encode()
        with contextlib.suppress(OSError):
            os.write(channel, FRAME.pack(len(body)) + body)


def _in_memory(text: str) -> int:
    """A descriptor from which `text` can be read, once, and that no path leads to."""
    descriptor = os.memfd_create("given", os.MFD_CLOEXEC)
    data = text.encode()
    while data:
        data = data[os.write(descriptor, data) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


# -- init and job ----------------------------------------------------------------------------------------------------


class Init:
    """Parent of the job, PID 1 where there is a namespace; `reap` is its life."""

    def __init__(self, request: Request, isolation: str, out: int, err: int, report: int, control: int) -> None:
        self._request = request
        self._isolation = isolation
        self._out, self._err, self._report, self._control = out, err, report, control

    def reap(self, *guards_ends: int) -> int:
        """Start the job, reap orphans, end with the job or with the guard, whose end of `control` then closes."""
        for descriptor in guards_ends:
            os.close(descriptor)
        self._settle()
        wake = _wake_on(signal.SIGCHLD)
        signal.pthread_sigmask(signal.SIG_BLOCK, _ORDERS)  # the job gets a stop that comes before its exec
        job = _fork(self._become_job)
        os.close(self._out)
        os.close(self._err)
        os.write(self._report, _REPORT.pack(b"s", 0))
        code = None
        while code is None:
            ready, _, _ = select.select([wake, self._control], [], [])
            if self._control in ready:
                if not os.read(self._control, 1):
                    break
                self._stop(job)
            if wake in ready:
                os.read(wake, 4096)
                code = self._collect(job)
        else:
            os.write(self._report, _REPORT.pack(b"e", code))
        if self._isolation == "subreaper":
            _kill_children()
        return 0

    def _settle(self) -> None:
        if self._isolation == "subreaper":
            _check("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            return
        _check("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        mount_own_proc()
        if self._request["own_shm"]:
            _check("mount", b"tmpfs", b"/dev/shm", b"tmpfs", _MS_NOSUID | _MS_NODEV, b"mode=1777")

    @staticmethod
    def _collect(job: int) -> int | None:
        """Reap all that ended; the job's exit code once it is among them."""
        code = None
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return code
            if pid == 0:
                return code
            if pid == job:
                ended = os.waitstatus_to_exitcode(status)
                code = ended if ended >= 0 else 128 - ended

    def _stop(self, job: int) -> None:
        """SIGTERM to the job's process group; bubblewrap's own init leads the one inside, and is immune as PID 1."""
        inner = next(iter(_children(job)), 0) if self._request["enclosed"] else 0
        group = inner if inner and _children(inner) else job
        try:
            os.killpg(group, signal.SIGTERM)
        except ProcessLookupError:  # it does not lead its group yet; init has not reaped it, so the number is its own
            os.kill(job, signal.SIGTERM)

    def _become_job(self) -> int:
        os.setsid()
        given = _in_memory(self._request["given"]) if self._request["given"] else os.open(os.devnull, os.O_RDONLY)
        for target, source in enumerate((given, self._out, self._err)):
            os.dup2(source, target)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.umask(0o022)
        argv, env = self._request["argv"], self._request["env"]
        try:
            os.chdir(self._request["work"])
            try:
                os.execvpe(argv[0], argv, env)  # noqa: S606 - running it is what we are for
            except OSError as error:
                if error.errno != errno.ENOEXEC:
                    raise
                os.execve("/bin/sh", ["sh", *argv], env)  # noqa: S606 - a script without #!, as shells run it
        except (FileNotFoundError, NotADirectoryError):
            reason, code = "command not found", COMMAND_NOT_FOUND
        except (OSError, ValueError) as error:
            reason, code = getattr(error, "strerror", str(error)), COMMAND_NOT_EXECUTABLE
        os.write(2, os.fsencode(f"meshgpu: {argv[0]}: {reason}\n"))
        return code


if __name__ == "__main__":
    serve()
