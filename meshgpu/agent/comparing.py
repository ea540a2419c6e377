"""Joining by comparing digits: the conversations around `core.trust.admitting`, on the admitter's and joiner's side.

The joiner never begins a second conversation by itself once its nonce was shown: each is one guess for who stands
between the two machines, and only a person may allow another.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from meshgpu import ports
from meshgpu.agent.pairing import Joined, Pairing, check_ca, check_names, reachable
from meshgpu.core import events as ev
from meshgpu.core.trust import comparing, joining
from meshgpu.core.trust.admitting import COMPARISON_LIFE_S, Agreed, Window
from meshgpu.core.trust.comparing import Knock, Terms
from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.ids import Address, Digest, KeyId, UserName, digest, key_id, node_id
from meshgpu.model.pairing import (
    CompareBinding,
    CompareKnock,
    CompareOutcome,
    ComparePress,
    CompareReveal,
    CompareTerms,
    Newcomer,
    Possession,
    Welcome,
)
from meshgpu.model.trust import AddNode, LinkUser, Notary, Role
from meshgpu.wire.certificates import node_of_ca
from meshgpu.wire.codec import PROTOCOL, decode, encode

OUTCOME_WAIT_S: Final = 3.0
"""How long one question of the joiner waits for the admin's key press: less than a call may take."""

LAST_WORD_S: Final = 5.0
"""How long the listener stays for a joiner that asks for its welcome."""

TICK_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Shown:
    """Digits for a person to compare. other: the name of the joining machine, or of the mesh it joins."""

    digits: str
    other: str
    user: UserName
    role: Role


@dataclass(frozen=True, slots=True)
class Failed:
    """A conversation ended without an admission; the window may stay open."""

    why: str


@dataclass(frozen=True, slots=True)
class Admitted:
    """The new member."""

    name: str
    user: UserName
    role: Role


@dataclass(slots=True)
class _Session:
    """One window and who opened it. uid: the admin's account; said: whose the machine will be, None: as it asks."""

    window: Window
    uid: int
    author: KeyId
    admin: UserName
    said: UserName | None
    role: Role
    outcome: "asyncio.Future[Welcome]"
    lines: "asyncio.Queue[Shown]" = field(default_factory=asyncio.Queue)
    talk: Digest | None = None
    digits: str = ""
    admitted: Admitted | None = None


