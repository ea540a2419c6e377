"""The audit chain: each machine's own record of who ran what on it, and the watch over the heads of all others.

Every entry holds the digest of the one before and is signed by the node's key, so nothing in the middle can be changed,
left out or moved. The head travels in the node's record: whoever heard of it notices when the chain's end is rewritten.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from meshgpu.core.effects import Effect, Persist, Warn
from meshgpu.core.jobs.attempt import Attempt
from meshgpu.errors import TrustError
from meshgpu.model.audit import AuditEntry, AuditEvent, AuditHead, AuditStart
from meshgpu.model.ids import NO_DIGEST, KeyId, NodeId
from meshgpu.model.records import AuditRecord, AuditStartRecord, Record
from meshgpu.model.trust import Notary, Signed

AUDIT: Final = "audit"
AUDIT_START: Final = "audit-start"
"""Kinds under which the store keeps the entries, and where they begin."""

KEPT: Final = 100_000
"""Entries kept: three for each attempt, so 90 days of 370 attempts a day, in some 60 MB."""

LET_GO: Final = 1_000
"""Entries let go at a time, when there are so many more than KEPT: one more signature for each thousand."""


def audit_key(seq: int) -> str:
    """Key of an entry in the store; keys sort as their numbers do."""
    return f"{seq:012d}"


def is_broken(seq: int, fault: str) -> TrustError:
    return TrustError("audit-broken", f"cannot trust the audit: entry {seq} {fault}")


class AuditChain:
    """This node's own chain. Only its head is in memory; entries leave as Persist effects, in their attempt's step."""

    def __init__(self, node: NodeId, notary: Notary, kept: int = KEPT, let_go: int = LET_GO) -> None:
        self._node = node
        self._notary = notary
        self._kept = kept
        self._let_go = let_go
        self._first = 0
        self.head: AuditHead | None = None

    def restore(self, records: Iterable[Record]) -> list[Effect]:
        """Go on after the newest entry, the only one among `records`, whether it can be trusted or not: to begin again
        would hide that somebody was here. A start that cannot be read is told, and counts as 0."""
        effects: list[Effect] = []
        for record in records:
            if isinstance(record, AuditStartRecord):
                try:
                    digest = self._notary.digest(record.start)  # who is to trust it is whoever verifies
                    self._first = self._notary.read_pinned(record.start, digest, AuditStart).seq
                except TrustError as error:
                    effects.append(Warn(self._node, f"the start of the audit cannot be read: {error.message}"))
            elif isinstance(record, AuditRecord):
                self.head = AuditHead(record.seq, self._notary.digest(record.entry))
        return effects

    @property
    def count(self) -> int:
        """How many entries are kept."""
        return 0 if self.head is None else self.head.seq + 1 - self._first

    def wrote(self, event: AuditEvent, attempt: Attempt, at_wall_s: float) -> list[Effect]:
        """What happened to an attempt becomes the next entry; the oldest go when there are too many."""
        result = attempt.result if event is AuditEvent.ENDED else None
        receipt = attempt.receipt if event is AuditEvent.ENDED else None
        entry = AuditEntry(
            self._node,
            0 if self.head is None else self.head.seq + 1,
            NO_DIGEST if self.head is None else self.head.entry,
            at_wall_s,
            event,
            attempt.spec.job,
            attempt.epoch,
            attempt.spec.name,
            attempt.spec.user,
            attempt.signed.key,
            self._notary.digest(attempt.signed),
            attempt.fenced,
            tuple(share.uuid for share in attempt.gpus),
            None if result is None else result.outcome,
            None if result is None else result.exit_code,
            NO_DIGEST if receipt is None else self._notary.digest(receipt),
        )
        signed = self._notary.sign(KeyId(self._node), entry)
        self.head = AuditHead(entry.seq, self._notary.digest(signed))
        return [Persist(AUDIT, audit_key(entry.seq), AuditRecord(entry.seq, signed)), *self._trim()]

    def _trim(self) -> list[Effect]:
        if self.count < self._kept + self._let_go:
            return []
        gone = range(self._first, self._first + self._let_go)
        self._first += self._let_go
        start = self._notary.sign(KeyId(self._node), AuditStart(self._node, self._first))
        return [
            Persist(AUDIT_START, AUDIT_START, AuditStartRecord(start)),
            *(Persist(AUDIT, audit_key(seq), None) for seq in gone),
        ]


class AuditWalk:
    """Checks a kept chain, entry by entry, from the oldest that is kept.

    It begins at 0, or where the signed AuditStart says that older entries were let go; the oldest kept entry's
    `previous` then names what cannot be looked at any more, and is vouched for by that entry's own signature.
    key_of(node): the key of an id that is, or was, this machine's; None for all others: the chain goes on under new
    keys.
    Raises TrustError `audit-broken`, which names the first bad entry.
    """

    def __init__(self, key_of: Callable[[NodeId], bytes | None], notary: Notary, start: Signed | None) -> None:
        self._key_of = key_of
        self._notary = notary
        self._first = 0
        if start is not None:
            try:
                told = notary.read(start, self._own_key(start), AuditStart)
            except TrustError as error:
                raise TrustError("audit-broken", f"cannot trust the audit: its start: {error.message}") from error
            self._first = told.seq
        self._next = self._first
        self.head: AuditHead | None = None

    @property
    def count(self) -> int:
        return self._next - self._first

    def take(self, key: str, record: AuditRecord | None) -> AuditEntry:
        """Check the next entry, as it lay under `key`; None for what cannot even be read."""
        seq = self._next
        if key != audit_key(seq):
            raise is_broken(seq, f"is not there: what follows has the key {key!r}")
        if record is None:
            raise is_broken(seq, "cannot be read: its bytes were changed")
        if record.seq != seq:
            raise is_broken(seq, f"says that it is entry {record.seq}")
        try:
            entry = self._notary.read(record.entry, self._own_key(record.entry), AuditEntry)
        except TrustError as error:
            raise is_broken(seq, f"does not hold: {error.message}") from error
        if KeyId(entry.node) != record.entry.key or entry.seq != seq:
            raise is_broken(seq, f"was signed as entry {entry.seq} of {entry.node[:12]}")
        if self.head is not None and entry.previous != self.head.entry:
            raise is_broken(seq, "does not follow from the entry before it")
        self.head = AuditHead(seq, self._notary.digest(record.entry))
        self._next += 1
        return entry

    def _own_key(self, signed: Signed) -> bytes:
        key = self._key_of(NodeId(signed.key))
        if key is None:
            raise TrustError("not-allowed", f"it was signed by {signed.key[:12]!r}, which this machine never was")
        return key

    def finish(self, told: AuditHead | None) -> None:
        """Compare the end of the walk with the head that the running agent holds."""
        if told == self.head:
            return
        if told is None:
            raise is_broken(self._next - 1, "is on disk, and the running agent knows of none")
        if self.head is None or self.head.seq < told.seq:
            raise is_broken(self._next, f"is missing: the running agent wrote entries up to {told.seq}")
        raise is_broken(told.seq, "is not the one that the running agent wrote")


@dataclass(frozen=True, slots=True)
class AuditFault:
    """How a member's audit chain went back on its word."""

    node: NodeId
    reason: str


