"""Measure what it costs a job that its log is kept: the same command beside a bare file and a bare pipe, in pairs.

The job prints lines of 100 bytes, each with a write of its own as Python does under meshgpu, with work between them
that makes it 1 GB a minute where nobody reads. It times itself, so that what comes before and after does not count.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.run import MESHGPU, mesh

RATE = 1e9 / 60
"""Bytes a second: a gigabyte a minute."""

JOB = """
import os, sys, time
lines, spin, report = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
line = b"x" * 99 + b"\\n"
start = time.perf_counter()
for _ in range(lines):
    os.write(1, line)
    for _ in range(spin):
        pass
with open(report, "w") as file:
    file.write(str(time.perf_counter() - start))
"""

Run = Callable[[list[str]], None]


def bare_file(command: list[str], out: Path) -> None:
    with out.open("wb") as file:
        subprocess.run(command, stdout=file, check=True)


def bare_pipe(command: list[str], out: Path) -> None:
    with out.open("wb") as file, subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file) as cat:
        subprocess.run(command, stdout=cat.stdin, check=True)
        assert cat.stdin is not None
        cat.stdin.close()


def under_guard(command: list[str], environment: dict[str, str], work: Path, *, is_followed: bool) -> None:
    run = [MESHGPU, "run", "-d", "--json", "-m", "bob", "--", *command]
    done = subprocess.run(run, env=environment, cwd=work, capture_output=True, check=True)
    job = json.loads(done.stdout)["id"]
    wait = [MESHGPU, "logs", "-f", job] if is_followed else [MESHGPU, "wait", job]
    subprocess.run(wait, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7, help="measured pairs per row")
    parser.add_argument("--seconds", type=float, default=6.0, help="how long the job prints, about")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="meshgpu-bench-") as name:
        directory = Path(name)
        work, report, out = directory / "work", directory / "seconds", directory / "out"
        work.mkdir()
        (work / "job.py").write_text(JOB)
        lines = int(RATE * options.seconds / 100)

        def command(spin: int) -> list[str]:
            return [sys.executable, str(work / "job.py"), str(lines), str(spin), str(report)]

        def timed(run: Run, spin: int) -> float:
            run(command(spin))
            os.sync()  # what one run left in memory is not written during the next
            return float(report.read_text())

        fast, slow = (timed(functools.partial(bare_file, out=out), spin) for spin in (0, 100))
        spin = max(0, round((options.seconds - fast) / (slow - fast) * 100))
        with mesh(directory) as environment:
            guarded, followed = (
                functools.partial(under_guard, environment=environment, work=work, is_followed=it)
                for it in (False, True)
            )
            file, pipe = functools.partial(bare_file, out=out), functools.partial(bare_pipe, out=out)
            rows: list[tuple[str, Run, str, Run]] = [
                ("a job that prints 1 GB a minute", guarded, "into a file", file),
                ("the same", guarded, "through a pipe into `cat > file`", pipe),
                ("the same, while `logs -f` reads it", followed, "the same pipe", pipe),
            ]
            print("| what | s | beside | s | ratio | pairs |\n|---|---|---|---|---|---|")
            for what, ours, peer, theirs in rows:
                pairs = [(timed(ours, spin), timed(theirs, spin)) for _ in range(options.pairs)]
                ratio = statistics.median(a / b for a, b in pairs)
                a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
                print(
                    f"| {what} | {a:.2f} | {peer} | {b:.2f} | {ratio:.2f} | {len(pairs)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
