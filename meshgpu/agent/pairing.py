"""Founding a mesh, inviting, joining: the conversations around `core.trust.joining`; and letting a machine rent.

Whatever an admin signs here is written one at a time, and not before the last is on disk: who signs one number twice
is frozen.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from meshgpu import ports
from meshgpu.agent.door import Door
from meshgpu.config import DEFAULT_LINK_PORT, host_of, with_port
from meshgpu.core import events as ev
from meshgpu.core.node import Node
from meshgpu.core.trust import joining
from meshgpu.core.trust.meshlog import MeshLog, found
from meshgpu.core.trust.strangers import Strangers
from meshgpu.errors import BadProof, MeshgpuError, TrustError
from meshgpu.model.ids import Address, KeyId, UserName, base32, is_name, key_id, node_id
from meshgpu.model.pairing import Application, Greeting, Introduction, InviteString, Newcomer, PairingBinding, Welcome
from meshgpu.model.trust import AddNode, Genesis, Invite, LinkUser, Member, Notary, Role, SetPolicy, SetRole, UserKey
from meshgpu.wire.certificates import node_of_ca
from meshgpu.wire.codec import PROTOCOL, decode, encode

CLOCK_LOOK_S: Final = 60.0
"""How often a wait for a moment of the wall clock looks at that again."""

LAST_WORD_S: Final = 1.0
"""How long the listener stays after a welcome, which is still on its way."""


Compare = Callable[[str, str, bytes], Awaitable[bytes]]
"""Answers one step of a comparison: (host, step, request)."""


@dataclass(frozen=True, slots=True)
class Founded:
    mesh_name: str
    recovery_key: str


@dataclass(frozen=True, slots=True)
class Joined:
    mesh_name: str
    name: str
    user: UserName
    inviter: str
    role: Role


@dataclass(slots=True)
class Pairing:
    """This node's way into a mesh, and others' way in through it."""

    node: Node
    keys: ports.Keys
    notary: Notary
    clock: ports.Clock
    rng: random.Random
    listener: ports.PairingTransport
    settle: Callable[[ev.Event], Awaitable[None]]
    addresses: Callable[[], Sequence[Address]]
    announce_port: Callable[[int], None]
    tasks: asyncio.TaskGroup
    recovery: Callable[[str], ports.Signer]
    writing: asyncio.Lock
    _invites: joining.Invites = field(default_factory=joining.Invites)
    _greeted: joining.Conversations = field(default_factory=joining.Conversations)
    _compare: Compare | None = None
    _opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    _admissions: int = 0
    _port: int = 0
    strangers: Strangers = field(default_factory=Strangers)

    # -- founding -----------------------------------------------------------------------------------------------------

    async def found(self, uid: int, mesh_name: str, name: str, user: str) -> Founded:
        """Make a mesh of one machine. Raises MeshgpuError `already-in-mesh` or `bad-name`."""
        self.check_outside()
        check_names(mesh=mesh_name, machine=name, user=user)
        admin = self.keys.user_key(uid)
        recovery_key = base32(self.rng.randbytes(20))
        genesis = Genesis(mesh_name, admin, self.recovery(recovery_key).public_key, self.rng.randbytes(16))
        mesh, first = found(self.notary, key_id(admin), genesis)
        log = MeshLog(self.notary)
        log.enter(mesh, [first])
        public_key = self.keys.node_key()
        me = node_id(public_key)
        member = AddNode(me, public_key, self.keys.device_ca(), name, Role.RIG, UserName(user))
        entries = log.write(key_id(admin), (member, LinkUser(UserName(user), admin, me, uid)))
        await self.settle(ev.MeshEntered(mesh, (first, *entries)))
        return Founded(mesh_name, recovery_key)

    def check_outside(self) -> None:
        if self.node.log.mesh is not None:
            raise MeshgpuError(
                "already-in-mesh",
                f"cannot enter a mesh: this machine is in the mesh {self.node.log.mesh_name} already",
                "meshgpu machines",
            )

    # -- inviting -----------------------------------------------------------------------------------------------------

    async def invite(self, uid: int, user: str | None, role: Role, uses: int, life_s: float) -> tuple[str, Invite]:
        """Open the pairing listener for up to `uses` more machines of `user` (None: the caller's).

        Raises MeshgpuError where the caller may not, or for what `joining.check_grant` refuses. The listener closes
        when the last invite is used up or over.
        """
        account = self.admin(uid, "invite", "meshgpu invite")
        log = self.node.log
        assert log.mesh is not None
        check_names(user=user or account.user)
        joining.check_grant(role, uses, life_s)
        await self._listen()
        secret = joining.new_secret(self.rng.randbytes(joining.SECRET_BYTES))
        grant = joining.Grant(UserName(user or account.user), role, uses, life_s)
        invite = self._invites.create(self.clock.now(), secret, grant, account.key)
        self.tasks.create_task(self._close_when_over(invite))
        hosts = dict.fromkeys(address.rpartition(":")[0] for address in self.addresses())
        where = tuple(Address(f"{host}:{self._port}") for host in hosts)
        return joining.write_invite(InviteString(log.mesh, self.node.node, secret, where)), invite

    def admin(self, uid: int, what: str, command: str) -> UserKey:
        """The caller's account, which `what` needs. Raises TrustError `not-in-mesh` or `not-an-admin`."""
        log = self.node.log
        account = log.account(self.node.node, uid)
        if account is None or log.mesh is None:
            raise TrustError("not-in-mesh", f"cannot {what}: this account is in no mesh", "meshgpu init")
        if not account.is_admin:
            admins = ", ".join(log.person(user.key) for user in log.admins()) or "nobody"
            raise TrustError(
                "not-an-admin",
                f"cannot {what}: {account.user} on this machine is no admin of the mesh {log.mesh_name}",
                f"an admin runs: {command}; the admins are: {admins}",
            )
        return account

    async def open_listener(self, compare: Compare) -> None:
        """Listen, and announce it, until `close_listener` for `compare` too, which answers the steps of a comparison.

        Where only invites need the listener it is not announced: they say where it is, and whoever looks for a window
        must not take it for one.
        """
        self._compare = compare
        await self._listen()
        self.announce_port(self._port)

    def hide_listener(self) -> None:
        """Announce it no more; whoever is in a conversation may still end that."""
        self.announce_port(0)

    async def close_listener(self) -> None:
        """No comparison any more; the listener stays where an invite needs it."""
        self._compare = None
        self.announce_port(0)
        await self._close_if_done()

    async def _listen(self) -> None:
        async with self._opening:
            if not self._port:
                self._port = await self.listener.open(Door(self.clock, self.strangers, self._answer))

    async def _close_when_over(self, invite: Invite) -> None:
        """By the wall clock, as it is kept: a machine that slept or was set to another time closes late, not never."""
        left_s = invite.expires_wall_s - self.clock.now().wall_s
        while left_s > 0:
            await asyncio.sleep(min(left_s, CLOCK_LOOK_S))
            left_s = invite.expires_wall_s - self.clock.now().wall_s
        self._invites.drop_expired(self.clock.now())
        await self._close_if_done()

    async def _close_if_done(self) -> None:
        if self._invites.is_empty and self._compare is None and not self._admissions and self._port:
            self._port = 0
            await self.listener.close()

    async def _answer(self, host: str, step: str, request: bytes) -> bytes:
        if step == "greet":
            return encode(self._greet(host, decode(Greeting, request)))
        if step == "apply":
            return await self._apply(decode(Application, request))
        if self._compare is not None:
            return await self._compare(host, step, request)
        if step.startswith("compare-"):
            raise TrustError("bad-invite", "cannot join: no admin compares digits there now", "meshgpu admit, there")
        raise MeshgpuError("bad-request", f"cannot pair: there is no step {step!r}")

    async def _apply(self, application: Application) -> bytes:
        """The listener stays until the welcome has left, although it may be an invite's last use."""
        self._admissions += 1
        try:
            welcome = encode(await self._admit(application))
        except BaseException:
            self._admissions -= 1
            raise
        self.tasks.create_task(self._close_soon())
        return welcome

    async def _close_soon(self) -> None:
        await asyncio.sleep(LAST_WORD_S)
        self._admissions -= 1
        await self._close_if_done()

    def _greet(self, host: str, greeting: Greeting) -> Introduction:
        if greeting.protocol != PROTOCOL:
            message = f"cannot pair: this mesh speaks protocol {PROTOCOL}, the newcomer {greeting.protocol}"
            raise MeshgpuError("version", message, "install the same version of meshgpu on both machines")
        self._invites.check_greeting(self.clock.now(), greeting, self.listener.fingerprint())
        nonce = self.rng.randbytes(32)
        binding = PairingBinding(self.listener.fingerprint(), greeting.nonce, nonce)
        signed = self.notary.sign(key_id(self.keys.node_key()), binding)
        introduction = Introduction(self.node.log.all_entries(), self.node.node, nonce, signed)
        self._greeted.begin(host, greeting, introduction)
        return introduction

    async def _admit(self, application: Application) -> Welcome:
        """Whoever proves an invite's secret over one of the open conversations is in.

        A use is taken before the entries are written and given back where they are refused; one whose entries may
        still reach the disk, after this conversation timed out, stays taken.
        """
        newcomer = application.newcomer
        check_names(machine=newcomer.name)
        check_ca(newcomer)
        async with self.writing:
            transcripts = self._greeted.transcripts(self.listener.fingerprint(), newcomer)
            nonce, invite = self._invites.redeem(self.clock.now(), application.proof, transcripts)
            self._greeted.end(nonce)
            try:  # to who has no invite we say nothing, not even which names are taken
                joining.check_name(self.node.log, newcomer.name)
                joining.check_possession(self.notary, self.node.log, application, transcripts[nonce])
                await self.settle(ev.LogWritten(joining.admit(self.node.log, invite, newcomer)))
            except MeshgpuError:
                self._invites.give_back(invite)
                raise
        return Welcome(self.node.log.all_entries(), invite.user, tuple(self.addresses()))

    # -- renting ------------------------------------------------------------------------------------------------------

    def check_renting(self, uid: int) -> None:
        """Raise TrustError `not-in-mesh` or `not-an-admin` where `let_rent` would."""
        self._granting(uid)

    async def let_rent(self, uid: int) -> None:
        """Let this node rent, and jobs leave the office for what it rents, where the mesh does not yet.

        Raises TrustError `not-in-mesh` or `not-an-admin`; then nothing was changed.
        """
        async with self.writing:
            author, grants = self._granting(uid)
            if grants:
                await self.settle(ev.LogWritten(self.node.log.write(author, grants)))

    def _granting(self, uid: int) -> tuple[KeyId, tuple[SetPolicy | SetRole, ...]]:
        """Who signs what is lacking; with nothing lacking anybody may."""
        log, me = self.node.log, self.node.node
        member, account = log.members.get(me), log.account(me, uid)
        policy = () if log.may_leave else (SetPolicy(may_leave=True),)
        role = () if member is not None and member.role is Role.BURST else (SetRole(me, Role.BURST),)
        if account is not None and not (policy or role):
            return account.key, ()
        return self.admin(uid, "let this machine rent", "meshgpu burst setup").key, (*policy, *role)

    # -- joining ------------------------------------------------------------------------------------------------------

    async def join(
        self,
        uid: int,
        text: str,
        name: str,
        more: Sequence[Address],
        dial: Callable[[Address], Awaitable[ports.PairingDialog]],
    ) -> Joined:
        """Use an invite. `more` are further addresses to try. Raises MeshgpuError; then nothing was changed here."""
        self.check_outside()
        check_names(machine=name)
        invite = joining.read_invite(text)
        failures: list[str] = []
        for address in dict.fromkeys((*invite.addresses, *more)):
            try:
                dialog = await dial(address)
            except MeshgpuError as error:
                failures.append(error.message)
                continue
            try:
                return await self._converse(uid, invite, name, dialog, address)
            finally:
                await dialog.close()
        raise MeshgpuError(
            "no-answer",
            f"cannot join: nobody takes in machines there now ({'; '.join(failures) or 'no address'})",
            "an invite ends with its time, its uses, or its maker's agent: meshgpu invite; else check the network",
        )

    async def _converse(
        self, uid: int, invite: InviteString, name: str, dialog: ports.PairingDialog, address: Address
    ) -> Joined:
        greeting = joining.greet(invite, PROTOCOL, self.rng.randbytes(32), dialog.fingerprint)
        introduction = decode(Introduction, await dialog.call("greet", encode(greeting)))
        log = joining.check_introduction(self.notary, invite, introduction, greeting, dialog.fingerprint)
        newcomer = Newcomer(self.keys.node_key(), self.keys.device_ca(), self.keys.user_key(uid), uid, name)
        me = joining.membership(log, newcomer)
        if me is not None:  # an earlier welcome was lost on its way: nothing more is needed, and no use is taken
            return await self._enter(invite, log, me, (with_port(host_of(address), DEFAULT_LINK_PORT),))
        joining.check_name(log, name)
        application = joining.apply(self.notary, invite, introduction, greeting, dialog.fingerprint, newcomer)
        welcome = decode(Welcome, await dialog.call("apply", encode(application)))
        log.add(welcome.log)
        me = joining.membership(log, newcomer)
        if me is None:
            raise MeshgpuError("wrong-mesh", "cannot join: the inviter did not add this machine to the mesh")
        return await self._enter(invite, log, me, reachable(welcome.addresses, address))

    async def _enter(self, invite: InviteString, log: MeshLog, me: Member, inviter_at: tuple[Address, ...]) -> Joined:
        self.check_outside()  # somebody else may have entered one meanwhile
        await self.settle(ev.MeshEntered(invite.genesis, log.all_entries(), ((invite.inviter, inviter_at),)))
        return Joined(log.mesh_name, me.name, me.owner, log.name_of(invite.inviter), me.role)


def reachable(addresses: Sequence[Address], answered: Address) -> tuple[Address, ...]:
    """The inviter's own addresses, and its Link port at the host that just answered: names and NAT may differ."""
    host = answered.rpartition(":")[0]
    ports_told = dict.fromkeys(address.rpartition(":")[2] for address in addresses)
    return tuple(dict.fromkeys((*addresses, *(Address(f"{host}:{port}") for port in ports_told))))


def check_ca(newcomer: Newcomer) -> None:
    """Raises BadProof where a newcomer's device CA is not of its key."""
    if node_of_ca(newcomer.device_ca) != node_id(newcomer.public_key):
        raise BadProof("bad-invite", "cannot admit a machine: its certificate belongs to another key")


def check_names(**names: str) -> None:
    for what, name in names.items():
        if not is_name(name):
            raise MeshgpuError(
                "bad-name", f"cannot use {name!r} as the name of a {what}: use a-z, 0-9 and hyphens, 40 at most"
            )
