"""Whether others reach this machine: a node asks linked peers to knock at its door, and knocks for those that ask.

A request names no address. Who is asked knocks at what the asker's own signed node record says, and tells only the
asker what came of it: so nobody can send a node to a door of somebody else's by a message alone. What a record may say
is narrowed further (`knockable`), and each peer is served a few times a minute.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from meshgpu.core.effects import Answered, Effect, KnockBack, Reject, Send
from meshgpu.core.statemachine import earliest
from meshgpu.model.clock import Now
from meshgpu.model.ids import Address, NodeId, base32
from meshgpu.model.messages import KnockAnswer, KnockResult, KnockWanted

ADDRESSES_LIMIT: Final = 8
"""Knocked at for one request: as many as mDNS announces, more than an office machine has."""

_BROADCAST: Final = IPv4Address("255.255.255.255")

QUERY_BYTES: Final = 10
"""80 random bits, so that an answer to an agent that was started anew meanwhile fits no question."""


@dataclass(frozen=True, slots=True)
class KnockTiming:
    """helpers: peers that are asked. answer_s: how long they may take: 1 s for the doors, 3 s for certificates, and
    some. served: requests of one peer that are served within served_s; higher lets a member scan more by its record.
    at_once: peers knocked for at the same time; bounds the sockets that requests open.
    """

    helpers: int = 3
    answer_s: float = 6.0
    served: int = 6
    served_s: float = 60.0
    at_once: int = 4


@dataclass(slots=True)
class _Question:
    """Of somebody local, by `name`. waiting: who has not answered yet."""

    name: str
    give_up_at: float
    waiting: set[NodeId]
    answers: list[tuple[NodeId, KnockAnswer, float]] = field(default_factory=list)


class Knocking:
    """Open questions of this node, and what it does for others."""

    def __init__(self, rng: random.Random, timing: KnockTiming) -> None:
        self._rng = rng
        self._timing = timing
        self._open: dict[str, _Question] = {}  # {query: its question}
        self._serving: dict[NodeId, str] = {}  # {who is knocked for now: its query}
        self._served: dict[NodeId, deque[float]] = {}  # {peer: boot_s of what was served, oldest first}

    # -- asking -------------------------------------------------------------------------------------------------------

    def ask(self, now: Now, name: str, peers: Sequence[NodeId]) -> list[Effect]:
        """Have some of `peers` knock here; ends in Answered, with those that answered in time."""
        helpers = self._rng.sample(sorted(peers), min(len(peers), self._timing.helpers))
        if not helpers:
            return [Answered(name)]
        query = base32(self._rng.randbytes(QUERY_BYTES))
        self._open[query] = _Question(name, now.boot_s + self._timing.answer_s, set(helpers))
        return [Send(peer, KnockWanted(query)) for peer in helpers]

    def answered(self, now: Now, peer: NodeId, answer: KnockAnswer) -> list[Effect]:
        question = self._open.get(answer.query)
        if question is None or peer not in question.waiting:
            return [Reject(peer, "a KnockAnswer that answers nothing")]
        question.waiting.discard(peer)
        question.answers.append((peer, answer, answer.wall_s - now.wall_s))
        return [] if question.waiting else self._close(answer.query)

    def step(self, now: Now) -> list[Effect]:
        due = [query for query, question in self._open.items() if now.boot_s >= question.give_up_at]
        return [effect for query in due for effect in self._close(query)]

    def deadline(self) -> float | None:
        return earliest(*(question.give_up_at for question in self._open.values()))

    def _close(self, query: str) -> list[Effect]:
        question = self._open.pop(query)
        return [Answered(question.name, knocks=tuple(question.answers))]

    # -- helping ------------------------------------------------------------------------------------------------------

    def wanted(
        self, now: Now, peer: NodeId, query: str, announced: Sequence[Address], own: Sequence[Address]
    ) -> list[Effect]:
        """Knock for a peer. announced: what its own signed node record says; own: the addresses of this node."""
        served = self._served.setdefault(peer, deque())
        while served and now.boot_s - served[0] >= self._timing.served_s:
            served.popleft()
        is_busy = peer in self._serving or len(self._serving) >= self._timing.at_once
        if is_busy or len(served) >= self._timing.served:
            return [Send(peer, KnockAnswer(query, (), False, False, now.wall_s, is_busy=True))]
        served.append(now.boot_s)
        self._serving[peer] = query
        return [KnockBack(peer, knockable(announced, own))]

    def knocked(
        self, now: Now, peer: NodeId, results: tuple[KnockResult, ...], *, hears: bool, announces: bool
    ) -> list[Effect]:
        query = self._serving.pop(peer, None)
        if query is None:
            return []
        return [Send(peer, KnockAnswer(query, results, hears, announces, now.wall_s))]

    def forget(self, peer: NodeId) -> None:
        """It is no member any more: whatever is found at its door is not told."""
        self._serving.pop(peer, None)
        self._served.pop(peer, None)


def knockable(announced: Sequence[Address], own: Sequence[Address]) -> tuple[Address, ...]:
    """Those addresses of a node record that one may knock at: numbers, not names, of one port, as an agent has one.

    Not this node's own addresses, by which a record would ask what else listens here; for the same reason no loopback,
    but where this node itself is to be found there: in a demonstration on one computer.
    """
    ours = {_number(address) for address in own}
    on_loopback = any(number is not None and number.is_loopback for number in ours)
    ports = [address.rpartition(":")[2] for address in announced]
    found: list[Address] = []
    for address in dict.fromkeys(announced):
        number = _number(address)
        if number is None or number.is_multicast or number.is_unspecified or number == _BROADCAST:
            continue
        is_here = not on_loopback if number.is_loopback else number in ours
        if address.rpartition(":")[2] == ports[0] and not is_here:
            found.append(address)
    return tuple(found[:ADDRESSES_LIMIT])


def _number(address: Address) -> IPv4Address | IPv6Address | None:
    """The host of an address, None for a name; one of IPv4 that is spelt as IPv6 is what the kernel takes it for."""
    try:
        number = ip_address(address.rpartition(":")[0].strip("[]"))
    except ValueError:
        return None
    return getattr(number, "ipv4_mapped", None) or number
