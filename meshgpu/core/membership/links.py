"""Which Links to open: one to every member, dialled by the lower id, by the other after a while.

A cloud node dials nobody; everybody in the office dials it at once.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from meshgpu.core.effects import Dial, Effect, Identify
from meshgpu.core.statemachine import earliest
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.model.clock import Now
from meshgpu.model.ids import Address, NodeId
from meshgpu.model.trust import Role

ADDRESSES_KEPT: Final = 4
"""Of each source and node: a desktop has two or three; a liar on the LAN must not make us dial hundreds."""

STRANGERS_KEPT: Final = 256
"""Nodes outside the mesh whose announcements are remembered, in case they turn out to be members."""


@dataclass(frozen=True, slots=True)
class LinkTiming:
    """courtesy_s: how long the higher id waits for the lower one to dial.
    retry_s, retry_limit_s: first and longest pause between dials of one peer (doubling, ±25 %); longer heals later.
    together_s: within which all who could not be reached are dialled once one of them is there again.
    seed_s: how often a seed whose node is not linked is asked who it is. dials: how many dials may be under way.
    """

    courtesy_s: float = 5.0
    retry_s: float = 0.5
    retry_limit_s: float = 30.0
    together_s: float = 1.0
    seed_s: float = 30.0
    dials: int = 8


@dataclass(slots=True)
class _Peer:
    """How one other node is reached. `next_dial` is None while no address is known or the Link is open.

    told: what the node itself signed; hints: what anybody may have announced. Neither pushes the other out.
    """

    told: list[Address] = field(default_factory=list)
    hints: list[Address] = field(default_factory=list)
    turn: int = 0
    next_dial: float | None = None
    failures: int = 0
    lost_at: float | None = None

    @property
    def addresses(self) -> tuple[Address, ...]:
        """What the node signed first, each once."""
        return tuple(dict.fromkeys((*self.told, *self.hints)))


class Links:
    """The address book and the dial rule. Dials nobody but members."""

    def __init__(
        self, node: NodeId, log: MeshLog, rng: random.Random, seeds: Iterable[Address], timing: LinkTiming
    ) -> None:
        self._node = node
        self._log = log
        self._rng = rng
        self._timing = timing
        self._peers: dict[NodeId, _Peer] = {}
        self._seeds: dict[Address, NodeId | None] = dict.fromkeys(seeds)
        self._seeds_at: float | None = 0.0 if self._seeds else None
        self.open: dict[NodeId, float] = {}
        """{peer: boot_s since when its Link is open}"""
        self._dialling: set[NodeId] = set()

    def last_seen(self, peer: NodeId) -> float | None:
        """`boot_s` at which the Link to `peer` was lost; None if it is open or never was."""
        found = self._peers.get(peer)
        return found.lost_at if found else None

    def learn(self, now: Now, peer: NodeId, addresses: Iterable[Address], *, is_signed: bool) -> None:
        """Take note where `peer` says it is, or where somebody says it is."""
        is_stranger = peer not in self._log.members and peer not in self._peers
        if peer == self._node or (is_stranger and len(self._peers) >= STRANGERS_KEPT + len(self._log.members)):
            return
        found = self._peers.setdefault(peer, _Peer())
        before = set(found.addresses)
        if is_signed:
            found.told = list(dict.fromkeys(addresses))[:ADDRESSES_KEPT]
        else:
            found.hints = list(dict.fromkeys((*addresses, *found.hints)))[:ADDRESSES_KEPT]
        if before.issuperset(found.addresses):
            return
        soonest = now.boot_s + (0.0 if self._goes_first(peer) else self._timing.courtesy_s)
        if found.next_dial is None or found.failures:
            found.next_dial = soonest
            found.failures = 0

    def addresses(self, peer: NodeId) -> tuple[Address, ...]:
        found = self._peers.get(peer)
        return found.addresses if found else ()

    def best_address(self, peer: NodeId) -> Address | None:
        """The one that is dialled next, or by which the Link was opened."""
        found = self._peers.get(peer)
        return found.addresses[found.turn % len(found.addresses)] if found and found.addresses else None

    # -- events -------------------------------------------------------------------------------------------------------

    def link_opened(self, now: Now, peer: NodeId) -> None:
        self.open[peer] = now.boot_s
        found = self._peers.setdefault(peer, _Peer())
        was_away = found.lost_at is not None or found.failures > 0
        self._dialling.discard(peer)
        found.failures, found.lost_at, found.next_dial = 0, None, None
        if was_away:
            self._hurry(now)

    def _hurry(self, now: Now) -> None:
        """Somebody is there again: what kept him away may have kept others away as well."""
        for found in self._peers.values():
            if found.failures and found.next_dial is not None:
                soon = now.boot_s + self._rng.uniform(0.0, self._timing.together_s)
                found.next_dial = min(found.next_dial, soon)

    def link_closed(self, now: Now, peer: NodeId) -> None:
        self.open.pop(peer, None)
        found = self._peers.setdefault(peer, _Peer())
        found.lost_at = now.boot_s
        if found.addresses:
            found.next_dial = now.boot_s + self._pause(found, courteous=not self._goes_first(peer))

    def dial_failed(self, now: Now, peer: NodeId) -> None:
        found = self._peers.get(peer)
        if found is None:
            return
        self._dialling.discard(peer)
        found.failures += 1
        found.turn += 1  # try the next address
        untried = found.failures < len(found.addresses)
        found.next_dial = now.boot_s if untried else now.boot_s + self._pause(found, courteous=False)

    def identified(self, now: Now, address: Address, node: NodeId) -> None:
        if address in self._seeds:
            self._seeds[address] = node
        self.learn(now, node, (address,), is_signed=False)

    def step(self, now: Now) -> list[Effect]:
        effects: list[Effect] = []
        if self._log.mesh is None:
            return effects
        if self._seeds_at is not None and now.boot_s >= self._seeds_at:
            self._seeds_at = now.boot_s + self._timing.seed_s
            effects.extend(
                Identify(seed) for seed, node in self._seeds.items() if node is None or node not in self.open
            )
        room = 0 if self._is_complete() else self._timing.dials - len(self._dialling)
        if room > 0:
            due = sorted(peer for peer, found in self._peers.items() if self._is_due(now, peer, found))
            for peer in due[:room]:
                found = self._peers[peer]
                self._dialling.add(peer)
                effects.append(Dial(peer, found.addresses[found.turn % len(found.addresses)]))
        return effects

    def deadline(self) -> float | None:
        if self._log.mesh is None:
            return None
        if self._is_complete() or len(self._dialling) >= self._timing.dials:
            return self._seeds_at
        dials = [
            found.next_dial
            for peer, found in self._peers.items()
            if found.next_dial is not None and self._is_wanted(peer, found)
        ]
        return earliest(self._seeds_at, *dials)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _is_complete(self) -> bool:
        """Whether all that are known are linked: nearly always, and then there is nobody to look for."""
        return len(self.open) == len(self._peers)

    def _goes_first(self, peer: NodeId) -> bool:
        return self._node < peer or self._role(peer) is Role.CLOUD

    def _role(self, node: NodeId) -> Role | None:
        member = self._log.members.get(node)
        return member.role if member else None

    def _is_wanted(self, peer: NodeId, found: _Peer) -> bool:
        if self._role(self._node) is Role.CLOUD:
            return False
        return (
            peer in self._log.members and peer not in self.open and peer not in self._dialling and bool(found.addresses)
        )

    def _is_due(self, now: Now, peer: NodeId, found: _Peer) -> bool:
        due_at = found.next_dial
        return due_at is not None and now.boot_s >= due_at and self._is_wanted(peer, found)

    def _pause(self, found: _Peer, *, courteous: bool) -> float:
        doubled = self._timing.retry_s * float(2 ** min(found.failures, 10))
        pause = min(doubled, self._timing.retry_limit_s)
        return pause * self._rng.uniform(0.75, 1.25) + (self._timing.courtesy_s if courteous else 0.0)
