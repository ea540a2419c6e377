"""Enrolment: what an instance believes, whom it shows its keys, and to whom a burst peer hands the mesh log."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from meshgpu.core.trust.enrolling import (
    BOOTSTRAP_LIFE_S,
    CONVERSATIONS_LIMIT,
    Enrolment,
    check_alive,
    check_keys,
    check_log,
    claim,
)
from meshgpu.core.trust.meshlog import MeshLog, found
from meshgpu.errors import TrustError
from meshgpu.model.clock import Now
from meshgpu.model.cloud import LaunchId
from meshgpu.model.enrolment import (
    BootTerms,
    EnrolClaim,
    EnrolGreeting,
    EnrolRequest,
    EnrolWelcome,
    InstanceKeys,
    InstanceTerms,
    KeysMade,
)
from meshgpu.model.ids import Digest, MeshId, UserName, digest, key_id, node_id
from meshgpu.model.trust import AddNode, Genesis, Role, Signed
from meshgpu.sim.fakes import KeyRing, ToyNotary
from tests.core.conftest import WALL_S

Clock = Callable[[float], Now]
LAUNCH = LaunchId("l" * 26)
CERTIFICATE = digest(b"bootstrap certificate")
GREETING, NONCE = EnrolGreeting(1, b"p" * 32), b"i" * 32


@dataclass
class Story:
    """A mesh with one burst peer, and an instance that has booted the peer's user data."""

    ring: KeyRing
    admin: bytes
    burst: bytes
    instance: bytes
    mesh: MeshId
    genesis: Signed

    def notary(self, *keys: bytes) -> ToyNotary:
        return ToyNotary(self.ring, keys)

    def enrolment(self, mesh: MeshId | None = None) -> Enrolment:
        terms = InstanceTerms(WALL_S + 3600, 600, 900)
        boot = BootTerms(mesh or self.mesh, LAUNCH, self.burst, 443, terms)
        keys = (self.instance, b"ca of instance")
        return Enrolment(self.notary(self.instance), boot, CERTIFICATE, WALL_S + BOOTSTRAP_LIFE_S, keys)

    def claim(self, key: bytes | None = None, **changes: object) -> EnrolRequest:
        said = EnrolClaim(self.mesh, LAUNCH, CERTIFICATE, GREETING.nonce, NONCE)
        said = replace(said, **changes)  # type: ignore[arg-type]  # names and types are EnrolClaim's
        key = key or self.burst
        return EnrolRequest(self.notary(key).sign(key_id(key), said))

    def log(self, *, rents: Role = Role.BURST, role: Role = Role.CLOUD, **changes: object) -> tuple[Signed, ...]:
        """The mesh log once the instance was added; `changes` of its entry."""
        notary = self.notary(self.admin)
        log = MeshLog(notary)
        log.enter(self.mesh, (self.genesis,))
        peer = AddNode(node_id(self.burst), self.burst, b"ca of burst", "rig", rents, UserName("ada"))
        ends = WALL_S + 3600 if role is Role.CLOUD else None
        added = AddNode(
            node_id(self.instance), self.instance, b"ca of instance", "cloud-1", role, UserName("ada"), ends
        )
        added = replace(added, **changes)  # type: ignore[arg-type]  # names and types are AddNode's
        admitted = (self.genesis, *log.write(key_id(self.admin), (peer,)))
        if added.role is not Role.CLOUD or rents is not Role.BURST:
            return (self.genesis, *log.write(key_id(self.admin), (peer, added)))
        own = MeshLog(self.notary(self.burst))
        own.enter(self.mesh, admitted)
        return (*admitted, *own.write(key_id(self.burst), (added,)))


@pytest.fixture
def story() -> Story:
    ring = KeyRing()
    admin, burst, instance = (ring.make(name) for name in ("admin", "burst", "instance"))
    mesh, genesis = found(ToyNotary(ring, (admin,)), key_id(admin), Genesis("lab", admin, b"r" * 32, b"n"))
    return Story(ring, admin, burst, instance, mesh, genesis)


@pytest.fixture
def proven(story: Story, at: Clock) -> Enrolment:
    """An enrolment whose burst peer has proven itself."""
    enrolment = story.enrolment()
    enrolment.challenge(at(0), GREETING, NONCE)
    enrolment.keys(at(1), story.claim())
    return enrolment


