"""GPU probe port over NVML: one thread asks the driver, and every fact is optional."""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

import pynvml

from meshgpu.model.ids import GpuId
from meshgpu.model.inventory import (
    DRIVER_FORBIDDEN,
    DRIVER_MISMATCH,
    DRIVER_NOT_LOADED,
    DRIVER_SILENT,
    DRIVER_TOO_OLD,
    NO_DRIVER,
    NO_NVIDIA_GPU,
    Gpu,
    GpuProcess,
    GpuReading,
    Inventory,
    ProcessKind,
)

SAMPLE_PERIOD_S: Final = 2.0
"""How often readings are taken: half the age at which an owner would call `machines -w` stale."""

RETRY_PERIOD_S: Final = 30.0
"""How often a machine without GPUs is asked again: a driver may be installed or loaded while the agent runs."""

SILENCE_LIMIT_S: Final = 10.0
"""How long the driver may take for a sample: calls hang for ever after some faults of the bus (Xid 79)."""

STOP_LIMIT_S: Final = 2.0
"""How long `stop` waits for a call in progress; a thread that hangs in the driver is left behind (it is a daemon)."""

MAX_GPUS: Final = 64
"""More than any board holds; bounds a count that makes no sense."""

MAX_MEMORY_BYTES: Final = 1 << 50
MAX_TEMPERATURE_C: Final = 200
MAX_POWER_W: Final = 100_000.0

Sample = tuple[Inventory, tuple[GpuReading, ...]]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_nvml: Any = pynvml  # publishes no types

_NOTES: Final = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: NO_DRIVER,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: DRIVER_NOT_LOADED,
    pynvml.NVML_ERROR_NO_PERMISSION: DRIVER_FORBIDDEN,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: DRIVER_MISMATCH,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: DRIVER_TOO_OLD,
}
_FAULTS: Final = {
    pynvml.NVML_ERROR_GPU_IS_LOST: "lost: reset the machine",
    pynvml.NVML_ERROR_RESET_REQUIRED: "stuck: reset the GPU",
}
_VANISHED: Final = "lost: the driver no longer lists it"
_MIG_WITHOUT_INSTANCES: Final = "MIG is on, without instances"


