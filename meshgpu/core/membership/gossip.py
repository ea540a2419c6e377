"""What every node says of itself, kept the same everywhere: owner-only entries, eager push, digests (Scuttlebutt).

A cloud node hears of nobody: only the mesh log goes to it, and only what it says of itself is taken from it.

Invariant: who claims version v of an owner has every entry of that owner up to v. It holds because an owner always
pushes all of its (few) entries, and because an answer to a digest carries all that is newer, in one message.
"""

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from meshgpu.core.effects import Effect, Reject, Send
from meshgpu.core.statemachine import earliest
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.errors import TrustError
from meshgpu.model.clock import Now
from meshgpu.model.gossip import (
    NEEDS_LIMIT,
    Capacity,
    Demand,
    Doubt,
    Doubts,
    GossipEntry,
    GossipValue,
    Incarnation,
    NodeRecord,
)
from meshgpu.model.ids import KeyId, NodeId, digest
from meshgpu.model.messages import GossipDelta, GossipDigest, Known, LogDelta
from meshgpu.model.trust import Head, Notary, Role, Signed

DELTA_BYTES: Final = 700_000
"""Of the entries in one message: they fit a frame of 1 MiB."""

ENTRY_BYTES: Final = 64 * 1024
ENTRY_PARTS: Final = 256
"""Bytes of one entry, and GPUs, allocations or addresses in it: more is no desktop, and every steward reads it."""

SUMMARY_CHARACTERS: Final = 32
"""128 bits of a hash: two who differ do not agree by chance."""

DELTA_ENTRIES: Final = 512
"""Entries in one message at most: two or three for each of 170 owners, far below a frame's 1 MiB."""


@dataclass(frozen=True, slots=True)
class GossipTiming:
    """coalesce_s: pause between two pushes, so that many changes travel together; the first of them leaves at once.
    digest_s: how often a random peer that is not probed is asked for what was missed; higher heals later. jitter: its
    spread, ±20 %.
    """

    coalesce_s: float = 0.05
    digest_s: float = 1.0
    jitter: float = 0.2


@dataclass(slots=True)
class _Owner:
    """All that is known of one owner, by the type of the entry's value. version: the highest of its entries.

    came_at: `boot_s` at which each was taken in here.
    """

    incarnation: Incarnation
    entries: dict[type, tuple[GossipEntry, Signed]] = field(default_factory=dict)
    came_at: dict[type, float] = field(default_factory=dict)
    version: int = 0

    def put(self, now: Now, entry: GossipEntry, signed: Signed) -> None:
        self.entries[type(entry.value)] = (entry, signed)
        self.came_at[type(entry.value)] = now.boot_s
        self.version = max(self.version, entry.version)

    def in_order(self) -> list[tuple[GossipEntry, Signed]]:
        """Entries by version: a message that is cut off leaves no gap."""
        return sorted(self.entries.values(), key=lambda pair: pair[0].version)


