"""What the counting entries of the mesh log add up to: members, users and policy, the same wherever it is reckoned."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from meshgpu.model.clock import WALL_CLOCK_SLACK_S
from meshgpu.model.ids import KeyId, NodeId, is_name, key_id, node_id
from meshgpu.model.trust import (
    AddNode,
    Genesis,
    LinkUser,
    LogEntry,
    Member,
    RemoveNode,
    Role,
    SetPolicy,
    SetRole,
    UserKey,
)

LEASE_LIMIT_S: Final = 7 * 86400.0
"""How far ahead the end of a cloud node's membership may lie: what was entered for longer is no member until then."""

CLOUDS_LIMIT: Final = 64
"""Cloud nodes of one author at a time, the first of its chain: every member dials and trusts each of them."""

NAME_SUFFIX_CHARACTERS: Final = 4
"""Of the id, where a name is taken; more where that is taken too."""

Run = Sequence[LogEntry]
"""The entries of one author that count, in order."""


@dataclass(frozen=True, slots=True)
class Roster:
    """The mesh at one moment.

    may_leave: whether jobs may leave the office. burst: nodes that may rent, or once might: their chains are kept.
    gone: cloud nodes that were removed or have expired, so that nothing of theirs lives.
    valid_wall_s: from when until before when the same entries add up to the same.
    """

    mesh_name: str = ""
    members: dict[NodeId, Member] = field(default_factory=dict)
    users: dict[KeyId, UserKey] = field(default_factory=dict)
    may_leave: bool = False
    burst: frozenset[NodeId] = frozenset()
    gone: frozenset[NodeId] = frozenset()
    valid_wall_s: tuple[float, float] = (-math.inf, math.inf)


def add_up(admins: Mapping[KeyId, Run], nodes: Mapping[KeyId, Run], wall_s: float) -> Roster:
    """The runs of admins, the founder's first, and those of burst nodes. What an author may not say is passed over."""
    bodies = [entry.body for run in admins.values() for entry in run]
    office = _office(bodies)
    burst = frozenset(
        body.node
        for body in bodies
        if isinstance(body, SetRole | AddNode) and body.role is Role.BURST and _is_rig(office.get(body.node))
    )
    clouds = _Clouds(office, wall_s)
    for author, run in (*admins.items(), *nodes.items()):
        clouds.take(run, may_add=author in admins or _is_burst(office.get(NodeId(author))))
    founder = next(iter(admins.values()), ())
    return Roster(
        next((body.mesh_name for body in bodies if isinstance(body, Genesis)), ""),
        _with_unique_names((*office.values(), *clouds.members())),
        {
            key_id(body.public_key): UserKey(
                body.user,
                key_id(body.public_key),
                body.public_key,
                body.node,
                body.uid,
                key_id(body.public_key) in admins,
            )
            for body in bodies
            if isinstance(body, LinkUser) and body.node in office  # nobody speaks for a user from a rented machine
        },
        next((entry.body.may_leave for entry in reversed(founder) if isinstance(entry.body, SetPolicy)), False),
        burst,
        clouds.gone(),
        clouds.valid(),
    )


def _office(bodies: Sequence[object]) -> dict[NodeId, Member]:
    """The members that are there for good, with the roles that admins gave them."""
    office: dict[NodeId, Member] = {}
    for body in bodies:
        if isinstance(body, AddNode) and body.role is not Role.CLOUD and _is_proper(body) and body.node not in office:
            office[body.node] = _member(body)
    for body in bodies:
        if isinstance(body, SetRole) and body.role in (Role.RIG, Role.BURST) and _is_rig(office.get(body.node)):
            office[body.node] = replace(office[body.node], role=body.role)
    return office


class _Clouds:
    """Cloud nodes as they are added and removed. None of them takes the place of a machine of the office."""

    def __init__(self, office: Mapping[NodeId, Member], wall_s: float) -> None:
        self._office = office
        self._wall_s = wall_s
        self._added: list[list[AddNode]] = []
        self._named: dict[NodeId, list[AddNode]] = {}
        self._removed: dict[NodeId, None] = {}

    def take(self, run: Run, *, may_add: bool) -> None:
        """An author that may not add any more still ended what it ended: a removal is never undone."""
        added: list[AddNode] = []
        for entry in run:
            body = entry.body
            if isinstance(body, RemoveNode) and body.node not in self._office:
                self._removed[body.node] = None
            elif isinstance(body, AddNode) and self._is_cloud(body):
                self._named.setdefault(body.node, []).append(body)
                added.append(body)
        if may_add:
            self._added.append(added)

    def members(self) -> Iterator[Member]:
        known: set[NodeId] = set()
        for added in self._added:
            current = [b for b in added if b.node not in self._removed and self._is_current(b) and b.node not in known]
            for body in current[:CLOUDS_LIMIT]:
                if body.node not in known:
                    known.add(body.node)
                    yield _member(body)

    def gone(self) -> frozenset[NodeId]:
        expired = (
            node for node, added in self._named.items() if all(self._wall_s >= _ends_wall_s(body) for body in added)
        )
        return frozenset((*self._removed, *expired))

    def valid(self) -> tuple[float, float]:
        moments = [
            moment
            for added in self._named.values()
            for body in added
            for moment in (_begins_wall_s(body), _ends_wall_s(body))
        ]
        since = max((moment for moment in moments if moment <= self._wall_s), default=-math.inf)
        return since, min((moment for moment in moments if moment > self._wall_s), default=math.inf)

    def _is_cloud(self, body: AddNode) -> bool:
        is_readable = is_name(body.name) and is_name(body.owner)
        return body.role is Role.CLOUD and _is_proper(body) and is_readable and body.node not in self._office

    def _is_current(self, body: AddNode) -> bool:
        return _begins_wall_s(body) <= self._wall_s < _ends_wall_s(body)


def _is_proper(body: AddNode) -> bool:
    """A node's id is its key's; cloud nodes have an end, and no others have."""
    return body.node == node_id(body.public_key) and (body.role is Role.CLOUD) is (body.expires_wall_s is not None)


def _ends_wall_s(body: AddNode) -> float:
    assert body.expires_wall_s is not None
    return body.expires_wall_s + WALL_CLOCK_SLACK_S


def _begins_wall_s(body: AddNode) -> float:
    assert body.expires_wall_s is not None
    return body.expires_wall_s - LEASE_LIMIT_S - WALL_CLOCK_SLACK_S


def _is_rig(member: Member | None) -> bool:
    return member is not None and member.role in (Role.RIG, Role.BURST)


def _is_burst(member: Member | None) -> bool:
    return member is not None and member.role is Role.BURST


def _member(body: AddNode) -> Member:
    return Member(body.node, body.name, body.public_key, body.device_ca, body.role, body.owner, body.expires_wall_s)


def _with_unique_names(members: Sequence[Member]) -> dict[NodeId, Member]:
    """Of equal names the one that was added first keeps it, machines of the office before rented ones.

    The others show with the first characters of their id, as many as make a name of their own.
    """
    taken: set[str] = set()
    named: dict[NodeId, Member] = {}
    for member in members:
        name, characters = member.name, NAME_SUFFIX_CHARACTERS
        while name in taken:
            name, characters = f"{member.name}-{member.node[:characters]}", characters + 1
        taken.add(name)
        named[member.node] = replace(member, name=name)
    return named