def refused(code: str) -> "pytest.RaisesExc[TrustError]":
    return pytest.raises(TrustError, check=lambda error: error.code == code)


def test_instance_becomes_a_member(story: Story, at: Clock) -> None:
    enrolment = story.enrolment()
    challenge = enrolment.challenge(at(0), GREETING, NONCE)
    request = claim(
        story.notary(story.burst),
        key_id(story.burst),
        (story.mesh, LAUNCH),
        CERTIFICATE,
        (GREETING.nonce, challenge.nonce),
    )
    keys = enrolment.keys(at(1), request)
    assert check_keys(story.notary(), request, keys) == node_id(story.instance)
    check_log(story.notary(), at(2), story.mesh, story.log(), keys)
    log = enrolment.welcome(at(2), EnrolWelcome(challenge.nonce, story.log()))
    assert (log.mesh, log.members[node_id(story.instance)].role) == (story.mesh, Role.CLOUD)


# -- whom the instance talks to ----------------------------------------------------------------------------------------


def test_another_dialler_is_shown_nothing(story: Story, at: Clock) -> None:
    enrolment = story.enrolment()
    enrolment.challenge(at(0), GREETING, NONCE)
    for key in (story.admin, story.instance):
        with refused("not-allowed"):
            enrolment.keys(at(1), story.claim(key))
    forged = story.ring.forge(key_id(story.burst), EnrolClaim(story.mesh, LAUNCH, CERTIFICATE, b"p" * 32, NONCE))
    with refused("not-allowed"):
        enrolment.keys(at(1), EnrolRequest(forged))
    enrolment.keys(at(1), story.claim())  # none of them used the challenge up


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": MeshId("ab" * 32)},
        {"launch": LaunchId("m" * 26)},
        {"certificate": digest(b"certificate of somebody in between")},
        {"peer_nonce": b"q" * 32},
        {"instance_nonce": b"j" * 32},
    ],
)
def test_claim_of_another_conversation_is_refused(story: Story, at: Clock, changes: dict[str, Any]) -> None:
    enrolment = story.enrolment()
    enrolment.challenge(at(0), GREETING, NONCE)
    with refused("not-allowed"):
        enrolment.keys(at(1), story.claim(**changes))


def test_replayed_claim_is_refused(story: Story, at: Clock, proven: Enrolment) -> None:
    with refused("not-allowed"):
        proven.keys(at(2), story.claim())
    second = story.enrolment()  # another server with the same user data
    second.challenge(at(2), GREETING, b"k" * 32)
    with refused("not-allowed"):
        second.keys(at(3), story.claim())


def test_oldest_conversations_are_forgotten(story: Story, at: Clock) -> None:
    enrolment = story.enrolment()
    enrolment.challenge(at(0), GREETING, NONCE)
    for number in range(CONVERSATIONS_LIMIT):
        enrolment.challenge(at(0), GREETING, b"%32d" % number)
    with refused("not-allowed"):
        enrolment.keys(at(1), story.claim())
    assert len(enrolment._open) == CONVERSATIONS_LIMIT


def test_welcome_before_a_claim_is_refused(story: Story, at: Clock) -> None:
    enrolment = story.enrolment()
    for conversation in (NONCE, b""):
        with refused("not-allowed"):
            enrolment.welcome(at(1), EnrolWelcome(conversation, story.log()))
    enrolment.challenge(at(1), GREETING, NONCE)
    with refused("not-allowed"):
        enrolment.welcome(at(1), EnrolWelcome(NONCE, story.log()))


def test_welcome_of_another_conversation_is_refused(story: Story, at: Clock, proven: Enrolment) -> None:
    with refused("not-allowed"):
        proven.welcome(at(2), EnrolWelcome(b"k" * 32, story.log()))


def test_second_enrolment_is_refused(story: Story, at: Clock, proven: Enrolment) -> None:
    proven.welcome(at(2), EnrolWelcome(NONCE, story.log()))
    for step in (
        lambda: proven.challenge(at(3), GREETING, b"k" * 32),
        lambda: proven.keys(at(3), story.claim()),
        lambda: proven.welcome(at(3), EnrolWelcome(NONCE, story.log())),
    ):
        with refused("already-enrolled"):
            step()


