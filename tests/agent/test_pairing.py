"""Inviting, admitting and joining between agents of one process, which talk through a listener of the test's own."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from meshgpu.agent.comparing import Admitted, Failed, Shown
from meshgpu.agent.pairing import Joined
from meshgpu.core import events as ev
from meshgpu.core.trust import comparing, joining
from meshgpu.core.trust.comparing import Knock
from meshgpu.core.trust.strangers import FAILURES_LIMIT
from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.ids import Address, Digest, NodeId, UserName, digest, key_id
from meshgpu.model.pairing import (
    Application,
    CompareKnock,
    ComparePress,
    CompareReveal,
    CompareTerms,
    Greeting,
    Introduction,
    Newcomer,
    Possession,
)
from meshgpu.model.trust import Role
from meshgpu.wire.codec import PROTOCOL, decode, encode
from tests.agent.pairing_lab import UID, Dialog, Lab, Listener, Machine, idle, lab

# -- invites -----------------------------------------------------------------------------------------------------------


async def test_invite_of_two_uses_lets_in_two_of_three_that_come_at_once(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        invite = await office.invite(uses=2)
        machines = [office.make(name) for name in ("bob", "cyd", "dan")]
        outcomes = await asyncio.gather(
            *(machine.join(invite, office.ada.listener) for machine in machines), return_exceptions=True
        )
        refused = [outcome for outcome in outcomes if isinstance(outcome, TrustError)]
        assert ([error.code for error in refused], len(office.ada.names())) == (["bad-invite"], 3)


async def test_last_use_is_given_back_where_the_newcomer_is_refused(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        invite = await office.invite()
        bob, eve = office.make("bob"), office.make("eve")
        apply = await greeted(eve, invite, office.ada.listener)
        application, transcript = apply(eve.newcomer())
        stolen = replace(application, by_user=bob.notary.sign(key_id(bob.keys.user_key(UID)), Possession(transcript)))
        with pytest.raises(TrustError):
            await Dialog(office.ada.listener).call("apply", encode(stolen))
        assert (await bob.join(invite, office.ada.listener)).mesh_name == "lab"
        assert office.ada.names() == {"ada", "bob"}


async def test_application_that_is_said_twice_counts_once(tmp_path: Path) -> None:
    """Both wait for the lock; the conversation is over with the first, although that was refused."""
    async with lab(tmp_path) as office:
        invite, eve = await office.invite(), office.make("eve")
        application, _ = (await greeted(eve, invite, office.ada.listener))(eve.newcomer())
        request = encode(replace(application, by_user=application.by_node))
        async with office.ada.pairing.writing:
            calls = [asyncio.ensure_future(Dialog(office.ada.listener).call("apply", request)) for _ in range(2)]
            await idle()
        refusals = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(refusal, TrustError) for refusal in refusals] == [True, True]
        assert "was used before" in str(refusals[1])
        await eve.join(invite, office.ada.listener)


async def test_newcomer_gets_the_role_and_user_that_the_inviter_wrote(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        invite = await office.invite(role=Role.SUBMITTER, user="bob")
        assert (await office.make("new").join(invite, office.ada.listener)).user == "bob"
        member = office.ada.node.log.member_named("new")
        assert member is not None
        assert (member.role, member.owner) == (Role.SUBMITTER, "bob")


async def test_listener_stays_for_uses_that_are_left_and_closes_after_the_last_welcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshgpu.agent.pairing.LAST_WORD_S", 0.0)
    async with lab(tmp_path) as office:
        invite = await office.invite(uses=2)
        await office.make("bob").join(invite, office.ada.listener)
        await idle()
        assert office.ada.listener.is_open()
        await office.make("cyd").join(invite, office.ada.listener)
        await idle()
        assert not office.ada.listener.is_open()


async def test_listener_does_not_close_on_a_machine_that_is_being_admitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last use is taken, the entries are not yet written, and an earlier welcome's time is over."""
    monkeypatch.setattr("meshgpu.agent.pairing.LAST_WORD_S", 0.0)
    async with lab(tmp_path) as office:
        invite = await office.invite()
        written, may_end = asyncio.Event(), asyncio.Event()

        async def slow(event: ev.Event) -> None:
            written.set()
            await may_end.wait()
            await office.ada.settle(event)

        office.ada.pairing.settle = slow
        bob = asyncio.ensure_future(office.make("bob").join(invite, office.ada.listener))
        await written.wait()
        await office.ada.pairing.close_listener()
        assert office.ada.listener.is_open()
        may_end.set()
        await bob