class AuditWatch:
    """The newest head heard of each member, since this agent started. A head never goes back, nor changes."""

    def __init__(self) -> None:
        self._heads: dict[NodeId, AuditHead] = {}
        self._faults: dict[NodeId, AuditFault] = {}

    @property
    def faults(self) -> tuple[AuditFault, ...]:
        """The last fault of each member, kept until this agent ends."""
        return tuple(fault for _, fault in sorted(self._faults.items()))

    @property
    def watched(self) -> int:
        """How many members have told a head."""
        return len(self._heads)

    def go_on(self, before: NodeId, after: NodeId) -> AuditFault | None:
        """The member goes on under another id: what it told, and what was found, is of that one now."""
        fault = self._faults.pop(before, None)
        if fault is not None:
            self._faults[after] = AuditFault(after, fault.reason)
        head = self._heads.pop(before, None)
        if head is None:
            return None
        told = self._heads.get(after)
        self._heads[after] = head
        return self.heard(after, told) if told is not None else None

    def heard(self, node: NodeId, head: AuditHead | None) -> AuditFault | None:
        """A member's newest record holds `head`. Returns what is wrong with it; the watch goes on from there."""
        before = self._heads.get(node)
        if head is None:
            self._heads.pop(node, None)
        else:
            self._heads[node] = head
        if before is None or before == head:
            return None
        if head is None:
            reason = f"its audit is gone: it had {before.seq + 1} entries"
        elif head.seq > before.seq:
            return None
        elif head.seq == before.seq:
            reason = f"its audit was rewritten: entry {head.seq} is another than it was"
        else:
            reason = f"its audit went back from entry {before.seq} to {head.seq}"
        self._faults[node] = AuditFault(node, reason)
        return self._faults[node]