class Gossip:
    """This node's copy of what all say, and its own say."""

    def __init__(
        self, node: NodeId, epoch: int, log: MeshLog, notary: Notary, rng: random.Random, timing: GossipTiming
    ) -> None:
        self._node = node
        self._log = log
        self._notary = notary
        self._rng = rng
        self._timing = timing
        self._owners: dict[NodeId, _Owner] = {node: _Owner(Incarnation(epoch, 0))}
        self._doubters: dict[NodeId, dict[NodeId, Doubt]] = {}
        """{member: {who of the others doubts it: its doubt}}: the same as in `_owners`, the other way round."""
        self._known: tuple[Known, ...] | None = None
        self._summary: tuple[tuple[Known, ...], tuple[Head, ...], str] = ((), (), "")
        self._peers: list[NodeId] = []
        self._push_at: float | None = None
        self._pushed_at = -math.inf
        self._digest_at: float | None = None

    # -- reading ------------------------------------------------------------------------------------------------------

    def record(self, node: NodeId) -> NodeRecord | None:
        value = self._value(node, NodeRecord)
        return value if isinstance(value, NodeRecord) else None

    def capacity(self, node: NodeId) -> Capacity | None:
        value = self._value(node, Capacity)
        return value if isinstance(value, Capacity) else None

    def capacity_age_s(self, now: Now, node: NodeId) -> float | None:
        """How long ago its capacity was heard; None if it never was."""
        owner = self._owners.get(node)
        came_at = owner.came_at.get(Capacity) if owner else None
        return now.boot_s - came_at if came_at is not None else None

    def demand(self, node: NodeId) -> Demand | None:
        value = self._value(node, Demand)
        return value if isinstance(value, Demand) else None

    def doubts(self, node: NodeId) -> tuple[Doubt, ...]:
        """Whom it doubts now."""
        value = self._value(node, Doubts)
        return value.doubts if isinstance(value, Doubts) else ()

    def doubters(self, node: NodeId) -> Mapping[NodeId, Doubt]:
        """{who doubts it now: its doubt}, without this node. Costs the same in a large mesh."""
        return self._doubters.get(node, {})

    def incarnation(self, node: NodeId) -> Incarnation:
        """The highest that was heard of it."""
        owner = self._owners.get(node)
        return owner.incarnation if owner else Incarnation(0, 0)

    def _value(self, node: NodeId, kind: type) -> GossipValue | None:
        owner = self._owners.get(node)
        found = owner.entries.get(kind) if owner else None
        return found[0].value if found else None

    def known(self) -> tuple[Known, ...]:
        if self._known is None:
            owners = [(node, owner) for node, owner in sorted(self._owners.items()) if owner.entries]
            self._known = tuple(Known(node, owner.incarnation, owner.version) for node, owner in owners)
        return self._known

    def summary(self) -> str:
        """One short word for all that is known here: who has the same word knows the same."""
        known, heads = self.known(), self._log.heads()
        if (known, heads) != self._summary[:2]:
            rows = [f"{k.owner} {k.incarnation.epoch} {k.incarnation.counter} {k.version}" for k in known]
            rows += [f"{head.author} {head.seq} {head.entry}" for head in heads]
            self._summary = (known, heads, digest("\n".join(rows).encode())[:SUMMARY_CHARACTERS])
        return self._summary[2]

    def probe(self, peer: NodeId, number: int) -> Effect:
        """Asks a member of the office for an answer, and for what was missed."""
        return Send(peer, GossipDigest((), (), wants_answer=True, summary=self.summary(), number=number))

    # -- own entries --------------------------------------------------------------------------------------------------

    def say(self, now: Now, value: GossipValue) -> None:
        """Change one of this node's own entries; told to all at once, or `coalesce_s` after what was told before."""
        own = self._owners[self._node]
        found = own.entries.get(type(value))
        if (found is not None and found[0].value == value) or self._log.mesh is None:
            return
        self._write(now, own, value)
        self._schedule_push(now)

    def _write(self, now: Now, own: _Owner, value: GossipValue) -> None:
        assert self._log.mesh is not None
        entry = GossipEntry(self._log.mesh, self._node, own.incarnation, own.version + 1, value)
        own.put(now, entry, self._notary.sign(KeyId(self._node), entry))
        self._known = None

    def _schedule_push(self, now: Now) -> None:
        if self._push_at is None:
            self._push_at = max(now.boot_s, self._pushed_at + self._timing.coalesce_s)

    # -- events -------------------------------------------------------------------------------------------------------

    def link_opened(self, now: Now, peer: NodeId) -> list[Effect]:
        """Full sync: both sides say what they know."""
        if peer not in self._peers:
            self._peers.append(peer)
        if self._digest_at is None:
            self._digest_at = now.boot_s + self._next_interval()
        return [Send(peer, self._digest(peer, wants_answer=True))]

    def forget(self, node: NodeId) -> None:
        """It is no member any more."""
        if node == self._node or node not in self._owners:
            return
        before = self.doubts(node)
        del self._owners[node]
        self._known = None
        self._doubts_changed(node, before)

    def link_closed(self, peer: NodeId) -> None:
        if peer in self._peers:
            self._peers.remove(peer)

    def log_grew(self, entries: tuple[Signed, ...], source: NodeId | None) -> list[Effect]:
        """Pass new log entries on at once; who has them already adds nothing and stays quiet."""
        return [Send(peer, LogDelta(entries)) for peer in self._peers if peer != source]

    def digest_arrived(self, peer: NodeId, told: GossipDigest) -> list[Effect]:
        if told.is_brief:
            return self._answer_brief(peer, told)
        effects: list[Effect] = []
        lacking_log = self._log.beyond(told.heads)
        if lacking_log:
            effects.append(Send(peer, LogDelta(fitting(lacking_log))))
        newer = self._newer_than(told.known) if self._is_of_office(peer) else ()
        if newer:
            effects.append(Send(peer, GossipDelta(newer)))
        if told.wants_answer:
            effects.append(Send(peer, self._digest(peer, wants_answer=False)))
        return effects

    def _answer_brief(self, peer: NodeId, told: GossipDigest) -> list[Effect]:
        """Who knows the same needs no rows. Else the one that was asked shows its own, and hears what it lacks."""
        if not told.wants_answer:
            return []
        is_same = told.summary == self.summary() or not self._is_of_office(peer)
        if is_same:
            return [Send(peer, GossipDigest((), (), False, self.summary(), told.number))]
        return [Send(peer, self._digest(peer, wants_answer=True, number=told.number))]

    def outbid(self, now: Now, heard: Incarnation) -> bool:
        """Somebody doubts this node under `heard`: say everything again above it. False where it is an old doubt."""
        if heard < self._owners[self._node].incarnation:
            return False
        self._raise(now, heard)
        return True

    def delta_arrived(self, now: Now, peer: NodeId, delta: GossipDelta) -> tuple[list[NodeId], list[Effect]]:
        """Returns the owners whose entries changed."""
        changed: list[NodeId] = []
        refused: set[NodeId] = set()
        effects: list[Effect] = []
        for signed in delta.entries[:DELTA_ENTRIES]:
            owner = NodeId(signed.key)
            if owner != peer and not self._is_of_office(peer):
                effects.append(Reject(peer, "a cloud node speaks for somebody else"))
                continue
            if owner in refused:
                continue  # later entries of an owner would claim the refused one
            try:
                if self._accept(now, signed) and owner not in changed:
                    changed.append(owner)
            except TrustError as error:
                refused.add(owner)
                effects.append(Reject(peer, error.message))
        return changed, effects

    def step(self, now: Now) -> list[Effect]:
        """Do what is due: push own changes, exchange digests with one random peer."""
        effects: list[Effect] = []
        if self._push_at is not None and now.boot_s >= self._push_at:
            self._push_at, self._pushed_at = None, now.boot_s
            # All of them: a peer whose Link is new, and breaks again, must not claim the newest without the others.
            push = GossipDelta(tuple(signed for _, signed in self._owners[self._node].in_order()))
            effects.extend(Send(peer, push) for peer in self._peers if self._is_of_office(peer))
        if self._digest_at is not None and now.boot_s >= self._digest_at:
            self._digest_at = now.boot_s + self._next_interval() if self._peers else None
            if unprobed := [peer for peer in self._peers if not self._is_probed(peer)]:
                peer = self._rng.choice(unprobed)
                effects.append(Send(peer, self._digest(peer, wants_answer=True)))
        return effects

    def deadline(self) -> float | None:
        return earliest(self._push_at, self._digest_at)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _is_probed(self, peer: NodeId) -> bool:
        """Whether digests ride in probes between the two: neither is a cloud node."""
        return self._is_of_office(peer) and self._is_of_office(self._node)

    def _digest(self, peer: NodeId, *, wants_answer: bool, number: int = 0) -> GossipDigest:
        known = self.known()
        if not self._is_of_office(peer):
            known = tuple(row for row in known if row.owner == peer)
        return GossipDigest(known, self._log.heads(), wants_answer, number=number)

    def _is_of_office(self, peer: NodeId) -> bool:
        """Whether it may hear of others: it is a member, and no cloud node."""
        member = self._log.members.get(peer)
        return member is not None and member.role is not Role.CLOUD

    def _next_interval(self) -> float:
        spread = self._timing.digest_s * self._timing.jitter
        return self._timing.digest_s + self._rng.uniform(-spread, spread)

    def _newer_than(self, known: tuple[Known, ...]) -> tuple[Signed, ...]:
        theirs = {row.owner: (row.incarnation, row.version) for row in known}
        newer: list[Signed] = []
        for node, owner in sorted(self._owners.items()):
            seen = theirs.get(node, (Incarnation(0, 0), 0))
            if (owner.incarnation, owner.version) <= seen:
                continue
            for entry, signed in owner.in_order():
                if (owner.incarnation, entry.version) > seen:
                    newer.append(signed)
        return fitting(newer)

    def _accept(self, now: Now, signed: Signed) -> bool:
        """Whether the entry was news. Raises TrustError for what no member signed as its own."""
        if len(signed.payload) > ENTRY_BYTES:
            raise TrustError("too-large", f"cannot take in an entry of {len(signed.payload)} bytes")
        member = self._log.members.get(NodeId(signed.key))
        if member is None:
            raise TrustError("not-allowed", "cannot take in an entry: its owner is no member of this mesh")
        known = self._owners.get(member.node)
        if known is not None and any(signed == held for _, held in known.entries.values()):
            return False  # most of what arrives is known: it costs no signature check
        entry = self._notary.read(signed, member.public_key, GossipEntry)
        if entry.mesh != self._log.mesh or entry.owner != member.node:
            raise TrustError("not-allowed", f"cannot take in an entry of {member.name}: it speaks for somebody else")
        if not is_of_a_desktop(entry.value):
            raise TrustError("too-large", f"cannot take in an entry of {member.name}: no desktop has that many parts")
        if entry.owner == self._node:
            self._outbid(now, entry.incarnation)
            return False
        before = self.doubts(entry.owner)
        owner = self._owners.get(entry.owner)
        if owner is None or entry.incarnation > owner.incarnation:
            owner = self._owners[entry.owner] = _Owner(entry.incarnation)
        found = owner.entries.get(type(entry.value))
        if entry.incarnation < owner.incarnation or (found is not None and entry.version <= found[0].version):
            return False
        owner.put(now, entry, signed)
        self._known = None
        self._doubts_changed(entry.owner, before)
        return True

    def _doubts_changed(self, owner: NodeId, before: tuple[Doubt, ...]) -> None:
        """What another doubts may differ from `before`. A new incarnation that says nothing of doubts has none."""
        after = self.doubts(owner)
        if after == before:
            return
        for doubt in before:
            doubters = self._doubters.get(doubt.node, {})
            doubters.pop(owner, None)
            if not doubters:
                self._doubters.pop(doubt.node, None)
        for doubt in after:
            self._doubters.setdefault(doubt.node, {})[owner] = doubt

    def _outbid(self, now: Now, heard: Incarnation) -> None:
        """Somebody knows a later me (restored from a backup): jump above it and say everything again."""
        if heard > self._owners[self._node].incarnation:
            self._raise(now, heard)

    def _raise(self, now: Now, heard: Incarnation) -> None:
        own = self._owners[self._node]
        values = [entry.value for entry, _ in own.in_order()]
        own = self._owners[self._node] = _Owner(replace(heard, counter=heard.counter + 1))
        for value in values:
            self._write(now, own, value)
        self._schedule_push(now)


def fitting(entries: Iterable[Signed]) -> tuple[Signed, ...]:
    """As many of the first entries as one message carries; at least one."""
    taken: list[Signed] = []
    room = DELTA_BYTES
    for signed in entries:
        room -= len(signed.payload) + len(signed.signature) + len(signed.key)
        if taken and (room < 0 or len(taken) >= DELTA_ENTRIES):
            break
        taken.append(signed)
    return tuple(taken)


def is_of_a_desktop(value: GossipValue) -> bool:
    """Whether an entry has a size that placement can look at for every job."""
    if isinstance(value, NodeRecord):
        return max(len(value.addresses), len(value.inventory.gpus), len(value.trusts)) <= ENTRY_PARTS
    if isinstance(value, Demand):
        return len(value.needs) <= NEEDS_LIMIT and len(value.lines) <= ENTRY_PARTS
    if isinstance(value, Doubts):
        return len(value.doubts) <= ENTRY_PARTS
    shares = sum(len(allocation.gpus) for allocation in value.allocations)
    return max(shares, len(value.readings), len(value.allocations), len(value.used)) <= ENTRY_PARTS