class NvmlGpus:
    """Samples the driver from a thread of its own; `emit` runs on the event loop that called `start`."""

    def __init__(
        self,
        *,
        sample_period_s: float = SAMPLE_PERIOD_S,
        retry_period_s: float = RETRY_PERIOD_S,
        silence_limit_s: float = SILENCE_LIMIT_S,
    ) -> None:
        self._sample_period_s = sample_period_s
        self._retry_period_s = retry_period_s
        self._silence_limit_s = silence_limit_s
        self._cpus = len(os.sched_getaffinity(0))
        self._memory_bytes = memory_bytes(Path("/proc/meminfo").read_text())
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)
        self._last: Sample | None = None

    async def start(self, emit: Callable[[Inventory, tuple[GpuReading, ...]], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._emit = emit
        self._first = self._loop.create_future()
        self._watchdog = self._loop.call_later(self._silence_limit_s, self._report_silence)
        self._thread.start()
        await self._first

    async def stop(self) -> None:
        self._stopping.set()
        self._watchdog.cancel()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, STOP_LIMIT_S)
        if self._thread.is_alive():
            _log.warning("a call of the NVIDIA driver hangs; its thread is left behind")

    def _run(self) -> None:
        sampler = _Sampler(Inventory(self._cpus, self._memory_bytes))
        try:
            while not self._stopping.is_set():
                sample = sampler.sample()
                pause_s = self._sample_period_s if sample[0].gpus else self._retry_period_s
                self._loop.call_soon_threadsafe(self._deliver, sample, pause_s)
                self._stopping.wait(pause_s)
        except RuntimeError:
            if not self._loop.is_closed():  # an agent that dies without `stop` ends this thread too
                raise
        finally:
            sampler.close()

    def _deliver(self, sample: Sample, pause_s: float) -> None:
        if self._stopping.is_set():
            return
        self._watchdog.cancel()
        self._watchdog = self._loop.call_later(pause_s + self._silence_limit_s, self._report_silence)
        self._publish(sample)

    def _report_silence(self) -> None:
        """Say that the driver hangs: GPUs that were there stay, each with a fault."""
        inventory, readings = self._last or (Inventory(self._cpus, self._memory_bytes, gpu_note=DRIVER_SILENT), ())
        self._publish((inventory, tuple(GpuReading(reading.uuid, fault=DRIVER_SILENT) for reading in readings)))

    def _publish(self, sample: Sample) -> None:
        self._last = sample
        self._emit(*sample)
        if not self._first.done():
            self._first.set_result(None)


def memory_bytes(meminfo: str) -> int:
    """MemTotal of /proc/meminfo's text, in bytes; 0 where it does not tell."""
    for line in meminfo.splitlines():
        name, _, value = line.partition(":")
        if name == "MemTotal":
            return int(value.split()[0]) * 1024
    return 0


class _Sampler:
    """Takes one sample at a time; lives in the sampling thread. Remembers the GPUs that it saw."""

    def __init__(self, machine: Inventory) -> None:
        self._machine = machine
        self._known: dict[GpuId, tuple[Gpu, int]] = {}
        self._is_open = False

    def sample(self) -> Sample:
        try:
            if not self._is_open:
                _nvml.nvmlInit()
                self._is_open = True
            count = min(_nvml.nvmlDeviceGetCount(), MAX_GPUS)
        except _nvml.NVMLError as error:
            return self._without_driver(_NOTES.get(error.value, f"the NVIDIA driver answers with error {error.value}"))
        except _nvml.NVMLLibraryMismatchError:
            return self._without_driver(_NOTES[pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH])
        return self._read_all(count)

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            _Device().fact(_nvml.nvmlShutdown)

    def _without_driver(self, note: str) -> Sample:
        self.close()  # so that the next sample starts afresh
        self._known.clear()
        return replace(self._machine, gpu_note=note), ()

    def _read_all(self, count: int) -> Sample:
        found: dict[GpuId, tuple[Gpu, GpuReading]] = {}
        faults: dict[int, str] = {}
        for position in range(count):
            for device in _devices(position):
                uuid = device.uuid()
                if uuid is None:
                    faults[position] = device.fault or "it does not tell its UUID"
                else:
                    gpu, reading = device.gpu(uuid), device.reading(uuid)
                    if reading.fault and uuid in self._known:
                        gpu, _ = self._known[uuid]  # what a lost GPU tells of itself is less than it told before
                    found[uuid] = gpu, reading
                    self._known[uuid] = gpu, position
        self._keep_vanished(found, faults)
        ordered = sorted(found.values(), key=lambda pair: pair[0].pci_bus)
        driver = _Device()
        inventory = replace(
            self._machine,
            gpus=tuple(replace(gpu, index=index) for index, (gpu, _) in enumerate(ordered)),
            driver_version=_text(driver.fact(_nvml.nvmlSystemGetDriverVersion)),
            cuda_version=_cuda_version(driver.fact(_nvml.nvmlSystemGetCudaDriverVersion)),
            gpu_note=_note(count, faults),
        )
        if not ordered:
            self.close()
        return inventory, tuple(reading for _, reading in ordered)

    def _keep_vanished(self, found: dict[GpuId, tuple[Gpu, GpuReading]], faults: dict[int, str]) -> None:
        """Add GPUs that were there before, each with its fault; take them out of `faults`. MIG instances may go."""
        for uuid, (gpu, position) in list(self._known.items()):
            if uuid in found:
                continue
            fault = faults.pop(position, _VANISHED)
            if uuid.startswith("MIG-") and fault == _VANISHED:
                del self._known[uuid]
            else:
                found[uuid] = gpu, GpuReading(uuid, fault=fault)


class _Device:
    """A GPU or MIG instance as the driver shows it now. `fault` keeps the first reason why it cannot be used."""

    def __init__(self, handle: Any = None, board: Any = None, fault: str = "") -> None:
        self._handle = handle
        self._board = handle if board is None else board
        self.fault = fault

    def fact(self, read: Callable[..., _T], *arguments: object) -> _T | None:
        """What `read` returns, None where the driver does not tell or answers with nonsense."""
        try:
            return read(*arguments)
        except _nvml.NVMLError as error:
            self.fault = self.fault or _FAULTS.get(error.value, "")
        except (_nvml.NVMLLibraryMismatchError, ValueError, IndexError, MemoryError):
            _log.debug("the NVIDIA driver answers with nonsense", exc_info=True)
        return None

    def uuid(self) -> GpuId | None:
        if self._handle is None:
            return None
        text = _text(self.fact(_nvml.nvmlDeviceGetUUID, self._handle))
        return GpuId(text) if text else None

    def gpu(self, uuid: GpuId) -> Gpu:
        memory = self.fact(_nvml.nvmlDeviceGetMemoryInfo, self._handle)
        capability = self.fact(_nvml.nvmlDeviceGetCudaComputeCapability, self._board)
        return Gpu(
            uuid=uuid,
            index=0,
            name=_text(self.fact(_nvml.nvmlDeviceGetName, self._handle)),
            memory_total_bytes=0 if memory is None else _within(memory.total, MAX_MEMORY_BYTES) or 0,
            compute_capability="" if capability is None else f"{capability[0]}.{capability[1]}",
            pci_bus=_text(self.fact(_bus_id, self._board)),
        )

    def reading(self, uuid: GpuId) -> GpuReading:
        memory = self.fact(_nvml.nvmlDeviceGetMemoryInfo, self._handle)
        utilization = self.fact(_nvml.nvmlDeviceGetUtilizationRates, self._handle)
        sensor = _nvml.NVML_TEMPERATURE_GPU
        power_mw = self.fact(_nvml.nvmlDeviceGetPowerUsage, self._board)
        limit_mw = self.fact(_nvml.nvmlDeviceGetEnforcedPowerLimit, self._board)
        reading = GpuReading(
            uuid=uuid,
            memory_free_bytes=None if memory is None else _within(memory.free, MAX_MEMORY_BYTES),
            utilization_percent=None if utilization is None else _within(utilization.gpu, 100),
            temperature_c=_within(self.fact(_nvml.nvmlDeviceGetTemperature, self._board, sensor), MAX_TEMPERATURE_C),
            power_w=None if power_mw is None else _within(power_mw / 1000, MAX_POWER_W),
            power_limit_w=None if limit_mw is None else _within(limit_mw / 1000, MAX_POWER_W),
            processes=(*self._processes(ProcessKind.COMPUTE), *self._processes(ProcessKind.GRAPHICS)),
        )
        return GpuReading(uuid, fault=self.fault) if self.fault else reading

    def _processes(self, kind: ProcessKind) -> Iterator[GpuProcess]:
        call = f"nvmlDeviceGet{kind.value.capitalize()}RunningProcesses"
        for version in ("_v3", "_v2"):  # drivers before 510 know only the second
            processes = self.fact(getattr(_nvml, call + version), self._handle)
            if processes is not None:
                for process in sorted(processes, key=lambda process: process.pid):
                    yield GpuProcess(process.pid, kind, _within(process.usedGpuMemory, MAX_MEMORY_BYTES))
                return


def _devices(position: int) -> list[_Device]:
    """What lies at `position` in NVML's order: a GPU, or the instances of one that is split by MIG."""
    board = _Device()
    handle = board.fact(_nvml.nvmlDeviceGetHandleByIndex, position)
    if handle is None:
        return [board]
    mode = board.fact(_nvml.nvmlDeviceGetMigMode, handle)
    if mode is None or mode[0] != _nvml.NVML_DEVICE_MIG_ENABLE:
        return [_Device(handle)]
    count = board.fact(_nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0
    instances = [
        board.fact(_nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index) for index in range(min(count, MAX_GPUS))
    ]
    devices = [_Device(instance, handle) for instance in instances if instance is not None]
    return devices or [_Device(handle, fault=_MIG_WITHOUT_INSTANCES)]


def _bus_id(handle: object) -> str:
    return str(_nvml.nvmlDeviceGetPciInfo(handle).busId)


def _note(count: int, faults: dict[int, str]) -> str:
    if not count:
        return NO_NVIDIA_GPU
    if faults:
        return f"{len(faults)} of {count} GPUs cannot be read: {', '.join(sorted(set(faults.values())))}"
    return ""


def _text(value: str | None) -> str:
    return "".join(character for character in value or "" if character.isprintable())


def _cuda_version(number: int | None) -> str:
    """13000 is 13.0, 12040 is 12.4."""
    return "" if number is None else f"{number // 1000}.{number % 1000 // 10}"


_N = TypeVar("_N", int, float)


def _within(value: _N | None, limit: _N) -> _N | None:
    """`value` where it lies between 0 and `limit`; a negative temperature arrives as a huge unsigned number."""
    return value if value is not None and 0 <= value <= limit else None
