"""What tests of renting share: an office behind its NAT, a local EC2 that runs instances, jobs that keep a diary."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.ec2.cloud import LocalCloud
from tests.ec2.front import REGION
from tests.ec2.machine import Machine
from tests.fake_nvml.build import build
from tests.hosts.office import Host, Office, until

SETUP: Final = (
    "--region", REGION, "--instance-type", "g6.xlarge", "--instance-type", "g5.xlarge",
    "--usd-per-hour", "5", "--usd-per-day", "500", "--usd-per-month", "500", "--usd-per-job", "5", "--instances", "2",
    "--on-demand", "--lease", "1h", "--burst-after", "2s", "--idle", "10s", "--no-contact", "2m", "--install", "true",
)  # fmt: skip

IDLE_S: Final = 10.0
"""As SETUP says it."""

RENTED_S: Final = 100.0
"""From a job's submission until it runs on a rented machine, at most; it takes ten where nothing else runs."""

AGAIN_S: Final = 150.0
"""The same where an instance was lost: it may take a minute until the provider is asked and says so."""

WORK: Final = """
import pathlib, signal, socket, sys, time
spans, diary, name = sys.argv[1].split(","), pathlib.Path(sys.argv[2]), sys.argv[3]
def note(word):
    with diary.open("a") as file:
        file.write(f"{word} {name} {socket.gethostname()} {time.time():.3f}\\n")
def asked(number, frame):
    note("asked")
    sys.exit(143)
signal.signal(signal.SIGTERM, asked)
before = diary.read_text().count(f"begins {name} ") if diary.exists() else 0
note("begins")
print("works", flush=True)
time.sleep(float(spans[min(before, len(spans) - 1)]))
note("ends")
"""
"""Arguments: how long it works, at its first attempt, its second one, ...; the diary; its name there.

The diary is the truth of what ran: machines of the local EC2 share our files. Words: begins, ends, asked (to end).
"""

POLL_S: Final = 0.005


@dataclass
class Story:
    """An office with one machine `ada`, which may rent in the cloud, and whose one GPU is free.

    settings: environment of the machines that are rented from now on, besides what they need.
    """

    office: Office
    cloud: LocalCloud
    ada: Host
    settings: dict[str, str]

    @property
    def consoles(self) -> str:
        found = [(m.instance, m.console) for m in list(self.cloud.machines.values())]
        return "\n".join(f"--- {name}\n{path.read_text()[-3000:]}" for name, path in found if path.exists())

    def members(self) -> list[str]:
        return [str(machine["name"]) for machine in self.ada.json("machines")["machines"]]

    def job(self, name: str) -> Any:
        return next(row for row in self.ada.json("ps", "-a")["jobs"] if row["id"] == name)

    def machine(self) -> Machine:
        """The one rented machine that runs."""
        (machine,) = self.cloud.running()
        return machine

    @contextmanager
    def filled(self, project: "Project") -> Iterator[str]:
        """While the GPU of the office is taken by a job, whose id this yields."""
        name = project.submit("600", "--cloud", "never", name="filler")
        until(lambda: bool(self.job(name)["phase"] == "running"), "the office's own GPU was not used")
        try:
            yield name
        finally:
            self.ada.meshgpu("kill", name, code=None)

    def runs_on_rented(self, name: str) -> bool:
        job = self.job(name)
        return job["phase"] == "running" and str(job["machine"]).startswith("cloud-")

    def is_done(self, name: str) -> bool:
        return bool(self.job(name)["state"] == "succeeded")

    def give_back(self) -> None:
        """Wait until nothing lives that was rented, and the mesh has forgotten it."""
        until(lambda: self.cloud.ec2.live() == [], "the instance was not given back", 60)
        until(lambda: self.members() == ["ada"], "it is still a member", 60)

    @contextmanager
    def at_rest(self, *kept: str) -> Iterator[None]:
        """Begin with no call noted, and end with no job but those that are kept and nothing that is rented."""
        self.cloud.ec2.calls.clear()
        self.cloud.ec2.most_live = 0
        try:
            yield
        finally:
            print(self.consoles, self.ada.log())  # pytest shows it if the test failed
            print(self.ada.meshgpu("burst", "status", "--json", code=None).stdout)
        for row in self.ada.json("ps")["jobs"]:
            if row["id"] not in kept:
                self.ada.meshgpu("kill", row["id"], code=None)
        self.give_back()