def test_after_fifteen_minutes_every_step_is_refused(story: Story, at: Clock) -> None:
    over = at(BOOTSTRAP_LIFE_S)
    enrolment = story.enrolment()
    with refused("expired"):
        enrolment.challenge(over, GREETING, NONCE)
    enrolment.challenge(at(BOOTSTRAP_LIFE_S - 2), GREETING, NONCE)
    with refused("expired"):
        enrolment.keys(over, story.claim())
    enrolment.keys(at(BOOTSTRAP_LIFE_S - 1), story.claim())
    with refused("expired"):
        enrolment.welcome(over, EnrolWelcome(NONCE, story.log()))
    with refused("expired"):
        check_alive(over, WALL_S + BOOTSTRAP_LIFE_S)
    check_alive(at(BOOTSTRAP_LIFE_S - 1), WALL_S + BOOTSTRAP_LIFE_S)


# -- what the instance believes ----------------------------------------------------------------------------------------


def test_log_of_another_mesh_is_refused(story: Story, at: Clock) -> None:
    enrolment = story.enrolment(MeshId("ab" * 32))
    enrolment.challenge(at(0), GREETING, NONCE)
    enrolment.keys(at(1), story.claim(mesh=MeshId("ab" * 32)))
    with refused("wrong-mesh"):
        enrolment.welcome(at(2), EnrolWelcome(NONCE, story.log()))


@pytest.mark.parametrize("role", [Role.RIG, Role.SUBMITTER, Role.CLOUD])
def test_peer_that_may_not_rent_is_refused(story: Story, at: Clock, proven: Enrolment, role: Role) -> None:
    with refused("not-allowed"):
        proven.welcome(at(2), EnrolWelcome(NONCE, story.log(rents=role)))
    with refused("not-allowed"):
        proven.welcome(at(2), EnrolWelcome(NONCE, (story.genesis,)))
    proven.welcome(at(2), EnrolWelcome(NONCE, story.log()))  # a refusal uses nothing up


@pytest.mark.parametrize("role", [Role.RIG, Role.SUBMITTER, Role.BURST])
def test_instance_is_nothing_but_a_rented_machine(story: Story, at: Clock, proven: Enrolment, role: Role) -> None:
    with refused("not-allowed"):
        proven.welcome(at(2), EnrolWelcome(NONCE, story.log(role=role)))


def test_entry_with_another_certificate_is_refused(story: Story, at: Clock, proven: Enrolment) -> None:
    with refused("not-allowed"):
        proven.welcome(at(2), EnrolWelcome(NONCE, story.log(device_ca=b"ca of somebody else")))


def test_log_without_the_instance_is_refused(story: Story, at: Clock, proven: Enrolment) -> None:
    with refused("not-a-member"):
        proven.welcome(at(2), EnrolWelcome(NONCE, story.log()[:-1]))


# -- what the burst peer believes --------------------------------------------------------------------------------------


def shown(story: Story, at: Clock) -> tuple[EnrolRequest, InstanceKeys]:
    enrolment, request = story.enrolment(), story.claim()
    enrolment.challenge(at(0), GREETING, NONCE)
    return request, enrolment.keys(at(1), request)


def test_keys_of_an_older_answer_are_refused(story: Story, at: Clock) -> None:
    _, keys = shown(story, at)
    with refused("not-allowed"):
        check_keys(story.notary(), story.claim(instance_nonce=b"j" * 32), keys)


def test_keys_that_are_a_copy_are_refused(story: Story, at: Clock) -> None:
    request, keys = shown(story, at)
    with refused("not-allowed"):  # somebody else's public key under the same possession
        check_keys(story.notary(), request, replace(keys, public_key=story.burst))
    with refused("not-allowed"):
        check_keys(story.notary(), request, replace(keys, device_ca=b"ca of somebody else"))
    made = KeysMade(story.notary().digest(request.claim), Digest("0" * 64))
    other = story.notary(story.instance).sign(key_id(story.instance), made)
    with refused("not-allowed"):
        check_keys(story.notary(), request, replace(keys, possession=other))


def test_log_is_handed_only_to_the_instance_that_it_names(story: Story, at: Clock) -> None:
    """A second server with the same user data shows keys of its own; the launch's record did not let those in."""
    _, keys = shown(story, at)
    thief = replace(keys, public_key=story.ring.make("thief"))
    with refused("not-a-member"):
        check_log(story.notary(), at(2), story.mesh, story.log(), thief)
    with refused("not-allowed"):
        check_log(story.notary(), at(2), story.mesh, story.log(role=Role.RIG), keys)
