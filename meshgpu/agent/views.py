"""What the control API says of machines, jobs and renting, as JSON documents."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from meshgpu.core.burst.plan import Plan
from meshgpu.core.burst.planner import BurstStatus
from meshgpu.core.burst.rental import member_name
from meshgpu.core.jobs.placement import GpuVerdict, MachineVerdict
from meshgpu.core.node import MachineView, Node
from meshgpu.model.clock import Now
from meshgpu.model.cloud import Instance, InstanceState
from meshgpu.model.gossip import Allocation, MemberState
from meshgpu.model.ids import GpuId, JobId, NodeId, display_name
from meshgpu.model.inventory import Gpu, GpuReading
from meshgpu.model.job import AttemptState, JobSpec, JobState, JobView, Register, quorum
from meshgpu.model.records import LaunchRecord
from meshgpu.model.sweep import Metric, Objective, Space
from meshgpu.model.trust import Member

Document = dict[str, Any]


def machine_document(view: MachineView) -> Document:
    member, record, capacity = view.member, view.record, view.capacity
    inventory = record.inventory if record else None
    readings = {reading.uuid: reading for reading in capacity.readings} if capacity else {}
    allocations = capacity.allocations if capacity else ()
    return {
        "name": member.name,
        "id": member.node,
        "state": view.state.value,
        "self": view.is_self,
        "roles": [member.role.value],
        "owner": member.owner,
        "cpus": inventory.cpus if inventory else None,
        "memory_bytes": inventory.memory_bytes if inventory else None,
        "fence": record.fence if record else "",
        "lending": record.lending.value if record else "",
        "paused": record is not None and record.pause is not None,
        "paused_until": record.pause.until_wall_s if record and record.pause else None,
        "gpu_note": inventory.gpu_note if inventory else "",
        "down_s": view.down_s,
        "heard_s": view.heard_s,
        "capacity_s": view.capacity_s,
        "jobs": sum(not allocation.is_kept for allocation in allocations),
        "doubted_by": list(view.doubted_by),
        "cloned": view.is_cloned,
        "version": record.agent_version if record else "",
        "address": record.addresses[0] if record and record.addresses else "",
        "load": capacity.load if capacity else None,
        "gpus": [
            _gpu_document(gpu, readings.get(gpu.uuid), allocations) for gpu in (inventory.gpus if inventory else ())
        ],
    }


def _gpu_document(gpu: Gpu, reading: GpuReading | None, allocations: tuple[Allocation, ...]) -> Document:
    jobs = [
        {"id": a.job, "display": display_name(a.name, a.job), "user": a.user, "waits": a.is_kept}
        for a in allocations
        if any(share.uuid == gpu.uuid for share in a.gpus)
    ]
    return {
        "index": gpu.index,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "memory_total_bytes": gpu.memory_total_bytes,
        "memory_free_bytes": reading.memory_free_bytes if reading else None,
        "utilization_percent": reading.utilization_percent if reading else None,
        "temperature_c": reading.temperature_c if reading else None,
        "power_w": reading.power_w if reading else None,
        "compute_capability": gpu.compute_capability,
        "fault": reading.fault if reading else "",
        "withheld": reading.withheld if reading else "",
        "jobs": jobs,
    }


def verdict_document(verdict: MachineVerdict) -> Document:
    """What one machine would say to a job now."""
    return {
        "name": verdict.name,
        "takes": verdict.rule is None,
        "rule": verdict.rule.value if verdict.rule else None,
        "refusal": verdict.refusal,
        "remedy": verdict.remedy,
        "gives": [share.uuid for share in verdict.gpus],
        "gpus": [_gpu_verdict_document(gpu) for gpu in verdict.verdicts],
    }


def _gpu_verdict_document(verdict: GpuVerdict) -> Document:
    return {
        "index": verdict.gpu.index,
        "uuid": verdict.gpu.uuid,
        "name": verdict.gpu.name,
        "memory_total_bytes": verdict.gpu.memory_total_bytes,
        "takes": verdict.rule is None,
        "rule": verdict.rule.value if verdict.rule else None,
        "refusal": verdict.refusal,
        "remedy": verdict.remedy,
    }


class JobDocuments:
    """Turns jobs into documents with the names that this node knows for machines and GPUs."""

    def __init__(self, node: Node, now: Now) -> None:
        self._now = now
        self._members: Mapping[NodeId, Member] = node.log.members
        self._node = node
        self._gpus: dict[GpuId, Gpu] = {
            gpu.uuid: gpu
            for view in node.machines(now)
            if view.record is not None
            for gpu in view.record.inventory.gpus
        }

    def document(self, view: JobView, display: str | None = None) -> Document:
        spec, register = view.spec, view.register
        result = register.result
        return {
            "id": spec.job,
            "display": display or display_name(spec.name, spec.job),
            "name": spec.name,
            "user": spec.user,
            "state": register.state.value,
            "phase": register.phase.value if register.phase else None,
            "detail": register.detail,
            "machine": self._name(register.node),
            "epoch": register.epoch,
            "exit_code": result.exit_code if result else None,
            "reason": self._too_few(view) or register.reason,
            "submitted_at": register.submitted_wall_s,
            "started_at": register.started_wall_s,
            "ended_at": register.ended_wall_s,
            "command": command_text(spec),
            "gpus": [self._gpu(share.uuid, share.memory_bytes) for share in register.gpus],
            "gpu_request": str(spec.resources.gpus),
            "on": spec.resources.on,
            "priority": spec.priority.value,
            "preemptible": spec.preemptible,
            "out_of_touch_s": self._out_of_touch(register),
            "held_by": [self._name(node) for node in spec.stewards],
            "output_files": result.output_files if result else 0,
            "output_bytes": result.output_bytes if result else 0,
            "tree_files": spec.tree_files,
            "tree_bytes": spec.tree_bytes,
            "requested_machine": self._name(spec.machine),
            "cloud": spec.cloud.value,
            "retries": spec.retries,
            "died": register.died,
            "metric": _metric_document(register.metric, spec.objective),
            "sweep": view.sweep.job if view.sweep else None,
            "trial": _trial_document(view),
            "space": _space_document(spec.sweep),
            "secrets": list(spec.secrets.names) if spec.secrets else [],
            "shared": spec.shared,
            "timeout_s": spec.timeout_s,
            "start_by": _start_by(view),
            "timed_out": result is not None and result.outcome is AttemptState.TIMED_OUT,
        }

    def _name(self, node: NodeId | None) -> str | None:
        member = self._members.get(node) if node else None
        return member.name if member else None

    def _too_few(self, view: JobView) -> str:
        """Why nothing about the job can change now: most of the machines that hold it are away. Empty while they are
        not, or it is over.
        """
        stewards = view.spec.stewards
        current = self._node.log.current
        away = [node for node in stewards if self._node.state(current(node)) is MemberState.DOWN]
        if view.register.state.is_final or len(stewards) - len(away) >= quorum(stewards):
            return ""
        names = ", ".join(self._name(node) or "a machine that left" for node in away)
        verb = "is" if len(away) == 1 else "are"
        return f"{names} {verb} away, and with that {len(away)} of {len(stewards)} that hold it"

    def _gpu(self, uuid: GpuId, memory_bytes: int) -> Document:
        gpu = self._gpus.get(uuid)
        total = gpu.memory_total_bytes if gpu else 0
        return {"uuid": uuid, "name": gpu.name if gpu else "GPU", "memory_bytes": memory_bytes or total}

    def _out_of_touch(self, register: Register) -> float | None:
        if register.state is not JobState.UNKNOWN or register.heard_wall_s is None:
            return None
        return max(self._now.wall_s - register.heard_wall_s, 0.0)


def _start_by(view: JobView) -> float | None:
    limit_s = view.spec.start_within_s
    return None if limit_s is None else view.register.submitted_wall_s + limit_s


def _metric_document(metric: Metric | None, objective: Objective | None) -> Document | None:
    """What the job reports: how good it is, None for numbers that have not come yet."""
    if objective is None:
        return None
    numbers = {"last": metric.last, "best": metric.best, "step": metric.step} if metric else {}
    return {"name": objective.name, "goal": objective.goal.value, "last": None, "best": None, "step": None} | numbers


def _trial_document(view: JobView) -> Document | None:
    if view.trial is None or view.sweep is None or view.sweep.sweep is None:
        return None
    names = (param.name for param in view.sweep.sweep.params)
    return {"number": view.trial.number, "values": dict(zip(names, view.trial.values, strict=True))}


def _space_document(space: Space | None) -> Document | None:
    if space is None:
        return None
    params = [param.name for param in space.params]
    return {
        "method": space.method.value,
        "params": params,
        "trials": space.trials,
        "parallel": space.parallel,
        "seed": space.seed,
    }


def command_text(spec: JobSpec) -> str:
    """The command as its user typed it."""
    return spec.command[0] if spec.shell else shlex.join(spec.command)


def display_names(views: list[JobView]) -> dict[JobId, str]:
    """{job: shortest `name-abc` that no other of these jobs shares}, three characters at least."""
    names: dict[JobId, str] = {}
    ordered = sorted((view.spec.name, view.spec.job) for view in views)
    for before, (name, job), after in zip([("", ""), *ordered], ordered, [*ordered[1:], ("", "")], strict=False):
        neighbours = [other for other_name, other in (before, after) if other_name == name and other != job]
        length = max([3, *(_alike(job, other) + 1 for other in neighbours)])
        names[job] = display_name(name, job, length)
    return names


def _alike(one: str, other: str) -> int:
    """How many characters they begin with in common."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def burst_document(node: Node, now: Now) -> Document:
    """How renting stands on this node: its settings, what it spends, what is rented; settings is None without any."""
    status = node.burst.status(now)
    me = node.log.members[node.node]
    return {
        "machine": me.name,
        "role": me.role.value,
        "may_leave": node.log.may_leave,
        "rents": status is not None and status.rents,
        "settings": asdict(status.settings) if status else None,
        "usd_per_hour": status.usd_per_hour if status else 0.0,
        "usd_today": status.usd_today if status else 0.0,
        "usd_this_month": status.usd_this_month if status else 0.0,
        "surveyed_s": status.surveyed_s if status else None,
        "problem": status.fault if status else "",
        "rented": _rented_documents(node, now, status) if status else [],
    }