@dataclass
class Project:
    """A directory to submit from, and the diary of all its jobs: (word, name, host, Unix time)."""

    host: Host
    directory: Path

    def __post_init__(self) -> None:
        (self.directory / "work.py").write_text(WORK)

    @property
    def path(self) -> Path:
        return self.directory.parent / f"{self.directory.name}.diary"

    def diary(self) -> list[tuple[str, ...]]:
        return [tuple(line.split()) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def times(self, word: str, name: str = "job") -> int:
        return sum(line[:2] == (word, name) for line in self.diary())

    def words(self, name: str = "job") -> list[str]:
        """What became of a job, in the order of time."""
        return [line[0] for line in self.diary() if line[1] == name]

    def submit(self, spans: str, *flags: str, name: str = "job") -> str:
        """A job for one GPU; its id. spans: see WORK; name: in the diary."""
        words = ("python", "work.py", spans, str(self.path), name)
        done = self.host.meshgpu("run", "-d", "--json", "-g", "1", *flags, "--", *words, directory=self.directory)
        return str(json.loads(done.stdout)["id"])


class Strike:
    """Kills the agent of a host, at once, from whichever thread."""

    def __init__(self, host: Host) -> None:
        self._pid = host.agent_pid()
        self.is_over = threading.Event()

    def __call__(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        self.is_over.set()

    def is_dead(self) -> bool:
        """Whether the process is gone, and its locks with it."""
        path = Path(f"/proc/{self._pid}/cmdline")
        return not path.exists() or not path.read_bytes()

    def when(self, holds: Callable[[], bool]) -> None:
        """As soon as `holds()`, which is asked in a thread of its own; but not after `is_over`."""

        def watch() -> None:
            while not self.is_over.is_set():
                if holds():
                    self()
                time.sleep(POLL_S)

        threading.Thread(target=watch, name="strike", daemon=True).start()


@contextmanager
def renting(office: Office, directory: Path) -> Iterator[Story]:
    """A mesh of one machine with one GPU, which may rent."""
    build(directory / "nvml")
    seen = {"LD_LIBRARY_PATH": str(directory / "nvml")}

    def gpu(name: str, kind: str) -> dict[str, str]:
        # Locks on a GPU hold for all of our machine, where another office may be at the same time.
        path = directory / f"{name}.gpus"
        shown = [
            "driver 580.1",
            "cuda 13000",
            "[gpu]",
            f"name {kind}",
            f"uuid GPU-{office.number}-{name}",
            "total_mib 24564",
            "",
        ]
        path.write_text("\n".join(shown))
        return seen | {"FAKE_NVML": str(path), "MESHGPU_KEEP_FREE_GB": "0"}

    settings: dict[str, str] = {}
    # A job that was shut in there could not write the diary; `make demo-burst` shows that it is.
    unfenced = {"MESHGPU_FENCE": "none", "MESHGPU_TRUST": "ada"}
    cloud = LocalCloud(lambda name: gpu(name, "NVIDIA L4") | unfenced | settings)
    try:
        ada = office.host("ada", **gpu("ada", "Simulated RTX 4090"), **cloud.ec2.environment())
        cloud.internet.attach(office.switch, [ada.namespace])
        ada.meshgpu("init", "--mesh", "lab", "--name", "ada", "--user", "ada", "--yes")
        ada.meshgpu("burst", "setup", "--yes", *SETUP)
        yield Story(office, cloud, ada, settings)
    finally:
        cloud.close()
