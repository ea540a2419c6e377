"""One window: whom it lets in, what ends a conversation, and what a guesser gets."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from meshgpu.core.trust import admitting
from meshgpu.core.trust.admitting import (
    ANSWERED_LIMIT,
    COMPARISON_LIFE_S,
    DECLINED_LIMIT,
    REVEAL_LIFE_S,
    WINDOW_LIFE_S,
    Agreed,
    Window,
)
from meshgpu.core.trust.comparing import Knock, Terms, commit, digits, transcript
from meshgpu.core.trust.strangers import FAILURES_LIMIT, Strangers
from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.clock import Now
from meshgpu.model.ids import Digest, MeshId, NodeId, UserName, digest, key_id
from meshgpu.model.pairing import Newcomer, Possession
from meshgpu.model.trust import Role, Signed
from meshgpu.sim.fakes import ToyNotary
from meshgpu.sim.office import Office

Clock = Callable[[float], Now]

TERMS = Terms(MeshId("ab" * 32), "office", NodeId("a" * 52), b"p" * 32, b"admitter's ca", Role.RIG, UserName("bob"))


class Joiner:
    """What a joining machine says; also what a man in the middle says as one."""

    def __init__(self, office: Office, name: str, nonce: bytes = b"j" * 32) -> None:
        node, user = office.ring.make(name), office.ring.make(f"user of {name}")
        self.notary = ToyNotary(office.ring, (node, user))
        self.knock = Knock(Newcomer(node, b"ca", user, 1000, name), UserName("bob"), digest(b"certificate"))
        self.nonce = nonce
        self.commitment = commit(self.knock, nonce)

    def signed(self, admitter_nonce: bytes, terms: Terms = TERMS) -> tuple[Signed, Signed]:
        possession = Possession(digest(transcript(self.knock, terms, self.nonce, admitter_nonce)))
        newcomer = self.knock.newcomer
        by_node, by_user = (
            self.notary.sign(key_id(key), possession) for key in (newcomer.public_key, newcomer.user_key)
        )
        return by_node, by_user

    def begin(self, window: Window, now: Now, nonce: bytes = b"a" * 32, host: str = "10.0.0.7") -> bytes:
        return window.knock(now, self.knock, self.commitment, TERMS, nonce, host)

    def show(self, window: Window, now: Now, nonce: bytes = b"a" * 32) -> str:
        return window.reveal(now, self.commitment, self.nonce, *self.signed(nonce))


@pytest.fixture
def window(office: Office, at: Clock) -> Window:
    return Window(office.notaries[0], Strangers(), at(0))


@pytest.fixture
def joiner(office: Office) -> Joiner:
    return Joiner(office, "new")


def test_machine_is_admitted_when_both_people_agreed(window: Window, joiner: Joiner, at: Clock) -> None:
    joiner.begin(window, at(0))
    assert joiner.show(window, at(1)) == digits(transcript(joiner.knock, TERMS, joiner.nonce, b"a" * 32))
    assert window.agree(at(2), joiner.commitment) is None
    assert window.press(at(3), same=True) == Agreed(joiner.knock, TERMS)
    assert window.agree(at(4), joiner.commitment) == Agreed(joiner.knock, TERMS)
    assert not window.is_open(at(4))


def test_admin_alone_admits_nobody(window: Window, joiner: Joiner, at: Clock) -> None:
    joiner.begin(window, at(0))
    joiner.show(window, at(1))
    assert window.press(at(2), same=True) is None
    assert window.is_open(at(2))


def test_admin_cannot_agree_before_digits_are_shown(window: Window, joiner: Joiner, at: Clock) -> None:
    joiner.begin(window, at(0))
    with pytest.raises(TrustError, match="no digits"):
        window.press(at(1), same=True)


def test_joiner_cannot_agree_before_it_has_shown_its_nonce(window: Window, joiner: Joiner, at: Clock) -> None:
    joiner.begin(window, at(0))
    with pytest.raises(TrustError, match="nobody has seen"):
        window.agree(at(1), joiner.commitment)


def test_wrong_nonce_ends_the_conversation(window: Window, joiner: Joiner, at: Clock) -> None:
    joiner.begin(window, at(0))
    joiner.nonce = b"x" * 32
    with pytest.raises(TrustError, match="another nonce"):
        joiner.show(window, at(1))
    joiner.nonce = b"j" * 32
    with pytest.raises(TrustError, match="another nonce"):
        joiner.show(window, at(1))


@pytest.mark.parametrize("forged", [0, 1])
def test_keys_that_are_not_the_joiners_own_are_refused(
    window: Window, joiner: Joiner, office: Office, at: Clock, forged: int
) -> None:
    joiner.begin(window, at(0))
    signed = list(joiner.signed(b"a" * 32))
    signed[forged] = Joiner(office, "other").signed(b"a" * 32)[forged]
    with pytest.raises(TrustError):
        window.reveal(at(1), joiner.commitment, joiner.nonce, *signed)
    assert window.end_of(joiner.commitment)


def test_possession_of_another_conversation_is_refused(window: Window, joiner: Joiner, at: Clock) -> None:
    joiner.begin(window, at(0))
    with pytest.raises(TrustError, match="keys were not there"):
        joiner.show(window, at(1), nonce=b"b" * 32)


def test_replayed_reveal_is_refused_and_changes_nothing(window: Window, joiner: Joiner, at: Clock) -> None:
    joiner.begin(window, at(0))
    joiner.show(window, at(1))
    with pytest.raises(TrustError, match="shown before"):
        joiner.show(window, at(2))
    window.agree(at(3), joiner.commitment)
    assert window.press(at(3), same=True) is not None


def test_conversation_that_ended_is_not_begun_again(window: Window, joiner: Joiner, at: Clock) -> None:
    joiner.begin(window, at(0))
    window.leave(at(1), joiner.commitment, "its person said no")
    with pytest.raises(TrustError, match="over before"):
        joiner.begin(window, at(2))


def test_second_joiner_hears_busy_and_may_come_later(window: Window, joiner: Joiner, office: Office, at: Clock) -> None:
    second = Joiner(office, "second")
    joiner.begin(window, at(0))
    with pytest.raises(MeshgpuError, match="another machine") as busy:
        second.begin(window, at(1))
    assert busy.value.code == "busy"
    window.leave(at(2), joiner.commitment, "its person said no")
    assert second.begin(window, at(3)) == b"a" * 32


def test_joiner_hears_that_the_admin_declined(window: Window, joiner: Joiner, at: Clock) -> None:
    joiner.begin(window, at(0))
    joiner.show(window, at(1))
    window.agree(at(2), joiner.commitment)
    window.press(at(2), same=False)
    with pytest.raises(TrustError, match="said no"):
        window.agree(at(3), joiner.commitment)


def test_admin_hears_that_the_joiner_declined(window: Window, joiner: Joiner, at: Clock) -> None:
    joiner.begin(window, at(0))
    joiner.show(window, at(1))
    window.leave(at(2), joiner.commitment, "its person said no")
    assert window.end_of(joiner.commitment) == "its person said no"
    with pytest.raises(TrustError, match="no digits"):
        window.press(at(2), same=True)


def test_stranger_does_not_end_a_conversation(window: Window, joiner: Joiner, at: Clock) -> None:
    joiner.begin(window, at(0))
    with pytest.raises(TrustError, match="no such"):
        window.leave(at(1), Digest("0" * 64), "")
    assert joiner.show(window, at(1))


def test_digits_nobody_compares_in_time_are_void(window: Window, joiner: Joiner, at: Clock) -> None:
    joiner.begin(window, at(0))
    joiner.show(window, at(1))
    assert window.agree(at(0.5 + COMPARISON_LIFE_S), joiner.commitment) is None
    with pytest.raises(TrustError, match="in time"):
        window.agree(at(1 + COMPARISON_LIFE_S), joiner.commitment)


def test_silent_joiner_makes_room(window: Window, joiner: Joiner, office: Office, at: Clock) -> None:
    joiner.begin(window, at(0))
    assert Joiner(office, "second").begin(window, at(REVEAL_LIFE_S))


def test_window_closes_by_itself_and_ends_what_runs(window: Window, joiner: Joiner, at: Clock) -> None:
    joiner.begin(window, at(WINDOW_LIFE_S - 2))
    joiner.show(window, at(WINDOW_LIFE_S - 1))
    assert window.is_open(at(WINDOW_LIFE_S - 1))
    assert not window.is_open(at(WINDOW_LIFE_S))
    assert window.why_closed() == "no machine was admitted in 10 minutes"
    with pytest.raises(TrustError, match="closed"):
        window.agree(at(WINDOW_LIFE_S), joiner.commitment)


def test_only_the_machine_that_was_named_is_let_in(office: Office, joiner: Joiner, at: Clock) -> None:
    window = Window(office.notaries[0], Strangers(), at(0), wanted="new")
    with pytest.raises(TrustError, match="waits for new, not for other"):
        Joiner(office, "other").begin(window, at(0))
    assert joiner.begin(window, at(0))


def test_guesser_who_hangs_up_wears_the_window_out_from_however_many_addresses(
    window: Window, office: Office, joiner: Joiner, at: Clock
) -> None:
    for number in range(ANSWERED_LIMIT):
        guesser = Joiner(office, f"guesser-{number}")
        assert window.is_open(at(number))
        guesser.begin(window, at(number), host=f"10.0.0.{number}")
        window.leave(at(number), guesser.commitment, "hung up")
    assert not window.is_open(at(ANSWERED_LIMIT))
    assert "may be guessing" in window.why_closed()
    with pytest.raises(TrustError, match="nobody takes in machines"):
        joiner.begin(window, at(ANSWERED_LIMIT))


def declined(window: Window, joiner: Joiner, at: Clock, second: float) -> None:
    joiner.begin(window, at(second))
    joiner.show(window, at(second))
    window.press(at(second), same=False)


def test_admin_who_declines_again_and_again_closes_the_window(window: Window, office: Office, at: Clock) -> None:
    for number in range(DECLINED_LIMIT):
        assert window.is_open(at(number))
        declined(window, Joiner(office, f"new-{number}"), at, number)
    assert not window.is_open(at(DECLINED_LIMIT))
    assert "were declined" in window.why_closed()


def test_admin_who_lets_the_time_pass_has_declined(office: Office, at: Clock) -> None:
    window = Window(office.notaries[0], Strangers(), at(0))
    for number in range(DECLINED_LIMIT - 1):
        declined(window, Joiner(office, f"new-{number}"), at, number)
    silent = Joiner(office, "silent")
    silent.begin(window, at(10))
    silent.show(window, at(10))
    assert window.is_open(at(9 + COMPARISON_LIFE_S))
    assert not window.is_open(at(10 + COMPARISON_LIFE_S))


@pytest.mark.parametrize("way", ["knocks", "silent", "shows", "agrees"])
def test_one_address_cannot_close_a_window_and_is_muted(office: Office, at: Clock, way: str) -> None:
    """Whatever it does without a person's answer: knock and hang up, say nothing more, show digits and hang up."""
    strangers, second = Strangers(), 0.0
    window = Window(office.notaries[0], strangers, at(0))
    for number in range(FAILURES_LIMIT):
        strangers.check(at(second), "10.0.0.66")
        stranger = Joiner(office, f"stranger-{number}")
        stranger.begin(window, at(second), host="10.0.0.66")
        if way == "shows":
            stranger.show(window, at(second))
        if way == "agrees":
            with pytest.raises(TrustError, match="nobody has seen"):
                window.agree(at(second), stranger.commitment)
        elif way == "silent":
            second += REVEAL_LIFE_S
            window.is_open(at(second))
        else:
            window.leave(at(second), stranger.commitment, "hung up")
    with pytest.raises(MeshgpuError, match=r"from 10\.0\.0\.66") as muted:
        strangers.check(at(second), "10.0.0.66")
    assert muted.value.code == "busy"
    strangers.check(at(second), "10.0.0.7")
    assert Joiner(office, "new").begin(window, at(second))


