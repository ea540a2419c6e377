"""Which signed requests are obeyed."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from meshgpu.core.trust.freshness import OPEN_LIMIT, Challenges
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.requests import RequestRules
from meshgpu.errors import StaleRequest, TrustError
from meshgpu.model.clock import Now
from meshgpu.model.ids import HoldId, JobId, KeyId, MeshId, NodeId, UserName
from meshgpu.model.job import Action, JobRequest, JobSpec, PlacingVote
from meshgpu.model.trust import Signed
from meshgpu.sim.office import Office

Clock = Callable[[float], Now]
Sign = Callable[..., tuple[JobSpec, Signed]]

STRANGER = NodeId("x" * 52)


def ask(office: Office, at: Now, **changes: object) -> tuple[JobRequest, Signed]:
    """A request of ada's from the second machine to the first."""
    request = JobRequest(
        office.mesh, UserName("ada"), Action.STOP, office.setups[0].node, at.wall_s, "nonce", JobId("j" * 26)
    )
    request = replace(request, **changes)  # type: ignore[arg-type]  # names and types are JobRequest's
    return request, office.notaries[1].sign(office.setups[1].accounts[UserName("ada")], request)


def test_spec_of_a_user_is_accepted(rules: RequestRules, signed: Sign) -> None:
    spec, envelope = signed()
    assert rules.verify_spec(envelope) == spec


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": MeshId("ab" * 32)},
        {"user": UserName("bob")},
        {"submitter": STRANGER},
        {"stewards": ()},
        {"stewards": (STRANGER,)},
        {"stewards": (STRANGER,) * 3},
    ],
)
def test_spec_that_claims_too_much_is_refused(rules: RequestRules, signed: Sign, changes: dict[str, object]) -> None:
    _, envelope = signed(**changes)
    with pytest.raises(TrustError):
        rules.verify_spec(envelope)


def test_two_stewards_are_no_quorum_anybody_agreed_on(rules: RequestRules, signed: Sign, office: Office) -> None:
    nodes = tuple(setup.node for setup in office.setups)
    rules.verify_spec(signed(stewards=nodes[:3])[1])
    for stewards in (nodes[:2], nodes[:4], (nodes[0], nodes[0], nodes[1])):
        with pytest.raises(TrustError):
            rules.verify_spec(signed(stewards=stewards)[1])


def test_spec_under_a_key_of_no_user_is_refused(rules: RequestRules, signed: Sign, office: Office) -> None:
    spec, envelope = signed()
    with pytest.raises(TrustError):
        rules.verify_spec(office.notaries[1].sign(KeyId(office.setups[1].node), spec))
    with pytest.raises(TrustError):
        rules.verify_spec(replace(envelope, signature=b"x" * 32))


@pytest.mark.parametrize(("age_s", "is_fresh"), [(0, True), (119, True), (-119, True), (121, False), (-121, False)])
def test_spec_must_be_fresh_by_two_clocks(
    rules: RequestRules, signed: Sign, at: Clock, age_s: float, is_fresh: bool
) -> None:
    spec, envelope = signed(issued_wall_s=at(0).wall_s - age_s)
    rules.verify_spec(envelope)
    if is_fresh:
        rules.check_fresh_spec(spec, None, at(0), spec.submitter)
    else:
        with pytest.raises(StaleRequest) as caught:
            rules.check_fresh_spec(spec, None, at(0), spec.submitter)
        assert caught.value.code == "stale"
        assert caught.value.challenge == b""  # these rules have none to give


# -- challenges --------------------------------------------------------------------------------------------------------


@pytest.fixture
def challenging(office: Office, log: MeshLog) -> RequestRules:
    """The rules of the first machine, which challenges what is stale."""
    return RequestRules(office.notaries[0], log, office.setups[0].node, Challenges(random.Random(1)))


def challenge(rules: RequestRules, envelope: Signed, now: Now, peer: NodeId) -> StaleRequest:
    with pytest.raises(StaleRequest) as caught:
        rules.verify_request(envelope, now, peer)
    return caught.value


