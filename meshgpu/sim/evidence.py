"""What must be shown when a world has come to rest: audits that are whole and true, receipts that hold."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from meshgpu.core.audit import AUDIT, AUDIT_START, AuditWalk
from meshgpu.core.node import Node
from meshgpu.errors import TrustError
from meshgpu.model.audit import AuditEntry, AuditEvent
from meshgpu.model.ids import JobId
from meshgpu.model.job import ENDED_ATTEMPT_STATES
from meshgpu.model.receipt import Proof
from meshgpu.model.records import AttemptRecord, AuditRecord, AuditStartRecord, JobRecord
from meshgpu.sim.machine import Machine


def faults(machines: Iterable[Machine], accepted: Iterable[tuple[JobId, int]]) -> Iterator[str]:
    """What cannot be shown although it happened, or is shown although it did not. accepted: all attempts that were."""
    machines = list(machines)
    judge = next((machine.agent for machine in machines if machine.agent is not None), None)
    if judge is None:
        return
    were = set(accepted)
    for machine in machines:
        yield from (f"{machine.setup.name} warns: {warning}" for warning in machine.warnings)
        try:
            entries = _walked(machine, judge)
        except TrustError as error:
            yield f"{machine.setup.name}: {error.message}"
            continue
        for record in machine.disk.values():
            if isinstance(record, AttemptRecord):
                yield from _audit_faults(machine, record, entries.get((record.job, record.epoch), []))
            elif isinstance(record, JobRecord):
                yield from _receipt_faults(judge, record, were)


def _walked(machine: Machine, judge: Node) -> dict[tuple[JobId, int], list[AuditEntry]]:
    """What the machine's audit says of each attempt. Raises TrustError where it does not hold."""
    members = [judge.log.known(node) for node in (*machine.before, machine.node)]
    keys = {member.node: member.public_key for member in members if member is not None}
    start = machine.disk.get((AUDIT_START, AUDIT_START))
    signed = start.start if isinstance(start, AuditStartRecord) else None
    walk = AuditWalk(keys.get, machine.notary, signed)
    found: dict[tuple[JobId, int], list[AuditEntry]] = defaultdict(list)
    for (kind, key), record in sorted(machine.disk.items(), key=lambda item: item[0]):
        if kind == AUDIT:
            entry = walk.take(key, record if isinstance(record, AuditRecord) else None)
            found[entry.job, entry.epoch].append(entry)
    if machine.agent is not None:
        walk.finish(machine.agent.attempts.audit.head)
    return found


def _audit_faults(machine: Machine, record: AttemptRecord, entries: list[AuditEntry]) -> Iterator[str]:
    """An attempt's own record and the audit tell one story."""
    wanted = [AuditEvent.ACCEPTED]
    if record.started_wall_s is not None:
        wanted.append(AuditEvent.STARTED)
    if record.state in ENDED_ATTEMPT_STATES:
        wanted.append(AuditEvent.ENDED)
    what = f"{record.job}/{record.epoch} is {record.state} on {machine.setup.name}, but its audit"
    if [entry.event for entry in entries] != wanted:
        yield f"{what} says {[str(entry.event) for entry in entries]}"
    elif record.state in ENDED_ATTEMPT_STATES:
        receipt = machine.notary.digest(record.receipt) if record.receipt else ""
        outcome = record.result.outcome if record.result else None
        if (entries[-1].receipt, entries[-1].outcome) != (receipt, outcome):
            yield f"{what} says {entries[-1].outcome} with the receipt {entries[-1].receipt[:12]}"


def _receipt_faults(judge: Node, record: JobRecord, accepted: set[tuple[JobId, int]]) -> Iterator[str]:
    """A job that has come to something has a receipt of the attempt that came to it, and it holds."""
    register = record.register
    if register.result is None or (register.job, register.epoch) not in accepted:
        return
    if record.receipt is None:
        yield f"{register.job}/{register.epoch} is {register.state} without a receipt"
        return
    examined = judge.examine(Proof(record.spec, record.receipt, record.trial))
    for check in examined.checks:
        if check.holds is False:
            yield f"the receipt of {register.job}/{register.epoch} does not hold: {check.found}"
    if examined.receipt is not None and examined.receipt.epoch != register.epoch:
        yield f"{register.job}/{register.epoch} has the receipt of attempt {examined.receipt.epoch}"
