"""The mesh log: a union of hash chains, and the members and users that it adds up to.

Which entries count is `chains`' business; here they are read, each after what it follows from. Admins write what they
like. A node has a chain of its own: that it leaves, or goes on under new keys, and, with the role burst, which cloud
nodes it lets in, which counts only while it has the role. Nodes that hold the same entries see the same mesh. Cloud
nodes leave it by the clock as well, each at the end of its lease. Whoever was taken out never comes back.

A machine of the office is known by the line of its ids: the one it was admitted under, and those that came after. What
an admin says of any of them, it is said of the machine.
"""

import math
from collections.abc import Iterable, Set
from dataclasses import replace
from typing import Final, assert_never

from meshgpu.core.trust.chains import Chains
from meshgpu.core.trust.lines import Line, is_admission, lines
from meshgpu.errors import TrustError
from meshgpu.model.clock import WALL_CLOCK_SLACK_S, Now
from meshgpu.model.ids import NO_DIGEST, KeyId, MeshId, NodeId, UserName, key_id, node_id
from meshgpu.model.trust import (
    OFFICE_ROLES,
    AddAdmin,
    AddNode,
    Body,
    Genesis,
    Head,
    LinkUser,
    LogEntry,
    Member,
    Notary,
    Rekey,
    RemoveAdmin,
    RemoveNode,
    Revoke,
    Role,
    SetPolicy,
    SetRole,
    Signed,
    UserKey,
)

REFUSALS_KEPT: Final = 16
"""Reasons for which entries were refused: more say the same."""