def _rented_documents(node: Node, now: Now, status: BurstStatus) -> list[Document]:
    """This node's launches, whatever became of them, and what others rented and lives; the oldest first."""
    seen = {instance.launch: instance for instance in status.instances}
    own = {record.request.launch for record in status.launches}
    rows = [_launch_document(record, seen.get(record.request.launch)) for record in status.launches]
    rows += [
        _instance_document(instance)
        for instance in status.instances
        if instance.launch not in own and instance.state is not InstanceState.TERMINATED
    ]
    names = {member.name for member in node.log.members.values()}
    for row in rows:
        name = member_name(row["launch"])
        owner = node.log.members.get(row["owner"])
        row |= {
            "machine": name if name in names else None,
            "owner": owner.name if owner else None,
            "lease_left_s": row["lease_ends_at"] - now.wall_s,
        }
    return sorted(rows, key=lambda row: (row["since"], row["launch"]))


def _launch_document(record: LaunchRecord, instance: Instance | None) -> Document:
    request = record.request
    return {
        "launch": request.launch,
        "instance": record.instance or None,
        "instance_type": request.rung.instance_type,
        "market": request.rung.market.value,
        "usd_per_hour": request.rung.usd_per_hour,
        "job": request.need,
        "owner": request.owner,
        "state": record.state.value,
        "reason": record.reason,
        "address": instance.address if instance else "",
        "since": instance.launched_wall_s if instance else record.asked_wall_s,
        "lease_ends_at": request.lease_ends_wall_s,
    }


def _instance_document(instance: Instance) -> Document:
    return {
        "launch": instance.launch,
        "instance": instance.instance,
        "instance_type": instance.instance_type,
        "market": instance.market.value,
        "usd_per_hour": instance.usd_per_hour,
        "job": instance.need,
        "owner": instance.owner,
        "state": instance.state.value,
        "reason": "",
        "address": instance.address,
        "since": instance.launched_wall_s,
        "lease_ends_at": instance.lease_ends_wall_s,
    }


def plan_document(plan: Plan, now: Now) -> Document:
    """What would be rented for one job now, and why or why not."""
    return {
        "job": plan.need.job,
        "gpu_request": str(plan.need.resources.gpus),
        "waits_since": plan.need.since_wall_s,
        "rung": asdict(plan.rung) if plan.rung else None,
        "usd": plan.usd,
        "words": plan.words,
        "again_s": None if plan.again_at is None else max(plan.again_at - now.boot_s, 0.0),
    }
