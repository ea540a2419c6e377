"""Sixteen real agents on a switch of network namespaces, and Serf doing the same there: a table of ratios.

For each question ours and Serf's answer it in turn on the same namespaces, never at the same time. Everything is read
from the agents' own logs: ours write the millisecond, Serf's are stamped as they leave the pipe. What is measured from:
the moment before the request, the signal, or the cut. Needs root, `ip`, `iptables` and Debian's `serf`.
"""

import argparse
import os
import re
import selectors
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from meshgpu.client.agent import AgentClient
from tests.hosts.office import Host, Office

CUT_S = 60.0
SETTLE_S = 20.0
"""After the last has joined."""
DEAF_S = 40.0
"""Longer than a doubt that nobody shares lasts in a mesh of sixteen."""
IDLE_S = 30.0
KNOWN_LIMIT_S = 120.0
"""After which whoever does not know, will not."""


@dataclass(frozen=True, slots=True)
class Said:
    """A line of one agent's log. at_s: Unix time."""

    at_s: float
    text: str


class Mesh(Protocol):
    """One kind of agent on all hosts."""

    name: str

    def start_all(self) -> None: ...
    def start(self, host: Host) -> None: ...
    def kill(self, host: Host) -> float:
        """SIGKILL; returns the moment before."""
        ...

    def said(self, host: Host) -> list[Said]: ...
    def is_up(self, line: str, peer: Host) -> bool:
        """Whether a line says that `peer` is there."""
        ...

    def is_down(self, line: str, peer: Host) -> bool: ...
    def is_missed(self, line: str, peer: Host) -> bool:
        """Whether a line says that `peer` did not answer, or is in doubt."""
        ...

    def change(self, host: Host) -> float:
        """Change a little thing that all are to know; returns the moment before."""
        ...

    def is_news(self, line: str, peer: Host) -> bool: ...
    def pids(self) -> list[int]: ...


