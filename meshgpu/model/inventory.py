"""What a machine has and how it stands: GPUs found, readings, processors, memory."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from meshgpu.model.ids import GpuId

NO_DRIVER: Final = "no NVIDIA driver found"
NO_NVIDIA_GPU: Final = "no NVIDIA GPU found"
DRIVER_NOT_LOADED: Final = "the NVIDIA driver is not loaded"
DRIVER_FORBIDDEN: Final = "no permission to use the NVIDIA driver: check /dev/nvidiactl"
DRIVER_MISMATCH: Final = "the NVIDIA driver and its library do not match: reboot the machine"
DRIVER_TOO_OLD: Final = "the NVIDIA driver is too old: install a newer one"
DRIVER_SILENT: Final = "the NVIDIA driver does not answer: reboot the machine"
"""What `Inventory.gpu_note` may say of a machine that shows no GPU."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as it was found. Facts that the driver does not tell are 0 or empty.

    index: position in PCI bus order, as CUDA_DEVICE_ORDER=PCI_BUS_ID counts.
    compute_capability: `8.9`; pci_bus: `00000000:01:00.0`.
    """

    uuid: GpuId
    index: int
    name: str
    memory_total_bytes: int
    compute_capability: str = ""
    pci_bus: str = ""


class ProcessKind(StrEnum):
    COMPUTE = "compute"
    GRAPHICS = "graphics"


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that uses a GPU; `memory_bytes` is None where the driver does not tell.

    name: as the kernel has it (`gnome-shell`), 15 characters at most; empty where it was not looked up.
    """

    pid: int
    kind: ProcessKind
    memory_bytes: int | None = None
    name: str = ""


@dataclass(frozen=True, slots=True)
class GpuReading:
    """How a GPU stands at one moment; every fact but the id may be unknown (None).

    fault: empty, or why the GPU cannot be used now (`lost: reset the machine`).
    withheld: empty, or why its owner does not lend it now.
    """

    uuid: GpuId
    memory_free_bytes: int | None = None
    utilization_percent: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    processes: tuple[GpuProcess, ...] = ()
    fault: str = ""
    withheld: str = ""


@dataclass(frozen=True, slots=True)
class Inventory:
    """Hardware of one machine.

    gpu_note: empty, or one line that says why there are no GPUs (`no NVIDIA driver is loaded`).
    driver_version, cuda_version: as the driver tells (`580.105.08`, `13.0`), empty where it does not.
    """

    cpus: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    driver_version: str = ""
    cuda_version: str = ""
    gpu_note: str = ""


def short_gpu_name(name: str) -> str:
    """`NVIDIA GeForce RTX 4090` as people say it: `RTX 4090`."""
    for prefix in ("NVIDIA ", "GeForce "):
        name = name.removeprefix(prefix)
    return name


def gpu_summary(gpus: tuple[Gpu, ...]) -> str:
    """The built-in GPUs in short form: `2x RTX 4090 24GB, 1x RTX 3060 12GB`; empty for none.

    Memory is rounded to the nearest decimal gigabyte below the sold size (25.8e9 bytes are sold as 24 GB = 24 GiB).
    """
    counts: dict[str, int] = {}
    for gpu in gpus:
        label = f"{short_gpu_name(gpu.name)} {sold_gigabytes(gpu.memory_total_bytes)}GB"
        counts[label] = counts.get(label, 0) + 1
    return ", ".join(f"{count}x {label}" for label, count in counts.items())


def sold_gigabytes(memory_bytes: int) -> int:
    """The number printed on the card's box: GPU makers count in GiB, and firmware keeps some back."""
    return round(memory_bytes / 2**30)