@dataclass(slots=True)
class Comparing:
    """This node's window, and its own way in through another's. One comparison at a time on each side."""

    pairing: Pairing
    _session: _Session | None = None
    _mine: "tuple[str, asyncio.Future[bool]] | None" = None
    _joins: bool = False

    # -- the admitter -------------------------------------------------------------------------------------------------

    async def admit(
        self,
        uid: int,
        wanted: str | None,
        said: str | None,
        role: Role,
        tell: Callable[[Shown | Failed | None], Awaitable[None]],
    ) -> Admitted:
        """Open a window and hold it until a machine was admitted; tells what happens, and None each second.

        Raises MeshgpuError where the caller may not, and `bad-invite` when the window closes; what `tell` raises ends
        it too. Then the listener is closed.
        """
        account = self.pairing.admin(uid, "admit a machine", "meshgpu admit")
        if role not in joining.GIVEN_ROLES:
            raise MeshgpuError("bad-request", f"cannot admit a machine as {role}: expected rig, submitter or viewer")
        check_names(**({"machine": wanted} if wanted else {}), **({"user": said} if said else {}))
        if self._session is not None and self._session.outcome.done():
            await self._close(self._session)
        if self._session is not None:
            raise MeshgpuError(
                "busy", "cannot admit: this machine's window is open already", "end that `meshgpu admit`"
            )
        window = Window(self.pairing.notary, self.pairing.strangers, self.pairing.clock.now(), wanted)
        outcome: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()
        user = None if said is None else UserName(said)
        session = _Session(window, uid, account.key, account.user, user, role, outcome)
        self._session = session
        try:
            await self.pairing.open_listener(self._answer)
            admitted = await self._watch(session, tell)
        except BaseException:
            await self._close(session)
            raise
        self.pairing.hide_listener()
        self.pairing.tasks.create_task(self._close_later(session))
        return admitted

    async def _watch(self, session: _Session, tell: Callable[[Shown | Failed | None], Awaitable[None]]) -> Admitted:
        while not session.outcome.done():
            with contextlib.suppress(TimeoutError):
                await tell(await asyncio.wait_for(session.lines.get(), TICK_S))
            is_open = session.window.is_open(self.pairing.clock.now())
            why = session.window.end_of(session.talk) if session.talk else None
            if why is not None:
                was_shown, session.talk, session.digits = bool(session.digits), None, ""
                if was_shown:
                    await tell(Failed(why))
            if not is_open and session.admitted is None:
                raise TrustError("bad-invite", session.window.why_closed(), "meshgpu admit")
            await tell(None)
        session.outcome.result()
        assert session.admitted is not None
        return session.admitted

    async def _close_later(self, session: _Session) -> None:
        await asyncio.sleep(LAST_WORD_S)
        await self._close(session)

    async def _close(self, session: _Session) -> None:
        session.outcome.cancel()
        if self._session is session:
            self._session = None
            await self.pairing.close_listener()

    async def _answer(self, host: str, step: str, request: bytes) -> bytes:
        session = self._session
        if session is None:
            raise TrustError("bad-invite", "cannot join: nobody takes in machines there now", "meshgpu admit")
        if step == "compare-knock":
            return encode(self._knock(session, decode(CompareKnock, request), host))
        if step == "compare-reveal":
            return encode(self._reveal(session, decode(CompareReveal, request)))
        if step == "compare-press":
            return encode(await self._pressed_there(session, decode(ComparePress, request)))
        raise MeshgpuError("bad-request", f"cannot pair: there is no step {step!r}")

    def _knock(self, session: _Session, said: CompareKnock, host: str) -> CompareTerms:
        pairing, newcomer = self.pairing, said.newcomer
        if said.protocol != PROTOCOL:
            message = f"cannot pair: this mesh speaks protocol {PROTOCOL}, the newcomer {said.protocol}"
            raise MeshgpuError("version", message, "install the same version of meshgpu on both machines")
        check_names(machine=newcomer.name, user=said.as_user)
        check_ca(newcomer)
        certificate = pairing.listener.fingerprint()
        knock = Knock(newcomer, said.as_user, certificate)
        user = self._check_new(session, knock)
        log, public_key = pairing.node.log, pairing.keys.node_key()
        assert log.mesh is not None
        me = pairing.node.node
        terms = Terms(log.mesh, log.mesh_name, me, public_key, pairing.keys.device_ca(), session.role, user)
        nonce = session.window.knock(
            pairing.clock.now(), knock, said.commitment, terms, pairing.rng.randbytes(comparing.NONCE_BYTES), host
        )
        session.talk, session.digits = said.commitment, ""
        binding = CompareBinding(certificate, said.commitment, nonce, log.mesh)
        signed = pairing.notary.sign(key_id(public_key), binding)
        return CompareTerms(log.mesh, log.mesh_name, me, public_key, terms.device_ca, session.role, user, nonce, signed)

    def _check_new(self, session: _Session, knock: Knock) -> UserName:
        """Nothing of the newcomer's is a member's already. Returns whose it will be; raises TrustError."""
        log, newcomer = self.pairing.node.log, knock.newcomer
        joining.check_name(log, newcomer.name)
        if node_id(newcomer.public_key) in log.members or key_id(newcomer.user_key) in log.users:
            raise TrustError("bad-invite", "cannot admit a machine: one of its keys is a member's already")
        return comparing.choose_user(log, session.admin, knock.as_user, session.said)

    def _reveal(self, session: _Session, said: CompareReveal) -> CompareOutcome:
        now = self.pairing.clock.now()
        shown = session.window.reveal(now, said.commitment, said.nonce, said.by_node, said.by_user)
        session.digits = shown
        newcomer, terms = session.window.compared()
        session.lines.put_nowait(Shown(shown, newcomer.newcomer.name, terms.user, terms.role))
        return CompareOutcome()

    async def _pressed_there(self, session: _Session, said: ComparePress) -> CompareOutcome:
        now = self.pairing.clock.now()
        if not said.same:
            session.window.leave(now, said.commitment, "the other machine's person saw other digits, or said no")
            return CompareOutcome()
        self._conclude(session, session.window.agree(now, said.commitment))
        with contextlib.suppress(TimeoutError):
            return CompareOutcome(await asyncio.wait_for(asyncio.shield(session.outcome), OUTCOME_WAIT_S))
        return CompareOutcome()

    def press(self, uid: int, digits: str, *, same: bool) -> None:
        """What the person here said of `digits`. Raises MeshgpuError where these are not compared now."""
        if self._mine is not None and self._mine[0] == digits:
            if not self._mine[1].done():
                self._mine[1].set_result(same)
            return
        session = self._session
        if session is None or session.uid != uid or not digits or session.digits != digits:
            raise TrustError("bad-invite", "cannot answer: these digits are not compared any more", "meshgpu admit")
        self._conclude(session, session.window.press(self.pairing.clock.now(), same=same))

    def _conclude(self, session: _Session, agreed: Agreed | None) -> None:
        """Write what both agreed to, once; a caller that goes away does not stop it halfway."""
        if agreed is None or session.admitted is not None or session.outcome.done():
            return
        newcomer = agreed.knock.newcomer
        session.admitted = Admitted(newcomer.name, agreed.terms.user, agreed.terms.role)
        self.pairing.tasks.create_task(self._write(session, agreed))

    async def _write(self, session: _Session, agreed: Agreed) -> None:
        newcomer, terms = agreed.knock.newcomer, agreed.terms
        node, log = node_id(newcomer.public_key), self.pairing.node.log
        try:
            async with self.pairing.writing:
                if self._check_new(session, agreed.knock) != terms.user:
                    raise TrustError("bad-invite", "cannot admit a machine: its user is another by now")
                added = AddNode(node, newcomer.public_key, newcomer.device_ca, newcomer.name, terms.role, terms.user)
                linked = LinkUser(terms.user, newcomer.user_key, node, newcomer.uid)
                await self.pairing.settle(ev.LogWritten(log.write(session.author, (added, linked))))
        except MeshgpuError as error:
            if not session.outcome.done():
                session.outcome.set_exception(error)
            return
        if not session.outcome.done():
            session.outcome.set_result(Welcome(log.all_entries(), terms.user, tuple(self.pairing.addresses())))

    # -- the joiner ---------------------------------------------------------------------------------------------------

    async def join(
        self,
        uid: int,
        addresses: Sequence[Address],
        name: str,
        user: str,
        dial: Callable[[Address], Awaitable[ports.PairingDialog]],
        tell: Callable[[Shown | None], Awaitable[None]],
    ) -> Joined:
        """Compare with whoever answers first at `addresses`; tells the digits, then None each second.

        Raises MeshgpuError, and what `tell` raises; then nothing was changed here, and the other side heard it.
        """
        self.pairing.check_outside()
        check_names(machine=name, user=user)
        if self._joins:
            raise MeshgpuError("busy", "cannot join: this machine compares digits already", "end that `meshgpu join`")
        self._joins = True
        try:
            dialog, address = await _first(addresses, dial)
            try:
                return await self._converse(uid, name, UserName(user), dialog, address, tell)
            finally:
                await dialog.close()
        finally:
            self._joins, self._mine = False, None

    async def _converse(
        self, uid: int, name: str, user: UserName, dialog: ports.PairingDialog, address: Address,
        tell: Callable[[Shown | None], Awaitable[None]],
    ) -> Joined:  # fmt: skip
        keys, notary = self.pairing.keys, self.pairing.notary
        newcomer = Newcomer(keys.node_key(), keys.device_ca(), keys.user_key(uid), uid, name)
        knock = Knock(newcomer, user, dialog.fingerprint)
        nonce = self.pairing.rng.randbytes(comparing.NONCE_BYTES)
        commitment = comparing.commit(knock, nonce)
        answer = await dialog.call("compare-knock", encode(CompareKnock(PROTOCOL, newcomer, user, commitment)))
        said = decode(CompareTerms, answer)
        check_terms(notary, said, CompareBinding(dialog.fingerprint, commitment, said.nonce, said.mesh))
        terms = Terms(said.mesh, said.mesh_name, said.node, said.public_key, said.device_ca, said.role, said.user)
        about = comparing.transcript(knock, terms, nonce, said.nonce)
        possession = Possession(digest(about))
        by_node = notary.sign(key_id(newcomer.public_key), possession)
        by_user = notary.sign(key_id(newcomer.user_key), possession)
        await dialog.call("compare-reveal", encode(CompareReveal(commitment, nonce, by_node, by_user)))
        try:
            same = await self._ask(Shown(comparing.digits(about), terms.mesh_name, terms.user, terms.role), tell)
        except BaseException:
            with contextlib.suppress(MeshgpuError):
                await dialog.call("compare-press", encode(ComparePress(commitment, same=False)))
            raise
        if not same:
            await dialog.call("compare-press", encode(ComparePress(commitment, same=False)))
            raise TrustError("bad-invite", "this machine did not join: the digits were not confirmed here")
        welcome = await self._await_welcome(dialog, commitment, tell)
        log = comparing.check_welcome(notary, knock, terms, welcome.log)
        met = ((terms.node, reachable(welcome.addresses, address)),)
        self.pairing.check_outside()  # somebody else may have entered one meanwhile
        await self.pairing.settle(ev.MeshEntered(terms.mesh, log.all_entries(), met))
        return Joined(log.mesh_name, name, terms.user, log.members[terms.node].name, terms.role)

    async def _ask(self, shown: Shown, tell: Callable[[Shown | None], Awaitable[None]]) -> bool:
        pressed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._mine = (shown.digits, pressed)
        await tell(shown)
        try:
            async with asyncio.timeout(COMPARISON_LIFE_S):
                while not pressed.done():
                    await asyncio.wait([pressed], timeout=TICK_S)
                    await tell(None)
        except TimeoutError:
            raise TrustError("bad-invite", "cannot join: nobody compared the digits in time", "meshgpu join") from None
        return pressed.result()

    async def _await_welcome(
        self, dialog: ports.PairingDialog, commitment: Digest, tell: Callable[[Shown | None], Awaitable[None]]
    ) -> Welcome:
        """The other side ends the conversation where its person is too slow, and its words are raised here."""
        request = encode(ComparePress(commitment, same=True))
        while True:
            outcome = decode(CompareOutcome, await dialog.call("compare-press", request))
            if outcome.welcome is not None:
                return outcome.welcome
            try:
                await tell(None)
            except BaseException:
                with contextlib.suppress(MeshgpuError):
                    await dialog.call("compare-press", encode(ComparePress(commitment, same=False)))
                raise


def check_terms(notary: Notary, said: CompareTerms, expected: CompareBinding) -> None:
    """The joiner's check, before it shows its nonce. Raises TrustError `wrong-mesh`."""
    its_own = node_id(said.public_key) == said.node == node_of_ca(said.device_ca)
    if not its_own or said.role not in joining.GIVEN_ROLES or len(said.nonce) != comparing.NONCE_BYTES:
        raise TrustError("wrong-mesh", "cannot join: the admin's machine shows keys or terms that do not fit together")
    if notary.read(said.binding, said.public_key, CompareBinding) != expected:
        raise TrustError("wrong-mesh", "cannot join: somebody stands between this machine and the admin's")


async def _first(
    addresses: Sequence[Address], dial: Callable[[Address], Awaitable[ports.PairingDialog]]
) -> tuple[ports.PairingDialog, Address]:
    failures: list[str] = []
    for address in dict.fromkeys(addresses):
        try:
            return await dial(address), address
        except MeshgpuError as error:
            failures.append(error.message)
    found = "; ".join(failures) or "no address"
    raise MeshgpuError(
        "no-answer", f"cannot join: nobody takes in machines there now ({found})", "meshgpu admit, there"
    )
