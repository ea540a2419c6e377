"""Who may change the mesh: nobody but admins, whatever else somebody holds: an invite, a machine, a user's key."""

import dataclasses
import random
from collections.abc import Callable
from itertools import count, product

import pytest

from meshgpu.core.trust.joining import (
    INVITE_LIFE_S,
    SECRET_BYTES,
    SECRET_CHARACTERS,
    Grant,
    Invites,
    admit,
    greet,
    new_secret,
    prove,
)
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.errors import TrustError
from meshgpu.model.clock import Now
from meshgpu.model.ids import Digest, KeyId, UserName, digest, key_id, node_id
from meshgpu.model.pairing import InviteString, Newcomer
from meshgpu.model.trust import (
    AddAdmin,
    AddNode,
    Body,
    Genesis,
    LinkUser,
    LogEntry,
    RemoveAdmin,
    RemoveNode,
    Revoke,
    Role,
    SetPolicy,
    SetRole,
)
from meshgpu.sim.office import Office
from tests.core.trust.test_several_admins import RING, Seat, founded

Clock = Callable[[float], Now]
CERTIFICATE = digest(b"certificate")
_numbers = count()

# -- an invite that was stolen ---------------------------------------------------------------------------------------


def stolen(log: MeshLog, office: Office, at: Clock) -> tuple[Newcomer, Invites, bytes, dict[bytes, bytes]]:
    """A thief has used an invite for bob's machine, and is in the log; also what he could say once more."""
    invites = Invites()
    admin = office.setups[0].accounts[UserName("ada")]
    invite = invites.create(at(0), "s" * 20, Grant(UserName("bob")), admin)
    node, user = office.ring.make("thief"), office.ring.make("user of thief")
    newcomer = Newcomer(node, b"ca", user, 0, "thief")
    proof, transcripts = prove("s" * 20, b"said"), {b"n": b"said"}
    assert invites.redeem(at(1), proof, transcripts)[1] == dataclasses.replace(invite, uses=0)
    log.add(admit(log, invite, newcomer))
    return newcomer, invites, proof, transcripts


def test_thief_of_an_invite_is_a_rig_of_the_invited_user_and_no_admin(log: MeshLog, office: Office, at: Clock) -> None:
    newcomer, _, _, _ = stolen(log, office, at)
    member = log.members[node_id(newcomer.public_key)]
    assert (member.role, member.owner) == (Role.RIG, UserName("bob"))
    user = log.users[key_id(newcomer.user_key)]
    assert (user.user, user.node, user.is_admin) == (UserName("bob"), member.node, False)
    with pytest.raises(TrustError, match="not one of its admins"):
        log.write(user.key, [AddAdmin(newcomer.user_key, member.node)])


def test_thief_of_an_invite_joins_once(log: MeshLog, office: Office, at: Clock) -> None:
    _, invites, proof, transcripts = stolen(log, office, at)
    for attempt in (proof, prove("s" * 20, b"again")):
        with pytest.raises(TrustError, match="was used before"):
            invites.redeem(at(2), attempt, {**transcripts, b"m": b"again"})
    invite = InviteString(office.mesh, office.setups[0].node, "s" * 20, ())
    with pytest.raises(TrustError, match="was used before"):
        invites.check_greeting(at(2), greet(invite, 1, b"n" * 32, CERTIFICATE), CERTIFICATE)


def test_thief_of_an_invite_is_out_for_ever_once_he_is_revoked(log: MeshLog, office: Office, at: Clock) -> None:
    newcomer, invites, _, _ = stolen(log, office, at)
    node, admin = node_id(newcomer.public_key), office.setups[0].accounts[UserName("ada")]
    log.add(log.write(admin, [log.revocation(node, stops_jobs=True)]))
    again = invites.create(at(3), "t" * 20, Grant(UserName("bob")), admin)
    log.add(admit(log, again, newcomer))
    assert node not in log.members
    assert key_id(newcomer.user_key) not in log.users


def test_invite_is_not_guessed(office: Office, at: Clock) -> None:
    """100 bits; and a guess uses nothing up, so that guessing keeps nobody out either."""
    rng = random.Random(1)
    secrets = {new_secret(rng.randbytes(SECRET_BYTES)) for _ in range(2_000)}
    assert len(secrets) == 2_000
    for place in range(SECRET_CHARACTERS):
        assert {secret[place] for secret in secrets} == set("abcdefghijklmnopqrstuvwxyz234567")
    invites = Invites()
    real, *guesses = sorted(secrets)
    invites.create(at(0), real, Grant(UserName("bob")), office.setups[0].accounts[UserName("ada")])
    near = [real[:-1] + ("a" if real[-1] != "a" else "b"), real[:-1], real + "a", real.upper(), ""]
    for guess in (*guesses, *near):
        invite = InviteString(office.mesh, office.setups[0].node, guess, ())
        with pytest.raises(TrustError):
            invites.check_greeting(at(1), greet(invite, 1, b"n" * 32, CERTIFICATE), CERTIFICATE)
        with pytest.raises(TrustError):
            invites.redeem(at(1), prove(guess, b"said"), {b"n": b"said"})
    invites.redeem(at(INVITE_LIFE_S - 1), prove(real, b"said"), {b"n": b"said"})


