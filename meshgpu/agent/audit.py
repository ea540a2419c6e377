"""Reads this machine's audit back from the disk: the newest entries, and whether the whole of it holds."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from meshgpu import ports
from meshgpu.agent.runtime import Runtime
from meshgpu.agent.views import Document
from meshgpu.core.audit import AUDIT, AUDIT_START, AuditWalk, audit_key, is_broken
from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.audit import AuditEntry, AuditHead
from meshgpu.model.ids import KeyId, NodeId
from meshgpu.model.records import AuditRecord, AuditStartRecord
from meshgpu.model.trust import Notary, Signed
from meshgpu.wire.codec import decode

NEWEST_LIMIT: Final = 10_000
"""Entries shown at most."""

STEP: Final = 1_000
"""Entries read at a time: a tenth of a second to verify."""

Rows = Sequence[tuple[str, bytes]]
Kept = TypeVar("Kept", AuditRecord, AuditStartRecord)


def kept_audit(store: ports.Store) -> list[AuditStartRecord | AuditRecord]:
    """Where the audit begins and its newest entry, with which an agent goes on; none before the first.

    What cannot be read is still there: the chain goes on after whatever it is, and who verifies it is told.
    """
    found: list[AuditStartRecord | AuditRecord] = []
    for _, data in store.last(AUDIT_START, 1):
        found.append(_readable(AuditStartRecord, data) or AuditStartRecord(_unsigned(data)))
    for key, data in store.last(AUDIT, 1):
        found.append(_readable(AuditRecord, data) or AuditRecord(_number(key), _unsigned(data)))
    return found


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a walk over the whole chain. fault: empty, or the first thing that is wrong, as people read it."""

    count: int
    head: AuditHead | None
    fault: str


@dataclass(slots=True)
class AuditTrail:
    """The audit of the machine that this agent runs on."""

    runtime: Runtime
    notary: Notary
    public_key: Callable[[], bytes]

    def key_of(self, node: NodeId) -> bytes | None:
        """The key of an id that is, or was, this machine's; None for all others."""
        own, log = self.runtime.node.node, self.runtime.node.log
        if node == own:
            return self.public_key()
        member = log.known(node)
        return member.public_key if member is not None and log.current(node) == own else None

    async def newest(self, count: int) -> list[Document]:
        """The last `count` entries, the oldest first, as they say they are: only `verify` tells whether they hold."""
        rows = await self.runtime.stored(lambda store: store.last(AUDIT, min(count, NEWEST_LIMIT)))
        return await asyncio.to_thread(lambda: [self._document(key, data) for key, data in rows])

    def _document(self, key: str, data: bytes) -> Document:
        record = _readable(AuditRecord, data)
        try:
            if record is None:
                raise is_broken(_number(key), "cannot be read")
            public_key = self.key_of(NodeId(record.entry.key))
            if public_key is None:
                raise is_broken(record.seq, "was signed by another machine")
            entry = self.notary.read(record.entry, public_key, AuditEntry)
        except TrustError as error:
            return {"fault": error.message}
        return {
            "seq": entry.seq,
            "at": entry.at_wall_s,
            "event": entry.event.value,
            "job": entry.job,
            "name": entry.name,
            "epoch": entry.epoch,
            "user": entry.user,
            "key": entry.key,
            "spec": entry.spec,
            "fenced": entry.fenced,
            "gpus": list(entry.gpus),
            "outcome": entry.outcome.value if entry.outcome else None,
            "exit_code": entry.exit_code,
            "receipt": entry.receipt or None,
            "fault": None,
        }

    async def verify(self) -> Verdict:
        """Check every link and signature, and that the chain ends where the running agent wrote last.

        What is written meanwhile is not looked at; should the oldest entries be let go meanwhile, it begins again.
        """
        while True:
            start = await self.runtime.stored(_start)
            verdict = await self._walk(start)
            if not verdict.fault or start == await self.runtime.stored(_start):
                return verdict

    async def _walk(self, start: bytes | None) -> Verdict:
        told = self.runtime.node.attempts.audit.head
        walk: AuditWalk | None = None
        try:
            walk = AuditWalk(self.key_of, self.notary, _signed_start(start))
            rows = await self.runtime.stored(partial(_read_on, after=""))
            while rows:
                written = [row for row in rows if told is not None and row[0] <= audit_key(told.seq)]
                await asyncio.to_thread(_take, walk, written)
                if len(written) < len(rows):
                    break
                after = f"{rows[-1][0]}\0"
                rows = await self.runtime.stored(partial(_read_on, after=after))
            walk.finish(told)
            await self._check_nothing_beyond()
        except TrustError as error:
            return Verdict(walk.count if walk else 0, walk.head if walk else None, error.message)
        return Verdict(walk.count, walk.head, "")

    async def _check_nothing_beyond(self) -> None:
        """Raises TrustError where there are entries that the running agent never wrote."""
        last = await self.runtime.stored(lambda store: store.last(AUDIT, 1))
        head = self.runtime.node.attempts.audit.head
        for key, _ in last:
            if head is None or key > audit_key(head.seq):
                raise is_broken(_number(key), "is on disk, and the running agent never wrote it")


def _number(key: str) -> int:
    """Of the entry that lies under `key`; 0 for a key that no agent writes."""
    return int(key) if key.isdecimal() else 0


def _read_on(store: ports.Store, after: str) -> Rows:
    return store.read(AUDIT, after, STEP)


def _take(walk: AuditWalk, rows: Rows) -> None:
    for key, data in rows:
        walk.take(key, _readable(AuditRecord, data))


def _readable(kind: type[Kept], data: bytes) -> Kept | None:
    try:
        return decode(kind, data)
    except MeshgpuError:
        return None


def _unsigned(data: bytes) -> Signed:
    return Signed("", data, KeyId(""), b"")


def _start(store: ports.Store) -> bytes | None:
    rows = store.last(AUDIT_START, 1)
    return rows[0][1] if rows else None


def _signed_start(data: bytes | None) -> Signed | None:
    if data is None:
        return None
    try:
        return decode(AuditStartRecord, data).start
    except MeshgpuError as error:
        raise TrustError("audit-broken", f"cannot trust the audit: where it begins cannot be read: {error}") from error
