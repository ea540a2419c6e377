"""What a simulated machine keeps of keys besides those it has: the next ones, and what is left of those it gave up."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from meshgpu.core.membership.gossip import fitting
from meshgpu.core.node import Node, take_up
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.rekeying import make_rekey
from meshgpu.model.ids import KeyId, NodeId, UserName, key_id, node_id
from meshgpu.model.messages import LogDelta
from meshgpu.model.records import Record
from meshgpu.model.trust import OFFICE_ROLES, Head, NewKey, Notary, Rekey, Signed
from meshgpu.sim.fakes import KeyRing, ToyNotary
from meshgpu.sim.network import Network
from meshgpu.sim.timeline import Timeline

FIRST_S: Final = 2.0
ROUND_S: Final = 10.0
"""As the agent's courier: before its first round, and between two."""


@dataclass(frozen=True, slots=True)
class NextKeys:
    """A set on disk that waits until the mesh log says that the machine goes on under it."""

    node: NodeId
    notary: ToyNotary
    accounts: dict[UserName, KeyId]
    rekey: Rekey


def make_next(ring: KeyRing, agent: Node, before: Notary, name: str) -> NextKeys:
    """Keys that only `name` decides, for the machine of `agent` and every account on it."""
    log, me = agent.log, agent.node
    assert log.mesh is not None
    public = ring.make(name)
    accounts = sorted((user for user in log.users.values() if user.node == me), key=lambda user: user.uid)
    users = [NewKey(user.public_key, ring.make(f"{user.user}@{name}")) for user in accounts]
    notary = ToyNotary(ring, (public, *(user.after for user in users)))
    rekey = make_rekey(log.mesh, me, (public, b"ca " + public), users, (before, notary))
    keys = {account.user: key_id(user.after) for account, user in zip(accounts, users, strict=True)}
    return NextKeys(node_id(public), notary, keys, rekey)


def is_said(keys: NextKeys, node: NodeId, records: Iterable[Record]) -> bool:
    """Whether what is on disk says that `node` goes on under `keys`."""
    log = MeshLog(keys.notary)
    take_up(log, records)
    return log.current(node) == keys.node


@dataclass(slots=True)
class Courier:
    """Brings the log to machines that know this one only by the id `before`, for as long as `agent` runs.

    As the agent's: no more of it than was on disk when the agent began.
    """

    before: NodeId
    agent: Node
    network: Network
    timeline: Timeline
    met: set[NodeId] = field(default_factory=set)
    kept: frozenset[Signed] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = frozenset(self.agent.log.all_entries())

    def _lacking(self, heads: tuple[Head, ...]) -> LogDelta:
        return LogDelta(fitting(entry for entry in self.agent.log.beyond(heads) if entry in self.kept))

    def begin(self) -> None:
        self.timeline.after(FIRST_S, self._round)

    def _round(self) -> None:
        log, me = self.agent.log, self.agent.node
        host = self.network.hosts[me]
        if not host.runs(self.agent) or me not in log.members:
            return
        self.met |= {peer for peer in log.members if self.network.is_linked(me, peer)}
        waiting = [m.node for m in log.members.values() if m.role in OFFICE_ROLES and m.node not in (me, *self.met)]
        for peer in waiting:
            self.network.errand(self.before, peer, self._lacking)
        if waiting:
            self.timeline.after(ROUND_S, self._round)
