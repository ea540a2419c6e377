"""Measure meshgpu beside a peer, in pairs on one machine, and print a table for docs/benchmarks.md.

Each row runs A and B in turn, A B A B …, as whole processes; figures are medians, the ratio is the median of the
pairs' ratios, so that it holds when the machine's speed drifts. Everything stays on loopback.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
MESHGPU = str(BIN / "meshgpu")
WARM_UPS = 3


@dataclass(frozen=True)
class Row:
    """One comparison; seconds a run, in the order measured."""

    what: str
    peer: str
    ours: list[float]
    theirs: list[float]

    def text(self) -> str:
        ratio = statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))
        ours, theirs = statistics.median(self.ours) * 1e3, statistics.median(self.theirs) * 1e3
        return f"| {self.what} | {ours:.0f} | {self.peer} | {theirs:.0f} | {ratio:.2f} | {len(self.ours)} |"


def timed(command: list[str], environment: dict[str, str], directory: Path) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=directory, capture_output=True, timeout=60, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr.decode()}")
    return seconds


def pairs(
    what: str, ours: list[str], peer: str, theirs: list[str], environment: dict[str, str], directory: Path, count: int
) -> Row:
    for _ in range(WARM_UPS):
        timed(ours, environment, directory)
        timed(theirs, environment, directory)
    measured = [(timed(ours, environment, directory), timed(theirs, environment, directory)) for _ in range(count)]
    return Row(what, peer, [a for a, _ in measured], [b for _, b in measured])


@contextmanager
def mesh(directory: Path) -> Iterator[dict[str, str]]:
    """Two agents on loopback, `ada` and `bob`; yields ada's environment."""
    homes = {name: agent_environment(directory / name) for name in ("ada", "bob")}

    def meshgpu(name: str, *arguments: str) -> str:
        command = [MESHGPU, *arguments]
        return subprocess.run(command, env=homes[name], check=True, capture_output=True, text=True).stdout

    try:
        meshgpu("ada", "init", "--mesh", "bench", "--name", "ada", "--yes")
        meshgpu("bob", "join", "--name", "bob", "--yes", meshgpu("ada", "invite").split()[-1])
        yield homes["ada"]
    finally:
        for environment in homes.values():
            subprocess.run([MESHGPU, "down"], env=environment, capture_output=True, check=False)


def agent_environment(home: Path) -> dict[str, str]:
    settings = {"MESHGPU_LOOPBACK": "true", "MESHGPU_LINK_PORT": "0", "MESHGPU_PAIRING_PORT": "0"}
    return os.environ | settings | {"MESHGPU_HOME": str(home), "MESHGPU_KEEP_FREE_GB": "0"}


@contextmanager
def ssh_server(directory: Path) -> Iterator[list[str] | None]:
    """An sshd of our own on loopback; yields the command line that reaches it, None where there is no sshd."""
    sshd = shutil.which("sshd") or shutil.which("/usr/sbin/sshd")
    if sshd is None or os.geteuid() != 0:
        yield None
        return
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)], check=True)
    (directory / "keys").write_text((directory / "user.pub").read_text())
    Path("/run/sshd").mkdir(exist_ok=True)
    options = [
        *("-o", "ListenAddress=127.0.0.1:22022", "-o", f"AuthorizedKeysFile={directory}/keys", "-o", "StrictModes=no"),
        *("-o", "PermitRootLogin=prohibit-password", "-o", "UsePAM=no", "-o", f"PidFile={directory}/sshd.pid"),
    ]
    server = subprocess.Popen([sshd, "-D", "-f", "/dev/null", "-h", str(directory / "host"), *options])
    time.sleep(0.5)
    known = ["-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={directory}/known", "-o", "LogLevel=ERROR"]
    try:
        yield ["ssh", "-F", "/dev/null", "-p", "22022", "-i", str(directory / "user"), *known, "root@127.0.0.1"]
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20, help="measured pairs per row")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="meshgpu-bench-") as name:
        directory = Path(name)
        work = directory / "work"
        work.mkdir()
        with mesh(directory) as environment, ssh_server(directory) as ssh:
            typer = [str(BIN / "python"), "-c", "import typer"]
            rows = [
                pairs("`meshgpu ps`, cold", [MESHGPU, "ps"], "`import typer`", typer, environment, work, options.pairs)
            ]
            run = [MESHGPU, "run", "-m", "bob", "--", "true"]
            if ssh is not None:
                peer = [*ssh, "true"]
                what = "`meshgpu run -m OTHER -- true`, warm"
                rows.append(pairs(what, run, "`ssh HOST true`, new connection", peer, environment, work, options.pairs))
            rows.append(
                pairs("the same", run, "`import typer`", typer, environment, work, options.pairs),
            )
    print("| what | ms | peer | ms | ratio | pairs |\n|---|---|---|---|---|---|")
    for row in rows:
        print(row.text())


if __name__ == "__main__":
    main()
