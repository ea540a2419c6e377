"""The chains of the mesh log: who may write, what came before what, and which entries count.

Four rules decide what admins' entries mean, in whatever order they came:

1. An entry *holds* if its author was an admin in the part of the log that the entry itself follows from.
2. A removal that holds ends its target's chain after the entry it names, and never before what its author had seen of
   it. What the target wrote later counts for nothing, but for removals: two admins who remove each other at the same
   time are both out. So a thief with an admin's key can take others out, but not stay in, nor undo what they had done
   before; the recovery key, which nobody removes, begins anew.
3. What counts needs an author whose own admission counts. Who was removed does not come back.
4. Two entries with one number freeze their author there, unless a removal names which of the two it goes on from.

A node that goes on under new keys stays the same machine: who revokes one of its ids revokes all that come after it.
A node is no admin: two entries with one number in its own chain, whatever they say, end its machine for ever.

Who counts for what (`Standing`) is read from chains up to their first gap or fork; of a machine that does not rent only
that it leaves or goes on under new keys. Of two that prove a fork a third is not needed, and what a node says after its
fork, or under keys that come after one, is not taken in: so nodes may hold different entries of a liar. All the same
they agree, because nothing is read from these but that he is a liar. An entry follows from what those wrote whom its
own past calls admins; other heads in it are passed over, so whom only some know holds up nobody.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from meshgpu.core.trust.rekeying import Lineage, check_rekey
from meshgpu.errors import TrustError
from meshgpu.model.ids import NO_DIGEST, Digest, KeyId, MeshId, NodeId, key_id, node_id
from meshgpu.model.trust import (
    AddAdmin,
    AddNode,
    Genesis,
    Head,
    LogEntry,
    Notary,
    Rekey,
    Removal,
    RemoveAdmin,
    RemoveNode,
    Revoke,
    Role,
    SetRole,
    Signed,
)

CHAIN_LIMIT: Final = 100_000
"""Entries of one author at most: an office needs hundreds; a hostile admin must not fill our memory."""

Clock = Mapping[KeyId, int]
"""A part of the log that is complete: for each author the number up to which it holds his entries."""


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """A signed entry that verified, under its digest."""

    name: Digest
    signed: Signed
    entry: LogEntry

    @property
    def author(self) -> KeyId:
        return self.entry.author

    def is_in(self, part: Clock | None) -> bool:
        """Whether it belongs to a part of the log; None is all of it."""
        return part is None or part.get(self.entry.author, -1) >= self.entry.seq


@dataclass(frozen=True, slots=True)
class Past:
    """What an entry follows from, once all of it is here. It is the same on every node, and never changes again.

    admins: whom it calls admins, rightly or not. heads: those of the entry's that are by such authors.
    """

    admins: frozenset[KeyId]
    heads: tuple[Head, ...]


@dataclass(frozen=True, slots=True)
class Standing:
    """Who counts for what, by the chains up to their first gap or fork: whom they name, one after the other.

    admins: whom any of them calls admins. renters: who may write more than one entry; their heirs may as well. lineage:
    of machines that were let in. What is *held* of others may differ from node to node: nothing is read from it, and
    nobody is told of it.
    """

    admins: frozenset[KeyId]
    renters: frozenset[NodeId]
    lineage: Lineage

    def may_rent(self, node: NodeId) -> bool:
        return not self.renters.isdisjoint(self.lineage.ancestry(node))

    def is_told(self, author: KeyId) -> bool:
        """Whether what he wrote is passed on: not that of keys below a fork, of which everybody may hold other ones."""
        return author in self.admins or self.lineage.knows(NodeId(author))

    def is_wide(self, author: KeyId) -> bool:
        """Whether all that `author` wrote is read: of a machine that does not rent only that it leaves or goes on."""
        return author in self.admins or self.may_rent(NodeId(author))


class Chains:
    """All entries that this node holds, whoever wrote them."""

    def __init__(self, notary: Notary, mesh: MeshId, genesis: Signed) -> None:
        """Raises TrustError unless `genesis` founds `mesh`."""
        self._notary = notary
        self._mesh = mesh
        body = _founding(notary, genesis)
        self.founder = key_id(body.admin_key)
        self.recovery = key_id(body.recovery_key)
        self._keys = {self.founder: body.admin_key, self.recovery: body.recovery_key}
        self._admins = {self.founder, self.recovery}
        self._renters: set[NodeId] = set()
        self._admitted: set[NodeId] = set()
        self._rekeys: dict[NodeId, list[Written]] = {}
        self._forks: dict[NodeId, int] = {}
        self._lineage: Lineage | None = None
        self._standing = Standing(frozenset((self.founder, self.recovery)), frozenset(), Lineage((), {}))
        self._turn = 0
        self._held: dict[KeyId, dict[int, list[Written]]] = {}
        self._by_name: dict[Digest, Written] = {}
        self._named: set[Digest] = set()
        self._pins: dict[KeyId, dict[int, Digest]] = {}
        self._runs: dict[KeyId, list[Written]] = {}
        self._pasts: dict[Digest, Past] = {}
        self._incomplete: list[Written] = []
        self._clocks: dict[Digest, Clock] = {}
        self._holding: set[Digest] = set()
        self._admissions: dict[KeyId, list[Written]] = {}
        self._removals: list[tuple[Written, Removal]] = []
        self.counting: tuple[Written, ...] = ()
        """What admins wrote and counts, each after what it follows from; the same order on every node."""

    # -- taking in ----------------------------------------------------------------------------------------------------

    def add(self, entries: Iterable[Signed]) -> tuple[tuple[Signed, ...], tuple[str, ...]]:
        """Take in what verifies and is new. Returns it, and why other entries were refused.

        What has to do with somebody who is not known (yet) is passed over in silence: his admission may be on its way.
        """
        added: list[Signed] = []
        refused: list[str] = []
        waiting: list[tuple[Signed, Written | None]] = [(signed, None) for signed in entries]
        while waiting:
            early: list[tuple[Signed, Written | None]] = []
            before = len(added)
            for signed, written in waiting:
                try:
                    written = written or self._verified(signed)
                    taken = None if written is None else self._take(written)
                except TrustError as error:
                    refused.append(error.message)
                    continue
                if taken is None:
                    early.append((signed, written))
                elif taken:
                    added.append(signed)
            waiting = early
            if len(added) == before:
                break  # else who has just been named may have to do with some of the rest
        if added:
            self._recount()
        return tuple(added), tuple(refused)

    def _verified(self, signed: Signed) -> Written | None:
        """The entry; None while nobody here knows who signed it. Raises TrustError for what its author did not sign."""
        if signed.key not in self._keys:
            return None
        name = self._notary.digest(signed)
        if (known := self._by_name.get(name)) is not None:
            return known
        entry = self._notary.read(signed, self._keys[signed.key], LogEntry)
        is_genesis = entry.seq == 0 and MeshId(name) == self._mesh
        if entry.author != signed.key or not (is_genesis or entry.mesh == self._mesh):
            raise TrustError("not-allowed", f"an entry of {signed.key[:12]} belongs to another mesh or author")
        if signed.key == self.founder and entry.seq == 0 and not is_genesis:
            raise TrustError("not-allowed", f"an entry of {signed.key[:12]} founds another mesh")
        return Written(name, signed, entry)

    def _take(self, written: Written) -> bool | None:
        """Whether it is new, and kept; None while that hangs on what is not here yet.

        Raises TrustError for what its author may not write.
        """
        entry, name = written.entry, written.name
        if name in self._by_name:
            return False
        if not self._may_ever_write(entry):
            raise TrustError("not-allowed", f"an entry of {entry.author[:12]} says what no node may say")
        if entry.author not in self._admins and not (goes_on := self._goes_on(entry)):
            return goes_on
        every = self._held.get(entry.author, {}).get(entry.seq, ())
        found = [sibling for sibling in every if _is_parting(sibling.entry) == _is_parting(entry)]
        # Two of a kind prove the fork; a third is kept only where somebody says that it is the true one.
        if entry.seq >= CHAIN_LIMIT or (len(found) > 1 and name not in self._named):
            return False
        if isinstance(entry.body, Rekey):
            self.check_rekey(entry.author, entry.body)
        siblings = self._held.setdefault(entry.author, {}).setdefault(entry.seq, [])
        siblings.append(written)
        self._incomplete.append(written)
        if sum(_is_of_a_node(sibling.entry) for sibling in siblings) > 1:
            self._fork(NodeId(entry.author), entry.seq)
        self._name(written)
        self._introduce(written)
        return True

    def _goes_on(self, entry: LogEntry) -> bool | None:
        """Whether a node's chain can go on with this; None while that hangs on what is not here yet."""
        node = NodeId(entry.author)
        if not (self._keepable.knows(node) and (_is_parting(entry) or self._may_rent(node))):
            return None
        if entry.seq > self._forks.get(node, entry.seq):
            return False
        if entry.seq == 0:
            return True
        below = self._by_name.get(entry.previous)
        if below is None:
            return None
        follows = below.author == entry.author and below.entry.seq == entry.seq - 1
        return follows and not isinstance(below.entry.body, Rekey)

    def _fork(self, node: NodeId, seq: int) -> None:
        """`node` wrote two entries with the number `seq`: it told us at least two stories."""
        self._forks[node] = min(seq, self._forks.get(node, seq))
        self._lineage = None

    def check_rekey(self, author: KeyId, rekey: Rekey) -> None:
        """Raises TrustError for one that is not to be taken in from `author`."""
        check_rekey(self._notary, self._mesh, author, rekey)
        if self._keepable.is_full(NodeId(author)):
            raise TrustError("not-allowed", f"cannot take in new keys of {author[:12]}: it has had too many")

    @property
    def lineage(self) -> Lineage:
        """Who goes on as whom."""
        return self._standing.lineage

    @property
    def _keepable(self) -> Lineage:
        """Who goes on as whom if everybody counts whom any entry names: what is kept must not hang on the order."""
        if self._lineage is None:
            self._lineage = Lineage(self._admitted, {node: _heir(said) for node, said in self._steps()})
        return self._lineage

    def _steps(self) -> Iterator[tuple[NodeId, Written]]:
        """(node, how it gave up its keys), if it told one story in what is read of it."""
        for node, said in self._rekeys.items():
            first = self._partings(KeyId(node))
            if len(first) == 1 and isinstance(first[0].entry.body, Rekey):
                yield node, first[0]
            elif not first and node not in self._forks:
                yield node, min(said, key=lambda written: written.entry.seq)

    def _partings(self, author: KeyId) -> list[Written]:
        """What is read of a machine that does not rent: one entry, or those that prove it a liar."""
        return [written for written in self._held.get(author, {}).get(0, ()) if _is_parting(written.entry)]

    def _is_liar(self, node: NodeId, standing: "Standing") -> bool:
        """Whether two entries with one number are read of it."""
        return len(self._partings(KeyId(node))) > 1 or (node in self._forks and standing.is_wide(KeyId(node)))

    def _stand(self) -> Standing:
        """The one place that says who counts for what."""
        admins, admitted, renters = {self.founder, self.recovery}, set[NodeId](), set[NodeId]()
        waiting = sorted(admins)
        while waiting:
            for written in self._runs.get(waiting.pop(), ()):
                match written.entry.body:
                    case AddAdmin(public_key=public_key) if key_id(public_key) not in admins:
                        admins.add(key_id(public_key))
                        waiting.append(key_id(public_key))
                    case AddNode(public_key=public_key, role=role) if role is not Role.CLOUD:
                        admitted.add(node_id(public_key))
                        if role is Role.BURST:
                            renters.add(node_id(public_key))
                    case SetRole(node=node, role=Role.BURST):
                        renters.add(node)
                    case _:
                        pass
        steps = dict(self._steps())
        heirs: dict[NodeId, NodeId] = {}
        liars: set[NodeId] = set()
        while True:  # who goes on as another's heir may rent as that one might, and so go on again, or be a liar
            standing = Standing(frozenset(admins), frozenset(renters), Lineage(admitted, heirs))
            if more := {node for node in steps if self._is_liar(node, standing)} - liars:
                liars |= more
                heirs = {}
                continue
            read = {
                node: _heir(said)
                for node, said in steps.items()
                if node not in liars and (said.entry.seq == 0 or standing.is_wide(KeyId(node)))
            }
            if read == heirs:
                return standing
            heirs = read

    def heirs(self, node: NodeId) -> Iterator[tuple[NodeId, Rekey]]:
        """(who said it, what he said) of all that goes back to `node`, forked or not: what must not escape it."""
        seen = {node}
        waiting = [node]
        while waiting:
            before = waiting.pop()
            for written in self._rekeys.get(before, ()):
                assert isinstance(written.entry.body, Rekey)
                yield before, written.entry.body
                if (heir := _heir(written)) not in seen:
                    seen.add(heir)
                    waiting.append(heir)

    def _may_rent(self, node: NodeId) -> bool:
        return not self._renters.isdisjoint(self._keepable.ancestry(node))

    def _may_ever_write(self, entry: LogEntry) -> bool:
        """All but what nodes write is for admins."""
        return entry.author in self._admins or _is_of_a_node(entry)

    def _introduce(self, written: Written) -> None:
        """Whom it names may write from now on, whether it counts or not: what is held must not hang on the order."""
        match written.entry.body:
            case AddAdmin(public_key=public_key):
                self._keys[key_id(public_key)] = public_key
                self._admins.add(key_id(public_key))
            case AddNode(public_key=public_key, role=role) if role is not Role.CLOUD:
                self._keys.setdefault(key_id(public_key), public_key)
                self._admitted.add(node_id(public_key))
                self._lineage = None
                if role is Role.BURST:
                    self._renters.add(node_id(public_key))
            case SetRole(node=node, role=Role.BURST):
                self._renters.add(node)
            case Rekey(public_key=public_key):
                self._keys.setdefault(key_id(public_key), public_key)
                self._rekeys.setdefault(NodeId(written.author), []).append(written)
                self._lineage = None
            case _:
                pass

    def _name(self, written: Written) -> None:
        """Remember which entries others build on, and what these follow from."""
        self._by_name[written.name] = written
        to_name = [head.entry for head in (*written.entry.heads, *_ends(written)) if head.author != written.author]
        if written.name in self._named:
            to_name.append(written.entry.previous)
        while to_name:
            name = to_name.pop()
            if name not in self._named:
                self._named.add(name)
                if (below := self._by_name.get(name)) is not None:
                    to_name.append(below.entry.previous)

    # -- reading ------------------------------------------------------------------------------------------------------

    def run(self, author: KeyId) -> list[Written]:
        """His entries from 0 on, each naming the one before, up to the first gap or fork."""
        return self._runs.get(author, [])

    def of_nodes(self) -> Iterator[tuple[NodeId, list[Written]]]:
        """What nodes wrote in chains of their own, as far as all that it follows from is here.

        Admins' chains are among them: were a node's left out because somebody called its key an admin's, it came back.
        """
        for author in sorted(self._held):
            yield NodeId(author), [written for written in self._read(author) if written.name in self._clocks]

    def _read(self, author: KeyId) -> list[Written]:
        """His run; of a node as far as everybody takes it in: not what only one may write who rents."""
        if author in self._standing.admins:
            return self.run(author)
        if self._standing.is_wide(author):
            run = self.run(author)
            last = next((written.entry.seq for written in run if isinstance(written.entry.body, Rekey)), len(run))
            return run[: last + 1]
        first = self._partings(author)
        return first if len(first) == 1 and first[0].entry.previous == NO_DIGEST else []

    def rekeyed(self) -> dict[NodeId, Written | None]:
        """Nodes that gave up their keys, for ever, and the entry that says so; None where a fork hides which it is."""
        forks = {node for node in self._forks if self._is_liar(node, self._standing)}
        found: dict[NodeId, Written | None] = dict.fromkeys(sorted(forks))
        for node, every in sorted(self._rekeys.items()):
            said = [w for w in every if _is_parting(w.entry) or self._standing.is_wide(KeyId(node))]
            if node not in forks and any(written.name in self._pasts for written in said):
                run = self._read(KeyId(node))
                meant = (w for w in run if isinstance(w.entry.body, Rekey) and w.name in self._clocks)
                found[node] = next(meant, None)
        return found

    def follows(self, later: Written, earlier: Written) -> bool:
        """Whether `later` was written by somebody who had seen `earlier`."""
        return earlier.is_in(self._clocks.get(later.name, {}))

    def heads(self) -> tuple[Head, ...]:
        runs = ((author, self._read(author)) for author in sorted(self._held) if self._standing.is_told(author))
        return tuple(Head(author, len(run) - 1, run[-1].name) for author, run in runs if run)

    def citable(self) -> tuple[Head, ...]:
        """What a new entry follows from: of each admin, also of before, the newest entry whose every root is here.

        Were others cited, somebody could name a head that does not exist, and nothing that anybody wrote after hearing
        of it would ever count.
        """
        admins = {self.founder, self.recovery, *self._admissions}
        runs = (run for author, run in sorted(self._runs.items()) if author in admins)
        tops = ([written for written in run if written.name in self._clocks] for run in runs)
        return tuple(Head(top[-1].author, top[-1].entry.seq, top[-1].name) for top in tops if top)

    def last_of(self, author: KeyId) -> Head | None:
        """What a removal of `author` names: of a fork, the side that was here first. None if he wrote nothing."""
        chain = self._held.get(author, {})
        last: Written | None = None
        while found := chain.get(0 if last is None else last.entry.seq + 1):
            follows = [w for w in found if w.entry.previous == (last.name if last else "")]
            if not follows:
                break
            last = follows[0]
        return Head(author, last.entry.seq, last.name) if last else None

    def frozen(self) -> tuple[KeyId, ...]:
        """Authors who wrote two entries with one number, and nobody said which is meant."""
        told = filter(self._standing.is_told, sorted(self._held))
        return tuple(author for author in told if self._siblings(author))

    def _siblings(self, author: KeyId) -> list[Written]:
        """The entries with one number at which he is frozen; none where he is not."""
        run = self._read(author)
        if author not in self._standing.admins and run and isinstance(run[-1].entry.body, Rekey):
            return []  # nothing follows these
        is_wide = self._standing.is_wide(author)
        found = self._held[author].get(len(run), []) if is_wide else self._partings(author)
        return found if len(found) > 1 else []

    def beyond(self, heads: Iterable[Head]) -> tuple[Signed, ...]:
        """Entries that somebody with `heads` lacks; where its head is none of ours, everything of that author.

        Who asks takes only the first few: so authors take turns, and what proves forks, which is told each time, is
        last.
        """
        theirs = {head.author: head for head in heads}
        told = sorted(filter(self._standing.is_told, self._held))
        self._turn += 1
        # A quarter of the way round each time: also where the first few are many each is soon among them.
        first = (self._turn % 4 * len(told) // 4 + self._turn // 4) % len(told) if theirs else 0
        lacking: list[Signed] = []
        proofs: list[Signed] = []
        # Rekeys after others: who hears one lets its author go, and must have heard before all that it follows from.
        for author in sorted((*told[first:], *told[:first]), key=lambda author: NodeId(author) in self._rekeys):
            chain, head, stuck = self._held[author], theirs.get(author), self._siblings(author)
            agrees = head is not None and any(written.name == head.entry for written in chain.get(head.seq, ()))
            start = head.seq + 1 if head is not None and agrees else 0
            if author in self._standing.admins:
                meant = [written for seq in sorted(chain) for written in chain[seq] if written not in stuck]
            else:
                meant = self._read(author)
            lacking.extend(written.signed for written in meant if written.entry.seq >= start)
            proofs.extend(written.signed for written in stuck)
        return (*lacking, *proofs)

    def is_admin(self, author: KeyId) -> bool:
        """Whether `author` may write now."""
        return self._was_admin(author, None)

    def admins(self) -> tuple[KeyId, ...]:
        """All who may write now, the recovery key left out."""
        known = sorted({self.founder, *self._admissions} - set(self.frozen()))
        return tuple(key for key in known if self.is_admin(key))

    def was_removed(self, author: KeyId) -> bool:
        """Whether a removal holds that names it: it is an admin never again."""
        return self._end(author, None) is not None

    # -- counting -----------------------------------------------------------------------------------------------------

    def _recount(self) -> None:
        """Everything that follows from what is held, from nothing on, so that the order of arrival leaves no trace.

        A removal may tell the true side of a fork, so again then: never a removal whose own author is in doubt by it.
        """
        self._complete()
        self._pins = {}
        while True:
            self._runs = {author: self._run(author) for author in self._held}
            self._clocks = self._order()
            self._judge()
            pins = self._pinned()
            if pins == self._pins:
                break
            self._pins = pins
        self._standing = self._stand()
        for author in self._held:
            run = self._read(author)
            if run and run[0].name not in self._clocks and not self._standing.is_wide(author):
                clock = self._clock(run, 0, self._clocks)
                if clock is not None:
                    self._clocks[run[0].name] = clock
        memo: dict[Digest, bool] = {}
        self.counting = tuple(written for written in self._sorted() if self._counts(written, None, memo))

    def _run(self, author: KeyId) -> list[Written]:
        chain, pinned = self._held[author], self._pins.get(author, {})
        run: list[Written] = []
        previous = NO_DIGEST
        while found := chain.get(len(run)):
            pin = pinned.get(len(run))
            meant = [written for written in found if written.name == pin] or found
            if len(meant) != 1 or meant[0].entry.previous != previous:
                break
            run.append(meant[0])
            previous = meant[0].name
        return run

    def _complete(self) -> None:
        """Find the pasts of entries: of those whose every root is here now."""
        hopeless: set[Digest] = set()
        for first in self._incomplete:
            waiting = [first]
            while waiting:
                written = waiting[-1]
                if written.name in self._pasts or written.name in hopeless:
                    waiting.pop()
                    continue
                past = self._past(written)
                if isinstance(past, Past):
                    self._pasts[written.name] = past
                elif past is None or past.name in hopeless:
                    hopeless.add(written.name)
                else:
                    waiting.append(past)
        self._incomplete = [written for written in self._incomplete if written.name not in self._pasts]

    def _past(self, written: Written) -> "Past | Written | None":
        """What it follows from; or an entry whose past must be found before; or None where one is not here."""
        entry = written.entry
        admins = frozenset((self.founder, self.recovery))
        if entry.seq:
            below = self._at(Head(entry.author, entry.seq - 1, entry.previous))
            if below is None or below.name not in self._pasts:
                return below
            admins = self._pasts[below.name].admins
        heads: list[Head] = []
        others = list(entry.heads)
        while (head := next((head for head in others if head.author in admins), None)) is not None:
            others.remove(head)
            cited = self._at(head)
            if cited is None or cited.name not in self._pasts:
                return cited
            heads.append(head)
            if not (more := self._pasts[cited.name].admins) <= admins:
                admins |= more
        if isinstance(entry.body, AddAdmin):
            admins |= {key_id(entry.body.public_key)}
        return Past(admins, tuple(heads))

    def _at(self, head: Head) -> Written | None:
        written = self._by_name.get(head.entry)
        is_it = written is not None and (written.author, written.entry.seq) == (head.author, head.seq)
        return written if is_it else None

    def _order(self) -> dict[Digest, Clock]:
        """What each entry follows from, itself included: of those whose every root is here."""
        clocks: dict[Digest, Clock] = {}
        done = dict.fromkeys(self._runs, 0)
        progress = True
        while progress:
            progress = False
            for author, run in self._runs.items():
                while done[author] < len(run) and (clock := self._clock(run, done[author], clocks)) is not None:
                    clocks[run[done[author]].name] = clock
                    done[author] += 1
                    progress = True
        return clocks

    def _clock(self, run: list[Written], seq: int, clocks: Mapping[Digest, Clock]) -> Clock | None:
        past = self._pasts.get(run[seq].name)
        if past is None:
            return None
        clock = dict(clocks[run[seq - 1].name]) if seq else {}
        for head in past.heads:
            cited = self._runs[head.author]
            if head.seq < len(cited) and cited[head.seq].name == head.entry:
                if head.entry not in clocks:
                    return None
                for author, reached in clocks[head.entry].items():
                    clock[author] = max(clock.get(author, -1), reached)
        clock[run[seq].author] = seq
        return clock

    def _sorted(self) -> list[Written]:
        """Of admins: each after what it follows from, and the same on every node."""
        ready = [
            written
            for author in (self.founder, self.recovery, *self._admissions)
            for written in self._runs.get(author, ())
            if written.name in self._clocks
        ]
        ranks = {w.name: (sum(self._clocks[w.name].values()) + len(self._clocks[w.name]), w.author) for w in ready}
        return sorted(ready, key=lambda written: ranks[written.name])

    def _judge(self) -> None:
        """Rule 1, from the first entry on: who admits others, and who removes whom."""
        self._holding = set()
        self._admissions, self._removals = {}, []
        judged = 0
        while True:  # an admission that holds may make more entries judgeable
            ready = self._sorted()
            if len(ready) == judged:
                break
            judged = len(ready)
            self._holding, self._removals, self._admissions = set(), [], {}
            for written in ready:
                self._judge_one(written)

    def _judge_one(self, written: Written) -> None:
        if not self._was_admin(written.author, self._clocks[written.name]):
            return
        self._holding.add(written.name)
        match written.entry.body:
            case AddAdmin(public_key=public_key):
                self._admissions.setdefault(key_id(public_key), []).append(written)
            case Revoke() | RemoveAdmin() as removal:
                self._removals.append((written, removal))
            case _:
                pass

    def _was_admin(self, author: KeyId, part: Clock | None) -> bool:
        """Whether `author` is an admin in a part of the log; None is all of it."""
        if author == self.recovery:
            return True
        if self._end(author, part) is not None:
            return False
        return author == self.founder or any(
            self._counts(admission, part, {}) for admission in self._admissions.get(author, ()) if admission.is_in(part)
        )

    def _end(self, author: KeyId, part: Clock | None) -> int | None:
        """The number of the author's last entry that counts, as removals in a part of the log say; None without one."""
        ends = [
            max(named, self._clocks[written.name].get(author, -1))
            for written, removal in self._removals
            if written.is_in(part) and (named := self._end_by(removal, author)) is not None
        ]
        return min(ends, default=None)

    def _end_by(self, removal: Removal, author: KeyId) -> int | None:
        if author == self.recovery:
            return None
        named = [head.seq for head in _heads_of(removal) if head.author == author]
        if named:
            return min(named)
        if isinstance(removal, RemoveAdmin):
            return -1 if removal.key == author else None
        if any(
            isinstance(body := admission.entry.body, AddAdmin) and self._comes_after(body.node, removal.node)
            for admission in self._admissions.get(author, ())
        ):
            return -1  # an admin of that machine of whom its author had not heard
        return None

    def _comes_after(self, node: NodeId, before: NodeId) -> bool:
        """Whether `node` is `before`, or anything that is held here says that it went on as it."""
        return node == before or any(node_id(said.public_key) == node for _, said in self.heirs(before))

    def _counts(self, written: Written, part: Clock | None, memo: dict[Digest, bool]) -> bool:
        """Rules 2 and 3, in a part of the log."""
        found = memo.get(written.name)
        if found is None:
            found = memo[written.name] = self._is_counting(written, part, memo)
        return found

    def _is_counting(self, written: Written, part: Clock | None, memo: dict[Digest, bool]) -> bool:
        if written.name not in self._holding:
            return False
        if isinstance(written.entry.body, Revoke | RemoveAdmin):
            return True
        end = self._end(written.author, part)
        if end is not None and written.entry.seq > end:
            return False
        if written.author in (self.founder, self.recovery):
            return True
        past = self._clocks[written.name]
        return any(
            self._counts(admission, part, memo)
            for admission in self._admissions.get(written.author, ())
            if admission.is_in(past)
        )

    def _pinned(self) -> dict[KeyId, dict[int, Digest]]:
        """The sides of forks that removals go on from: the entry that each names, and all that it follows from."""
        pins: dict[KeyId, dict[int, Digest]] = {}
        named = sorted(
            (head.seq, head.entry, head.author) for _, removal in self._removals for head in _heads_of(removal)
        )
        for _, name, author in reversed(named):  # of two that disagree the lower one has the last word
            while (written := self._by_name.get(name)) is not None and written.author == author:
                pins.setdefault(author, {})[written.entry.seq] = name
                name = written.entry.previous
        return pins


def _founding(notary: Notary, genesis: Signed) -> Genesis:
    """What the first entry says. The key inside must have signed it: its hash is the mesh id, so it needs no root."""
    body = notary.read_pinned(genesis, notary.digest(genesis), LogEntry).body
    if not isinstance(body, Genesis):
        raise TrustError("wrong-mesh", "cannot enter the mesh: its first entry does not found one")
    notary.read(genesis, body.admin_key, LogEntry)
    return body


def _heads_of(removal: Removal) -> tuple[Head, ...]:
    if isinstance(removal, Revoke):
        return removal.ends
    return (removal.end,) if removal.end is not None and removal.end.author == removal.key else ()


def _is_of_a_node(entry: LogEntry) -> bool:
    """Whether it is what nodes may write: of themselves, and, with the role burst, of cloud nodes."""
    match entry.body:
        case AddNode(role=role, expires_wall_s=expires_wall_s):
            return role is Role.CLOUD and expires_wall_s is not None
        case RemoveNode() | Rekey():
            return True
        case _:
            return False


def _heir(written: Written) -> NodeId:
    assert isinstance(written.entry.body, Rekey)
    return node_id(written.entry.body.public_key)


def _is_parting(entry: LogEntry) -> bool:
    """Whether a node says that it leaves, or goes on under new keys, with which its chain begins and ends."""
    is_last = isinstance(entry.body, Rekey) or entry.body == RemoveNode(NodeId(entry.author))
    return entry.seq == 0 and is_last


def _ends(written: Written) -> tuple[Head, ...]:
    body = written.entry.body
    return _heads_of(body) if isinstance(body, Revoke | RemoveAdmin) else ()
