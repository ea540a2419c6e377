"""Choosing machines and GPUs. Pure: a ranking for the steward, a choice for the node, and a reason for everyone."""

import difflib
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from meshgpu.model.constraints import Fact, Facts, parse_constraint, version
from meshgpu.model.gossip import Allocation, Capacity, NodeRecord
from meshgpu.model.ids import GpuId, JobId, NodeId, UserName, display_name
from meshgpu.model.inventory import Gpu, GpuReading, Inventory, short_gpu_name, sold_gigabytes
from meshgpu.model.job import CloudUse, JobSpec, Priority, SecretBox
from meshgpu.model.lending import Lending
from meshgpu.model.resources import GB, GpuRequest, GpuShare, Resources

OFFERS: Final = 3
"""Machines asked at once: with three random ones of the best class, first tries succeed while half are free."""


class Rule(StrEnum):
    """What keeps a job away from a machine or a GPU."""

    ELSEWHERE = "elsewhere"
    """The job names another machine."""
    CLOUD = "cloud"
    """It is rented and the job may not leave the office, or it is not and the job must."""
    CLOSED = "closed"
    """The owner does not let its user in."""
    SEALED = "sealed"
    """It cannot read the job's secrets."""
    CLONED = "cloned"
    """Two agents run with its keys."""
    DOWN = "down"
    UNKNOWN = "unknown"
    """The machine has not said yet what it has."""
    LACKS = "lacks"
    """It never fits, however free it is."""
    FAULTY = "faulty"
    OWNER = "owner"
    """Its owner uses it, or has paused the lending."""
    BUSY = "busy"


@dataclass(frozen=True, slots=True)
class Room:
    """What a machine would give (`gpus`), or why it cannot (`rule` and `refusal`, then gpus is empty)."""

    gpus: tuple[GpuShare, ...] = ()
    rule: Rule | None = None
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Host:
    """A machine as constraints speak of it. name, owner: empty of one that is not rented yet."""

    inventory: Inventory
    name: str = ""
    owner: UserName = UserName("")  # noqa: RUF009  # a string

    def facts(self, gpu: Gpu | None) -> Facts:
        """Of the machine, and of one of its GPUs."""
        built_in = self.inventory
        facts: dict[str, Fact] = {
            "machine": self.name,
            "owner": self.owner,
            "cpus": float(built_in.cpus),
            "memory": built_in.memory_bytes / GB,
            "gpus": float(len(built_in.gpus)),
        }
        if built_in.driver_version:
            facts["driver"] = version(built_in.driver_version)
        if gpu is not None:
            facts |= {"name": short_gpu_name(gpu.name), "vram": float(sold_gigabytes(gpu.memory_total_bytes))}
            if gpu.compute_capability:
                facts["cc"] = version(gpu.compute_capability)
        return facts


