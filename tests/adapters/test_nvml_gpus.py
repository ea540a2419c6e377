"""The real pynvml code over a fake driver library (tests/fake_nvml)."""

import asyncio
import ctypes
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest

from meshgpu.adapters.nvml_gpus import NvmlGpus, memory_bytes
from meshgpu.model.ids import GpuId
from meshgpu.model.inventory import DRIVER_SILENT, Gpu, GpuProcess, GpuReading, Inventory, ProcessKind

FAKE = Path(__file__).parent.parent / "fake_nvml"
TWO_GPUS = (FAKE / "two_gpus.txt").read_text()
FIRST = GpuId("GPU-51a10000-0000-4000-8000-000000000001")
SECOND = GpuId("GPU-51a10000-0000-4000-8000-000000000002")
LIBRARY_NOT_FOUND, NOT_SUPPORTED, NO_PERMISSION, LOST, RESET_REQUIRED, MISMATCH = 12, 3, 4, 15, 16, 18
DEADLINE_S = 20.0

Sample = tuple[Inventory, tuple[GpuReading, ...]]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def compile_library(*flags: str) -> Path:
        directory = tmp_path_factory.getbasetemp() / "-".join(("nvml", *flags))
        subprocess.run([sys.executable, FAKE / "build.py", directory, *flags], check=True, timeout=DEADLINE_S)
        return directory / "libnvidia-ml.so.1"

    return compile_library


class Driver:
    """The machine's NVIDIA driver: which library there is, and what the file behind it says."""

    def __init__(self, library: Path, facts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.facts = facts
        self.monkeypatch = monkeypatch
        monkeypatch.setenv("FAKE_NVML", str(facts))
        self.use_library(library)

    def use_library(self, library: Path) -> None:
        self.monkeypatch.setattr(pynvml, "CDLL", lambda _: ctypes.CDLL(str(library)))
        self.monkeypatch.setattr(pynvml, "nvmlLib", None)
        self.monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})

    def write(self, facts: str | bytes) -> None:
        unfinished = self.facts.with_suffix(".new")
        unfinished.write_bytes(facts.encode() if isinstance(facts, str) else facts)
        unfinished.replace(self.facts)


@pytest.fixture
def driver(build: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    fake = Driver(build(), tmp_path / "gpus.txt", monkeypatch)
    fake.write(TWO_GPUS)
    yield fake
    for thread in threading.enumerate():
        assert thread.name != "nvml", "the sampling thread outlived its probe"


class Probe:
    """A started NvmlGpus and everything that it told."""

    def __init__(self, **periods: float) -> None:
        self.samples: list[Sample] = []
        self._news = asyncio.Event()
        self._gpus = NvmlGpus(**{"sample_period_s": 0.01, "retry_period_s": 0.01, "silence_limit_s": 10.0} | periods)

    async def __aenter__(self) -> "Probe":
        await self._gpus.start(self._emit)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._gpus.stop()

    def _emit(self, inventory: Inventory, readings: tuple[GpuReading, ...]) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.samples.append((inventory, readings))
        self._news.set()

    async def until(self, holds: Callable[[Inventory, tuple[GpuReading, ...]], Any]) -> Sample:
        async with asyncio.timeout(DEADLINE_S):
            while not holds(*self.samples[-1]):
                self._news.clear()
                await self._news.wait()
        return self.samples[-1]


async def first_sample() -> Sample:
    async with Probe() as probe:
        return probe.samples[0]


async def test_facts_of_two_gpus(driver: Driver) -> None:
    inventory, readings = await first_sample()
    assert inventory.gpus == (
        Gpu(FIRST, 0, "Simulated RTX 4090", 24564 << 20, "8.9", "00000000:01:00.0"),
        Gpu(SECOND, 1, "Simulated RTX 3060", 12288 << 20, "8.6", "00000000:41:00.0"),
    )
    assert (inventory.driver_version, inventory.cuda_version, inventory.gpu_note) == ("580.105.08", "13.0", "")
    assert readings == (
        GpuReading(FIRST, 23540 << 20, 37, 61, 143.0, 450.0),
        GpuReading(SECOND, 12032 << 20, 0, 33, 19.0, 170.0),
    )


async def test_processors_and_memory_are_those_of_this_machine(driver: Driver) -> None:
    inventory, _ = await first_sample()
    assert inventory.cpus == len(os.sched_getaffinity(0))
    assert inventory.memory_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_unknown_where_the_kernel_does_not_tell() -> None:
    assert memory_bytes("MemTotal:       1000 kB\nMemFree:  1 kB\n") == 1_024_000
    assert memory_bytes("MemFree:  1 kB\n") == 0


def test_unmodified_pynvml_finds_the_library_by_its_path(build: Callable[..., Path]) -> None:
    program = (
        "import asyncio, json\n"
        "from meshgpu.adapters.nvml_gpus import NvmlGpus\n"
        "async def main():\n"
        "    gpus = NvmlGpus()\n"
        "    await gpus.start(lambda inventory, _: print(json.dumps([gpu.name for gpu in inventory.gpus])))\n"
        "    await gpus.stop()\n"
        "asyncio.run(main())\n"
    )
    environment = os.environ | {"LD_LIBRARY_PATH": str(build().parent), "FAKE_NVML": str(FAKE / "two_gpus.txt")}
    command = [sys.executable, "-W", "error", "-c", program]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, timeout=DEADLINE_S).stdout
    assert json.loads(output) == ["Simulated RTX 4090", "Simulated RTX 3060"]


