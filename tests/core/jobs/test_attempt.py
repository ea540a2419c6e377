"""States of an attempt move forward."""

import pytest

from meshgpu.core.jobs.attempt import Attempt
from meshgpu.errors import BrokenInvariant
from meshgpu.model.ids import HoldId, NodeId
from meshgpu.model.job import ENDED_ATTEMPT_STATES, AttemptState, JobSpec
from meshgpu.model.trust import Signed


def attempt(make: tuple[JobSpec, Signed], state: AttemptState) -> Attempt:
    spec, signed = make
    return Attempt(spec, signed, 1, state, (), HoldId("h"), NodeId("n"), 0.0)


def test_attempt_never_goes_back(signed: object) -> None:
    running = attempt(signed(), AttemptState.RUNNING)  # type: ignore[operator]  # the fixture
    running.advance(AttemptState.EXITED)
    with pytest.raises(BrokenInvariant) as caught:
        running.advance(AttemptState.RUNNING)
    assert caught.value.story == ("running → exited", "exited → running")


@pytest.mark.parametrize("state", AttemptState)
def test_gpus_are_taken_until_no_process_lives(signed: object, state: AttemptState) -> None:
    assert attempt(signed(), state).occupies is (state not in ENDED_ATTEMPT_STATES)  # type: ignore[operator]


@pytest.mark.parametrize("state", sorted(ENDED_ATTEMPT_STATES - {AttemptState.DELIVERED}))
def test_every_ended_attempt_can_be_delivered(signed: object, state: AttemptState) -> None:
    ended = attempt(signed(), state)  # type: ignore[operator]
    ended.advance(AttemptState.DELIVERED)
    assert not ended.needs_telling
