"""What the joiner gets must be what the digits stood for; and nobody becomes a colleague by typing her name."""

from dataclasses import replace
from typing import Any

import pytest

from meshgpu.core.trust import joining
from meshgpu.core.trust.comparing import Knock, Terms, check_welcome, choose_user
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.errors import TrustError
from meshgpu.model.ids import KeyId, MeshId, UserName, digest
from meshgpu.model.pairing import Newcomer
from meshgpu.model.trust import Invite, Role
from meshgpu.sim.office import Office

ADA, BOB = UserName("ada"), UserName("bob")


@pytest.fixture
def compared(office: Office, log: MeshLog) -> tuple[Knock, Terms]:
    """What was compared, after the admitter wrote it to `log`."""
    newcomer = Newcomer(office.ring.make("new"), b"ca", office.ring.make("user of new"), 1000, "new")
    admitter = log.members[office.setups[0].node]
    assert log.mesh is not None
    key, ca = admitter.public_key, admitter.device_ca
    terms = Terms(log.mesh, log.mesh_name, admitter.node, key, ca, Role.RIG, BOB)
    admin: KeyId = office.setups[0].accounts[ADA]
    log.add(joining.admit(log, Invite("", BOB, Role.RIG, admin, 0.0), newcomer))
    return Knock(newcomer, BOB, digest(b"certificate")), terms


def test_welcome_to_what_was_compared_is_taken(office: Office, log: MeshLog, compared: tuple[Knock, Terms]) -> None:
    entered = check_welcome(office.notaries[1], *compared, log.all_entries())
    assert entered.member_named("new") == log.member_named("new")


@pytest.mark.parametrize(
    "change",
    [
        {"mesh": MeshId("cd" * 32)},
        {"mesh_name": "other"},
        {"public_key": b"x" * 32},
        {"device_ca": b"other"},
        {"role": Role.SUBMITTER},
        {"user": ADA},
    ],
    ids=lambda change: next(iter(change)),
)
def test_welcome_on_other_terms_is_refused(
    office: Office, log: MeshLog, compared: tuple[Knock, Terms], change: dict[str, Any]
) -> None:
    knock, terms = compared
    with pytest.raises(TrustError) as caught:
        check_welcome(office.notaries[1], knock, replace(terms, **change), log.all_entries())
    assert caught.value.code == "wrong-mesh"


@pytest.mark.parametrize(
    "change",
    [{"public_key": b"x" * 32}, {"user_key": b"x" * 32}, {"device_ca": b"x"}, {"uid": 1001}, {"name": "other"}],
    ids=lambda change: next(iter(change)),
)
def test_welcome_of_another_machine_is_refused(
    office: Office, log: MeshLog, compared: tuple[Knock, Terms], change: dict[str, Any]
) -> None:
    knock, terms = compared
    other = replace(knock, newcomer=replace(knock.newcomer, **change))
    with pytest.raises(TrustError, match="cannot join"):
        check_welcome(office.notaries[1], other, terms, log.all_entries())


def test_new_name_is_taken_as_proposed(log: MeshLog) -> None:
    assert choose_user(log, ADA, BOB, None) == BOB


def test_admin_may_bring_another_machine_of_her_own(log: MeshLog) -> None:
    assert choose_user(log, ADA, ADA, None) == ADA


@pytest.mark.usefixtures("compared")
def test_name_of_a_colleague_needs_the_admins_word(log: MeshLog) -> None:
    with pytest.raises(TrustError, match="has a user of that name") as caught:
        choose_user(log, ADA, BOB, None)
    assert caught.value.hint is not None
    assert "meshgpu admit --user bob" in caught.value.hint
    assert choose_user(log, ADA, BOB, BOB) == BOB
