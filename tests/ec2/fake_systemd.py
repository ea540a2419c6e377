"""The part of systemd that user data asks for, on a machine that is no more than a few namespaces.

As `init DIRECTORY HOSTNAME` it is process 1: it shields what the machine writes, runs the metadata service and the user
data, starts services and timers, and the machine is over when it ends. As `shutdown`, `poweroff` or `systemctl` it
passes its arguments to process 1. It runs outside the package, so the standard library is all it has.
"""

import json
import os
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

UNITS: Final = Path("/etc/systemd/system")
SOCKET: Final = "/run/fake-systemd"
METADATA: Final = ("169.254.169.254", 80)

FAKES: Final = ("shutdown", "poweroff", "systemctl")
"""Its names on the machine's PATH; a unit that names the real one gets these too."""

START_S: Final = 2.0
"""In which one of these programs must have said what it wants."""

STOP_S: Final = 90.0
"""DefaultTimeoutStopSec of systemd-system.conf(5)."""


class Refused(Exception):
    """What cannot be done; shown by the program that asked."""


@dataclass
class Service:
    """A unit that was started; again_at: on the monotonic clock, when it starts once more."""

    command: list[str]
    environment: dict[str, str]
    restarts: bool
    restart_s: float
    stop_s: float
    process: "subprocess.Popen[bytes] | None" = None
    again_at: float | None = None


