"""Invites: strings that survive copying or are refused, and a right that is used once."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshgpu.core.trust.joining import (
    CONVERSATIONS_LIMIT,
    CONVERSATIONS_OF_ONE,
    INVITE_LIFE_MAX_S,
    INVITE_LIFE_MIN_S,
    INVITE_LIFE_S,
    SECRET_BYTES,
    USES_LIMIT,
    Conversations,
    Grant,
    Invites,
    admit,
    apply,
    check_grant,
    check_introduction,
    check_name,
    check_possession,
    greet,
    new_secret,
    prove,
    read_invite,
    transcript,
    write_invite,
)
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.errors import BadProof, MeshgpuError, TrustError
from meshgpu.model.clock import Now
from meshgpu.model.ids import Address, Digest, KeyId, MeshId, NodeId, UserName, digest
from meshgpu.model.pairing import Greeting, Introduction, InviteString, Newcomer, PairingBinding
from meshgpu.model.trust import Role
from meshgpu.sim.fakes import ToyNotary
from meshgpu.sim.office import Office

Clock = Callable[[float], Now]

STRING = InviteString(
    MeshId("ab" * 32), NodeId("a" * 52), new_secret(bytes(range(SECRET_BYTES))), (Address("10.0.0.1:7444"),)
)
GREETING = Greeting(1, b"n" * 32, b"p" * 32)
CERTIFICATE = digest(b"certificate")


def introduce(office: Office, certificate: Digest = CERTIFICATE) -> Introduction:
    node = office.setups[0].node
    binding = PairingBinding(certificate, GREETING.nonce, b"i" * 32)
    return Introduction(office.log, node, b"i" * 32, office.notaries[0].sign(KeyId(node), binding))


def newcomer(office: Office, name: str = "new") -> tuple[ToyNotary, Newcomer]:
    node, user = office.ring.make(name), office.ring.make(f"user of {name}")
    return ToyNotary(office.ring, (node, user)), Newcomer(node, b"ca", user, 1000, name)


def invited(office: Office, secret: str = STRING.secret) -> InviteString:
    return InviteString(office.mesh, office.setups[0].node, secret, STRING.addresses)


# -- the string --------------------------------------------------------------------------------------------------------


@given(st.lists(st.ip_addresses(v=4).map(lambda ip: Address(f"{ip}:7444")), min_size=1, max_size=3))
def test_invite_survives_writing_and_reading(addresses: list[Address]) -> None:
    invite = InviteString(STRING.genesis, STRING.inviter, STRING.secret, tuple(addresses))
    assert read_invite(f"  {write_invite(invite).upper()}\n") == invite


@given(st.integers(0, len(write_invite(STRING)) - 1), st.sampled_from("abcdefgh234567"))
def test_one_wrong_character_is_noticed(position: int, character: str) -> None:
    text = write_invite(STRING)
    typo = text[:position] + character + text[position + 1 :]
    if typo != text:
        with pytest.raises(TrustError) as caught:
            read_invite(typo)
        assert caught.value.code == "bad-invite"


@pytest.mark.parametrize("text", ["", "mgpu1-", "hello", write_invite(STRING)[:-1], write_invite(STRING) + "a"])
def test_what_is_no_invite_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(TrustError) as caught:
        read_invite(text)
    assert caught.value.hint


# -- the inviter's side ------------------------------------------------------------------------------------------------


def test_right_proof_is_redeemed_once(at: Clock) -> None:
    invites = Invites()
    invite = invites.create(at(0), "secret", Grant(UserName("ada")), KeyId("k"))
    used = replace(invite, uses=0)
    assert invites.redeem(at(1), prove("secret", b"about"), {b"n": b"about"}) == (b"n", used)
    assert invites.is_empty
    with pytest.raises(TrustError):
        invites.redeem(at(2), prove("secret", b"about"), {b"n": b"about"})


def test_expired_invite_is_refused(at: Clock) -> None:
    invites = Invites()
    invites.create(at(0), "secret", Grant(UserName("ada")), KeyId("k"))
    with pytest.raises(TrustError):
        invites.redeem(at(INVITE_LIFE_S), prove("secret", b"about"), {b"n": b"about"})
    assert invites.is_empty


@pytest.mark.parametrize(("secret", "about"), [("other", b"about"), ("secret", b"another conversation")])
def test_wrong_secret_or_transcript_uses_nothing_up(at: Clock, secret: str, about: bytes) -> None:
    invites = Invites()
    invites.create(at(0), "secret", Grant(UserName("ada")), KeyId("k"))
    with pytest.raises(TrustError):
        invites.redeem(at(1), prove(secret, about), {b"n": b"about"})
    assert not invites.is_empty


def test_invite_of_two_uses_lets_in_two_machines_and_no_third(at: Clock) -> None:
    invites = Invites()
    invites.create(at(0), "secret", Grant(UserName("ada"), uses=2), KeyId("k"))
    for left in (1, 0):
        _, invite = invites.redeem(at(1), prove("secret", b"about"), {b"n": b"about"})
        assert (invite.uses, invites.is_empty) == (left, left == 0)
    with pytest.raises(BadProof):
        invites.redeem(at(2), prove("secret", b"about"), {b"n": b"about"})


@pytest.mark.parametrize("uses", [1, 2])
def test_use_that_is_given_back_can_be_taken_again_once(at: Clock, uses: int) -> None:
    invites = Invites()
    invites.create(at(0), "secret", Grant(UserName("ada"), uses=uses), KeyId("k"))
    _, invite = invites.redeem(at(1), prove("secret", b"about"), {b"n": b"about"})
    invites.give_back(invite)
    for _ in range(uses):
        invites.redeem(at(2), prove("secret", b"about"), {b"n": b"about"})
    with pytest.raises(BadProof):
        invites.redeem(at(3), prove("secret", b"about"), {b"n": b"about"})


def test_only_the_use_that_is_given_back_can_be_taken_again(at: Clock) -> None:
    invites = Invites()
    invites.create(at(0), "secret", Grant(UserName("ada"), uses=2), KeyId("k"))
    (_, first), _ = (invites.redeem(at(1), prove("secret", b"about"), {b"n": b"about"}) for _ in range(2))
    invites.give_back(first)
    invites.redeem(at(2), prove("secret", b"about"), {b"n": b"about"})
    assert invites.is_empty


def test_use_that_is_given_back_lives_no_longer_than_its_invite(at: Clock) -> None:
    invites = Invites()
    invites.create(at(0), "secret", Grant(UserName("ada"), life_s=90.0), KeyId("k"))
    _, invite = invites.redeem(at(89), prove("secret", b"about"), {b"n": b"about"})
    invites.give_back(invite)
    with pytest.raises(BadProof):
        invites.redeem(at(90), prove("secret", b"about"), {b"n": b"about"})


def test_invite_says_which_role_and_user_the_newcomer_gets(office: Office, log: MeshLog, at: Clock) -> None:
    _, who = newcomer(office)
    admin = office.setups[0].accounts[UserName("ada")]
    invite = Invites().create(at(0), "s", Grant(UserName("bob"), Role.VIEWER), admin)
    log.add(admit(log, invite, who))
    member = log.member_named("new")
    assert member is not None
    assert (member.role, member.owner) == (Role.VIEWER, "bob")


@pytest.mark.parametrize(
    ("role", "uses", "life_s"),
    [
        (Role.BURST, 1, 600.0),
        (Role.CLOUD, 1, 600.0),
        (Role.RIG, 0, 600.0),
        (Role.RIG, USES_LIMIT + 1, 600.0),
        (Role.RIG, 1, INVITE_LIFE_MIN_S - 1),
        (Role.RIG, 1, INVITE_LIFE_MAX_S + 1),
        (Role.RIG, 1, float("nan")),
    ],
)
def test_invite_out_of_bounds_is_refused(role: Role, uses: int, life_s: float) -> None:
    with pytest.raises(MeshgpuError) as caught:
        check_grant(role, uses, life_s)
    assert caught.value.code == "bad-request"


def test_invite_within_bounds_is_made() -> None:
    check_grant(Role.VIEWER, 1, INVITE_LIFE_MIN_S)
    check_grant(Role.RIG, USES_LIMIT, INVITE_LIFE_MAX_S)


def test_address_that_opens_many_conversations_loses_its_own(office: Office) -> None:
    open_ones, (_, who) = Conversations(), newcomer(office)
    first = replace(introduce(office), nonce=b"honest")
    open_ones.begin("10.0.0.1", GREETING, first)
    for number in range(CONVERSATIONS_LIMIT + 1):
        open_ones.begin("10.0.0.2", GREETING, replace(first, nonce=b"%d" % number))
    left = open_ones.transcripts(CERTIFICATE, who)
    assert b"honest" in left
    assert list(left)[1:] == [b"%d" % number for number in range(CONVERSATIONS_LIMIT + 1)][-CONVERSATIONS_OF_ONE:]


def test_conversations_are_bounded_whoever_opens_them(office: Office) -> None:
    open_ones, (_, who) = Conversations(), newcomer(office)
    for number in range(CONVERSATIONS_LIMIT + 5):
        open_ones.begin(f"10.0.0.{number}", GREETING, replace(introduce(office), nonce=b"%d" % number))
    left = list(open_ones.transcripts(CERTIFICATE, who))
    assert (len(left), left[0]) == (CONVERSATIONS_LIMIT, b"5")


# -- the newcomer's side -----------------------------------------------------------------------------------------------


def test_newcomer_learns_the_mesh_from_its_inviter(office: Office) -> None:
    log = check_introduction(office.notaries[1], invited(office), introduce(office), GREETING, CERTIFICATE)
    assert log.mesh == office.mesh


def test_certificate_of_somebody_in_between_is_noticed(office: Office) -> None:
    with pytest.raises(TrustError, match="stands between"):
        check_introduction(office.notaries[1], invited(office), introduce(office), GREETING, digest(b"other"))


def test_answer_of_another_member_is_refused(office: Office) -> None:
    other = office.setups[1].node
    binding = PairingBinding(CERTIFICATE, GREETING.nonce, b"i" * 32)
    introduction = Introduction(office.log, other, b"i" * 32, office.notaries[1].sign(KeyId(other), binding))
    with pytest.raises(TrustError, match="not the one"):
        check_introduction(office.notaries[2], invited(office), introduction, GREETING, CERTIFICATE)


def test_old_introduction_is_no_answer_to_a_new_nonce(office: Office) -> None:
    with pytest.raises(TrustError):
        check_introduction(
            office.notaries[1], invited(office), introduce(office), Greeting(1, b"m" * 32, b"p" * 32), CERTIFICATE
        )


def test_mesh_of_another_genesis_is_refused(office: Office) -> None:
    invite = InviteString(MeshId("cd" * 32), office.setups[0].node, STRING.secret, ())
    with pytest.raises(TrustError) as caught:
        check_introduction(office.notaries[1], invite, introduce(office), GREETING, CERTIFICATE)
    assert caught.value.code == "wrong-mesh"


# -- being let in ------------------------------------------------------------------------------------------------------


def test_newcomer_that_proves_itself_becomes_a_member(office: Office, log: MeshLog, at: Clock) -> None:
    notary, who = newcomer(office)
    invites = Invites()
    admin = office.setups[0].accounts[UserName("ada")]
    created = invites.create(at(0), STRING.secret, Grant(UserName("bob")), admin)
    introduction = introduce(office)
    application = apply(notary, invited(office), introduction, GREETING, CERTIFICATE, who)
    about = transcript(introduction, GREETING, CERTIFICATE, who)
    assert invites.redeem(at(1), application.proof, {b"n": about}) == (b"n", replace(created, uses=0))
    check_possession(notary, log, application, about)
    log.add(admit(log, created, application.newcomer))
    member = log.member_named("new")
    assert member is not None
    assert (member.owner, log.account(member.node, 1000)) == ("bob", log.users[next(reversed(log.users))])


def test_keys_of_somebody_else_are_not_admitted(office: Office, log: MeshLog) -> None:
    notary, who = newcomer(office)
    thief, other = newcomer(office, "thief")
    introduction = introduce(office)
    stolen = Newcomer(who.public_key, b"ca", other.user_key, 1000, "thief")
    about = transcript(introduction, GREETING, CERTIFICATE, stolen)
    honest = apply(notary, invited(office), introduction, GREETING, CERTIFICATE, who)
    with pytest.raises(TrustError):
        check_possession(thief, log, honest, about)


def test_key_of_a_member_is_not_admitted_again(office: Office, log: MeshLog) -> None:
    notary, who = newcomer(office)
    admin = office.setups[0].accounts[UserName("ada")]
    introduction = introduce(office)
    application = apply(notary, invited(office), introduction, GREETING, CERTIFICATE, who)
    about = transcript(introduction, GREETING, CERTIFICATE, who)
    created = Invites().create(Now(0, 0, ""), "s", Grant(UserName("ada")), admin)
    log.add(admit(log, created, who))
    with pytest.raises(TrustError, match="already"):
        check_possession(notary, log, application, about)


def test_transcripts_of_two_conversations_differ(office: Office) -> None:
    _, one = newcomer(office)
    moved = Newcomer(one.public_key, one.device_ca, one.user_key, 1000, "ne")
    introduction = introduce(office)
    assert transcript(introduction, GREETING, CERTIFICATE, one) != transcript(
        introduction, GREETING, CERTIFICATE, moved
    )


def test_stranger_without_an_invite_is_not_even_greeted(office: Office, at: Clock) -> None:
    """The introduction shows the whole mesh log: names, accounts, keys."""
    invites = Invites()
    created = invites.create(at(0), "s" * 20, Grant(UserName("ada")), KeyId("k"))
    invite = replace(invited(office), secret=created.secret)
    greeting = greet(invite, 1, b"n" * 32, CERTIFICATE)
    invites.check_greeting(at(1), greeting, CERTIFICATE)
    for wrong, certificate in (
        (replace(greeting, proof=b"p" * 32), CERTIFICATE),
        (replace(greeting, nonce=b"m" * 32), CERTIFICATE),
        (greeting, digest(b"another certificate")),
    ):
        with pytest.raises(TrustError, match="was used before"):
            invites.check_greeting(at(1), wrong, certificate)
    with pytest.raises(TrustError, match="has expired"):
        invites.check_greeting(at(INVITE_LIFE_S), greeting, CERTIFICATE)


def test_name_of_a_machine_cannot_be_taken_over(log: MeshLog) -> None:
    (name, *_) = [member.name for member in log.members.values()]
    with pytest.raises(TrustError, match="has a machine of that name"):
        check_name(log, name)
    check_name(log, "newcomer")