@pytest.mark.parametrize(
    ("function", "fact"),
    [
        ("nvmlDeviceGetMemoryInfo", "memory_free_bytes"),
        ("nvmlDeviceGetUtilizationRates", "utilization_percent"),
        ("nvmlDeviceGetTemperature", "temperature_c"),
        ("nvmlDeviceGetPowerUsage", "power_w"),
        ("nvmlDeviceGetEnforcedPowerLimit", "power_limit_w"),
    ],
)
@pytest.mark.parametrize("code", [NOT_SUPPORTED, 999, 12345])
async def test_a_reading_that_the_driver_does_not_tell_is_unknown(
    driver: Driver, function: str, fact: str, code: int
) -> None:
    driver.write(f"fail {function}={code}\n{TWO_GPUS}")
    _, (reading, _) = await first_sample()
    facts = ["memory_free_bytes", "utilization_percent", "temperature_c", "power_w", "power_limit_w"]
    assert [name for name in facts if getattr(reading, name) is None] == [fact]
    assert reading.fault == ""


@pytest.mark.parametrize(
    ("function", "fact", "unknown"),
    [
        ("nvmlDeviceGetName", "name", ""),
        ("nvmlDeviceGetMemoryInfo", "memory_total_bytes", 0),
        ("nvmlDeviceGetCudaComputeCapability", "compute_capability", ""),
        ("nvmlDeviceGetPciInfo", "pci_bus", ""),
    ],
)
async def test_a_part_of_the_inventory_that_the_driver_does_not_tell_is_empty(
    driver: Driver, function: str, fact: str, unknown: object
) -> None:
    driver.write(f"fail {function}={NOT_SUPPORTED}\n{TWO_GPUS}")
    inventory, _ = await first_sample()
    assert [gpu.uuid for gpu in inventory.gpus] == [FIRST, SECOND]
    assert getattr(inventory.gpus[0], fact) == unknown


async def test_versions_that_the_driver_does_not_tell_are_empty(driver: Driver) -> None:
    driver.write(f"fail nvmlSystemGetDriverVersion=3\nfail nvmlSystemGetCudaDriverVersion=3\n{TWO_GPUS}")
    inventory, _ = await first_sample()
    assert (inventory.driver_version, inventory.cuda_version, len(inventory.gpus)) == ("", "", 2)


