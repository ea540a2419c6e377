"""What an attempt leaves: which files of its working directory are new or changed, told by size and time of change."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from meshgpu.adapters import job_trees
from meshgpu.adapters.log_ledger import ledger_digest
from meshgpu.model.receipt import Evidence

NOT_OUTPUT: Final = "__pycache__"
"""Python leaves it beside every imported file; nobody means it as a result."""


def note_inputs(directory: Path) -> None:
    """Write before.json: what lies in `directory/work` before the job runs. Blocks."""
    _write_json(directory / "before.json", dict(_files(directory / "work")))


def note_staged(directory: Path, *, environment: str = "", image: str = "") -> None:
    """Write staged.json: what the job is going to run in, for whoever concludes the attempt. Blocks."""
    _write_json(directory / "staged.json", {"environment": environment, "image": image})


def find_evidence(directory: Path) -> Evidence:
    """What can be vouched for of an attempt that has ended. Blocks for as long as it takes to read the log."""
    staged: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError):
        staged = json.loads((directory / "staged.json").read_bytes())
    return Evidence(staged.get("environment", ""), staged.get("image", ""), ledger_digest(directory / "log"))


def list_outputs(directory: Path) -> tuple[int, int]:
    """Write outputs.json, what of `directory/work` is the job's: (files, bytes). Blocks."""
    before: dict[str, list[int]] = {}
    with contextlib.suppress(FileNotFoundError):
        before = json.loads((directory / "before.json").read_bytes())
    outputs = {path: state[0] for path, state in _files(directory / "work") if before.get(path) != state}
    _write_json(directory / "outputs.json", list(outputs.items()))
    return len(outputs), sum(outputs.values())


def _files(top: Path) -> Iterator[tuple[str, list[int]]]:
    """(relative path, [bytes, mtime_ns]) of all regular files below `top`; links are not followed."""
    for path, facts in job_trees.files_below(top):
        if NOT_OUTPUT not in path.split("/")[:-1]:
            yield path, [facts.st_size, facts.st_mtime_ns]


def _write_json(path: Path, document: object) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(document))
    temporary.replace(path)
