"""The executor's side of guards: the fork server that they come from, their records, and whether they live."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from meshgpu import guard
from meshgpu.guard import FRAME, ExitRecord, GuardRecord, Notice, Request

CLOSE_LIMIT_S: Final = 5.0
"""The fork server ends when its channel does; after this it is killed."""
SWEEP_PAUSE_S: Final = 0.05


class ForkServer:
    """The process that guards are forked from, and the channel to it."""

    def __init__(self, hear: Callable[[Notice], None], gone: Callable[[], None]) -> None:
        self._hear = hear
        self._gone = gone
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._listener: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.to_thread(self._spawn, theirs)
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        self._listener = asyncio.get_running_loop().create_task(self._listen(reader))

    def _is_deaf(self) -> bool:
        """Whether the server has closed its channel, which it may have before its end shows."""
        return self._listener is not None and self._listener.done()

    @staticmethod
    def _spawn(channel: socket.socket) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", guard.__file__],
            stdin=channel.fileno(),
            stdout=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,
        )

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                (length,) = FRAME.unpack(await reader.readexactly(FRAME.size))
                notice: Notice = json.loads(await reader.readexactly(length))
                self._hear(notice)
        except (asyncio.IncompleteReadError, ConnectionError):
            self._gone()

    async def send(self, request: Request) -> None:
        """Have a guard started; starts a new server where the last one is gone."""
        body = json.dumps(request).encode()
        async with self._lock:
            if self._process is None or self._process.poll() is not None or self._is_deaf():
                await self.close()
                await self.start()
            assert self._writer is not None
            self._writer.write(FRAME.pack(len(body)) + body)
            with contextlib.suppress(ConnectionError):
                await self._writer.drain()

    async def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
        if self._process is not None:
            await asyncio.to_thread(self._reap, self._process)
        self._process = self._writer = self._listener = None

    @staticmethod
    def _reap(process: subprocess.Popen[bytes]) -> None:
        try:
            process.wait(CLOSE_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def live_guards(jobs_dir: Path) -> dict[Path, GuardRecord]:
    """{attempt directory: record} of guards that an earlier agent left running. Blocks."""
    found: dict[Path, GuardRecord] = {}
    for path in jobs_dir.glob("*/*/guard.json"):
        if not (path.parent / "exit.json").exists() and is_alive(record := read_guard(path.parent)):
            found[path.parent] = record
    return found


def guard_or_claim(directory: Path) -> GuardRecord | None:
    """The attempt's guard; where there is none, claim the attempt so that none can start, and return None. Blocks."""
    if not directory.is_dir():
        return None
    if guard.claim(str(directory / "guard.json"), guard.new_record(0, "")):
        return None
    record = read_guard(directory)
    return record if record["pid"] else None


def read_guard(directory: Path) -> GuardRecord:
    record: GuardRecord = json.loads((directory / "guard.json").read_bytes())
    return record


def read_exit(directory: Path) -> ExitRecord | None:
    try:
        record: ExitRecord = json.loads((directory / "exit.json").read_bytes())
    except FileNotFoundError:
        return None
    return record


def is_alive(record: GuardRecord) -> bool:
    return record["boot_id"] == guard.boot_id() and guard.start_ticks(record["pid"]) == record["start_ticks"]


def open_guard(record: GuardRecord) -> int | None:
    """A pidfd of this very guard, or None if it has ended."""
    try:
        pidfd = os.pidfd_open(record["pid"])
    except ProcessLookupError:
        return None
    if is_alive(record):
        return pidfd
    os.close(pidfd)
    return None


async def ended(descriptor: int) -> None:
    """Wait for it: a pidfd becomes readable when its process has ended."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


def kill_leftovers(work: Path) -> None:
    """Kill what a killed guard could not take along, known by its output directory. Blocks until none is left."""
    mark = b"\0MESHGPU_OUTPUT_DIR=" + os.fsencode(work) + b"\0"
    while True:
        found = False
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in b"\0" + (process / "environ").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
                    found = True
        if not found:
            return
        time.sleep(SWEEP_PAUSE_S)