@dataclass(frozen=True, slots=True)
class Guest:
    """What of a job decides whether a machine may run it at all. image: empty for a process.

    secrets: sealed already; None where there are none, or not yet.
    """

    user: UserName
    image: str = ""
    cloud: CloudUse = CloudUse.NEVER
    secrets: SecretBox | None = None

    @classmethod
    def of(cls, spec: JobSpec) -> "Guest":
        return cls(spec.user, spec.image, spec.cloud, spec.secrets)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A machine as it is known here. refusal: why it is out of the question before its GPUs are looked at, by `rule`.

    Of the rules, CLOSED and CLOUD hold now and later; OWNER and DOWN hold at the moment.
    """

    node: NodeId
    name: str
    record: NodeRecord | None
    capacity: Capacity | None
    refusal: str = ""
    rule: Rule | None = None
    is_rented: bool = False
    owner: UserName = UserName("")  # noqa: RUF009  # a string

    @property
    def host(self) -> Host | None:
        """None where it has not said yet what it has."""
        return Host(self.record.inventory, self.name, self.owner) if self.record is not None else None

    @property
    def is_closed(self) -> bool:
        return self.rule in (Rule.CLOSED, Rule.CLOUD)

    @property
    def is_down(self) -> bool:
        return self.rule is Rule.DOWN


@dataclass(frozen=True, slots=True)
class GpuVerdict:
    """Whether one GPU would serve now (rule is None), or what refuses and what would change that."""

    gpu: Gpu
    rule: Rule | None
    refusal: str
    remedy: str


@dataclass(frozen=True, slots=True)
class MachineVerdict:
    """Whether a machine would take a job now (rule is None) and on which GPUs, or what refuses and its remedy.

    verdicts: one for each GPU that is known there, in PCI order, whatever the machine itself says.
    """

    node: NodeId
    name: str
    rule: Rule | None
    refusal: str
    remedy: str
    gpus: tuple[GpuShare, ...]
    verdicts: tuple[GpuVerdict, ...]


def find_room(
    resources: Resources, host: Host, readings: Iterable[GpuReading], allocations: Sequence[Allocation]
) -> Room:
    """Whether the resources are free now, and on which GPUs. Counts reservations, never measured load."""
    inventory = host.inventory
    for what, unit, asked, total, taken in (
        ("processors", 1, wanted_cpus(resources), inventory.cpus, sum(a.cpus for a in allocations)),
        ("GB of memory", GB, resources.memory_bytes, inventory.memory_bytes, sum(a.memory_bytes for a in allocations)),
    ):
        asks = f"the job asks for {asked / unit:.4g}"
        if asked > total:
            return Room(rule=Rule.LACKS, refusal=f"has {total / unit:.4g} {what}, {asks}")
        if asked > total - taken:
            left = (total - taken) / unit
            return Room(rule=Rule.BUSY, refusal=f"is busy: {left:.4g} of {total / unit:.4g} {what} free, {asks}")
    too_few = _lacking(resources, host)
    if too_few:
        return Room(rule=Rule.LACKS, refusal=too_few)
    request = resources.gpus
    if request.count == 0:
        return Room()
    by_uuid = {reading.uuid: reading for reading in readings}
    rules = [_gpu_rule(resources, host, gpu, by_uuid.get(gpu.uuid), allocations) for gpu in inventory.gpus]
    free = [gpu for gpu, rule in zip(inventory.gpus, rules, strict=True) if rule is None]
    if len(free) < request.count:
        fitting = len(rules) - rules.count(Rule.LACKS)
        return Room(
            rule=next(rule for rule in (Rule.BUSY, Rule.OWNER, Rule.FAULTY) if rule in rules),
            refusal=_busy(fitting, len(free), allocations, by_uuid.values()),
        )
    free.sort(key=lambda gpu: (_left_over(request, gpu, allocations), gpu.index))
    reserved = request.memory_bytes if request.shared else 0
    chosen = sorted(free[: request.count], key=lambda gpu: gpu.index)
    return Room(gpus=tuple(GpuShare(gpu.uuid, reserved) for gpu in chosen))


def never_fits(resources: Resources, host: Host) -> str:
    """Why this machine cannot take the job even when it is idle; empty if it can."""
    return find_room(resources, host, (), ()).refusal


def _lacking(resources: Resources, host: Host) -> str:
    """Why this machine's GPUs can never be what the job wants; empty if they can once they are free."""
    request, gpus = resources.gpus, host.inventory.gpus
    if request.count == 0:
        return "" if _accepts(resources, host, None) else f"is not where the job may run: {resources.on}"
    if sum(_matches(resources, host, gpu) for gpu in gpus) >= request.count:
        return ""
    if not gpus:
        return f"has no GPU, the job asks for {request}"
    installed = ", ".join(describe_gpu(gpu) for gpu in gpus)
    return f"has {installed}; the job asks for {_wanted(resources)}"


def out_of_bounds(cloud: CloudUse, *, is_rented: bool) -> str:
    """Why a machine must not run a job because of where it stands; empty if it may."""
    if is_rented and cloud is CloudUse.NEVER:
        return "is rented, and the job may not leave the office"
    return "is in the office, and the job is for the cloud only" if not is_rented and cloud is CloudUse.ONLY else ""


def wanted_cpus(resources: Resources) -> int:
    """A job that names neither GPUs nor processors still occupies one, so that a machine can be full."""
    return resources.cpus or int(resources.gpus.count == 0)


def describe_gpu(gpu: Gpu) -> str:
    return f"{short_gpu_name(gpu.name)} {sold_gigabytes(gpu.memory_total_bytes)} GB"


@dataclass(frozen=True, slots=True)
class Clearing:
    """What a machine would give once some of its jobs have ended.

    blocking: those, as few as possible. gives_way: whether all of them agreed to be stopped for such a job.
    """

    gpus: tuple[GpuShare, ...]
    blocking: tuple[Allocation, ...]
    gives_way: bool


