"""The mesh log: a union of hash chains, and the members and users that it adds up to.

Admins write what they like. A node with the role burst has a chain of its own, of which only what it says about cloud
nodes counts, and that only while it has the role. Nothing is discarded and order does not matter: nodes that hold the
same entries see the same mesh. Cloud nodes leave it by the clock as well, each at the end of its lease.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final, assert_never

from meshgpu.errors import TrustError
from meshgpu.model.clock import WALL_CLOCK_SLACK_S, Now
from meshgpu.model.ids import Digest, KeyId, MeshId, NodeId, UserName, key_id, node_id
from meshgpu.model.trust import (
    OFFICE_ROLES,
    AddNode,
    Body,
    Genesis,
    Head,
    LinkUser,
    LogEntry,
    Member,
    Notary,
    RemoveNode,
    Role,
    SetPolicy,
    SetRole,
    Signed,
    UserKey,
)

CHAIN_LIMIT: Final = 100_000
"""Entries of one author at most: an office needs hundreds; a hostile admin must not fill our memory."""


@dataclass(slots=True)
class _Chain:
    """One author's entries by sequence number; more than one at a number is a fork and freezes the author there."""

    public_key: bytes
    is_admins: bool = True
    entries: dict[int, list[tuple[Digest, Signed, LogEntry]]] = field(default_factory=dict)

    def counting(self) -> list[tuple[Digest, Signed, LogEntry]]:
        """The entries that count: from 0 without gap or fork, each naming the one before."""
        run: list[tuple[Digest, Signed, LogEntry]] = []
        previous = Digest("")
        while len(found := self.entries.get(len(run), [])) == 1 and found[0][2].previous == previous:
            run.append(found[0])
            previous = found[0][0]
        return run