HOURS_S = 5 * 3600.0


def test_request_of_a_machine_with_a_wrong_clock_is_obeyed_with_its_challenge_in_it(
    challenging: RequestRules, office: Office, at: Clock
) -> None:
    peer = office.setups[1].node
    _, stale = ask(office, at(-HOURS_S))
    refused = challenge(challenging, stale, at(0), peer)
    assert (len(refused.challenge), refused.wall_s, refused.refused) == (32, at(0).wall_s, b"")
    request, again = ask(office, at(-HOURS_S), challenge=refused.challenge)
    assert challenging.verify_request(again, at(119), peer) == request


def test_challenge_is_good_once(challenging: RequestRules, office: Office, at: Clock) -> None:
    peer = office.setups[1].node
    nonce = challenge(challenging, ask(office, at(-HOURS_S))[1], at(0), peer).challenge
    _, again = ask(office, at(-HOURS_S), challenge=nonce)
    challenging.verify_request(again, at(1), peer)
    refused = challenge(challenging, again, at(2), peer)
    assert refused.refused == nonce
    assert refused.challenge not in (b"", nonce)


def test_challenge_ends_after_two_minutes_of_the_boot_clock(
    challenging: RequestRules, office: Office, at: Clock
) -> None:
    peer = office.setups[1].node
    nonce = challenge(challenging, ask(office, at(-HOURS_S))[1], at(0), peer).challenge
    _, again = ask(office, at(-HOURS_S), challenge=nonce)
    challenge(challenging, again, replace(at(0), boot_s=120.0), peer)


def test_challenge_is_its_peers_alone(challenging: RequestRules, office: Office, at: Clock) -> None:
    """Who overhears one, or made one up, or was given one before a restart, cannot use it."""
    other, peer = office.setups[2], office.setups[1].node
    nonce = challenge(challenging, ask(office, at(-HOURS_S))[1], at(0), peer).challenge
    request, _ = ask(office, at(-HOURS_S), challenge=nonce)
    stolen = office.notaries[2].sign(other.accounts[UserName("ada")], request)
    challenge(challenging, stolen, at(1), other.node)
    challenge(challenging, ask(office, at(-HOURS_S), challenge=b"m" * 32)[1], at(1), peer)
    fresh = RequestRules(office.notaries[0], challenging._log, office.setups[0].node, Challenges(random.Random(2)))
    challenge(fresh, ask(office, at(-HOURS_S), challenge=nonce)[1], at(1), peer)
    challenging.verify_request(ask(office, at(-HOURS_S), challenge=nonce)[1], at(2), peer)


def test_request_that_is_wrong_in_another_way_gets_no_challenge(
    challenging: RequestRules, office: Office, at: Clock
) -> None:
    _, envelope = ask(office, at(-HOURS_S), node=STRANGER)
    with pytest.raises(TrustError) as caught:
        challenging.verify_request(envelope, at(0), office.setups[1].node)
    assert not isinstance(caught.value, StaleRequest)


def test_one_peer_cannot_make_a_node_forget_the_challenges_of_others(at: Clock) -> None:
    challenges = Challenges(random.Random(1))
    one, flooding = NodeId("a" * 52), NodeId("b" * 52)
    mine = challenges.issue(at(0), one)
    given = [challenges.issue(at(0), flooding) for _ in range(OPEN_LIMIT + 1)]
    assert sum(map(len, challenges._open.values())) == OPEN_LIMIT + 1
    assert not challenges.redeem(at(1), flooding, given[0])
    assert challenges.redeem(at(1), flooding, given[-1])
    assert challenges.redeem(at(1), one, mine)


def test_request_is_obeyed_from_the_machine_that_signed_it(rules: RequestRules, office: Office, at: Clock) -> None:
    request, envelope = ask(office, at(0))
    assert rules.verify_request(envelope, at(1), office.setups[1].node) == request