def clear(
    resources: Resources,
    host: Host,
    readings: Sequence[GpuReading],
    allocations: Iterable[Allocation],
    priority: Priority,
) -> Clearing | None:
    """How a machine could make room; None where that would not help. Jobs that give way are the first to go."""
    if find_room(resources, host, readings, ()).rule is not None:
        return None
    staying: list[Allocation] = []
    blocking: list[Allocation] = []
    for allocation in sorted(allocations, key=lambda a: (a.gives_way_to(priority), a.job, a.epoch)):
        fits = find_room(resources, host, readings, [*staying, allocation]).rule is None
        (staying if fits else blocking).append(allocation)
    room = find_room(resources, host, readings, staying)
    return Clearing(room.gpus, tuple(blocking), all(a.gives_way_to(priority) for a in blocking))


def clearable(spec: JobSpec, candidate: Candidate) -> Clearing | None:
    """The same, of a machine as it is known here; None also where it keeps room for another job already."""
    host, capacity = candidate.host, candidate.capacity
    if candidate.rule is not None or host is None or capacity is None:
        return None
    others = [allocation for allocation in capacity.allocations if allocation.job != spec.job]
    if any(allocation.is_kept and allocation.priority.rank >= spec.priority.rank for allocation in others):
        return None
    return clear(spec.resources, host, capacity.readings, [a for a in others if not a.is_kept], spec.priority)


def rank(
    resources: Resources, candidates: Iterable[Candidate], rng: random.Random, job: JobId | None = None
) -> list[NodeId]:
    """Machines that seem to have room, best class first, at random within a class; at most OFFERS of them.

    Class: the smallest GPU that fits comes first, so that large ones stay free for those who need them; of equal
    ones those of machines that nobody sits at. What is rented comes after all that is not. What is kept free for `job`
    is free.
    """
    classes: dict[tuple[bool, int, bool], list[NodeId]] = {}
    for candidate in candidates:
        room = _room(resources, _without(job, candidate))
        if room.rule is None and candidate.record is not None:
            size = _class(room.gpus, candidate.record.inventory)
            is_lived_in = candidate.record.lending is not Lending.DEDICATED
            classes.setdefault((candidate.is_rented, size, is_lived_in), []).append(candidate.node)
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
        room = _room(resources, candidate)
        reasons.setdefault(room.refusal or "seems to have room", []).append(candidate.name)
    if not reasons:
        return "no machine of the mesh lends anything"
    return "; ".join(f"{', '.join(sorted(names))} {reason}" for reason, names in sorted(reasons.items()))


def explain_each(
    resources: Resources, candidates: Iterable[Candidate], named: NodeId | None, job: JobId
) -> tuple[MachineVerdict, ...]:
    """What each machine would say to the job now, by name. What `job` itself holds counts as free.

    named: the only machine that may take it, None for any. No verdicts on GPUs where the job asks for none.
    """
    ordered = sorted(candidates, key=lambda candidate: candidate.name)
    return tuple(_machine_verdict(resources, _without(job, candidate), named) for candidate in ordered)


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """The name that was probably meant."""
    return next(iter(difflib.get_close_matches(name.lower(), sorted(names), n=1, cutoff=0.5)), None)


def _room(resources: Resources, candidate: Candidate) -> Room:
    """What the machine would give, as far as it is known here."""
    if candidate.rule is not None:
        return Room(rule=candidate.rule, refusal=candidate.refusal)
    host, capacity = candidate.host, candidate.capacity
    if host is None or capacity is None:
        return Room(rule=Rule.UNKNOWN, refusal="has not said yet what it has")
    return find_room(resources, host, capacity.readings, capacity.allocations)


def _without(job: JobId | None, candidate: Candidate) -> Candidate:
    """The machine as it would be without the job."""
    capacity = candidate.capacity
    if capacity is None or job is None:
        return candidate
    others = tuple(allocation for allocation in capacity.allocations if allocation.job != job)
    return replace(candidate, capacity=replace(capacity, allocations=others))


def _machine_verdict(resources: Resources, candidate: Candidate, named: NodeId | None) -> MachineVerdict:
    room = _room(resources, candidate)
    if named not in (None, candidate.node):
        room = Room(rule=Rule.ELSEWHERE, refusal="is not the machine that the job names")
    allocations = candidate.capacity.allocations if candidate.capacity else ()
    readings = {reading.uuid: reading for reading in (candidate.capacity.readings if candidate.capacity else ())}
    host = candidate.host
    gpus = host.inventory.gpus if host is not None and resources.gpus.count else ()
    return MachineVerdict(
        candidate.node,
        candidate.name,
        room.rule,
        room.refusal,
        _remedy(room.rule, allocations),
        room.gpus,
        tuple(_gpu_verdict(resources, host, gpu, readings.get(gpu.uuid), allocations) for gpu in gpus) if host else (),
    )