class MeshLog:
    """What this node holds of the log. Empty until `enter` names the mesh."""

    def __init__(self, notary: Notary) -> None:
        self._notary = notary
        self._chains: dict[KeyId, _Chain] = {}
        self.mesh: MeshId | None = None
        self.mesh_name = ""
        self.members: dict[NodeId, Member] = {}
        self.users: dict[KeyId, UserKey] = {}
        self.frozen: tuple[KeyId, ...] = ()
        self.may_leave = False
        """Whether jobs may leave the office for rented instances."""
        self._heads: tuple[Head, ...] = ()
        self._expired: set[NodeId] = set()
        self._first_expiry_wall_s = math.inf

    def enter(self, mesh: MeshId, log: Iterable[Signed]) -> tuple[Signed, ...]:
        """Make `mesh` ours; its genesis must be in `log`. Returns the entries that were new. Raises TrustError."""
        entries = tuple(log)
        genesis = next((entry for entry in entries if MeshId(self._notary.digest(entry)) == mesh), None)
        if genesis is None:
            raise TrustError("wrong-mesh", f"cannot enter the mesh {mesh[:12]}: its first entry is missing")
        key = self._admin_key(genesis)
        self.mesh = mesh
        self._chains = {key_id(key): _Chain(key)}
        return self.add(entries)

    def add(self, log: Iterable[Signed]) -> tuple[Signed, ...]:
        """Take in what verifies and is new, and return it. What does not verify is left out, never an error."""
        added: list[Signed] = []
        waiting = tuple(log)
        while taken := [entry for entry in waiting if self._add_one(entry)]:
            added += taken
            self._recount()  # who has just got a role may have written some of the rest
            waiting = tuple(entry for entry in waiting if entry.key not in self._chains)
        return tuple(added)

    def expire(self, now: Now) -> tuple[NodeId, ...]:
        """Let cloud nodes go whose time is over, clocks being as they are, and say which; nearly always none."""
        latest_wall_s = now.wall_s - WALL_CLOCK_SLACK_S
        if latest_wall_s <= self._first_expiry_wall_s:
            return ()
        over = tuple(member.node for member in self.members.values() if _expiry_wall_s(member) < latest_wall_s)
        self._expired.update(over)
        self._recount()
        return over

    def _add_one(self, signed: Signed) -> bool:
        chain = self._chain_of(signed.key)
        if chain is None:
            return False
        name = self._notary.digest(signed)
        try:
            entry = self._notary.read(signed, chain.public_key, LogEntry)
        except TrustError:
            return False
        is_genesis = entry.seq == 0 and MeshId(name) == self.mesh
        is_next = entry.mesh == self.mesh and (entry.seq > 0 or not chain.is_admins)
        if entry.author != signed.key or not (is_genesis or is_next):
            return False
        found = chain.entries.setdefault(entry.seq, [])
        if entry.seq >= CHAIN_LIMIT or len(found) > 1 or any(digest == name for digest, _, _ in found):
            return False
        found.append((name, signed, entry))
        self._chains[signed.key] = chain
        return True

    def _chain_of(self, author: KeyId) -> _Chain | None:
        """The author's chain, a new one for a node with the role burst; None for whoever may write nothing."""
        member = self.members.get(NodeId(author))
        if author not in self._chains and member is not None and member.role is Role.BURST:
            return _Chain(member.public_key, is_admins=False)
        return self._chains.get(author)

    def _admin_key(self, genesis: Signed) -> bytes:
        """The key inside the genesis, which must have signed it: its hash is the mesh id, so it needs no other root."""
        body = self._notary.read_pinned(genesis, self._notary.digest(genesis), LogEntry).body
        if not isinstance(body, Genesis):
            raise TrustError("wrong-mesh", "cannot enter the mesh: its first entry does not found one")
        self._notary.read(genesis, body.admin_key, LogEntry)
        return body.admin_key

    def _recount(self) -> None:
        heads: list[Head] = []
        counting: dict[KeyId, list[Body]] = {}
        for author in sorted(self._chains):
            if run := self._chains[author].counting():
                heads.append(Head(author, len(run) - 1, run[-1][0]))
                counting[author] = [entry.body for _, _, entry in run]
        members: dict[NodeId, Member] = {}
        users: dict[KeyId, UserKey] = {}
        for author, bodies in counting.items():
            if self._chains[author].is_admins:
                self._count_admin(bodies, members, users)
        gone = self._expired | {
            body.node
            for author, bodies in counting.items()
            if self._writes_of_cloud(author, members)
            for body in bodies
            if isinstance(body, RemoveNode)
        }
        for author, bodies in counting.items():
            if self._writes_of_cloud(author, members):
                _count_cloud(bodies, members, gone)
        self._heads = tuple(heads)
        self.members = _with_unique_names(members)
        self._first_expiry_wall_s = min(map(_expiry_wall_s, members.values()), default=math.inf)
        self.users = {key: user for key, user in users.items() if user.node in members}
        self.frozen = tuple(
            author
            for author in sorted(self._chains)
            if any(len(found) > 1 for found in self._chains[author].entries.values())
        )

    def _count_admin(self, bodies: list[Body], members: dict[NodeId, Member], users: dict[KeyId, UserKey]) -> None:
        """Take in what an admin wrote, into `members` and `users`."""
        for body in bodies:
            match body:
                case Genesis(mesh_name=name):
                    self.mesh_name = name
                case AddNode(node=node, role=role):
                    if role in OFFICE_ROLES and node == node_id(body.public_key) and node not in members:
                        members[node] = _member(body, expires_wall_s=None)
                case SetRole(node=node, role=role):
                    if role in OFFICE_ROLES and node in members:
                        members[node] = replace(members[node], role=role)
                case LinkUser():
                    key = key_id(body.public_key)
                    is_admin = key in self._chains and self._chains[key].is_admins
                    users[key] = UserKey(body.user, key, body.public_key, body.node, body.uid, is_admin)
                case SetPolicy(may_leave=may_leave):
                    self.may_leave = may_leave
                case RemoveNode():
                    pass  # revoking a machine of the office is another matter
                case _:
                    assert_never(body)

    def _writes_of_cloud(self, author: KeyId, members: dict[NodeId, Member]) -> bool:
        writer = members.get(NodeId(author))
        return not self._chains[author].is_admins and writer is not None and writer.role is Role.BURST

    # -- reading ------------------------------------------------------------------------------------------------------

    def heads(self) -> tuple[Head, ...]:
        """The newest counting entry of each author, as digests carry it."""
        return self._heads

    def beyond(self, heads: Iterable[Head]) -> tuple[Signed, ...]:
        """Entries that somebody with `heads` lacks; where its head is none of ours, everything of that author."""
        heads = tuple(heads)
        if heads == self._heads and not self.frozen:
            return ()  # nearly always
        theirs = {head.author: head for head in heads}
        lacking: list[Signed] = []
        for author in sorted(self._chains):
            chain = self._chains[author]
            head = theirs.get(author)
            found = chain.entries.get(head.seq, []) if head else []
            agrees = head is not None and any(digest == head.entry for digest, _, _ in found)
            start = head.seq + 1 if head and agrees else 0
            for seq in sorted(chain.entries):
                if seq >= start or len(chain.entries[seq]) > 1:
                    lacking.extend(signed for _, signed, _ in chain.entries[seq])
        return tuple(lacking)

    def all_entries(self) -> tuple[Signed, ...]:
        return self.beyond(())

    def member_named(self, name: str) -> Member | None:
        return next((member for member in self.members.values() if member.name == name), None)

    def account(self, node: NodeId, uid: int) -> UserKey | None:
        """The key that speaks for an OS account of a node."""
        return next((user for user in self.users.values() if user.node == node and user.uid == uid), None)

    def user_of(self, key: KeyId) -> UserName | None:
        user = self.users.get(key)
        return user.user if user else None

    # -- writing ------------------------------------------------------------------------------------------------------

    def write(self, author: KeyId, bodies: Iterable[Body]) -> tuple[Signed, ...]:
        """Sign the next entries of `author`'s chain. They count once they are added. Raises `not-an-admin`."""
        chain = self._chain_of(author)
        if chain is None or self.mesh is None:
            raise TrustError(
                "not-an-admin",
                f"cannot change who is in the mesh {self.mesh_name}: this account is not one of its admins",
                "ask the person who made the mesh to run: meshgpu invite",
            )
        run = chain.counting()
        seq, previous = len(run), run[-1][0] if run else Digest("")
        others = tuple(head for head in self.heads() if head.author != author)
        written: list[Signed] = []
        for body in bodies:
            entry = self._notary.sign(author, LogEntry(self.mesh, author, seq, previous, others, body))
            written.append(entry)
            seq, previous = seq + 1, self._notary.digest(entry)
        return tuple(written)