async def test_gpus_are_in_the_order_of_their_bus(driver: Driver) -> None:
    driver.write(TWO_GPUS.replace("00000000:01:00.0", "00000000:81:00.0"))
    inventory, readings = await first_sample()
    assert [(gpu.uuid, gpu.index) for gpu in inventory.gpus] == [(SECOND, 0), (FIRST, 1)]
    assert [reading.uuid for reading in readings] == [SECOND, FIRST]


PROCESSES = "proc c 4242 500\nproc g 3107 900\nproc g 1201 412\nproc c 77 -\n"
EXPECTED_PROCESSES = (
    GpuProcess(77, ProcessKind.COMPUTE, None),
    GpuProcess(4242, ProcessKind.COMPUTE, 500 << 20),
    GpuProcess(1201, ProcessKind.GRAPHICS, 412 << 20),
    GpuProcess(3107, ProcessKind.GRAPHICS, 900 << 20),
)


async def test_processes_of_both_kinds(driver: Driver) -> None:
    driver.write(TWO_GPUS + PROCESSES)
    _, (first, second) = await first_sample()
    assert first.processes == ()
    assert second.processes == EXPECTED_PROCESSES


async def test_an_old_driver_tells_its_processes_by_the_old_call(driver: Driver, build: Callable[..., Path]) -> None:
    driver.use_library(build("-DOLD_DRIVER"))
    driver.write(TWO_GPUS + PROCESSES)
    _, (_, second) = await first_sample()
    assert second.processes == EXPECTED_PROCESSES


async def test_facts_are_followed_while_the_agent_runs(driver: Driver) -> None:
    async with Probe() as probe:
        driver.write(TWO_GPUS.replace("temp 61", "temp 84") + "proc c 4242 500\n")
        await probe.until(lambda _, readings: readings[0].temperature_c == 84 and readings[1].processes)


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (f"fail nvmlDeviceGetHandleByIndex={LOST}", "lost: reset the machine"),
        (f"fail nvmlDeviceGetUUID={LOST}", "lost: reset the machine"),
        (f"fail nvmlDeviceGetUtilizationRates={LOST}\nfail nvmlDeviceGetName={LOST}", "lost: reset the machine"),
        (f"fail nvmlDeviceGetTemperature={RESET_REQUIRED}", "stuck: reset the GPU"),
    ],
)
async def test_a_lost_gpu_stays_in_the_inventory_with_its_fault(driver: Driver, broken: str, fault: str) -> None:
    async with Probe() as probe:
        healthy, _ = probe.samples[0]
        driver.write(TWO_GPUS.replace("temp 61", f"temp 61\n{broken}"))
        inventory, readings = await probe.until(lambda _, readings: readings[0].fault)
        assert inventory == healthy
        assert readings[0] == GpuReading(FIRST, fault=fault)
        assert readings[1].temperature_c == 33
        driver.write(TWO_GPUS)
        await probe.until(lambda _, readings: readings[0].temperature_c == 61)


async def test_a_gpu_that_vanishes_stays_in_the_inventory(driver: Driver) -> None:
    async with Probe() as probe:
        driver.write(TWO_GPUS[: TWO_GPUS.rindex("[gpu]")])
        inventory, readings = await probe.until(lambda _, readings: readings[1].fault)
        assert [gpu.uuid for gpu in inventory.gpus] == [FIRST, SECOND]
        assert readings[1].fault == "lost: the driver no longer lists it"


async def test_a_gpu_that_was_never_seen_whole_is_noted(driver: Driver) -> None:
    driver.write(TWO_GPUS + f"fail nvmlDeviceGetHandleByIndex={LOST}\n")
    inventory, readings = await first_sample()
    assert [gpu.uuid for gpu in inventory.gpus] == [reading.uuid for reading in readings] == [FIRST]
    assert inventory.gpu_note == "1 of 2 GPUs cannot be read: lost: reset the machine"


