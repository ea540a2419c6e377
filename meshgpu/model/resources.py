"""Amounts of things: what a job asks for, what of a GPU it gets, and the grammar of `-g`."""

import re
from dataclasses import dataclass
from typing import Final

from meshgpu.errors import MeshgpuError
from meshgpu.model.constraints import ANYWHERE, Where
from meshgpu.model.ids import GpuId

GB: Final = 10**9
"""Gigabytes are decimal, so that `-g 24GB` fits a card that is sold as 24 GB."""

_GRAMMAR: Final = (
    "-g takes a count (2), memory on one GPU (8GB), count x memory (2x24GB), or a model with a count (4090:2)"
)


@dataclass(frozen=True, slots=True)
class GpuRequest:
    """GPUs of one machine.

    count: how many GPUs; 0 asks for none.
    memory_bytes: 0 asks for whole GPUs. Otherwise each GPU must offer that much: `shared` reserves exactly it and
        leaves the rest to others, else the GPU is taken whole.
    model: empty, or a part of the GPU's name, compared without case (`4090`, `a100`).
    """

    count: int
    memory_bytes: int = 0
    shared: bool = False
    model: str = ""

    def __str__(self) -> str:
        memory = f"{self.memory_bytes / GB:g}GB" if self.memory_bytes else ""
        if self.model:
            return f"{self.model}:{self.count}"
        if self.shared:
            return memory
        return f"{self.count}x{memory}" if memory else str(self.count)


NO_GPU: Final = GpuRequest(count=0)


@dataclass(frozen=True, slots=True)
class GpuShare:
    """A part of one GPU: `memory_bytes` of it, or all of it where `memory_bytes` is 0."""

    uuid: GpuId
    memory_bytes: int = 0

    @property
    def is_whole(self) -> bool:
        return self.memory_bytes == 0


@dataclass(frozen=True, slots=True)
class Resources:
    """What a job needs on its machine. `cpus` and `memory_bytes` are 0 where the job does not say.

    on: which machines and GPUs will do; empty: any.
    """

    gpus: GpuRequest
    cpus: int = 0
    memory_bytes: int = 0
    on: Where = ANYWHERE


def parse_gpus(text: str) -> GpuRequest:
    """Read the grammar of `-g`; raises MeshgpuError `bad-request` that shows it."""
    text = text.strip().lower()
    if re.fullmatch(r"\d{1,2}", text):
        return GpuRequest(count=int(text))
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)gb", text):
        return GpuRequest(count=1, memory_bytes=_memory(match[1]), shared=True)
    if match := re.fullmatch(r"(\d{1,2})x(\d+(?:\.\d+)?)gb", text):
        return GpuRequest(count=int(match[1]), memory_bytes=_memory(match[2]))
    if match := re.fullmatch(r"([a-z0-9][a-z0-9 _-]*?)(?::(\d{1,2}))?", text):
        return GpuRequest(count=int(match[2] or 1), model=match[1].replace("_", " "))
    raise MeshgpuError("bad-request", f"cannot read the GPUs {text!r}: {_GRAMMAR}", "meshgpu run -g 1 …")


def _memory(gigabytes: str) -> int:
    size = int(float(gigabytes) * GB)
    if size <= 0:
        raise MeshgpuError(
            "bad-request", f"cannot reserve {gigabytes}GB of GPU memory: {_GRAMMAR}", "meshgpu run -g 8GB …"
        )
    return size