def found(notary: Notary, admin: KeyId, genesis: Genesis) -> tuple[MeshId, Signed]:
    """The first entry of a new mesh, signed by its founder, and the id that follows from it."""
    entry = notary.sign(admin, LogEntry(MeshId(""), admin, 0, Digest(""), (), genesis))
    return MeshId(notary.digest(entry)), entry


def _count_cloud(bodies: list[Body], members: dict[NodeId, Member], gone: set[NodeId]) -> None:
    """Take in the cloud nodes that a burst node let in, but for those that are gone: they never come back."""
    for body in bodies:
        if isinstance(body, AddNode) and body.role is Role.CLOUD and body.expires_wall_s is not None:
            is_new = body.node not in members and body.node not in gone
            if is_new and body.node == node_id(body.public_key):
                members[body.node] = _member(body, body.expires_wall_s)


def _expiry_wall_s(member: Member) -> float:
    return math.inf if member.expires_wall_s is None else member.expires_wall_s


def _member(body: AddNode, expires_wall_s: float | None) -> Member:
    return Member(body.node, body.name, body.public_key, body.device_ca, body.role, body.owner, expires_wall_s)


def _with_unique_names(members: dict[NodeId, Member]) -> dict[NodeId, Member]:
    """Of equal names the one that was added first keeps it; the others show with the first characters of their id."""
    taken: set[str] = set()
    named: dict[NodeId, Member] = {}
    for node, member in members.items():
        name = member.name if member.name not in taken else f"{member.name}-{node[:4]}"
        taken.add(name)
        named[node] = replace(member, name=name)
    return named
