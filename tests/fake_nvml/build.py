"""Compile the fake NVML library: `python tests/fake_nvml/build.py DIR [-DOLD_DRIVER]` makes DIR/libnvidia-ml.so.1.

Then `LD_LIBRARY_PATH=DIR FAKE_NVML=gpus.txt` makes unmodified pynvml see the GPUs of that file.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).with_name("fake_nvml.c")
LIBRARY: Final = "libnvidia-ml.so.1"
COMPILER_TIMEOUT_S: Final = 60.0
"""It takes half a second; a machine under load takes longer."""


def build(directory: Path, *flags: str) -> Path:
    """Compile the library into `directory` unless a newer one is there; returns its path."""
    library = directory / LIBRARY
    if library.exists() and library.stat().st_mtime > SOURCE.stat().st_mtime:
        return library
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = directory / f"{LIBRARY}.{os.getpid()}"
    options = [
        "-shared",
        "-fPIC",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Wno-format-truncation",
        f"-Wl,-soname,{LIBRARY}",
        *flags,
    ]
    subprocess.run(["cc", *options, "-o", unfinished, SOURCE], check=True, timeout=COMPILER_TIMEOUT_S)
    unfinished.replace(library)  # so that a second build beside this one never sees half a library
    return library


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: build.py DIR [-DOLD_DRIVER]")
    print(build(Path(sys.argv[1]), *sys.argv[2:]))