async def greeted(
    machine: Machine, invite: str, listener: Listener
) -> Callable[[Newcomer], tuple[Application, Digest]]:
    """A newcomer's first step by hand; what is returned makes its second, and the digest that it has to sign."""
    words, dialog = joining.read_invite(invite), Dialog(listener)
    greeting = joining.greet(words, PROTOCOL, b"n" * 32, dialog.fingerprint)
    introduction = decode(Introduction, await dialog.call("greet", encode(greeting)))

    def apply(newcomer: Newcomer) -> tuple[Application, Digest]:
        about = joining.transcript(introduction, greeting, dialog.fingerprint, newcomer)
        made = joining.apply(machine.notary, words, introduction, greeting, dialog.fingerprint, newcomer)
        return made, digest(about)

    return apply


async def test_keys_of_a_member_do_not_join_again_by_an_invite(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        invite = await office.invite(uses=2)
        bob = office.make("bob")
        await bob.join(invite, office.ada.listener)
        apply = await greeted(bob, invite, office.ada.listener)
        with pytest.raises(TrustError, match="keys is a member's already"):
            await Dialog(office.ada.listener).call("apply", encode(apply(bob.newcomer("bob-2"))[0]))
        assert office.ada.names() == {"ada", "bob"}


async def test_name_of_a_machine_is_not_taken_by_an_invite(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        invite, eve = await office.invite(), office.make("eve")
        apply = await greeted(eve, invite, office.ada.listener)
        with pytest.raises(TrustError, match="has a machine of that name"):
            await Dialog(office.ada.listener).call("apply", encode(apply(eve.newcomer("ada"))[0]))
        assert (await eve.join(invite, office.ada.listener)).mesh_name == "lab"


async def test_machine_whose_welcome_was_lost_enters_at_the_next_try_and_uses_nothing_up(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        invite, bob = await office.invite(uses=2), office.make("bob")
        apply = await greeted(bob, invite, office.ada.listener)
        await Dialog(office.ada.listener).call("apply", encode(apply(bob.newcomer())[0]))
        assert (bob.node.log.mesh, office.ada.names()) == (None, {"ada", "bob"})
        joined = await bob.join(invite, office.ada.listener, name="another")
        assert (joined.name, joined.user, bob.names()) == ("bob", "ada", {"ada", "bob"})
        await office.make("cyd").join(invite, office.ada.listener)
        assert office.ada.names() == {"ada", "bob", "cyd"}


@pytest.mark.parametrize("changed", ["device_ca", "user_key", "uid"])
async def test_member_by_other_keys_is_no_member(tmp_path: Path, changed: str) -> None:
    async with lab(tmp_path) as office:
        me = office.ada.newcomer()
        assert joining.membership(office.ada.node.log, me) is not None
        other = replace(office.make("other").newcomer(), uid=UID + 1)
        wrong = replace(me, **{changed: getattr(other, changed)})
        assert joining.membership(office.ada.node.log, wrong) is None


# -- strangers ---------------------------------------------------------------------------------------------------------


async def test_address_with_bad_proofs_is_muted_and_others_still_join(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        invite = await office.invite()
        stranger = Dialog(office.ada.listener, "10.0.0.66")
        bad = encode(Greeting(PROTOCOL, b"n" * 32, b"p" * 32))
        for request in [bad] * (FAILURES_LIMIT - 1) + [b"\xff\xff"]:
            with pytest.raises(MeshgpuError, match=r"was used before|cannot read"):
                await stranger.call("greet", request)
        bob = office.make("bob")
        with pytest.raises(MeshgpuError, match=r"too many tries .* from 10\.0\.0\.66"):
            await bob.join(invite, office.ada.listener, host="10.0.0.66")
        await bob.join(invite, office.ada.listener, host="10.0.0.7")
        assert office.ada.names() == {"ada", "bob"}


async def test_stranger_without_an_invite_learns_no_names_and_is_muted(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        await office.invite()
        eve, possession = office.make("eve"), Possession(digest(b"anything"))
        answers: list[str] = []
        for name in ["ada", "nobody"] * FAILURES_LIMIT:
            newcomer = eve.newcomer(name)
            keys = (key_id(newcomer.public_key), key_id(newcomer.user_key))
            application = Application(newcomer, b"junk", *(eve.notary.sign(key, possession) for key in keys))
            with pytest.raises(MeshgpuError) as refused:
                await Dialog(office.ada.listener).call("apply", encode(application))
            answers.append(refused.value.code)
        assert answers == ["bad-invite"] * FAILURES_LIMIT + ["busy"] * FAILURES_LIMIT


async def test_address_that_is_silent_again_and_again_is_muted(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        await office.invite()
        door = office.ada.listener.door
        assert door is not None
        for _ in range(FAILURES_LIMIT):
            door.check("10.0.0.66")
            door.broke_off("10.0.0.66")
        with pytest.raises(MeshgpuError, match="too many tries"):
            door.check("10.0.0.66")


async def test_mistakes_of_honest_people_mute_nobody(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        invite, bob = await office.invite(), office.make("bob")
        for _ in range(FAILURES_LIMIT + 1):
            apply = await greeted(bob, invite, office.ada.listener)
            with pytest.raises(TrustError, match="has a machine of that name"):
                await Dialog(office.ada.listener).call("apply", encode(apply(bob.newcomer("ada"))[0]))
            with pytest.raises(TrustError, match="no admin compares digits"):
                await Dialog(office.ada.listener).call("compare-knock", b"")
        await bob.join(invite, office.ada.listener)


@pytest.mark.parametrize("step", ["apply", "compare-knock"])
async def test_certificate_of_another_key_is_refused_and_held_against_the_address(tmp_path: Path, step: str) -> None:
    async with lab(tmp_path) as office, window(office) as _:
        invite, eve, other = await office.invite(), office.make("eve"), office.make("other")
        false = replace(eve.newcomer(), device_ca=other.keys.device_ca())
        for _ in range(FAILURES_LIMIT):
            if step == "apply":
                apply = await greeted(eve, invite, office.ada.listener)
                request = encode(apply(false)[0])
            else:
                request = encode(CompareKnock(PROTOCOL, false, UserName("eve"), digest(b"commitment")))
            with pytest.raises(TrustError, match="certificate belongs to another key"):
                await Dialog(office.ada.listener).call(step, request)
        with pytest.raises(MeshgpuError, match="too many tries"):
            await Dialog(office.ada.listener).call(step, request)
        assert office.ada.names() == {"ada"}


# -- comparing ---------------------------------------------------------------------------------------------------------


@dataclass
class Open:
    """ada's window. told: what her screen shows, one after the other."""

    task: "asyncio.Task[Admitted]"
    told: "asyncio.Queue[Shown | Failed]"


@asynccontextmanager
async def window(office: Lab, said: str | None = None) -> AsyncIterator[Open]:
    told: asyncio.Queue[Shown | Failed] = asyncio.Queue()

    async def tell(what: Shown | Failed | None) -> None:
        if what is not None:
            told.put_nowait(what)

    task = asyncio.ensure_future(office.ada.comparing.admit(UID, None, said, Role.RIG, tell))
    while office.ada.pairing._compare is None:  # noqa: ASYNC110  # the loop's own turns, no time
        await asyncio.sleep(0)
    try:
        yield Open(task, told)
    finally:
        task.cancel()
        await asyncio.wait([task])


@dataclass
class Joiner:
    """A machine that joins by digits. shown: what its person sees."""

    machine: Machine
    task: "asyncio.Task[Joined]"
    shown: "asyncio.Queue[Shown]"

    async def digits(self) -> str:
        return (await self.shown.get()).digits


def joins(machine: Machine, at: Listener, name: str | None = None, user: str = "bob") -> Joiner:
    shown: asyncio.Queue[Shown] = asyncio.Queue()

    async def tell(what: Shown | None) -> None:
        if what is not None:
            shown.put_nowait(what)

    async def dial(_: Address) -> Dialog:
        return Dialog(at)

    join = machine.comparing.join(UID, [Address("10.0.0.1:7444")], name or machine.name, user, dial, tell)
    return Joiner(machine, asyncio.ensure_future(join), shown)


async def test_only_a_window_is_announced_and_an_invite_is_not_taken_for_one(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        invite = await office.invite()
        assert office.ada.announced == []
        async with window(office):
            await idle()
            assert office.ada.announced == [7444]
        assert office.ada.announced[-1] == 0
        await office.make("bob").join(invite, office.ada.listener)


async def test_digits_of_an_earlier_comparison_answer_no_later_one(tmp_path: Path) -> None:
    async with lab(tmp_path) as office, window(office) as there:
        first = joins(office.make("bob"), office.ada.listener)
        stale = await first.digits()
        first.machine.comparing.press(UID, stale, same=False)
        with pytest.raises(TrustError, match="not confirmed here"):
            await first.task
        second = joins(office.make("eve"), office.ada.listener)
        fresh = await second.digits()
        assert fresh != stale
        with pytest.raises(TrustError, match="not compared any more"):
            office.ada.comparing.press(UID, stale, same=True)
        second.machine.comparing.press(UID, fresh, same=True)
        await idle()
        assert (office.ada.names(), there.task.done()) == ({"ada"}, False)
        office.ada.comparing.press(UID, fresh, same=True)
        assert (await second.task).mesh_name == "lab"
        assert (await there.task).name == "eve"


async def test_digits_are_answered_only_by_the_account_that_opened_the_window(tmp_path: Path) -> None:
    async with lab(tmp_path) as office, window(office):
        bob = joins(office.make("bob"), office.ada.listener)
        shown = await bob.digits()
        with pytest.raises(TrustError, match="not compared any more"):
            office.ada.comparing.press(UID + 1, shown, same=True)
        bob.task.cancel()
        await asyncio.wait([bob.task])


async def test_keys_of_a_member_do_not_join_again_by_digits(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        bob = office.make("bob")
        await bob.join(await office.invite(), office.ada.listener)
        again = replace(bob.newcomer("bob-2"))
        for stolen in (again, replace(office.make("eve").newcomer(), user_key=again.user_key)):
            async with window(office):
                request = CompareKnock(PROTOCOL, stolen, UserName("bob"), digest(stolen.public_key))
                with pytest.raises(TrustError, match="keys is a member's already"):
                    await Dialog(office.ada.listener).call("compare-knock", encode(request))


async def test_name_of_a_machine_is_not_taken_by_digits(tmp_path: Path) -> None:
    async with lab(tmp_path) as office, window(office) as there:
        eve = joins(office.make("eve"), office.ada.listener, name="ada")
        with pytest.raises(TrustError, match="has a machine of that name"):
            await eve.task
        assert there.told.empty()


async def test_two_that_take_one_name_at_once_are_one_member(tmp_path: Path) -> None:
    """Both were told that the name is free; whoever is written second is looked at again, under the lock."""
    async with lab(tmp_path) as office, window(office) as there:
        invite = await office.invite()
        bob, eve = joins(office.make("bob"), office.ada.listener), office.make("eve")
        shown = await bob.digits()
        apply = await greeted(eve, invite, office.ada.listener)
        async with office.ada.pairing.writing:
            bob.machine.comparing.press(UID, shown, same=True)
            office.ada.comparing.press(UID, shown, same=True)
            taken = asyncio.ensure_future(
                Dialog(office.ada.listener).call("apply", encode(apply(eve.newcomer("bob"))[0]))
            )
            await idle()
            assert office.ada.names() == {"ada"}
        outcomes = await asyncio.gather(bob.task, taken, return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, TrustError)]
        assert [error.code for error in refused] == ["name-taken"]
        assert office.ada.names() == {"ada", "bob"}
        await asyncio.wait([there.task])


async def test_two_invites_that_take_one_name_at_once_make_one_member(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        calls = []
        async with office.ada.pairing.writing:
            for machine in (office.make("one"), office.make("two")):
                apply = await greeted(machine, await office.invite(), office.ada.listener)
                request = encode(apply(machine.newcomer("bob"))[0])
                calls.append(asyncio.ensure_future(Dialog(office.ada.listener).call("apply", request)))
            await idle()
        _, refused = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(refused, TrustError)
        assert (refused.code, office.ada.names()) == ("name-taken", {"ada", "bob"})


async def test_keys_that_joined_by_invite_meanwhile_are_not_written_again(tmp_path: Path) -> None:
    async with lab(tmp_path) as office, window(office) as there:
        invite, bob = await office.invite(), office.make("bob")
        by_digits = joins(bob, office.ada.listener, name="bob-2")
        shown = await by_digits.digits()
        apply = await greeted(bob, invite, office.ada.listener)
        await Dialog(office.ada.listener).call("apply", encode(apply(bob.newcomer())[0]))
        bob.comparing.press(UID, shown, same=True)
        office.ada.comparing.press(UID, shown, same=True)
        with pytest.raises(TrustError, match="keys is a member's already"):
            await by_digits.task
        assert office.ada.names() == {"ada", "bob"}
        with pytest.raises(TrustError):
            await there.task


async def test_stranger_who_shows_digits_and_hangs_up_does_not_close_the_window(tmp_path: Path) -> None:
    async with lab(tmp_path) as office, window(office) as there:
        for number in range(FAILURES_LIMIT):
            await show_and_hang_up(office.make(f"x{number}"), Dialog(office.ada.listener, "10.0.0.66"))
        with pytest.raises(MeshgpuError, match="too many tries"):
            await show_and_hang_up(office.make("x"), Dialog(office.ada.listener, "10.0.0.66"))
        bob = joins(office.make("bob"), office.ada.listener)
        shown = await bob.digits()
        bob.machine.comparing.press(UID, shown, same=True)
        office.ada.comparing.press(UID, shown, same=True)
        await bob.task
        assert (await there.task).name == "bob"


async def show_and_hang_up(machine: Machine, dialog: Dialog) -> None:
    knock = Knock(machine.newcomer(), UserName(machine.name), dialog.fingerprint)
    commitment = comparing.commit(knock, b"j" * 32)
    answer = await dialog.call(
        "compare-knock", encode(CompareKnock(PROTOCOL, knock.newcomer, knock.as_user, commitment))
    )
    said = decode(CompareTerms, answer)
    terms = comparing.Terms(
        said.mesh, said.mesh_name, NodeId(said.node), said.public_key, said.device_ca, said.role, said.user
    )
    possession = Possession(digest(comparing.transcript(knock, terms, b"j" * 32, said.nonce)))
    by_node, by_user = (
        machine.notary.sign(key_id(key), possession) for key in (knock.newcomer.public_key, knock.newcomer.user_key)
    )
    await dialog.call("compare-reveal", encode(CompareReveal(commitment, b"j" * 32, by_node, by_user)))
    await dialog.call("compare-press", encode(ComparePress(commitment, same=False)))
