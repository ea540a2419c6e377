"""Choosing machines and GPUs. Pure: a ranking for the steward, a choice for the node, and a reason for everyone."""

import difflib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from meshgpu.model.gossip import Allocation, Capacity, NodeRecord
from meshgpu.model.ids import GpuId, NodeId
from meshgpu.model.inventory import Gpu, GpuReading, Inventory, short_gpu_name, sold_gigabytes
from meshgpu.model.resources import GB, GpuRequest, GpuShare, Resources

OFFERS: Final = 3
"""Machines asked at once: with three random ones of the best class, first tries succeed while half are free."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a machine would give (`gpus`), or why it cannot (`refusal`, then gpus is empty)."""

    gpus: tuple[GpuShare, ...] = ()
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A machine as it is known here. refusal: why it is out of the question before its GPUs are looked at.

    is_closed: its owner does not let this user in, now or later. is_down: it does not answer at the moment.
    """

    node: NodeId
    name: str
    record: NodeRecord | None
    capacity: Capacity | None
    refusal: str = ""
    is_closed: bool = False
    is_down: bool = False


def find_room(
    resources: Resources, inventory: Inventory, readings: Iterable[GpuReading], allocations: Sequence[Allocation]
) -> Room:
    """Whether the resources are free now, and on which GPUs. Counts reservations, never measured load."""
    for what, asked, total, taken in (
        ("processors", wanted_cpus(resources), inventory.cpus, sum(a.cpus for a in allocations)),
        ("bytes of memory", resources.memory_bytes, inventory.memory_bytes, sum(a.memory_bytes for a in allocations)),
    ):
        if asked > total:
            return Room(refusal=f"has {total} {what}, the job asks for {asked}")
        if asked > total - taken:
            return Room(refusal=f"is busy: {total - taken} of {total} {what} free, the job asks for {asked}")
    request = resources.gpus
    if request.count == 0:
        return Room()
    too_few = lacking(request, inventory)
    if too_few:
        return Room(refusal=too_few)
    faults = {reading.uuid: reading.fault for reading in readings if reading.fault}
    fitting = [gpu for gpu in inventory.gpus if _matches(request, gpu)]
    free = [gpu for gpu in fitting if gpu.uuid not in faults and _is_free(request, gpu, allocations)]
    if len(free) < request.count:
        return Room(refusal=_busy(len(fitting), len(free), allocations, faults))
    free.sort(key=lambda gpu: (_left_over(request, gpu, allocations), gpu.index))
    reserved = request.memory_bytes if request.shared else 0
    chosen = sorted(free[: request.count], key=lambda gpu: gpu.index)
    return Room(gpus=tuple(GpuShare(gpu.uuid, reserved) for gpu in chosen))


def lacking(request: GpuRequest, inventory: Inventory) -> str:
    """Why this machine can never satisfy the request; empty if it can once it is free."""
    fitting = sum(_matches(request, gpu) for gpu in inventory.gpus)
    if fitting >= request.count:
        return ""
    if not inventory.gpus:
        return f"has no GPU, the job asks for {request}"
    installed = ", ".join(describe_gpu(gpu) for gpu in inventory.gpus)
    return f"has {installed}; the job asks for {request}"


def wanted_cpus(resources: Resources) -> int:
    """A job that names neither GPUs nor processors still occupies one, so that a machine can be full."""
    return resources.cpus or int(resources.gpus.count == 0)


def describe_gpu(gpu: Gpu) -> str:
    return f"{short_gpu_name(gpu.name)} {sold_gigabytes(gpu.memory_total_bytes)} GB"


def rank(resources: Resources, candidates: Iterable[Candidate], rng: random.Random) -> list[NodeId]:
    """Machines that seem to have room, best class first, at random within a class; at most OFFERS of them.

    Class: the smallest GPU that fits comes first, so that large ones stay free for those who need them.
    """
    classes: dict[int, list[NodeId]] = {}
    for candidate in candidates:
        record, capacity = candidate.record, candidate.capacity
        if candidate.refusal or record is None or capacity is None:
            continue
        room = find_room(resources, record.inventory, capacity.readings, capacity.allocations)
        if not room.refusal:
            classes.setdefault(_class(room.gpus, record.inventory), []).append(candidate.node)
    ranked: list[NodeId] = []
    for key in sorted(classes):
        members = sorted(classes[key])
        rng.shuffle(members)
        ranked.extend(members)
    return ranked[:OFFERS]


def explain(resources: Resources, candidates: Iterable[Candidate]) -> str:
    """One line: why no machine takes the job now. Names each machine when they are few."""
    reasons: dict[str, list[str]] = {}
    for candidate in candidates:
        record, capacity = candidate.record, candidate.capacity
        reason = candidate.refusal
        if not reason and record is not None and capacity is not None:
            reason = find_room(resources, record.inventory, capacity.readings, capacity.allocations).refusal
        reasons.setdefault(reason or "has not said yet what it has", []).append(candidate.name)
    if not reasons:
        return "no machine of the mesh lends anything"
    return "; ".join(f"{', '.join(sorted(names))} {reason}" for reason, names in sorted(reasons.items()))


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """The name that was probably meant."""
    return next(iter(difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.5)), None)


def _matches(request: GpuRequest, gpu: Gpu) -> bool:
    # Firmware keeps some memory back: a "24 GB" card must pass `-g 24GB`, which counts 10⁹ bytes.
    is_large_enough = gpu.memory_total_bytes >= request.memory_bytes
    return is_large_enough and request.model in short_gpu_name(gpu.name).lower()


def _is_free(request: GpuRequest, gpu: Gpu, allocations: Iterable[Allocation]) -> bool:
    shares = _shares(gpu.uuid, allocations)
    if not request.shared:
        return not shares
    return (
        not any(share.is_whole for share in shares)
        and _reserved(shares) + request.memory_bytes <= gpu.memory_total_bytes
    )


def _left_over(request: GpuRequest, gpu: Gpu, allocations: Iterable[Allocation]) -> int:
    """Bytes that stay unused: the tightest fit wins."""
    return gpu.memory_total_bytes - _reserved(_shares(gpu.uuid, allocations)) - request.memory_bytes


def _shares(uuid: GpuId, allocations: Iterable[Allocation]) -> list[GpuShare]:
    return [share for allocation in allocations for share in allocation.gpus if share.uuid == uuid]


def _reserved(shares: Iterable[GpuShare]) -> int:
    return sum(share.memory_bytes for share in shares)


def _class(gpus: tuple[GpuShare, ...], inventory: Inventory) -> int:
    """Decimal gigabytes of the largest GPU given: machines of one class are alike to the job."""
    chosen = {share.uuid for share in gpus}
    return max((gpu.memory_total_bytes // GB for gpu in inventory.gpus if gpu.uuid in chosen), default=0)


def _busy(fitting: int, free: int, allocations: Iterable[Allocation], faults: dict[GpuId, str]) -> str:
    holders = sorted({f"{a.name}-{a.job[:3]} ({a.user})" for a in allocations if a.gpus})
    why = f"taken by {', '.join(holders)}" if holders else "; ".join(sorted(set(faults.values())))
    return f"is busy: {free} of {fitting} GPUs free" + (f", {why}" if why else "")
