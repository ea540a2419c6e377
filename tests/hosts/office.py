"""An office of network namespaces on one bridge: real interfaces, real multicast, nothing configured but the mesh."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MESHGPU = str(Path(sys.executable).parent / "meshgpu")
DEADLINE_S = 60.0
_numbers = itertools.count()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class Host:
    """One machine of the office."""

    name: str
    namespace: str
    address: str
    home: Path
    settings: dict[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MESHGPU_")}
        return kept | {"MESHGPU_HOME": str(self.home), "MESHGPU_KEEP_FREE_GB": "0"} | self.settings

    def argv(self, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *arguments]

    def start(self, *arguments: str, directory: Path | None = None) -> "subprocess.Popen[str]":
        """`meshgpu ARGUMENTS` on this host, with its output on pipes."""
        return subprocess.Popen(
            self.argv(MESHGPU, *arguments),
            env=self.environment(),
            cwd=directory or self.home.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def meshgpu(
        self, *arguments: str, directory: Path | None = None, code: int | None = 0
    ) -> "subprocess.CompletedProcess[str]":
        """The same, to its end; asserts its exit code unless `code` is None."""
        process = self.start(*arguments, directory=directory)
        try:
            out, err = process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(
                f"{self.name}: meshgpu {' '.join(arguments)} did not end\n{out}\n{err}\n{self.log()}"
            ) from None
        if code is not None and process.returncode != code:
            shown = f"{self.name}: meshgpu {' '.join(arguments)} ended with {process.returncode}, expected {code}"
            raise AssertionError(f"{shown}\n{out}\n{err}\n{self.log()}")
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def json(self, *arguments: str) -> Any:
        return json.loads(self.meshgpu(*arguments, "--json").stdout)

    def agent_pid(self) -> int:
        """The agent's process, found by its home."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    command = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if b"agent" in command and str(self.home).encode() in command and b"meshgpu" in b" ".join(command):
                    return int(entry.name)
        raise AssertionError(f"no agent runs on {self.name}")

    def kill_agent(self) -> None:
        pid = self.agent_pid()
        os.kill(pid, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes())

    def log(self) -> str:
        path = self.home / "agent.log"
        return f"--- agent.log of {self.name}\n{path.read_text()[-3000:]}" if path.exists() else ""

    def cut(self) -> None:
        """Pull the network cable."""
        ip("-n", self.namespace, "link", "set", "eth0", "down")

    def heal(self) -> None:
        ip("-n", self.namespace, "link", "set", "eth0", "up")


class Office:
    """Hosts on one switch. `close` ends every process and namespace."""

    def __init__(self) -> None:
        self.number = next(_numbers) + os.getpid() % 1000 * 10
        self.directory = Path(tempfile.mkdtemp(prefix="mgo-"))
        self.switch = f"mgsw{self.number}"
        self.hosts: list[Host] = []
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self.switch, "link", "set", "br0", "type", "bridge", "mcast_snooping", "0")
        ip("-n", self.switch, "link", "set", "br0", "up")

    def host(self, name: str, **settings: str) -> Host:
        index = len(self.hosts) + 1
        namespace = f"mg{self.number}-{index}"
        address = f"10.77.0.{index}"
        ip("netns", "add", namespace)
        port = f"p{index}"
        ip("link", "add", "eth0", "netns", namespace, "type", "veth", "peer", "name", port, "netns", self.switch)
        ip("-n", self.switch, "link", "set", port, "master", "br0")
        ip("-n", self.switch, "link", "set", port, "up")
        ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        ip("-n", namespace, "link", "set", "eth0", "up")
        ip("-n", namespace, "link", "set", "lo", "up")
        host = Host(name, namespace, address, self.directory / name / "home", settings)
        host.home.parent.mkdir()
        self.hosts.append(host)
        return host

    def form_mesh(self, *hosts: Host) -> None:
        """The first founds the mesh, the others join it by invite; returns when all see all."""
        first, *others = hosts
        first.meshgpu("init", "--mesh", "lab", "--name", first.name, "--yes")
        for host in others:
            self.join(first, host)
        until(lambda: all(self.sees_all(host, len(hosts)) for host in hosts), "machines do not see each other")

    def join(self, inviter: Host, host: Host, *arguments: str) -> None:
        invite = inviter.meshgpu("invite", *arguments).stdout.split()[-1]
        host.meshgpu("join", "--name", host.name, "--yes", invite)

    def sees_all(self, host: Host, count: int) -> bool:
        machines = host.json("machines")["machines"]
        return len(machines) == count and all(m["state"] == "alive" and m["cpus"] for m in machines)

    def close(self) -> None:
        for host in self.hosts:
            subprocess.run(host.argv(MESHGPU, "down"), env=host.environment(), capture_output=True, check=False)
        for namespace in [*(host.namespace for host in self.hosts), self.switch]:
            pids = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
            for pid in pids.stdout.split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            subprocess.run(["ip", "netns", "del", namespace], check=False)
        shutil.rmtree(self.directory, ignore_errors=True)


def until(holds: Callable[[], bool], otherwise: str = "it never came true", seconds: float = 30.0) -> None:
    """Wait until `holds()`; raises AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(otherwise)
        time.sleep(0.1)