def test_machines_that_fall_silent_close_no_window(window: Window, office: Office, at: Clock) -> None:
    for number in range(DECLINED_LIMIT):
        Joiner(office, f"silent-{number}").begin(window, at(number * REVEAL_LIFE_S), host=f"10.0.0.{number}")
    assert window.is_open(at(DECLINED_LIMIT * REVEAL_LIFE_S))


def test_one_address_alone_is_muted_before_the_admins_patience_ends() -> None:
    assert FAILURES_LIMIT < DECLINED_LIMIT


# -- a man in the middle ---------------------------------------------------------------------------------------------

GRINDS_LIMIT = 50_000_000
"""Six digits come up once in a million: fewer are enough but for one time in 10^21."""


def both_screens(office: Office, at: Clock, seed: int, *, chooses_late: bool = False) -> tuple[str, str]:
    """The digits at the joiner and at the admitter, with him between: to each he is the other.

    chooses_late: he shows the admitter a nonce that he picks when he knows all else, not the one he committed to.
    """
    random = Random(seed)
    joiner, his = Joiner(office, "new"), Joiner(office, "false")
    joiner.knock = replace(joiner.knock, certificate=digest(b"of the man in the middle"))
    joiner.nonce, his.nonce, to_joiner, fresh = (random.randbytes(32) for _ in range(4))
    joiner.commitment, his.commitment = commit(joiner.knock, joiner.nonce), commit(his.knock, his.nonce)
    real, false = Window(office.notaries[0], Strangers(), at(0)), Window(office.notaries[0], Strangers(), at(0))
    joiner.begin(false, at(0), to_joiner)
    his.begin(real, at(0), fresh)
    at_joiner = joiner.show(false, at(1), to_joiner)
    if chooses_late:
        his.nonce = ground(his.knock, fresh, at_joiner)
    return at_joiner, his.show(real, at(1), fresh)