@pytest.mark.parametrize(
    ("code", "note"),
    [
        (9, "the NVIDIA driver is not loaded"),
        (LIBRARY_NOT_FOUND, "no NVIDIA driver found"),
        (MISMATCH, "the NVIDIA driver and its library do not match: reboot the machine"),
        (NO_PERMISSION, "no permission to use the NVIDIA driver: check /dev/nvidiactl"),
        (777, "the NVIDIA driver answers with error 777"),
    ],
)
@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetCount"])
async def test_a_driver_that_refuses_is_an_empty_inventory_with_a_note(
    driver: Driver, function: str, code: int, note: str
) -> None:
    driver.write(f"fail {function}={code}\n{TWO_GPUS}")
    inventory, readings = await first_sample()
    assert (inventory.gpus, readings, inventory.gpu_note) == ((), (), note)
    assert inventory.cpus > 0


async def test_a_driver_that_is_not_loaded_is_noted(driver: Driver) -> None:
    driver.facts.unlink()
    inventory, _ = await first_sample()
    assert inventory.gpu_note == "the NVIDIA driver is not loaded"


async def test_a_machine_without_the_library_is_noted(driver: Driver) -> None:
    driver.use_library(Path("/nowhere/libnvidia-ml.so.1"))
    inventory, _ = await first_sample()
    assert inventory.gpu_note == "no NVIDIA driver found"


