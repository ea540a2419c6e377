"""What every job finds on its import path: the module through which it reports numbers."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from meshgpu.adapters.metrics import FILE

LIBRARY: Final = Path(__file__).resolve().parent.parent / "inside"
MODULE: Final = "meshgpu.py"


def place_in(home: Path) -> Path:
    """Where a fenced job with that home directory finds the module. Its files are put there by `put_into`."""
    return home / ".meshgpu"


def put_into(home: Path) -> None:
    """Put the module into a fenced job's home directory, the one place that it surely can read. Blocks."""
    place_in(home).mkdir(exist_ok=True)
    shutil.copyfile(LIBRARY / MODULE, place_in(home) / MODULE)


def variables(library: Path, work: Path, asked: Mapping[str, str]) -> dict[str, str]:
    """What a job's environment needs for it, after what its user asked for. Paths are as the job sees them."""
    path = f"{library}:{asked['PYTHONPATH']}" if asked.get("PYTHONPATH") else str(library)
    return {"PYTHONPATH": path, "MESHGPU_METRICS": str(work / FILE)}