def ground(knock: Knock, fresh: bytes, wanted: str) -> bytes:
    """A nonce with which the admitter would show the digits `wanted`."""
    placeholder = b"?" * 32
    before, after = transcript(knock, TERMS, placeholder, fresh).split(placeholder)
    begun, number = hashlib.sha256(before), int(wanted.replace(" ", ""))
    for tried in range(GRINDS_LIMIT):
        nonce = tried.to_bytes(32, "big")
        attempt = begun.copy()
        attempt.update(nonce + after)
        if int.from_bytes(attempt.digest(), "big") % 1_000_000 == number:
            return nonce
    raise AssertionError("no nonce was found")


def test_man_in_the_middle_of_two_windows_gets_different_digits(office: Office, at: Clock) -> None:
    for seed in range(1000):
        at_joiner, at_admitter = both_screens(office, at, seed)
        assert at_joiner != at_admitter, seed


def test_man_in_the_middle_who_chooses_late_is_refused_and_would_else_fool_both(
    office: Office, at: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the commitment is for: without it, the man of the test above gets equal digits at the first try."""
    with pytest.raises(TrustError, match="another nonce"):
        both_screens(office, at, 1, chooses_late=True)
    monkeypatch.setattr(admitting, "check_commitment", lambda commitment, knock, nonce: None)
    at_joiner, at_admitter = both_screens(office, at, 1, chooses_late=True)
    assert at_joiner == at_admitter