# -- a machine that was broken into ----------------------------------------------------------------------------------


def bodies(seats: list[Seat]) -> dict[str, Body]:
    """All that an admin may write, as somebody would write it who wants more for himself, or others out."""
    ada, bob, eve = seats
    number = next(_numbers)
    public, user = RING.make(f"puppet {number}"), RING.make(f"user of puppet {number}")
    puppet = AddNode(node_id(public), public, b"ca", "puppet", Role.RIG, UserName("eve"))
    return {
        "admit a machine": puppet,
        "admit a rented machine": dataclasses.replace(puppet, role=Role.CLOUD, expires_wall_s=2e9),
        "mint an identity": LinkUser(UserName("ada"), user, eve.node, 0),
        "speak for ada elsewhere": LinkUser(UserName("ada"), user, ada.node, 0),
        "take over the name of a machine": dataclasses.replace(puppet, name="ada"),
        "become an admin": eve.promoted(),
        "make an admin": AddAdmin(user, ada.node),
        "remove an admin": RemoveAdmin(bob.key, None),
        "revoke a machine": Revoke(ada.node, (), stops_jobs=True),
        "remove a machine": RemoveNode(ada.node),
        "have a better role": SetRole(eve.node, Role.BURST),
        "take away a role": SetRole(bob.node, Role.VIEWER),
        "let jobs leave": SetPolicy(may_leave=True),
        "begin the mesh anew": Genesis("lab", eve.user_key, eve.user_key, b"nonce"),
    }


ATTEMPTS = tuple(bodies(founded("ada", "bob", "eve")))


def standing(log: MeshLog) -> tuple[object, ...]:
    assert log._chains is not None
    admins = frozenset(log._chains.admins())  # those, too, whose key speaks for nobody
    return dict(log.members), dict(log.users), log.former, admins, log.may_leave, log.mesh_name


KEYS = ("its node's key", "its user's key", "a key of nobody")
A_BURST_NODES_WORK = ("admit a rented machine", "its node's key", Role.BURST)
"""Its limits: test_meshlog.py::test_burst_node_may_do_nothing_else."""
TRIED = [case for case in product(ATTEMPTS, KEYS, Role) if case != A_BURST_NODES_WORK]


@pytest.mark.parametrize(("attempt", "by", "role"), TRIED)
def test_machine_that_is_no_admins_changes_nothing(attempt: str, by: str, role: Role) -> None:
    seats = ada, bob, eve = founded("ada", "bob", "eve")
    node, user = eve.node, eve.key
    if role is Role.CLOUD:
        public = RING.make("instance")
        node, user = node_id(public), key_id(RING.make("user of an instance"))
        ada.write(SetRole(bob.node, Role.BURST))
        bob.hears(ada)
        cloud = AddNode(node, public, b"ca", "cloud", Role.CLOUD, UserName("bob"), 2e9)
        bob.write(cloud, key=KeyId(bob.node))
        ada.hears(bob)
    else:
        ada.write(SetRole(eve.node, role))
    assert ada.log.members[node].role is role
    key = {"its node's key": KeyId(node), "its user's key": user, "a key of nobody": key_id(RING.make("nobody"))}[by]
    before = standing(ada.log)
    body = bodies(seats)[attempt]
    for heads in ((), ada.log.heads()):
        log = MeshLog(ada.notary)  # anew each time: two entries with one number would prove it a liar
        log.enter(ada.mesh, ada.log.all_entries())
        log.add((RING.sign(key, LogEntry(ada.mesh, key, 0, Digest(""), heads, body)),))
        assert standing(log) == before


# `remove a machine` admins say in another way, the others nobody may say.
@pytest.mark.parametrize(
    "attempt", sorted(set(ATTEMPTS) - {"begin the mesh anew", "admit a rented machine", "remove a machine"})
)
def test_an_admins_key_does_all_of_it(attempt: str) -> None:
    """Else the test above would prove nothing."""
    seats = founded("ada", "bob", "eve")
    log = seats[0].log
    before = standing(log)
    seats[0].write(bodies(seats)[attempt])
    assert standing(log) != before
