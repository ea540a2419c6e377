"""The mesh log: a union of hash chains, those of admins and those of burst nodes, and what it adds up to.

Nothing that counts is discarded and order does not matter: nodes that hold the same entries see the same mesh.
The chain of a burst node is taken in once an admin's entry gave it that role; digests bring what came before.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from meshgpu.core.trust.roster import Roster, add_up
from meshgpu.errors import TrustError
from meshgpu.model.ids import Digest, KeyId, MeshId, NodeId, UserName, key_id
from meshgpu.model.trust import (
    AddNode,
    Genesis,
    Head,
    LogBody,
    LogEntry,
    Member,
    Notary,
    RemoveNode,
    Role,
    Signed,
    UserKey,
)

CHAIN_LIMIT: Final = 100_000
"""Entries of one admin at most: an office needs hundreds; a hostile admin must not fill our memory."""

NODE_CHAIN_LIMIT: Final = 20_000
NODE_ENTRY_BYTES: Final = 4096
"""Entries of one burst node, and bytes of each: ten thousand instances in 80 MB at most."""


@dataclass(slots=True)
class _Chain:
    """One author's entries by sequence number; more than one at a number is a fork and freezes the author there."""

    public_key: bytes
    is_admin: bool
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
    """What this node holds of the log. Empty until `enter` names the mesh; no cloud node counts before `expire`."""

    def __init__(self, notary: Notary) -> None:
        self._notary = notary
        self._chains: dict[KeyId, _Chain] = {}
        self._wall_s = 0.0
        self._roster = Roster()
        self._heads: tuple[Head, ...] = ()
        self.mesh: MeshId | None = None
        self.frozen: tuple[KeyId, ...] = ()

    def enter(self, mesh: MeshId, log: Iterable[Signed]) -> tuple[Signed, ...]:
        """Make `mesh` ours; its genesis must be in `log`. Returns the entries that were new. Raises TrustError."""
        entries = tuple(log)
        genesis = next((entry for entry in entries if MeshId(self._notary.digest(entry)) == mesh), None)
        if genesis is None:
            raise TrustError("wrong-mesh", f"cannot enter the mesh {mesh[:12]}: its first entry is missing")
        key = self._admin_key(genesis)
        self.mesh = mesh
        self._chains = {key_id(key): _Chain(key, is_admin=True)}
        return self.add(entries)

    def add(self, log: Iterable[Signed]) -> tuple[Signed, ...]:
        """Take in what verifies and is new, and return it. What does not verify is left out, never an error."""
        entries = tuple(log)
        added: list[Signed] = []
        for of_admins in (True, False):  # admins first: they say whose other chains are kept
            new = [entry for entry in entries if self._is_of_admin(entry) is of_admins and self._add_one(entry)]
            if new:
                added.extend(new)
                self._recount()
        return tuple(added)

    def expire(self, wall_s: float) -> bool:
        """Let time pass: cloud nodes are members while the clock says so. Returns whether that changed anything."""
        self._wall_s = wall_s
        since, until = self._roster.valid_wall_s
        if since <= wall_s < until:
            return False
        self._recount()
        return True

    def _is_of_admin(self, signed: Signed) -> bool:
        chain = self._chains.get(signed.key)
        return chain is not None and chain.is_admin

    def _add_one(self, signed: Signed) -> bool:
        chain = self._chains.get(signed.key)
        if chain is None or (not chain.is_admin and len(signed.payload) > NODE_ENTRY_BYTES):
            return False
        name = self._notary.digest(signed)
        try:
            entry = self._notary.read(signed, chain.public_key, LogEntry)
        except TrustError:
            return False
        is_genesis = chain.is_admin and entry.seq == 0 and MeshId(name) == self.mesh
        is_next = entry.mesh == self.mesh and (entry.seq > 0 or not chain.is_admin)
        if entry.author != signed.key or not (is_genesis or is_next):
            return False
        limit = CHAIN_LIMIT if chain.is_admin else NODE_CHAIN_LIMIT
        found = chain.entries.setdefault(entry.seq, []) if 0 <= entry.seq < limit else None
        if found is None or len(found) > 1 or any(digest == name for digest, _, _ in found):
            return False
        found.append((name, signed, entry))
        return True

    def _admin_key(self, genesis: Signed) -> bytes:
        """The key inside the genesis, which must have signed it: its hash is the mesh id, so it needs no other root."""
        body = self._notary.read_pinned(genesis, self._notary.digest(genesis), LogEntry).body
        if not isinstance(body, Genesis):
            raise TrustError("wrong-mesh", "cannot enter the mesh: its first entry does not found one")
        self._notary.read(genesis, body.admin_key, LogEntry)
        return body.admin_key

    def _recount(self) -> None:
        runs = {author: self._chains[author].counting() for author in self._authors()}
        admins = {a: [entry for _, _, entry in run] for a, run in runs.items() if self._chains[a].is_admin}
        nodes = {a: [entry for _, _, entry in run] for a, run in runs.items() if not self._chains[a].is_admin}
        self._roster = add_up(admins, nodes, self._wall_s)
        for node in sorted(self._roster.burst):
            self._chains.setdefault(KeyId(node), _Chain(self._roster.members[node].public_key, is_admin=False))
        self._heads = tuple(Head(author, len(run) - 1, run[-1][0]) for author, run in runs.items() if run)
        self.frozen = tuple(
            author for author in runs if any(len(found) > 1 for found in self._chains[author].entries.values())
        )

    def _authors(self) -> list[KeyId]:
        """Admins first: who lacks both takes in a burst node's entries only after an admin's."""
        return sorted(self._chains, key=lambda author: (not self._chains[author].is_admin, author))

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def mesh_name(self) -> str:
        return self._roster.mesh_name

    @property
    def members(self) -> dict[NodeId, Member]:
        return self._roster.members

    @property
    def users(self) -> dict[KeyId, UserKey]:
        return self._roster.users

    @property
    def may_leave(self) -> bool:
        """Whether the mesh lets jobs leave the office."""
        return self._roster.may_leave

    @property
    def gone(self) -> frozenset[NodeId]:
        """Cloud nodes whose end is known: nothing that they ran lives on."""
        return self._roster.gone

    @property
    def changes_wall_s(self) -> float:
        """When `expire` will change something at the latest; infinity for never."""
        return self._roster.valid_wall_s[1]

    def role(self, node: NodeId) -> Role | None:
        member = self.members.get(node)
        return member.role if member else None

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
        for author in self._authors():
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

    def write(self, author: KeyId, bodies: Iterable[LogBody]) -> tuple[Signed, ...]:
        """Sign the next entries of `author`'s chain, an admin's or a burst node's. They count once they are added.

        Raises TrustError `not-an-admin`, or `frozen` where the author signed one number twice.
        """
        bodies = tuple(bodies)
        chain = self._chains.get(author)
        if chain is None or self.mesh is None or not (chain.is_admin or self._may_rent(author, bodies)):
            raise TrustError(
                "not-an-admin",
                f"cannot change who is in the mesh {self.mesh_name}: this account is not one of its admins",
                "ask the person who made the mesh to run: meshgpu invite",
            )
        if author in self.frozen:
            raise TrustError(
                "frozen", f"cannot change who is in the mesh {self.mesh_name}: two entries have one number"
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

    def _may_rent(self, author: KeyId, bodies: tuple[LogBody, ...]) -> bool:
        """Whether a burst node may write all this: cloud nodes that come and go."""
        return self.role(NodeId(author)) is Role.BURST and all(
            isinstance(body, RemoveNode) or (isinstance(body, AddNode) and body.role is Role.CLOUD) for body in bodies
        )


def found(notary: Notary, admin: KeyId, genesis: Genesis) -> tuple[MeshId, Signed]:
    """The first entry of a new mesh, signed by its founder, and the id that follows from it."""
    entry = notary.sign(admin, LogEntry(MeshId(""), admin, 0, Digest(""), (), genesis))
    return MeshId(notary.digest(entry)), entry
