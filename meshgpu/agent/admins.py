"""What admins change of a mesh after it was founded, and how a machine leaves: entries of the mesh log, one at a time.

Whatever is signed here waits until the entry before is on disk: who signs one number twice is frozen.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from meshgpu import ports
from meshgpu.core import events as ev
from meshgpu.core.node import Node
from meshgpu.core.trust.joining import GIVEN_ROLES
from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.ids import KeyId, key_id
from meshgpu.model.trust import (
    AddAdmin,
    Body,
    Member,
    Notary,
    RemoveAdmin,
    RemoveNode,
    Role,
    SetRole,
    Signed,
    UserKey,
)

PARTING_S: Final = 0.5
"""From the word that this machine leaves, or has new keys, to its end: the open Links carry it in milliseconds."""


@dataclass(slots=True)
class Admins:
    """Writes for the callers of the control socket. Every method raises TrustError where the caller may not.

    writing: held by whoever signs entries with this machine's keys. notary_of: signs with one key alone.
    """

    node: Node
    writing: asyncio.Lock
    settle: Callable[[ev.Event], Awaitable[None]]
    recovery: Callable[[str], ports.Signer]
    notary_of: Callable[[ports.Signer], Notary]
    forget_mesh: Callable[[], None]

    # -- who may --------------------------------------------------------------------------------------------------

    def account(self, uid: int) -> UserKey:
        """The caller's account in the mesh."""
        account = self.node.log.account(self.node.node, uid)
        if account is None:
            raise TrustError("not-in-mesh", "cannot do this: this account is in no mesh", "meshgpu init, or join")
        return account

    def admin(self, uid: int, what: str) -> UserKey:
        """The same, which `what` needs to be an admin's."""
        account = self.account(uid)
        if not account.is_admin:
            names = ", ".join(self.node.log.person(user.key) for user in self.node.log.admins()) or "nobody"
            raise TrustError(
                "not-an-admin",
                f"cannot {what}: {account.user} on this machine is no admin of the mesh {self.node.log.mesh_name}",
                f"the admins are: {names}",
            )
        return account

    def member(self, name: str) -> Member:
        member = self.node.log.member_named(name)
        if member is None:
            names = ", ".join(sorted(m.name for m in self.node.log.members.values()))
            raise MeshgpuError("unknown-machine", f"no machine of the mesh is called {name}", f"there are: {names}")
        return member

    def person(self, text: str) -> UserKey:
        """`bob`, or `bob@rig7` where bob has several machines."""
        user, _, machine = text.partition("@")
        log = self.node.log
        found = [u for u in log.users.values() if u.user == user and machine in ("", log.name_of(u.node))]
        if len(found) == 1:
            return found[0]
        if not found:
            names = ", ".join(sorted({u.user for u in log.users.values()}))
            raise MeshgpuError("unknown-user", f"no user of the mesh is called {text}", f"there are: {names}")
        where = ", ".join(sorted(f"{user}@{log.name_of(u.node)}" for u in found))
        raise MeshgpuError("ambiguous", f"{user} has accounts on several machines: {where}", "name one of them")

    # -- changing -------------------------------------------------------------------------------------------------

    async def revoke(self, uid: int, name: str, *, stops_jobs: bool) -> Member:
        """Take a machine out, for ever, with the keys of all accounts there."""
        member = self.member(name)
        if member.node == self.node.node:
            raise MeshgpuError("bad-request", "cannot revoke this machine from itself", "meshgpu leave")

        def bodies() -> tuple[Body, ...]:
            self._check_rest(lambda user: user.node != member.node, f"revoke {name}")
            return (self.node.log.revocation(member.node, stops_jobs=stops_jobs),)

        await self._write(uid, f"revoke {name}", bodies)
        return member

    async def set_role(self, uid: int, name: str, role: Role) -> Member:
        member = self.member(name)
        if role not in GIVEN_ROLES or member.role is Role.CLOUD:
            raise MeshgpuError(
                "bad-request",
                f"cannot make {name} a {role}: expected {', '.join(GIVEN_ROLES)}, and no rented machine",
                "for renting, on the machine that shall: meshgpu burst setup",
            )
        await self._write(uid, f"make {name} a {role}", lambda: (SetRole(member.node, role),))
        return member

    async def add_admin(self, uid: int, who: str) -> UserKey:
        user = self.person(who)
        if user.is_admin:
            raise MeshgpuError("bad-request", f"{self.node.log.person(user.key)} is an admin already")
        await self._write(uid, f"make {who} an admin", lambda: (AddAdmin(user.public_key, user.node),))
        if not self.node.log.users[user.key].is_admin:
            raise TrustError(
                "not-allowed",
                f"cannot make {who} an admin again: the right was taken from that key, which is for ever",
                "make an admin of another account of theirs, or let them join anew",
            )
        return user

    async def remove_admin(self, uid: int, who: str) -> UserKey:
        user = self._author(who)

        def bodies() -> tuple[Body, ...]:
            self._check_rest(lambda other: other.key != user.key, f"remove {who}")
            return (RemoveAdmin(user.key, self.node.log.last_of(user.key)),)

        await self._write(uid, f"remove the admin {who}", bodies)
        return user

    def _author(self, who: str) -> UserKey:
        """An admin; one that is frozen, who counts as none, too."""
        user = self.person(who)
        if not user.is_admin and user.key not in self.node.log.frozen:
            raise MeshgpuError("bad-request", f"{self.node.log.person(user.key)} is no admin", "meshgpu admin ls")
        return user

    def _check_rest(self, stays: Callable[[UserKey], bool], what: str) -> None:
        if not any(stays(user) for user in self.node.log.admins()):
            raise TrustError(
                "not-allowed", f"cannot {what}: no admin would be left", "first make another: meshgpu admin add USER"
            )

    async def _write(self, uid: int, what: str, bodies: Callable[[], tuple[Body, ...]]) -> None:
        self.admin(uid, what)
        async with self.writing:
            author = self.admin(uid, what)  # he may have lost the right while he waited
            await self.settle(ev.LogWritten(self.node.log.write(author.key, bodies())))

    async def recover(self, uid: int, words: str) -> UserKey:
        """Make the caller an admin by the recovery key; admins who signed one number twice are removed."""
        log, signer = self.node.log, self.recovery(words)
        async with self.writing:
            if log.frozen:  # only after that the log names everybody again
                await self._sign_recovery(signer, [RemoveAdmin(key, log.last_of(key)) for key in log.frozen])
            account = self.account(uid)
            if not account.is_admin:
                await self._sign_recovery(signer, [AddAdmin(account.public_key, account.node)])
        return log.users[account.key]

    async def _sign_recovery(self, signer: ports.Signer, bodies: list[Body]) -> None:
        log = self.node.log
        try:
            entries = log.write(key_id(signer.public_key), bodies, self.notary_of(signer))
        except TrustError as error:
            raise TrustError(
                "not-allowed",
                f"cannot recover: this is not the recovery key of the mesh {log.mesh_name}",
                "it was printed once, by `meshgpu init` on the first machine",
            ) from error
        await self.settle(ev.LogWritten(entries))

    # -- leaving --------------------------------------------------------------------------------------------------

    async def leave(self, uid: int, *, anyway: bool) -> str:
        """Take this machine out, and forget the mesh and its keys at the next start. Returns the mesh's name.

        anyway: although jobs run or are held here, or no admin would be left.
        """
        log, me = self.node.log, self.node.node
        if me in log.former:
            self.forget_mesh()
            return log.mesh_name
        self.account(uid)
        if not anyway:
            self._check_free()
        async with self.writing:
            ours = [user for user in log.admins() if user.node == me]
            if len(log.members) > 1 and not anyway and ours:
                self._check_rest(lambda user: user.node != me, "leave")
            parting: tuple[Signed, ...] = ()
            for user in ours:
                parting += log.write(user.key, (RemoveAdmin(user.key, log.last_of(user.key)),))
            await self.settle(ev.LogWritten((*parting, *log.write(KeyId(me), (RemoveNode(me),)))))
        await asyncio.sleep(PARTING_S)
        self.forget_mesh()
        return log.mesh_name

    def _check_free(self) -> None:
        running = self.node.attempts.allocations()
        if running:
            names = ", ".join(sorted({allocation.name for allocation in running}))
            raise MeshgpuError(
                "busy", f"cannot leave: jobs run here ({names})", "meshgpu pause, and leave when they went"
            )
        if held := self.node.stewardship.unfinished:
            raise MeshgpuError(
                "busy", f"cannot leave: this machine holds {held} unfinished jobs of the mesh", "wait until they ended"
            )