class MeshLog:
    """What this node holds of the log. Empty until `enter` names the mesh."""

    def __init__(self, notary: Notary) -> None:
        self._notary = notary
        self._chains: Chains | None = None
        self.mesh: MeshId | None = None
        self.mesh_name = ""
        self.members: dict[NodeId, Member] = {}
        self.users: dict[KeyId, UserKey] = {}
        self.former: dict[NodeId, Member] = {}
        """Machines of the office that were revoked or have left, and the ids that others had before their new keys."""
        self.heirs: dict[NodeId, NodeId] = {}
        """{id of before: the one that the same machine took next}, whether it still is a member or not."""
        self.former_users: dict[KeyId, UserKey] = {}
        """Keys that spoke for users there: nothing new is taken from them."""
        self.stopped: frozenset[KeyId] = frozenset()
        """Those of them whose jobs end."""
        self.ended: frozenset[NodeId] = frozenset()
        """Instances that are gone, and with them all that they ran."""
        self.frozen: tuple[KeyId, ...] = ()
        self.refused: tuple[str, ...] = ()
        """Why the newest entries that were refused were."""
        self.rented: dict[NodeId, Member] = {}
        """Every instance that was ever let in, for what it signed meanwhile."""
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
        self._chains = Chains(self._notary, mesh, genesis)
        self.mesh = mesh
        return self.add(entries)

    def add(self, log: Iterable[Signed]) -> tuple[Signed, ...]:
        """Take in what verifies and is new, and return it. What does not verify is left out; `refused` says why."""
        if self._chains is None:
            return ()
        added, refused = self._chains.add(log)
        self.refused = (*self.refused, *refused)[-REFUSALS_KEPT:]
        if added:
            self._recount(self._chains)
        return added

    def expire(self, now: Now) -> tuple[NodeId, ...]:
        """Let cloud nodes go whose time is over, clocks being as they are, and say which; nearly always none."""
        latest_wall_s = now.wall_s - WALL_CLOCK_SLACK_S
        if latest_wall_s <= self._first_expiry_wall_s or self._chains is None:
            return ()
        over = tuple(member.node for member in self.members.values() if _expiry_wall_s(member) < latest_wall_s)
        self._expired.update(over)
        self._recount(self._chains)
        return over

    # -- adding up ----------------------------------------------------------------------------------------------------

    def _recount(self, chains: Chains) -> None:
        machines = lines(chains)
        origin = {node: line.first for line in machines for node in line.ids}
        office: dict[NodeId, Member] = {}
        links: dict[KeyId, LinkUser] = {}
        revoked: dict[NodeId, bool] = {}
        for written in chains.counting:
            match written.entry.body:
                case Genesis(mesh_name=name):
                    self.mesh_name = name
                case AddNode(node=node) as body:
                    if is_admission(body) and node not in office:
                        office[node] = _member(body, expires_wall_s=None)
                case SetRole(node=node, role=role):
                    first = origin.get(node, node)
                    if role in OFFICE_ROLES and first in office:
                        office[first] = replace(office[first], role=role)
                case LinkUser() as body:
                    links.setdefault(key_id(body.public_key), body)  # a key speaks for one user, for ever
                case SetPolicy(may_leave=may_leave):
                    self.may_leave = may_leave
                case Revoke(node=node, stops_jobs=stops_jobs):
                    revoked[node] = revoked.get(node, False) or stops_jobs
                case AddAdmin() | RemoveAdmin() | RemoveNode() | Rekey():
                    pass
                case _ as never:
                    assert_never(never)
        self._place(chains, machines, office, revoked.keys())
        self._link(chains, machines, links, {node for node, stops_jobs in revoked.items() if stops_jobs})
        self._heads = chains.heads()
        self.frozen = chains.frozen()

    def _place(self, chains: Chains, machines: list[Line], office: dict[NodeId, Member], revoked: Set[NodeId]) -> None:
        """Who is in, and who was: each machine under the last of its ids, and under those before among the former."""
        known = {node for line in machines for node in line.ids}
        trusted = [line for line in machines if line.removals.isdisjoint(revoked)]
        renters = {node for line in trusted if office[line.first].role is Role.BURST for node in line.ids}
        left, ended, rented = self._of_nodes(chains, renters, known)
        inside: dict[NodeId, Member] = {}
        self.former, self.heirs = {}, {}
        for line in machines:
            *before, current = line.members(office[line.first])
            if line.is_lost or not line.removals.isdisjoint(revoked) or not left.isdisjoint(line.ids):
                before.append(current)
            else:
                inside[current.node] = current
            self.former.update((member.node, member) for member in before)
            self.heirs.update((node, heir) for node, _, heir in line.changes())
        for node, member in rented.items():
            if node not in known and node not in ended and node not in revoked:
                inside.setdefault(node, member)
        self.members = _with_unique_names(inside)
        self.ended, self.rented = frozenset(ended), rented
        self._first_expiry_wall_s = min(map(_expiry_wall_s, self.members.values()), default=math.inf)

    def _of_nodes(
        self, chains: Chains, renters: Set[NodeId], office: Set[NodeId]
    ) -> tuple[set[NodeId], set[NodeId], dict[NodeId, Member]]:
        """(who left, which instances are gone, which were let in), by what nodes wrote of themselves and of these."""
        left: set[NodeId] = set()
        ended = set(self._expired)
        rented: dict[NodeId, Member] = {}
        for author, run in chains.of_nodes():
            rents = author in renters
            for written in run:
                match written.entry.body:
                    case Rekey():
                        break  # what these keys sign later, whoever took them may have signed
                    case RemoveNode(node=node) if node == author:
                        left.add(node)
                    case RemoveNode(node=node) if rents and node not in office:
                        ended.add(node)
                    case AddNode(role=Role.CLOUD, expires_wall_s=float(ends)) as body if rents:
                        if body.node == node_id(body.public_key):
                            rented.setdefault(body.node, _member(body, ends))
                    case _:
                        pass
        return left, ended, rented

    def _link(self, chains: Chains, machines: list[Line], links: dict[KeyId, LinkUser], stopping: Set[NodeId]) -> None:
        """Whose key is whose: as admins said, and as the keys were handed on. stopping: machines whose jobs end."""
        for line in machines:
            for node, said, heir in line.changes():
                for new in said.users:
                    link = links.get(key_id(new.before))
                    if link is not None and link.node == node:
                        links.setdefault(key_id(new.after), replace(link, public_key=new.after, node=heir))
        admins = frozenset(chains.admins())
        every = {key: UserKey(b.user, key, b.public_key, b.node, b.uid, key in admins) for key, b in links.items()}
        inside = self.members.keys() & {line.current for line in machines}
        self.users = {key: user for key, user in every.items() if user.node in inside}
        self.former_users = {key: user for key, user in every.items() if user.node in self.former}
        self.stopped = frozenset(key for line in machines for key in self._stopped(chains, line, stopping))

    def _stopped(self, chains: Chains, line: Line, stopping: Set[NodeId]) -> set[KeyId]:
        """Keys of a machine whose jobs end: also those that only one side of a fork names, which it may have used."""
        said = list(chains.heirs(line.first))
        if stopping.isdisjoint({*line.removals, *(node_id(rekey.public_key) for _, rekey in said)}):
            return set()
        keys = {key for key, user in self.former_users.items() if user.node in line.ids}
        for _, rekey in said:  # each after the one before
            keys |= {key_id(new.after) for new in rekey.users if key_id(new.before) in keys}
        return keys - self.users.keys()

    # -- reading ------------------------------------------------------------------------------------------------------

    def heads(self) -> tuple[Head, ...]:
        """The newest entry of each author's chain, as digests carry it."""
        return self._heads

    def beyond(self, heads: Iterable[Head]) -> tuple[Signed, ...]:
        """Entries that somebody with `heads` lacks; where its head is none of ours, everything of that author."""
        heads = tuple(heads)
        if self._chains is None or (heads == self._heads and not self.frozen):
            return ()  # nearly always
        return self._chains.beyond(heads)

    def all_entries(self) -> tuple[Signed, ...]:
        return self.beyond(())

    def member_named(self, name: str) -> Member | None:
        return next((member for member in self.members.values() if member.name == name), None)

    def current(self, node: NodeId) -> NodeId:
        """The newest id of the machine that is, or was, `node`."""
        while (heir := self.heirs.get(node)) is not None:
            node = heir
        return node

    def account(self, node: NodeId, uid: int) -> UserKey | None:
        """The key that speaks for an OS account of a node."""
        return next((user for user in self.users.values() if user.node == node and user.uid == uid), None)

    def user_of(self, key: KeyId) -> UserName | None:
        user = self.users.get(key)
        return user.user if user else None

    def known(self, node: NodeId) -> Member | None:
        """A machine of now or before, rented ones too: whose key signed what it says it signed."""
        return self.members.get(node) or self.former.get(node) or self.rented.get(node)

    def name_of(self, node: NodeId) -> str:
        """What people call a machine of now or before."""
        member = self.known(node)
        return member.name if member else f"the machine {node[:8]}"

    def admins(self) -> tuple[UserKey, ...]:
        """The accounts that may change who is in the mesh."""
        return tuple(user for _, user in sorted(self.users.items()) if user.is_admin)

    def candidates(self) -> tuple[UserKey, ...]:
        """The accounts that an admin could make admins, on machines that have none; those of other users first."""
        chains, admins = self._chains, self.admins()
        if chains is None:
            return ()
        names, nodes = {user.user for user in admins}, {user.node for user in admins}
        others = (user for user in self.users.values() if user.node not in nodes and not chains.was_removed(user.key))
        return tuple(sorted(others, key=lambda user: (user.user in names, user.user, user.key)))

    def person(self, key: KeyId) -> str:
        """Who a key is, as people read it: user and machine, of now or before."""
        user = self.users.get(key) or self.former_users.get(key)
        if user is None:
            node = NodeId(key)
            return self.name_of(node) if node in self.members or node in self.former else f"the key {key[:12]}"
        return f"{user.user} on {self.name_of(user.node)}"

    # -- writing ------------------------------------------------------------------------------------------------------

    def write(self, author: KeyId, bodies: Iterable[Body], notary: Notary | None = None) -> tuple[Signed, ...]:
        """Sign the next entries of `author`'s chain. They count once they are added.

        notary: what holds the author's key, where this node does not. Raises TrustError `not-an-admin` or `frozen`.
        """
        chains, mesh, bodies = self._chains, self.mesh, tuple(bodies)
        if chains is None or mesh is None or not self._may_write(chains, author, bodies):
            raise TrustError(
                "not-an-admin",
                f"cannot change who is in the mesh {self.mesh_name}: this account is not one of its admins",
                "ask an admin; they are shown by: meshgpu admin ls",
            )
        self._check_not_frozen(author)
        run = chains.run(author)
        seq, previous = len(run), run[-1].name if run else NO_DIGEST
        others = tuple(head for head in chains.citable() if head.author != author)
        written: list[Signed] = []
        for body in bodies:
            entry = (notary or self._notary).sign(author, LogEntry(mesh, author, seq, previous, others, body))
            written.append(entry)
            seq, previous = seq + 1, self._notary.digest(entry)
        return tuple(written)

    def _check_not_frozen(self, author: KeyId) -> None:
        if author in self.frozen:
            raise TrustError(
                "frozen",
                "cannot write to the mesh log: two different entries with one number were signed with this key",
                "another admin must remove it: meshgpu admin remove",
            )

    def _may_write(self, chains: Chains, author: KeyId, bodies: tuple[Body, ...]) -> bool:
        member = self.members.get(NodeId(author))
        parts = len(bodies) == 1 and (bodies == (RemoveNode(NodeId(author)),) or isinstance(bodies[0], Rekey))
        return chains.is_admin(author) or (member is not None and (parts or member.role is Role.BURST))

    def revocation(self, node: NodeId, *, stops_jobs: bool) -> Revoke:
        """What takes the machine of `node` out, naming where the chains of its admins end: with what is known here.

        By the id that an admin let in: later ones may be known to some of us only, for as long as they are told.
        """
        ends = tuple(
            head
            for key, user in sorted(self.users.items())
            if user.node == node and user.is_admin and (head := self.last_of(key)) is not None
        )
        return Revoke(self._first_of(node), ends, stops_jobs)

    def _first_of(self, node: NodeId) -> NodeId:
        before = {heir: node for node, heir in self.heirs.items()}
        while node in before:
            node = before[node]
        return node

    def check_rekey(self, node: NodeId, rekey: Rekey) -> None:
        """Raises TrustError unless `node` and the admins among its accounts can write all of it, now."""
        if self._chains is None or node not in self.members:
            raise TrustError("not-in-mesh", "cannot take new keys: this machine is no member of a mesh")
        self._chains.check_rekey(KeyId(node), rekey)
        for author in (KeyId(node), *(author for author, _ in self.hand_over(rekey))):
            self._check_not_frozen(author)

    def hand_over(self, rekey: Rekey) -> tuple[tuple[KeyId, tuple[Body, ...]], ...]:
        """(author, what he writes before it) of each admin among its accounts: his right goes to his next key.

        In chains of their own, so that the rules of admins hold for it: a removal that had not heard of it wins.
        """
        heir = node_id(rekey.public_key)
        return tuple(
            (key, (AddAdmin(new.after, heir), RemoveAdmin(key, self.last_of(key))))
            for new in rekey.users
            if (key := key_id(new.before)) in self.users and self.users[key].is_admin
        )

    def last_of(self, author: KeyId) -> Head | None:
        """The last entry of an author that is known here; None if he wrote nothing."""
        return self._chains.last_of(author) if self._chains else None


def found(notary: Notary, admin: KeyId, genesis: Genesis) -> tuple[MeshId, Signed]:
    """The first entry of a new mesh, signed by its founder, and the id that follows from it."""
    entry = notary.sign(admin, LogEntry(MeshId(""), admin, 0, NO_DIGEST, (), genesis))
    return MeshId(notary.digest(entry)), entry


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