class Init:
    """Process 1."""

    def __init__(self, directory: Path, hostname: str) -> None:
        self._directory = directory
        self._hostname = hostname
        self._off_at: float | None = None  # `shutdown +N`, on the monotonic clock
        self._killed_at: float | None = None  # set while the machine goes down: when it stops waiting for services
        self._timers: dict[str, float] = {}  # {name of the unit without its ending: wall clock}
        self._services: dict[str, Service] = {}
        self._kept: list[subprocess.Popen[bytes]] = []

    def run(self) -> None:
        """Returns when the machine is over. Standard input is its plug: it closes when whoever holds it lets go."""
        awake, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._shield()
        with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
            listener.bind(SOCKET)
            listener.listen()
            for source in (0, awake, listener):
                selector.register(source, selectors.EVENT_READ)
            self._boot()
            while not self._is_over():
                ready = {key.fileobj for key, _ in selector.select(self._wait_s())}
                if 0 in ready:
                    return
                if awake in ready:
                    os.read(awake, 512)
                if listener in ready:
                    self._answer(listener)
                self._reap()
                self._start_what_is_due()

    def _shield(self) -> None:
        socket.sethostname(self._hostname)
        (self._directory / "lib").mkdir()
        _mount("--bind", str(self._directory / "lib"), "/var/lib")
        _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
        Path("/run/lock").mkdir()
        Path("/run/lock").chmod(0o1777)
        UNITS.mkdir(parents=True, exist_ok=True)
        _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(UNITS))

    def _boot(self) -> None:
        # The socket is made here, so that the first question waits for the service instead of being refused.
        with socket.create_server(METADATA, backlog=64) as listener:
            fd = listener.fileno()
            facts = str(self._directory / "metadata.json")
            self._kept.append(_spawn([str(self._directory / "metadata"), str(fd), facts], {}, [fd]))
        self._kept.append(_spawn([str(self._directory / "user-data")], {}))

    # -- asked by the machine's programs ---------------------------------------------------------------------------

    def _answer(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rw") as stream:
            connection.settimeout(START_S)
            try:
                name, *arguments = json.loads(stream.readline())
                print("init:", name, *arguments, flush=True)
                {"shutdown": self._shutdown, "poweroff": self._poweroff, "systemctl": self._systemctl}[name](arguments)
                error = ""
            except (Refused, OSError, ValueError, LookupError) as refused:
                error = str(refused) or repr(refused)
            try:
                print(error, file=stream, flush=True)
            except OSError:
                print("init: whoever asked is gone", flush=True)

    def _shutdown(self, arguments: list[str]) -> None:
        options = [word for word in arguments if word.startswith("-")]
        times = [word for word in arguments if not word.startswith("-")] or ["+1"]
        if options == ["-c"]:
            self._off_at = None
        elif not set(options) <= {"-P", "-h", "--poweroff"}:
            raise Refused(f"this fake cannot shut down with {' '.join(options)}")
        elif times[0] in ("now", "+0"):
            self._power_off()
        elif times[0].startswith("+"):
            self._off_at = time.monotonic() + 60.0 * int(times[0])
        else:
            raise Refused(f"this fake cannot shut down at {times[0]}")

    def _poweroff(self, arguments: list[str]) -> None:
        self._power_off()

    def _systemctl(self, arguments: list[str]) -> None:
        verb, *units = [word for word in arguments if not word.startswith("-")] or [""]
        if verb == "poweroff":
            self._power_off()
        elif verb == "start" or (verb == "enable" and "--now" in arguments):
            for unit in units:
                name, _, kind = unit.rpartition(".")
                if kind == "timer":
                    self._timers[name] = _moment(_read_unit(unit)["OnCalendar"][-1])
                else:
                    self._start_service(name or unit)

    # -- services --------------------------------------------------------------------------------------------------

    def _start_service(self, name: str) -> None:
        running = self._services.get(name)
        if running is None or (running.process is None and running.again_at is None):
            self._services[name] = running = self._service(_read_unit(f"{name}.service"))
        if running.process is None:
            running.again_at = None
            running.process = _spawn(running.command, running.environment)

    def _service(self, unit: dict[str, list[str]]) -> Service:
        program, *arguments = shlex.split(unit["ExecStart"][-1])
        if Path(program).name in FAKES:
            program = str(self._directory / "bin" / Path(program).name)
        settings = (setting for line in unit.get("Environment", []) for setting in shlex.split(line))
        return Service(
            [program, *arguments],
            dict(setting.split("=", 1) for setting in settings),
            unit.get("Restart", ["no"])[-1] == "always",
            float(unit.get("RestartSec", ["0.1"])[-1].removesuffix("s")),
            float(unit.get("TimeoutStopSec", [str(STOP_S)])[-1].removesuffix("s")),
        )

    def _reap(self) -> None:
        """Every process whose parent is gone is a child of this one."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for process in self._kept:
                if process.pid == pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    print("init:", process.args, "ended with", process.returncode, flush=True)
            for name, service in self._services.items():
                if service.process is not None and service.process.pid == pid:
                    service.process.returncode = os.waitstatus_to_exitcode(status)
                    print("init:", name, "ended with", service.process.returncode, flush=True)
                    service.process = None
                    service.again_at = time.monotonic() + service.restart_s if service.restarts else None

    # -- time ------------------------------------------------------------------------------------------------------

    def _start_what_is_due(self) -> None:
        if self._killed_at is not None:
            return
        if self._off_at is not None and self._off_at <= time.monotonic():
            self._power_off()
        due = [name for name, moment in self._timers.items() if moment <= time.time()]
        for name, service in self._services.items():
            if service.again_at is not None and service.again_at <= time.monotonic():
                due.append(name)
        for name in due:
            self._timers.pop(name, None)
            try:
                self._start_service(name)
            except (Refused, OSError, ValueError, LookupError) as refused:
                print(f"init: {name}: {refused}", flush=True)

    def _wait_s(self) -> float | None:
        """Until the next thing is due; None if nothing is."""
        moments = [self._off_at, self._killed_at, *(service.again_at for service in self._services.values())]
        left = [moment - time.monotonic() for moment in moments if moment is not None]
        left += [moment - time.time() for moment in self._timers.values()]
        return max(0.0, min(left)) if left else None

    def _power_off(self) -> None:
        """Services are asked to end, and have the time that their units grant."""
        if self._killed_at is not None:
            return
        self._killed_at = time.monotonic()
        for service in self._services.values():
            service.again_at = None
            if service.process is not None:
                service.process.send_signal(signal.SIGTERM)
                self._killed_at = max(self._killed_at, time.monotonic() + service.stop_s)

    def _is_over(self) -> bool:
        if self._killed_at is None:
            return False
        return self._killed_at <= time.monotonic() or not any(one.process for one in self._services.values())


def ask(name: str, arguments: list[str]) -> int:
    """Pass a command to process 1; returns the exit code."""
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw") as stream:
        connection.connect(SOCKET)
        print(json.dumps([name, *arguments]), file=stream, flush=True)
        error = stream.readline().strip()
    if error:
        print(f"{name}: {error}", file=sys.stderr)
    return 1 if error else 0


def _read_unit(unit: str) -> dict[str, list[str]]:
    """{key: its values in their order}, whatever section they stand in."""
    found: dict[str, list[str]] = {}
    try:
        lines = (UNITS / unit).read_text().splitlines()
    except OSError as error:
        raise Refused(f"Unit file {unit} does not exist.") from error
    for line in lines:
        key, separator, value = line.partition("=")
        if separator and not line.startswith(("#", ";")):
            found.setdefault(key.strip(), []).append(value.strip())
    return found


def _moment(calendar: str) -> float:
    """Of the one form that user data writes, on the wall clock.

    One in the past is due at once. Real systemd skips it on a timer's first start, `Persistent=true` or not: only the
    start after a reboot makes up for it (`timer_start` in src/core/timer.c).
    """
    return datetime.strptime(calendar, "%Y-%m-%d %H:%M:%S UTC").replace(tzinfo=UTC).timestamp()


def _spawn(command: list[str], environment: dict[str, str], fds: Sequence[int] = ()) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command, env=os.environ | environment, cwd="/", stdin=subprocess.DEVNULL, pass_fds=fds, start_new_session=True
    )


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    if Path(sys.argv[0]).name == "init":
        Init(Path(sys.argv[1]), sys.argv[2]).run()
        os._exit(0)  # and with process 1 ends every other one
    sys.exit(ask(Path(sys.argv[0]).name, sys.argv[1:]))
