"""Three agents on this computer's loopback: they find each other, form a mesh, and one trains a model for another.

Nothing leaves the loopback interface and no real GPU is touched: the GPUs come from the test suite's NVML library,
and their names say "Simulated". Everything lives in a temporary directory that is removed at the end.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MESHGPU = Path(sys.executable).parent / "meshgpu"
GPUS = {
    "rig-a": "",
    "rig-b": "[gpu]\nname Simulated RTX 4090\nuuid GPU-demo-b0\ntotal_mib 24564\nused_mib 512\ntemp 41\nutil 0\n",
    "rig-c": "[gpu]\nname Simulated RTX 3090\nuuid GPU-demo-c0\ntotal_mib 24576\nused_mib 310\ntemp 38\nutil 0\n"
    "[gpu]\nname Simulated RTX 3060\nuuid GPU-demo-c1\ntotal_mib 12288\nused_mib 200\ntemp 35\nutil 0\n",
}


class Demo:
    """One directory with three homes, and the environment of each machine."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.library = self._build_library()

    def _build_library(self) -> Path | None:
        if shutil.which("cc") is None:
            print("(no C compiler here: the machines of this demo show no GPUs; apt install gcc libc6-dev)\n")
            return None
        library = self.directory / "nvml"
        builder = ROOT / "tests" / "fake_nvml" / "build.py"
        subprocess.run([sys.executable, str(builder), str(library)], check=True, stdout=subprocess.DEVNULL)
        return library

    def environment(self, machine: str) -> dict[str, str]:
        """Loopback only, free ports, a home and (where a compiler is) GPUs of its own."""
        gpus = self.directory / f"{machine}.gpus"
        gpus.write_text(f"driver 580.105.08\ncuda 13000\n{GPUS[machine]}")
        settings = {
            "MESHGPU_HOME": str(self.directory / machine),
            "MESHGPU_LOOPBACK": "true",
            "MESHGPU_LINK_PORT": "0",
            "MESHGPU_PAIRING_PORT": "0",
            "MESHGPU_KEEP_FREE_GB": "1",
            "UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR", str(Path.home() / ".cache" / "uv")),
        }
        if self.library is not None and GPUS[machine]:
            settings |= {"LD_LIBRARY_PATH": str(self.library), "FAKE_NVML": str(gpus)}
        return os.environ | settings

    def show(self, machine: str, *arguments: str, directory: Path | None = None) -> None:
        """Print a command as its user types it, run it, let its output through. Raises on failure."""
        shown = (
            " ".join(arguments) if len(arguments[-1]) < 80 else " ".join((*arguments[:-1], arguments[-1][:24] + "…"))
        )
        print(
            f"\033[1m{machine} $\033[0m meshgpu {shown}" if sys.stdout.isatty() else f"{machine} $ meshgpu {shown}",
            flush=True,
        )
        subprocess.run([str(MESHGPU), *arguments], env=self.environment(machine), cwd=directory, check=True)
        print(flush=True)

    def quietly(self, machine: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(MESHGPU), *arguments], env=self.environment(machine), check=True, text=True, stdout=subprocess.PIPE
        )
        return done.stdout

    def play(self) -> None:
        project = self.directory / "digits"
        shutil.copytree(ROOT / "examples" / "digits", project)
        for machine in ("rig-b", "rig-c"):
            self.quietly(machine, "up")
        self.show("rig-b", "init", "--mesh", "lab", "--name", "rig-b", "--user", "ada", "--yes")
        self.join("rig-c")
        self.show("rig-a", "up")
        self.join("rig-a")
        self.show("rig-a", "discover")
        self.show("rig-a", "machines")
        self.show("rig-a", "run", "-m", "rig-b", "--fetch", "--", "python", "train.py", directory=project)
        self.show("rig-c", "ps", "-a")
        model = project / "model.joblib"
        print(f"The model that rig-b trained is here now: {model.name}, {model.stat().st_size / 1000:.0f} kB.")

    def join(self, machine: str) -> None:
        invite = self.quietly("rig-b", "invite").split()[-1]
        self.show(machine, "join", "--name", machine, "--yes", invite)

    def end(self) -> None:
        for machine in GPUS:
            subprocess.run([str(MESHGPU), "down"], env=self.environment(machine), capture_output=True, check=False)


def main() -> int:
    directory = Path(tempfile.mkdtemp(prefix="meshgpu-demo-"))
    demo = Demo(directory)
    try:
        demo.play()
    except subprocess.CalledProcessError as error:
        print(f"\nThe demo stopped: a command ended with {error.returncode}. Its agents' logs:", file=sys.stderr)
        for log in sorted(directory.glob("*/agent.log")):
            print(f"--- {log.parent.name}\n{log.read_text()[-2000:]}", file=sys.stderr)
        return 1
    finally:
        demo.end()
        shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