async def test_bindings_that_do_not_fit_the_library_are_noted(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise pynvml.NVMLLibraryMismatchError

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", refuse)
    inventory, _ = await first_sample()
    assert inventory.gpu_note == "the NVIDIA driver and its library do not match: reboot the machine"


async def test_a_driver_without_gpus_is_noted(driver: Driver) -> None:
    driver.write("driver 580.105.08\ncuda 12040\n")
    inventory, _ = await first_sample()
    assert (inventory.gpu_note, inventory.cuda_version) == ("no NVIDIA GPU found", "12.4")


async def test_a_driver_that_comes_and_goes_is_followed(driver: Driver) -> None:
    driver.facts.unlink()
    async with Probe() as probe:
        driver.write(TWO_GPUS)
        await probe.until(lambda inventory, _: len(inventory.gpus) == 2)
        driver.facts.unlink()
        inventory, readings = await probe.until(lambda inventory, _: not inventory.gpus)
        assert (readings, inventory.gpu_note) == ((), "the NVIDIA driver is not loaded")
        driver.write(TWO_GPUS)
        await probe.until(lambda inventory, _: len(inventory.gpus) == 2 and not inventory.gpu_note)


async def test_a_library_that_is_installed_later_is_found(driver: Driver, build: Callable[..., Path]) -> None:
    driver.use_library(Path("/nowhere/libnvidia-ml.so.1"))
    async with Probe() as probe:
        driver.use_library(build())
        await probe.until(lambda inventory, _: len(inventory.gpus) == 2)


async def test_without_gpus_the_driver_is_asked_less_often(driver: Driver) -> None:
    driver.facts.unlink()
    async with Probe(sample_period_s=0.001, retry_period_s=3600.0) as probe:
        driver.write(TWO_GPUS)
        await asyncio.sleep(0.1)  # nothing can be awaited: the claim is that nothing happens
        assert len(probe.samples) == 1


MIG = """
[gpu]
name Simulated A100
uuid GPU-a100
bus 00000000:05:00.0
cc 8.0
total_mib 40960
power_mw 90000
mig 1
"""
INSTANCES = """
[mig]
name Simulated A100 MIG 3g.20gb
uuid MIG-1
total_mib 20096
fail nvmlDeviceGetUtilizationRates=3
[mig]
name Simulated A100 MIG 1g.5gb
uuid MIG-2
total_mib 4864
"""


async def test_a_gpu_split_by_mig_is_its_instances(driver: Driver) -> None:
    driver.write(MIG + INSTANCES + TWO_GPUS)
    async with Probe() as probe:
        inventory, readings = probe.samples[0]
        assert [gpu.uuid for gpu in inventory.gpus] == [FIRST, "MIG-1", "MIG-2", SECOND]
        assert inventory.gpus[1] == Gpu(
            GpuId("MIG-1"), 1, "Simulated A100 MIG 3g.20gb", 20096 << 20, "8.0", "00000000:05:00.0"
        )
        assert (readings[1].utilization_percent, readings[1].power_w) == (None, 90.0)
        driver.write(MIG + "[mig]\nuuid MIG-3\n" + TWO_GPUS)
        await probe.until(lambda inventory, _: [gpu.uuid for gpu in inventory.gpus] == [FIRST, "MIG-3", SECOND])


async def test_a_gpu_in_mig_mode_without_instances_cannot_be_used(driver: Driver) -> None:
    driver.write(MIG)
    inventory, readings = await first_sample()
    assert [gpu.name for gpu in inventory.gpus] == ["Simulated A100"]
    assert readings[0].fault == "MIG is on, without instances"


@pytest.mark.parametrize(
    "nonsense",
    [
        b"[gpu]\nname \xff\xfe\xfa\nuuid GPU-1\n",
        b"[gpu]\nuuid \xff\xfe\n",
        b"[gpu]\nuuid GPU-1\nbus \xff\xff\n",
        b"[gpu]\nuuid GPU-1\nproc c 1 1\nclaim_procs 4000000000\n",
        b"[gpu]\nuuid GPU-1\nutil 4294967295\ntemp 4294967290\npower_mw 4294967295\nlimit_mw 4294967295\n",
        b"[gpu]\nuuid GPU-1\ntotal_mib 17592186044415\nused_mib 1\n",
        b"[gpu]\nuuid GPU-1\n[gpu]\nuuid GPU-1\n",
        b"cuda -1\ndriver \xff\xff\n[gpu]\nuuid \n",
        b"\x00\xff\n" * 100,
    ],
)
async def test_nonsense_is_unknown_and_never_ends_the_probe(driver: Driver, nonsense: bytes) -> None:
    async with Probe() as probe:
        driver.write(nonsense)
        taken = len(probe.samples)
        inventory, readings = await probe.until(lambda *_: len(probe.samples) > taken + 1)
        for reading in readings:
            assert (reading.utilization_percent or 0) <= 100
            assert (reading.temperature_c or 0) <= 200
            assert (reading.power_w or 0) <= 100_000
        assert len({gpu.uuid for gpu in inventory.gpus}) == len(inventory.gpus) == len(readings)
        driver.write(TWO_GPUS)
        await probe.until(lambda _, readings: any(reading.temperature_c == 61 for reading in readings))


async def test_a_driver_that_hangs_does_not_hold_up_the_start(driver: Driver) -> None:
    driver.write("slow nvmlInit=500\n" + TWO_GPUS)
    async with Probe(silence_limit_s=0.05) as probe:
        inventory, readings = probe.samples[0]
        assert (inventory.gpus, readings, inventory.gpu_note) == ((), (), DRIVER_SILENT)
        await probe.until(lambda inventory, _: len(inventory.gpus) == 2 and not inventory.gpu_note)


async def test_gpus_of_a_driver_that_hangs_have_a_fault_until_it_answers(driver: Driver) -> None:
    async with Probe(silence_limit_s=0.2) as probe:
        driver.write("slow nvmlDeviceGetTemperature=800\n" + TWO_GPUS)
        inventory, readings = await probe.until(lambda _, readings: readings[0].fault)
        assert [gpu.uuid for gpu in inventory.gpus] == [FIRST, SECOND]
        assert [reading.fault for reading in readings] == [DRIVER_SILENT, DRIVER_SILENT]
        driver.write(TWO_GPUS)
        await probe.until(lambda _, readings: not readings[0].fault)


async def test_nothing_is_told_once_stop_is_called_in_the_middle_of_a_sample(driver: Driver) -> None:
    driver.write("slow nvmlDeviceGetTemperature=50\n" + TWO_GPUS)
    async with Probe(sample_period_s=0.0, silence_limit_s=0.3) as probe:
        taken = len(probe.samples)
        await probe.until(lambda *_: len(probe.samples) > taken)
        told = len(probe.samples)
    await asyncio.sleep(0.5)  # nothing can be awaited: the claim is that nothing happens
    assert len(probe.samples) == told
