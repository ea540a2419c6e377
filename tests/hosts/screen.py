"""What a person sees and types at a machine of the office."""

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.hosts.office import MESHGPU, until

DEADLINE_S = 60.0


class Screen:
    """A terminal at which `meshgpu ARGUMENTS` runs."""

    def __init__(self, host: Any, *arguments: str) -> None:
        self.master, child = pty.openpty()
        command = host.argv(MESHGPU, *arguments)
        self.process = subprocess.Popen(
            command, env=host.environment(), cwd=host.home.parent, stdin=child, stdout=child, stderr=child
        )
        os.close(child)
        self.text = ""

    def read_until(self, pattern: str) -> str:
        """The match of `pattern`; raises AssertionError where it does not appear in time."""
        deadline = time.monotonic() + DEADLINE_S
        while (match := re.search(pattern, self.text)) is None:
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            try:
                data = os.read(self.master, 4096) if ready else b""
            except OSError:  # the other side of the terminal is closed
                data = b""
            assert data, f"{pattern!r} was not shown:\n{self.text}"
            self.text += data.decode(errors="replace")
        return match[0]

    def type(self, line: str) -> None:
        os.write(self.master, line.encode() + b"\n")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@contextmanager
def screens(*started: Screen) -> Iterator[None]:
    try:
        yield
    finally:
        for screen in started:
            screen.close()


def admit_by_digits(admin: Any, host: Any) -> tuple[str, str]:
    """`host` joins by digits under its own name, both people say yes; returns what stood on the two screens."""
    until(lambda: not admin.json("discover")["machines"][0]["pairing"], "the listener stays open")
    there = Screen(admin, "admit", host.name)
    there.read_until("Waiting for")
    here = Screen(host, "join", "--name", host.name, "--as", host.name, "--yes")
    with screens(there, here):
        for screen in (there, here):
            screen.read_until(r"\[y/N\]")
            screen.type("y")
        there.read_until(f"{host.name} is a member now")
        here.read_until(f"{host.name} is in lab")
        assert there.process.wait(60) == here.process.wait(60) == 0
    return there.text, here.text