class Ours:
    """meshgpu's agents, members of one mesh."""

    name = "meshgpu"

    def __init__(self, office: Office) -> None:
        self.office = office
        first, *others = office.hosts
        first.meshgpu("init", "--mesh", "lab", "--name", first.name, "--yes")
        invite = first.meshgpu("invite", "--uses", str(len(others))).stdout.split()[-1]
        for host in others:
            host.meshgpu("join", "--name", host.name, "--yes", invite)
        self.ids = {host.name: AgentClient(host.home).agent()["node"][:12] for host in office.hosts}
        self._paused: set[str] = set()
        self._read: dict[str, tuple[int, list[Said]]] = {}
        """{host: bytes of its log that were read, and its lines}"""

    def start_all(self) -> None:
        started = [(host, self._spawn(host)) for host in self.office.hosts]
        for _, process in started:
            process.wait(60)

    def start(self, host: Host) -> None:
        self._spawn(host).wait(60)

    def _spawn(self, host: Host) -> "subprocess.Popen[str]":
        return host.start("up")

    def stop_all(self) -> None:
        for process in [host.start("down") for host in self.office.hosts]:
            process.wait(60)

    def kill(self, host: Host) -> float:
        pid, at_s = host.agent_pid(), time.time()
        os.kill(pid, signal.SIGKILL)
        return at_s

    def said(self, host: Host) -> list[Said]:
        read, lines = self._read.get(host.name, (0, []))
        with (host.home / "agent.log").open("rb") as file:
            file.seek(read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.decode(errors="replace").splitlines():
            try:
                at = datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f")  # noqa: DTZ007  # the log's own time
            except ValueError:
                continue
            lines.append(Said(at.timestamp(), line[24:]))
        self._read[host.name] = read + len(whole), lines
        return lines

    def is_up(self, line: str, peer: Host) -> bool:
        return f"link opened: {self.ids[peer.name]}" in line

    def is_down(self, line: str, peer: Host) -> bool:
        return f"{peer.name} is down:" in line

    def is_missed(self, line: str, peer: Host) -> bool:
        return f"{peer.name} is suspect:" in line

    def change(self, host: Host) -> float:
        client, at_s = AgentClient(host.home), time.time()
        if host.name in self._paused:
            self._paused.discard(host.name)
            client.resume()
        else:
            self._paused.add(host.name)
            client.pause(None, let_run=True)
        return at_s

    def is_news(self, line: str, peer: Host) -> bool:
        return f"heard GossipDelta of {self.ids[peer.name]}" in line

    def pids(self) -> list[int]:
        return [host.agent_pid() for host in self.office.hosts]


class Serf:
    """Serf's agents with their default LAN profile, which join the first."""

    name = "Serf"

    def __init__(self, office: Office) -> None:
        self.office = office
        self._lines: dict[str, list[Said]] = {host.name: [] for host in office.hosts}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._selector = selectors.DefaultSelector()
        self._values = 0
        threading.Thread(target=self._read, daemon=True).start()

    def start_all(self) -> None:
        for host in self.office.hosts:
            self.start(host)

    def start(self, host: Host) -> None:
        first = self.office.hosts[0]
        command = ["serf", "agent", f"-node={host.name}", f"-bind={host.address}:7946", "-log-level=debug"]
        others = [f"-retry-join={first.address}", "-retry-interval=1s"] if host is not first else []
        process = subprocess.Popen(
            host.argv(*command, *others, "-tag", "value=0"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._processes[host.name] = process
        self._selector.register(process.stdout, selectors.EVENT_READ, host.name)

    def stop_all(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()

    def _read(self) -> None:
        while True:
            for key, _ in self._selector.select(0.2):
                at_s, data = time.time(), os.read(key.fd, 65536)
                if not data:
                    self._selector.unregister(key.fileobj)
                    continue
                self._lines[key.data] += [Said(at_s, text) for text in data.decode(errors="replace").splitlines()]

    def kill(self, host: Host) -> float:
        at_s = time.time()
        self._processes[host.name].kill()
        self._processes[host.name].wait()
        return at_s

    def said(self, host: Host) -> list[Said]:
        return list(self._lines[host.name])

    def is_up(self, line: str, peer: Host) -> bool:
        return bool(re.search(rf"EventMemberJoin: {peer.name} ", line))

    def is_down(self, line: str, peer: Host) -> bool:
        return bool(re.search(rf"EventMemberFailed: {peer.name} ", line))

    def is_missed(self, line: str, peer: Host) -> bool:
        return bool(re.search(rf"memberlist: (Failed (UDP )?ping: {peer.name} |Suspect {peer.name} )", line))

    def change(self, host: Host) -> float:
        self._values += 1
        at_s = time.time()
        subprocess.run(host.argv("serf", "tags", "-set", f"value={self._values}"), check=True, capture_output=True)
        return at_s

    def is_news(self, line: str, peer: Host) -> bool:
        return bool(re.search(rf"EventMemberUpdate: {peer.name}\b", line))

    def pids(self) -> list[int]:
        return [process.pid for process in self._processes.values()]


# -- questions ---------------------------------------------------------------------------------------------------------


def firsts(
    mesh: Mesh, observers: Iterable[Host], means: Callable[[str, Host], bool], about: Host, since_s: float
) -> list[float]:
    """Seconds after `since_s` at which each observer first said it of `about`; inf for who did not within the limit."""
    observers = list(observers)
    found: dict[str, float] = {}
    deadline = time.monotonic() + KNOWN_LIMIT_S
    while len(found) < len(observers) and time.monotonic() < deadline:
        for host in observers:
            if host.name not in found:
                times = [
                    said.at_s for said in mesh.said(host) if said.at_s >= since_s - 0.001 and means(said.text, about)
                ]
                if times:
                    found[host.name] = max(times[0] - since_s, 0.0)
        time.sleep(0.1)
    return [found.get(host.name, float("inf")) for host in observers]


def all_up(mesh: Mesh, hosts: list[Host], since_s: float) -> float:
    """Seconds until everybody has said of everybody that it is up."""
    times = [firsts(mesh, [host], mesh.is_up, peer, since_s)[0] for host in hosts for peer in hosts if peer is not host]
    return max(times)


@dataclass(slots=True)
class Figures:
    """What one kind of agent did. Times in seconds, one for each observer and trial."""

    start_s: float = 0.0
    news_s: list[float] = field(default_factory=list)
    killed_s: list[float] = field(default_factory=list)
    unplugged_s: list[float] = field(default_factory=list)
    healed_s: float = 0.0
    false_downs: int = 0
    deaf_s: list[float] = field(default_factory=list)
    deaf_downs: int = 0
    heard_s: list[float] = field(default_factory=list)
    rss_mib: float = 0.0
    anonymous_mib: float = 0.0
    core_percent: float = 0.0


def measure(mesh: Mesh, office: Office, trials: int) -> Figures:
    hosts, figures = office.hosts, Figures()
    since_s = time.time()
    mesh.start_all()
    figures.start_s = all_up(mesh, hosts, since_s)
    say(mesh, f"full mesh after {figures.start_s:.2f} s")
    time.sleep(10)
    figures.rss_mib, figures.anonymous_mib, figures.core_percent = idle(mesh.pids())
    say(mesh, f"idle: {figures.rss_mib:.0f} MiB, {figures.core_percent:.2f} % of a core")
    for number in range(trials * 4):
        host = hosts[number % len(hosts)]
        since_s = mesh.change(host)
        figures.news_s += firsts(mesh, others(hosts, host), mesh.is_news, host, since_s)
        time.sleep(1)
    say(mesh, f"a change is known: {spread(figures.news_s)}")
    for number in range(trials):
        host = hosts[1 + number]
        since_s = mesh.kill(host)
        figures.killed_s += firsts(mesh, others(hosts, host), mesh.is_down, host, since_s)
        restart(mesh, host, hosts)
    say(mesh, f"a killed agent is known: {spread(figures.killed_s)}")
    for number in range(trials):
        host = hosts[1 + trials + number]
        since_s = time.time()
        host.cut()
        figures.unplugged_s += firsts(mesh, others(hosts, host), mesh.is_down, host, since_s)
        since_s = time.time()
        host.heal()
        firsts(mesh, others(hosts, host), mesh.is_up, host, since_s)
    say(mesh, f"a pulled cable is known: {spread(figures.unplugged_s)}")
    for number in range(trials):
        one_way(mesh, hosts, hosts[1 + 2 * number], hosts[2 + 2 * number], figures)
    say(
        mesh, f"a path that is open one way alone is noticed: {spread(figures.deaf_s)}; well: {spread(figures.heard_s)}"
    )
    halves = hosts[::2], hosts[1::2]
    since_s = time.time()
    part(office, halves[1], "br1")
    time.sleep(CUT_S)
    figures.false_downs = sum(
        any(said.at_s > since_s and mesh.is_down(said.text, peer) for said in mesh.said(host))
        for half in halves
        for host in half
        for peer in half
    )
    since_s = time.time()
    part(office, halves[1], "br0")
    across = [(host, peer) for host in halves[0] for peer in halves[1]]
    healed = [firsts(mesh, [a], mesh.is_up, b, since_s)[0] for a, b in across]
    figures.healed_s = max(healed)
    say(mesh, f"halves that were apart for {CUT_S:.0f} s are one after {figures.healed_s:.2f} s")
    return figures


def one_way(mesh: Mesh, hosts: list[Host], speaker: Host, deaf: Host, figures: Figures) -> None:
    """For DEAF_S nothing of `speaker` reaches `deaf`, while `deaf` reaches `speaker`.

    Noticed: when the first of the two says so of the other. Down: how often the others, who reach both, call one of
    them that. Well: when each of the two that called the other down has it back; 0 where neither did.
    """
    pair, rule = (speaker, deaf), ["INPUT", "-s", speaker.address, "-j", "DROP"]
    since_s = time.time()
    subprocess.run(deaf.argv("iptables", "-A", *rule), check=True)
    time.sleep(DEAF_S)
    subprocess.run(deaf.argv("iptables", "-D", *rule), check=True)
    healed_s = time.time()
    seen = [
        (host, peer, said)
        for host in hosts
        for peer in pair
        for said in mesh.said(host)
        if host is not peer and since_s <= said.at_s
    ]
    noticed = [said.at_s for host, peer, said in seen if host in pair and mesh.is_missed(said.text, peer)]
    figures.deaf_s.append(min(noticed, default=float("inf")) - since_s)
    figures.deaf_downs += sum(host not in pair and mesh.is_down(said.text, peer) for host, peer, said in seen)
    lost = [(host, peer) for host, peer, said in seen if host in pair and mesh.is_down(said.text, peer)]
    figures.heard_s.append(max((firsts(mesh, [a], mesh.is_up, b, healed_s)[0] for a, b in lost), default=0.0))


def others(hosts: list[Host], host: Host) -> list[Host]:
    return [other for other in hosts if other is not host]


def restart(mesh: Mesh, host: Host, hosts: list[Host]) -> None:
    since_s = time.time()
    mesh.start(host)
    firsts(mesh, others(hosts, host), mesh.is_up, host, since_s)


def part(office: Office, hosts: list[Host], bridge: str) -> None:
    """Plug some hosts into one of the switch's two bridges."""
    for host in hosts:
        port = f"p{office.hosts.index(host) + 1}"
        subprocess.run(["ip", "-n", office.switch, "link", "set", port, "master", bridge], check=True)


def idle(pids: list[int]) -> tuple[float, float, float]:
    """(RSS MiB, anonymous MiB, percent of a core): medians over the agents, at rest."""
    before = [cpu_s(pid) for pid in pids]
    time.sleep(IDLE_S)
    used = [(cpu_s(pid) - start) / IDLE_S * 100 for pid, start in zip(pids, before, strict=True)]
    return (
        statistics.median(memory(pid, "Rss") for pid in pids),
        statistics.median(memory(pid, "Anonymous") for pid in pids),
        statistics.median(used),
    )


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int, what: str) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) / 1024
    raise LookupError(what)


# -- the table ---------------------------------------------------------------------------------------------------------


def say(mesh: Mesh, text: str) -> None:
    print(f"{mesh.name:>8}  {text}", file=sys.stderr, flush=True)


def at(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def spread(values: list[float]) -> str:
    return f"median {at(values, 0.5):.3f} s, p99 {at(values, 0.99):.3f} s"


def rows(ours: Figures, serf: Figures) -> list[str]:
    compared = [("all start at once, full mesh, s", ours.start_s, serf.start_s)]
    for what, values in (
        ("a change is known", "news_s"),
        ("a killed agent is known", "killed_s"),
        ("a pulled cable is known", "unplugged_s"),
    ):
        for name, share in (("median", 0.5), ("p99", 0.99)):
            compared.append((f"{what}, {name}, s", at(getattr(ours, values), share), at(getattr(serf, values), share)))
    compared += [
        ("a path that is open one way alone is noticed, median, s", at(ours.deaf_s, 0.5), at(serf.deaf_s, 0.5)),
        (f"halves that were apart for {CUT_S:.0f} s are one, s", ours.healed_s, serf.healed_s),
        ("idle, RSS, MiB", ours.rss_mib, serf.rss_mib),
        ("idle, anonymous memory, MiB", ours.anonymous_mib, serf.anonymous_mib),
        ("idle, % of a core", ours.core_percent, serf.core_percent),
    ]
    if max(ours.heard_s + serf.heard_s):  # else nobody was called down
        compared.append(("both have each other back once it is open, worst, s", max(ours.heard_s), max(serf.heard_s)))
    return [
        "| what | meshgpu | Serf | ratio |",
        "|---|---|---|---|",
        *(f"| {what} | {a:.3g} | {b:.3g} | {a / b if b else float('nan'):.2f} |" for what, a, b in compared),
        f"| one of that pair called down by others | {ours.deaf_downs} | {serf.deaf_downs} | |",
        f"| healthy members called down while the halves were apart | {ours.false_downs} | {serf.false_downs} | |",
    ]


def rest(office: Office) -> None:
    """What an idle agent of ours costs, alone: nothing else is asked."""
    ours = Ours(office)
    time.sleep(SETTLE_S)
    rss_mib, anonymous_mib, core_percent = idle(ours.pids())
    ours.stop_all()
    print(f"idle: RSS {rss_mib:.0f} MiB, anonymous {anonymous_mib:.0f} MiB, {core_percent:.2f} % of a core")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, default=16)
    parser.add_argument("--idle", action="store_true", help="only what an idle agent of ours costs, with its usual log")
    parser.add_argument("--trials", type=int, default=3, help="of each loss; four times as many changes")
    options = parser.parse_args()
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "serf"))):
        raise SystemExit("needs root, `ip` (Debian: iproute2) and `serf` (Debian: serf)")
    office = Office()
    try:
        subprocess.run(["ip", "-n", office.switch, "link", "add", "br1", "type", "bridge"], check=True)
        subprocess.run(["ip", "-n", office.switch, "link", "set", "br1", "up"], check=True)
        for number in range(options.agents):
            office.host(f"m{number:02}", **({} if options.idle else {"MESHGPU_LOG": "debug"}))
        if options.idle:
            rest(office)
            return
        ours = Ours(office)
        ours.stop_all()
        figures = measure(ours, office, options.trials)
        ours.stop_all()
        serf = Serf(office)
        try:
            theirs = measure(serf, office, options.trials)
        finally:
            serf.stop_all()
    finally:
        office.close()
    print("\n".join(rows(figures, theirs)))


if __name__ == "__main__":
    main()
