"""The mesh log: a union of admins' hash chains, and the members and users that it adds up to.

Nothing is discarded and order does not matter: nodes that hold the same entries see the same mesh.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from meshgpu.errors import TrustError
from meshgpu.model.ids import Digest, KeyId, MeshId, NodeId, UserName, key_id, node_id
from meshgpu.model.trust import AddNode, Genesis, Head, LinkUser, LogEntry, Member, Notary, RemoveNode, Signed, UserKey

CHAIN_LIMIT: Final = 100_000
"""Entries of one author at most: an office needs hundreds; a hostile admin must not fill our memory."""


@dataclass(slots=True)
class _Chain:
    """One author's entries by sequence number; more than one at a number is a fork and freezes the author there."""

    public_key: bytes
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
        self._heads: tuple[Head, ...] = ()

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
        added = tuple(entry for entry in log if self._add_one(entry))
        if added:
            self._recount()
        return added

    def _add_one(self, signed: Signed) -> bool:
        chain = self._chains.get(signed.key)
        if chain is None:
            return False
        name = self._notary.digest(signed)
        try:
            entry = self._notary.read(signed, chain.public_key, LogEntry)
        except TrustError:
            return False
        is_genesis = entry.seq == 0 and MeshId(name) == self.mesh
        if entry.author != signed.key or not (is_genesis or (entry.mesh == self.mesh and entry.seq > 0)):
            return False
        found = chain.entries.setdefault(entry.seq, [])
        if entry.seq >= CHAIN_LIMIT or len(found) > 1 or any(digest == name for digest, _, _ in found):
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
        members: dict[NodeId, Member] = {}
        users: dict[KeyId, UserKey] = {}
        admins = set(self._chains)
        heads: list[Head] = []
        for author in sorted(self._chains):
            run = self._chains[author].counting()
            if run:
                heads.append(Head(author, len(run) - 1, run[-1][0]))
            for _, _, entry in run:
                match entry.body:
                    case Genesis(mesh_name=name):
                        self.mesh_name = name
                    case AddNode() as body if body.node == node_id(body.public_key) and body.node not in members:
                        members[body.node] = Member(
                            body.node, body.name, body.public_key, body.device_ca, body.role, body.owner
                        )
                    case LinkUser() as body:
                        key = key_id(body.public_key)
                        users[key] = UserKey(body.user, key, body.public_key, body.node, body.uid, key in admins)
        self._heads = tuple(heads)
        self.members = _with_unique_names(members)
        self.users = users
        self.frozen = tuple(
            author
            for author in sorted(self._chains)
            if any(len(found) > 1 for found in self._chains[author].entries.values())
        )

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

    def write(self, author: KeyId, bodies: Iterable[AddNode | LinkUser | RemoveNode]) -> tuple[Signed, ...]:
        """Sign the next entries of `author`'s chain. They count once they are added. Raises `not-an-admin`."""
        chain = self._chains.get(author)
        if chain is None or self.mesh is None:
            raise TrustError(
                "not-an-admin",
                f"cannot change who is in the mesh {self.mesh_name}: this account is not one of its admins",
                "ask the person who made the mesh to run: meshgpu invite",
            )
        run = chain.counting()
        seq, previous = len(run), run[-1][0]
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


def _with_unique_names(members: dict[NodeId, Member]) -> dict[NodeId, Member]:
    """Of equal names the one that was added first keeps it; the others show with the first characters of their id."""
    taken: set[str] = set()
    named: dict[NodeId, Member] = {}
    for node, member in members.items():
        name = member.name if member.name not in taken else f"{member.name}-{node[:4]}"
        taken.add(name)
        named[node] = Member(node, name, member.public_key, member.device_ca, member.role, member.owner)
    return named
