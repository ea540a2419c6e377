"""A sweep that overflows into the cloud, and an owner who takes his GPU back: all real but the GPUs and the cloud.

Two rigs with a GPU each, in network namespaces behind a NAT, and a local EC2 whose instance boots the user data that
it is given. The agents, the trials, the signatures, gRPC and the calls of EC2's API are real; no AWS account, no real
GPU and no network outside the namespaces is touched. Needs root, for the namespaces. Writes timeline.svg.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from examples.timeline import Lane, Stay, draw
from meshgpu.errors import MeshgpuError
from tests.ec2.cloud import LocalCloud
from tests.ec2.front import REGION
from tests.fake_nvml.build import build
from tests.hosts.office import MESHGPU, Host, Office, until

ROOT: Final = Path(__file__).resolve().parent.parent
WANTED: Final = ("ip", "iptables", "unshare", "cc")
GPUS: Final = {"rig-a": "Simulated RTX 4090", "rig-b": "Simulated RTX 3090"}
RENTED_GPU: Final = "Simulated L4"

SETUP: Final = (
    *("--region", REGION, "--instance-type", "g6.xlarge", "--instances", "1", "--usd-per-hour", "1"),
    *("--burst-after", "5s", "--idle", "15s", "--lease", "1h", "--install", "true"),
)
"""The wait for the office and for more work are cut short, so that the demo does not take ten minutes."""

RATES: Final = "0.0003,0.001,0.003,0.01,0.03,0.1,0.3,1"
EPOCHS: Final = 80
POLL_S: Final = 0.25


@dataclass
class Watcher:
    """Follows a sweep from one machine, and keeps who ran what when."""

    host: Host
    sweep: str = ""
    stays: dict[tuple[int, int], tuple[str, float, float]] = field(default_factory=dict)
    done: dict[int, int] = field(default_factory=dict)
    rented_at: float = 0.0
    joined_at: float = 0.0
    gone_at: float = 0.0
    played: tuple[float, float] = (0.0, 0.0)

    def look(self, cloud: LocalCloud) -> bool:
        """Take a look; whether the sweep is over."""
        now = time.monotonic()
        if cloud.ec2.live() and not self.rented_at:
            self.rented_at = now
        if not self.sweep:
            self.sweep = next((found["id"] for found in self._ask("sweep", "ls").get("sweeps", [])), "")
            return False
        view = self._ask("sweep", "status", self.sweep)
        for trial in view.get("trials", []):
            number, epoch = trial["trial"]["number"], trial["epoch"]
            if trial["phase"] == "running" and trial["machine"]:
                _, begun, _ = self.stays.get((number, epoch), ("", now, now))
                self.stays[number, epoch] = (trial["machine"], begun, now)
                if trial["machine"] not in GPUS and not self.joined_at:
                    self.joined_at = begun
            elif trial["state"] == "succeeded":
                self.done[number] = epoch
        return bool(view) and view["sweep"]["state"] in ("succeeded", "failed", "cancelled")

    def lanes(self, began: float) -> list[Lane]:
        lanes = {name: Lane(name, gpu.removeprefix("Simulated ")) for name, gpu in GPUS.items()}
        for (number, epoch), (machine, begin, end) in sorted(self.stays.items(), key=lambda item: item[1][1]):
            lane = lanes.setdefault(machine, Lane(machine, "g6.xlarge, rented"))
            lane.stays.append(Stay(number, begin - began, end - began, is_cut=self.done.get(number) != epoch))
        lanes["rig-b"].played = [(self.played[0] - began, self.played[1] - began)]
        for lane in lanes.values():
            if lane.name not in GPUS:
                lane.life = (self.rented_at - began, self.joined_at - began, self.gone_at - began)
        return list(lanes.values())

    def _ask(self, *arguments: str) -> Any:
        done = self.host.meshgpu(*arguments, "--json", code=None)
        return json.loads(done.stdout) if done.returncode == 0 else {}


class Demo:
    """The office, the cloud and a game. `close` ends everything."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.nvml = directory / "nvml"
        build(self.nvml)
        self.cloud = LocalCloud(lambda name: self.machine(name, RENTED_GPU))
        self.office = Office()
        self.game: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        if self.game is not None:
            self.game.kill()
            self.game.wait()
        self.office.close()
        self.cloud.close()

    def machine(self, name: str, gpu: str, *processes: str) -> dict[str, str]:
        """The environment of a machine with one GPU, on which these processes run."""
        shown = ["driver 580.105.08", "cuda 13000", "[gpu]", f"name {gpu}", f"uuid GPU-{name}", "total_mib 24564"]
        path = self.directory / f"{name}.gpus"
        unfinished = path.with_suffix(".new")
        unfinished.write_text("\n".join([*shown, "used_mib 512", "temp 41", *processes, ""]))
        unfinished.replace(path)
        return {
            "LD_LIBRARY_PATH": str(self.nvml),
            "FAKE_NVML": str(path),
            "MESHGPU_KEEP_FREE_GB": "0",
            "UV_CACHE_DIR": str(package_cache()),
            "UV_OFFLINE": "1",
            "UV_LINK_MODE": "copy",
        }

    def rig(self, name: str) -> Host:
        host = self.office.host(name, **self.machine(name, GPUS[name]), **self.cloud.ec2.environment())
        self.cloud.internet.attach(self.office.switch, [host.namespace])
        return host

    def play(self) -> None:
        project = self.directory / "digits"
        shutil.copytree(ROOT / "examples" / "digits", project)
        a, b = self.rig("rig-a"), self.rig("rig-b")
        say("Two rigs form a mesh; rig-a may rent. The cloud is a local one, and the rigs are behind a NAT.")
        a.meshgpu("init", "--mesh", "lab", "--name", "rig-a", "--user", "ada", "--yes")
        self.office.join(a, b)
        until(lambda: self.office.sees_all(a, 2))
        show(a, "burst", "setup", "--yes", *SETUP)
        show(a, "machines")
        say("Eight trials want a GPU each; the office has two.")
        watcher = Watcher(b)
        began = time.monotonic()
        helper = threading.Thread(target=self.follow, args=(watcher, b), daemon=True)
        helper.start()
        show(
            a, "sweep", "grid", "--param", f"lr={RATES}", "--parallel", "8", "--metric", "loss:min",
            "--metric-regex", "loss ([0-9.]+)", "-g", "1", "--cloud", "ok", "-e", "OMP_NUM_THREADS=1",
            "--", "python", "train.py", "--lr", "{lr}", "--epochs", str(EPOCHS), directory=project,
        )  # fmt: skip
        helper.join(10.0)
        until(lambda: self.cloud.ec2.live() == [], "the instance was not given back", 120.0)
        watcher.gone_at = time.monotonic()
        until(lambda: len(a.json("machines")["machines"]) == len(GPUS), "the instance is still a member", 60.0)
        say("The sweep is over. The instance had nothing to do for 15 s, and was given back:")
        show(a, "burst", "status")
        show(a, "machines")
        self.draw(watcher, began)

    def follow(self, watcher: Watcher, host: Host) -> None:
        """Watch the sweep; once the rented machine works, the owner of rig-b starts a game."""
        starts_at = 0.0
        while not watcher.look(self.cloud):
            now = time.monotonic()
            if watcher.joined_at and not starts_at:
                starts_at = now + 4.0
            if starts_at and now > starts_at and self.game is None and self.runs_on(watcher, host.name):
                self.start_game(watcher, host)
            time.sleep(POLL_S)
        watcher.played = (watcher.played[0], time.monotonic())

    def runs_on(self, watcher: Watcher, name: str) -> bool:
        newest = time.monotonic() - 2.0
        return any(machine == name and end > newest > begin for machine, begin, end in watcher.stays.values())

    def start_game(self, watcher: Watcher, host: Host) -> None:
        sleep = shutil.which("sleep")
        assert sleep is not None
        shutil.copy(sleep, self.directory / "game")
        self.game = subprocess.Popen([str(self.directory / "game"), "3600"])
        self.machine(host.name, GPUS[host.name], f"proc g {self.game.pid} 4100")
        watcher.played = (time.monotonic(), time.monotonic())
        say(f"(The owner of {host.name} starts a game: the GPU is his again, the trial moves.)")

    def draw(self, watcher: Watcher, began: float) -> None:
        lanes = watcher.lanes(began)
        path = Path(os.environ.get("TIMELINE", "timeline.svg"))
        path.write_text(draw("A sweep of eight trials in an office with two GPUs", lanes))
        away = [stay for lane in lanes if lane.life for stay in lane.stays if not stay.is_cut]
        moved = [(lane.name, stay) for lane in lanes for stay in lane.stays if stay.is_cut]
        say(f"{len(watcher.done)} trials succeeded, {len(away)} of them on the rented machine.")
        for name, stay in moved:
            after_s = stay.end_s - (watcher.played[0] - began)
            say(f"Trial #{stay.trial} left {name} {after_s:.1f} s after the game began, and ran again elsewhere.")
        say(f"Wrote {path}.")