def test_request_that_another_machine_passes_on_is_refused(rules: RequestRules, office: Office, at: Clock) -> None:
    _, envelope = ask(office, at(0))
    with pytest.raises(TrustError):
        rules.verify_request(envelope, at(1), office.setups[2].node)


@pytest.mark.parametrize("changes", [{"mesh": MeshId("ab" * 32)}, {"user": UserName("bob")}, {"node": STRANGER}])
def test_request_for_somebody_else_is_refused(
    rules: RequestRules, office: Office, at: Clock, changes: dict[str, object]
) -> None:
    _, envelope = ask(office, at(0), **changes)
    with pytest.raises(TrustError):
        rules.verify_request(envelope, at(1), office.setups[1].node)


def test_old_request_is_refused(rules: RequestRules, office: Office, at: Clock) -> None:
    _, envelope = ask(office, at(0))
    with pytest.raises(TrustError):
        rules.verify_request(envelope, at(121), office.setups[1].node)


def test_cancel_must_be_about_this_job_by_its_user(
    rules: RequestRules, signed: Sign, office: Office, at: Clock
) -> None:
    spec, _ = signed()
    _, good = ask(office, at(0), job=spec.job)
    rules.verify_cancel(good, spec, spec.job)
    for changes in (
        {"job": JobId("k" * 26)},
        {"job": spec.job, "action": Action.LIST},
        {"node": office.setups[2].node},
    ):
        with pytest.raises(TrustError):
            rules.verify_cancel(ask(office, at(0), **{"job": spec.job, **changes})[1], spec, spec.job)
    with pytest.raises(TrustError):
        rules.verify_cancel(good, replace(spec, user=UserName("bob")), spec.job)


# -- tickets -----------------------------------------------------------------------------------------------------------


def vote(
    office: Office, spec: JobSpec, envelope: Signed, steward: int, **changes: object
) -> tuple[PlacingVote, Signed]:
    node = office.setups[steward].node
    digest = office.notaries[0].digest(envelope)
    value = PlacingVote(office.mesh, spec.job, digest, 1, office.setups[3].node, HoldId("h" * 26), node)
    value = replace(value, **changes)  # type: ignore[arg-type]  # names and types are PlacingVote's
    return value, office.notaries[steward].sign(KeyId(node), value)


def test_ticket_needs_the_votes_of_a_quorum(rules: RequestRules, signed: Sign, office: Office) -> None:
    stewards = tuple(setup.node for setup in office.setups[:3])
    spec, envelope = signed(stewards=stewards)
    wanted, first = vote(office, spec, envelope, 0)
    _, second = vote(office, spec, envelope, 1)
    rules.verify_ticket((first, second), wanted, stewards)
    for votes in ((), (first,), (first, first), (first, vote(office, spec, envelope, 3)[1])):
        with pytest.raises(TrustError):
            rules.verify_ticket(votes, wanted, stewards)


@pytest.mark.parametrize("changes", [{"epoch": 2}, {"hold": HoldId("i" * 26)}, {"node": STRANGER}, {"job": JobId("k")}])
def test_vote_for_something_else_does_not_count(
    rules: RequestRules, signed: Sign, office: Office, changes: dict[str, object]
) -> None:
    spec, envelope = signed()
    wanted, _ = vote(office, spec, envelope, 0)
    _, other = vote(office, spec, envelope, 0, **changes)
    with pytest.raises(TrustError):
        rules.verify_ticket((other,), wanted, spec.stewards)


def test_vote_signed_by_another_node_does_not_count(
    rules: RequestRules, signed: Sign, office: Office, log: MeshLog
) -> None:
    spec, envelope = signed()
    wanted, _ = vote(office, spec, envelope, 0)
    forged = office.ring.forge(KeyId(spec.stewards[0]), wanted)
    with pytest.raises(TrustError):
        rules.verify_ticket((forged,), wanted, spec.stewards)
