"""Gives this machine and all accounts on it new keys, and has the mesh log say so."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from meshgpu import ports
from meshgpu.agent.admins import PARTING_S
from meshgpu.core import events as ev
from meshgpu.core.effects import Answered
from meshgpu.core.node import Node
from meshgpu.core.trust.rekeying import make_rekey
from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.gossip import MemberState
from meshgpu.model.ids import NodeId, node_id
from meshgpu.model.trust import NewKey, Notary, Rekey, Role


@dataclass(frozen=True, slots=True)
class Renewed:
    """This machine under new keys. before: the id it gave up. away: names of machines that have yet to hear of it."""

    name: str
    node: NodeId
    before: NodeId
    away: tuple[str, ...]


@dataclass(slots=True)
class Rekeying:
    """For the account that runs the agent. begin_anew: to be called once `rekey` has returned.

    writing: held by whoever signs entries with this machine's keys. notary_of: signs with one set of keys.

    ask: puts a question to the node; raises MeshgpuError where it says no.
    """

    node: Node
    clock: ports.Clock
    writing: asyncio.Lock
    keys: ports.Keys
    next_keys: ports.NextKeys
    notary_of: Callable[[ports.Keys], Notary]
    ask: Callable[[Callable[[str], ev.Event]], Awaitable[Answered]]
    begin_anew: Callable[[], None]

    async def rekey(self) -> Renewed:
        """The old keys are void when this returns, and the agent has to begin anew.

        The new ones lie on disk before the mesh is told of them, and take the old ones' place only once it was: there
        always is a set that the mesh knows and this machine has. Raises MeshgpuError where nothing was changed.
        """
        async with self.writing:
            member = self.node.log.members.get(self.node.node)
            if member is None:
                raise TrustError(
                    "not-in-mesh", "cannot take new keys: this machine is no member of a mesh", "meshgpu init, or join"
                )
            away = self._away()
            next_keys = await asyncio.to_thread(self.next_keys.make)
            try:
                rekey = self._sign(next_keys)
                await self.ask(lambda query: ev.RekeyAsked(query, rekey))
            except MeshgpuError:
                if self.node.node in self.node.log.members:  # else it was said, and these are the keys
                    await asyncio.to_thread(self.next_keys.drop)
                raise
        await asyncio.sleep(PARTING_S)
        return Renewed(member.name, node_id(rekey.public_key), member.node, away)

    def _sign(self, next_keys: ports.Keys) -> Rekey:
        log, me = self.node.log, self.node.node
        assert log.mesh is not None
        accounts = sorted((user for user in log.users.values() if user.node == me), key=lambda user: user.uid)
        users = [NewKey(user.public_key, next_keys.user_key(user.uid)) for user in accounts]
        identity = (next_keys.node_key(), next_keys.device_ca())
        return make_rekey(log.mesh, me, identity, users, (self.notary_of(self.keys), self.notary_of(next_keys)))

    def _away(self) -> tuple[str, ...]:
        """Machines of the office that do not answer now."""
        views = self.node.machines(self.clock.now())
        return tuple(
            view.member.name
            for view in views
            if view.state is not MemberState.ALIVE and view.member.role is not Role.CLOUD
        )