def package_cache() -> Path:
    return Path(os.environ.get("UV_CACHE_DIR", Path.home() / ".cache" / "uv"))


def fill_package_cache() -> None:
    """The machines of the demo see no network, so what the trials import is fetched before."""
    uv = Path(sys.executable).with_name("uv")
    with tempfile.TemporaryDirectory() as directory:
        for command in (
            ("venv", "--quiet", "--python", sys.executable, f"{directory}/env"),
            ("pip", "install", "--quiet", "--python", f"{directory}/env/bin/python", "-r", "requirements.txt"),
        ):
            environment = os.environ | {"UV_CACHE_DIR": str(package_cache()), "UV_LINK_MODE": "copy"}
            subprocess.run([str(uv), *command], cwd=ROOT / "examples" / "digits", env=environment, check=True)


def say(text: str) -> None:
    print(f"{text}\n", flush=True)


def show(host: Host, *arguments: str, directory: Path | None = None) -> None:
    """Print a command as its user types it, run it, let its output through. Raises on failure."""
    prompt = f"{host.name} $"
    print(f"\033[1m{prompt}\033[0m" if sys.stdout.isatty() else prompt, shlex.join(("meshgpu", *arguments)), flush=True)
    argv = host.argv(MESHGPU, *arguments)
    subprocess.run(argv, env=host.environment(), cwd=directory or host.home.parent, check=True)
    print(flush=True)


def check_needs() -> None:
    """Raise MeshgpuError where this computer cannot play."""
    missing = [program for program in WANTED if shutil.which(program) is None]
    if missing:
        hint = "apt install iproute2 iptables util-linux gcc libc6-dev"
        raise MeshgpuError("missing", f"cannot play: found no {', '.join(missing)}", hint)
    if os.geteuid() != 0:
        raise MeshgpuError("not-root", "cannot play: only root makes network namespaces", "sudo make demo-burst")


def main() -> int:
    try:
        check_needs()
    except MeshgpuError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return 1
    say("Fetching what the trials import …")
    fill_package_cache()
    with tempfile.TemporaryDirectory(prefix="meshgpu-demo-") as directory:
        demo = Demo(Path(directory))
        try:
            demo.play()
        except (subprocess.CalledProcessError, AssertionError) as error:
            print(f"\nThe demo stopped: {error}", file=sys.stderr)
            for host in demo.office.hosts:
                print(host.log(), file=sys.stderr)
            for machine in demo.cloud.machines.values():
                print(f"--- {machine.instance}\n{machine.console.read_text()[-3000:]}", file=sys.stderr)
            return 1
        finally:
            demo.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