def _gpu_verdict(
    resources: Resources, host: Host, gpu: Gpu, reading: GpuReading | None, allocations: Sequence[Allocation]
) -> GpuVerdict:
    rule, request = _gpu_rule(resources, host, gpu, reading, allocations), resources.gpus
    holding = [a for a in allocations if any(share.uuid == gpu.uuid for share in a.gpus)]
    refusal = ""
    if rule is Rule.LACKS:
        refusal = f"is {describe_gpu(gpu)}, the job asks for {_wanted(resources)}"
    elif reading is not None and rule in (Rule.FAULTY, Rule.OWNER):
        refusal = reading.fault or reading.withheld
    elif rule is Rule.BUSY:
        shares = _shares(gpu.uuid, allocations)
        is_shared = request.shared and not any(share.is_whole for share in shares)
        left = f"{(gpu.memory_total_bytes - _reserved(shares)) / GB:.1f} GB free, " if is_shared else ""
        refusal = left + _holders(holding)
    return GpuVerdict(gpu, rule, refusal, _remedy(rule, holding))


def _remedy(rule: Rule | None, holding: Collection[Allocation]) -> str:
    """What would change a refusal."""
    match rule:
        case None:
            return ""
        case Rule.ELSEWHERE:
            return "run it without -m"
        case Rule.CLOUD:
            return "run it with another --cloud"
        case Rule.CLOSED:
            return "its owner lets you in"
        case Rule.SEALED:
            return "run it anew: secrets are sealed to the machines of that moment"
        case Rule.CLONED:
            return "one of the two is stopped (see meshgpu doctor)"
        case Rule.DOWN:
            return "it answers again (is it on?)"
        case Rule.UNKNOWN:
            return "it has read its hardware, within seconds"
        case Rule.LACKS:
            return "ask for less: -g, --cpus, --memory, --on"
        case Rule.OWNER:
            return "its owner leaves it (there: meshgpu resume, or the program that uses the GPU ends)"
        case Rule.FAULTY:
            return "the fault is mended (there: meshgpu doctor)"
        case Rule.BUSY:
            return f"end of {_names(holding)}" if holding else "it has room again"


def _gpu_rule(
    resources: Resources, host: Host, gpu: Gpu, reading: GpuReading | None, allocations: Iterable[Allocation]
) -> Rule | None:
    """What keeps one GPU from serving now; None if it would."""
    if not _matches(resources, host, gpu):
        return Rule.LACKS
    if reading is not None and reading.fault:
        return Rule.FAULTY
    if reading is not None and reading.withheld:
        return Rule.OWNER
    return None if _is_free(resources.gpus, gpu, allocations) else Rule.BUSY


def _matches(resources: Resources, host: Host, gpu: Gpu) -> bool:
    # Firmware keeps some memory back: a "24 GB" card must pass `-g 24GB`, which counts 10⁹ bytes.
    request = resources.gpus
    is_large_enough = gpu.memory_total_bytes >= request.memory_bytes
    is_of_model = request.model in short_gpu_name(gpu.name).lower()
    return is_large_enough and is_of_model and _accepts(resources, host, gpu)


def _accepts(resources: Resources, host: Host, gpu: Gpu | None) -> bool:
    """Whether the job's constraint holds there."""
    return not resources.on or parse_constraint(resources.on).holds(host.facts(gpu))


def _wanted(resources: Resources) -> str:
    """The request for GPUs as people write it: `1 where vram>=24GB`."""
    return f"{resources.gpus} where {resources.on}" if resources.on else str(resources.gpus)


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


def _busy(fitting: int, free: int, allocations: Iterable[Allocation], readings: Iterable[GpuReading]) -> str:
    holders = _holders([a for a in allocations if a.gpus])
    reasons = {reading.fault or reading.withheld for reading in readings} - {""}
    why = "; ".join([holders] * bool(holders) + sorted(reasons))
    return f"is busy: {free} of {fitting} GPUs free" + (f", {why}" if why else "")


def _holders(allocations: Collection[Allocation]) -> str:
    """`taken by train-k7q (ada), kept free for sweep-b26 (bob)`; empty where there are none."""
    taken, kept = (_names(a for a in allocations if a.is_kept is is_kept) for is_kept in (False, True))
    return ", ".join([f"taken by {taken}"] * bool(taken) + [f"kept free for {kept}"] * bool(kept))


def _names(allocations: Iterable[Allocation]) -> str:
    return ", ".join(sorted({f"{display_name(a.name, a.job)} ({a.user})" for a in allocations}))
